"""Tiles and rooms hold what edits say; every place has one column at most."""

from __future__ import annotations

import dataclasses

import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import types
from jaxedit.batching import (
    packer,
)
from jaxedit.batching import (
    plan as plan_lib,
)
from jaxedit.batching import (
    slots as slots_lib,
)
from jaxedit.testing import facts
from jaxedit.text import encoding

TEMPLATES = ('{}', 'The guitar in Paris. {}', 'You. {}')
RECORDS = tuple(
    types.Record(i, f'r{i}', prompt, subject, target)
    for i, (prompt, subject, target) in enumerate(
        [
            ('{}, the', 'Toko Yasuda', 'piano'),
            ('The mother tongue of {} is', 'Danielle Darrieux', 'French'),
            ('The capital of {} is', 'France', 'a city of the Eiffel Tower'),
            ('{}', 'Zoë 🎸', 'x'),
            ('In {} the mother tongue of most is', 'Sydney', 'Wellington'),
        ],
        1,
    )
)
NONE = types.PADDING


def encode(**options) -> list[encoding.EncodedEdit]:
  """Edits of real text, whose contexts share a head."""
  return encoding.encode_edits(
      text_tokenizers.byte_level(begin=True),
      RECORDS,
      TEMPLATES,
      max_tokens=200,
      **options,
  )


def cut(edit, window: int, overlap: int = 0) -> encoding.EncodedEdit:
  """Cuts the target into chunks."""
  length = len(edit.target)
  chunks = [(0, min(window, length))]
  while chunks[-1][1] < length:
    begin = chunks[-1][1] - overlap
    chunks.append((begin, min(begin + window, length)))
  return dataclasses.replace(edit, chunks=tuple(chunks))


def random_edits(count: int, seed: int, *, kl: bool = True, chunked: bool):
  """Edits of many lengths; some go chunk by chunk, if wanted."""
  rng = np.random.default_rng(seed)
  some = facts.random_edits(
      count, seed=seed, targets=rng.integers(1, 13, 7).tolist(), kl=kl
  )
  if chunked:
    some = [
        cut(edit, 4, int(rng.integers(2))) if rng.random() < 0.7 else edit
        for edit in some
    ]
  return some


def check_ragged(case, rows: types.Ragged) -> None:
  """Asserts that index, row and column are each other's inverse."""
  index, row, column = (np.asarray(x) for x in (rows.index, rows.row,
                                                rows.column))  # fmt: skip
  count, places = len(index), len(row)
  real = rows.columns.segment != NONE
  np.testing.assert_array_equal(index == places, ~real)
  np.testing.assert_array_equal(rows.columns.position[~real], 0)
  np.testing.assert_array_equal(rows.columns.segment[real], types.TRUNK)
  # Rows are filled from their first column on, by tokens that follow each
  # other in the text.
  np.testing.assert_array_equal(real[:, 1:] & ~real[:, :-1], False)
  step = np.diff(rows.columns.position, axis=1)
  np.testing.assert_array_equal(step[real[:, 1:]], 1)
  used = index[real]
  case.assertLen(set(used.tolist()), len(used))
  np.testing.assert_array_equal(row[used], np.nonzero(real)[0])
  np.testing.assert_array_equal(column[used], np.nonzero(real)[1])
  free = np.setdiff1d(np.arange(places), used)
  np.testing.assert_array_equal(row[free], count)
  np.testing.assert_array_equal(column[free], 0)
  for array in (index, row, column, *vars(rows.columns).values()):
    case.assertEqual(array.dtype, np.int32)


def tile_rows(tile, slot: int) -> list[tuple[list[int], list[int], int]]:
  """Reads a slot back: (tokens, positions, position of the anchor) a row."""
  width = tile.anchor.shape[1]
  found = []
  for r in range(slot * width, (slot + 1) * width):
    real = tile.rows.columns.segment[r] != NONE
    place = tile.anchor[slot, r - slot * width]
    assert tile.rows.row[place] == r
    position = tile.rows.columns.position[r]
    found.append((
        tile.tokens[0, tile.rows.index[r, real]].tolist(),
        position[real].tolist(),
        int(position[tile.rows.column[place]]),
    ))  # fmt: skip
  return found


class FrameTest(parameterized.TestCase):

  @parameterized.product(anchor=list(encoding.ANCHORS), kl=['{} is a', None])
  def test_trunks_are_the_longest_common_heads(self, anchor, kl):
    edits = encode(anchor=anchor, kl_template=kl)
    frame = plan_lib.frame(edits)
    self.assertEqual(frame.kl, kl is not None)
    self.assertEqual(frame.contexts, len(TEMPLATES))
    self.assertEqual(frame.rows, len(TEMPLATES) + frame.kl)
    for c, trunk in enumerate(frame.trunk):
      length = 0
      while all(
          length < edit.anchors[c]
          and edit.rows[c][length] == edits[0].rows[c][length]
          for edit in edits
      ):
        length += 1
      np.testing.assert_array_equal(trunk, edits[0].rows[c][:length])
    self.assertEqual(frame.shared, max(map(len, frame.trunk)))
    # The context in words is shared as a whole, and one token begins all.
    self.assertGreater(len(frame.trunk[1]), 3)
    self.assertLen(frame.trunk[0], 1)
    tokens, columns = packer.trunk_columns(frame)
    self.assertEqual(tokens.shape, (frame.rows, frame.shared))
    for c, ids in enumerate((*frame.trunk, [])[: frame.rows]):
      real = columns.segment[c] == types.TRUNK
      np.testing.assert_array_equal(tokens[c, real], ids)
      np.testing.assert_array_equal(columns.position[c, real], range(len(ids)))
      self.assertFalse(
          tokens[c, ~real].any() or columns.segment[c, ~real].any()
      )

  def test_equal_edits_share_what_is_left_of_the_anchor(self):
    edit = encode()[1]
    frame = plan_lib.frame([edit, edit])
    for row, anchor, trunk in zip(edit.rows, edit.anchors, frame.trunk):
      np.testing.assert_array_equal(trunk, row[:anchor])

  def test_nothing_is_shared_if_not_wanted(self):
    edits = encode()
    for frame in (
        plan_lib.frame(edits, share=False),
        plan_lib.frame(edits).apart(),
    ):
      self.assertEqual(frame.shared, 0)
      self.assertEqual(frame.contexts, len(TEMPLATES))
      self.assertEqual(frame.key, frame.whole)
      tokens, _ = packer.trunk_columns(frame)
      self.assertEqual(tokens.shape, (frame.rows, 0))

  def test_rooms_by_width(self):
    edits = random_edits(40, 3, chunked=True)
    suffix = [
        max(
            edit.stage(k, c).end - edit.stage(k, c).anchor
            for k in range(edit.stages)
            for c in range(len(edit.rows))
        )
        for edit in edits
    ]
    frame = plan_lib.frame(edits, widths=(4, 7))
    self.assertLen(frame.rooms, 3)
    limits = [room.limit for room in frame.rooms]
    self.assertEqual(limits, [4, 7, max(suffix)])
    for edit, length in zip(edits, suffix):
      number = frame.room(edit)
      self.assertLessEqual(length, frame.rooms[number].width)
      self.assertLessEqual(length, limits[number])
      self.assertGreater(length, [0, *limits][number])
    # A limit that nobody needs makes no room.
    self.assertLen(plan_lib.frame(edits, widths=(1, 100)).rooms, 1)

  @parameterized.product(slots=[None, 1, 2, 8], places=[1, 64], batch=[None, 3])
  def test_rooms_hold_their_largest_edit(self, slots, places, batch):
    edits = random_edits(20, 4, chunked=True)
    frame = plan_lib.frame(
        edits, slots=slots, places=places, batch=batch, widths=(6,)
    )
    self.assertEqual(frame.batch, batch or 20)
    for number, room in enumerate(frame.rooms):
      members = [edit for edit in edits if frame.room(edit) == number]
      self.assertBetween(room.slots, 1, min(batch or 20, len(members)))
      self.assertLessEqual(room.slots, 1.2 * (slots or 20) + 1)
      self.assertLessEqual(room.tile[0], room.slots)
      for edit in members:
        for k in range(edit.stages):
          self.assertTrue(slots_lib.Seating(frame, room).fits(edit, k))
          for c in range(len(edit.rows)):
            self.assertLessEqual(len(edit.stage(k, c).labels), room.labels)

  def test_the_kl_row_has_a_place(self):
    # Sixteen columns are a whole step of the budget; one more is needed.
    ids = np.arange(2, 18, dtype=np.int32)
    edit = encoding.EncodedEdit(1, (ids[:1],), (0,), ids, ids[:1])
    frame = plan_lib.frame([edit])
    self.assertGreater(frame.rooms[0].places, len(ids))
    self.assertTrue(slots_lib.Seating(frame, frame.rooms[0]).fits(edit))

  def test_misuse(self):
    edits = encode()
    with self.assertRaisesRegex(ValueError, 'slot'):
      plan_lib.frame(edits, slots=0)
    fewer = [dataclasses.replace(edits[0], rows=edits[0].rows[:2])]
    for other in (encode(kl_template=None)[:1], fewer):
      with self.assertRaisesRegex(ValueError, 'contexts'):
        plan_lib.frame([edits[1], *other])
    with self.assertRaises(ValueError):
      plan_lib.frame([])


class TileTest(parameterized.TestCase):

  def _left(self, tile, slot, wanted):
    """The columns left of the anchor, as rows of their own."""
    width = tile.anchor.shape[1]
    for c, (tokens, start, anchor) in enumerate(wanted):
      r = slot * width + c
      rows = tile.left.rows
      real = rows.columns.segment[r] != NONE
      here = tile.left.index[rows.index[r, real]]
      count = anchor - start
      np.testing.assert_array_equal(tile.tokens[0, here], tokens[:count])
      np.testing.assert_array_equal(
          rows.columns.position[r, real], np.arange(start, anchor)
      )
      np.testing.assert_array_equal(here, tile.rows.index[r, : anchor - start])

  @parameterized.product(
      slots=[1, 2, 8],
      share=[True, False],
      anchor=list(encoding.ANCHORS),
      kl=['{} is a', None],
      window=[None, 4],
  )
  def test_edits_can_be_read_back_from_row_tiles(
      self, slots, share, anchor, kl, window
  ):
    edits = encode(anchor=anchor, kl_template=kl)
    if window:
      edits = [cut(edit, window) for edit in edits]
    frame = plan_lib.frame(edits, slots=slots, share=share, widths=(12,))
    seen = []
    for number, room in enumerate(frame.rooms):
      order = [i for i, e in enumerate(edits) if frame.room(e) == number][::-1]
      begin = len(seen)
      for tile in packer.row_tiles(edits, order, frame, room):
        self.assertEqual(tile.edit.shape, (room.tile[0],))
        self.assertEqual(tile.tokens.shape, (1, room.tile[1]))
        self.assertEqual(tile.rows.index.shape[1], room.tile[2])
        self.assertEqual(tile.left.index.shape, (room.left[0],))
        self.assertEqual(tile.left.rows.index.shape[1], room.left[1])
        check_ragged(self, tile.rows)
        check_ragged(self, tile.left.rows)
        contexts = tile.context.reshape(-1, frame.rows)
        np.testing.assert_array_equal(contexts - np.arange(frame.rows), 0)
        for slot, i in enumerate(tile.edit):
          if i < 0:
            continue
          seen.append(int(i))
          wanted = [
              (edits[i].text(c)[len(trunk) :].tolist(), len(trunk), column)
              for c, (trunk, column) in enumerate(
                  zip(frame.trunk, edits[i].anchors)
              )
          ]
          if kl:
            ids = edits[i].kl.tolist()
            wanted.append((ids, 0, len(ids) - 1))
          found = tile_rows(tile, slot)
          self.assertLen(found, len(wanted))
          for (tokens, positions, at), (ids, start, column) in zip(
              found, wanted
          ):
            self.assertEqual(tokens, ids)
            self.assertEqual(positions, [*range(start, start + len(ids))])
            self.assertEqual(at, column)
          self._left(tile, slot, wanted)
      self.assertEqual(seen[begin:], order)
    self.assertCountEqual(seen, range(len(edits)))

  @parameterized.product(
      slots=[1, 8],
      share=[True, False, 'apart'],
      window=[None, 4],
      text=[True, False],
  )
  def test_edits_can_be_read_back_from_key_tiles(
      self, slots, share, window, text
  ):
    edits = encode()
    if window:
      edits = [cut(edit, window, 1) for edit in edits]
    frame = plan_lib.frame(edits, slots=slots, share=bool(share), places=8)
    frame = frame.apart() if share == 'apart' else frame
    rows, places, width = frame.key.text if text else frame.key.upto
    for bare, contexts in ((True, [0]), (False, [1, 2])):
      seen = []
      for tile in packer.key_tiles(edits, frame, bare=bare, text=text):
        self.assertEqual(tile.tokens.shape, (1, places))
        self.assertEqual(tile.rows.index.shape, (rows, width))
        self.assertEqual(tile.anchor.shape, (rows, frame.stages))
        self.assertIsNone(tile.left)
        check_ragged(self, tile.rows)
        for r, (i, c) in enumerate(zip(tile.edit, tile.context)):
          if i < 0:
            continue
          seen.append((int(i), int(c)))
          edit, begin = edits[i], len(frame.trunk[c])
          anchors = [edit.stage(k, c).anchor for k in range(edit.stages)]
          whole = [*edit.rows[c], *edit.target]
          end = len(whole) if text else anchors[-1] + 1
          used = tile.rows.columns.segment[r] != types.PADDING
          here = tile.rows.index[r, used]
          self.assertEqual(tile.tokens[0, here].tolist(), whole[begin:end])
          self.assertEqual(
              tile.rows.columns.position[r, used].tolist(), [*range(begin, end)]
          )
          self.assertEqual(
              tile.anchor[r, : edit.stages].tolist(),
              [here[anchor - begin] for anchor in anchors],
          )
          self.assertTrue((tile.anchor[r, edit.stages :] == places).all())
      # Edit by edit: readers count on it.
      self.assertEqual(seen, [(i, c) for i in range(5) for c in contexts])

  def test_one_context_has_no_others(self):
    edits = facts.random_edits(3, seed=1, contexts=1)
    frame = plan_lib.frame(edits)
    self.assertEmpty(list(packer.key_tiles(edits, frame, bare=False)))

  def test_empty_slots_are_all_padding(self):
    edits = encode()
    frame = plan_lib.frame(edits, slots=8)
    (room,) = frame.rooms
    for tile, width in (
        (next(packer.row_tiles(edits, [3], frame, room)), frame.rows),
        (next(packer.key_tiles(edits[:1], frame, bare=True)), 1),
    ):
      self.assertGreater(len(tile.edit), 1)
      self.assertGreaterEqual(tile.edit[0], 0)
      np.testing.assert_array_equal(tile.edit[1:], -1)
      places = tile.tokens.shape[1]
      np.testing.assert_array_equal(tile.anchor[1:], places)
      np.testing.assert_array_equal(tile.rows.index[width:], places)
      self.assertFalse(tile.rows.columns.segment[width:].any())
      empty = tile.rows.row == len(tile.rows.index)
      self.assertFalse(tile.tokens[0, empty].any())
      if tile.left is not None:
        self.assertFalse(tile.left.rows.columns.segment[width:].any())

  def test_no_edits_no_tiles(self):
    edits = encode()
    frame = plan_lib.frame(edits)
    self.assertEmpty(list(packer.row_tiles(edits, [], frame, frame.rooms[0])))
    self.assertEmpty(list(packer.key_tiles([], frame, bare=True)))


class Model:
  """Says slowly what a `Seating` must look like."""

  def __init__(self, case, frame, room):
    self.case, self.frame, self.room = case, frame, room
    self.seating = slots_lib.Seating(frame, room)
    self.at = {}  # slot -> (edit, stage, seated)

  def need(self, edit, k) -> tuple[int, int]:
    """(places, scored places) of a stage."""
    stages = [edit.stage(k, c) for c in range(self.frame.contexts)]
    places = sum(stage.end - stage.anchor for stage in stages)
    places += self.frame.kl and k == 0
    return places, sum(len(stage.labels) for stage in stages)

  def free(self) -> tuple[int, int]:
    """(places, scored places) that nobody has."""
    taken = [self.need(e, k) for e, k, seated in self.at.values() if seated]
    places, scored = np.sum([(0, 0), *taken], axis=0)
    return self.room.places - places, self.room.scored - scored

  def fits(self, edit, k) -> bool:
    """Compares `fits` with a count of places."""
    wanted = all(x <= y for x, y in zip(self.need(edit, k), self.free()))
    self.case.assertEqual(self.seating.fits(edit, k), wanted)
    return wanted

  def sit(self, slot, edit, k=0) -> None:
    """Seats a stage and compares the places it was given."""
    places = self.seating.sit(slot, edit, k)
    rows = slice(slot * self.frame.rows, (slot + 1) * self.frame.rows)
    np.testing.assert_array_equal(places, self.seating.seats().rows.index[rows])
    self.at[slot] = (edit, k, True)

  def move_on(self, slot) -> None:
    """Ends a stage and compares where its keys and values go."""
    edit, k, _ = self.at[slot]
    column = self.seating.move_on(slot)
    self.case.assertEqual(column, self.offsets(edit, k)[k])
    # What is copied there is as wide as a row of the room.
    total = self.seating.seats().before.segment.shape[1]
    self.case.assertLessEqual(column + self.room.width, total)
    self.at[slot] = (edit, k, False)

  def leave(self, slot) -> None:
    """Frees a slot."""
    self.seating.leave(slot)
    del self.at[slot]

  def offsets(self, edit, k) -> list[int]:
    """First column of earlier keys and values of stages 0 to k."""
    found = [self.frame.shared + self.room.left[1]]
    for j in range(k):
      found.append(found[-1] + max(self.moved(edit, j)))
    return found

  def moved(self, edit, k) -> list[int]:
    """Columns between a stage's anchor and the next one's, a row."""
    stages = lambda c: (edit.stage(k, c), edit.stage(k + 1, c))
    return [b.anchor - a.anchor for a, b in map(stages, range(len(edit.rows)))]

  def check(self) -> None:
    """Compares all tables with what they should hold."""
    case, frame, room = self.case, self.frame, self.room
    seats = self.seating.seats()
    check_ragged(case, seats.rows)
    check_ragged(case, seats.keep.rows)
    taken = (seats.rows.row < len(seats.rows.index)).sum()
    case.assertEqual(room.places - taken, self.free()[0])
    kept = seats.keep.index < room.places
    case.assertEqual(room.scored - kept[: room.scored].sum(), self.free()[1])
    case.assertEqual(kept.shape, (room.scored + room.slots * frame.kl,))
    # A scored place is empty, or a row asks there.
    asking = seats.keep.rows.row < len(seats.keep.rows.index)
    np.testing.assert_array_equal(kept, asking)
    held = [s in self.at for s in range(room.slots)]
    case.assertEqual([x is not None for x in self.seating.held], held)
    idle = held.index(False) if not all(held) else None
    case.assertEqual(self.seating.idle, idle)
    for slot in range(room.slots):
      edit, k, seated = self.at.get(slot, (None, 0, False))
      case.assertEqual(seats.live[slot], seated)
      rows = range(slot * frame.rows, (slot + 1) * frame.rows)
      for c, r in enumerate(rows):
        self._before(seats, edit, k + (edit is not None and not seated), (c, r))
        if seated and c < frame.contexts:
          self._row(seats, edit.stage(k, c), (slot, c, r))
        elif seated and k == 0:
          self._kl(seats, edit, (slot, c, r))
        else:
          case.assertFalse(seats.rows.columns.segment[r].any())
          case.assertFalse(seats.keep.rows.columns.segment[r].any())
          case.assertEqual(seats.anchor[slot, c], room.places)
          if c < frame.contexts:
            np.testing.assert_array_equal(seats.pick[slot, c], room.scored)

  def _row(self, seats, stage, where) -> None:
    slot, c, r = where
    case, count = self.case, len(stage.labels)
    real = seats.rows.columns.segment[r] != NONE
    np.testing.assert_array_equal(
        seats.rows.columns.position[r, real], range(stage.anchor, stage.end)
    )
    place = seats.rows.index[r, 0]
    case.assertEqual(seats.anchor[slot, c], place)
    pick = seats.pick[slot, c]
    np.testing.assert_array_equal(pick[count:], self.room.scored)
    pick = pick[:count]
    np.testing.assert_array_equal(seats.label[pick], stage.labels)
    ask = seats.keep.rows
    np.testing.assert_array_equal(ask.index[r, :count], pick)
    case.assertEqual((ask.columns.segment[r] != NONE).sum(), count)
    # A label is foretold one column before its own.
    places = seats.keep.index[pick]
    np.testing.assert_array_equal(seats.rows.row[places], r)
    columns = np.arange(stage.first, stage.end)
    np.testing.assert_array_equal(ask.columns.position[r, :count], columns)
    np.testing.assert_array_equal(
        seats.rows.columns.position[r, seats.rows.column[places]], columns
    )

  def _kl(self, seats, edit, where) -> None:
    slot, c, r = where
    case, last = self.case, len(edit.kl) - 1
    for rows in (seats.rows, seats.keep.rows):
      real = rows.columns.segment[r] != NONE
      case.assertEqual(rows.columns.position[r, real].tolist(), [last])
    place = seats.rows.index[r, 0]
    case.assertEqual(seats.anchor[slot, c], place)
    case.assertEqual(seats.keep.rows.index[r, 0], self.room.scored + slot)
    case.assertEqual(seats.keep.index[self.room.scored + slot], place)

  def _before(self, seats, edit, k, where) -> None:
    """Columns before the anchor of stage k: each position once, in place."""
    c, r = where
    wanted = np.full(seats.before.position.shape[1], -1)

    def put(at, begin, end):
      wanted[at : at + end - begin] = np.arange(begin, end)

    if edit is not None and c < self.frame.contexts:
      trunk = len(self.frame.trunk[c])
      put(0, 0, trunk)
      put(self.frame.shared, trunk, edit.anchors[c])
      for j, at in enumerate(self.offsets(edit, k)[:k]):
        put(at, edit.stage(j, c).anchor, edit.stage(j + 1, c).anchor)
      seen = np.sort(wanted[wanted >= 0])
      np.testing.assert_array_equal(seen, range(edit.stage(k, c).anchor))
    elif edit is not None:
      put(self.frame.shared, 0, len(edit.kl) - 1)
    np.testing.assert_array_equal(
        seats.before.segment[r], np.where(wanted >= 0, types.TRUNK, NONE)
    )
    np.testing.assert_array_equal(
        seats.before.position[r], np.maximum(wanted, 0)
    )


class SeatingTest(parameterized.TestCase):

  def test_an_empty_room(self):
    edits = encode()
    frame = plan_lib.frame(edits, slots=3)
    Model(self, frame, frame.rooms[0]).check()

  @parameterized.parameters('{} is a', None)
  def test_fits_is_exact(self, kl):
    edits = [cut(edit, 2, 1) for edit in encode(kl_template=kl)]
    frame = plan_lib.frame(edits, slots=2)
    room = frame.rooms[0]
    for edit in edits:
      for k in range(edit.stages):
        places, scored = Model(self, frame, room).need(edit, k)
        for less in ((0, 0), (1, 0), (0, 1)):
          size = (places - less[0], scored - less[1])
          tight = room._replace(places=size[0], scored=size[1])
          model = Model(self, frame, tight)
          self.assertEqual(model.fits(edit, k), less == (0, 0))
        whole = room._replace(places=places, scored=scored)
        slots_lib.Seating(frame, whole).sit(0, edit, k)

  @parameterized.product(anchor=list(encoding.ANCHORS), kl=['{} is a', None])
  def test_sit_and_leave(self, anchor, kl):
    edits = encode(anchor=anchor, kl_template=kl)
    frame = plan_lib.frame(edits, slots=5)
    model = Model(self, frame, frame.rooms[0])
    self.assertEqual(frame.rooms[0].slots, 5)
    for edit in edits:
      self.assertTrue(model.fits(edit, 0))
      model.sit(model.seating.idle, edit)
      model.check()
    self.assertIsNone(model.seating.idle)
    for slot in (3, 0, 4, 1, 2):
      model.leave(slot)
      model.check()

  def test_freed_places_are_used_again(self):
    edits = encode()
    frame = plan_lib.frame(edits, slots=1)
    model = Model(self, frame, frame.rooms[0])
    for i in (2, 0, 4, 2, 1, 3, 2) * 3:
      self.assertTrue(model.fits(edits[i], 0))
      model.sit(0, edits[i])
      model.leave(0)
    model.sit(0, edits[2])
    model.check()

  def test_views_do_not_change_later(self):
    edits = encode()
    frame = plan_lib.frame(edits, slots=2)
    room = slots_lib.Seating(frame, frame.rooms[0])
    room.sit(0, edits[0], 0)
    before = room.seats()
    held = [np.array(x) for x in _leaves(before)]
    room.leave(0)
    room.sit(0, edits[2], 0)
    for old, now in zip(held, _leaves(before)):
      np.testing.assert_array_equal(old, now)

  @parameterized.product(overlap=[0, 1], kl=['{} is a', None])
  def test_chunks_move_on(self, overlap, kl):
    edits = [cut(edit, 2 + overlap, overlap) for edit in encode(kl_template=kl)]
    self.assertGreater(max(edit.stages for edit in edits), 2)
    frame = plan_lib.frame(edits, slots=2)
    model = Model(self, frame, frame.rooms[0])
    for edit in edits:
      model.sit(1, edit)
      for k in range(1, edit.stages):
        model.move_on(1)
        model.check()
        self.assertTrue(model.fits(edit, k))
        model.sit(1, edit, k)
        model.check()
      model.leave(1)
    model.check()

  def test_contexts_with_different_ends_move_on(self):
    # Text behind the placeholder puts anchors at different distances.
    edits = encoding.encode_edits(
        text_tokenizers.byte_level(),
        RECORDS,
        ['{}', 'say {} now or never'],
        max_tokens=99,
    )
    edits = [cut(edit, 2) for edit in edits]
    frame = plan_lib.frame(edits, slots=1)
    model = Model(self, frame, frame.rooms[0])
    edit = edits[2]
    self.assertLen(set(model.moved(edit, 0)), 2)
    model.sit(0, edit)
    for k in range(1, edit.stages):
      model.move_on(0)
      model.sit(0, edit, k)
      model.check()

  @parameterized.product(seed=[0, 1, 2, 3], kl=[True, False])
  def test_any_sequence_keeps_the_tables(self, seed, kl):
    rng = np.random.default_rng(seed)
    edits = random_edits(15, seed, kl=kl, chunked=seed > 0)
    frame = plan_lib.frame(
        edits, slots=int(rng.integers(2, 6)), share=bool(seed % 2), widths=(5,)
    )
    room = frame.rooms[-1]
    edits = [e for e in edits if frame.room(e) == len(frame.rooms) - 1]
    model = Model(self, frame, room)
    crowded = 0
    for _ in range(80):
      # Rather sit than leave: rooms are to be full.
      idle = model.seating.idle
      slot = int(rng.integers(room.slots))
      slot = slot if idle is None or rng.random() < 0.4 else idle
      edit, k, seated = model.at.get(slot, (None, 0, False))
      if edit is None:
        edit = edits[rng.integers(len(edits))]
        if model.fits(edit, 0):
          model.sit(slot, edit)
        else:
          crowded += 1
      elif not seated:
        if model.fits(edit, k + 1):
          model.sit(slot, edit, k + 1)
      elif k + 1 < edit.stages:
        model.move_on(slot)
      else:
        model.leave(slot)
      model.check()
    self.assertGreater(crowded, 0)
    for slot in list(model.at):
      model.leave(slot)
    model.check()
    self.assertEqual(model.free(), (room.places, room.scored))


def _leaves(seats: slots_lib.Seats) -> list[np.ndarray]:
  """All arrays of the seats."""
  rows, keep = seats.rows, seats.keep
  found = [seats.anchor, seats.pick, seats.label, seats.live, keep.index]
  for x in (rows, keep.rows):
    found += [x.index, x.row, x.column, x.columns.position, x.columns.segment]
  return [*found, seats.before.position, seats.before.segment]


if __name__ == '__main__':
  absltest.main()
