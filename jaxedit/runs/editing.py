"""Edits by a protocol: independent batches, or a sequence that may resume.

After each batch of a sequence the sum of the edits and the editor's state are
kept (`checkpoint`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit import edited as edited_lib
from jaxedit.checkpoint import Checkpoint
from jaxedit.deltas import UNEDITED, Edited
from jaxedit.edited import files
from jaxedit.eval import evaluation, protocols
from jaxedit.eval.evaluation import Evaluation
from jaxedit.eval.scorers.base import Scorer
from jaxedit.methods import base
from jaxedit.methods.base import EditBatch, Editor, EditResult, Info, Run
from jaxedit.models.loading import Model
from jaxedit.runs.answers import Answers
from jaxedit.runs.cache import TargetFiles, digest, edit_digest
from jaxedit.runs.inputs import Session, batches_of
from jaxedit.runs.output import Output
from jaxedit.types import InputError, Progress, silent


@dataclasses.dataclass(frozen=True)
class SessionResult:
  """What editing returned.

  Attributes:
    edited: the edit; of independent batches, side by side.
    edit_ids: which of them each request belongs to; None for one edit.
    info: of all requests together.
    along: what judging along the way found, in order; plain JSON types.
  """

  edited: Edited
  edit_ids: tuple[int, ...] | None
  info: Info
  along: tuple[Mapping[str, Any], ...] = ()


# (the edit so far, indices of its requests, how they went) -> what was found.
Judge = Callable[[Edited, Sequence[int], Info], Mapping[str, Any]]


class Stores(NamedTuple):
  """Where a run saves what it needs to resume.

  Attributes:
    targets: optimised targets.
    output: the folder; batches of a sequence lie in its `unfinished`.
    answers: of edited models under evaluation.
    before: of the unedited one.
  """

  targets: TargetFiles
  output: Output
  answers: Answers
  before: Answers


def edit(
    session: Session,
    state: Any,
    stores: Stores | None = None,
    progress: Progress = silent,
    *,
    judge_along: Judge | None = None,
) -> SessionResult:
  """Makes all edits of a session, by its protocol.

  Args:
    session: what to work on.
    state: what the editor's `init` returned.
    stores: where targets and checkpoints are saved; None saves nothing.
    progress: progress display.
    judge_along: judges a sequence where its config asks for it.

  Returns:
    The edit, or independent edits side by side.
  """
  cache = None if stores is None else stores.targets
  if session.config.reset:
    return _edit_independent(session, state, Run(cache, progress))
  outcome = _edit_in_sequence(
      session, state, stores, progress, judge_along=judge_along
  )
  edited = session.editor.finish(session.model, outcome.edited)
  return dataclasses.replace(outcome, edited=edited)


def _edit_independent(session: Session, state: Any, run: Run) -> SessionResult:
  """Edits batches that know nothing of each other."""
  editor, model, plan = session.editor, session.model, session.plan
  if session.alone:
    requests = session.loaded.requests
    batch = EditBatch(session.encoded, plan, session.cases, requests)
    result = editor.edit(model, state, batch, run)
    return SessionResult(result.edited, session.cases, result.info)
  batches = batches_of(session.cases, session.config.batch_size)
  results = [
      editor.edit(model, state, session.batch(some), run) for some in batches
  ]
  return SessionResult(
      edited_lib.stack([one.edited for one in results]),
      tuple(b for b, some in enumerate(batches) for _ in some),
      base.join_infos([one.info for one in results]),
  )


def _edit_in_sequence(
    session: Session,
    state: Any,
    stores: Stores | None,
    progress: Progress,
    *,
    judge_along: Judge | None,
) -> SessionResult:
  """Edits batch after batch, each on the model that the last one left."""
  config, model = session.config, session.model
  order = protocols.sequence(config.batch_size, judge_at=config.judge_at or ())
  steps = list(order.steps(session.cases))
  total, infos, along, first = UNEDITED, [], [], 0
  checkpoint, start = None, state
  if stores is not None and len(steps) > 1:
    checkpoint = Checkpoint(stores.output.unfinished / 'sequence')
    found = checkpoint.restore()
    if found is not None:
      step, arrays, record = found
      first = step + 1
      total, state, infos = _unpacked(arrays, record, state)
      along = list(record.get('along', ()))
  earlier = digest()
  for number, (indices, judged) in enumerate(steps):
    encoded = [session.encoded[i] for i in indices]
    if number >= first:
      cache = None
      if stores is not None:
        # In a sequence targets depend on all earlier edits.
        known = stores.targets
        cache = known if number == 0 else known.after(earlier)
      result = advance(
          session.editor,
          model,
          total,
          state,
          session.batch(indices),
          Run(cache, progress),
      )
      total, state = result.edited, result.state
      infos.append(result.info)
      last = number + 1 == len(steps)
      if judged and judge_along and not last:  # after the last all are anyway
        finished = session.editor.finish(model, total)
        found = judge_along(finished, judged, base.join_infos(infos))
        along.append({'edits': len(judged), **found})
      if checkpoint is not None and not last:
        # What a memory holds is in its state as well.
        kept_sum = UNEDITED if session.editor.cumulative else total
        arrays, record = _packed(kept_sum, state, start, infos)
        checkpoint.save(number, arrays, {**record, 'along': along})
    earlier = digest(earlier, *map(edit_digest, encoded))
  deltas = tuple(map(edited_lib.compact, total.deltas))
  return SessionResult(
      total.replace(deltas=deltas), None, base.join_infos(infos), tuple(along)
  )


def advance(
    editor: Editor,
    model: Model,
    total: Edited,
    state: Any,
    batch: EditBatch,
    run: Run,
) -> EditResult:
  """Edits a batch on the model that earlier edits left.

  Args:
    editor: the method.
    model: the unedited model.
    total: the sum of the earlier edits, as this function returned it.
    state: what the last edit returned, or `init`.
    batch: what to edit.
    run: where targets are kept, and progress.

  Returns:
    What the editor returned, its edit added to the earlier ones.
  """
  if editor.cumulative:
    return editor.edit(model, state, batch, run)
  # From the base each time: bf16 weights are rounded once in all.
  params = edited_lib.apply(model.params, total)
  current = dataclasses.replace(model, params=params)
  result = editor.edit(current, state, batch, run)
  return result._replace(edited=edited_lib.add(total, result.edited))


def changes(state: Any, start: Any) -> dict[str, Any]:
  """Names the arrays of a state that edits have changed since `init`."""
  pairs = zip(jax.tree.leaves(state), jax.tree.leaves(start))
  return {f'state/{i}': x for i, (x, y) in enumerate(pairs) if x is not y}


def restored(changed: Mapping[str, Any], start: Any) -> Any:
  """Puts what `changes` named back into what `init` returns."""
  leaves, tree = jax.tree.flatten(start)
  leaves = [changed.get(f'state/{i}', x) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(tree, leaves)


def _packed(
    total: Edited, state: Any, start: Any, infos: Sequence[Info]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a sequence resumes from, as arrays and a record."""
  arrays, deltas = files.packed(total)
  changed = changes(state, start)
  record = {'deltas': deltas, 'infos': [base.info_record(i) for i in infos]}
  return {**arrays, **changed}, record


def _unpacked(
    arrays: Mapping[str, np.ndarray], record: Mapping[str, Any], start: Any
) -> tuple[Edited, Any, list[Info]]:
  """What `_packed` saved."""
  state = restored(arrays, start)
  infos = [_kept(base.info_of(one)) for one in record['infos']]
  return Edited(files.unpacked(arrays, record['deltas'])), state, infos


def _kept(info: Info) -> Info:
  """The report of a batch that an interrupted run has edited."""
  work = info.work
  if work is not None:
    work = work._replace(kept=len(info.written), seconds={})
  return info._replace(seconds={}, work=work)


def judge(
    session: Session,
    outcome: SessionResult | None,
    scorers: Sequence[Scorer],
    *,
    before: Evaluation | None = None,
    answers: Answers | None = None,
    progress: Progress = silent,
) -> Evaluation:
  """Evaluates the edited model, or the unedited one.

  Args:
    session: what to work on.
    outcome: what editing returned; None for the unedited model.
    scorers: what to measure.
    before: the unedited model's evaluation of the same requests.
    answers: saves what the model answers; None saves nothing.
    progress: progress display.

  Returns:
    The evaluation of all requests, each under the edit it belongs to.
  """
  requests, config = session.loaded.requests, session.config

  def call(edited: Edited, some: Sequence[Any], old: Any, ids: Any = None):
    lm = edited_lib.open_model(
        session.model, edited, batch_size=config.eval_batch_size
    )
    if answers is not None:
      lm = answers.open(lm, edited, config.eval_batch_size)
    return evaluation.evaluate(
        lm,
        some,
        scorers,
        before=old,
        edit_ids=ids,
        seed=config.seed,
        progress=progress,
    )

  if outcome is None:
    return call(UNEDITED, requests, before)
  if outcome.edit_ids is None or session.alone:
    return call(outcome.edited, requests, before, outcome.edit_ids)
  # A change of many facts a sequence would not fit; the sequences of a batch
  # share one.
  parts = [
      call(
          edited_lib.select(outcome.edited, number),
          [requests[i] for i in some],
          evaluation.select(before, some) if before else None,
      )
      for number, some in enumerate(
          batches_of(session.cases, config.batch_size)
      )
  ]
  return evaluation.join(parts, seed=config.seed)


def require_some(info: Info, output: Output | None = None) -> None:
  """Refuses a run in which no edit could be written.

  Args:
    info: of all edits.
    output: forgets what was found, which is of no use.

  Raises:
    InputError: with the method's reason.
  """
  if len(info.written) and not info.written.any():
    if output is not None:
      output.forget()
    raise InputError(f'no edit was written: {info.reason}')
