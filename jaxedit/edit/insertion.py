"""Writes wanted states into the edited layers, lowest first.

Layer by layer from the first edited one to the last (which z describes),

  K   keys: input of the edited map at the anchors, averaged over contexts
  R   residuals: (z - z_now) * share, z_now under the changes made so far
  H   keys that are held: other tokens of the texts, keys of earlier batches
  X   = S K_all^T (r I + C_all S K_all^T)^-1 [R; 0]      (`solve.ridge`)

in one pass that goes up with the edits (`climb`). Edits are solved for together,
or in independent groups side by side, each on a model of its own.

Axes: E edits, M states of all edits, G groups, m states of a group, P held keys,
p of a group, F key width, D width, n edited layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1; for held tokens
Jiang et al. 2025 (AnyEdit, arXiv 2502.05628) as its code has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.edit.climb import Change, Climb, Keys
from jaxedit.edit.recipe import Recipe, State
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.metric import Metric
from jaxedit.solve.ridge import Factors, ridge_dense, ridge_update
from jaxedit.solve.shaping import rect
from jaxedit.text import seating
from jaxedit.text.batching import EncodedEdit, round_up
from jaxedit.text.seating import Frame
from jaxedit.types import Array, Params, Progress, Targets, silent

# Of independent groups, those solved for in one call share this much memory.
_GROUP_BYTES = 2**30


class Written(NamedTuple):
  """What an insertion gave.

  Attributes:
    changes: of every layer: factors, whose first M rows are the states', or one
      matrix where that is smaller; of independent groups, factors [G, m, .].
    distance: [n + 1, M] |z - z_now| / |z - z0| before each layer was written and
      after the last.
    active: [M] bool, states whose edit stayed finite.
    keys: [M, F] of every layer.
  """

  changes: list[Change]
  distance: np.ndarray
  active: np.ndarray
  keys: list[np.ndarray]


class _Rows(NamedTuple):
  """Rows of one system, or of G systems side by side."""

  keys: np.ndarray  # [M, F]
  residuals: np.ndarray  # [M, D]
  active: np.ndarray  # [M] bool
  constraint: np.ndarray | None  # [M, F]
  held: np.ndarray | None  # [P, F]
  held_active: np.ndarray | None  # [P] bool


def pays(rows: int, keys: int, width: int) -> bool:
  """Says whether factors of that many rows are smaller than the matrix."""
  return rows * (keys + width) < keys * width


@jax.jit
def _solve_factors(metric: Metric, rows: _Rows, ridge: Array) -> Factors:
  return ridge_update(metric, **_named(rows), ridge=ridge)


@jax.jit
def _solve_dense(metric: Metric, rows: _Rows, ridge: Array) -> Array:
  return ridge_dense(metric, **_named(rows), ridge=ridge)


@jax.jit
def _solve_groups(metric: Metric, rows: _Rows, ridge: Array) -> Factors:
  """Solves systems that know nothing of each other, [G, m, .]."""
  one = lambda rows, ridge: ridge_update(metric, **_named(rows), ridge=ridge)
  return jax.vmap(one)(rows, ridge)


def _named(rows: _Rows) -> dict[str, Any]:
  return {name: x for name, x in rows._asdict().items() if x is not None}


class _Together:
  """All edits in one system."""

  def __init__(self, frame: Frame, states: int):
    # Smaller batches leave rows of the solve idle, rather than compile their own.
    self._rows = max(frame.states, states)

  def solve(
      self,
      metric: Metric,
      rows: _Rows,
      owner: np.ndarray,
      recipe: Recipe,
  ) -> Change:
    """Solves for one change of a layer; `owner` is not asked."""
    del owner
    full, count = self._rows, len(rows.keys)
    dense = not pays(full, rows.keys.shape[1], rows.residuals.shape[1])
    # What solves for a matrix widens its keys block by block, and held keys are
    # widened so in either case.
    put = lambda x: None if x is None else _pad(_as(x, dense), full)
    room = _room(0 if rows.held is None else len(rows.held))
    hold = lambda x: None if x is None else _pad(x, room)
    rows = _Rows(*map(put, rows[:4]), *map(hold, rows[4:]))
    solve = _solve_dense if dense else _solve_factors
    ridge = recipe.ridge_of(count)
    return solve(metric, jax.tree.map(jnp.asarray, rows), ridge)

  def fine(self, change: Change) -> np.ndarray:
    """[] whether the change is finite."""
    parts = jax.tree.leaves(change)
    return np.array(all(np.isfinite(x).all() for x in parts))

  def kept(self, sound: np.ndarray, axes: int) -> np.ndarray:
    """What a change is multiplied by to let go of what is not sound."""
    del axes
    return sound


class _Apart:
  """Independent groups of edits, each a system of its own."""

  def __init__(self, frame: Frame, edits: Sequence[EncodedEdit], group: Any):
    self._group = np.asarray(group)
    self._states = np.repeat(self._group, [edit.stages for edit in edits])
    self._groups = int(self._group.max()) + 1
    self._most = max(frame.batch, self._groups)
    self._index = _members(self._states, self._groups, frame.stages)

  def solve(
      self,
      metric: Metric,
      rows: _Rows,
      owner: np.ndarray,
      recipe: Recipe,
  ) -> Factors:
    """Solves for the changes of all groups; `owner` [P] is a held key's edit."""
    index, held = self._index, None
    if rows.held is not None:
      held = _members(self._group[owner], self._groups, 1)
      idle = _room(held.shape[1]) - held.shape[1]
      held = np.pad(held, [(0, 0), (0, idle)], constant_values=-1)
    counts = (index >= 0).sum(1)
    ridge = np.array([recipe.ridge_of(count) for count in counts], np.float64)
    size = index.shape[1] + (0 if held is None else held.shape[1])
    step = max(1, _GROUP_BYTES // (32 * size * rows.keys.shape[1]))
    step = min(step, self._most)
    metric = jax.tree.map(jnp.asarray, metric)  # to the device once
    found = []
    for at in range(0, self._groups, step):
      # The last systems stand idle where there are no more groups.
      cut = lambda x: _fill(x[at : at + step], step)  # pylint: disable=cell-var-from-loop
      part = _take(rows, cut(index), None if held is None else cut(held))
      part = jax.tree.map(jnp.asarray, part)
      shares = np.resize(ridge[at : at + step], step)
      solved = _solve_groups(metric, part, jnp.asarray(shares))
      found.append(jax.tree.map(np.asarray, solved))
    return Factors(*(np.concatenate(x)[: self._groups] for x in zip(*found)))

  def fine(self, change: Factors) -> np.ndarray:
    """[M] whether the change of a state's group is finite."""
    every = [np.isfinite(x).all(axis=(1, 2)) for x in change]
    return np.logical_and(*every)[self._states]

  def kept(self, sound: np.ndarray, axes: int) -> np.ndarray:
    """What changes [G, ...] are multiplied by to let go of unsound groups."""
    groups = np.ones(self._groups, bool)
    np.logical_and.at(groups, self._states, sound)
    return groups.reshape(-1, *[1] * (axes - 1))


def _fill(index: np.ndarray, rows: int) -> np.ndarray:
  """Adds rows that name nothing."""
  idle = [(0, rows - len(index)), (0, 0)]
  return np.pad(index, idle, constant_values=-1)


def _members(group: np.ndarray, groups: int, least: int) -> np.ndarray:
  """[G, m] which rows belong to a group, -1 for none."""
  counts = np.bincount(group, minlength=groups)
  index = np.full((groups, max(least, int(counts.max(initial=0)))), -1)
  for g in np.flatnonzero(counts):
    rows = np.flatnonzero(group == g)
    index[g, : len(rows)] = rows
  return index


def _take(rows: _Rows, index: np.ndarray, held: np.ndarray | None) -> _Rows:
  """The rows of groups, [G, m, .]; idle where there is none."""

  def pick(x: np.ndarray | None, index: np.ndarray) -> np.ndarray | None:
    if x is None:
      return None
    some = x[np.maximum(index, 0)]
    none = (index < 0).reshape(*index.shape, *[1] * (x.ndim - 1))
    return _as(np.where(none, np.zeros((), x.dtype), some), False)

  first = (pick(x, index) for x in rows[:4])
  if held is None:
    return _Rows(*first, None, None)
  return _Rows(*first, *(pick(x, held) for x in rows[4:]))


def _as(x: np.ndarray, narrow: bool) -> np.ndarray:
  """Widens numbers for an exact solve, unless told otherwise."""
  return x if narrow or x.dtype == bool else x.astype(np.float64)


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _room(held: int) -> int:
  """Held rows to compile for, so that a few more do not compile anew."""
  return round_up(held) if held else 0


def insert(
    spec: ModelSpec,
    params: Params,
    recipe: Recipe,
    state: State,
    edits: Sequence[EncodedEdit],
    *,
    targets: Targets,
    active: np.ndarray,
    owner: Sequence[int] | None = None,
    frame: Frame | None = None,
    progress: Progress = silent,
) -> Written:
  """Writes the targets into the edited layers, lowest first.

  Args:
    spec: the architecture.
    params: canonical parameters.
    recipe: the method.
    state: factored metrics, and keys to hold.
    edits: E edits.
    targets: their wanted states, all M.
    active: [M] bool, states to write; an edit is written whole or not at all.
    owner: [E] independent group of an edit, for changes of their own a group;
      None solves for all together.
    frame: static shapes, of these edits and others; chosen unless given.
    progress: progress display.

  Returns:
    What was written.
  """
  frame = frame or seating.frame(edits)
  states = sum(edit.stages for edit in edits)
  if owner is None:
    systems: Any = _Together(frame, states)
  else:
    systems = _Apart(frame, edits, owner)
  if owner is not None or recipe.texts:
    # Every group changes what contexts share in its own way, and every text
    # holds all of its own tokens.
    frame = frame.apart()
  climb = _Climbing(
      Climb(spec, params, recipe, edits, frame, owner=owner),
      (params, recipe, state),
      edits,
      targets,
      active,
      together=owner is None,
  )
  with progress('insert', len(recipe.layers), 'layer') as advance:
    for layer in range(recipe.layers[0], recipe.layers[-1] + 1):
      climb.halt(layer)
      change = None
      if layer in recipe.layers:
        change = climb.solve(layer, systems)
        advance(1)
      if layer < recipe.layers[-1]:
        climb.write(layer, change)
  climb.gap(climb.rows.outcome(change))
  return Written(
      climb.solved, np.stack(climb.distance), climb.active, climb.keys
  )


class _Climbing:
  """An insertion under way."""

  def __init__(
      self,
      rows: Climb,
      given: tuple[Params, Recipe, State],
      edits: Sequence[EncodedEdit],
      targets: Targets,
      active: np.ndarray,
      *,
      together: bool,
  ):
    self.rows, self._targets = rows, targets
    self._together = together
    self._params, self._recipe, self._state = given
    self._edit = np.repeat(np.arange(len(edits)), [e.stages for e in edits])
    self._length = np.linalg.norm(targets.z - targets.z0, axis=-1)
    self.halt, self.write = rows.halt, rows.write
    self.active = self._whole(active)
    self.solved: list[Change] = []
    self.distance: list[np.ndarray] = []
    self.keys: list[np.ndarray] = []

  def _whole(self, fine: np.ndarray) -> np.ndarray:
    """[M] bool, states whose edit is fine in all its states."""
    bad = np.zeros(int(self._edit.max()) + 1, bool)
    np.logical_or.at(bad, self._edit, ~fine)
    return ~bad[self._edit]

  def gap(self, now: np.ndarray) -> np.ndarray:
    """Records how far the wanted states are."""
    away = self._targets.z - now
    far = np.linalg.norm(away, axis=-1) / np.maximum(self._length, 1e-30)
    self.distance.append(far)
    return away

  def solve(self, layer: int, systems: Any) -> Change:
    """Solves for the change of a layer whose MLP rows wait for."""
    recipe, dtype = self._recipe, self._targets.z.dtype
    i = recipe.layers.index(layer)
    found = self.rows.keys(layer)
    share = recipe.spread(len(recipe.layers) - i)
    away = self.gap(self.rows.present(layer)) * share
    fine = np.isfinite(found.mean).all(1) & np.isfinite(away).all(1)
    self.active = self._whole(self.active & fine)
    self.keys.append(found.mean)
    metric = i if recipe.shared_metric is None else recipe.shared_metric
    rows, owner = self._rows(found, away, i)
    with jax.enable_x64(True):
      exact = systems.solve(self._state.metrics[metric], rows, owner, recipe)
      if recipe.keep < 1:
        kernel = self._params['layers']
        for name in (*recipe.site.split('/'), 'kernel'):
          kernel = kernel[name]
        if isinstance(exact, Factors):
          exact = exact.key.T @ exact.value
        exact = rect(exact, kernel[layer], recipe.keep)
      change = jax.tree.map(lambda x: np.asarray(x, dtype), exact)
    sound = systems.fine(change)
    if not np.all(sound):
      # A singular system: nothing of it may reach the model.
      self.active = self._whole(self.active & sound)
      change = jax.tree.map(lambda x: np.where(np.isfinite(x), x, 0), change)
      change = jax.tree.map(
          lambda x: x * systems.kept(sound, x.ndim).astype(x.dtype), change
      )
    self.solved.append(change)
    return jax.tree.map(jnp.asarray, change)

  def _rows(
      self, found: Keys, away: np.ndarray, i: int
  ) -> tuple[_Rows, np.ndarray]:
    """The system of a layer, and the edits that held keys belong to."""
    held, live = found.held, np.zeros(0, bool)
    if len(held):
      live = np.isfinite(held).all(1)
      fine = np.zeros(int(self._edit.max()) + 1, bool)
      fine[self._edit[self.active]] = True
      live &= fine[found.owner]
    owner = found.owner
    # Independent edits know nothing of earlier ones.
    joint = self._state.prior is not None and self._together
    if joint and len(self._state.prior[i]):
      prior = self._state.prior[i]
      held = np.concatenate([held, prior.astype(found.mean.dtype)])
      live = np.append(live, np.ones(len(prior), bool))
    constraint = None
    if self._recipe.constraint == 'bare':
      constraint = found.bare
    some = len(held) > 0
    rows = _Rows(
        found.mean,
        away,
        self.active,
        constraint,
        held if some else None,
        live if some else None,
    )
    return rows, owner
