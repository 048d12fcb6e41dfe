"""Scheduler of one batch shape: the slot engine (`batching.slots`) of edits.

The device steps until an edit is done. Its slot then goes to the edit's next
chunk or to the next waiting edit that fits. When no edit is waiting, the last
ones move to a smaller batch shape (compaction).
"""

from __future__ import annotations

import collections
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxedit.batching import edits as edits_lib
from jaxedit.batching import slots as slots_lib
from jaxedit.batching.edits import PackedBatch
from jaxedit.batching.plan import (
    BatchPlan,
    BatchShape,
)
from jaxedit.deltas import ActiveDeltas, Below
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.targets import engine
from jaxedit.targets.state import (
    OptState,
    Prefill,
    PrefixCache,
    SharedTokens,
    TargetConfig,
)
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import KV, Params


class Work(NamedTuple):
  """Work of an optimisation: counts of tokens and steps, needed and computed.

  Attributes:
    needed: suffix tokens x steps of the edits, without KL prompts and padding.
    computed: token budget x steps.
    scored: scored tokens x steps of the edits, without KL prompts.
    scored_computed: logit budget x steps, with KL prompts.
    last: suffix tokens of every edit's last step, which has no backward pass.
    last_scored: scored tokens of every edit's last step.
    prepared: tokens of the packed batches that were prefilled.
    steps: optimiser steps.
    kept: edits whose targets were found in the cache.
    seconds: wall time of 'prefill' and 'optimize', compilation included.
  """

  needed: int = 0
  computed: int = 0
  scored: int = 0
  scored_computed: int = 0
  last: int = 0
  last_scored: int = 0
  prepared: int = 0
  steps: int = 0
  kept: int = 0
  seconds: Mapping[str, float] = types.MappingProxyType({})

  def __add__(self, other: Work) -> Work:
    """Sums two counts."""
    seconds = dict(self.seconds)
    for stage, value in other.seconds.items():
      seconds[stage] = seconds.get(stage, 0.0) + value
    counts = (x + y for x, y in zip(self[:-1], other[:-1]))
    return Work(*counts, seconds=seconds)

  @property
  def waste(self) -> float:
    """Fraction of the computed tokens that belonged to no active edit."""
    return 1 - self.needed / self.computed if self.computed else 0.0


class Result(NamedTuple):
  """The optimised target of one chunk of one edit."""

  z: np.ndarray
  z0: np.ndarray
  loss: float
  likelihood: float
  steps: int
  finite: bool


class _Waiting(NamedTuple):
  """A prefilled edit that waits for a slot."""

  edit: int
  source: int  # slot in the packed batch
  packed: PackedBatch
  prefilled: Prefill


class Objective(NamedTuple):
  """What is optimised, and how.

  Attributes:
    layer: the layer whose output is changed.
    config: settings.
    output: which output, one of `state.OUTPUTS`.
  """

  layer: int
  config: TargetConfig
  output: str = 'block'


class Scheduler:
  """Runs the edits of one batch shape; see the module."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      edits: Sequence[EncodedEdit],
      plan: BatchPlan,
      *,
      batch_shape: BatchShape,
      shared_prefix: KV | SharedTokens | None,
      objective: Objective,
      below: Below | None = None,
  ):
    self._model, self._edits = (spec, params), edits
    self._plan, self._batch_shape = plan, batch_shape
    self._shared_prefix, self._objective = shared_prefix, objective
    self._below = below
    self._source: Iterator[PackedBatch] = iter(())
    self._chained = batch_shape.grow > 0
    self._exhausted = False
    self._allocator = slots_lib.SlotAllocator(plan, batch_shape)
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._assigned: dict[int, tuple[_Waiting, int]] = {}  # slot -> edit, chunk
    self._parked: dict[int, tuple[_Waiting, int]] = {}  # no tokens free yet
    self._fresh = np.ones(batch_shape.slots, bool)
    self._cache: PrefixCache | None = None
    self._state: OptState | None = None
    self._counts = collections.Counter()
    self._prepare_seconds = 0.0

  def results(
      self, order: Sequence[int]
  ) -> Iterator[tuple[tuple[int, int], Result]]:
    """Optimises the edits of `order`; yields ((edit, chunk), result)."""
    self._source = edits_lib.pack_edits(
        self._edits, order, self._plan, self._batch_shape
    )
    for done in slots_lib.run(self):
      yield from done

  def fill(self) -> bool:
    """Assigns waiting edits and chunks; returns whether any slot has one."""
    self._assign_waiting()
    if not self._assigned:
      return False
    if self._exhausted and not self._waiting and not self._parked:
      self._compact()
    return True

  def _compact(self) -> None:
    """Moves the last edits to the smallest batch shape that holds them."""
    if self._state is None:
      return
    found, batch_shape = None, self._batch_shape
    while (smaller := batch_shape.compacted) is not None and (
        fits := self._allocator.compact(smaller)
    ):
      found, batch_shape = fits, smaller
    if found is None:
      return
    self._bank()
    self._cache, self._state = engine.compact(
        self._cache,
        self._state,
        found.slots,
        found.tokens,
        shards=batch_shape.shards,
    )
    now = {int(old): new for new, old in enumerate(found.slots)}
    self._assigned = {now[slot]: who for slot, who in self._assigned.items()}
    self._allocator, self._batch_shape = found.allocator, batch_shape
    self._fresh = np.append(self._fresh, False)[found.slots]

  def _bank(self) -> None:
    """Adds the steps of the present batch shape to the counts."""
    batch_shape, ran = self._batch_shape, int(self._state.ran)
    kl = batch_shape.slots if self._plan.kl else 0
    self._counts['computed'] += ran * batch_shape.token_budget
    self._counts['scored_computed'] += ran * (batch_shape.logit_budget + kl)
    self._counts['steps'] += ran

  def _assign_waiting(self) -> None:
    """Assigns waiting edits to free slots, in order as far as they fit."""
    for slot, (who, k) in list(self._parked.items()):
      if self._allocator.fits(self._edits[who.edit], k, slot=slot):
        del self._parked[slot]
        self._assign(slot, who, k)
    # Parked chunks come first, or small edits would always take the tokens of
    # their shard.
    closed = {self._allocator.shard(slot) for slot in self._parked}
    while free := self._allocator.free_slots(closed):
      who, slot = next(self._admissible(free), (None, None))
      if who is not None:
        self._waiting.remove(who)
        self._assign(slot, who, 0)
      # One more packed batch gives a choice of edits that may fit; a second
      # would only take memory.
      elif (
          len(self._waiting) >= self._batch_shape.prefill_shape[0]
          or not self._prefill()
      ):
        return

  def _admissible(self, free: Sequence[int]) -> Iterator[tuple[_Waiting, int]]:
    """Waiting edits that fit the shard of a free slot, each with its slot."""
    for who in self._waiting:
      slot = self._allocator.slot_for(self._edits[who.edit], free)
      if slot is not None:
        yield who, slot

  def _prefill(self) -> bool:
    """Prefills the next packed batch; returns whether there was one."""
    packed = next(self._source, None)
    if packed is None:
      self._exhausted = True
      return False
    begin = time.monotonic()
    deltas: ActiveDeltas | tuple[()] = ()
    if self._below is not None:
      deltas = self._below.active(packed.edit, self._plan.rows)
    prefilled = engine.prefill(
        *self._model,
        self._shared_prefix,
        packed,
        deltas,
        layer=self._objective.layer,
        output=self._objective.output,
    )
    jax.block_until_ready(prefilled)
    self._prepare_seconds += time.monotonic() - begin
    self._counts['prepared'] += packed.tokens.shape[1]
    for source, edit in enumerate(packed.edit):
      if edit >= 0:
        self._waiting.append(_Waiting(int(edit), source, packed, prefilled))
    return True

  def _assign(self, slot: int, who: _Waiting, k: int) -> None:
    """Assigns a chunk to a slot and copies its hidden states there."""
    edit, rows = self._edits[who.edit], self._plan.rows
    index = self._allocator.assign(slot, edit, k)
    packed = who.packed.rows.index[who.source * rows : (who.source + 1) * rows]
    origin = np.full_like(index, who.packed.tokens.shape[1])
    for c in range(rows):
      count = int((index[c] < self._batch_shape.token_budget).sum())
      first = self._column(edit, c, k)
      origin[c, :count] = packed[c, first : first + count]
    move = np.stack([origin.reshape(-1), index.reshape(-1)])
    if k == 0:
      if self._cache is None:
        self._cache = engine.empty(who.prefilled, self._plan, self._batch_shape)
      self._cache = engine.assign(
          self._cache,
          who.prefilled,
          slot,
          who.source,
          move,
          shards=self._batch_shape.shards,
      )
    else:
      self._cache = engine.assign_chunk(self._cache, who.prefilled, slot, move)
    # Frees the arrays of a prefilled batch as soon as they are not needed.
    kept = who.prefilled._replace(key=None, value=None)
    who = who._replace(prefilled=kept if k + 1 < edit.stages else None)
    self._fresh[slot] = True
    self._assigned[slot] = (who, k)

  def _column(self, edit: EncodedEdit, c: int, k: int) -> int:
    """Index of a chunk's anchor in its sequence, without the shared prefix."""
    if c == self._plan.contexts:
      return len(edit.kl) - 1
    return edit.stage(k, c).anchor - len(self._plan.shared_prefix[c])

  def step(self) -> Iterator[tuple[int, tuple[tuple[int, int], Result]]]:
    """Steps until an edit is done; yields (slot, result) of all that are."""
    config = self._objective.config
    assigned = self._allocator.layout()
    if self._state is None:
      self._state = engine.start(
          self._model[0],
          self._cache,
          assigned,
          solver=config.solver,
          return_kv=self._chained,
      )
    self._state, z0 = engine.step(
        *self._model,
        self._cache,
        assigned,
        self._state,
        self._fresh,
        layer=self._objective.layer,
        return_kv=self._chained,
        **engine.split_config(config),
    )
    self._fresh = np.zeros_like(self._fresh)
    state = self._state
    done = fetch(state.done)
    read = (state.delta, z0, state.loss, state.likelihood)
    delta, z0, loss, likelihood = (fetch(x) for x in read)
    if delta.ndim == 3:  # the attention's change is not used
      delta, z0 = delta[:, 1], z0[:, 1]
    steps, finite = fetch(state.steps), fetch(state.finite)
    for slot in [s for s in self._assigned if done[s]]:
      who, k = self._assigned[slot]
      self._count(self._edits[who.edit], k, int(steps[slot]))
      result = Result(
          z0[slot] + delta[slot],
          z0[slot].copy(),  # not a view of all slots
          loss[slot],
          likelihood[slot],
          steps[slot],
          finite[slot],
      )
      yield slot, ((who.edit, k), result)

  def free(self, slot: int) -> None:
    """Frees the slot of an edit, or its tokens for the edit's next chunk."""
    who, k = self._assigned.pop(slot)
    if k + 1 == self._edits[who.edit].stages:
      self._allocator.free(slot)
      return
    column = self._allocator.next_chunk(slot)
    if self._state.kv is not None:
      self._cache = engine.append_kv(
          self._cache,
          self._state.kv,
          slot=slot,
          column=column,
          shards=self._batch_shape.shards,
      )
    self._parked[slot] = (who, k + 1)

  def _count(self, edit: EncodedEdit, k: int, steps: int) -> None:
    tokens, scored = edit.load(k)
    self._counts['needed'] += steps * tokens
    self._counts['scored'] += steps * scored
    self._counts['last'] += tokens
    self._counts['last_scored'] += scored

  def work(self) -> Work:
    """The work done, once all edits are."""
    if self._state is not None:
      self._bank()
    seconds = {'prefill': self._prepare_seconds}
    return Work(seconds=seconds, **self._counts)
