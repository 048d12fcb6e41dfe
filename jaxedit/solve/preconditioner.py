"""Preconditioners of key space, factored once per (model, layer, corpus).

A preconditioner S says how freely a kernel may change along a direction of key
space. Every closed form needs it only through a square root, S = B B^T with
B [F, r]: `whiten` takes keys to A = K B, in whose r coordinates S is the identity,
and `lift` takes such coordinates back to key space, A B^T = K S.

  Covariance   S = (lambda C)^-1     C the average of k k^T over text (MEMIT)
  NullSpace    S = U U^T             U an orthonormal basis, r <= F (AlphaEdit)
  Identity     S = I                 every direction is as free as any other

These three are settings; `factor` makes the factored form that solves take. Keys
whose output must stay, known by their Gram matrix in whitened coordinates, go
into the factored form by `preserve`: S becomes B (I + G / ridge)^-1 B^T.

Factor in float64: run under `jax.enable_x64(True)`, as the editors do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# Share of the largest eigenvalue that rounding of f32 sums may put below 0.
_ROUNDING = 1e-4


class CovarianceFactor(NamedTuple):
  """S = (lambda C)^-1, so B = U^-1.

  The factor is upper triangular for the sake of memory: solvers read columns,
  and the transpose of an array that lies in rows is free, while a lower factor
  would be copied by every solve.

  Attributes:
    factor: [F, F] upper triangular U, U^T U = lambda C.
  """

  factor: Array


class NullSpaceBasis(NamedTuple):
  """S = U U^T, the projection onto the keys that may be changed at will.

  Attributes:
    basis: [F, r] orthonormal columns U.
  """

  basis: Array


class IdentityDiagonal(NamedTuple):
  """S = I, which knows nothing of the keys of text.

  Attributes:
    ones: [F] the diagonal of S, which tells size and dtype.
  """

  ones: Array


class Preserved(NamedTuple):
  """S = B (I + G / ridge)^-1 B^T, with preserved keys of Gram matrix G.

  Attributes:
    base: the factored preconditioner of B.
    factor: [r, r] upper triangular U, U^T U = I + G / ridge.
  """

  base: CovarianceFactor | NullSpaceBasis | IdentityDiagonal
  factor: Array


Factored = CovarianceFactor | NullSpaceBasis | IdentityDiagonal | Preserved


@dataclasses.dataclass(frozen=True)
class Covariance:
  """S = (weight C)^-1, C the average second moment of keys.

  Attributes:
    weight: lambda, how many virtual tokens of text the moments count for.
  """

  weight: float
  moments: ClassVar[bool] = True

  def factor(self, gram: Array) -> CovarianceFactor:
    """Factors the preconditioner of an average second moment [F, F]."""
    return covariance(gram, self.weight)


@dataclasses.dataclass(frozen=True)
class NullSpace:
  """S projects onto the directions that keys of text hardly have.

  Attributes:
    share: see `null_space`.
    threshold: see `null_space`.
  """

  share: float | None = None
  threshold: float | None = None
  moments: ClassVar[bool] = True

  def factor(self, gram: Array) -> NullSpaceBasis:
    """Finds the basis for an average second moment [F, F]."""
    return null_space(gram, share=self.share, threshold=self.threshold)


@dataclasses.dataclass(frozen=True)
class Identity:
  """S = I, which needs no moments."""

  moments: ClassVar[bool] = False

  def factor(self, gram: Array) -> IdentityDiagonal:
    """Takes size and dtype of a [F, F] array."""
    return identity(gram)


Preconditioner = Covariance | NullSpace | Identity


def preserve(factored: Factored, gram: Array, ridge: float) -> Preserved:
  """Adds keys whose output must stay.

  Args:
    factored: the preconditioner without them, S = B B^T.
    gram: [r, r] G = A^T A of their whitened keys A = K B.
    ridge: r of the solves that follow, above 0.

  Returns:
    The preconditioner with which a solve over other keys alone gives what a
    solve over all of them would.
  """
  system = jnp.eye(gram.shape[0], dtype=gram.dtype) + gram / ridge
  return Preserved(factored, jnp.linalg.cholesky(system).T)


@jax.jit
def covariance(gram: Array, weight: Array | float) -> CovarianceFactor:
  """Factors the preconditioner of an average second moment.

  Args:
    gram: [F, F] average of k k^T, uncentred.
    weight: lambda, how many virtual tokens of text the preserved keys count for
      (tokens).

  Returns:
    The preconditioner; its factor holds NaN where `gram` is not positive definite.

  Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), equation 15.
  """
  return CovarianceFactor(jnp.linalg.cholesky(weight * gram).T)


def null_space(
    gram: Array, *, share: float | None = None, threshold: float | None = None
) -> NullSpaceBasis:
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
    The preconditioner, of rank F where nothing is ruled out; its basis is [F, F] NaN
    where `gram` holds numbers that are not finite.

  Raises:
    ValueError: neither rule is given, the share is no share, an eigenvalue is
      negative, or nothing is left that may change.

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
    return NullSpaceBasis(jnp.full_like(gram, jnp.nan))
  if eigenvalues[0] < -_ROUNDING * abs(eigenvalues).max():
    raise ValueError(
        f'the least eigenvalue is {eigenvalues[0]:.3g} and the largest'
        f' {eigenvalues[-1]:.3g}; an average of k k^T has none below 0, so collect'
        ' the second moments again'
    )
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
  return NullSpaceBasis(vectors[:, : int(kept)])


def identity(gram: Array) -> IdentityDiagonal:
  """Makes the preconditioner that needs no moments.

  Args:
    gram: [F, F], of which size and dtype are taken; no number of it is read.

  Returns:
    S = I.
  """
  return IdentityDiagonal(jnp.ones(gram.shape[0], gram.dtype))


def dtype_of(preconditioner: Factored) -> Any:
  """The dtype of a factored preconditioner."""
  return jax.tree.leaves(preconditioner)[0].dtype


def rank(preconditioner: Factored) -> int:
  """The number r of coordinates of a whitened key."""
  if isinstance(preconditioner, Preserved):
    return rank(preconditioner.base)
  (root,) = preconditioner
  return root.shape[-1]


def whiten(preconditioner: Factored, keys: Array) -> Array:
  """Takes keys to the coordinates in which a preconditioner is the identity.

  Args:
    preconditioner: S = B B^T.
    keys: [M, F], any float dtype.

  Returns:
    [M, r] A = K B in the dtype of the preconditioner, so that A A^T = K S K^T.
  """
  if isinstance(preconditioner, Preserved):
    rows = whiten(preconditioner.base, keys)
    return _solve_transposed(preconditioner.factor, rows, transpose=False)
  (root,) = preconditioner
  keys = keys.astype(root.dtype)
  if isinstance(preconditioner, IdentityDiagonal):
    return keys
  if isinstance(preconditioner, NullSpaceBasis):
    return keys @ root
  return _solve_transposed(root, keys, transpose=False)


def lift(preconditioner: Factored, whitened: Array) -> Array:
  """Takes whitened coordinates to key space, the adjoint of `whiten`.

  Args:
    preconditioner: S = B B^T.
    whitened: [M, r] A.

  Returns:
    [M, F] A B^T; K S where A = K B.
  """
  if isinstance(preconditioner, Preserved):
    rows = _solve_transposed(preconditioner.factor, whitened, transpose=True)
    return lift(preconditioner.base, rows)
  (root,) = preconditioner
  if isinstance(preconditioner, IdentityDiagonal):
    return whitened
  if isinstance(preconditioner, NullSpaceBasis):
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
