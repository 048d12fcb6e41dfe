"""Templates hold one placeholder each, whatever a model generates."""

import json
import os
import tempfile

from absl.testing import absltest, parameterized

from jaxedit.text import templates
from jaxedit.types import InputError


class CleanTest(parameterized.TestCase):

  @parameterized.parameters(
      ('The man\n\nsaid', 'The man said'),
      ('The\nman\r\nsaid\u2028so', 'The man said so'),
      ('a {b} {} c', 'a  b     c'),
      ('full \uff5bwidth\uff5d', 'full  width '),
      ('<|begin_of_text|>The<|endoftext|> end</s>', 'The end'),
      ('x < y | z > w', 'x < y | z > w'),
      ('\ufb01ne caf\u00e9', 'fine cafe\u0301'),
      ('\ud83d alone', '\ufffd alone'),
  )
  def test_cases(self, text, wanted):
    self.assertEqual(templates.clean(text), wanted)

  def test_named_special_tokens_go_longest_first(self):
    cleaned = templates.clean('a [E] b [E]x', ['[E]', '[E]x', ''])
    self.assertEqual(cleaned, 'a  b ')


class SampleTest(absltest.TestCase):

  def test_bare_first_then_each_start(self):
    calls = []

    def sample(prompts, seed, length):
      calls.append((prompts, seed, length))
      return [f'{p} {{go}}\n\non {i}' for i, p in enumerate(prompts)]

    got = templates.sample_templates(
        sample, seed=7, starts=('The', 'I'), length=12, per_start=2
    )
    self.assertEqual(calls, [(['The', 'The', 'I', 'I'], 7, 12)])
    self.assertEqual(got[0], '{}')
    self.assertEqual(got[1], 'The  go  on 0. {}')
    self.assertLen(got, 5)
    self.assertEqual(templates.template_errors(got), [])

  def test_defaults_are_those_of_memit(self):
    def sample(prompts, seed, length):
      del seed
      self.assertEqual(length, 10)
      return prompts

    got = templates.sample_templates(sample, seed=0)
    self.assertEqual(
        got,
        ('{}', 'The. {}', 'Therefore. {}', 'Because. {}', 'I. {}', 'You. {}'),
    )

  def test_no_starts_need_no_model(self):
    def sample(prompts, seed, length):
      raise AssertionError

    got = templates.sample_templates(sample, seed=0, starts=())
    self.assertEqual(got, ('{}',))

  def test_wrong_number_of_texts(self):
    with self.assertRaisesRegex(ValueError, '1 texts for 5'):
      templates.sample_templates(lambda *_: ['a'], seed=0)


class FileTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = os.path.join(self.folder, 'templates.json')

  def _write(self, text):
    with open(self.path, 'w', encoding='utf-8') as file:
      file.write(text)

  def test_round_trip(self):
    given = ('{}', 'Zoë said. {}', 'braces { and } alone. {}')
    self._write(json.dumps(given))
    self.assertEqual(templates.load_templates(self.path), given)

  @parameterized.parameters(
      ([], ('{}',)),
      (['a {}'], ('{}', 'a {}')),
      (['a {}', '{}', 'b {}'], ('{}', 'a {}', 'b {}')),
  )
  def test_bare_is_put_first(self, entries, wanted):
    self._write(json.dumps(entries))
    self.assertEqual(templates.load_templates(self.path), wanted)

  def test_every_faulty_entry_is_told(self):
    self._write(json.dumps(['{}', 'none', 3, '{} {}', 'fine {}']))
    with self.assertRaises(InputError) as caught:
      templates.load_templates(self.path)
    problems = caught.exception.problems
    self.assertLen(problems, 3)
    for problem, number in zip(problems, (2, 3, 4)):
      self.assertIn(f'template {number}', problem)
      self.assertIn(self.path, problem)

  @parameterized.parameters('{"a": 1}', '[', '"{}"')
  def test_other_content(self, text):
    self._write(text)
    with self.assertRaisesRegex(InputError, 'list of strings'):
      templates.load_templates(self.path)

  def test_missing_file(self):
    with self.assertRaisesRegex(InputError, 'No such file'):
      templates.load_templates(self.path)


if __name__ == '__main__':
  absltest.main()
