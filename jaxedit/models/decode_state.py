"""Prefill, assignment and steps of generation on a device, over explicit state.

  begin    runs what several prompts begin with alike
  prefill  runs right-padded prompts, or what is left of them, and chooses their
           first tokens
  assign   moves them to free slots of the running batch
  step     generates a segment of tokens for every sequence
  resize   changes the number of slots and the length of the cache

Index p of a sequence's cache is position p, so sequences of different lengths
share a batch. `decode` decides when to run which step.

Axes as in `jaxedit.types`: B slots, B' prompts of one prefill, P tokens of the
cache, n edited layers, E edits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from jaxedit import deltas as deltas_lib
from jaxedit.deltas import ActiveDeltas, SiteDelta
from jaxedit.models import decoder, packing, sampling
from jaxedit.models.spec import ModelSpec
from jaxedit.types import (
    KV,
    PADDING,
    SHARED,
    Array,
    Params,
    Tap,
    TokenLayout,
)

# Tokens of a segment; an ended text waits for half of one on average.
SEGMENT = 32


class TextState(NamedTuple):
  """The texts of a batch."""

  token: Array  # [B] int32 the last token, not in the cache yet
  place: Array  # [B] int32 its position
  step: Array  # [B] int32 new tokens so far
  live: Array  # [B] bool, whether the text is unfinished
  stream: Array  # [B] int32 number of the random stream
  edit_id: Array  # [B] int32 edit of the sequence
  seen: Array | None  # [B, V] bool tokens of the text, for a repetition penalty
  source: Array | None  # [B] int32 tokens of its source; None without encoder


class DecodeState(NamedTuple):
  """A batch of texts with its KV cache and the choices of deltas.

  Attributes:
    rows: the texts.
    cache: keys and values, [L, B, G, P, H]; without layers of an encoder.
    choices: of every delta, [n, B, ...]; see `deltas.ActiveDeltas`.
  """

  rows: TextState
  cache: tuple[Array, Array]
  choices: tuple[Any, ...] = ()

  @property
  def shape(self) -> tuple[int, int]:
    """(B, P)."""
    _, rows, _, width, _ = self.cache[0].shape
    return rows, width


@flax.struct.dataclass
class DecodeInputs:
  """The inputs that all compiled calls of a run share."""

  numbers: sampling.Numbers
  stop: Array  # [V] bool
  most: Array  # [] int32 new tokens at most
  deltas: tuple[SiteDelta, ...]
  per_edit: bool = flax.struct.field(pytree_node=False, default=False)


class Beginning(NamedTuple):
  """What the prompts of a prefill begin with alike.

  Attributes:
    cache: keys and values of all layers, [L, 1, G, P, H].
    tokens: [P] int32.
    count: [] int32 tokens, those after are padding.
  """

  cache: tuple[Array, Array]
  tokens: Array
  count: Array

  def prefix(self, rows: int) -> KV:
    """The same for every one of B' sequences."""
    width = len(self.tokens)
    column = jnp.arange(width, dtype=jnp.int32)
    segment = jnp.where(column < self.count, SHARED, PADDING)
    wide_ = lambda x: jnp.broadcast_to(x, (rows, width))
    copy = lambda x: jnp.broadcast_to(x, (len(x), rows, *x.shape[2:]))
    layout = TokenLayout(wide_(column), wide_(segment))
    return KV(*map(copy, self.cache), layout)

  def before(self, new: Array, old: Array) -> Array:
    """Joins keys or values: these, and behind them [L, B', G, T, H] new ones."""
    size = list(new.shape)
    size[3] += old.shape[3]
    whole = jnp.zeros(size, new.dtype)
    whole = whole.at[:, :, :, : old.shape[3]].set(old)
    at = (0, 0, 0, self.count, 0)
    return jax.lax.dynamic_update_slice(whole, new, at)


def empty(fresh: DecodeState, rows: int, width: int) -> DecodeState:
  """Makes a batch without texts.

  Args:
    fresh: prefilled texts, whose dtypes and sizes it has.
    rows: B.
    width: P, tokens of the cache.

  Returns:
    The batch.
  """
  zeros = lambda x, *shape: jnp.zeros(shape, x.dtype)
  put = lambda x: zeros(x, len(x), rows, *x.shape[2:])
  cache = lambda x: zeros(x, len(x), rows, x.shape[2], width, x.shape[4])
  return DecodeState(
      jax.tree.map(lambda x: zeros(x, rows, *x.shape[1:]), fresh.rows),
      tuple(map(cache, fresh.cache)),
      jax.tree.map(put, fresh.choices),
  )


def _run(
    spec: ModelSpec,
    params: Params,
    deltas: ActiveDeltas,
    *,
    start: int = 0,
    choose: bool = False,
) -> Callable[..., tuple[Array, tuple[Any, ...]]]:
  """Binds `run_layers` to the layers from `start` on.

  It returns KV of the layers over an encoder, or all, and choices if asked.
  """
  taps = [Tap('kv', tuple(range(spec.encoder_layers, spec.layers)))]
  if choose:
    taps += [
        Tap(f'choice/{i}', delta.layers)
        for i, delta in enumerate(deltas.deltas)
        if delta.chooses
    ]
  return functools.partial(
      decoder.run_layers,
      spec,
      params,
      start=start,
      stop=spec.layers,
      deltas=deltas,
      taps=tuple(taps),
  )


def _active(inputs: DecodeInputs, rows: TextState, **options) -> ActiveDeltas:
  """The deltas under which the texts are run."""
  edit_ids = rows.edit_id if inputs.per_edit else None
  return deltas_lib.active(inputs.deltas, edit_ids, **options)


def _append(
    rule: sampling.Rule, inputs: DecodeInputs, rows: TextState, logits: Array
) -> tuple[TextState, Array]:
  """Adds a token to unfinished texts.

  Args:
    rule: static settings of the choice.
    inputs: the inputs that all calls share.
    rows: B texts.
    logits: [B, V].

  Returns:
    (the texts, [B] int32 the token or -1).
  """
  token = sampling.choose(
      rule,
      inputs.numbers,
      logits,
      seen=rows.seen,
      stream=rows.stream,
      step=rows.step,
  )
  seen = rows.seen
  if rule.penalised:
    seen = seen.at[jnp.arange(len(token)), token].set(True)
  step = rows.step + rows.live
  longer = rows._replace(
      token=jnp.where(rows.live, token, rows.token),
      place=rows.place + rows.live,
      step=step,
      live=rows.live & ~inputs.stop[token] & (step < inputs.most),
      seen=seen,
  )
  return longer, jnp.where(rows.live, token, -1)


@functools.partial(jax.jit, static_argnames='spec')
def begin(
    spec: ModelSpec,
    params: Params,
    inputs: DecodeInputs,
    tokens: Array,
    count: Array,
) -> Beginning:
  """Runs what several prompts begin with alike.

  Args:
    spec: the architecture.
    params: canonical parameters.
    inputs: the inputs that all calls share; no delta chooses.
    tokens: [P] int32, padded on the right.
    count: [] int32 tokens.

  Returns:
    The beginning.
  """
  layout = decoder.token_layout(jnp.arange(len(tokens))[None] < count)
  h = decoder.embed(spec, params, tokens[None], layout)
  own = deltas_lib.active(inputs.deltas)
  _, (cache,) = _run(spec, params, own)(h, layout)
  return Beginning(cache, tokens, count)


@functools.partial(jax.jit, static_argnames=('spec', 'rule'))
def prefill(
    spec: ModelSpec,
    params: Params,
    inputs: DecodeInputs,
    tokens: Array,
    *,
    length: Array,
    stream: Array,
    edit_id: Array,
    rule: sampling.Rule,
    beginning: Beginning | None = None,
) -> tuple[DecodeState, Array]:
  """Runs prompts and chooses their first tokens.

  Args:
    spec: the architecture.
    params: canonical parameters.
    inputs: the inputs that all calls share.
    tokens: [B', T] right-padded prompts.
    length: [B'] tokens of each, at least one.
    stream: [B'] numbers of their random streams.
    edit_id: [B'] their edits.
    rule: static settings of the choice.
    beginning: what all of them begin with, if `tokens` are the rest of each;
      not with edits side by side.

  Returns:
    (a batch of its own, [B'] first tokens).
  """
  valid = jnp.arange(tokens.shape[1]) < length[:, None]
  layout = decoder.token_layout(valid, decoder.source_of(spec, tokens))
  start, prefix = 0, None
  if beginning is not None:
    start, prefix = beginning.count, beginning.prefix(len(tokens))
    layout = layout.replace(positions=layout.positions + start)
  h = decoder.embed(spec, params, tokens, layout)
  each = jnp.arange(len(tokens))
  seen = None
  if rule.penalised:
    seen = jnp.zeros((len(tokens), spec.vocab), bool)
    written = jnp.where(tokens < 0, spec.vocab, tokens)  # no source
    seen = seen.at[each[:, None], written].max(valid, mode='drop')
    if beginning is not None:
      there = jnp.arange(len(beginning.tokens)) < start
      seen = seen.at[:, beginning.tokens].max(there)
  rows = TextState(
      token=jnp.zeros_like(length),
      place=start + length - 1,
      step=jnp.zeros_like(length),
      live=jnp.ones_like(length, bool),
      stream=stream,
      edit_id=edit_id,
      seen=seen,
      source=jnp.sum(tokens < 0, axis=1) if spec.encoder_layers else None,
  )
  own = _active(inputs, rows)
  run = _run(spec, params, own, choose=True)
  h, (cache, *chosen) = run(h, layout, prefix=prefix)
  if beginning is not None:
    cache = tuple(map(beginning.before, cache, beginning.cache))
  chosen = iter(chosen)
  choices = tuple(next(chosen) if d.chooses else () for d in inputs.deltas)
  logits = decoder.logits(spec, params, h[each, length - 1])
  rows, first = _append(rule, inputs, rows, logits)
  return DecodeState(rows, cache, choices), first


@functools.partial(jax.jit, donate_argnames='state')
def assign(state: DecodeState, fresh: DecodeState, slots: Array) -> DecodeState:
  """Assigns prefilled texts to slots of a batch.

  Args:
    state: B slots.
    fresh: B' texts; of a cache longer than that of `state` the end is padding.
    slots: [B'] int32 slots to take; B or more drops the text.

  Returns:
    The batch.
  """
  width = min(fresh.shape[1], state.shape[1])
  put = lambda old, new: old.at[slots].set(new, mode='drop')
  cache = tuple(
      old.at[:, slots, :, :width].set(new[:, :, :, :width], mode='drop')
      for old, new in zip(state.cache, fresh.cache)
  )
  put_choice = lambda old, new: old.at[:, slots].set(new, mode='drop')
  return DecodeState(
      jax.tree.map(put, state.rows, fresh.rows),
      cache,
      jax.tree.map(put_choice, state.choices, fresh.choices),
  )


@functools.partial(jax.jit, static_argnames='width')
def resize(state: DecodeState, kept: Array, width: int) -> DecodeState:
  """Changes the slots and the length of the cache.

  Args:
    state: B slots.
    kept: slots to keep, in order; B or more makes an empty slot.
    width: tokens of the cache, static.

  Returns:
    A batch with the slots of `kept`.
  """
  take = functools.partial(packing.take_slots, slots=kept)

  def tokens(x: Array) -> Array:
    x = take(x[:, :, :, :width], axis=1)
    added = width - x.shape[3]
    return jnp.pad(x, (*((0, 0),) * 3, (0, added), (0, 0)))

  rows = jax.tree.map(take, state.rows)
  choices = jax.tree.map(functools.partial(take, axis=1), state.choices)
  return DecodeState(rows, tuple(map(tokens, state.cache)), choices)


@functools.partial(
    jax.jit, static_argnames=('spec', 'rule'), donate_argnames='state'
)
def step(
    spec: ModelSpec,
    params: Params,
    inputs: DecodeInputs,
    state: DecodeState,
    *,
    rule: sampling.Rule,
) -> tuple[DecodeState, Array]:
  """Generates one segment.

  Args:
    spec: the architecture.
    params: canonical parameters.
    inputs: the inputs that all calls share.
    state: B slots with a cache of enough tokens.
    rule: static settings of the choice.

  Returns:
    (the batch, [B, SEGMENT] tokens, -1 where none).
  """
  size, width = state.shape
  choices = state.choices
  generated = jnp.zeros((size, 1), bool)
  own = _active(inputs, state.rows, prompt=generated, choices=choices)
  # What is generated passes an encoder unread.
  run = _run(spec, params, own, start=spec.encoder_layers)
  each, column = jnp.arange(size), jnp.arange(width, dtype=jnp.int32)
  column = jnp.broadcast_to(column, (size, width))

  def unfinished(carry: tuple) -> Array:
    step, state, _ = carry
    return (step < SEGMENT) & jnp.any(state.rows.live)

  def write(carry: tuple) -> tuple:
    step, (rows, cache, _), out = carry
    place = rows.place[:, None]
    own = TokenLayout(place, jnp.full_like(place, SHARED))
    before = TokenLayout(column, jnp.where(column < place, SHARED, PADDING))
    if rows.source is not None:
      before = before.replace(source=column < rows.source[:, None])
    h = decoder.embed(spec, params, rows.token[:, None], own)
    h, (new,) = run(h, own, prefix=KV(*cache, before))
    cache = tuple(
        old.at[:, each, :, rows.place].set(jnp.swapaxes(x[:, :, :, 0], 0, 1))
        for old, x in zip(cache, new)
    )
    logits = decoder.logits(spec, params, h[:, 0])
    rows, token = _append(rule, inputs, rows, logits)
    state = DecodeState(rows, cache, choices)
    return step + 1, state, out.at[:, step].set(token)

  out = jnp.full((size, SEGMENT), -1, jnp.int32)
  _, state, out = jax.lax.while_loop(
      unfinished, write, (jnp.int32(0), state, out)
  )
  return state, out
