"""What one program of the fused head computes, for GPUs.

`scores` takes some rows of x and one block of the vocabulary, `spread` some
rows and some columns of the gradient. All references are whole arrays; a
program reads the pieces that its place in the grid names. Rows come first in
the grid, so that programs which run together share a piece of the head.

Sizes are powers of two (`tiles`). x and everything that is written are padded
to whole pieces by the caller; the head and the bias are not, and what lies
outside of them is masked.

Axes: R rows, D width, V vocabulary, S blocks of the vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def _places(start, size: int) -> jax.Array:
  return start + jnp.arange(size, dtype=jnp.int32)


def _head(head_ref, d, v, *, tied: bool) -> jax.Array:
  """Loads a piece of the head, zeros outside of it.

  Args:
    head_ref: [D, V], or [V, D] where it is tied.
    d: (start, size) along D.
    v: (start, size) along V.
    tied: the order of the array.

  Returns:
    [d, v], or [v, d] where it is tied.
  """
  mask = None
  pieces = (v, d) if tied else (d, v)
  for axis, ((start, size), whole) in enumerate(zip(pieces, head_ref.shape)):
    inside = jnp.expand_dims(_places(start, size) < whole, 1 - axis)
    mask = inside if mask is None else mask & inside
  return plt.load(
      head_ref.at[tuple(pl.ds(start, size) for start, size in pieces)],
      mask=mask,
      other=jnp.zeros((), head_ref.dtype),
  )


def _dot(a, b, contract: int, wide) -> jax.Array:
  """Multiplies a [m, k] with b along one of its axes; sums are wide."""
  return jax.lax.dot_general(
      a,
      b,
      (((1,), (contract,)), ((), ())),
      precision='highest' if a.dtype == wide else 'default',
      preferred_element_type=wide,
  )


def scores(first_ref, x_ref, head_ref, labels_ref, *refs, plan, has_bias):
  """Computes the logits of a block and writes what is kept of them.

  Args:
    first_ref: [1] int32, the block that the first program of a row takes.
    x_ref: [R, D].
    head_ref: [D, V] or [V, D].
    labels_ref: [R] int32.
    *refs: the bias [V] where there is one, then what is written: largest logit,
      sum of e^(logit - largest), id of the largest, logit of the label, each
      [S, R], and maybe e^(logit - largest) [R, S * block].
    plan: sizes and order of the head.
    has_bias: whether the first of `refs` is the bias.
  """
  bias_ref, refs = (refs[0], refs[1:]) if has_bias else (None, refs)
  top_ref, total_ref, best_ref, picked_ref, *kept_ref = refs
  tiles, wide = plan.tiles, top_ref.dtype
  rows = pl.ds(pl.program_id(0) * tiles.rows, tiles.rows)
  slot = pl.program_id(1)
  start = (first_ref[0] + slot) * tiles.vocabulary
  whole = head_ref.shape[0 if plan.tied else 1]
  ids = _places(start, tiles.vocabulary)

  def add(step, logits):
    d = step * tiles.width
    head = _head(
        head_ref,
        (d, tiles.width),
        (start, tiles.vocabulary),
        tied=plan.tied,
    )
    x = plt.load(x_ref.at[rows, pl.ds(d, tiles.width)])
    return logits + _dot(x, head, 1 if plan.tied else 0, wide)

  logits = jnp.zeros((tiles.rows, tiles.vocabulary), wide)
  steps = x_ref.shape[1] // tiles.width
  logits = jax.lax.fori_loop(0, steps, add, logits)
  if bias_ref is not None:
    bias = plt.load(
        bias_ref.at[pl.ds(start, tiles.vocabulary)],
        mask=ids < whole,
        other=jnp.zeros((), bias_ref.dtype),
    )
    logits += bias.astype(wide)[None]
  logits = jnp.where((ids < whole)[None], logits, -jnp.inf)

  top = jnp.max(logits, axis=1)
  # A block of logits that are all -inf sums to 0, not to NaN.
  shift = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
  share = jnp.exp(logits - shift[:, None])
  highest = jnp.where(logits == top[:, None], ids[None], whole - 1)
  best = jnp.min(highest, axis=1)
  labels = plt.load(labels_ref.at[rows])
  own = jnp.where(ids[None] == labels[:, None], logits, jnp.zeros_like(logits))
  top_ref[slot, rows] = top
  total_ref[slot, rows] = jnp.sum(share, axis=1)
  best_ref[slot, rows] = best
  picked_ref[slot, rows] = jnp.sum(own, axis=1)
  if kept_ref:
    columns = pl.ds(slot * tiles.vocabulary, tiles.vocabulary)
    kept_ref[0][rows, columns] = share.astype(x_ref.dtype)


def spread(
    first_ref,
    kept_ref,
    head_ref,
    within_ref,
    before_ref,
    old_ref,
    new_ref,
    *,
    plan,
    width,
):
  """Adds the softmax of some blocks times W^T to some columns of the sum.

  Args:
    first_ref: [1] int32, the first block.
    kept_ref: [R, S * block], what `scores` kept.
    head_ref: [D, V] or [V, D].
    within_ref: [S, R] factor of each block.
    before_ref: [R] factor of the sum so far.
    old_ref: [R, D] the sum so far; may be the array that is written.
    new_ref: [R, D] the new sum.
    plan: sizes and order of the head.
    width: columns of the sum that a program takes.
  """
  tiles, wide = plan.tiles, new_ref.dtype
  rows = pl.ds(pl.program_id(0) * tiles.rows, tiles.rows)
  d = pl.program_id(1) * width
  block = tiles.vocabulary

  def add(slot, total):
    kept = plt.load(kept_ref.at[rows, pl.ds(slot * block, block)])
    factor = plt.load(within_ref.at[slot, rows])
    share = (kept.astype(wide) * factor[:, None]).astype(kept.dtype)
    start = (first_ref[0] + slot) * block
    head = _head(head_ref, (d, width), (start, block), tied=plan.tied)
    return total + _dot(share, head, 0 if plan.tied else 1, wide)

  place = (rows, pl.ds(d, width))
  before = plt.load(before_ref.at[rows])
  total = plt.load(old_ref.at[place]) * before[:, None]
  total = jax.lax.fori_loop(0, within_ref.shape[0], add, total)
  new_ref[place] = total
