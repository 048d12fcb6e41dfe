"""Writing safetensors files and folders.

The counterpart of `checkpoint`: headers, bytes copied from one file to another,
and folders that appear whole or not at all. Nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from jaxedit.models import checkpoint
from jaxedit.types import InputError

_CHUNK = 1 << 24


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> bytes:
  """Builds a header, padded so that the tensors start at a multiple of eight.

  Args:
    tensors: name -> (dtype code, shape), in file order; see `aligned`.
    metadata: free strings.

  Returns:
    The JSON.
  """
  entries: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
  start = 0
  for name, (code, shape) in tensors.items():
    stop = start + math.prod(shape) * checkpoint.SIZES[code]
    entries[name] = {
        'dtype': code, 'shape': list(shape), 'data_offsets': [start, stop],
    }  # fmt: skip
    start = stop
  raw = json.dumps(entries, separators=(',', ':')).encode()
  return raw + b' ' * (-len(raw) % 8)


def aligned(names: Mapping[str, str]) -> list[str]:
  """Orders tensors so that each starts at a multiple of its item size.

  Args:
    names: name -> dtype code.

  Returns:
    The names, wider dtypes first, otherwise in their order. Torch cannot view
    a float32 tensor that starts at an odd bfloat16.
  """
  return sorted(names, key=lambda name: -checkpoint.SIZES[names[name]])


def write_header(stream: BinaryIO, raw: bytes) -> None:
  """Writes the eight length bytes and a header."""
  stream.write(len(raw).to_bytes(8, 'little'))
  stream.write(raw)


def copy_bytes(tensor: checkpoint.Tensor, stream: BinaryIO) -> None:
  """Copies a tensor's bytes as they are."""
  with open(tensor.path, 'rb') as source:
    source.seek(tensor.start)
    left = tensor.size
    while left:
      piece = source.read(min(left, _CHUNK))
      if not piece:
        raise InputError(f'{tensor.path} became shorter while it was read')
      stream.write(piece)
      left -= len(piece)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Fills a folder beside its place and moves it there when all went well.

  Args:
    folder: must not exist, or be empty.

  Yields:
    The temporary folder.

  Raises:
    InputError: the place is taken.
  """
  folder = pathlib.Path(folder).absolute()
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(
        f'{folder} exists and is not an empty folder; remove it or give '
        'another place'
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(
      tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent)
  )
  try:
    yield temporary
    # mkdtemp makes folders private; this one is a result like any other.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    os.replace(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
