"""Starts the processes of one program on this machine, and waits for them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_PAUSE = 0.05  # seconds between two looks at the processes
_GRACE = 15.0  # seconds beyond the heartbeat timeout that the others have
_TAIL = 2000  # characters of a lost process's messages that are shown


class Process(NamedTuple):
  """A process that was started.

  Attributes:
    handle: of the process.
    messages: file of its standard error; None where that is the launcher's.
  """

  handle: subprocess.Popen
  messages: Any = None


def launch(
    command: Sequence[str],
    processes: int,
    *,
    devices: int | None = None,
    heartbeat_seconds: int = 100,
) -> int:
  """Runs a program as several processes.

  Args:
    command: the program, e.g. ('python', '-m', 'experiments.edit', '--data=x').
    processes: how many.
    devices: CPU devices of each, made by force; as JAX sees them unless given.
    heartbeat_seconds: after which a process that does not answer is lost.

  Returns:
    The exit code: that of all, or of the first one that was lost.
  """
  environment = dict(os.environ)
  if devices:
    forced = f'--xla_force_host_platform_device_count={devices}'
    given = environment.get('XLA_FLAGS', '')
    environment['XLA_FLAGS'] = f'{given} {forced}'.strip()
  common = (
      f'--coordinator=127.0.0.1:{_free_port()}',
      f'--num_processes={processes}',
      f'--heartbeat_seconds={heartbeat_seconds}',
  )
  with contextlib.ExitStack() as files:
    started = []
    for number in range(processes):
      messages = None
      if number:
        messages = files.enter_context(tempfile.TemporaryFile('w+'))
      handle = subprocess.Popen(
          (*command, *common, f'--process_id={number}'),
          env=environment,
          stdout=subprocess.DEVNULL if number else None,
          stderr=messages,
          start_new_session=True,  # a signal reaches it from here alone, once
      )
      started.append(Process(handle, messages))
      files.callback(_end, handle)
    with _forwarding(started):
      first = _wait(started, heartbeat_seconds + _GRACE)
    for one in started:
      _end(one.handle)
    if first is None:
      return 0
    codes = {one.handle.returncode for one in started}
    code = started[first].handle.returncode
    if len(codes) > 1 or code < 0:
      _report(first, started, command)
    return code if code > 0 else 128 - code


def _end(handle: subprocess.Popen) -> None:
  """Ends a process that still runs."""
  if handle.poll() is None:
    handle.kill()
  handle.wait()


def _free_port() -> int:
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return one.getsockname()[1]


@contextlib.contextmanager
def _forwarding(started: Sequence[Process]) -> Iterator[None]:
  """Passes signals on to all that run."""

  def forward(number, *unused):
    del unused
    for one in started:
      if one.handle.poll() is None:
        one.handle.send_signal(number)

  signals = (signal.SIGTERM, signal.SIGINT)
  before = {one: signal.signal(one, forward) for one in signals}
  try:
    yield
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)


def _wait(started: Sequence[Process], patience: float) -> int | None:
  """Waits for all; returns the first that failed, or None.

  From then on the others have `patience` seconds.
  """
  first, until = None, float('inf')
  while any(one.handle.poll() is None for one in started):
    if first is None:
      first = _failed(started)
      until = time.monotonic() + patience if first is not None else until
    if time.monotonic() > until:
      break
    time.sleep(_PAUSE)
  return _failed(started) if first is None else first


def _failed(started: Sequence[Process]) -> int | None:
  """The first process that ended with another code than 0."""
  for number, one in enumerate(started):
    if one.handle.poll():
      return number
  return None


def _report(
    number: int, started: Sequence[Process], command: Sequence[str]
) -> None:
  """Says which process was lost, what it said, and what to do."""
  handle, messages = started[number]
  code = handle.returncode
  how = f'exit code {code}' if code > 0 else signal.Signals(-code).name
  if messages is not None:
    messages.seek(0)
    print(messages.read()[-_TAIL:].rstrip(), file=sys.stderr)
  advice = 'repeat the command, it resumes from what was saved'
  if code == 2:
    advice = 'see its message'
  print(
      f'process {number} of {len(started)} was lost ({how}) and the others were'
      f' ended; {advice}: {shlex.join(command)}',
      file=sys.stderr,
  )
