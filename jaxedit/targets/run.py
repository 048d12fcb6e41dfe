"""Optimises any number of edits in the rooms of a frame.

The host seats edits, the device steps until one of them is done, and its slot
goes to the next in line that fits. Results do not depend on who else is seated,
on the order or on the number of slots.

A long target goes chunk by chunk (`autoregressive`): the state of a chunk
stands on the token before it, with the states of earlier chunks in force. The
keys and values of a finished chunk are those of its last step, so no run is
needed between two chunks.

Source: Jiang et al. 2025 (AnyEdit, arXiv 2502.05628), section 4, for chunks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from jaxedit.batching import packer
from jaxedit.batching.budget import plan_batches
from jaxedit.batching.plan import BatchPlan
from jaxedit.models.spec import ModelSpec
from jaxedit.targets.partial_forward import shared_prefix_kv
from jaxedit.targets.scheduler import (
    Objective,
    Result,
    Scheduler,
    Work,
)
from jaxedit.targets.state import (
    OUTPUTS,
    TargetConfig,
)
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Params, Progress, Targets, silent


class TargetCache(Protocol):
  """Remembers the states of edits, so that they are not optimised again.

  It must tell apart whatever else states depend on: the model and the settings.
  """

  def get(self, edit: EncodedEdit) -> Targets | None:
    """The states of an edit, if it was remembered."""

  def put(self, edit: EncodedEdit, targets: Targets) -> None:
    """Is told of the states of an edit as soon as they are found."""


def optimize(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    layer: int,
    config: TargetConfig,
    output: str = 'block',
    plan: BatchPlan | None = None,
    memory: TargetCache | None = None,
    progress: Progress = silent,
) -> tuple[Targets, Work]:
  """Finds the wanted states of edits with one state each.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits, at least one.
    layer: the layer whose output is changed.
    config: settings.
    output: which output, 'block', 'mlp' or 'attn+mlp' (see `state`).
    plan: static shapes, of these edits and others; chosen unless given.
    memory: what it recalls is not optimised, and all else is told to it.
    progress: progress display.

  Returns:
    (targets of the E edits as numpy arrays, what was run).

  Raises:
    ValueError: an edit has several chunks or does not fit the frame, or the
      output is unknown.
  """
  for edit in edits:
    if edit.stages > 1:
      raise ValueError(
          f'edit {edit.number} has {edit.stages} chunks; `autoregressive` is'
          ' for those'
      )
  found, work = autoregressive(
      spec,
      params,
      edits,
      layer=layer,
      config=config,
      output=output,
      plan=plan,
      memory=memory,
      progress=progress,
  )
  return jax.tree.map(lambda *x: np.concatenate(x), *found), work


def autoregressive(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    layer: int,
    config: TargetConfig,
    output: str = 'block',
    plan: BatchPlan | None = None,
    memory: TargetCache | None = None,
    progress: Progress = silent,
) -> tuple[list[Targets], Work]:
  """Finds the wanted states of edits whose targets go chunk by chunk.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits, at least one.
    layer: the layer whose output is changed.
    config: settings; steps are counted anew for every chunk.
    output: which output, 'block', 'mlp' or 'attn+mlp' (see `state`). `Targets`
      hold the state of the block or of the MLP; the change of the attention's
      output is optimised with the MLP's and let go of, as published.
    plan: static shapes, of these edits and others; chosen unless given.
    memory: what it recalls is not optimised, and all else is told to it.
    progress: progress display.

  Returns:
    (for every edit the targets of its K stages as numpy arrays, what was run).

  Raises:
    ValueError: an edit does not fit the frame, or the output is unknown.
  """
  if output not in OUTPUTS:
    raise ValueError(f'output is {output!r}; known are {", ".join(OUTPUTS)}')
  targets = [memory.get(edit) if memory else None for edit in edits]
  if all(targets):
    return targets, Work()
  plan = plan or plan_batches(spec, params, edits)
  begin = time.monotonic()
  tokens, layout = packer.pack_shared_prefix(plan)
  shared_prefix = _shared_prefix_kv(spec, params, tokens, layout)
  jax.block_until_ready(shared_prefix)
  seconds = {'prefill': time.monotonic() - begin}
  total = Work(seconds=seconds, prepared=tokens.size)
  home = [
      None if known else plan.shape_of(edit)
      for edit, known in zip(edits, targets)
  ]
  objective = Objective(layer, config, output)
  stages = sum(e.stages for e, known in zip(edits, targets) if known is None)
  unit = 'edit' if stages == targets.count(None) else 'chunk'
  with progress('optimize', stages, unit) as optimize_until_done:
    for number, batch_shape in enumerate(plan.shapes):
      order = [i for i, where in enumerate(home) if where == number]
      run = None  # gives the last room's memory back
      if order:
        run = Scheduler(
            spec,
            params,
            edits,
            plan,
            batch_shape=batch_shape,
            shared_prefix=shared_prefix,
            objective=objective,
        )
        found: dict[int, list[Result]] = {i: [] for i in order}
        for (i, _), result in run.results(order):
          found[i].append(result)
          optimize_until_done(1)
          if len(found[i]) == edits[i].stages:
            targets[i] = _targets(found.pop(i))
            if memory:
              memory.put(edits[i], targets[i])
        total += run.work()
  spent = time.monotonic() - begin
  seconds = {**total.seconds, 'optimize': spent - total.seconds['prefill']}
  return targets, total._replace(seconds=seconds)


_shared_prefix_kv = jax.jit(shared_prefix_kv, static_argnames='spec')


def _targets(results: Sequence[Result]) -> Targets:
  """Stacks the stages of one edit."""
  z, z0, loss, likelihood, steps, finite = zip(*results)
  dtype = z[0].dtype
  return Targets(
      z=np.stack(z),
      z0=np.stack(z0),
      loss=np.array(loss, dtype),
      likelihood=np.array(likelihood, dtype),
      steps=np.array(steps, np.int32),
      finite=np.array(finite, bool),
  )
