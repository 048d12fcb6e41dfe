"""Continuous batching: who has which slot, and the loop that runs it.

A running batch has a fixed number of slots. An engine (`targets.scheduler` for
edits, `models.decode` for texts) holds its explicit state on the device and
works by the same words, of which `run` is the loop:

  prefill   runs once what stays constant for waiting items, a batch at a time
  assign    moves prefilled items to free slots of the running batch
  step      runs the batch until an item may be done
  free      gives the slot of an item that is done to the next one

`SlotAllocator` also allocates the tokens and logits of a batch shape to edits,
as these share one packed axis; a text has a row of the cache to itself. Where a
batch is divided over devices, an edit takes all of these from the shard of its
slot, so that a step exchanges no activations.

Axis letters as in `jaxedit.types`: E slots, C contexts, B sequences, N token
budget, P prefix tokens, S suffix tokens, O logit budget, O' labels of a
sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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
    outputs: of each shard the scored tokens, O in all, then one a slot for its
      KL prompt.
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
  """How the edits move to a smaller batch shape, each within its shard.

  Attributes:
    allocator: of the new shape.
    slots: [E] int32 old slot of a new one; past the end for a free one.
    tokens: [N] int32 old packed index of a new one, likewise.
  """

  allocator: SlotAllocator
  slots: np.ndarray
  tokens: np.ndarray


class SlotAllocator(Slots):
  """Allocates the slots, tokens and logits of one batch shape, shard by shard.

  Attributes:
    assigned: (edit, number of its chunk) of every slot, or None.
  """

  assigned: list[tuple[EncodedEdit, int] | None]

  def __init__(self, plan: BatchPlan, batch_shape: BatchShape):
    slots, rows = batch_shape.slots, plan.rows
    super().__init__(slots)
    count, shards = slots * rows, batch_shape.shards
    self._plan, self._batch_shape = plan, batch_shape
    # Free ones of every shard.
    self._tokens = _shares(batch_shape.token_budget, shards)
    self._scored = _shares(batch_shape.logit_budget, shards)
    self._rows = packer.Packer(
        count, batch_shape.length, batch_shape.token_budget, shards
    )
    # Of each shard: scored tokens, then one a slot for its KL prompt.
    kept = batch_shape.logit_budget + (slots if plan.kl else 0)
    self._keep = np.full([kept], batch_shape.token_budget, np.int32)
    self._asking = packer.Packer(count, batch_shape.labels, kept, shards)
    length = plan.shared + batch_shape.prefix_shape[1] + batch_shape.grow
    # Positions, segments, and whether a token is of a source.
    self._before = np.zeros([3, count, length], np.int32)
    self._sources = False
    self._anchor = np.full([slots, rows], batch_shape.token_budget, np.int32)
    self._pick = np.full(
        [slots, plan.contexts, batch_shape.labels],
        batch_shape.logit_budget,
        np.int32,
    )
    self._label = np.zeros([batch_shape.logit_budget], np.int32)
    self._grown = [0] * slots

  def shard(self, slot: int) -> int:
    """The shard of a slot."""
    return slot * self._batch_shape.shards // self._batch_shape.slots

  def fits(self, edit: EncodedEdit, k: int = 0, *, slot: int = 0) -> bool:
    """Says whether a chunk fits the free tokens and logits of a slot's shard."""
    return self._holds(self.shard(slot), plan_lib.stage_load(edit, k))

  def _holds(self, shard: int, load: tuple[int, int]) -> bool:
    tokens, scored = load
    free = len(self._tokens[shard]), len(self._scored[shard])
    return tokens <= free[0] and scored <= free[1]

  def free_slots(self, closed: Collection[int] = ()) -> list[int]:
    """The first free slot of every shard that has one, but for closed shards."""
    found = {}
    for slot, item in enumerate(self.assigned):
      if item is None and self.shard(slot) not in closed:
        found.setdefault(self.shard(slot), slot)
    return list(found.values())

  def slot_for(self, edit: EncodedEdit, slots: Iterable[int]) -> int | None:
    """Chooses the slot of a new edit.

    Args:
      edit: the edit; of its chunks, the first has to fit.
      slots: free ones.

    Returns:
      The slot whose shard has most free tokens of those in which it fits, the
      first of equals; or None.
    """
    load = plan_lib.stage_load(edit, 0)
    fits = [slot for slot in slots if self._holds(self.shard(slot), load)]
    free = lambda slot: len(self._tokens[self.shard(slot)])
    return max(fits, key=free, default=None)

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
      scored = self._batch_shape.logit_budget // self._batch_shape.shards
      output = (self.shard(slot) + 1) * scored + slot
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
    free = self._tokens[self.shard(slot)]
    index = np.array([free.pop() for _ in range(count)], np.int32)
    self._rows.put(slot * self._plan.rows + c, index, start)
    self._anchor[slot, c] = index[0]

  def _assign_outputs(self, slot: int, c: int, stage: Stage) -> None:
    """Takes logits for the labels of one sequence."""
    row, shard = slot * self._plan.rows + c, self.shard(slot)
    count, free = len(stage.labels), self._scored[shard]
    scored = np.array([free.pop() for _ in range(count)], np.int32)
    # Outputs of earlier shards include one a slot for its KL prompt.
    asked = len(self._keep) - len(self._label)
    kept = scored + shard * (asked // self._batch_shape.shards)
    offset = stage.first - stage.anchor
    self._keep[kept] = self._rows.index[row, offset : offset + count]
    self._asking.put(row, kept, stage.first)
    self._label[scored] = stage.labels
    self._pick[slot, c, :count] = scored

  def _note_prefix(self, slot: int, edit: EncodedEdit) -> None:
    """Sets the prefix layout of a new edit's sequences."""
    plan = self._plan
    for c in range(plan.rows):
      positions, segment_ids, source = self._before[:, slot * plan.rows + c]
      ids = edit.rows[c] if c < plan.contexts else edit.kl
      self._sources |= ids[0] < 0
      shared_prefix = len(plan.shared_prefix[c]) if c < plan.contexts else 0
      anchor = edit.anchors[c] if c < plan.contexts else len(edit.kl) - 1
      for at, begin, end in (
          (0, 0, shared_prefix),
          (plan.shared, shared_prefix, anchor),
      ):
        positions[at : at + end - begin] = np.arange(begin, end)
        segment_ids[at : at + end - begin] = SHARED
        source[at : at + end - begin] = ids[begin:end] < 0

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
      positions, segment_ids, _ = self._before[:, slot * plan.rows + c]
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
    shard = self.shard(slot)
    for c in range(plan.rows):
      row = slot * plan.rows + c
      self._tokens[shard] += self._rows.clear(row).tolist()
      self._keep[self._asking.clear(row)] = batch_shape.token_budget
    scored = self._pick[slot]
    self._scored[shard] += scored[scored < batch_shape.logit_budget].tolist()
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
    counts = (
        batch_shape.slots,
        batch_shape.token_budget,
        batch_shape.logit_budget,
    )
    each = np.array(counts) // batch_shape.shards
    used, moved = np.zeros([batch_shape.shards, len(each)], np.int64), []
    for slot in active:
      shard = self.shard(slot)
      moved.append(shard * each[0] + used[shard, 0])
      used[shard] += [1, *plan_lib.edit_load(self.assigned[slot][0])]
    if (used > each).any():
      return None
    other, rows = SlotAllocator(self._plan, batch_shape), self._plan.rows
    source = np.full(
        [batch_shape.token_budget], self._batch_shape.token_budget, np.int32
    )
    slots = np.full([batch_shape.slots], self._batch_shape.slots, np.int32)
    slots[moved] = active
    for new, old in zip(moved, active):
      there = other.assign(new, *self.assigned[old])
      here = self._rows.index[old * rows : (old + 1) * rows]
      taken = there < batch_shape.token_budget
      source[there[taken]] = here[taken]
      a, b = new * rows, old * rows
      other._before[:, a : a + rows] = self._before[:, b : b + rows]
      other._grown[new] = self._grown[old]
    return Compaction(other, slots, source)

  def layout(self) -> SlotLayout:
    """The present layout, in copies."""
    positions, segment_ids, source = self._before.copy()
    source = source.astype(bool) if self._sources else None
    return SlotLayout(
        rows=self._rows.packing(),
        before=TokenLayout(positions, segment_ids, source),
        outputs=OutputTokens(self._keep.copy(), self._asking.packing()),
        anchor=self._anchor.copy(),
        pick=self._pick.copy(),
        label=self._label.copy(),
        live=self._anchor[:, 0] < self._batch_shape.token_budget,
    )


def _shares(count: int, shards: int) -> list[list[int]]:
  """Numbers below `count` in equal parts, the last of each first."""
  return np.arange(count).reshape(shards, -1)[:, ::-1].tolist()
