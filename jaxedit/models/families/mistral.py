"""Mistral 7B: Llama's block, with a sliding attention window in v0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common

PREFIX = 'model.'
TENSORS = common.LLAMA_TENSORS
IGNORED = common.LLAMA_IGNORED


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Mistral config; see `families.spec_from_hf`."""

  def more(fields: common.Fields) -> dict[str, Any]:
    # A config that says nothing has the 4,096 of v0.1; v0.3 says null.
    silent = 'sliding_window' not in config
    return {
        'window': 4096 if silent else fields.integer('sliding_window', None)
    }

  return common.llama_spec(
      'mistral', config, kv_heads=8, max_positions=4096 * 32, more=more
  )
