"""Optimises the targets of any number of edits in the shapes of a plan.

Continuous batching: the host assigns edits to slots, the device steps until one
of them is done, and its slot and tokens go to the next edit that fits. Results
do not depend on which edits share a batch, on their order or on the number of
slots, except that last bits may differ between batch shapes.

A long target text is optimised chunk by chunk: the target of a chunk is at the
token before it, with the changes of earlier chunks in force. The keys and
values of a finished chunk are those of its last step, so nothing is run between
chunks.

Source: Jiang et al. 2025 (AnyEdit, arXiv 2502.05628), section 4, for chunks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from jaxedit.batching import edits as edits_lib
from jaxedit.batching.plan import BatchPlan, edit_load
from jaxedit.deltas import Below
from jaxedit.models.spec import ModelSpec
from jaxedit.targets.partial_forward import shared_prefix_kv
from jaxedit.targets.scheduler import (
    Objective,
    Result,
    Scheduler,
    Work,
)
from jaxedit.targets.state import OUTPUTS, SharedTokens
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Params, Progress, Targets, silent

# Times that a round fills the token budget, about. An interrupted run resumes
# from whole rounds, so large rounds lose more work; small ones leave more slots
# idle.
ROUND_FILLS = 8


class TargetCache(Protocol):
  """Stores targets of edits, so that they are not optimised again.

  Its keys cover all that targets depend on: the edit, the model, the settings.

  Attributes:
    exact: reuse whole rounds only. Rounding of a target depends on the shapes
      of its batch; so a run that resumes from such a cache is bit-identical to
      one that was not interrupted.
  """

  exact: bool

  def get(self, edit: EncodedEdit) -> Targets | None:
    """Returns the targets of an edit, or None."""

  def put(self, edit: EncodedEdit, targets: Targets) -> None:
    """Stores the targets of an edit as soon as they are optimised."""


def optimize(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    plan: BatchPlan,
    objective: Objective,
    below: Below | None = None,
    cache: TargetCache | None = None,
    progress: Progress = silent,
) -> tuple[list[Targets], Work]:
  """Optimises the targets of edits, chunk by chunk.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits, at least one.
    plan: static shapes, made for these edits and maybe others.
    objective: what is optimised, and how; each chunk counts its own steps.
      `Targets` are outputs of the block or of the MLP; a change of the
      attention's output is optimised with the MLP's and then dropped, as
      published.
    below: changes of layers below the objective's, of every edit its own.
    cache: targets that it has are not optimised; all others are put into it.
    progress: progress display.

  Returns:
    (for every edit the targets of its K chunks as numpy arrays, the work done).

  Raises:
    ValueError: an edit does not fit the plan, or the output is unknown.
  """
  if objective.output not in OUTPUTS:
    raise ValueError(
        f'output is {objective.output!r}; known are {", ".join(OUTPUTS)}'
    )
  begin = time.monotonic()
  targets, waiting = _known(edits, plan, cache)
  missing = [i for _, order in waiting for i in order]
  kept = len(edits) - len(missing)
  if not waiting:
    return targets, Work(kept=kept)
  tokens, layout = edits_lib.pack_shared_prefix(plan)
  if below is None:
    shared_prefix = _shared_prefix_kv(spec, params, tokens, layout)
    jax.block_until_ready(shared_prefix)
  else:
    shared_prefix = SharedTokens(tokens, layout) if tokens.shape[1] else None
  seconds = {'prefill': time.monotonic() - begin}
  total = Work(seconds=seconds, prepared=tokens.size, kept=kept)
  chunks = sum(edits[i].stages for i in missing)
  unit = 'edit' if chunks == len(missing) else 'chunk'
  with progress('optimize', chunks, unit) as advance:
    for number, order in waiting:
      run = None  # frees the memory of the last round
      run = Scheduler(
          spec,
          params,
          edits,
          plan,
          batch_shape=plan.shapes[number],
          shared_prefix=shared_prefix,
          objective=objective,
          below=below,
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


def _known(
    edits: Sequence[EncodedEdit], plan: BatchPlan, cache: TargetCache | None
) -> tuple[list[Targets | None], list[tuple[int, list[int]]]]:
  """Looks targets up in the cache and divides the rest into rounds by shape.

  Returns:
    (targets of every edit or None, (number of a batch shape, edits of a
    round)).
  """
  known = [cache.get(edit) if cache else None for edit in edits]
  exact = cache is not None and cache.exact
  waiting = []
  for number, shape in enumerate(plan.shapes):
    mine = [i for i, e in enumerate(edits) if plan.shape_of(e) == number]
    if not exact:
      mine = [i for i in mine if known[i] is None]
    load = sum(int(edit_load(edits[i])[0]) for i in mine)
    rounds = max(1, load // (ROUND_FILLS * shape.token_budget))
    for order in map(list, np.array_split(mine, rounds)):
      if order and any(known[i] is None for i in order):
        waiting.append((number, [int(i) for i in order]))
  for _, order in waiting:
    for i in order:
      known[i] = None
  return known, waiting


_shared_prefix_kv = jax.jit(shared_prefix_kv, static_argnames='spec')


def _targets(results: Sequence[Result]) -> Targets:
  """Stacks the results of one edit's chunks."""
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
