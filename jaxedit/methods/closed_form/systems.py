"""The linear systems of a layer's keys and residuals, and their solution.

All edits in one system, or independent groups of edits side by side, each with
a system of its own. Shapes are padded with inactive rows, so that batches of
other sizes do not recompile. Rows are transferred in their own dtype and
widened on the device. A system without a finite solution gives a zero delta.

Axes as in `jaxedit.types`: M targets of all edits, M' of a group, J preserved
keys, F key width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching.buckets import round_up
from jaxedit.batching.plan import BatchPlan
from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.methods.closed_form.sweep import LayerDelta
from jaxedit.solve.preconditioner import Factored
from jaxedit.solve.ridge import LowRankUpdate, ridge_dense, ridge_update
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array

# Memory of the independent groups that are solved for in one call, bytes.
_GROUP_BYTES = 2**30


class Rows(NamedTuple):
  """Rows of one system, or of several side by side on an axis of groups."""

  keys: np.ndarray  # [M, F]
  residuals: np.ndarray  # [M, D]
  active: np.ndarray  # [M] bool
  constraint: np.ndarray | None  # [M, F]
  preserved: np.ndarray | None  # [J, F]
  preserved_active: np.ndarray | None  # [J] bool


def pays(rows: int, keys: int, width: int) -> bool:
  """Says whether factors of `rows` pairs are smaller than the matrix."""
  return rows * (keys + width) < keys * width


@jax.jit
def _solve_factors(
    preconditioner: Factored, rows: Rows, ridge: Array
) -> LowRankUpdate:
  return ridge_update(preconditioner, **_named(rows), ridge=ridge)


@jax.jit
def _solve_dense(preconditioner: Factored, rows: Rows, ridge: Array) -> Array:
  return ridge_dense(preconditioner, **_named(rows), ridge=ridge)


@jax.jit
def _solve_groups(
    preconditioner: Factored, rows: Rows, ridge: Array
) -> LowRankUpdate:
  """Solves independent systems, [groups, M', .]."""
  one = lambda rows, ridge: ridge_update(
      preconditioner, **_named(rows), ridge=ridge
  )
  return jax.vmap(one)(rows, ridge)


def _named(rows: Rows) -> dict[str, Any]:
  return {name: x for name, x in rows._asdict().items() if x is not None}


class Joint:
  """All edits in one system."""

  def __init__(self, plan: BatchPlan, states: int):
    # Smaller batches have inactive rows and do not recompile.
    self._rows, self._states = max(plan.states, states), states

  def solve(
      self,
      preconditioner: Factored,
      rows: Rows,
      group: np.ndarray,
      recipe: Recipe,
  ) -> LayerDelta:
    """Solves for the one delta of a layer; `group` is not used."""
    del group
    full = self._rows
    preserved = 0 if rows.preserved is None else len(rows.preserved)
    # The ridge depends on active rows only.
    sizes = [
        int(x.sum())
        for x in (rows.active, rows.preserved_active)
        if x is not None
    ]
    dense = not pays(full, rows.keys.shape[1], rows.residuals.shape[1])
    pad = lambda size: lambda x: None if x is None else _pad(x, size)
    rows = Rows(
        *map(pad(full), rows[:4]), *map(pad(_padded(preserved)), rows[4:])
    )
    solve = _solve_dense if dense else _solve_factors
    ridge = recipe.ridge_of(*sizes)
    return solve(preconditioner, jax.tree.map(jnp.asarray, rows), ridge)

  def sound(self, change: LayerDelta) -> tuple[LayerDelta, np.ndarray]:
    """The delta, zero if it is not finite, and the [M] targets it inserts."""
    fine = all(np.isfinite(x).all() for x in jax.tree.leaves(change))
    if not fine:
      change = jax.tree.map(np.zeros_like, change)
    return change, np.full(self._states, fine)


class Independent:
  """Independent groups of edits, each a system of its own."""

  def __init__(self, plan: BatchPlan, edits: Sequence[EncodedEdit], group: Any):
    self._group = np.asarray(group)
    self._number = np.repeat(self._group, [edit.stages for edit in edits])
    self._groups = int(self._group.max()) + 1
    self._most = max(plan.batch, self._groups)
    self._index = _members(self._number, self._groups, plan.stages)

  def solve(
      self,
      preconditioner: Factored,
      rows: Rows,
      group: np.ndarray,
      recipe: Recipe,
  ) -> LowRankUpdate:
    """Solves for all groups' deltas; `group` [J] edits of preserved keys."""
    index, preserved = self._index, None
    sizes = [np.bincount(self._number, rows.active, self._groups)]
    if rows.preserved is not None:
      mine = self._group[group]
      sizes.append(np.bincount(mine, rows.preserved_active, self._groups))
      preserved = _members(mine, self._groups, 1)
      idle = _padded(preserved.shape[1]) - preserved.shape[1]
      preserved = np.pad(preserved, [(0, 0), (0, idle)], constant_values=-1)
    ridge = [recipe.ridge_of(*map(int, some)) for some in zip(*sizes)]
    ridge = np.array(ridge, np.float64)
    size = index.shape[1] + (0 if preserved is None else preserved.shape[1])
    step = max(1, _GROUP_BYTES // (32 * size * rows.keys.shape[1]))
    step = min(step, self._most)
    preconditioner = jax.tree.map(
        jnp.asarray, preconditioner
    )  # to the device once
    found = []
    for at in range(0, self._groups, step):
      # The last systems are inactive where there are no more groups.
      cut = lambda x: _fill(x[at : at + step], step)  # pylint: disable=cell-var-from-loop
      part = _take(
          rows, cut(index), None if preserved is None else cut(preserved)
      )
      part = jax.tree.map(jnp.asarray, part)
      shares = np.resize(ridge[at : at + step], step)
      solved = _solve_groups(preconditioner, part, jnp.asarray(shares))
      found.append(jax.tree.map(np.asarray, solved))
    return LowRankUpdate(
        *(np.concatenate(x)[: self._groups] for x in zip(*found))
    )

  def sound(self, change: LowRankUpdate) -> tuple[LowRankUpdate, np.ndarray]:
    """The deltas, zero where not finite, and the [M] targets they insert."""
    fine = np.logical_and(*(np.isfinite(x).all(axis=(1, 2)) for x in change))
    kept = (np.where(fine[:, None, None], x, 0) for x in change)
    return LowRankUpdate(*kept), fine[self._number]


def _fill(index: np.ndarray, rows: int) -> np.ndarray:
  """Adds rows of -1."""
  idle = [(0, rows - len(index)), (0, 0)]
  return np.pad(index, idle, constant_values=-1)


def _members(group: np.ndarray, groups: int, least: int) -> np.ndarray:
  """[groups, M'] the rows of each group, -1 for none."""
  counts = np.bincount(group, minlength=groups)
  index = np.full((groups, max(least, int(counts.max(initial=0)))), -1)
  for g in np.flatnonzero(counts):
    rows = np.flatnonzero(group == g)
    index[g, : len(rows)] = rows
  return index


def _take(rows: Rows, index: np.ndarray, preserved: np.ndarray | None) -> Rows:
  """The rows of groups, [groups, M', .]; inactive where there is none."""

  def pick(x: np.ndarray | None, index: np.ndarray) -> np.ndarray | None:
    if x is None:
      return None
    some = x[np.maximum(index, 0)]
    none = (index < 0).reshape(*index.shape, *[1] * (x.ndim - 1))
    return np.where(none, np.zeros((), x.dtype), some)

  first = (pick(x, index) for x in rows[:4])
  if preserved is None:
    return Rows(*first, None, None)
  return Rows(*first, *(pick(x, preserved) for x in rows[4:]))


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _padded(preserved: int) -> int:
  """Rounds up, so that a few more preserved keys do not recompile."""
  return round_up(preserved) if preserved else 0
