"""Keeps pieces of work in files, each named by all that it depends on.

A run keeps what it has found so far in the folder `unfinished` of --output_dir,
so that one that was stopped goes on with the same command: it finds the pieces
there, another command does not, and a run that ends removes them.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from experiments import common
from jaxedit.types import InputError


class Kept:
  """Pieces in a folder.

  Attributes:
    found: how many were there when they were asked for.
  """

  def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
    """Opens a folder, which need not exist.

    Args:
      folder: where they are.
      about: what all pieces depend on, plain JSON types.
    """
    self._folder = folder
    self._about = json.dumps(about, sort_keys=True).encode()
    self.found = 0

  def load(self, *parts: Any) -> dict[str, np.ndarray] | None:
    """Reads a piece; None where there is none.

    Args:
      *parts: what this one depends on: arrays, and plain JSON types.

    Raises:
      InputError: the file is damaged.
    """
    path = self._path(parts)
    if not path.is_file():
      return None
    try:
      arrays = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError) as e:
      raise InputError(f'{path}: cannot be read ({e}); delete it') from None
    self.found += 1
    return arrays

  def save(self, arrays: Mapping[str, np.ndarray], *parts: Any) -> None:
    """Writes a piece atomically; see `load`.

    Raises:
      InputError: it cannot be written.
    """
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise InputError(
          f'{self._folder}: cannot be made ({e.strerror}); name another folder'
      ) from e
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    common.write_bytes(self._path(parts), safetensors.numpy.save(arrays))

  def clear(self) -> None:
    """Removes all pieces."""
    shutil.rmtree(self._folder, ignore_errors=True)

  def _path(self, parts: tuple[Any, ...]) -> pathlib.Path:
    digest = hashlib.sha256(self._about)
    for part in parts:
      if isinstance(part, np.ndarray):
        digest.update(f'{part.dtype}{part.shape}'.encode())
        digest.update(np.ascontiguousarray(part).tobytes())
      else:
        digest.update(json.dumps(part).encode())
    return self._folder / f'{digest.hexdigest()[:32]}.safetensors'


def unfinished(output: pathlib.Path, about: Mapping[str, Any]) -> Kept:
  """Opens what a run with this output folder keeps until it ends.

  Args:
    output: the folder.
    about: what all pieces depend on, beside the versions of all that computes.
  """
  about = {**about, 'versions': common.versions()}
  return Kept(output / common.UNFINISHED, about)
