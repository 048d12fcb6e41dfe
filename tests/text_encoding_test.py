"""Edits hold the filled contexts, their anchors, targets and stages."""

import dataclasses
import time

import numpy as np
import text_helpers
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import testing, types
from jaxedit.batching import buckets
from jaxedit.batching import edits as edits_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.eval import datasets
from jaxedit.text import (
    chat,
    encoding,
    token_cache,
)

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


def _encode(records=RECORDS, **options):
  options = {'max_tokens': 200} | options
  tokenizer = text_tokenizers.byte_level(begin=True)
  return text_helpers.encode_edits(tokenizer, records, TEMPLATES, **options)


class LadderTest(parameterized.TestCase):

  @parameterized.parameters(
      (0, 2), (1, 2), (4, 4), (9, 10), (17, 20), (1024, 1024), (1025, 1280),
      (2049, 2560), (300_000, 458_752),
  )  # fmt: skip
  def test_round_up(self, n, wanted):
    self.assertEqual(buckets.round_up(n), wanted)


class EncodeTest(parameterized.TestCase):

  def test_rows_are_the_filled_contexts(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    for record, edit in zip(RECORDS, _encode()):
      self.assertEqual(edit.number, record.number)
      for template, row, anchor in zip(TEMPLATES, edit.rows, edit.anchors):
        head = template.replace('{}', '')
        found = text_helpers.locate_subject(
            tokenizer, record.prompt, record.subject, head
        )
        np.testing.assert_array_equal(row, found.ids)
        self.assertEqual(anchor, found.last)
      np.testing.assert_array_equal(
          edit.target, text_tokenizers.target_ids(tokenizer, record.target)
      )
      kl = text_helpers.locate_subject(tokenizer, '{} is a', record.subject)
      np.testing.assert_array_equal(edit.kl, kl.ids[: kl.last + 1])

  def test_chat(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    words = chat.chat_of(tokenizer, '<s>Q: {}\nA:\n', '</s>')
    (edit,) = _encode(RECORDS[1:2], chat=words)
    for template, row, anchor in zip(TEMPLATES, edit.rows, edit.anchors):
      text = template.replace('{}', RECORDS[1].question)
      self.assertEqual(tokenizer.decode(row), f'<s>Q: {text}\nA:\n')
      head = tokenizer.decode(row[: anchor + 1])
      self.assertEndsWith(head, RECORDS[1].subject)
    # Behind a line break the object stands as it is, and nothing ends it.
    self.assertEqual(tokenizer.decode(edit.target), 'French')
    kl = tokenizer.decode(edit.kl)
    self.assertEqual(kl, f'<s>Q: {RECORDS[1].subject}')

  def test_one_equals_many(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    many = _encode()
    (one,) = text_helpers.encode_edits(
        tokenizer, RECORDS[3:4], TEMPLATES, max_tokens=200
    )
    np.testing.assert_equal(vars(one), vars(many[3]))

  def test_text_behind_the_placeholder_of_a_template(self):
    tokenizer = text_tokenizers.byte_level()
    (edit,) = text_helpers.encode_edits(
        tokenizer, RECORDS[:1], ['say {} now'], max_tokens=99
    )
    text = tokenizer.decode(edit.rows[0])
    self.assertEqual(text, 'say Toko Yasuda, the now')

  def test_braces_in_a_subject_do_no_harm(self):
    record = types.EditRequest(1, 'a', '{} is', 'set {}', 'x')
    (edit,) = _encode([record])
    tokenizer = text_tokenizers.byte_level(begin=True)
    self.assertEqual(tokenizer.decode(edit.rows[2]), '<s>You. set {} is')

  def test_prompt_last(self):
    for edit in _encode(anchor='prompt_last'):
      self.assertEqual(edit.anchors, tuple(len(row) - 1 for row in edit.rows))
      for c in range(len(TEMPLATES)):
        stage = edit.stage(0, c)
        self.assertEqual(stage.first, stage.anchor)
        self.assertEqual(stage.end - stage.anchor, len(edit.target))

  def test_all_errors_name_their_records(self):
    records = [
        RECORDS[0],
        types.EditRequest(8, 'x8', '{} is', ' ', 'y'),
        types.EditRequest(9, 'x9', '{} is', 'Paris ' * 50, 'y'),
        types.EditRequest(10, 'x10', '{} is', 'Paris', ''),
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
    check = encoding.fact_encoder(tokenizer, TEMPLATES, max_tokens=12).check
    for record in RECORDS:
      try:
        _encode([record], max_tokens=12)
        self.assertEqual(check([record]), [[]])
      except types.InputError as error:
        name = f'record {record.number} (id {record.id}): '
        (errors,) = check([record])
        reported = tuple(name + message for message in errors)
        self.assertEqual(reported, error.problems)

  def test_what_was_checked_is_not_tokenised_again(self):
    inner = text_tokenizers.byte_level(begin=True)
    texts = []

    class Counted:
      is_fast = True

      def __getattr__(self, name):
        return getattr(inner, name)

      def __call__(self, some, **options):
        texts.extend(some)
        return inner(some, **options)

    tokens = token_cache.TokenCache(Counted())
    options = dict(max_tokens=200)
    bare = encoding.fact_encoder(tokens, ['{}'], **options)
    self.assertEqual(bare.check(RECORDS), [[]] * len(RECORDS))
    seen = len(texts)
    np.testing.assert_equal(
        list(map(vars, bare.encode(RECORDS))),
        list(
            map(
                vars,
                text_helpers.encode_edits(inner, RECORDS, ['{}'], **options),
            )
        ),
    )
    self.assertLen(texts, seen)
    # Of more contexts only those that are new.
    full = text_helpers.encode_edits(tokens, RECORDS, TEMPLATES, **options)
    self.assertLen(texts, seen + 2 * len(RECORDS))
    np.testing.assert_equal(
        list(map(vars, full)), list(map(vars, _encode())), strict=True
    )

  def test_bad_options(self):
    tokenizer = text_tokenizers.byte_level()
    with self.assertRaises(types.InputError) as caught:
      encoding.fact_encoder(
          tokenizer,
          ['no'],
          max_tokens=9,
          anchor='first',
          kl_template='{} {}',
      )
    self.assertLen(caught.exception.problems, 3)
    with self.assertRaisesRegex(types.InputError, 'no context'):
      encoding.fact_encoder(tokenizer, [], max_tokens=9)


class StageTest(parameterized.TestCase):
  """TokenLayout are those of the row that `text` returns."""

  EDIT = encoding.EncodedEdit(
      number=1,
      rows=(np.arange(5), np.arange(20, 28)),
      anchors=(2, 5),
      target=np.arange(100, 109),
      kl=np.zeros(0, np.int32),
  )

  def test_one_stage_is_the_whole_target(self):
    edit = self.EDIT
    self.assertEqual(edit.stages, 1)
    for c, row in enumerate(edit.rows):
      stage = edit.stage(0, c)
      self.assertEqual(stage.anchor, edit.anchors[c])
      self.assertEqual(stage.first, len(row) - 1)
      self.assertEqual(stage.end, len(edit.text(c)))
      np.testing.assert_array_equal(stage.labels, edit.target)

  @parameterized.parameters(
      (((0, 9),),), (((0, 4), (4, 8), (8, 9)),), (((0, 4), (3, 7), (6, 9)),)
  )  # fmt: skip
  def test_chunks(self, chunks):
    edit = dataclasses.replace(self.EDIT, chunks=chunks)
    self.assertEqual(edit.stages, len(chunks))
    for k, (begin, end) in enumerate(chunks):
      for c, row in enumerate(edit.rows):
        stage = edit.stage(k, c)
        np.testing.assert_array_equal(stage.labels, edit.target[begin:end])
        # The column before a label is the one that foretells it.
        whole = np.concatenate([row, edit.target])
        self.assertEqual(whole[stage.first + 1], edit.target[begin])
        self.assertEqual(stage.end, stage.first + end - begin)
        wanted = stage.first if k else edit.anchors[c]
        self.assertEqual(stage.anchor, wanted)


class SpeedTest(absltest.TestCase):

  def test_a_thousand_records(self):
    loaded = datasets.load_requests(
        testing.data_path('counterfact_train.jsonl'),
        limit=1000,
        on_bad_record='skip',
    )
    begin = time.perf_counter()
    encoded = _encode(loaded.requests)
    plan = plan_lib.plan_shapes(encoded, slots=64)
    seen = []
    for number, shape in enumerate(plan.shapes):
      order = [i for i, e in enumerate(encoded) if plan.shape_of(e) == number]
      for packed in edits_lib.pack_edits(encoded, order, plan, shape):
        seen.extend(packed.edit[packed.edit >= 0].tolist())
    # Twenty times what it takes: this only finds work that grows too fast.
    self.assertLess(time.perf_counter() - begin, 10)
    self.assertCountEqual(seen, range(1000))


if __name__ == '__main__':
  absltest.main()
