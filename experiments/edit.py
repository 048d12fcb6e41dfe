"""Edits a model by any method, on facts or long answers, and measures what it did.

  python -m experiments.edit --method=memit --data=facts.jsonl --output_dir=runs/x

--data decides what is edited: facts (CounterFact, zsRE, our own) or long answers
(UnKEBench, AKEW, EditEverything, our own). In --output_dir:

  delta.safetensors   the edit, or with --reset all of them side by side;
                      deltas/ instead where they are too large to be held
  results.json        metrics, protocol, versions, seconds by stage
  records.jsonl       one line a record: before, after, loss, steps
  templates.json      the context templates that were used, of facts
  moments.safetensors the second moments, if they were collected
  model/              with --save_model, the edited model, a Hugging Face folder

Interrupted runs resume: repeat the same command. With --suggest_radius nothing is
edited: a radius is proposed from the data, for methods that have one.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags

from jaxedit.eval import datasets
from jaxedit.runs import cli, dry_run, method_flags, proposals, session
from jaxedit.runs.config import RunConfig
from jaxedit.types import InputError

KINDS = ('auto', 'fact', 'text')


def define_flags(kind: str = 'any', **defaults: Any) -> None:
  """Defines the flags of an editing program.

  Args:
    kind: 'fact', 'text' or 'any', what it edits.
    **defaults: its own defaults.
  """
  cli.define(RunConfig, kind, **defaults)
  method_flags.define_flags(kind)
  proposals.define_flags()
  if kind == 'any':
    flags.DEFINE_enum(
        'kind',
        'auto',
        KINDS,
        'What --data holds: facts, or long answers to questions; auto tells by'
        ' its fields.',
    )
  for module in (cli, method_flags, proposals):
    flags.adopt_module_key_flags(module)


def main(kind: str = 'auto') -> None:
  """Does the run that flags describe.

  Args:
    kind: what is edited; 'auto' asks the flag, or else the data.
  """
  config = cli.read(RunConfig)
  problems, wanted = [], None
  if kind == 'auto':
    kind = flags.FLAGS.kind
  if kind == 'auto':
    kind = datasets.kind_of(config.data)
  try:
    chosen = method_flags.from_flags(kind)
    wanted = proposals.asked(chosen, kind)
  except InputError as e:
    problems += e.problems
  problems += session.errors(config)
  InputError.raise_for(problems)
  given = dict(command=cli.given(), progress=cli.progress_bar)
  if config.dry_run:
    lines = dry_run.editing(config, chosen, kind)
  elif wanted:
    program = getattr(sys.modules['__main__'].__spec__, 'name', __name__)
    lines = proposals.run(
        config, chosen, kind, wanted, program=program, **given
    )
  else:
    lines = session.run(config, chosen, kind, **given)
  print('\n'.join(lines))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
