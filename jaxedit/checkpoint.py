"""Checkpoints of long stages, in Orbax's format: the one mechanism of resuming.

A stage saves arrays and a JSON record after each step; a run that repeats the
command restores the newest step and goes on from there.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

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

    # Orbax has no form for arrays without elements, nor for an empty tree.
    full = {k: v for k, v in arrays.items() if v.size}
    empty = {
        k: [str(v.dtype), list(v.shape)]
        for k, v in arrays.items()
        if not v.size
    }
    tree = {'arrays': full, 'step': np.asarray(step)}
    try:
      with self._manager(ocp) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave(
                    {'record': dict(record), 'empty': empty}
                ),
            ),
        )
    except OSError as e:
      raise InputError(
          f'{self._folder}: the checkpoint cannot be written ({e}); make room'
          ' there or name another folder'
      ) from e

  def restore(self) -> tuple[int, dict[str, np.ndarray], Any] | None:
    """Reads the newest step.

    Returns:
      (step, arrays, record), or None where there is none.

    Raises:
      InputError: it cannot be read.
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
                arrays=ocp.args.StandardRestore(),
                record=ocp.args.JsonRestore(),
            ),
        )
    except (OSError, ValueError, KeyError) as e:
      raise InputError(
          f'{self._folder}: the checkpoint cannot be read ({e}); delete it'
      ) from e
    read = found['arrays'].get('arrays', {})
    arrays = {name: np.asarray(array) for name, array in read.items()}
    for name, (dtype, shape) in found['record']['empty'].items():
      arrays[name] = np.zeros(shape, dtype)
    return step, arrays, found['record']['record']

  def clear(self) -> None:
    """Removes the checkpoint."""
    shutil.rmtree(self._folder, ignore_errors=True)

  def _manager(self, ocp: Any) -> Any:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(1),
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(self._folder, options=options)
