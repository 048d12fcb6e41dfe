"""Settings of all tests, before any of them imports JAX.

Most of their time goes into compiling small programs that run once. It takes two
thirds as long where the compiler does not optimise their code, and a third of
that by the older of jaxlib 0.10's two ways to emit CPU code. Classes with
`OPTIMIZE = True`, whose bounds or models need it, are optimised all the same.
JAXEDIT_OPTIMIZE=1 leaves the compiler as users have it, for all tests.

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

if os.environ.get('JAXEDIT_OPTIMIZE', '0') == '0':
  os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  # jaxlib 0.11 does not know the flag, and an unknown one ends the process.
  if importlib.metadata.version('jaxlib').startswith('0.10.'):
    flags = os.environ.get('XLA_FLAGS', '')
    # What does not begin like a flag names a file of them.
    if flags.strip()[:1] in ('', '-'):
      os.environ['XLA_FLAGS'] = (
          f'--xla_cpu_use_fusion_emitters=false {flags}'.strip()
      )

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
