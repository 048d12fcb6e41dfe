"""Times editing stage by stage against what the machine could do.

  python -m experiments.benchmark \
    --flagfile=experiments/flagfiles/benchmark_smollm2.flags

With --window long answers are edited by AnyEdit, each one alone, instead of
facts by MEMIT as one batch (flagfiles/benchmark_anyedit_smollm2.flags).

In one process: the rate of large matrix products (at the start and at the end,
the better counts; and, separately, before and after every warm call of the
editor, for a machine whose speed varies); second moments and factors; and, once
to compile and --repeat times warm, what editing all of them takes: prefill (all
that stays constant), optimize (targets), insert (keys, solves) and
evaluate (scores of prompts, paraphrases and neighbours), or answer (the
questions of long answers, each by its own edited model). With --baseline=torch
the published loop runs in between, on the first --baseline_edits of the same
edits.

In --output_dir: results.json, section.md, time.png and time.svg. With --append
the section is added to a file such as BENCHMARKS.md.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.benchmark import (
    compare,
    judges,
    presets,
    report,
)
from experiments.benchmark import config as config_lib
from experiments.benchmark import setup as setup_lib
from experiments.benchmark import stages as stages_lib
from experiments.benchmark.config import BenchmarkConfig
from experiments.benchmark.setup import Setup
from jaxedit import io
from jaxedit.methods.base import EditBatch, Run
from jaxedit.models.spec import param_shapes
from jaxedit.planning import lengths, machine
from jaxedit.runs import cli, method_flags
from jaxedit.runs.config import RunConfig
from jaxedit.runs.output import Output
from jaxedit.targets.budget import plan_batches
from jaxedit.types import InputError, Progress, silent

_RESULTS = ('results.json', 'section.md', 'time.png', 'time.svg')


def define_flags() -> None:
  """Defines this program's flags."""
  config_lib.define_flags()
  for module in (cli, method_flags):
    flags.adopt_module_key_flags(module)


@contextlib.contextmanager
def compilation_cache(cold: bool, enabled: bool = True) -> Iterator[None]:
  """Uses the usual compilation cache, or an empty one."""
  if not cold:
    cli.use_compilation_cache(enabled)
    yield
    return
  before = jax.config.jax_compilation_cache_dir
  with tempfile.TemporaryDirectory() as folder:
    jax.config.update('jax_compilation_cache_dir', folder)
    try:
      yield
    finally:
      jax.config.update('jax_compilation_cache_dir', before)


def measure(
    setup: Setup, progress: Progress = silent
) -> tuple[list[stages_lib.Stage], dict[str, Any] | None]:
  """Runs every stage.

  Args:
    setup: what to run on.
    progress: progress display.

  Returns:
    (the stages with their times; the comparison as plain numbers, or None).
  """
  model, settings = setup.model, setup.settings
  texts = [stages_lib.time_moments(setup, progress)]
  if settings.moments_tokens:
    texts.append(stages_lib.time_collection(setup, progress))
  factor, state = stages_lib.time_factor(setup, progress)
  scoring = judges.judges_of(setup)
  # Chosen now, when the preconditioners have their place in memory.
  plan = plan_batches(
      model, setup.edits, slots=setup.config.slots, memory=setup.config.memory
  )
  stages = stages_lib.edit_stages(setup, plan)
  merging = []  # independent edits are not merged
  if not setup.independent:
    merging = [stages_lib.Stage('merge', 'edit', len(setup.edits))]
  rival = facts = info = None
  if settings.baseline == 'torch':
    rival = compare.build(setup, settings.baseline_edits)
  pace = lambda: machine.pace(stages_lib.dtype_of(setup), settings.ceiling_size)
  batch, run, paces = (
      EditBatch(setup.edits, plan, setup.group),
      Run(progress=progress),
      [],
  )
  for turn in range(1 + settings.repeat):
    if turn:  # the first call compiles
      paces.append(pace())
    (edited, _, info), seconds = machine.timed(
        lambda: setup.editor.edit(model, state, batch, run)
    )
    if turn:
      paces.append(pace())
    stages_lib.add_edit(setup, stages, info)
    for stage in merging:
      stages_lib.add_merge(setup, stage, edited, seconds)
    for judge in scoring:
      judge(edited, progress)
    del edited  # a whole model's, when the next one is made
    if rival:
      rival.ours(state, info.targets.targets, progress)
      if turn:  # torch compiles nothing
        rival.theirs(progress)
  stages['optimize'].more['pace'] = statistics.median(paces)
  if rival:
    targets = info.targets.targets
    facts = rival.facts(state, targets, stages, progress=progress)
  stages = [*texts, factor, *stages.values(), *merging]
  stages += [judge.stage for judge in scoring]
  return stages, facts


def workload(setup: Setup) -> dict[str, Any]:
  """What was run, for readers of the figures."""
  config, settings = setup.config, setup.settings
  spec, edits, recipe = setup.model.spec, setup.edits, setup.recipe
  sizes = lengths.lengths(edits, recipe.texts)
  loads = lengths.loads(edits)
  contexts = len(edits[0].rows)
  rows = len(edits) * contexts
  shapes = param_shapes(spec).values()
  found = {
      'preset': settings.preset,
      'model': setup.model.hash,
      'random': setup.random,
      'dtype': config.dtype,
      'activations': settings.activations,
      'parameters': sum(map(math.prod, shapes)),
      'model_layers': spec.layers,
      'layers': ', '.join(map(str, recipe.layers)),
      'source': presets.PRESETS[settings.preset].source,
      'settings': {
          'moment_weight': recipe.preconditioner.weight,
          **recipe.target._asdict(),
      },
      'data': config.data,
      'edits': len(edits),
      'contexts': contexts,
      'tokens': float(sizes.tokens.sum()) / rows,
      'suffix': float(loads.suffix.sum()) / rows,
      'labels': float(loads.scored.sum()) / rows,
      'slots': config.slots,
      'memory_gib': config.memory_gib,
      'moments_tokens': settings.moments_tokens,
      'repeat': settings.repeat,
      'cold': settings.cold,
      'seed': config.seed,
  }
  if recipe.chunks is None:
    return found
  answers = np.array([len(edit.target) for edit in edits])
  return found | {
      'chunks': recipe.chunks._asdict(),
      'states': float(sizes.states.mean()),
      'question': float(sizes.left.mean()) + 1,
      'answer': [int(answers.min()), int(answers.max())],
      'max_answer_tokens': config.max_answer_tokens,
  }


def run(
    config: RunConfig, settings: BenchmarkConfig, output: Output
) -> dict[str, Any]:
  """Measures everything: what results.json holds."""
  bar, origin = cli.progress_bar, report.origin(sys.argv[1:])
  with bar('ceiling', 1, 'machine') as advance:
    ceilings = machine.ceilings(settings.ceiling_size)
    advance(1)
  setup = setup_lib.prepare(config, settings, bar)
  output.begin(_RESULTS)
  stages, baseline = measure(setup, bar)
  # Whatever else the machine did, the ceiling is the most that it gave.
  for dtype, rate in machine.ceilings(settings.ceiling_size).items():
    ceilings[dtype] = max(ceilings[dtype], rate)
  return {
      'origin': origin,
      'workload': workload(setup),
      'ceilings': ceilings,
      'stages': [stage.facts(ceilings) for stage in stages],
      'baseline': baseline,
  }


def main() -> None:
  config, settings = cli.read(RunConfig), cli.read(BenchmarkConfig)
  if problems := config_lib.errors(config, settings):
    raise InputError(*problems)
  with (
      Output(
          config.output_dir, cli.given(), overwrite=config.overwrite
      ) as output,
      compilation_cache(settings.cold, config.compilation_cache),
  ):
    results, folder = run(config, settings, output), output.folder
    section = report.section(results)
    io.write_text(folder / 'section.md', section)
    notes = report.plot(results, folder)
    io.write_json(folder / 'results.json', results)
    if settings.append:
      report.append(pathlib.Path(settings.append), section)
      notes.append(f'appended to {settings.append}')
  print('\n'.join([section, *notes, f'results in {folder}']))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
