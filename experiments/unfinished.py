"""Keeps what a long run has found so far, so that one that was stopped goes on.

A piece of work is a file in the folder `unfinished` of --output_dir, named by all
that it depends on: the same command finds it there, another one does not. A run
that ends removes the folder.
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


class Unfinished:
  """Pieces of one run.

  Attributes:
    found: how many pieces an earlier run had left.
  """

  def __init__(self, output: pathlib.Path, about: Mapping[str, Any]):
    """Opens the pieces of a run.

    Args:
      output: its output folder.
      about: what all pieces depend on, plain JSON types.
    """
    self._folder = output / common.UNFINISHED
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
    """Writes a piece atomically; see `load`."""
    self._folder.mkdir(exist_ok=True)
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    common.write_bytes(self._path(parts), safetensors.numpy.save(arrays))

  def clear(self) -> None:
    """Removes all pieces, at the end of the run."""
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
