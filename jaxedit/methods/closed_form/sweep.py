"""The forward pass of insertion upward through the edited layers.

For each edited layer, every sequence is paused before the MLP, keys are read
and the states after the last edited layer are predicted; after the solve the
sequences continue through the edited MLP. No run starts at the embedding again,
and neither the layers above the last edited one nor the head are run. Shared
prefixes are run once for all edits, as sequences of their own.

Axes as in `jaxedit.types`: E edits, B sequences, N packed tokens, P prefix
tokens, K chunks an edit, M targets of all edits, J preserved keys, F key width,
D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.batching import edits as edits_lib
from jaxedit.batching.edits import PackedBatch
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import (
    ActiveDeltas,
    Below,
    Dense,
    LayerDeltas,
    LowRank,
    SiteDelta,
)
from jaxedit.methods.closed_form import segment_sum
from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.models import decoder
from jaxedit.models.blocks import stored
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import KV, Array, PackedSequences, Params, Tap, TokenLayout

# The delta of one layer: factors, or one matrix [F, D].
LayerDelta = LowRankUpdate | Array


class Keys(NamedTuple):
  """Inputs of the edited map in one layer.

  Attributes:
    plain: [M, F] at the anchors of the plain prompts.
    mean: [M, F] average over contexts.
    preserved: [J, F] at the other tokens of the texts.
    group: [J] edit that a preserved key belongs to.
  """

  plain: np.ndarray
  mean: np.ndarray
  preserved: np.ndarray
  group: np.ndarray


class _AtMlp(NamedTuple):
  """Activations of sequences that are paused before an MLP."""

  h: Array  # residual stream without the MLP
  x: Array  # input of the MLP


class _SharedPrefix(NamedTuple):
  """The shared prefixes during the sweep."""

  at: Array | _AtMlp  # [B, P, D]
  layout: TokenLayout  # [B, P]
  kv: tuple[Array, Array] | None = None  # of the present layer, [B, G, P, H]


def _prefix(
    shared_prefix: _SharedPrefix, kv: tuple[Array, Array], batch: PackedBatch
) -> tuple[Array, Array, TokenLayout]:
  """Keys and values of each sequence's shared prefix in one layer."""
  pick = lambda x: x[batch.context]
  return pick(kv[0]), pick(kv[1]), jax.tree.map(pick, shared_prefix.layout)


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _enter_shared_prefix(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout,
    layer: int,
) -> tuple[Array, KV | None]:
  """Runs the shared prefixes up to the first edited layer."""
  h = decoder.embed(spec, params, tokens, layout)
  below = tuple(range(layer))
  if not below:
    return h, None
  h, ((key, value),) = decoder.run_layers(
      spec,
      params,
      h,
      layout,
      start=0,
      stop=layer,
      taps=(Tap('kv', below),),
  )
  return h, KV(key, value, layout)


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _enter(
    spec: ModelSpec,
    params: Params,
    kv: KV | None,
    batch: PackedBatch,
    deltas: ActiveDeltas | Sequence[SiteDelta] = (),
    *,
    layer: int,
) -> Array:
  """Runs a batch up to the first edited layer; `kv` of the shared prefixes."""
  h = decoder.embed(spec, params, batch.tokens, batch.rows)
  if kv is not None:
    kv = targets_lib.broadcast_prefix(kv, batch.context)
  return decoder.run_layers(
      spec,
      params,
      h,
      batch.rows,
      start=0,
      stop=layer,
      prefix=kv,
      deltas=deltas,
  )[0]


@functools.partial(jax.jit, static_argnames='spec')
def _shared_prefix_to_mlp(
    spec: ModelSpec,
    params: Params,
    shared_prefix: _SharedPrefix,
    *,
    layer: Array,
) -> _SharedPrefix:
  """Runs the shared prefixes up to the MLP of a layer."""
  h, x, kv = decoder.attention_half(
      spec, params, shared_prefix.at, shared_prefix.layout, layer=layer
  )
  return shared_prefix._replace(at=_AtMlp(h, x), kv=kv)


@functools.partial(jax.jit, static_argnames='spec', donate_argnames='h')
def _to_mlp(
    spec: ModelSpec,
    params: Params,
    h: Array,
    batch: PackedBatch,
    shared_prefix: _SharedPrefix | None,
    *,
    layer: Array,
) -> _AtMlp:
  """Runs a batch up to the MLP of a layer, after the shared prefixes."""
  prefix = None
  if shared_prefix is not None:
    prefix = _prefix(shared_prefix, shared_prefix.kv, batch)
  h, x, _ = decoder.attention_half(
      spec, params, h, batch.rows, layer=layer, prefix=prefix
  )
  # The MLP takes its input in this dtype.
  return _AtMlp(h, x.astype(stored(spec, params['embed']['embedding'].dtype)))


def _at(x: Array, index: Array) -> Array:
  """Takes [1, N, D] at packed indices; zeros where there is none."""
  return jnp.take(x[0], index, axis=0, mode='fill', fill_value=0)


@functools.partial(jax.jit, static_argnames=('spec', 'site'))
def _read_keys(
    spec: ModelSpec,
    params: Params,
    at_mlp: _AtMlp,
    index: Array | None,
    *,
    layer: Array,
    site: str,
) -> Array:
  """Computes the keys [N', F] at packed indices [N'], or of all tokens."""
  x = at_mlp.x if index is None else _at(at_mlp.x, index)[None]
  _, seen = decoder.mlp_half(spec, params, x, layer=layer)
  key = seen[site][0]
  return key.astype(wide(key.dtype))


@functools.partial(jax.jit, static_argnames=('spec', 'output'))
def _measure(
    spec: ModelSpec,
    params: Params,
    at_mlp: _AtMlp,
    anchor: Array,
    *,
    layer: Array,
    deltas: LayerDeltas,
    output: str,
) -> Array:
  """Computes the output of a layer at anchors [B, K], under its delta.

  Returns:
    [B, K, D].
  """
  m, _ = decoder.mlp_half(
      spec, params, _at(at_mlp.x, anchor), layer=layer, deltas=deltas
  )
  return _at(at_mlp.h, anchor) + m if output == 'block' else m


@functools.partial(jax.jit, static_argnames='spec')
def _predict_final(
    spec: ModelSpec,
    params: Params,
    at_mlp: _AtMlp,
    batch: PackedBatch,
    shared_prefix: _SharedPrefix | None,
    *,
    layer: Array,
    last: Array,
) -> _AtMlp:
  """Runs paused sequences from the MLP of `layer`, unedited, to `last`'s."""

  def through_mlp(at: _AtMlp, layer: Array) -> Array:
    return at.h + decoder.mlp_half(spec, params, at.x, layer=layer)[0]

  def body(layer: Array, state: tuple[_AtMlp, Any]) -> Any:
    at, base = state
    prefix = None
    if base is not None:
      h, x, kv = decoder.attention_half(
          spec,
          params,
          through_mlp(base, layer),
          shared_prefix.layout,
          layer=layer + 1,
      )
      base = _AtMlp(h, x.astype(base.x.dtype))
      prefix = _prefix(shared_prefix, kv, batch)
    h, x, _ = decoder.attention_half(
        spec, params, through_mlp(at, layer), batch.rows, layer=layer + 1,
        prefix=prefix,
    )  # fmt: skip
    return _AtMlp(h, x.astype(at.x.dtype)), base

  base = None if shared_prefix is None else shared_prefix.at
  return jax.lax.fori_loop(layer, last, body, (at_mlp, base))[0]


@functools.partial(jax.jit, static_argnames='spec', donate_argnames='h')
def _through_mlp(
    spec: ModelSpec,
    params: Params,
    h: Array,
    x: Array,
    rows: PackedSequences | None,
    *,
    layer: Array,
    deltas: LayerDeltas,
) -> Array:
  """Runs the MLP of a layer under its deltas; returns the residual stream."""
  m, _ = decoder.mlp_half(
      spec, params, x, layer=layer, rows=rows, deltas=deltas
  )
  return h + m


class LayerSweep:
  """The sequences of a batch during insertion; see the module."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      recipe: Recipe,
      edits: Sequence[EncodedEdit],
      plan: BatchPlan,
      *,
      group: Sequence[int] | None = None,
      below: Below | None = None,
  ):
    """Runs all sequences up to the first edited layer.

    Args:
      spec: the architecture.
      params: canonical parameters.
      recipe: the method.
      edits: E edits.
      plan: of the run.
      group: [E] independent group of an edit; None for joint edits.
      below: changes of layers below the first, of every group its own.
    """
    self._model, self._recipe = (spec, params), recipe
    self._contexts, self._text = plan.contexts, recipe.texts
    self._group = None if group is None else np.asarray(group)
    self._stages = np.array([edit.stages for edit in edits])
    self._first = np.cumsum(self._stages) - self._stages
    self._sides = tuple(
        list(edits_lib.pack_prompts(edits, plan, plain=plain, text=self._text))
        for plain in (True, False)
    )
    self._segments = tuple(
        [
            segment_sum.find_segments(self._numbers(batch), each)
            for batch in side
        ]
        for side, each in zip(self._sides, (1, plan.contexts - 1))
    )
    first = recipe.layers[0]
    tokens, layout = edits_lib.pack_shared_prefix(plan)
    self._shared_prefix, kv = None, None
    if tokens.shape[1]:
      h, kv = _enter_shared_prefix(spec, params, tokens, layout, layer=first)
      self._shared_prefix = _SharedPrefix(h, layout)
    free = plan.resident_bytes
    self._at: list[list[Any]] = [[], []]
    self._offloaded: list[list[bool]] = [[], []]  # kept on the host
    for side, t, batch in self._each():
      own = () if below is None else below.active(batch.edit)
      h = _enter(spec, params, kv, batch, own, layer=first)
      free -= 2 * h.nbytes  # with the input of the MLP
      self._offloaded[side].append(free < 0)
      self._at[side].append(None)
      self._keep(side, t, h)

  @property
  def states(self) -> int:
    """M."""
    return int(self._stages.sum())

  def _each(self) -> Iterator[tuple[int, int, PackedBatch]]:
    for number, side in enumerate(self._sides):
      for t, batch in enumerate(side):
        yield number, t, batch

  def _numbers(self, batch: PackedBatch) -> np.ndarray:
    """[B, K] which of the M targets an anchor belongs to, -1 for none."""
    k = np.arange(batch.anchor.shape[1])
    taken = (batch.edit >= 0)[:, None] & (k < self._stages[batch.edit][:, None])
    return np.where(taken, self._first[batch.edit][:, None] + k, -1)

  def _keep(self, side: int, t: int, rows: Any) -> None:
    """Stores the activations of a packed batch on the device or the host."""
    if self._offloaded[side][t]:
      rows = jax.tree.map(fetch, rows)
    self._at[side][t] = rows

  def _gather(self, side: int, parts: Iterator[Array]) -> np.ndarray:
    """Averages vectors at anchors [B, K, .] over the contexts of a side."""
    total, mine = None, self._segments[side]
    found = (
        segment_sum.segment_sum(part, one.index)
        for part, one in zip(parts, mine)
    )
    for part, one in zip(segment_sum.one_ahead(found), mine):
      part = fetch(part)
      if total is None:
        total = np.zeros((self.states, part.shape[-1]), part.dtype)
      total[one.states] += part[: len(one.states)]
    return total / (1 if side == 0 else self._contexts - 1)

  def _mean(self, plain: np.ndarray, others: np.ndarray | None, weight: float):
    return plain if others is None else weight * plain + (1 - weight) * others

  def to_mlp(self, layer: int) -> None:
    """Runs all sequences up to the MLP of a layer."""
    if self._shared_prefix is not None:
      self._shared_prefix = _shared_prefix_to_mlp(
          *self._model, self._shared_prefix, layer=layer
      )
    for side, t, batch in self._each():
      at_mlp = _to_mlp(
          *self._model,
          self._at[side][t],
          batch,
          self._shared_prefix,
          layer=layer,
      )
      self._keep(side, t, at_mlp)

  def keys(self, layer: int) -> Keys:
    """Reads the keys of all edits before the MLP of a layer."""
    read = functools.partial(
        _read_keys, *self._model, layer=layer, site=self._recipe.site
    )
    preserved: list[tuple[np.ndarray, np.ndarray]] = []

    def at_anchors(side: int) -> Iterator[Array]:
      # One packed batch at a time: the keys of all contexts would fill memory.
      for at, batch in zip(self._at[side], self._sides[side]):
        if not self._text:
          found = read(at, batch.anchor.reshape(-1))
          yield found.reshape(*batch.anchor.shape, -1)
          continue
        every = read(at, None)
        rest = batch.rows.row < len(batch.edit)
        rest[batch.anchor[self._numbers(batch) >= 0]] = False
        preserved.append((fetch(every)[rest], batch.edit[batch.rows.row[rest]]))
        yield _at(every[None], batch.anchor)

    plain = self._gather(0, at_anchors(0))
    others = self._gather(1, at_anchors(1)) if self._sides[1] else None
    weight = self._recipe.weight(self._contexts)
    mean = self._mean(plain, others, weight)
    if not preserved:
      return Keys(plain, mean, plain[:0], np.zeros(0, np.int32))
    return Keys(plain, mean, *(np.concatenate(x) for x in zip(*preserved)))

  def predicted(self, layer: int) -> np.ndarray:
    """Predicts the present states of the last edited layer, [M, D]."""
    last = self._recipe.layers[-1]

    def one_ahead(side: int, t: int, batch: PackedBatch) -> _AtMlp:
      return _predict_final(
          *self._model,
          self._at[side][t],
          batch,
          self._shared_prefix,
          layer=layer,
          last=last,
      )

    return self._read(one_ahead, None)

  def final(self, delta: LayerDelta | None) -> np.ndarray:
    """States [M, D] of the last edited layer, now at its MLP, under `delta`."""
    return self._read(lambda side, t, batch: self._at[side][t], delta)

  def present(self, layer: int) -> np.ndarray:
    """Outputs [M, D] of a layer, now at its MLP, without a delta of its own."""
    return self._read(lambda side, t, batch: self._at[side][t], None, layer)

  def _read(
      self, where: Any, delta: LayerDelta | None, layer: int | None = None
  ) -> np.ndarray:
    recipe = self._recipe
    layer = recipe.layers[-1] if layer is None else layer

    def measured(side: int) -> Iterator[Array]:
      for t, batch in enumerate(self._sides[side]):
        yield _measure(
            *self._model,
            where(side, t, batch),
            batch.anchor,
            layer=layer,
            deltas=self._deltas(delta, batch),
            output=recipe.output,
        )

    plain = self._gather(0, measured(0))
    if recipe.measured == 'plain' or not self._sides[1]:
      return plain
    others = self._gather(1, measured(1))
    return self._mean(plain, others, 1 / self._contexts)

  def _deltas(
      self, delta: LayerDelta | None, batch: PackedBatch | None
  ) -> LayerDeltas:
    """The delta of a layer, or that of every sequence's own group."""
    site, group = self._recipe.site, self._group
    if delta is None:
      return decoder.NO_DELTAS
    if not isinstance(delta, LowRankUpdate):
      return LayerDeltas({0: Dense((), site, delta)})
    if group is None:
      return LayerDeltas({0: LowRank((), site, *delta)})
    own = group[np.maximum(batch.edit, 0)]
    return LayerDeltas({0: LowRank((), site, *(x[own] for x in delta))}, True)

  def through_mlp(self, layer: int, delta: LayerDelta | None) -> None:
    """Runs all sequences through the MLP of a layer, edited."""
    put = functools.partial(_through_mlp, *self._model, layer=layer)
    if self._shared_prefix is not None:
      own = self._deltas(delta, None)
      h = put(*self._shared_prefix.at, None, deltas=own)
      self._shared_prefix = _SharedPrefix(h, self._shared_prefix.layout)
    for side, t, batch in self._each():
      own = self._deltas(delta, batch)
      self._keep(side, t, put(*self._at[side][t], batch.rows, deltas=own))
