"""Runs the part of the model that a restored activation can change.

Restoring (token t, layer l) can only affect tokens from t on above layer l, so
only that part is recomputed. The clean and the corrupted run leave tables of
their activations. A grid cell continues the corrupted one: its row enters after
the first restored layer e with the columns from the restored token t on,

  h_t = the state that restoring the part at t in layer e gives,   h_j = corrupted

and sees the corrupted keys and values of the columns before t. A state that one
part's restoration gives follows from the tables alone:

  block   the clean state
  mlp     corrupted state + clean MLP - corrupted MLP
  attn    one MLP more a layer, for all tokens at once (`tables`)

The other layers of a window, and parts that are held, are set as the rows pass.

Axis letters: G cases, n draws, R0 = G n corrupted rows, R rows of a tile, N
places, K scored places; the others as in `jaxedit.types`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp

from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.trace.grid_cells import PackedBatch
from jaxedit.trace.restoration import Restoration
from jaxedit.types import PADDING, SHARED, Array, Params, Tap, TokenLayout


@flax.struct.dataclass
class Tables:
  """Activations of a group of cases.

  Attributes:
    clean: part -> [L, G, T, D] outputs of the clean run.
    base: part -> [L, R0, T, D] outputs of the corrupted runs.
    entry: part -> [L, R0, T, D] output of the block where that part alone is
      restored, at every token apart; for 'attn'.
    key: [L, R0, G', T, H] keys of the corrupted runs.
    value: [L, R0, G', T, H].
    high: [G, K] clean log-probability of the labels, nats.
    low: [R0, K] the same, corrupted.
  """

  clean: dict[str, Array]
  base: dict[str, Array]
  entry: dict[str, Array]
  key: Array
  value: Array
  high: Array
  low: Array


def parts_of(restorations: Sequence[Restoration]) -> tuple[str, ...]:
  """Parts whose outputs the tables of some restorations must hold."""
  wanted = {
      'block',
      *(part for r in restorations for part in (r.part, r.sever)),
  }
  return tuple(p for p in ('block', 'mlp', 'attn') if p in wanted)


@functools.partial(
    jax.jit, static_argnames=('spec', 'mode', 'parts', 'entries')
)
def tables(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    valid: Array,
    noise: Array,
    *,
    corrupted: Array,
    scored: Array,
    labels: Array,
    mode: str,
    parts: tuple[str, ...],
    entries: bool,
) -> Tables:
  """Runs cases clean and corrupted.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [G, T] int32, padded on the right.
    valid: [G, T] bool.
    noise: [G, n, T, D] what corrupts the embeddings.
    corrupted: [G, T] bool, where it does.
    scored: [G, K] columns that are scored.
    labels: [G, K] tokens that should follow there.
    mode: 'add' or 'set', static.
    parts: whose outputs to keep, static; see `parts_of`.
    entries: whether attentions will be restored, static.

  Returns:
    The tables.
  """
  draws = noise.shape[1]
  layers = tuple(range(spec.layers))
  layout = decoder.token_layout(valid)
  spread = lambda x: jnp.repeat(x, draws, axis=0)
  run = functools.partial(
      decoder.run_layers, spec, params, start=0, stop=spec.layers
  )
  h = decoder.embed(spec, params, tokens, layout)
  score = functools.partial(_score, spec, params)
  out, seen = run(h, layout, taps=[Tap(p, layers) for p in parts])
  clean, high = dict(zip(parts, seen)), score(out, scored, labels)
  noise = noise.reshape(-1, *noise.shape[2:]).astype(h.dtype)
  h = spread(h)
  if mode == 'set':  # of the residual, the token's own part
    noise = noise - spread(params['embed']['embedding'][tokens]).astype(h.dtype)
  h = jnp.where(spread(corrupted)[..., None], h + noise, h)
  layout = jax.tree.map(spread, layout)
  taps = [Tap(p, layers) for p in (*parts, 'kv')]
  out, (*seen, (key, value)) = run(h, layout, taps=taps)
  base, low = dict(zip(parts, seen)), score(out, spread(scored), spread(labels))
  entry = {}
  if entries:
    entry['attn'] = _attend_clean(spec, params, h, layout, base, clean)
  return Tables(clean, base, entry, key, value, high, low)


def _score(
    spec: ModelSpec, params: Params, h: Array, scored: Array, labels: Array
) -> Array:
  """[B, K] log-probability of labels at columns of [B, T, D]."""
  at = jnp.take_along_axis(h, scored[..., None], axis=1)
  return decoder.label_logprob(spec, params, at, labels)[0]


def _attend_clean(
    spec: ModelSpec,
    params: Params,
    h: Array,
    layout: TokenLayout,
    base: dict[str, Array],
    clean: dict[str, Array],
) -> Array:
  """[L, R0, T, D] block outputs where a layer's attention alone is clean.

  The attention that is computed here is not used, so XLA leaves it out.
  """
  draws = h.shape[0] // clean['attn'].shape[1]

  def body(h, xs):
    layer, restored, after = xs
    wanted = jnp.repeat(restored, draws, axis=0)
    set_attention = lambda site, x: wanted if site == 'attn' else x
    out, _ = decoder.run_layer(
        spec, params, h, layout, layer=layer, intervene=set_attention
    )
    return after, out

  xs = (jnp.arange(spec.layers), clean['attn'], base['block'])
  return jax.lax.scan(body, h, xs)[1]


def _restored(
    found: Tables, part: str, layer: Array, cell_ids: Array, token: Array
) -> Array:
  """[R, D] block's output where a part is restored at [R] tokens of [R] rows."""
  draws = found.low.shape[0] // found.high.shape[0]
  clean = lambda name: found.clean[name][layer, cell_ids // draws, token]
  if part == 'block':
    return clean('block')
  if part == 'attn':
    return found.entry['attn'][layer, cell_ids, token]
  base = {name: found.base[name][layer, cell_ids, token] for name in found.base}
  return base['block'] + clean('mlp') - base['mlp']


@functools.partial(jax.jit, static_argnames=('spec', 'restoration'))
def run_cells(
    spec: ModelSpec,
    params: Params,
    found: Tables,
    packed: PackedBatch,
    *,
    restoration: Restoration,
) -> Array:
  """Runs a tile of grid cells.

  Args:
    spec: the architecture.
    params: canonical parameters.
    found: the tables of the tile's group.
    packed: rows that enter after a layer below the last.
    restoration: what is restored, see `Restoration.program`, static.

  Returns:
    [K] log-probability of the labels at scored places, nats.
  """
  first = _restored(
      found, restoration.part, packed.entry, packed.cell_ids, packed.token
  )
  hold = _holder(found, packed, restoration)
  return run_rows(spec, params, found, packed, first, hold=hold)


def _holder(
    found: Tables, packed: PackedBatch, restoration: Restoration
) -> tuple[str, Callable[[Array], tuple[Array, Array]]] | None:
  """(part, layer -> ([R, D] its output at t, [R] whether it is set))."""
  sever = restoration.sever
  if not sever and restoration.window == 1:
    return None
  part, cell_ids, table = sever or restoration.part, packed.cell_ids, found.base
  if not sever:
    draws = found.low.shape[0] // found.high.shape[0]
    cell_ids, table = packed.cell_ids // draws, found.clean

  def values(layer: Array) -> tuple[Array, Array]:
    restored = table[part][layer, cell_ids, packed.token]
    always = jnp.ones(cell_ids.shape, bool)
    return restored, always if sever else layer < packed.stop

  return part, values


def run_rows(
    spec: ModelSpec,
    params: Params,
    found: Tables,
    packed: PackedBatch,
    first: Array,
    *,
    hold: Any = None,
) -> Array:
  """Runs rows from the entry layer to the head.

  Args:
    spec: the architecture.
    params: canonical parameters.
    found: the tables.
    packed: the rows.
    first: [R, D] state of their first columns after the entry layer.
    hold: (part, layer -> ([R, D] its output at the first column, [R] whether it
      is set there)), or None.

  Returns:
    [K] log-probability of the labels at scored places, nats.
  """
  rows, last = packed.rows, spec.layers - 1
  pick = lambda x, row: jnp.take(x, row, axis=0, mode='clip')
  column = pick(packed.token, rows.row) + rows.column
  base = found.base['block']
  h = base[packed.entry, pick(packed.cell_ids, rows.row), column]
  head = lambda row, column: ((column == 0) & (row < len(first)))[..., None]
  h = jnp.where(head(rows.row, rows.column), pick(first, rows.row), h)[None]
  before = _before(packed, base.shape[2])

  def layer(h: Array, number: Array, outputs=None) -> Array:
    row, at = rows.row, rows.column
    if outputs is not None:
      row = outputs.rows.row
      at = jnp.take(at, outputs.index, mode='clip')

    def intervene(site: str, x: Array) -> Array:
      if hold is None or site != hold[0]:
        return x
      value, active = hold[1](number)
      here = head(row, at) & pick(active, row)[..., None]
      return jnp.where(here, pick(value, row).astype(x.dtype), x)

    kv = [x[number, packed.cell_ids] for x in (found.key, found.value)]
    return decoder.run_layer(
        spec, params, h, rows, layer=number, prefix=(*kv, before),
        intervene=intervene, outputs=outputs,
    )[0]  # fmt: skip

  h = jax.lax.fori_loop(packed.entry + 1, last, lambda i, h: layer(h, i), h)
  h = layer(h, jnp.int32(last), packed.outputs)
  return decoder.label_logprob(spec, params, h[0], packed.label)[0]


def _before(packed: PackedBatch, width: int) -> TokenLayout:
  """The columns left of the first one, of the corrupted run."""
  positions = jnp.broadcast_to(jnp.arange(width), (len(packed.token), width))
  seen = positions < packed.token[:, None]
  return TokenLayout(positions, jnp.where(seen, SHARED, PADDING))


@functools.partial(jax.jit, static_argnames=('spec', 'part'))
def edge(
    spec: ModelSpec,
    params: Params,
    found: Tables,
    token: Array,
    labels: Array,
    *,
    part: str,
) -> Array:
  """Scores cells whose first restored layer is the last of the model.

  Args:
    spec: the architecture.
    params: canonical parameters.
    found: the tables.
    token: [R0] first scored column, the only one that can change.
    labels: [R0] the token that should follow it.
    part: what is restored, static.

  Returns:
    [R0] its log-probability, nats.
  """
  cell_ids = jnp.arange(len(token))
  h = _restored(found, part, jnp.int32(spec.layers - 1), cell_ids, token)
  return decoder.label_logprob(spec, params, h, labels)[0]
