"""Log-probability of labels under a linear head, without the logits, for GPUs.

  logits = x W (+ b)                              block by block of V
  m <- max(m, max logits),  s <- s e^(m_old - m) + sum e^(logits - m)
  logprob = logits[label] - m - log s

  d logprob / dx = W[:, label] - softmax(logits) W^T

A program computes the logits of some rows and one block of the vocabulary in
registers and writes their maximum, sum, argmax and the label's logit. Where the
gradient is wanted, the vocabulary is taken in chunks: a first kernel also
writes e^(logits - maximum of its block) [R, chunk], a second multiplies it with
W^T and adds that to a running sum, rescaled as the sum s is. So the gradient is
ready when the forward pass ends and the backward pass only scales it: two
products with the head in all, as where the logits are kept, instead of the
three of a backward pass that computes the logits again.

bf16 operands go to the matrix units as they are, with f32 sums; f32 operands
are multiplied in full f32. The kernel and the bias are constants: asking for
their gradient raises. There are no gradients of gradients, and nothing here
knows of arrays that are sharded over devices.

A tied head is the transpose of an embedding [V, D]. With `tied` the array is
read in that order: the transpose taken here and the caller's cancel under jit,
and no copy of the head is made.

Axes: R rows, D width, V vocabulary, S blocks of the vocabulary. Lowered by the
Triton backend of Pallas, which jax 0.11 calls deprecated: what is used of it is
masked loads and two launch parameters.

Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3, for the
running maximum and sum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxedit.kernels.linear_logprob import programs
from jaxedit.types import InputError

# Elements of the chunk buffer [R, chunk] of the gradient: 32 MiB of bf16.
_CHUNK_ELEMENTS = 1 << 24


class Tiles(NamedTuple):
  """Sizes of the pieces a program works on; powers of two, at least 16.

  Attributes:
    rows: rows of x.
    vocabulary: columns of the head.
    width: part of D that is multiplied at once.
    warps: warps of a program.
    stages: loads in flight.
    chunk: blocks of the vocabulary taken at once where the gradient is wanted;
      0 for as many as the buffer holds.
  """

  rows: int
  vocabulary: int
  width: int
  warps: int
  stages: int
  chunk: int = 0


class _Plan(NamedTuple):
  """What a call is compiled for."""

  tiles: Tiles
  tied: bool
  interpret: bool


class _State(NamedTuple):
  """What is known after some blocks of the vocabulary.

  Attributes:
    top: [R] largest logit.
    total: [R] sum of e^(logit - top).
    best: [R] int32 id of the largest logit.
    picked: [R] logit of the label, 0 before its block.
  """

  top: jax.Array
  total: jax.Array
  best: jax.Array
  picked: jax.Array


def tiles_for(rows: int, dtype: jnp.dtype) -> Tiles:
  """Returns the tiles that are used where none are given."""
  most = 64 if jnp.dtype(dtype).itemsize > 2 else 128
  few = min(most, max(16, pl.next_power_of_2(max(rows, 1))))
  if jnp.dtype(dtype).itemsize > 2:
    return Tiles(few, 64, 32, 4, 2)
  return Tiles(few, 128, 64, 8 if few == most else 4, 3)


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
    tied: the kernel is the transpose of an array [V, D].
    tiles: sizes to use instead of those of `tiles_for`.
    interpret: run without a GPU, slowly.

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
  plan = _Plan(tiles or tiles_for(len(x), x.dtype), tied, interpret)
  return _scored(plan, x, kernel.T if tied else kernel, bias, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(plan, x, head, bias, labels):
  """Scores labels; the head is [D, V], or [V, D] where it is tied."""
  call = _Call.of(plan, x, head, bias, labels)
  first = jnp.zeros((1,), jnp.int32)
  parts, _ = call.scores(first, call.blocks, keep=False)
  state, _, _ = _merge(call.start(), parts)
  return _result(state, len(x))


def _scored_forward(plan, x, head, bias, labels):
  """Also computes the gradient, which the backward pass only scales."""
  if head.perturbed or (bias is not None and bias.perturbed):
    raise InputError(
        'the fused head gives no gradient to its kernel and bias: wrap them in'
        ' jax.lax.stop_gradient, or use the reference'
    )
  x, head, labels = x.value, head.value, labels.value
  bias = None if bias is None else bias.value
  call = _Call.of(plan, x, head, bias, labels)
  state, mean = call.mean_row()
  own = head[labels] if plan.tied else jnp.take(head, labels, axis=1).T
  slope = own.astype(mean.dtype) - mean[: len(x), : x.shape[1]]
  # An empty array tells the backward pass the dtype of x.
  return _result(state, len(x)), (slope, jnp.zeros((0,), x.dtype))


def _scored_backward(plan, residuals, cotangents):
  """Scales the gradient, which is kept wide up to here."""
  del plan
  slope, like = residuals
  given, _ = cotangents
  if isinstance(given, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  return (given[:, None] * slope).astype(like.dtype), None, None, None


_scored.defvjp(_scored_forward, _scored_backward, symbolic_zeros=True)


def _result(state: _State, count: int) -> tuple[jax.Array, jax.Array]:
  logprob = state.picked - state.top - jnp.log(state.total)
  return logprob[:count], state.best[:count]


def _merge(state: _State, parts: _State) -> tuple[_State, jax.Array, jax.Array]:
  """Adds blocks [S, R] to what is known.

  Returns:
    The state; the factor [R] by which what was summed before is rescaled; the
    factors [S, R] of what was summed in the blocks.
  """
  highest = jnp.max(parts.top, axis=0)
  top = jnp.maximum(state.top, highest)
  # A row of logits that are all -inf so far has nothing to rescale.
  shift = jnp.where(jnp.isneginf(top), 0, top)
  before = jnp.exp(state.top - shift)
  within = jnp.exp(parts.top - shift)
  # Of equal maxima the first block counts, as in argmax.
  block = jnp.argmax(parts.top, axis=0)
  best = jnp.take_along_axis(parts.best, block[None], axis=0)[0]
  merged = _State(
      top,
      state.total * before + jnp.sum(parts.total * within, axis=0),
      jnp.where(highest > state.top, best, state.best),
      state.picked + jnp.sum(parts.picked, axis=0),
  )
  return merged, before, within


class _Call(NamedTuple):
  """The arguments of one call, x padded to whole tiles.

  Attributes:
    plan: what it is compiled for.
    x: [R, D], rows and columns of zeros appended.
    head: [D, V] or [V, D], as it is.
    bias: [V] or None.
    labels: [R] int32.
  """

  plan: _Plan
  x: jax.Array
  head: jax.Array
  bias: jax.Array | None
  labels: jax.Array

  @classmethod
  def of(cls, plan, x, head, bias, labels):
    up = lambda size, step: -size % step
    rows = up(len(x), plan.tiles.rows) if len(x) else plan.tiles.rows
    x = jnp.pad(x, ((0, rows), (0, up(x.shape[1], plan.tiles.width))))
    labels = jnp.pad(labels.astype(jnp.int32), (0, rows))
    return cls(plan, x, head, bias, labels)

  @property
  def wide(self) -> jnp.dtype:
    return jnp.promote_types(self.x.dtype, jnp.float32)

  @property
  def blocks(self) -> int:
    size = self.head.shape[0 if self.plan.tied else 1]
    return pl.cdiv(size, self.plan.tiles.vocabulary)

  def start(self) -> _State:
    rows = (len(self.x),)
    return _State(
        jnp.full(rows, -jnp.inf, self.wide),
        jnp.zeros(rows, self.wide),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, self.wide),
    )

  def mean_row(self) -> tuple[_State, jax.Array]:
    """Returns the state after all blocks and softmax @ W^T, [R, D]."""
    tiles, rows = self.plan.tiles, len(self.x)
    fit = max(1, _CHUNK_ELEMENTS // (rows * tiles.vocabulary))
    chunks = pl.cdiv(self.blocks, tiles.chunk or fit)
    count = pl.cdiv(self.blocks, chunks)

    def add(chunk, carry):
      state, mean = carry
      first = (chunk * count)[None]
      parts, kept = self.scores(first, count, keep=True)
      state, before, within = _merge(state, parts)
      return state, self.spread(first, kept, within, before, mean)

    # Programs take as many columns of it as a block of the vocabulary has.
    columns = pl.cdiv(self.x.shape[1], tiles.vocabulary) * tiles.vocabulary
    zero = jnp.zeros((rows, columns), self.wide)
    state, mean = jax.lax.fori_loop(
        jnp.int32(0), jnp.int32(chunks), add, (self.start(), zero)
    )
    return state, mean / state.total[:, None]

  def scores(
      self, first: jax.Array, count: int, *, keep: bool
  ) -> tuple[_State, jax.Array | None]:
    """Scores `count` blocks of the vocabulary from block `first`.

    Args:
      first: [1] int32.
      count: S.
      keep: also return e^(logits - maximum of the block).

    Returns:
      A state [S, R] of each block by itself; [R, S * block] in the dtype of x,
      or None.
    """
    tiles, rows = self.plan.tiles, len(self.x)
    shape = lambda *size: functools.partial(jax.ShapeDtypeStruct, size)
    part = shape(count, rows)
    out = [part(self.wide), part(self.wide), part(jnp.int32), part(self.wide)]
    if keep:
      out.append(shape(rows, count * tiles.vocabulary)(self.x.dtype))
    parts = self._launch(
        functools.partial(
            programs.scores, plan=self.plan, has_bias=self.bias is not None
        ),
        out,
        (rows // tiles.rows, count),
        'linear_logprob_scores',
    )(
        first,
        self.x,
        self.head,
        self.labels,
        *([] if self.bias is None else [self.bias]),
    )
    return _State(*parts[:4]), parts[4] if keep else None

  def spread(self, first, kept, within, before, mean) -> jax.Array:
    """Returns mean * before + (kept * within) @ W^T over some blocks.

    Args:
      first: [1] int32, the first block.
      kept: [R, S * block], see `scores`.
      within: [S, R] factor of each block.
      before: [R] factor of the sum so far.
      mean: [R, D] sum so far, written over.
    """
    width = self.plan.tiles.vocabulary
    return self._launch(
        functools.partial(programs.spread, plan=self.plan, width=width),
        jax.ShapeDtypeStruct(mean.shape, mean.dtype),
        (len(mean) // self.plan.tiles.rows, mean.shape[1] // width),
        'linear_logprob_spread',
        input_output_aliases={5: 0},
    )(first, kept, self.head, within, before, mean)

  def _launch(self, body, out, grid, name, **options):
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=grid,
        compiler_params=plt.CompilerParams(
            num_warps=self.plan.tiles.warps, num_stages=self.plan.tiles.stages
        ),
        interpret=self.plan.interpret,
        name=name,
        **options,
    )
