"""Dtypes and contractions that every package shares.

Residuals, sums and losses are float32 or wider whatever the weights are; a run
with float32 weights uses matmul precision 'highest'.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
  """Returns the dtype of residuals, sums and losses for weights of `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


def all_finite(tree: Any) -> jax.Array:
  """[] bool, whether every number of a tree is finite."""
  leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Contracts in the dtype of `y`, summing in float32 or wider."""
  out = wide(y.dtype)
  return jnp.einsum(
      equation,
      x.astype(y.dtype),
      y,
      precision='highest' if y.dtype == out else 'default',
      preferred_element_type=out,
  )
