"""T5, its version 1.1 and Flan-T5: an encoder under a decoder.

RMS norms, no biases, attention without a scale but with learned biases by
distance, a ReLU or a gated GELU MLP. The input of a head that is tied to the
embedding is scaled by 1 / sqrt(D).

Source: Raffel et al. 2020 (arXiv 1910.10683); Shazeer 2020 (arXiv 2002.05202)
for the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import Source

PREFIX = ''
_BLOCKS = 'encoder.block.{}.layer.', 'decoder.block.{}.layer.'
_BIAS = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'


def _both(leaf: str, form: str, lower: str, upper: str) -> Source:
  """A leaf of every layer, by its names within a block of either part."""
  names = (
      f'{block}{name}.{leaf}.weight'
      for block, name in zip(_BLOCKS, (lower, upper))
  )
  return Source(next(names), form, upper=next(names))


_SELF = '0.SelfAttention'
_CROSS = '1.EncDecAttention'
_DENSE = '1.DenseReluDense', '2.DenseReluDense'
_NAMES = {'q': 'q', 'k': 'k', 'v': 'v', 'out': 'o'}


def _mlp(name: str, leaf: str) -> dict[str, Source]:
  return {f'layers/mlp/{name}/kernel': _both(leaf, 'transpose', *_DENSE)}


TENSORS = {
    'embed/embedding': Source('shared.weight'),
    'layers/attn_norm/scale': _both('layer_norm', 'same', '0', '0'),
    **{
        f'layers/attn/{x}/kernel': _both(name, 'transpose', _SELF, _SELF)
        for x, name in _NAMES.items()
    },
    'layers/cross_norm/scale': _both('layer_norm', 'same', '', '1'),
    **{
        f'layers/cross/{x}/kernel': _both(name, 'transpose', '', _CROSS)
        for x, name in _NAMES.items()
    },
    'layers/mlp_norm/scale': _both('layer_norm', 'same', '1', '2'),
    **_mlp('gate', 'wi_0'),
    **_mlp('up', 'wi_1'),
    **_mlp('down', 'wo'),
    'position_bias/encoder': Source(f'encoder.{_BIAS}'),
    'position_bias/decoder': Source(f'decoder.{_BIAS}'),
    'encoder_norm/scale': Source('encoder.final_layer_norm.weight'),
    'final_norm/scale': Source('decoder.final_layer_norm.weight'),
    'head/kernel': Source('lm_head.weight', 'transpose'),
}
PLAIN = _mlp('up', 'wi')
IGNORED = (
    'encoder.embed_tokens.weight',
    'decoder.embed_tokens.weight',
    # Of the first releases; cross-attention has no bias.
    'decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias.weight',
)

# Of training.
_HARMLESS = ('dropout_rate', 'initializer_factor', 'output_past')


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a T5 config; see `families.spec_from_hf`."""
  fields = common.Fields('t5', config)
  if fields.value('is_encoder_decoder') not in (None, True):
    fields.refuse('is_encoder_decoder', 'true')
  layers = fields.integer('num_layers')
  width, heads = fields.integer('d_model'), fields.integer('num_heads')
  kind = str(fields.value('feed_forward_proj', 'relu'))
  gated = kind.startswith('gated-')
  name = {'gated-gelu': 'gelu_new'}.get(kind, kind.removeprefix('gated-'))
  if name not in common.ACTIVATIONS:
    fields.refuse('feed_forward_proj', "'relu' or 'gated-gelu'")
    name = 'relu'
  # Written beside it since; a config in which they differ is of another model.
  for field, value in (('is_gated_act', gated), ('dense_act_fn', name)):
    if fields.value(field, value) != value:
      fields.refuse(field, f'{value!r}, as feed_forward_proj is {kind!r}')
  tied = fields.flag('tie_word_embeddings', True)
  scaled = fields.flag('scale_decoder_outputs', tied)
  buckets = fields.integer('relative_attention_num_buckets', 32)
  distance = fields.integer('relative_attention_max_distance', 128)
  if buckets % 4 or distance <= buckets // 2:
    fields.refuse(
        'relative_attention_num_buckets',
        'a multiple of 4 that is less than twice relative_attention_max_distance',
    )
  spec = spec_lib.ModelSpec(
      family='t5',
      layers=layers + fields.integer('num_decoder_layers', layers),
      encoder_layers=layers,
      width=width,
      mlp_width=fields.integer('d_ff'),
      heads=heads,
      kv_heads=heads,
      head_size=fields.integer('d_kv'),
      vocab=fields.integer('vocab_size'),
      # No table ends there; a source and a target of what it was trained with.
      max_positions=2 * fields.integer('n_positions', 512),
      norm_eps=fields.number('layer_norm_epsilon', 1e-6),
      activation=common.ACTIVATIONS[name],
      gated=gated,
      rotary='none',
      head_scale=width**-0.5 if scaled else 1.0,
      tied=tied,
      attn_scale=1.0,
      position_buckets=buckets,
      position_distance=distance,
  )
  return fields.finish(spec, _HARMLESS)
