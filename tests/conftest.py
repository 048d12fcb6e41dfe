"""Keeps a long run within the memory maps that the kernel grants a process.

Every compiled program takes some; beyond the limit (65,530 on Linux as it comes)
the next compilation aborts the process.
"""

from __future__ import annotations

import gc
import pathlib
import sys

import pytest

_MAPS = pathlib.Path('/proc/self/maps')
_MOST = 25_000


def _count() -> int:
  return _MAPS.read_bytes().count(b'\n') if _MAPS.exists() else 0


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Lets go of compiled programs between files where there are many."""
  yield
  if 'jax' in sys.modules and _count() > _MOST:
    sys.modules['jax'].clear_caches()
    gc.collect()
