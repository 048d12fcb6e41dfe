"""The architecture of a model, as one frozen, hashable value.

A `ModelSpec` holds what changes the mathematics and nothing else. It is a
static argument of every jitted function, so two models of one shape share
compiled code. Families (`families/<hf model_type>.py`) build it from a Hugging
Face config; `param_shapes` gives the canonical parameter tree that goes with it:

  embed/embedding [V, D]                embed/position [max_positions, D]
  embed/type [token_types, D]           embed/norm/{scale, bias} [D]
  layers/attn_norm/{scale, bias} [L, D]
  layers/attn/{q, k, v}/kernel [L, D, heads * H]    layers/attn/out/kernel [L, N * H, D]
  layers/attn/{q_norm, k_norm}/scale [L, H]
  layers/cross_norm/scale [L - L', D]
  layers/cross/{q, k, v, out}/kernel [L - L', ...]
  layers/mlp_norm/{scale, bias} [L, D]
  layers/mlp/{gate, up}/kernel [L, D, F]            layers/mlp/down/kernel [L, F, D]
  encoder_norm/scale [D]
  position_bias/{encoder, decoder} [buckets, N]
  final_norm/{scale, bias} [D]          head/kernel [D, V]    head/bias [V]

The first L' layers of an encoder-decoder are its encoder. Only the others attend
to the source: a leaf of fewer rows than L has those of the last layers (`row`).
Leaves that an architecture lacks are absent: biases, the norm of a block with
one shared norm, `gate` of a plain MLP, `head/kernel` of a tied head, the norm
of embeddings unless blocks are post-norm, and the final norm where they are. Linear
kernels are [in, out] in every family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Frequency scaling of rotary positions.

  Attributes:
    kind: 'linear' or 'llama3'.
    factor: how much the context is stretched.
    low_freq_factor: llama3: wavelengths longer than original/low are divided.
    high_freq_factor: llama3: wavelengths shorter than original/high are kept.
    original_max_positions: llama3: context length of pretraining, tokens.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """What a decoder, an encoder or an encoder-decoder computes.

  Attributes:
    family: Hugging Face model_type, the name of the file in `families`.
    layers: number of blocks (L), those of an encoder among them.
    encoder_layers: the first of them, which read the source (L'); 0 if there is
      no encoder under the decoder.
    width: residual width (D).
    mlp_width: inner width of the MLP (F).
    heads: query heads (N).
    kv_heads: key and value heads (G).
    head_size: width of a head (H).
    vocab: rows of the embedding (V).
    max_positions: longest input, tokens.
    norm: 'rms' or 'layer'.
    norm_eps: added to the variance.
    residual: 'sequential', 'parallel' (attention and MLP each with a norm of
      its own), 'parallel_shared' (both read one norm) or 'post' (BERT: the norm
      follows the sum, and that of the embeddings).
    activation: 'silu', 'relu', 'gelu' (exact) or 'gelu_tanh'.
    gated: whether the MLP has a gate.
    rotary: 'half' (rotates the two halves), 'interleaved' (neighbouring pairs)
      or 'none'.
    rotary_size: leading part of a head that is rotated.
    rope_theta: base of the wavelengths.
    rope_scaling: stretching of the wavelengths, or None.
    learned_positions: whether the embedding adds a learned position table.
    token_types: rows of the table of token types that is added too, or 0.
    qk_norm: whether every head of q and k is normalised before it is rotated.
    qkv_bias: bias on q, k and v.
    out_bias: bias on the attention output.
    mlp_bias: bias on the MLP's maps.
    head: whether there is a language model head; False for encoders.
    head_bias: bias on the head.
    head_scale: factor on the input of the head.
    tied: whether the head is the embedding.
    window: sliding attention window in tokens, or None.
    attn_scale: factor on attention logits, or None for 1 / sqrt(H).
    position_buckets: of distances with a learned bias on attention logits; 0 for
      none.
    position_distance: from which on all distances are in the last bucket.
    activations: dtype of activations in products, and of keys and values, if
      wider than the weights: with bf16 weights 'float32' computes what f32
      arithmetic does, and 'bfloat16' or None round them; None leaves the
      products of a backward pass to JAX, which widens the weights for them.
  """

  family: str
  layers: int
  width: int
  mlp_width: int
  heads: int
  kv_heads: int
  head_size: int
  vocab: int
  max_positions: int
  encoder_layers: int = 0
  norm: str = 'rms'
  norm_eps: float = 1e-5
  residual: str = 'sequential'
  activation: str = 'silu'
  gated: bool = True
  rotary: str = 'half'
  rotary_size: int = 0
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  learned_positions: bool = False
  token_types: int = 0
  qk_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head: bool = True
  head_bias: bool = False
  head_scale: float = 1.0
  tied: bool = False
  window: int | None = None
  attn_scale: float | None = None
  position_buckets: int = 0
  position_distance: int = 128
  activations: str | None = None


def param_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
  """Lists the canonical leaves of a model.

  Args:
    spec: the architecture.

  Returns:
    '/'-joined path -> shape, in the order of the forward pass.
  """
  L, D, F = spec.layers, spec.width, spec.mlp_width
  N, G = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
  shapes: dict[str, tuple[int, ...]] = {'embed/embedding': (spec.vocab, D)}
  if spec.learned_positions:
    shapes['embed/position'] = (spec.max_positions, D)
  if spec.token_types:
    shapes['embed/type'] = (spec.token_types, D)

  def norm(path: str, lead: tuple[int, ...]) -> None:
    shapes[f'{path}/scale'] = (*lead, D)
    if spec.norm == 'layer':
      shapes[f'{path}/bias'] = (*lead, D)

  def linear(
      path: str, fan_in: int, fan_out: int, bias: bool, rows: int = L
  ) -> None:
    shapes[f'layers/{path}/kernel'] = (rows, fan_in, fan_out)
    if bias:
      shapes[f'layers/{path}/bias'] = (rows, fan_out)

  if spec.residual == 'post':
    norm('embed/norm', ())
  norm('layers/attn_norm', (L,))
  linear('attn/q', D, N, spec.qkv_bias)
  linear('attn/k', D, G, spec.qkv_bias)
  linear('attn/v', D, G, spec.qkv_bias)
  if spec.qk_norm:
    for name in ('q_norm', 'k_norm'):
      shapes[f'layers/attn/{name}/scale'] = (L, spec.head_size)
  linear('attn/out', N, D, spec.out_bias)
  if spec.encoder_layers:
    above = L - spec.encoder_layers
    norm('layers/cross_norm', (above,))
    for name in 'qkv':
      linear(f'cross/{name}', D, N if name == 'q' else G, False, above)
    linear('cross/out', N, D, False, above)
  if spec.residual != 'parallel_shared':
    norm('layers/mlp_norm', (L,))
  if spec.gated:
    linear('mlp/gate', D, F, spec.mlp_bias)
  linear('mlp/up', D, F, spec.mlp_bias)
  linear('mlp/down', F, D, spec.mlp_bias)
  if spec.position_buckets:
    for part in ('encoder', 'decoder'):
      shapes[f'position_bias/{part}'] = (spec.position_buckets, spec.heads)
  if spec.encoder_layers:
    norm('encoder_norm', ())
  if spec.residual != 'post':
    norm('final_norm', ())
  if spec.head and not spec.tied:
    shapes['head/kernel'] = (D, spec.vocab)
  if spec.head_bias:
    shapes['head/bias'] = (spec.vocab,)
  return shapes


def depth_of(params: Mapping[str, Any]) -> int:
  """L, the layers that parameters have."""
  return len(params['layers']['attn_norm']['scale'])


def row(depth: int, rows: int, layer: Any) -> Any:
  """The row of a stacked leaf that belongs to a layer.

  Args:
    depth: L, layers of the model.
    rows: of the leaf: L, or those of the last layers alone.
    layer: layer number, or an array of them.

  Returns:
    The row; below 0 where the leaf has none for this layer.
  """
  return layer - (depth - rows)
