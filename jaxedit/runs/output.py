"""The output folder of a run that can be interrupted and resumes.

An interrupted run resumes: repeat the same command. Until a run ends, what it
needs for that lies in the folder `unfinished` of its output folder. One run at a
time has a folder: it holds a lock on it (flock) that ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxedit import hosts, io
from jaxedit.types import InputError, Stopped

_UNFINISHED, _COMMAND = 'unfinished', 'command.json'


class Output:
  """An output folder, claimed by a run.

  As a context it removes `unfinished` at the end of a run, and all that a run
  has written, and the folder if it made that, where it is refused before it has
  found anything.

  Attributes:
    folder: the folder.
    resumed: whether this command was interrupted there.
    unfinished: where the run keeps what it needs to resume.
  """

  def __init__(
      self,
      path: str,
      command: Mapping[str, Any],
      *,
      overwrite: bool,
      writes: Sequence[str] = (),
  ):
    """Claims the folder; nothing that is there is changed before `begin`.

    Args:
      path: the folder.
      command: what the run was told, plain JSON types, but for the folder itself.
      overwrite: whether results of an earlier run may be replaced.
      writes: names of what the run writes; if it is refused, those that were
        not there before are removed again.

    Raises:
      InputError: it cannot be written, another run is at work there, or it
        holds files that are not to be replaced.
    """
    if hosts.number():  # after the first process has claimed it
      hosts.follow(path)
    self._made = not os.path.lexists(path)
    self.folder = make_folder(path)
    self.unfinished = self.folder / _UNFINISHED
    self._command = dict(command)
    self._release = _lock(self, self.folder)
    # What runs left that were killed as they began, or as they wrote a file.
    for folder in (self.folder, self.unfinished):
      io.sweep_folder(folder)
    self._new = [x for x in writes if not os.path.lexists(self.folder / x)]
    earlier = _read(self.unfinished / _COMMAND)
    self.resumed = earlier == self._command
    if self.unfinished.is_dir() and not any(self.unfinished.iterdir()):
      self.unfinished.rmdir()
    if earlier is None and self.unfinished.exists():
      raise InputError(
          f'{self.unfinished}: exists, and no interrupted run has left it; move'
          ' it away or choose another --output_dir'
      )
    if earlier is not None and not self.resumed:
      if self._is_empty():
        io.remove_folder(self.unfinished)
      elif not overwrite:
        names = {
            name
            for name in {*earlier, *self._command}
            if earlier.get(name) != self._command.get(name)
        }
        names = sorted(f'--{name}' for name in names)
        raise InputError(
            f'--output_dir={path}: holds what a run with other flags'
            f' ({", ".join(names)}) had found when it was interrupted; repeat that'
            ' one, choose another folder, or pass --overwrite to lose it'
        )
    if not self.resumed and any(self.folder.iterdir()) and not overwrite:
      raise InputError(
          f'--output_dir={path}: already has files; choose another folder or'
          ' pass --overwrite'
      )
    if not hosts.number():
      hosts.follow(path, self.resumed)

  def begin(self, stale: Sequence[str] = ()) -> None:
    """From here on the folder is this run's.

    Args:
      stale: see `clear`.
    """
    if not self.resumed:
      io.remove_folder(self.unfinished)
    self.unfinished.mkdir(exist_ok=True)
    io.write_json(self.unfinished / _COMMAND, self._command)
    self.clear(stale)

  def clear(self, stale: Iterable[str]) -> None:
    """Removes results of an earlier run, files or folders."""
    for name in stale:
      path = self.folder / name
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)

  def forget(self) -> None:
    """Drops what was found: a run that resumed would be refused again."""
    self.clear(f'{_UNFINISHED}/{path.name}' for path in self._found())

  def __enter__(self) -> Output:
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    refused = isinstance(error, InputError) and self._is_empty()
    if isinstance(error, Stopped) and any(self._found()):
      error.saved.append(str(self.unfinished))
    try:
      if refused:
        self.clear(self._new)
      if kind is None or refused:
        io.remove_folder(self.unfinished)
      if self._made and isinstance(error, InputError):
        with contextlib.suppress(OSError):  # something lies in it
          self.folder.rmdir()
    finally:
      self._release()

  def _found(self) -> list[pathlib.Path]:
    """What lies beside the command."""
    return [p for p in self.unfinished.glob('*') if p.name != _COMMAND]

  def _is_empty(self) -> bool:
    """Whether there is nothing but the command."""
    return (self.unfinished / _COMMAND).exists() and not self._found()


def _lock(output: Output, folder: pathlib.Path) -> Any:
  """Locks a folder for as long as its Output lives; returns what ends that.

  Raises:
    InputError: another run holds it.
  """
  handle = os.open(folder, os.O_RDONLY)
  release = weakref.finalize(output, os.close, handle)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    release()
    raise InputError(
        f'--output_dir={folder}: another run is at work there; wait for its end'
        ' or choose another folder'
    ) from None
  except OSError:  # a file system without locks
    pass
  return release


def make_folder(path: str) -> pathlib.Path:
  """Makes an output folder, if it is not there.

  Args:
    path: the folder.

  Returns:
    The folder, which exists and is writable.

  Raises:
    InputError: it cannot be written.
  """
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    raise InputError(
        f'--output_dir={path}: cannot be written ({e.strerror}); choose'
        ' another folder'
    ) from None
  return folder


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """The command of an interrupted run, if there was one."""
  try:
    found = io.read_json(path)
  except InputError:
    return None
  return found if isinstance(found, dict) else None
