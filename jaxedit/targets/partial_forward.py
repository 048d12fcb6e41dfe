"""The parts a model is run in while a state above `layer` is optimised.

  trunk_kv   what all edits' contexts share, all layers         once a batch
  lower      an edit's own columns, layers up to l              once an edit
  prefix_kv  its columns left of the anchor, layers above l     once an edit
  upper      its suffix columns, layers above l; in the last of them queries,
             and then the head, at scored columns alone         every step

Axes: N places (suffix tokens), R rows, W suffix columns, U layers above the
edited one, s shared columns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.batching.slots import Seats
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import KV, Array, Columns, Params, Ragged, Tap


def trunk_kv(
    spec: ModelSpec, params: Params, tokens: Array, columns: Columns
) -> KV | None:
  """Runs what all edits share at the head of their rows.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, s] int32.
    columns: [B, s] columns.

  Returns:
    Its keys and values in all layers; None where s is 0.
  """
  if not tokens.shape[1]:
    return None
  every = tuple(range(spec.layers))
  _, ((key, value),) = decoder.run_layers(
      spec,
      params,
      decoder.embed(spec, params, tokens, columns),
      columns,
      start=0,
      stop=spec.layers,
      taps=(Tap('kv', every),),
  )
  return KV(key, value, columns)


def spread(kv: KV, context: Array) -> KV:
  """Gives every row the keys and values of its trunk.

  Args:
    kv: of the trunks.
    context: [R] int32 trunk of a row.

  Returns:
    Keys and values of R rows.
  """
  columns = jax.tree.map(lambda x: x[context], kv.columns)
  return KV(kv.key[:, context], kv.value[:, context], columns)


def lower(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    columns: Columns | Ragged,
    layer: int,
    trunk: KV | None = None,
) -> Array:
  """Runs the model up to and including `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    columns: [B, T] columns.
    layer: last layer to run.
    trunk: keys and values of earlier columns, in all layers.

  Returns:
    [B, T, D] residual leaving `layer`.
  """
  return _lower(spec, params, tokens, columns, layer=layer, trunk=trunk)[0]


def lower_parts(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    columns: Columns | Ragged,
    *,
    layer: int,
    trunk: KV | None = None,
) -> tuple[Array, tuple[Array, Array]]:
  """Runs the model up to and including `layer`, whose two halves are observed.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    columns: [B, T] columns.
    layer: last layer to run.
    trunk: keys and values of earlier columns, in all layers.

  Returns:
    ([B, T, D] residual leaving `layer`, (attention's output, MLP's output)).
  """
  taps = tuple(Tap(site, (layer,)) for site in ('attn', 'mlp'))
  h, (attn, mlp) = _lower(
      spec, params, tokens, columns, layer=layer, trunk=trunk, taps=taps
  )
  return h, (attn[0], mlp[0])


def _lower(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    columns: Columns | Ragged,
    *,
    layer: int,
    trunk: KV | None,
    taps: tuple[Tap, ...] = (),
) -> tuple[Array, tuple[Any, ...]]:
  """Runs layers 0 to `layer`; gives what the taps read as well."""
  if trunk is not None:
    trunk = KV(trunk.key[: layer + 1], trunk.value[: layer + 1], trunk.columns)
  return decoder.run_layers(
      spec,
      params,
      decoder.embed(spec, params, tokens, columns),
      columns,
      start=0,
      stop=layer + 1,
      prefix=trunk,
      taps=taps,
  )


def prefix_kv(
    spec: ModelSpec,
    params: Params,
    h: Array,
    columns: Columns | Ragged,
    layer: int,
    trunk: KV | None = None,
) -> KV | None:
  """Runs the columns left of the anchor through the layers above `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, P, D] residual leaving `layer`, columns before the anchor only.
    columns: [B, P] columns.
    layer: the edited layer.
    trunk: keys and values of earlier columns, in all layers.

  Returns:
    Keys and values of the trunk and of these columns in the U layers above;
    None where there are no such layers.
  """
  above = tuple(range(layer + 1, spec.layers))
  if not above:
    return None
  if trunk is not None:
    trunk = KV(trunk.key[layer + 1 :], trunk.value[layer + 1 :], trunk.columns)
  _, ((key, value),) = decoder.run_layers(
      spec,
      params,
      h,
      columns,
      start=layer + 1,
      stop=spec.layers,
      prefix=trunk,
      taps=(Tap('kv', above),),
  )
  rows = columns.columns if isinstance(columns, Ragged) else columns
  if trunk is None:
    return KV(key, value, rows)
  join = lambda x, y, axis: jnp.concatenate([x, y], axis=axis)
  return KV(
      join(trunk.key, key, 3),
      join(trunk.value, value, 3),
      jax.tree.map(lambda x, y: join(x, y, 1), trunk.columns, rows),
  )


def upper(
    spec: ModelSpec,
    params: Params,
    h: Array,
    seats: Seats,
    *,
    kv: KV | None,
    layer: int,
    watch: bool = False,
) -> tuple[Array, tuple[Array, Array] | None]:
  """Runs suffix columns through the layers above `layer`; differentiable in h.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [1, N, D] residual leaving `layer`, from the anchors on.
    seats: which rows these places form, and which are scored.
    kv: keys and values of earlier columns in the layers above.
    layer: the edited layer.
    watch: return this run's keys and values as well.

  Returns:
    ([1, K', D] output of the last block at scored places; keys and values
    [U, R, G, W, H] or None).
  """
  above = tuple(range(layer + 1, spec.layers))
  h, taps = decoder.run_layers(
      spec,
      params,
      h,
      seats.rows,
      start=layer + 1,
      stop=spec.layers,
      prefix=kv,
      taps=(Tap('kv', above),) if watch and above else (),
      keep=seats.keep,
      remat=decoder.SAVE_PRODUCTS,
  )
  return h, taps[0] if taps else None
