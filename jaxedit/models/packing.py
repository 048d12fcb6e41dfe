"""Moves activations between packed tokens, padded sequences and slots.

See `types.PackedSequences`. `unflatten` and `flatten` are each other's
transpose, and both gather: plain differentiation would turn one gather into a
scatter, which runs serially on a CPU. (`take` selects few tokens and has no
such rule.)

Where sequences are kept in shards, every shard gathers from its own part of an
axis (`each_shard`). The compiler then finds that nothing moves between devices
that hold a shard each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxedit.types import Array, OutputTokens, PackedSequences

# Entries of an axis, 0 where an index is past its end.
_entries = functools.partial(jnp.take, mode='fill', fill_value=0)


def each_shard(
    f: Callable[..., Array],
    *arrays: Array,
    shards: int,
    axes: Sequence[int] | None = None,
    out: int = 0,
) -> Array:
  """Applies a function to every shard's part of some arrays.

  Args:
    f: parts of the arrays -> a part of the result.
    *arrays: arguments of f.
    shards: equal parts of an axis, one after the other.
    axes: of shards in the arrays; the first of each unless given.
    out: axis of shards in the result.

  Returns:
    The parts of the result along `out`.
  """
  if shards == 1:
    return f(*arrays)
  axes = (0,) * len(arrays) if axes is None else tuple(axes)

  def cut(x: Array, axis: int) -> Array:
    before, (count, *after) = x.shape[:axis], x.shape[axis:]
    return x.reshape(*before, shards, count // shards, *after)

  parts = map(cut, arrays, axes)
  y = jax.vmap(f, in_axes=axes, out_axes=out)(*parts)
  before, (_, count, *after) = y.shape[:out], y.shape[out:]
  return y.reshape(*before, shards * count, *after)


def local(index: Array, size: int, shards: int) -> Array:
  """Indices into an axis of `size` entries as indices into a shard's part.

  Args:
    index: [M, ...] int32, the first axis by shards; `size` for none.
    size: entries that indices count, of all shards.
    shards: equal parts of both axes.

  Returns:
    [M, ...] int32; past the end of the part for none.
  """
  if shards == 1:
    return index
  shard = jnp.arange(len(index), dtype=index.dtype) // (len(index) // shards)
  return index - (shard * (size // shards)).reshape(-1, *[1] * (index.ndim - 1))


@jax.custom_vjp
def unflatten(rows: PackedSequences, x: Array) -> Array:
  """Unpacks tokens into padded sequences.

  Args:
    rows: B sequences of at most T tokens, N in all.
    x: [1, N, ...].

  Returns:
    [B, T, ...], 0 at padding.
  """
  index = local(rows.index, x.shape[1], rows.shards)
  unpack = lambda x, index: _entries(x[0], index, axis=0)
  return each_shard(unpack, x, index, shards=rows.shards, axes=(1, 0))


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
  index = local(index, len(flat), rows.shards)
  pack = lambda x, index: _entries(x, index, axis=0)[None]
  return each_shard(pack, flat, index, shards=rows.shards, out=1)


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
  shards = outputs.rows.shards
  index = local(outputs.index, x.shape[1], shards)
  chosen = functools.partial(_entries, axis=1)
  return each_shard(chosen, x, index, shards=shards, axes=(1, 0), out=1)


def take_slots(x: Array, slots: Array, axis: int = 0) -> Array:
  """Moves slots of a batch to another one.

  Args:
    x: an array of the old batch.
    slots: [E'] int32 old slot of every new one; past the end for a free one.
    axis: of the slots.

  Returns:
    The array of the new batch, 0 where a slot is free.
  """
  return _entries(x, slots, axis=axis)


def take_slot(x: Array, slot: Array, *, axis: int, shards: int) -> Array:
  """Takes one slot of a batch.

  Args:
    x: an array of the batch.
    slot: [] int32.
    axis: of the slots.
    shards: into which slots are divided; over several devices a slice would
      gather all slots, `take_slots` only sends this one.

  Returns:
    The array, with one slot.
  """
  if shards == 1:
    return jax.lax.dynamic_slice_in_dim(x, slot, 1, axis)
  return take_slots(x, jnp.asarray(slot)[None], axis)
