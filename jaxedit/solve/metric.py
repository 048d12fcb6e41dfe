"""Metrics on key space, factored once per (model, layer, corpus).

A metric S says how freely a kernel may change along a direction of key space.
Every closed form needs it only through a square root, S = B B^T with B [F, r]:
`whiten` takes keys to A = K B, in whose r coordinates S is the identity, and
`lift` takes such coordinates back to key space, A B^T = K S.

  covariance   S = (lambda C)^-1     C the average of k k^T over text (MEMIT)
  null space   S = U U^T             U an orthonormal basis, r <= F (AlphaEdit)

Factor in float64: run under `jax.enable_x64(True)`, as `edit` does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Covariance(NamedTuple):
  """S = (lambda C)^-1, so B = U^-1.

  The factor is upper triangular for the sake of memory: solvers read columns,
  and the transpose of an array that lies in rows is free, while a lower factor
  would be copied by every solve.

  Attributes:
    factor: [F, F] upper triangular U, U^T U = lambda C.
  """

  factor: Array


class NullSpace(NamedTuple):
  """S = U U^T, the projection onto the keys that may be changed at will.

  Attributes:
    basis: [F, r] orthonormal columns U.
  """

  basis: Array


Metric = Covariance | NullSpace


@jax.jit
def covariance(gram: Array, weight: Array | float) -> Covariance:
  """Factors the metric of an average second moment.

  Args:
    gram: [F, F] average of k k^T, uncentred.
    weight: lambda, how many virtual tokens of text the preserved keys count for
      (tokens).

  Returns:
    The metric; its factor holds NaN where `gram` is not positive definite.

  Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), equation 15.
  """
  return Covariance(jnp.linalg.cholesky(weight * gram).T)


def rank(metric: Metric) -> int:
  """The number r of coordinates of a whitened key."""
  (root,) = metric
  return root.shape[-1]


def whiten(metric: Metric, keys: Array) -> Array:
  """Takes keys to the coordinates in which a metric is the identity.

  Args:
    metric: S = B B^T.
    keys: [M, F], any float dtype.

  Returns:
    [M, r] A = K B in the dtype of the metric, so that A A^T = K S K^T.
  """
  (root,) = metric
  keys = keys.astype(root.dtype)
  if isinstance(metric, NullSpace):
    return keys @ root
  return _solve_transposed(root, keys, transpose=False)


def lift(metric: Metric, whitened: Array) -> Array:
  """Takes whitened coordinates to key space, the adjoint of `whiten`.

  Args:
    metric: S = B B^T.
    whitened: [M, r] A.

  Returns:
    [M, F] A B^T; K S where A = K B.
  """
  (root,) = metric
  if isinstance(metric, NullSpace):
    return whitened @ root.T
  return _solve_transposed(root, whitened, transpose=True)


def _solve_transposed(upper: Array, rows: Array, *, transpose: bool) -> Array:
  """Solves X U = rows, or X U^T = rows, for U upper triangular."""
  solved = jax.lax.linalg.triangular_solve(
      upper.T, rows.T, left_side=True, lower=True, transpose_a=transpose
  )
  return solved.T
