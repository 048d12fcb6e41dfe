"""Keeps track of who sits where in a room.

Axis letters as in `shapes`: E slots, C contexts, R rows, N places, P columns before
a suffix, K scored places, n labels of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import flax
import numpy as np

from jaxedit.batching import (
    packer,
)
from jaxedit.batching import (
    plan as plan_lib,
)
from jaxedit.batching.plan import (
    BatchPlan,
    BatchShape,
)
from jaxedit.text.encoding import (
    EncodedEdit,
    Stage,
)
from jaxedit.types import (
    SHARED,
    Array,
    OutputTokens,
    PackedSequences,
    TokenLayout,
)


@flax.struct.dataclass
class SlotLayout:
  """Who sits where in a room.

  Attributes:
    rows: suffix columns, R rows on N places.
    before: [R, P] columns of earlier keys and values: trunk, own, done chunks.
    outputs: the K scored places, then one a slot for its KL row.
    anchor: [E, rows] int32 place of the anchor; N where there is none.
    pick: [E, C, n] int32 scored place of a label; K where there is none.
    label: [K] int32 token that should follow a scored place.
    live: [E] bool, slots whose edit has its places.
  """

  rows: PackedSequences
  before: TokenLayout
  outputs: OutputTokens
  anchor: Array
  pick: Array
  label: Array
  live: Array


class Compaction(NamedTuple):
  """How everybody moves to another room.

  Attributes:
    allocator: of the new shape.
    slots: [E] int32 old slot of a new one; past the end for a free one.
    tokens: [N] int32 old token of a new one, likewise.
  """

  allocator: SlotAllocator
  slots: np.ndarray
  tokens: np.ndarray


class SlotAllocator:
  """Keeps track of who sits where in one room.

  Attributes:
    held: (edit, stage) in every slot, or None.
  """

  def __init__(self, plan: BatchPlan, batch_shape: BatchShape):
    slots, rows = batch_shape.slots, plan.rows
    count = slots * rows
    self._plan, self._batch_shape = plan, batch_shape
    self.held: list[tuple[EncodedEdit, int] | None] = [None] * slots
    self._places = list(range(batch_shape.token_budget))[::-1]
    self._scored = list(range(batch_shape.logit_budget))[::-1]
    self._rows = packer.Packer(
        count, batch_shape.length, batch_shape.token_budget
    )
    # Scored places come first, then one a slot for its KL row.
    kept = batch_shape.logit_budget + (slots if plan.kl else 0)
    self._keep = np.full([kept], batch_shape.token_budget, np.int32)
    self._asking = packer.Packer(count, batch_shape.labels, kept)
    layout = plan.shared + batch_shape.prefix_shape[1] + batch_shape.grow
    self._before = np.zeros([2, count, layout], np.int32)
    self._anchor = np.full([slots, rows], batch_shape.token_budget, np.int32)
    self._pick = np.full(
        [slots, plan.contexts, batch_shape.labels],
        batch_shape.logit_budget,
        np.int32,
    )
    self._label = np.zeros([batch_shape.logit_budget], np.int32)
    self._grown = [0] * slots

  @property
  def free_slot(self) -> int | None:
    """A free slot, if there is one."""
    return self.held.index(None) if None in self.held else None

  def fits(self, edit: EncodedEdit, k: int = 0) -> bool:
    """Says whether a stage finds enough places."""
    places, scored = plan_lib.stage_load(edit, k)
    return places <= len(self._places) and scored <= len(self._scored)

  def assign(self, slot: int, edit: EncodedEdit, k: int) -> np.ndarray:
    """Assigns a stage of an edit.

    Args:
      slot: a free one.
      edit: the edit; it must fit.
      k: number of the stage.

    Returns:
      [rows, W] int32 places of its columns from the anchor on; N elsewhere.
    """
    plan = self._plan
    self.held[slot] = (edit, k)
    base = slot * plan.rows
    for c in range(plan.contexts):
      stage = edit.stage(k, c)
      self._assign_sequence(slot, c, stage.anchor, stage.end - stage.anchor)
      self._assign_outputs(slot, c, stage)
    if plan.kl and k == 0:
      self._assign_sequence(slot, plan.contexts, len(edit.kl) - 1, 1)
      place = len(self._label) + slot
      self._keep[place] = self._anchor[slot, -1]
      self._asking.put(
          base + plan.contexts, np.array([place]), len(edit.kl) - 1
      )
    if k == 0:
      self._grown[slot] = 0
      self._note_prefix(slot, edit)
    return self._rows.index[base : base + plan.rows].copy()

  def _assign_sequence(self, slot: int, c: int, start: int, count: int) -> None:
    """Takes places for one row."""
    places = np.array([self._places.pop() for _ in range(count)], np.int32)
    self._rows.put(slot * self._plan.rows + c, places, start)
    self._anchor[slot, c] = places[0]

  def _assign_outputs(self, slot: int, c: int, stage: Stage) -> None:
    """Takes scored places for the labels of one row."""
    row = slot * self._plan.rows + c
    count = len(stage.labels)
    kept = np.array([self._scored.pop() for _ in range(count)], np.int32)
    offset = stage.first - stage.anchor
    self._keep[kept] = self._rows.index[row, offset : offset + count]
    self._asking.put(row, kept, stage.first)
    self._label[kept] = stage.labels
    self._pick[slot, c, :count] = kept

  def _note_prefix(self, slot: int, edit: EncodedEdit) -> None:
    """Notes which earlier columns the rows of a new edit see."""
    plan = self._plan
    for c in range(plan.rows):
      positions, segment_ids = self._before[:, slot * plan.rows + c]
      shared_prefix = len(plan.shared_prefix[c]) if c < plan.contexts else 0
      anchor = edit.anchors[c] if c < plan.contexts else len(edit.kl) - 1
      for at, begin, end in (
          (0, 0, shared_prefix),
          (plan.shared, shared_prefix, anchor),
      ):
        positions[at : at + end - begin] = np.arange(begin, end)
        segment_ids[at : at + end - begin] = SHARED

  def next_chunk(self, slot: int) -> int:
    """Ends a stage whose edit has another one.

    The columns before the next anchor become earlier columns of the row.

    Args:
      slot: where the edit sits; its next stage can be seated there.

    Returns:
      The column of earlier keys and values from which this stage's belong.
    """
    edit, k = self.held[slot]
    plan = self._plan
    offset = plan.shared + self._batch_shape.prefix_shape[1] + self._grown[slot]
    counts = []
    for c in range(plan.contexts):
      begin, end = edit.stage(k, c).anchor, edit.stage(k + 1, c).anchor
      positions, segment_ids = self._before[:, slot * plan.rows + c]
      positions[offset : offset + end - begin] = np.arange(begin, end)
      segment_ids[offset : offset + end - begin] = SHARED
      counts.append(end - begin)
    self._grown[slot] += max(counts)
    self._release(slot)
    return offset

  def free(self, slot: int) -> None:
    """Frees a slot and its places."""
    self._release(slot)
    for c in range(self._plan.rows):
      self._before[:, slot * self._plan.rows + c] = 0
    self.held[slot] = None

  def _release(self, slot: int) -> None:
    plan, batch_shape = self._plan, self._batch_shape
    for c in range(plan.rows):
      row = slot * plan.rows + c
      self._places += self._rows.clear(row).tolist()
      kept = self._asking.clear(row)
      self._keep[kept] = batch_shape.token_budget
      self._scored += [int(i) for i in kept if i < batch_shape.logit_budget]
    self._anchor[slot] = batch_shape.token_budget
    self._pick[slot] = batch_shape.logit_budget

  def compact(self, batch_shape: BatchShape) -> Compaction | None:
    """Assigns everybody in a smaller room, if all their stages fit there.

    Args:
      batch_shape: `BatchShape.compacted`.

    Returns:
      The new seating and where its slots and places come from, or None.
    """
    seated = [slot for slot, held in enumerate(self.held) if held is not None]
    loads = np.array(
        [plan_lib.edit_load(self.held[slot][0]) for slot in seated]
    )
    places, scored = loads.sum(axis=0) if seated else (0, 0)
    if (
        len(seated) > batch_shape.slots
        or places > batch_shape.token_budget
        or scored > batch_shape.logit_budget
    ):
      return None
    other, rows = SlotAllocator(self._plan, batch_shape), self._plan.rows
    slots = np.full([batch_shape.slots], len(self.held), np.int32)
    source = np.full(
        [batch_shape.token_budget], self._batch_shape.token_budget, np.int32
    )
    for new, old in enumerate(seated):
      there = other.assign(new, *self.held[old])
      here = self._rows.index[old * rows : (old + 1) * rows]
      taken = there < batch_shape.token_budget
      source[there[taken]] = here[taken]
      slots[new] = old
      a, b = new * rows, old * rows
      other._before[:, a : a + rows] = self._before[:, b : b + rows]
      other._grown[new] = self._grown[old]
    return Compaction(other, slots, source)

  def layout(self) -> SlotLayout:
    """Who sits where now, in arrays of their own."""
    positions, segment_ids = self._before.copy()
    return SlotLayout(
        rows=self._rows.packing(),
        before=TokenLayout(positions, segment_ids),
        outputs=OutputTokens(self._keep.copy(), self._asking.packing()),
        anchor=self._anchor.copy(),
        pick=self._pick.copy(),
        label=self._label.copy(),
        live=self._anchor[:, 0] < self._batch_shape.token_budget,
    )
