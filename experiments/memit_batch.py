"""Edits facts with MEMIT, or another method, and measures what it did.

  python -m experiments.memit_batch \
    --flagfile=experiments/flagfiles/quickstart.flags

`experiments.edit` with the settings for facts; see there for what it writes.
"""

from __future__ import annotations

import functools

from experiments import edit
from jaxedit.runs import cli

define_flags = functools.partial(edit.define_flags, 'fact')
main = functools.partial(edit.main, 'fact')

if __name__ == '__main__':
  define_flags()
  cli.run(main)
