"""Several processes that run one program together, each with its own devices.

Every process runs the same command and comes to the same decisions, as what they
depend on is either the same everywhere or agreed on (`gather`). The first
process writes results and speaks to the user; the others write into folders of
their own, which end with them (`runs.output`).

The processes are JAX's (`jax.distributed`): its coordination service runs in the
first one, and ends all others when one stops answering.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxedit.types import InputError

# Environment variables that say how many processes a launcher has started.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
_MOST_BYTES = 1024  # of a value that is gathered


@dataclasses.dataclass(frozen=True)
class Group:
  """Which processes run together.

  Attributes:
    distributed: True asks JAX to find the others (Slurm, Open MPI, Kubernetes,
      Cloud TPU), False means that there are none, None asks the environment
      whether a launcher has started several.
    coordinator: host:port of the first process, where nobody can find it.
    num_processes: with a coordinator, how many they are.
    process_id: with a coordinator, the number of this one, from 0.
    heartbeat_seconds: a process that has not answered for so long is lost.
  """

  distributed: bool | None = None
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat_seconds: int = 100

  def errors(self) -> list[str]:
    """Finds settings that do not go together."""
    given = (self.coordinator, self.num_processes, self.process_id)
    if all(x is None for x in given):
      return []
    if any(x is None for x in given):
      return [
          '--coordinator, --num_processes and --process_id go together; give all'
          ' three, or none where a launcher knows them'
      ]
    problems = []
    if self.process_id >= self.num_processes:
      problems.append(
          f'--process_id={self.process_id}: {self.num_processes} processes have'
          f' numbers 0 to {self.num_processes - 1}'
      )
    host, _, port = self.coordinator.rpartition(':')
    if not host or not port.isdecimal():
      problems.append(f'--coordinator={self.coordinator}: give host:port')
    if self.distributed is False:
      problems.append('--nodistributed and --coordinator exclude each other')
    return problems


def launched(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether a launcher has started several processes of this program.

  Args:
    environment: environment variables.

  Returns:
    True for a step of Slurm or a run of Open MPI with more than one process, for
    an indexed job of Kubernetes that names its coordinator, and for several
    hosts of a Cloud TPU. A TPU pod whose processes are started over ssh tells
    nothing here: `Group.distributed` asks JAX.
  """
  counts = [environment.get(name, '') for name in _COUNTS]
  if any(x.isdecimal() and int(x) > 1 for x in counts):
    return True
  if ',' in environment.get('TPU_WORKER_HOSTNAMES', ''):
    return True
  kubernetes = ('KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX')
  return all(name in environment for name in kubernetes)


def join(group: Group) -> None:
  """Joins the other processes; before anything asks JAX for its devices.

  Args:
    group: which they are.

  Raises:
    InputError: settings that do not go together, or the others are not found.
  """
  if problems := group.errors():
    raise InputError(*problems)
  wanted = group.distributed
  if wanted is None:
    wanted = group.coordinator is not None or launched()
  if not wanted or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(
        group.coordinator,
        group.num_processes,
        group.process_id,
        heartbeat_timeout_seconds=group.heartbeat_seconds,
    )
  except (ValueError, RuntimeError) as e:
    reason = ' '.join(str(e).split())[:300]
    raise InputError(
        f'the other processes cannot be joined ({reason}); give --coordinator,'
        ' --num_processes and --process_id, or --nodistributed for a process'
        ' alone'
    ) from e


def count() -> int:
  """How many processes run together."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def number() -> int:
  """The number of this process, from 0."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def gather(value: Any) -> list[Any]:
  """Collects a value of every process; all must call, in the same order.

  Args:
    value: plain JSON types, at most 1,024 bytes as text.

  Returns:
    The values in the order of processes.

  Raises:
    ValueError: it is too long.
  """
  if count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  text = json.dumps(value).encode()
  if len(text) > _MOST_BYTES:
    raise ValueError(f'{len(text)} bytes are too many to gather')
  mine = np.frombuffer(text.ljust(_MOST_BYTES), np.uint8)
  rows = multihost_utils.process_allgather(mine)
  return [json.loads(bytes(row.astype(np.uint8))) for row in rows]


def own(path: str) -> str:
  """Where this process writes what the first one writes to a path.

  Args:
    path: of a file or a folder.

  Returns:
    The path itself in the first process; in others a path of the same name in a
    temporary folder that ends with the process.
  """
  if number() == 0:
    return path
  mine = str(pathlib.Path(_scratch(), _hash(path), pathlib.Path(path).name))
  _originals[mine] = path
  return mine


def follow(path: str, present: bool = True) -> None:
  """Copies the files of the first process to all others; all must call.

  Args:
    path: a folder, as `own` names it.
    present: in the first process, whether there is something to copy.

  Raises:
    InputError: another process does not see these files.
  """
  if count() == 1:
    return
  original, first = _originals.get(path, path), number() == 0
  wanted = gather(_listing(original) if first and present else '')[0]
  same = first or not wanted or _listing(original) == wanted
  if wanted and same and not first and os.path.isdir(original):
    shutil.copytree(original, path, dirs_exist_ok=True)
  if not all(gather(same)):
    raise InputError(
        f'{original}: not every process sees the files that the first one sees'
        ' there; name a folder that all hosts share'
    )


_originals: dict[str, str] = {}  # what `own` has named -> what it was named for


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listing(path: str) -> str:
  """Names all files under a folder and their sizes, in short."""
  root = pathlib.Path(path)
  files = sorted(x for x in root.rglob('*') if x.is_file())
  return _hash(
      str([(str(x.relative_to(root)), x.stat().st_size) for x in files])
  )


@functools.cache
def _scratch() -> str:
  """A folder of this process alone, removed at its end."""
  folder = tempfile.mkdtemp(prefix=f'jaxedit-process-{number()}-')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def leave(code: int) -> None:
  """Ends this process at once where others run with it and it has failed.

  A process that ends in the usual way waits for the others, which may wait for
  it.

  Args:
    code: exit code; 0 does nothing.
  """
  if not code or count() == 1:
    return
  if _scratch.cache_info().currsize:
    shutil.rmtree(_scratch(), ignore_errors=True)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
