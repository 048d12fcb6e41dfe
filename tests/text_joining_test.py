"""Tests for jaxedit.text.joining and scripts: what stands between two texts."""

from absl.testing import absltest, parameterized

from jaxedit.text import joining, scripts


class ContinuationTest(parameterized.TestCase):

  @parameterized.parameters(
      ('巴西的首都是', '上海'),
      ('成立于', '1949年'),
      ('成立于', '1949'),
      ('答案：', 'Rome'),
      ('東京は', '日本'),
      ('เมืองหลวงคือ', 'กรุงเทพ'),
      ('上海', '，它'),
      ('The motto is "', 'Onward'),
      ("It is called '", 'Onward'),
      ('The motto is \u201c', 'Onward'),
      ('It is (', 'big)'),
      ('import pandas as pd\ndf = pd.', 'load_table("a.csv")'),
      ('std::', 'vector'),
      ('p->', 'next'),
      ('It costs $', '5'),
      ('the Baden-', 'W\u00fcrttemberg'),
      ('the Rhine', ', which freezes'),
      ('the Rhine', '. It flows'),
      ('London', "'s bridge"),
      ('A:\n', 'London'),
      ('A:', '\nLondon'),
      ('A:', ' London'),
      ('<|user|>', 'London'),
  )
  def test_no_blank(self, prompt, target):
    found = joining.continuation(prompt, target, special=['<|user|>'])
    self.assertEqual(found, target)

  @parameterized.parameters(
      ('The capital is', 'Rome'),
      ('A:', 'Rome'),
      ('Who is it?', 'Rome'),
      ('[INST] Where? [/INST]', 'Peru'),
      ('It is "big"', 'Rome'),
      ('He said "go."', 'Rome'),
      ("the dogs'", 'bone'),
      ('He lives in St.', 'Louis'),
      ('It is big (or so).', 'the'),
      ('It runs on', '.NET'),
      ('It is rated', '(5)'),
      ('It is called', '"Onward"'),
      ('Use C#', 'now'),
      ('It is ____', 'Rome'),
      ('where $x$', 'is'),
      ('first known as', '-5'),
      ('In Chinese it is', '北京'),
      ('首都是', 'Rome'),
      ('수도는', '서울'),
      ('Столица', 'Рим'),
      ('I love 🎸', 'music'),
  )
  def test_blank(self, prompt, target):
    self.assertEqual(joining.continuation(prompt, target), ' ' + target)
    self.assertEqual(joining.continuation(prompt, target, False), target)

  @parameterized.parameters('', ' ', '\n')
  def test_nothing(self, target):
    self.assertEqual(joining.continuation('A', target, True), '')

  def test_white_space_at_ends(self):
    self.assertEqual(joining.trim_prompt('A is \t\u00a0'), 'A is')
    self.assertEqual(joining.trim_prompt('A:\n '), 'A:\n ')
    self.assertEqual(joining.trim_target(' Rome \n'), 'Rome')
    self.assertEqual(joining.trim_target('\n Rome\n'), '\n Rome')


class PiecesTest(parameterized.TestCase):

  @parameterized.parameters(
      ('Ada  Orme', ['Ada', 'Orme']),
      ('上海的London塔', ['上', '海', '的', 'London', '塔']),
      ('서울은 수도', ['서울은', '수도']),
      ('दिल्ली में', ['दिल्ली', 'में']),
      ('รุง', ['รุ', 'ง']),
      ('a🎸🎹', ['a', '🎸', '🎹']),
      ('👩\u200d🚀👍🏽', ['👩\u200d🚀', '👍🏽']),
      ('', []),
  )
  def test_pieces(self, text, expected):
    self.assertEqual(scripts.pieces(text), expected)


if __name__ == '__main__':
  absltest.main()
