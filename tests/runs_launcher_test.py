"""The launcher of local processes, with programs that need no JAX."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time

from absl.testing import absltest, parameterized

from jaxedit.runs import launcher

# Ends as its arguments say: process_id=action, where the action is a code, a
# signal or a time to sleep.
_PROGRAM = """
import os, signal, sys, time
flags = dict(x.lstrip('-').split('=', 1) for x in sys.argv[1:])
action = flags[flags['process_id']]
assert flags['num_processes'] == '3' and ':' in flags['coordinator']
print('process', flags['process_id'], file=sys.stderr)
if action == 'kill':
  os.kill(os.getpid(), signal.SIGKILL)
if action == 'term':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if action in ('sleep', 'term'):
  time.sleep(60)
sys.exit(int(action))
"""


def launch(*actions: str, **options) -> tuple[int, str]:
  command = [sys.executable, '-c', _PROGRAM]
  command += [f'--{number}={action}' for number, action in enumerate(actions)]
  with contextlib.redirect_stderr(io.StringIO()) as said:
    code = launcher.launch(command, len(actions), **options)
  return code, said.getvalue()


class LauncherTest(parameterized.TestCase):

  @parameterized.parameters(('0', 0), ('2', 2), ('75', 75))
  def test_the_code_of_all_is_the_code(self, action, code):
    found, said = launch(action, action, action)
    self.assertEqual(found, code)
    self.assertEmpty(said)

  @parameterized.parameters(('kill', 137, 'SIGKILL'), ('5', 5, 'exit code 5'))
  def test_a_lost_process_ends_the_others(self, action, code, how):
    self.enter_context(absltest.mock.patch.object(launcher, '_GRACE', 0.2))
    begin = time.monotonic()
    found, said = launch('sleep', action, 'sleep', heartbeat_seconds=1)
    self.assertLess(time.monotonic() - begin, 30)
    self.assertEqual(found, code)
    self.assertIn(f'process 1 of 3 was lost ({how})', said)
    self.assertIn('process 1\n', said)  # its own messages
    self.assertIn('repeat the command', said)

  def test_a_signal_reaches_every_process_once(self):
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    found, said = launch('term', 'term', 'term')
    self.assertEqual(found, 143)
    self.assertEmpty(said)


if __name__ == '__main__':
  absltest.main()
