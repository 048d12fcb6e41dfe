"""Chooses the token budget of a run from the device and its free memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxedit.batching import plan as plan_lib
from jaxedit.batching.plan import BatchPlan
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import device_bytes
from jaxedit.text.encoding import EncodedEdit

# Suffix tokens a step that keep the matrix units busy; a larger budget only
# lengthens the phase in which the last edits leave it partly unused. A CPU
# copies each layer's weights once a step; a larger budget spreads that over
# more tokens, and a second compaction shortens the last phase. Both pay off
# where a batch fills the budget `_ROUNDS` times.
_TOKENS_CPU = 256
_TOKENS_CPU_MANY = 512
_ROUNDS = 2
_TOKENS_ACCELERATOR = 2048
_TOKENS_LEAST = 16
# Share of the free memory that the optimiser may use.
_MEMORY_SHARE = 0.6
# Paused activations that stay on an accelerator during insertion.
_RESIDENT_BYTES = 2 * 2**30


def plan_batches(
    model: Model,
    edits: Sequence[EncodedEdit],
    *,
    slots: int | None = None,
    batch: int | None = None,
    memory: float | None = None,
) -> BatchPlan:
  """Chooses the static shapes of a run from its edits and the free memory.

  Args:
    model: to edit; its placement says on what it runs.
    edits: all edits of the run.
    slots: edits optimised side by side; None for as many as are useful and fit
      in memory.
    batch: edits a batch at most; None if all are one batch.
    memory: bytes of a device's memory to use, weights included; None for all
      that is free.

  Returns:
    The plan.
  """
  accelerated = model.placement.accelerated
  token_budget, compactions = _TOKENS_ACCELERATOR, 1
  if not accelerated:
    most = min(batch or len(edits), len(edits))
    token_budget, compactions = _cpu_tokens(edits, most)
  free = [model.placement.budget_bytes]
  if memory is not None:
    free.append(memory - device_bytes(model.params))
  free = [x for x in free if x is not None]
  if free:
    share = _MEMORY_SHARE * min(free)
    affordable = max(_TOKENS_LEAST, int(share // _token_bytes(model.spec)))
    # A power of two, so that a little more or less memory changes no shape.
    token_budget = min(token_budget, 2 ** int(np.log2(affordable)))
  plan = plan_lib.plan_shapes(
      edits,
      slots=slots,
      batch=batch,
      token_budget=token_budget,
      compactions=compactions,
      shards=model.placement.batch_shards,
  )
  if not accelerated:
    return plan
  return dataclasses.replace(plan, resident_bytes=_RESIDENT_BYTES)


def _cpu_tokens(edits: Sequence[EncodedEdit], batch: int) -> tuple[int, int]:
  """(token budget, compactions) of a CPU, for batches of `batch` edits."""
  load = sum(int(plan_lib.edit_load(edit)[0]) for edit in edits)
  fills = load * batch >= len(edits) * _ROUNDS * _TOKENS_CPU_MANY
  return (_TOKENS_CPU_MANY, 2) if fills else (_TOKENS_CPU, 1)


def _token_bytes(spec: ModelSpec) -> int:
  """Bytes of memory that one suffix token takes, at most.

  The backward pass keeps the results of weight products, in f32. Keys and
  values of prefix tokens, f32 too, are counted as eight prefix tokens a suffix
  token, the average.
  """
  heads = spec.head_size * (spec.heads + 2 * spec.kv_heads)
  products = heads + 3 * spec.width + (2 + spec.gated) * spec.mlp_width
  earlier = 8 * 2 * spec.kv_heads * spec.head_size
  return 4 * spec.layers * (products + earlier) + 8 * spec.vocab
