"""Runs that are killed at random moments and started again end with the bits of
one that was not.
"""

from __future__ import annotations

import os
import random
import time

import programs
from absl.testing import absltest

from experiments import anyedit_batch, memit_batch
from jaxedit import io

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
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    del out
    return err

  def bytes(self, name: str) -> bytes:
    return (self.folder / name).read_bytes()

  @property
  def results(self):
    return io.read_json(self.folder / 'results.json')


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
    self.assertTrue(killed[0][1], told)
    if (broken.folder / 'unfinished').exists():  # it had not ended before
      broken.finish()
    self.assertFalse((broken.folder / 'unfinished').exists())
    for name in ('delta.safetensors', 'records.jsonl'):
      self.assertEqual(broken.bytes(name), whole.bytes(name), f'{name}, {told}')
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'unedited'):
      self.assertEqual(broken.results[name], whole.results[name], told)
    self.assertNotIn('states_kept', whole.results['work'])

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


if __name__ == '__main__':
  absltest.main()
