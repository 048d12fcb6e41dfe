"""Qwen3, dense: Llama's block with a norm of every head of q and k.

Windows are as in Qwen2. Mixtures of experts are another model_type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common
from jaxedit.models.tensors import norms

PREFIX = 'model.'
_SELF = 'model.layers.{}.self_attn'
TENSORS = common.LLAMA_TENSORS | norms(
    {f'layers/attn/{x}_norm': f'{_SELF}.{x}_norm' for x in 'qk'}
)
IGNORED = common.LLAMA_IGNORED
_POSITIONS = 32768  # where the config is silent


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Qwen3 config; see `families.spec_from_hf`."""

  def more(fields: common.Fields) -> dict[str, Any]:
    positions = fields.integer('max_position_embeddings', _POSITIONS)
    common.check_window(fields, positions)
    bias = fields.flag('attention_bias', False)
    return {'qk_norm': True, 'qkv_bias': bias, 'out_bias': bias}

  return common.llama_spec(
      'qwen3',
      {'head_dim': 128} | dict(config),
      common.WINDOW_HARMLESS,
      max_positions=_POSITIONS,
      more=more,
  )
