"""GPT-J: attention and MLP read one norm; neighbouring pairs are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source, maps, norms

PREFIX = 'transformer.'
_BLOCK = 'transformer.h.{}'
_NORMS = {
    'layers/attn_norm': f'{_BLOCK}.ln_1',
    'final_norm': 'transformer.ln_f',
}
_MAPS = {
    **{f'layers/attn/{x}': f'{_BLOCK}.attn.{x}_proj' for x in 'qkv'},
    'layers/attn/out': f'{_BLOCK}.attn.out_proj',
    'layers/mlp/up': f'{_BLOCK}.mlp.fc_in',
    'layers/mlp/down': f'{_BLOCK}.mlp.fc_out',
    'head': 'lm_head',
}
TENSORS = {
    'embed/embedding': Source('transformer.wte.weight'),
    **norms(_NORMS),
    **maps(_MAPS),
}
IGNORED = (
    f'{_BLOCK}.attn.bias',
    f'{_BLOCK}.attn.masked_bias',
    f'{_BLOCK}.attn.embed_positions',
)

# n_ctx repeats n_positions.
_HARMLESS = ('n_ctx',)


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a GPT-J config; see `families.spec_from_hf`."""
  fields = common.Fields('gptj', config)
  width = fields.integer('n_embd')
  heads = fields.integer('n_head')
  fields.must_be('rotary', True)
  fields.must_be('scale_attn_weights', True)
  spec = spec_lib.ModelSpec(
      family='gptj',
      layers=fields.integer('n_layer'),
      width=width,
      mlp_width=fields.integer('n_inner', 4 * width),
      heads=heads,
      kv_heads=heads,
      head_size=fields.head_size(width, heads, explicit=False),
      vocab=fields.integer('vocab_size'),
      max_positions=fields.integer('n_positions', 2048),
      norm='layer',
      norm_eps=fields.number('layer_norm_epsilon', 1e-5),
      residual='parallel_shared',
      activation=fields.activation('activation_function', 'gelu_new'),
      gated=False,
      rotary='interleaved',
      rotary_size=fields.integer('rotary_dim'),
      mlp_bias=True,
      head_bias=True,
      tied=fields.flag('tie_word_embeddings', False),
  )
  return fields.finish(spec, _HARMLESS)
