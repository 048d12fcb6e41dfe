"""What is in the folder of a sentence encoder.

It holds config.json, model.safetensors and tokenizer.json of a BERT model, as
transformers and sentence-transformers write them. Upstream names its tensors
embeddings.*, encoder.layer.N.*, with or without 'bert.' in front; linear maps
are [out, in] there and [in, out] here, and layers are stacked. Every tensor is
used or known to be of no use (the pooler), and all faults are told at once.
Pickles are never read.

Nothing here runs the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxedit import io
from jaxedit.models import checkpoint, tensors
from jaxedit.types import InputError, Params, Progress, silent

_PREFIX = 'bert.'
_IGNORED = (
    'bert.embeddings.position_ids',
    'bert.pooler.dense.weight',
    'bert.pooler.dense.bias',
)
_LINEAR = {
    'q': 'attention.self.query',
    'k': 'attention.self.key',
    'v': 'attention.self.value',
    'out': 'attention.output.dense',
    'up': 'intermediate.dense',
    'down': 'output.dense',
}
_NORMS = {
    'norm': 'embeddings.LayerNorm',
    'layers/attn_norm': 'encoder.layer.{}.attention.output.LayerNorm',
    'layers/mlp_norm': 'encoder.layer.{}.output.LayerNorm',
}
_EMBEDDINGS = {
    'word': 'word_embeddings',
    'position': 'position_embeddings',
    'type': 'token_type_embeddings',
}
_SIZES = {
    'vocab': 'vocab_size',
    'positions': 'max_position_embeddings',
    'types': 'type_vocab_size',
    'layers': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'width': 'hidden_size',
    'inner': 'intermediate_size',
}
# Fields that would change the mathematics, and what is computed here.
_FIXED = {
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'position_embedding_type': 'absolute',
    'is_decoder': False,
}


@dataclasses.dataclass(frozen=True)
class Bert:
  """Sizes of a BERT encoder.

  Attributes:
    vocab: rows of the word embedding.
    positions: rows of the position embedding.
    types: rows of the token type embedding; row 0 alone is used.
    layers: layers.
    heads: N.
    width: D.
    inner: width inside the MLP.
    norm_eps: added to variances.
  """

  vocab: int
  positions: int
  types: int
  layers: int
  heads: int
  width: int
  inner: int
  norm_eps: float


def read_config(folder: pathlib.Path) -> Bert:
  """Reads the sizes of an encoder.

  Args:
    folder: has a config.json.

  Raises:
    InputError: it is no BERT encoder with mean pooling; all faults at once.
  """
  where = folder / 'config.json'
  config = checkpoint.read_config(folder)
  problems = [
      f'{where}: {field} is {config.get(field)!r}; only {value!r} is supported.'
      for field, value in _FIXED.items()
      if config.get(field, value) != value
  ]
  if 'model_type' not in config:
    problems.append(f"{where}: has no model_type; it should be 'bert'.")
  sizes = {name: config.get(field) for name, field in _SIZES.items()}
  for name, size in sizes.items():
    if type(size) is not int or size < 1:
      problems.append(
          f'{where}: {_SIZES[name]} is {size!r} where a positive whole number'
          ' is needed.'
      )
  if not problems and sizes['width'] % sizes['heads']:
    problems.append(
        f'{where}: {sizes["heads"]} heads do not divide a width of'
        f' {sizes["width"]}.'
    )
  eps = config.get('layer_norm_eps', 1e-12)
  if type(eps) is not float or eps <= 0:
    problems.append(
        f'{where}: layer_norm_eps is {eps!r} where a positive number is needed.'
    )
  problems += _pooling_faults(folder)
  if problems:
    raise InputError(*problems)
  return Bert(**sizes, norm_eps=eps)


def _pooling_faults(folder: pathlib.Path) -> list[str]:
  """Reads what the folder says of pooling, where it says anything."""
  path = folder / '1_Pooling' / 'config.json'
  if not path.is_file():
    return []
  said = io.read_json(path)
  prefix = 'pooling_mode'
  on = set()
  for field, value in said.items():
    if field == prefix:
      on.add(str(value))
    elif field.startswith(prefix) and value:
      on.add(field.removeprefix(f'{prefix}_').removesuffix('_tokens'))
  if on <= {'mean'}:
    return []
  return [
      f'{path}: asks for the pooling {", ".join(sorted(on))}; only the mean'
      ' over tokens is supported.'
  ]


def _table() -> dict[str, tensors.Source]:
  """Leaf path -> where upstream keeps it."""
  table = {}
  for leaf, name in _EMBEDDINGS.items():
    table[f'{leaf}/embedding'] = tensors.Source(f'embeddings.{name}.weight')
  for leaf, name in _NORMS.items():
    table[f'{leaf}/scale'] = tensors.Source(f'{name}.weight')
    table[f'{leaf}/bias'] = tensors.Source(f'{name}.bias')
  for leaf, name in _LINEAR.items():
    name = f'encoder.layer.{{}}.{name}'
    table[f'layers/{leaf}/kernel'] = tensors.linear(f'{name}.weight')
    table[f'layers/{leaf}/bias'] = tensors.Source(f'{name}.bias')
  return table


def _slots(
    config: Bert, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tensors.Slot]:
  """Upstream name, prefix included -> the leaf or row of one it fills."""
  found = {}
  for path, source in _table().items():
    stacked = path.startswith('layers/')
    for layer in range(config.layers) if stacked else (None,):
      shape = shapes[path][1:] if stacked else shapes[path]
      name = _PREFIX + source.name.format(layer)
      found[name] = tensors.Slot(path, layer, source, shape)
  return found


def read_params(
    config: Bert,
    shapes: Mapping[str, tuple[int, ...]],
    folder: pathlib.Path,
    *,
    progress: Progress = silent,
) -> tuple[Params, str]:
  """Reads all weights of an encoder as f32.

  Args:
    config: its sizes.
    shapes: leaf path -> shape, layers first where they are stacked.
    folder: has its safetensors.
    progress: is told tensors.

  Returns:
    The parameters on the default device, and the SHA-256 over names, shapes
    and bytes of what was read.

  Raises:
    InputError: tensors missing, left over, misshapen or not finite.
  """
  source = checkpoint.open_folder(folder)
  slots = _slots(config, shapes)
  names = {
      full: tensors.find_name(full, _PREFIX, source.tensors) for full in slots
  }
  problems = _faults(source, slots, names)
  if problems:
    raise InputError(*problems)
  digest = hashlib.sha256()
  leaves: dict[str, np.ndarray] = {}
  with progress('loading encoder', len(slots), 'tensors') as advance:
    for full in sorted(slots):
      slot, tensor = slots[full], source.tensors[names[full]]
      value = tensor.read()
      digest.update(f'{full}|{tensor.code}|{tensor.shape}|'.encode())
      digest.update(io.tensor_bytes(value))
      if not np.isfinite(value).all():
        problems.append(
            f'{tensor.path}: tensor {tensor.name} has values that are not'
            ' finite; fetch the encoder again.'
        )
      leaf = leaves.setdefault(
          slot.path, np.empty(shapes[slot.path], np.float32)
      )
      row = ... if slot.layer is None else slot.layer
      leaf[row] = tensors.to_canonical(value, slot.source, config.heads)
      advance(1)
  if problems:
    raise InputError(*problems)
  tree = traverse_util.unflatten_dict(leaves, sep='/')
  return jax.tree.map(jnp.asarray, tree), digest.hexdigest()


def _faults(
    source: checkpoint.Checkpoint,
    slots: Mapping[str, tensors.Slot],
    names: Mapping[str, str | None],
) -> list[str]:
  """Lists tensors that are missing, misshapen, quantised or unknown."""
  problems = []
  for full, slot in slots.items():
    if names[full] is None:
      problems.append(
          f'{source.folder}: tensor {full.removeprefix(_PREFIX)} is missing;'
          ' fetch the complete encoder.'
      )
      continue
    tensor = source.tensors[names[full]]
    wanted = tensors.upstream_shape(slot)
    if tensor.shape != wanted:
      problems.append(
          f'{tensor.path}: tensor {tensor.name} has shape'
          f' {list(tensor.shape)} where config.json asks for {list(wanted)}.'
      )
    if tensor.code not in checkpoint.FLOATS:
      problems.append(
          f'{tensor.path}: tensor {tensor.name} has dtype {tensor.code}; only'
          f' {", ".join(checkpoint.FLOATS)} can be read.'
      )
  known = set(names.values())
  problems += [
      f'{tensor.path}: tensor {name} has no place in a BERT encoder with this'
      ' config.'
      for name, tensor in source.tensors.items()
      if name not in known and not tensors.is_ignored(name, _PREFIX, _IGNORED)
  ]
  return problems
