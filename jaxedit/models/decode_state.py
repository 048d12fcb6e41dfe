"""A batch of texts on a device, and what is done to it.

  read      new prompts, right-padded, become a small batch with first tokens
  seat      their texts go to free rows of the large one
  extend    every row writes a segment of columns, each at its own place
  resize    other rows and columns, as the texts need them

Column p of a row's cache is its position p, so rows of any age stand side by
side. What decides when to do which is `decode`.

Axes: B rows, P cache columns, Q rows read together, n edited layers, E edits.
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
from jaxedit.models import decoder, sampling
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

# Columns of a segment: rows that have ended wait for half of it on average.
SEGMENT = 32


class TextState(NamedTuple):
  """The texts of a batch."""

  token: Array  # [B] int32 the last token, not in the cache yet
  place: Array  # [B] int32 its position
  step: Array  # [B] int32 new tokens so far
  live: Array  # [B] bool, the text goes on
  stream: Array  # [B] int32 number of the random stream
  edit_id: Array  # [B] int32 edit of the row
  seen: Array | None  # [B, V] bool tokens of the text, where they matter


class DecodeState(NamedTuple):
  """A batch of texts with what earlier tokens left.

  Attributes:
    rows: the texts.
    cache: keys and values of all layers, [L, B, G, P, H].
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
  """What every compiled call of one run is given."""

  numbers: sampling.Numbers
  stop: Array  # [V] bool
  most: Array  # [] int32 new tokens at most
  deltas: tuple[SiteDelta, ...]
  per_edit: bool = flax.struct.field(pytree_node=False, default=False)


def empty(
    spec: ModelSpec,
    params: Params,
    inputs: DecodeInputs,
    *,
    rows: int,
    width: int,
    rule: sampling.Rule,
) -> DecodeState:
  """Makes a batch without texts.

  Args:
    spec: the architecture.
    params: canonical parameters; keys and values have their dtype.
    inputs: what all calls share.
    rows: B.
    width: P, tokens of the cache.
    rule: static settings of the choice of tokens.

  Returns:
    The batch.
  """
  dtype = params['layers']['attn']['k']['kernel'].dtype
  shape = (spec.layers, rows, spec.kv_heads, width, spec.head_size)
  zeros = lambda: jnp.zeros(rows, jnp.int32)
  texts = TextState(
      token=zeros(),
      place=zeros(),
      step=zeros(),
      live=jnp.zeros(rows, bool),
      stream=zeros(),
      edit_id=zeros(),
      seen=jnp.zeros((rows, spec.vocab), bool) if rule.penalised else None,
  )
  choices = ((),) * len(inputs.deltas)
  if any(delta.chooses for delta in inputs.deltas):
    ones = jnp.ones(rows, jnp.int32)
    run = functools.partial(prefill, spec, rule=rule)
    shapes, _ = jax.eval_shape(
        run,
        params,
        inputs,
        ones[:, None],
        length=ones,
        stream=ones,
        edit_id=ones,
    )
    choices = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), shapes.choices
    )
  cache = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
  return DecodeState(texts, cache, choices)


def _run(
    spec: ModelSpec,
    params: Params,
    deltas: ActiveDeltas,
    *,
    choose: bool = False,
) -> Callable[..., tuple[Array, tuple[Any, ...]]]:
  """The whole stack of layers, with its KV and, if asked for, choices."""
  taps = [Tap('kv', tuple(range(spec.layers)))]
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
      start=0,
      stop=spec.layers,
      deltas=deltas,
      taps=tuple(taps),
  )


def _active(inputs: DecodeInputs, rows: TextState, **options) -> ActiveDeltas:
  """The deltas under which rows are run."""
  edit_ids = rows.edit_id if inputs.per_edit else None
  return deltas_lib.active(inputs.deltas, edit_ids, **options)


def _append(
    rule: sampling.Rule, inputs: DecodeInputs, rows: TextState, logits: Array
) -> tuple[TextState, Array]:
  """Adds a token to the texts that go on.

  Args:
    rule: static settings of the choice.
    inputs: what all calls share.
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
) -> tuple[DecodeState, Array]:
  """Runs prompts and chooses their first tokens.

  Args:
    spec: the architecture.
    params: canonical parameters.
    inputs: what all calls share.
    tokens: [Q, P] right-padded prompts.
    length: [Q] tokens of each, at least one.
    stream: [Q] numbers of their random streams.
    edit_id: [Q] their edits.
    rule: static settings of the choice.

  Returns:
    (a batch of its own, [Q] first tokens).
  """
  valid = jnp.arange(tokens.shape[1]) < length[:, None]
  layout = decoder.token_layout(valid)
  h = decoder.embed(spec, params, tokens, layout)
  each = jnp.arange(len(tokens))
  seen = None
  if rule.penalised:
    seen = jnp.zeros((len(tokens), spec.vocab), bool)
    seen = seen.at[each[:, None], tokens].max(valid)
  rows = TextState(
      token=jnp.zeros_like(length),
      place=length - 1,
      step=jnp.zeros_like(length),
      live=jnp.ones_like(length, bool),
      stream=stream,
      edit_id=edit_id,
      seen=seen,
  )
  own = _active(inputs, rows)
  h, (cache, *chosen) = _run(spec, params, own, choose=True)(h, layout)
  chosen = iter(chosen)
  choices = tuple(next(chosen) if d.chooses else () for d in inputs.deltas)
  logits = decoder.logits(spec, params, h[each, length - 1])
  rows, first = _append(rule, inputs, rows, logits)
  return DecodeState(rows, cache, choices), first


@functools.partial(jax.jit, donate_argnames='state')
def assign(state: DecodeState, fresh: DecodeState, slots: Array) -> DecodeState:
  """Puts texts into rows of a batch.

  Args:
    state: B rows.
    fresh: Q rows with no more columns.
    slots: [Q] int32 rows to take; B or more drops the text.

  Returns:
    The batch.
  """
  _, width = fresh.shape
  put = lambda old, new: old.at[slots].set(new, mode='drop')
  cache = tuple(
      old.at[:, slots, :, :width].set(new, mode='drop')
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
  """Goes on with other rows and columns.

  Args:
    state: B rows.
    kept: rows to keep, in order; B or more makes an empty row.
    width: columns of the cache, static.

  Returns:
    A batch of as many rows as `kept` has.
  """
  take = functools.partial(jnp.take, indices=kept, mode='fill', fill_value=0)

  def tokens(x: Array) -> Array:
    x = take(x[:, :, :, :width], axis=1)
    left = width - x.shape[3]
    return jnp.pad(x, (*((0, 0),) * 3, (0, left), (0, 0)))

  rows = jax.tree.map(functools.partial(take, axis=0), state.rows)
  choices = jax.tree.map(functools.partial(take, axis=1), state.choices)
  return DecodeState(rows, tuple(map(tokens, state.cache)), choices)


@functools.partial(
    jax.jit, static_argnames=('spec', 'rule'), donate_argnames='state'
)
def generate_segment(
    spec: ModelSpec,
    params: Params,
    inputs: DecodeInputs,
    state: DecodeState,
    *,
    rule: sampling.Rule,
) -> tuple[DecodeState, Array]:
  """Writes one segment.

  Args:
    spec: the architecture.
    params: canonical parameters.
    inputs: what all calls share.
    state: B rows with a cache of enough tokens.
    rule: static settings of the choice.

  Returns:
    (the batch, [B, segment] tokens, -1 where none).
  """
  size, width = state.shape
  choices = state.choices
  generated = jnp.zeros((size, 1), bool)
  own = _active(inputs, state.rows, prompt=generated, choices=choices)
  run = _run(spec, params, own)
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
