"""What the machine can do: rates of large products, memory, a stop watch."""

from __future__ import annotations

import functools
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.placement import Placement, one_device

# Columns of the products that give the ceiling.
_SIZES = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}
_TRIES = 5
# Seconds for which `pace` runs products, about.
_PACE = 0.5
# Columns of the products of a short measurement, and bytes of its array.
_SHORT, _STREAM = 1024, 2**26


def peak_bytes() -> int:
  """Peak memory of the process so far: the device's, or on CPU the host's."""
  placement = one_device()
  if placement.accelerated and 'peak_bytes_in_use' in placement.memory:
    return int(placement.memory['peak_bytes_in_use'])
  # Linux counts in KiB.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
  """Calls a function and waits for its arrays; returns both."""
  begin = time.perf_counter()
  result = jax.block_until_ready(call())
  return result, time.perf_counter() - begin


def ceilings(size: int | None = None) -> dict[str, float]:
  """Measures large square products.

  Args:
    size: rows and columns, or None for what fits the platform.

  Returns:
    'bfloat16', 'float32' (precision 'highest'), 'float64' and, where products
    of f32 may be rounded to TF32, 'tf32': FLOPs a second, the best of a few.
  """
  platform = one_device().platform
  size = _ceiling_size(size)
  found = {
      'bfloat16': _rate(size, jnp.bfloat16, None),
      'float32': _rate(size, jnp.float32, 'highest'),
  }
  if platform == 'gpu':
    found['tf32'] = _rate(size, jnp.float32, 'tensorfloat32')
  with jax.enable_x64(True):
    found['float64'] = _rate(size, jnp.float64, 'highest')
  return found


def rates() -> dict[str, float]:
  """Measures this machine within a second or two, for estimates of time.

  Returns:
    `ceilings` of smaller products on a CPU, and 'memory', bytes a second that
    are read and written by the sum of an array and a number.
  """
  cpu = one_device().platform == 'cpu'
  found = ceilings(_SHORT if cpu else None)
  array = jnp.zeros(_STREAM // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  jax.block_until_ready(add(array))
  seconds = [timed(lambda: add(array))[1] for _ in range(_TRIES)]
  return {**found, 'memory': 2 * _STREAM / min(seconds)}


def device_bytes(placement: Placement) -> int | None:
  """Memory of a device, free or not, bytes; None where it is unknown."""
  if 'bytes_limit' in placement.memory:
    return int(placement.memory['bytes_limit'])
  return None if placement.accelerated else host_bytes()


def host_bytes() -> int | None:
  """Memory of the host, free or not, bytes; None where it is unknown."""
  try:
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, ValueError, OSError):
    return None


def pace(dtype: str, size: int | None = None) -> float:
  """Measures at what rate large square products run now.

  A machine that others share is now faster, now slower; to be taken right
  before and after what is compared with it.

  Args:
    dtype: 'float32' (precision 'highest') or 'bfloat16'.
    size: rows and columns, or None for what fits the platform.

  Returns:
    FLOPs a second, the median over half a second or so.
  """
  size = _ceiling_size(size)
  product = _product(size, dtype, 'highest' if dtype == 'float32' else None)
  many, seconds = _many(timed(product)[1]), []
  while sum(seconds) < _PACE:
    seconds.append(timed(lambda: [product() for _ in range(many)])[1])
  return many * 2 * size**3 / statistics.median(seconds)


def _many(seconds: float) -> int:
  """How many products to run together: a short one waits for its launch."""
  return max(1, min(16, round(0.02 / seconds)))


def _ceiling_size(size: int | None) -> int:
  """Rows and columns of the products that give the ceiling."""
  return size or _SIZES.get(one_device().platform, 8192)


def _product(
    size: int, dtype: Any, precision: str | None
) -> Callable[[], jax.Array]:
  """A product of two [size, size] matrices, compiled."""
  product = jax.jit(functools.partial(jnp.matmul, precision=precision))
  one, two = (
      jax.random.normal(key, (size, size), dtype)
      for key in jax.random.split(jax.random.key(0))
  )
  jax.block_until_ready(product(one, two))
  return lambda: product(one, two)


def _rate(size: int, dtype: Any, precision: str | None) -> float:
  """FLOPs a second of [size, size] products, the best of a few."""
  product = _product(size, dtype, precision)
  seconds = [timed(product)[1] for _ in range(_TRIES)]
  many = _many(min(seconds))
  for _ in range(_TRIES if many > 1 else 0):
    together = timed(lambda: [product() for _ in range(many)])[1]
    seconds.append(together / many)
  return 2 * size**3 / min(seconds)
