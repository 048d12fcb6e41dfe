"""BERT: an encoder whose norms follow the sums, with learned positions and
token types. Its pooler and the heads of pretraining are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source, maps, norms

PREFIX = 'bert.'
_LAYER = 'bert.encoder.layer.{}'
_NORMS = {
    'embed/norm': 'bert.embeddings.LayerNorm',
    'layers/attn_norm': f'{_LAYER}.attention.output.LayerNorm',
    'layers/mlp_norm': f'{_LAYER}.output.LayerNorm',
}
_MAPS = {
    'layers/attn/q': f'{_LAYER}.attention.self.query',
    'layers/attn/k': f'{_LAYER}.attention.self.key',
    'layers/attn/v': f'{_LAYER}.attention.self.value',
    'layers/attn/out': f'{_LAYER}.attention.output.dense',
    'layers/mlp/up': f'{_LAYER}.intermediate.dense',
    'layers/mlp/down': f'{_LAYER}.output.dense',
}
TENSORS = {
    'embed/embedding': Source('bert.embeddings.word_embeddings.weight'),
    'embed/position': Source('bert.embeddings.position_embeddings.weight'),
    'embed/type': Source('bert.embeddings.token_type_embeddings.weight'),
    **norms(_NORMS),
    **maps(_MAPS),
}
IGNORED = (
    'bert.embeddings.position_ids',
    *(
        f'{name}.{ending}'
        for name in (
            'bert.pooler.dense',
            'cls.predictions.decoder',
            'cls.predictions.transform.dense',
            'cls.predictions.transform.LayerNorm',
            'cls.seq_relationship',
        )
        for ending in ('weight', 'bias', 'gamma', 'beta')
    ),
    'cls.predictions.bias',
)
OLDER = (
    ('LayerNorm.weight', 'LayerNorm.gamma'),
    ('LayerNorm.bias', 'LayerNorm.beta'),
)

# Of the pooler, of a Chinese model, and ties of the head of pretraining.
_HARMLESS = (
    *('directionality', 'pooler_fc_size', 'pooler_num_attention_heads'),
    *('pooler_num_fc_layers', 'pooler_size_per_head', 'pooler_type'),
    'tie_word_embeddings',
)


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a BERT config; see `families.spec_from_hf`."""
  fields = common.Fields('bert', config)
  sizes = common.plain_sizes(
      fields, common.NAMES, positions=512, eps=1e-12, activation='gelu'
  )
  fields.must_be('is_decoder', False)
  fields.must_be('add_cross_attention', False)
  if fields.value('position_embedding_type', 'absolute') != 'absolute':
    fields.refuse('position_embedding_type', "'absolute'")
  spec = spec_lib.ModelSpec(
      family='bert',
      **sizes,
      residual='post',
      rotary='none',
      learned_positions=True,
      token_types=fields.integer('type_vocab_size', 2),
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      head=False,
  )
  return fields.finish(spec, _HARMLESS)
