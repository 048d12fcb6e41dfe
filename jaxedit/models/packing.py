"""Moves activations between places and rows (see `types.Ragged`).

`to_rows` and `to_places` are each other's transpose, and both gather: plain
differentiation would turn the gather of one direction into a scatter, which
runs serially on a CPU. (`take` picks few places and leaves it at that.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxedit.types import Array, Keep, Ragged


@jax.custom_vjp
def to_rows(rows: Ragged, x: Array) -> Array:
  """Lays places out as rows.

  Args:
    rows: R rows of T columns on N places.
    x: [1, N, ...].

  Returns:
    [R, T, ...], 0 where a row has no token.
  """
  return jnp.take(x[0], rows.index, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def to_places(rows: Ragged, x: Array) -> Array:
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


to_rows.defvjp(
    lambda rows, x: (to_rows(rows, x), rows),
    lambda rows, g: (None, to_places(rows, g)),
)
to_places.defvjp(
    lambda rows, x: (to_places(rows, x), rows),
    lambda rows, g: (None, to_rows(rows, g)),
)


def take(x: Array, keep: Keep) -> Array:
  """Picks the kept places.

  Args:
    x: [1, N, ...].
    keep: K places.

  Returns:
    [1, K, ...], 0 where none is kept.
  """
  return jnp.take(x, keep.index, axis=1, mode='fill', fill_value=0)
