"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v.

The sliding window of some configs applies to the upper layers alone; it is
refused unless it is longer than any input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common

PREFIX = 'model.'
TENSORS = common.LLAMA_TENSORS
IGNORED = common.LLAMA_IGNORED

_POSITIONS = 32768  # where the config is silent


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Qwen2 config; see `families.spec_from_hf`."""

  def more(fields: common.Fields) -> dict[str, Any]:
    positions = fields.integer('max_position_embeddings', _POSITIONS)
    common.check_window(fields, positions)
    return {'qkv_bias': True}

  return common.llama_spec(
      'qwen2',
      config,
      common.WINDOW_HARMLESS,
      max_positions=_POSITIONS,
      more=more,
  )
