"""Optimises hidden states: which state at the anchor makes a model say y?

A change d of the residual leaving layer l at the anchor column (the last token
of the subject) is found by Adam on

  mean over contexts of [ mean over target tokens of -log P(y_j) ]
  + kl * KL(P_d || P_0) of the next token after "{subject} is a"
  + decay * |d| / |z0|^2          with |d| <= clamp * |z0|,

and the wanted state is z = z0 + d. Everything below the layer and left of the
anchor is constant: `lower` and `prefix_kv` run once, `upper` runs in each step
on the suffix columns alone. This is exact.

Axes: E edits, C contexts, B = E * C rows, P prefix columns, S suffix columns, N
scored positions, U layers above the edited one.

Source: Meng et al. 2022a (ROME, arXiv 2202.05262), equation 4; Meng et al. 2022b
(MEMIT), equation 16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.text.batching import Tile
from jaxedit.types import KV, Array, Columns, Params, Tap, Targets


class Schedule(NamedTuple):
  """Settings of the optimisation; numbers, so changing one does not recompile.

  Attributes:
    steps: losses evaluated at most; there is one update fewer.
    rate: learning rate of Adam.
    decay: weight of |d| / |z0|^2.
    clamp: largest |d| as a multiple of |z0|.
    kl: weight of the KL term.
    threshold: an edit stops when its loss is below, nats.
  """

  steps: int = 25
  rate: float = 0.5
  decay: float = 0.5
  clamp: float = 0.75
  kl: float = 0.0625
  threshold: float = 5e-2


def norm(x: Array) -> Array:
  """Euclidean length along the last axis, with gradient 0 at 0."""
  square = jnp.sum(jnp.square(x), axis=-1)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def lower(
    spec: ModelSpec, params: Params, tokens: Array, columns: Columns, layer: int
) -> Array:
  """Runs the model up to and including `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    columns: [B, T] columns.
    layer: last layer to run.

  Returns:
    [B, T, D] residual leaving `layer`.
  """
  h = decoder.embed(spec, params, tokens, columns)
  stop = layer + 1
  return decoder.run_layers(spec, params, h, columns, start=0, stop=stop)[0]


def prefix_kv(
    spec: ModelSpec, params: Params, h: Array, columns: Columns, layer: int
) -> KV | None:
  """Runs the columns left of the anchor through the layers above `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, P, D] residual leaving `layer`, columns before the anchor only.
    columns: [B, P] columns.
    layer: the edited layer.

  Returns:
    Their keys and values in the U layers above, or None where there are none.
  """
  above = tuple(range(layer + 1, spec.layers))
  if not above or not h.shape[1]:
    return None
  _, ((key, value),) = decoder.run_layers(
      spec,
      params,
      h,
      columns,
      start=layer + 1,
      stop=spec.layers,
      taps=(Tap('kv', above),),
  )
  return KV(key, value, columns)


def upper(
    spec: ModelSpec,
    params: Params,
    h: Array,
    columns: Columns,
    *,
    kv: KV | None,
    layer: int,
) -> Array:
  """Runs suffix columns through the layers above `layer`; differentiable in h.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, S, D] residual leaving `layer`, from the anchor on.
    columns: [B, S] columns.
    kv: what `prefix_kv` returned.
    layer: the edited layer.

  Returns:
    [B, S, D] output of the last block.
  """
  return decoder.run_layers(
      spec,
      params,
      h,
      columns,
      start=layer + 1,
      stop=spec.layers,
      prefix=kv,
      remat=decoder.SAVE_PRODUCTS,
  )[0]


class _Rows(NamedTuple):
  """Rows cut at their anchor, with all that stays constant."""

  h: Array  # [B, S, D] residual leaving the layer, suffix columns
  columns: Columns  # [B, S]
  kv: KV | None


def _cut(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    columns: Columns,
    *,
    prefix: int,
    layer: int,
) -> _Rows:
  """Runs what is constant for [B, T] rows whose anchor is column `prefix`."""
  h = lower(spec, params, tokens, columns, layer)
  left, right = (
      jax.tree.map(lambda x: x[:, part], columns)
      for part in (slice(None, prefix), slice(prefix, None))
  )
  kv = prefix_kv(spec, params, h[:, :prefix], left, layer)
  return _Rows(h[:, prefix:], right, kv)


class _State(NamedTuple):
  """Loop state of one tile."""

  step: Array  # [] losses evaluated so far
  delta: Array  # [E, D]
  adam: Any
  done: Array  # [E] bool
  loss: Array  # [E]
  likelihood: Array  # [E]
  steps: Array  # [E]
  finite: Array  # [E] bool


def _minimise(
    loss: Callable[[Array], tuple[Array, Array]],
    z0: Array,
    live: Array,
    schedule: Schedule,
) -> _State:
  """Runs Adam with a clamp and a stop of its own for every edit.

  Args:
    loss: [E, D] -> ([E] loss, [E] likelihood term), edits independent.
    z0: [E, D] state of the unedited model.
    live: [E] bool, False in empty slots.
    schedule: settings.

  Returns:
    The last state; `delta` is the change at which the loss was last evaluated.
  """
  adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
  radius = schedule.clamp * norm(z0)

  def total(delta: Array) -> tuple[Array, tuple[Array, Array]]:
    losses, likelihoods = loss(delta)
    return jnp.sum(jnp.where(live, losses, 0)), (losses, likelihoods)

  def step(state: _State) -> _State:
    grad, (value, likelihood) = jax.grad(total, has_aux=True)(state.delta)
    keep = lambda new, old: jnp.where(state.done, old, new)
    finite = jnp.isfinite(value)
    last = state.step + 1 >= schedule.steps
    done = state.done | (value < schedule.threshold) | ~finite | last
    update, moments = adam.update(grad, state.adam)
    delta = state.delta - schedule.rate * update
    size = norm(delta)
    scale = jnp.where(size > radius, radius / jnp.maximum(size, 1e-30), 1)
    delta = jnp.where(done[:, None], state.delta, delta * scale[:, None])
    return _State(
        step=state.step + 1,
        delta=delta,
        adam=moments,
        done=done,
        loss=keep(value, state.loss),
        likelihood=keep(likelihood, state.likelihood),
        steps=keep(state.step + 1, state.steps),
        finite=keep(finite, state.finite),
    )

  zeros = jnp.zeros(z0.shape[0], z0.dtype)
  start = _State(
      step=jnp.int32(0),
      delta=jnp.zeros_like(z0),
      adam=adam.init(jnp.zeros_like(z0)),
      done=~live,
      loss=zeros,
      likelihood=zeros,
      steps=jnp.zeros(z0.shape[0], jnp.int32),
      finite=jnp.ones(z0.shape[0], bool),
  )
  return jax.lax.while_loop(lambda s: ~jnp.all(s.done), step, start)


def _divergence(
    spec: ModelSpec, params: Params, tile: Tile, layer: int
) -> Callable[[Array], Array | float]:
  """Builds the KL term: [E, D] change -> [E] nats (0 for tiles without rows).

  Only the distribution at the anchor of the KL row counts, so above the layer
  the row is one column.
  """
  if not tile.kl_tokens.shape[1]:
    return lambda delta: 0.0
  rows = _cut(
      spec,
      params,
      tile.kl_tokens,
      Columns(tile.kl_position, tile.kl_segment),
      prefix=tile.kl_tokens.shape[1] - 1,
      layer=layer,
  )

  def next_token(delta: Array) -> Array:
    moved = rows.h.at[:, 0].add(delta)
    h = upper(spec, params, moved, rows.columns, kv=rows.kv, layer=layer)
    return jax.nn.log_softmax(decoder.logits(spec, params, h[:, 0]))

  base = next_token(jnp.zeros_like(rows.h[:, 0]))

  def divergence(delta: Array) -> Array:
    now = next_token(delta)
    return jnp.sum(jnp.exp(now) * (now - base), axis=-1)

  return divergence


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def optimize(
    spec: ModelSpec,
    params: Params,
    tile: Tile,
    *,
    layer: int,
    schedule: Schedule,
) -> Targets:
  """Finds the wanted states of one tile of edits, side by side.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tile: rows of E edits, aligned at their anchor.
    layer: the layer whose output is changed.
    schedule: settings.

  Returns:
    Targets of the E slots; those of empty slots are meaningless.
  """
  edits, contexts, width = tile.tokens.shape
  scored = tile.label.shape[-1]
  prefix = tile.prefix
  flat = lambda x: x.reshape(edits * contexts, -1)
  rows = _cut(
      spec,
      params,
      flat(tile.tokens),
      Columns(flat(tile.position), flat(tile.segment)),
      prefix=prefix,
      layer=layer,
  )
  divergence = _divergence(spec, params, tile, layer)
  z0 = rows.h.reshape(edits, contexts, width - prefix, -1)[:, 0, 0]
  picked = flat(tile.score_column)[..., None]
  tokens = jnp.maximum(jnp.sum(tile.label_mask, axis=-1), 1)

  def likelihood(delta: Array) -> Array:
    moved = rows.h.at[:, 0].add(jnp.repeat(delta, contexts, axis=0))
    h = upper(spec, params, moved, rows.columns, kv=rows.kv, layer=layer)
    h = jnp.take_along_axis(h, picked, axis=1)
    h = h.reshape(edits, contexts, scored, -1)
    logprob, _ = decoder.label_logprob(spec, params, h, tile.label)
    nll = -jnp.sum(logprob * tile.label_mask, axis=-1) / tokens
    return jnp.mean(nll, axis=-1)

  def loss(delta: Array) -> tuple[Array, Array]:
    nll = likelihood(delta)
    decay = schedule.decay * norm(delta) / jnp.sum(jnp.square(z0), axis=-1)
    return nll + schedule.kl * divergence(delta) + decay, nll

  end = _minimise(loss, z0, tile.edit >= 0, schedule)
  return Targets(
      z=z0 + end.delta,
      z0=z0,
      loss=end.loss,
      likelihood=end.likelihood,
      steps=end.steps,
      finite=end.finite,
  )
