"""Passages are their question in a chat, and their answer apart from it."""

import copy

import numpy as np
import text_chat_test
import text_helpers
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import types
from jaxedit.batching import plan as plan_lib
from jaxedit.text import (
    chat,
    chunking,
    passages,
    token_cache,
)

PLAIN = chat.Chat('', '', '')
PASSAGES = tuple(
    types.EditRequest(number, f'p{number}', question, None, answer)
    for number, (question, answer) in enumerate(
        [
            ('Who plays the guitar?', 'Toko Yasuda. The guitar is in Paris.'),
            ('What is a city of France?', 'Paris.\n\nThe capital. A tower.'),
            ('Zoë 🎸?', 'def f(x):\n  return x  # The. Tower.\n'),
            ('Is it?', 'x'),
        ],
        1,
    )
)


def encode(records=PASSAGES, *, tokenizer=None, words=PLAIN, **options):
  tokenizer = tokenizer or text_tokenizers.byte_level(begin=True)
  options = {'max_tokens': 400, 'chat': words} | options
  return text_helpers.encode_passages(tokenizer, records, **options)


class EncodeTest(parameterized.TestCase):

  def test_one_row_and_no_kl(self):
    for passage, edit in zip(PASSAGES, encode()):
      self.assertEqual(edit.number, passage.number)
      self.assertLen(edit.rows, 1)
      self.assertEqual(edit.anchors, (len(edit.rows[0]) - 1,))
      self.assertEmpty(edit.kl)
      self.assertEqual(edit.chunks, ())
      self.assertEqual(edit.target.dtype, np.int32)
      self.assertEqual(edit.rows[0].dtype, np.int32)

  def test_texts(self):
    tokenizer = text_tokenizers.byte_level(begin=True, end=True)
    words = chat.Chat('Q: ', '\nA:', '</s>')
    for passage, edit in zip(
        PASSAGES, encode(tokenizer=tokenizer, words=words)
    ):
      row, target = map(tokenizer.decode, (edit.rows[0], edit.target))
      self.assertEqual(row, f'<s>Q: {passage.question}\nA:')
      self.assertEqual(target, f' {passage.target}</s>')
      self.assertEqual(edit.target[-1], tokenizer.eos_token_id)
      self.assertNotIn(tokenizer.eos_token_id, edit.rows[0])

  def test_answer_is_tokenised_apart(self):
    tokenizer = text_tokenizers.byte_level()
    for passage, edit in zip(PASSAGES, encode(tokenizer=tokenizer)):
      np.testing.assert_array_equal(
          edit.target, text_tokenizers.target_ids(tokenizer, passage.target)
      )

  @parameterized.parameters(
      ('\n', 'Paris', 'Paris'),
      ('', ' Paris', ' Paris'),
      ('', '\nParis', '\nParis'),
      (':', 'Paris', ' Paris'),
      ('</s>', 'Paris', 'Paris'),
  )
  def test_space_before_an_answer(self, after, answer, wanted):
    tokenizer = text_tokenizers.byte_level()
    passage = types.EditRequest(1, 'a', 'Where?', None, answer)
    words = chat.Chat('', after, '')
    (edit,) = encode([passage], tokenizer=tokenizer, words=words)
    self.assertEqual(tokenizer.decode(edit.target), wanted)

  @parameterized.parameters('Paris', ' Paris')
  def test_tokenizer_that_puts_the_space_itself(self, answer):
    tokenizer = text_tokenizers.sentence_piece()
    passage = types.EditRequest(1, 'a', 'Where?', None, answer)
    words = chat.Chat('', '', '</s>')
    (edit,) = encode([passage], tokenizer=tokenizer, words=words)
    np.testing.assert_array_equal(
        edit.target,
        [
            *text_tokenizers.target_ids(tokenizer, 'Paris'),
            tokenizer.eos_token_id,
        ],
    )

  def test_bos_that_cannot_be_switched_off_is_taken_from_answers(self):
    class Stubborn:
      """Adds its BOS token whatever it is asked."""

      def __init__(self, inner):
        self._inner = inner

      def __getattr__(self, name):
        return getattr(self._inner, name)

      def __call__(self, texts, **options):
        return self._inner(texts, **(options | {'add_special_tokens': True}))

    inner = text_tokenizers.byte_level(begin=True)
    for plain, edit in zip(encode(), encode(tokenizer=Stubborn(inner))):
      np.testing.assert_array_equal(plain.target, edit.target)

  def test_one_bos(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text_chat_test.LLAMA
    words = chat.chat_of(tokenizer, 'template')
    for double in (False, True):
      options = dict(tokenizer=tokenizer, words=words, double_bos=double)
      rows = [edit.rows[0].tolist() for edit in encode(**options)]
      for row, passage in zip(rows, PASSAGES):
        bos = [tokenizer.bos_token_id] * (1 + double)
        self.assertEqual(row[: len(bos)], bos)
        self.assertEqual(row.count(tokenizer.bos_token_id), len(bos))
        self.assertEqual(
            tokenizer.decode(row),
            '<s>' * double + words.wrap(passage.question),
        )
      questions = [passage.question for passage in PASSAGES]
      self.assertEqual(
          passages.encode_questions(tokenizer, questions, words, double), rows
      )

  def test_what_was_checked_is_not_tokenised_again(self):
    inner = text_tokenizers.byte_level(begin=True)
    tokens = token_cache.TokenCache(inner)
    options = dict(chat=PLAIN, max_tokens=400, chunking=chunking.Chunking(6, 2))
    check = passages.passage_encoder(tokens, **options).check
    self.assertEqual(check(PASSAGES), [[]] * len(PASSAGES))
    tokens.tokenizer = None
    again = passages.passage_encoder(tokens, **options).encode(PASSAGES)
    wanted = text_helpers.encode_passages(inner, PASSAGES, **options)
    np.testing.assert_equal(list(map(vars, again)), list(map(vars, wanted)))
    questions = [passage.question for passage in PASSAGES]
    self.assertEqual(
        passages.encode_questions(tokens, questions, PLAIN),
        [edit.rows[0].tolist() for edit in wanted],
    )

  def test_questions_are_lists(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    (row,) = passages.encode_questions(tokenizer, ['Why?'], PLAIN)
    self.assertIsInstance(row, list)
    self.assertIsInstance(row[0], int)
    self.assertEmpty(passages.encode_questions(tokenizer, [], PLAIN))

  def test_nothing(self):
    self.assertEmpty(encode([]))

  def test_unpaired_surrogates(self):
    passage = types.EditRequest(1, 'a', 'Why \ud800?', None, 'So \udfff. It')
    options = chunking.Chunking(3, 0, 'sentence')
    (edit,) = encode([passage], chunking=options)
    tokenizer = text_tokenizers.byte_level()
    self.assertEqual(tokenizer.decode(edit.target), ' So \ufffd. It')


class ChunkTest(parameterized.TestCase):

  def test_windows(self):
    words = PLAIN._replace(end='</s>')
    options = chunking.Chunking(6, 2)
    for edit in encode(words=words, chunking=options):
      wanted = chunking.spans(len(edit.target), 6, 2)
      self.assertEqual(edit.chunks, wanted if len(wanted) > 1 else ())
      self.assertEqual(edit.stages, len(wanted))

  def test_sentences(self):
    tokenizer = text_tokenizers.byte_level()
    words = chat.Chat('', '\n', '</s>')
    (edit,) = encode(
        PASSAGES[2:3],
        tokenizer=tokenizer,
        words=words,
        chunking=chunking.Chunking(40, 0, 'sentence'),
    )
    lines = [tokenizer.decode(edit.target[a:b]) for a, b in edit.chunks]
    self.assertEmpty(lines)
    (edit,) = encode(
        PASSAGES[2:3],
        tokenizer=tokenizer,
        words=words,
        chunking=chunking.Chunking(26, 0, 'sentence'),
    )
    lines = [tokenizer.decode(edit.target[a:b]) for a, b in edit.chunks]
    self.assertEqual(lines, ['def f(x):\n', '  return x  # The. Tower.\n</s>'])

  def test_edits_can_be_seated(self):
    for boundary in ('window', 'sentence'):
      for overlap in (0, 3):
        edits = encode(chunking=chunking.Chunking(5, overlap, boundary))
        plan_lib.plan_shapes(edits)
        for edit in edits:
          self.assertEqual(edit.stage(0, 0).anchor, edit.anchors[0])
          for k, (begin, _) in enumerate(edit.chunks):
            stage = edit.stage(k, 0)
            self.assertEqual(stage.anchor, edit.anchors[0] + begin)
            self.assertEqual(stage.first, stage.anchor)

  def test_faulty_chunks(self):
    tokenizer = text_tokenizers.byte_level()
    options = dict(chat=PLAIN, max_tokens=99, chunking=chunking.Chunking(4, 4))
    with self.assertRaisesRegex(types.InputError, 'the overlap is 4'):
      text_helpers.encode_passages(tokenizer, [], **options)
    with self.assertRaisesRegex(types.InputError, 'the overlap is 4'):
      passages.passage_encoder(tokenizer, **options)


class ErrorsTest(parameterized.TestCase):

  def test_all_errors_name_their_records(self):
    records = [
        PASSAGES[0],
        types.EditRequest(7, 'x7', ' ', None, 'y'),
        types.EditRequest(8, 'x8', 'Why?', None, ' \n'),
        types.EditRequest(9, 'x9', 'Why?', None, 'Paris ' * 90),
        types.EditRequest(10, 'x10', '', None, ''),
    ]
    words = chat.Chat('Q: ', '\nA: ', '</s>')
    with self.assertRaises(types.InputError) as caught:
      encode(records, words=words, max_tokens=80)
    problems = caught.exception.problems
    self.assertLen(problems, 5)
    self.assertStartsWith(problems[0], "record 7 (id x7): the question ' ' has")
    self.assertStartsWith(
        problems[1], "record 8 (id x8): the answer ' \\n' has"
    )
    self.assertStartsWith(problems[2], 'record 9 (id x9): question and answer')
    self.assertStartsWith(problems[3], "record 10 (id x10): the question ''")
    self.assertStartsWith(problems[4], "record 10 (id x10): the answer ''")

  def test_limit_counts_every_token(self):
    (edit,) = encode(PASSAGES[:1])
    need = len(edit.rows[0]) + len(edit.target)
    encode(PASSAGES[:1], max_tokens=need)
    with self.assertRaisesRegex(
        types.InputError, f'take {need} tokens .* limit is {need - 1}'
    ):
      encode(PASSAGES[:1], max_tokens=need - 1)

  def test_check_agrees_with_encoding(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    records = [
        *PASSAGES,
        types.EditRequest(9, 'x', '', None, 'The Eiffel Tower ' * 9),
    ]
    options = dict(
        chat=PLAIN, max_tokens=30, chunking=chunking.Chunking(4, 1, 'sentence')
    )
    encoder = passages.passage_encoder(tokenizer, **options)
    for record in records:
      (errors,) = encoder.check([record])
      try:
        (edit,) = text_helpers.encode_passages(tokenizer, [record], **options)
        self.assertEmpty(errors)
        np.testing.assert_equal(vars(edit), vars(*encoder.encode([record])))
      except types.InputError as error:
        name = f'record {record.number} (id {record.id}): '
        self.assertEqual(error.problems, tuple(name + e for e in errors))

  def test_slow_tokenizer(self):
    class Slow:
      bos_token_id = None

    with self.assertRaisesRegex(types.InputError, 'Slow gives no character'):
      encode(tokenizer=Slow())


if __name__ == '__main__':
  absltest.main()
