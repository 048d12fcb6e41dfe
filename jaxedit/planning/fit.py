"""Sums the stages of a run up: what a device and the host must hold, and for how
long; whether that fits, and what would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jaxedit.planning.stages import Stage

_GIB = 2**30
# Of a process beside its arrays: tokenizer, modules imported late, and loaded
# programs. Measured with a tiny model (BENCHMARKS.md, "Dry runs").
PROCESS_BYTES = 350 * 2**20
# How often slots are halved in search of a number that fits.
_HALVINGS = 12


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run takes.

  Attributes:
    stages: in the order of the run.
    weights: bytes of the weights a device.
    shared: whether the device's memory is the host's.
    devices: over which the work is divided.
  """

  stages: tuple[Stage, ...]
  weights: float
  shared: bool
  devices: int = 1

  @property
  def device(self) -> list[float]:
    """Peak bytes of a device, by stage."""
    return [self.weights + stage.device for stage in self.stages]

  @property
  def host(self) -> list[float]:
    """Peak bytes of the host, by stage: after imports, as `PROCESS_BYTES`."""
    found, kept = [], float(PROCESS_BYTES)
    for stage, device in zip(self.stages, self.device):
      found.append(
          kept + stage.host + (device * self.devices if self.shared else 0)
      )
      kept += stage.kept
    return found


@dataclasses.dataclass(frozen=True)
class Limits:
  """Memory that there is.

  Attributes:
    device: bytes of a device, or None if it is not known.
    host: bytes of the host, or None.
  """

  device: float | None
  host: float | None


def table(plan: Plan, rates: Mapping[str, float]) -> list[str]:
  """Writes a plan as lines.

  Args:
    plan: of a run.
    rates: as of `machine.rates`.
  """
  rows = [
      (
          'stage',
          'TFLOP',
          'GB read',
          'GB sent',
          'device',
          'host',
          'seconds',
          'what',
      )
  ]
  count = 1 if plan.shared else plan.devices
  seconds = [stage.seconds(rates) / count for stage in plan.stages]
  for stage, device, host, time in zip(
      plan.stages, plan.device, plan.host, seconds
  ):
    rows.append(
        (
            stage.name,
            _short(sum(stage.flops.values()) / 1e12),
            _short(stage.moved / 1e9),
            _short(stage.collective / 1e9),
            _short(device / _GIB),
            _short(host / _GIB),
            _short(time),
            stage.what,
        )
    )
  flops = sum(sum(stage.flops.values()) for stage in plan.stages)
  rows.append(
      (
          'total',
          _short(flops / 1e12),
          _short(sum(stage.moved for stage in plan.stages) / 1e9),
          _short(sum(stage.collective for stage in plan.stages) / 1e9),
          _short(max(plan.device) / _GIB),
          _short(max(plan.host) / _GIB),
          _short(sum(seconds)),
          '',
      )
  )
  widths = [max(len(row[i]) for row in rows) for i in range(7)]
  lines = []
  for row in rows:
    name, *numbers = (
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths))
    )
    lines.append('  '.join((name, *numbers, row[7])).rstrip())
  return lines


def notes(plan: Plan, rates: Mapping[str, float]) -> list[str]:
  """Says what the numbers of `table` mean."""
  ceiling = ', '.join(
      f'{name} {rate / 1e9:,.0f} GFLOP/s'
      for name, rate in rates.items()
      if name != 'memory'
  )
  checked = [
      f'{stage.name} {stage.checked:.2f}'
      for stage in plan.stages
      if stage.checked
  ]
  lines = [
      'device and host: peak GiB'
      + (', the same memory' if plan.shared else '')
      + '; host counts what comes after imports. Targets take all of their'
      ' steps and texts their full length: seconds are an upper estimate.',
      f'ceiling: {ceiling}, memory {rates["memory"] / 1e9:,.1f} GB/s',
  ]
  if checked:
    lines.append(
        'FLOPs of one step and two layers, the compiler over the sum by hand: '
        + ', '.join(checked)
    )
  return lines


def misfits(plan: Plan, limits: Limits) -> list[str]:
  """Says what does not fit, in messages without advice."""
  found = []
  names = [stage.name for stage in plan.stages]
  for what, needs, limit in (
      ('a device', plan.device, limits.device),
      ('the host', plan.host, limits.host),
  ):
    if what == 'a device' and plan.shared:
      continue
    if limit is not None and max(needs) > limit:
      most = max(range(len(needs)), key=needs.__getitem__)
      found.append(
          f'stage {names[most]} needs {_short(needs[most] / _GIB)} GiB of'
          f' {what}, which has {_short(limit / _GIB)}'
      )
  return found


def advice(
    fits: Callable[..., bool], *, slots: int | None, narrow: bool, devices: int
) -> str:
  """Says what would fit.

  Args:
    fits: (slots, narrow, devices) -> whether a run would fit with so many slots,
      bfloat16 weights, and weights divided over so many devices.
    slots: of the run; None where it has none.
    narrow: whether its weights are bfloat16 already.
    devices: that its weights are divided over.

  Returns:
    The first that fits of: fewer slots, bfloat16, more devices, all of them.
  """
  fewer = (
      [slots >> i for i in range(1, _HALVINGS) if slots >> i] if slots else []
  )
  more = [devices << i for i in range(1, 9)]
  found = []
  for count in fewer:
    if fits(slots=count, narrow=narrow, devices=devices):
      found.append(f'--slots={count}')
      break
  if not narrow and fits(slots=slots, narrow=True, devices=devices):
    found.append('--dtype=bfloat16')
  for count in more:
    if fits(slots=slots, narrow=narrow, devices=count):
      found.append(f'--mesh=fsdp:{count}')
      break
  if found:
    return 'what would fit: ' + ', or '.join(found)
  for count in more:
    for some in (slots, *fewer[-1:]):
      if fits(slots=some, narrow=True, devices=count):
        slot = f' --slots={some}' if some and some != slots else ''
        return f'what would fit: --dtype=bfloat16 --mesh=fsdp:{count}{slot}'
  return 'give smaller batches (--batch_size), or more memory'


def _short(number: float) -> str:
  """Three digits."""
  if not number:
    return '-'
  if number >= 100:
    return f'{number:,.0f}'
  return f'{number:.3g}'
