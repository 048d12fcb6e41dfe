"""Batched generation on a KV cache of fixed size.

Prompts are left-padded to a bucket, run once, and continued one column a step
until every row has stopped. Sampling draws from a stream of its own for every
prompt, so a text depends neither on the rows beside it nor on their number.

Not here: beam search, nucleus sampling, repetition penalties.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import (
    KV,
    TRUNK,
    Array,
    Columns,
    Delta,
    InputError,
    Params,
    Progress,
    Tap,
    silent,
)

# Widths to which prompts are padded, tokens.
_WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class _State(NamedTuple):
  """Loop state of one batch."""

  step: Array  # [] columns written so far
  token: Array  # [B] the last token of every row
  done: Array  # [B] bool
  out: Array  # [B, new] tokens so far
  cache: KV


def _pick(
    logits: Array, temperature: Array, top_k: int, keys: Array, step: Array
) -> Array:
  """Chooses the next token of every row: greedy at temperature 0.

  Args:
    logits: [B, V].
    temperature: [] divides the logits.
    top_k: keep that many, static; 0 keeps all.
    keys: [B] random keys, one a row.
    step: [] folded into the keys.

  Returns:
    [B] int32.
  """
  greedy = jnp.argmax(logits, axis=-1)
  if top_k:
    kept, names = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
  else:
    kept, names = logits, None
  scaled = kept / jnp.maximum(temperature, 1e-6)
  draw = lambda key, row: jax.random.categorical(
      jax.random.fold_in(key, step), row
  )
  drawn = jax.vmap(draw)(keys, scaled)
  if names is not None:
    drawn = jnp.take_along_axis(names, drawn[:, None], axis=-1)[:, 0]
  return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('spec', 'new', 'top_k'))
def _continue(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    valid: Array,
    *,
    keys: Array,
    stop: Array,
    temperature: Array,
    deltas: Sequence[Delta],
    new: int,
    top_k: int,
) -> Array:
  """Continues one padded batch.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, P] left-padded prompts.
    valid: [B, P] bool.
    keys: [B] random keys.
    stop: [V] bool, tokens that end a row.
    temperature: [] 0 for greedy.
    deltas: lazy kernel changes.
    new: tokens to add at most.
    top_k: see `_pick`.

  Returns:
    [B, new] tokens, -1 after the stop token (which is kept).
  """
  every = (Tap('kv', tuple(range(spec.layers))),)
  run = functools.partial(
      decoder.run_layers,
      spec,
      params,
      start=0,
      stop=spec.layers,
      deltas=deltas,
      taps=every,
  )
  columns = decoder.token_columns(valid)
  h = decoder.embed(spec, params, tokens, columns)
  h, ((key, value),) = run(h, columns)
  width = ((0, 0), (0, new))
  room = (*((0, 0),) * 2, (0, new), (0, 0), (0, 0))
  cache = KV(
      jnp.pad(key, room),
      jnp.pad(value, room),
      Columns(
          jnp.pad(columns.position, width), jnp.pad(columns.segment, width)
      ),
  )
  prompt = tokens.shape[1]
  length = jnp.sum(valid, axis=1)

  def choose(h: Array, step: Array) -> Array:
    logits = decoder.logits(spec, params, h[:, -1])
    return _pick(logits, temperature, top_k, keys, step)

  first = choose(h, jnp.int32(0))
  out = jnp.full((tokens.shape[0], new), -1, jnp.int32).at[:, 0].set(first)
  state = _State(jnp.int32(1), first, stop[first], out, cache)

  def unfinished(state: _State) -> Array:
    return (state.step < new) & ~jnp.all(state.done)

  def extend(state: _State) -> _State:
    column = prompt + state.step - 1
    own = Columns(
        (length + state.step - 1)[:, None].astype(jnp.int32),
        jnp.full_like(state.token, TRUNK)[:, None],
    )
    h = decoder.embed(spec, params, state.token[:, None], own)
    h, ((key, value),) = run(h, own, prefix=state.cache)
    put = jax.lax.dynamic_update_slice_in_dim
    seen = state.cache.columns
    cache = KV(
        put(state.cache.key, key, column, axis=2),
        put(state.cache.value, value, column, axis=2),
        Columns(
            put(seen.position, own.position, column, axis=1),
            put(seen.segment, own.segment, column, axis=1),
        ),
    )
    token = choose(h, state.step)
    written = jnp.where(state.done, -1, token)
    out = put(state.out, written[:, None], state.step, axis=1)
    done = state.done | stop[token]
    return _State(state.step + 1, token, done, out, cache)

  return jax.lax.while_loop(unfinished, extend, state).out


def _refuse_faulty(
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sizes: Mapping[str, float],
) -> None:
  """Raises one error for all settings and prompts that cannot be used."""
  least = {'max_new_tokens': 1, 'batch_size': 1, 'temperature': 0, 'top_k': 0}
  problems = [
      f'{name} is {size}; it must be at least {least[name]}'
      for name, size in sizes.items()
      if size < least[name]
  ]
  if unknown := [t for t in stop_ids if not 0 <= t < spec.vocab]:
    problems.append(
        f'stop token {unknown[0]} is unknown; the model knows 0 to'
        f' {spec.vocab - 1}'
    )
  new = int(sizes['max_new_tokens'])
  room = spec.max_positions - new
  for i, prompt in enumerate(prompts):
    if not 1 <= len(prompt) <= room:
      problems.append(
          f'prompt {i} has {len(prompt)} tokens; with {new} new ones the model'
          f' takes 1 to {room}: shorten it or ask for fewer new tokens'
      )
    # Inside jit such an id would be read as another one without a word.
    strange = sorted({t for t in prompt if not 0 <= t < spec.vocab})
    if strange:
      problems.append(
          f'prompt {i} has token {strange[0]}, but the model knows 0 to'
          f' {spec.vocab - 1}: use the tokenizer that belongs to the model'
      )
  if problems:
    raise InputError(*problems)


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    deltas: Sequence[Delta] = (),
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[list[int]]:
  """Continues prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    prompts: token ids, special tokens included, at least one each.
    max_new_tokens: tokens to add at most.
    stop_ids: tokens that end a text; the stop token is kept as its last.
    temperature: 0 is greedy; else divides the logits.
    top_k: draw among the k most probable; 0 among all.
    seed: prompt i draws from the stream (seed, i).
    deltas: lazy kernel changes, without a row axis.
    batch_size: rows a batch.
    progress: progress display.

  Returns:
    New tokens of every prompt, in order.

  Raises:
    InputError: a setting is out of range, or a prompt is empty, has a token
      that the model lacks or, with the new tokens, is longer than the model
      allows.
  """
  sizes = {
      'max_new_tokens': max_new_tokens,
      'batch_size': batch_size,
      'temperature': temperature,
      'top_k': top_k,
  }
  _refuse_faulty(spec, prompts, stop_ids, sizes)
  if not prompts:
    return []
  stop = np.zeros(spec.vocab, bool)
  stop[list(stop_ids)] = True
  root = jax.random.key(seed)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  texts: list[list[int]] = [[] for _ in prompts]
  rows = min(batch_size, len(prompts))
  with progress('generate', len(prompts), 'text') as advance:
    for first in range(0, len(order), rows):
      chosen = order[first : first + rows]
      longest = len(prompts[chosen[-1]])
      width = next((w for w in _WIDTHS if w >= longest), longest)
      tokens = np.zeros((rows, width), np.int32)
      valid = np.zeros((rows, width), bool)
      # Rows to spare repeat the last prompt and are dropped.
      indices = chosen + [chosen[-1]] * (rows - len(chosen))
      for row, i in enumerate(indices):
        tokens[row, width - len(prompts[i]) :] = prompts[i]
        valid[row, width - len(prompts[i]) :] = True
      out = _continue(
          spec,
          params,
          tokens,
          valid,
          keys=jax.vmap(lambda i: jax.random.fold_in(root, i))(
              jnp.asarray(indices)
          ),
          stop=stop,
          temperature=jnp.float32(temperature),
          deltas=tuple(deltas),
          new=max_new_tokens,
          top_k=top_k,
      )
      for i, row in zip(chosen, np.asarray(out)):
        texts[i] = [int(token) for token in row if token >= 0]
      advance(len(chosen))
  return texts
