"""Makes a change gentler after it was solved for.

  RECT    keeps the entries of largest relative change |X / W|
  PRUNE   takes singular values beyond the kernel's own largest s0 to
          log(s) - log(s0) + s0

Source: Gu et al. 2024 (RECT, arXiv 2401.04700); Ma et al. 2024 (PRUNE, arXiv
2405.16821). Published code adds PRUNE's result to the edited kernel, here it
takes the place of the change.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rect(change: Array, kernel: Array, keep: float) -> Array:
  """Keeps the entries that change most, relative to the kernel.

  Args:
    change: [F, D] X.
    kernel: [F, D] W before this change.
    keep: share of the entries that is kept, in (0, 1]; published 0.4.

  Returns:
    [F, D], zero elsewhere; not finite where X is not.
  """
  score = jnp.abs(change / (kernel.astype(change.dtype) + 1e-8))
  # A comparison with what is not a number is false, and hides nothing so.
  return jnp.where(score < jnp.quantile(score, 1 - keep), 0, change)


def prune(change: Array, kernel: Array) -> Array:
  """Lowers singular values of a change above those of the kernel.

  Args:
    change: [F, D] X, the sum of all edits.
    kernel: [F, D] W, unedited.

  Returns:
    [F, D].
  """
  largest = jnp.linalg.norm(kernel.astype(change.dtype), ord=2)
  u, s, v = jnp.linalg.svd(change, full_matrices=False)
  lowered = jnp.log(jnp.maximum(s, largest)) - jnp.log(largest) + largest
  kept = jnp.where(s > largest, lowered, s)
  return jnp.matmul(u * kept, v, precision='highest')
