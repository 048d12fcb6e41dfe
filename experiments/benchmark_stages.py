"""Times the stages of an editing run and sets them against the machine.

A stage is called once to compile and warm up, and then as often as is asked
for; compile time is the first call less the median of the others. What it is
measured by is the time that its counted FLOPs (`costs`) take at the rate of
large square products in the same process, dtype by dtype.

Peaks of memory are those of the process so far: neither the allocator's nor the
operating system's mark can be set back.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark_lengths, costs
from experiments.benchmark_setup import Setup
from jaxedit import edited as edited_lib
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import (
    Edited,
    LowRank,
)
from jaxedit.methods.base import (
    Editor,
    Info,
)
from jaxedit.stats import moments as moments_lib
from jaxedit.stats import packing
from jaxedit.types import (
    SHARED,
    Progress,
)

# Columns of the products that give the ceiling.
_SIZES = {'cpu': 2048, 'gpu': 8192, 'tpu': 8192}
_TRIES = 5
# Seconds for which `pace` runs products, about.
_PACE = 0.5
# Tokens of a row of text; moments are collected from such rows.
_TEXT = 512


@dataclasses.dataclass
class Stage:
  """One stage's times and counts; counts are those of one call.

  Attributes:
    name: of the stage.
    unit: what `count` counts: 'edit', 'token' or 'layer'.
    count: units a call.
    seconds: wall time of every call, the first one compiles.
    flops: dtype of the ceiling -> FLOPs that the stage cannot do without.
    bytes: bytes of weights and metrics that it reads at least.
    peak: peak memory of the process after it, bytes.
    more: further counts, by name.
    whole: of the last stage of an edit, wall time from its beginning.
  """

  name: str
  unit: str
  count: int
  seconds: list[float] = dataclasses.field(default_factory=list)
  flops: dict[str, float] = dataclasses.field(default_factory=dict)
  bytes: float = 0.0
  peak: int = 0
  more: dict[str, float] = dataclasses.field(default_factory=dict)
  whole: list[float] = dataclasses.field(default_factory=list)

  @property
  def median(self) -> float:
    """Seconds of a warm call."""
    return statistics.median(self.seconds[1:] or self.seconds)

  @property
  def spread(self) -> tuple[float, float]:
    """Least and most seconds of a warm call."""
    warm = self.seconds[1:] or self.seconds
    return min(warm), max(warm)

  @property
  def compile(self) -> float:
    """Seconds that the first call took longer."""
    return max(self.seconds[0] - self.median, 0.0)

  def share(
      self, ceilings: Mapping[str, float], flops: Mapping[str, float]
  ) -> float:
    """Fraction of the ceiling at which some FLOPs were done."""
    ideal = sum(count / ceilings[dtype] for dtype, count in flops.items())
    return ideal / self.median

  def facts(self, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The stage as plain numbers, for results.json."""
    return {
        **dataclasses.asdict(self),
        'median_seconds': self.median,
        'compile_seconds': self.compile,
        'ceiling_share': self.share(ceilings, self.flops),
    }


def peak_bytes() -> int:
  """Peak memory of the process so far: the device's, or on CPU the host's."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  if device.platform != 'cpu' and 'peak_bytes_in_use' in stats:
    return int(stats['peak_bytes_in_use'])
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
  platform = jax.devices()[0].platform
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
  return size or _SIZES.get(jax.devices()[0].platform, 8192)


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


def dtype_of(setup: Setup) -> str:
  """Dtype of the weights, which names their ceiling."""
  return setup.model.params['embed']['embedding'].dtype.name


def itemsize(setup: Setup) -> int:
  """Bytes a weight."""
  return setup.model.params['embed']['embedding'].dtype.itemsize


def time_moments(
    setup: Setup, *, rows: int, repeat: int, progress: Progress
) -> Stage:
  """Times second moments on rows of random tokens.

  Args:
    setup: what to run on.
    rows: rows a batch.
    repeat: warm calls.
    progress: progress display.

  Returns:
    The stage, by the token.
  """
  spec, layers = setup.model.spec, setup.recipe.layers
  batch = packing.stack(list(_random_rows(setup, rows)), rows)
  size = moments_lib.key_width(spec, setup.recipe.site)
  total = jnp.zeros((len(layers), size, size), jnp.float32)
  stage = Stage('moments', 'token', batch.tokens.size)
  stage.flops = _moment_flops(setup, stage.count)
  stage.bytes = costs.model_bytes(spec, layers[-1] + 1, itemsize(setup))
  stage.bytes += 2.0 * total.nbytes
  with progress('moments', 1 + repeat, 'call') as advance:
    for _ in range(1 + repeat):
      total, seconds = timed(
          lambda total=total: moments_lib.add_batch(
              total,
              spec,
              setup.model.params,
              batch,
              layers=layers,
              site=setup.recipe.site,
          )
      )
      stage.seconds.append(seconds)
      advance(1)
  stage.peak = peak_bytes()
  return stage


def time_collection(
    setup: Setup, *, rows: int, tokens: int, progress: Progress
) -> Stage:
  """Times second moments as a whole: all batches, sums in f64, averages.

  Args:
    setup: what to run on.
    rows: rows a batch, as `time_moments` has compiled them.
    tokens: random tokens to collect them from.
    progress: progress display.

  Returns:
    The stage, by the token, called once.
  """
  spec, recipe = setup.model.spec, setup.recipe
  width = min(_TEXT, spec.max_positions)
  moments, seconds = timed(
      lambda: moments_lib.collect(
          spec,
          setup.model.params,
          _random_rows(setup, -(-tokens // width)),
          layers=recipe.layers,
          source=moments_lib.Source('random', 'random', 0),
          site=recipe.site,
          cap=tokens,
          batch_rows=rows,
          progress=progress,
      )
  )
  stage = Stage('collect', 'token', moments.count, [seconds])
  stage.flops = _moment_flops(setup, stage.count)
  stage.bytes = (stage.count / (rows * width)) * costs.model_bytes(
      spec, recipe.layers[-1] + 1, itemsize(setup)
  )
  stage.peak = peak_bytes()
  return stage


def _random_rows(setup: Setup, count: int) -> Iterator[packing.Row]:
  """Rows of text of random tokens."""
  width = min(_TEXT, setup.model.spec.max_positions)
  rng = np.random.default_rng(0)
  for _ in range(count):
    yield packing.Row(
        rng.integers(0, len(setup.tokenizer), width, np.int32),
        np.arange(width, dtype=np.int32),
        np.full(width, SHARED + 1, np.int32),
    )


def _moment_flops(setup: Setup, tokens: int) -> dict[str, float]:
  model, gram = costs.moment_flops(
      setup.model.spec, setup.recipe.layers, tokens
  )
  return _flops((dtype_of(setup), model), ('float32', gram))


def _flops(*parts: tuple[str, float]) -> dict[str, float]:
  """Adds FLOPs up by dtype."""
  found: dict[str, float] = {}
  for dtype, count in parts:
    found[dtype] = found.get(dtype, 0.0) + count
  return found


def time_factor(
    setup: Setup, editor: Editor, *, repeat: int, progress: Progress
) -> tuple[Stage, Any]:
  """Times the factors of the metrics.

  Returns:
    (the stage, by the layer; the editor's state).
  """
  spec, layers = setup.model.spec, len(setup.recipe.layers)
  stage = Stage('factor', 'layer', layers)
  stage.flops = {'float64': costs.factor_flops(spec, layers)}
  stage.bytes = 16.0 * layers * spec.mlp_width**2
  state = None
  with progress('factor', 1 + repeat, 'call') as advance:
    for _ in range(1 + repeat):
      state = None  # one at a time is in memory
      state, seconds = timed(
          lambda: editor.init(setup.model.params, setup.moments)
      )
      stage.seconds.append(seconds)
      advance(1)
  stage.peak = peak_bytes()
  return stage, state


def edit_stages(setup: Setup, plan: BatchPlan) -> dict[str, Stage]:
  """Makes the stages that one call of an editor runs, without times.

  Args:
    setup: what to run on.
    plan: the editor's static shapes; says what the edits share.
  """
  spec, layers = setup.model.spec, setup.recipe.layers
  count, dtype, last = len(setup.edits), dtype_of(setup), layers[-1]
  held = dict(texts=setup.recipe.texts)
  shared_prefix = [len(shared) for shared in plan.shared_prefix]
  sizes = benchmark_lengths.lengths(setup.edits, **held)
  shared = benchmark_lengths.own(sizes, shared_prefix)
  solved = benchmark_lengths.systems(setup.edits, apart=setup.apart, **held)
  lower = Stage('prepare', 'edit', count)
  lower.flops = {dtype: costs.prepare_flops(spec, last, shared)}
  lower.bytes = costs.model_bytes(spec, spec.layers, itemsize(setup))
  optimize = Stage('optimize', 'edit', count)
  insert = Stage('insert', 'edit', count)
  # Edits that are made alone share nothing from the first edited layer on.
  climbing = sizes if setup.apart else shared
  insert.flops = _flops(
      (dtype, costs.insert_flops(spec, layers, climbing)),
      ('float64', costs.solve_flops(spec, len(layers), solved)),
  )
  insert.bytes = costs.model_bytes(spec, last + 1, itemsize(setup))
  insert.bytes += 8.0 * len(layers) * spec.mlp_width**2
  return {stage.name: stage for stage in (lower, optimize, insert)}


def add_merge(
    setup: Setup, stage: Stage, edited: Edited, before: float
) -> None:
  """Merges the change into the weights, and enters the time.

  Args:
    setup: what to run on.
    stage: by the edit.
    edited: a change that all edits share.
    before: seconds that the editor's whole call took.
  """
  merged, seconds = timed(lambda: edited_lib.apply(setup.model.params, edited))
  del merged
  stage.seconds.append(seconds)
  stage.peak = peak_bytes()
  stage.whole.append(before + seconds)
  spec, layers = setup.model.spec, len(setup.recipe.layers)
  numbers = float(layers * spec.mlp_width * spec.width)
  states = sum(edit.stages for edit in setup.edits)
  factors = any(isinstance(delta, LowRank) for delta in edited.deltas)
  stage.flops = {'float32': numbers * (2 * states if factors else 1)}
  stage.bytes = 2 * itemsize(setup) * numbers


def add_edit(setup: Setup, stages: dict[str, Stage], info: Info) -> None:
  """Enters one call of an editor into its stages.

  Args:
    setup: what it ran on.
    stages: of `edit_stages`.
    info: what the editor reported.
  """
  spec, last, work = setup.model.spec, setup.recipe.layers[-1], info.work
  seconds = {'insert': info.seconds['insert'], **work.seconds}
  for name, stage in stages.items():
    stage.seconds.append(seconds[name])
    stage.peak = peak_bytes()
  stage, dtype = stages['optimize'], dtype_of(setup)
  floor = costs.value_flops(spec, last, work.needed, work.scored)
  last_steps = costs.value_flops(spec, last, work.last, work.last_scored)
  stage.flops = {dtype: floor}
  stage.bytes = costs.value_bytes(spec, last, work.steps, itemsize(setup))
  stage.more = {
      'strict_flops': floor - last_steps / 2,
      'computed_flops': costs.value_flops(
          spec, last, work.computed, work.scored_computed
      ),
      'pool_steps': work.steps,
      'steps_a_state': float(np.mean(info.targets.steps)),
      'states': len(info.targets.steps),
      'needed': work.needed,
      'computed': work.computed,
      'scored': work.scored,
      'scored_computed': work.scored_computed,
      'prepared': work.prepared,
  }
