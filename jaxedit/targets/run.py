"""Optimises the targets of any number of edits, by the shapes of a plan.

Continuous batching: the host assigns edits to slots, the device steps until one
of them is done, and its slot and tokens go to the next in line that fits. Results
do not depend on the neighbours of an edit, on the order or on the number of slots.

A long target goes chunk by chunk: the hidden state of a chunk stands on the token
before it, with the changes of earlier chunks in force. The keys and values of a
finished chunk are those of its last step, so no run is needed between two chunks.

Source: Jiang et al. 2025 (AnyEdit, arXiv 2502.05628), section 4, for chunks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from jaxedit.batching import packer
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
)
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Params, Progress, Targets, silent


class TargetCache(Protocol):
  """Keeps the targets of edits, so that they are not optimised again.

  Its keys cover whatever else targets depend on: the model and the settings.
  """

  def get(self, edit: EncodedEdit) -> Targets | None:
    """Returns the targets of an edit, or None."""

  def put(self, edit: EncodedEdit, targets: Targets) -> None:
    """Takes the targets of an edit as soon as they are found."""


def optimize(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    plan: BatchPlan,
    objective: Objective,
    cache: TargetCache | None = None,
    progress: Progress = silent,
) -> tuple[list[Targets], Work]:
  """Finds the wanted hidden states of edits, chunk by chunk.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits, at least one.
    plan: static shapes, of these edits and others.
    objective: what is optimised, and how; steps are counted anew for every chunk.
      `Targets` hold the state of the block or of the MLP; the change of the
      attention's output is optimised with the MLP's and then dropped, as
      published.
    cache: targets that it holds are not optimised; it is given all others.
    progress: progress display.

  Returns:
    (for every edit the targets of its K chunks as numpy arrays, what was run).

  Raises:
    ValueError: an edit does not fit the plan, or the output is unknown.
  """
  if objective.output not in OUTPUTS:
    raise ValueError(
        f'output is {objective.output!r}; known are {", ".join(OUTPUTS)}'
    )
  targets = [cache.get(edit) if cache else None for edit in edits]
  if all(targets):
    return targets, Work()
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
  stages = sum(e.stages for e, known in zip(edits, targets) if known is None)
  unit = 'edit' if stages == targets.count(None) else 'chunk'
  with progress('optimize', stages, unit) as advance:
    for number, batch_shape in enumerate(plan.shapes):
      order = [i for i, where in enumerate(home) if where == number]
      run = None  # frees the memory of the last shape
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
          advance(1)
          if len(found[i]) == edits[i].stages:
            targets[i] = _targets(found.pop(i))
            if cache:
              cache.put(edits[i], targets[i])
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
