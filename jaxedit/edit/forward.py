"""The one door through which an edited model is run.

Evaluation and serving call these functions and never ask which method made the
edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxedit.models import decode, decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import Array, Columns, Edited, Params

UNEDITED = Edited()


def hidden(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    tokens: Array,
    columns: Columns,
) -> Array:
  """Runs an edited model up to its last block.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: the change; with a row axis in its factors every row of the batch
      is a model of its own.
    tokens: [B, T] int32.
    columns: [B, T] columns.

  Returns:
    [B, T, D] residual, ready for `decoder.logits` or `decoder.label_logprob`.
  """
  h = decoder.embed(spec, params, tokens, columns)
  h, _ = decoder.run_layers(
      spec,
      params,
      h,
      columns,
      start=0,
      stop=spec.layers,
      deltas=edited.deltas,
  )
  return h


def forward(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    tokens: Array,
    columns: Columns,
) -> Array:
  """Computes the logits of an edited model; see `hidden`.

  Returns:
    [B, T, V] logits, f32 or wider.
  """
  h = hidden(spec, params, edited, tokens, columns)
  return decoder.logits(spec, params, h)


def generate(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    prompts: Sequence[Sequence[int]],
    **settings: Any,
) -> list[list[int]]:
  """Continues prompts with an edited model; see `decode.generate`."""
  return decode.generate(
      spec, params, prompts, deltas=edited.deltas, **settings
  )
