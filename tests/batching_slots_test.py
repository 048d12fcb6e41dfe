"""Tiles and rooms hold what edits say; every place has one column at most."""

from __future__ import annotations

import dataclasses

import numpy as np
import text_helpers
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import types
from jaxedit.batching import edits as edits_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.batching import slots as slots_lib
from jaxedit.testing import facts
from jaxedit.text import encoding

TEMPLATES = ('{}', 'The guitar in Paris. {}', 'You. {}')
RECORDS = tuple(
    types.EditRequest(i, f'r{i}', prompt, subject, target)
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
  return text_helpers.encode_edits(
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


def check_ragged(case, rows: types.PackedSequences) -> None:
  """Asserts that index, row and column are each other's inverse, by shards."""
  index, row, column = (np.asarray(x) for x in (rows.index, rows.row,
                                                rows.column))  # fmt: skip
  count, places = len(index), len(row)
  real = rows.layout.segment_ids != NONE
  np.testing.assert_array_equal(index == places, ~real)
  np.testing.assert_array_equal(rows.layout.positions[~real], 0)
  np.testing.assert_array_equal(rows.layout.segment_ids[real], types.SHARED)
  # Rows are filled from their first column on, by tokens that follow each
  # other in the text.
  np.testing.assert_array_equal(real[:, 1:] & ~real[:, :-1], False)
  step = np.diff(rows.layout.positions, axis=1)
  np.testing.assert_array_equal(step[real[:, 1:]], 1)
  used = index[real]
  case.assertLen(set(used.tolist()), len(used))
  np.testing.assert_array_equal(row[used], np.nonzero(real)[0])
  np.testing.assert_array_equal(column[used], np.nonzero(real)[1])
  shard = np.nonzero(real)[0] // (count // rows.shards)
  np.testing.assert_array_equal(used // (places // rows.shards), shard)
  free = np.setdiff1d(np.arange(places), used)
  np.testing.assert_array_equal(row[free], count)
  np.testing.assert_array_equal(column[free], 0)
  layout = rows.layout.positions, rows.layout.segment_ids
  for array in (index, row, column, *layout):
    case.assertEqual(array.dtype, np.int32)


def tile_rows(packed, slot: int) -> list[tuple[list[int], list[int], int]]:
  """Reads a slot back: (tokens, positions, position of the anchor) a row."""
  width = packed.anchor.shape[1]
  found = []
  for r in range(slot * width, (slot + 1) * width):
    real = packed.rows.layout.segment_ids[r] != NONE
    place = packed.anchor[slot, r - slot * width]
    assert packed.rows.row[place] == r
    positions = packed.rows.layout.positions[r]
    found.append((
        packed.tokens[0, packed.rows.index[r, real]].tolist(),
        positions[real].tolist(),
        int(positions[packed.rows.column[place]]),
    ))  # fmt: skip
  return found


class FrameTest(parameterized.TestCase):

  @parameterized.product(anchor=list(encoding.ANCHORS), kl=['{} is a', None])
  def test_prefixes_are_the_longest_common_heads(self, anchor, kl):
    edits = encode(anchor=anchor, kl_template=kl)
    plan = plan_lib.plan_shapes(edits)
    self.assertEqual(plan.kl, kl is not None)
    self.assertEqual(plan.contexts, len(TEMPLATES))
    self.assertEqual(plan.rows, len(TEMPLATES) + plan.kl)
    for c, shared_prefix in enumerate(plan.shared_prefix):
      length = 0
      while all(
          length < edit.anchors[c]
          and edit.rows[c][length] == edits[0].rows[c][length]
          for edit in edits
      ):
        length += 1
      np.testing.assert_array_equal(shared_prefix, edits[0].rows[c][:length])
    self.assertEqual(plan.shared, max(map(len, plan.shared_prefix)))
    # The context in words is shared as a whole, and one token begins all.
    self.assertGreater(len(plan.shared_prefix[1]), 3)
    self.assertLen(plan.shared_prefix[0], 1)
    tokens, layout = edits_lib.pack_shared_prefix(plan)
    self.assertEqual(tokens.shape, (plan.rows, plan.shared))
    for c, ids in enumerate((*plan.shared_prefix, [])[: plan.rows]):
      real = layout.segment_ids[c] == types.SHARED
      np.testing.assert_array_equal(tokens[c, real], ids)
      np.testing.assert_array_equal(layout.positions[c, real], range(len(ids)))
      self.assertFalse(
          tokens[c, ~real].any() or layout.segment_ids[c, ~real].any()
      )

  def test_equal_edits_share_what_is_left_of_the_anchor(self):
    edit = encode()[1]
    plan = plan_lib.plan_shapes([edit, edit])
    for row, anchor, shared_prefix in zip(
        edit.rows, edit.anchors, plan.shared_prefix
    ):
      np.testing.assert_array_equal(shared_prefix, row[:anchor])

  def test_nothing_is_shared_if_not_wanted(self):
    edits = encode()
    for plan in (
        plan_lib.plan_shapes(edits, share=False),
        plan_lib.plan_shapes(edits).independent(),
    ):
      self.assertEqual(plan.shared, 0)
      self.assertEqual(plan.contexts, len(TEMPLATES))
      self.assertEqual(plan.prompts, plan.unshared_prompts)
      tokens, _ = edits_lib.pack_shared_prefix(plan)
      self.assertEqual(tokens.shape, (plan.rows, 0))

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
    plan = plan_lib.plan_shapes(edits, max_suffixes=(4, 7))
    self.assertLen(plan.shapes, 3)
    limits = [batch_shape.max_suffix for batch_shape in plan.shapes]
    self.assertEqual(limits, [4, 7, max(suffix)])
    for edit, length in zip(edits, suffix):
      number = plan.shape_of(edit)
      self.assertLessEqual(length, plan.shapes[number].length)
      self.assertLessEqual(length, limits[number])
      self.assertGreater(length, [0, *limits][number])
    # A limit that nobody needs makes no room.
    self.assertLen(plan_lib.plan_shapes(edits, max_suffixes=(1, 100)).shapes, 1)

  @parameterized.product(
      slots=[None, 1, 2, 8],
      token_budget=[1, 64],
      batch=[None, 3],
      shards=[1, 4],
  )
  def test_rooms_hold_their_largest_edit(
      self, slots, token_budget, batch, shards
  ):
    edits = random_edits(20, 4, chunked=True)
    plan = plan_lib.plan_shapes(
        edits,
        slots=slots,
        token_budget=token_budget,
        batch=batch,
        shards=shards,
        max_suffixes=(6,),
    )
    self.assertEqual(plan.batch, batch or 20)
    share = lambda n: -(-n // shards)
    for number, batch_shape in enumerate(plan.shapes):
      members = [edit for edit in edits if plan.shape_of(edit) == number]
      most = share(min(batch or 20, len(members)))
      self.assertBetween(batch_shape.slots / shards, 1, most)
      wanted = 1.2 * share(slots or 20) + 1
      self.assertLessEqual(batch_shape.slots / shards, wanted)
      self.assertLessEqual(batch_shape.prefill_shape[0], batch_shape.slots)
      allocator = slots_lib.SlotAllocator(plan, batch_shape)
      smaller = batch_shape.compacted or batch_shape
      for counts in (
          *(shape[1:3] for shape in (batch_shape, smaller)),
          *(shape.prefill_shape[:2] for shape in (batch_shape, smaller)),
          (batch_shape.logit_budget, batch_shape.prefix_shape[0]),
          (smaller.logit_budget, plan.prompts.upto[0]),
          (plan.prompts.text[1], plan.unshared_prompts.upto[1]),
      ):
        self.assertEqual([n % shards for n in counts], [0, 0])
      for edit in members:
        for k in range(edit.stages):
          for slot in range(batch_shape.slots):
            self.assertTrue(allocator.fits(edit, k, slot=slot))
          for c in range(len(edit.rows)):
            self.assertLessEqual(
                len(edit.stage(k, c).labels), batch_shape.labels
            )

  def test_the_kl_row_has_a_place(self):
    # Sixteen columns are a whole step of the budget; one more is needed.
    ids = np.arange(2, 18, dtype=np.int32)
    edit = encoding.EncodedEdit(1, (ids[:1],), (0,), ids, ids[:1])
    plan = plan_lib.plan_shapes([edit])
    self.assertGreater(plan.shapes[0].token_budget, len(ids))
    self.assertTrue(slots_lib.SlotAllocator(plan, plan.shapes[0]).fits(edit))

  def test_misuse(self):
    edits = encode()
    with self.assertRaisesRegex(ValueError, 'slot'):
      plan_lib.plan_shapes(edits, slots=0)
    fewer = [dataclasses.replace(edits[0], rows=edits[0].rows[:2])]
    for other in (encode(kl_template=None)[:1], fewer):
      with self.assertRaisesRegex(ValueError, 'contexts'):
        plan_lib.plan_shapes([edits[1], *other])
    with self.assertRaises(ValueError):
      plan_lib.plan_shapes([])


class TileTest(parameterized.TestCase):

  def _left(self, packed, slot, wanted):
    """The columns left of the anchor, as rows of their own."""
    width = packed.anchor.shape[1]
    for c, (tokens, start, anchor) in enumerate(wanted):
      r = slot * width + c
      rows = packed.prefix.rows
      real = rows.layout.segment_ids[r] != NONE
      here = packed.prefix.index[rows.index[r, real]]
      count = anchor - start
      np.testing.assert_array_equal(packed.tokens[0, here], tokens[:count])
      np.testing.assert_array_equal(
          rows.layout.positions[r, real], np.arange(start, anchor)
      )
      np.testing.assert_array_equal(
          here, packed.rows.index[r, : anchor - start]
      )

  @parameterized.product(
      slots=[1, 2, 8],
      share=[True, False],
      anchor=list(encoding.ANCHORS),
      kl=['{} is a', None],
      window_and_shards=[(None, 1), (4, 1), (4, 3)],
  )
  def test_edits_can_be_read_back_from_row_tiles(
      self, slots, share, anchor, kl, window_and_shards
  ):
    window, shards = window_and_shards
    edits = encode(anchor=anchor, kl_template=kl)
    if window:
      edits = [cut(edit, window) for edit in edits]
    plan = plan_lib.plan_shapes(
        edits, slots=slots, share=share, max_suffixes=(12,), shards=shards
    )
    seen = []
    for number, batch_shape in enumerate(plan.shapes):
      order = [i for i, e in enumerate(edits) if plan.shape_of(e) == number][
          ::-1
      ]
      begin = len(seen)
      for packed in edits_lib.pack_edits(edits, order, plan, batch_shape):
        self.assertEqual(packed.edit.shape, (batch_shape.prefill_shape[0],))
        self.assertEqual(packed.tokens.shape, (1, batch_shape.prefill_shape[1]))
        self.assertEqual(
            packed.rows.index.shape[1], batch_shape.prefill_shape[2]
        )
        self.assertEqual(
            packed.prefix.index.shape, (batch_shape.prefix_shape[0],)
        )
        self.assertEqual(
            packed.prefix.rows.index.shape[1], batch_shape.prefix_shape[1]
        )
        check_ragged(self, packed.rows)
        check_ragged(self, packed.prefix.rows)
        contexts = packed.context.reshape(-1, plan.rows)
        np.testing.assert_array_equal(contexts - np.arange(plan.rows), 0)
        for slot, i in enumerate(packed.edit):
          if i < 0:
            continue
          seen.append(int(i))
          wanted = [
              (
                  edits[i].text(c)[len(shared_prefix) :].tolist(),
                  len(shared_prefix),
                  column,
              )
              for c, (shared_prefix, column) in enumerate(
                  zip(plan.shared_prefix, edits[i].anchors)
              )
          ]
          if kl:
            ids = edits[i].kl.tolist()
            wanted.append((ids, 0, len(ids) - 1))
          found = tile_rows(packed, slot)
          self.assertLen(found, len(wanted))
          for (tokens, positions, at), (ids, start, column) in zip(
              found, wanted
          ):
            self.assertEqual(tokens, ids)
            self.assertEqual(positions, [*range(start, start + len(ids))])
            self.assertEqual(at, column)
          self._left(packed, slot, wanted)
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
    plan = plan_lib.plan_shapes(
        edits, slots=slots, share=bool(share), token_budget=8
    )
    plan = plan.independent() if share == 'apart' else plan
    rows, places, width = plan.prompts.text if text else plan.prompts.upto
    for plain, contexts in ((True, [0]), (False, [1, 2])):
      seen = []
      for packed in edits_lib.pack_prompts(edits, plan, plain=plain, text=text):
        self.assertEqual(packed.tokens.shape, (1, places))
        self.assertEqual(packed.rows.index.shape, (rows, width))
        self.assertEqual(packed.anchor.shape, (rows, plan.stages))
        self.assertIsNone(packed.prefix)
        check_ragged(self, packed.rows)
        for r, (i, c) in enumerate(zip(packed.edit, packed.context)):
          if i < 0:
            continue
          seen.append((int(i), int(c)))
          edit, begin = edits[i], len(plan.shared_prefix[c])
          anchors = [edit.stage(k, c).anchor for k in range(edit.stages)]
          whole = [*edit.rows[c], *edit.target]
          end = len(whole) if text else anchors[-1] + 1
          used = packed.rows.layout.segment_ids[r] != types.PADDING
          here = packed.rows.index[r, used]
          self.assertEqual(packed.tokens[0, here].tolist(), whole[begin:end])
          self.assertEqual(
              packed.rows.layout.positions[r, used].tolist(),
              [*range(begin, end)],
          )
          self.assertEqual(
              packed.anchor[r, : edit.stages].tolist(),
              [here[anchor - begin] for anchor in anchors],
          )
          self.assertTrue((packed.anchor[r, edit.stages :] == places).all())
      # Edit by edit: readers count on it.
      self.assertEqual(seen, [(i, c) for i in range(5) for c in contexts])

  def test_one_context_has_no_others(self):
    edits = facts.random_edits(3, seed=1, contexts=1)
    plan = plan_lib.plan_shapes(edits)
    self.assertEmpty(list(edits_lib.pack_prompts(edits, plan, plain=False)))

  def test_empty_slots_are_all_padding(self):
    edits = encode()
    plan = plan_lib.plan_shapes(edits, slots=8)
    (batch_shape,) = plan.shapes
    for packed, width in (
        (next(edits_lib.pack_edits(edits, [3], plan, batch_shape)), plan.rows),
        (next(edits_lib.pack_prompts(edits[:1], plan, plain=True)), 1),
    ):
      self.assertGreater(len(packed.edit), 1)
      self.assertGreaterEqual(packed.edit[0], 0)
      np.testing.assert_array_equal(packed.edit[1:], -1)
      places = packed.tokens.shape[1]
      np.testing.assert_array_equal(packed.anchor[1:], places)
      np.testing.assert_array_equal(packed.rows.index[width:], places)
      self.assertFalse(packed.rows.layout.segment_ids[width:].any())
      empty = packed.rows.row == len(packed.rows.index)
      self.assertFalse(packed.tokens[0, empty].any())
      if packed.prefix is not None:
        self.assertFalse(packed.prefix.rows.layout.segment_ids[width:].any())

  def test_no_edits_no_tiles(self):
    edits = encode()
    plan = plan_lib.plan_shapes(edits)
    self.assertEmpty(
        list(edits_lib.pack_edits(edits, [], plan, plan.shapes[0]))
    )
    self.assertEmpty(list(edits_lib.pack_prompts([], plan, plain=True)))


class Model:
  """Says slowly what a `SlotAllocator` must look like."""

  def __init__(self, case, plan, batch_shape):
    self.case, self.plan, self.batch_shape = case, plan, batch_shape
    self.slots = slots_lib.SlotAllocator(plan, batch_shape)
    self.at = {}  # slot -> (edit, stage, seated)

  def need(self, edit, k) -> tuple[int, int]:
    """(places, scored places) of a stage."""
    stages = [edit.stage(k, c) for c in range(self.plan.contexts)]
    places = sum(stage.end - stage.anchor for stage in stages)
    places += self.plan.kl and k == 0
    return places, sum(len(stage.labels) for stage in stages)

  def shard(self, slot) -> int:
    """The shard of a slot."""
    return slot // (self.batch_shape.slots // self.batch_shape.shards)

  def left(self) -> np.ndarray:
    """(places, scored places) of every shard that nobody has."""
    shape = self.batch_shape
    budgets = np.array([shape.token_budget, shape.logit_budget])
    left = np.tile(budgets // shape.shards, (shape.shards, 1))
    for slot, (edit, k, seated) in self.at.items():
      if seated:
        left[self.shard(slot)] -= self.need(edit, k)
    return left

  def fits(self, edit, k, slot=0) -> bool:
    """Compares `fits` with a count of places."""
    wanted = (self.need(edit, k) <= self.left()[self.shard(slot)]).all()
    self.case.assertEqual(self.slots.fits(edit, k, slot=slot), wanted)
    return wanted

  def slot_for(self, edit, closed=()) -> int | None:
    """Compares the slot for a new edit with that of the emptiest shard."""
    free = self.slots.free_slots(closed)
    wanted = (s for s in range(self.batch_shape.slots) if s not in self.at)
    wanted = (s for s in wanted if self.shard(s) not in closed)
    wanted = [s for s in wanted if self.fits(edit, 0, s)]
    places = lambda s: (self.left()[self.shard(s)][0], -s)
    wanted = max(wanted, key=places, default=None)
    self.case.assertEqual(self.slots.slot_for(edit, free), wanted)
    return wanted

  def assign(self, slot, edit, k=0) -> None:
    """Assigns a stage and compares the places it was given."""
    places = self.slots.assign(slot, edit, k)
    rows = slice(slot * self.plan.rows, (slot + 1) * self.plan.rows)
    np.testing.assert_array_equal(places, self.slots.layout().rows.index[rows])
    self.at[slot] = (edit, k, True)

  def next_chunk(self, slot) -> None:
    """Ends a stage and compares where its keys and values go."""
    edit, k, _ = self.at[slot]
    column = self.slots.next_chunk(slot)
    self.case.assertEqual(column, self.offsets(edit, k)[k])
    # What is copied there is as wide as a row of the room.
    total = self.slots.layout().before.segment_ids.shape[1]
    self.case.assertLessEqual(column + self.batch_shape.length, total)
    self.at[slot] = (edit, k, False)

  def free(self, slot) -> None:
    """Frees a slot."""
    self.slots.free(slot)
    del self.at[slot]

  def offsets(self, edit, k) -> list[int]:
    """First column of earlier keys and values of stages 0 to k."""
    found = [self.plan.shared + self.batch_shape.prefix_shape[1]]
    for j in range(k):
      found.append(found[-1] + max(self.moved(edit, j)))
    return found

  def moved(self, edit, k) -> list[int]:
    """Tokens between a stage's anchor and the next one's, a row."""
    stages = lambda c: (edit.stage(k, c), edit.stage(k + 1, c))
    return [b.anchor - a.anchor for a, b in map(stages, range(len(edit.rows)))]

  def check(self) -> None:
    """Compares all tables with what they should hold."""
    case, plan, batch_shape = self.case, self.plan, self.batch_shape
    assigned = self.slots.layout()
    check_ragged(case, assigned.rows)
    check_ragged(case, assigned.outputs.rows)
    taken = (assigned.rows.row < len(assigned.rows.index)).sum()
    left = self.left()
    case.assertEqual(batch_shape.token_budget - taken, left[:, 0].sum())
    kept = assigned.outputs.index < batch_shape.token_budget
    scored = kept.reshape(batch_shape.shards, -1)
    scored = scored[:, : batch_shape.logit_budget // batch_shape.shards]
    np.testing.assert_array_equal((~scored).sum(axis=1), left[:, 1])
    case.assertEqual(
        kept.shape, (batch_shape.logit_budget + batch_shape.slots * plan.kl,)
    )
    # A scored place is empty, or a row asks there.
    asking = assigned.outputs.rows.row < len(assigned.outputs.rows.index)
    np.testing.assert_array_equal(kept, asking)
    held = [s in self.at for s in range(batch_shape.slots)]
    case.assertEqual([x is not None for x in self.slots.assigned], held)
    free_slot = held.index(False) if not all(held) else None
    case.assertEqual(self.slots.free_slot, free_slot)
    for slot in range(batch_shape.slots):
      edit, k, seated = self.at.get(slot, (None, 0, False))
      case.assertEqual(assigned.live[slot], seated)
      rows = range(slot * plan.rows, (slot + 1) * plan.rows)
      for c, r in enumerate(rows):
        self._before(
            assigned, edit, k + (edit is not None and not seated), (c, r)
        )
        if seated and c < plan.contexts:
          self._row(assigned, edit.stage(k, c), (slot, c, r))
        elif seated and k == 0:
          self._kl(assigned, edit, (slot, c, r))
        else:
          case.assertFalse(assigned.rows.layout.segment_ids[r].any())
          case.assertFalse(assigned.outputs.rows.layout.segment_ids[r].any())
          case.assertEqual(assigned.anchor[slot, c], batch_shape.token_budget)
          if c < plan.contexts:
            np.testing.assert_array_equal(
                assigned.pick[slot, c], batch_shape.logit_budget
            )

  def _row(self, assigned, stage, where) -> None:
    slot, c, r = where
    case, count = self.case, len(stage.labels)
    real = assigned.rows.layout.segment_ids[r] != NONE
    np.testing.assert_array_equal(
        assigned.rows.layout.positions[r, real], range(stage.anchor, stage.end)
    )
    place = assigned.rows.index[r, 0]
    case.assertEqual(assigned.anchor[slot, c], place)
    pick = assigned.pick[slot, c]
    np.testing.assert_array_equal(pick[count:], self.batch_shape.logit_budget)
    pick = pick[:count]
    np.testing.assert_array_equal(assigned.label[pick], stage.labels)
    ask = assigned.outputs.rows
    kept = ask.index[r, :count]
    # Places of earlier shards' KL rows lie between.
    between = self.shard(slot) * self.kl_places()
    np.testing.assert_array_equal(kept, pick + between)
    case.assertEqual((ask.layout.segment_ids[r] != NONE).sum(), count)
    # A label is foretold one column before its own.
    places = assigned.outputs.index[kept]
    np.testing.assert_array_equal(assigned.rows.row[places], r)
    layout = np.arange(stage.first, stage.end)
    np.testing.assert_array_equal(ask.layout.positions[r, :count], layout)
    np.testing.assert_array_equal(
        assigned.rows.layout.positions[r, assigned.rows.column[places]], layout
    )

  def _kl(self, assigned, edit, where) -> None:
    slot, c, r = where
    case, last = self.case, len(edit.kl) - 1
    for rows in (assigned.rows, assigned.outputs.rows):
      real = rows.layout.segment_ids[r] != NONE
      case.assertEqual(rows.layout.positions[r, real].tolist(), [last])
    place = assigned.rows.index[r, 0]
    case.assertEqual(assigned.anchor[slot, c], place)
    shape, shard = self.batch_shape, self.shard(slot)
    kept = shape.logit_budget // shape.shards * (shard + 1) + slot
    case.assertEqual(assigned.outputs.rows.index[r, 0], kept)
    case.assertEqual(assigned.outputs.index[kept], place)

  def kl_places(self) -> int:
    """Places of a shard's KL rows."""
    shape = self.batch_shape
    return self.plan.kl * shape.slots // shape.shards

  def _before(self, assigned, edit, k, where) -> None:
    """TokenLayout before the anchor of stage k: each position once, in place."""
    c, r = where
    wanted = np.full(assigned.before.positions.shape[1], -1)

    def put(at, begin, end):
      wanted[at : at + end - begin] = np.arange(begin, end)

    if edit is not None and c < self.plan.contexts:
      shared_prefix = len(self.plan.shared_prefix[c])
      put(0, 0, shared_prefix)
      put(self.plan.shared, shared_prefix, edit.anchors[c])
      for j, at in enumerate(self.offsets(edit, k)[:k]):
        put(at, edit.stage(j, c).anchor, edit.stage(j + 1, c).anchor)
      seen = np.sort(wanted[wanted >= 0])
      np.testing.assert_array_equal(seen, range(edit.stage(k, c).anchor))
    elif edit is not None:
      put(self.plan.shared, 0, len(edit.kl) - 1)
    np.testing.assert_array_equal(
        assigned.before.segment_ids[r],
        np.where(wanted >= 0, types.SHARED, NONE),
    )
    np.testing.assert_array_equal(
        assigned.before.positions[r], np.maximum(wanted, 0)
    )


class SeatingTest(parameterized.TestCase):

  def test_an_empty_room(self):
    edits = encode()
    plan = plan_lib.plan_shapes(edits, slots=3)
    Model(self, plan, plan.shapes[0]).check()

  @parameterized.parameters('{} is a', None)
  def test_fits_is_exact(self, kl):
    edits = [cut(edit, 2, 1) for edit in encode(kl_template=kl)]
    plan = plan_lib.plan_shapes(edits, slots=2)
    batch_shape = plan.shapes[0]
    for edit in edits:
      for k in range(edit.stages):
        places, scored = Model(self, plan, batch_shape).need(edit, k)
        for less in ((0, 0), (1, 0), (0, 1)):
          size = (places - less[0], scored - less[1])
          tight = batch_shape._replace(
              token_budget=size[0], logit_budget=size[1]
          )
          model = Model(self, plan, tight)
          self.assertEqual(model.fits(edit, k), less == (0, 0))
        whole = batch_shape._replace(token_budget=places, logit_budget=scored)
        slots_lib.SlotAllocator(plan, whole).assign(0, edit, k)

  @parameterized.product(anchor=list(encoding.ANCHORS), kl=['{} is a', None])
  def test_sit_and_leave(self, anchor, kl):
    edits = encode(anchor=anchor, kl_template=kl)
    plan = plan_lib.plan_shapes(edits, slots=5)
    model = Model(self, plan, plan.shapes[0])
    self.assertEqual(plan.shapes[0].slots, 5)
    for edit in edits:
      self.assertTrue(model.fits(edit, 0))
      model.assign(model.slots.free_slot, edit)
      model.check()
    self.assertIsNone(model.slots.free_slot)
    for slot in (3, 0, 4, 1, 2):
      model.free(slot)
      model.check()

  def test_freed_places_are_used_again(self):
    edits = encode()
    plan = plan_lib.plan_shapes(edits, slots=1)
    model = Model(self, plan, plan.shapes[0])
    for i in (2, 0, 4, 2, 1, 3, 2) * 3:
      self.assertTrue(model.fits(edits[i], 0))
      model.assign(0, edits[i])
      model.free(0)
    model.assign(0, edits[2])
    model.check()

  def test_views_do_not_change_later(self):
    edits = encode()
    plan = plan_lib.plan_shapes(edits, slots=2)
    batch_shape = slots_lib.SlotAllocator(plan, plan.shapes[0])
    batch_shape.assign(0, edits[0], 0)
    before = batch_shape.layout()
    held = [np.array(x) for x in _leaves(before)]
    batch_shape.free(0)
    batch_shape.assign(0, edits[2], 0)
    for old, now in zip(held, _leaves(before)):
      np.testing.assert_array_equal(old, now)

  @parameterized.product(overlap=[0, 1], kl=['{} is a', None])
  def test_chunks_move_on(self, overlap, kl):
    edits = [cut(edit, 2 + overlap, overlap) for edit in encode(kl_template=kl)]
    self.assertGreater(max(edit.stages for edit in edits), 2)
    plan = plan_lib.plan_shapes(edits, slots=2)
    model = Model(self, plan, plan.shapes[0])
    for edit in edits:
      model.assign(1, edit)
      for k in range(1, edit.stages):
        model.next_chunk(1)
        model.check()
        self.assertTrue(model.fits(edit, k))
        model.assign(1, edit, k)
        model.check()
      model.free(1)
    model.check()

  def test_contexts_with_different_ends_move_on(self):
    # Text behind the placeholder puts anchors at different distances.
    edits = text_helpers.encode_edits(
        text_tokenizers.byte_level(),
        RECORDS,
        ['{}', 'say {} now or never'],
        max_tokens=99,
    )
    edits = [cut(edit, 2) for edit in edits]
    plan = plan_lib.plan_shapes(edits, slots=1)
    model = Model(self, plan, plan.shapes[0])
    edit = edits[2]
    self.assertLen(set(model.moved(edit, 0)), 2)
    model.assign(0, edit)
    for k in range(1, edit.stages):
      model.next_chunk(0)
      model.assign(0, edit, k)
      model.check()

  @parameterized.product(seed=[0, 1, 2, 3], kl=[True, False], shards=[1, 3])
  def test_any_sequence_keeps_the_tables(self, seed, kl, shards):
    rng = np.random.default_rng(seed)
    edits = random_edits(15, seed, kl=kl, chunked=seed > 0)
    plan = plan_lib.plan_shapes(
        edits,
        slots=int(rng.integers(2, 6)),
        share=bool(seed % 2),
        shards=shards,
        max_suffixes=(5,),
    )
    batch_shape = plan.shapes[-1]
    edits = [e for e in edits if plan.shape_of(e) == len(plan.shapes) - 1]
    model = Model(self, plan, batch_shape)
    crowded = 0
    for _ in range(80):
      # Rather sit than leave: rooms are to be full.
      free_slot = model.slots.free_slot
      slot = int(rng.integers(batch_shape.slots))
      slot = slot if free_slot is None or rng.random() < 0.4 else free_slot
      edit, k, seated = model.at.get(slot, (None, 0, False))
      if edit is None:
        edit = edits[rng.integers(len(edits))]
        if model.fits(edit, 0, slot):
          model.slot_for(edit)
          model.assign(slot, edit)
        else:
          crowded += 1
          model.slot_for(edit, {model.shard(slot)})
      elif not seated:
        if model.fits(edit, k + 1, slot):
          model.assign(slot, edit, k + 1)
      elif k + 1 < edit.stages:
        model.next_chunk(slot)
      else:
        model.free(slot)
      model.check()
    self.assertGreater(crowded, 0)
    for slot in list(model.at):
      model.free(slot)
    model.check()
    np.testing.assert_array_equal(
        model.left().sum(axis=0),
        (batch_shape.token_budget, batch_shape.logit_budget),
    )

  @parameterized.product(seed=[0, 1, 2], shards=[1, 3])
  def test_all_edits_move_within_their_shards(self, seed, shards):
    edits = random_edits(24, seed, chunked=True)
    plan = plan_lib.plan_shapes(edits, slots=8 * shards, shards=shards)
    shape = plan.shapes[0]
    smaller, moved = shape.compacted, 0
    for count in range(1, smaller.slots + 2):
      allocator = slots_lib.SlotAllocator(plan, shape)
      for edit in edits[:count]:
        slot = allocator.slot_for(edit, allocator.free_slots())
        allocator.assign(slot, edit, 0)
      found = allocator.compact(smaller)
      if found is None:
        self.assertGreater(count, 1)
        continue
      moved += 1
      old = [int(slot) for slot in found.slots if slot < shape.slots]
      self.assertCountEqual(old, allocator.active)
      model = Model(self, plan, smaller)
      model.slots = found.allocator
      for new, slot in enumerate(found.slots):
        if slot < shape.slots:
          model.at[new] = (*allocator.assigned[slot], True)
      model.check()
      # There are places for the largest chunk of each edit at the same time.
      largest = np.zeros_like(model.left())
      for new, (edit, _, _) in model.at.items():
        largest[model.shard(new)] += plan_lib.edit_load(edit)
      budgets = np.array([smaller.token_budget, smaller.logit_budget])
      self.assertTrue((largest <= budgets // shards).all())
      before, after = allocator.layout(), found.allocator.layout()
      for new, slot in enumerate(found.slots):
        if slot < shape.slots:
          there = after.anchor[new]
          shard = slot // (shape.slots // shards)
          self.assertEqual(new // (smaller.slots // shards), shard)
          np.testing.assert_array_equal(
              found.tokens[there], before.anchor[slot]
          )
    self.assertGreater(moved, 0)
    if shards > 1 and seed:
      self.assertGreater(moved, shards)


def _leaves(assigned: slots_lib.SlotLayout) -> list[np.ndarray]:
  """All arrays of the seats."""
  rows, outputs = assigned.rows, assigned.outputs
  found = [
      assigned.anchor,
      assigned.pick,
      assigned.label,
      assigned.live,
      outputs.index,
  ]
  for x in (rows, outputs.rows):
    found += [
        x.index,
        x.row,
        x.column,
        x.layout.positions,
        x.layout.segment_ids,
    ]
  return [*found, assigned.before.positions, assigned.before.segment_ids]


if __name__ == '__main__':
  absltest.main()
