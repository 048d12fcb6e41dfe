"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v.

The sliding window of some configs applies to the upper layers alone; it is
refused unless it is longer than any input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common

PREFIX = 'model.'
TENSORS = common.LLAMA_TENSORS
IGNORED = common.LLAMA_IGNORED

# The upper layers' window is off or too long to matter once the checks below
# have passed; then the layer it starts at does not matter either.
_HARMLESS = ('max_window_layers',)


def _check_window(fields: common.Fields, max_positions: int) -> None:
  """Refuses windows that would hide tokens."""
  window = fields.integer('sliding_window', None)
  sliding = fields.flag('use_sliding_window', False)
  if sliding and window is not None and window < max_positions:
    fields.refuse(
        'use_sliding_window',
        f'false, or a sliding_window of at least the {max_positions} positions '
        f'instead of {window}',
    )
  kinds = fields.value('layer_types', [])
  if not sliding and any(kind != 'full_attention' for kind in kinds):
    fields.refuse('layer_types', "'full_attention' in every layer")


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Qwen2 config; see `families.spec_from_hf`."""
  fields = common.Fields('qwen2', config)
  width = fields.integer('hidden_size')
  heads = fields.integer('num_attention_heads')
  head_size = fields.head_size(width, heads)
  max_positions = fields.integer('max_position_embeddings', 32768)
  _check_window(fields, max_positions)
  rope = common.rope(fields)
  spec = spec_lib.ModelSpec(
      family='qwen2',
      layers=fields.integer('num_hidden_layers'),
      width=width,
      mlp_width=fields.integer('intermediate_size'),
      heads=heads,
      kv_heads=fields.integer('num_key_value_heads', heads),
      head_size=head_size,
      vocab=fields.integer('vocab_size'),
      max_positions=max_positions,
      norm_eps=fields.number('rms_norm_eps', 1e-6),
      activation=fields.activation('hidden_act', 'silu'),
      rotary_size=head_size,
      rope_theta=rope.theta,
      rope_scaling=rope.scaling,
      qkv_bias=True,
      tied=fields.flag('tie_word_embeddings', False),
  )
  return fields.finish(spec, _HARMLESS)
