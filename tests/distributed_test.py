"""Runs of several local processes under jax.distributed equal those of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from unittest import mock

import cases
import numpy as np
import programs
import pytest
from absl.testing import absltest, parameterized

from experiments import edit
from jaxedit import hosts
from jaxedit.edited import algebra
from jaxedit.types import InputError

_NAMES = ('Danielle', 'Toko', 'Sydney', 'Paris', 'Yasuda')
HEARTBEAT = 10


def flat(done: programs.Done) -> np.ndarray:
  """All changes of an edit, one after the other."""
  edited, _ = done.delta()
  return np.concatenate([np.ravel(algebra.full(x)) for x in edited.deltas])


class GroupTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(coordinator='a:1'), 'go together'),
      (dict(coordinator='a', num_processes=2, process_id=0), 'give host:port'),
      (
          dict(coordinator='a:1', num_processes=2, process_id=2),
          'numbers 0 to 1',
      ),
      (
          dict(
              distributed=False,
              coordinator='a:1',
              num_processes=2,
              process_id=0,
          ),
          'exclude each other',
      ),
  )
  def test_settings_that_do_not_go_together(self, settings, message):
    with self.assertRaisesRegex(InputError, message):
      hosts.join(hosts.Group(**settings))

  @parameterized.parameters(
      ({}, False),
      ({'SLURM_STEP_NUM_TASKS': '1'}, False),
      ({'SLURM_STEP_NUM_TASKS': '4'}, True),
      ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
      ({'TPU_WORKER_HOSTNAMES': 'a'}, False),
      ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
      ({'KUBERNETES_SERVICE_HOST': 'x'}, False),
      ({'KUBERNETES_SERVICE_HOST': 'x', 'JOB_COMPLETION_INDEX': '0'}, True),
  )
  def test_what_launchers_say(self, environment, several):
    self.assertEqual(hosts.launched(environment), several)

  def test_alone_there_is_nobody_to_wait_for(self):
    self.assertEqual(hosts.gather({'a': 1}), [{'a': 1}])
    self.assertEqual(hosts.own('runs/x'), 'runs/x')
    hosts.follow('nowhere')
    hosts.leave(1)


class DistributedTest(programs.Case):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.setup = programs.Setup(edit)
    cls.addClassCleanup(cls.setup.close)
    facts = [
        {
            'prompt': 'The mother tongue of {} is',
            'subject': name,
            'target_new': 'twin city',
            'target_true': 'French',
        }
        for name in _NAMES
    ]
    cls.given = dict(
        data=cls.setup.write(*facts), layers='0,1', batch_size=2,
        value_steps=8, moment_weight=20, max_new_tokens=3,
        moments_corpus=f'file:{cls.setup.text}', moments_tokens=400,
        compilation_cache=True,
    )  # fmt: skip
    # A cache of compiled programs would stay that of all later tests.
    cls.alone = cls.setup.run(**cls.given | {'compilation_cache': False})
    assert cls.alone.code == 0, cls.alone.err

  def launch(self, processes, folder, **changes):
    """Starts the processes of a run with a cache of its own."""
    given = self.given | {'output_dir': folder} | changes
    arguments = self.setup.arguments(**given)
    cache = {'JAXEDIT_CACHE': str(self.setup.path('cache'))}
    return subprocess.Popen(
        [sys.executable, '-m', 'experiments.launch']
        + [f'--processes={processes}', f'--heartbeat_seconds={HEARTBEAT}']
        + ['--', 'experiments.edit', *arguments],
        cwd=programs.ROOT,
        env={**os.environ, **cache, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

  def finish(self, processes, folder, **changes):
    process = self.launch(processes, folder, **changes)
    out, err = process.communicate(timeout=600)
    self.assertEqual(process.returncode, 0, err)
    return programs.Done(0, out, err, folder)

  def assert_equal(self, done):
    """The same edit, records and metrics as one process."""
    one, other = flat(self.alone), flat(done)
    away = np.linalg.norm(one - other) / np.linalg.norm(one)
    self.assertLess(away, 1e-5)
    self.assertEqual(done.files, self.alone.files)
    for state, mine in done.results['metrics'].items():
      for name, value in self.alone.results['metrics'][state].items():
        self.assertAlmostEqual(mine[name], value, 5, f'{state} {name}')

  @cases.first(
      1, parameterized.parameters((2, 'fsdp:2'), (4, 'data:2,tensor:2'))
  )
  def test_processes_equal_one(self, processes, mesh):
    done = self.finish(processes, self.setup.path('out'), mesh=mesh)
    self.assert_equal(done)
    self.assertIn(f'results in {done.folder}', done.out)

  @pytest.mark.long
  def test_a_run_that_lost_a_process_completes_when_repeated(self):
    folder = self.setup.path('out')
    process = self.launch(2, folder)
    while not (folder / 'unfinished' / 'targets').exists():
      self.assertIsNone(process.poll())
      time.sleep(0.01)
    second = subprocess.run(
        ['pgrep', '-f', f'{folder}.*--process_id=1'],
        capture_output=True,
        text=True,
        check=True,
    )
    begin = time.monotonic()
    os.kill(int(second.stdout.split()[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    self.assertLess(time.monotonic() - begin, HEARTBEAT + 30)
    self.assertNotEqual(process.returncode, 0)
    self.assertIn('process 1 of 2 was lost (SIGKILL)', err)
    self.assert_equal(self.finish(2, folder))

  @pytest.mark.long
  def test_a_run_of_eight_devices_completes_on_two(self):
    folder, cache = self.setup.path('out'), str(self.setup.path('cache'))

    def start(devices):
      forced = f'--xla_force_host_platform_device_count={devices}'
      given = self.given | {'output_dir': folder, 'mesh': f'data:{devices}'}
      environment = {'XLA_FLAGS': forced, 'JAXEDIT_CACHE': cache}
      with mock.patch.dict(os.environ, environment):
        return self.setup.start(*self.setup.arguments(**given))

    process = start(8)
    while not (folder / 'unfinished' / 'sequence').exists():
      self.assertIsNone(process.poll())
      time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=600)
    self.assertEqual(process.returncode, 143, err)
    self.assertIn('the same command resumes', err)
    process = start(2)
    out, err = process.communicate(timeout=600)
    self.assertEqual(process.returncode, 0, err)
    self.assert_equal(programs.Done(0, out, err, folder))

  @pytest.mark.long
  def test_all_stop_where_one_is_told_to(self):
    folder = self.setup.path('out')
    process = self.launch(2, folder, max_seconds=3)
    _, err = process.communicate(timeout=600)
    self.assertEqual(process.returncode, 75, err)
    self.assertIn('stopped by --max_seconds=3', err)
    self.assertNotIn('lost', err)
    self.assert_equal(self.finish(2, folder))


if __name__ == '__main__':
  absltest.main()
