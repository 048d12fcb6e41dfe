"""Locate-and-edit methods with a closed form; each is a row (`Recipe`).

For every edit a wanted state z at its anchor is optimised once (`values`).
Then, layer by layer from the first edited one to the last (whose output z
describes),

  K   keys: input of the edited map at the anchor, averaged over contexts
  R   residuals: (z - z_now) * share, z_now under the changes made so far
  X   = S K^T (r I + K S K^T)^-1 R      (`solve.ridge`)

and X is the change of that layer's kernel. Keys and z_now come from one pass
that goes up with the edits: h before layer l is kept for all rows, no run starts
at the embedding again, and neither the layers above the last edited one nor the
head are touched.

Axes: E edits, C contexts, P prefix columns, F key width, D width, n edited
layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1. Unlike upstream,
templates are inputs, solves are M x M in f64, and params never change.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import values
from jaxedit.edit.base import Editor, Info
from jaxedit.models import decoder
from jaxedit.models.blocks import wide
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.metric import Metric
from jaxedit.solve.ridge import Factors, ridge_update
from jaxedit.stats.moments import Moments
from jaxedit.text.batching import Tile
from jaxedit.types import (
    Array,
    Columns,
    Edited,
    InputError,
    LowRank,
    Params,
    Progress,
    Targets,
    silent,
)


def even(remaining: int) -> float:
  """Spread that divides what is left by the layers left (MEMIT)."""
  return 1 / remaining


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One closed-form method.

  Attributes:
    name: the method's name, for reports.
    layers: layers to edit, ascending; z is the output of the last.
    metric: (gram [F, F] average second moment) -> metric S.
    value: settings of the value optimisation.
    ridge: r in the closed form.
    bare: weight of the bare prompt in the average of the keys; the other
      contexts share the rest evenly.
    spread: layers still to write, this one included -> share of the residual.
    site: the edited linear map.
    anchor: the edited token, 'subject_last' or 'prompt_last'.
  """

  name: str
  layers: tuple[int, ...]
  metric: Callable[[Array], Metric]
  value: values.Schedule
  ridge: float = 1.0
  bare: float = 0.5
  spread: Callable[[int], float] = even
  site: str = 'mlp/down'
  anchor: str = 'subject_last'


class State(NamedTuple):
  """What a closed-form editor keeps: one metric an edited layer, in f64."""

  metrics: tuple[Metric, ...]


class _Rows(NamedTuple):
  """One tile on its way up through the edited layers."""

  h: Array  # [E, C, P + 1, D] residual before the layer at hand
  columns: Columns  # [E, C, P + 1]


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _enter(spec: ModelSpec, params: Params, tile: Tile, layer: int) -> _Rows:
  """Runs the columns up to the anchor as far as the first edited layer."""
  edits, contexts, _ = tile.tokens.shape
  end = tile.prefix + 1
  cut = lambda x: x[:, :, :end].reshape(edits * contexts, end)
  columns = Columns(cut(tile.position), cut(tile.segment))
  h = decoder.embed(spec, params, cut(tile.tokens), columns)
  h, _ = decoder.run_layers(spec, params, h, columns, start=0, stop=layer)
  split = lambda x: x.reshape(edits, contexts, *x.shape[1:])
  return jax.tree.map(split, _Rows(h, columns))


def _flat(rows: _Rows) -> _Rows:
  """Joins the edit and context axes."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


@functools.partial(jax.jit, static_argnames=('spec', 'site'))
def _measure(
    spec: ModelSpec,
    params: Params,
    rows: _Rows,
    *,
    layer: Array,
    last: Array,
    weights: Array,
    site: str,
) -> tuple[Array, Array]:
  """Reads keys at `layer` and the present state after layer `last`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    rows: residual before `layer`, all earlier changes in force.
    layer: [] the layer to be written.
    last: [] the last edited layer.
    weights: [C] weight of every context in a key.
    site: the edited linear map.

  Returns:
    ([E, F] keys, [E, D] state at the anchor of the bare prompt).
  """
  flat = _flat(rows)
  _, seen = decoder.run_layer(spec, params, flat.h, flat.columns, layer=layer)
  key = seen[site][:, -1].reshape(*rows.h.shape[:2], -1)
  bare = jax.tree.map(lambda x: x[:, 0], rows)
  h = decoder.sweep_layers(
      spec, params, bare.h, bare.columns, start=layer, stop=last + 1
  )
  key = jnp.sum(key.astype(wide(key.dtype)) * weights[:, None], axis=1)
  return key, h[:, -1]


@functools.partial(jax.jit, static_argnames=('spec', 'site'))
def _advance(
    spec: ModelSpec,
    params: Params,
    rows: _Rows,
    *,
    layer: Array,
    factors: Factors,
    site: str,
) -> _Rows:
  """Runs one layer with its change.

  Args:
    spec: the architecture.
    params: canonical parameters.
    rows: residual before `layer`.
    layer: [] the layer just solved for.
    factors: key [M, F] and value [M, D], or with an edit axis in front.
    site: the edited linear map.

  Returns:
    The rows before the next layer.
  """
  edits, contexts = rows.h.shape[:2]
  if factors.key.ndim == 3:
    factors = jax.tree.map(lambda x: jnp.repeat(x, contexts, axis=0), factors)
  flat = _flat(rows)
  h, _ = decoder.run_layer(
      spec,
      params,
      flat.h,
      flat.columns,
      layer=layer,
      deltas={site: tuple(factors)},
  )
  return _Rows(h.reshape(edits, contexts, *h.shape[1:]), rows.columns)


_solve = jax.jit(ridge_update)


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


def _slots(tiles: Sequence[Tile]) -> tuple[np.ndarray, np.ndarray]:
  """Maps between slots (tiles end to end) and edits.

  Returns:
    ([slots] edit of a slot, -1 where empty; [E] slot of an edit).
  """
  edit = np.concatenate([np.asarray(tile.edit) for tile in tiles])
  filled = np.flatnonzero(edit >= 0)
  return edit, filled[np.argsort(edit[filled])]


def find_targets(
    spec: ModelSpec,
    params: Params,
    recipe: Recipe,
    tiles: Sequence[Tile],
    progress: Progress = silent,
) -> Targets:
  """Optimises the wanted states of all slots.

  Args:
    spec: the architecture.
    params: canonical parameters.
    recipe: the method.
    tiles: the batch.
    progress: progress display.

  Returns:
    Targets over all slots, tiles end to end, as numpy arrays.
  """
  count = int(sum((np.asarray(tile.edit) >= 0).sum() for tile in tiles))
  found = []
  with progress('optimize', count, 'edit') as advance:
    for tile in tiles:
      targets = values.optimize(
          spec, params, tile, layer=recipe.layers[-1], schedule=recipe.value
      )
      found.append(jax.tree.map(np.asarray, targets))
      advance(int((np.asarray(tile.edit) >= 0).sum()))
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def insert(
    spec: ModelSpec,
    params: Params,
    recipe: Recipe,
    state: State,
    tiles: Sequence[Tile],
    *,
    targets: Targets,
    active: np.ndarray,
    each: bool,
    progress: Progress = silent,
) -> tuple[list[Factors], np.ndarray]:
  """Writes the targets into the edited layers, lowest first.

  Args:
    spec: the architecture.
    params: canonical parameters.
    recipe: the method.
    state: factored metrics.
    tiles: the batch.
    targets: wanted states of all slots.
    active: [slots] bool, slots to write.
    each: solve for every edit alone instead of for all together.
    progress: progress display.

  Returns:
    (factors of every layer over all slots; [n + 1, slots] distance to the
    target before each layer and after the last, as a multiple of |z - z0|).
  """
  contexts = tiles[0].tokens.shape[1]
  weights = np.full(contexts, (1 - recipe.bare) / max(contexts - 1, 1))
  weights[0] = recipe.bare if contexts > 1 else 1.0
  sizes = np.cumsum([len(tile.edit) for tile in tiles])[:-1]
  rows = [_enter(spec, params, tile, recipe.layers[0]) for tile in tiles]
  last = recipe.layers[-1]
  length = np.linalg.norm(targets.z - targets.z0, axis=-1)
  distance, solved = [], []
  measure = functools.partial(
      _measure, spec, params, weights=weights.astype(targets.z.dtype)
  )

  def present(layer: int) -> tuple[np.ndarray, np.ndarray]:
    seen = [measure(r, layer=layer, last=last, site=recipe.site) for r in rows]
    keys, now = (
        np.concatenate([np.asarray(x) for x in xs]) for xs in zip(*seen)
    )
    gap = np.linalg.norm(targets.z - now, axis=-1)
    distance.append(gap / np.maximum(length, 1e-30))
    return keys, targets.z - now

  with progress('insert', len(recipe.layers), 'layer') as advance:
    for i, layer in enumerate(recipe.layers):
      keys, gap = present(layer)
      share = recipe.spread(len(recipe.layers) - i)
      with jax.enable_x64(True):
        exact = (_solve_each if each else _solve)(
            state.metrics[i],
            jnp.asarray(keys, jnp.float64),
            jnp.asarray(gap * share, jnp.float64),
            ridge=recipe.ridge,
            active=jnp.asarray(active),
        )
        factors = Factors(*(np.asarray(x, targets.z.dtype) for x in exact))
      solved.append(factors)
      _climb(spec, params, recipe, rows, i, factors, sizes)
      advance(1)
    # Past the last edited layer the rows hold the final state themselves.
    now = np.concatenate([np.asarray(r.h[:, 0, -1]) for r in rows])
    gap = np.linalg.norm(targets.z - now, axis=-1)
    distance.append(gap / np.maximum(length, 1e-30))
  return solved, np.stack(distance)


def _climb(
    spec: ModelSpec,
    params: Params,
    recipe: Recipe,
    rows: list[_Rows],
    i: int,
    factors: Factors,
    sizes: np.ndarray,
) -> None:
  """Takes all rows past edited layer i and on to the next edited one, in place.

  One tile at a time gives its old rows up, so there is one copy of them.
  """
  layers = recipe.layers
  each = factors.key.ndim == 3
  parts = [np.split(x, sizes) for x in factors] if each else None
  for t, r in enumerate(rows):
    mine = Factors(*(part[t] for part in parts)) if each else factors
    r = _advance(
        spec, params, r, layer=layers[i], factors=mine, site=recipe.site
    )
    for layer in range(layers[i] + 1, (layers + (layers[-1] + 1,))[i + 1]):
      r = _pass(spec, params, r, layer=layer)
    rows[t] = r


@functools.partial(jax.jit, static_argnames=('spec',))
def _pass(
    spec: ModelSpec, params: Params, rows: _Rows, *, layer: Array
) -> _Rows:
  """Runs one unedited layer."""
  flat = _flat(rows)
  h, _ = decoder.run_layer(spec, params, flat.h, flat.columns, layer=layer)
  return _Rows(h.reshape(rows.h.shape), rows.columns)


def check_layers(spec: ModelSpec, layers: Sequence[int]) -> None:
  """Refuses layers that a model does not have.

  Args:
    spec: the architecture.
    layers: layers to edit.

  Raises:
    InputError: empty, out of range, repeated or not ascending.
  """
  wrong = [layer for layer in layers if not 0 <= layer < spec.layers]
  if wrong or not layers:
    raise InputError(
        f'layers {list(layers)}: the model has layers 0 to {spec.layers - 1};'
        ' choose from these'
    )
  if list(layers) != sorted(set(layers)):
    raise InputError(
        f'layers {list(layers)}: list each once, in ascending order'
    )


def closed_form(spec: ModelSpec, recipe: Recipe) -> Editor:
  """Makes an editor of a row.

  Args:
    spec: the architecture.
    recipe: the method.

  Returns:
    The editor. Its `init(params, moments)` factors the metrics in f64 and its
    `edit(params, state, tiles, progress=silent)` takes tiles of
    `text.batching.make_tiles`.

  Raises:
    InputError: a layer is out of range; from `init`, moments lack a layer or
      are not positive definite.
  """
  check_layers(spec, recipe.layers)

  def init(params: Params, moments: Moments) -> State:
    del params
    metrics = []
    with jax.enable_x64(True):
      for layer in recipe.layers:
        gram = jnp.asarray(moments.layer(layer), jnp.float64)
        metric = jax.block_until_ready(recipe.metric(gram))
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in metric):
          raise InputError(
              f'the second moments of layer {layer} are not positive definite;'
              ' collect more tokens (at least one a key dimension, better 20)'
          )
        metrics.append(metric)
    return State(tuple(metrics))

  def run(
      params: Params,
      state: State,
      tiles: Sequence[Tile],
      progress: Progress,
      each: bool,
  ) -> tuple[Edited, State, Info]:
    if not tiles:
      return Edited(), state, _nothing(spec, recipe)
    edit, slot = _slots(tiles)
    begin = time.monotonic()
    targets = find_targets(spec, params, recipe, tiles, progress)
    middle = time.monotonic()
    active = (edit >= 0) & targets.finite
    solved, distance = insert(
        spec,
        params,
        recipe,
        state,
        tiles,
        targets=targets,
        active=active,
        each=each,
        progress=progress,
    )
    seconds = {
        'optimize': middle - begin,
        'insert': time.monotonic() - middle,
    }
    written = active[slot]
    kept = slot if each else slot[written]
    stacked = Factors(*(np.stack(x)[:, kept] for x in zip(*solved)))
    delta = LowRank(
        layers=recipe.layers,
        site=recipe.site,
        key=jnp.asarray(stacked.key),
        value=jnp.asarray(stacked.value),
    )
    ordered = jax.tree.map(lambda x: x[slot], targets)
    info = Info(ordered, written, distance[:, slot], seconds)
    return Edited(deltas=(delta,)), state, info

  def edit(params, state, tiles, progress=silent):
    return run(params, state, tiles, progress, each=False)

  def edit_each(params, state, tiles, progress=silent):
    return run(params, state, tiles, progress, each=True)

  return Editor(init, edit, edit_each)


def _nothing(spec: ModelSpec, recipe: Recipe) -> Info:
  """The report on an empty batch."""
  state, one = np.zeros((0, spec.width), np.float32), np.zeros(0, np.float32)
  steps, yes = np.zeros(0, np.int32), np.zeros(0, bool)
  targets: Any = Targets(state, state, one, one, steps, yes)
  distance = np.zeros((len(recipe.layers) + 1, 0), np.float32)
  return Info(targets, yes, distance, {'optimize': 0.0, 'insert': 0.0})
