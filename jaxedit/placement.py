"""Where a model runs: a mesh of devices, and how arrays lie on it.

Everything whose size depends on the devices (token budgets, tables, what is kept
on the host) asks the model's placement, before a program is traced. Inside
traced code nothing asks: where two platforms need different operations,
`jax.lax.platform_dependent` chooses when the program is lowered. This is the
only module that asks JAX for its devices.

Not here: more than one device. The mesh has the axes of edits, of weights at
rest and of tensor parallelism, each of size 1, and there are no rules yet.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

# Axes of a mesh: edits side by side, weights at rest, tensor parallelism.
AXES = ('data', 'fsdp', 'tensor')


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh of devices and the sharding of parameters on it.

  Attributes:
    mesh: the devices, with the axes `AXES`.
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
    """What the first device tells of its memory, bytes; empty on a CPU."""
    return self.devices[0].memory_stats() or {}

  @property
  def budget_bytes(self) -> int | None:
    """Memory of a device that is free now, bytes; None where it is unknown."""
    if 'bytes_limit' in self.memory:
      return self.memory['bytes_limit'] - self.memory['bytes_in_use']
    if self.accelerated:
      return None
    try:
      return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):
      return None


def one_device(device: Any = None) -> Placement:
  """Places a model on one device.

  Args:
    device: a device; JAX's first one unless given.

  Returns:
    The placement.
  """
  device = jax.local_devices()[0] if device is None else device
  return Placement(Mesh(np.array(device).reshape((1,) * len(AXES)), AXES))


def device_names() -> str:
  """Names the devices that JAX sees, e.g. '1 x cpu'."""
  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'
