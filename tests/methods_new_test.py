"""A new method is one file: its flags, help, refusals, runs and tests follow.

The file is new_method/toy.py.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import unittest
from unittest import mock

import editing_runs
from absl import flags
from absl.testing import absltest, parameterized

import jaxedit as je
from experiments import anyedit_batch, edit
from jaxedit import methods
from jaxedit.methods import registry
from jaxedit.runs import method_flags
from jaxedit.types import InputError

FLAGS = (
    'toy_times', 'toy_rate', 'toy_sign', 'toy_parts', 'toy_whole', 'toy_file',
)  # fmt: skip


def setUpModule():
  global FACT
  FACT = editing_runs.Facts()
  folder = pathlib.Path(__file__).with_name('new_method')
  paths = [*methods.__path__, str(folder)]
  FACT.stack.enter_context(mock.patch.object(methods, '__path__', paths))
  FACT.stack.enter_context(mock.patch.dict(sys.modules))
  FACT.stack.enter_context(
      mock.patch.dict(registry.METHODS, registry.discover())
  )


def tearDownModule():
  FACT.close()


class NewMethodTest(editing_runs.Case):

  def run_toy(self, **changes):
    given = dict(method='toy', moment_weight=None, value_steps=None)
    return FACT.run(edit, **(given | changes))

  def test_flags_and_help(self):
    with editing_runs.programs.defined(edit) as names:
      self.assertContainsSubset(FLAGS, names)
      self.assertIn('toy: a toy', flags.FLAGS['method'].help)
      self.assertIn(
          'How often it is added. Default: toy 2.',
          flags.FLAGS['toy_times'].help,
      )
      self.assertIn('toy 1.0,0.5', flags.FLAGS['toy_parts'].help)
      self.assertIn('toy 1', flags.FLAGS['layers'].help)
    with editing_runs.programs.defined(anyedit_batch) as names:
      self.assertNoCommonElements(FLAGS, names)  # it takes facts alone

  def test_settings_are_listed_by_the_names_of_flags(self):
    settings = registry.METHODS['toy'].settings
    self.assertContainsSubset([*FLAGS, 'layers'], settings)
    self.assertEqual(settings['toy_times'].default, 2)

  def test_table_of_the_documentation(self):
    table = method_flags.table()
    row = '| [`toy`](#toy) | a toy | facts | decoders | [arXiv 0000.00'
    self.assertIn(row, table)
    self.assertIn('| `--toy_rate` | its size | toy 0.5 |  |', table)

  def test_run(self):
    scales = FACT.path('scales.json')
    scales.write_text(json.dumps([2, 1, 1]))
    done = self.succeed(
        self.run_toy, toy_times=3, toy_rate=0.25, toy_sign='minus',
        toy_parts='1,0.25', toy_whole=False, toy_file=scales,
    )  # fmt: skip
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'toy')
    self.assertEqual(protocol['factors'], [2, 1, 1])
    settings = protocol['settings']
    self.assertEqual((settings['times'], settings['rate']), (3, 0.25))
    self.assertEqual((settings['sign'], settings['whole']), ('minus', False))
    self.assertEqual(settings['parts'], [1, 0.25])
    self.assertEqual(settings['layers'], [0, 1])
    edited, metadata = done.delta(model_hash=FACT.base.hash)
    self.assertEqual(metadata['method'], 'toy')
    (delta,) = edited.deltas
    self.assertEqual((delta.layers, delta.site), ((0, 1), 'mlp/up'))
    for row in done.records:
      self.assertTrue(row['written'])
      self.assertGreater(row['norm'], 0)
      self.assertNotEqual(row['before']['nll_new'], row['after']['nll_new'])
    self.assert_judged(FACT, edited, [(None, row) for row in done.records])

  def test_side_by_side(self):
    done = self.succeed(self.run_toy, reset=True, batch_size=1)
    edited, _ = done.delta()
    self.assertEqual(edited.size, len(done.records))

  @parameterized.parameters(
      (dict(toy_times=0), 'flag --toy_times=0.*lower than 1|toy_times=0'),
      (dict(toy_rate=0), 'toy_rate=0.*above 0'),
      (dict(toy_sign='both'), 'toy_sign=both.*<plus\\|minus>'),
      (dict(toy_parts='1,x'), '--toy_parts=1,x: give numbers'),
      (dict(toy_parts='1,3'), '--toy_parts is 3.0; it must be at most 2'),
      (dict(toy_file='none'), '--toy_file=none: no such file; leave it'),
      (dict(ridge=1), '--ridge is no setting of toy; it belongs to alphaedit'),
      (dict(method='memit', toy_rate=1), 'toy_rate is no setting of memit; it'
       ' belongs to toy: leave it out'),
      (dict(states='x'), '--states=x: toy optimises no hidden states'),
      (dict(kind='text'), 'method toy edits facts, these requests are long'),
      (dict(parity='easyedit'), '--parity=easyedit sets nothing for toy'),
  )  # fmt: skip
  def test_refused(self, changes, message):
    done = self.run_toy(**changes)
    self.assertEqual(done.code, 2, done.err)
    self.assertRegex(done.err, f'error: .*({message})')

  def test_front_door(self):
    model = je.load(FACT.model)
    request = dict(prompt='The capital of {} is', subject='Paris', target='a')
    edited = je.edit(model, request, 'toy', contexts=['{}'], toy_rate=4.0)
    self.assertTrue(edited.info.written.all())
    self.assertNotEqual(
        edited.score('The capital of Paris is', 'a'),
        je.EditedModel(model, je.Edited(), None).score(
            'The capital of Paris is', 'a'
        ),
    )
    with self.assertRaisesRegex(InputError, 'toy_times is 0; it must be at'):
      je.edit(model, request, 'toy', contexts=['{}'], toy_times=0)

  def test_battery(self):
    path = pathlib.Path(__file__).with_name('methods_common_test.py')
    spec = importlib.util.spec_from_file_location('battery', path)
    battery = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, battery=battery):
      spec.loader.exec_module(battery)
      found = unittest.defaultTestLoader.loadTestsFromModule(battery)
      mine = unittest.TestSuite(
          test for suite in found for test in suite if 'toy' in test.id()
      )
      result = unittest.TestResult()
      mine.run(result)
    self.assertGreater(result.testsRun, 12)
    self.assertEqual(result.failures + result.errors, [])


if __name__ == '__main__':
  absltest.main()
