"""Settings of all tests, before any of them imports JAX.

Most of their time goes into compiling small programs that run once, which takes
two thirds as long where the compiler does not optimise their code. It does for
classes with `OPTIMIZE = True`, whose bounds or models need it, and for all with
JAX_DISABLE_MOST_OPTIMIZATIONS=0. The older of jaxlib 0.10's two ways to emit CPU
code then compiles in a third of the time that the newer one takes. With 0.10,
XLA_FLAGS=--xla_cpu_use_fusion_emitters=true keeps to the newer one, which is all
that 0.11 has.

Every compiled program takes some of the memory maps that the kernel grants a
process; beyond the limit (65,530 on Linux as it comes) the next compilation
aborts it.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib
import sys

import pytest

os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
_EMITTERS, _FLAGS = '--xla_cpu_use_fusion_emitters', 'XLA_FLAGS'
# An unknown flag ends the process.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _given = os.environ.get(_FLAGS, '')
  # What does not begin like a flag names a file of them.
  if _EMITTERS not in _given and _given.strip()[:1] in ('', '-'):
    os.environ[_FLAGS] = f'{_given} {_EMITTERS}=false'.strip()

_MAPS = pathlib.Path('/proc/self/maps')
_MOST = 25_000


def _count() -> int:
  return _MAPS.read_bytes().count(b'\n') if _MAPS.exists() else 0


@pytest.fixture(autouse=True, scope='class')
def optimization(request):
  """Lets the compiler optimise what a class asks for it."""
  if not getattr(request.cls, 'OPTIMIZE', False):
    yield
    return
  jax, option = sys.modules['jax'], 'jax_disable_most_optimizations'
  before = jax.config.read(option)
  # Programs of other classes must not be found again, nor these by them.
  jax.clear_caches()
  jax.config.update(option, False)
  yield
  jax.clear_caches()
  jax.config.update(option, before)


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Lets go of compiled programs between files where there are many."""
  yield
  if 'jax' in sys.modules and _count() > _MOST:
    sys.modules['jax'].clear_caches()
    gc.collect()
