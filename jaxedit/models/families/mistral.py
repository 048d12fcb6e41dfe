"""Mistral 7B: Llama's block, with a sliding attention window in v0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common

PREFIX = 'model.'
TENSORS = common.LLAMA_TENSORS
IGNORED = common.LLAMA_IGNORED


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Mistral config; see `families.spec_from_hf`."""
  fields = common.Fields('mistral', config)
  width = fields.integer('hidden_size')
  heads = fields.integer('num_attention_heads')
  head_size = fields.head_size(width, heads)
  # A config that says nothing has the 4,096 of v0.1; v0.3 says null.
  window = (
      fields.integer('sliding_window', None)
      if 'sliding_window' in config
      else 4096
  )
  rope = common.rope(fields)
  spec = spec_lib.ModelSpec(
      family='mistral',
      layers=fields.integer('num_hidden_layers'),
      width=width,
      mlp_width=fields.integer('intermediate_size'),
      heads=heads,
      kv_heads=fields.integer('num_key_value_heads', 8),
      head_size=head_size,
      vocab=fields.integer('vocab_size'),
      max_positions=fields.integer('max_position_embeddings', 4096 * 32),
      norm_eps=fields.number('rms_norm_eps', 1e-6),
      activation=fields.activation('hidden_act', 'silu'),
      rotary_size=head_size,
      rope_theta=rope.theta,
      rope_scaling=rope.scaling,
      tied=fields.flag('tie_word_embeddings', False),
      window=window,
  )
  return fields.finish(spec)
