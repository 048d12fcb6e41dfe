"""Metrics on key space, factored once per (model, layer, corpus).

A metric S says how freely a kernel may change along a direction of key space.
Every closed form needs it only through a square root, S = B B^T with B [F, r]:
`whiten` takes keys to A = K B, in whose r coordinates S is the identity, and
`lift` takes such coordinates back to key space, A B^T = K S.

  covariance   S = (lambda C)^-1     C the average of k k^T over text (MEMIT)
  null space   S = U U^T             U an orthonormal basis, r <= F (AlphaEdit)
  identity     S = I                 every direction is as free as any other

Factor in float64: run under `jax.enable_x64(True)`, as `edit` does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


class Identity(NamedTuple):
  """S = I, which knows nothing of the keys of text.

  Attributes:
    ones: [F] the diagonal of S, which tells size and dtype.
  """

  ones: Array


Preconditioner = Covariance | NullSpace | Identity


@jax.jit
def covariance(gram: Array, weight: Array | float) -> Covariance:
  """LowRankUpdate the metric of an average second moment.

  Args:
    gram: [F, F] average of k k^T, uncentred.
    weight: lambda, how many virtual tokens of text the preserved keys count for
      (tokens).

  Returns:
    The metric; its factor holds NaN where `gram` is not positive definite.

  Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), equation 15.
  """
  return Covariance(jnp.linalg.cholesky(weight * gram).T)


def null_space(
    gram: Array, *, share: float | None = None, threshold: float | None = None
) -> NullSpace:
  """Finds the directions that keys of text hardly have.

  The rank depends on the data, so this is not for the inside of a jit.

  Args:
    gram: [F, F] average of k k^T, uncentred, exactly symmetric.
    share: in [0, 1]; the fewest leading eigenvectors that together hold at
      least this share of the trace are ruled out. Unlike a threshold it does
      not depend on how large the keys of a model are.
    threshold: rule out eigenvectors whose eigenvalue is not below this instead,
      as published (0.02; squared units of a key). `share` is then not used.

  Returns:
    The metric, of rank F where nothing is ruled out; its basis is [F, F] NaN
    where `gram` holds numbers that are not finite.

  Raises:
    ValueError: neither rule is given, the share is no share, or nothing is left
      that may change.

  Source: Fang et al. 2024 (AlphaEdit, arXiv 2410.02355), section 3.2. The share
  is ours.
  """
  if threshold is None and (share is None or not 0 <= share <= 1):
    raise ValueError(
        f'share is {share} and threshold is {threshold}; give a share of the '
        'trace between 0 and 1, or a threshold for the eigenvalues'
    )
  eigenvalues, vectors = _eigh(gram)  # ascending
  eigenvalues = np.asarray(eigenvalues)
  if not np.isfinite(eigenvalues).all():
    return NullSpace(jnp.full_like(gram, jnp.nan))
  if threshold is None:
    # What rounding leaves below zero holds nothing.
    preserved = np.cumsum(np.maximum(eigenvalues[::-1], 0))
    dropped = np.searchsorted(np.append(0, preserved), share * preserved[-1])
    kept, rule = len(eigenvalues) - dropped, f'share {share} of the trace'
  else:
    kept, rule = (eigenvalues < threshold).sum(), f'threshold {threshold}'
  if not kept:
    raise ValueError(
        f'{rule} rules out all {len(eigenvalues)} directions of key space (the '
        f'least eigenvalue is {eigenvalues[0]:.3g}), so nothing may change; '
        'lower the share or raise the threshold'
    )
  return NullSpace(vectors[:, : int(kept)])


def identity(gram: Array) -> Identity:
  """Makes the metric that needs no moments.

  Args:
    gram: [F, F], of which size and dtype are taken; no number of it is read.

  Returns:
    S = I.
  """
  return Identity(jnp.ones(gram.shape[0], gram.dtype))


def rank(preconditioner: Preconditioner) -> int:
  """The number r of coordinates of a whitened key."""
  (root,) = preconditioner
  return root.shape[-1]


def whiten(preconditioner: Preconditioner, keys: Array) -> Array:
  """Takes keys to the coordinates in which a metric is the identity.

  Args:
    preconditioner: S = B B^T.
    keys: [M, F], any float dtype.

  Returns:
    [M, r] A = K B in the dtype of the metric, so that A A^T = K S K^T.
  """
  (root,) = preconditioner
  keys = keys.astype(root.dtype)
  if isinstance(preconditioner, Identity):
    return keys
  if isinstance(preconditioner, NullSpace):
    return keys @ root
  return _solve_transposed(root, keys, transpose=False)


def lift(preconditioner: Preconditioner, whitened: Array) -> Array:
  """Takes whitened coordinates to key space, the adjoint of `whiten`.

  Args:
    preconditioner: S = B B^T.
    whitened: [M, r] A.

  Returns:
    [M, F] A B^T; K S where A = K B.
  """
  (root,) = preconditioner
  if isinstance(preconditioner, Identity):
    return whitened
  if isinstance(preconditioner, NullSpace):
    return whitened @ root.T
  return _solve_transposed(root, whitened, transpose=True)


@jax.jit
def _eigh(gram: Array) -> tuple[Array, Array]:
  """Eigenvalues in ascending order and their vectors, in columns."""
  return jnp.linalg.eigh(gram, symmetrize_input=False)


def _solve_transposed(upper: Array, rows: Array, *, transpose: bool) -> Array:
  """Solves X U = rows, or X U^T = rows, for U upper triangular."""
  solved = jax.lax.linalg.triangular_solve(
      upper.T, rows.T, left_side=True, lower=True, transpose_a=transpose
  )
  return solved.T
