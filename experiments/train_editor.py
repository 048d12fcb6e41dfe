"""Trains an editor (MEND, KE, SERAC) for one model, on facts.

  python -m experiments.train_editor --method=mend --data=facts.jsonl \
    --exclude=to_judge.jsonl --out=editors/mend
  python -m experiments.edit --method=mend --editor=editors/mend \
    --data=to_judge.jsonl --output_dir=runs/mend

In --out:

  editor.safetensors   the trained editor, and what it was trained on
  training.json        settings, versions, held-out scores along the way

Interrupted runs resume: repeat the same command.
"""

from __future__ import annotations

import dataclasses

from absl import flags

from jaxedit.runs import cli, training, training_flags
from jaxedit.runs.config import RunConfig
from jaxedit.runs.training import TrainConfig
from jaxedit.types import InputError

_MODEL_FIELDS = (*cli.MODEL_FIELDS, 'encoder')


def define_flags() -> None:
  """Defines this program's flags."""
  cli.define(RunConfig, names=_MODEL_FIELDS)
  cli.define(TrainConfig)
  flags.DEFINE_alias('out', 'output_dir')
  training_flags.define_flags()
  for module in (cli, training_flags):
    flags.adopt_module_key_flags(module)


def main() -> None:
  config = cli.read(TrainConfig)
  model = dataclasses.replace(
      RunConfig(), **{n: flags.FLAGS[n].value for n in _MODEL_FIELDS}
  )
  problems = training.errors(config)
  try:
    method, settings = training_flags.from_flags()
  except InputError as e:
    problems += e.problems
  InputError.raise_for(problems)
  command = {k: v for k, v in cli.given().items() if k != 'out'}
  lines = training.run(
      config,
      model,
      method,
      settings,
      command=command,
      progress=cli.progress_bar,
  )
  print('\n'.join(lines))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
