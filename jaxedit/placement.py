"""Where a model runs: a mesh of devices, and how arrays lie on it.

A mesh has three axes. Sequences and slots of a batch are divided over `data` and
`fsdp`, matrices over `fsdp` (at rest: a device gathers a layer's when it runs it)
and `tensor` (columns of the maps into a block, rows of those out of it). An axis
whose size does not divide a dimension of a weight moves to the first free
dimension that it divides, but never to that of layers; where there is none, the
weight lies whole along the axis. A batch that an axis does not divide is computed
by every device of the axis.

Everything whose size depends on the devices (token budgets, tables, what is kept
on the host) asks the model's placement, before a program is traced. Inside
traced code nothing asks: where two platforms need different operations,
`jax.lax.platform_dependent` chooses when the program is lowered, and the mesh is
that of the weights. This is the only module that asks JAX for its devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxedit import hosts
from jaxedit.types import Array, InputError

# Axes of a mesh: edits side by side, weights at rest, tensor parallelism.
AXES = ('data', 'fsdp', 'tensor')
# Over which batches are divided.
BATCH_AXES = ('data', 'fsdp')
# Share of a device's memory that a copy of the weights may take.
_COPY_SHARE = 0.5

_COLUMNS = PartitionSpec(None, 'fsdp', 'tensor')
_ROWS = PartitionSpec(None, 'tensor', 'fsdp')
_VECTOR = PartitionSpec(None, 'tensor')
# Wanted partitions by canonical name (`models.spec.param_shapes`); the rest,
# norms and biases of outputs, lies whole on every device.
RULES: Mapping[str, PartitionSpec] = types.MappingProxyType({
    'embed/embedding': PartitionSpec('tensor', 'fsdp'),
    'embed/position': PartitionSpec(None, 'fsdp'),
    **{f'layers/attn/{x}/kernel': _COLUMNS for x in 'qkv'},
    **{f'layers/attn/{x}/bias': _VECTOR for x in 'qkv'},
    'layers/attn/out/kernel': _ROWS,
    **{f'layers/cross/{x}/kernel': _COLUMNS for x in 'qkv'},
    'layers/cross/out/kernel': _ROWS,
    **{f'layers/mlp/{x}/kernel': _COLUMNS for x in ('gate', 'up')},
    **{f'layers/mlp/{x}/bias': _VECTOR for x in ('gate', 'up')},
    'layers/mlp/down/kernel': _ROWS,
    'head/kernel': PartitionSpec('fsdp', 'tensor'),
    'head/bias': PartitionSpec('tensor'),
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh of devices and the sharding of parameters on it.

  Attributes:
    mesh: the devices; its axes are some of `AXES`, automatic.
    rules: PartitionSpec of a parameter by its canonical name; one without a
      rule lies whole on every device.
  """

  mesh: Mesh
  rules: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)

  @property
  def devices(self) -> tuple[jax.Device, ...]:
    """The devices, at least one."""
    return tuple(self.mesh.devices.flat)

  @property
  def platform(self) -> str:
    """The devices' platform: 'cpu', 'gpu' or 'tpu'."""
    return self.devices[0].platform

  @property
  def accelerated(self) -> bool:
    """Whether the devices have memory of their own, apart from the host's."""
    return self.platform != 'cpu'

  @property
  def memory(self) -> Mapping[str, int]:
    """What this process's first device tells of its memory, bytes; empty on a
    CPU.
    """
    return self.mesh.local_devices[0].memory_stats() or {}

  @property
  def budget_bytes(self) -> int | None:
    """Memory of a device that is free now, bytes; None where it is unknown.

    Devices that are parts of one CPU share its memory evenly. Of several
    processes it is the least.
    """
    known = [x for x in hosts.gather(self._free_bytes()) if x is not None]
    return min(known, default=None)

  def _free_bytes(self) -> int | None:
    """What this process knows of `budget_bytes`."""
    if 'bytes_limit' in self.memory:
      return self.memory['bytes_limit'] - self.memory['bytes_in_use']
    if self.accelerated:
      return None
    try:
      free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
      return free // len(self.devices)
    except (AttributeError, ValueError, OSError):
      return None

  @property
  def several(self) -> bool:
    """Whether there is more than one device."""
    return len(self.devices) > 1

  @property
  def batch_shards(self) -> int:
    """Over how many devices a batch is divided."""
    return math.prod(self.mesh.shape.get(axis, 1) for axis in BATCH_AXES)

  def full(self, count: int) -> int:
    """A count of sequences, rounded up so that no device has fewer."""
    return -(-count // self.batch_shards) * self.batch_shards

  def active(self) -> contextlib.AbstractContextManager[Any]:
    """A context in which the mesh of a caller (`jax.set_mesh`), whose axes may be
    explicit, gives way to this one.
    """
    if jax.sharding.get_abstract_mesh().empty:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  @property
  def label(self) -> str:
    """The axes as `parse_mesh` reads them, e.g. 'data:4,tensor:2'."""
    sizes = self.mesh.shape.items()
    wide = [f'{axis}:{size}' for axis, size in sizes if size > 1]
    return ','.join(wide) or 'data:1'

  def partition(
      self, path: str, shape: Sequence[int], unit: int = 1
  ) -> PartitionSpec:
    """Fits the rule of a parameter to its shape; see the module.

    Args:
      path: its canonical name.
      shape: its shape.
      unit: what stays together along the dimension that `tensor` divides: the
        size of a head.

    Returns:
      Its partition; axes of size 1 are left out.
    """
    wanted = tuple(self.rules.get(path, ()))
    wanted += (None,) * (len(shape) - len(wanted))
    free = range(1 if path.startswith('layers/') else 0, len(shape))
    found: list[str | None] = [None] * len(shape)
    moved = []
    for place, axis in enumerate(wanted):
      if axis is None or self.mesh.shape.get(axis, 1) == 1:
        continue
      whole = shape[place] // (unit if axis == 'tensor' else 1)
      if whole % self.mesh.shape[axis]:
        moved.append(axis)
      else:
        found[place] = axis
    for axis in moved:
      size = self.mesh.shape[axis]
      # A place that fits in units was taken above, so here it may not be cut.
      fits = [i for i in free if found[i] is None and not shape[i] % size]
      fits = [i for i in fits if wanted[i] != axis]
      if fits and len(shape) > 1:
        found[fits[0]] = axis
    return PartitionSpec(*found)

  def sharding(
      self, path: str, shape: Sequence[int], unit: int = 1
  ) -> NamedSharding:
    """The sharding of a parameter; see `partition`."""
    return NamedSharding(self.mesh, self.partition(path, shape, unit))

  def hashes(self, number: int) -> bool:
    """Whether this process reads and hashes the tensor of a number."""
    processes = sorted({device.process_index for device in self.devices})
    return processes[number % len(processes)] == jax.process_index()


def one_device(device: Any = None) -> Placement:
  """Places a model on one device.

  Args:
    device: a device; JAX's first one unless given.

  Returns:
    The placement.
  """
  device = jax.local_devices()[0] if device is None else device
  return Placement(Mesh(np.array(device).reshape((1,) * len(AXES)), AXES))


def parse_mesh(text: str) -> Mesh:
  """Makes a mesh of all devices of this process, or of all processes.

  Args:
    text: axes and their sizes, e.g. 'data:4,tensor:2'; others have size 1.

  Returns:
    A mesh with all of `AXES`, automatic.

  Raises:
    InputError: another spelling, an unknown axis, or sizes whose product is not
      the number of devices, of this process or of all.
  """
  sizes, problems = dict.fromkeys(AXES, 1), []
  usual = 'write axes and sizes, e.g. data:4,tensor:2'
  seen = set()
  for word in text.split(','):
    found = re.fullmatch(r'\s*(\w+):([1-9][0-9]{0,6})\s*', word)
    if found is None:
      problems.append(f'mesh {text!r}: {word!r} is no axis:size; {usual}')
    elif found[1] not in AXES:
      problems.append(
          f'mesh {text!r}: axis {found[1]!r} is unknown; known are'
          f' {", ".join(AXES)}'
      )
    elif found[1] in seen:
      problems.append(f'mesh {text!r}: axis {found[1]!r} stands twice; {usual}')
    else:
      seen.add(found[1])
      sizes[found[1]] = int(found[2])
  devices, wanted = jax.local_devices(), math.prod(sizes.values())
  if wanted == jax.device_count():
    devices = jax.devices()
  if not problems and wanted != len(devices):
    problems.append(
        f'mesh {text!r} is of {wanted} devices, but JAX sees'
        f' {len(devices)} ({devices[0].platform}): choose sizes whose product is'
        f' {len(devices)}'
    )
  if problems:
    raise InputError(*problems)
  return jax.make_mesh(
      tuple(sizes.values()),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices,
  )


def on_mesh(mesh: Mesh | str) -> Placement:
  """Places a model on a mesh, by the rules of this module.

  Args:
    mesh: see `parse_mesh`; or a caller's own, whose devices and axes are taken
      as they are. Explicit axes become automatic for the arrays of the model.

  Returns:
    The placement; of one device where the mesh has one.

  Raises:
    InputError: see `parse_mesh`; or the mesh has an axis of another name.
  """
  if isinstance(mesh, str):
    mesh = parse_mesh(mesh)
  other = [name for name in mesh.axis_names if name not in AXES]
  if other:
    raise InputError(
        f'the mesh has axes {", ".join(map(str, other))}; name them by their use'
        f' among {", ".join(AXES)}'
    )
  if mesh.size == 1:
    return one_device(mesh.devices.flat[0])
  automatic = (AxisType.Auto,) * len(mesh.axis_names)
  mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
  return Placement(mesh, RULES)


def default_placement(size: int) -> Placement:
  """Chooses a mesh of all devices, of all processes that run together.

  Args:
    size: bytes of the weights.

  Returns:
    All devices on `data` while a copy of the weights takes half of the memory of
    one at most, or where nobody knows; else all on `fsdp`.
  """
  count = jax.device_count()
  if count == 1:
    return one_device()
  found = on_mesh(f'data:{count}')
  free = found.budget_bytes
  if free is not None and size > _COPY_SHARE * free:
    return on_mesh(f'fsdp:{count}')
  return found


def place_by(mesh: Placement | Mesh | str | None, size: int = 0) -> Placement:
  """Chooses where a model goes.

  Args:
    mesh: a placement; or see `on_mesh`; or None for `default_placement`.
    size: bytes of the weights.

  Returns:
    The placement.

  Raises:
    InputError: see `on_mesh`.
  """
  if mesh is None:
    return default_placement(size)
  return mesh if isinstance(mesh, Placement) else on_mesh(mesh)


def join_parts(placement: Placement, parts: Sequence[bytes]) -> list[bytes]:
  """Joins strings of equal length, each made by one process and 0 elsewhere.

  Args:
    placement: whose processes have made them.
    parts: those of this process.

  Returns:
    The strings, in every process.
  """
  if len({device.process_index for device in placement.devices}) == 1:
    return list(parts)
  from jax.experimental import multihost_utils

  mine = np.stack([np.frombuffer(part, np.uint8) for part in parts])
  every = np.asarray(multihost_utils.process_allgather(mine))
  return [one.tobytes() for one in every.max(axis=0)]


def fetch(x: Array | np.ndarray, dtype: Any = None) -> np.ndarray:
  """Copies an array to the host, whole and in every process that has a part.

  Args:
    x: an array, on the host already or on devices.
    dtype: of the copy; the array's own unless given.

  Returns:
    The array.
  """
  if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
  ):
    from jax.experimental import multihost_utils

    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x, dtype)


def device_bytes(tree: Any) -> int:
  """Bytes that arrays, or their shapes, take on a device."""

  def count(x: Any) -> int:
    sharding, shape = getattr(x, 'sharding', None), x.shape
    shape = sharding.shard_shape(shape) if sharding is not None else shape
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(count, jax.tree.leaves(tree)))


def device_names() -> str:
  """Names the devices that JAX sees, e.g. '1 x cpu'."""
  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'
