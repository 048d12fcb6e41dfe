"""Programs that are asked to stop save, say so, and resume with the same bytes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import editing_runs
from absl.testing import absltest, parameterized

from experiments import collect_moments
from jaxedit.runs import cli, stopping
from jaxedit.types import Stopped

_TWICE = """
import time
from jaxedit.runs import stopping
with stopping.listening():
  print('ready', flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def at(stage, count, action):
  """Does something where a stage has counted so often."""
  bar, seen = cli.progress_bar, []

  @contextlib.contextmanager
  def watched(name, total, unit):
    with bar(name, total, unit) as advance:

      def told(done):
        seen.extend([None] * (name == stage))
        if name == stage and len(seen) == count:
          action()
        advance(done)

      yield told

  with mock.patch.object(cli, 'progress_bar', watched):
    yield


def ask(number):
  return lambda: signal.raise_signal(number)


class StopTest(parameterized.TestCase):

  @parameterized.parameters(
      (signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'SIGINT')
  )
  def test_a_signal_is_noted_and_polled(self, number, code, name):
    before = signal.getsignal(number)
    with stopping.listening() as stop:
      stopping.poll('fit', 0, 1, 'edit')
      signal.raise_signal(number)
      with self.assertRaisesRegex(Stopped, f"{name} in 'fit', 1 of 1 edit$"):
        stopping.poll('fit', 1, 1, 'edit')
      self.assertEqual(stop.code, code)
      self.assertEqual(signal.getsignal(number), signal.SIG_DFL)
    self.assertEqual(signal.getsignal(number), before)
    stopping.poll('fit', 1, 1, 'edit')  # nothing listens

  def test_time(self):
    with stopping.listening(1e-9) as stop:
      with self.assertRaisesRegex(Stopped, 'max_seconds=1e-09 .* 0 of 2,000'):
        stopping.poll('fit', 0, 2000, 'edit')
    self.assertEqual(stop.code, 75)
    with stopping.listening(1000):
      stopping.poll('fit', 0, 2000, 'edit')

  def test_a_second_signal_ends_the_process(self):
    process = subprocess.Popen(
        [sys.executable, '-c', _TWICE], stdout=subprocess.PIPE, text=True
    )
    self.assertEqual(process.stdout.readline(), 'ready\n')
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    self.assertIsNone(process.poll())
    process.send_signal(signal.SIGINT)
    self.assertEqual(process.wait(30), -signal.SIGINT)
    process.stdout.close()


class EditingTest(editing_runs.Case):
  """A sequence of two batches, stopped in every stage."""

  def setUp(self):
    super().setUp()
    self.setup = editing_runs.setup_of('FACT')
    cache = self.enter_context(tempfile.TemporaryDirectory())
    self.enter_context(mock.patch.dict(os.environ, {'JAXEDIT_CACHE': cache}))
    self.cache = pathlib.Path(cache)

  @classmethod
  def tearDownClass(cls):
    editing_runs.close()
    super().tearDownClass()

  def stop(self, stage, count, action, **flags):
    """Runs until it is stopped; returns the sentence that says so."""
    with at(stage, count, action):
      done = self.setup.run(**flags)
    self.assertFalse((done.folder / 'results.json').exists())
    return done.code, done.err.splitlines()[-1]

  def test_sigterm_in_every_stage(self):
    """One run, stopped again and again on its way."""
    whole = self.succeed(self.setup)
    place = self.setup.path('out')
    (moments,) = (self.cache / 'moments').iterdir()
    moments.unlink()
    optimize = [('optimize', 1), ('optimize', 2), ('insert', 1), ('insert', 3)]
    stages = [('score', 1), *optimize, ('score', 2), ('generate', 2)]
    for stage, count in [('second moments', 2), *stages]:
      code, told = self.stop(
          stage, count, ask(signal.SIGTERM), output_dir=place
      )
      self.assertEqual(code, 143, told)
      self.assertRegex(told, f"^stopped by SIGTERM in '{stage}', [0-9]* of ")
      saved = stage in ('insert', 'second moments') or (stage, count) == (
          'optimize', 2
      )  # fmt: skip
      if saved:
        self.assertRegex(told, '; saved in .*: the same command resumes$')
    again = self.succeed(self.setup, output_dir=place)
    for name in ('delta.safetensors', 'records.jsonl', 'moments.safetensors'):
      one, other = ((x.folder / name).read_bytes() for x in (again, whole))
      self.assertEqual(one, other, name)
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'unedited'):
      self.assertEqual(again.results[name], whole.results[name], name)
    self.assertEqual(again.files, whole.files)

  def test_max_seconds(self):
    """It may differ in the run that resumes."""
    place, flags = self.setup.path('out'), dict(max_new_tokens=0)
    code, told = self.stop(
        None, 0, None, output_dir=place, max_seconds=1e-3, **flags
    )
    self.assertEqual(code, 75)
    self.assertIn('stopped by --max_seconds=0.001', told)
    self.assertIn('nothing to save yet: the same command begins anew', told)
    self.succeed(self.setup, output_dir=place, max_seconds=1e4, **flags)

  def test_a_stop_while_moments_are_collected(self):
    setup, out = self.setup, self.setup.path('m.safetensors')
    flags = dict(
        output_dir=None, corpus=f'file:{setup.text}', out=out, layers='0,1',
        tokens=400, width=16, data=None, slots=None, batch_size=None,
        moment_weight=None, value_steps=None, eval_batch_size=None,
        max_new_tokens=None, moments_corpus=None, moments_tokens=None,
        context_templates=None,
    )  # fmt: skip
    run = lambda **more: setup.run(collect_moments, **flags | more)
    with at('second moments', 3, ask(signal.SIGINT)):
      done = run()
    self.assertEqual(done.code, 130, done.err)
    self.assertRegex(
        done.err.splitlines()[-1],
        f"by SIGINT in 'second moments', [0-9]+ of 400 tokens; saved in"
        f' {re.escape(str(out))}.partial',
    )
    self.assertFalse(out.exists())
    self.assertEqual(run().code, 0)
    self.assertFalse(out.with_name(out.name + '.partial').exists())


if __name__ == '__main__':
  absltest.main()
