"""Writes wanted states into the edited layers, lowest first.

Layer by layer from the first edited one to the last (whose output z describes),

  K   keys: input of the edited map at the anchor, averaged over contexts
  R   residuals: (z - z_now) * share, z_now under the changes made so far
  X   = S K^T (r I + K S K^T)^-1 R      (`solve.ridge`)

in one pass that goes up with the edits. All rows halt before the MLP of the
layer at hand, where keys are read and z_now is foreseen; once its change is
known they go on from that MLP. No run starts at the embedding again, and neither
the layers above the last edited one nor the head are touched. What the contexts
share runs once for all edits, as a few rows of their own.

Axes: E edits, C contexts, R rows, N places, F key width, D width, s shared
columns, n edited layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import values
from jaxedit.edit.recipe import Recipe, State
from jaxedit.models import decoder
from jaxedit.models.blocks import wide
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.metric import Metric
from jaxedit.solve.ridge import Factors, ridge_dense, ridge_update
from jaxedit.text import seating
from jaxedit.text.batching import EncodedEdit
from jaxedit.text.seating import Frame, Tile
from jaxedit.types import (
    KV,
    Array,
    Columns,
    Params,
    Progress,
    Ragged,
    Tap,
    Targets,
    silent,
)

# A layer's change: factors, or one matrix [F, D].
Change = Factors | Array


class _Halted(NamedTuple):
  """Rows that wait before an MLP."""

  h: Array  # residual without the MLP
  x: Array  # input of the MLP


class _Trunk(NamedTuple):
  """What the contexts share, on its way up."""

  at: Array | _Halted  # [B, s, D]
  columns: Columns  # [B, s]
  kv: tuple[Array, Array] | None = None  # of the layer at hand, [B, s, G, H]


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
    kv = values.spread(kv, tile.context)
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
  # The MLP takes its input in the dtype of the weights.
  return _Halted(h, x.astype(params['embed']['embedding'].dtype))


@functools.partial(jax.jit, static_argnames=('spec', 'site'))
def _read_keys(
    spec: ModelSpec,
    params: Params,
    halted: _Halted,
    tile: Tile,
    *,
    layer: Array,
    site: str,
) -> Array:
  """Computes the keys at the anchors, [R, F]."""
  x = jnp.take(halted.x, tile.anchor[:, 0], axis=1, mode='fill', fill_value=0)
  _, seen = decoder.write_layer(spec, params, x, layer=layer)
  key = seen[site][0]
  return key.astype(wide(key.dtype))


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
) -> Array:
  """Computes the state after `last` at the anchors of halted bare prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    halted: the tile before the MLP of `layer`.
    tile: bare prompts.
    trunk: their trunk, halted likewise, or None.
    layer: [] the layer to be written, as yet without its change.
    last: [] the last edited layer.

  Returns:
    [R, D].
  """

  def write(at: _Halted, layer: Array) -> Array:
    return at.h + decoder.write_layer(spec, params, at.x, layer=layer)[0]

  def body(layer: Array, state: tuple[Array, Array | None]) -> Any:
    h, base = state
    prefix = None
    if trunk is not None:
      base, x, kv = decoder.mix_layer(
          spec, params, base, trunk.columns, layer=layer
      )
      base = write(_Halted(base, x), layer)
      prefix = _prefix(trunk, kv, tile)
    h, x, _ = decoder.mix_layer(
        spec, params, h, tile.rows, layer=layer, prefix=prefix
    )
    return write(_Halted(h, x), layer), base

  base = None if trunk is None else write(trunk.at, layer)
  state = (write(halted, layer), base)
  h, _ = jax.lax.fori_loop(layer + 1, last + 1, body, state)
  return jnp.take(h[0], tile.anchor[:, 0], axis=0, mode='fill', fill_value=0)


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
  deltas = {}
  if isinstance(change, Factors):
    deltas = {site: tuple(change)}
  elif change is not None:
    deltas = {site: (change,)}
  m, _ = decoder.write_layer(
      spec, params, x, layer=layer, rows=rows, deltas=deltas
  )
  return h + m


_solve_factors = jax.jit(ridge_update)
_solve_dense = jax.jit(ridge_dense)


@jax.jit
def _solve_each(
    metric: Metric,
    keys: Array,
    residuals: Array,
    *,
    ridge: float,
    active: Array,
) -> Factors:
  """Solves M = 1 systems for E edits that know nothing of each other."""
  one = lambda key, residual, on: ridge_update(
      metric, key[None], residual[None], ridge=ridge, active=on[None]
  )
  return jax.vmap(one)(keys, residuals, active)


def pays(rows: int, keys: int, width: int) -> bool:
  """Says whether factors of that many rows are smaller than the matrix."""
  return rows * (keys + width) < keys * width


class _Climb:
  """All rows of a batch on their way through the edited layers."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      recipe: Recipe,
      edits: Sequence[EncodedEdit],
      frame: Frame,
  ):
    self._model, self._recipe = (spec, params), recipe
    self._count, self._contexts = len(edits), frame.contexts
    self._sides = tuple(
        list(seating.key_tiles(edits, frame, bare=bare))
        for bare in (True, False)
    )
    first = recipe.layers[0]
    tokens, columns = seating.trunk_columns(frame)
    self._trunk, kv = None, None
    if tokens.shape[1]:
      h, kv = _enter_trunk(spec, params, tokens, columns, layer=first)
      self._trunk = _Trunk(h, columns)
    self._at = [
        [_enter(spec, params, kv, tile, layer=first) for tile in tiles]
        for tiles in self._sides
    ]

  def _each(self) -> Iterator[tuple[int, int, Tile]]:
    for side, tiles in enumerate(self._sides):
      for t, tile in enumerate(tiles):
        yield side, t, tile

  def halt(self, layer: int) -> None:
    """Takes all rows to the MLP of a layer."""
    if self._trunk is not None:
      self._trunk = _halt_trunk(*self._model, self._trunk, layer=layer)
    for side, t, tile in self._each():
      self._at[side][t] = _halt(
          *self._model, self._at[side][t], tile, self._trunk, layer=layer
      )

  def keys(self, layer: int) -> np.ndarray:
    """Keys of all edits, averaged over contexts, [E, F]."""
    read = functools.partial(
        _read_keys, *self._model, layer=layer, site=self._recipe.site
    )
    bare = self._recipe.bare if self._sides[1] else 1.0
    total = 0.0
    for side, weight in enumerate((bare, 1 - bare)):
      # A tile at a time: the keys of all contexts would fill the memory.
      for at, tile in zip(self._at[side], self._sides[side]):
        found = np.asarray(read(at, tile))
        if not isinstance(total, np.ndarray):
          total = np.zeros((self._count, found.shape[-1]), found.dtype)
        taken = tile.edit >= 0
        # Contexts other than the bare prompt share their weight evenly.
        share = weight / (1 if side == 0 else self._contexts - 1)
        np.add.at(total, tile.edit[taken], share * found[taken])
    return total

  def _by_edit(self, side: int, parts: Sequence[Array]) -> np.ndarray:
    """Puts what tiles hold by row in order, [E, contexts of the side, ...]."""
    read = np.concatenate([np.asarray(part) for part in parts])
    edit = np.concatenate([tile.edit for tile in self._sides[side]])
    # Rows lie edit by edit; those of no edit are left out.
    return read[edit >= 0].reshape(self._count, -1, *read.shape[1:])

  def present(self, layer: int) -> np.ndarray:
    """States after the last edited layer as things stand, [E, D]."""
    foresee = functools.partial(
        _foresee, *self._model, layer=layer, last=self._recipe.layers[-1]
    )
    found = self._by_edit(
        0,
        [
            foresee(at, tile, self._trunk)
            for at, tile in zip(self._at[0], self._sides[0])
        ],
    )
    return found[:, 0]

  def write(self, layer: int, change: Change | None) -> None:
    """Takes all rows past the MLP of a layer, with its change."""
    put = functools.partial(
        _write, *self._model, layer=layer, site=self._recipe.site
    )
    if self._trunk is not None:
      h = put(*self._trunk.at, None, change=change)
      self._trunk = _Trunk(h, self._trunk.columns)
    last = layer == self._recipe.layers[-1]
    for side, t, tile in self._each():
      if last and side:  # nobody reads the contexts any more
        continue
      mine = change
      if isinstance(change, Factors) and change.key.ndim == 3:
        own = np.maximum(tile.edit, 0)
        mine = Factors(*(x[own] for x in change))
      self._at[side][t] = put(*self._at[side][t], tile.rows, change=mine)

  def states(self) -> np.ndarray:
    """States of the bare prompts where the rows are now, [E, D]."""
    pick = lambda h, tile: jnp.take(
        h[0], tile.anchor[:, 0], axis=0, mode='fill', fill_value=0
    )
    found = self._by_edit(
        0, [pick(h, tile) for h, tile in zip(self._at[0], self._sides[0])]
    )
    return found[:, 0]


def insert(
    spec: ModelSpec,
    params: Params,
    recipe: Recipe,
    state: State,
    edits: Sequence[EncodedEdit],
    *,
    targets: Targets,
    active: np.ndarray,
    each: bool = False,
    frame: Frame | None = None,
    progress: Progress = silent,
) -> tuple[list[Change], np.ndarray, np.ndarray]:
  """Writes the targets into the edited layers, lowest first.

  Args:
    spec: the architecture.
    params: canonical parameters.
    recipe: the method.
    state: factored metrics.
    edits: E edits.
    targets: their wanted states.
    active: [E] bool, edits to write.
    each: solve for every edit alone instead of for all together.
    frame: static shapes, of these edits and others; chosen unless given.
    progress: progress display.

  Returns:
    (the change of every layer: factors whose first E rows are the edits', or one
    matrix where that is smaller; [n + 1, E] distance to the target before each
    layer and after the last, as a multiple of |z - z0|; [E] bool, edits whose
    keys and residuals stayed finite).
  """
  frame = frame or seating.frame(edits)
  if each:  # every edit changes the contexts in a way of its own
    frame = frame.apart()
  climb = _Climb(spec, params, recipe, edits, frame)
  # Smaller batches leave rows of the solve idle, rather than compile their own.
  rows = max(frame.batch, len(edits))
  pad = lambda x: np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])
  dtype = targets.z.dtype
  length = np.linalg.norm(targets.z - targets.z0, axis=-1)
  dense = not each and not pays(rows, *_sizes(state, targets))
  solve = _solve_each if each else _solve_dense if dense else _solve_factors
  distance, solved = [], []

  def gap(now: np.ndarray) -> np.ndarray:
    away = targets.z - now
    far = np.linalg.norm(away, axis=-1) / np.maximum(length, 1e-30)
    distance.append(far)
    return away

  with progress('insert', len(recipe.layers), 'layer') as advance:
    for layer in range(recipe.layers[0], recipe.layers[-1] + 1):
      climb.halt(layer)
      change = None
      if layer in recipe.layers:
        i = recipe.layers.index(layer)
        keys, away = climb.keys(layer), gap(climb.present(layer))
        away = away * recipe.spread(len(recipe.layers) - i)
        active = active & np.isfinite(keys).all(1) & np.isfinite(away).all(1)
        with jax.enable_x64(True):
          # What solves for a matrix widens its keys block by block.
          exact = solve(
              state.metrics[i],
              jnp.asarray(pad(keys), keys.dtype if dense else jnp.float64),
              jnp.asarray(pad(away), away.dtype if dense else jnp.float64),
              ridge=recipe.ridge,
              active=jnp.asarray(pad(active)),
          )
          solved.append(jax.tree.map(lambda x: np.asarray(x, dtype), exact))
        change = jax.tree.map(jnp.asarray, solved[-1])
        advance(1)
      climb.write(layer, change)
  gap(climb.states())
  return solved, np.stack(distance), active


def _sizes(state: State, targets: Targets) -> tuple[int, int]:
  """(F, D) of the edited kernels."""
  return state.metrics[0][0].shape[0], targets.z.shape[1]
