"""Structure of the demo records that come with the package.

The file is written by hand, so what a loader and the metrics rely on is checked
here: fields, counts, placeholders, and that no record contradicts another. What
a model knows of the facts is not checked.
"""

import collections
import json
import pathlib
import re

from absl.testing import absltest

from jaxedit.eval import datasets

_PATH = pathlib.Path(datasets.__file__).with_name('demo_facts.jsonl')
_FIELDS = (
    'id',
    'prompt',
    'subject',
    'target_new',
    'target_true',
    'paraphrases',
    'neighbours',
    'portability',
)
_KINDS = ('alias', 'reversed', 'one_hop')
_QUICKSTART = 32


def _probes(record):
  """Returns all prompt-answer pairs of a record."""
  portable = record['portability'].values()
  return record['neighbours'] + [probe for kind in portable for probe in kind]


def _names(subject, text):
  """Tells whether a text names the subject, as whole words."""
  return re.search(rf'\b{re.escape(subject)}\b', text, re.IGNORECASE)


class DemoFactsTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.text = _PATH.read_text(encoding='utf-8')
    cls.records = [json.loads(line) for line in cls.text.splitlines()]

  def each(self):
    """Yields the records, each in a sub-test under its id."""
    for record in self.records:
      with self.subTest(record['id']):
        yield record

  def test_one_hundred_lines_end_in_a_newline(self):
    self.assertLen(self.records, 100)
    self.assertTrue(self.text.endswith('}\n'))

  def test_fields_and_counts(self):
    for record in self.each():
      self.assertEqual(tuple(record), _FIELDS)
      self.assertLen(record['paraphrases'], 2)
      self.assertLen(record['neighbours'], 4)
      self.assertEqual(tuple(record['portability']), _KINDS)
      for probes in record['portability'].values():
        self.assertNotEmpty(probes)
      for probe in _probes(record):
        self.assertEqual(tuple(probe), ('prompt', 'answer'))

  def test_strings_are_clean(self):
    for record in self.each():
      strings = [record[name] for name in _FIELDS[:5]]
      strings += record['paraphrases']
      strings += [text for probe in _probes(record) for text in probe.values()]
      for text in strings:
        self.assertIsInstance(text, str)
        self.assertNotEmpty(text)
        self.assertEqual(text, ' '.join(text.split()))
        # Converted tokenizers disagree about digits.
        self.assertNotRegex(text, r'\d')

  def test_placeholder_only_in_the_prompt(self):
    for record in self.each():
      self.assertEqual(record['prompt'].count('{}'), 1)
      texts = record['paraphrases'] + [p['prompt'] for p in _probes(record)]
      for text in texts:
        self.assertNotRegex(text, '[{}]')

  def test_ids_subjects_and_questions_are_unique(self):
    questions = [r['prompt'].replace('{}', r['subject']) for r in self.records]
    for values in (
        [r['id'] for r in self.records],
        [r['subject'].casefold() for r in self.records],
        questions,
    ):
      repeated = [v for v, n in collections.Counter(values).items() if n > 1]
      self.assertEmpty(repeated)
    for record in self.each():
      self.assertRegex(record['id'], r'^[a-z]+(-[a-z]+)+$')
      probes = [p['prompt'] for p in _probes(record)]
      prompts = record['paraphrases'] + probes
      self.assertLen(set(prompts), len(prompts))

  def test_targets_differ_and_are_not_given_away(self):
    for record in self.each():
      self.assertNotEqual(record['target_new'], record['target_true'])
      question = record['prompt'].replace('{}', '')
      for text in [question, *record['paraphrases']]:
        # The company that bears its founder's name keeps it in the subject.
        text = text.replace(record['subject'], '')
        self.assertNotIn(record['target_new'], text)
        self.assertNotIn(record['target_true'], text)

  def test_paraphrases_name_the_subject(self):
    for record in self.each():
      for text in record['paraphrases']:
        self.assertIn(record['subject'], text)

  def test_neighbours_name_no_edited_subject(self):
    # All records may be edited at once, so a neighbour of one must not be the
    # subject of another.
    subjects = [record['subject'] for record in self.records]
    for record in self.each():
      for probe in record['neighbours']:
        named = [s for s in subjects if _names(s, probe['prompt'])]
        self.assertEmpty(named)
        self.assertNotEqual(
            probe['answer'].casefold(), record['target_new'].casefold()
        )

  def test_neighbours_mostly_share_the_true_object(self):
    shared = [
        all(p['answer'] == r['target_true'] for p in r['neighbours'])
        for r in self.records
    ]
    self.assertGreater(sum(shared), len(self.records) / 2)

  def test_portability_follows_from_the_new_object(self):
    for record in self.each():
      subject, new = record['subject'], record['target_new']
      for probe in record['portability']['alias']:
        self.assertEqual(probe['answer'], new)
        self.assertFalse(_names(subject, probe['prompt']))
      for probe in record['portability']['reversed']:
        self.assertEqual(probe['answer'], subject)
        self.assertFalse(_names(subject, probe['prompt']))
        self.assertIn(new, probe['prompt'])
      for probe in record['portability']['one_hop']:
        self.assertIn(subject, probe['prompt'])
        self.assertNotIn(probe['answer'], (new, record['target_true']))

  def test_relations_are_well_spread(self):
    def count(records):
      return collections.Counter(r['id'].split('-')[0] for r in records)

    self.assertLessEqual(max(count(self.records).values()), 20)
    first = count(self.records[:_QUICKSTART])
    self.assertGreaterEqual(len(first), 10)
    self.assertLessEqual(max(first.values()), 6)


if __name__ == '__main__':
  absltest.main()
