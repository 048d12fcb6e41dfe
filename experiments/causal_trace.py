"""Finds where a model holds facts: which states, restored, bring answers back.

  python -m experiments.causal_trace \
    --flagfile=experiments/flagfiles/causal_trace_demo.flags

  python -m experiments.causal_trace --output_dir=runs/needle \
    --prompt='The Space Needle is in downtown' --subject='Space Needle'

Loads a model and facts, keeps those that the model completes, corrupts the
embeddings of each subject with noise, restores each hidden state in turn, and
measures how much of the answer's probability returns. In --output_dir:

  index.html    all that follows on one page that needs nothing else
  results.json  protocol, average effects by token with intervals, seconds
  facts.jsonl   one line a fact: tokens, p(answer) clean and corrupted, best
  traces.npz    every p(answer) of the grids, see `jaxedit.trace.results`
  plots/        average_*, average_map_*, severed, fact_<number>_*; PNG, SVG

Interrupted runs resume: repeat the same command.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from experiments.benchmark import torch_model, torch_trace
from jaxedit.models.loading import Model
from jaxedit.runs import cli, dry_trace, method_flags, trace_config, tracing
from jaxedit.runs.config import RunConfig
from jaxedit.runs.trace_config import TraceRunConfig
from jaxedit.trace import noise, results
from jaxedit.types import InputError

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines this program's flags."""
  names = cli.MODEL_FIELDS + trace_config.RUN_FIELDS
  cli.define(RunConfig, 'fact', names=names, seed=noise.SEED)
  cli.define(TraceRunConfig)
  method_flags.define_flags('fact')
  flags.DEFINE_enum(
      'baseline',
      'none',
      ('none', 'torch'),
      'Also time the published loop in PyTorch, a full forward pass a cell, on'
      ' some cells, and compare seconds and scores.',
  )
  flags.DEFINE_integer(
      'baseline_cells', 60, 'Cells that are timed.', lower_bound=2
  )
  for module in (cli, method_flags):
    flags.adopt_module_key_flags(module)


def baseline(model: Model, found: results.FactTraces) -> dict[str, Any]:
  """Times the published loop on some cells."""
  torch = torch_model.load(model.folder, FLAGS.dtype)
  return torch_trace.baseline(
      torch, found, count=FLAGS.baseline_cells, progress=cli.progress_bar
  )


def main() -> None:
  settings, chosen, problems = cli.read(TraceRunConfig), None, []
  if settings.prompt is not None and FLAGS['data'].present:
    problems.append('--data and --prompt: leave one of them out')
  if not settings.suggest_layers and settings.proposal is not None:
    problems.append('--proposal is judged with --suggest_layers: add it')
  if settings.suggest_layers:
    if FLAGS.layers is not None:
      problems.append('--layers is what --suggest_layers finds: leave it out')
    try:
      chosen = method_flags.from_flags('fact')
    except InputError as e:
      problems += e.problems
  config, timed = cli.read(RunConfig), FLAGS.baseline == 'torch'
  problems += tracing.errors(config, settings, chosen)
  InputError.raise_for(problems)
  if config.dry_run:
    print('\n'.join(dry_trace.tracing(config, settings)))
    return
  if timed:
    torch_model.require()
  lines = tracing.run(
      config,
      settings,
      command=cli.given(),
      chosen=chosen,
      baseline=baseline if timed else None,
      progress=cli.progress_bar,
  )
  print('\n'.join(lines))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
