"""The loss of all seated edits at once, each on its own.

  nll * mean over contexts of [ mean over target tokens of -log P(y_j) ]
  + kl * KL(P_d || P_0) of the next token after the KL row
  + decay * sum over parts of |d| / |z0|^2

Axes: E slots, C contexts, R rows of an edit, N places, K scored places, n
labels of a row; part: the attention's change, then the MLP's.

Source: Meng et al. 2022a (ROME, arXiv 2202.05262), equation 4; Li et al. 2023
(PMET, arXiv 2308.08742), section 3, for two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.batching.slots import Seats
from jaxedit.models import decoder
from jaxedit.models.blocks import Norm
from jaxedit.models.spec import ModelSpec
from jaxedit.targets.partial_forward import upper
from jaxedit.targets.state import (
    Pool,
    Schedule,
    State,
)
from jaxedit.types import KV, Array, Params

# Of its weight, what the likelihood keeps where `Schedule.ease` applies.
_EASED = 0.1


def norm(x: Array) -> Array:
  """Euclidean length along the last axis, with gradient 0 at 0."""
  square = jnp.sum(jnp.square(x), axis=-1)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def unedited(pool: Pool, seats: Seats) -> Array:
  """The outputs that are changed, before any change.

  Args:
    pool: what stays constant.
    seats: who sits where.

  Returns:
    [E, D], or [E, part, D], at the anchor of the bare prompt.
  """
  if pool.parts is None:
    return _anchored(pool, seats.anchor[:, 0])
  attn, mlp = pool.parts
  if attn is None:
    return mlp[:, 0]
  return jnp.stack([attn[:, 0], mlp[:, 0]], axis=1)


def _anchored(pool: Pool, anchor: Array) -> Array:
  """[..., D] unedited residuals at places [...]."""
  return jnp.take(pool.base[0], anchor, axis=0, mode='fill', fill_value=0)


def _changed(
    spec: ModelSpec,
    params: Params,
    pool: Pool,
    seats: Seats,
    *,
    layer: int,
) -> Callable[[Array], Array]:
  """Builds the function from a change to the residual [1, N, D] with it."""
  anchor = seats.anchor.reshape(-1)

  def add(delta: Array) -> Array:
    moves = jnp.repeat(delta, seats.anchor.shape[1], axis=0)
    return pool.base.at[0, anchor].add(moves, mode='drop')

  if pool.parts is None or pool.parts.attn is None:
    return add
  if spec.residual != 'sequential':
    return lambda delta: add(jnp.sum(delta, axis=1))
  middle = _anchored(pool, seats.anchor) - pool.parts.mlp  # [E, R, D]
  weights = {'params': decoder.layer_params(params, layer)['mlp_norm']}

  def run(delta: Array) -> Array:
    m = middle + delta[:, :1]
    x = Norm(spec).apply(weights, m)
    y, _ = decoder.write_layer(spec, params, x, layer=layer)
    out = (m + y + delta[:, 1:]).reshape(len(anchor), -1)
    return pool.base.at[0, anchor].set(out, mode='drop')

  return run


class Aux(NamedTuple):
  """What the loss of a step gives beside itself.

  Attributes:
    loss: [E] nats.
    likelihood: [E] mean negative log-likelihood of a target token, nats.
    base: [E, V] unedited log-probabilities of the KL row, or [E, 0].
    kv: keys and values of the suffixes, or None.
    found: [E] bool, all target tokens are the most probable ones; None unless
      asked for.
    term: [E] KL term as it weighs in the loss, nats.
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
    pool: Pool,
    seats: Seats,
    *,
    layer: int,
    watch: bool,
    easing: bool,
) -> Callable[[Array, State, Schedule], Aux]:
  """Builds the loss of all slots.

  Args:
    spec: the architecture.
    params: canonical parameters.
    pool: what stays constant.
    seats: who sits where.
    layer: the edited layer.
    watch: give the keys and values of the suffixes as well.
    easing: apply `Schedule.ease`.

  Returns:
    (change [E, D] or [E, part, D], state, settings) -> `Aux`.
  """
  scored = seats.label.shape[0]
  flat = lambda x: x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])
  kv = KV(flat(pool.key), flat(pool.value), seats.before)
  kv = kv if len(pool.key) else None
  z0 = unedited(pool, seats)
  changed = _changed(spec, params, pool, seats, layer=layer)
  mask = seats.pick < scored
  label = jnp.pad(seats.label, (0, len(seats.keep.index) - scored))
  tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)

  def loss(delta: Array, state: State, schedule: Schedule) -> Aux:
    h = changed(delta)
    h, seen = upper(spec, params, h, seats, kv=kv, layer=layer, watch=watch)
    # Labels and KL rows share the head: its weights are read once.
    logits = decoder.logits(spec, params, h[0])
    total = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0] - total
    picked = jnp.take(logprob, seats.pick, mode='fill', fill_value=0)
    picked = jnp.where(mask, picked, 0)
    nll = jnp.mean(-jnp.sum(picked, axis=-1) / tokens, axis=-1)
    size = jnp.maximum(jnp.sum(jnp.square(z0), axis=-1), 1e-30)
    decay = norm(delta) / size
    decay = decay if decay.ndim == 1 else jnp.sum(decay, axis=-1)
    weight = schedule.nll
    if easing:
      weight = jnp.where(state.eased, _EASED * weight, weight)
    value = weight * nll + schedule.decay * decay
    base, term = state.base, jnp.zeros_like(nll)
    if base.shape[1]:
      now = logits[scored:] - total[scored:, None]
      first = (state.steps == 0)[:, None]
      base = jnp.where(first, jax.lax.stop_gradient(now), base)
      term = schedule.kl * jnp.sum(jnp.exp(now) * (now - base), axis=-1)
      value += term
    if not easing:
      return Aux(value, nll, base, seen, None, None)
    best = jnp.argmax(logits[:scored], axis=-1) == seats.label
    best = jnp.take(best, seats.pick, mode='fill', fill_value=True)
    found = jnp.all(best | ~mask, axis=(1, 2))
    return Aux(value, nll, base, seen, found, term)

  return loss
