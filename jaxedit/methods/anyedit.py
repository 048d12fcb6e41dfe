"""AnyEdit: any method on targets of any length, chunk by chunk.

A target is cut into chunks. The hidden state of a chunk stands on the token before
it, and is optimised with the changes of earlier chunks in force, so that the model
predicts the chunk; all of them are inserted in one update. The other tokens of the
text are preserved keys.

Source: Jiang et al. 2025, "AnyEdit: Edit Any Knowledge Encoded in Language
Models" (arXiv 2502.05628), section 4; preserved keys as in its code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxedit.batching.buckets import round_up
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.text.chunking import Chunking, check_chunking, surprise_spans
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, Params

Config = TypeVar('Config', bound=Any)


def anyedit(
    config: Config, window: int = 40, overlap: int = 0, boundary: str = 'window'
) -> Config:
  """Makes a method edit long targets.

  Args:
    config: of a method that is chunkable.
    window: tokens a chunk (published 40 for Llama-3, 50 for Qwen2.5).
    overlap: tokens that a chunk shares with the one before it.
    boundary: 'window'; 'sentence' to end chunks where sentences, lines of code
      or verse end; or 'surprise' to begin them where the unedited model expects
      the text least (`cut`).

  Returns:
    The config, for texts of `text.passages`.

  Raises:
    InputError: a window or overlap that cannot be.
  """
  chunks = Chunking(window, overlap, boundary)
  check_chunking(chunks)
  return dataclasses.replace(config, chunks=chunks, anchor='prompt_last')


def cut(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    chunking: Chunking | None,
) -> tuple[EncodedEdit, ...]:
  """Cuts targets where that takes the model.

  Args:
    spec: the architecture.
    params: of the unedited model.
    edits: encoded with `chunking`.
    chunking: how; None for no chunks.

  Returns:
    The edits, as they are unless chunks begin at surprises.
  """
  if chunking is None or chunking.boundary != 'surprise':
    return tuple(edits)
  found = []
  for edit in edits:
    spans = surprise_spans(surprise(spec, params, edit), chunking.window)
    chunks = spans if len(spans) > 1 else ()
    found.append(dataclasses.replace(edit, chunks=chunks))
  return tuple(found)


def surprise(spec: ModelSpec, params: Params, edit: EncodedEdit) -> np.ndarray:
  """Computes -log p of every target token after the plain prompt, nats [n]."""
  text = edit.text(0)
  width = round_up(len(text))
  tokens, labels = np.zeros((2, 1, width), np.int32)
  first = len(edit.rows[0]) - 1
  tokens[0, : len(text)] = text
  labels[0, first : first + len(edit.target)] = edit.target
  logprob = fetch(_logprob(spec, params, tokens, labels, len(text)))
  return -logprob[0, first : first + len(edit.target)]


@functools.partial(jax.jit, static_argnames='spec')
def _logprob(
    spec: ModelSpec, params: Params, tokens: Array, labels: Array, length: Array
) -> Array:
  """Log-probabilities [1, T] of labels, each after the token at its place."""
  valid = np.arange(tokens.shape[1])[None] < length
  layout = decoder.token_layout(valid)
  h = decoder.embed(spec, params, tokens, layout)
  h, _ = decoder.run_layers(spec, params, h, layout, start=0, stop=spec.layers)
  return decoder.label_logprob(spec, params, h, labels)[0]
