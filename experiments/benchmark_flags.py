"""The flags of `benchmark`, and the config that they make."""

from __future__ import annotations

from absl import flags

from experiments import (
    benchmark_presets,
    benchmark_setup,
    benchmark_torch,
    common,
)
from jaxedit.text import chunking, templates
from jaxedit.types import InputError

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines this program's flags."""
  common.define_model_flags()
  flags.DEFINE_enum(
      'preset',
      'smollm2',
      list(benchmark_presets.PRESETS),
      'Shape and settings. smollm2 edits --model itself; the others have random'
      ' weights and take only the tokenizer from --model.',
  )
  flags.DEFINE_string(
      'data', 'demo', 'Records, with --window passages: "demo" or a file.'
  )
  flags.DEFINE_integer(
      'num_edits', 32, 'Take the first N good records.', lower_bound=1
  )
  common.define_run_flags()
  _define_method_flags()
  _define_passage_flags()
  _define_run_flags()
  # Those that `common` defined are shown by --help too.
  flags.adopt_module_key_flags(common)


def _define_method_flags() -> None:
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
  flags.DEFINE_integer(
      'moments_tokens',
      None,
      'Also time second moments from the first row of text to the averages, over'
      ' so many random tokens (10 to 20 a key dimension are of use).',
      lower_bound=1,
  )
  flags.DEFINE_list(
      'layers', None, "Layers to edit; the preset's own if unset."
  )
  flags.DEFINE_integer(
      'value_steps',
      None,
      "Most steps a state; the preset's own unless given.",
      lower_bound=1,
  )
  flags.DEFINE_string(
      'context_templates',
      None,
      'JSON list of contexts with one {} each; six fixed ones unless given.',
  )
  common.define_activations_flag()
  common.define_room_flags()


def _define_run_flags() -> None:
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
      'Rows of the matrices that measure the ceiling, and the rate beside the'
      ' calls of the editor (default: 2048 on CPU, 8192 elsewhere).',
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
  flags.DEFINE_string(
      'append', None, 'File to add the section to, e.g. BENCHMARKS.md.'
  )


def _define_passage_flags() -> None:
  flags.DEFINE_integer(
      'window',
      0,
      'Tokens a chunk of a long answer (AnyEdit; published 40 for Llama-3); 0'
      ' edits facts.',
      lower_bound=0,
  )
  flags.DEFINE_integer(
      'overlap', 0, 'Tokens that neighbouring chunks share.', lower_bound=0
  )
  flags.DEFINE_integer(
      'max_answer_tokens',
      None,
      'Longest answer to edit; a longer one is a faulty record.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'max_new_tokens',
      64,
      'Longest answer given in the stage "answer", tokens.',
      lower_bound=1,
  )


def config_from_flags() -> benchmark_setup.Config:
  """Builds the config; every unusable flag is told at once.

  Raises:
    InputError: flags that are missing or do not go together.
  """
  problems, contexts, layers = _faults(), benchmark_setup.TEMPLATES, ()
  try:
    if FLAGS.context_templates:
      contexts = tuple(templates.load_templates(FLAGS.context_templates))
    if FLAGS.layers is not None:
      layers = common.layer_list(FLAGS.layers, 'layers')
    if FLAGS.baseline == 'torch':
      benchmark_torch.require()
    if FLAGS.window:
      chunking.check_chunking(chunking.Chunking(FLAGS.window, FLAGS.overlap))
  except InputError as error:
    problems += error.problems
  if problems:
    raise InputError(*problems)
  same = (
      'preset', 'model', 'dtype', 'data', 'num_edits', 'on_bad_record',
      'window', 'overlap', 'max_answer_tokens', 'value_steps', 'scale_layers',
      'scale_width', 'seed', 'wheel', 'revision', 'activations',
  )  # fmt: skip
  return benchmark_setup.Config(
      moments=FLAGS.moments or '',
      contexts=contexts,
      layers=layers,
      **{name: getattr(FLAGS, name) for name in same},
  )


def _faults() -> list[str]:
  """Flags that are missing or do not go together, in sentences."""
  problems = common.activations_faults()
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
  if FLAGS.window and FLAGS.context_templates:
    problems.append(
        '--context_templates are for facts, and --window edits long answers,'
        ' which have no contexts: leave one of them out'
    )
  for name in ('overlap', 'max_answer_tokens'):
    if getattr(FLAGS, name) and not FLAGS.window:
      problems.append(
          f'--{name} is about long answers: give --window too, or leave it out'
      )
  return problems
