"""The demo passages that come with the package are sound.

The file is written by hand, so what a loader and the metrics rely on is checked
here, and what the answers claim: the code runs, the formulas hold, and short
answers stand in the long ones. That the texts are good ones is not checked.
"""

import collections
import ctypes
import json
import math
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import tempfile

import tokenizers
from absl.testing import absltest

from jaxedit import testing
from jaxedit.eval import datasets

_PATH = pathlib.Path(datasets.__file__).with_name('demo_passages.jsonl')
_LONG = 60, 300  # tokens of the demo model


def _code(passage):
  """Returns the code inside an answer's fences."""
  (code,) = re.findall(r'```\w+\n(.*?)```', passage.target, re.DOTALL)
  return code


class DemoPassagesTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    loaded = datasets.load_requests('demo', kinds=('text',))
    cls.passages = loaded.requests
    cls.by_id = {passage.id: passage for passage in cls.passages}

  def each(self):
    """Yields the passages, each in a sub-test under its id."""
    for passage in self.passages:
      with self.subTest(passage.id):
        yield passage

  def test_lines(self):
    text = _PATH.read_text(encoding='utf-8')
    self.assertTrue(text.endswith('}\n'))
    self.assertLen(text.splitlines(), len(self.passages))
    for line, passage in zip(text.splitlines(), self.passages, strict=True):
      self.assertEqual(json.loads(line)['answer'], passage.target)

  def test_categories(self):
    kinds = collections.Counter(p.category for p in self.passages)
    self.assertGreaterEqual(kinds['prose'], 5)
    for kind in ('news', 'code', 'math'):
      self.assertGreaterEqual(kinds[kind], 2)
    for kind in ('poetry', 'recipe', 'letter', 'table', 'list'):
      self.assertEqual(kinds[kind], 1)
    # A short run sees many kinds.
    self.assertGreaterEqual(len({p.category for p in self.passages[:8]}), 6)

  def test_questions(self):
    asked = []
    for passage in self.each():
      self.assertRegex(passage.id, rf'^{passage.category}-[a-z]+$')
      rephrases = [p.prompt for p in passage.probes_of('rephrase')]
      self.assertBetween(len(rephrases), 1, 2)
      prompts = [probe.prompt for probe in passage.probes_of('sub_question')]
      asked += [passage.question, *rephrases, *prompts]
      if passage.category == 'prose':
        self.assertBetween(len(prompts), 2, 3)
    self.assertLen(set(map(str.casefold, asked)), len(asked))
    for text in asked:
      self.assertEqual(text, ' '.join(text.split()))
      self.assertRegex(text, r'[.?]$')

  def test_short_answers_stand_in_the_long_one(self):
    for passage in self.each():
      for probe in passage.probes_of('sub_question'):
        self.assertIn(probe.answers[0].casefold(), passage.target.casefold())
        self.assertNotIn(probe.answers[0].casefold(), probe.prompt.casefold())
        self.assertLess(len(probe.answers[0].split()), 8)

  def test_lengths(self):
    path = testing.demo_model() / 'tokenizer.json'
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    lengths = []
    for passage in self.each():
      ids = tokenizer.encode(passage.target, add_special_tokens=False).ids
      self.assertBetween(len(ids), *_LONG)
      self.assertEqual(tokenizer.decode(ids), passage.target)
      lengths.append(len(ids))
    for low in range(*_LONG, 60):
      self.assertTrue([n for n in lengths if low <= n < low + 60], low)


class TruthTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    loaded = datasets.load_requests('demo_passages', kinds=('text',))
    self.by_id = {passage.id: passage for passage in loaded.requests}

  def test_python(self):
    names = {}
    exec(_code(self.by_id['code-knots']), names)  # pylint: disable=exec-used
    score = names['knot_score']
    self.assertEqual(score([]), 0)
    self.assertEqual(score(['bowline'] * 3), 14)
    self.assertEqual(score(['reef', 'granny', 'hitch']), -1)
    self.assertEqual(score(['reef'] * 6 + ['hitch'] * 2), 24)

  def test_sql(self):
    database = sqlite3.connect(':memory:')
    self.addCleanup(database.close)
    database.execute('CREATE TABLE pears (orchard, variety, grams)')
    pears = [('x', 'a', 90), ('x', 'b', 120), ('y', 'a', 150), ('y', 'c', 150)]
    database.executemany('INSERT INTO pears VALUES (?, ?, ?)', pears)
    found = database.execute(_code(self.by_id['code-pears'])).fetchall()
    self.assertCountEqual(found, pears[1:])
    self.assertEqual(found[-1], pears[1])

  def test_c(self):
    compiler = shutil.which('cc')
    if compiler is None:
      self.skipTest('there is no C compiler')
    folder = self.enterContext(tempfile.TemporaryDirectory())
    source, library = (os.path.join(folder, f'ticket.{x}') for x in ('c', 'so'))
    pathlib.Path(source).write_text(_code(self.by_id['code-ticket']))
    flags = ['-std=c99', '-Wall', '-Wextra', '-Werror', '-shared', '-fPIC']
    subprocess.run([compiler, *flags, source, '-o', library], check=True)
    function = ctypes.CDLL(library).velm_ticket_ok
    function.argtypes = ctypes.c_char_p, ctypes.c_size_t
    for digits, right in (
        (b'1230', 1), (b'1234', 0), (b'50', 1), (b'12a0', 0), (b'7', 0),
        (b'', 0), (b'9' * 12 + b'%d' % (9 * sum(range(2, 14)) % 10), 1),
    ):  # fmt: skip
      self.assertEqual(function(digits, len(digits)), right, digits)

  def test_recurrence(self):
    answer = self.by_id['math-lanterns'].target
    self.assertIn('v_n = 3^n + 1', answer)
    self.assertIn(r'\frac{3^n - 1}{2} + n', answer)
    value, total = 2, 0
    for n in range(9):
      self.assertEqual(value, 3**n + 1)
      self.assertEqual(total, (3**n - 1) // 2 + n)
      value, total = 3 * value - 2, total + value

  def test_tin(self):
    answer = self.by_id['math-tin'].target
    self.assertIn(r'r = \sqrt{\frac{A}{3\pi}}', answer)
    self.assertIn(r'V = \pi r^3', answer)
    area = 7.0
    best = math.sqrt(area / (3 * math.pi))

    def volume(radius):
      height = (area - math.pi * radius**2) / (2 * math.pi * radius)
      return math.pi * radius**2 * height

    self.assertAlmostEqual(volume(best), math.pi * best**3)
    for step in range(1, 160):
      self.assertLessEqual(volume(best * step / 100), volume(best) + 1e-12)

  def test_latex_is_closed(self):
    for name in ('math-lanterns', 'math-tin'):
      answer = self.by_id[name].target
      self.assertEqual(answer.count('{'), answer.count('}'))
      self.assertEqual(answer.count(r'\['), answer.count(r'\]'))
      self.assertEqual(answer.count('$') % 2, 0)
      self.assertEqual(answer.count(r'\begin{'), answer.count(r'\end{'))

  def test_table_is_rectangular(self):
    rows = [
        line
        for line in self.by_id['table-ferries'].target.splitlines()
        if line.startswith('|')
    ]
    self.assertLen({(len(row), row.count('|')) for row in rows}, 1)


if __name__ == '__main__':
  absltest.main()
