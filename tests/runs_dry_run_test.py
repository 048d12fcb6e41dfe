"""--dry_run of the programs: a table, no weights, nothing written."""

from __future__ import annotations

import re
import shutil
from unittest import mock

import editing_runs
import programs
from absl.testing import absltest

from experiments import causal_trace, collect_moments, trace_passages
from jaxedit.models import checkpoint, loading
from jaxedit.planning import machine
from jaxedit.runs import output

RATES = {'float32': 1e11, 'float64': 5e10, 'bfloat16': 1e11, 'memory': 1e10}


def setUpModule():
  global FACT
  FACT = editing_runs.setup_of('FACT')


def tearDownModule():
  editing_runs.close()


class DryRunTest(programs.Case):

  def setUp(self):
    super().setUp()
    refuse = mock.Mock(side_effect=AssertionError('a dry run must not'))
    for owner, name, value in (
        (loading, 'load_model', refuse),
        (checkpoint.Tensor, 'read', refuse),
        (output, 'Output', refuse),
        (machine, 'rates', lambda: RATES),
    ):
      self.enter_context(mock.patch.object(owner, name, value))

  def table(self, done):
    """Stage -> (TFLOP, device GiB, host GiB)."""
    self.assertEqual(done.code, 0, done.err)
    self.assertFalse(done.folder.exists())
    lines = done.out.splitlines()
    rows = [re.split(r' {2,}', line.strip()) for line in lines]
    return {row[0]: row[1:] for row in rows if len(row) > 6}

  def test_facts(self):
    found = self.table(FACT.run(dry_run=True))
    self.assertEqual(
        list(found),
        [
            'stage', 'load', 'moments', 'factor', 'evaluate_before, score',
            'evaluate_before, generate', 'targets', 'insert',
            'evaluate_after, score', 'evaluate_after, generate', 'total',
        ],
    )  # fmt: skip
    self.assertIn('4 targets, 5 steps, 2 slots', found['targets'][-1])

  def test_weights_and_tokenizer_are_not_needed(self):
    folder = FACT.path('bare')
    shutil.copytree(FACT.model, folder)
    (folder / 'model.safetensors').unlink()
    done = FACT.run(dry_run=True, model=folder)
    self.table(done)
    self.assertIn('holds no weights', done.out)

  def test_refuses_what_cannot_fit(self):
    done = FACT.run(dry_run=True, memory_gib=0.2)
    self.assertEqual(done.code, 2)
    self.assertIn('total', done.out)
    self.assertRegex(done.err, r'error: stage .* needs .* GiB of the host')

  def test_an_error_of_the_run_is_one_of_the_dry_run(self):
    done = FACT.run(dry_run=True, layers='0,9')
    self.assertEqual(done.code, 2)
    self.assertIn('the model has layers 0 to 2', done.err)

  def test_other_methods(self):
    done = FACT.run(
        dry_run=True, method='ft_l', layers='1', batch_size=4,
        moments_corpus=None, moments_tokens=None, context_templates=None,
        moment_weight=None, value_steps=None, slots=None,
    )  # fmt: skip
    found = self.table(done)
    self.assertNotIn('targets', found)
    self.assertIn('is not counted', done.out)

  def test_long_answers(self):
    setup = editing_runs.setup_of('TEXT')
    found = self.table(setup.run(dry_run=True, boundary='surprise'))
    self.assertIn('targets', found)
    self.assertIn('evaluate_after, generate', found)

  def test_moments(self):
    with programs.defined(collect_moments):
      pass
    done = FACT.run(
        collect_moments, dry_run=True, layers='0,1', tokens=200,
        corpus=f'file:{FACT.text}', **dict.fromkeys(
            ['data', 'batch_size', 'slots', 'moment_weight', 'value_steps',
             'eval_batch_size', 'max_new_tokens', 'moments_corpus',
             'moments_tokens', 'context_templates', 'output_dir'],
        ),
    )  # fmt: skip
    self.assertEqual(done.code, 0, done.err)
    self.assertIn('200 tokens, 2 x [64, 64]', done.out)

  def test_traces(self):
    setup = programs.Setup(causal_trace)
    self.addCleanup(setup.close)
    done = setup.run(
        dry_run=True, prompt='The mother tongue of Danielle is',
        subject='Danielle', plots=False,
    )  # fmt: skip
    found = self.table(done)
    self.assertIn('cells, 10 draws', found['trace'][-1])
    self.assertGreater(float(found['trace'][0]), 0)

  def test_passages(self):
    setup = programs.Setup(trace_passages, chats=True)
    self.addCleanup(setup.close)
    data = setup.write(*editing_runs.TEXTS)
    done = setup.run(dry_run=True, data=data, window=3, plots=False)
    found = self.table(done)
    self.assertIn('4 passages', found['locating'][-1])
    self.assertGreater(float(found['reach'][0]), 0)


if __name__ == '__main__':
  absltest.main()
