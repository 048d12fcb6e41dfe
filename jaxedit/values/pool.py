"""The room in which states are optimised: seats on a device, and their steps.

Loop state is kept a slot: an edit that is done stands still while others go on,
and a slot that is new starts afresh.

Axes: E slots, C contexts, R rows, N places, W suffix columns, P columns before
them, K scored places, n labels of a row, U layers above the edited one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from jaxedit.models import decoder, ragged
from jaxedit.models.spec import ModelSpec
from jaxedit.text.seating import Seats, Tile
from jaxedit.types import KV, Array, Params
from jaxedit.values.parts import lower, prefix_kv, spread, upper


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


class Ready(NamedTuple):
  """A tile of edits with all that stays constant."""

  h: Array  # [1, N, D] residual leaving the layer
  key: Array  # [U, E, rows, P, G, H]
  value: Array


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def prepare(
    spec: ModelSpec, params: Params, trunk: KV | None, tile: Tile, layer: int
) -> Ready:
  """Runs what stays constant for the edits of one tile."""
  slots, rows = tile.anchor.shape
  if trunk is not None:
    trunk = spread(trunk, tile.context)
  h = lower(spec, params, tile.tokens, tile.rows, layer, trunk)
  before = ragged.take(h, tile.left)
  kv = prefix_kv(spec, params, before, tile.left.rows, layer, trunk)
  if kv is None:
    shape = (0, slots, rows, 1, spec.kv_heads, spec.head_size)
    empty = jnp.zeros(shape, params['embed']['embedding'].dtype)
    return Ready(h, empty, empty)
  split = lambda x: x.reshape(len(x), slots, rows, *x.shape[2:])
  return Ready(h, split(kv.key), split(kv.value))


class Pool(NamedTuple):
  """What the seated edits keep constant."""

  base: Array  # [1, N, D] residual leaving the layer
  key: Array  # [U, E, rows, P, G, H]
  value: Array


@functools.partial(jax.jit, donate_argnums=0)
def seat(
    pool: Pool, ready: Ready, slot: Array, source: Array, move: Array
) -> Pool:
  """Copies an edit from a tile to its slot; `move` is [2, n] places from, to."""

  def put(old: Array, new: Array) -> Array:
    part = jax.lax.dynamic_slice_in_dim(new, source, 1, axis=1)
    # Unseen columns too: what is not finite would come through a weight of 0.
    part = jnp.pad(
        part, [(0, 0)] * 3 + [(0, old.shape[3] - part.shape[3])] + [(0, 0)] * 2
    )
    return jax.lax.dynamic_update_slice(old, part, (0, slot, 0, 0, 0, 0))

  base = _move(pool.base, ready.h, move)
  return Pool(base, put(pool.key, ready.key), put(pool.value, ready.value))


@functools.partial(jax.jit, donate_argnums=0)
def shift(pool: Pool, h: Array, move: Array) -> Pool:
  """Copies the states of an edit's next chunk; its rows stay in their slot."""
  return pool._replace(base=_move(pool.base, h, move))


def _move(base: Array, h: Array, move: Array) -> Array:
  """Copies [1, N, D] places `move[0]` of h to places `move[1]` of base."""
  taken = jnp.take(h[0], move[0], axis=0, mode='fill', fill_value=0)
  return base.at[0, move[1]].set(taken, mode='drop')


@functools.partial(jax.jit, donate_argnums=0)
def extend(
    pool: Pool, kv: tuple[Array, Array], slot: Array, column: Array
) -> Pool:
  """Appends a finished chunk's keys and values [U, R, W, G, H] to its rows."""

  def put(old: Array, new: Array) -> Array:
    new = new.reshape(len(new), *old.shape[1:3], *new.shape[2:])
    part = jax.lax.dynamic_slice_in_dim(new, slot, 1, axis=1)
    return jax.lax.dynamic_update_slice(old, part, (0, slot, 0, column, 0, 0))

  return pool._replace(key=put(pool.key, kv[0]), value=put(pool.value, kv[1]))


@flax.struct.dataclass
class State:
  """Loop state of the slots of a room."""

  delta: Array  # [E, D]
  adam: Any
  done: Array  # [E] bool
  loss: Array  # [E]
  likelihood: Array  # [E]
  steps: Array  # [E] int32
  finite: Array  # [E] bool
  base: Array  # [E, V] unedited log-probabilities of the KL row, or [E, 0]
  kv: tuple[Array, Array] | None  # [U, R, W, G, H] of the last step
  ran: Array  # [] int32 steps of the room


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


@functools.partial(jax.jit, static_argnames=('spec', 'watch'))
def start(spec: ModelSpec, pool: Pool, seats: Seats, watch: bool) -> State:
  """The state in which every slot is new."""
  slots, dtype = len(seats.live), pool.base.dtype
  delta = jnp.zeros([slots, spec.width], dtype)
  scalar = jnp.zeros([slots], dtype)
  kl = seats.keep.index.shape[0] > seats.label.shape[0]
  kv = None
  if watch and len(pool.key):
    shape = (len(pool.key), *seats.rows.index.shape, *pool.key.shape[4:])
    kv = (jnp.zeros(shape, pool.key.dtype),) * 2
  return State(
      delta=delta,
      adam=jax.vmap(_ADAM.init)(delta),
      done=jnp.zeros([slots], bool),
      loss=scalar,
      likelihood=scalar,
      steps=jnp.zeros([slots], jnp.int32),
      finite=jnp.ones([slots], bool),
      base=jnp.zeros([slots, spec.vocab if kl else 0], dtype),
      kv=kv,
      ran=jnp.int32(0),
  )


@jax.jit
def move(
    pool: Pool, state: State, slots: Array, places: Array
) -> tuple[Pool, State]:
  """Takes everybody to a room of other slots and places (`seating.Move`)."""

  def pick(x: Array, axis: int = 0) -> Array:
    return jnp.take(x, slots, axis=axis, mode='fill', fill_value=0)

  def pick_rows(x: Array) -> Array:
    kept = pick(x.reshape(len(x), len(state.done), -1, *x.shape[2:]), 1)
    return kept.reshape(len(x), -1, *x.shape[2:])

  base = jnp.take(pool.base, places, axis=1, mode='fill', fill_value=0)
  moved = jax.tree.map(pick, state.replace(kv=None, ran=None))
  kv = jax.tree.map(pick_rows, state.kv)
  return (
      Pool(base, pick(pool.key, 1), pick(pool.value, 1)),
      moved.replace(kv=kv, ran=jnp.zeros_like(state.ran)),
  )


class _Aux(NamedTuple):
  """What the loss of a step gives beside itself."""

  loss: Array
  likelihood: Array
  base: Array
  kv: tuple[Array, Array] | None


def _loss(
    spec: ModelSpec,
    params: Params,
    pool: Pool,
    seats: Seats,
    *,
    layer: int,
    watch: bool,
) -> Callable[[Array, State, Schedule], _Aux]:
  """Builds the loss of all slots at a change [E, D], each on its own."""
  scored = seats.label.shape[0]
  flat = lambda x: x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])
  kv = KV(flat(pool.key), flat(pool.value), seats.before)
  kv = kv if len(pool.key) else None
  z0 = _anchored(pool, seats)
  mask = seats.pick < scored
  label = jnp.pad(seats.label, (0, len(seats.keep.index) - scored))
  tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)

  def loss(delta: Array, state: State, schedule: Schedule) -> _Aux:
    moves = jnp.repeat(delta, seats.anchor.shape[1], axis=0)
    h = pool.base.at[0, seats.anchor.reshape(-1)].add(moves, mode='drop')
    h, seen = upper(spec, params, h, seats, kv=kv, layer=layer, watch=watch)
    # Labels and KL rows share the head: its weights are read once.
    logits = decoder.logits(spec, params, h[0])
    total = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0] - total
    picked = jnp.take(logprob, seats.pick, mode='fill', fill_value=0)
    picked = jnp.where(mask, picked, 0)
    nll = jnp.mean(-jnp.sum(picked, axis=-1) / tokens, axis=-1)
    size = jnp.maximum(jnp.sum(jnp.square(z0), axis=-1), 1e-30)
    value = nll + schedule.decay * norm(delta) / size
    base = state.base
    if base.shape[1]:
      now = logits[scored:] - total[scored:, None]
      first = (state.steps == 0)[:, None]
      base = jnp.where(first, jax.lax.stop_gradient(now), base)
      value += schedule.kl * jnp.sum(jnp.exp(now) * (now - base), axis=-1)
    return _Aux(value, nll, base, seen)

  return loss


def _anchored(pool: Pool, seats: Seats) -> Array:
  """[E, D] state of the unedited model at the anchor of the bare prompt."""
  return jnp.take(
      pool.base[0], seats.anchor[:, 0], axis=0, mode='fill', fill_value=0
  )


@functools.partial(
    jax.jit, static_argnames=('spec', 'layer', 'watch'), donate_argnames='state'
)
def advance(
    spec: ModelSpec,
    params: Params,
    pool: Pool,
    seats: Seats,
    state: State,
    fresh: Array,
    *,
    schedule: Schedule,
    layer: int,
    watch: bool,
) -> tuple[State, Array]:
  """Steps until one of the seated edits is done.

  Args:
    spec: the architecture.
    params: canonical parameters.
    pool: what stays constant.
    seats: who sits where.
    state: as this function, or `start`, left it.
    fresh: [E] bool, slots that are new and start at the unedited state.
    schedule: settings.
    layer: the layer whose output is changed.
    watch: keep the keys and values of every edit's last step.

  Returns:
    (the state, [E, D] z0).
  """
  new = start(spec, pool, seats, watch)
  state = _unless(~fresh, state, new.replace(kv=state.kv, ran=state.ran))
  loss = _loss(spec, params, pool, seats, layer=layer, watch=watch)
  z0 = _anchored(pool, seats)
  radius = schedule.clamp * norm(z0)

  def total(delta: Array, state: State) -> tuple[Array, _Aux]:
    aux = loss(delta, state, schedule)
    active = seats.live & ~state.done
    return jnp.sum(jnp.where(active, aux.loss, 0)), aux

  def step(state: State) -> State:
    grad, aux = jax.grad(total, has_aux=True)(state.delta, state)
    finite = jnp.isfinite(aux.loss)
    last = state.steps + 1 >= schedule.steps
    done = (aux.loss < schedule.threshold) | ~finite | last
    update, adam = jax.vmap(_ADAM.update)(grad, state.adam)
    delta = state.delta - schedule.rate * update
    size = norm(delta)
    scale = jnp.where(size > radius, radius / jnp.maximum(size, 1e-30), 1)
    # A stage that is done keeps the change its loss was evaluated at.
    delta = jnp.where(done[:, None], state.delta, delta * scale[:, None])
    moved = State(
        delta=delta,
        adam=adam,
        done=done,
        loss=aux.loss,
        likelihood=aux.likelihood,
        steps=state.steps + 1,
        finite=finite,
        base=aux.base,
        kv=aux.kv,
        ran=state.ran + 1,
    )
    return _unless(state.done | ~seats.live, state, moved)

  def waits(state: State) -> Array:
    return ~jnp.any(seats.live & state.done)

  return jax.lax.while_loop(waits, step, state), z0


def _unless(idle: Array, old: State, new: State) -> State:
  """The new state of slots at work, the old one of all others."""
  slots = len(idle)

  def pick(x: Array, y: Array) -> Array:
    return jnp.where(idle.reshape(-1, *[1] * (x.ndim - 1)), x, y)

  def pick_rows(x: Array, y: Array) -> Array:
    rows = jnp.repeat(idle, x.shape[1] // slots)
    return jnp.where(rows[None, :, None, None, None], x, y)

  kv = jax.tree.map(pick_rows, old.kv, new.kv)
  ran = new.ran
  old, new = (s.replace(kv=None, ran=None) for s in (old, new))
  return jax.tree.map(pick, old, new).replace(kv=kv, ran=ran)
