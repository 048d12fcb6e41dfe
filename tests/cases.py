"""Cases of a test that run always, and those behind the marker `long`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


def first(
    count: int, parameters: Callable[[Any], Any]
) -> Callable[[Any], Iterator[Any]]:
  """Parameters of a test of which all but the first few are long.

  Args:
    count: cases that run always.
    parameters: what `absl.testing.parameterized` makes of them.

  Returns:
    A decorator.
  """

  def decorate(test: Any) -> Iterator[Any]:
    for number, case in enumerate(parameters(test)):
      yield case if number < count else pytest.mark.long(case)

  return decorate
