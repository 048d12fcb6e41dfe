"""The one closed form behind every locate-and-edit method.

With keys K [M, F], wanted output changes R [M, D], keys C [M, F] at which R is
wanted (as a rule K itself), a preconditioner S = B B^T and a ridge r, the
kernel change

  X = S K^T (r I + C S K^T)^-1 R                          [F, D]

solves min ||X||_S^2 + 1/r ||K X - R||^2 where C is K. With r = 1 and S^-1 the
second moment of keys times lambda it is MEMIT's (S^-1 + K^T K)^-1 K^T R, by the
Woodbury identity; with r = 0 and the key of the plain prompt for C it is
ROME's. In the whitened keys A = K B and Q = C B, [M, rank],

  X = B A^T (r I + Q A^T)^-1 R       M x M, `ridge_update` gives it as factors
    = B (r I + A^T Q)^-1 A^T R       rank x rank, for more keys than the rank

and both systems are symmetric and positive semidefinite where C is K.

Preserved keys H [J, F], G = H B, are further rows of K and of C with zero
residual. In the second form they add G^T G. In the first they are eliminated,
and M rows are left: those of K without their regression on H.

  W  = A G^T (r I + G G^T)^-1,  A' = A - W G      V and Q' from Q likewise
  X  = B A'^T (r I + Q' A'^T + r V W^T)^-1 R

The matrix is the Schur complement, so written that nothing is subtracted in it
and errors of V and W enter only as a product. Where keys are almost preserved,
a Cholesky factorisation of all rows would have a thousand times the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.solve.preconditioner import (
    Factored,
    dtype_of,
    lift,
    rank,
    whiten,
)

Array = jax.Array

# Rows that are widened and whitened at one time; matrix products of so many
# rows already run at full speed.
BLOCK = 1024
# Least ridge of preserved keys, in roundings of their sum of squares.
_SOFT = 8
# The same of all keys in the coordinates of the preconditioner, as a power of a
# rounding: of what keys do not reach, rounding leaves its share over this
# one's.
_SOFT_POWER = 2 / 3


class LowRankUpdate(NamedTuple):
  """A kernel change `key.T @ value`.

  Attributes:
    key: [M, F].
    value: [M, D].
  """

  key: Array
  value: Array


def ridge_update(
    preconditioner: Factored,
    keys: Array,
    residuals: Array,
    *,
    ridge: Array | float,
    active: Array | None = None,
    constraint: Array | None = None,
    preserved: Array | None = None,
    preserved_active: Array | None = None,
) -> LowRankUpdate:
  """Solves for the change that moves the output at C by R, as exact factors.

  Beside the factors of the preconditioner it costs a Cholesky of J x J and a
  solve of M x M: Cholesky too, or LU with a constraint, which makes it
  unsymmetric. With M + J beyond the rank one system of rank x rank takes their
  place.

  Args:
    preconditioner: S.
    keys: [M, F].
    residuals: [M, D] wanted change of the output; zero rows ask that the output
      stay where it is.
    ridge: r, on the diagonal of the system; 0 makes C X = R, H X = 0 exact.
    active: [M] bool; other rows take no part, as if they were not there. A
      fixed M keeps one compiled solve for batches of any size.
    constraint: [M, F] C; `keys` unless given.
    preserved: [J, F] H, keys whose output is to stay where it is; as rows of
      `keys` with zero residual, only that the factors still have M rows, and
      that with ridge 0 they may repeat or depend on each other.
    preserved_active: [J] bool, as `active`.

  Returns:
    Factors of X in the dtype of the preconditioner, [M, F] and [M, D], zero in
    inactive rows; not finite where the system is singular.

  Source: Meng et al. 2022b (MEMIT), equation 14, in Woodbury form; with a
  constraint Meng et al. 2022a (ROME, arXiv 2202.05262), equation 2.
  """
  problem = _Problem.of(
      (preconditioner, keys, residuals),
      active,
      constraint,
      (preserved, preserved_active),
  )
  count = keys.shape[0]
  if count + _count(problem.preserved) <= rank(preconditioner):
    free, value = _solve_rows(problem, ridge=ridge, block=None)
    return LowRankUpdate(lift(preconditioner, free), value)
  # Many preserved keys: the columns of (r I + A^T Q + G^T G)^-1 A^T.
  unit = problem._replace(residuals=jnp.eye(count, dtype=residuals.dtype))
  free = _solve_coordinates(unit, ridge=ridge, block=BLOCK)
  value = _masked(residuals, problem.active).astype(free.dtype)
  return LowRankUpdate(lift(preconditioner, free.T), value)


def ridge_dense(
    preconditioner: Factored,
    keys: Array,
    residuals: Array,
    *,
    ridge: Array | float,
    active: Array | None = None,
    constraint: Array | None = None,
    preserved: Array | None = None,
    preserved_active: Array | None = None,
    block: int = BLOCK,
) -> Array:
  """Solves for the same change as `ridge_update`, as one matrix.

  For so many keys that factors are larger than the matrix. The smaller of the
  two systems is solved: M x M and J x J up to M + J = rank, rank x rank beyond.
  Keys may come narrower than the preconditioner (f32, where it is f64): they
  are widened and whitened a block at a time, and K and H are never put
  together.

  Memory beside arguments and result, in numbers of the preconditioner's dtype,
  is about

    M + J <= rank    (M + J) rank + 2 M^2 + 2 J^2
    M + J > rank     2 rank^2 + 2 rank D

  and `block` (2 F + rank) of one block; with J or a constraint M rank more. At
  F 16,384 and D 4,096 in f64 the preconditioner is 2.1 GB and the result 0.5
  GB; beside them M = 3,000 takes 0.6 GB, M = 10,000 2.9 GB and M = 20,000 5.1
  GB.

  Args:
    preconditioner: S.
    keys: [M, F], M at least 1.
    residuals: [M, D] wanted change of the output; zero rows ask that the output
      stay where it is.
    ridge: r. With 0, C X = R and H X = 0 are exact up to as many active rows as
      the rank (to about 1e-4 where M + J is above it); beyond, X is the
      least-squares solution where C is K.
    active: [M] bool; other rows take no part, as if they were not there.
    constraint: [M, F] C; `keys` unless given.
    preserved: [J, F] H, keys whose output is to stay where it is.
    preserved_active: [J] bool, as `active`.
    block: rows whitened at one time.

  Returns:
    [F, D] X in the dtype of the preconditioner; not finite where the system is
    singular, with ridge 0 and no preserved keys also where M is above the rank
    and fewer rows are active.

  Source: as `ridge_update`; the rank x rank form is the normal equations.
  """
  problem = _Problem.of(
      (preconditioner, keys, residuals),
      active,
      constraint,
      (preserved, preserved_active),
  )
  if keys.shape[0] + _count(problem.preserved) <= rank(preconditioner):
    free, value = _solve_rows(problem, ridge=ridge, block=block)
    found = free.T @ value
  else:
    found = _solve_coordinates(problem, ridge=ridge, block=block)
  return lift(preconditioner, found.T).T


class _Problem(NamedTuple):
  """What a solve was given, every mask written out."""

  preconditioner: Factored
  keys: Array  # [M, F]
  residuals: Array  # [M, D]
  active: Array  # [M]
  constraint: Array | None  # [M, F]
  preserved: Array | None  # [J, F], J at least 1
  preserved_active: Array | None  # [J]

  @classmethod
  def of(
      cls,
      system: tuple[Factored, Array, Array],
      active: Array | None,
      constraint: Array | None,
      preserved: tuple[Array | None, Array | None],
  ) -> _Problem:
    """Fills in what was left out."""
    preconditioner, keys, residuals = system
    rows, on = preserved if _count(preserved[0]) else (None, None)
    every = lambda rows: jnp.ones(rows.shape[0], bool)
    active = every(keys) if active is None else active
    if rows is not None and on is None:
      on = every(rows)
    return cls(preconditioner, keys, residuals, active, constraint, rows, on)

  def whitened(
      self, rows: Array, active: Array, block: int | None = None
  ) -> Array:
    """Whitens rows, [rows, rank], block by block where told."""
    if block is None:
      return whiten(self.preconditioner, _masked(rows, active))
    block = min(block, rows.shape[0])

    def write(done: Array, first: Array, fresh: Array) -> Array:
      del fresh  # a row that is repeated is the same again
      on = _part(active, first, block)
      part = whiten(self.preconditioner, _masked(_part(rows, first, block), on))
      return jax.lax.dynamic_update_slice_in_dim(done, part, first, 0)

    empty = jnp.zeros(
        (rows.shape[0], rank(self.preconditioner)),
        dtype_of(self.preconditioner),
    )
    return _fold(write, empty, rows.shape[0], block)


def _solve_rows(
    problem: _Problem, *, ridge: Array | float, block: int | None
) -> tuple[Array, Array]:
  """A' and (r I + Q' A'^T + j V W^T)^-1 R, j the ridge of preserved keys."""
  _, keys, residuals, active, constraint, preserved, preserved_active = problem
  free = problem.whitened(keys, active, block)
  there = free
  if constraint is not None:
    there = problem.whitened(constraint, active, block)
  blend = 0
  if preserved is not None:
    rows = problem.whitened(preserved, preserved_active, block)
    gram = rows @ rows.T
    # Texts share openings, so preserved keys repeat: without any ridge their
    # system is singular although the answer is not.
    least = _SOFT * jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    soft = jnp.maximum(ridge, least)
    factor = _factor(gram, jnp.where(preserved_active, soft, 1))
    weigh = lambda x: jax.scipy.linalg.cho_solve(factor, rows @ x.T).T
    mine = also = weigh(free)  # W, V
    if constraint is not None:
      also = weigh(there)
    blend = soft * (also @ mine.T)
    free, there = free - mine @ rows, there - also @ rows
  residuals = _masked(residuals, active).astype(free.dtype)
  system, diagonal = there @ free.T + blend, jnp.where(active, ridge, 1)
  symmetric = constraint is None
  return free, _solve(system, residuals, diagonal, symmetric=symmetric)


def _solve_coordinates(
    problem: _Problem, *, ridge: Array | float, block: int
) -> Array:
  """(r I + A^T Q + G^T G)^-1 A^T R, [rank, D], for many keys."""
  (
      preconditioner,
      keys,
      residuals,
      active,
      constraint,
      preserved,
      preserved_active,
  ) = problem
  size, dtype = rank(preconditioner), dtype_of(preconditioner)

  def cut(first: Array, fresh: Array, active: Array) -> Any:
    on = fresh & _part(active, first, fresh.shape[0])
    return lambda rows: _masked(_part(rows, first, fresh.shape[0]), on)

  def add(sums: tuple[Array, Array], first: Array, fresh: Array) -> Any:
    part = cut(first, fresh, active)
    whitened = whiten(preconditioner, part(keys))
    there = whitened
    if constraint is not None:
      there = whiten(preconditioner, part(constraint))
    wanted = part(residuals).astype(dtype)
    return sums[0] + whitened.T @ there, sums[1] + whitened.T @ wanted

  def hold(gram: Array, first: Array, fresh: Array) -> Array:
    whitened = whiten(
        preconditioner, cut(first, fresh, preserved_active)(preserved)
    )
    return gram + whitened.T @ whitened

  zeros = lambda width: jnp.zeros((size, width), dtype)
  start = zeros(size), zeros(residuals.shape[1])
  count = keys.shape[0]
  gram, moved = _fold(add, start, count, min(block, count))
  if preserved is not None:
    gram = _fold(hold, gram, _count(preserved), min(block, _count(preserved)))
    # They repeat, and may all together leave directions free.
    least = jnp.finfo(dtype).eps ** _SOFT_POWER * jnp.trace(gram)
    ridge = jnp.maximum(ridge, least)
  diagonal = jnp.full(size, ridge)
  return _solve(gram, moved, diagonal, symmetric=constraint is None)


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


def _count(rows: Array | None) -> int:
  """How many rows there are."""
  return 0 if rows is None else rows.shape[0]


def _part(rows: Array, first: Array, block: int) -> Array:
  """`block` rows from `first`."""
  return jax.lax.dynamic_slice_in_dim(rows, first, block)


def _masked(rows: Array, active: Array) -> Array:
  """Zero in the rows that take no part, whatever they hold."""
  return jnp.where(active[:, None], rows, 0)


def _factor(gram: Array, diagonal: Array) -> tuple[Array, bool]:
  """Cholesky of gram + diag(diagonal) for `cho_solve`; NaN where singular."""
  system = gram + jnp.diag(diagonal.astype(gram.dtype))
  # Only the lower triangle is read, so nothing has to be made symmetric.
  return jax.lax.linalg.cholesky(system, symmetrize_input=False), True


def _solve(
    gram: Array, right: Array, diagonal: Array, *, symmetric: bool
) -> Array:
  """Solves (gram + diag(diagonal)) X = right."""
  if symmetric:
    return jax.scipy.linalg.cho_solve(_factor(gram, diagonal), right)
  return jnp.linalg.solve(gram + jnp.diag(diagonal.astype(gram.dtype)), right)
