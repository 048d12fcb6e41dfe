"""Stopping a program so that the same command resumes it: signals and time.

SIGTERM, SIGINT and the end of `--max_seconds` are noted here and polled where a
stage counts its progress: what it calls raises `types.Stopped`, and stages that
hold what is not saved yet save it on the way out. A second signal ends the
process at once, as files are written whole or not at all; Python notes the first
one when the call of the device at hand returns.

  reason          exit code
  SIGTERM         143, as a shell reports a process that it ended
  SIGINT          130
  --max_seconds   75, EX_TEMPFAIL of sysexits.h: try again
"""

from __future__ import annotations

import contextlib
import contextvars
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxedit import hosts
from jaxedit.types import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TRY_AGAIN = 75


class Stop:
  """Why a program shall end, and when it is to be asked.

  Attributes:
    code: exit code of a program that was stopped.
    reason: what stopped it; '' until then.
  """

  def __init__(self, max_seconds: float = 0.0):
    """Begins to count.

    Args:
      max_seconds: wall time after which the program is to end; 0 for never.
    """
    self._seconds, self._begin = max_seconds, time.monotonic()
    self.code, self.reason = 0, ''

  def ask(self, number: int, _: Any = None) -> None:
    """Notes a signal; the next one ends the process."""
    for one in _SIGNALS:
      signal.signal(one, signal.SIG_DFL)
    self.code, self.reason = 128 + number, signal.Signals(number).name

  def poll(self, stage: str, done: int, total: int, unit: str) -> None:
    """Raises `Stopped` if the program shall end.

    Args:
      stage: what it is doing.
      done: units done.
      total: units of the stage.
      unit: their name.

    Raises:
      Stopped: it shall.
    """
    spent = time.monotonic() - self._begin
    if not self.reason and 0 < self._seconds <= spent:
      self.code, self.reason = _TRY_AGAIN, f'--max_seconds={self._seconds:g}'
    said = hosts.gather([self.code, self.reason])  # one stops all
    self.code, self.reason = max(said)
    if self.reason:
      raise Stopped(
          f'stopped by {self.reason} in {stage!r}, {done:,} of {total:,}'
          f' {unit}{"s" * (total != 1)}'
      )


_current: contextvars.ContextVar[Stop] = contextvars.ContextVar('stop')


@contextlib.contextmanager
def listening(max_seconds: float = 0.0) -> Iterator[Stop]:
  """Notes signals, for `poll`, until the context ends.

  Args:
    max_seconds: see `Stop`.

  Yields:
    What was noted.
  """
  stop = Stop(max_seconds)
  token, before = _current.set(stop), {}
  if threading.current_thread() is threading.main_thread():
    before = {one: signal.signal(one, stop.ask) for one in _SIGNALS}
  try:
    yield stop
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)
    _current.reset(token)


def poll(stage: str, done: int, total: int, unit: str) -> None:
  """Raises `Stopped` if the program that listens shall end; see `Stop.poll`."""
  if stop := _current.get(None):
    stop.poll(stage, done, total, unit)
