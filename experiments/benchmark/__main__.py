"""Times editing stage by stage against what the machine could do.

  python -m experiments.benchmark \
    --flagfile=experiments/flagfiles/benchmark_smollm2.flags

With --window long answers are edited by AnyEdit, each one alone, instead of
facts by MEMIT as one batch (flagfiles/benchmark_anyedit_smollm2.flags).

In one process: the rate of large matrix products (at the start and at the end,
the better counts; and, told apart, before and after every warm call of the
editor, for a machine whose speed varies); second moments and factors; and, once
to compile and --repeat times warm, what editing all records takes: prepare (all
that stays constant), optimize (wanted states), insert (keys, solves) and
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

from experiments import (
    benchmark_compare,
    benchmark_flags,
    benchmark_judges,
    benchmark_lengths,
    benchmark_presets,
    benchmark_report,
    benchmark_setup,
    benchmark_stages,
    common,
)
from jaxedit import io
from jaxedit import targets as targets_lib
from jaxedit.methods import closed_form
from jaxedit.models.spec import param_shapes
from jaxedit.types import Progress, silent

FLAGS = flags.FLAGS

_RESULTS = ('results.json', 'section.md', 'time.png', 'time.svg')


def define_flags() -> None:
  """Defines this program's flags."""
  benchmark_flags.define_flags()
  flags.adopt_module_key_flags(benchmark_flags)


@contextlib.contextmanager
def compilation_cache(cold: bool) -> Iterator[None]:
  """Uses the usual compilation cache, or an empty one."""
  if not cold:
    common.use_compilation_cache(FLAGS.compilation_cache)
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
    setup: benchmark_setup.Setup,
    *,
    repeat: int,
    slots: int | None = None,
    memory: float | None = None,
    baseline: int = 0,
    moments_rows: int = 4,
    moments_tokens: int | None = None,
    eval_rows: int = 64,
    max_new_tokens: int = 64,
    ceiling_size: int | None = None,
    progress: Progress = silent,
) -> tuple[list[benchmark_stages.Stage], dict[str, Any] | None]:
  """Runs every stage.

  Args:
    setup: what to run on.
    repeat: warm calls of every stage.
    slots: edits side by side, or None.
    memory: bytes to plan with, or None.
    baseline: edits that torch runs too; 0 for none.
    moments_rows: rows of text a batch of moments.
    moments_tokens: tokens to collect moments from as a whole; None not to.
    eval_rows: rows of a batch of evaluation.
    max_new_tokens: longest answer that is given to a passage.
    ceiling_size: rows of the matrices whose rate is taken beside the editor's
      calls.
    progress: progress display.

  Returns:
    (the stages with their times; the comparison as plain numbers, or None).
  """
  model, often = setup.model, dict(repeat=repeat, progress=progress)
  moments = benchmark_stages.time_moments(setup, rows=moments_rows, **often)
  texts = [moments]
  if moments_tokens:
    texts.append(
        benchmark_stages.time_collection(
            setup, rows=moments_rows, tokens=moments_tokens, progress=progress
        )
    )
  editor = closed_form.closed_form(model.spec, setup.recipe)
  factor, state = benchmark_stages.time_factor(setup, editor, **often)
  edit = editor.edit_independent if setup.apart else editor.edit
  judge = benchmark_judges.judge(setup, eval_rows, max_new_tokens)
  # Chosen now, when the metrics have their place in memory.
  plan = targets_lib.plan_batches(
      model.spec, model.params, setup.edits, slots=slots, memory=memory
  )
  stages = benchmark_stages.edit_stages(setup, plan)
  merging = []  # changes of edits that are made alone stay apart
  if not setup.apart:
    merging = [benchmark_stages.Stage('merge', 'edit', len(setup.edits))]
  rival = benchmark_compare.build(setup, baseline) if baseline else None
  info = facts = None
  pace = lambda: benchmark_stages.pace(
      benchmark_stages.dtype_of(setup), ceiling_size
  )
  paces = []
  for turn in range(1 + repeat):
    if turn:  # the first call compiles
      paces.append(pace())
    (edited, _, info), seconds = benchmark_stages.timed(
        lambda: edit(
            model.params, state, setup.edits, plan=plan, progress=progress
        )
    )
    if turn:
      paces.append(pace())
    benchmark_stages.add_edit(setup, stages, info)
    for stage in merging:
      benchmark_stages.add_merge(setup, stage, edited, seconds)
    judge(edited, progress)
    del edited  # a whole model's, when the next one is made
    if rival:
      rival.ours(state, info.targets, progress)
      if turn:  # torch compiles nothing
        rival.theirs(progress)
  stages['optimize'].more['pace'] = statistics.median(paces)
  if rival:
    facts = rival.facts(state, info.targets, stages, progress=progress)
  stages = [*texts, factor, *stages.values(), *merging, judge.stage]
  return stages, facts


def workload(
    config: benchmark_setup.Config, setup: benchmark_setup.Setup
) -> dict[str, Any]:
  """What was run, for readers of the figures."""
  spec, edits = setup.model.spec, setup.edits
  sizes = benchmark_lengths.lengths(edits, setup.recipe.texts)
  loads = benchmark_lengths.loads(edits)
  contexts = len(edits[0].rows)
  rows = len(edits) * contexts
  shapes = param_shapes(spec).values()
  found = {
      'preset': config.preset,
      'model': setup.model.hash,
      'random': setup.random,
      'dtype': config.dtype,
      'activations': config.activations,
      'parameters': sum(map(math.prod, shapes)),
      'model_layers': spec.layers,
      'layers': ', '.join(map(str, setup.recipe.layers)),
      'source': benchmark_presets.PRESETS[config.preset].source,
      'settings': {
          'moment_weight': setup.moment_weight,
          **setup.recipe.value._asdict(),
      },
      'data': config.data,
      'edits': len(edits),
      'contexts': contexts,
      'tokens': float(sizes.tokens.sum()) / rows,
      'suffix': float(loads.suffix.sum()) / rows,
      'labels': float(loads.scored.sum()) / rows,
      'slots': FLAGS.slots,
      'memory_gib': FLAGS.memory_gib,
      'moments_tokens': FLAGS.moments_tokens,
      'repeat': FLAGS.repeat,
      'cold': FLAGS.cold,
      'seed': config.seed,
  }
  if setup.recipe.chunks is None:
    return found
  answers = np.array([len(edit.target) for edit in edits])
  return found | {
      'chunks': setup.recipe.chunks._asdict(),
      'states': float(sizes.states.mean()),
      'question': float(sizes.left.mean()) + 1,
      'answer': [int(answers.min()), int(answers.max())],
      'max_answer_tokens': config.max_answer_tokens,
  }


def main() -> None:
  config = benchmark_flags.config_from_flags()
  folder = common.claim_folder(FLAGS.output_dir, FLAGS.overwrite)
  bar, origin = common.progress_bar, benchmark_report.origin(sys.argv[1:])
  with compilation_cache(FLAGS.cold):
    with bar('ceiling', 1, 'machine') as advance:
      ceilings = benchmark_stages.ceilings(FLAGS.ceiling_size)
      advance(1)
    setup = benchmark_setup.prepare(config, folder, bar)
    common.clear(folder, _RESULTS)
    stages, baseline = measure(
        setup,
        repeat=FLAGS.repeat,
        slots=FLAGS.slots,
        memory=common.memory_of_flags(),
        baseline=FLAGS.baseline_edits if FLAGS.baseline == 'torch' else 0,
        moments_rows=FLAGS.moments_rows,
        moments_tokens=FLAGS.moments_tokens,
        eval_rows=FLAGS.eval_batch_size,
        max_new_tokens=FLAGS.max_new_tokens,
        ceiling_size=FLAGS.ceiling_size,
        progress=bar,
    )
    # Whatever else the machine did, the ceiling is the most that it gave.
    for dtype, rate in benchmark_stages.ceilings(FLAGS.ceiling_size).items():
      ceilings[dtype] = max(ceilings[dtype], rate)
  results = {
      'origin': origin,
      'workload': workload(config, setup),
      'ceilings': ceilings,
      'stages': [stage.facts(ceilings) for stage in stages],
      'baseline': baseline,
  }
  section = benchmark_report.section(results)
  io.write_text(folder / 'section.md', section)
  notes = benchmark_report.plot(results, folder)
  io.write_json(folder / 'results.json', results)
  if FLAGS.append:
    benchmark_report.append(pathlib.Path(FLAGS.append), section)
    notes.append(f'appended to {FLAGS.append}')
  print('\n'.join([section, *notes, f'results in {folder}']))


if __name__ == '__main__':
  define_flags()
  common.run(main)
