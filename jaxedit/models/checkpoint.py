"""Reading safetensors folders byte by byte.

A file is eight bytes of header length (little endian), a JSON header with the
dtype, shape and place of every tensor, and the tensors. Reading the format here
keeps torch out, gives bfloat16 as it is, and lets a truncated file be told from
a sound one before any weight is read. Nothing here knows a model or writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxedit.types import InputError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
ORIGINAL = 'original.safetensors'

# Safetensors' dtype codes that hold weights, and the sizes of all its codes.
FLOATS = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}
SIZES = {code: dtype.itemsize for code, dtype in FLOATS.items()} | {
    'I64': 8, 'I32': 4, 'I16': 2, 'I8': 1,
    'U64': 8, 'U32': 4, 'U16': 2, 'U8': 1,
    'BOOL': 1, 'F8_E4M3': 1, 'F8_E5M2': 1,
}  # fmt: skip

# Upstream's own limit; a longer header is not a header.
_MAX_HEADER = 100_000_000
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    name: upstream name.
    path: its file.
    code: safetensors dtype code, e.g. 'BF16'.
    shape: its shape.
    start: first byte in the file.
    size: bytes.
  """

  name: str
  path: pathlib.Path
  code: str
  shape: tuple[int, ...]
  start: int
  size: int

  def read_bytes(self) -> np.ndarray:
    """Reads the tensor as uint8 [size] into memory of its own."""
    with open(self.path, 'rb') as stream:
      stream.seek(self.start)
      return np.fromfile(stream, np.uint8, self.size)

  def read(self) -> np.ndarray:
    """Reads the tensor; its dtype must be one of `FLOATS`."""
    return self.read_bytes().view(FLOATS[self.code]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
  """The head of one safetensors file.

  Attributes:
    raw: the JSON as it stands in the file, padding included.
    metadata: its free strings.
    tensors: name -> tensor, in file order.
  """

  raw: bytes
  metadata: Mapping[str, str]
  tensors: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The weights of a folder.

  Attributes:
    folder: the folder.
    headers: file name -> header.
    tensors: tensor name -> tensor, over all files.
    index: the parsed index of a sharded checkpoint, or None.
  """

  folder: pathlib.Path
  headers: Mapping[str, Header]
  tensors: Mapping[str, Tensor]
  index: Mapping[str, Any] | None


def read_header(path: pathlib.Path) -> Header:
  """Reads and checks the head of a safetensors file.

  Args:
    path: the file.

  Returns:
    Its header.

  Raises:
    InputError: the file is cut short or is no safetensors file.
  """
  length = path.stat().st_size
  with open(path, 'rb') as stream:
    size = int.from_bytes(stream.read(8), 'little')
    if length < 8 or size > min(length - 8, _MAX_HEADER):
      raise InputError(
          f'{path}: its header claims {size} bytes but the file has {length}; '
          'it is cut short or no safetensors file: fetch it again'
      )
    raw = stream.read(size)
  try:
    entries = json.loads(raw)
    metadata = entries.pop('__metadata__', {})
    tensors = [
        _tensor(path, name, entry, 8 + size) for name, entry in entries.items()
    ]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
        f'{path}: its header is not that of a safetensors file ({error}); '
        'fetch it again'
    ) from error
  tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
  end = 8 + size
  for tensor in tensors:
    if tensor.start != end:
      raise InputError(
          f'{path}: tensor {tensor.name} starts at byte {tensor.start} instead '
          f'of {end}; the file is damaged: fetch it again'
      )
    end += tensor.size
  if end != length:
    raise InputError(
        f'{path}: the file has {length} bytes and its header needs {end}; it '
        'is cut short or damaged: fetch it again'
    )
  return Header(raw, metadata, {tensor.name: tensor for tensor in tensors})


def _tensor(
    path: pathlib.Path, name: str, entry: Mapping[str, Any], base: int
) -> Tensor:
  """Builds a tensor from its header entry; ValueError if it is senseless."""
  code, shape = entry['dtype'], tuple(entry['shape'])
  start, stop = entry['data_offsets']
  if code not in SIZES:
    raise ValueError(f'tensor {name} has the unknown dtype {code!r}')
  numbers = (*shape, start, stop)
  if any(type(number) is not int or number < 0 for number in numbers):
    raise ValueError(f'tensor {name} has a shape or place that is no number')
  if stop - start != math.prod(shape) * SIZES[code]:
    raise ValueError(
        f'tensor {name} has {stop - start} bytes for {code} {list(shape)}'
    )
  return Tensor(name, path, code, shape, base + start, stop - start)


def open_folder(folder: str | os.PathLike[str]) -> Checkpoint:
  """Finds the weights of a folder and reads every header.

  Args:
    folder: holds model.safetensors, or shards with their index.

  Returns:
    What is there; no weight has been read.

  Raises:
    InputError: no folder, no safetensors in it, or damaged files; all at once.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f'{folder}: there is no such folder')
  if (folder / SINGLE).is_file():
    names, index = [SINGLE], None
  elif (folder / INDEX).is_file():
    index = read_json(folder / INDEX)
    names = _shard_names(folder, index)
  else:
    raise InputError(_no_weights(folder))
  problems, headers = [], {}
  for name in names:
    try:
      if not (folder / name).is_file():
        raise InputError(
            f'{folder / INDEX} names the shard {name}, which is not in the '
            'folder; fetch it'
        )
      headers[name] = read_header(folder / name)
    except InputError as error:
      problems += error.problems
  tensors: dict[str, Tensor] = {}
  for header in headers.values():
    for name, tensor in header.tensors.items():
      if name in tensors:
        problems.append(
            f'{tensor.path}: tensor {name} is in '
            f'{tensors[name].path.name} too; remove one'
        )
      tensors[name] = tensor
  if index is not None and not problems:
    problems += _index_faults(folder, index['weight_map'], tensors)
  if problems:
    raise InputError(*problems)
  return Checkpoint(folder, headers, tensors, index)


def _shard_names(folder: pathlib.Path, index: Any) -> list[str]:
  """Lists the files of an index, refusing any that is not a plain name."""
  weights = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(weights, dict) or not weights:
    raise InputError(
        f'{folder / INDEX} has no weight_map from tensors to files; fetch it '
        'again'
    )
  names = list(dict.fromkeys(weights.values()))
  strange = [
      f'{folder / INDEX} names the file {name!r}, which is not a plain '
      '.safetensors file name of this folder'
      for name in names
      if not isinstance(name, str)
      or pathlib.PurePath(name).name != name
      or not name.endswith('.safetensors')
  ]
  if strange:
    raise InputError(*strange)
  return names


def _index_faults(
    folder: pathlib.Path,
    weights: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> list[str]:
  """Compares an index with the shards."""
  return [
      f'{folder / INDEX} says that tensor {name} is in {file}, but it is not; '
      'fetch both again'
      for name, file in weights.items()
      if name not in tensors or tensors[name].path.name != file
  ] + [
      f'{tensor.path}: tensor {name} is not in the index; fetch {INDEX} again'
      for name, tensor in tensors.items()
      if name not in weights
  ]


def _no_weights(folder: pathlib.Path) -> str:
  """Says what a folder without safetensors has instead."""
  present = sorted(path.name for path in folder.iterdir() if path.is_file())
  pickles = [name for name in present if name.endswith(_PICKLES)]
  if pickles:
    return (
        f'{folder}: has only pickle weights ({", ".join(pickles)}), which can '
        'run code when opened; convert them to safetensors (load the model '
        'with transformers and call save_pretrained) and give that folder'
    )
  if any(name.endswith('.msgpack') for name in present):
    return (
        f'{folder}: has Flax weights (.msgpack) only; read them with '
        'interop.load_hf_flax_msgpack or convert them to safetensors'
    )
  return f'{folder}: has neither {SINGLE} nor {INDEX}; found {present}'


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    InputError: it is missing or is no JSON.
  """
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise InputError(f'{path} is missing; fetch it') from error
  except ValueError as error:
    raise InputError(f'{path} is not valid JSON ({error})') from error


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a folder's config.json.

  Raises:
    InputError: there is no such folder, no config.json, or it is no object.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f'{folder}: there is no such folder')
  config = read_json(folder / 'config.json')
  if not isinstance(config, dict):
    raise InputError(f'{folder / "config.json"} does not hold an object')
  return config
