"""Optimisation of targets: the shapes of a plan, compiled.

A step's FLOPs are counted by hand for every layer above the edited one. The
compiler counts one step, and of its layers the body of their loop and the last
one, so its count is compared with that of two layers.

Axis letters as in `jaxedit.types`; W weights a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit.batching import edits as edits_lib
from jaxedit.batching.plan import BatchPlan, BatchShape
from jaxedit.batching.slots import SlotAllocator
from jaxedit.models.flops import attention_flops
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import device_bytes
from jaxedit.planning import costs, lengths
from jaxedit.planning import programs as programs_lib
from jaxedit.planning.programs import Program
from jaxedit.planning.stages import Stage, itemsize, products
from jaxedit.targets import TargetConfig, engine
from jaxedit.targets.partial_forward import shared_prefix_kv
from jaxedit.text.encoding import EncodedEdit

# Prefilled batches that wait for slots: those of the slots that are filled
# first, and one that gives a choice.
_WAITING = 2


class StepProgram(NamedTuple):
  """The programs of one batch shape.

  Attributes:
    step: the compiled optimiser step.
    prefill: the compiled prefill of a packed batch.
    resident: bytes that stay on a device between steps: the caches of prefixes
      and the state of the optimiser.
    waiting: bytes of one prefilled batch on a device.
    assigned: bytes that a device exchanges where an edit is assigned to a slot.
  """

  step: Program
  prefill: Program
  resident: int
  waiting: int
  assigned: float


class StepArguments(NamedTuple):
  """Arguments of `engine.step` as shapes, with what they are made of."""

  args: tuple[Any, ...]
  keywords: dict[str, Any]
  prefill: jax.stages.Lowered
  shared: Any
  prefilled: Any
  assigned: float


_shared_prefix_kv = jax.jit(shared_prefix_kv, static_argnames='spec')


def step_arguments(
    spec: ModelSpec,
    params: Any,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    *,
    number: int,
    layer: int,
    output: str,
    config: TargetConfig,
) -> StepArguments:
  """Makes the arguments that a run would have.

  Args:
    spec: the architecture, with the activations of the optimisation.
    params: canonical parameters, or their shapes; on a mesh with shards, of
      which those of all that follows come.
    edits: all edits.
    plan: made for them.
    number: of the batch shape.
    layer: the layer whose output is changed.
    output: which output, one of `state.OUTPUTS`.
    config: settings.

  Returns:
    The arguments; nothing is allocated.
  """
  several = any(getattr(x, 'sharding', None) for x in jax.tree.leaves(params))

  def shapes(lowered: jax.stages.Lowered) -> Any:
    if several:
      return programs_lib.output(lowered)[1]
    plain = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(plain, lowered.out_info)

  shape = plan.shapes[number]
  mine = [i for i, e in enumerate(edits) if plan.shape_of(e) == number]
  tokens, layout = edits_lib.pack_shared_prefix(plan)
  shared = None
  if tokens.shape[1]:
    shared = shapes(_shared_prefix_kv.lower(spec, params, tokens, layout))
  packed = next(edits_lib.pack_edits(edits, mine, plan, shape))
  prefill = engine.prefill.lower(
      spec, params, shared, packed, layer=layer, output=output
  )
  prefilled = shapes(prefill)
  cache = jax.eval_shape(lambda x: engine.empty(x, plan, shape), prefilled)
  allocator, sent = SlotAllocator(plan, shape), 0.0
  if several:
    index = allocator.assign(0, edits[mine[0]], 0).reshape(-1)
    move = np.stack([index, index])
    program, cache = programs_lib.output(
        engine.assign.lower(cache, prefilled, 0, 0, move, shards=shape.shards)
    )
    sent = sum(program.collectives.values())
  assigned, chained = allocator.layout(), shape.grow > 0
  state = shapes(
      engine.start.lower(
          spec, cache, assigned, solver=config.solver, return_kv=chained
      )
  )
  keywords = dict(layer=layer, return_kv=chained, **engine.split_config(config))
  fresh = np.ones(shape.slots, bool)
  args = (spec, params, cache, assigned, state, fresh)
  return StepArguments(args, keywords, prefill, shared, prefilled, sent)


def programs(
    spec: ModelSpec,
    params: Any,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    **objective: Any,
) -> StepProgram:
  """Compiles the programs of one batch shape; see `step_arguments`."""
  found = step_arguments(spec, params, edits, plan, **objective)
  step = engine.step.lower(*found.args, **found.keywords)
  return StepProgram(
      programs_lib.compiled(step),
      programs_lib.compiled(found.prefill),
      device_bytes((found.shared, found.args[2], found.args[4])),
      device_bytes(found.prefilled),
      found.assigned,
  )


def step_flops(
    spec: ModelSpec, layer: int, plan: BatchPlan, shape: BatchShape
) -> float:
  """FLOPs of one step of a full batch shape, padding included.

  Args:
    spec: the architecture.
    layer: the layer whose output is changed.
    plan: of the run.
    shape: one of its batch shapes.
  """
  kl = shape.slots if plan.kl else 0
  flops = costs.target_flops(
      spec, layer, shape.token_budget, shape.logit_budget + kl
  )
  rows = shape.slots * plan.rows
  columns = plan.shared + shape.prefix_shape[1] + shape.grow + shape.length
  pairs = rows * shape.length * columns
  return flops + 3 * attention_flops(spec, pairs, costs.above(spec, layer))


def stage(
    model: Model,
    spec: ModelSpec,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    *,
    objective: Mapping[str, Any],
) -> Stage:
  """The optimisation of all targets, every one with all of its steps.

  Args:
    model: as shapes.
    spec: the architecture, with the activations of the optimisation.
    edits: all edits.
    plan: made for them.
    objective: 'layer', 'output' and 'value', see `MethodConfig.objective`.

  Returns:
    The stage.
  """
  layer = objective['layer']
  config = TargetConfig(**objective['value'])
  kinds = [
      programs(
          spec, model.params, edits, plan,
          number=n, layer=layer, output=objective['output'], config=config,
      )
      for n in range(len(plan.shapes))
  ]  # fmt: skip
  states = sum(edit.stages for edit in edits)
  steps = np.full(states, config.steps)
  flops = costs.ours_flops(spec, layer, edits, steps)
  loads = lengths.loads(edits)
  budget = max(shape.token_budget for shape in plan.shapes)
  ran = float((loads.suffix + (loads.kl > 0)).sum()) * config.steps / budget
  pair = 8.0 * max(plan.states, 1) * spec.width
  largest = max(
      one.resident
      + max(one.step.peak, one.prefill.peak)
      + _WAITING * one.waiting
      for one in kinds
  )
  checked = None
  if kinds[0].step.flops:
    # The last layer runs scored tokens alone and stands outside the loop.
    trip = dataclasses.replace(spec, layers=min(spec.layers, layer + 3))
    by_hand = step_flops(trip, layer, plan, plan.shapes[0])
    checked = kinds[0].step.flops / by_hand
  shape = plan.shapes[-1]
  return Stage(
      'targets',
      f'{states:,} targets, {config.steps} steps, {shape.slots} slots of'
      f' {shape.token_budget} tokens and {shape.logit_budget} logits',
      flops={products(model, spec): flops},
      moved=costs.target_bytes(
          spec, layer, max(ran, config.steps), itemsize(model)
      ),
      device=largest,
      collective=max(ran, config.steps)
      * sum(kinds[0].step.collectives.values())
      + len(edits) * kinds[0].assigned,
      host=2 * pair,
      kept=8.0 * states * spec.width,
      checked=checked,
  )
