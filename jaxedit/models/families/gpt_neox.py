"""GPT-NeoX-20B and Pythia: fused q, k, v by head, part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source, fused, maps, norms

PREFIX = 'gpt_neox.'
_BLOCK = 'gpt_neox.layers.{}'
_NORMS = {
    'layers/attn_norm': f'{_BLOCK}.input_layernorm',
    'layers/mlp_norm': f'{_BLOCK}.post_attention_layernorm',
    'final_norm': 'gpt_neox.final_layer_norm',
}
_MAPS = {
    'layers/attn/out': f'{_BLOCK}.attention.dense',
    'layers/mlp/up': f'{_BLOCK}.mlp.dense_h_to_4h',
    'layers/mlp/down': f'{_BLOCK}.mlp.dense_4h_to_h',
    'head': 'embed_out',
}
TENSORS = {
    'embed/embedding': Source('gpt_neox.embed_in.weight'),
    **norms(_NORMS),
    **fused(f'{_BLOCK}.attention.query_key_value', 'heads'),
    **maps(_MAPS),
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
  sizes = common.plain_sizes(
      fields, common.NAMES, positions=2048, activation='gelu'
  )
  rope = common.rope(
      fields, theta_name='rotary_emb_base', fraction_name='rotary_pct',
      fraction=0.25,
  )  # fmt: skip
  parallel = fields.flag('use_parallel_residual', True)
  bias = fields.flag('attention_bias', True)
  spec = spec_lib.ModelSpec(
      family='gpt_neox',
      **sizes,
      residual='parallel' if parallel else 'sequential',
      rotary_size=int(sizes['head_size'] * rope.fraction),
      rope_theta=rope.theta,
      rope_scaling=rope.scaling,
      qkv_bias=bias,
      out_bias=bias,
      mlp_bias=True,
      tied=fields.flag('tie_word_embeddings', False),
  )
  return fields.finish(spec)
