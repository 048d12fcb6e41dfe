"""Locate-and-edit methods with a closed form; each is a row (`Recipe`).

For every edit a wanted state z at its anchor is optimised once (`values`), on
the unedited model, and then written into the edited layers (`insertion`). With
chunks an edit has several anchors and states, one after the other.

Axes: E edits, M states of all edits (rows of a change), G groups, F key width,
D width, n edited layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1. Unlike upstream,
templates are inputs, solves are M x M in f64, and params never change.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import (
    Dense,
    Edited,
    LowRank,
    SiteDelta,
)
from jaxedit.methods.base import (
    Editor,
    Info,
)
from jaxedit.methods.closed_form.insertion import (
    Written,
    all_states,
    insert,
)
from jaxedit.methods.closed_form.recipe import (
    Recipe,
    State,
    check_layers,
)
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.stats.moments import Moments
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import (
    InputError,
    Params,
    Progress,
    Targets,
    silent,
)

__all__ = ['Recipe', 'State', 'check_layers', 'closed_form', 'insert']


def closed_form(spec: ModelSpec, recipe: Recipe) -> Editor:
  """Makes an editor of a row.

  Args:
    spec: the architecture.
    recipe: the method.

  Returns:
    The editor. Its `init(params, moments)` factors the metrics in f64, once; its
    `edit(params, state, edits, frame=None, memory=None, progress=silent)` takes
    what `text.encoding.encode_edits` or `text.passages.encode_passages` gives,
    and the frame of the run it is part of; `edit_independent` also takes `group`, [E]
    which independent group an edit belongs to (every edit alone unless given).

  Raises:
    InputError: a layer is out of range; from `init`, moments lack a layer or
      are not positive definite; from `edit_independent`, the method writes single
      entries of a matrix (RECT), which have no factors.
  """
  check_layers(spec, recipe.layers)
  spec = dataclasses.replace(spec, activations=recipe.activations)

  def init(params: Params, moments: Moments) -> State:
    del params
    preconditioners = []
    with jax.enable_x64(True):
      for layer in recipe.layers:
        gram = jnp.asarray(moments.layer(layer), jnp.float64)
        preconditioner = jax.block_until_ready(
            _preconditioner(recipe, gram, layer)
        )
        # Held by the host: at width 16,384 a layer's takes 2 GB of the device.
        preconditioners.append(jax.tree.map(np.asarray, preconditioner))
    preserved_before = None
    if recipe.preserve_previous:
      width = moments.gram.shape[-1]
      preserved_before = (np.zeros((0, width), np.float32),) * len(
          recipe.layers
      )
    return State(tuple(preconditioners), preserved_before)

  def edit(params, state, edits, *, plan=None, memory=None, progress=silent):
    if not edits:
      return Edited(), state, _nothing(spec, recipe)
    call = _Call(spec, params, recipe, edits, (plan, memory), progress)
    written = call.run(state, None)
    # What stopped being finite while it was written has zero rows.
    delta = _delta(recipe, written.changes, call.finite)
    if state.preserved_before is not None:
      kept = (keys[written.active] for keys in written.keys)
      joined = map(np.concatenate, zip(state.preserved_before, kept))
      state = state._replace(preserved_before=tuple(joined))
    return Edited(deltas=(delta,)), state, call.info(written)

  def edit_independent(
      params,
      state,
      edits,
      *,
      group=None,
      plan=None,
      memory=None,
      progress=silent,
  ):
    if recipe.rect_density < 1:
      raise InputError(
          f'{recipe.name}: a change of single entries has no factors, so edits'
          ' cannot be held side by side; edit them in one sequence'
      )
    if not edits:
      return Edited(), state, _nothing(spec, recipe)
    call = _Call(spec, params, recipe, edits, (plan, memory), progress)
    group = np.arange(len(edits)) if group is None else np.asarray(group)
    written = call.run(state, group)
    groups = slice(0, int(group.max()) + 1)
    key, value = (
        jnp.asarray(np.stack(x)[:, groups]) for x in zip(*written.changes)
    )
    delta = LowRank(recipe.layers, recipe.site, key, value)
    edited = Edited(deltas=(delta,), size=groups.stop)
    return edited, state, call.info(written)

  return Editor(init, edit, edit_independent)


def _preconditioner(recipe: Recipe, gram: jax.Array, layer: int) -> Any:
  """LowRankUpdate the metric of a layer and checks it."""
  try:
    preconditioner = recipe.preconditioner(gram)
  except ValueError as e:
    raise InputError(f'layer {layer}: {e}') from None
  if not all(bool(jnp.all(jnp.isfinite(x))) for x in preconditioner):
    raise InputError(
        f'the second moments of layer {layer} are not positive definite;'
        ' collect more tokens (at least one a key dimension, better 20)'
    )
  return preconditioner


class _Call:
  """One call of an editor."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      recipe: Recipe,
      edits: Sequence[EncodedEdit],
      prepared: tuple[BatchPlan | None, targets_lib.TargetCache | None],
      progress: Progress,
  ):
    begin = time.monotonic()
    self._given = (spec, params, recipe)
    self._edits, self._progress = edits, progress
    plan, self._memory = prepared
    self._plan = plan or targets_lib.plan_batches(spec, params, edits)
    self._targets, self._work = self._optimize()
    self._edit = np.repeat(np.arange(len(edits)), [e.stages for e in edits])
    self.finite = all_states(self._edit, self._targets.finite)
    self._seconds = {'optimize': time.monotonic() - begin}

  def _optimize(self) -> tuple[Targets, targets_lib.Work]:
    spec, params, recipe = self._given
    settings = dict(
        layer=recipe.layers[-1],
        config=recipe.value,
        output=recipe.output,
        plan=self._plan,
        memory=self._memory,
        progress=self._progress,
    )
    if all(edit.stages == 1 for edit in self._edits):
      return targets_lib.optimize(spec, params, self._edits, **settings)
    found, work = targets_lib.autoregressive(
        spec, params, self._edits, **settings
    )
    return jax.tree.map(lambda *x: np.concatenate(x), *found), work

  def run(self, state: State, group: np.ndarray | None) -> Written:
    """Writes the states."""
    begin = time.monotonic()
    written = insert(
        *self._given,
        state,
        self._edits,
        targets=self._targets,
        active=self.finite,
        group=group,
        plan=self._plan,
        progress=self._progress,
    )
    self._seconds['insert'] = time.monotonic() - begin
    return written

  def info(self, written: Written) -> Info:
    """The report."""
    first = np.flatnonzero(np.diff(self._edit, prepend=-1))
    return Info(
        targets=self._targets,
        edit=self._edit,
        written=written.active[first],
        distance=written.distance,
        seconds=self._seconds,
        work=self._work,
    )


def _delta(
    recipe: Recipe, solved: Sequence[Any], kept: np.ndarray
) -> SiteDelta:
  """Joins the changes of all layers; `kept` rows of factors take part."""
  if isinstance(solved[0], LowRankUpdate):
    key, value = (
        jnp.asarray(np.stack(x)[:, : len(kept)][:, kept]) for x in zip(*solved)
    )
    return LowRank(layers=recipe.layers, site=recipe.site, key=key, value=value)
  kernel = jnp.asarray(np.stack(solved))
  return Dense(layers=recipe.layers, site=recipe.site, value=kernel)


def _nothing(spec: ModelSpec, recipe: Recipe) -> Info:
  """The report on an empty batch."""
  state, one = np.zeros((0, spec.width), np.float32), np.zeros(0, np.float32)
  steps, yes = np.zeros(0, np.int32), np.zeros(0, bool)
  return Info(
      targets=Targets(state, state, one, one, steps, yes),
      edit=steps,
      written=yes,
      distance=np.zeros((len(recipe.layers) + 1, 0), np.float32),
      seconds={'optimize': 0.0, 'insert': 0.0},
      work=targets_lib.Work(),
  )
