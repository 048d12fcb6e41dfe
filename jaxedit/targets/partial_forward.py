"""The parts a model is run in while a state above `layer` is optimised.

  shared_prefix_kv   what all edits' contexts share, all layers         once a batch
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

from jaxedit.batching.slots import SlotLayout
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import KV, Array, PackedSequences, Params, Tap, TokenLayout


def shared_prefix_kv(
    spec: ModelSpec, params: Params, tokens: Array, layout: TokenLayout
) -> KV | None:
  """Runs what all edits share at the head of their rows.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, s] int32.
    layout: [B, s] columns.

  Returns:
    Its keys and values in all layers; None where s is 0.
  """
  if not tokens.shape[1]:
    return None
  every = tuple(range(spec.layers))
  _, ((key, value),) = decoder.run_layers(
      spec,
      params,
      decoder.embed(spec, params, tokens, layout),
      layout,
      start=0,
      stop=spec.layers,
      taps=(Tap('kv', every),),
  )
  return KV(key, value, layout)


def broadcast_prefix(kv: KV, context: Array) -> KV:
  """Gives every row the keys and values of its trunk.

  Args:
    kv: of the trunks.
    context: [R] int32 trunk of a row.

  Returns:
    Keys and values of R rows.
  """
  layout = jax.tree.map(lambda x: x[context], kv.layout)
  return KV(kv.key[:, context], kv.value[:, context], layout)


def lower(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout | PackedSequences,
    layer: int,
    shared_prefix: KV | None = None,
) -> Array:
  """Runs the model up to and including `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    layout: [B, T] columns.
    layer: last layer to run.
    shared_prefix: keys and values of earlier columns, in all layers.

  Returns:
    [B, T, D] residual leaving `layer`.
  """
  return _lower(
      spec, params, tokens, layout, layer=layer, shared_prefix=shared_prefix
  )[0]


def lower_parts(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout | PackedSequences,
    *,
    layer: int,
    shared_prefix: KV | None = None,
) -> tuple[Array, tuple[Array, Array]]:
  """Runs the model up to and including `layer`, whose two halves are observed.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    layout: [B, T] columns.
    layer: last layer to run.
    shared_prefix: keys and values of earlier columns, in all layers.

  Returns:
    ([B, T, D] residual leaving `layer`, (attention's output, MLP's output)).
  """
  taps = tuple(Tap(site, (layer,)) for site in ('attn', 'mlp'))
  h, (attn, mlp) = _lower(
      spec,
      params,
      tokens,
      layout,
      layer=layer,
      shared_prefix=shared_prefix,
      taps=taps,
  )
  return h, (attn[0], mlp[0])


def _lower(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout | PackedSequences,
    *,
    layer: int,
    shared_prefix: KV | None,
    taps: tuple[Tap, ...] = (),
) -> tuple[Array, tuple[Any, ...]]:
  """Runs layers 0 to `layer`; gives what the taps read as well."""
  if shared_prefix is not None:
    shared_prefix = KV(
        shared_prefix.key[: layer + 1],
        shared_prefix.value[: layer + 1],
        shared_prefix.layout,
    )
  return decoder.run_layers(
      spec,
      params,
      decoder.embed(spec, params, tokens, layout),
      layout,
      start=0,
      stop=layer + 1,
      prefix=shared_prefix,
      taps=taps,
  )


def prefix_kv(
    spec: ModelSpec,
    params: Params,
    h: Array,
    layout: TokenLayout | PackedSequences,
    layer: int,
    shared_prefix: KV | None = None,
) -> KV | None:
  """Runs the columns left of the anchor through the layers above `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, P, D] residual leaving `layer`, columns before the anchor only.
    layout: [B, P] columns.
    layer: the edited layer.
    shared_prefix: keys and values of earlier columns, in all layers.

  Returns:
    Keys and values of the trunk and of these columns in the U layers above;
    None where there are no such layers.
  """
  above = tuple(range(layer + 1, spec.layers))
  if not above:
    return None
  if shared_prefix is not None:
    shared_prefix = KV(
        shared_prefix.key[layer + 1 :],
        shared_prefix.value[layer + 1 :],
        shared_prefix.layout,
    )
  _, ((key, value),) = decoder.run_layers(
      spec,
      params,
      h,
      layout,
      start=layer + 1,
      stop=spec.layers,
      prefix=shared_prefix,
      taps=(Tap('kv', above),),
  )
  rows = layout.layout if isinstance(layout, PackedSequences) else layout
  if shared_prefix is None:
    return KV(key, value, rows)
  join = lambda x, y, axis: jnp.concatenate([x, y], axis=axis)
  return KV(
      join(shared_prefix.key, key, 3),
      join(shared_prefix.value, value, 3),
      jax.tree.map(lambda x, y: join(x, y, 1), shared_prefix.layout, rows),
  )


def upper(
    spec: ModelSpec,
    params: Params,
    h: Array,
    assigned: SlotLayout,
    *,
    kv: KV | None,
    layer: int,
    return_kv: bool = False,
) -> tuple[Array, tuple[Array, Array] | None]:
  """Runs suffix columns through the layers above `layer`; differentiable in h.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [1, N, D] residual leaving `layer`, from the anchors on.
    assigned: which rows these places form, and which are scored.
    kv: keys and values of earlier columns in the layers above.
    layer: the edited layer.
    return_kv: return this run's keys and values as well.

  Returns:
    ([1, K', D] output of the last block at scored places; keys and values
    [U, R, G, W, H] or None).
  """
  above = tuple(range(layer + 1, spec.layers))
  h, taps = decoder.run_layers(
      spec,
      params,
      h,
      assigned.rows,
      start=layer + 1,
      stop=spec.layers,
      prefix=kv,
      taps=(Tap('kv', above),) if return_kv and above else (),
      outputs=assigned.outputs,
      remat=decoder.SAVE_PRODUCTS,
  )
  return h, taps[0] if taps else None
