"""Low-rank changes of linear maps as the adapters that servers load.

  PEFT   adapter_model.safetensors with adapter_config.json: PEFT, vLLM
  GGUF   one file: llama.cpp, which loads it beside a GGUF model

In torch's orientation a change is B A, and its scale, alpha / r, is one. PEFT
gets one rank for all maps, by rows of zeros, as some readers know no pattern of
ranks; GGUF takes alpha as 0, which means a scale of one for any rank.

Axis letters: r rank; `in` and `out` widths of a map. Sources: PEFT 0.21, vLLM
and llama.cpp as of 2026.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxedit import io
from jaxedit.models import families
from jaxedit.models import spec as spec_lib
from jaxedit.types import InputError

DTYPES = {
    'float32': np.float32,
    'float16': np.float16,
    'bfloat16': jnp.bfloat16,
}
# What vLLM takes for --max-lora-rank; families that it takes adapters of.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM = ('llama', 'mistral', 'qwen2', 'qwen3')
# Family -> architecture of its GGUF files, whether q and k are permuted there.
_GGUF = {
    'llama': ('llama', True),
    'mistral': ('llama', True),
    'qwen2': ('qwen2', False),
    'qwen3': ('qwen3', False),
    'gpt_neox': ('gptneox', False),
    'gpt2': ('gpt2', False),
}
_GGUF_NAMES = {
    'attn/q': 'attn_q',
    'attn/k': 'attn_k',
    'attn/v': 'attn_v',
    'attn/out': 'attn_output',
    'mlp/gate': 'ffn_gate',
    'mlp/up': 'ffn_up',
    'mlp/down': 'ffn_down',
}
_MERGE = 'merge the edit into the weights instead (--save_model, `merge`)'


class Change(NamedTuple):
  """The change of one linear map.

  Attributes:
    site: the map, e.g. 'mlp/down'.
    layer: its layer.
    a: [r, in].
    b: [out, r].
  """

  site: str
  layer: int
  a: np.ndarray
  b: np.ndarray


def write_peft(
    folder: str | os.PathLike[str],
    spec: spec_lib.ModelSpec,
    changes: Sequence[Change],
    *,
    base: str,
    dtype: str = 'float32',
    about: Mapping[str, Any] | None = None,
) -> list[str]:
  """Writes a PEFT adapter.

  Args:
    folder: new or empty; appears when everything has been written.
    spec: the architecture.
    changes: of all changed maps.
    base: the name by which a server finds the unedited model.
    dtype: of the tensors, a key of `DTYPES`.
    about: JSON values that are kept beside it, in jaxedit.json.

  Returns:
    Lines that say how to load it.

  Raises:
    InputError: a map shares its tensor with others, or the place is taken.
  """
  modules = [_module(spec, change) for change in changes]
  rank = max(len(change.a) for change in changes)
  found = {}
  for (name, _), change in zip(modules, changes):
    extra = rank - len(change.a)
    key = f'base_model.model.{name}'
    a = np.pad(change.a, [(0, extra), (0, 0)])
    b = np.pad(change.b, [(0, 0), (0, extra)])
    found[f'{key}.lora_A.weight'] = _cast(a, dtype)
    found[f'{key}.lora_B.weight'] = _cast(b, dtype)
  config = {
      'peft_type': 'LORA',
      'task_type': 'SEQ_2_SEQ_LM' if spec.encoder_layers else 'CAUSAL_LM',
      'base_model_name_or_path': base,
      'inference_mode': True,
      'r': rank,
      'lora_alpha': rank,
      'lora_dropout': 0.0,
      'bias': 'none',
      # Of GPT-2's Conv1D; A and B have the same shapes.
      'fan_in_fan_out': any(form == 'same' for _, form in modules),
      'target_modules': [name for name, _ in modules],
      'use_rslora': False,
      'use_dora': False,
      'modules_to_save': None,
      'rank_pattern': {},
      'alpha_pattern': {},
  }
  with io.new_folder(folder) as place:
    blob = safetensors.numpy.save(found, metadata={'format': 'pt'})
    (place / 'adapter_model.safetensors').write_bytes(blob)
    text = json.dumps(config, indent=2)
    (place / 'adapter_config.json').write_text(text)
    if about:
      io.write_json(place / 'jaxedit.json', about)
  return [
      f'PEFT: PeftModel.from_pretrained(base, {str(folder)!r})',
      _vllm(spec, rank, base, folder),
  ]


def _vllm(spec: spec_lib.ModelSpec, rank: int, base: str, folder: Any) -> str:
  if spec.family not in _VLLM:
    return f'vLLM takes no adapters of {spec.family}; {_MERGE}'
  wide = next((size for size in _VLLM_RANKS if size >= rank), None)
  if wide is None:
    return f'vLLM takes ranks up to {_VLLM_RANKS[-1]}, not {rank}; {_MERGE}'
  return (
      f'vLLM: vllm serve {base} --enable-lora --max-lora-rank {wide}'
      f' --lora-modules edit={folder}'
  )


def write_gguf(
    path: str | os.PathLike[str],
    spec: spec_lib.ModelSpec,
    changes: Sequence[Change],
    *,
    dtype: str = 'float32',
) -> list[str]:
  """Writes a GGUF adapter.

  Args:
    path: file to write.
    spec: the architecture.
    changes: of all changed maps.
    dtype: 'float32' or 'float16'.

  Returns:
    Lines that say how to load it.

  Raises:
    InputError: llama.cpp takes no adapters of the family, a map has no tensor of
      its own there, the `gguf` package is missing, or the place is taken.
  """
  try:
    import gguf
  except ImportError:
    raise InputError(
        "GGUF adapters need the package gguf; pip install 'jaxedit[gguf]'"
    ) from None
  if spec.family not in _GGUF:
    raise InputError(f'llama.cpp takes no adapters of {spec.family}; {_MERGE}')
  if dtype not in ('float32', 'float16'):
    raise InputError(f'GGUF adapters are float32 or float16, not {dtype}')
  if pathlib.Path(path).exists():
    raise InputError(f'{path}: exists already; give another place')
  arch, permuted = _GGUF[spec.family]
  with io.new_file(path) as file:
    writer = gguf.GGUFWriter(pathlib.Path(file.name), arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, 'lora')
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for change in changes:
      _module(spec, change)  # a tensor of its own
      heads = {'attn/q': spec.heads, 'attn/k': spec.kv_heads}.get(change.site)
      b = change.b
      if permuted and heads:
        # From the two halves of a head to neighbouring pairs.
        parts = b.reshape(heads, 2, -1, b.shape[1])
        b = parts.swapaxes(1, 2).reshape(b.shape)
      name = f'blk.{change.layer}.{_GGUF_NAMES[change.site]}.weight'
      writer.add_tensor(f'{name}.lora_a', _cast(change.a, dtype))
      writer.add_tensor(f'{name}.lora_b', _cast(b, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  return [f'llama.cpp: llama-cli -m BASE.gguf --lora {path}']


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
  return np.ascontiguousarray(x.astype(DTYPES[dtype]))


def _module(spec: spec_lib.ModelSpec, change: Change) -> tuple[str, str]:
  """The module that upstream keeps a map in, and the form of its weight."""
  source = families.tensors_of(spec)[f'layers/{change.site}/kernel']
  name = source.tensor(change.layer, spec.encoder_layers).removesuffix(
      '.weight'
  )
  if source.form not in ('same', 'transpose'):
    raise InputError(
        f'{change.site} shares {name} with other maps in {spec.family}, which no'
        f' adapter divides; {_MERGE}'
    )
  return name, source.form
