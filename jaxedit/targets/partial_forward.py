"""The parts of the forward pass while targets of a layer l are optimised.

  shared_prefix_kv  the shared prefixes, all layers                once a batch
  lower             all other tokens, layers up to l               once an edit
  prefix_kv         those before the anchor, layers above l        once an edit
  upper             those from the anchor on, layers above l; in the last layer
                    queries, MLP and then the head at scored tokens only
                                                                   every step

Axes as in `jaxedit.types`: N token budget, B sequences, S suffix tokens, P
prefix tokens, O output tokens, U layers above the edited one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.batching.slots import SlotLayout
from jaxedit.deltas import ActiveDeltas, SiteDelta
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import KV, Array, PackedSequences, Params, Tap, TokenLayout


def shared_prefix_kv(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout,
    deltas: ActiveDeltas | Sequence[SiteDelta] = (),
) -> KV | None:
  """Runs the shared prefixes.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, P] int32.
    layout: [B, P] layout of the tokens.
    deltas: that the model is under.

  Returns:
    Their keys and values in all layers; None where P is 0.
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
      deltas=deltas,
      taps=(Tap('kv', every),),
  )
  return KV(key, value, layout)


def broadcast_prefix(kv: KV, context: Array) -> KV:
  """Gives every sequence the keys and values of its shared prefix.

  Args:
    kv: of the shared prefixes.
    context: [B] int32 shared prefix of a sequence.

  Returns:
    Keys and values of B sequences.
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
    deltas: ActiveDeltas | Sequence[SiteDelta] = (),
) -> Array:
  """Runs the model up to and including `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    layout: [B, T] layout of the tokens.
    layer: last layer to run.
    shared_prefix: keys and values of prefix tokens, in all layers.
    deltas: that the model is under.

  Returns:
    [B, T, D] residual stream after `layer`.
  """
  return _lower(
      spec,
      params,
      tokens,
      layout,
      layer=layer,
      shared_prefix=shared_prefix,
      deltas=deltas,
  )[0]


def lower_parts(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout | PackedSequences,
    *,
    layer: int,
    shared_prefix: KV | None = None,
    deltas: ActiveDeltas | Sequence[SiteDelta] = (),
) -> tuple[Array, tuple[Array, Array]]:
  """Runs the model up to and including `layer`; returns its halves' outputs.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    layout: [B, T] layout of the tokens.
    layer: last layer to run.
    shared_prefix: keys and values of prefix tokens, in all layers.
    deltas: that the model is under.

  Returns:
    ([B, T, D] residual stream after `layer`, (attention's output, MLP's
    output)).
  """
  taps = tuple(Tap(site, (layer,)) for site in ('attn', 'mlp'))
  h, (attn, mlp) = _lower(
      spec,
      params,
      tokens,
      layout,
      layer=layer,
      shared_prefix=shared_prefix,
      deltas=deltas,
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
    deltas: ActiveDeltas | Sequence[SiteDelta],
    taps: tuple[Tap, ...] = (),
) -> tuple[Array, tuple[Any, ...]]:
  """Runs layers 0 to `layer`; returns the readings of the taps too."""
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
      deltas=deltas,
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
  """Runs the tokens before the anchor through the layers above `layer`.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, P, D] residual stream after `layer`, of tokens before the anchor.
    layout: [B, P] layout of the tokens.
    layer: the edited layer.
    shared_prefix: keys and values of prefix tokens, in all layers.

  Returns:
    Keys and values of the shared prefix and of these tokens in the U layers
    above; None where there are no such layers.
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
  """Runs the suffixes through the layers above `layer`; differentiable in h.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [1, N, D] residual stream after `layer`, from the anchors on.
    assigned: the sequences of these tokens, and which tokens are scored.
    kv: keys and values of prefix tokens in the layers above.
    layer: the edited layer.
    return_kv: return this run's keys and values too.

  Returns:
    ([1, O', D] output of the last block at scored tokens and KL prompts; keys
    and values [U, B, G, S, H] or None).
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
