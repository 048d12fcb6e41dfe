"""Times implementations of one operation against each other.

An implementation is compiled on its own clock, run once, and then timed as the
median over batches of calls. The calls of a batch are queued without waiting
and waited for at its end, so that what is measured is the device and not the
way to it. The reference comes first: the others are divided by its time and
compared with its values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A batch of calls lasts at least this long, seconds.
_BATCH_SECONDS = 0.02
_MOST_CALLS = 100
HEAD = (
    f'{"shape":34} {"what":18} {"by":12} {"ms":>10} {"x ref":>7} {"TFLOP/s":>8}'
    f' {"compile s":>9} {"temp MiB":>9}  difference'
)


class Case(NamedTuple):
  """One shape to time.

  Attributes:
    name: the shape, in words.
    what: which computation, e.g. 'forward'.
    args: arrays on the device.
    functions: implementation -> function of `args`; the reference first.
    flops: operations of the products that have to be done.
  """

  name: str
  what: str
  args: tuple[Any, ...]
  functions: Mapping[str, Callable[..., Any]]
  flops: float


class Timing(NamedTuple):
  """What one implementation took.

  Attributes:
    seconds: median of a call.
    compile_seconds: tracing and compiling.
    temporary: bytes of temporary memory that the program asks for.
    out: what it returned.
  """

  seconds: float
  compile_seconds: float
  temporary: int
  out: Any


def measure(
    function: Callable[..., Any], args: tuple[Any, ...], repeats: int
) -> Timing:
  """Compiles a function and times it.

  Args:
    function: of arrays.
    args: its arguments.
    repeats: batches to take the median over.
  """
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  compile_seconds = time.perf_counter() - start
  out = jax.block_until_ready(compiled(*args))

  def batch(calls: int) -> float:
    start = time.perf_counter()
    last = None
    for _ in range(calls):
      last = compiled(*args)
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / calls

  calls = int(_BATCH_SECONDS / max(batch(1), 1e-6))
  calls = max(1, min(_MOST_CALLS, calls))
  seconds = statistics.median(batch(calls) for _ in range(repeats))
  memory = compiled.memory_analysis()
  temporary = getattr(memory, 'temp_size_in_bytes', 0)
  return Timing(seconds, compile_seconds, temporary, out)


def difference(out: Any, expected: Any) -> str:
  """Compares results in words.

  Returns:
    The largest relative error ||out - expected|| / ||expected|| of an array of
    floats, and how many ids differ where there are ids.
  """
  worst, ids = 0.0, 0
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
    if jnp.issubdtype(b.dtype, jnp.integer):
      ids += int(jnp.sum(a != b))
      continue
    wide = jnp.promote_types(b.dtype, jnp.float32)
    a, b = a.astype(wide), b.astype(wide)
    error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    # NaN is the worst, and stays.
    worst = error if error > worst or error != error else worst
  return f'{worst:.1e}' + (f', {ids} ids differ' if ids else '')


def rows(case: Case, repeats: int) -> Iterator[str]:
  """Times a case; yields a line of the table for each implementation."""
  base = None
  for place, (name, function) in enumerate(case.functions.items()):
    start = f'{case.name:34} {case.what:18} {name:12}'
    try:
      timing = measure(function, case.args, repeats)
      base = timing if place == 0 else base
      words, ratio = '', '-'
      if base is not None:
        words = difference(timing.out, base.out) if place else ''
        ratio = f'{base.seconds / timing.seconds:.2f}'
    # One that does not compile or fit must not hide the others.
    except Exception as error:
      reason = (str(error).splitlines() or [''])[0][:120]
      yield f'{start} failed: {type(error).__name__}: {reason}'
      continue
    yield (
        f'{start} {timing.seconds * 1e3:10.3f} {ratio:>7}'
        f' {case.flops / timing.seconds / 1e12:8.2f}'
        f' {timing.compile_seconds:9.2f} {timing.temporary / 2**20:9.1f}'
        f'  {words}'
    )


def parser(doc: str) -> argparse.ArgumentParser:
  """Returns the options that every benchmark has."""
  options = argparse.ArgumentParser(
      description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = options.add_argument
  add('--repeats', type=int, default=9, help='batches of calls a median is of')
  add('--dtypes', default='bfloat16,float32', help='of the operands')
  add('--only', default='', help='time shapes whose name contains this')
  add(
      '--tiles',
      default='',
      help='comma-separated Tiles of the kernel, instead of its own choice',
  )
  add(
      '--interpret',
      action='store_true',
      help='small shapes without a TPU: shows that it runs, not how fast',
  )
  return options


def run(
    options: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    cases: Iterable[Case],
) -> None:
  """Prints the table.

  Args:
    options: says what is wrong and exits with code 2 where there is no TPU.
    arguments: what it read.
    cases: made one by one, after that check.
  """
  device = jax.devices()[0]
  if device.platform != 'tpu' and not arguments.interpret:
    options.exit(
        2,
        f'jax sees no TPU here, only a {device.platform}: install jax[tpu] on a'
        ' machine with one, or give --interpret to try small shapes.\n',
    )
  print(f'{device.device_kind}, jax {jax.__version__}', flush=True)
  print(HEAD, flush=True)
  for case in cases:
    if arguments.only not in case.name:
      continue
    for line in rows(case, arguments.repeats):
      print(line, flush=True)
