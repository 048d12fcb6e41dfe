"""Packs the sequences of edits in batches of the shapes of a plan.

Axis letters as in `jaxedit.types`: E slots, B sequences, N packed tokens, K
chunks an edit, P' prefix tokens of all sequences, O output tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import flax
import numpy as np

from jaxedit.batching import packer
from jaxedit.batching.plan import (
    BatchPlan,
    BatchShape,
    prompt_ids,
    sequence_spans,
)
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, OutputTokens, PackedSequences, TokenLayout


@flax.struct.dataclass
class PackedBatch:
  """Tokens of some edits after their shared prefixes, end to end.

  Attributes:
    edit: [E] int32 index of the edit in a slot, or -1.
    context: [B] int32 context of a sequence, which is also its shared prefix.
    tokens: [1, N] int32.
    rows: the sequences, B = E * (sequences an edit).
    anchor: [E, sequences an edit] int32 packed index of the first anchor; of
      `pack_prompts` [B, K], of every chunk's anchor; N where there is none.
    prefix: the tokens before the anchor as packed sequences; None where they
      are not needed separately.
  """

  edit: Array
  context: Array
  tokens: Array
  rows: PackedSequences
  anchor: Array
  prefix: OutputTokens | None


def pack_shared_prefix(plan: BatchPlan) -> tuple[np.ndarray, TokenLayout]:
  """Makes sequences of the shared prefixes; that of the KL prompt is empty.

  Args:
    plan: of the run.

  Returns:
    ([sequences an edit, P] int32 tokens, their layout).
  """
  return packer.pad(plan.shared_prefix, (plan.rows, plan.shared))


def pack_edits(
    edits: Sequence[EncodedEdit],
    order: Sequence[int],
    plan: BatchPlan,
    batch_shape: BatchShape,
) -> Iterator[PackedBatch]:
  """Packs whole sequences of edits, in order, one shard after the other.

  Args:
    edits: the batch.
    order: those to lay out, as indices.
    plan: of the run.
    batch_shape: of the plan, the one that the edits belong to.

  Yields:
    Packed batches.
  """
  spans = [list(sequence_spans(edits[i], plan.shared_prefix)) for i in order]
  loads = [
      (sum(len(ids) for ids, _, _ in one), sum(cut for _, _, cut in one))
      for one in spans
  ]
  shape, (tokens, length) = batch_shape.prefill_shape, batch_shape.prefix_shape
  slots, *limits = (
      n // batch_shape.shards for n in (*shape[:2], tokens)
  )  # of a shard
  parts = packer.groups(loads, limits, most=slots)
  while batch := list(itertools.islice(parts, batch_shape.shards)):
    part = slice(batch[0].start, batch[-1].stop)
    at = [np.arange(one.stop - one.start) for one in batch]
    at = np.concatenate([d * slots + x for d, x in enumerate(at)])
    sequences = [sequence for one in spans[part] for sequence in one]
    packed, cut = _pack(
        sequences,
        order[part],
        shape,
        width=plan.rows,
        at=at,
        shards=batch_shape.shards,
    )
    begin = np.zeros_like(cut)
    prefix = packer.select(packed.rows, begin, cut, width=length, budget=tokens)
    yield packed.replace(prefix=prefix)


def pack_prompts(
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    *,
    plain: bool,
    text: bool = False,
) -> Iterator[PackedBatch]:
  """Packs prompts up to the last anchor, one sequence a slot, no KL prompts.

  Args:
    edits: the batch.
    plan: of the run.
    plain: the plain prompts, or those of all other contexts.
    text: continue to the end of the target text.

  Yields:
    Packed batches.
  """
  contexts = range(1) if plain else range(1, plan.contexts)
  wanted = [(i, c) for i in range(len(edits)) for c in contexts]
  starts = [len(plan.shared_prefix[c]) for _, c in wanted]
  sequences = [
      (prompt_ids(edits[i], c, text)[start:], start, 0)
      for (i, c), start in zip(wanted, starts)
  ]
  shape = plan.prompts.text if text else plan.prompts.upto
  loads = [(len(ids),) for ids, _, _ in sequences]
  for part in packer.groups(loads, shape[1:2], most=shape[0]):
    numbers = [i for i, _ in wanted[part]]
    packed, _ = _pack(sequences[part], numbers, shape, width=1)
    context = np.zeros([shape[0]], np.int32)
    anchor = np.full([shape[0], plan.stages], shape[1], np.int32)
    for slot, ((i, c), start) in enumerate(zip(wanted[part], starts[part])):
      context[slot] = c
      for k in range(edits[i].stages):
        column = edits[i].stage(k, c).anchor - start
        anchor[slot, k] = packed.rows.index[slot, column]
    yield packed.replace(context=context, anchor=anchor)


def _pack(
    sequences: Sequence[tuple[np.ndarray, int, int]],
    numbers: Sequence[int],
    shape: tuple[int, int, int],
    *,
    width: int,
    at: np.ndarray | None = None,
    shards: int = 1,
) -> tuple[PackedBatch, np.ndarray]:
  """Packs (ids, first position, index of the anchor) of some edits.

  Args:
    sequences: those of all edits, in order.
    numbers: of the edits.
    shape: (E, N, T).
    width: sequences an edit.
    at: slots of the edits, ascending; the first ones unless given.
    shards: into which slots and tokens are divided.

  Returns:
    (the batch, [B] tokens before the anchor).
  """
  slots, token_budget, length = shape
  at = np.arange(len(numbers)) if at is None else at
  start, count, cut = np.zeros([3, slots * width], np.int32)
  used = (at[:, None] * width + np.arange(width)).reshape(-1)
  for r, (ids, first, before) in zip(used, sequences):
    start[r], count[r], cut[r] = first, len(ids), before
  rows = packer.end_to_end(
      start, count, width=length, token_budget=token_budget, shards=shards
  )
  tokens = np.zeros([1, token_budget], np.int32)
  tokens[0, rows.index[rows.index < token_budget]] = np.concatenate(
      [ids for ids, _, _ in sequences]
  )
  rows = packer.with_sources(rows, tokens)
  edit = np.full([slots], -1, np.int32)
  edit[at] = numbers
  anchor = np.where(count, rows.index[:, 0] + cut, token_budget)
  context = np.arange(slots * width, dtype=np.int32) % width
  batch = PackedBatch(
      edit,
      context,
      tokens,
      rows,
      anchor.reshape(slots, width).astype(np.int32),
      None,
  )
  return batch, cut
