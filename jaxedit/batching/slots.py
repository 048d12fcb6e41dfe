"""Continuous batching: who has which slot, and the loop that runs it.

A running batch has a fixed number of slots. An engine (`targets.scheduler` for
edits, `models.decode` for texts) holds its explicit state on the device and
works by the same words, of which `run` is the loop:

  prefill   runs once what stays constant for waiting items, a batch at a time
  assign    moves prefilled items to free slots of the running batch
  step      runs the batch until an item may be done
  free      gives the slot of an item that is done to the next one

`SlotAllocator` also allocates the tokens and logits of a batch shape to edits,
as these share one packed axis; a text has a row of the cache to itself.

Axis letters as in `jaxedit.types`: E slots, C contexts, B sequences, N token
budget, P prefix tokens, S suffix tokens, O logit budget, O' labels of a
sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import flax
import numpy as np

from jaxedit.batching import packer
from jaxedit.batching import plan as plan_lib
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
  """Which edit has which slot, and how its tokens lie in the batch.

  Attributes:
    rows: the suffixes, B sequences on N packed tokens.
    before: [B, P] layout of the prefix: shared prefix, own tokens, finished
      chunks.
    outputs: the O scored tokens, then one a slot for its KL prompt.
    anchor: [E, sequences an edit] int32 packed index of the anchor; N where
      there is none.
    pick: [E, C, O'] int32 scored token of a label; O where there is none.
    label: [O] int32 token that should follow a scored one.
    live: [E] bool, slots whose edit has tokens assigned.
  """

  rows: PackedSequences
  before: TokenLayout
  outputs: OutputTokens
  anchor: Array
  pick: Array
  label: Array
  live: Array


class SlotEngine(Protocol):
  """Items that run side by side in slots."""

  def fill(self) -> bool:
    """Prefills waiting items and assigns them to free slots, as far as they fit.

    Returns:
      Whether any slot has an item.
    """

  def step(self) -> Iterable[tuple[int, Any]]:
    """Runs the batch; returns (slot, result) of every item that is done."""

  def free(self, slot: int) -> None:
    """Frees the slot of an item that is done."""


def run(engine: SlotEngine) -> Iterator[list[Any]]:
  """Runs an engine until no item is left; yields the results of every step."""
  while engine.fill():
    done = list(engine.step())
    for slot, _ in done:
      engine.free(slot)
    yield [result for _, result in done]


class Slots:
  """Who has which slot of a batch.

  Attributes:
    assigned: the item of every slot, or None.
  """

  def __init__(self, count: int):
    self.assigned: list[Any] = [None] * count

  @property
  def free_slot(self) -> int | None:
    """The first free slot, if there is one."""
    return self.assigned.index(None) if None in self.assigned else None

  @property
  def active(self) -> list[int]:
    """Slots that have an item."""
    return [i for i, item in enumerate(self.assigned) if item is not None]

  def free(self, slot: int) -> None:
    """Frees a slot."""
    self.assigned[slot] = None

  def compacted(self, count: int) -> np.ndarray:
    """[count] int32 old slot of a new one; past the end for a free one."""
    active = self.active
    free = [len(self.assigned)] * (count - len(active))
    return np.array([*active, *free], np.int32)


class Compaction(NamedTuple):
  """How the edits move to a smaller batch shape.

  Attributes:
    allocator: of the new shape.
    slots: [E] int32 old slot of a new one; past the end for a free one.
    tokens: [N] int32 old packed index of a new one, likewise.
  """

  allocator: SlotAllocator
  slots: np.ndarray
  tokens: np.ndarray


class SlotAllocator(Slots):
  """Allocates the slots, tokens and logits of one batch shape.

  Attributes:
    assigned: (edit, number of its chunk) of every slot, or None.
  """

  assigned: list[tuple[EncodedEdit, int] | None]

  def __init__(self, plan: BatchPlan, batch_shape: BatchShape):
    slots, rows = batch_shape.slots, plan.rows
    super().__init__(slots)
    count = slots * rows
    self._plan, self._batch_shape = plan, batch_shape
    self._tokens = list(range(batch_shape.token_budget))[::-1]
    self._scored = list(range(batch_shape.logit_budget))[::-1]
    self._rows = packer.Packer(
        count, batch_shape.length, batch_shape.token_budget
    )
    # Scored tokens come first, then one a slot for its KL prompt.
    kept = batch_shape.logit_budget + (slots if plan.kl else 0)
    self._keep = np.full([kept], batch_shape.token_budget, np.int32)
    self._asking = packer.Packer(count, batch_shape.labels, kept)
    length = plan.shared + batch_shape.prefix_shape[1] + batch_shape.grow
    self._before = np.zeros([2, count, length], np.int32)
    self._anchor = np.full([slots, rows], batch_shape.token_budget, np.int32)
    self._pick = np.full(
        [slots, plan.contexts, batch_shape.labels],
        batch_shape.logit_budget,
        np.int32,
    )
    self._label = np.zeros([batch_shape.logit_budget], np.int32)
    self._grown = [0] * slots

  def fits(self, edit: EncodedEdit, k: int = 0) -> bool:
    """Says whether a chunk fits the free tokens and logits."""
    tokens, scored = plan_lib.stage_load(edit, k)
    return tokens <= len(self._tokens) and scored <= len(self._scored)

  def assign(self, slot: int, edit: EncodedEdit, k: int) -> np.ndarray:
    """Assigns a chunk of an edit to a slot.

    Args:
      slot: a free one.
      edit: the edit; it must fit.
      k: number of the chunk.

    Returns:
      [sequences an edit, S] int32 packed indices of its tokens from the anchor
      on; N elsewhere.
    """
    plan = self._plan
    self.assigned[slot] = (edit, k)
    base = slot * plan.rows
    for c in range(plan.contexts):
      stage = edit.stage(k, c)
      self._assign_sequence(slot, c, stage.anchor, stage.end - stage.anchor)
      self._assign_outputs(slot, c, stage)
    if plan.kl and k == 0:
      self._assign_sequence(slot, plan.contexts, len(edit.kl) - 1, 1)
      output = len(self._label) + slot
      self._keep[output] = self._anchor[slot, -1]
      self._asking.put(
          base + plan.contexts, np.array([output]), len(edit.kl) - 1
      )
    if k == 0:
      self._grown[slot] = 0
      self._note_prefix(slot, edit)
    return self._rows.index[base : base + plan.rows].copy()

  def _assign_sequence(self, slot: int, c: int, start: int, count: int) -> None:
    """Takes tokens for one sequence."""
    index = np.array([self._tokens.pop() for _ in range(count)], np.int32)
    self._rows.put(slot * self._plan.rows + c, index, start)
    self._anchor[slot, c] = index[0]

  def _assign_outputs(self, slot: int, c: int, stage: Stage) -> None:
    """Takes logits for the labels of one sequence."""
    row = slot * self._plan.rows + c
    count = len(stage.labels)
    kept = np.array([self._scored.pop() for _ in range(count)], np.int32)
    offset = stage.first - stage.anchor
    self._keep[kept] = self._rows.index[row, offset : offset + count]
    self._asking.put(row, kept, stage.first)
    self._label[kept] = stage.labels
    self._pick[slot, c, :count] = kept

  def _note_prefix(self, slot: int, edit: EncodedEdit) -> None:
    """Sets the prefix layout of a new edit's sequences."""
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
    """Ends a chunk of an edit that has another one.

    The tokens before the next anchor join the prefix of their sequence.

    Args:
      slot: the edit's; its next chunk can be assigned there.

    Returns:
      Index in the prefix cache at which this chunk's keys and values start.
    """
    edit, k = self.assigned[slot]
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
    """Frees a slot with its tokens and logits."""
    self._release(slot)
    for c in range(self._plan.rows):
      self._before[:, slot * self._plan.rows + c] = 0
    super().free(slot)

  def _release(self, slot: int) -> None:
    plan, batch_shape = self._plan, self._batch_shape
    for c in range(plan.rows):
      row = slot * plan.rows + c
      self._tokens += self._rows.clear(row).tolist()
      kept = self._asking.clear(row)
      self._keep[kept] = batch_shape.token_budget
      self._scored += [int(i) for i in kept if i < batch_shape.logit_budget]
    self._anchor[slot] = batch_shape.token_budget
    self._pick[slot] = batch_shape.logit_budget

  def compact(self, batch_shape: BatchShape) -> Compaction | None:
    """Assigns all edits to a smaller batch shape, if all their chunks fit.

    Args:
      batch_shape: `BatchShape.compacted`.

    Returns:
      The new allocator and where its slots and tokens come from, or None.
    """
    active = self.active
    loads = np.array(
        [plan_lib.edit_load(self.assigned[slot][0]) for slot in active]
    )
    tokens, scored = loads.sum(axis=0) if active else (0, 0)
    if (
        len(active) > batch_shape.slots
        or tokens > batch_shape.token_budget
        or scored > batch_shape.logit_budget
    ):
      return None
    other, rows = SlotAllocator(self._plan, batch_shape), self._plan.rows
    source = np.full(
        [batch_shape.token_budget], self._batch_shape.token_budget, np.int32
    )
    for new, old in enumerate(active):
      there = other.assign(new, *self.assigned[old])
      here = self._rows.index[old * rows : (old + 1) * rows]
      taken = there < batch_shape.token_budget
      source[there[taken]] = here[taken]
      a, b = new * rows, old * rows
      other._before[:, a : a + rows] = self._before[:, b : b + rows]
      other._grown[new] = self._grown[old]
    return Compaction(other, self.compacted(batch_shape.slots), source)

  def layout(self) -> SlotLayout:
    """The present layout, in copies."""
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
