"""The losses of the edits in all slots, computed together.

  nll * mean over contexts of [ mean over target tokens of -log P(y_j) ]
  + kl * KL(P_d || P_0) of the next token after the KL prompt
  + decay * sum over halves of |d| / |z0|^2

Axes as in `jaxedit.types`: E slots, C' sequences an edit, N token budget, O
scored tokens; half: the attention's change, then the MLP's.

Source: Meng et al. 2022a (ROME, arXiv 2202.05262), equation 4; Li et al. 2023
(PMET, arXiv 2308.08742), section 3, for two halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.batching.slots import SlotLayout
from jaxedit.models import decoder, packing
from jaxedit.models.blocks import Norm
from jaxedit.models.spec import ModelSpec
from jaxedit.targets.partial_forward import upper
from jaxedit.targets.state import (
    OptState,
    PrefixCache,
    TargetConfig,
)
from jaxedit.types import KV, Array, Params

# Factor on the likelihood's weight where `TargetConfig.argmax_stop` applies.
_EASED = 0.1


def norm(x: Array) -> Array:
  """Euclidean norm along the last axis, with gradient 0 at 0."""
  square = jnp.sum(jnp.square(x), axis=-1)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def unedited(cache: PrefixCache, assigned: SlotLayout) -> Array:
  """The outputs that are changed, before any change.

  Args:
    cache: what stays constant.
    assigned: the slot layout.

  Returns:
    [E, D], or [E, half, D], at the anchor of the plain prompt.
  """
  if cache.parts is None:
    return _anchored(cache, assigned, assigned.anchor[:, 0])
  attn, mlp = cache.parts
  if attn is None:
    return mlp[:, 0]
  return jnp.stack([attn[:, 0], mlp[:, 0]], axis=1)


def _anchored(cache: PrefixCache, assigned: SlotLayout, anchor: Array) -> Array:
  """[E, ..., D] unedited residual stream at packed indices [E, ...]."""

  def read(base: Array, anchor: Array) -> Array:
    return jnp.take(base[0], anchor, axis=0, mode='fill', fill_value=0)

  shards = assigned.rows.shards
  anchor = packing.local(anchor, cache.base.shape[1], shards)
  return packing.each_shard(
      read, cache.base, anchor, shards=shards, axes=(1, 0)
  )


def _changed(
    spec: ModelSpec,
    params: Params,
    cache: PrefixCache,
    assigned: SlotLayout,
    *,
    layer: int,
) -> Callable[[Array], Array]:
  """Builds the function from a change to the residual stream [1, N, D]."""
  shards, anchor = assigned.rows.shards, assigned.anchor.reshape(-1)
  anchor = packing.local(anchor, cache.base.shape[1], shards)

  def write(mode: str, values: Array) -> Array:
    def put(base: Array, anchor: Array, values: Array) -> Array:
      return getattr(base.at[0, anchor], mode)(values, mode='drop')

    return packing.each_shard(
        put, cache.base, anchor, values, shards=shards, axes=(1, 0, 0), out=1
    )

  def add(delta: Array) -> Array:
    return write('add', jnp.repeat(delta, assigned.anchor.shape[1], axis=0))

  if cache.parts is None or cache.parts.attn is None:
    return add
  if spec.residual != 'sequential':
    return lambda delta: add(jnp.sum(delta, axis=1))
  middle = _anchored(cache, assigned, assigned.anchor)  # [E, C', D]
  middle = middle - cache.parts.mlp
  weights = {'params': decoder.layer_params(params, layer)['mlp_norm']}

  def run(delta: Array) -> Array:
    m = middle + delta[:, :1]
    x = Norm(spec).apply(weights, m)
    y, _ = decoder.mlp_half(spec, params, x, layer=layer)
    out = (m + y + delta[:, 1:]).reshape(len(anchor), -1)
    return write('set', out)

  return run


class Aux(NamedTuple):
  """The losses of a step, and values computed with them.

  Attributes:
    loss: [E] nats.
    likelihood: [E] mean negative log-likelihood of a target token, nats.
    base: [E, V] unedited log-probabilities after the KL prompt, or [E, 0].
    kv: keys and values of the suffixes, or None.
    found: [E] bool, whether all target tokens are the most probable ones; None
      without `use_argmax_stop`, as `term`.
    term: [E] weighted KL term, nats.
  """

  loss: Array
  likelihood: Array
  base: Array
  kv: tuple[Array, Array] | None
  found: Array | None
  term: Array | None


def build(
    spec: ModelSpec,
    params: Params,
    cache: PrefixCache,
    assigned: SlotLayout,
    *,
    layer: int,
    return_kv: bool,
    use_argmax_stop: bool,
) -> Callable[[Array, OptState, TargetConfig], Aux]:
  """Builds the loss of all slots.

  Args:
    spec: the architecture.
    params: canonical parameters.
    cache: what stays constant.
    assigned: the slot layout.
    layer: the edited layer.
    return_kv: return the keys and values of the suffixes too.
    use_argmax_stop: apply `TargetConfig.argmax_stop`.

  Returns:
    (change [E, D] or [E, half, D], state, settings) -> `Aux`.
  """
  shards, scored = assigned.rows.shards, assigned.label.shape[0]
  asked = len(assigned.outputs.index) - scored  # for KL prompts
  flat = lambda x: x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])
  kv = KV(flat(cache.key), flat(cache.value), assigned.before)
  kv = kv if len(cache.key) else None
  z0 = unedited(cache, assigned)
  changed = _changed(spec, params, cache, assigned, layer=layer)
  mask = assigned.pick < scored
  pick = packing.local(assigned.pick, scored, shards)
  # Of each shard the scored tokens come first, see `SlotLayout.outputs`.
  each = functools.partial(packing.each_shard, shards=shards)
  label = each(lambda x: jnp.pad(x, (0, asked // shards)), assigned.label)
  of_scored = lambda x: each(lambda x: x[: scored // shards], x)
  of_kl = lambda x: each(lambda x: x[scored // shards :], x)

  def picked(x: Array, missing: Any) -> Array:
    """[E, C, O'] values of scored tokens by label."""
    choose = functools.partial(jnp.take, mode='fill', fill_value=missing)
    return each(choose, x, pick)

  tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)

  def loss(delta: Array, state: OptState, config: TargetConfig) -> Aux:
    h = changed(delta)
    h, seen = upper(
        spec, params, h, assigned, kv=kv, layer=layer, return_kv=return_kv
    )
    # Labels and KL prompts share one product with the head: its weights are
    # read once.
    logits = decoder.logits(spec, params, h[0])
    total = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0] - total
    found = jnp.where(mask, picked(logprob, 0), 0)
    nll = jnp.mean(-jnp.sum(found, axis=-1) / tokens, axis=-1)
    size = jnp.maximum(jnp.sum(jnp.square(z0), axis=-1), 1e-30)
    decay = norm(delta) / size
    decay = decay if decay.ndim == 1 else jnp.sum(decay, axis=-1)
    weight = config.nll
    if use_argmax_stop:
      weight = jnp.where(state.lowered, _EASED * weight, weight)
    value = weight * nll + config.decay * decay
    base, term = state.base, jnp.zeros_like(nll)
    if base.shape[1]:
      now = of_kl(logits) - of_kl(total)[:, None]
      first = (state.steps == 0)[:, None]
      base = jnp.where(first, jax.lax.stop_gradient(now), base)
      term = config.kl * jnp.sum(jnp.exp(now) * (now - base), axis=-1)
      value += term
    if not use_argmax_stop:
      return Aux(value, nll, base, seen, None, None)
    best = jnp.argmax(of_scored(logits), axis=-1) == assigned.label
    found = jnp.all(picked(best, True) | ~mask, axis=(1, 2))
    return Aux(value, nll, base, seen, found, term)

  return loss
