"""Runs a program and tells its peak memory, that of imports taken off.

  python -m experiments.benchmark.peak memit_batch \
    --flagfile=experiments/flagfiles/quickstart.flags --overwrite

The peak is VmHWM of Linux at the end less VmRSS after the program's imports and
JAX's start: what `--dry_run` predicts as the host's peak.
"""

from __future__ import annotations

import atexit
import sys

from experiments import anyedit_batch, collect_moments, edit, memit_batch
from jaxedit.placement import device_names
from jaxedit.runs import cli

_PROGRAMS = {
    'anyedit_batch': anyedit_batch,
    'collect_moments': collect_moments,
    'edit': edit,
    'memit_batch': memit_batch,
}


def status(name: str) -> float:
  """An entry of /proc/self/status, GiB."""
  with open('/proc/self/status', encoding='ascii') as lines:
    (line,) = (line for line in lines if line.startswith(f'{name}:'))
  return int(line.split()[1]) / 2**20


def main() -> None:
  name = sys.argv.pop(1) if len(sys.argv) > 1 else ''
  if name not in _PROGRAMS:
    sys.exit(f'name a program, then its flags: {", ".join(_PROGRAMS)}')
  program = _PROGRAMS[name]
  device_names()  # starts JAX
  base = status('VmRSS')

  def report() -> None:
    peak = status('VmHWM') - base
    print(f'peak {peak:.3f} GiB beside {base:.3f} after imports')

  atexit.register(report)
  program.define_flags()
  cli.run(program.main)


if __name__ == '__main__':
  main()
