"""Inserts targets into the edited layers, lowest first.

Layer by layer from the first edited one to the last (at which z stands),

  K   keys: input of the edited map at the anchors, averaged over contexts
  R   residuals: (z - z_now) * share, z_now under the deltas of lower layers
  H   preserved keys: other tokens of the texts, keys of earlier batches
  X   = S K_all^T (r I + C_all S K_all^T)^-1 [R; 0]      (`solve.ridge`)

in one forward pass (`sweep`). Edits are solved for jointly, or in independent
groups side by side, each of which edits the unedited model.

Axes as in `jaxedit.types`: E edits, M targets of all edits, M' targets of a
group, J preserved keys, F key width, D width, n edited layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1; for preserved
tokens Jiang et al. 2025 (AnyEdit, arXiv 2502.05628) as in its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import Below
from jaxedit.methods.base import EditBatch
from jaxedit.methods.closed_form.recipe import (
    Recipe,
    State,
)
from jaxedit.methods.closed_form.sweep import (
    Keys,
    LayerDelta,
    LayerSweep,
)
from jaxedit.methods.closed_form.systems import (
    Independent,
    Joint,
    Rows,
)
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.solve.preconditioner import Factored, preserve
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.solve.shaping import rect
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Params, Progress, Targets, silent


class InsertionResult(NamedTuple):
  """Result of an insertion.

  Attributes:
    deltas: of every layer: factors, whose first M pairs are the targets', or
      one matrix where that is smaller; of independent groups, factors [groups,
      M', .].
    distance: [n + 1, M] |z - z_now| / |z - z0| before each edited layer and
      after the last.
    active: [M] bool, targets whose edit stayed finite.
    keys: [M, F] of every layer.
  """

  deltas: list[LayerDelta]
  distance: np.ndarray
  active: np.ndarray
  keys: list[np.ndarray]


def insert(
    spec: ModelSpec,
    params: Params,
    recipe: Recipe,
    state: State,
    batch: EditBatch,
    *,
    targets: Targets,
    active: np.ndarray,
    replayed: np.ndarray | None = None,
    below: Below | None = None,
    progress: Progress = silent,
) -> InsertionResult:
  """Inserts the targets into the edited layers, lowest first.

  Args:
    spec: the architecture.
    params: canonical parameters.
    recipe: the method.
    state: factored preconditioners, and keys to preserve.
    batch: E edits, joint or in independent groups.
    targets: all M targets.
    active: [M] bool, targets to insert; an edit is inserted whole or not at
      all.
    replayed: [n, M, D] targets of each layer's own output; None for targets of
      the last layer alone.
    below: changes of layers below the first, of every group its own.
    progress: progress display.

  Returns:
    The deltas, with distances and keys.
  """
  edits, plan, group = batch.encoded, batch.plan, batch.group
  if group is None:
    systems: Any = Joint(plan, sum(edit.stages for edit in edits))
  else:
    systems = Independent(plan, edits, group)
  if group is not None or recipe.texts:
    # Every group changes the shared prefixes in its own way, and every text
    # preserves all of its own tokens.
    plan = plan.independent()
  sweep = _Insertion(
      LayerSweep(spec, params, recipe, edits, plan, group=group, below=below),
      (params, recipe, state),
      edits,
      targets,
      active,
      joint=group is None,
      replayed=replayed,
  )
  with progress('insert', len(recipe.layers), 'layer') as advance:
    for layer in range(recipe.layers[0], recipe.layers[-1] + 1):
      sweep.to_mlp(layer)
      delta = None
      if layer in recipe.layers:
        delta = sweep.solve(layer, systems)
        advance(1)
      if layer < recipe.layers[-1]:
        sweep.through_mlp(layer, delta)
  sweep.gap(sweep.rows.final(delta))
  return InsertionResult(
      sweep.solved, np.stack(sweep.distance), sweep.active, sweep.keys
  )


_preserve = jax.jit(preserve)


def all_targets(edit: np.ndarray, fine: np.ndarray) -> np.ndarray:
  """Finds the targets all of whose edit's targets are fine.

  Args:
    edit: [M] int, the edit of a target.
    fine: [M] bool.

  Returns:
    [M] bool.
  """
  bad = np.zeros(int(edit.max()) + 1, bool)
  np.logical_or.at(bad, edit, ~fine)
  return ~bad[edit]


class _Insertion:
  """State of an insertion: present distances, deltas and keys."""

  def __init__(
      self,
      rows: LayerSweep,
      given: tuple[Params, Recipe, State],
      edits: Sequence[EncodedEdit],
      targets: Targets,
      active: np.ndarray,
      *,
      joint: bool,
      replayed: np.ndarray | None,
  ):
    self.rows, self._targets = rows, targets
    self._replayed = replayed
    self._joint = joint
    self._params, self._recipe, self._state = given
    self._edit = np.repeat(np.arange(len(edits)), [e.stages for e in edits])
    self._length = np.linalg.norm(targets.z - targets.z0, axis=-1)
    self.to_mlp, self.through_mlp = rows.to_mlp, rows.through_mlp
    self.active = all_targets(self._edit, active)
    self.solved: list[LayerDelta] = []
    self.distance: list[np.ndarray] = []
    self.keys: list[np.ndarray] = []

  def gap(self, now: np.ndarray, i: int = -1) -> np.ndarray:
    """Records the distance to the targets; returns the residuals [M, D]."""
    z = self._targets.z if self._replayed is None else self._replayed[i]
    away = z - now
    far = np.linalg.norm(away, axis=-1) / np.maximum(self._length, 1e-30)
    self.distance.append(far)
    return away

  def solve(self, layer: int, systems: Any) -> LayerDelta:
    """Solves for the delta of a layer, with sequences before its MLP."""
    recipe, dtype = self._recipe, self._targets.z.dtype
    i = recipe.layers.index(layer)
    found = self.rows.keys(layer)
    if self._replayed is None:
      share = recipe.share(len(recipe.layers) - i)
      away = self.gap(self.rows.predicted(layer)) * share
    else:
      away = self.gap(self.rows.present(layer), i)
    fine = np.isfinite(found.mean).all(1) & np.isfinite(away).all(1)
    self.active = all_targets(self._edit, self.active & fine)
    self.keys.append(found.mean)
    rows, group = self._rows(found, away, i)
    with jax.enable_x64(True):
      exact = systems.solve(self._preconditioner(i), rows, group, recipe)
      if recipe.rect_density < 1:
        kernel = self._params['layers']
        for name in (*recipe.site.split('/'), 'kernel'):
          kernel = kernel[name]
        if isinstance(exact, LowRankUpdate):
          exact = exact.key.T @ exact.value
        exact = rect(exact, kernel[layer], recipe.rect_density)
      delta = jax.tree.map(lambda x: fetch(x, dtype), exact)
    # No delta of a singular system may reach the model.
    delta, sound = systems.sound(delta)
    self.active = all_targets(self._edit, self.active & sound)
    self.solved.append(delta)
    return jax.tree.map(jnp.asarray, delta)

  def _preconditioner(self, i: int) -> Factored:
    """S of the i-th edited layer, with preserved keys of earlier batches."""
    recipe, state = self._recipe, self._state
    i = (
        i
        if recipe.shared_preconditioner is None
        else recipe.shared_preconditioner
    )
    factored = state.preconditioners[i]
    # Independent edits do not preserve earlier ones.
    if state.previous is None or not self._joint or not state.previous[i].any():
      return factored
    return _preserve(factored, state.previous[i], recipe.ridge)

  def _rows(
      self, found: Keys, away: np.ndarray, i: int
  ) -> tuple[Rows, np.ndarray]:
    """The system of a layer, and the edits that preserved keys belong to."""
    preserved, live = found.preserved, np.zeros(0, bool)
    if len(preserved):
      live = np.isfinite(preserved).all(1)
      fine = np.zeros(int(self._edit.max()) + 1, bool)
      fine[self._edit[self.active]] = True
      live &= fine[found.group]
    group = found.group
    constraint = None
    if self._recipe.constraint == 'plain':
      constraint = found.plain
    some = len(preserved) > 0
    rows = Rows(
        found.mean,
        away,
        self.active,
        constraint,
        preserved if some else None,
        live if some else None,
    )
    return rows, group
