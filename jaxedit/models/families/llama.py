"""Llama 2, 3, 3.1 and 3.2, and models of their shape such as SmolLM2.

Sequential blocks with RMS norms, a gated SiLU MLP, rotary halves and grouped
key and value heads. Rotary scaling may be 'linear' or 'llama3'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common

PREFIX = 'model.'
TENSORS = common.LLAMA_TENSORS
IGNORED = common.LLAMA_IGNORED

# pretraining_tp splits matrix products and changes their rounding only.
_HARMLESS = ('pretraining_tp', 'is_llama_config')


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Llama config; see `families.spec_from_hf`."""
  fields = common.Fields('llama', config)
  width = fields.integer('hidden_size')
  heads = fields.integer('num_attention_heads')
  head_size = fields.head_size(width, heads)
  rope = common.rope(fields)
  bias = fields.flag('attention_bias', False)
  spec = spec_lib.ModelSpec(
      family='llama',
      layers=fields.integer('num_hidden_layers'),
      width=width,
      mlp_width=fields.integer('intermediate_size'),
      heads=heads,
      kv_heads=fields.integer('num_key_value_heads', heads),
      head_size=head_size,
      vocab=fields.integer('vocab_size'),
      max_positions=fields.integer('max_position_embeddings', 2048),
      norm_eps=fields.number('rms_norm_eps', 1e-6),
      activation=fields.activation('hidden_act', 'silu'),
      rotary_size=head_size,
      rope_theta=rope.theta,
      rope_scaling=rope.scaling,
      qkv_bias=bias,
      out_bias=bias,
      mlp_bias=fields.flag('mlp_bias', False),
      tied=fields.flag('tie_word_embeddings', False),
  )
  return fields.finish(spec, _HARMLESS)
