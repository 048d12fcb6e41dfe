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
  sizes = common.plain_sizes(
      fields, common.GPT_NAMES, positions=2048, activation='gelu_new'
  )
  fields.must_be('rotary', True)
  fields.must_be('scale_attn_weights', True)
  spec = spec_lib.ModelSpec(
      family='gptj',
      **sizes,
      residual='parallel_shared',
      rotary='interleaved',
      rotary_size=fields.integer('rotary_dim'),
      mlp_bias=True,
      head_bias=True,
      tied=fields.flag('tie_word_embeddings', False),
  )
  return fields.finish(spec, _HARMLESS)
