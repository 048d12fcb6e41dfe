"""Keeps pieces of work in files, each named by all that it depends on.

A run keeps what it has found so far in the folder `unfinished` of --output_dir
(`Output`), so that one that was stopped goes on with the same command. A run
that ends removes them.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from jaxedit import io
from jaxedit.types import InputError

_UNFINISHED, _COMMAND = 'unfinished', 'command.json'
_PIECE = 'jaxedit piece 1'


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
    self._folder, self._about = folder, dict(about)
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
    arrays, _ = io.read_tensors(path, _PIECE, 'delete it')
    self.found += 1
    return arrays

  def save(self, arrays: Mapping[str, np.ndarray], *parts: Any) -> None:
    """Writes a piece atomically; see `load`.

    Raises:
      InputError: it cannot be written.
    """
    io.write_tensors(self._path(parts), arrays, kind=_PIECE, record={})

  def _path(self, parts: tuple[Any, ...]) -> pathlib.Path:
    name = digest(_PIECE, self._about, *parts)
    return self._folder / f'{name}.safetensors'


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


class Output:
  """The output folder of a run that can be stopped and goes on.

  As a context it removes what was kept at the end of a run, and where one is
  refused before it has found anything.

  Attributes:
    folder: the folder.
    resumed: whether this command was stopped there.
  """

  def __init__(self, path: str, overwrite: bool):
    """Claims the folder; nothing that was found is changed before `begin`.

    Args:
      path: the folder.
      overwrite: whether results of an earlier run may be replaced.

    Raises:
      InputError: it cannot be written, or holds files that are not to be
        replaced.
    """
    self.folder = common.make_folder(path)
    self._place = self.folder / _UNFINISHED
    earlier, self._command = _read(self._place / _COMMAND), _command()
    self.resumed = earlier == self._command
    if self._place.is_dir() and not any(self._place.iterdir()):
      self._place.rmdir()  # of a run that was killed as it began
    if earlier is None and self._place.exists():
      raise InputError(
          f'{self._place}: exists, and no run that was stopped has left it; move'
          ' it away or choose another --output_dir'
      )
    if earlier is not None and not self.resumed:
      if self._empty():
        shutil.rmtree(self._place)
      elif not overwrite:
        names = {*earlier.items()} ^ {*self._command.items()}
        names = sorted({f'--{name}' for name, _ in names})
        raise InputError(
            f'--output_dir={path}: holds what a run with other flags'
            f' ({", ".join(names)}) had found when it was stopped; run that one'
            ' again, choose another folder, or pass --overwrite to lose it'
        )
    if not self.resumed:
      common.claim_folder(path, overwrite)

  def begin(self) -> None:
    """From here on the folder is this run's."""
    if not self.resumed:
      shutil.rmtree(self._place, ignore_errors=True)
    self._place.mkdir(exist_ok=True)
    io.write_json(self._place / _COMMAND, self._command)

  def pieces(self, about: Mapping[str, Any]) -> Kept:
    """What this run keeps until it ends.

    Args:
      about: what all pieces depend on, beside the versions of all that computes.
    """
    return Kept(self._place, {**about, 'versions': common.versions()})

  def __enter__(self) -> Output:
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    refused = isinstance(error, InputError) and self._empty()
    if kind is None or refused:
      shutil.rmtree(self._place, ignore_errors=True)

  def _empty(self) -> bool:
    """Whether there is nothing but the command."""
    return [path.name for path in self._place.glob('*')] == [_COMMAND]


def _command() -> dict[str, str]:
  """The flags that were given, but for those of the folder itself."""
  ours = ('output_dir', 'overwrite', 'flagfile')
  return {
      name: flags.FLAGS[name].serialize()
      for name in sorted(flags.FLAGS)
      if not flags.FLAGS[name].using_default_value and name not in ours
  }


def _read(path: pathlib.Path) -> dict[str, str] | None:
  """The command of a run that was stopped, if one was."""
  try:
    return io.read_json(path)
  except InputError:
    return None
