"""GPT-J: attention and MLP read one norm; neighbouring pairs are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source, linear

PREFIX = 'transformer.'
_BLOCK = 'transformer.h.{}'
TENSORS = {
    'embed/embedding': Source('transformer.wte.weight'),
    'layers/attn_norm/scale': Source(f'{_BLOCK}.ln_1.weight'),
    'layers/attn_norm/bias': Source(f'{_BLOCK}.ln_1.bias'),
    'layers/attn/q/kernel': linear(f'{_BLOCK}.attn.q_proj.weight'),
    'layers/attn/k/kernel': linear(f'{_BLOCK}.attn.k_proj.weight'),
    'layers/attn/v/kernel': linear(f'{_BLOCK}.attn.v_proj.weight'),
    'layers/attn/out/kernel': linear(f'{_BLOCK}.attn.out_proj.weight'),
    'layers/mlp/up/kernel': linear(f'{_BLOCK}.mlp.fc_in.weight'),
    'layers/mlp/up/bias': Source(f'{_BLOCK}.mlp.fc_in.bias'),
    'layers/mlp/down/kernel': linear(f'{_BLOCK}.mlp.fc_out.weight'),
    'layers/mlp/down/bias': Source(f'{_BLOCK}.mlp.fc_out.bias'),
    'final_norm/scale': Source('transformer.ln_f.weight'),
    'final_norm/bias': Source('transformer.ln_f.bias'),
    'head/kernel': linear('lm_head.weight'),
    'head/bias': Source('lm_head.bias'),
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
