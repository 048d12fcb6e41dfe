"""Runs that are ended in every stage and started again end with the same bytes.

Processes of their own, as a user starts them: killed (SIGKILL) or asked to end
(SIGTERM) at seeded random moments of a stage, which their progress shows. Every
result is that of a run that was not interrupted but for `timing` and `work` in
results.json, which say what the last process computed and how long it took.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import threading
import time
import unittest
from unittest import mock

import programs
import pytest
from absl.testing import absltest

from experiments import memit_batch
from jaxedit import io

CACHE = os.environ.get('JAXEDIT_CACHE', '')  # has the demo model
# Other moments in every run of the test; a failure names them.
SEED = int(os.environ.get('JAXEDIT_RESUME_SEED', time.time_ns() % 10**6))
_FILES = ('delta.safetensors', 'records.jsonl', 'moments.safetensors')


class Run:
  """An output folder and a cache, and the command that fills them."""

  def __init__(self, setup: programs.Setup, models: str = '', **given):
    self.folder, cache = setup.path('out'), setup.path('cache')
    cache.mkdir()
    for path in pathlib.Path(models).iterdir() if models else ():
      if path.name not in ('moments', 'xla'):
        (cache / path.name).symlink_to(path)
    self._env = {
        'JAXEDIT_CACHE': str(cache),  # moments, which a run collects itself
        'JAX_COMPILATION_CACHE_DIR': str(setup.folder / 'xla'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self._setup = setup
    self._arguments = setup.arguments(output_dir=self.folder, **given)

  def start(self):
    with mock.patch.dict(os.environ, self._env):
      return self._setup.start(*self._arguments)

  def end(self, stage: str, number: int, wait: float, how: int):
    """Ends a process in a stage.

    Args:
      stage: as its progress shows it, or the name of a file that is there.
      number: end it in the n-th such stage.
      wait: seconds after its begin.
      how: the signal.

    Returns:
      (exit code, the last stage that was shown, standard error).
    """
    process, seen = self.start(), []

    def read():
      while block := os.read(process.stderr.fileno(), 1 << 16):
        seen.append(block.decode(errors='replace'))

    reader = threading.Thread(target=read)
    reader.start()
    begins = f'\r{stage:<14}:   0%'
    place = self.folder / stage
    while process.poll() is None:
      if place.exists() or ''.join(seen).count(begins) >= number:
        break
      time.sleep(0.001)
    time.sleep(wait)
    process.send_signal(how)
    process.wait(600)
    reader.join()
    process.stdout.close()
    process.stderr.close()
    err = ''.join(seen)
    stages = re.findall(r'\r([a-z][a-z ]{13}):', err)
    return process.returncode, (stages or [''])[-1].strip(), err

  def finish(self) -> str:
    """Lets it end; returns what it has told on standard error."""
    process = self.start()
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    return err

  def found(self) -> dict[str, object]:
    """All that it wrote, but for what a process did and how long it took."""
    results = io.read_json(self.folder / 'results.json')
    for name in ('timing', 'work'):
      del results[name]
    files = {path.name for path in self.folder.iterdir()}
    read = lambda name: (self.folder / name).read_bytes()
    return {'results': results, 'files': files} | {n: read(n) for n in _FILES}


class Case(absltest.TestCase):

  def sequence(self, edits: int, batch: int):
    """A set-up and the flags of a sequence of edits of a tiny model."""
    setup = programs.Setup(memit_batch)
    self.addCleanup(setup.close)
    contexts = setup.path('contexts.json')
    contexts.write_text('["{}", "In Paris. {}"]')
    names = ('Danielle', 'Toko', 'Sydney', 'Paris', 'Vienna')
    facts = [
        {
            'prompt': 'The mother tongue of {} is',
            'subject': f'{names[i % 5]} {i // 5}',
            'target_new': 'twin city',
            'target_true': 'French',
            'neighbours': [f'The mother tongue of France {i} is'],
        }
        for i in range(edits)
    ]
    return setup, dict(
        method='alphaedit', data=setup.write(*facts), layers='0,1',
        batch_size=batch, judge_at='20', slots=4, value_steps=15, max_new_tokens=2,
        eval_batch_size=4, moments_corpus=f'file:{setup.text}',
        moments_tokens=700, context_templates=contexts,
        compilation_cache=True,
    )  # fmt: skip

  def check(self, run: Run, whole: dict[str, object], told: str):
    if (run.folder / 'unfinished').exists():  # it had not ended before
      run.finish()
    for name, value in run.found().items():
      self.assertEqual(value, whole[name], f'{name}, {told}')


class KilledTest(Case):

  def test_in_three_stages_of_one_run(self):
    setup, flags = self.sequence(30, 10)
    whole, run, draw = (
        Run(setup, **flags),
        Run(setup, **flags),
        random.Random(SEED),
    )
    whole.finish()
    told = f'JAXEDIT_RESUME_SEED={SEED}:'
    for stage, number, longest in (
        ('second moments', 1, 0.2), ('optimize', 2, 0.2), ('score', 2, 0.05)
    ):  # fmt: skip
      wait = draw.uniform(0, longest)
      code, shown, err = run.end(stage, number, wait, signal.SIGKILL)
      told += f' {stage} {number} + {wait:.3f} s: {shown};'
      self.assertEqual(code, -signal.SIGKILL, f'{told}\n{err}')
    print(told)
    self.check(run, whole.found(), told)


@pytest.mark.long
class LongTest(Case):
  """200 edits; every run is ended once and started again."""

  def ended(self, moments, how, code):
    setup, flags = self.sequence(200, 20)
    whole, draw = Run(setup, **flags), random.Random(SEED)
    whole.finish()
    found, stages = whole.found(), []
    for stage, numbers, longest in moments:
      run, number = Run(setup, **flags), draw.choice(numbers)
      wait = draw.uniform(0, longest)
      left, shown, err = run.end(stage, number, wait, how)
      told = f'seed {SEED}: {stage} {number} + {wait:.3f} s: {shown}'
      print(told, flush=True)
      self.assertEqual(left, code, f'{told}\n{err}')
      if how == signal.SIGTERM:
        sentence = err.splitlines()[-1]
        print(sentence, flush=True)
        self.assertRegex(sentence, 'stopped by SIGTERM .* same command')
      self.check(run, found, told)
      stages.append(shown)
    return stages

  def test_sigkill_at_twelve_moments(self):
    batches = range(1, 11)
    self.ended(
        [
            *[('second moments', [1], 0.3)] * 2,
            ('score', [1], 0.3),
            *[('optimize', batches, 0.3)] * 3,
            *[('insert', batches, 0.005)] * 2,
            ('score', [2], 0.3),
            ('generate', [2], 0.2),
            ('delta.safetensors', [1], 0),
            ('records.jsonl', [1], 0),
        ],
        signal.SIGKILL,
        -signal.SIGKILL,
    )

  def test_sigterm_at_four_moments(self):
    batches = range(1, 11)
    self.ended(
        [
            ('second moments', [1], 0.1),
            ('optimize', batches, 0.2),
            ('insert', batches, 0),
            ('score', [2], 0.05),
        ],
        signal.SIGTERM,
        128 + signal.SIGTERM,
    )


@unittest.skipUnless(
    os.environ.get('JAXEDIT_RESUME_DEMO'),
    'takes minutes: JAXEDIT_RESUME_DEMO=1 runs it on the demo model',
)
class DemoModelTest(Case):

  def test_in_moments_and_in_evaluation(self):
    """SmolLM2-135M, with few steps; both kills hit one run."""
    setup = programs.Setup(memit_batch)
    self.addCleanup(setup.close)
    contexts = setup.path('contexts.json')
    contexts.write_text('["{}", "In the city. {}"]')
    flags = dict(
        models=os.path.abspath(CACHE), model='smollm2-135m-instruct', data='demo',
        num_edits=20, method='alphaedit', layers='3,4', batch_size=10, slots=5,
        value_steps=3, value_rate=5, max_new_tokens=8, eval_batch_size=2,
        moments_tokens=15360, context_templates=contexts, compilation_cache=True,
    )  # fmt: skip
    whole, run, draw = (
        Run(setup, **flags),
        Run(setup, **flags),
        random.Random(SEED),
    )
    whole.finish()
    said = f'JAXEDIT_RESUME_SEED={SEED}:'
    for stage, number, longest in (('second moments', 1, 9), ('score', 2, 3)):
      wait = draw.uniform(0, longest)
      code, shown, err = run.end(stage, number, wait, signal.SIGKILL)
      said += f' {stage} {number} + {wait:.3f} s: {shown};'
      self.assertEqual(code, -signal.SIGKILL, f'{said}\n{err}')
    print(said)
    self.check(run, whole.found(), said)


if __name__ == '__main__':
  absltest.main()
