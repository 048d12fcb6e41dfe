"""How far a change at one token moves a long target.

The state of one token (the anchor, the last one before the target) is pushed in a
random direction after layer l,

  h' = h + size |h| u,   |u| = 1

and the log-probability of every token of the target is read again. Where the
reach is short, one state cannot hold a long text, which is why AnyEdit writes it
chunk by chunk.

Axis letters: n pushes, K target tokens; the others as in `jaxedit.types`.

Source: Jiang et al. 2025 (AnyEdit, arXiv 2502.05628), section 3: the efficacy
barrier of single-token editing. The measure is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.trace import grid_cells as cells_lib
from jaxedit.trace import partial_run
from jaxedit.trace.grid_cells import PackedBatch
from jaxedit.trace.groups import padded
from jaxedit.trace.restoration import HIDDEN
from jaxedit.types import Array, Params, Progress, silent

_STEP = 16


class Text(NamedTuple):
  """A prompt with its target.

  Attributes:
    ids: [T] int32.
    start: first token of the target, at least 1.
  """

  ids: np.ndarray
  start: int


class Reach(NamedTuple):
  """What pushes did to the target of one text.

  Attributes:
    logprob: [K] of the unchanged model, nats.
    moved: [layers, K] mean over pushes of |change of the log-probability|.
    change: [layers, K] mean over pushes of the change itself.
  """

  logprob: np.ndarray
  moved: np.ndarray
  change: np.ndarray


def reach(
    spec: ModelSpec,
    params: Params,
    texts: Sequence[Text],
    *,
    layers: Sequence[int],
    size: float = 0.5,
    pushes: int = 4,
    seed: int = 0,
    pieces: Any = None,
    progress: Progress = silent,
) -> list[Reach]:
  """Pushes the anchors of texts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    texts: prompts with their targets.
    layers: layers after which to push, ascending, below the last.
    size: length of a push, as a share of the state's.
    pushes: n.
    seed: of the directions, the same for all texts and layers.
    pieces: keeps the result of each text, so that an interrupted run can resume,
      such as `runs.cache.ArrayFiles`; None for nothing.
    progress: told of texts.

  Returns:
    One result a text.

  Raises:
    ValueError: texts without prompt or target, or layers there are none of.
  """
  _check(spec, texts, layers)
  draw = np.random.default_rng(seed).standard_normal((pushes, spec.width))
  draw = size * draw / np.linalg.norm(draw, axis=-1, keepdims=True)
  found = []
  with progress('reach', len(texts), 'text') as done:
    for text in texts:
      about = ('reach', text.ids, text.start, list(layers), draw)
      saved = pieces and pieces.load(*about)
      if saved:
        one = Reach(**saved)
      else:
        one = _reach(spec, params, text, layers, draw.astype(np.float32))
        if pieces:
          pieces.save(one._asdict(), *about)
      found.append(one)
      done(1)
  return found


def _check(
    spec: ModelSpec, texts: Sequence[Text], layers: Sequence[int]
) -> None:
  wrong = [layer for layer in layers if not 0 <= layer < spec.layers - 1]
  if wrong or not layers:
    raise ValueError(
        f'layers {list(layers)}: give some of 0 to {spec.layers - 2}; the last'
        ' one moves no other token'
    )
  for number, text in enumerate(texts):
    if not 0 < text.start < len(text.ids):
      raise ValueError(
          f'text {number}: its target starts at token {text.start} of'
          f' {len(text.ids)}; a prompt and a target are needed'
      )


def _reach(
    spec: ModelSpec,
    params: Params,
    text: Text,
    layers: Sequence[int],
    draw: np.ndarray,
) -> Reach:
  """Pushes one text's anchor."""
  ids, labels = text.ids[:-1], text.ids[text.start :]
  pushes, count = len(draw), len(labels)
  width = -(-len(ids) // _STEP) * _STEP
  scored_width = min(-(-count // _STEP) * _STEP, width)
  tokens, valid = padded([ids], 1, width)
  column = np.minimum(text.start - 1 + np.arange(scored_width), len(ids) - 1)
  wanted = np.pad(labels, (0, scored_width - count))[None]
  noise = np.zeros((1, pushes, width, spec.width), np.float32)
  found = partial_run.tables(
      spec, params, tokens, valid, noise,
      corrupted=np.zeros_like(valid), scored=column[None], labels=wanted,
      mode='add', parts=partial_run.parts_of((HIDDEN,)), entries=False,
  )  # fmt: skip
  shape = cells_lib.Shape(
      pushes, pushes * scored_width, scored_width, scored_width
  )
  outs = []
  for layer in layers:
    at = np.full(pushes, text.start - 1, np.int32)
    same = np.full(pushes, layer, np.int32)
    rows = cells_lib.GridCells(
        np.zeros(pushes, np.int32), np.arange(pushes), at, same, same, same + 1
    )
    packed = cells_lib.packed(
        rows, shape, lengths=np.array([len(ids)]), labels=[labels], draws=pushes
    )
    outs.append(_pushed(spec, params, found, packed, draw))
  logprob = fetch(found.high, np.float64)[0, :count]
  size = pushes * count
  pushed = np.stack([fetch(out, np.float64)[:size] for out in outs])
  change = pushed.reshape(len(layers), pushes, count) - logprob
  return Reach(logprob, np.abs(change).mean(1), change.mean(1))


@functools.partial(jax.jit, static_argnames=('spec',))
def _pushed(
    spec: ModelSpec,
    params: Params,
    found: partial_run.Tables,
    packed: PackedBatch,
    push: Array,
) -> Array:
  """[K] log-probability of the labels where first columns are pushed."""
  h = found.base['block'][packed.entry, packed.cell_ids, packed.token]
  length = jnp.linalg.norm(h, axis=-1, keepdims=True)
  return partial_run.run_rows(spec, params, found, packed, h + length * push)
