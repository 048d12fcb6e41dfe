"""What a run tells: notes before it, and what it replaces."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import types

from absl.testing import absltest, parameterized

from jaxedit.eval.datasets import Loaded, Skipped
from jaxedit.eval.evaluation import Evaluation
from jaxedit.methods import base
from jaxedit.runs import report
from jaxedit.runs.config import RunConfig
from jaxedit.targets import Work
from jaxedit.types import InputError


class NotesTest(absltest.TestCase):

  def test_nothing_to_note(self):
    loaded = Loaded((), (), 'facts.jsonl', '', 'counterfact')
    self.assertEmpty(report.notes(loaded, None, 4))
    self.assertEmpty(report.notes(loaded, 4, 4))

  def test_skipped_and_missing_records(self):
    skipped = tuple(Skipped(i, f'id{i}', 'bad') for i in range(1, 8))
    loaded = Loaded((), skipped, 'facts.jsonl', '', 'counterfact')
    first, *some, last = report.notes(loaded, 9, 4)
    self.assertRegex(first, '^note: facts.jsonl: 7 bad records were skipped')
    self.assertLen(some, 5)
    self.assertEqual(some[0], '  record 1 (id id1): bad')
    self.assertRegex(last, '^note: --num_edits=9: .* holds 4 good records')


class StaleTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.config = RunConfig(output_dir=folder)

  def stale(self, resumed=False, **changes):
    config = dataclasses.replace(self.config, **changes)
    return report.stale_results(config, resumed)

  @parameterized.parameters('', '{}', '{"protocol": {}}', 'no JSON')
  def test_a_model_that_no_run_has_saved_stays(self, results):
    (self.folder / 'results.json').write_text(results)
    (self.folder / 'model').mkdir()
    self.assertNotIn('model', self.stale())
    with self.assertRaisesRegex(
        InputError, 'model: exists, and no run .*; move it away'
    ):
      self.stale(save_model=True)
    # The interrupted run that resumes has written it.
    self.assertIn('model', self.stale(True, save_model=True))

  def test_a_saved_model_is_replaced(self):
    (self.folder / 'results.json').write_text('{"saved": {}}')
    (self.folder / 'model').mkdir()
    self.assertIn('model', self.stale())
    self.assertIn('model', self.stale(save_model=True))

  def test_moments_may_be_the_runs_own_input(self):
    self.assertNotIn('moments.safetensors', self.stale())


class WorkTest(absltest.TestCase):

  def test_counts(self):
    shape = types.SimpleNamespace(slots=2, token_budget=32, length=8)
    plan = types.SimpleNamespace(shapes=[shape])
    session = types.SimpleNamespace(plan=plan)
    work = Work(needed=30, computed=40, steps=5, seconds={'optimize': 1.0})
    info = base.Info([], {}, {}, work=work)
    self.assertEqual(
        report.work(session, info),
        {
            'shapes': [{'slots': 2, 'token_budget': 32, 'length': 8}],
            'steps': 5,
            'tokens_run': 40,
            'tokens_needed': 30,
            'wasted': 0.25,
            'seconds': {'optimize': 1.0},
        },
    )
    kept = info._replace(work=work._replace(kept=3))
    self.assertEqual(report.work(session, kept)['states_kept'], 3)
    none = info._replace(work=None)
    self.assertEqual(report.work(session, none), {})


class TablesTest(absltest.TestCase):

  def test_numbers_by_name(self):
    summary = {
        'es': {'mean': 0.5, 'low': 0.25, 'high': 0.75, 'n': 8},
        'true_preferred': {'mean': 0.9, 'low': 0.8, 'high': 1.0, 'n': 8},
    }
    found = report.tables({'pre': Evaluation([], summary, ())})
    self.assertEqual(found['metrics']['pre']['es'], 0.5)
    self.assertEqual(found['intervals']['pre']['es'], [0.25, 0.75])
    self.assertEqual(found['counts']['pre']['es'], 8)

  def test_what_the_unedited_model_knows(self):
    one = {'mean': 0.9, 'low': 0.8, 'high': 1.0, 'n': 8}
    self.assertEqual(
        report.knowledge(Evaluation([], {'true_preferred': one}, ())),
        {'prefers_true': 0.9},
    )
    self.assertEqual(report.knowledge(Evaluation([], {}, ())), {})


if __name__ == '__main__':
  absltest.main()
