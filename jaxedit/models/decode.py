"""Generates the continuations of many prompts by continuous batching.

Every sequence of a batch has a slot. A compiled call generates `SEGMENT` tokens
of each; between calls, slots whose text has ended take the next prompts, and
when none waits the batch shrinks to the active ones. The KV cache has as many
tokens a sequence as the longest text needs next, in powers of two.

Every prompt has a random stream and a step count of its own, so a text depends
neither on the sequences beside it, nor on their number, nor on the calls. Stop
strings are looked for between calls, and what follows one is dropped. What
prompts begin with alike may be run once (`share`); only they are prefilled
together then.

Not here: beam search. The batch and what runs it are in `decode_state`, how a
token is chosen in `sampling`.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import sources
from jaxedit.batching import beginnings, buckets, packer
from jaxedit.batching import slots as slots_lib
from jaxedit.batching.buckets import round_up
from jaxedit.batching.slots import Slots
from jaxedit.deltas import SiteDelta
from jaxedit.models import (
    decode_state,
    sampling,
)
from jaxedit.models import stop_texts as stop_lib
from jaxedit.models.sampling import GREEDY, Decoding
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.types import (
    InputError,
    Params,
    Progress,
    silent,
)

__all__ = ['GREEDY', 'Decoding', 'generate', 'refuse_faulty']

# Numbers of random streams are int32 on the device.
_STREAMS = 2**31

# Tokens of a batch of prompts and of a cache.
_LENGTHS, _CACHES = buckets.octaves(1, 16), buckets.octaves(1, 64)
# A batch is not halved below this: reading the weights dominates its cost then.
_FEW = 4


def refuse_faulty(
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    decoding: Decoding = GREEDY,
    batch_size: int = 1,
    streams: Sequence[int] | None = None,
    stop_texts: Sequence[Sequence[str]] | None = None,
    more: Sequence[str] = (),
) -> None:
  """Raises one error for all settings and prompts that cannot be used.

  Args:
    spec: the architecture.
    prompts: token ids.
    max_new_tokens: see `generate`, as all that follow.
    stop_ids: tokens that end a text.
    decoding: settings of the choice.
    batch_size: sequences.
    streams: numbers of the random streams.
    stop_texts: strings that end each text.
    more: further errors that the caller has found.

  Raises:
    InputError: with a message an error.
  """
  sizes = {'max_new_tokens': max_new_tokens, 'batch_size': batch_size}
  problems = [
      f'{name} is {size}; it must be at least 1'
      for name, size in sizes.items()
      if size < 1
  ]
  problems += [*decoding.errors(), *more]
  if stop_texts is not None:
    problems += stop_lib.errors(stop_texts, len(prompts))
  if unknown := [t for t in stop_ids if not 0 <= t < spec.vocab]:
    problems.append(
        f'stop token {unknown[0]} is unknown; the model knows 0 to'
        f' {spec.vocab - 1}'
    )
  streams = range(len(prompts)) if streams is None else streams
  if len(streams) != len(prompts):
    problems.append(
        f'streams has {len(streams)} entries for {len(prompts)} prompts'
    )
  if absent := [n for n in streams if not 0 <= n < _STREAMS]:
    problems.append(
        f'random stream {absent[0]} does not exist; they are numbered from 0'
        f' to {_STREAMS - 1}'
    )
  longest = spec.max_positions - max_new_tokens
  for i, prompt in enumerate(prompts):
    if not 1 <= len(prompt) <= longest:
      problems.append(
          f'prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones'
          f' the model takes 1 to {longest}: shorten it or ask for fewer new'
          ' tokens'
      )
    # Inside jit such an id would silently be read as another one.
    if spec.encoder_layers and (problem := sources.error(prompt)):
      problems.append(f'prompt {i}: {problem}')
      continue
    ids = sources.plain(prompt) if spec.encoder_layers else prompt
    strange = sorted({t for t in ids if not 0 <= t < spec.vocab})
    if strange:
      problems.append(
          f'prompt {i} has token {strange[0]}, but the model knows 0 to'
          f' {spec.vocab - 1}: use the tokenizer that belongs to the model'
      )
  if problems:
    raise InputError(*problems)


class _DecodeEngine:
  """The slot engine (`batching.slots`) of one run over a list of prompts.

  Attributes:
    texts: new tokens of every prompt so far.
    waiting: prompts without a slot, the shortest first.
    slots: the prompt of every slot.
  """

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      prompts: Sequence[Sequence[int]],
      *,
      inputs: decode_state.DecodeInputs,
      rule: sampling.Rule,
      rows: int,
      streams: Sequence[int],
      edit_ids: Sequence[int],
      stops: Sequence[Sequence[str]],
      detokenize: stop_lib.Detokenize | None,
      share: bool,
  ):
    self._spec, self._params, self._prompts = spec, params, prompts
    self._inputs, self._rule = inputs, rule
    self._streams, self._edit_ids = streams, edit_ids
    self._stops, self._detokenize = stops, detokenize
    self._most = int(inputs.most)
    # Prompts are prefilled a quarter of the batch at a time, so that few slots
    # have to be free for it and one program is enough.
    self._chunk = max(1, rows // 4)
    self._state: decode_state.DecodeState | None = None
    self._shape = 0, 0  # slots, tokens of the cache
    self.texts: list[list[int]] = [[] for _ in prompts]
    self._groups = beginnings.groups(prompts if share else [])
    self._beginning: tuple[int, decode_state.Beginning] | None = None
    group = lambda i: self._groups.get(i, (-1, 0))
    size = lambda i: (group(i)[0], len(prompts[i]))
    order = sorted(range(len(prompts)), key=size)
    self.waiting = collections.deque(order)
    self.slots = Slots(rows)

  def fill(self) -> bool:
    """Assigns waiting prompts; returns whether any slot has a text."""
    coming = self._next_prompts()
    texts = [i for chosen in coming for i in chosen]
    if not texts and not self.slots.active:
      return False
    self._resize(texts)
    for chosen in coming:
      self._assign(chosen)
    return True

  def step(self) -> Iterator[tuple[int, int]]:
    """Generates a segment; yields (slot, prompt) of the texts that end."""
    self._state, out = decode_state.step(
        self._spec, self._params, self._inputs, self._state, rule=self._rule
    )
    live, out = fetch(self._state.rows.live).copy(), fetch(out)
    unfinished = live.sum()
    for slot in self.slots.active:
      i = self.slots.assigned[slot]
      # The first token is the prefill's, which looks for no strings.
      seen = len(self.texts[i]) if len(self.texts[i]) > 1 else 0
      self.texts[i] += [int(token) for token in out[slot] if token >= 0]
      end = stop_lib.end_of(
          self.texts[i], self._stops[i], self._detokenize, seen=seen
      )
      if end is not None:
        self.texts[i], live[slot] = self.texts[i][:end], False
      if not live[slot]:
        yield slot, i
    if live.sum() < unfinished:
      rows = self._state.rows._replace(live=live)
      self._state = self._state._replace(rows=rows)

  def free(self, slot: int) -> None:
    """Frees the slot of a text that has ended."""
    self.slots.free(slot)

  def _next_prompts(self) -> list[list[int]]:
    """Takes the prompts to assign now, in groups."""
    free, coming = self.slots.assigned.count(None), []
    while self.waiting and free >= min(self._chunk, len(self.waiting)):
      size = min(self._chunk, len(self.waiting))
      some = [self.waiting.popleft()]
      while len(some) < size and self._alike(some[0], self.waiting[0]):
        some.append(self.waiting.popleft())
      coming.append(some)
      free -= len(some)
    return coming

  def _alike(self, one: int, other: int) -> bool:
    """Whether two prompts may be prefilled together."""
    return self._groups.get(one) == self._groups.get(other)

  def _begin(self, i: int) -> decode_state.Beginning | None:
    """What a prompt shares with others, run once; None if nothing."""
    number, count = self._groups.get(i, (-1, 0))
    if not count:
      return None
    if self._beginning is None or self._beginning[0] != number:
      tokens = np.zeros(round_up(count, _LENGTHS), np.int32)
      tokens[:count] = self._prompts[i][:count]
      found = decode_state.begin(
          self._spec, self._params, self._inputs, tokens, np.int32(count)
      )
      self._beginning = number, found
    return self._beginning[1]

  def _resize(self, coming: Sequence[int]) -> None:
    """Resizes the batch and its cache for the next segment."""
    present = [self.slots.assigned[slot] for slot in self.slots.active]
    texts, rows = [*present, *coming], len(self.slots.assigned)
    while not self.waiting and rows // 2 >= max(_FEW, len(texts)):
      rows //= 2
    width = round_up(max(map(self._columns, texts)), _CACHES)
    if (rows, width) == self._shape:
      return
    kept, self._shape = self.slots.compacted(rows), (rows, width)
    if self._state is not None:
      self._state = decode_state.resize(self._state, kept, width)
    self.slots.assigned = present + [None] * (rows - len(present))

  def _columns(self, i: int) -> int:
    """Tokens of a text in the cache after the next segment."""
    new = max(len(self.texts[i]), 1)  # prefill generates the first token
    ahead = min(decode_state.SEGMENT, self._most - new)
    return len(self._prompts[i]) + new - 1 + ahead

  def _assign(self, chosen: Sequence[int]) -> None:
    """Prefills prompts and assigns them to slots."""
    beginning = self._begin(chosen[0])
    _, count = self._groups.get(chosen[0], (-1, 0))
    prompts = [self._prompts[i][count:] for i in chosen]
    width = round_up(max(map(len, prompts)), _LENGTHS)
    tokens, _ = packer.pad(prompts, (self._chunk, width))
    # Unused sequences of the prefill have one token and get no slot.
    length, stream, edit_id = np.zeros((3, self._chunk), np.int32)
    length[:] = 1
    slots = np.full(self._chunk, len(self.slots.assigned), np.int32)
    for row, i in enumerate(chosen):
      length[row] = len(prompts[row])
      stream[row], edit_id[row] = self._streams[i], self._edit_ids[i]
      slots[row] = self.slots.free_slot
      self.slots.assigned[slots[row]] = i
    fresh, first = decode_state.prefill(
        self._spec,
        self._params,
        self._inputs,
        tokens,
        length=length,
        stream=stream,
        edit_id=edit_id,
        rule=self._rule,
        beginning=beginning,
    )
    if self._state is None:
      self._state = decode_state.empty(fresh, *self._shape)
    self._state = decode_state.assign(self._state, fresh, slots)
    for i, token in zip(chosen, fetch(first)):
      self.texts[i] = [int(token)]


def _rows(prompts: int, batch_size: int) -> int:
  """Slots of a run over so many prompts."""
  return min(round_up(prompts, buckets.HALVES), batch_size)


def lower(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
    batch_size: int = 64,
) -> tuple[decode_state.DecodeState, jax.stages.Lowered]:
  """Lowers the largest program that `generate` would run.

  Args:
    spec: the architecture.
    params: canonical parameters, or their shapes.
    prompts: as for `generate`, at least one.
    max_new_tokens: as for `generate`, as all that follow.
    decoding: how tokens are chosen.
    batch_size: sequences a batch at most.

  Returns:
    (shapes of the batch with its longest cache, the program of a segment).
  """
  rule, numbers = sampling.split(decoding)
  inputs = decode_state.DecodeInputs(
      numbers=numbers,
      stop=np.zeros(spec.vocab, bool),
      most=np.int32(max_new_tokens),
      deltas=(),
  )
  rows, longest = _rows(len(prompts), batch_size), max(map(len, prompts))
  prefill = functools.partial(decode_state.prefill, spec, rule=rule)
  one = np.zeros(rows, np.int32)
  fresh, _ = jax.eval_shape(
      lambda params, tokens: prefill(
          params, inputs, tokens, length=one, stream=one, edit_id=one
      ),
      params,
      np.zeros((rows, round_up(longest, _LENGTHS)), np.int32),
  )
  width = round_up(longest + max_new_tokens - 1, _CACHES)
  state = jax.eval_shape(lambda x: decode_state.empty(x, rows, width), fresh)
  step = decode_state.step.lower(spec, params, inputs, state, rule=rule)
  return state, step


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    deltas: Sequence[SiteDelta] = (),
    edit_ids: Sequence[int] | None = None,
    streams: Sequence[int] | None = None,
    stop_texts: Sequence[Sequence[str]] | None = None,
    tokenizer: Any = None,
    share: bool = False,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[list[int]]:
  """Generates continuations of prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    prompts: token ids, special tokens included, at least one each.
    max_new_tokens: tokens to add at most.
    stop_ids: tokens that end a text; the stop token is kept as its last.
    temperature: see `Decoding`, as for the four below.
    top_k: candidates at most; 0 for all.
    top_p: probability that the candidates exceed; 1 for all.
    repetition_penalty: divides positive logits of tokens that are in the text.
    seed: of the random streams.
    deltas: of one edit that all prompts are under, or of E edits side by side.
    edit_ids: with edits side by side, which one each prompt is under.
    streams: number of each prompt's random stream, below 2^31; 0, 1, 2, ... if
      not given.
    stop_texts: of each prompt, strings that end its text; the token that
      completes one is kept as its last. See `models.stop_texts`.
    tokenizer: a transformers tokenizer, with `stop_texts`.
    share: run once what prompts begin with alike, of 32 tokens or more; not
      with edits side by side, nor deltas that choose. Texts are those without
      up to rounding.
    batch_size: sequences a batch at most.
    progress: progress display.

  Returns:
    New tokens of every prompt, in order.

  Raises:
    InputError: a setting is out of range, or a prompt
      is empty, has a token that the model lacks or, with the new tokens, is
      longer than the model allows; stop strings without a tokenizer.
  """
  decoding = Decoding(temperature, top_k, top_p, repetition_penalty, seed)
  refuse_faulty(
      spec,
      prompts,
      max_new_tokens=max_new_tokens,
      stop_ids=stop_ids,
      decoding=decoding,
      batch_size=batch_size,
      streams=streams,
      stop_texts=stop_texts,
  )
  if not prompts:
    return []
  stops = [()] * len(prompts) if stop_texts is None else stop_texts
  rule, numbers = sampling.split(decoding)
  stop = np.zeros(spec.vocab, bool)
  stop[list(stop_ids)] = True
  engine = _DecodeEngine(
      spec,
      params,
      prompts,
      inputs=decode_state.DecodeInputs(
          numbers=numbers,
          stop=jnp.asarray(stop),
          most=jnp.int32(max_new_tokens),
          # Once: every compiled call would transfer them from the host.
          deltas=jax.tree.map(jnp.asarray, tuple(deltas)),
          per_edit=edit_ids is not None,
      ),
      rule=rule,
      rows=_rows(len(prompts), batch_size),
      streams=range(len(prompts)) if streams is None else streams,
      edit_ids=[0] * len(prompts) if edit_ids is None else edit_ids,
      stops=stops,
      detokenize=stop_lib.detokenizer(tokenizer) if any(stops) else None,
      share=share and edit_ids is None and not any(d.chooses for d in deltas),
  )
  with progress('generate', len(prompts), 'text') as advance:
    for ended in slots_lib.run(engine):
      advance(len(ended))
  return engine.texts
