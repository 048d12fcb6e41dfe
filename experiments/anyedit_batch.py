"""Writes long answers into a model, chunk by chunk, and measures what it says.

  python -m experiments.anyedit_batch \
    --flagfile=experiments/flagfiles/anyedit_demo.flags

`experiments.edit` with the settings for long answers: AnyEdit on any closed form
or on UnKE; with --noanyedit the same method with one target for the whole answer.
Every record is edited alone on the unedited model (the published protocol), unless
--noreset asks for a sequence of batches.
"""

from __future__ import annotations

from absl import flags

from experiments import edit
from jaxedit.runs import cli


def define_flags() -> None:
  """Defines this program's flags."""
  edit.define_flags('text', batch_size=1, reset=True)
  flags.adopt_module_key_flags(edit)


def main() -> None:
  edit.main('text')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
