"""The one closed form behind every locate-and-edit method.

With keys K [M, F], wanted output changes R [M, D], a metric S and a ridge r, the
kernel change

  X = S K^T (r I + K S K^T)^-1 R        [F, D], exact factors (K S, (...)^-1 R)

solves min ||X||_S^2 + 1/r ||K X - R||^2. With S = (lambda C)^-1 and r = 1 it is
MEMIT's (lambda C + K^T K)^-1 K^T R by the Woodbury identity: only an M x M
system is solved.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.solve.metric import Metric, precondition

Array = jax.Array


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
  """Solves for the change that moves the output at K by R.

  Args:
    metric: S.
    keys: [M, F].
    residuals: [M, D] wanted change of the output; zero rows ask that the output
      stay where it is.
    ridge: r, on the diagonal of the M x M system; 0 makes K X = R exact.
    active: [M] bool; other rows take no part, as if they were not there. A
      fixed M keeps one compiled solve for batches of any size.

  Returns:
    Factors of X, zero in inactive rows; NaN where the system is singular.

  Source: Meng et al. 2022b (MEMIT), equation 14, in Woodbury form.
  """
  if active is None:
    active = jnp.ones(keys.shape[0], bool)
  keys = jnp.where(active[:, None], keys, 0)
  residuals = jnp.where(active[:, None], residuals, 0)
  towards = precondition(metric, keys)
  diagonal = jnp.where(active, ridge, 1).astype(keys.dtype)
  system = keys @ towards.T + jnp.diag(diagonal)
  # K S K^T is symmetric in exact arithmetic; keep it so for Cholesky.
  factor = jnp.linalg.cholesky((system + system.T) / 2)
  value = jax.scipy.linalg.cho_solve((factor, True), residuals)
  return Factors(towards, value)
