"""One transformer block as a Flax linen module.

A block reads its weights from the canonical tree (see `spec`), takes
interventions as arguments and returns its activations:

  sequential:       h += attn(norm(h));  h += mlp(norm'(h))
  parallel:         h += attn(norm(h)) + mlp(norm'(h))
  parallel_shared:  h += attn(norm(h)) + mlp(norm(h))
  post:             h = norm(h + attn(h));  h = norm'(h + mlp(h))

In a decoder over an encoder h += cross(norm''(h)) comes between the two: its
queries are those of the decoder's tokens, and its keys and values are projected
from what the encoder gave for the tokens of the source.

The residual stream h is f32 or wider for weights of any dtype; the inputs of
matrix products are cast to the dtype of the weights, or to that of the
activations if the spec has a wider one, and their sums are f32 or wider. A run
with f32 weights uses matmul precision 'highest'.

Not here: dropout, training-only parts, the loop over layers (`decoder`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxedit.deltas import ACTIVATIONS, LayerDeltas
from jaxedit.models import packing
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import einsum, wide
from jaxedit.types import Array, OutputTokens, PackedSequences

# The name under which results of weight products are saved for a backward pass.
PRODUCT = 'product'

# In place of minus infinity, so that a fully masked token stays finite.
MASKED = -1e30

# The queries of one token are few where keys are at least this many times as
# many.
_FEW = 8


def stored(spec: ModelSpec, weights: Any) -> Any:
  """Returns the dtype of stored activations, for weights of a dtype."""
  return jnp.promote_types(weights, spec.activations or weights)


def product(spec: ModelSpec, x: Array, kernel: Array) -> Array:
  """Applies a kernel to activations; its result has the name `PRODUCT`.

  Activations wider than the kernel are split into two pieces of its dtype, x =
  high + low: two products at its speed, with an error of 2^-17 of x for bf16,
  where one product of rounded activations has 2^-9. A CPU, whose products of
  bf16 are products of f32, widens the kernel instead.

  Args:
    spec: the architecture.
    x: [..., in], two axes at least.
    kernel: [in, out].

  Returns:
    [..., out] in f32 or wider.
  """
  full = lambda x, kernel: einsum('...f,fd->...d', x, kernel)
  if spec.activations is None or kernel.dtype == wide(kernel.dtype):
    y = full(x, kernel)
  elif stored(spec, kernel.dtype) == kernel.dtype:
    y = narrow_product(x, kernel, 1)
  else:
    y = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: full(x, kernel.astype(wide(kernel.dtype))),
        default=lambda x, kernel: narrow_product(x, kernel, 2),
    )
  return checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(x: Array, kernel: Array, pieces: int) -> Array:
  """Multiplies in the dtype of a narrow kernel, forward and backward.

  The default backward pass would multiply the f32 gradient with a widened copy
  of the kernel and round the result.

  Args:
    x: [..., in], two axes at least, f32 or wider.
    kernel: [in, out], narrower than f32.
    pieces: of x, and of the gradient of the result: 1 or 2.

  Returns:
    [..., out] in f32 or wider.
  """
  return _in_pieces('...f,fd->...d', x, kernel, pieces)


def _in_pieces(equation: str, x: Array, kernel: Array, pieces: int) -> Array:
  """Contracts x, cut into pieces of the kernel's dtype, with the kernel."""
  if pieces == 1:
    return einsum(equation, x, kernel)
  info = jnp.finfo(kernel.dtype)
  # Not by conversion there and back, which XLA may remove.
  high = jax.lax.reduce_precision(x, info.nexp, info.nmant)
  # Joined, so that the kernel is read once.
  high, low = jnp.split(
      einsum(equation, jnp.concatenate([high, x - high]), kernel), 2
  )
  return high + low


def _narrow_forward(x, kernel, pieces):
  return narrow_product(x, kernel, pieces), (x, kernel)


def _narrow_backward(pieces, saved, grad):
  x, kernel = saved
  back = _in_pieces('...d,fd->...f', grad, kernel, pieces)
  weights = jnp.einsum('...f,...d->fd', x, grad, precision='highest')
  return back.astype(x.dtype), weights.astype(kernel.dtype)


narrow_product.defvjp(_narrow_forward, _narrow_backward)


class Norm(nn.Module):
  """RMS or layer normalisation, in f32 or wider."""

  spec: ModelSpec

  @nn.compact
  def __call__(self, x: Array) -> Array:
    size, shape = (x.shape[-1],), x.shape
    # One axis of tokens: with an axis of length 1 before it, XLA's reductions
    # in the backward pass take seven times as long on a CPU.
    x = x.reshape(-1, *size)
    scale = self.param('scale', nn.initializers.ones, size)
    if self.spec.norm == 'layer':
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.spec.norm_eps) * scale
    if self.spec.norm == 'layer':
      x = x + self.param('bias', nn.initializers.zeros, size)
    return x.reshape(shape).astype(wide(scale.dtype))


class Linear(nn.Module):
  """A linear map [in, out]."""

  spec: ModelSpec
  features: int
  use_bias: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param(
        'kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    y = product(self.spec, x, kernel)
    if self.use_bias:
      y = y + self.param('bias', nn.initializers.zeros, (self.features,))
    return y


def rotate(x: Array, rotary: tuple[Array, Array], style: str) -> Array:
  """Rotates the leading part of every head by its position.

  Args:
    x: [B, T, Q or G, H].
    rotary: cosines and sines of the angles, each [B, T, H' / 2], H' the rotated
      part of a head.
    style: 'half' or 'interleaved'.

  Returns:
    Same shape and dtype as x.
  """
  cos, sin = (part[:, :, None, :] for part in rotary)
  size = 2 * cos.shape[-1]
  part = x[..., :size].astype(cos.dtype)
  if style == 'half':
    a, b = jnp.split(part, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  else:
    a, b = part[..., ::2], part[..., 1::2]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.reshape(part.shape)
  return jnp.concatenate([turned.astype(x.dtype), x[..., size:]], axis=-1)


def attend(
    q: Array,
    kv: tuple[Array, Array] | None,
    prefix: tuple[Array, Array] | None,
    *,
    mask: Array,
    scale: float,
    bias: Array | None = None,
) -> Array:
  """Grouped-query attention over prefix and present tokens, kept apart.

  Tokens are the last axis but one, so that every product is one of plain
  matrices: a CPU runs others at a third of the rate.

  Args:
    q: [B, G, T, Q / G * H], the queries of a group side by side.
    kv: keys and values of the present tokens, each [B, G, T', H]; None for none.
    prefix: keys and values of P prefix tokens, each [B, G, P, H], or None.
    mask: [B, T, P + T'] bool, True where a query attends.
    scale: factor on the logits.
    bias: [B, Q, T, P + T'], added to the logits.

  Returns:
    [B, G, T, Q / G * H] in f32 or wider.
  """
  batch, groups, tokens, _ = q.shape
  parts = [part for part in (prefix, kv) if part is not None]
  size = parts[0][0].shape[-1]
  q = q.reshape(batch, groups, -1, size) * scale
  logits = [_scores(q, key, tokens) for key, _ in parts]
  logits = jnp.concatenate(logits, axis=-1)
  logits = logits.reshape(batch, groups, tokens, -1, logits.shape[-1])
  if bias is not None:
    by_group = bias.reshape(batch, groups, -1, tokens, bias.shape[-1])
    logits += jnp.swapaxes(by_group, 2, 3)
  logits = jnp.where(mask[:, None, :, None], logits, MASKED)
  weights = jax.nn.softmax(logits).reshape(batch, groups, q.shape[2], -1)
  mixed, first = 0.0, 0
  for _, value in parts:
    last = first + value.shape[2]
    mixed += einsum('bgqs,bgsh->bgqh', weights[..., first:last], value)
    first = last
  return mixed.reshape(batch, groups, tokens, -1)


def _scores(q: Array, key: Array, tokens: int) -> Array:
  """Products [B, G, T Q / G, T'] of queries [B, G, T Q / G, H] with keys.

  Keys are [B, G, T', H]. When a CPU generates token by token, the few queries
  are the right operand, which is up to three times as fast in f32; the barrier
  keeps XLA from swapping the operands back. It is slower for narrower keys and
  for gradients of many tokens.
  """
  plain = functools.partial(einsum, 'bgqh,bgsh->bgqs')
  few = tokens == 1 and _FEW * q.shape[2] <= key.shape[2]
  if not few or key.dtype != wide(key.dtype):
    return plain(q, key)

  def swapped(q: Array, key: Array) -> Array:
    y = einsum('bgsh,bgqh->bgsq', key, q.astype(key.dtype))
    return jnp.swapaxes(jax.lax.optimization_barrier(y), 2, 3)

  return jax.lax.platform_dependent(q, key, cpu=swapped, default=plain)


class AttentionInputs(NamedTuple):
  """All that attention needs beside activations, keys and values.

  Attributes:
    mask: [B, T, P + T'] bool, which keys a query attends to.
    rotary: cosines and sines of the activations' rotary angles, each
      [B, T, H' / 2], or None. They are computed once, as they are the same in
      all layers and heads.
    rows: the sequences of activations [1, N, ...]; None for [B, T, ...].
    outputs: tokens for which the block's output is computed; None for all.
    bias: [B, Q, T, P + T'], added to attention logits; None for none.
    cross_mask: of a decoder over an encoder, which tokens of a source a query
      attends to: [B, T, P + T'] bool, or [B, T, P] where no present token is
      one; None elsewhere.
    source: [B, T'] bool, which present tokens are of a source; None for none.
    passing: like the activations with one last axis of size 1, bool, tokens that
      the block leaves as they are; None for none.
  """

  mask: Array
  rotary: tuple[Array, Array] | None
  rows: PackedSequences | None = None
  outputs: OutputTokens | None = None
  bias: Array | None = None
  cross_mask: Array | None = None
  source: Array | None = None
  passing: Array | None = None


class Block(nn.Module):
  """One block; see the module head for its four shapes.

  `__call__` is `attention_half` and then `mlp_half`. Called separately, the MLP
  can run again under another delta without its attention. Activations are
  [B, T, D], or [1, N, D] where `inputs.rows` gives their sequences.
  """

  spec: ModelSpec

  def setup(self):
    self.attn_norm = Norm(self.spec)
    self.attn = _Attention(self.spec)
    if self.spec.encoder_layers:
      self.cross_norm = Norm(self.spec)
      self.cross = _Attention(self.spec, 'cross')
    self.mlp_norm = Norm(self.spec)
    self.mlp = _Mlp(self.spec)

  def __call__(self, h, inputs, prefix, deltas, intervene):
    """Runs the block.

    Args:
      h: [B, T, D] residual stream.
      inputs: all that attention needs beside activations, keys and values.
      prefix: keys and values of P prefix tokens, or None.
      deltas: those of this layer.
      intervene: (site, activation) -> activation, applied to the edited outputs
        'attn', 'mlp' and 'block'.

    Returns:
      ([B, T, D] residual stream, activations: 'attn', 'mlp', 'block', 'kv', the
      input of every linear map by its site, and 'choice/<number>' of each delta
      that chooses).
    """
    run = _Sites(deltas, inputs.rows)
    before = _kept(inputs, h)
    h, x = self._attention_half(h, inputs, prefix, run, intervene)
    m = run.edited('mlp', x, self.mlp(x, run))
    run.seen['mlp'] = m = intervene('mlp', m)
    h = h + m
    if self.spec.residual == 'post':
      h = self.mlp_norm(h)
    h = run.edited('block', before, h)
    if inputs.passing is not None:
      h = jnp.where(_kept(inputs, inputs.passing), before, h)
    run.seen['block'] = h = intervene('block', h)
    return h, run.seen

  def attention_half(self, h, inputs, prefix, deltas):
    """Runs the attention half.

    Returns:
      (residual stream without the MLP, input of the MLP, (keys, values) by
      sequence).
    """
    run = _Sites(deltas, inputs.rows)
    h, x = self._attention_half(h, inputs, prefix, run, lambda site, x: x)
    return h, x, run.seen['kv']

  def mlp_half(self, x, rows, deltas):
    """Runs the MLP half.

    Returns:
      (what it adds to the residual stream, activations).
    """
    run = _Sites(deltas, rows)
    return run.edited('mlp', x, self.mlp(x, run)), run.seen

  def _attention_half(self, h, inputs, prefix, run, intervene):
    post = self.spec.residual == 'post'
    context, whole = h if post else self.attn_norm(h), h
    h, x = _kept(inputs, h), _kept(inputs, context)
    a = run.edited('attn', x, self.attn(x, context, inputs, prefix, run))
    run.seen['attn'] = a = intervene('attn', a)
    if self.spec.residual == 'parallel_shared':
      return h + a, x
    if self.spec.residual == 'parallel':
      return h + a, self.mlp_norm(h)
    h = h + a
    if inputs.cross_mask is not None:
      h = h + self._cross(h, whole, inputs, prefix, run)
    if post:
      h = self.attn_norm(h)
      return h, h
    return h, self.mlp_norm(h)

  def _cross(self, h, whole, inputs, prefix, run):
    """What attention to the source adds; joins its keys and values to `seen`."""
    own = run.seen['kv']
    x = self.cross_norm(h)
    context = None if inputs.source is None else whole
    inputs = inputs._replace(mask=inputs.cross_mask, bias=None, rotary=None)
    a = self.cross(x, context, inputs, prefix, run)
    if context is not None:
      read = inputs.source[:, None, :, None]
      join = lambda cross, own: jnp.where(read, cross, own)
      own = tuple(map(join, run.seen['kv'], own))
    run.seen['kv'] = own
    return a


def _kept(inputs: AttentionInputs, x: Array) -> Array:
  """Activations of the tokens for which the output is computed."""
  return x if inputs.outputs is None else packing.take(x, inputs.outputs)


class _Sites:
  """Applies deltas at the sites of a block and records activations there."""

  def __init__(self, deltas: LayerDeltas, rows: PackedSequences | None):
    self._given, self._rows = deltas, rows
    self.seen: dict[str, Any] = {}

  def __call__(self, site: str, linear: Linear, x: Array) -> Array:
    self.seen[site] = x
    return self.edited(site, x, linear(x))

  def edited(self, site: str, x: Array, y: Array) -> Array:
    """The output of a site under the deltas there."""
    for number, delta in self._given.deltas.items():
      if delta.site == site:
        y = self._apply(number, delta, x, y)
    return y

  def _apply(self, number: int, delta: Any, x: Array, y: Array) -> Array:
    given, rows = self._given, self._rows
    if not given.per_edit and not delta.chooses:
      return delta(x, y)
    if rows is not None:
      x, y = packing.unflatten(rows, x), packing.unflatten(rows, y)
    axis = 0 if given.per_edit else None
    choice, prompt = (), given.prompt
    if delta.chooses:
      choice = given.choices.get(number)
      if choice is None:
        choose = jax.vmap(lambda d, *a: d.choose(*a), (axis, 0, 0, 0))
        choice = choose(delta, x, y, prompt)
      self.seen[f'choice/{number}'] = choice
      y = jax.vmap(lambda d, *a: d(*a), (axis, 0, 0, 0, 0))(
          delta, x, y, choice, prompt
      )
    else:
      y = jax.vmap(lambda d, *a: d(*a), (axis, 0, 0))(delta, x, y)
    return y if rows is None else packing.flatten(rows, y)


def _by_group(spec: ModelSpec, rows: PackedSequences | None, x: Array) -> Array:
  """Transposes heads [B, T, Q or G, H] to [B, G, T, Q / G * H or H]."""
  if rows is not None:
    x = packing.unflatten(rows, x.reshape(*x.shape[:2], -1))
  x = x.reshape(*x.shape[:2], spec.kv_heads, -1)
  return jnp.swapaxes(x, 1, 2)


class _Attention(nn.Module):
  """Attention with rotary positions, biases or none, under the name `site`."""

  spec: ModelSpec
  site: str = 'attn'

  @nn.compact
  def __call__(self, x, context, inputs, prefix, run):
    spec, rows, outputs = self.spec, inputs.rows, inputs.outputs

    def project(name: str, heads: int, x: Array) -> Array:
      linear = Linear(spec, heads * spec.head_size, spec.qkv_bias, name=name)
      y = run(f'{self.site}/{name}', linear, x)
      y = y.reshape(*x.shape[:2], heads, spec.head_size)
      if spec.qk_norm and name != 'v':
        y = Norm(spec, name=f'{name}_norm')(y)
      return y

    q, kv = project('q', spec.heads, x), None
    asking = rows if outputs is None else outputs.rows
    if inputs.rotary is not None:
      asked = inputs.rotary
      if outputs is not None:
        asked = tuple(packing.take(part, outputs) for part in asked)
      q = rotate(q, asked, spec.rotary)
    if context is not None:
      k, v = (project(name, spec.kv_heads, context) for name in ('k', 'v'))
      if inputs.rotary is not None:
        k = rotate(k, inputs.rotary, spec.rotary)
      # Keys and values are contracted in the dtype in which they are stored.
      store = stored(spec, self.variables['params']['k']['kernel'].dtype)
      kv = tuple(_by_group(spec, rows, y.astype(store)) for y in (k, v))
      run.seen['kv'] = kv
    mixed = attend(
        _by_group(spec, asking, q),
        kv,
        prefix,
        mask=inputs.mask,
        scale=spec.attn_scale or spec.head_size**-0.5,
        bias=inputs.bias,
    )
    mixed = jnp.swapaxes(mixed, 1, 2)
    mixed = mixed.reshape(*mixed.shape[:2], -1)
    if rows is not None:
      mixed = packing.flatten(asking, mixed)
    out = Linear(spec, spec.width, spec.out_bias, name='out')
    return run(f'{self.site}/out', out, mixed)


class _Mlp(nn.Module):
  """Plain or gated MLP."""

  spec: ModelSpec

  @nn.compact
  def __call__(self, x, run):
    spec = self.spec

    def project(name: str) -> Array:
      linear = Linear(spec, spec.mlp_width, spec.mlp_bias, name=name)
      return run(f'mlp/{name}', linear, x)

    activation = ACTIVATIONS[spec.activation]
    if spec.gated:
      inner = activation(project('gate')) * project('up')
    else:
      inner = activation(project('up'))
    down = Linear(spec, spec.width, spec.mlp_bias, name='down')
    return run('mlp/down', down, inner)
