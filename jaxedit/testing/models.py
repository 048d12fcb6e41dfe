"""Tiny random models of every family, made with numpy alone.

The weights are far larger than a fresh model's, so that logits are of order
one, and no bias or norm is at its neutral value: a part that is left out shows.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.models import loading
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.types import InputError, Params

_SIZES = dict(
    layers=3, width=32, mlp_width=48, heads=4, kv_heads=4, head_size=8,
    vocab=97, max_positions=64,
)  # fmt: skip
_LAYER_NORM = dict(norm='layer', gated=False, mlp_bias=True, mlp_width=128)
_FAMILIES: dict[str, dict[str, Any]] = {
    'llama': dict(kv_heads=2, rotary_size=8),
    'mistral': dict(kv_heads=2, rotary_size=8, window=8),
    'qwen2': dict(
        kv_heads=2, rotary_size=8, qkv_bias=True, tied=True, norm_eps=1e-6
    ),
    'qwen3': dict(
        kv_heads=2, head_size=16, rotary_size=16, qk_norm=True, norm_eps=1e-6
    ),
    'gptj': dict(
        **_LAYER_NORM, residual='parallel_shared', activation='gelu_tanh',
        rotary='interleaved', rotary_size=4, head_bias=True,
    ),
    'gpt_neox': dict(
        **_LAYER_NORM, residual='parallel', activation='gelu', rotary_size=2,
        qkv_bias=True, out_bias=True,
    ),
    'gpt2': dict(
        **_LAYER_NORM, activation='gelu_tanh', rotary='none',
        learned_positions=True, qkv_bias=True, out_bias=True, tied=True,
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
# Two layers read the source; heads together are not as wide as the model.
_FAMILIES['t5'] = dict(
    layers=4, encoder_layers=2, head_size=6, activation='relu', gated=False,
    rotary='none', head_scale=32**-0.5, tied=True, attn_scale=1.0,
    norm_eps=1e-6, position_buckets=8, position_distance=12,
)  # fmt: skip
ENCODER_DECODERS = ('t5',)


def tiny_spec(family: str, **changes: Any) -> ModelSpec:
  """Makes a small architecture of a family.

  Args:
    family: one of `FAMILIES` or `ENCODER_DECODERS`.
    **changes: fields of `ModelSpec` that differ.

  Returns:
    A spec of 3 layers (an encoder-decoder: 2 and 2), width 32, 97 tokens and 64
    positions unless changed.

  Raises:
    InputError: there is no such family.
  """
  if family not in _FAMILIES:
    raise InputError(
        f'unknown family {family!r}; known are {", ".join(_FAMILIES)}'
    )
  return ModelSpec(family=family, **(_SIZES | _FAMILIES[family] | changes))


def random_params(
    spec: ModelSpec, seed: int, dtype: Any = jnp.float32, scale: float = 1.0
) -> Params:
  """Draws the canonical parameters of a spec.

  Kernels and the head are normal with standard deviation scale / sqrt(in),
  embeddings scale (scale / sqrt(D) where the head is tied to them), biases
  0.1 scale, and norm scales 1 plus 0.1 scale of noise.

  Args:
    spec: the architecture.
    seed: of numpy's generator; the same draws for every dtype.
    dtype: of the leaves; float64 needs `jax.enable_x64`.
    scale: multiplies every standard deviation.

  Returns:
    The nested tree.

  Raises:
    InputError: float64 was asked for outside `jax.enable_x64`.
  """
  if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
    raise InputError(
        f'{jnp.dtype(dtype).name} parameters need jax.enable_x64(True)'
    )
  rng = np.random.default_rng(seed)
  leaves = {}
  for path, shape in param_shapes(spec).items():
    draw = rng.standard_normal(shape) * scale
    if path.endswith('kernel'):
      draw /= np.sqrt(shape[-2])
    elif path.startswith('position_bias'):
      pass
    elif path.endswith('bias'):
      draw *= 0.1
    elif path.endswith('scale'):
      draw = 1.0 + 0.1 * draw
    elif spec.tied and path == 'embed/embedding':
      draw /= np.sqrt(spec.width)
    leaves[path] = jnp.asarray(draw, dtype)
  return loading.nest(leaves)


def as_model(spec: ModelSpec, params: Params) -> loading.Model:
  """Wraps a spec and its parameters as a loaded model; there is no folder."""
  return loading.Model(spec, params, pathlib.Path('.'), 'ab' * 32, {})
