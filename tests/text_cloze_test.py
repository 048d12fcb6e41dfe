"""Tests for jaxedit.text.cloze: subjects, braces, and what nearly matches."""

import unicodedata

from absl.testing import absltest, parameterized

from jaxedit.text import cloze
from jaxedit.types import LOCALITY, REPHRASE, EditRequest, Probe, cloze_parts

RUST = 'In Rust, println!("{}", x) is a macro; println belongs to the'


class ResolveTest(parameterized.TestCase):

  @parameterized.parameters(
      ('The {} is in', 'Eiffel Tower', 'The {} is in', 'Eiffel Tower'),
      ('The {} is in \t', ' Tower\n', 'The {} is in', 'Tower'),
      ('The {} is in', 'Tower\u00a0', 'The {} is in', 'Tower'),
      ('The {} is in', '\ufeffTower\u200b ', 'The {} is in', 'Tower'),
      ('The {}is in', 'Tower ', 'The {} is in', 'Tower'),
      ('{}的首都是', '巴西 ', '{}的首都是', '巴西'),
      ('A:\n', '', 'A:\n', ''),
      ('Where is the {}?\nA:\n', 'Tower', 'Where is the {}?\nA:\n', 'Tower'),
      ('The Tower is in', 'Tower', 'The {} is in', 'Tower'),
      # The subject again behind the placeholder refers back to it.
      ('import pandas as {}\ndf = pd.', 'pd', 'import pandas as {}\ndf = pd.', 'pd'),
      ("The {}'s city, as the Tower", 'Tower', "The {}'s city, as the Tower", 'Tower'),
      # Escaped braces, and braces in the subject itself.
      (RUST.replace('{}', '{{}}'), 'println', 'In Rust, {}!("{{}}", x) is a macro; println belongs to the', 'println'),
      ('The call f({}) of', 'f({})', 'The call {} of', 'f({})'),
  )  # fmt: skip
  def test_found(self, prompt, subject, expected, edited):
    self.assertEqual(cloze.resolve(prompt, subject), (expected, edited, ()))

  @parameterized.parameters(
      (RUST, 'println', "write '{{}}' for braces"),
      ('Freedonia uses the format string {} for', 'Freedonia', "'{{}}'"),
      ('Use "{}" in the format of Freedonia', 'Freedonia', "'{{}}'"),
      ('In C, int {} = {} declares', 'x', '2 placeholders.*{{}}'),
      ('The {subject} is', 'Tower', 'nowhere'),
      ('The { } is', 'Tower', 'nowhere'),
      ('The Towers are', 'Tower', 'only inside a longer word'),
      (
          'The eiffel tower is',
          'Eiffel Tower',
          "'Eiffel Tower' stands in the prompt as 'eiffel tower', in other case",
      ),
  )
  def test_errors(self, prompt, subject, pattern):
    (error,) = cloze.resolve(prompt, subject).errors
    self.assertRegex(error, pattern)

  @parameterized.parameters(
      ('Zoe\u0308 plays', 'Zo\u00eb', 'Zoe\u0308'),
      ('Zo\u00eb plays', 'Zoe\u0308', 'Zo\u00eb'),
      ('O\u2019Brien plays', "O'Brien", 'O\u2019Brien'),
      ('the \u201cTower\u201d stands', '"Tower"', '\u201cTower\u201d'),
      ('Eiffel\u00a0Tower is', 'Eiffel Tower', 'Eiffel\u00a0Tower'),
      ('Eiffel  Tower is', 'Eiffel Tower', 'Eiffel  Tower'),
      ('The Beatles are', 'the Beatles', 'The Beatles'),
      (
          unicodedata.normalize('NFD', '서울은 큰'),
          '서울은',
          unicodedata.normalize('NFD', '서울은'),
      ),
  )
  def test_found_in_another_form(self, prompt, subject, written):
    found = cloze.resolve(prompt, subject)
    self.assertEqual(found.errors, ())
    self.assertEqual(found.subject, written)
    request = EditRequest(1, '1', found.prompt, found.subject, 'x')
    self.assertEqual(request.question, prompt)

  def test_other_words_are_no_other_form(self):
    found = cloze.resolve('Cafe\u0301 is', 'Cafe')
    self.assertLen(found.errors, 1)


class FillTest(parameterized.TestCase):

  @parameterized.parameters(
      ("{}'s capital", "Freedonia's capital"),
      ('The capital of Freedonia', 'The capital of Freedonia'),
      ('f"{{}}" of {}', 'f"{}" of Freedonia'),
  )
  def test_filled(self, text, expected):
    probe, errors = cloze.fill(Probe(REPHRASE, text, ('x',)), 'Freedonia')
    self.assertEqual((probe.prompt, errors), (expected, []))

  @parameterized.parameters(
      (REPHRASE, '{} and {}', 'more than once'),
      (REPHRASE, 'Freedonia formats {}', 'written out as well'),
      (LOCALITY, 'The capital of {} is', 'about another subject'),
  )
  def test_errors(self, kind, text, pattern):
    _, (error,) = cloze.fill(Probe(kind, text, ('x',)), 'Freedonia')
    self.assertRegex(error, pattern)
    self.assertIn("'{{}}'", error)

  def test_parts(self):
    self.assertEqual(cloze_parts('a{{}}b{}c'), ['a{}b', 'c'])
    self.assertEqual(cloze_parts('{{{}}}'), ['{{}}'])
    self.assertEqual(cloze_parts(''), [''])


if __name__ == '__main__':
  absltest.main()
