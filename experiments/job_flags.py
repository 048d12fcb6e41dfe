"""Flags that all editing programs have, and which of them go together."""

from __future__ import annotations

import os
import pathlib

from absl import flags

from experiments import common, methods, resources

FLAGS = flags.FLAGS


def define_flags(texts: bool = False) -> None:
  """Defines the flags that all editing programs have.

  Args:
    texts: whether the program edits passages.
  """
  common.define_model_flags()
  methods.define_flags(texts)
  resources.define_flags()
  flags.DEFINE_integer(
      'num_edits',
      None,
      'Take the first N good records (cases, where several are one edit); all'
      ' unless given.',
      lower_bound=1,
  )
  common.define_run_flags()
  flags.DEFINE_integer(
      'batch_size', 100, 'Edits solved for together.', lower_bound=1
  )
  flags.DEFINE_bool(
      'reset',
      False,
      'Start every batch from the unedited model (independent batches) instead'
      ' of the model that the last batch left.',
  )
  common.define_room_flags()
  flags.DEFINE_string(
      'states',
      None,
      'Folder that keeps optimised states: a later run with the same model,'
      ' last layer and value settings skips those of records that it finds there,'
      ' so that what follows can be tuned alone.',
  )
  flags.DEFINE_bool(
      'save_model',
      False,
      'Also write the merged model to OUTPUT_DIR/model, and evaluate that.',
  )
  flags.DEFINE_bool(
      'keep_original',
      False,
      'Keep the replaced matrices in the saved model for an exact restore.',
  )
  flags.DEFINE_enum(
      'edited_dtype',
      'source',
      ('source', 'float32'),
      'Dtype of edited matrices in the saved model.',
  )
  flags.DEFINE_integer(
      'eval_batch_size', 64, 'Rows an evaluation batch.', lower_bound=1
  )
  flags.DEFINE_string(
      'perplexity_text',
      None,
      'Plain text file whose perplexity is measured before and after.',
  )
  flags.DEFINE_integer(
      'perplexity_tokens',
      20000,
      'Tokens of it that are scored at most.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'show', 4, 'Texts before and after to print.', lower_bound=0
  )
  # Those that others defined are shown by --help too.
  flags.adopt_module_key_flags(common)
  flags.adopt_module_key_flags(methods)
  flags.adopt_module_key_flags(resources)


def check_flags() -> list[str]:
  """Finds flags that do not go together, one sentence each."""
  problems = []
  if not FLAGS.output_dir:
    problems.append('--output_dir is missing: name a folder for the results')
  elif _holds(model_folder(), FLAGS.model):
    problems.append(
        f'--model={FLAGS.model} lies where --output_dir={FLAGS.output_dir}'
        ' would replace it; choose another --output_dir'
    )
  if FLAGS.save_model and FLAGS.reset:
    problems.append(
        '--save_model needs one edited model; --reset makes one a batch: leave'
        ' one of them out'
    )
  if FLAGS.perplexity_text and FLAGS.reset:
    problems.append(
        '--perplexity_text needs one edited model; --reset makes one a batch:'
        ' leave one of them out'
    )
  if (
      FLAGS.perplexity_text
      and not pathlib.Path(FLAGS.perplexity_text).is_file()
  ):
    problems.append(
        f'--perplexity_text={FLAGS.perplexity_text}: no such file; name a plain'
        ' text'
    )
  if FLAGS.post != 'none' and FLAGS.reset:
    problems.append(
        f'--post={FLAGS.post} shapes the one change of a sequence; --reset makes'
        ' one a batch: leave one of them out'
    )
  return problems


def model_folder() -> pathlib.Path:
  return pathlib.Path(FLAGS.output_dir) / 'model'


def _holds(folder: pathlib.Path, name: str) -> bool:
  """Says whether a model's path is a folder or lies in it."""
  path = pathlib.Path(os.path.expanduser(name)).resolve()
  return folder.resolve() in (path, *path.parents)
