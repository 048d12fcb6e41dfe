"""The room in which states are optimised: seats on a device, and their steps.

Loop state is kept a slot: an edit that is done stands still while others go on,
and a slot that is new starts afresh.

Axes: E slots, R rows of an edit, N places, W suffix columns, P columns before
them, U layers above the edited one, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from jaxedit.batching.packer import Tile
from jaxedit.batching.slots import Seats
from jaxedit.models import packing
from jaxedit.models.blocks import stored
from jaxedit.models.spec import ModelSpec
from jaxedit.targets import objective
from jaxedit.targets.objective import (
    Aux,
    norm,
)
from jaxedit.targets.partial_forward import (
    lower,
    lower_parts,
    prefix_kv,
    spread,
)
from jaxedit.targets.state import (
    Parts,
    Pool,
    Ready,
    Schedule,
    State,
)
from jaxedit.types import KV, Array, Params


@functools.partial(jax.jit, static_argnames=('spec', 'layer', 'output'))
def prepare(
    spec: ModelSpec,
    params: Params,
    trunk: KV | None,
    tile: Tile,
    *,
    layer: int,
    output: str,
) -> Ready:
  """Runs what stays constant for the edits of one tile.

  Args:
    spec: the architecture.
    params: canonical parameters.
    trunk: keys and values that edits share, or None.
    tile: the edits.
    layer: the edited layer.
    output: one of `state.OUTPUTS`.

  Returns:
    What stays constant.
  """
  slots, rows = tile.anchor.shape
  if trunk is not None:
    trunk = spread(trunk, tile.context)
  parts = None
  if output == 'block':
    h = lower(spec, params, tile.tokens, tile.rows, layer, trunk)
  else:
    h, (attn, mlp) = lower_parts(
        spec, params, tile.tokens, tile.rows, layer=layer, trunk=trunk
    )
    parts = Parts(attn if output == 'attn+mlp' else None, mlp)
  before = packing.take(h, tile.left)
  kv = prefix_kv(spec, params, before, tile.left.rows, layer, trunk)
  if kv is None:
    shape = (0, slots, rows, spec.kv_heads, 1, spec.head_size)
    empty = jnp.zeros(shape, stored(spec, params['embed']['embedding'].dtype))
    return Ready(h, empty, empty, parts)
  split = lambda x: x.reshape(len(x), slots, rows, *x.shape[2:])
  return Ready(h, split(kv.key), split(kv.value), parts)


@functools.partial(jax.jit, donate_argnums=0)
def seat(
    pool: Pool, ready: Ready, slot: Array, source: Array, move: Array
) -> Pool:
  """Copies an edit from a tile to its slot.

  Args:
    pool: where to.
    ready: the tile.
    slot: of the room.
    source: slot of the tile.
    move: [2, R * W] places from and to, every row from its anchor on.

  Returns:
    The pool.
  """

  def put(old: Array, new: Array) -> Array:
    part = jax.lax.dynamic_slice_in_dim(new, source, 1, axis=1)
    # Unseen columns too: what is not finite would come through a weight of 0.
    part = jnp.pad(
        part, [(0, 0)] * 4 + [(0, old.shape[4] - part.shape[4])] + [(0, 0)]
    )
    return jax.lax.dynamic_update_slice(old, part, (0, slot, 0, 0, 0, 0))

  pool = _move(pool, ready, slot, move)
  return pool._replace(
      key=put(pool.key, ready.key), value=put(pool.value, ready.value)
  )


@functools.partial(jax.jit, donate_argnums=0)
def shift(pool: Pool, ready: Ready, slot: Array, move: Array) -> Pool:
  """Copies the states of an edit's next chunk; its rows stay in their slot."""
  return _move(pool, ready, slot, move)


def _move(pool: Pool, ready: Ready, slot: Array, move: Array) -> Pool:
  """Copies states from places `move[0]` of a tile to `move[1]` of the pool."""

  def taken(x: Array, places: Array) -> Array:
    return jnp.take(x[0], places, axis=0, mode='fill', fill_value=0)

  base = pool.base.at[0, move[1]].set(taken(ready.h, move[0]), mode='drop')
  # A row's first place is its anchor.
  anchor = move[0].reshape(pool.key.shape[2], -1)[:, 0]
  put = lambda old, new: old.at[slot].set(taken(new, anchor))
  parts = jax.tree.map(put, pool.parts, ready.parts)
  return pool._replace(base=base, parts=parts)


@functools.partial(jax.jit, donate_argnums=0)
def extend(
    pool: Pool, kv: tuple[Array, Array], slot: Array, column: Array
) -> Pool:
  """Appends a finished chunk's keys and values [U, R, G, W, H] to its rows."""

  def put(old: Array, new: Array) -> Array:
    new = new.reshape(len(new), *old.shape[1:3], *new.shape[2:])
    part = jax.lax.dynamic_slice_in_dim(new, slot, 1, axis=1)
    return jax.lax.dynamic_update_slice(old, part, (0, slot, 0, 0, column, 0))

  return pool._replace(key=put(pool.key, kv[0]), value=put(pool.value, kv[1]))


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


@functools.partial(jax.jit, static_argnames=('spec', 'watch'))
def start(spec: ModelSpec, pool: Pool, seats: Seats, watch: bool) -> State:
  """The state in which every slot is new."""
  slots, dtype = len(seats.live), pool.base.dtype
  delta = jnp.zeros(objective.unedited(pool, seats).shape, dtype)
  scalar = jnp.zeros([slots], dtype)
  kl = seats.keep.index.shape[0] > seats.label.shape[0]
  kv = None
  if watch and len(pool.key):
    rows, columns = seats.rows.index.shape
    groups, size = pool.key.shape[3], pool.key.shape[5]
    shape = (len(pool.key), rows, groups, columns, size)
    kv = (jnp.zeros(shape, pool.key.dtype),) * 2
  return State(
      delta=delta,
      adam=jax.vmap(_ADAM.init)(delta),
      done=jnp.zeros([slots], bool),
      loss=scalar,
      likelihood=scalar,
      steps=jnp.zeros([slots], jnp.int32),
      finite=jnp.ones([slots], bool),
      eased=jnp.zeros([slots], bool),
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
  parts = jax.tree.map(pick, pool.parts)
  return (
      Pool(base, pick(pool.key, 1), pick(pool.value, 1), parts),
      moved.replace(kv=kv, ran=jnp.zeros_like(state.ran)),
  )


@functools.partial(
    jax.jit,
    static_argnames=('spec', 'layer', 'watch', 'easing'),
    donate_argnames='state',
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
    easing: bool,
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
    easing: apply `Schedule.ease`.

  Returns:
    (the state, z0 of the shape of its `delta`).
  """
  new = start(spec, pool, seats, watch)
  state = _unless(~fresh, state, new.replace(kv=state.kv, ran=state.ran))
  loss = objective.build(
      spec, params, pool, seats, layer=layer, watch=watch, easing=easing
  )
  z0 = objective.unedited(pool, seats)
  radius = schedule.clamp * norm(z0)

  def total(delta: Array, state: State) -> tuple[Array, Aux]:
    aux = loss(delta, state, schedule)
    active = seats.live & ~state.done
    return jnp.sum(jnp.where(active, aux.loss, 0)), aux

  def step(state: State) -> State:
    grad, aux = jax.grad(total, has_aux=True)(state.delta, state)
    finite = jnp.isfinite(aux.loss)
    last = state.steps + 1 >= schedule.steps
    done = (aux.loss < schedule.threshold) | ~finite | last
    if easing:
      done |= aux.found & (aux.term <= schedule.ease)
    update, adam = jax.vmap(_ADAM.update)(grad, state.adam)
    delta = state.delta - schedule.rate * update
    size = norm(delta)
    scale = jnp.where(size > radius, radius / jnp.maximum(size, 1e-30), 1)
    # A stage that is done keeps the change its loss was evaluated at.
    still = done.reshape(-1, *[1] * (delta.ndim - 1))
    delta = jnp.where(still, state.delta, delta * scale[..., None])
    moved = State(
        delta=delta,
        adam=adam,
        done=done,
        loss=aux.loss,
        likelihood=aux.likelihood,
        steps=state.steps + 1,
        finite=finite,
        eased=aux.found if easing else state.eased,
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
