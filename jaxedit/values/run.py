"""Optimises any number of edits in the rooms of a frame.

The host seats edits, the device steps until one of them is done, and its slot
goes to the next in line that fits. Results do not depend on who else is seated,
on the order or on the number of slots.

A long target goes chunk by chunk (`autoregressive`): the state of a chunk stands
on the token before it, with the states of earlier chunks in force. The keys and
values of a finished chunk are those of its last step, so no run is needed
between two chunks.

Source: Jiang et al. 2025 (AnyEdit, arXiv 2502.05628), section 4, for chunks.
"""

from __future__ import annotations

import collections
import os
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.text import seating
from jaxedit.text.batching import EncodedEdit
from jaxedit.text.seating import Frame, Room, Tile
from jaxedit.types import KV, Params, Progress, Targets, silent
from jaxedit.values import pool as pool_lib
from jaxedit.values.parts import trunk_kv
from jaxedit.values.pool import Pool, Ready, Schedule, State

# Suffix tokens that keep the matrix units busy; more only lengthen the tail in
# which the last edits leave places empty.
_PLACES_CPU = 256
_PLACES_ACCELERATOR = 2048
# Of the free memory, what the optimiser may plan with.
_MEMORY_SHARE = 0.6


class Work(NamedTuple):
  """What an optimisation needed and what it ran; counts of tokens and steps.

  Attributes:
    needed: suffix tokens x steps of the edits, KL rows and padding left out.
    computed: places x steps that were run.
    scored: scored tokens x steps of the edits, KL rows left out.
    scored_computed: scored places x steps that were run, KL rows included.
    last: suffix tokens of every edit's last step, which has no backward.
    last_scored: scored tokens of every edit's last step.
    prepared: places run once, below and left of the anchors.
    steps: steps that were run.
    seconds: wall time of 'prepare' and 'optimize', compilation included.
  """

  needed: int = 0
  computed: int = 0
  scored: int = 0
  scored_computed: int = 0
  last: int = 0
  last_scored: int = 0
  prepared: int = 0
  steps: int = 0
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
    """Fraction of the places run that held no token of an edit at work."""
    return 1 - self.needed / self.computed if self.computed else 0.0


class _Result(NamedTuple):
  """What one stage of one edit came to."""

  z: np.ndarray
  z0: np.ndarray
  loss: float
  likelihood: float
  steps: int
  finite: bool


class _Waiting(NamedTuple):
  """An edit whose constant part has been run."""

  edit: int
  source: int  # slot in the tile
  tile: Tile
  ready: Ready


def frame_for(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    slots: int | None = None,
    batch: int | None = None,
) -> Frame:
  """Chooses the static shapes of a run from its edits and the free memory.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: all edits of the run.
    slots: edits optimised side by side; None for as many as are of use and have
      room in memory.
    batch: edits a batch at most; None if all are one batch.

  Returns:
    The frame.
  """
  device = jax.devices()[0]
  places = _PLACES_CPU if device.platform == 'cpu' else _PLACES_ACCELERATOR
  free = _free_bytes(device)
  if free is not None:
    share = _MEMORY_SHARE * free
    room = max(16, int(share // _place_bytes(spec, params)))
    # A power of two, so that a little more or less memory changes no shape.
    places = min(places, 2 ** int(np.log2(room)))
  return seating.frame(edits, slots=slots, batch=batch, places=places)


def _place_bytes(spec: ModelSpec, params: Params) -> int:
  """Memory that one suffix token takes, at most.

  The backward pass keeps the results of weight products, in f32; an earlier
  column's keys and values are counted eight times, once for every column that a
  suffix token has before it on average.
  """
  weights = params['embed']['embedding'].dtype.itemsize
  heads = spec.head_size * (spec.heads + 2 * spec.kv_heads)
  products = heads + 3 * spec.width + (2 + spec.gated) * spec.mlp_width
  earlier = 8 * 2 * spec.kv_heads * spec.head_size * weights
  return spec.layers * (4 * products + earlier) + 8 * spec.vocab


def _free_bytes(device: jax.Device) -> int | None:
  """Free memory of a device, or None where nothing tells."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use']
  if device.platform != 'cpu':
    return None
  try:
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, ValueError, OSError):
    return None


def optimize(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    layer: int,
    schedule: Schedule,
    frame: Frame | None = None,
    progress: Progress = silent,
) -> tuple[Targets, Work]:
  """Finds the wanted states of edits with one state each.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits, at least one.
    layer: the layer whose output is changed.
    schedule: settings.
    frame: static shapes, of these edits and others; chosen unless given.
    progress: progress display.

  Returns:
    (targets of the E edits as numpy arrays, what was run).

  Raises:
    ValueError: an edit has several chunks, or does not fit the frame.
  """
  for edit in edits:
    if edit.stages > 1:
      raise ValueError(
          f'edit {edit.number} has {edit.stages} chunks; `autoregressive` is for'
          ' those'
      )
  found, work = autoregressive(
      spec,
      params,
      edits,
      layer=layer,
      schedule=schedule,
      frame=frame,
      progress=progress,
  )
  return jax.tree.map(lambda *x: np.concatenate(x), *found), work


def autoregressive(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    *,
    layer: int,
    schedule: Schedule,
    frame: Frame | None = None,
    progress: Progress = silent,
) -> tuple[list[Targets], Work]:
  """Finds the wanted states of edits whose targets go chunk by chunk.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits, at least one.
    layer: the layer whose output is changed.
    schedule: settings; steps are counted anew for every chunk.
    frame: static shapes, of these edits and others; chosen unless given.
    progress: progress display.

  Returns:
    (for every edit the targets of its K stages as numpy arrays, what was run).
  """
  frame = frame or frame_for(spec, params, edits)
  begin = time.monotonic()
  tokens, columns = seating.trunk_columns(frame)
  trunk = _trunk_kv(spec, params, tokens, columns)
  jax.block_until_ready(trunk)
  seconds = {'prepare': time.monotonic() - begin}
  total = Work(seconds=seconds, prepared=tokens.size)
  found: dict[tuple[int, int], _Result] = {}
  home = [frame.room(edit) for edit in edits]
  with progress('optimize', len(edits), 'edit') as advance:
    for number, room in enumerate(frame.rooms):
      order = [i for i, where in enumerate(home) if where == number]
      run = None  # gives the last room's memory back
      if order:
        run = _Run(spec, params, edits, frame, room, trunk, layer, schedule)
        for key, result in run.results(order):
          found[key] = result
          last = key[1] + 1 == edits[key[0]].stages
          advance(int(last))
        total += run.work()
  spent = time.monotonic() - begin
  seconds = {**total.seconds, 'optimize': spent - total.seconds['prepare']}
  targets = [
      _targets([found[i, k] for k in range(edit.stages)])
      for i, edit in enumerate(edits)
  ]
  return targets, total._replace(seconds=seconds)


_trunk_kv = jax.jit(trunk_kv, static_argnames='spec')


def _targets(results: Sequence[_Result]) -> Targets:
  """Stacks the stages of one edit."""
  z, z0, loss, likelihood, steps, finite = zip(*results)
  dtype = z[0].dtype
  return Targets(
      z=np.stack(z),
      z0=np.stack(z0),
      loss=np.array(loss, dtype),
      likelihood=np.array(likelihood, dtype),
      steps=np.array(steps, np.int32),
      finite=np.array(finite, bool),
  )


class _Run:
  """One room at work: seats edits, steps, and collects who is done."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      edits: Sequence[EncodedEdit],
      frame: Frame,
      room: Room,
      trunk: KV | None,
      layer: int,
      schedule: Schedule,
  ):
    self._model, self._edits = (spec, params), edits
    self._frame, self._room, self._trunk = frame, room, trunk
    self._layer, self._schedule = layer, schedule
    self._chained = room.grow > 0
    self._tail = room.tail
    self._exhausted = False
    self._seating = seating.Seating(frame, room)
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._seated: dict[int, tuple[_Waiting, int]] = {}  # slot -> who, stage
    self._parked: dict[int, tuple[_Waiting, int]] = {}  # no places free yet
    self._fresh = np.ones(room.slots, bool)
    self._pool = self._empty()
    self._state: State | None = None
    self._counts = collections.Counter()
    self._prepare_seconds = 0.0

  def _empty(self) -> Pool:
    (spec, params), room, frame = self._model, self._room, self._frame
    weights = params['embed']['embedding'].dtype
    above = spec.layers - 1 - self._layer
    columns = frame.shared + room.left[1] + room.grow if above else 1
    shape = (above, room.slots, frame.rows, columns)
    make = lambda: jnp.zeros((*shape, spec.kv_heads, spec.head_size), weights)
    base = jnp.zeros([1, room.places, spec.width], decoder.wide(weights))
    return Pool(base, make(), make())

  def results(
      self, order: Sequence[int]
  ) -> Iterator[tuple[tuple[int, int], _Result]]:
    """Optimises all stages of the edits named; yields ((edit, stage), result)."""
    tiles = seating.row_tiles(self._edits, order, self._frame, self._room)
    while True:
      self._fill(tiles)
      if not self._seated:
        return
      if self._exhausted and not self._waiting and not self._parked:
        self._move_out()
      yield from self._step()

  def _move_out(self) -> None:
    """Goes on in a smaller room as soon as the last edits fit there."""
    if self._tail is None or self._state is None:
      return
    found = self._seating.shrink(self._tail)
    if found is None:
      return
    self._bank()
    self._pool, self._state = pool_lib.move(
        self._pool, self._state, found.slots, found.places
    )
    now = {int(old): new for new, old in enumerate(found.slots)}
    self._seated = {now[slot]: who for slot, who in self._seated.items()}
    self._seating, self._room, self._tail = found.seating, self._tail, None
    self._fresh = np.append(self._fresh, False)[found.slots]

  def _bank(self) -> None:
    """Counts what was run since the last time."""
    room, ran = self._room, int(self._state.ran)
    kl = room.slots if self._frame.kl else 0
    self._counts['computed'] += ran * room.places
    self._counts['scored_computed'] += ran * (room.scored + kl)
    self._counts['steps'] += ran

  def _fill(self, tiles: Iterator[Tile]) -> None:
    """Seats who waits, first in line first as far as they fit."""
    for slot, (who, k) in list(self._parked.items()):
      if self._seating.fits(self._edits[who.edit], k):
        del self._parked[slot]
        self._take(slot, who, k)
    # Who waits for places goes first, or small edits would take them for ever.
    while not self._parked and (slot := self._seating.idle) is not None:
      fits = lambda who: self._seating.fits(self._edits[who.edit])
      who = next(filter(fits, self._waiting), None)
      if who is not None:
        self._waiting.remove(who)
        self._take(slot, who, 0)
      # One tile more gives a choice of edits that may fit; a second would only
      # take memory.
      elif len(self._waiting) >= self._room.tile[0] or not self._more(tiles):
        return

  def _more(self, tiles: Iterator[Tile]) -> bool:
    """Runs the constant part of a further tile; says if there was one."""
    tile = next(tiles, None)
    if tile is None:
      self._exhausted = True
      return False
    begin = time.monotonic()
    ready = pool_lib.prepare(*self._model, self._trunk, tile, layer=self._layer)
    jax.block_until_ready(ready)
    self._prepare_seconds += time.monotonic() - begin
    self._counts['prepared'] += tile.tokens.shape[1]
    for source, edit in enumerate(tile.edit):
      if edit >= 0:
        self._waiting.append(_Waiting(int(edit), source, tile, ready))
    return True

  def _take(self, slot: int, who: _Waiting, k: int) -> None:
    """Seats a stage and copies its states there."""
    edit, rows = self._edits[who.edit], self._frame.rows
    places = self._seating.sit(slot, edit, k)
    tile = who.tile.rows.index[who.source * rows : (who.source + 1) * rows]
    origin = np.full_like(places, who.tile.tokens.shape[1])
    for c in range(rows):
      count = int((places[c] < self._room.places).sum())
      first = self._column(edit, c, k)
      origin[c, :count] = tile[c, first : first + count]
    move = np.stack([origin.reshape(-1), places.reshape(-1)])
    if k == 0:
      self._pool = pool_lib.seat(self._pool, who.ready, slot, who.source, move)
    else:
      self._pool = pool_lib.shift(self._pool, who.ready.h, move)
    # A tile's arrays are let go of as soon as nobody needs them.
    kept = who.ready._replace(key=None, value=None)
    who = who._replace(ready=kept if k + 1 < edit.stages else None)
    self._fresh[slot] = True
    self._seated[slot] = (who, k)

  def _column(self, edit: EncodedEdit, c: int, k: int) -> int:
    """Column of a stage's anchor among a row's own columns."""
    if c == self._frame.contexts:
      return len(edit.kl) - 1
    return edit.stage(k, c).anchor - len(self._frame.trunk[c])

  def _step(self) -> Iterator[tuple[tuple[int, int], _Result]]:
    """Steps until somebody is done and takes their results."""
    seats = self._seating.seats()
    if self._state is None:
      self._state = pool_lib.start(
          self._model[0], self._pool, seats, self._chained
      )
    self._state, z0 = pool_lib.advance(
        *self._model,
        self._pool,
        seats,
        self._state,
        self._fresh,
        schedule=self._schedule,
        layer=self._layer,
        watch=self._chained,
    )
    self._fresh = np.zeros_like(self._fresh)
    state = self._state
    done = np.asarray(state.done)
    read = (state.delta, z0, state.loss, state.likelihood)
    delta, z0, loss, likelihood = (np.asarray(x) for x in read)
    steps, finite = np.asarray(state.steps), np.asarray(state.finite)
    for slot in [s for s in self._seated if done[s]]:
      who, k = self._seated.pop(slot)
      self._count(self._edits[who.edit], k, int(steps[slot]))
      yield (
          (who.edit, k),
          _Result(
              z0[slot] + delta[slot],
              z0[slot].copy(),  # not a view of all slots
              loss[slot],
              likelihood[slot],
              steps[slot],
              finite[slot],
          ),
      )
      self._end(slot, who, k)

  def _end(self, slot: int, who: _Waiting, k: int) -> None:
    """Goes on to an edit's next stage, or lets it leave."""
    if k + 1 == self._edits[who.edit].stages:
      self._seating.leave(slot)
      return
    column = self._seating.move_on(slot)
    if self._state.kv is not None:
      self._pool = pool_lib.extend(
          self._pool, self._state.kv, slot=slot, column=column
      )
    self._parked[slot] = (who, k + 1)

  def _count(self, edit: EncodedEdit, k: int, steps: int) -> None:
    tokens, scored = edit.load(k)
    self._counts['needed'] += steps * tokens
    self._counts['scored'] += steps * scored
    self._counts['last'] += tokens
    self._counts['last_scored'] += scored

  def work(self) -> Work:
    """What was run, once all is done."""
    if self._state is not None:
      self._bank()
    seconds = {'prepare': self._prepare_seconds}
    return Work(seconds=seconds, **self._counts)
