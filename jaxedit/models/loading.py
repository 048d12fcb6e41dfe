"""Local Hugging Face folders into canonical parameters.

Every upstream tensor goes through the device once: it is read from its
safetensors file, turned into the canonical layout there, and written into its
row of the stacked leaf, whose buffer is donated. So the host holds about one
upstream tensor beside the parameters, and hashing reads no file twice. On a mesh
a device gets its part of every tensor and nothing else. Of several processes
each reads the parts of its devices, and the whole of those tensors that it
hashes for all.

A folder is refused as a whole, with every fault named: tensors that are
missing, unknown, misshapen or not finite, and config fields that would change
the mathematics. Other sources (hub names, GGUF) are made local folders first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxedit import io
from jaxedit.models import checkpoint, families, sharding, tensors
from jaxedit.models import spec as spec_lib
from jaxedit.placement import Placement, join_parts, one_device, place_by
from jaxedit.types import Array, InputError, Params, Progress, silent

_DIGEST_BYTES = hashlib.sha256().digest_size
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded model.

  Attributes:
    spec: what it computes.
    params: canonical parameters, see `spec.param_shapes`.
    folder: where it was read from.
    hash: SHA-256 over its tensors' names, dtypes, shapes and bytes as they lie
      upstream; the same for a copy that is sharded differently.
    config: the parsed config.json.
    tokenizer: its tokenizer, where `jaxedit.load` has read it.
    placement: the devices that it lies on; JAX's first one unless given.
  """

  spec: spec_lib.ModelSpec
  params: Params
  folder: pathlib.Path
  hash: str
  config: Mapping[str, Any]
  tokenizer: Any = None
  placement: Placement = dataclasses.field(default_factory=one_device)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which tensor of a folder fills which canonical leaves.

  Attributes:
    spec: the architecture.
    slots: tensor name as in the folder -> what it fills.
    full_names: tensor name as in the folder -> name with the family's prefix.
    copies: name of a stored copy of a tied head -> name of the embedding.
    ignored: tensors that nothing needs.
  """

  spec: spec_lib.ModelSpec
  slots: Mapping[str, tuple[tensors.Slot, ...]]
  full_names: Mapping[str, str]
  copies: Mapping[str, str]
  ignored: tuple[str, ...]


def load_model(
    folder: str | os.PathLike[str],
    dtype: str = 'float32',
    progress: Progress = silent,
    *,
    names: Sequence[str] = families.NAMES,
    mesh: Mesh | Placement | str | None = None,
) -> Model:
  """Loads a Hugging Face folder.

  Args:
    folder: has config.json and model.safetensors, or shards with their index.
    dtype: 'float32' or 'bfloat16', of every parameter.
    progress: is told upstream tensors.
    names: the families that are wanted.
    mesh: devices to load to, see `placement.place_by`; by default all.

  Returns:
    The model, its parameters on these devices.

  Raises:
    InputError: anything about the folder that cannot be used, all at once.
  """
  if dtype not in DTYPES:
    raise InputError(
        f'dtype {dtype!r} is not supported; use one of {", ".join(DTYPES)}'
    )
  folder = pathlib.Path(folder)
  config, source, layout = open_model(folder, names)
  shapes = spec_lib.param_shapes(layout.spec)
  size = (
      sum(map(math.prod, shapes.values())) * jnp.dtype(DTYPES[dtype]).itemsize
  )
  placement = place_by(mesh, size)
  with placement.active():
    params, digest = _read_params(
        source, layout, DTYPES[dtype], placement, progress
    )
  return Model(layout.spec, params, folder, digest, config, placement=placement)


def open_model(
    folder: str | os.PathLike[str],
    names: Sequence[str] = families.NAMES,
) -> tuple[dict[str, Any], checkpoint.Checkpoint, Layout]:
  """Reads and checks everything but the weights.

  Args:
    folder: as for `load_model`.
    names: the families that are wanted.

  Returns:
    The config, the headers of the weight files, and what goes where.

  Raises:
    InputError: see `load_model`.
  """
  config = checkpoint.read_config(folder)
  problems: list[str] = []
  spec = source = None
  try:
    spec = families.spec_from_hf(config, names)
  except InputError as error:
    where = pathlib.Path(folder) / 'config.json'
    problems += [f'{where}: {problem}' for problem in error.problems]
  try:
    source = checkpoint.open_folder(folder)
  except InputError as error:
    problems += error.problems
  if spec is None or source is None:
    raise InputError(*problems)
  return config, source, match(spec, source)


def match(spec: spec_lib.ModelSpec, source: checkpoint.Checkpoint) -> Layout:
  """Assigns every tensor of a folder, and every leaf a tensor.

  Args:
    spec: the architecture.
    source: headers of the folder.

  Returns:
    The assignment.

  Raises:
    InputError: tensors missing, left over, of the wrong shape or dtype.
  """
  if spec.layers > len(source.tensors):  # before a table of them is made
    raise InputError(
        f'{source.folder}: config.json asks for {spec.layers} layers, but there'
        f' are {len(source.tensors)} tensors; fetch the complete checkpoint or'
        ' correct config.json'
    )
  family = families.get(spec.family)
  slots, full_names, problems = {}, {}, []
  for full, wanted in tensors.upstream_slots(
      spec, families.tensors_of(spec)
  ).items():
    known = (full, *(full.replace(*pair) for pair in _older(family)))
    tries = (
        tensors.find_name(name, family.PREFIX, source.tensors) for name in known
    )
    name = next(filter(None, tries), None)
    if name is None:
      leaves = ', '.join(slot.path for slot in wanted)
      problems.append(
          f'{source.folder}: tensor {full} (for {leaves}) is missing; fetch '
          'the complete checkpoint or correct config.json'
      )
      continue
    slots[name], full_names[name] = wanted, full
    problems += _misfit(source.tensors[name], wanted[0])
  copies = _tied_copies(spec, source, slots)
  ignored = []
  for name in source.tensors:
    if name in slots or name in copies:
      continue
    if tensors.is_ignored(name, family.PREFIX, family.IGNORED):
      ignored.append(name)
      continue
    problems.append(
        f'{source.tensors[name].path}: tensor {name} has no place in a '
        f'{spec.family} model with this config; correct config.json, or '
        'remove the tensor if the model does not use it'
    )
  if problems:
    raise InputError(*problems)
  return Layout(spec, slots, full_names, copies, tuple(ignored))


def _older(family: Any) -> tuple[tuple[str, str], ...]:
  """Endings of a family's names, and what older checkpoints have there."""
  return getattr(family, 'OLDER', ())


def _misfit(tensor: checkpoint.Tensor, slot: tensors.Slot) -> list[str]:
  """Compares a tensor with the place it goes to."""
  shape, problems = tensors.upstream_shape(slot), []
  if tensor.shape != shape:
    problems.append(
        f'{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)} '
        f'where config.json asks for {list(shape)}'
    )
  if tensor.code not in checkpoint.FLOATS:
    problems.append(
        f'{tensor.path}: tensor {tensor.name} has dtype {tensor.code}; only '
        f'{", ".join(checkpoint.FLOATS)} weights can be read, so give an '
        'unquantised checkpoint'
    )
  return problems


def _tied_copies(
    spec: spec_lib.ModelSpec,
    source: checkpoint.Checkpoint,
    slots: Mapping[str, Sequence[tensors.Slot]],
) -> dict[str, str]:
  """Finds a stored head that a tied model takes from its embedding."""
  if not spec.tied:
    return {}
  head = families.tensors_of(spec)['head/kernel'].name
  if head not in source.tensors:
    return {}
  embedding = [
      name
      for name, (slot, *_) in slots.items()
      if slot.path == 'embed/embedding'
  ]
  # Without an embedding there is a fault already, and nothing to compare.
  return dict(zip([head], embedding))


@functools.partial(
    jax.jit, static_argnames=('form', 'part', 'heads'), donate_argnums=0
)
def _fill(
    leaf: Array,
    tensor: Array,
    layer: Array,
    *,
    form: str,
    part: int,
    heads: int,
) -> tuple[Array, Array]:
  """Writes one upstream tensor into its row of a stacked leaf."""
  value, finite = _convert(
      tensor, dtype=leaf.dtype, form=form, part=part, heads=heads
  )
  return jax.lax.dynamic_update_index_in_dim(leaf, value, layer, 0), finite


@functools.partial(jax.jit, static_argnames=('dtype', 'form', 'part', 'heads'))
def _convert(
    tensor: Array, *, dtype: Any, form: str, part: int, heads: int
) -> tuple[Array, Array]:
  """Makes a leaf, or a row of one, and tells whether it is finite."""
  source = tensors.Source('', form, part)
  value = tensors.to_canonical(tensor, source, heads).astype(dtype)
  return value, jnp.isfinite(value).all()


def _read_params(
    source: checkpoint.Checkpoint,
    layout: Layout,
    dtype: Any,
    placement: Placement,
    progress: Progress,
) -> tuple[Params, str]:
  """Reads every used tensor in file order; returns the params and the hash."""
  shapes = spec_lib.param_shapes(layout.spec)
  where = dict.fromkeys(shapes)
  if placement.several:
    where = sharding.shardings(layout.spec, placement)
  leaves = {
      path: jnp.zeros(shape, dtype, device=where[path])
      for path, shape in shapes.items()
      if path.startswith('layers/')
  }
  digests: dict[str, bytes] = {}
  problems: list[str] = []
  with progress('loading', len(layout.slots), 'tensors') as advance:
    for number, (name, slots) in enumerate(_in_order(source, layout)):
      tensor, full_name = source.tensors[name], layout.full_names[name]
      if placement.hashes(number):
        value = tensor.read()
        digests[full_name] = _digest(full_name, tensor, value)
      else:
        value, digests[full_name] = tensor.view(), b'\0' * _DIGEST_BYTES
      if placement.several:
        parts = [_parts(value, slot, layout.spec, where) for slot in slots]
      else:
        parts = [jnp.asarray(_readable(value))] * len(slots)
      sound = True
      for slot, part in zip(slots, parts):
        finite = _put(leaves, part, slot, layout.spec, dtype, placement)
        # Waiting here keeps one tensor on the host, not a queue of them.
        sound = bool(finite) and sound
      if not sound:
        problems.append(
            f'{tensor.path}: tensor {name} has values that are not finite in '
            f'{jnp.dtype(dtype).name}; fetch the checkpoint again'
        )
      advance(1)
  problems += _differing_copies(source, layout)
  if problems:
    raise InputError(*problems)
  total = hashlib.sha256()
  names = sorted(digests)
  for digest in join_parts(placement, [digests[name] for name in names]):
    total.update(digest)
  # Leaves in the order of the forward pass, whatever the order of the file.
  return nest({path: leaves[path] for path in shapes}), total.hexdigest()


def _in_order(
    source: checkpoint.Checkpoint, layout: Layout
) -> Iterator[tuple[str, tuple[tensors.Slot, ...]]]:
  """The used tensors in file order, with what they fill."""
  return (
      (name, layout.slots[name])
      for name in source.tensors
      if name in layout.slots
  )


def _readable(value: np.ndarray) -> np.ndarray:
  """In a dtype that JAX has without x64."""
  return value.astype(np.float32) if value.dtype == np.float64 else value


def _parts(
    value: np.ndarray,
    slot: tensors.Slot,
    spec: spec_lib.ModelSpec,
    where: Mapping[str, NamedSharding],
) -> Array:
  """Puts one canonical matrix on the devices, to each its part."""
  whole = tensors.to_canonical(value, slot.source, spec.heads)
  on = where[slot.path]
  if slot.layer is not None:  # without the axis of layers
    on = NamedSharding(on.mesh, PartitionSpec(*on.spec[1:]))
  found: dict[str, np.ndarray] = {}

  def part(index: tuple[slice, ...]) -> np.ndarray:
    if str(index) not in found:
      found[str(index)] = _readable(np.ascontiguousarray(whole[index]))
    return found[str(index)]

  return jax.make_array_from_callback(whole.shape, on, part)


def _put(
    leaves: dict[str, Array],
    value: Array,
    slot: tensors.Slot,
    spec: spec_lib.ModelSpec,
    dtype: Any,
    placement: Placement,
) -> Array:
  """Puts one upstream tensor into its leaf; tells whether it is finite."""
  how = dict(form=slot.source.form, part=slot.source.part, heads=spec.heads)
  if placement.several:
    how['form'] = 'same'  # `_parts` has made it canonical
  if slot.layer is None:
    leaves[slot.path], finite = _convert(value, dtype=dtype, **how)
  else:
    # The stack leaves the dict so that its buffer can be donated.
    stack = leaves.pop(slot.path)
    place = spec_lib.row(spec.layers, len(stack), slot.layer)
    leaves[slot.path], finite = _fill(stack, value, jnp.int32(place), **how)
  return finite


def _digest(name: str, tensor: checkpoint.Tensor, value: np.ndarray) -> bytes:
  """Hashes one tensor with its name, dtype and shape."""
  digest = hashlib.sha256(f'{name}|{tensor.code}|{tensor.shape}|'.encode())
  digest.update(io.tensor_bytes(value))
  return digest.digest()


def _differing_copies(
    source: checkpoint.Checkpoint, layout: Layout
) -> list[str]:
  """Refuses a tied head whose stored copy is another matrix."""
  problems = []
  for copy, name in layout.copies.items():
    one, other = source.tensors[copy], source.tensors[name]
    same = one.shape == other.shape and one.code == other.code
    if not same or io.tensor_bytes(one.read()) != io.tensor_bytes(other.read()):
      problems.append(
          f'{one.path}: tensor {copy} differs from {name}, but config.json '
          'ties them; set tie_word_embeddings to false to use it'
      )
  return problems


def require_decoder(spec: spec_lib.ModelSpec, what: str) -> None:
  """Refuses an encoder-decoder for what goes on with a text.

  Args:
    spec: the architecture.
    what: begins the sentence.

  Raises:
    InputError: it has an encoder.
  """
  if spec.encoder_layers:
    raise InputError(
        f'{what} takes a model that reads and writes one text, and'
        f' {spec.family} reads with an encoder; use a decoder'
    )


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Turns '/'-joined paths into a nested dict."""
  return traverse_util.unflatten_dict(leaves, sep='/')


def get_leaf(params: Params, path: str) -> Any:
  """Looks up a '/'-joined path."""
  node: Any = params
  for part in path.split('/'):
    node = node[part]
  return node
