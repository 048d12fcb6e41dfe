"""Targets kept in files, found by all that they depend on.

Optimising the targets takes most of a run and depends on nothing that insertion
does: not on the preconditioner, its weight, the null space or the layers below the
last. A run whose targets are kept only inserts and evaluates.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxedit import io
from jaxedit.methods.config import MethodConfig
from jaxedit.models.loading import Model
from jaxedit.runs.provenance import versions
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import InputError, Targets


def digest(*parts: Any) -> str:
  """Hashes arrays and plain JSON types, in their order."""
  found = hashlib.sha256()
  for part in parts:
    if isinstance(part, np.ndarray):
      found.update(f'{part.dtype}{part.shape}'.encode())
      found.update(np.ascontiguousarray(part).tobytes())
    else:
      found.update(json.dumps(part, sort_keys=True).encode())
  return found.hexdigest()[:32]


def edit_digest(edit: EncodedEdit) -> str:
  """Hashes an edit without its number."""
  anchors = [int(x) for x in edit.anchors]
  chunks = [[int(x) for x in chunk] for chunk in edit.chunks]
  ids = [*edit.rows, edit.target, edit.kl]
  return digest(anchors, chunks, *(np.asarray(x, np.int32) for x in ids))


class TargetFiles:
  """A `targets.TargetCache` in a folder.

  Attributes:
    exact: see `targets.TargetCache`.
  """

  _KIND = 'jaxedit-targets-1'

  def __init__(
      self,
      folder: pathlib.Path,
      about: Mapping[str, Any],
      *,
      exact: bool,
  ):
    """Opens a folder, which need not exist.

    Args:
      folder: where they are.
      about: what all targets there depend on, plain JSON types.
      exact: reuse whole rounds only.
    """
    self._folder, self._about, self.exact = folder, dict(about), exact

  def after(self, earlier: str) -> TargetFiles:
    """The targets of edits that are made after others, named by a digest."""
    about = {**self._about, 'after': earlier}
    return TargetFiles(self._folder, about, exact=self.exact)

  def get(self, edit: EncodedEdit) -> Targets | None:
    path = self._path(edit)
    if not path.is_file():
      return None
    tensors, _ = io.read_tensors(path, self._KIND, 'delete it')
    if tensors.keys() != Targets.__dataclass_fields__.keys():
      raise InputError(f'{path}: is damaged, it has no targets; delete it')
    return Targets(**tensors)

  def put(self, edit: EncodedEdit, targets: Targets) -> None:
    io.write_tensors(
        self._path(edit), vars(targets), kind=self._KIND, record={}
    )

  def _path(self, edit: EncodedEdit) -> pathlib.Path:
    name = digest(self._about, edit_digest(edit))
    return self._folder / f'{name}.safetensors'


class ArrayFiles:
  """Arrays in a folder, found by all that they depend on.

  Attributes:
    found: how many were there when they were asked for.
  """

  _KIND = 'jaxedit-trace-1'

  def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
    """Opens a folder, which need not exist.

    Args:
      folder: where they are.
      about: what all of them depend on, plain JSON types.
    """
    self._folder, self._about, self.found = folder, dict(about), 0

  def load(self, *parts: Any) -> dict[str, np.ndarray] | None:
    """Reads what was saved for these parts: arrays, and plain JSON types."""
    path = self._path(parts)
    if not path.is_file():
      return None
    self.found += 1
    return io.read_tensors(path, self._KIND, 'delete it')[0]

  def save(self, arrays: Mapping[str, np.ndarray], *parts: Any) -> None:
    """Writes arrays; see `load`."""
    io.write_tensors(self._path(parts), arrays, kind=self._KIND, record={})

  def _path(self, parts: tuple[Any, ...]) -> pathlib.Path:
    return self._folder / f'{digest(self._about, *parts)}.safetensors'


def target_settings(model: Model, config: MethodConfig) -> dict[str, Any]:
  """What targets depend on, beside the edits; plain JSON types."""
  return {
      'jaxedit': versions()['jaxedit'],
      'model': model.hash,
      'dtype': str(model.params['embed']['embedding'].dtype),
      **(config.objective() or {}),
  }
