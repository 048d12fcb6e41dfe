"""Gram matrix of masked rows in one kernel, for GPUs.

  G[i, j] = sum over n of K[n, i]^T K[n, j]       for column blocks i <= j
  G[j, i] = G[i, j]^T

A program computes one block of the upper triangle in registers and writes it
twice. Rows that the mask leaves out are never read, so the masked copy of the
keys does not exist either. Operands keep their dtype (bf16 goes to the matrix
units as it is), sums are f32; f32 operands are multiplied in full f32.

Axes: N rows, F width. Lowered by the Triton backend of Pallas, which jax 0.11
calls deprecated: what is used of it is masked loads and stores and two launch
parameters. There is no gradient.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


class Tiles(NamedTuple):
  """Sizes of the pieces a program works on; powers of two, at least 16.

  Attributes:
    columns: columns of a block of G, both ways.
    rows: rows of keys that are multiplied at once.
    group: block columns that are computed side by side, so that programs
      which run together share what they read.
    warps: warps of a program.
    stages: loads in flight.
  """

  columns: int
  rows: int
  group: int
  warps: int
  stages: int


def tiles_for(dtype: jnp.dtype) -> Tiles:
  """Returns the tiles that are used where none are given."""
  if jnp.dtype(dtype).itemsize > 2:
    return Tiles(64, 16, 8, 4, 2)
  return Tiles(128, 64, 8, 8, 3)


def gram(
    keys: jax.Array,
    mask: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
  """Sums k k^T over the rows that the mask names, as `reference.gram` does.

  Args:
    keys: [N, F] floats.
    mask: [N] bool.
    tiles: sizes to use instead of `tiles_for(keys.dtype)`.
    interpret: run without a GPU, slowly.

  Returns:
    [F, F] f32 or wider, exactly symmetric.
  """
  count, size = keys.shape
  wide = jnp.promote_types(keys.dtype, jnp.float32)
  if not count:
    return jnp.zeros((size, size), wide)
  tiles = tiles or tiles_for(keys.dtype)
  blocks = pl.cdiv(size, tiles.columns)
  return pl.pallas_call(
      functools.partial(_block, tiles=tiles, wide=wide),
      out_shape=jax.ShapeDtypeStruct((size, size), wide),
      grid=(blocks * tiles.group, pl.cdiv(blocks, tiles.group)),
      compiler_params=plt.CompilerParams(
          num_warps=tiles.warps, num_stages=tiles.stages
      ),
      interpret=interpret,
      name='gram',
  )(keys, mask.astype(jnp.int32))


def _block(keys_ref, mask_ref, out_ref, *, tiles: Tiles, wide: jnp.dtype):
  """Computes one block of the upper triangle and its mirror image."""
  i = pl.program_id(0) // tiles.group
  j = pl.program_id(1) * tiles.group + pl.program_id(0) % tiles.group
  blocks = pl.cdiv(out_ref.shape[0], tiles.columns)

  @pl.when((i <= j) & (j < blocks))
  def _():
    _one_block(keys_ref, mask_ref, out_ref, i, j, tiles=tiles, wide=wide)


def _one_block(keys_ref, mask_ref, out_ref, i, j, *, tiles, wide):
  """Computes block (i, j), i <= j."""
  count, size = keys_ref.shape
  step, width = tiles.rows, tiles.columns
  precision = 'highest' if keys_ref.dtype == wide else 'default'
  places = jnp.arange(width, dtype=jnp.int32)
  within = lambda block: block * width + places < size

  def add(n, total):
    rows = pl.ds(n * step, step)
    inside = n * step + jnp.arange(step, dtype=jnp.int32) < count
    real = plt.load(mask_ref.at[rows], mask=inside, other=0) > 0

    def load(block):
      return plt.load(
          keys_ref.at[rows, pl.ds(block * width, width)],
          mask=real[:, None] & within(block)[None],
          other=jnp.zeros((), keys_ref.dtype),
      )

    return total + jax.lax.dot_general(
        load(i),
        load(j),
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=wide,
    )

  zero = jnp.zeros((width, width), wide)
  total = jax.lax.fori_loop(0, pl.cdiv(count, step), add, zero)
  # The mirror image of a block on the diagonal lies in the block itself.
  upper = (i < j) | (places[:, None] <= places[None])
  total = jnp.where(upper, total, total.T)

  def write(first, second, block):
    plt.store(
        out_ref.at[pl.ds(first * width, width), pl.ds(second * width, width)],
        block,
        mask=within(first)[:, None] & within(second)[None],
    )

  write(i, j, total)

  @pl.when(i < j)
  def _():
    write(j, i, total.T)
