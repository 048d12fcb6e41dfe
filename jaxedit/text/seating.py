"""Lays rows of ids out for a device, end to end and in few static shapes.

Rows of an edit are its C contexts and, last, its KL row. What all edits share at
the head of a context (the context itself, as a rule) is its trunk and is run
once. The rest of a row is the edit's own: own columns left of the anchor, then
the suffix:

  trunk            own
  t t t t t t t t | t t t | A t t t y y y

A tile holds own columns of some edits. A room is where suffixes are optimised: a
fixed number of slots (edits), places (tokens) and scored places. An edit that is
done leaves, and another takes its slot and any free places; so rooms need no
padding, and one compiled shape serves edits of any length up to the room's
width. Edits much longer than others get a room of their own, as attention does
pad rows to the width.

Axis letters: E slots, C contexts, R rows, N places, W columns of a suffix, P
columns before it, K scored places, n labels of a row.

It holds numpy arrays only and knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax
import numpy as np

from jaxedit.text.batching import EncodedEdit, Stage, round_up
from jaxedit.types import PADDING, TRUNK, Array, Columns, Keep, Ragged

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

  @property
  def tail(self) -> Room | None:
    """A smaller room, for the last edits; None if this one is small already."""
    if self.slots < 2 * _TAIL:
      return None
    places, scored = -(-self.places // _TAIL), -(-self.scored // _TAIL)
    return self._replace(
        slots=-(-self.slots // _TAIL),
        places=-(-places // 16) * 16,
        scored=-(-scored // 4) * 4,
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


@flax.struct.dataclass
class Tile:
  """Own columns of some edits, end to end.

  Attributes:
    edit: [E] int32 index of the edit in a slot, or -1.
    context: [R] int32 number of a row's context, and of its trunk.
    tokens: [1, N] int32.
    rows: R = E * rows rows.
    anchor: [E, rows] int32 place of the first anchor, in `key_tiles` [R, K] of
      every state's; N where there is none.
    left: the places left of the anchor, as rows of their own; None where they
      are not needed apart.
  """

  edit: Array
  context: Array
  tokens: Array
  rows: Ragged
  anchor: Array
  left: Keep | None


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


def _suffix(edit: EncodedEdit) -> int:
  """Columns of the longest suffix of any stage."""
  stages = _stages(edit)
  return max(stage.end - stage.anchor for _, stage in stages)


def _stages(edit: EncodedEdit) -> Iterator[tuple[int, Stage]]:
  for k in range(edit.stages):
    for c in range(len(edit.rows)):
      yield k, edit.stage(k, c)


def _need(edit: EncodedEdit, k: int) -> tuple[int, int]:
  """(places, scored places) of a stage; the first has the KL row's place too."""
  places, scored = edit.load(k)
  return places + (k == 0 and len(edit.kl) > 0), scored


def _load(edit: EncodedEdit) -> np.ndarray:
  """(places, scored places) that serve every stage of an edit."""
  return np.max([_need(edit, k) for k in range(edit.stages)], axis=0)


def _trunk(edits: Sequence[EncodedEdit], c: int) -> np.ndarray:
  """The head that one context has in all edits, left of all anchors."""
  first = edits[0].rows[c]
  length = min(edit.anchors[c] for edit in edits)
  for edit in edits:
    differs = edit.rows[c][:length] != first[:length]
    if differs.any():
      length = int(differs.argmax())
  return first[:length]


def frame(
    edits: Sequence[EncodedEdit],
    *,
    slots: int | None = None,
    batch: int | None = None,
    places: int = 128,
    share: bool = True,
    widths: Sequence[int] = WIDTHS,
) -> Frame:
  """Chooses the shapes for a run.

  Args:
    edits: all edits of the run, at least one, with one number of contexts.
    slots: edits optimised side by side; None for as many as fill `places`.
    batch: edits a batch at most; more slots than that are never made.
    places: suffix tokens optimised side by side where `slots` does not say.
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
      rooms.append(_room(members, trunk, limit, amount))
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


def _key_shapes(
    edits: Sequence[EncodedEdit], trunk: Sequence[np.ndarray], places: int
) -> KeyShapes:
  """Shapes of `key_tiles`, of about `places` columns each."""

  def shape(text: bool) -> tuple[int, int, int]:
    sizes = np.array(
        [
            len(_key_text(edit, c, text)) - len(head)
            for edit in edits
            for c, head in enumerate(trunk)
        ]
    )
    rows = max(1, min(len(sizes), round(places / sizes.mean())))
    return rows, _room_for(sizes, rows), round_up(int(sizes.max()))

  return KeyShapes(shape(False), shape(True))


def _key_text(edit: EncodedEdit, c: int, text: bool) -> np.ndarray:
  """What keys are read from: a row up to its last anchor, or to its end."""
  if text:
    return np.concatenate([edit.rows[c], edit.target])
  return edit.text(c)[: edit.stage(edit.stages - 1, c).anchor + 1]


def _room_for(sizes: Sequence[int], count: float, step: int = 16) -> int:
  """Places that hold `count` average edits, or the largest one."""
  wanted = min(np.mean(sizes) * count, np.sum(sizes))
  return -(-int(max(np.ceil(wanted), np.max(sizes))) // step) * step


def _room(
    members: Sequence[EncodedEdit],
    trunk: Sequence[np.ndarray],
    limit: int,
    amount: tuple[int | None, int, int],
) -> Room:
  """Chooses the shapes of a room for the edits that belong there."""
  slots, places, most = amount
  loads = np.array([_load(edit) for edit in members])
  if slots is None:
    slots = max(1, round(places / loads[:, 0].mean()))
  slots = min(slots, most)
  spans = [list(_spans(edit, trunk)) for edit in members]
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
  )


def _spans(
    edit: EncodedEdit, trunk: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, int, int]]:
  """Own columns of every row: (ids, first position, how many left of A)."""
  for c, head in enumerate(trunk):
    start = len(head)
    yield edit.text(c)[start:], start, edit.anchors[c] - start
  if len(edit.kl):
    yield edit.kl, 0, len(edit.kl) - 1


class _Rows:
  """Rows that are being laid out."""

  def __init__(self, rows: int, width: int, places: int):
    self.index = np.full([rows, width], places, np.int32)
    self.position = np.zeros([rows, width], np.int32)
    self.segment = np.full([rows, width], PADDING, np.int32)
    self.row = np.full([places], rows, np.int32)
    self.column = np.zeros([places], np.int32)

  def put(self, row: int, places: np.ndarray, start: int) -> None:
    """Lets a row consist of these places, from a position on."""
    columns = np.arange(len(places), dtype=np.int32)
    self.index[row, : len(places)] = places
    self.position[row, : len(places)] = start + columns
    self.segment[row, : len(places)] = TRUNK
    self.row[places] = row
    self.column[places] = columns

  def clear(self, row: int) -> np.ndarray:
    """Empties a row and returns its places."""
    used = self.segment[row] != PADDING
    places = self.index[row, used]
    self.index[row] = len(self.row)
    self.position[row] = 0
    self.segment[row] = PADDING
    self.row[places] = len(self.index)
    self.column[places] = 0
    return places

  def ragged(self) -> Ragged:
    """The rows as they are now."""
    columns = Columns(self.position.copy(), self.segment.copy())
    copies = (x.copy() for x in (self.index, self.row, self.column))
    return Ragged(columns, *copies)


def trunk_columns(frame: Frame) -> tuple[np.ndarray, Columns]:
  """The trunks as rows; the KL row's is empty.

  Args:
    frame: of the run.

  Returns:
    ([rows, s] int32 tokens, their columns).
  """
  tokens = np.zeros([frame.rows, frame.shared], np.int32)
  segment = np.full(tokens.shape, PADDING, np.int32)
  for c, ids in enumerate(frame.trunk):
    tokens[c, : len(ids)] = ids
    segment[c, : len(ids)] = TRUNK
  position = np.where(segment, np.arange(frame.shared, dtype=np.int32), 0)
  return tokens, Columns(position.astype(np.int32), segment)


def row_tiles(
    edits: Sequence[EncodedEdit], order: Sequence[int], frame: Frame, room: Room
) -> Iterator[Tile]:
  """Yields tiles of whole rows, in order.

  Args:
    edits: the batch.
    order: those to lay out, as indices.
    frame: of the run.
    room: which the edits belong to.
  """
  spans = {i: list(_spans(edits[i], frame.trunk)) for i in order}
  limits = (room.tile[1], room.left[0])
  load = lambda i: (
      sum(len(ids) for ids, _, _ in spans[i]),
      sum(cut for _, _, cut in spans[i]),
  )
  for chosen in _groups(order, load, room.tile[0], limits):
    yield _tile(
        [(i, spans[i]) for i in chosen], frame.rows, room.tile, room.left
    )


def key_tiles(
    edits: Sequence[EncodedEdit],
    frame: Frame,
    *,
    bare: bool,
    text: bool = False,
) -> Iterator[Tile]:
  """Yields tiles of columns up to the last anchor, a slot a row, no KL rows.

  Args:
    edits: the batch.
    frame: of the run.
    bare: the first context alone, or all others.
    text: go on to the end of the target.
  """
  rows = [
      (i, c, _key_text(edit, c, text))
      for i, edit in enumerate(edits)
      for c in (range(1) if bare else range(1, frame.contexts))
  ]
  shape = frame.key.text if text else frame.key.upto
  load = lambda r: (len(rows[r][2]) - len(frame.trunk[rows[r][1]]),)
  for group in _groups(range(len(rows)), load, shape[0], shape[1:2]):
    chosen, context = [], np.zeros([shape[0]], np.int32)
    for slot, r in enumerate(group):
      i, c, ids = rows[r]
      start = len(frame.trunk[c])
      chosen.append((i, [(ids[start:], start, 0)]))
      context[slot] = c
    tile = _tile(chosen, 1, shape, None)
    anchor = np.full([shape[0], frame.stages], shape[1], np.int32)
    for slot, r in enumerate(group):
      i, c, _ = rows[r]
      columns = [edits[i].stage(k, c).anchor for k in range(edits[i].stages)]
      columns = np.array(columns) - len(frame.trunk[c])
      anchor[slot, : len(columns)] = tile.rows.index[slot, columns]
    yield tile.replace(context=context, anchor=anchor)


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
) -> Tile:
  """Fills one tile; `width` is the rows of an edit."""
  slots, places, columns = shape
  rows = _Rows(slots * width, columns, places)
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
  keep = None if left is None else _cut(cuts, places, slots * width, left)
  context = np.tile(np.arange(width, dtype=np.int32), slots)
  return Tile(edit, context, tokens, rows.ragged(), anchor, keep)


def _cut(
    cuts: Sequence[tuple[int, np.ndarray, int]],
    places: int,
    count: int,
    shape: tuple[int, int],
) -> Keep:
  """Makes rows of their own of some places: (row, places, first position)."""
  kept = np.full([shape[0]], places, np.int32)
  rows = _Rows(count, shape[1], shape[0])
  at = 0
  for row, here, start in cuts:
    there = np.arange(at, at + len(here), dtype=np.int32)
    rows.put(row, there, start)
    kept[there] = here
    at += len(here)
  return Keep(kept, rows.ragged())


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
    self._rows = _Rows(count, room.width, room.places)
    # Scored places come first, then one a slot for its KL row.
    kept = room.scored + (slots if frame.kl else 0)
    self._keep = np.full([kept], room.places, np.int32)
    self._asking = _Rows(count, room.labels, kept)
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
    places, scored = _need(edit, k)
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
    loads = np.array([_load(self.held[slot][0]) for slot in seated])
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
