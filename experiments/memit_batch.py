"""Edits facts with MEMIT, or another method, and measures what it did.

  python -m experiments.memit_batch \
    --flagfile=experiments/flagfiles/quickstart.flags

`experiments.edit` with the settings for facts; see there for what it writes.
"""

from __future__ import annotations

from absl import flags

from experiments import edit
from jaxedit.runs import cli


def define_flags() -> None:
  """Defines this program's flags."""
  edit.define_flags('fact')
  flags.adopt_module_key_flags(edit)


def main() -> None:
  edit.main('fact')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
