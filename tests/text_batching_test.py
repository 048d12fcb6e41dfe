"""Tiles hold every edit once, with anchors and labels in their columns."""

import time

import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import testing, types
from jaxedit.eval import datasets
from jaxedit.text import batching, locate

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


def _encode(records=RECORDS, **options):
  options = {'max_tokens': 200} | options
  tokenizer = text_tokenizers.byte_level(begin=True)
  return batching.encode_edits(tokenizer, records, TEMPLATES, **options)


def _rows(tile, e):
  """Reads the rows of a slot back, as ids without padding."""
  return [
      tile.tokens[e, c][tile.segment[e, c] == types.TRUNK].tolist()
      for c in range(tile.tokens.shape[1])
  ]


class LadderTest(parameterized.TestCase):

  @parameterized.parameters(
      (0, 2), (1, 2), (4, 4), (9, 10), (17, 20), (1024, 1024), (1025, 2048),
      (2049, 3072),
  )  # fmt: skip
  def test_round_up(self, n, wanted):
    self.assertEqual(batching.round_up(n), wanted)


class EncodeTest(parameterized.TestCase):

  def test_rows_are_the_filled_contexts(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    for record, edit in zip(RECORDS, _encode()):
      self.assertEqual(edit.number, record.number)
      for template, row, anchor in zip(TEMPLATES, edit.rows, edit.anchors):
        head = template.replace('{}', '')
        found = locate.locate_subject(
            tokenizer, record.prompt, record.subject, head
        )
        np.testing.assert_array_equal(row, found.ids)
        self.assertEqual(anchor, found.last)
      np.testing.assert_array_equal(
          edit.target, locate.encode_target(tokenizer, record.target_new)
      )
      kl = locate.locate_subject(tokenizer, '{} is a', record.subject)
      np.testing.assert_array_equal(edit.kl, kl.ids[: kl.last + 1])

  def test_one_equals_many(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    many = _encode()
    one = batching.encode_edit(tokenizer, RECORDS[3], TEMPLATES, max_tokens=200)
    np.testing.assert_equal(vars(one), vars(many[3]))

  def test_text_behind_the_placeholder_of_a_template(self):
    tokenizer = text_tokenizers.byte_level()
    edit = batching.encode_edit(
        tokenizer, RECORDS[0], ['say {} now'], max_tokens=99
    )
    text = tokenizer.decode(edit.rows[0])
    self.assertEqual(text, 'say Toko Yasuda, the now')

  def test_braces_in_a_subject_do_no_harm(self):
    record = types.Record(1, 'a', '{} is', 'set {}', 'x')
    (edit,) = _encode([record])
    tokenizer = text_tokenizers.byte_level(begin=True)
    self.assertEqual(tokenizer.decode(edit.rows[2]), '<s>You. set {} is')

  def test_prompt_last(self):
    for edit in _encode(anchor='prompt_last'):
      self.assertEqual(edit.anchors, tuple(len(row) - 1 for row in edit.rows))
      self.assertEqual(edit.suffix, len(edit.target))

  def test_all_faults_name_their_records(self):
    records = [
        RECORDS[0],
        types.Record(8, 'x8', '{} is', ' ', 'y'),
        types.Record(9, 'x9', '{} is', 'Paris ' * 50, 'y'),
        types.Record(10, 'x10', '{} is', 'Paris', ''),
    ]
    with self.assertRaises(types.InputError) as caught:
      _encode(records, max_tokens=30)
    problems = caught.exception.problems
    self.assertStartsWith(problems[0], 'record 8 (id x8): the subject')
    self.assertStartsWith(problems[1], 'record 9 (id x9): its longest row')
    self.assertIn('limit is 30', problems[1])
    self.assertStartsWith(problems[2], 'record 9 (id x9): its KL row')
    self.assertStartsWith(problems[3], 'record 10 (id x10): the target')
    self.assertLen(problems, 4)

  def test_limit_is_exact(self):
    edit = _encode(RECORDS[2:3])[0]
    need = max(map(len, edit.rows)) + len(edit.target) - 1
    _encode(RECORDS[2:3], max_tokens=need)
    with self.assertRaisesRegex(types.InputError, f'takes {need} tokens'):
      _encode(RECORDS[2:3], max_tokens=need - 1)

  def test_check_agrees_with_encoding(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    check = batching.edit_check(tokenizer, TEMPLATES, max_tokens=12)
    for record in RECORDS:
      try:
        _encode([record], max_tokens=12)
        self.assertEqual(check(record), [])
      except types.InputError as error:
        name = f'record {record.number} (id {record.id}): '
        told = tuple(name + fault for fault in check(record))
        self.assertEqual(told, error.problems)

  def test_bad_options(self):
    tokenizer = text_tokenizers.byte_level()
    with self.assertRaises(types.InputError) as caught:
      batching.edit_check(
          tokenizer,
          ['no'],
          max_tokens=9,
          anchor='first',
          kl_template='{} {}',
      )
    self.assertLen(caught.exception.problems, 3)
    with self.assertRaisesRegex(types.InputError, 'no context'):
      batching.edit_check(tokenizer, [], max_tokens=9)


class TileTest(parameterized.TestCase):

  @parameterized.product(
      slots=[1, 2, 8], anchor=list(batching.ANCHORS), kl=['{} is a', None]
  )
  def test_every_edit_can_be_read_back(self, slots, anchor, kl):
    encoded = _encode(anchor=anchor, kl_template=kl)
    tiles = batching.make_tiles(encoded, slots=slots)
    seen = []
    for tile in tiles:
      for e, i in enumerate(tile.edit):
        if i < 0:
          continue
        seen.append(int(i))
        edit = encoded[i]
        wanted = [[*row, *edit.target[:-1]] for row in edit.rows]
        self.assertEqual(_rows(tile, e), wanted)
        for c, (row, column) in enumerate(zip(edit.rows, edit.anchors)):
          self.assertEqual(tile.tokens[e, c, tile.prefix], row[column])
          self.assertEqual(tile.position[e, c, tile.prefix], column)
        real = tile.kl_segment[e] == types.TRUNK
        np.testing.assert_array_equal(tile.kl_tokens[e][real], edit.kl)
        if kl:
          self.assertEqual(tile.kl_position[e, -1], len(edit.kl) - 1)
    self.assertCountEqual(seen, range(len(encoded)))

  def test_labels_follow_their_columns(self):
    encoded = _encode()
    for tile in batching.make_tiles(encoded, slots=2):
      for e, i in enumerate(tile.edit):
        if i < 0:
          continue
        target = encoded[i].target
        n = len(target)
        for c, row in enumerate(encoded[i].rows):
          columns = tile.score_column[e, c, :n] + tile.prefix
          np.testing.assert_array_equal(tile.label[e, c, :n], target)
          np.testing.assert_array_equal(
              tile.position[e, c, columns], len(row) - 1 + np.arange(n)
          )
          # The next column holds the label itself, save for the last label.
          np.testing.assert_array_equal(
              tile.tokens[e, c, columns[:-1] + 1], target[:-1]
          )
          self.assertEqual(tile.label_mask[e, c].sum(), n)
        self.assertLess(tile.score_column[e].max(), tile.suffix)

  def test_positions_count_real_tokens(self):
    for tile in batching.make_tiles(_encode(), slots=4):
      real = tile.segment == types.TRUNK
      counted = np.where(real, np.cumsum(real, -1) - 1, 0)
      np.testing.assert_array_equal(tile.position, counted)
      np.testing.assert_array_equal(tile.tokens[~real], 0)

  def test_empty_slots(self):
    tiles = batching.make_tiles(_encode(), slots=4)
    empty = 0
    for tile in tiles:
      vacant = tile.edit < 0
      empty += vacant.sum()
      self.assertFalse(tile.segment[vacant].any())
      self.assertFalse(tile.kl_segment[vacant].any())
      self.assertFalse(tile.label_mask[vacant].any())
      self.assertFalse(tile.score_column[vacant].any())
    self.assertEqual(empty, 4 * len(tiles) - len(RECORDS))

  def test_shapes_and_dtypes(self):
    tiles = batching.make_tiles(_encode(), slots=2)
    self.assertLen({tile.prefix for tile in tiles}, 1)
    for tile in tiles:
      longest = int(tile.label_mask.sum(axis=-1).max())
      self.assertEqual(
          tile.label.shape[-1],
          batching.round_up(longest, batching.LABEL_LADDER),
      )
    self.assertLen({tile.kl_tokens.shape for tile in tiles}, 1)
    suffixes = [tile.suffix for tile in tiles]
    self.assertEqual(suffixes, sorted(suffixes))
    self.assertContainsSubset(suffixes, batching.LADDER)
    for tile in tiles:
      self.assertIn(tile.prefix, batching.LADDER)
      self.assertIn(tile.label.shape[-1], batching.LABEL_LADDER)
      for name, leaf in vars(tile).items():
        if name != 'prefix':
          wanted = np.float32 if name == 'label_mask' else np.int32
          self.assertEqual(leaf.dtype, wanted, name)

  def test_order_changes_slots_alone(self):
    encoded = _encode()
    order = [3, 1, 4, 0, 2]
    shuffled = [encoded[i] for i in order]

    def content(edits, names):
      found = {}
      for tile in batching.make_tiles(edits, slots=2):
        for e, i in enumerate(tile.edit):
          if i >= 0:
            found[names[i]] = [
                np.asarray(leaf)[e].tolist()
                for name, leaf in vars(tile).items()
                if name not in ('prefix', 'edit')
            ]
      return found

    self.assertEqual(content(encoded, range(5)), content(shuffled, order))

  def test_no_edits_no_tiles(self):
    self.assertEqual(batching.make_tiles([], slots=2), ())
    self.assertEqual(batching.padding_waste([]), (0.0, 0.0))

  def test_misuse(self):
    encoded = _encode()
    with self.assertRaisesRegex(ValueError, 'slot'):
      batching.make_tiles(encoded, slots=0)
    mixed = encoded[:1] + _encode(RECORDS[1:2], kl_template=None)
    with self.assertRaisesRegex(ValueError, 'contexts'):
      batching.make_tiles(mixed, slots=1)

  def test_padding_waste(self):
    encoded = _encode(RECORDS[:1])
    (tile,) = batching.make_tiles(encoded, slots=4)
    columns = [
        len(row) - a + len(encoded[0].target) - 1
        for row, a in zip(encoded[0].rows, encoded[0].anchors)
    ]
    used = sum(columns) / (len(columns) * tile.suffix)
    waste = batching.padding_waste([tile])
    self.assertAlmostEqual(waste.rows, 1 - used)
    self.assertAlmostEqual(waste.slots, 1 - used / 4)


class SpeedTest(absltest.TestCase):

  def test_a_thousand_records(self):
    loaded = datasets.load_records(
        testing.data_path('counterfact_train.jsonl'),
        limit=1000,
        on_bad_record='skip',
    )
    begin = time.perf_counter()
    encoded = _encode(loaded.records)
    tiles = batching.make_tiles(encoded, slots=64)
    # Twenty times what it takes: this only finds work that grows too fast.
    self.assertLess(time.perf_counter() - begin, 10)
    self.assertEqual(sum((t.edit >= 0).sum() for t in tiles), 1000)


if __name__ == '__main__':
  absltest.main()
