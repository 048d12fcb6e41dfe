"""Edits facts with MEMIT, or a method near it, and measures what it did.

  python -m experiments.memit_batch \
    --flagfile=experiments/flagfiles/quickstart.flags

--method names another closed form (ROME, R-ROME, EMMET, PMET, AlphaEdit). Loads
a model, second moments (collected if none are given) and records; edits in
batches; evaluates the same records before and after. In --output_dir:

  delta.safetensors   the change: factors, or dense where that is smaller
  results.json        metrics, protocol, versions, seconds by stage
  records.jsonl       one line a record: before, after, loss, steps
  templates.json      the context templates that were used
  moments.safetensors the second moments, if they were collected
  model/              with --save_model, the edited model, a Hugging Face folder

A run that was stopped goes on with the same command: optimised states are kept
in unfinished/ until it ends.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import (
    common,
    job,
    job_flags,
    judging,
    methods,
    resources,
    timing,
    workbench,
)
from jaxedit.eval import datasets, harness, report
from jaxedit.methods import closed_form
from jaxedit.text import templates
from jaxedit.types import InputError, Record

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines this program's flags."""
  job_flags.define_flags()
  flags.DEFINE_string(
      'data',
      'demo',
      'Records: "demo", or a file: CounterFact (nested JSON or flat JSONL),'
      ' zsRE, or the JSONL described in jaxedit/eval/datasets.py.',
  )
  flags.DEFINE_enum(
      'zsre_target',
      'alt',
      datasets.ZSRE_TARGETS,
      'Which zsRE field is written.',
  )
  flags.DEFINE_string(
      'context_templates',
      None,
      'JSON list of contexts with one {} each; sampled from the model unless'
      ' given.',
  )
  flags.DEFINE_integer(
      'max_new_tokens',
      16,
      'Length of generated texts, tokens; 0 generates none.',
      lower_bound=0,
  )
  flags.adopt_module_key_flags(job_flags)


def recipe_of_flags() -> tuple[closed_form.Recipe, dict[str, Any]]:
  """Builds the method from flags and refuses flags that do not go together.

  Returns:
    (the method, its settings for the protocol).

  Raises:
    InputError: all that is wrong with the flags.
  """
  problems, chosen = job_flags.check_flags(), None
  try:
    chosen = methods.recipe_of_flags()
  except InputError as e:
    problems += e.problems
  if problems:
    raise InputError(*problems)
  resources.check_flags(chosen[0])
  return chosen


def read_records(
    check: Callable[[Record], list[str]] | None,
) -> datasets.Loaded:
  """Reads the records that flags name."""
  return datasets.load_records(
      FLAGS.data,
      limit=FLAGS.num_edits,
      on_bad_record=FLAGS.on_bad_record,
      check=check,
      zsre_target=FLAGS.zsre_target,
  )


def _given_templates() -> tuple[str, ...]:
  if not FLAGS.context_templates:
    return ()
  return tuple(templates.load_templates(FLAGS.context_templates))


def _check(words: Any, spec: Any, recipe: closed_form.Recipe) -> Any:
  """The check of a record under the templates, if they are given."""
  return workbench.record_check(
      words,
      spec,
      contexts=_given_templates(),
      max_new_tokens=FLAGS.max_new_tokens,
      anchor=recipe.anchor,
  )


def complete(
    bench: workbench.Workbench,
    recipe: closed_form.Recipe,
    clock: timing.Clock,
    folder: pathlib.Path,
) -> tuple[workbench.Workbench, Any, dict[str, Any]]:
  """Adds context templates, the records as ids, and second moments.

  Templates and moments are made if none were given.

  Raises:
    InputError: the moments cannot be used, or records are too long under the
      templates.
  """
  moments = None
  find = lambda: resources.find_moments(
      bench.model, bench.tokenizer, recipe, folder
  )
  if FLAGS.moments:
    with clock('moments'):
      moments = find()
  with clock('templates'):
    chosen = _given_templates() or resources.sample_templates(
        bench.model, bench.tokenizer, FLAGS.seed
    )
    # Records that are too long under the templates are told before more is run.
    bench = workbench.encode_facts(bench, chosen, recipe.anchor)
  if moments is None:
    with clock('moments'):
      moments = find()
  source = {'moments': {**moments.provenance, 'tokens': moments.count}}
  return bench, moments, source


def judge_of_flags(bench: workbench.Workbench) -> job.Judge:
  """The evaluation with the flags' settings; see `judging.judge`."""
  evaluate = functools.partial(
      harness.evaluate,
      max_new_tokens=FLAGS.max_new_tokens,
      stop=workbench.stop_tokens(bench),
      progress=common.progress_bar,
  )
  return functools.partial(
      judging.judge,
      evaluate=evaluate,
      seed=FLAGS.seed,
      batch_size=FLAGS.eval_batch_size,
  )


def _protocol(bench: workbench.Workbench) -> dict[str, Any]:
  return {
      'templates': list(bench.templates),
      'decoding': f'greedy, {FLAGS.max_new_tokens} new tokens at most, stopped'
      ' at end of text, a full stop or a line break',
  }


TASK = job.Task(
    recipe=recipe_of_flags,
    editor=lambda bench, recipe: closed_form.closed_form(
        bench.model.spec, recipe
    ),
    read=read_records,
    check=_check,
    complete=complete,
    judge=judge_of_flags,
    protocol=_protocol,
    show=report.generations,
)


def main() -> None:
  job.run(TASK)


if __name__ == '__main__':
  define_flags()
  common.run(main)
