"""Moves activations between packed tokens, padded sequences and slots.

See `types.PackedSequences`. `unflatten` and `flatten` are each other's
transpose, and both gather: plain differentiation would turn one gather into a
scatter, which runs serially on a CPU. (`take` selects few tokens and has no
such rule.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxedit.types import Array, OutputTokens, PackedSequences


@jax.custom_vjp
def unflatten(rows: PackedSequences, x: Array) -> Array:
  """Unpacks tokens into padded sequences.

  Args:
    rows: B sequences of at most T tokens, N in all.
    x: [1, N, ...].

  Returns:
    [B, T, ...], 0 at padding.
  """
  return jnp.take(x[0], rows.index, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def flatten(rows: PackedSequences, x: Array) -> Array:
  """Packs padded sequences end to end.

  Args:
    rows: B sequences of at most T tokens, N in all.
    x: [B, T, ...].

  Returns:
    [1, N, ...], 0 where there is no token.
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
  """Takes the output tokens.

  Args:
    x: [1, N, ...].
    outputs: O tokens.

  Returns:
    [1, O, ...], 0 where there is none.
  """
  return jnp.take(x, outputs.index, axis=1, mode='fill', fill_value=0)


def take_slots(x: Array, slots: Array, axis: int = 0) -> Array:
  """Moves slots of a batch to another one.

  Args:
    x: an array of the old batch.
    slots: [E'] int32 old slot of every new one; past the end for a free one.
    axis: of the slots.

  Returns:
    The array of the new batch, 0 where a slot is free.
  """
  return jnp.take(x, slots, axis=axis, mode='fill', fill_value=0)
