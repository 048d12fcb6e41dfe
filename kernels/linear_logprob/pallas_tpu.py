"""Log-probability of labels under a linear head, without the logits, for TPUs.

  logits = x W (+ b)                              block by block of V
  m' = max(m, max logits)
  s <- s e^(m - m') + sum e^(logits - m'),  then m <- m'
  g <- g e^(m - m') + e^(logits - m') W^T         where the gradient is wanted
  logprob = logits[label] - m - log s
  d logprob / dx = W[:, label] - g / s

The grid is (blocks of rows, blocks of the vocabulary). Its second axis runs in
order, so the sums of a block of rows stay in the core's memory while the head
passes by, and both products with a block of the head read it once. The
gradient is ready when the forward pass ends; the backward pass scales it.

bf16 operands go to the matrix unit as they are, with f32 sums; f32 operands
are multiplied in full f32. The kernel and the bias are constants: asking for
their gradient raises. There are no gradients of gradients, and nothing here
knows of arrays that are sharded over devices. Taking the labels' columns for
the gradient copies a head that is not tied.

GPUs run the reference. They need another kernel, as their grids have no order;
the one that was here was written for Pallas's Triton backend, which jax 0.11
deprecates, had not been measured, and was dropped. This one compiles for TPU
v5e and v6e (libtpu 0.0.50) and has not been measured either.

Axes: R rows, D width, V vocabulary.

Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3, for the
running maximum and sum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxedit.types import InputError

# Bytes of a block of the head, of which two are in memory at a time, and of the
# memory that a program may use: TPU v5 and later have at least 64 MiB.
_BLOCK_BYTES = 4 << 20
_MEMORY_BYTES = 48 << 20


class Tiles(NamedTuple):
  """Sizes of the pieces a step of the grid works on.

  Attributes:
    rows: rows of x, a multiple of 16.
    vocabulary: columns of the head, a multiple of 128.
  """

  rows: int
  vocabulary: int


class _Plan(NamedTuple):
  """What a call is compiled for."""

  tiles: Tiles
  tied: bool
  interpret: bool


def tiles_for(width: int, dtype: jnp.dtype) -> Tiles:
  """Returns the tiles that are used where none are given."""
  fit = _BLOCK_BYTES // (width * jnp.dtype(dtype).itemsize)
  return Tiles(128, max(128, min(1024, fit // 128 * 128)))


def linear_logprob(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    *,
    tied: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Scores labels as `reference.linear_logprob` does; differentiable in x.

  Args:
    x: [R, D], in the dtype of the kernel.
    kernel: [D, V].
    bias: [V] or None.
    labels: [R] int32 ids within the vocabulary.
    tied: the kernel is the transpose of an array [V, D], which is then read in
      its own order: the transpose taken here and the caller's cancel under jit,
      and no copy of the head is made.
    tiles: sizes to use instead of those of `tiles_for`.
    interpret: run without a TPU, slowly.

  Returns:
    ([R] log-probability of the label in nats, f32 or wider; [R] int32 id of the
    most probable token, the first of several).

  Raises:
    InputError: x and the kernel differ in dtype, or, under differentiation, the
      kernel or the bias is not a constant.
  """
  if x.dtype != kernel.dtype:
    raise InputError(
        f'x is {x.dtype} and the kernel {kernel.dtype}; cast one of them'
    )
  plan = _Plan(tiles or tiles_for(x.shape[1], x.dtype), tied, interpret)
  return _score(plan, x, kernel.T if tied else kernel, bias, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(plan, x, head, bias, labels):
  """Scores labels; the head is [D, V], or [V, D] where it is tied."""
  logprob, best, _ = _run(plan, x, head, bias, labels, gradient=False)
  return logprob, best


def _score_forward(plan, x, head, bias, labels):
  """Also computes the gradient, which the backward pass only scales."""
  if head.perturbed or (bias is not None and bias.perturbed):
    raise InputError(
        'the fused head gives no gradient to its kernel and bias: wrap them in'
        ' jax.lax.stop_gradient, or use the reference'
    )
  x, head, labels = x.value, head.value, labels.value
  bias = None if bias is None else bias.value
  logprob, best, mean = _run(plan, x, head, bias, labels, gradient=True)
  own = head[labels] if plan.tied else jnp.take(head, labels, axis=1).T
  # An empty array tells the backward pass the dtype of x.
  residuals = own.astype(mean.dtype) - mean, jnp.zeros((0,), x.dtype)
  return (logprob, best), residuals


def _score_backward(plan, residuals, cotangents):
  """Scales the gradient, which is kept wide up to here."""
  del plan
  slope, like = residuals
  given, _ = cotangents
  if isinstance(given, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  return (given[:, None] * slope).astype(like.dtype), None, None, None


_score.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


def _run(plan, x, head, bias, labels, *, gradient: bool):
  """Launches the kernel.

  Returns:
    ([R] log-probability; [R] id of the most probable token; [R, D] softmax @
    W^T where the gradient is wanted, else None).
  """
  (rows, width), wide = x.shape, jnp.promote_types(x.dtype, jnp.float32)
  vocabulary = head.shape[0 if plan.tied else 1]
  if not rows:
    nothing = jnp.zeros((0,), wide)
    return nothing, nothing.astype(jnp.int32), x.astype(wide)
  r, v = min(plan.tiles.rows, rows), min(plan.tiles.vocabulary, vocabulary)
  by_rows = lambda columns: pl.BlockSpec((r, columns), lambda i, j: (i, 0))
  columns = pl.BlockSpec((1, v), lambda i, j: (0, j))
  tied = pl.BlockSpec((v, width), lambda i, j: (j, 0))
  untied = pl.BlockSpec((width, v), lambda i, j: (0, j))
  column = functools.partial(jax.ShapeDtypeStruct, (rows, 1))
  out = [column(wide), column(wide), column(jnp.int32), column(wide)]
  if gradient:
    out.append(jax.ShapeDtypeStruct((rows, width), wide))
  has_bias = bias is not None
  top, total, best, picked, *mean = pl.pallas_call(
      functools.partial(
          _step, vocabulary=vocabulary, tied=plan.tied, has_bias=has_bias
      ),
      out_shape=out,
      grid=(pl.cdiv(rows, r), pl.cdiv(vocabulary, v)),
      in_specs=[
          by_rows(width),
          tied if plan.tied else untied,
          by_rows(1),
          *[columns] * has_bias,
      ],
      out_specs=[by_rows(array.shape[1]) for array in out],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          vmem_limit_bytes=_MEMORY_BYTES,
      ),
      interpret=plan.interpret,
      name='linear_logprob',
  )(
      x,
      head,
      labels.astype(jnp.int32)[:, None],
      *([bias[None]] if has_bias else []),
  )
  logprob = picked - top - jnp.log(total)
  return logprob[:, 0], best[:, 0], mean[0] / total if gradient else None


def _step(x_ref, head_ref, labels_ref, *refs, vocabulary, tied, has_bias):
  """Adds one block of the vocabulary to the sums of one block of rows.

  Args:
    x_ref: [rows, D].
    head_ref: [D, columns], or [columns, D] where it is tied.
    labels_ref: [rows, 1] int32.
    *refs: the bias [1, columns] where there is one, then the sums: largest
      logit, sum of e^(logit - largest), id of the largest, logit of the label,
      each [rows, 1], and maybe sum of e^(logit - largest) W^T, [rows, D].
    vocabulary: V.
    tied: the order of the head.
    has_bias: whether the first of `refs` is the bias.
  """
  bias_ref, sums = (refs[0], refs[1:]) if has_bias else (None, refs)
  top_ref, total_ref, best_ref, picked_ref, *mean_ref = sums

  @pl.when(pl.program_id(1) == 0)
  def _start():
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)

  axis = 0 if tied else 1
  size = head_ref.shape[axis]
  count = vocabulary - pl.program_id(1) * size
  columns = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
  x, head = x_ref[...], head_ref[...]
  logits = _dot(x, head, axis, top_ref.dtype)
  if bias_ref is not None:
    logits += bias_ref[...].astype(logits.dtype)
  logits = jnp.where(columns < count, logits, -jnp.inf)

  top, before = jnp.max(logits, axis=1, keepdims=True), top_ref[...]
  highest = jnp.maximum(before, top)
  # A row of logits that are all -inf so far has nothing to rescale.
  shift = jnp.where(highest == -jnp.inf, 0.0, highest)
  share, rescale = jnp.exp(logits - shift), jnp.exp(before - shift)
  # Ids within a block are exact in f32, of which TPUs take the minimum.
  place = jnp.where(logits == top, columns.astype(jnp.float32), float(size - 1))
  place = jnp.min(place, axis=1, keepdims=True).astype(jnp.int32)
  best = vocabulary - count + place
  own = columns == labels_ref[...] - (vocabulary - count)
  best_ref[...] = jnp.where(top > before, best, best_ref[...])
  total_ref[...] = rescale * total_ref[...] + jnp.sum(share, 1, keepdims=True)
  picked_ref[...] += jnp.sum(jnp.where(own, logits, 0.0), 1, keepdims=True)
  top_ref[...] = highest
  if mean_ref:
    if vocabulary % size:
      # What is read beyond the vocabulary may be anything, NaN too.
      rows_of = jax.lax.broadcasted_iota(jnp.int32, head.shape, axis)
      head = jnp.where(rows_of < count, head, jnp.zeros_like(head))
    added = _dot(share.astype(x.dtype), head, 1 - axis, top_ref.dtype)
    mean_ref[0][...] = rescale * mean_ref[0][...] + added


def _dot(a, b, columns: int, wide) -> jax.Array:
  """Multiplies a [m, k] with b, whose axis `columns` stays; sums are wide."""
  return jax.lax.dot_general(
      a,
      b,
      (((1,), (1 - columns,)), ((), ())),
      precision='highest' if a.dtype == wide else 'default',
      preferred_element_type=wide,
  )
