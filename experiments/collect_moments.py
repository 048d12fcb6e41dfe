"""Collects second moments of a model's keys, what closed-form editors need.

  python -m experiments.collect_moments --model=smollm2-135m-instruct \
    --layers=4,5,6,7,8 --corpus=self --out=moments.safetensors

Interrupted, it resumes: sampled text is kept beside the output in `<out>.texts`
and partial sums in `<out>.partial` until the output is there.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

from absl import flags

from jaxedit.convert import hub
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.runs import cli, dry_run, setting_flags
from jaxedit.runs.config import RunConfig
from jaxedit.runs.moments import MomentsConfig, collect
from jaxedit.types import InputError


def define_flags() -> None:
  """Defines this program's flags."""
  cli.define(RunConfig, names=(*cli.MODEL_FIELDS, 'dry_run'))
  cli.define(MomentsConfig)
  flags.DEFINE_list('layers', None, 'Layers to collect, e.g. 4,5,6,7,8.')
  flags.DEFINE_string('out', None, 'File to write (safetensors).')
  flags.adopt_module_key_flags(cli)


def config_from_flags() -> MomentsConfig:
  """Builds the config; every unusable flag is told at once."""
  given = flags.FLAGS
  named = given.out or given.dry_run
  problems = [] if named else ['--out: name the file to write']
  with InputError.collected(problems):
    layers = setting_flags.entries(given.layers, 'layers')
  InputError.raise_for(problems)
  config = cli.read(MomentsConfig)
  return dataclasses.replace(
      config, layers=layers, out=pathlib.Path(given.out or '')
  )


def main() -> None:
  config, bar = config_from_flags(), cli.progress_bar
  if flags.FLAGS.dry_run:
    print('\n'.join(dry_run.collecting(cli.read(RunConfig), config)))
    return
  cli.use_compilation_cache(flags.FLAGS.compilation_cache)
  folder = hub.resolve(
      flags.FLAGS.model,
      wheel=flags.FLAGS.wheel,
      revision=flags.FLAGS.revision,
      progress=bar,
  )
  model = loading.load_model(
      folder, flags.FLAGS.dtype, progress=bar, mesh=flags.FLAGS.mesh
  )
  report = collect(config, model, tokenizer_lib.load_tokenizer(folder), bar)
  for warning in report.warnings():
    print(f'warning: {warning}', file=sys.stderr)
  print(report.line())


if __name__ == '__main__':
  define_flags()
  cli.run(main)
