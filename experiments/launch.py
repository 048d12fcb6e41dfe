"""Runs a program as several processes on this machine, joined by JAX.

  python -m experiments.launch --processes=2 -- experiments.edit --data=x.jsonl ...

For machines with several CPUs, and to try on one machine what a cluster runs;
one process is enough for all GPUs of a machine. On a cluster its own launcher
starts the processes (BUILD.md, "Many hosts").
"""

from __future__ import annotations

import sys

from absl import app, flags

from jaxedit.runs import cli, launcher

_PROCESSES = flags.DEFINE_integer(
    'processes', 2, 'How many processes.', lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    'devices',
    None,
    'CPU devices of each process, made by force; what JAX sees unless given.',
    lower_bound=1,
)


def main(arguments: list[str]) -> None:
  command = arguments[1:]
  if not command:
    print(
        'error: name the program after --, e.g. -- experiments.edit --data=x',
        file=sys.stderr,
    )
    sys.exit(2)
  if not command[0].endswith('.py') and '/' not in command[0]:
    command = ['-m', *command]
  sys.exit(
      launcher.launch(
          [sys.executable, *command],
          _PROCESSES.value,
          devices=_DEVICES.value,
          heartbeat_seconds=flags.FLAGS.heartbeat_seconds,
      )
  )


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parse)
