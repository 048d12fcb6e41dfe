"""Editing programs that are interrupted, and edits that are not finite."""

from __future__ import annotations

import shutil
from unittest import mock

import cases
import editing_runs
import jax
import numpy as np
import tiny_model
from absl.testing import absltest, parameterized
from editing_runs import TEXTS, Case, fact, interrupted_at, text

from jaxedit.edited import scoring
from jaxedit.runs import editing, inputs, moments, report
from jaxedit.runs.cache import TargetFiles

both_kinds = editing_runs.both_kinds
setup_of = editing_runs.setup_of


def setUpModule():
  global FACT, TEXT
  FACT, TEXT = map(setup_of, editing_runs.SETUPS)


def tearDownModule():
  editing_runs.close()


class InterruptedTest(Case):

  @parameterized.product(
      name=('FACT', 'TEXT'), file=('records.jsonl', 'results.json')
  )
  def test_nothing_is_half_written(self, name, file):
    with interrupted_at(file):
      done = setup_of(name).run(num_edits=2, max_new_tokens=0)
    self.assertEqual(done.code, 130)
    self.assertIn('interrupted', done.err)
    whole = ['delta.safetensors', 'moments.safetensors', 'unfinished']
    whole += ['templates.json'] if name == 'FACT' else []
    whole += ['records.jsonl'] if file == 'results.json' else []
    self.assertEqual(done.files, sorted(whole))

  def test_a_sequence_resumes(self):
    """Between the targets of its second batch; see runs_resume_test as well."""
    settings = dict(method='alphaedit', moment_weight=None, max_new_tokens=0)
    whole = self.succeed(FACT, **settings)
    put, seen = TargetFiles.put, []

    def stop(self, *args):
      if len(seen) == 3:  # one of the second batch's two
        raise KeyboardInterrupt
      seen.append(args)
      put(self, *args)

    with mock.patch.object(TargetFiles, 'put', stop):
      done = FACT.run(**settings)
    self.assertEqual(done.code, 130)
    self.assertFalse((done.folder / 'delta.safetensors').exists())
    again = self.succeed(FACT, output_dir=done.folder, **settings)
    # The second batch is a round that was not complete.
    self.assertEqual(again.results['work']['states_kept'], 2)
    self.assertIn('the targets of 2 of 4 edits were kept', again.err)
    self.assertNotIn('states_kept', whole.results['work'])
    self.assertFalse((done.folder / 'unfinished').exists())
    for name in ('delta.safetensors', 'records.jsonl'):
      one, other = ((x.folder / name).read_bytes() for x in (again, whole))
      self.assertEqual(one, other)
    self.assertEqual(again.results['counts'], whole.results['counts'])

  def test_the_unedited_model_is_asked_once(self):
    settings = dict(num_edits=2, max_new_tokens=3, answers=FACT.path('kept'))
    one = self.succeed(FACT, **settings)
    score, asked = scoring.score, []

    def spy(*args, **given):
      asked.append(args)
      return score(*args, **given)

    with mock.patch.object(scoring, 'score', spy):
      again = self.succeed(FACT, **settings)
    self.assertLen(asked, 1)  # the edited one
    for name in ('delta.safetensors', 'records.jsonl'):
      one_, other = ((x.folder / name).read_bytes() for x in (again, one))
      self.assertEqual(one_, other)
    self.assertEqual(again.results['metrics'], one.results['metrics'])

  def test_a_run_resumes_that_had_saved_the_model(self):
    settings = dict(num_edits=2, max_new_tokens=0, save_model=True)
    with mock.patch.object(report, 'write', side_effect=KeyboardInterrupt):
      done = FACT.run(**settings)
    self.assertEqual(done.code, 130)
    self.assertTrue((done.folder / 'model').is_dir())
    again = self.succeed(FACT, output_dir=done.folder, **settings)
    self.assertEqual(again.results['work']['states_kept'], 2)
    self.assertIn('saved', again.results)

  def test_results_stay_until_something_is_made(self):
    place = TEXT.path('used')
    place.mkdir()
    (place / 'results.json').write_text('old')
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(moments, 'find', stop):
      done = TEXT.run(output_dir=place, overwrite=True)
    self.assertEqual(done.code, 130)
    self.assertEqual((place / 'results.json').read_text(), 'old')

  def test_results_of_an_earlier_run(self):
    """They stay until something is made anew, and then go."""
    place = FACT.path('used')
    place.mkdir()
    for name in ('results.json', 'delta.safetensors', 'keep.txt'):
      (place / name).write_text('old')
    settings = dict(output_dir=place, num_edits=2, max_new_tokens=0)
    self.refuse(FACT, 'already has files; .*--overwrite', **settings)
    settings['overwrite'] = True
    # Bad input must not cost the results that are there.
    self.refuse(FACT, 'layers', **settings | dict(layers='9'))
    self.refuse(TEXT, 'nowhere', **settings | dict(encoder='nowhere'))
    self.refuse(TEXT, 'no token', **settings | dict(answer_end='the end'))
    self.assertEqual((place / 'results.json').read_text(), 'old')
    # A folder called model that no run has written is somebody's own.
    (place / 'model').mkdir()
    self.refuse(FACT, 'model: exists, and no run', save_model=True,
                weights=True, **settings)  # fmt: skip
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(editing, '_edit_in_sequence', stop):
      done = FACT.run(**settings)
    self.assertEqual(done.code, 130)
    self.assertFalse((place / 'results.json').exists())
    shutil.rmtree(place / 'model')
    for _ in range(2):
      done = self.succeed(FACT, save_model=True, **settings)
      self.assertIn('saved', done.results)
    self.assertEqual((place / 'keep.txt').read_text(), 'old')
    # A later run without --save_model leaves no model that is not its own.
    self.succeed(FACT, **settings)
    self.assertFalse((place / 'model').exists())


class NotFiniteTest(Case):

  def bad(self, space=' '):
    """Records whose states overflow in the poisoned model."""
    question = f'The mother tongue of{space}{tiny_model.POISON}'
    # One word less, as a token before the subject is a space.
    return {
        'FACT': fact(tiny_model.POISON, prompt='The tongue of {} is'),
        'TEXT': text('Paris', TEXTS[0]['answer'], question=question),
    }

  @cases.first(
      2,
      parameterized.parameters(
          ('FACT', dict(reset=False, batch_size=2)),
          ('TEXT', dict(reset=True)),
          ('FACT', dict(reset=True, batch_size=1)),
          ('TEXT', dict(reset=False, batch_size=2)),
      ),
  )
  def test_one_edit_fails_alone(self, name, how):
    setup = setup_of(name)
    data = setup.write(self.bad()[name], *setup.good[1:])
    done = self.succeed(setup, model=setup.poisoned, data=data, **how)
    poisoned, *sound = done.records
    self.assertFalse(poisoned['written'])
    self.assertIsNone(poisoned['loss'])
    self.assertTrue(all(row['written'] for row in sound))
    if setup is FACT:
      for row in sound:
        self.assertLess(row['after']['nll_new'], row['before']['nll_new'] - 0.2)
    self.assertIn('1 edits were not written', done.out)
    for part in jax.tree.leaves(done.delta()[0]):
      self.assertTrue(np.isfinite(part).all())

  def test_a_part_of_them_fails_alone(self):
    data = TEXT.write(self.bad()['TEXT'], self.bad('')['TEXT'], *TEXTS[2:])
    two = mock.Mock(return_value=[[0, 1], [2, 3]])
    with mock.patch.object(inputs, '_parts', two):
      done = self.succeed(TEXT, model=TEXT.poisoned, data=data)
    written = [row['written'] for row in done.records]
    self.assertEqual(written, [False, False, True, True])
    self.assertIn('2 edits were not written', done.out)

  @both_kinds
  def test_no_edit_is_left(self, name):
    setup = setup_of(name)
    data = setup.write(self.bad()[name])
    done = setup.run(model=setup.poisoned, data=data)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'error: no edit was written: .*; lower')
    self.assertFalse((done.folder / 'results.json').exists())


if __name__ == '__main__':
  absltest.main()
