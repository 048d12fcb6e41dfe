"""Prefill, assignment and optimiser steps on a device, over explicit state.

  prefill    runs a packed batch of edits up to the edited layer
  assign     copies an edit, or its next chunk, to a slot of the running batch
  step       optimises until an edit in a slot is done
  append_kv  keeps a finished chunk as a prefix of the next
  compact    moves all edits to a smaller batch

`scheduler` decides when to run which. Loop state is per slot: a finished edit is frozen while others continue, and a
new one starts from the unedited state.

Axes as in `jaxedit.types`: E slots, C' sequences an edit, N token budget, S
suffix tokens, P prefix tokens, U layers above the edited one, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.batching.edits import PackedBatch
from jaxedit.batching.plan import BatchPlan, BatchShape
from jaxedit.batching.slots import SlotLayout
from jaxedit.deltas import ActiveDeltas, SiteDelta
from jaxedit.models import packing
from jaxedit.models.blocks import stored
from jaxedit.models.sharding import over_batch
from jaxedit.models.spec import ModelSpec
from jaxedit.targets import objective
from jaxedit.targets.objective import (
    Aux,
    norm,
)
from jaxedit.targets.partial_forward import (
    broadcast_prefix,
    lower,
    lower_parts,
    prefix_kv,
    shared_prefix_kv,
)
from jaxedit.targets.solvers import SOLVERS, Advice, Evaluated
from jaxedit.targets.state import (
    HalfOutputs,
    OptState,
    Prefill,
    PrefixCache,
    SharedTokens,
    TargetConfig,
)
from jaxedit.types import KV, Array, Params


@functools.partial(jax.jit, static_argnames=('spec', 'layer', 'output'))
def prefill(
    spec: ModelSpec,
    params: Params,
    shared_prefix: KV | SharedTokens | None,
    packed: PackedBatch,
    deltas: ActiveDeltas | Sequence[SiteDelta] = (),
    *,
    layer: int,
    output: str,
) -> Prefill:
  """Runs what stays constant for the edits of one packed batch.

  Args:
    spec: the architecture.
    params: canonical parameters.
    shared_prefix: keys and values of the shared prefixes, or None; with deltas
      their tokens, as every edit's own model gives them other keys.
    packed: the edits.
    deltas: of layers up to `layer`, that the sequences are under.
    layer: the edited layer.
    output: one of `state.OUTPUTS`.

  Returns:
    What stays constant.
  """
  slots, rows = packed.anchor.shape
  if isinstance(shared_prefix, SharedTokens):
    own = jax.tree.map(lambda x: jnp.asarray(x)[packed.context], shared_prefix)
    shared_prefix = shared_prefix_kv(spec, params, *own, deltas=deltas)
  elif shared_prefix is not None:
    shared_prefix = broadcast_prefix(shared_prefix, packed.context)
  parts = None
  tokens = (packed.tokens, packed.rows)
  given = dict(layer=layer, shared_prefix=shared_prefix, deltas=deltas)
  if output == 'block':
    h = lower(spec, params, *tokens, **given)
  else:
    h, (attn, mlp) = lower_parts(spec, params, *tokens, **given)
    parts = HalfOutputs(attn if output == 'attn+mlp' else None, mlp)
  before = packing.take(h, packed.prefix)
  kv = prefix_kv(spec, params, before, packed.prefix.rows, layer, shared_prefix)
  if kv is None:
    shape = (0, slots, rows, spec.kv_heads, 1, spec.head_size)
    empty = jnp.zeros(shape, stored(spec, params['embed']['embedding'].dtype))
    return Prefill(h, empty, empty, parts)
  split = lambda x: x.reshape(len(x), slots, rows, *x.shape[2:])
  return Prefill(h, split(kv.key), split(kv.value), parts)


def empty(
    prefilled: Prefill, plan: BatchPlan, batch_shape: BatchShape
) -> PrefixCache:
  """Makes the cache of a running batch without edits; see `Prefill`."""
  length = plan.shared + batch_shape.prefix_shape[1] + batch_shape.grow
  if batch_shape.shards == 1:
    return _empty(prefilled, batch_shape, plan.rows, length)
  return _empty_shards(prefilled, batch_shape, plan.rows, length)


def _empty(
    prefilled: Prefill, batch_shape: BatchShape, rows: int, length: int
) -> PrefixCache:
  """A cache of a number of sequences an edit and of prefix tokens."""
  zeros = lambda x, *shape: jnp.zeros(shape, x.dtype)
  layers, _, _, groups, _, size = prefilled.key.shape
  shape = (layers, batch_shape.slots, rows, groups)
  kv = lambda x: zeros(x, *shape, length if layers else 1, size)
  width = prefilled.h.shape[-1]
  return PrefixCache(
      zeros(prefilled.h, 1, batch_shape.token_budget, width),
      kv(prefilled.key),
      kv(prefilled.value),
      jax.tree.map(
          lambda x: zeros(x, batch_shape.slots, rows, width),
          prefilled.parts,
      ),
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _empty_shards(prefilled: Prefill, *shape: Any) -> PrefixCache:
  """`_empty`, on the devices of the prefilled batch: one may not hold all."""
  return _divided(prefilled, _empty(prefilled, *shape))


@functools.partial(jax.jit, donate_argnums=0, static_argnames='shards')
def assign(
    cache: PrefixCache,
    prefilled: Prefill,
    slot: Array,
    source: Array,
    move: Array,
    *,
    shards: int = 1,
) -> PrefixCache:
  """Copies an edit from a prefilled batch to its slot.

  Args:
    cache: of the running batch.
    prefilled: the prefilled batch.
    slot: of the running batch.
    source: slot of the prefilled batch.
    move: [2, C' * S] packed indices from and to, every sequence from its anchor
      on.
    shards: of both batches, `BatchShape.shards`.

  Returns:
    The cache.
  """

  def put(old: Array, new: Array) -> Array:
    part = packing.take_slot(new, source, axis=1, shards=shards)
    # Masked tokens too: non-finite numbers would pass through a weight of 0.
    part = jnp.pad(
        part, [(0, 0)] * 4 + [(0, old.shape[4] - part.shape[4])] + [(0, 0)]
    )
    return jax.lax.dynamic_update_slice(old, part, (0, slot, 0, 0, 0, 0))

  cache = _move(cache, prefilled, slot, move)
  key, value = put(cache.key, prefilled.key), put(cache.value, prefilled.value)
  return _divided(prefilled, cache._replace(key=key, value=value))


@functools.partial(jax.jit, donate_argnums=0)
def assign_chunk(
    cache: PrefixCache, prefilled: Prefill, slot: Array, move: Array
) -> PrefixCache:
  """Copies the hidden states of an edit's next chunk to its slot."""
  return _divided(prefilled, _move(cache, prefilled, slot, move))


def _divided(source: Any, cache: PrefixCache) -> PrefixCache:
  """Divides a cache over the devices of another tree, by slots and tokens."""
  rest = jax.sharding.PartitionSpec.UNCONSTRAINED
  divide = functools.partial(over_batch, source, rest=rest)
  return PrefixCache(
      divide(cache.base, 1),
      divide(cache.key, 1),
      divide(cache.value, 1),
      jax.tree.map(divide, cache.parts),
  )


def _move(
    cache: PrefixCache, prefilled: Prefill, slot: Array, move: Array
) -> PrefixCache:
  """Copies hidden states of the packed tokens `move[0]` to `move[1]`."""

  def taken(x: Array, index: Array) -> Array:
    return jnp.take(x[0], index, axis=0, mode='fill', fill_value=0)

  base = cache.base.at[0, move[1]].set(taken(prefilled.h, move[0]), mode='drop')
  # A sequence's first token is its anchor.
  anchor = move[0].reshape(cache.key.shape[2], -1)[:, 0]
  put = lambda old, new: old.at[slot].set(taken(new, anchor))
  parts = jax.tree.map(put, cache.parts, prefilled.parts)
  return cache._replace(base=base, parts=parts)


@functools.partial(jax.jit, donate_argnums=0, static_argnames='shards')
def append_kv(
    cache: PrefixCache,
    kv: tuple[Array, Array],
    slot: Array,
    column: Array,
    *,
    shards: int = 1,
) -> PrefixCache:
  """Appends a finished chunk's keys and values [U, B, G, S, H] to a prefix."""

  def put(old: Array, new: Array) -> Array:
    new = new.reshape(len(new), *old.shape[1:3], *new.shape[2:])
    part = packing.take_slot(new, slot, axis=1, shards=shards)
    return jax.lax.dynamic_update_slice(old, part, (0, slot, 0, 0, column, 0))

  return _divided(
      kv,
      cache._replace(key=put(cache.key, kv[0]), value=put(cache.value, kv[1])),
  )


@functools.partial(jax.jit, static_argnames=('spec', 'solver', 'return_kv'))
def start(
    spec: ModelSpec,
    cache: PrefixCache,
    assigned: SlotLayout,
    *,
    solver: str,
    return_kv: bool,
) -> OptState:
  """The optimiser state in which every slot is new."""
  slots, dtype = len(assigned.live), cache.base.dtype
  delta = jnp.zeros(objective.unedited(cache, assigned).shape, dtype)
  scalar = jnp.zeros([slots], dtype)
  kl = assigned.outputs.index.shape[0] > assigned.label.shape[0]
  kv = None
  if return_kv and len(cache.key):
    rows, length = assigned.rows.index.shape
    groups, size = cache.key.shape[3], cache.key.shape[5]
    shape = (len(cache.key), rows, groups, length, size)
    kv = (jnp.zeros(shape, cache.key.dtype),) * 2
  return OptState(
      delta=delta,
      solver=jax.vmap(SOLVERS[solver].init)(delta),
      done=jnp.zeros([slots], bool),
      loss=scalar,
      likelihood=scalar,
      steps=jnp.zeros([slots], jnp.int32),
      idle=jnp.zeros([slots], jnp.int32),
      mark=jnp.full([slots], jnp.inf, dtype),
      finite=jnp.ones([slots], bool),
      lowered=jnp.zeros([slots], bool),
      base=jnp.zeros([slots, spec.vocab if kl else 0], dtype),
      kv=kv,
      ran=jnp.int32(0),
  )


@functools.partial(jax.jit, static_argnames='shards')
def compact(
    cache: PrefixCache,
    state: OptState,
    slots: Array,
    tokens: Array,
    *,
    shards: int = 1,
) -> tuple[PrefixCache, OptState]:
  """Moves all edits to a smaller batch shape (`slots.Compaction`)."""

  def taken(x: Array, index: Array, axis: int) -> Array:
    index = packing.local(index, x.shape[axis], shards)
    take = functools.partial(packing.take_slots, axis=axis)
    return packing.each_shard(
        take, x, index, shards=shards, axes=(axis, 0), out=axis
    )

  pick = lambda x, axis=0: taken(x, slots, axis)

  def pick_rows(x: Array) -> Array:
    kept = pick(x.reshape(len(x), len(state.done), -1, *x.shape[2:]), axis=1)
    return kept.reshape(len(x), -1, *x.shape[2:])

  base = taken(cache.base, tokens, 1)
  moved = jax.tree.map(pick, state.replace(kv=None, ran=None))
  kv = jax.tree.map(pick_rows, state.kv)
  parts = jax.tree.map(pick, cache.parts)
  key, value = pick(cache.key, axis=1), pick(cache.value, axis=1)
  return (
      _divided(cache, PrefixCache(base, key, value, parts)),
      moved.replace(kv=kv, ran=jnp.zeros_like(state.ran)),
  )


def split_config(config: TargetConfig) -> dict[str, Any]:
  """Keywords of `step`: numbers, and what another program is compiled for."""
  return dict(
      config=config._replace(solver=None),
      solver=config.solver,
      use_argmax_stop=bool(config.argmax_stop > 0),
  )


@functools.partial(
    jax.jit,
    static_argnames=(
        'spec', 'solver', 'layer', 'return_kv', 'use_argmax_stop',
    ),  # fmt: skip
    donate_argnames='state',
)
def step(
    spec: ModelSpec,
    params: Params,
    cache: PrefixCache,
    assigned: SlotLayout,
    state: OptState,
    fresh: Array,
    *,
    config: TargetConfig,
    solver: str,
    layer: int,
    return_kv: bool,
    use_argmax_stop: bool,
) -> tuple[OptState, Array]:
  """Evaluates losses and changes until one of the edits in slots is done.

  Args:
    spec: the architecture.
    params: canonical parameters.
    cache: what stays constant.
    assigned: the slot layout.
    state: the result of this function or of `start`.
    fresh: [E] bool, new slots, which start from the unedited state.
    config: settings; see `split_config`.
    solver: a key of `SOLVERS`.
    layer: the layer whose output is changed.
    return_kv: return the keys and values of every edit's last step in the
      state.
    use_argmax_stop: apply `TargetConfig.argmax_stop`.

  Returns:
    (the state, z0 of the shape of its `delta`).
  """
  new = start(spec, cache, assigned, solver=solver, return_kv=return_kv)
  state = _unless(~fresh, state, new.replace(kv=state.kv, ran=state.ran))
  loss = objective.build(
      spec,
      params,
      cache,
      assigned,
      layer=layer,
      return_kv=return_kv,
      use_argmax_stop=use_argmax_stop,
  )
  z0 = objective.unedited(cache, assigned)
  size = norm(z0)
  advise = jax.vmap(SOLVERS[solver].update, in_axes=(0, 0, None))

  def total(delta: Array, state: OptState) -> tuple[Array, Aux]:
    aux = loss(delta, state, config)
    active = assigned.live & ~state.done
    return jnp.sum(jnp.where(active, aux.loss, 0)), aux

  def update(state: OptState) -> OptState:
    grad, aux = jax.grad(total, has_aux=True)(state.delta, state)
    renewed = jnp.zeros_like(state.done)
    if use_argmax_stop:
      renewed = aux.found != state.lowered
    evaluated = Evaluated(state.delta, aux.loss, grad, renewed, size)
    advice = advise(state.solver, evaluated, config)
    moved = _advance(state, aux, advice, config)
    return _unless(state.done | ~assigned.live, state, moved)

  def waits(state: OptState) -> Array:
    return ~jnp.any(assigned.live & state.done)

  return jax.lax.while_loop(waits, update, state), z0


def _advance(
    state: OptState, aux: Aux, advice: Advice, config: TargetConfig
) -> OptState:
  """The state after an evaluation, as if all slots were at work.

  A slot whose solver rejects the change keeps what it has of the last step. An
  edit that ends keeps the change of its last step.
  """
  moved = state.replace(
      loss=aux.loss,
      likelihood=aux.likelihood,
      finite=jnp.isfinite(aux.loss),
      lowered=state.lowered if aux.found is None else aux.found,
      kv=aux.kv,
  )
  moved = _unless(~advice.accepted, state, moved)
  better = aux.loss < (1 - config.stagnation) * state.mark
  mark = jnp.where(better, aux.loss, state.mark)
  idle = jnp.where(better, 0, state.idle + 1)
  done = (moved.loss < config.threshold) | ~moved.finite
  done |= state.steps + 1 >= config.steps
  done |= (config.stagnation > 0) & (idle >= config.stagnation_steps)
  if aux.found is not None:
    fits = aux.found & (aux.term <= config.argmax_stop)
    done |= advice.accepted & fits
  still = done.reshape(-1, *[1] * (advice.delta.ndim - 1))
  return moved.replace(
      delta=jnp.where(still, advice.best, advice.delta),
      solver=advice.state,
      done=done,
      steps=state.steps + 1,
      idle=idle,
      # Losses of another weight are not compared.
      mark=jnp.where(moved.lowered != state.lowered, jnp.inf, mark),
      base=aux.base,
      ran=state.ran + 1,
  )


def _unless(free_slot: Array, old: OptState, new: OptState) -> OptState:
  """Selects the old state where `free_slot` is set, the new one elsewhere."""
  slots = len(free_slot)

  def pick(x: Array, y: Array) -> Array:
    return jnp.where(free_slot.reshape(-1, *[1] * (x.ndim - 1)), x, y)

  def pick_rows(x: Array, y: Array) -> Array:
    rows = jnp.repeat(free_slot, x.shape[1] // slots)
    return jnp.where(rows[None, :, None, None, None], x, y)

  kv = jax.tree.map(pick_rows, old.kv, new.kv)
  ran = new.ran
  old, new = (s.replace(kv=None, ran=None) for s in (old, new))
  return jax.tree.map(pick, old, new).replace(kv=kv, ran=ran)
