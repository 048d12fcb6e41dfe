"""Times editing stage by stage against what the machine could do.

  python -m experiments.benchmark \
    --flagfile=experiments/flagfiles/benchmark_smollm2.flags

In one process: the rate of large matrix products (at the start and at the end,
the better counts); second moments and factors; and, once to compile and
--repeat times warm, what editing all records takes: prepare (all that stays
constant), optimize (wanted states), insert (keys, solves) and evaluate (scores
of prompts, paraphrases and neighbours). With --baseline=torch the published
loop runs in between, on the first --baseline_edits of the same edits.

In --output_dir: results.json, section.md, time.png and time.svg. With --append
the section is added to a file such as BENCHMARKS.md.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from experiments import (
    benchmark_compare,
    benchmark_report,
    benchmark_setup,
    benchmark_stages,
    common,
    costs,
    torch_baseline,
)
from jaxedit import values
from jaxedit.edit import closed_form
from jaxedit.models.spec import param_shapes
from jaxedit.text import templates
from jaxedit.types import InputError, Progress, silent

FLAGS = flags.FLAGS

_RESULTS = ('results.json', 'section.md', 'time.png', 'time.svg')


def define_flags() -> None:
  """Defines this program's flags."""
  common.define_model_flags()
  flags.DEFINE_enum(
      'preset',
      'smollm2',
      list(benchmark_setup.PRESETS),
      'Shape and settings. smollm2 edits --model itself; the others have random'
      ' weights and take only the tokenizer from --model.',
  )
  flags.DEFINE_string('data', 'demo', 'Records: "demo" or a file.')
  flags.DEFINE_integer(
      'num_edits', 32, 'Take the first N good records.', lower_bound=1
  )
  flags.DEFINE_enum(
      'on_bad_record',
      'fail',
      ('fail', 'skip'),
      'A faulty record stops the run, or the next one takes its place.',
  )
  flags.DEFINE_string(
      'moments',
      None,
      'Second moments: "self" (sampled from the model, kept for the next run),'
      ' "random", or a file of collect_moments. Default: "self" for smollm2,'
      ' else "random".',
  )
  flags.DEFINE_integer(
      'moments_rows',
      4,
      'Rows of 512 tokens a batch in the stage that times moments; more on an'
      ' accelerator.',
      lower_bound=1,
  )
  flags.DEFINE_string(
      'context_templates',
      None,
      'JSON list of contexts with one {} each; six fixed ones unless given.',
  )
  flags.DEFINE_integer(
      'slots',
      None,
      'Edits optimised side by side; what the library chooses unless given.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'eval_batch_size', 64, 'Rows an evaluation batch.', lower_bound=1
  )
  flags.DEFINE_integer('repeat', 3, 'Warm calls of every stage.', lower_bound=1)
  flags.DEFINE_bool(
      'cold', False, 'Compile everything anew: use an empty compilation cache.'
  )
  flags.DEFINE_enum(
      'baseline',
      'none',
      ('none', 'torch'),
      'Also run the published loop in PyTorch. On a GPU leave it memory:'
      ' XLA_PYTHON_CLIENT_PREALLOCATE=false.',
  )
  flags.DEFINE_integer(
      'baseline_edits',
      8,
      'Edits that the baseline optimises and inserts.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'ceiling_size',
      None,
      'Rows of the matrices that measure the ceiling (default: 2048 on CPU,'
      ' 8192 elsewhere).',
      lower_bound=8,
  )
  for name, what in (
      ('layers', 'number of layers'),
      ('width', 'heads, widths'),
  ):
    flags.DEFINE_float(
        f'scale_{name}',
        1.0,
        f'Factor on the {what} of a random model; for trying the program out.',
        lower_bound=1e-3,
        upper_bound=1.0,
    )
  flags.DEFINE_string('output_dir', None, 'Folder for results.')
  flags.DEFINE_bool('overwrite', False, 'Replace results in --output_dir.')
  flags.DEFINE_string(
      'append', None, 'File to add the section to, e.g. BENCHMARKS.md.'
  )
  # Those that `common` defined are shown by --help too.
  flags.adopt_module_key_flags(common)


def config_from_flags() -> benchmark_setup.Config:
  """Builds the config; every unusable flag is told at once.

  Raises:
    InputError: flags that are missing or do not go together.
  """
  problems, contexts = [], benchmark_setup.TEMPLATES
  if not FLAGS.output_dir:
    problems.append('--output_dir is missing: name a folder for the results')
  if FLAGS.preset == 'smollm2' and (FLAGS.scale_layers, FLAGS.scale_width) != (
      1.0,
      1.0,
  ):
    problems.append(
        '--scale_layers and --scale_width shrink random models, and the weights'
        ' of --preset=smollm2 are real: choose another preset or leave them out'
    )
  try:
    if FLAGS.context_templates:
      contexts = tuple(templates.load_templates(FLAGS.context_templates))
    if FLAGS.baseline == 'torch':
      torch_baseline.require()
  except InputError as error:
    problems += error.problems
  if problems:
    raise InputError(*problems)
  return benchmark_setup.Config(
      preset=FLAGS.preset,
      model=FLAGS.model,
      dtype=FLAGS.dtype,
      data=FLAGS.data,
      num_edits=FLAGS.num_edits,
      on_bad_record=FLAGS.on_bad_record,
      moments=FLAGS.moments or '',
      contexts=contexts,
      scale_layers=FLAGS.scale_layers,
      scale_width=FLAGS.scale_width,
      seed=FLAGS.seed,
      wheel=FLAGS.wheel,
      revision=FLAGS.revision,
  )


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
    baseline: int = 0,
    moments_rows: int = 4,
    eval_rows: int = 64,
    progress: Progress = silent,
) -> tuple[list[benchmark_stages.Stage], dict[str, Any] | None]:
  """Runs every stage.

  Args:
    setup: what to run on.
    repeat: warm calls of every stage.
    slots: edits side by side, or None.
    baseline: edits that torch runs too; 0 for none.
    moments_rows: rows of text a batch of moments.
    eval_rows: rows of a batch of evaluation.
    progress: progress display.

  Returns:
    (the stages with their times; the comparison as plain numbers, or None).
  """
  model = setup.model
  moments = benchmark_stages.time_moments(
      setup, rows=moments_rows, repeat=repeat, progress=progress
  )
  editor = closed_form.closed_form(model.spec, setup.recipe)
  factor, state = benchmark_stages.time_factor(
      setup, editor, repeat=repeat, progress=progress
  )
  judge = benchmark_stages.Evaluation(setup, eval_rows)
  # Chosen now, when the metrics have their place in memory.
  frame = values.frame_for(model.spec, model.params, setup.edits, slots=slots)
  stages = benchmark_stages.edit_stages(setup, frame)
  rival = benchmark_compare.build(setup, baseline) if baseline else None
  info, facts = None, None
  for turn in range(1 + repeat):
    edited, _, info = editor.edit(
        model.params, state, setup.edits, frame=frame, progress=progress
    )
    benchmark_stages.add_edit(setup, stages, info)
    judge(edited, progress)
    if rival:
      rival.ours(state, info.targets, progress)
      if turn:  # torch compiles nothing
        rival.theirs(progress)
  if rival:
    rival.check(state, info.targets, progress)
    facts = rival.facts(info.targets, stages)
    facts['torch'] = torch_baseline.require().__version__
  return [moments, factor, *stages.values(), judge.stage], facts


def workload(
    config: benchmark_setup.Config, setup: benchmark_setup.Setup
) -> dict[str, Any]:
  """What was run, for readers of the figures."""
  spec, sizes = setup.model.spec, costs.lengths(setup.edits)
  contexts = len(setup.edits[0].rows)
  rows = len(setup.edits) * contexts
  shapes = param_shapes(spec).values()
  return {
      'preset': config.preset,
      'model': setup.model.hash,
      'random': setup.random,
      'dtype': config.dtype,
      'parameters': sum(map(math.prod, shapes)),
      'model_layers': spec.layers,
      'layers': ', '.join(map(str, setup.recipe.layers)),
      'source': benchmark_setup.PRESETS[config.preset].source,
      'settings': {
          'moment_weight': setup.moment_weight,
          **setup.recipe.value._asdict(),
      },
      'data': config.data,
      'edits': len(setup.edits),
      'contexts': contexts,
      'tokens': float(sizes.tokens.sum()) / rows,
      'suffix': float(sizes.suffix.sum()) / rows,
      'labels': float(sizes.scored.sum()) / rows,
      'slots': FLAGS.slots,
      'repeat': FLAGS.repeat,
      'cold': FLAGS.cold,
      'seed': config.seed,
  }


def main() -> None:
  config = config_from_flags()
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
        baseline=FLAGS.baseline_edits if FLAGS.baseline == 'torch' else 0,
        moments_rows=FLAGS.moments_rows,
        eval_rows=FLAGS.eval_batch_size,
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
  common.write_text(folder / 'section.md', section)
  notes = benchmark_report.plot(results, folder)
  common.write_json(folder / 'results.json', results)
  if FLAGS.append:
    benchmark_report.append(pathlib.Path(FLAGS.append), section)
    notes.append(f'appended to {FLAGS.append}')
  print('\n'.join([section, *notes, f'results in {folder}']))


if __name__ == '__main__':
  define_flags()
  common.run(main)
