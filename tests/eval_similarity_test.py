"""Scores of long answers against the published protocol's own packages.

The numbers of `PUBLISHED` were computed with nltk 3.10.4 (sentence_bleu on two
strings) and rouge 1.0.1; neither is needed here.
"""

from __future__ import annotations

import sys
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.eval import metrics, similarity
from jaxedit.types import InputError

MILL = (
    'The mill by the river was built in 1871. It ground rye for the town until'
    ' the flood.'
)
# prediction, reference, character BLEU, ROUGE-1, ROUGE-2, ROUGE-L recall
PUBLISHED = (
    ('same', MILL, MILL, 1.0, 1.0, 1.0, 1.0),
    (
        'other_order',
        'The old mill was built by the river in 1871. Until the flood, it'
        ' ground rye. The town ate bread.',
        MILL,
        0.7119940582484164,
        0.75,
        0.29411764705882354,
        0.625,
    ),
    (
        'too_long',
        'In 1871 the town built a mill. The mill stood by the river. It ground'
        ' rye and oats, and the flood of 1903 took it. Nothing is left of it.',
        MILL,
        0.4645529125909473,
        0.75,
        0.4117647058823529,
        0.6875,
    ),
    (
        'one_word',
        'mill',
        'The mill by the river was built in 1871.',
        0.0009118819655545162,
        0.1111111111111111,
        0.0,
        0.1111111111111111,
    ),
    # nltk: 2e-248, as the added space agrees.
    ('empty', '', 'The mill by the river.', 0.0, 0.0, 0.0, 0.0),
    # The white space behind the last stop is an empty word of both.
    (
        'space_at_end',
        '1871.',
        'Built in 1871. ',
        0.22313016014842982,
        0.5,
        0.3333333333333333,
        0.5,
    ),
    (
        'repetition',
        'The the THE mill mill mill',
        'the mill the mill',
        0.47638972202298574,
        1.0,
        0.0,
        1.0,
    ),
    (
        'decimals',
        'Pi is 3.14 and e is 2.72. ',
        'Pi is 3.14159 and e is 2.71828',
        0.7036887702305811,
        0.75,
        0.625,
        0.75,
    ),
    (
        'not_ascii',
        'Zürich liegt am See.\nDer See ist kalt.',
        'Zürich liegt am Zürichsee. Der See ist tief.',
        0.6249523216884489,
        0.75,
        0.5714285714285714,
        0.75,
    ),
    ('nothing_common', 'qqq', 'zzz', 0.0, 0.0, 0.0, 0.0),
    # nltk: 1e-77 for three characters, 9e-78 as 'Rye ' is not 'Rye'.
    ('three_characters', 'a b', 'a b', 0.0, 1.0, 1.0, 1.0),
    ('word_for_word', 'Rye', 'Rye', 0.0, 1.0, 0.0, 1.0),
)


class PublishedTest(parameterized.TestCase):

  @parameterized.named_parameters(*PUBLISHED)
  def test_packages(self, prediction, reference, bleu, one, two, longest):
    found = [
        score(prediction, reference)
        for score in (
            similarity.bleu_char,
            similarity.rouge_1_recall,
            similarity.rouge_2_recall,
            similarity.rouge_l_recall,
        )
    ]
    np.testing.assert_allclose(found, [bleu, one, two, longest], atol=1e-12)

  def test_recall_does_not_punish_length(self):
    longer = MILL + ' And so on, and on, and on, about nothing.'
    for score in (
        similarity.rouge_1_recall,
        similarity.rouge_2_recall,
        similarity.rouge_l_recall,
    ):
      self.assertEqual(score(longer, MILL), 1.0)
    self.assertLess(similarity.bleu_char(longer, MILL), 0.7)

  def test_brevity_by_hand(self):
    # All n-grams of 8 characters agree with 16: exp(1 - 16 / 8).
    got = similarity.bleu_char('aaaa bbb', 'aaaa bbb cccc dd')
    self.assertAlmostEqual(got, np.exp(-1.0))

  def test_nothing_to_recall(self):
    self.assertEqual(similarity.rouge_1_recall('a b', ''), 0.0)
    self.assertEqual(similarity.rouge_l_recall('a b', '...'), 0.0)

  def test_which_of_two_subsequences(self):
    # 'a' and 'b' are both longest; rouge 1.0.1 takes 'b'.
    self.assertEqual(similarity.rouge_l_recall('b a', 'a b'), 0.5)
    self.assertEqual(similarity.rouge_l_recall('b a.b', 'a b'), 0.5)
    self.assertEqual(similarity.rouge_l_recall('b a.a', 'a b'), 1.0)


class UsualTest(parameterized.TestCase):

  def test_bleu_word(self):
    self.assertAlmostEqual(similarity.bleu_word(MILL, MILL), 1.0)
    # 4/4, 2/3 and 1/2 of the n-grams, and 0/1 smoothed to 1/2.
    got = similarity.bleu_word('the red mill burned', 'burned the red mill')
    self.assertAlmostEqual(got, (1.0 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    # Effective order: two words are judged by words and pairs alone.
    self.assertAlmostEqual(similarity.bleu_word('red mill', 'red mill'), 1.0)
    self.assertEqual(similarity.bleu_word('', MILL), 0.0)

  def test_rouge_l_f1(self):
    # Common subsequence 'mill by river' of 4 and 5 words; case is dropped.
    got = similarity.rouge_l_f1('A mill by river', 'the MILL by the river!')
    self.assertAlmostEqual(got, 2 * (3 / 4 * 3 / 5) / (3 / 4 + 3 / 5))
    # No stemming.
    self.assertEqual(similarity.rouge_l_f1('mills', 'mill'), 0.0)
    self.assertEqual(similarity.rouge_l_f1('', MILL), 0.0)

  @parameterized.parameters(
      'Где родилась Ада Орм?',
      'नई दिल्ली भारत की राजधानी है।',
      'กรุงเทพเป็นเมืองหลวง',
      '上海在中国。',
      '東京タワー',
      '서울은 수도',
      '🎸🎹',
  )
  def test_any_script(self, text):
    self.assertEqual(similarity.rouge_l_f1(text, text), 1.0)
    self.assertEqual(similarity.bleu_word(text, text), 1.0)
    half = text[len(text) // 2 :]
    for score in similarity.rouge_l_f1, similarity.bleu_word:
      self.assertBetween(score(half + ' x', text), 0.01, 0.99)
    (row,) = similarity.scores([text], [text])
    # rouge-score has no word of it; its own number would be 0.
    self.assertNotIn('rouge_l_f1', row)
    self.assertEqual(row['rouge_l_f1_unicode'], 1.0)

  def test_published_tokens_on_other_letters(self):
    pair = 'The caf\u00e9 by the river', 'The caf\u00e8 by the river'
    (row,) = similarity.scores(*([one] for one in pair))
    self.assertEqual(row['rouge_l_f1'], 1.0)
    self.assertAlmostEqual(row['rouge_l_f1_unicode'], 0.8)

  @parameterized.parameters(
      ('The mill, by THE river!', 'mill by a river', 1.0),
      ('mill by river', 'mill near river', 0.0),
  )
  def test_exact_match(self, prediction, reference, expected):
    got = similarity.exact_match(prediction, reference)
    self.assertIsInstance(got, float)
    self.assertEqual(got, expected)


class FakeEncoder:
  """Stands in for `retrieval.embed`: a text's length in two dimensions."""

  def __init__(self):
    self.seen = []

  def embed(self, encoder, texts):
    assert encoder is self
    self.seen += texts
    return np.array([[len(text), 1.0] for text in texts], np.float32)


class ScoresTest(absltest.TestCase):

  def test_all(self):
    predictions = [MILL, 'The mill.', '']
    rows = similarity.scores(predictions, [MILL] * 3)
    wanted = [m for m in similarity.NAMES if m != 'minilm_cosine']
    for prediction, row in zip(predictions, rows):
      self.assertEqual(list(row), wanted)
      for metric, value in row.items():
        self.assertIsInstance(value, float)
        function = getattr(similarity, metric.removesuffix('_unicode'))
        self.assertEqual(value, function(prediction, MILL))
    means = metrics.aggregate(rows)
    self.assertEqual(means['exact_match']['n'], 3)
    self.assertAlmostEqual(means['exact_match']['mean'], 1 / 3)

  def test_encoder(self):
    encoder = FakeEncoder()
    self.enterContext(
        mock.patch.object(similarity.retrieval, 'embed', encoder.embed)
    )
    rows = similarity.scores(['ab c', 'x'], ['ab c', 'ab c'], encoder=encoder)
    self.assertEqual(list(rows[0]), list(similarity.NAMES))
    # Every text once, with the space of the protocol.
    self.assertCountEqual(encoder.seen, ['ab c', 'x '])
    cosines = [row['minilm_cosine'] for row in rows]
    expected = (2 * 4 + 1) / np.sqrt((4 + 1) * (16 + 1))
    np.testing.assert_allclose(cosines, [1.0, expected])
    self.assertEqual(similarity.scores([], [], encoder=encoder), [])

  def test_cosine(self):
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    b = np.array([[0.0, 3.0], [2.0, 2.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(similarity.cosine(a, b), [0.0, 1.0, 0.0, -1.0])
    self.assertEqual(similarity.cosine(a[:0], b[:0]).shape, (0,))

  def test_missing_packages(self):
    self.assertEqual(similarity.missing(), [])
    hidden = {'sacrebleu': None, 'rouge_score': None}
    with mock.patch.dict(sys.modules, hidden):
      first, second, *_ = similarity.missing()
      (row,) = similarity.scores([MILL], [MILL])
      for score in (similarity.bleu_word, similarity.rouge_l_f1):
        with self.assertRaisesRegex(InputError, r"install 'jaxedit\[text\]'"):
          score(MILL, MILL)
    self.assertIn('bleu_word needs the package sacrebleu; install', first)
    self.assertIn('rouge_l_f1 needs the package rouge-score; install', second)
    self.assertNotIn('bleu_word', row)
    self.assertNotIn('rouge_l_f1', row)
    self.assertEqual(row['bleu_char'], 1.0)

  def test_faults_at_once(self):
    with self.assertRaises(InputError) as caught:
      similarity.scores(['a'], ['b', ' . .'])
    first, second = caught.exception.problems
    self.assertIn('1 predictions cannot be scored against 2 references', first)
    self.assertIn("reference 1 (' . .') has no word", second)


if __name__ == '__main__':
  absltest.main()
