"""The Gram matrix of masked rows, by a named implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxedit.kernels.gram import reference
from jaxedit.types import InputError

IMPLEMENTATIONS = ('reference', 'pallas_gpu')


def gram(
    keys: jax.Array,
    mask: jax.Array,
    *,
    implementation: str = 'reference',
    interpret: bool = False,
) -> jax.Array:
  """Sums k k^T over the rows that the mask names.

  Args:
    keys: [N, F] floats; rows that are masked out may hold anything.
    mask: [N] bool, True for the rows to sum.
    implementation: one of `IMPLEMENTATIONS`.
    interpret: run the Pallas kernel without a GPU, slowly.

  Returns:
    [F, F] f32 or wider, exactly symmetric.

  Raises:
    InputError: an unknown implementation, or shapes and dtypes that do not fit.
  """
  problems = []
  if implementation not in IMPLEMENTATIONS:
    problems.append(
        f'gram has no implementation {implementation!r}; it has'
        f' {", ".join(IMPLEMENTATIONS)}'
    )
  if keys.ndim != 2 or not jnp.issubdtype(keys.dtype, jnp.floating):
    problems.append(
        f'keys are {keys.dtype}{list(keys.shape)}; give floats [N, F]'
    )
  if mask.dtype != bool or mask.shape != keys.shape[:1]:
    problems.append(
        f'the mask is {mask.dtype}{list(mask.shape)}; give one bool a row of'
        f' keys, [{keys.shape[0] if keys.ndim else 0}]'
    )
  if problems:
    raise InputError(*problems)
  if implementation == 'reference':
    return reference.gram(keys, mask)
  # Imported where it is used, so that nothing else needs Pallas.
  from jaxedit.kernels.gram import pallas_gpu

  return pallas_gpu.gram(keys, mask, interpret=interpret)
