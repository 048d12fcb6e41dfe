"""GPT-NeoX-20B and Pythia: fused q, k, v by head, part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source, fused, linear

PREFIX = 'gpt_neox.'
_BLOCK = 'gpt_neox.layers.{}'
_MLP_NORM = f'{_BLOCK}.post_attention_layernorm'
TENSORS = {
    'embed/embedding': Source('gpt_neox.embed_in.weight'),
    'layers/attn_norm/scale': Source(f'{_BLOCK}.input_layernorm.weight'),
    'layers/attn_norm/bias': Source(f'{_BLOCK}.input_layernorm.bias'),
    **fused(f'{_BLOCK}.attention.query_key_value', 'heads'),
    'layers/attn/out/kernel': linear(f'{_BLOCK}.attention.dense.weight'),
    'layers/attn/out/bias': Source(f'{_BLOCK}.attention.dense.bias'),
    'layers/mlp_norm/scale': Source(f'{_MLP_NORM}.weight'),
    'layers/mlp_norm/bias': Source(f'{_MLP_NORM}.bias'),
    'layers/mlp/up/kernel': linear(f'{_BLOCK}.mlp.dense_h_to_4h.weight'),
    'layers/mlp/up/bias': Source(f'{_BLOCK}.mlp.dense_h_to_4h.bias'),
    'layers/mlp/down/kernel': linear(f'{_BLOCK}.mlp.dense_4h_to_h.weight'),
    'layers/mlp/down/bias': Source(f'{_BLOCK}.mlp.dense_4h_to_h.bias'),
    'final_norm/scale': Source('gpt_neox.final_layer_norm.weight'),
    'final_norm/bias': Source('gpt_neox.final_layer_norm.bias'),
    'head/kernel': linear('embed_out.weight'),
}
IGNORED = (
    f'{_BLOCK}.attention.bias',
    f'{_BLOCK}.attention.masked_bias',
    f'{_BLOCK}.attention.rotary_emb.inv_freq',
    'gpt_neox.rotary_emb.inv_freq',
)


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a GPT-NeoX config; see `families.spec_from_hf`."""
  fields = common.Fields('gpt_neox', config)
  width = fields.integer('hidden_size')
  heads = fields.integer('num_attention_heads')
  head_size = fields.head_size(width, heads, explicit=False)
  rope = common.rope(
      fields,
      theta_name='rotary_emb_base',
      fraction_name='rotary_pct',
      fraction=0.25,
  )
  parallel = fields.flag('use_parallel_residual', True)
  bias = fields.flag('attention_bias', True)
  spec = spec_lib.ModelSpec(
      family='gpt_neox',
      layers=fields.integer('num_hidden_layers'),
      width=width,
      mlp_width=fields.integer('intermediate_size'),
      heads=heads,
      kv_heads=heads,
      head_size=head_size,
      vocab=fields.integer('vocab_size'),
      max_positions=fields.integer('max_position_embeddings', 2048),
      norm='layer',
      norm_eps=fields.number('layer_norm_eps', 1e-5),
      residual='parallel' if parallel else 'sequential',
      activation=fields.activation('hidden_act', 'gelu'),
      gated=False,
      rotary_size=int(head_size * rope.fraction),
      rope_theta=rope.theta,
      rope_scaling=rope.scaling,
      qkv_bias=bias,
      out_bias=bias,
      mlp_bias=True,
      tied=fields.flag('tie_word_embeddings', False),
  )
  return fields.finish(spec)
