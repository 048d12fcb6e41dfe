"""PyTorch models for the loop that `benchmark` is compared with.

From a Hugging Face folder or with the weights of ours; and where the parts are
that the loop reads and changes. torch is imported when a function needs it, and
nowhere else here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxedit.models import families, loading, tensors
from jaxedit.models.spec import ModelSpec
from jaxedit.types import InputError, Params

_BLOCKS = ('model.layers', 'transformer.h', 'gpt_neox.layers')
_ATTENTION = ('self_attn', 'attn', 'attention')
_DOWN = ('down_proj', 'fc_out', 'c_proj', 'dense_4h_to_h')


def require() -> Any:
  """Returns torch.

  Raises:
    InputError: it is not installed.
  """
  try:
    import torch
  except ImportError:
    raise InputError(
        '--baseline=torch needs PyTorch, which is not installed: run `pip'
        ' install torch` (on a GPU the build for its CUDA version), or leave'
        ' --baseline out'
    ) from None
  return torch


def load(folder: str | os.PathLike[str], dtype: str) -> Any:
  """Loads a Hugging Face folder as a transformers torch model.

  Args:
    folder: config.json and safetensors.
    dtype: 'float32' or 'bfloat16'.

  Returns:
    The model, frozen, on the GPU if torch has one, with as many threads as
    there are cores.

  Raises:
    InputError: torch is not installed.
  """
  torch = require()
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, dtype)
  )
  return _ready(torch, model)


def from_params(
    config: Mapping[str, Any], spec: ModelSpec, params: Params, dtype: str
) -> Any:
  """Builds a transformers torch model with the weights of ours.

  Args:
    config: Hugging Face config fields, 'model_type' among them.
    spec: the architecture that they describe.
    params: canonical parameters.
    dtype: 'float32' or 'bfloat16', of the torch model.

  Returns:
    As for `load`.

  Raises:
    InputError: torch is not installed.
  """
  torch = require()
  import transformers

  fields = dict(config)
  described = transformers.AutoConfig.for_model(
      fields.pop('model_type'), **fields
  )
  model = transformers.AutoModelForCausalLM.from_config(
      described, dtype=getattr(torch, dtype)
  )
  own = dict(model.named_parameters())
  slots = tensors.upstream_slots(spec, families.get(spec.family).TENSORS)
  for name, parts in slots.items():
    leaves = []
    for slot in parts:
      leaf = loading.get_leaf(params, slot.path)
      leaf = leaf if slot.layer is None else leaf[slot.layer]
      leaves.append(np.asarray(leaf, np.float32))
    array = tensors.to_upstream(leaves, parts[0].source, spec.heads)
    with torch.no_grad():
      own[name].copy_(torch.tensor(array))
  return _ready(torch, model)


def _ready(torch: Any, model: Any) -> Any:
  """Freezes a model and puts it where it runs."""
  torch.set_num_threads(os.cpu_count() or 1)
  for parameter in model.parameters():
    parameter.requires_grad_(False)
  return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()


def tf32() -> bool | None:
  """Whether torch's products of f32 are rounded to TF32; None without a GPU."""
  torch = require()
  if not torch.cuda.is_available():
    return None
  return bool(torch.backends.cuda.matmul.allow_tf32)


def block(model: Any, layer: int) -> Any:
  """The module of one transformer block."""
  for path in _BLOCKS:
    with contextlib.suppress(AttributeError):
      return model.get_submodule(path)[layer]
  raise InputError(f'{type(model).__name__}: its blocks were not found')


def down(model: Any, layer: int) -> Any:
  """The module of the second MLP matrix of one block."""
  for name in _DOWN:
    with contextlib.suppress(AttributeError):
      return block(model, layer).mlp.get_submodule(name)
  raise InputError(f'{type(model).__name__}: its MLP was not found')


def part(model: Any, layer: int, site: str) -> Any:
  """The module whose output is 'block', 'mlp' or 'attn'."""
  if site == 'block':
    return block(model, layer)
  for name in ('mlp',) if site == 'mlp' else _ATTENTION:
    with contextlib.suppress(AttributeError):
      return block(model, layer).get_submodule(name)
  raise InputError(f'{type(model).__name__}: its {site} was not found')
