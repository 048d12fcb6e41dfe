"""Keeps track of who sits where in a room.

Axis letters as in `rooms`: E slots, C contexts, R rows, N places, P columns before
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
    Frame,
    Room,
)
from jaxedit.text.encoding import (
    EncodedEdit,
    Stage,
)
from jaxedit.types import TRUNK, Array, Columns, Keep, Ragged


@flax.struct.dataclass
class Seats:
  """Who sits where in a room.

  Attributes:
    rows: suffix columns, R rows on N places.
    before: [R, P] columns of earlier keys and values: trunk, own, done chunks.
    keep: the K scored places, then one a slot for its KL row.
    anchor: [E, rows] int32 place of the anchor; N where there is none.
    pick: [E, C, n] int32 scored place of a label; K where there is none.
    label: [K] int32 token that should follow a scored place.
    live: [E] bool, slots whose edit has its places.
  """

  rows: Ragged
  before: Columns
  keep: Keep
  anchor: Array
  pick: Array
  label: Array
  live: Array


class Move(NamedTuple):
  """How everybody moves to another room.

  Attributes:
    seating: of the new room.
    slots: [E] int32 old slot of a new one; past the end for a free one.
    places: [N] int32 old place of a new one, likewise.
  """

  seating: Seating
  slots: np.ndarray
  places: np.ndarray


class Seating:
  """Keeps track of who sits where in one room.

  Attributes:
    held: (edit, stage) in every slot, or None.
  """

  def __init__(self, frame: Frame, room: Room):
    slots, rows = room.slots, frame.rows
    count = slots * rows
    self._frame, self._room = frame, room
    self.held: list[tuple[EncodedEdit, int] | None] = [None] * slots
    self._places = list(range(room.places))[::-1]
    self._scored = list(range(room.scored))[::-1]
    self._rows = packer.Rows(count, room.width, room.places)
    # Scored places come first, then one a slot for its KL row.
    kept = room.scored + (slots if frame.kl else 0)
    self._keep = np.full([kept], room.places, np.int32)
    self._asking = packer.Rows(count, room.labels, kept)
    columns = frame.shared + room.left[1] + room.grow
    self._before = np.zeros([2, count, columns], np.int32)
    self._anchor = np.full([slots, rows], room.places, np.int32)
    self._pick = np.full(
        [slots, frame.contexts, room.labels], room.scored, np.int32
    )
    self._label = np.zeros([room.scored], np.int32)
    self._grown = [0] * slots

  @property
  def idle(self) -> int | None:
    """A free slot, if there is one."""
    return self.held.index(None) if None in self.held else None

  def fits(self, edit: EncodedEdit, k: int = 0) -> bool:
    """Says whether a stage finds enough places."""
    places, scored = plan_lib.stage_load(edit, k)
    return places <= len(self._places) and scored <= len(self._scored)

  def sit(self, slot: int, edit: EncodedEdit, k: int) -> np.ndarray:
    """Seats a stage of an edit.

    Args:
      slot: a free one.
      edit: the edit; it must fit.
      k: number of the stage.

    Returns:
      [rows, W] int32 places of its columns from the anchor on; N elsewhere.
    """
    frame = self._frame
    self.held[slot] = (edit, k)
    base = slot * frame.rows
    for c in range(frame.contexts):
      stage = edit.stage(k, c)
      self._seat(slot, c, stage.anchor, stage.end - stage.anchor)
      self._ask(slot, c, stage)
    if frame.kl and k == 0:
      self._seat(slot, frame.contexts, len(edit.kl) - 1, 1)
      place = len(self._label) + slot
      self._keep[place] = self._anchor[slot, -1]
      self._asking.put(
          base + frame.contexts, np.array([place]), len(edit.kl) - 1
      )
    if k == 0:
      self._grown[slot] = 0
      self._look_back(slot, edit)
    return self._rows.index[base : base + frame.rows].copy()

  def _seat(self, slot: int, c: int, start: int, count: int) -> None:
    """Takes places for one row."""
    places = np.array([self._places.pop() for _ in range(count)], np.int32)
    self._rows.put(slot * self._frame.rows + c, places, start)
    self._anchor[slot, c] = places[0]

  def _ask(self, slot: int, c: int, stage: Stage) -> None:
    """Takes scored places for the labels of one row."""
    row = slot * self._frame.rows + c
    count = len(stage.labels)
    kept = np.array([self._scored.pop() for _ in range(count)], np.int32)
    offset = stage.first - stage.anchor
    self._keep[kept] = self._rows.index[row, offset : offset + count]
    self._asking.put(row, kept, stage.first)
    self._label[kept] = stage.labels
    self._pick[slot, c, :count] = kept

  def _look_back(self, slot: int, edit: EncodedEdit) -> None:
    """Notes which earlier columns the rows of a new edit see."""
    frame = self._frame
    for c in range(frame.rows):
      position, segment = self._before[:, slot * frame.rows + c]
      trunk = len(frame.trunk[c]) if c < frame.contexts else 0
      anchor = edit.anchors[c] if c < frame.contexts else len(edit.kl) - 1
      for at, begin, end in ((0, 0, trunk), (frame.shared, trunk, anchor)):
        position[at : at + end - begin] = np.arange(begin, end)
        segment[at : at + end - begin] = TRUNK

  def move_on(self, slot: int) -> int:
    """Ends a stage whose edit has another one.

    The columns before the next anchor become earlier columns of the row.

    Args:
      slot: where the edit sits; its next stage can be seated there.

    Returns:
      The column of earlier keys and values from which this stage's belong.
    """
    edit, k = self.held[slot]
    frame = self._frame
    offset = frame.shared + self._room.left[1] + self._grown[slot]
    counts = []
    for c in range(frame.contexts):
      begin, end = edit.stage(k, c).anchor, edit.stage(k + 1, c).anchor
      position, segment = self._before[:, slot * frame.rows + c]
      position[offset : offset + end - begin] = np.arange(begin, end)
      segment[offset : offset + end - begin] = TRUNK
      counts.append(end - begin)
    self._grown[slot] += max(counts)
    self._rise(slot)
    return offset

  def leave(self, slot: int) -> None:
    """Frees a slot and its places."""
    self._rise(slot)
    for c in range(self._frame.rows):
      self._before[:, slot * self._frame.rows + c] = 0
    self.held[slot] = None

  def _rise(self, slot: int) -> None:
    frame, room = self._frame, self._room
    for c in range(frame.rows):
      row = slot * frame.rows + c
      self._places += self._rows.clear(row).tolist()
      kept = self._asking.clear(row)
      self._keep[kept] = room.places
      self._scored += [int(i) for i in kept if i < room.scored]
    self._anchor[slot] = room.places
    self._pick[slot] = room.scored

  def shrink(self, room: Room) -> Move | None:
    """Seats everybody in a smaller room, if all their stages fit there.

    Args:
      room: `Room.tail`.

    Returns:
      The new seating and where its slots and places come from, or None.
    """
    seated = [slot for slot, held in enumerate(self.held) if held is not None]
    loads = np.array(
        [plan_lib.edit_load(self.held[slot][0]) for slot in seated]
    )
    places, scored = loads.sum(axis=0) if seated else (0, 0)
    if len(seated) > room.slots or places > room.places or scored > room.scored:
      return None
    other, rows = Seating(self._frame, room), self._frame.rows
    slots = np.full([room.slots], len(self.held), np.int32)
    source = np.full([room.places], self._room.places, np.int32)
    for new, old in enumerate(seated):
      there = other.sit(new, *self.held[old])
      here = self._rows.index[old * rows : (old + 1) * rows]
      taken = there < room.places
      source[there[taken]] = here[taken]
      slots[new] = old
      a, b = new * rows, old * rows
      other._before[:, a : a + rows] = self._before[:, b : b + rows]
      other._grown[new] = self._grown[old]
    return Move(other, slots, source)

  def seats(self) -> Seats:
    """Who sits where now, in arrays of their own."""
    position, segment = self._before.copy()
    return Seats(
        rows=self._rows.ragged(),
        before=Columns(position, segment),
        keep=Keep(self._keep.copy(), self._asking.ragged()),
        anchor=self._anchor.copy(),
        pick=self._pick.copy(),
        label=self._label.copy(),
        live=self._anchor[:, 0] < self._room.places,
    )
