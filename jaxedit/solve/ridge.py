"""The one closed form behind every locate-and-edit method.

With keys K [M, F], wanted output changes R [M, D], a metric S = B B^T and a
ridge r, the kernel change

  X = S K^T (r I + K S K^T)^-1 R                          [F, D]

solves min ||X||_S^2 + 1/r ||K X - R||^2. With S = (lambda C)^-1 and r = 1 it is
MEMIT's (lambda C + K^T K)^-1 K^T R by the Woodbury identity. In the whitened
keys A = K B, [M, rank],

  X = B A^T (r I + A A^T)^-1 R         M x M, `ridge_update` gives it as factors
    = B (r I + A^T A)^-1 A^T R         rank x rank, for more keys than the rank

and both systems are symmetric and positive semidefinite by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.solve.metric import Metric, lift, rank, whiten

Array = jax.Array

# Rows that are widened and whitened at one time; matrix products of so many
# rows already run at full speed.
BLOCK = 1024


class Factors(NamedTuple):
  """A kernel change `key.T @ value`.

  Attributes:
    key: [M, F].
    value: [M, D].
  """

  key: Array
  value: Array


def ridge_update(
    metric: Metric,
    keys: Array,
    residuals: Array,
    *,
    ridge: Array | float,
    active: Array | None = None,
) -> Factors:
  """Solves for the change that moves the output at K by R, as exact factors.

  Args:
    metric: S.
    keys: [M, F].
    residuals: [M, D] wanted change of the output; zero rows ask that the output
      stay where it is.
    ridge: r, on the diagonal of the M x M system; 0 makes K X = R exact.
    active: [M] bool; other rows take no part, as if they were not there. A
      fixed M keeps one compiled solve for batches of any size.

  Returns:
    Factors of X in the dtype of the metric, zero in inactive rows; NaN where
    the system is singular.

  Source: Meng et al. 2022b (MEMIT), equation 14, in Woodbury form.
  """
  active = _all_rows(keys) if active is None else active
  whitened = whiten(metric, _masked(keys, active))
  residuals = _masked(residuals, active).astype(whitened.dtype)
  diagonal = jnp.where(active, ridge, 1)
  value = _solve(whitened @ whitened.T, residuals, diagonal)
  return Factors(lift(metric, whitened), value)


def ridge_dense(
    metric: Metric,
    keys: Array,
    residuals: Array,
    *,
    ridge: Array | float,
    active: Array | None = None,
    block: int = BLOCK,
) -> Array:
  """Solves for the same change as `ridge_update`, as one matrix.

  For so many keys that factors are larger than the matrix. The smaller of the
  two systems is solved: M x M up to the rank of the metric, rank x rank beyond.
  Keys may come narrower than the metric (f32, where it is f64): they are widened
  and whitened a block at a time.

  Memory beside arguments and result, in numbers of the metric's dtype, is about

    M <= rank    M rank + 2 M^2
    M > rank     2 rank^2 + 2 rank D

  and `block` (2 F + rank) of one block. At F 16,384 and D 4,096 in f64 the
  metric is 2.1 GB and the result 0.5 GB; beside them M = 3,000 takes 0.6 GB,
  M = 10,000 2.9 GB and M = 20,000 5.1 GB.

  Args:
    metric: S.
    keys: [M, F], M at least 1.
    residuals: [M, D] wanted change of the output; zero rows ask that the output
      stay where it is.
    ridge: r. With 0, K X = R is exact up to as many active rows as the rank
      and the least-squares solution beyond.
    active: [M] bool; other rows take no part, as if they were not there.
    block: rows whitened at one time.

  Returns:
    [F, D] X in the dtype of the metric; NaN where the system is singular, with
    ridge 0 also where M is above the rank and fewer rows are active.

  Source: as `ridge_update`; the rank x rank form is the normal equations.
  """
  active = _all_rows(keys) if active is None else active
  problem = _Problem(metric, keys, residuals, active)
  few = keys.shape[0] <= rank(metric)
  solve = _solve_keys if few else _solve_coordinates
  found = solve(problem, ridge=ridge, block=min(block, keys.shape[0]))
  return lift(metric, found.T).T


class _Problem(NamedTuple):
  """What `ridge_dense` was given."""

  metric: Metric
  keys: Array  # [M, F]
  residuals: Array  # [M, D]
  active: Array  # [M]

  def rows(self, first: Array, block: int) -> tuple[Array, Array]:
    """Whitened keys and residuals of `block` rows from `first`."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, first, block)
    active = part(self.active)
    whitened = whiten(self.metric, _masked(part(self.keys), active))
    residuals = _masked(part(self.residuals), active)
    return whitened, residuals.astype(whitened.dtype)


def _fold(
    step: Callable[[Any, Array, Array], Any], start: Any, rows: int, block: int
) -> Any:
  """Folds step(carry, first, fresh) over blocks of rows.

  No row is padded: the last block ends with the last row. Where it repeats rows
  of the block before, `fresh`, [block], is False.
  """

  def body(i: Array, carry: Any) -> Any:
    first = jnp.minimum(i * block, rows - block)
    return step(carry, first, first + jnp.arange(block) >= i * block)

  return jax.lax.fori_loop(0, -(-rows // block), body, start)


def _solve_keys(
    problem: _Problem, *, ridge: Array | float, block: int
) -> Array:
  """A^T (r I + A A^T)^-1 R, [rank, D], for few keys."""
  metric, keys, residuals, active = problem

  def write(whitened: Array, first: Array, fresh: Array) -> Array:
    del fresh  # a row that is repeated is the same again
    part, _ = problem.rows(first, block)
    return jax.lax.dynamic_update_slice_in_dim(whitened, part, first, 0)

  empty = jnp.zeros((keys.shape[0], rank(metric)), metric[0].dtype)
  whitened = _fold(write, empty, keys.shape[0], block)
  residuals = _masked(residuals, active).astype(whitened.dtype)
  system = whitened @ whitened.T
  return whitened.T @ _solve(system, residuals, jnp.where(active, ridge, 1))


def _solve_coordinates(
    problem: _Problem, *, ridge: Array | float, block: int
) -> Array:
  """(r I + A^T A)^-1 A^T R, [rank, D], for many keys."""
  metric, keys, residuals, _ = problem
  size, dtype = rank(metric), metric[0].dtype

  def add(
      sums: tuple[Array, Array], first: Array, fresh: Array
  ) -> tuple[Array, Array]:
    whitened, wanted = problem.rows(first, block)
    whitened = _masked(whitened, fresh)
    return sums[0] + whitened.T @ whitened, sums[1] + whitened.T @ wanted

  zeros = lambda width: jnp.zeros((size, width), dtype)
  start = zeros(size), zeros(residuals.shape[1])
  gram, moved = _fold(add, start, keys.shape[0], block)
  return _solve(gram, moved, jnp.full(size, ridge))


def _all_rows(keys: Array) -> Array:
  """Every row takes part, [M]."""
  return jnp.ones(keys.shape[0], bool)


def _masked(rows: Array, active: Array) -> Array:
  """Zero in the rows that take no part, whatever they hold."""
  return jnp.where(active[:, None], rows, 0)


def _solve(gram: Array, right: Array, diagonal: Array) -> Array:
  """Solves (gram + diag(diagonal)) X = right; NaN where that is singular."""
  system = gram + jnp.diag(diagonal.astype(gram.dtype))
  # Only the lower triangle is read, so nothing has to be made symmetric.
  factor = jax.lax.linalg.cholesky(system, symmetrize_input=False)
  return jax.scipy.linalg.cho_solve((factor, True), right)
