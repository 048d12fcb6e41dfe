"""Lays the sequences of edits end to end in packed batches of one static shape.

Axis letters as in `jaxedit.types`: E slots, B sequences, N packed tokens, K
chunks an edit, P' prefix tokens of all sequences, O output tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import flax
import numpy as np

from jaxedit.batching import plan as plan_lib
from jaxedit.batching.plan import (
    BatchPlan,
    BatchShape,
)
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import (
    PADDING,
    SHARED,
    Array,
    OutputTokens,
    PackedSequences,
    TokenLayout,
)


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


class Packer:
  """Packed sequences under construction."""

  def __init__(self, rows: int, width: int, token_budget: int):
    self.index = np.full([rows, width], token_budget, np.int32)
    self.positions = np.zeros([rows, width], np.int32)
    self.segment_ids = np.full([rows, width], PADDING, np.int32)
    self.row = np.full([token_budget], rows, np.int32)
    self.column = np.zeros([token_budget], np.int32)

  def put(self, row: int, index: np.ndarray, start: int) -> None:
    """Makes a sequence of the packed tokens `index`, from position `start`."""
    column = np.arange(len(index), dtype=np.int32)
    self.index[row, : len(index)] = index
    self.positions[row, : len(index)] = start + column
    self.segment_ids[row, : len(index)] = SHARED
    self.row[index] = row
    self.column[index] = column

  def clear(self, row: int) -> np.ndarray:
    """Removes a sequence and returns the packed indices of its tokens."""
    used = self.segment_ids[row] != PADDING
    index = self.index[row, used]
    self.index[row] = len(self.row)
    self.positions[row] = 0
    self.segment_ids[row] = PADDING
    self.row[index] = len(self.index)
    self.column[index] = 0
    return index

  def packing(self) -> PackedSequences:
    """A copy of the sequences as they are now."""
    layout = TokenLayout(self.positions.copy(), self.segment_ids.copy())
    copies = (x.copy() for x in (self.index, self.row, self.column))
    return PackedSequences(layout, *copies)


def pack_shared_prefix(plan: BatchPlan) -> tuple[np.ndarray, TokenLayout]:
  """Makes sequences of the shared prefixes; that of the KL prompt is empty.

  Args:
    plan: of the run.

  Returns:
    ([sequences an edit, P] int32 tokens, their layout).
  """
  tokens = np.zeros([plan.rows, plan.shared], np.int32)
  segment_ids = np.full(tokens.shape, PADDING, np.int32)
  for c, ids in enumerate(plan.shared_prefix):
    tokens[c, : len(ids)] = ids
    segment_ids[c, : len(ids)] = SHARED
  positions = np.where(segment_ids, np.arange(plan.shared, dtype=np.int32), 0)
  return tokens, TokenLayout(positions.astype(np.int32), segment_ids)


def pack_edits(
    edits: Sequence[EncodedEdit],
    order: Sequence[int],
    plan: BatchPlan,
    batch_shape: BatchShape,
) -> Iterator[PackedBatch]:
  """Packs whole sequences of edits, in order.

  Args:
    edits: the batch.
    order: those to lay out, as indices.
    plan: of the run.
    batch_shape: of the plan, the one that the edits belong to.

  Yields:
    Packed batches.
  """
  spans = {
      i: list(plan_lib.sequence_spans(edits[i], plan.shared_prefix))
      for i in order
  }
  limits = (batch_shape.prefill_shape[1], batch_shape.prefix_shape[0])
  load = lambda i: (
      sum(len(ids) for ids, _, _ in spans[i]),
      sum(cut for _, _, cut in spans[i]),
  )
  for chosen in _groups(order, load, batch_shape.prefill_shape[0], limits):
    yield _packed_batch(
        [(i, spans[i]) for i in chosen],
        plan.rows,
        batch_shape.prefill_shape,
        batch_shape.prefix_shape,
    )


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
  rows = [
      (i, c, plan_lib.prompt_ids(edit, c, text))
      for i, edit in enumerate(edits)
      for c in (range(1) if plain else range(1, plan.contexts))
  ]
  shape = plan.prompts.text if text else plan.prompts.upto
  load = lambda r: (len(rows[r][2]) - len(plan.shared_prefix[rows[r][1]]),)
  for group in _groups(range(len(rows)), load, shape[0], shape[1:2]):
    chosen, context = [], np.zeros([shape[0]], np.int32)
    for slot, r in enumerate(group):
      i, c, ids = rows[r]
      start = len(plan.shared_prefix[c])
      chosen.append((i, [(ids[start:], start, 0)]))
      context[slot] = c
    packed = _packed_batch(chosen, 1, shape, None)
    anchor = np.full([shape[0], plan.stages], shape[1], np.int32)
    for slot, r in enumerate(group):
      i, c, _ = rows[r]
      anchors = [edits[i].stage(k, c).anchor for k in range(edits[i].stages)]
      anchors = np.array(anchors) - len(plan.shared_prefix[c])
      anchor[slot, : len(anchors)] = packed.rows.index[slot, anchors]
    yield packed.replace(context=context, anchor=anchor)


def _groups(
    order: Sequence[int],
    load: Callable[[int], tuple[int, ...]],
    slots: int,
    limits: tuple[int, ...],
) -> Iterator[list[int]]:
  """Cuts a sequence where the next edit would not fit."""
  group: list[int] = []
  total = np.zeros(len(limits), int)
  for i in order:
    size = np.array(load(i))
    if group and (len(group) == slots or (total + size > limits).any()):
      yield group
      group, total = [], np.zeros(len(limits), int)
    group.append(i)
    total += size
  if group:
    yield group


def _packed_batch(
    chosen: Sequence[tuple[int, list]],
    width: int,
    shape: tuple[int, int, int],
    left: tuple[int, int] | None,
) -> PackedBatch:
  """Makes one packed batch; `width` is the number of sequences an edit."""
  slots, token_budget, length = shape
  rows = Packer(slots * width, length, token_budget)
  tokens = np.zeros([1, token_budget], np.int32)
  edit = np.full([slots], -1, np.int32)
  anchor = np.full([slots, width], token_budget, np.int32)
  cuts = []
  at = 0
  for e, (i, spans) in enumerate(chosen):
    edit[e] = i
    for c, (ids, start, cut) in enumerate(spans):
      here = np.arange(at, at + len(ids), dtype=np.int32)
      rows.put(e * width + c, here, start)
      tokens[0, here] = ids
      anchor[e, c] = at + cut
      cuts.append((e * width + c, here[:cut], start))
      at += len(ids)
  outputs = None
  if left is not None:
    outputs = _cut(cuts, token_budget, slots * width, left)
  context = np.arange(slots * width, dtype=np.int32) % width
  return PackedBatch(edit, context, tokens, rows.packing(), anchor, outputs)


def _cut(
    cuts: Sequence[tuple[int, np.ndarray, int]],
    token_budget: int,
    count: int,
    shape: tuple[int, int],
) -> OutputTokens:
  """Makes sequences of the cuts (sequence, packed indices, first position)."""
  kept = np.full([shape[0]], token_budget, np.int32)
  rows = Packer(count, shape[1], shape[0])
  at = 0
  for row, here, start in cuts:
    there = np.arange(at, at + len(here), dtype=np.int32)
    rows.put(row, there, start)
    kept[there] = here
    at += len(here)
  return OutputTokens(kept, rows.packing())
