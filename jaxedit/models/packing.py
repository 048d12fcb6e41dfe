"""Moves activations between places and rows (see `types.Ragged`).

`unflatten` and `flatten` are each other's transpose, and both gather: plain
differentiation would turn the gather of one direction into a scatter, which
runs serially on a CPU. (`take` picks few places and leaves it at that.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxedit.types import Array, OutputTokens, PackedSequences


@jax.custom_vjp
def unflatten(rows: PackedSequences, x: Array) -> Array:
  """Lays places out as rows.

  Args:
    rows: R rows of T columns on N places.
    x: [1, N, ...].

  Returns:
    [R, T, ...], 0 where a row has no token.
  """
  return jnp.take(x[0], rows.index, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def flatten(rows: PackedSequences, x: Array) -> Array:
  """Lays rows end to end.

  Args:
    rows: R rows of T columns on N places.
    x: [R, T, ...].

  Returns:
    [1, N, ...], 0 at empty places.
  """
  flat = x.reshape(-1, *x.shape[2:])
  index = rows.row * rows.index.shape[1] + rows.column
  return jnp.take(flat, index, axis=0, mode='fill', fill_value=0)[None]


unflatten.defvjp(
    lambda rows, x: (unflatten(rows, x), rows),
    lambda rows, g: (None, flatten(rows, g)),
)
flatten.defvjp(
    lambda rows, x: (flatten(rows, x), rows),
    lambda rows, g: (None, unflatten(rows, g)),
)


def take(x: Array, outputs: OutputTokens) -> Array:
  """Picks the kept places.

  Args:
    x: [1, N, ...].
    outputs: K places.

  Returns:
    [1, K, ...], 0 where none is kept.
  """
  return jnp.take(x, outputs.index, axis=1, mode='fill', fill_value=0)
