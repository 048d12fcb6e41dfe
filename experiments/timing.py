"""The time that the stages of a run take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping


class Clock:
  """Adds up wall seconds by stage; it starts when it is made."""

  def __init__(self):
    self._begin = time.monotonic()
    self.seconds: dict[str, float] = {}

  def stop(self) -> None:
    """Writes down the 'total'."""
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
