"""Parameters of other JAX code, in and out, as maps of trees.

Two kinds of tree are known. Those of Hugging Face's Flax models mirror torch's
names, with `kernel`, `scale` and `embedding` for `weight`, and hold every
linear kernel transposed against torch's tensor; so GPT-2's Conv1D, [in, out] in
torch, is [out, in] there. Any other unstacked tree (linen or nnx, e.g. bonsai's
and tunix's Llama) is described by a table of paths.

Layers are stacked on the way in and unstacked on the way out. Files other than
HF Flax's msgpack are not read here.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxedit.models import families, loading, tensors
from jaxedit.models import spec as spec_lib
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.types import InputError, Params

# tunix's Llama 3: attention kernels keep an axis for the heads.
TUNIX_LLAMA = {
    'embed/embedding': 'embedder.input_embedding',
    'layers/attn_norm/scale': 'layers.{}.input_layernorm.w',
    'layers/attn/q/kernel': 'layers.{}.attn.q_proj.w',
    'layers/attn/k/kernel': 'layers.{}.attn.k_proj.w',
    'layers/attn/v/kernel': 'layers.{}.attn.v_proj.w',
    'layers/attn/out/kernel': 'layers.{}.attn.o_proj.w',
    'layers/mlp_norm/scale': 'layers.{}.post_attention_layernorm.w',
    'layers/mlp/gate/kernel': 'layers.{}.mlp.gate_proj.kernel',
    'layers/mlp/up/kernel': 'layers.{}.mlp.up_proj.kernel',
    'layers/mlp/down/kernel': 'layers.{}.mlp.down_proj.kernel',
    'final_norm/scale': 'final_norm.w',
    'head/kernel': 'lm_head.w',
}


def from_hf_flax(
    tree: Mapping[str, Any], spec: ModelSpec, dtype: str = 'float32'
) -> Params:
  """Reads the parameters of a Hugging Face Flax model.

  Args:
    tree: e.g. {'transformer': {'h': {'0': ...}}, 'lm_head': ...}, with or
      without an outer 'params', or of a base model.
    spec: the architecture.
    dtype: 'float32' or 'bfloat16'.

  Returns:
    Canonical parameters.

  Raises:
    InputError: leaves missing, left over or of the wrong shape, all at once.
  """
  family = families.get(spec.family)
  flat = flatten(tree.get('params', tree))
  prefix = family.PREFIX
  pieces: dict[str, dict[int | None, Any]] = {}
  problems = []
  for name, slots in tensors.upstream_slots(
      spec, families.tensors_of(spec)
  ).items():
    path = _flax_name(name, slots[0], spec)
    found = tensors.find_name(path, prefix, flat)
    if found is None:
      problems.append(f'the Flax tree has no leaf {path}')
      continue
    given = value = np.asarray(flat.pop(found))
    if value.ndim == 2 and path.endswith('.kernel'):
      value = value.T  # torch's layout of a Linear, and GPT-2's turned round
    wanted = tensors.upstream_shape(slots[0])
    if value.shape != wanted:
      problems.append(
          f'Flax leaf {found} has shape {list(given.shape)}, which '
          f'does not fit {list(wanted)} of the torch tensor {name}'
      )
      continue
    for slot in slots:
      leaf = tensors.to_canonical(value, slot.source, spec.heads)
      pieces.setdefault(slot.path, {})[slot.layer] = leaf
  problems += [
      f'Flax leaf {name} has no place in a {spec.family} model of this spec'
      for name in flat
  ]
  return _stack(pieces, problems, dtype)


def to_hf_flax(params: Params, spec: ModelSpec) -> dict[str, Any]:
  """Writes the parameters of a Hugging Face Flax model.

  Args:
    params: canonical parameters.
    spec: the architecture.

  Returns:
    The tree of the model with its head, as numpy arrays.
  """
  flat = {}
  for name, slots in tensors.upstream_slots(
      spec, families.tensors_of(spec)
  ).items():
    leaves = [
        _slot_value(params, spec.layers, slot.path, slot.layer)
        for slot in slots
    ]
    value = tensors.to_upstream(leaves, slots[0].source, spec.heads)
    path = _flax_name(name, slots[0], spec)
    if path.endswith('.kernel'):
      value = value.T
    flat[path] = value
  return unflatten(flat)


def load_hf_flax_msgpack(
    path: str | os.PathLike[str], spec: ModelSpec, dtype: str = 'float32'
) -> Params:
  """Reads a flax_model.msgpack, e.g. GPT-J's.

  Args:
    path: the file.
    spec: the architecture, e.g. from `families.spec_from_hf`.
    dtype: 'float32' or 'bfloat16'.

  Returns:
    Canonical parameters.

  Raises:
    InputError: the file is missing or damaged, or see `from_hf_flax`.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'{path}: there is no such file')
  try:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, Mapping):
      raise InputError(f'{path}: does not hold a tree of parameters')
    return from_hf_flax(tree, spec, dtype)
  except InputError:
    raise
  # What a damaged file raises is not specified: beside msgpack's own, what numpy
  # raises where a dtype or a shape is none, or a tree is too deep.
  except Exception as error:
    raise InputError(
        f'{path}: is damaged or no Flax msgpack file ({error}); fetch it again'
    ) from error


def from_nested(
    tree: Any, spec: ModelSpec, names: Mapping[str, str], dtype: str = 'float32'
) -> Params:
  """Reads an unstacked tree by a table of paths.

  Args:
    tree: nested mappings or sequences, or an nnx.State; linear kernels are
      [in, out] and may have an axis of their own for the heads.
    spec: the architecture.
    names: canonical leaf path -> dotted path, the layer number as '{}'; e.g.
      `TUNIX_LLAMA`.
    dtype: 'float32' or 'bfloat16'.

  Returns:
    Canonical parameters.

  Raises:
    InputError: leaves missing, left over or of the wrong shape, all at once.
  """
  flat = flatten(tree)
  pieces: dict[str, dict[int | None, Any]] = {}
  problems = []
  for path, layer, name, shape in _places(spec, names):
    if name not in flat:
      problems.append(f'the tree has no leaf {name} (for {path})')
      continue
    value = np.asarray(flat.pop(name))
    if not _merges(value.shape, shape):
      problems.append(
          f'leaf {name} has shape {list(value.shape)} where {path} needs '
          f'{list(shape)}, [in, out] with the heads apart or together'
      )
      continue
    pieces.setdefault(path, {})[layer] = value.reshape(shape)
  problems += [
      f'leaf {name} of the tree is not in the table of paths' for name in flat
  ]
  return _stack(pieces, problems, dtype)


def to_nested(
    params: Params, spec: ModelSpec, names: Mapping[str, str], like: Any = None
) -> dict[str, Any]:
  """Writes an unstacked tree by a table of paths.

  Args:
    params: canonical parameters.
    spec: the architecture.
    names: as for `from_nested`.
    like: a tree whose leaves have the shapes wanted, e.g. with the heads apart;
      None keeps kernels as [in, out].

  Returns:
    Nested dict with string keys, leaves as numpy arrays.

  Raises:
    InputError: `like` lacks a leaf or has one of another size.
  """
  shapes = {} if like is None else flatten(like)
  flat, problems = {}, []
  for path, layer, name, shape in _places(spec, names):
    value = _slot_value(params, spec.layers, path, layer)
    if like is not None:
      wanted = shapes[name].shape if name in shapes else None
      if wanted is None or not _merges(wanted, shape):
        problems.append(
            f'{path} of shape {list(shape)} cannot become leaf {name} '
            f'of shape {wanted and list(wanted)}'
        )
        continue
      value = value.reshape(wanted)
    flat[name] = value
  InputError.raise_for(problems)
  return unflatten(flat)


def flatten(tree: Any) -> dict[str, Any]:
  """Flattens a tree into dotted paths; list places and int keys are numbers."""
  if isinstance(tree, Mapping):
    items = tree.items()
  elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
    items = enumerate(tree)
  else:
    # A leaf of an nnx.State is a variable.
    return {'': tree.get_value() if hasattr(tree, 'get_value') else tree}
  return {
      f'{key}.{path}' if path else str(key): leaf
      for key, inner in items
      for path, leaf in flatten(inner).items()
  }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nests dotted paths."""
  return traverse_util.unflatten_dict(flat, sep='.')


def _flax_name(name: str, slot: tensors.Slot, spec: ModelSpec) -> str:
  """The dotted Flax path of a torch tensor."""
  leaf = slot.path.rsplit('/', 1)[1]
  stem, ending = name.rsplit('.', 1)
  if slot.path.startswith(('embed/', 'position_bias/')):
    ending = 'embedding'
  elif leaf == 'kernel' or (leaf == 'scale' and spec.norm == 'layer'):
    # The RMS norms of the Flax models are written by hand and say 'weight'.
    ending = leaf
  return f'{stem}.{ending}'


def _places(
    spec: ModelSpec, names: Mapping[str, str]
) -> Iterator[tuple[str, int | None, str, tuple[int, ...]]]:
  """Yields (path, layer, dotted name, shape) of every matrix and vector."""
  shapes = param_shapes(spec)
  missing = [path for path in shapes if path not in names]
  if missing:
    raise InputError(f'the table of paths has no row for {", ".join(missing)}')
  for path, shape in shapes.items():
    if path.startswith('layers/'):
      for layer in range(spec.layers - shape[0], spec.layers):
        yield path, layer, names[path].format(layer), shape[1:]
    else:
      yield path, None, names[path], shape


def _merges(shape: Sequence[int], target: Sequence[int]) -> bool:
  """Whether joining neighbouring axes of `shape` gives `target`."""
  rest = list(shape)
  for size in target:
    joined = 1
    while rest and joined < size:
      joined *= rest.pop(0)
    if joined != size:
      return False
  return not rest


def _slot_value(
    params: Params, depth: int, path: str, layer: int | None
) -> np.ndarray:
  leaf = loading.get_leaf(params, path)
  if layer is not None:
    leaf = leaf[spec_lib.row(depth, len(leaf), layer)]
  return np.asarray(leaf)


def _stack(
    pieces: Mapping[str, Mapping[int | None, Any]],
    problems: Sequence[str],
    dtype: str,
) -> Params:
  """Stacks the layers of every leaf, or raises the problems."""
  if dtype not in loading.DTYPES:
    problems = [*problems, f'dtype {dtype!r} is not supported']
  InputError.raise_for(problems)
  leaves = {}
  for path, layers in pieces.items():
    whole = layers.get(None)
    if whole is None:
      whole = np.stack([layers[layer] for layer in sorted(layers)])
    leaves[path] = jnp.asarray(whole, loading.DTYPES[dtype])
  return loading.nest(leaves)
