"""Runs that are killed at random moments and started again end with the bits of
one that was not.
"""

from __future__ import annotations

import json
import os
import random
import time
import unittest
from unittest import mock

import programs
import pytest
from absl.testing import absltest

from experiments import anyedit_batch, memit_batch
from jaxedit import io
from jaxedit.eval import datasets

# Other moments in every run of the test; a failure names them.
SEED = int(os.environ.get('JAXEDIT_RESUME_SEED', time.time_ns() % 10**6))


class Run:
  """One output folder, and the command that fills it."""

  def __init__(self, setup: programs.Setup, **given):
    self.folder = setup.path('out')
    given |= {'output_dir': self.folder, 'compilation_cache': True}
    self._setup, self._arguments = setup, setup.arguments(**given)

  def start(self):
    return self._setup.start(*self._arguments)

  def found(self) -> int:
    """How many targets lie in files."""
    targets = self.folder / 'unfinished' / 'targets'
    return len(list(targets.glob('*.safetensors')))

  def kill_after(self, found: int, wait: float) -> tuple[int, bool]:
    """Kills the run, seconds after so many targets are found.

    Returns:
      (targets that were found, whether it had not ended before).
    """
    process = self.start()
    while process.poll() is None and self.found() < found:
      time.sleep(0.002)
    time.sleep(wait)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return self.found(), alive

  def finish(self) -> str:
    """Lets it end; returns what it has told on standard error."""
    process = self.start()
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    del out
    return err

  def bytes(self, name: str) -> bytes:
    return (self.folder / name).read_bytes()

  @property
  def results(self):
    return io.read_json(self.folder / 'results.json')


class TwiceTest(absltest.TestCase):

  def test_the_same_command_writes_the_same_bytes(self):
    """But for seconds, which stand in results.json alone."""
    setup = programs.Setup(memit_batch)
    self.addCleanup(setup.close)
    facts = [
        {
            'prompt': 'The mother tongue of {} is',
            'subject': name,
            'target_new': 'twin city',
            'target_true': 'French',
        }
        for name in ('Danielle', 'Toko', 'Sydney')
    ]
    given = dict(
        data=setup.write(*facts), layers='0,1', batch_size=2, value_steps=3,
        moment_weight=20, max_new_tokens=3, save_model=True,
        moments_corpus=f'file:{setup.text}', moments_tokens=400,
    )  # fmt: skip
    runs = []
    for seed in '12':  # of Python's sets
      cache = {'JAXEDIT_CACHE': str(setup.path('cache'))}
      with mock.patch.dict(os.environ, {'PYTHONHASHSEED': seed, **cache}):
        runs.append(Run(setup, **given))
        runs[-1].finish()
    one, other = (self.written(run.folder) for run in runs)
    self.assertIn('model/model.safetensors', one)
    for name in sorted({*one, *other}):
      self.assertEqual(one.get(name), other.get(name), name)

  def written(self, folder):
    """File -> bytes, without seconds and the folder's own name."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }
    results = io.parse_json(found['results.json'])
    for part in (results, results['work']):
      for name in ('timing', 'seconds'):
        part.pop(name, None)
    results['saved'].pop('folder')
    return found | {'results.json': json.dumps(results)}


class ResumeTest(absltest.TestCase):

  def check(self, setup: programs.Setup, total: int, kills: int, **given):
    """Compares a run that is killed with one that is not."""
    whole, broken = Run(setup, **given), Run(setup, **given)
    whole.finish()
    draw = random.Random(SEED)
    moments = sorted(draw.uniform(0, total) for _ in range(kills))
    waits = [draw.choice((0, draw.uniform(0, 0.4))) for _ in moments]
    killed = [
        broken.kill_after(int(found), wait)
        for found, wait in zip(moments, waits)
    ]
    told = f'JAXEDIT_RESUME_SEED={SEED}: {moments} {waits} {killed}'
    print(told)
    self.assertTrue(killed[0][1], told)
    if (broken.folder / 'unfinished').exists():  # it had not ended before
      broken.finish()
    self.assertFalse((broken.folder / 'unfinished').exists())
    for name in ('delta.safetensors', 'records.jsonl'):
      self.assertEqual(broken.bytes(name), whole.bytes(name), f'{name}, {told}')
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'unedited'):
      self.assertEqual(broken.results[name], whole.results[name], told)
    self.assertNotIn('states_kept', whole.results['work'])

  @pytest.mark.long
  def test_a_sequence_of_facts(self):
    setup = programs.Setup(memit_batch)
    self.addCleanup(setup.close)
    contexts = setup.path('contexts.json')
    contexts.write_text('["{}", "In Paris. {}"]')
    facts = [
        {
            'prompt': 'The mother tongue of {} is',
            'subject': f'{name} {place}',
            'target_new': 'twin city',
            'target_true': 'French',
        }
        for name in ('Danielle', 'Toko', 'Sydney', 'Paris', 'Vienna')
        for place in range(8)
    ]
    self.check(
        setup, 40, 3, method='alphaedit', data=setup.write(*facts), layers='0,1',
        batch_size=10, slots=2, value_steps=20, max_new_tokens=0,
        moments_corpus=f'file:{setup.text}', moments_tokens=400,
        context_templates=contexts,
    )  # fmt: skip

  @pytest.mark.long
  def test_long_answers_alone(self):
    setup = programs.Setup(anyedit_batch, chats=True)
    self.addCleanup(setup.close)
    answers = [
        {
            'question': f'The mother tongue of {name}',
            'answer': f'a guitar and the piano in {name}, a twin city',
        }
        for name in map(str, range(24))
    ]
    self.check(
        setup, 24, 2, data=setup.write(*answers), layers='0,1', window=3, slots=1,
        moment_weight=20, value_steps=10, max_new_tokens=3,
        moments_corpus=f'file:{setup.text}', moments_tokens=400,
    )  # fmt: skip


@unittest.skipUnless(
    os.environ.get('JAXEDIT_RESUME_DEMO'),
    'takes minutes: JAXEDIT_RESUME_DEMO=1 runs it on the demo model',
)
class DemoModelTest(ResumeTest):
  """The same on SmolLM2-135M, with few steps."""

  def demo(self, program):
    cache = os.environ.get('JAXEDIT_CACHE', '')
    setup = programs.Setup(program)
    self.addCleanup(setup.close)
    known = {'JAXEDIT_CACHE': cache}  # has the model
    self.enter_context(mock.patch.dict(os.environ, known))
    return setup

  def test_a_sequence_of_facts(self):
    setup = self.demo(memit_batch)
    contexts = setup.path('contexts.json')
    contexts.write_text('["{}", "In the city. {}"]')
    demo = datasets.load_requests('demo', limit=40).requests
    facts = [  # judged at their own prompts alone, which is a leg's start
        {
            'prompt': one.prompt,
            'subject': one.subject,
            'target_new': one.target,
            'target_true': one.target_true,
        }
        for one in demo
    ]
    self.check(
        setup, 40, 8, model='smollm2-135m-instruct', data=setup.write(*facts),
        method='alphaedit', layers='1,2,3,4', batch_size=10, slots=5,
        value_steps=3, value_rate=5, max_new_tokens=0, moments_tokens=15360,
        context_templates=contexts,
    )  # fmt: skip

  def test_long_answers_alone(self):
    self.check(
        self.demo(anyedit_batch), 6, 4, model='smollm2-135m-instruct',
        data='demo', num_edits=6, layers='8', window=20, slots=2,
        moment_weight=0.2, value_steps=3, value_rate=10, max_new_tokens=2,
        sub_questions=False, moments_tokens=15360,
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
