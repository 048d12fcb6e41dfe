"""Runs any part of a decoder, or an encoder-decoder, over stacked parameters.

  embed -> run_layers(start, stop) -> logits

The loop is our own scan over layer *indices* of the full stack: slicing the
stack inside jit would copy the weights. The range is cut where an edited or a
tapped layer begins or ends, and each piece is one scan, so a run compiles as
many block bodies as it has pieces, whatever its depth.

Interventions are arguments (`patches`, `deltas`), observations are return
values (`taps`); there is no state. Axes as in `jaxedit.types`. Where a layout
is `PackedSequences`, activations [B, T, ...] are [1, N, ...].

An encoder-decoder is run as one stack on one axis of tokens: a sequence is its
source, the token that the decoder starts with, and what follows, so that whoever
scores, edits or continues a sequence need not know. The lower layers change the
tokens of the source, which see each other, the upper ones the others; these see
each other causally and, by cross-attention, what the encoder gave for the source.
At every layer a token thus has one state, and one key and value (of
cross-attention where it is of the source), which later tokens may be run with.
Which tokens are of a source is in `TokenLayout.source`, and in their ids: there
an id i of the source is ~i, below 0. What is run without any, as of generated
tokens, passes the encoder without being computed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import ActiveDeltas, LayerDeltas, SiteDelta
from jaxedit.kernels.linear_logprob import api as linear_logprob_api
from jaxedit.models import packing
from jaxedit.models.blocks import (
    PRODUCT,
    AttentionInputs,
    Block,
    Norm,
    product,
)
from jaxedit.models.sharding import over_batch
from jaxedit.models.spec import ModelSpec, RopeScaling, depth_of, row
from jaxedit.numerics import wide
from jaxedit.types import (
    KV,
    PADDING,
    SHARED,
    Array,
    OutputTokens,
    PackedSequences,
    Params,
    Patch,
    Tap,
    TokenLayout,
)

NO_DELTAS = LayerDeltas({})
# Saves the results of weight products and recomputes the rest. Plain AD would
# also keep each layer's slice of the weights for the backward pass.
SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def token_layout(valid: Array, source: Array | None = None) -> TokenLayout:
  """Makes the layout of padded sequences of one text each.

  Args:
    valid: [B, T] bool, False at padding on either side.
    source: [B, T] bool, see `source_of`.

  Returns:
    Layout with positions from 0 at the first valid token, all in `SHARED`.
  """
  valid = jnp.asarray(valid)
  positions = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
  segment_ids = jnp.where(valid, SHARED, PADDING)
  return TokenLayout(
      positions.astype(jnp.int32), segment_ids.astype(jnp.int32), source
  )


def source_of(spec: ModelSpec, tokens: Array) -> Array | None:
  """Tells which tokens an encoder reads, by their ids; None without encoder."""
  return tokens < 0 if spec.encoder_layers else None


def visible(query: TokenLayout, key: TokenLayout, window: int | None) -> Array:
  """Computes the attention mask of two layouts (see `types.TokenLayout`).

  Args:
    query: [B, T] layout of the queries; says whether attention is causal.
    key: [B, T'] layout of the keys.
    window: sliding window in tokens, or None.

  Returns:
    [B, T, T'] bool.
  """
  q = TokenLayout(query.positions[:, :, None], query.segment_ids[:, :, None])
  k = TokenLayout(key.positions[:, None, :], key.segment_ids[:, None, :])
  mask = (k.segment_ids == SHARED) | (k.segment_ids == q.segment_ids)
  mask &= k.segment_ids != PADDING
  if query.causal:
    mask &= k.positions <= q.positions
  if window is not None:
    mask &= q.positions - k.positions < window
  return mask


def word_ids(tokens: Array) -> Array:
  """Rows of the embedding that tokens have, those of a source too."""
  return jnp.where(tokens < 0, ~tokens, tokens)


def rope_frequencies(
    size: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray:
  """Computes the angular frequencies of rotary positions.

  Args:
    size: rotated part of a head.
    theta: base of the wavelengths.
    scaling: of long contexts, or None.

  Returns:
    [size / 2] float64, radians a token.

  Source: Su et al. 2021 (arXiv 2104.09864); the llama3 scaling as released with
  Llama 3.1.
  """
  freq = theta ** -(np.arange(0, size, 2) / size)
  if scaling is None:
    return freq
  if scaling.kind == 'linear':
    return freq / scaling.factor
  turns = scaling.original_max_positions * freq / (2 * np.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return freq * (kept + (1 - kept) / scaling.factor)


def _rotary(
    spec: ModelSpec, positions: Array, dtype: Any
) -> tuple[Array, Array] | None:
  """Cosines and sines [B, T, H' / 2] of rotary angles; None without them."""
  if spec.rotary == 'none':
    return None
  freq = rope_frequencies(spec.rotary_size, spec.rope_theta, spec.rope_scaling)
  angles = positions[..., None].astype(dtype) * jnp.asarray(freq, dtype)
  return jnp.cos(angles), jnp.sin(angles)


def _sequence_layout(layout: TokenLayout | PackedSequences) -> TokenLayout:
  """[B, T] layout of the sequences, as attention uses it."""
  return layout.layout if isinstance(layout, PackedSequences) else layout


def _positions(layout: TokenLayout | PackedSequences) -> Array:
  """[B, T] positions, or [1, N] of packed sequences."""
  if isinstance(layout, PackedSequences):
    return packing.flatten(layout, layout.layout.positions)
  return layout.positions


def _attention_inputs(
    spec: ModelSpec,
    params: Params,
    layout: TokenLayout | PackedSequences,
    prefix: KV | None,
    *,
    dtype: Any,
    outputs: OutputTokens | None = None,
    encoder: bool = False,
) -> AttentionInputs:
  """Computes what all layers share, those of the encoder or the others."""
  keys = _sequence_layout(layout)
  queries = keys if outputs is None else outputs.rows.layout
  every = [keys] if prefix is None else [prefix.layout, keys]
  inputs = AttentionInputs(
      mask=_join_keys(visible(queries, key, spec.window) for key in every),
      rotary=_rotary(spec, _positions(layout), dtype),
      rows=layout if isinstance(layout, PackedSequences) else None,
      outputs=outputs,
  )
  if not spec.encoder_layers:
    return inputs
  read = [
      jnp.zeros_like(key.positions, bool) if key.source is None else key.source
      for key in every
  ]
  # All of a source is seen, whatever its order.
  reads = [
      visible(queries.replace(causal=False), key, None) & mine[:, None]
      for key, mine in zip(every, read)
  ]
  gap = _join_keys(
      key.positions[:, None] - queries.positions[:, :, None] for key in every
  )
  part = 'encoder' if encoder else 'decoder'
  table = params['position_bias'][part].astype(dtype)
  bias = table[position_buckets(spec, gap, encoder)]
  inputs = inputs._replace(
      bias=jnp.moveaxis(bias, -1, 1),
      source=keys.source,
      passing=passing(spec, layout, 0 if encoder else spec.encoder_layers),
  )
  if encoder:
    return inputs._replace(mask=_join_keys(reads))
  if keys.source is None:
    reads = reads[:-1]
  if not reads:
    raise ValueError('a decoder has no source to attend to')
  own = inputs.mask & ~_join_keys(mine[:, None] for mine in read)
  return inputs._replace(mask=own, cross_mask=_join_keys(reads))


def passing(
    spec: ModelSpec, layout: TokenLayout | PackedSequences, layer: int
) -> Array | None:
  """Tells which tokens pass a layer unchanged: those of the other part.

  Args:
    spec: the architecture.
    layout: [B, T] layout of the tokens.
    layer: layer number.

  Returns:
    [B, T, 1] bool ([1, N, 1] with `PackedSequences`); None for none.
  """
  encoder, rows = layer < spec.encoder_layers, _sequence_layout(layout)
  if not spec.encoder_layers or (rows.source is None and not encoder):
    return None
  source = rows.source
  if source is None:
    source = jnp.zeros_like(rows.positions, bool)
  others = (source != encoder)[..., None]
  if isinstance(layout, PackedSequences):
    return packing.flatten(layout, others)
  return others


def _join_keys(parts: Iterable[Array]) -> Array:
  """Joins what is of prefix keys and of present ones, [B, T, T']."""
  return jnp.concatenate([*parts], axis=-1)


def position_buckets(spec: ModelSpec, gap: Array, both_sides: bool) -> Array:
  """Sorts distances into the buckets of learned position biases.

  Near ones have a bucket each, further ones share one with neighbours, wider and
  wider, and all from `spec.position_distance` on are in the last.

  Args:
    spec: the architecture.
    gap: int32, position of a key less that of the query.
    both_sides: whether later keys are seen too; they have half of the buckets.

  Returns:
    The buckets, like `gap`.

  Source: Raffel et al. 2020 (T5, arXiv 1910.10683), section 2.1.
  """
  count, base = spec.position_buckets, 0
  if both_sides:
    count //= 2
    base = jnp.where(gap > 0, count, 0)
    gap = jnp.abs(gap)
  else:
    gap = jnp.maximum(-gap, 0)
  near = count // 2
  # From a table: no rounding of logarithms then depends on the device.
  distance = np.arange(max(spec.position_distance, near) + 1)
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(near)
  step = np.log(ratio) / np.float32(np.log(spec.position_distance / near))
  far = near + (step * (count - near)).astype(np.int32)
  table = np.where(distance < near, distance, np.minimum(far, count - 1))
  return base + jnp.asarray(table, jnp.int32)[jnp.minimum(gap, len(table) - 1)]


def embed(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout | PackedSequences,
) -> Array:
  """Looks up token (and learned position) embeddings.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32; [1, N] with `PackedSequences`.
    layout: [B, T] layout of the tokens.

  Returns:
    [B, T, D] residual stream, f32 or wider.
  """
  table = params['embed']['embedding']
  if spec.encoder_layers:
    tokens = word_ids(tokens)
  h = table[tokens].astype(wide(table.dtype))
  if spec.learned_positions:
    table = params['embed']['position']
    h += table[_positions(layout)].astype(h.dtype)
  return _spread(params, h, layout)


def _spread(
    params: Params, h: Array, layout: TokenLayout | PackedSequences
) -> Array:
  """Divides a residual stream over the devices of the weights, by sequences."""
  return over_batch(params, h, int(isinstance(layout, PackedSequences)))


def _spread_sequences(params: Params, layout: Any) -> Any:
  """Divides what says how tokens lie; all its arrays have sequences first."""
  return jax.tree.map(lambda x: over_batch(params, x), layout)


def _spread_prefix(params: Params, prefix: KV) -> KV:
  """Divides keys and values of prefix tokens by sequences; heads stay divided."""
  rest = jax.sharding.PartitionSpec.UNCONSTRAINED
  key, value = (
      over_batch(params, x, 1, rest=rest) for x in (prefix.key, prefix.value)
  )
  return KV(key, value, _spread_sequences(params, prefix.layout))


def final_norm(spec: ModelSpec, params: Params, h: Array) -> Array:
  """Applies the norm before the head to [..., D]."""
  return Norm(spec).apply({'params': params['final_norm']}, h)


def _head_input(spec: ModelSpec, params: Params, h: Array) -> Array:
  """What the head multiplies, of the output [..., D] of the last block."""
  x = final_norm(spec, params, h)
  return x if spec.head_scale == 1 else x * spec.head_scale


def _head(spec: ModelSpec, params: Params) -> tuple[Array, Array | None]:
  """The head's kernel [D, V] and bias; a tied kernel is a view."""
  if spec.tied:
    kernel = params['embed']['embedding'].T
  else:
    kernel = params['head']['kernel']
  return kernel, params['head']['bias'] if spec.head_bias else None


def logits(spec: ModelSpec, params: Params, h: Array) -> Array:
  """Computes next-token logits from the output of the last block.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [..., D] output of the last block.

  Returns:
    [..., V] f32 or wider.
  """
  kernel, bias = _head(spec, params)
  out = product(spec, _head_input(spec, params, h), kernel)
  return out if bias is None else out + bias


def label_logprob(
    spec: ModelSpec, params: Params, h: Array, labels: Array
) -> tuple[Array, Array]:
  """Scores labels at given outputs of the last block, without storing logits.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [..., D] output of the last block.
    labels: [...] int32 ids.

  Returns:
    ([...] log-probability in nats, [...] int32 most probable id).
  """
  kernel, bias = _head(spec, params)
  x = _head_input(spec, params, h)
  x = x.reshape(-1, spec.width).astype(kernel.dtype)
  logprob, best = linear_logprob_api.linear_logprob(
      x, kernel, bias, labels.reshape(-1), tied=spec.tied
  )
  return logprob.reshape(labels.shape), best.reshape(labels.shape)


def _intervene(patches: Sequence[Patch], layer: Array) -> Callable:
  """Builds the function that a block applies to its outputs."""

  def apply(site: str, x: Array) -> Array:
    for patch in patches:
      if patch.site != site:
        continue
      here = jnp.arange(x.shape[1]) == patch.column[:, None]
      here &= layer == patch.layer
      value = patch.value[:, None].astype(x.dtype)
      value = x + value if patch.mode == 'add' else value
      x = jnp.where(here[..., None], value, x)
    return x

  return apply


def layer_params(params: Params, layer: Array | int) -> Params:
  """Selects one layer's weights; the index may be traced."""
  depth = depth_of(params)

  def pick(leaf: Array) -> Array:
    place = row(depth, len(leaf), layer)
    return jax.lax.dynamic_index_in_dim(leaf, place, 0, keepdims=False)

  return jax.tree.map(pick, params['layers'])


def run_layer(
    spec: ModelSpec,
    params: Params,
    h: Array,
    layout: TokenLayout | PackedSequences,
    *,
    layer: Array | int,
    prefix: tuple[Array, Array, TokenLayout] | None = None,
    deltas: LayerDeltas = NO_DELTAS,
    intervene: Callable[[str, Array], Array] = lambda site, x: x,
    outputs: OutputTokens | None = None,
) -> tuple[Array, dict[str, Any]]:
  """Runs one layer whose number may be traced; none of an encoder's.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, T, D] residual stream.
    layout: [B, T] layout of the tokens.
    layer: layer number.
    prefix: keys and values of P prefix tokens in this layer, or None.
    deltas: those of this layer.
    intervene: (site, output) -> output to use instead, for the sites 'attn',
      'mlp' and 'block'.
    outputs: with `PackedSequences`, tokens at which the output is needed.

  Returns:
    ([B, T, D] residual stream, the block's activations, see `blocks.Block`).
  """
  kv = before = None
  if prefix is not None:
    kv = prefix[:2]
    before = KV(kv[0][None], kv[1][None], prefix[2])
  return Block(spec).apply(
      {'params': layer_params(params, layer)},
      h,
      _attention_inputs(
          spec, params, layout, before, dtype=h.dtype, outputs=outputs
      ),
      kv,
      deltas,
      intervene,
  )


def attention_half(
    spec: ModelSpec,
    params: Params,
    h: Array,
    layout: TokenLayout | PackedSequences,
    *,
    layer: Array | int,
    prefix: tuple[Array, Array, TokenLayout] | None = None,
) -> tuple[Array, Array, tuple[Array, Array]]:
  """Runs the attention half of one layer, up to the input of its MLP.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, T, D] residual stream.
    layout: [B, T] layout of the tokens.
    layer: layer number, may be traced.
    prefix: keys and values of P prefix tokens in this layer, or None.

  Returns:
    (residual stream without the MLP, input of the MLP, (keys, values) by
    sequence).
  """
  kv = before = None
  if prefix is not None:
    kv = prefix[:2]
    before = KV(kv[0][None], kv[1][None], prefix[2])
  inputs = _attention_inputs(spec, params, layout, before, dtype=h.dtype)
  weights = {'params': layer_params(params, layer)}
  return Block(spec).apply(
      weights, h, inputs, kv, NO_DELTAS, method='attention_half'
  )


def mlp_half(
    spec: ModelSpec,
    params: Params,
    x: Array,
    *,
    layer: Array | int,
    rows: PackedSequences | None = None,
    deltas: LayerDeltas = NO_DELTAS,
) -> tuple[Array, dict[str, Any]]:
  """Runs the MLP of one layer.

  Args:
    spec: the architecture.
    params: canonical parameters.
    x: [B, T, D] its input, the result of `attention_half`.
    layer: layer number, may be traced.
    rows: the sequences of x [1, N, D], for deltas per sequence.
    deltas: those of this layer.

  Returns:
    ([B, T, D] what it adds to the residual stream, the inputs of its maps by
    site).
  """
  weights = {'params': layer_params(params, layer)}
  return Block(spec).apply(weights, x, rows, deltas, method='mlp_half')


def _pieces(
    start: int, stop: int, marked: Sequence[tuple[int, ...]]
) -> list[tuple[int, int, tuple[int, ...]]]:
  """Cuts [start, stop) where membership in the marked layer sets changes.

  Returns:
    (first, end, which sets contain these layers) of every piece.
  """

  def active(layer: int) -> tuple[int, ...]:
    return tuple(i for i, layers in enumerate(marked) if layer in layers)

  groups = itertools.groupby(range(start, stop), key=active)
  runs = [(list(layers), sets) for sets, layers in groups]
  return [(layers[0], layers[-1] + 1, sets) for layers, sets in runs]


def run_layers(
    spec: ModelSpec,
    params: Params,
    h: Array,
    layout: TokenLayout | PackedSequences,
    *,
    start: int,
    stop: int,
    prefix: KV | None = None,
    patches: Sequence[Patch] = (),
    deltas: ActiveDeltas | Sequence[SiteDelta] = (),
    taps: Sequence[Tap] = (),
    outputs: OutputTokens | None = None,
    remat: Callable | None = None,
) -> tuple[Array, tuple[Any, ...]]:
  """Runs layers start to stop - 1.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, T, D] residual stream before layer `start`; [1, N, D] with
      `PackedSequences`.
    layout: [B, T] layout of the tokens. `PackedSequences` do not go with
      patches.
    start: first layer, static.
    stop: one past the last layer, static.
    prefix: keys and values of prefix tokens in exactly these layers.
    patches: interventions on activations.
    deltas: applied as the layers run; those of other layers are ignored. A
      Python sequence stands for deltas that all sequences share.
    taps: activations to return.
    outputs: with `PackedSequences`, tokens at which the output of the last of
      these layers is needed; the returned residual stream is then [1, O, D].
    remat: a checkpoint policy (e.g. `SAVE_PRODUCTS`) where gradients flow.

  Returns:
    ([B, T, D] residual stream after layer stop - 1; for every tap its readings,
    stacked over those of its layers that were run).
  """
  if isinstance(layout, PackedSequences) and patches:
    raise ValueError(
        'patches name tokens of sequences, not packed ones: use `TokenLayout`'
    )
  if not isinstance(deltas, ActiveDeltas):
    deltas = ActiveDeltas(tuple(deltas))
  if outputs is not None and deltas.per_sequence:
    raise ValueError('output tokens do not mix with deltas per sequence')
  h = _spread(params, h, layout)
  layout, outputs = _spread_sequences(params, (layout, outputs))
  prefix = None if prefix is None else _spread_prefix(params, prefix)
  share = functools.partial(
      _attention_inputs, spec, params, layout, prefix, dtype=h.dtype
  )
  below, source = spec.encoder_layers, _sequence_layout(layout).source
  everywhere = functools.cache(lambda encoder: share(encoder=encoder))
  readings: list[list[Any]] = [[] for _ in taps]
  gathered, count = deltas.deltas, len(deltas.deltas)
  prompt = deltas.prompt
  if prompt is None:
    prompt = _sequence_layout(layout).segment_ids == SHARED
  marked = [d.layers for d in gathered] + [t.layers for t in taps]
  marked += [] if outputs is None else [(stop - 1,)]
  # Last, so that the numbers above stay those of deltas and taps.
  marked += [tuple(range(below))] if below else []
  for first, end, sets in _pieces(start, stop, marked):
    here = [i for i in sets if i < count]
    watching = [i - count for i in sets if count <= i < count + len(taps)]
    encoder = first < below
    if outputs is None or end < stop:
      inputs = everywhere(encoder)
    else:
      inputs = share(outputs=outputs, encoder=encoder)
    if below and first == below and source is not None:
      h = _leave_encoder(spec, params, h, everywhere(True).passing)

    def body(h, xs, watching=watching, inputs=inputs):
      layer, mine, choices = xs
      kv = None
      if prefix is not None:
        # An index, not a slice of the stack: that would be a copy.
        kv = tuple(
            jax.lax.dynamic_index_in_dim(x, layer - start, 0, keepdims=False)
            for x in (prefix.key, prefix.value)
        )
      h, seen = Block(spec).apply(
          {'params': layer_params(params, layer)},
          h,
          inputs,
          kv,
          LayerDeltas(mine, deltas.per_edit, prompt, choices),
          _intervene(patches, layer),
      )
      h = _spread(params, h, layout)
      return h, [taps[i].read(seen[taps[i].site]) for i in watching]

    def part(tree: Any, i: int, first=first, end=end) -> Any:
      offset = first - gathered[i].layers.index(first)
      return jax.tree.map(lambda x: x[first - offset : end - offset], tree)

    mine = {i: part(gathered[i], i) for i in here}
    choices = {
        i: part(deltas.choices[i], i)
        for i in here
        if deltas.choices is not None and gathered[i].chooses
    }
    if remat is not None:
      body = jax.checkpoint(body, policy=remat)
    xs = (jnp.arange(first, end), mine, choices)
    if encoder and source is None and not watching and inputs.outputs is None:
      continue  # these tokens pass it as they are
    if outputs is not None and end == stop:  # changes the shape of h: no scan
      h, seen = body(h, jax.tree.map(lambda x: x[0], xs))
      seen = jax.tree.map(lambda x: x[None], seen)
    else:
      h, seen = jax.lax.scan(body, h, xs)
    for i, reading in zip(watching, seen):
      readings[i].append(reading)
  if outputs is not None and start == stop:
    h = packing.take(h, outputs)
  join = lambda *parts: jnp.concatenate(parts, axis=0)
  return h, tuple(jax.tree.map(join, *r) if r else None for r in readings)


def _leave_encoder(
    spec: ModelSpec, params: Params, h: Array, others: Array
) -> Array:
  """Applies the norm over the encoder to the tokens of the source."""
  x = Norm(spec).apply({'params': params['encoder_norm']}, h)
  return jnp.where(others, h, x)


def forward(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout,
    *,
    patches: Sequence[Patch] = (),
    deltas: Sequence[SiteDelta] = (),
) -> Array:
  """Runs the whole model.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    layout: [B, T] layout of the tokens, e.g. `token_layout(tokens != pad)`.
    patches: interventions on activations.
    deltas: see `run_layers`.

  Returns:
    [B, T, V] logits, f32 or wider.
  """
  h = embed(spec, params, tokens, layout)
  h, _ = run_layers(
      spec,
      params,
      h,
      layout,
      start=0,
      stop=spec.layers,
      patches=patches,
      deltas=deltas,
  )
  return logits(spec, params, h)
