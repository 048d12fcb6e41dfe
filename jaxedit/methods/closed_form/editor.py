"""Locate-and-edit methods with a closed form; each is a `Recipe`.

For every edit a target z at its anchor is optimised once (`targets`), on the
unedited model, and then inserted into the edited layers (`insertion`). With
chunks an edit has several anchors and targets, one after the other.

Axis letters as in `jaxedit.types`: E edits, M targets of all edits (pairs of a
solve), F key width, D width, n edited layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1. Unlike
upstream, templates are inputs, solves are M x M in f64, and params never
change.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.deltas import Below, Dense, Edited, LowRank, SiteDelta
from jaxedit.edited.algebra import full, rank_limit
from jaxedit.methods.base import (
    NOT_FINITE,
    EditBatch,
    Editor,
    EditResult,
    Info,
    Moments,
    Need,
    Run,
    TargetReport,
    check_layers,
    empty_info,
    per_edit,
)
from jaxedit.methods.closed_form import planned
from jaxedit.methods.closed_form.insertion import (
    InsertionResult,
    all_targets,
    insert,
)
from jaxedit.methods.closed_form.recipe import (
    Recipe,
    State,
)
from jaxedit.methods.closed_form.replay import replay
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.solve import shaping
from jaxedit.solve.preconditioner import Factored, rank, whiten
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import InputError, Params

_SINGULAR = (
    'the system to solve is singular, as the preserved keys leave no direction'
    ' free; edit fewer together (--batch_size) or with a ridge, as MEMIT does'
)


def closed_form(spec: ModelSpec, recipe: Recipe) -> Editor:
  """Makes an editor of a recipe.

  Args:
    spec: the architecture.
    recipe: the method.

  Returns:
    The editor. It needs the second moments of its layers, if its preconditioner
    uses them; `init` factors them in f64, once. Its `edit` takes `below` too.

  Raises:
    InputError: a layer is out of range; from `init`, moments lack a layer or
      are not positive definite; from `edit` with groups, the method changes
      single entries of a matrix (RECT), which have no factors.
  """
  check_layers(spec, recipe.layers)
  spec = dataclasses.replace(spec, activations=recipe.activations)
  need = Moments(recipe.layers, recipe.site)
  needs = (need,) if recipe.preconditioner.moments else ()

  def init(model: Any, resources: Mapping[Need, Any]) -> State:
    del model
    factored = []
    with jax.enable_x64(True):
      for layer in recipe.layers:
        if needs:
          gram = jnp.asarray(resources[need].layer(layer), jnp.float64)
        else:
          gram = jnp.zeros((spec.mlp_width,) * 2, jnp.float64)
        one = jax.block_until_ready(_factor(recipe, gram, layer))
        # Kept on the host: at width 16,384 a layer's takes 2 GB of device
        # memory.
        factored.append(jax.tree.map(np.asarray, one))
    previous = None
    if recipe.preserve_previous:
      previous = tuple(np.zeros((rank(one),) * 2) for one in factored)
    return State(tuple(factored), previous)

  def edit(
      model: Any,
      state: State,
      batch: EditBatch,
      run: Run,
      below: Below | None = None,
  ) -> EditResult:
    if batch.group is not None and (problems := check(1)):
      raise InputError(*problems)
    if not batch.encoded:
      return EditResult(Edited(), state, empty_info(spec, recipe.layers))
    call = _Call(spec, model.params, recipe, batch, run, below)
    inserted = call.insert(state)
    if batch.group is not None:
      size = int(max(batch.group)) + 1
      key, value = (
          jnp.asarray(np.stack(x)[:, :size]) for x in zip(*inserted.deltas)
      )
      delta = LowRank(recipe.layers, recipe.site, key, value)
      return EditResult(Edited((delta,), size=size), state, call.info(inserted))
    # Edits that became non-finite have zero factors.
    delta = _delta(recipe, inserted.deltas, call.finite)
    if state.previous is not None:
      state = _preserved(state, inserted)
    return EditResult(Edited((delta,)), state, call.info(inserted))

  def check(targets: int) -> list[str]:
    if recipe.rect_density < 1 or recipe.prune:
      shape = 'prune' if recipe.prune else 'rect'
      return [
          f'post={shape} shapes the one change of a sequence, which has no factors'
          ' to be held side by side; leave one of them out'
      ]
    limit = rank_limit(spec.mlp_width, spec.width)
    if targets <= limit:
      return []
    return [
        'independent edits are held side by side as factors, which pay off up to'
        f' {limit} targets a batch in this model (a fact has one, a long text'
        f' one a chunk), and there are {targets}; lower --batch_size or leave'
        ' --reset out'
    ]

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    # The keys of all tokens, twice while they are sorted by group.
    del model
    tokens = [len(edit.rows[0]) + len(edit.target) for edit in edits]
    return 8 * spec.mlp_width * max(tokens) * len(edits)

  def finish(model: Any, edited: Edited) -> Edited:
    return pruned(model.params, edited) if recipe.prune else edited

  plan = functools.partial(planned.stages, spec, recipe)
  return Editor(needs, init, edit, check, bytes_of, finish, stages=plan)


def _factor(recipe: Recipe, gram: jax.Array, layer: int) -> Factored:
  """Factors the preconditioner of a layer and checks it."""
  if not bool(jnp.all(jnp.isfinite(gram))):
    raise InputError(
        f'the second moments of layer {layer} hold numbers that are not finite;'
        ' collect them again'
    )
  try:
    factored = recipe.preconditioner.factor(gram)
  except ValueError as e:
    raise InputError(f'layer {layer}: {e}') from None
  if not all(bool(jnp.all(jnp.isfinite(x))) for x in factored):
    raise InputError(
        f'the second moments of layer {layer} are not positive definite;'
        ' collect more tokens (at least one a key dimension, better 20)'
    )
  return factored


@jax.jit
def _gram(factored: Factored, keys: jax.Array) -> jax.Array:
  """Gram matrix [r, r] of whitened keys [M, F]."""
  whitened = whiten(factored, keys)
  return whitened.T @ whitened


def _preserved(state: State, inserted: InsertionResult) -> State:
  """Adds the keys of a batch to those that later batches preserve."""
  added = []
  with jax.enable_x64(True):
    for i, factored in enumerate(state.preconditioners):
      # Inactive pairs are zero rather than absent: one shape a batch size.
      keys = np.where(inserted.active[:, None], inserted.keys[i], 0)
      added.append(state.previous[i] + fetch(_gram(factored, keys)))
  return state._replace(previous=tuple(added))


class _Call:
  """One call of an editor."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Any,
      recipe: Recipe,
      batch: EditBatch,
      run: Run,
      below: Below | None,
  ):
    begin = time.monotonic()
    self._given = (spec, params, recipe)
    self._batch, self._run, self._below = batch, run, below
    found, self._work = targets_lib.optimize(
        spec,
        params,
        batch.encoded,
        plan=batch.plan,
        objective=targets_lib.Objective(
            recipe.target_layer, recipe.target, recipe.output
        ),
        below=below,
        cache=run.cache,
        progress=run.progress,
    )
    self._targets = jax.tree.map(lambda *x: np.concatenate(x), *found)
    self._replayed = None
    if recipe.targets_at == 'first':
      self._replayed = replay(
          spec, params, batch.encoded, found, recipe.layers, batch.plan
      )
    stages = [edit.stages for edit in batch.encoded]
    self._edit = np.repeat(np.arange(len(stages), dtype=np.int32), stages)
    self.finite = all_targets(self._edit, self._targets.finite)
    self._seconds = {'optimize': time.monotonic() - begin}

  def insert(self, state: State) -> InsertionResult:
    """Inserts the targets into the edited layers."""
    begin = time.monotonic()
    inserted = insert(
        *self._given,
        state,
        self._batch,
        targets=self._targets,
        active=self.finite,
        replayed=self._replayed,
        below=self._below,
        progress=self._run.progress,
    )
    self._seconds['insert'] = time.monotonic() - begin
    return inserted

  def info(self, inserted: InsertionResult) -> Info:
    """The report."""
    first = np.flatnonzero(np.diff(self._edit, prepend=-1))
    report = TargetReport(self._targets, self._edit, inserted.distance)
    reason = _SINGULAR if self._targets.finite.any() else NOT_FINITE
    return Info(
        written=inserted.active[first],
        seconds=self._seconds,
        per_edit=per_edit(report, len(first)),
        targets=report,
        work=self._work,
        reason='' if inserted.active.any() else reason,
    )


def _delta(
    recipe: Recipe, solved: Sequence[Any], finite: np.ndarray
) -> SiteDelta:
  """Joins the deltas of all layers; `finite` [M] pairs take part."""
  if isinstance(solved[0], LowRankUpdate):
    key, value = (
        jnp.asarray(np.stack(x)[:, : len(finite)][:, finite])
        for x in zip(*solved)
    )
    return LowRank(recipe.layers, recipe.site, key, value)
  return Dense(recipe.layers, recipe.site, jnp.asarray(np.stack(solved)))


def pruned(params: Params, edited: Edited) -> Edited:
  """Lowers the singular values of a sequence's change (PRUNE).

  Args:
    params: of the unedited model.
    edited: changes of kernels.
  """
  found = []
  for delta in edited.deltas:
    kernel = params['layers']
    for name in (*delta.site.split('/'), 'kernel'):
      kernel = kernel[name]
    changes = [
        shaping.prune(change, kernel[layer])
        for change, layer in zip(full(delta), delta.layers)
    ]
    found.append(Dense(delta.layers, delta.site, jnp.stack(changes)))
  return Edited(deltas=tuple(found))
