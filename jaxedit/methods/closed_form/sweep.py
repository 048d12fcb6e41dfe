"""Takes all rows of a batch through the edited layers, lowest first.

All rows halt before the MLP of the layer at hand, where keys are read and the
states after the last edited layer are foreseen; once the change is known they go
on from that MLP. No run starts at the embedding again, and neither the layers
above the last edited one nor the head are touched. What the contexts share runs
once for all edits, as a few rows of their own.

Axes: E edits, C contexts, R rows, N places, K states an edit, M states of all
edits, P held keys, F key width, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.batching import packer
from jaxedit.batching.packer import Tile
from jaxedit.batching.plan import Frame
from jaxedit.methods.closed_form import segment_sum
from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.models import decoder
from jaxedit.models.blocks import stored, wide
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.ridge import Factors
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import KV, Array, Columns, Params, Ragged, Tap

# A layer's change: factors, or one matrix [F, D].
Change = Factors | Array
# Of the rows that wait between layers, so much stays on an accelerator; more goes
# back to the host.
_RESIDENT_BYTES = 2 * 2**30


class Keys(NamedTuple):
  """Inputs of the edited map in one layer.

  Attributes:
    bare: [M, F] at the anchors of the bare prompts.
    mean: [M, F] average over contexts.
    held: [P, F] at the other tokens of the texts.
    owner: [P] edit that a held key belongs to.
  """

  bare: np.ndarray
  mean: np.ndarray
  held: np.ndarray
  owner: np.ndarray


class _Halted(NamedTuple):
  """Rows that wait before an MLP."""

  h: Array  # residual without the MLP
  x: Array  # input of the MLP


class _Trunk(NamedTuple):
  """What the contexts share, on its way up."""

  at: Array | _Halted  # [B, s, D]
  columns: Columns  # [B, s]
  kv: tuple[Array, Array] | None = None  # of the layer at hand, [B, G, s, H]


def _prefix(
    trunk: _Trunk, kv: tuple[Array, Array], tile: Tile
) -> tuple[Array, Array, Columns]:
  """Keys and values that a tile's rows have before them in one layer."""
  pick = lambda x: x[tile.context]
  return pick(kv[0]), pick(kv[1]), jax.tree.map(pick, trunk.columns)


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _enter_trunk(
    spec: ModelSpec, params: Params, tokens: Array, columns: Columns, layer: int
) -> tuple[Array, KV | None]:
  """Runs the trunk as far as the first edited layer."""
  h = decoder.embed(spec, params, tokens, columns)
  below = tuple(range(layer))
  if not below:
    return h, None
  h, ((key, value),) = decoder.run_layers(
      spec,
      params,
      h,
      columns,
      start=0,
      stop=layer,
      taps=(Tap('kv', below),),
  )
  return h, KV(key, value, columns)


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _enter(
    spec: ModelSpec, params: Params, kv: KV | None, tile: Tile, layer: int
) -> Array:
  """Runs a tile as far as the first edited layer; `kv` is its trunk's."""
  h = decoder.embed(spec, params, tile.tokens, tile.rows)
  if kv is not None:
    kv = targets_lib.spread(kv, tile.context)
  return decoder.run_layers(
      spec, params, h, tile.rows, start=0, stop=layer, prefix=kv
  )[0]


@functools.partial(jax.jit, static_argnames='spec')
def _halt_trunk(
    spec: ModelSpec, params: Params, trunk: _Trunk, *, layer: Array
) -> _Trunk:
  """Takes the trunk to the MLP of a layer."""
  h, x, kv = decoder.mix_layer(
      spec, params, trunk.at, trunk.columns, layer=layer
  )
  return trunk._replace(at=_Halted(h, x), kv=kv)


@functools.partial(jax.jit, static_argnames='spec', donate_argnames='h')
def _halt(
    spec: ModelSpec,
    params: Params,
    h: Array,
    tile: Tile,
    trunk: _Trunk | None,
    *,
    layer: Array,
) -> _Halted:
  """Takes a tile to the MLP of a layer; the trunk has halted there."""
  prefix = None
  if trunk is not None:
    prefix = _prefix(trunk, trunk.kv, tile)
  h, x, _ = decoder.mix_layer(
      spec, params, h, tile.rows, layer=layer, prefix=prefix
  )
  # The MLP takes its input in this dtype.
  return _Halted(h, x.astype(stored(spec, params['embed']['embedding'].dtype)))


def _at(x: Array, places: Array) -> Array:
  """Takes [1, N, D] at places; zeros where there is none."""
  return jnp.take(x[0], places, axis=0, mode='fill', fill_value=0)


@functools.partial(jax.jit, static_argnames=('spec', 'site'))
def _read_keys(
    spec: ModelSpec,
    params: Params,
    halted: _Halted,
    places: Array | None,
    *,
    layer: Array,
    site: str,
) -> Array:
  """Computes the keys at places [n], or at all of them, [n, F]."""
  x = halted.x if places is None else _at(halted.x, places)[None]
  _, seen = decoder.write_layer(spec, params, x, layer=layer)
  key = seen[site][0]
  return key.astype(wide(key.dtype))


def _deltas(site: str, change: Change | None) -> dict[str, tuple[Array, ...]]:
  """A change as blocks take it."""
  if change is None:
    return {}
  whole = isinstance(change, Factors)
  return {site: tuple(change) if whole else (change,)}


@functools.partial(jax.jit, static_argnames=('spec', 'site', 'output'))
def _measure(
    spec: ModelSpec,
    params: Params,
    halted: _Halted,
    anchor: Array,
    *,
    layer: Array,
    change: Change | None,
    site: str,
    output: str,
) -> Array:
  """Computes the output of a layer at anchors [R, K], under its change.

  Returns:
    [R, K, D].
  """
  m, _ = decoder.write_layer(
      spec,
      params,
      _at(halted.x, anchor),
      layer=layer,
      deltas=_deltas(site, change),
  )
  return _at(halted.h, anchor) + m if output == 'block' else m


@functools.partial(jax.jit, static_argnames='spec')
def _foresee(
    spec: ModelSpec,
    params: Params,
    halted: _Halted,
    tile: Tile,
    trunk: _Trunk | None,
    *,
    layer: Array,
    last: Array,
) -> _Halted:
  """Takes halted rows from the MLP of `layer`, unchanged, to that of `last`."""

  def write(at: _Halted, layer: Array) -> Array:
    return at.h + decoder.write_layer(spec, params, at.x, layer=layer)[0]

  def body(layer: Array, state: tuple[_Halted, Any]) -> Any:
    at, base = state
    prefix = None
    if base is not None:
      h, x, kv = decoder.mix_layer(
          spec, params, write(base, layer), trunk.columns, layer=layer + 1
      )
      base = _Halted(h, x.astype(base.x.dtype))
      prefix = _prefix(trunk, kv, tile)
    h, x, _ = decoder.mix_layer(
        spec, params, write(at, layer), tile.rows, layer=layer + 1,
        prefix=prefix,
    )  # fmt: skip
    return _Halted(h, x.astype(at.x.dtype)), base

  base = None if trunk is None else trunk.at
  return jax.lax.fori_loop(layer, last, body, (halted, base))[0]


@functools.partial(
    jax.jit, static_argnames=('spec', 'site'), donate_argnames='h'
)
def _write(
    spec: ModelSpec,
    params: Params,
    h: Array,
    x: Array,
    rows: Ragged | None,
    *,
    layer: Array,
    change: Change | None,
    site: str,
) -> Array:
  """Runs the MLP that rows wait for, with its change; gives the residual.

  Factors may have a row axis, for changes of their own a row.
  """
  m, _ = decoder.write_layer(
      spec, params, x, layer=layer, rows=rows, deltas=_deltas(site, change)
  )
  return h + m


def _resident_bytes() -> float:
  """Bytes of waiting rows that stay on the device."""
  cpu = jax.devices()[0].platform == 'cpu'
  return np.inf if cpu else _RESIDENT_BYTES


class Climb:
  """All rows of a batch on their way through the edited layers."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      recipe: Recipe,
      edits: Sequence[EncodedEdit],
      frame: Frame,
      *,
      owner: Sequence[int] | None = None,
  ):
    """Takes all rows to the first edited layer.

    Args:
      spec: the architecture.
      params: canonical parameters.
      recipe: the method.
      edits: E edits.
      frame: of the run.
      owner: [E] which change an edit is under, where changes have a row axis.
    """
    self._model, self._recipe = (spec, params), recipe
    self._contexts, self._text = frame.contexts, recipe.texts
    self._owner = None if owner is None else np.asarray(owner)
    self._stages = np.array([edit.stages for edit in edits])
    self._first = np.cumsum(self._stages) - self._stages
    self._sides = tuple(
        list(packer.key_tiles(edits, frame, bare=bare, text=self._text))
        for bare in (True, False)
    )
    self._folds = tuple(
        [segment_sum.find(self._numbers(tile), each) for tile in side]
        for side, each in zip(self._sides, (1, frame.contexts - 1))
    )
    first = recipe.layers[0]
    tokens, columns = packer.trunk_columns(frame)
    self._trunk, kv = None, None
    if tokens.shape[1]:
      h, kv = _enter_trunk(spec, params, tokens, columns, layer=first)
      self._trunk = _Trunk(h, columns)
    room = _resident_bytes()
    self._at: list[list[Any]] = [[], []]
    self._far: list[list[bool]] = [[], []]  # who waits on the host
    for side, t, tile in self._each():
      h = _enter(spec, params, kv, tile, layer=first)
      room -= 2 * h.nbytes  # with the input of the MLP
      self._far[side].append(room < 0)
      self._at[side].append(None)
      self._keep(side, t, h)

  @property
  def states(self) -> int:
    """M."""
    return int(self._stages.sum())

  def _each(self) -> Iterator[tuple[int, int, Tile]]:
    for number, side in enumerate(self._sides):
      for t, tile in enumerate(side):
        yield number, t, tile

  def _numbers(self, tile: Tile) -> np.ndarray:
    """[R, K] which of the M states an anchor has, -1 for none."""
    k = np.arange(tile.anchor.shape[1])
    taken = (tile.edit >= 0)[:, None] & (k < self._stages[tile.edit][:, None])
    return np.where(taken, self._first[tile.edit][:, None] + k, -1)

  def _keep(self, side: int, t: int, rows: Any) -> None:
    """Puts a tile's rows where they wait."""
    if self._far[side][t]:
      rows = jax.tree.map(np.asarray, rows)
    self._at[side][t] = rows

  def _gather(self, side: int, parts: Iterator[Array]) -> np.ndarray:
    """Averages what anchors hold [R, K, .] over the contexts of a side."""
    total, mine = None, self._folds[side]
    found = (
        segment_sum.fold(part, one.index) for part, one in zip(parts, mine)
    )
    for part, one in zip(segment_sum.ahead(found), mine):
      part = np.asarray(part)
      if total is None:
        total = np.zeros((self.states, part.shape[-1]), part.dtype)
      total[one.states] += part[: len(one.states)]
    return total / (1 if side == 0 else self._contexts - 1)

  def _mean(self, bare: np.ndarray, others: np.ndarray | None, weight: float):
    return bare if others is None else weight * bare + (1 - weight) * others

  def halt(self, layer: int) -> None:
    """Takes all rows to the MLP of a layer."""
    if self._trunk is not None:
      self._trunk = _halt_trunk(*self._model, self._trunk, layer=layer)
    for side, t, tile in self._each():
      halted = _halt(
          *self._model, self._at[side][t], tile, self._trunk, layer=layer
      )
      self._keep(side, t, halted)

  def keys(self, layer: int) -> Keys:
    """Reads the keys of all edits before the MLP of a layer."""
    read = functools.partial(
        _read_keys, *self._model, layer=layer, site=self._recipe.site
    )
    held: list[tuple[np.ndarray, np.ndarray]] = []

    def at_anchors(side: int) -> Iterator[Array]:
      # A tile at a time: the keys of all contexts would fill the memory.
      for at, tile in zip(self._at[side], self._sides[side]):
        if not self._text:
          found = read(at, tile.anchor.reshape(-1))
          yield found.reshape(*tile.anchor.shape, -1)
          continue
        every = read(at, None)
        rest = tile.rows.row < len(tile.edit)
        rest[tile.anchor[self._numbers(tile) >= 0]] = False
        held.append((np.asarray(every)[rest], tile.edit[tile.rows.row[rest]]))
        yield _at(every[None], tile.anchor)

    bare = self._gather(0, at_anchors(0))
    others = self._gather(1, at_anchors(1)) if self._sides[1] else None
    weight = self._recipe.weight(self._contexts)
    mean = self._mean(bare, others, weight)
    if not held:
      return Keys(bare, mean, bare[:0], np.zeros(0, np.int32))
    return Keys(bare, mean, *(np.concatenate(x) for x in zip(*held)))

  def present(self, layer: int) -> np.ndarray:
    """States of the last edited layer as things stand, [M, D]."""
    last = self._recipe.layers[-1]

    def ahead(side: int, t: int, tile: Tile) -> _Halted:
      return _foresee(
          *self._model,
          self._at[side][t],
          tile,
          self._trunk,
          layer=layer,
          last=last,
      )

    return self._read(ahead, None)

  def outcome(self, change: Change | None) -> np.ndarray:
    """States of the last edited layer, where rows are halted, under a change."""
    return self._read(lambda side, t, tile: self._at[side][t], change)

  def _read(self, where: Any, change: Change | None) -> np.ndarray:
    recipe = self._recipe

    def measured(side: int) -> Iterator[Array]:
      for t, tile in enumerate(self._sides[side]):
        yield _measure(
            *self._model,
            where(side, t, tile),
            tile.anchor,
            layer=recipe.layers[-1],
            change=self._own(change, tile),
            site=recipe.site,
            output=recipe.output,
        )

    bare = self._gather(0, measured(0))
    if recipe.measured == 'bare' or not self._sides[1]:
      return bare
    others = self._gather(1, measured(1))
    return self._mean(bare, others, 1 / self._contexts)

  def _own(self, change: Change | None, tile: Tile) -> Change | None:
    """The change that each row of a tile is under."""
    if self._owner is None or change is None:
      return change
    own = self._owner[np.maximum(tile.edit, 0)]
    return Factors(*(x[own] for x in change))

  def write(self, layer: int, change: Change | None) -> None:
    """Takes all rows past the MLP of a layer, with its change."""
    put = functools.partial(
        _write, *self._model, layer=layer, site=self._recipe.site
    )
    if self._trunk is not None:
      h = put(*self._trunk.at, None, change=change)
      self._trunk = _Trunk(h, self._trunk.columns)
    for side, t, tile in self._each():
      own = self._own(change, tile)
      self._keep(side, t, put(*self._at[side][t], tile.rows, change=own))
