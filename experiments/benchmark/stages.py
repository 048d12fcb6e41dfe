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
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.benchmark.setup import Setup
from jaxedit import edited as edited_lib
from jaxedit.batching import packer
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import Edited, LowRank
from jaxedit.methods.base import Info
from jaxedit.planning import costs, lengths
from jaxedit.planning.machine import peak_bytes, timed
from jaxedit.stats import moments as moments_lib
from jaxedit.types import Progress

# Tokens of a sequence that moments are collected from.
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
    bytes: bytes of weights and preconditioners that it reads at least.
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
  def compile(self) -> float:
    """Seconds that the first call took longer."""
    return max(self.seconds[0] - self.median, 0.0)

  def share(self, ceilings: Mapping[str, float]) -> float:
    """Fraction of the ceiling at which its FLOPs were done."""
    ideal = sum(count / ceilings[dtype] for dtype, count in self.flops.items())
    return ideal / self.median

  def facts(self, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The stage as plain numbers, for results.json."""
    return {
        **dataclasses.asdict(self),
        'median_seconds': self.median,
        'compile_seconds': self.compile,
        'ceiling_share': self.share(ceilings),
    }


def dtype_of(setup: Setup) -> str:
  """Dtype of the weights, which names their ceiling."""
  return setup.model.params['embed']['embedding'].dtype.name


def itemsize(setup: Setup) -> int:
  """Bytes a weight."""
  return setup.model.params['embed']['embedding'].dtype.itemsize


def time_moments(setup: Setup, progress: Progress) -> Stage:
  """Times second moments on sequences of random tokens.

  Args:
    setup: what to run on.
    progress: progress display.

  Returns:
    The stage, by the token.
  """
  spec, layers = setup.model.spec, setup.recipe.layers
  rows, calls = setup.settings.moments_rows, 1 + setup.settings.repeat
  batch = packer.stack(list(_random_rows(setup, rows)), rows)
  size = moments_lib.key_width(spec, setup.recipe.site)
  total = jnp.zeros((len(layers), size, size), jnp.float32)
  stage = Stage('moments', 'token', batch.tokens.size)
  stage.flops = _moment_flops(setup, stage.count)
  stage.bytes = costs.model_bytes(spec, layers[-1] + 1, itemsize(setup))
  stage.bytes += 2.0 * total.nbytes
  add = functools.partial(
      moments_lib.add_batch,
      spec=spec,
      params=setup.model.params,
      batch=batch,
      layers=layers,
      site=setup.recipe.site,
  )
  with progress('moments', calls, 'call') as advance:
    for _ in range(calls):
      total, seconds = timed(functools.partial(add, total))
      stage.seconds.append(seconds)
      advance(1)
  stage.peak = peak_bytes()
  return stage


def time_collection(setup: Setup, progress: Progress) -> Stage:
  """Times second moments as a whole: all batches, sums in f64, averages.

  Args:
    setup: what to run on; batches are those that `time_moments` has compiled.
    progress: progress display.

  Returns:
    The stage, by the token, called once.
  """
  spec, recipe, settings = setup.model.spec, setup.recipe, setup.settings
  rows, tokens = settings.moments_rows, settings.moments_tokens
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


def _random_rows(setup: Setup, count: int) -> Iterator[packer.Row]:
  """Sequences of random tokens."""
  width = min(_TEXT, setup.model.spec.max_positions)
  rng = np.random.default_rng(0)
  draw = lambda: rng.integers(0, len(setup.tokenizer), width, np.int32)
  return packer.first_fit((draw() for _ in range(count)), width)


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


def time_factor(setup: Setup, progress: Progress) -> tuple[Stage, Any]:
  """Times the factors of the preconditioners.

  Returns:
    (the stage, by the layer; the editor's state).
  """
  spec, layers = setup.model.spec, len(setup.recipe.layers)
  stage = Stage('factor', 'layer', layers)
  stage.flops = {'float64': costs.factor_flops(spec, layers)}
  stage.bytes = 16.0 * layers * spec.mlp_width**2
  state = None
  calls = 1 + setup.settings.repeat
  with progress('factor', calls, 'call') as advance:
    for _ in range(calls):
      state = None  # one at a time is in memory
      state, seconds = timed(
          lambda: setup.editor.init(setup.model, setup.resources)
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
  shared_prefix = [len(shared) for shared in plan.shared_prefix]
  texts, independent = setup.recipe.texts, setup.independent
  sizes = lengths.lengths(setup.edits, texts)
  shared = lengths.own(sizes, shared_prefix)
  solved = lengths.systems(setup.edits, texts=texts, independent=independent)
  prefill = Stage('prefill', 'edit', count)
  prefill.flops = {dtype: costs.prefill_flops(spec, last, shared)}
  prefill.bytes = costs.model_bytes(spec, spec.layers, itemsize(setup))
  optimize = Stage('optimize', 'edit', count)
  insert = Stage('insert', 'edit', count)
  # Independent edits share nothing from the first edited layer on.
  own_sizes = sizes if independent else shared
  insert.flops = _flops(
      (dtype, costs.insert_flops(spec, layers, own_sizes)),
      ('float64', costs.solve_flops(spec, len(layers), solved)),
  )
  insert.bytes = costs.model_bytes(spec, last + 1, itemsize(setup))
  insert.bytes += 8.0 * len(layers) * spec.mlp_width**2
  return {stage.name: stage for stage in (prefill, optimize, insert)}


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
  floor = costs.target_flops(spec, last, work.needed, work.scored)
  last_steps = costs.target_flops(spec, last, work.last, work.last_scored)
  stage.flops = {dtype: floor}
  stage.bytes = costs.target_bytes(spec, last, work.steps, itemsize(setup))
  stage.more = {
      'strict_flops': floor - last_steps / 2,
      'computed_flops': costs.target_flops(
          spec, last, work.computed, work.scored_computed
      ),
      'pool_steps': work.steps,
      'steps_a_state': float(np.mean(info.targets.targets.steps)),
      'states': len(info.targets.targets.steps),
      'needed': work.needed,
      'computed': work.computed,
      'scored': work.scored,
      'scored_computed': work.scored_computed,
      'prepared': work.prepared,
  }
