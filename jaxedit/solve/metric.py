"""Metrics on key space, factored once per (model, layer, corpus).

A metric S says how freely a kernel may change along a direction of key space;
every closed form needs it only through the product K S of a few keys with it:

  covariance   S = (lambda C)^-1     C the average of k k^T over text (MEMIT)

Factor in float64: run under `jax.enable_x64(True)`, as `edit` does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Covariance(NamedTuple):
  """S = (lambda C)^-1.

  Attributes:
    factor: [F, F] lower Cholesky factor of lambda C.
  """

  factor: Array


Metric = Covariance


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
  return Covariance(jnp.linalg.cholesky(weight * gram))


def precondition(metric: Metric, keys: Array) -> Array:
  """Multiplies keys by a metric.

  Args:
    metric: S.
    keys: [M, F].

  Returns:
    [M, F], K S.
  """
  solved = jax.scipy.linalg.cho_solve((metric.factor, True), keys.T)
  return solved.T
