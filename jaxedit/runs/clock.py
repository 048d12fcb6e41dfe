"""The time that the stages of a run take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax


class Clock:
  """Adds up wall seconds by stage; it starts when it is made."""

  def __init__(self):
    self._begin = time.monotonic()
    self.seconds: dict[str, float] = {}

  def stop(self) -> None:
    """Notes the 'total'."""
    self.seconds['total'] = time.monotonic() - self._begin

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    begin = time.monotonic()
    try:
      yield
    finally:
      self.add({stage: time.monotonic() - begin})

  def add(self, seconds: Mapping[str, float]) -> None:
    """Adds seconds measured elsewhere."""
    for stage, value in seconds.items():
      self.seconds[stage] = self.seconds.get(stage, 0.0) + value


@contextlib.contextmanager
def compile_seconds(seconds: dict[str, float]) -> Iterator[None]:
  """Adds up the time spent on programs before they run, as seconds['compile'].

  That is tracing, lowering and compiling; it is part of the stages in which they
  are first run. What comes from the persistent cache counts with the time it
  takes to load.
  """
  seconds['compile'] = 0.0
  spans: list[tuple[float, float]] = []  # (end, duration), within no other

  def listen(name: str, duration: float, **details: Any) -> None:
    del details
    if not name.startswith('/jax/core/compile/'):
      return
    # A function is traced while those that call it are: an outer span ends last.
    end = time.monotonic()
    while spans and spans[-1][0] > end - duration:
      seconds['compile'] -= spans.pop()[1]
    spans.append((end, duration))
    seconds['compile'] += duration

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
