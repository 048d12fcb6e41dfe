"""Tiny random Llama folders with a small byte-level tokenizer, without torch.

Two characters are strange on purpose:

  '\\u2603'  is dropped by the tokenizer, with the space before it
  'Z'       in a poisoned model: finite weights make a state that overflows

A model that chats has a chat template, and its tokenizer puts a BOS token in
front of every text.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import text_tokenizers
import tokenizers

from jaxedit.models import families, loading, tensors
from jaxedit.models import spec as spec_lib
from jaxedit.testing import models

DROPPED = '\u2603'
POISON = 'Z'
SPEC = models.tiny_spec(
    'llama', mlp_width=64, vocab=384, max_positions=96, tied=False
)
# It brings the BOS token that the tokenizer adds as well.
_CHAT = (
    "{% for turn in messages %}{% if turn['role'] == 'user' %}{{ bos_token }}"
    "In {{ turn['content'] }} is{% else %} {{ turn['content'] }}{{ eos_token }}"
    '{% endif %}{% endfor %}'
)
_DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def make(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = 'float32',
    poisoned: bool = False,
    chats: bool = False,
    changes: dict[str, Any] | None = None,
) -> pathlib.Path:
  """Writes a model folder.

  Args:
    folder: the folder to make.
    seed: of the weights.
    dtype: 'float32' or 'bfloat16', of every tensor.
    poisoned: whether texts with `POISON` overflow in the first layer.
    chats: whether there is a chat template, and the tokenizer adds a BOS token.
    changes: upstream tensor name -> array, written instead of the random one.

  Returns:
    The folder.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  core = tokenizer(begin=chats)
  params = models.random_params(SPEC, seed)
  if poisoned:
    params = _poison(params, core.token_to_id(POISON))
  written = _upstream(params) | (changes or {})
  safetensors.numpy.save_file(
      {name: array.astype(_DTYPES[dtype]) for name, array in written.items()},
      folder / 'model.safetensors',
      {'format': 'pt'},
  )
  config = _config() | {'dtype': dtype}
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'tokenizer.json').write_text(core.to_str())
  if chats:
    settings = {'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': _CHAT}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return folder


def tokenizer(begin: bool = False) -> tokenizers.Tokenizer:
  """Builds the tokenizer; `begin` lets it add a BOS token."""
  core = tokenizers.Tokenizer.from_str(
      text_tokenizers.byte_level(begin=begin).backend_tokenizer.to_str()
  )
  core.normalizer = tokenizers.normalizers.Replace(
      tokenizers.Regex(f' ?{DROPPED}'), ''
  )
  assert core.get_vocab_size() <= SPEC.vocab
  return core


def _config() -> dict[str, Any]:
  spec = SPEC
  return {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'hidden_size': spec.width,
      'intermediate_size': spec.mlp_width,
      'num_hidden_layers': spec.layers,
      'num_attention_heads': spec.heads,
      'num_key_value_heads': spec.kv_heads,
      'vocab_size': spec.vocab,
      'max_position_embeddings': spec.max_positions,
      'rms_norm_eps': spec.norm_eps,
      'rope_theta': spec.rope_theta,
      'hidden_act': 'silu',
      'tie_word_embeddings': False,
      'bos_token_id': 0,
      'eos_token_id': 1,
  }


def _upstream(params: Any) -> dict[str, np.ndarray]:
  """Names and lays out canonical parameters as upstream does."""
  table, written = families.get('llama').TENSORS, {}
  for name, slots in tensors.upstream_slots(SPEC, table).items():
    leaves = []
    for slot in slots:
      leaf = np.asarray(loading.get_leaf(params, slot.path))
      leaves.append(leaf if slot.layer is None else leaf[slot.layer])
    written[name] = tensors.to_upstream(leaves, slots[0].source, SPEC.heads)
  return written


def _poison(params: Any, token: int) -> Any:
  """Lets one token overflow: dimension 0 is its own up to the first MLP.

  There gate and up are 1e25 each, so that their product is infinite for that
  token and as small as ever for every other one.
  """
  leaves = {
      path: np.array(loading.get_leaf(params, path))
      for path in spec_lib.param_shapes(SPEC)
  }
  leaves['embed/embedding'][:, 0] = 0
  leaves['embed/embedding'][token, 0] = 1
  leaves['layers/attn/out/kernel'][0, :, 0] = 0
  for name in ('gate', 'up'):
    row = leaves[f'layers/mlp/{name}/kernel'][0, 0]
    row[:] = 0
    row[0] = 1e25
  return loading.nest(leaves)
