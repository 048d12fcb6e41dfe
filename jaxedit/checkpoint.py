"""Checkpoints of long stages, in Orbax's format: the one mechanism of resuming.

A stage saves arrays and a JSON record after each step; a run that repeats the
command restores the newest step and goes on from there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxedit import hosts, io
from jaxedit.placement import fetch
from jaxedit.types import InputError


class Checkpoint:
  """The newest step of one stage, in a folder.

  Only what is complete is ever restored: Orbax writes a step under another name
  and renames it.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Opens a folder, which need not exist.

    Args:
      folder: where the checkpoint lies.
    """
    self._folder = pathlib.Path(folder).absolute()

  def save(
      self,
      step: int,
      arrays: Mapping[str, jax.Array | np.ndarray],
      record: Mapping[str, Any],
  ) -> None:
    """Saves a step and removes older ones.

    Args:
      step: number of the step, counted up.
      arrays: name -> array.
      record: plain JSON types.

    Raises:
      InputError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    # As numpy arrays, so that any number of devices can restore them. Orbax has
    # no form for arrays without elements, nor for an empty tree.
    full = {k: fetch(v) for k, v in arrays.items() if v.size}
    empty = {
        k: [str(v.dtype), list(v.shape)]
        for k, v in arrays.items()
        if not v.size
    }
    tree = {'arrays': full, 'step': np.asarray(step)}
    said = {'record': dict(record), 'empty': empty, 'crc32': _sums(full)}
    said['record_crc32'] = _sum(said)
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      with _quiet(), self._manager(ocp) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave(said),
            ),
        )
    except (OSError, ValueError) as e:
      raise InputError(
          f'{self._folder}: the checkpoint cannot be written ({_reason(e)});'
          ' make room there or name another folder, and repeat the command'
      ) from e

  def restore(self) -> tuple[int, dict[str, np.ndarray], Any] | None:
    """Reads the newest step.

    Returns:
      (step, arrays, record), or None where there is none.

    Raises:
      InputError: it cannot be read, or is not what was saved. Steps of earlier
        versions have no checksums.
    """
    if not self._folder.is_dir():
      return None
    import orbax.checkpoint as ocp

    try:
      with self._manager(ocp) as manager:
        step = manager.latest_step()
        if step is None:
          return None
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore()
            ),
        )
      read, said = found['arrays'].get('arrays', {}), found['record']
      arrays = {name: np.asarray(array) for name, array in read.items()}
      if 'record_crc32' in said and (
          said.pop('record_crc32') != _sum(said)
          or said['crc32'] != _sums(arrays)
      ):
        raise ValueError('its checksums are others')
      for name, (dtype, shape) in said['empty'].items():
        arrays[name] = np.zeros(shape, dtype)
      return step, arrays, said['record']
    except (
        Exception
    ) as e:  # what Orbax raises on damaged files is not specified
      reason = ' '.join(str(e).split()) or type(e).__name__
      raise InputError(
          f'{self._folder}: the checkpoint cannot be read ({reason[:300]});'
          ' delete it'
      ) from e

  def clear(self) -> None:
    """Removes the checkpoint."""
    shutil.rmtree(self._folder, ignore_errors=True)

  def _manager(self, ocp: Any) -> Any:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(1),
        enable_async_checkpointing=False,
        create=False,
        multiprocessing_options=_alone(ocp),
    )
    return ocp.CheckpointManager(self._folder, options=options)


def _alone(ocp: Any) -> Any:
  """Makes every process save its own checkpoint, and wait for none."""
  number = hosts.number()
  return ocp.options.MultiprocessingOptions(
      primary_host=number,
      active_processes={number} if hosts.count() > 1 else None,
      barrier_sync_key_prefix=f'process{number}' if hosts.count() > 1 else None,
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Prints nothing of errors: Orbax raises those of its threads once more."""
  log = logging.getLogger('absl')
  level, hooks = log.level, (threading.excepthook, sys.unraisablehook)
  log.setLevel(logging.CRITICAL + 1)
  threading.excepthook = sys.unraisablehook = lambda args: None
  try:
    yield
  except BaseException:
    for one in threading.enumerate():  # an error may be on its way to the hook
      if type(one).__module__.startswith('orbax.'):
        one.join(10)
    gc.collect()  # event loops that were closed too early
    raise
  finally:
    log.setLevel(level)
    threading.excepthook, sys.unraisablehook = hooks


def _reason(error: OSError | ValueError) -> str:
  """Says what the system has refused; raises an error that is another one's.

  Tensorstore, which Orbax writes with, raises ValueError for those of the system.
  """
  found = re.search(r"os_error_code='(\d+)'", str(error))
  if not found and not isinstance(error, OSError):
    raise error
  return os.strerror(int(found[1])) if found else error.strerror or str(error)


def _sums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
  """CRC-32 of every array."""
  return {
      name: zlib.crc32(io.tensor_bytes(np.asarray(array)))
      for name, array in arrays.items()
  }


def _sum(said: Mapping[str, Any]) -> int:
  """CRC-32 of a record, whose keys become texts in a file."""
  text = json.dumps(json.loads(json.dumps(said)), sort_keys=True)
  return zlib.crc32(text.encode())
