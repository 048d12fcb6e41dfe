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

# The upper layers' window is off or too long to matter once the checks below
# have passed; then the layer it starts at does not matter either.
_HARMLESS = ('max_window_layers',)
_POSITIONS = 32768  # where the config is silent


def _check_window(fields: common.Fields, max_positions: int) -> None:
  """Refuses windows that would hide tokens."""
  window = fields.integer('sliding_window', None)
  sliding = fields.flag('use_sliding_window', False)
  if sliding and window is not None and window < max_positions:
    fields.refuse(
        'use_sliding_window',
        f'false, or a sliding_window of at least the {max_positions} positions '
        f'instead of {window}',
    )
  kinds = fields.value('layer_types', [])
  if not sliding and any(kind != 'full_attention' for kind in kinds):
    fields.refuse('layer_types', "'full_attention' in every layer")


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Qwen2 config; see `families.spec_from_hf`."""

  def more(fields: common.Fields) -> dict[str, Any]:
    positions = fields.integer('max_position_embeddings', _POSITIONS)
    _check_window(fields, positions)
    return {'qkv_bias': True}

  return common.llama_spec(
      'qwen2', config, _HARMLESS, max_positions=_POSITIONS, more=more
  )
