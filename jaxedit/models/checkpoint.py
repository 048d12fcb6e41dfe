"""What lies in the safetensors files of a folder, before any weight is read.

Headers are read and checked by safetensors, index and shards against each
other here. Nothing here knows a model or writes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxedit import io
from jaxedit.types import InputError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
ORIGINAL = 'original.safetensors'

# Safetensors' dtype codes that hold weights.
FLOATS = ('F64', 'F32', 'F16', 'BF16')
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    name: upstream name.
    path: its file.
    entry: where in it, and what.
  """

  name: str
  path: pathlib.Path
  entry: io.TensorEntry

  @property
  def code(self) -> str:
    """Its safetensors dtype code, e.g. 'BF16'."""
    return self.entry.code

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape."""
    return self.entry.shape

  @property
  def size(self) -> int:
    """Its bytes."""
    return self.entry.size

  def read(self) -> np.ndarray:
    """Reads the tensor into memory of its own.

    Raises:
      InputError: it cannot be read.
    """
    return self._opened(io.read_tensor)

  def view(self) -> np.ndarray:
    """The tensor where it lies in its file; an index reads what it selects.

    Raises:
      InputError: it cannot be read.
    """
    return self._opened(io.view_tensor)

  def _opened(self, how: Callable[..., np.ndarray]) -> np.ndarray:
    try:
      return how(self.path, self.entry)
    except OSError as error:
      raise InputError(
          f'{self.path}: cannot be read ({error.strerror or error}); fetch it'
          ' again'
      ) from error


@dataclasses.dataclass(frozen=True)
class Header:
  """The head of one safetensors file.

  Attributes:
    metadata: its free strings.
    tensors: name -> tensor.
  """

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
  metadata, entries = io.read_header(path)
  tensors = {name: Tensor(name, path, one) for name, one in entries.items()}
  return Header(metadata, tensors)


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
    index = io.read_json(folder / INDEX)
    names = _shard_names(folder, index)
  else:
    raise InputError(_no_weights(folder))
  problems, headers = [], {}
  for name in names:
    if not (folder / name).is_file():
      problems.append(
          f'{folder / INDEX} names the shard {name}, which is not in the folder;'
          ' fetch it'
      )
      continue
    with InputError.collected(problems):
      headers[name] = read_header(folder / name)
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
  InputError.raise_for(problems)
  return Checkpoint(folder, headers, tensors, index)


def _shard_names(folder: pathlib.Path, index: Mapping[str, Any]) -> list[str]:
  """Lists the files of an index, refusing any that is not a plain name."""
  weights = index.get('weight_map')
  if not isinstance(weights, dict) or not weights:
    raise InputError(
        f'{folder / INDEX} has no weight_map from tensors to files; fetch it '
        'again'
    )
  strange = [
      f'{folder / INDEX} names the file {str(name)[:80]!r}, which is not a plain '
      '.safetensors file name of this folder'
      for name in weights.values()
      if not isinstance(name, str)
      or pathlib.PurePath(name).name != name
      or not name.endswith('.safetensors')
      or len(name) > 255
  ]
  if not isinstance(index.get('metadata') or {}, dict):
    strange.append(
        f'{folder / INDEX}: its metadata is no object; fetch it again'
    )
  InputError.raise_for(strange)
  return list(dict.fromkeys(weights.values()))


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
  pickles = [name for name in present if name.endswith(PICKLES)]
  if pickles:
    return (
        f'{folder}: has only pickle weights ({", ".join(pickles)}), which can '
        'run code when opened; convert them to safetensors (load the model '
        'with transformers and call save_pretrained) and give that folder'
    )
  if any(name.endswith('.msgpack') for name in present):
    return (
        f'{folder}: has Flax weights (.msgpack) only; read them with '
        'jaxedit.convert.load_hf_flax_msgpack or convert them to safetensors'
    )
  return f'{folder}: has neither {SINGLE} nor {INDEX}; found {present}'


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a folder's config.json.

  Raises:
    InputError: there is no such folder, no config.json, or it is no object.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f'{folder}: there is no such folder')
  return io.read_json(folder / 'config.json', remedy='fetch it')
