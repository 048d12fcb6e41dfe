"""Chooses the few static shapes in which rows of ids go to a device, end to end.

Rows of an edit are its C contexts and, last, its KL row. What all edits share at
the head of a context (the context itself, as a rule) is its trunk and is run
once. The rest of a row is the edit's own: own columns left of the anchor, then
the suffix:

  trunk            own
  t t t t t t t t | t t t | A t t t y y y

A tile (`tiles`) holds own columns of some edits. A room, filled by `seating`, is where
suffixes are optimised: a fixed number of slots (edits), places (tokens) and scored
places. An edit that is done leaves, and another takes its slot and any free
places; so rooms need no padding, and one compiled shape serves edits of any length
up to the room's width. Edits much longer than others get a room of their own, as
attention does pad rows to the width.

Axis letters: E slots, C contexts, R rows, N places, W columns of a suffix, P
columns before it, K scored places, n labels of a row.

This file, `tiles` and `seating` hold numpy arrays only and know nothing of models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.batching.buckets import round_up
from jaxedit.text.encoding import (
    EncodedEdit,
    Stage,
)

# Suffix lengths up to which edits share a room.
WIDTHS = (16, 64, 256, 1024)
# A room has this many slots for every edit that fills its places on average, so
# that short edits do not leave places empty.
_SPARE = 1.2
# Once nobody waits, the last edits move to a room this many times smaller.
_TAIL = 2


class Room(NamedTuple):
  """Static shapes of one room, and of the tiles that fill it.

  Attributes:
    limit: longest suffix that comes here, tokens.
    slots: E.
    places: N, suffix tokens at a time.
    width: W.
    scored: K, scored tokens at a time.
    labels: n, most labels of a row.
    grow: columns for the chunks of an edit that are done.
    tile: (slots, places, width) of a tile of whole rows.
    left: (places, width) of a tile's columns left of the anchor.
    tails: how often the last edits move to a smaller room.
  """

  limit: int
  slots: int
  places: int
  width: int
  scored: int
  labels: int
  grow: int
  tile: tuple[int, int, int]
  left: tuple[int, int]
  tails: int

  @property
  def tail(self) -> Room | None:
    """A smaller room, for the last edits; None if this one is small enough."""
    if not self.tails or self.slots < 2 * _TAIL:
      return None
    places, scored = -(-self.places // _TAIL), -(-self.scored // _TAIL)
    return self._replace(
        slots=-(-self.slots // _TAIL),
        places=-(-places // 16) * 16,
        scored=-(-scored // 4) * 4,
        tails=self.tails - 1,
    )


class KeyShapes(NamedTuple):
  """(rows, places, width) of a tile of own columns.

  Attributes:
    upto: up to the last anchor.
    text: to the end of the target.
  """

  upto: tuple[int, int, int]
  text: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Frame:
  """The static shapes of a run, which all its batches share.

  Attributes:
    trunk: the shared head of every context, C arrays [s] int32.
    kl: whether edits have a KL row.
    rooms: by ascending limit.
    batch: edits a batch at most.
    stages: states an edit at most.
    states: states a batch at most.
    key: shapes of `key_tiles`.
    whole: same, where nothing is shared.
  """

  trunk: tuple[np.ndarray, ...]
  kl: bool
  rooms: tuple[Room, ...]
  batch: int
  stages: int
  states: int
  key: KeyShapes
  whole: KeyShapes

  def apart(self) -> Frame:
    """The frame for edits that share nothing, as their models differ.

    It serves `key_tiles`; what comes before editing can be shared in any case.
    """
    nothing = (np.zeros(0, np.int32),) * self.contexts
    return dataclasses.replace(self, trunk=nothing, key=self.whole)

  @property
  def contexts(self) -> int:
    """C."""
    return len(self.trunk)

  @property
  def rows(self) -> int:
    """Rows an edit."""
    return self.contexts + self.kl

  @property
  def shared(self) -> int:
    """Columns of the longest trunk."""
    return max(map(len, self.trunk))

  def room(self, edit: EncodedEdit) -> int:
    """Number of the room an edit belongs to."""
    suffix = _suffix(edit)
    for number, room in enumerate(self.rooms):
      if suffix <= room.limit:
        return number
    raise ValueError(
        f'edit {edit.number} has a suffix of {suffix} tokens, longer than any'
        ' that this frame was made for'
    )


def frame(
    edits: Sequence[EncodedEdit],
    *,
    slots: int | None = None,
    batch: int | None = None,
    places: int = 128,
    tails: int = 1,
    share: bool = True,
    widths: Sequence[int] = WIDTHS,
) -> Frame:
  """Chooses the shapes for a run.

  Args:
    edits: all edits of the run, at least one, with one number of contexts.
    slots: edits optimised side by side; None for as many as fill `places`.
    batch: edits a batch at most; more slots than that are never made.
    places: suffix tokens optimised side by side where `slots` does not say.
    tails: how often the last edits move to a smaller room, which compiles for
      it.
    share: run what all edits share once. It must be off where edits differ in
      weights.
    widths: suffix lengths up to which edits share a room, ascending.

  Returns:
    The frame.

  Raises:
    ValueError: no edits, no slots, edits with differing numbers of contexts, or
      chunks with a gap between them.
  """
  for name, given in (('slot', slots), ('edit a batch', batch)):
    if given is not None and given < 1:
      raise ValueError(f'at least one {name} is needed, got {given}')
  if not edits:
    raise ValueError('a frame is made for at least one edit')
  for edit in edits:
    for (a, b), (c, d) in itertools.pairwise(edit.chunks):
      if not a < c <= b < d:
        raise ValueError(
            f'edit {edit.number}: chunk {c}-{d} does not go on from {a}-{b}'
        )
  kinds = {(len(edit.rows), bool(len(edit.kl))) for edit in edits}
  if len(kinds) != 1:
    raise ValueError('edits differ in their contexts; encode them together')
  contexts, kl = kinds.pop()
  trunk = tuple(
      _trunk(edits, c) if share else np.zeros(0, np.int32)
      for c in range(contexts)
  )
  rooms, rest = [], list(edits)
  limits = [*widths, max(map(_suffix, edits))]
  for limit in sorted(set(limits)):
    members = [edit for edit in rest if _suffix(edit) <= limit]
    rest = [edit for edit in rest if _suffix(edit) > limit]
    if members:
      amount = (slots, places, min(batch or len(members), len(members)))
      rooms.append(_room(members, trunk, limit, amount, tails))
  nothing = (np.zeros(0, np.int32),) * contexts
  most = min(batch or len(edits), len(edits))
  stages = sorted((edit.stages for edit in edits), reverse=True)
  return Frame(
      trunk=trunk,
      kl=kl,
      rooms=tuple(rooms),
      batch=most,
      stages=stages[0],
      states=sum(stages[:most]),
      key=_key_shapes(edits, trunk, places),
      whole=_key_shapes(edits, nothing, places),
  )


def _trunk(edits: Sequence[EncodedEdit], c: int) -> np.ndarray:
  """The head that one context has in all edits, left of all anchors."""
  first = edits[0].rows[c]
  length = min(edit.anchors[c] for edit in edits)
  for edit in edits:
    differs = edit.rows[c][:length] != first[:length]
    if differs.any():
      length = int(differs.argmax())
  return first[:length]


def _key_shapes(
    edits: Sequence[EncodedEdit], trunk: Sequence[np.ndarray], places: int
) -> KeyShapes:
  """Shapes of `key_tiles`, of about `places` columns each."""

  def shape(text: bool) -> tuple[int, int, int]:
    sizes = np.array(
        [
            len(key_text(edit, c, text)) - len(head)
            for edit in edits
            for c, head in enumerate(trunk)
        ]
    )
    rows = max(1, min(len(sizes), round(places / sizes.mean())))
    return rows, _room_for(sizes, rows), round_up(int(sizes.max()))

  return KeyShapes(shape(False), shape(True))


def _room(
    members: Sequence[EncodedEdit],
    trunk: Sequence[np.ndarray],
    limit: int,
    amount: tuple[int | None, int, int],
    tails: int,
) -> Room:
  """Chooses the shapes of a room for the edits that belong there."""
  slots, places, most = amount
  loads = np.array([edit_load(edit) for edit in members])
  if slots is None:
    slots = max(1, round(places / loads[:, 0].mean()))
  slots = min(slots, most)
  spans = [list(row_spans(edit, trunk)) for edit in members]
  own = [sum(len(ids) for ids, _, _ in rows) for rows in spans]
  left = [sum(cut for _, _, cut in rows) for rows in spans]
  side = -(-slots // 2)
  done = lambda edit, c: edit.stage(edit.stages - 1, c).anchor - edit.anchors[c]
  chained = any(edit.stages > 1 for edit in members)
  width = round_up(max(map(_suffix, members)))
  grow = max(done(edit, c) for edit in members for c in range(len(trunk)))
  return Room(
      limit=limit,
      slots=min(most, int(np.ceil(_SPARE * slots))),
      places=_room_for(loads[:, 0], slots),
      width=width,
      scored=_room_for(loads[:, 1], slots, 4),
      labels=max(len(stage.labels) for e in members for _, stage in _stages(e)),
      grow=round_up(grow + width) if chained else 0,
      tile=(
          side,
          _room_for(own, side),
          round_up(max(len(ids) for rows in spans for ids, _, _ in rows)),
      ),
      left=(
          max(1, _room_for(left, side)),
          round_up(max(1, *(cut for rows in spans for _, _, cut in rows))),
      ),
      tails=tails,
  )


def _room_for(sizes: Sequence[int], count: float, step: int = 16) -> int:
  """Places that hold `count` average edits, or the largest one."""
  wanted = min(np.mean(sizes) * count, np.sum(sizes))
  return -(-int(max(np.ceil(wanted), np.max(sizes))) // step) * step


def _suffix(edit: EncodedEdit) -> int:
  """Columns of the longest suffix of any stage."""
  stages = _stages(edit)
  return max(stage.end - stage.anchor for _, stage in stages)


def _stages(edit: EncodedEdit) -> Iterator[tuple[int, Stage]]:
  for k in range(edit.stages):
    for c in range(len(edit.rows)):
      yield k, edit.stage(k, c)


def stage_load(edit: EncodedEdit, k: int) -> tuple[int, int]:
  """(places, scored places) of a stage; the first has the KL row's place too."""
  places, scored = edit.load(k)
  return places + (k == 0 and len(edit.kl) > 0), scored


def edit_load(edit: EncodedEdit) -> np.ndarray:
  """(places, scored places) that serve every stage of an edit."""
  return np.max([stage_load(edit, k) for k in range(edit.stages)], axis=0)


def row_spans(
    edit: EncodedEdit, trunk: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, int, int]]:
  """Own columns of every row: (ids, first position, how many left of A)."""
  for c, head in enumerate(trunk):
    start = len(head)
    yield edit.text(c)[start:], start, edit.anchors[c] - start
  if len(edit.kl):
    yield edit.kl, 0, len(edit.kl) - 1


def key_text(edit: EncodedEdit, c: int, text: bool) -> np.ndarray:
  """What keys are read from: a row up to its last anchor, or to its end."""
  if text:
    return np.concatenate([edit.rows[c], edit.target])
  return edit.text(c)[: edit.stage(edit.stages - 1, c).anchor + 1]
