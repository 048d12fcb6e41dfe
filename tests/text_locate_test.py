"""Subjects are found by their characters, ids are joined and never remade."""

import json

import numpy as np
import text_helpers
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import testing
from jaxedit.text import cloze, locate
from jaxedit.types import InputError

TOKENIZERS = {
    'plain': lambda: text_tokenizers.byte_level(),
    'untrimmed': lambda: text_tokenizers.byte_level(trim=False),
    'bos': lambda: text_tokenizers.byte_level(begin=True),
    'bos_eos': lambda: text_tokenizers.byte_level(
        begin=True, end=True, trim=False
    ),
    'sentence_piece': text_tokenizers.sentence_piece,
}
SUBJECTS = {
    'word': 'Toko Yasuda',
    'accent': 'Zoë Kravitz',
    'combining': 'Zoe\u0308',
    'emoji': 'DJ 🎸',
    'wide': '東京',
    'punctuated': '(What?) No!',
}
PROMPTS = {
    'start': '{}, the',
    'middle': 'The mother tongue of {} is',
    'end': 'Who is {}',
    'no_space': 'see "{}"?',
    'breaks': 'a\n\n{}\tis',
}


def _each(names):
  return [(name, name) for name in names]


class LocateTest(parameterized.TestCase):

  @parameterized.product(
      kind=list(TOKENIZERS), subject=list(SUBJECTS), prompt=list(PROMPTS)
  )
  def test_span_covers_subject_and_nothing_else(self, kind, subject, prompt):
    tokenizer = TOKENIZERS[kind]()
    subject, prompt = SUBJECTS[subject], PROMPTS[prompt]
    found = text_helpers.locate_subject(tokenizer, prompt, subject)
    text = prompt.replace('{}', subject)
    begin = prompt.index('{}')
    end = begin + len(subject)
    # Oracle: which token each character of the subject lies in.
    encoding = tokenizer(text)
    tokens = [
        encoding.char_to_token(i)
        for i in range(begin, end)
        if encoding.char_to_token(i) is not None
    ]
    self.assertEqual(found.first, min(tokens))
    self.assertGreaterEqual(found.last, max(tokens))
    inside = tokenizer.decode(found.ids[found.first : found.last + 1])
    self.assertIn(subject, inside)
    # SentencePiece may merge a comma into the last token, no more.
    self.assertLessEqual(len(inside.strip()), len(subject) + 1)
    self.assertEqual(found.ids.dtype, np.int32)

  @parameterized.named_parameters(_each(['plain', 'untrimmed', 'bos']))
  def test_every_byte_of_a_split_character_counts(self, kind):
    tokenizer = TOKENIZERS[kind]()
    found = text_helpers.locate_subject(tokenizer, 'The 🎸 {} is', '🎸')
    pieces = tokenizer.convert_ids_to_tokens(found.ids)
    self.assertEqual(found.last - found.first, 3)
    self.assertEqual(pieces[found.last + 1], 'Ġis')

  @parameterized.named_parameters(_each(TOKENIZERS))
  def test_placeholder_decides_between_two_occurrences(self, kind):
    tokenizer = TOKENIZERS[kind]()
    first = text_helpers.locate_subject(tokenizer, '{} is in Paris', 'Paris')
    second = text_helpers.locate_subject(tokenizer, 'Paris is in {}', 'Paris')
    np.testing.assert_array_equal(first.ids, second.ids)
    self.assertLess(first.last, second.first)
    self.assertEqual(second.last, len(second.ids) - 1)

  @parameterized.named_parameters(_each(TOKENIZERS))
  def test_prefix_text_shifts_the_span(self, kind):
    tokenizer = TOKENIZERS[kind]()
    prompt, subject = 'the guitar of {} is', 'Danielle'
    bare = text_helpers.locate_subject(tokenizer, prompt, subject)
    long = text_helpers.locate_subject(
        tokenizer, prompt, subject, 'The piano. '
    )
    shift = len(long.ids) - len(bare.ids)
    self.assertGreater(shift, 0)
    self.assertEqual(long.last, bare.last + shift)
    np.testing.assert_array_equal(
        long.ids[long.first : long.last + 1],
        bare.ids[bare.first : bare.last + 1],
    )

  def test_bos_once_and_no_eos(self):
    tokenizer = TOKENIZERS['bos_eos']()
    found = text_helpers.locate_subject(tokenizer, '{} is', 'Paris')
    self.assertEqual(found.first, 1)
    self.assertEqual(list(found.ids).count(tokenizer.bos_token_id), 1)
    self.assertNotIn(tokenizer.eos_token_id, found.ids)

  def test_empty_prompt_is_the_bos_alone(self):
    (ids,) = locate.encode_prompts(TOKENIZERS['bos_eos'](), [''])
    self.assertEqual(ids.tolist(), [0])
    (ids,) = locate.encode_prompts(TOKENIZERS['plain'](), [''])
    self.assertEqual(ids.tolist(), [])

  @parameterized.parameters('', ' ')
  def test_subject_without_tokens(self, subject):
    case = ('The', subject, '')
    ((_, span),) = locate.locate_subjects(TOKENIZERS['plain'](), [case])
    self.assertIsNone(span)

  def test_unpaired_surrogates_are_accepted(self):
    found = text_helpers.locate_subject(
        TOKENIZERS['plain'](), '\udc80 {} is', 'a\ud83d'
    )
    pieces = TOKENIZERS['plain']().convert_ids_to_tokens(found.ids)
    self.assertEqual(pieces[found.last + 1], 'Ġis')

  def test_slow_tokenizer_is_refused(self):
    with self.assertRaisesRegex(InputError, 'fast tokenizer'):
      locate.encode_prompts(object(), ['a'])

  def test_records_on_a_real_tokenizer(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    path = testing.data_path('known_facts.jsonl')
    for line in path.read_text().splitlines()[:200]:
      fact = json.loads(line)
      filled = cloze.make_cloze(fact['prompt'], fact['subject'])
      found = text_helpers.locate_subject(tokenizer, filled, fact['subject'])
      text = tokenizer.decode(found.ids[found.first : found.last + 1])
      self.assertEqual(text.strip(), fact['subject'])


class TargetTest(parameterized.TestCase):

  @parameterized.named_parameters(_each(TOKENIZERS))
  def test_one_space_and_no_bos(self, kind):
    tokenizer = TOKENIZERS[kind]()
    ids = text_tokenizers.target_ids(tokenizer, 'piano')
    pieces = tokenizer.convert_ids_to_tokens(ids)
    self.assertEqual([p.replace('\u2581', 'Ġ') for p in pieces], ['Ġpiano'])
    np.testing.assert_array_equal(
        ids, text_tokenizers.target_ids(tokenizer, ' piano')
    )

  @parameterized.named_parameters(_each(TOKENIZERS))
  def test_no_space(self, kind):
    tokenizer = TOKENIZERS[kind]()
    for prompt, target in [
        ('The motto is "', 'piano'),
        ('df = pd.', 'piano'),
        ('首都是', '上海'),
        ('A:\n', 'piano'),
        ('A:', '\npiano'),
        ('the Rhine', ', the piano'),
    ]:
      (ids,) = locate.encode_targets(
          tokenizer, [locate.Continued(prompt, target)]
      )
      (front,) = locate.encode_prompts(tokenizer, [prompt])
      whole, start = map(tokenizer.decode, ([*front, *ids], front))
      self.assertEqual(whole, start + target)

  @parameterized.named_parameters(_each(TOKENIZERS))
  def test_a_text_with_its_own_bos_gets_no_other(self, kind):
    tokenizer = TOKENIZERS[kind]()
    (ids,) = locate.encode_prompts(tokenizer, ['<s>Paris is'])
    self.assertEqual(list(ids).count(tokenizer.bos_token_id), 1)
    ((ids, (first, _)),) = locate.locate_subjects(
        tokenizer, [('<s>The ', 'Paris', ' is')]
    )
    self.assertEqual(list(ids).count(tokenizer.bos_token_id), 1)
    self.assertIn('Paris', tokenizer.decode(ids[first:]))
    (ids,) = locate.encode_prompts(tokenizer, ['<s>Paris'], double_bos=True)
    added = kind not in ('plain', 'untrimmed')
    self.assertEqual(list(ids).count(tokenizer.bos_token_id), 1 + added)

  def test_other_white_space_is_kept(self):
    tokenizer = TOKENIZERS['plain']()
    ids = text_tokenizers.target_ids(tokenizer, '\nParis')
    self.assertEqual(tokenizer.decode(ids), '\nParis')

  @parameterized.parameters('', ' ', '\n')
  def test_empty_target(self, target):
    self.assertEmpty(text_tokenizers.target_ids(TOKENIZERS['bos'](), target))

  def test_batches_equal_single_calls(self):
    tokenizer = TOKENIZERS['bos']()
    targets = ['piano', ' guitar', 'Zoë 🎸', '']
    many = locate.encode_targets(
        tokenizer, [locate.Continued('is', target) for target in targets]
    )
    for ids, target in zip(many[:-1], targets):
      np.testing.assert_array_equal(
          ids, text_tokenizers.target_ids(tokenizer, target)
      )
    self.assertEmpty(many[-1])
    self.assertEqual(locate.encode_targets(tokenizer, []), [])


class ClozeTest(parameterized.TestCase):

  @parameterized.parameters(
      ('Toko Yasuda, the', 'Toko Yasuda', '{}, the'),
      ('Artists say Art is old', 'Art', 'Artists say {} is old'),
      ('Paris or Paris', 'Paris', '{} or Paris'),
      ("Who is Zoë's friend", 'Zoë', "Who is {}'s friend"),
      ('Cafe\u0301 near Cafe', 'Cafe', 'Cafe\u0301 near {}'),
      ('東京は日本の', '東京', '{}は日本の'),
      ('Is (What?) good', '(What?)', 'Is {} good'),
      ('a_b b', 'b', 'a_b {}'),
      ('Lions are', 'Lion', None),
      ('paris is', 'Paris', None),
      ('Paris is', '', None),
  )
  def test_first_whole_word(self, prompt, subject, expected):
    self.assertEqual(cloze.make_cloze(prompt, subject), expected)


if __name__ == '__main__':
  absltest.main()
