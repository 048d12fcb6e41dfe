"""Arrays of .npz archives from outside, read header first.

An archive is a zip file with one .npy file an array. Before anything of an
array is unpacked, its header must name a plain dtype and a shape that the entry
has the bytes for, and that the caller expects; no more bytes than those are
unpacked. Nothing in an archive can run code.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxedit import io

# Of the text that describes an array; numpy's own takes about 100.
_MOST_HEADER = 1000
# Entries of an archive; each takes some 500 bytes once listed.
_MOST_ENTRIES = 100_000
# What zipfile, zlib and a header may raise on damaged files.
ERRORS = (
    OSError, EOFError, KeyError, NotImplementedError, OverflowError,
    MemoryError, RecursionError, RuntimeError, TypeError, ValueError,
    SyntaxError, struct.error, zipfile.BadZipFile, zipfile.LargeZipFile,
    zlib.error,
)  # fmt: skip


def read(
    path: str | os.PathLike[str], wanted: Mapping[str, tuple[int | None, ...]]
) -> dict[str, np.ndarray]:
  """Reads arrays of numbers.

  Args:
    path: the archive.
    wanted: name -> shape, None for any length of an axis.

  Returns:
    name -> array.

  Raises:
    One of `ERRORS`, with a reason: the file cannot be read, lacks an array, or
      has another shape.
  """
  size = io.file_size(path)
  with open(path, 'rb') as stream:
    _check_directory(stream, size)
    with zipfile.ZipFile(stream) as archive:
      return {
          name: _array(archive, f'{name}.npy', shape)
          for name, shape in wanted.items()
      }


def _check_directory(stream: Any, size: int) -> None:
  """Refuses an archive that lists too many entries, before they are listed."""
  stream.seek(max(0, size - (1 << 16) - 22))
  tail = stream.read()
  at = tail.rfind(b'PK\5\6')
  if at < 0 or len(tail) - at < 22:
    raise ValueError('it is no zip archive, or its end is missing')
  count = int.from_bytes(tail[at + 10 : at + 12], 'little')
  length = int.from_bytes(tail[at + 12 : at + 16], 'little')
  # Larger archives say so in another record; those of moments are none.
  if count == 0xFFFF or length > 500 * _MOST_ENTRIES:
    raise ValueError('it has too many entries')
  stream.seek(0)


def _array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int | None, ...]
) -> np.ndarray:
  """Reads one entry."""
  info = archive.getinfo(name)
  if info.flag_bits & 1:
    raise ValueError(f'{name} is encrypted')
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError(
        f'{name} is compressed in a way ({info.compress_type}) that numpy does'
        ' not write'
    )
  with archive.open(info) as stream:
    # Others have headers of any length, which arrays of numbers do not need.
    if np.lib.format.read_magic(stream) != (1, 0):
      raise ValueError(f'{name} is not in version 1.0 of the format')
    found, fortran, dtype = np.lib.format.read_array_header_1_0(
        stream, max_header_size=_MOST_HEADER
    )
    if dtype.kind not in 'iuf' or dtype.itemsize > 8:
      raise ValueError(f'{name} holds {dtype}, not numbers')
    if len(found) != len(shape) or any(
        x < 0 or want not in (None, x) for x, want in zip(found, shape)
    ):
      said = ['F' if x is None else x for x in shape]
      raise ValueError(
          f'{name} has shape {list(found)[:8]}, where {said} is needed'
      )
    size = math.prod(found) * dtype.itemsize
    if stream.tell() + size != info.file_size:
      raise ValueError(f'{name} has not the bytes of its shape {list(found)}')
    raw = stream.read(size + 1)  # to the end, where its checksum is compared
  return np.frombuffer(raw, dtype).reshape(found, order='F' if fortran else 'C')
