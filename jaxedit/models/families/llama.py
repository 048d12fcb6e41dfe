"""Llama 2, 3, 3.1 and 3.2, and models of their shape such as SmolLM2.

Sequential blocks with RMS norms, a gated SiLU MLP, rotary halves and grouped
key and value heads. Rotary scaling may be 'linear' or 'llama3'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.families import common

PREFIX = 'model.'
TENSORS = common.LLAMA_TENSORS
IGNORED = common.LLAMA_IGNORED

# pretraining_tp splits matrix products and changes their rounding only.
_HARMLESS = ('pretraining_tp', 'is_llama_config')


def spec_from_hf(config: Mapping[str, Any]) -> spec_lib.ModelSpec:
  """Reads a Llama config; see `families.spec_from_hf`."""

  def more(fields: common.Fields) -> dict[str, Any]:
    bias = fields.flag('attention_bias', False)
    mlp_bias = fields.flag('mlp_bias', False)
    return {'qkv_bias': bias, 'out_bias': bias, 'mlp_bias': mlp_bias}

  return common.llama_spec('llama', config, _HARMLESS, more=more)
