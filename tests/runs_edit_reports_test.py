"""Edits that were not learned, and facts that a later batch edits again."""

from __future__ import annotations

import editing_runs
import numpy as np
from absl.testing import absltest, parameterized
from editing_runs import Case, fact

from jaxedit.methods.base import Info
from jaxedit.runs import edit_reports
from jaxedit.types import EditRequest


def setUpModule():
  global FACT
  FACT = editing_runs.Facts()


def tearDownModule():
  FACT.close()


class SupersededTest(parameterized.TestCase):

  @parameterized.parameters(
      ('abc', {0: 2, 1: 2}), ('aba', {1: 2}), ('aa', {}), ('a', {})
  )
  def test_the_last_edit_is_in_force(self, targets, want):
    requests = [
        EditRequest(number, '', 'The tongue of {} is', 'Sydney', target)
        for number, target in enumerate(targets, 1)
    ]
    other = EditRequest(9, '', 'The tongue of {} is', 'Paris', 'z')
    self.assertEqual(edit_reports.superseded([*requests, other]), want)


class EditedAgainTest(Case):

  redo = (
      fact('Danielle'),
      fact('Toko', 'guitar piano'),
      fact('Danielle', 'guitar piano', target_true='twin city'),
  )

  @parameterized.parameters(('memit', False), ('alphaedit', True))
  def test_the_later_edit_wins(self, method, preserved):
    weight = 20 if method == 'memit' else None
    done = self.succeed(
        FACT, data=FACT.write(*self.redo), batch_size=1, value_steps=20,
        method=method, moment_weight=weight, max_new_tokens=0,
    )  # fmt: skip
    first, other, last = done.records
    self.assertEqual(first['superseded_by'], 3)
    self.assertNotIn('superseded_by', other)
    self.assertTrue(last['edited_again'])
    self.assertEqual(last.get('against_preserved_keys', False), preserved)
    self.assertLess(last['after']['nll_new'], last['before']['nll_new'])
    if not preserved:  # the new object beats the one that was written first
      self.assertLess(last['after']['nll_new'], last['after']['nll_true'])
    self.assertEqual(done.results['counts']['post']['es'], 2)
    again = done.results['edited_again']
    self.assertEqual((again['records'], again['superseded']), ([3], [1]))
    self.assertEqual(again['metrics']['es'], last['after']['metrics']['es'])
    self.assertIn('1 facts were edited again in a later batch', done.out)
    self.assertEqual('preserves the keys' in done.out, preserved)

  def test_in_one_batch_it_is_an_error(self):
    message = (
        'record 3.*for the same subject and prompt; keep one, or .*batches'
    )
    data = FACT.write(*self.redo)
    self.refuse(FACT, message, data=data, batch_size=3)
    again = r'record 3.*same subject and prompt; keep one\.'
    self.refuse(FACT, again, data=data, batch_size=1, reset=True)


class NotLearnedTest(Case):

  def test_they_are_named_and_counted(self):
    done = self.succeed(FACT, num_edits=2, value_steps=1, max_new_tokens=0)
    found = done.results['not_learned']
    self.assertEqual(found['count'], 2)
    for one, row in zip(found['records'], done.records, strict=True):
      self.assertFalse(row['learned'])
      self.assertEqual(one['number'], row['number'])
      self.assertEqual(one['loss'], row['loss'])
      self.assertLess(one['probability'], edit_reports.LEARNED)
    self.assertEqual(done.results['metrics']['post']['learned'], 0.0)
    self.assertIn('2 of 2 edits were not learned', done.out)
    self.assertRegex(done.out, r'record 1 \(id .*\): loss \d+\.\d\d, prob')
    self.assertRegex(done.out, r'learned +- +0\.000 ')

  @parameterized.parameters(
      (0.5, True, True), (0.49, True, False), (None, False, False)
  )
  def test_learned(self, probability, written, learned):
    per_edit = {'probability': [probability], 'loss': [probability]}
    info = Info(np.array([written]), {}, per_edit)
    request = EditRequest(1, 'a', 'x {}', 'y', 'z')
    found = edit_reports.EditReports([request], info, {}, False, 0)
    self.assertEqual(found.record(0), {'learned': learned})
    # What was not written is told in a line of its own.
    self.assertEqual(found.not_learned, [] if learned or not written else [0])

  def test_a_method_that_optimises_nothing_says_nothing(self):
    info = Info(np.array([True]), {}, {})
    request = EditRequest(1, 'a', 'x {}', 'y', 'z')
    found = edit_reports.EditReports([request], info, {}, False, 0)
    self.assertEqual((found.record(0), found.not_learned), ({}, []))


if __name__ == '__main__':
  absltest.main()
