"""The models that `benchmark` runs on: shapes, settings, random weights.

`smollm2` is the real demo model with the demo's settings. The others have the
shapes and published MEMIT settings of larger models with random weights, which
are as fast as real ones: speed depends on shapes and lengths alone. Their
threshold is 0, so that every edit takes all its steps, and lengths are those of
the demo tokenizer. Nothing that a random model answers means anything.

Large arrays are made on the device, in the dtype that is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.methods.closed_form.recipe import TEXT_TARGET
from jaxedit.models import loading
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.targets import TargetConfig
from jaxedit.types import Array, Params

# Rate of the targets of long answers at width 576, where the published one, of
# width 4,096, crawls.
_TEXT_RATE = 25.0
# Rank of what random moments add to the identity.
_RANK = 64


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model's shape and the settings to edit it with.

  Attributes:
    config: Hugging Face config fields; empty for a real model.
    layers: edited layers.
    moment_weight: lambda, tokens.
    target: settings of the optimisation of targets.
    source: where the settings are from.
  """

  config: Mapping[str, Any]
  layers: tuple[int, ...]
  moment_weight: float
  target: TargetConfig
  source: str

  @property
  def text_target(self) -> TargetConfig:
    """Settings for the targets of long answers."""
    if self.config:
      return TEXT_TARGET._replace(threshold=_FIXED.threshold)
    return TEXT_TARGET._replace(rate=_TEXT_RATE)


# Fields that hold layers, heads, key and value heads, width and MLP width.
_GPT_FIELDS = ('n_layer', 'n_head', None, 'n_embd', None)
_LLAMA_FIELDS = (
    'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
    'hidden_size', 'intermediate_size',
)  # fmt: skip
_FIXED = TargetConfig(steps=25, threshold=0.0)

PRESETS: dict[str, Preset] = {
    'smollm2': Preset(
        config={},
        layers=(1, 2, 3, 4),
        moment_weight=100,
        target=TargetConfig(rate=5.0, clamp=0.65),
        source='flagfiles/counterfact_smollm2.flags',
    ),
    'gptj-6b': Preset(
        config=dict(
            model_type='gptj', n_layer=28, n_head=16, n_embd=4096,
            n_positions=2048, rotary_dim=64, vocab_size=50400,
            tie_word_embeddings=False,
        ),
        layers=(3, 4, 5, 6, 7, 8),
        moment_weight=15000,
        target=_FIXED,
        source='Meng et al. 2022b, appendix B',
    ),
    'llama3-8b': Preset(
        config=dict(
            model_type='llama', num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, hidden_size=4096, intermediate_size=14336,
            max_position_embeddings=8192, rope_theta=500000.0,
            rms_norm_eps=1e-5, vocab_size=128256, tie_word_embeddings=False,
        ),
        layers=(4, 5, 6, 7, 8),
        moment_weight=15000,
        target=_FIXED._replace(rate=0.1),
        source='Fang et al. 2024 (AlphaEdit), its MEMIT settings',
    ),
    'qwen2.5-7b': Preset(
        config=dict(
            model_type='qwen2', num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, hidden_size=3584, intermediate_size=18944,
            max_position_embeddings=32768, rope_theta=1000000.0,
            rms_norm_eps=1e-6, vocab_size=152064, tie_word_embeddings=False,
        ),
        layers=(4, 5, 6, 7, 8),
        moment_weight=15000,
        target=_FIXED._replace(decay=1e-3, clamp=4.0),
        source='EasyEdit, its MEMIT settings',
    ),
    'gpt2-xl': Preset(
        config=dict(
            model_type='gpt2', n_layer=48, n_head=25, n_embd=1600,
            n_positions=1024, vocab_size=50257,
        ),
        layers=(13, 14, 15, 16, 17),
        moment_weight=20000,
        target=_FIXED,
        source='Meng et al. 2022b, but 25 steps for 20',
    ),
}  # fmt: skip


def scaled(
    preset: Preset, layers: float, width: float
) -> tuple[dict[str, Any], tuple[int, ...]]:
  """Shrinks a preset's shape; the size of a head and the vocabulary stay.

  Args:
    preset: with a config.
    layers: factor on the number of layers.
    width: factor on the number of heads; widths follow.

  Returns:
    (config fields, edited layers, at their place in the stack).
  """
  config = dict(preset.config)
  gpt = 'n_embd' in config
  depth, heads, kv, size, inner = _GPT_FIELDS if gpt else _LLAMA_FIELDS
  many = max(2, round(config[depth] * layers))
  edited = sorted({layer * many // config[depth] for layer in preset.layers})
  config[depth] = many
  groups = config[kv] if kv else config[heads]
  kept = max(1, round(groups * width))
  for name in (heads, kv, size, inner):
    if name:
      config[name] = config[name] * kept // groups
  return config, tuple(edited)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, shape: tuple[int, ...], std: float, dtype: str) -> Array:
  """Normal numbers; layer by layer, so that nothing is held in f32 at once."""
  if len(shape) < 3:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
  one = lambda k: _draw(k, shape[1:], std, dtype)
  return jax.lax.map(one, jax.random.split(key, shape[0]))


def random_params(spec: ModelSpec, seed: int, dtype: str) -> Params:
  """Draws parameters on the device.

  Args:
    spec: the architecture.
    seed: of the draw.
    dtype: of the leaves.

  Returns:
    Kernels with standard deviation 1 / sqrt(in), embeddings 1 / sqrt(D), norm
    scales 1 and biases 0.
  """
  leaves, key = {}, jax.random.key(seed)
  for i, (path, shape) in enumerate(param_shapes(spec).items()):
    if path.endswith('scale'):
      leaves[path] = jnp.ones(shape, dtype)
    elif path.endswith('bias'):
      leaves[path] = jnp.zeros(shape, dtype)
    else:
      fan_in = shape[-2] if path.endswith('kernel') else spec.width
      std = 1 / math.sqrt(fan_in)
      leaves[path] = _draw(jax.random.fold_in(key, i), shape, std, dtype)
  return loading.nest(leaves)


@dataclasses.dataclass(frozen=True)
class RandomMoments:
  """Well-conditioned second moments that are made where they are used.

  Attributes:
    width: F.
    seed: of the draw; every layer has its own.
  """

  width: int
  seed: int

  def layer(self, layer: int) -> Array:
    """[F, F] float64 on the device: I + G G^T / rank, G [F, rank] normal."""
    with jax.enable_x64(True):
      key = jax.random.fold_in(jax.random.key(self.seed), layer)
      shape = (self.width, min(_RANK, self.width))
      low = jax.random.normal(key, shape, jnp.float64)
      return jnp.eye(self.width) + low @ low.T / shape[1]
