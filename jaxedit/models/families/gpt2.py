"""GPT-2: learned positions, biases everywhere, fused q, k, v, a tied head.

Its linear maps are Conv1D and hold [in, out] already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source, fused, linear, maps, norms

PREFIX = 'transformer.'
_BLOCK = 'transformer.h.{}'
_NORMS = {
    'layers/attn_norm': f'{_BLOCK}.ln_1',
    'layers/mlp_norm': f'{_BLOCK}.ln_2',
    'final_norm': 'transformer.ln_f',
}
_MAPS = {
    'layers/attn/out': f'{_BLOCK}.attn.c_proj',
    'layers/mlp/up': f'{_BLOCK}.mlp.c_fc',
    'layers/mlp/down': f'{_BLOCK}.mlp.c_proj',
}
TENSORS = {
    'embed/embedding': Source('transformer.wte.weight'),
    'embed/position': Source('transformer.wpe.weight'),
    **norms(_NORMS),
    **fused(f'{_BLOCK}.attn.c_attn', 'thirds'),
    **maps(_MAPS, form='same'),
    'head/kernel': linear('lm_head.weight'),
}
IGNORED = (f'{_BLOCK}.attn.bias', f'{_BLOCK}.attn.masked_bias')

# n_ctx repeats n_positions; reorder_and_upcast_attn changes rounding only.
_HARMLESS = ('n_ctx', 'reorder_and_upcast_attn')


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a GPT-2 config; see `families.spec_from_hf`."""
  fields = common.Fields('gpt2', config)
  sizes = common.plain_sizes(
      fields, common.GPT_NAMES, positions=1024, activation='gelu_new'
  )
  fields.must_be('scale_attn_by_inverse_layer_idx', False)
  fields.must_be('add_cross_attention', False)
  scaled = fields.flag('scale_attn_weights', True)
  spec = spec_lib.ModelSpec(
      family='gpt2',
      **sizes,
      rotary='none',
      learned_positions=True,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      tied=fields.flag('tie_word_embeddings', True),
      attn_scale=None if scaled else 1.0,
  )
  return fields.finish(spec, _HARMLESS)
