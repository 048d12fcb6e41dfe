"""Fills tiles: own columns of some edits, end to end, in one static shape.

Axis letters as in `shapes`: E slots, R rows, N places, K states of an edit.
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
  """Own columns of some edits, end to end.

  Attributes:
    edit: [E] int32 index of the edit in a slot, or -1.
    context: [R] int32 number of a row's context, and of its trunk.
    tokens: [1, N] int32.
    rows: R = E * rows rows.
    anchor: [E, rows] int32 place of the first anchor, in `pack_prompts` [R, K] of
      every state's; N where there is none.
    prefix: the places left of the anchor, as rows of their own; None where they
      are not needed apart.
  """

  edit: Array
  context: Array
  tokens: Array
  rows: PackedSequences
  anchor: Array
  prefix: OutputTokens | None


class Packer:
  """Rows that are being laid out."""

  def __init__(self, rows: int, width: int, places: int):
    self.index = np.full([rows, width], places, np.int32)
    self.positions = np.zeros([rows, width], np.int32)
    self.segment_ids = np.full([rows, width], PADDING, np.int32)
    self.row = np.full([places], rows, np.int32)
    self.column = np.zeros([places], np.int32)

  def put(self, row: int, places: np.ndarray, start: int) -> None:
    """Lets a row consist of these places, from a position on."""
    layout = np.arange(len(places), dtype=np.int32)
    self.index[row, : len(places)] = places
    self.positions[row, : len(places)] = start + layout
    self.segment_ids[row, : len(places)] = SHARED
    self.row[places] = row
    self.column[places] = layout

  def clear(self, row: int) -> np.ndarray:
    """Empties a row and returns its places."""
    used = self.segment_ids[row] != PADDING
    places = self.index[row, used]
    self.index[row] = len(self.row)
    self.positions[row] = 0
    self.segment_ids[row] = PADDING
    self.row[places] = len(self.index)
    self.column[places] = 0
    return places

  def packing(self) -> PackedSequences:
    """The rows as they are now."""
    layout = TokenLayout(self.positions.copy(), self.segment_ids.copy())
    copies = (x.copy() for x in (self.index, self.row, self.column))
    return PackedSequences(layout, *copies)


def pack_shared_prefix(plan: BatchPlan) -> tuple[np.ndarray, TokenLayout]:
  """The trunks as rows; the KL row's is empty.

  Args:
    plan: of the run.

  Returns:
    ([rows, s] int32 tokens, their columns).
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
  """Yields tiles of whole rows, in order.

  Args:
    edits: the batch.
    order: those to lay out, as indices.
    plan: of the run.
    batch_shape: which the edits belong to.
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
    yield _tile(
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
  """Yields tiles of columns up to the last anchor, a slot a row, no KL rows.

  Args:
    edits: the batch.
    plan: of the run.
    plain: the first context alone, or all others.
    text: go on to the end of the target.
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
    packed = _tile(chosen, 1, shape, None)
    anchor = np.full([shape[0], plan.stages], shape[1], np.int32)
    for slot, r in enumerate(group):
      i, c, _ = rows[r]
      layout = [edits[i].stage(k, c).anchor for k in range(edits[i].stages)]
      layout = np.array(layout) - len(plan.shared_prefix[c])
      anchor[slot, : len(layout)] = packed.rows.index[slot, layout]
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


def _tile(
    chosen: Sequence[tuple[int, list]],
    width: int,
    shape: tuple[int, int, int],
    left: tuple[int, int] | None,
) -> PackedBatch:
  """Fills one tile; `width` is the rows of an edit."""
  slots, places, layout = shape
  rows = Packer(slots * width, layout, places)
  tokens = np.zeros([1, places], np.int32)
  edit = np.full([slots], -1, np.int32)
  anchor = np.full([slots, width], places, np.int32)
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
  outputs = None if left is None else _cut(cuts, places, slots * width, left)
  context = np.tile(np.arange(width, dtype=np.int32), slots)
  return PackedBatch(edit, context, tokens, rows.packing(), anchor, outputs)


def _cut(
    cuts: Sequence[tuple[int, np.ndarray, int]],
    places: int,
    count: int,
    shape: tuple[int, int],
) -> OutputTokens:
  """Makes rows of their own of some places: (row, places, first position)."""
  kept = np.full([shape[0]], places, np.int32)
  rows = Packer(count, shape[1], shape[0])
  at = 0
  for row, here, start in cuts:
    there = np.arange(at, at + len(here), dtype=np.int32)
    rows.put(row, there, start)
    kept[there] = here
    at += len(here)
  return OutputTokens(kept, rows.packing())
