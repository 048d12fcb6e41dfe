"""One editing run, from settings to files.

  load (`inputs`) -> judge -> edit by protocol (`editing`) -> store -> judge ->
  report

An interrupted run resumes: targets are kept as they are found (`cache`), and the
batches of a sequence (`editing`). A resumed run ends with the same delta, records
and metrics as one that was not interrupted.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxedit import edited as edited_lib
from jaxedit import hosts, io
from jaxedit.deltas import UNEDITED, Edited
from jaxedit.eval import evaluation
from jaxedit.eval.evaluation import Evaluation
from jaxedit.eval.scorers.base import Scorer
from jaxedit.methods import base
from jaxedit.models import loading, saving
from jaxedit.runs import (
    cli,
    edit_reports,
    editing,
    inputs,
    report,
    side_effects,
)
from jaxedit.runs.answers import Answers, KeptAnswers
from jaxedit.runs.cache import TargetFiles, target_settings
from jaxedit.runs.clock import Clock, compile_seconds
from jaxedit.runs.config import RunConfig, errors
from jaxedit.runs.editing import SessionResult, Stores
from jaxedit.runs.inputs import Session
from jaxedit.runs.method_flags import Chosen
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.runs.side_effects import SideEffects
from jaxedit.types import InputError, Progress, silent


def run(
    config: RunConfig,
    chosen: Chosen,
    kind: str,
    *,
    command: Mapping[str, Any],
    progress: Progress = silent,
) -> list[str]:
  """Does a whole run.

  Args:
    config: settings of the run.
    chosen: the method.
    kind: 'fact' or 'text', what the requests are.
    command: what a run that resumes must repeat, plain JSON types.
    progress: progress display.

  Returns:
    Lines to print.

  Raises:
    InputError: anything that cannot be used.
  """
  problems = errors(config)
  with InputError.collected(problems):
    side_effects.check(config)
  InputError.raise_for(problems)
  clock = Clock()
  with (
      compile_seconds(clock.seconds),
      Output(
          config.output_dir,
          command,
          overwrite=config.overwrite,
          writes=report.WRITTEN,
      ) as output,
  ):
    stale = report.stale_results(config, output.resumed)
    cli.use_compilation_cache(config.compilation_cache)
    session = inputs.load(
        config,
        chosen,
        kind,
        clock=clock,
        progress=progress,
        begin=output.begin,
    )
    output.clear(stale)  # nothing is refused any more
    return _work(session, output, clock, progress)


def _work(
    session: Session, output: Output, clock: Clock, progress: Progress
) -> list[str]:
  """Edits, judges and writes everything; returns what to print."""
  config, task, folder = session.config, session.task, output.folder
  if session.contexts:
    io.write_json(folder / 'templates.json', session.contexts)
  scorers = task.scorers(session.tokens, session.model.spec, session.model)
  with clock('factor'):
    state = session.editor.init(session.model, session.resources)
  stores = _stores(session, output)
  with clock('evaluate_before'):
    before = editing.judge(
        session, None, scorers, answers=stores.before, progress=progress
    )
  first = side_effects.measure(session, UNEDITED, clock, progress)
  outcome, after, then = _edit_parts(
      session, state, stores, scorers, before, first, clock, progress
  )
  work = report.work(session, outcome.info)
  if kept := work.get('states_kept'):
    print(
        f'note: the targets of {kept} of {len(session.encoded)} edits were kept;'
        ' seconds are those of the others',
        file=sys.stderr,
    )
  became = edit_reports.edit_reports(session, outcome.info)
  before, after = became.marked(before), became.marked(after, after=True)
  evaluations = {'pre': before, 'post': after}
  results: dict[str, Any] = {
      'protocol': session.meaning,
      'work': work,
      **became.results(after),
  }
  results |= side_effects.results(first, then)
  if outcome.along:
    results['along'] = outcome.along
  if config.save_model:
    with clock('save_model'):
      results['saved'], saved = _save_and_judge(
          session, outcome, stores, scorers, before, progress
      )
      evaluations['saved'] = became.marked(saved, after=True)
  clock.stop()
  results |= task.tables(evaluations)
  report.write(session, became, evaluations, results, clock)
  return report.lines(session, became, results, evaluations, clock)


def _stores(session: Session, output: Output) -> Stores:
  """Where a run saves: until it ends, or targets between runs."""
  about = {'run': session.meaning, 'versions': versions()}
  targets = TargetFiles(output.unfinished / 'targets', about, exact=True)
  if session.config.states:
    settings = target_settings(session.model, session.chosen.config)
    folder = hosts.own(session.config.states)
    hosts.follow(folder)
    targets = TargetFiles(pathlib.Path(folder), settings, exact=False)
  answers = Answers(output.unfinished / 'answers', about)
  return Stores(targets, output, answers, _kept_answers(session) or answers)


def _kept_answers(session: Session) -> Answers | None:
  """The unedited model's answers that runs share, if they shall."""
  config, model = session.config, session.model
  if not config.answers:
    return None
  about = {
      'versions': versions(),
      'model': model.hash,
      'dtype': config.dtype,
      'mesh': dict(model.placement.mesh.shape),
      'batch': config.eval_batch_size,
  }
  folder = hosts.own(config.answers)
  hosts.follow(folder)
  return KeptAnswers(pathlib.Path(folder), about)


def _edit_parts(
    session: Session,
    state: Any,
    stores: Stores,
    scorers: Sequence[Scorer],
    before: Evaluation,
    first: SideEffects,
    clock: Clock,
    progress: Progress,
) -> tuple[SessionResult, Evaluation, SideEffects]:
  """Edits, saves and judges all requests, part by part."""

  def judge_along(edited: Edited, indices: Sequence[int], info: Any):
    some = session.part(indices)
    with clock('evaluate_along'):
      after = editing.judge(
          some,
          SessionResult(edited, None, info),
          scorers,
          before=evaluation.select(before, indices),
          answers=stores.answers,
          progress=progress,
      )
    marked = edit_reports.edit_reports(some, info).marked(after, after=True)
    then = side_effects.measure(session, edited, clock, progress)
    return report.tables({'post': marked}) | then.report(first)

  parts, done = session.parts(), []
  for number, indices in enumerate(parts, 1):
    single = len(parts) == 1
    part = session if single else session.part(indices)
    outcome = editing.edit(
        part, state, stores, progress, judge_along=judge_along
    )
    clock.add(outcome.info.seconds)
    if single:  # where nothing could be written there is nothing to judge
      editing.require_some(outcome.info, stores.output)
    name = 'delta.safetensors' if single else f'deltas/{number:05}.safetensors'
    mine = [session.loaded.requests[i].number for i in indices]
    _write_delta(session, outcome, name, mine)
    with clock('evaluate_after'):
      own = evaluation.select(before, indices)
      after = editing.judge(
          part,
          outcome,
          scorers,
          before=own,
          answers=stores.answers,
          progress=progress,
      )
    then = side_effects.measure(session, outcome.edited, clock, progress)
    if single:
      return outcome, after, then
    # Written, and too large to keep.
    done.append((dataclasses.replace(outcome, edited=Edited()), after, then))
  outcomes, afters, measured = zip(*done)
  info = base.join_infos([one.info for one in outcomes])
  editing.require_some(info, stores.output)
  joined = evaluation.join(afters, seed=session.config.seed)
  then = side_effects.join(measured)
  return SessionResult(Edited(), None, info), joined, then


def _write_delta(
    session: Session, outcome: SessionResult, name: str, records: Sequence[int]
) -> None:
  """Writes the edit with what it was made for."""
  metadata = {
      **session.meaning,
      'records': list(records),
      'independent': outcome.edit_ids is not None,
  }
  edited_lib.save(session.config.folder / name, outcome.edited, metadata)


def _save_and_judge(
    session: Session,
    outcome: SessionResult,
    stores: Stores,
    scorers: Sequence[Scorer],
    before: Evaluation,
    progress: Progress,
) -> tuple[dict[str, Any], Evaluation]:
  """Writes the merged model, loads it again and evaluates it.

  Returns:
    (what to report of the merge, the evaluation of the saved model).
  """
  config, model = session.config, session.model
  exact = config.edited_dtype == 'float32'
  merged = edited_lib.apply(model.params, outcome.edited, dtype=jnp.float32)
  saved = saving.save_model(
      model.folder,
      stores.output.folder / 'model',
      model.spec,
      merged,
      changed=edited_lib.changed(outcome.edited),
      dtype='float32' if exact else None,
      keep_original=config.keep_original,
  )
  # In bf16 the matrices that were kept in float32 would be rounded after all.
  dtype = 'float32' if exact else config.dtype
  again = loading.load_model(saved.folder, dtype, mesh=session.model.placement)
  facts = {
      'folder': str(saved.folder),
      'evaluated_in': dtype,
      'model_hash': again.hash,
      'merge_error': saved.merge_error,
      'dtypes': sorted({t.dtype for t in saved.tensors.values()}),
  }
  session = dataclasses.replace(session, model=again)
  return facts, editing.judge(
      session,
      None,
      scorers,
      before=before,
      answers=Answers(
          stores.output.unfinished / 'saved', {'model': again.hash}
      ),
      progress=progress,
  )
