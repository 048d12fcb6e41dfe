"""Evaluates an edited model on requests: one call scores, one generates.

Scorers say what to ask and what the answers are worth (`scorers`); equal
questions of several scorers and requests are put to the model once.

With edits side by side every request is judged under the edit that `edit_ids`
names, so that many models, each with one edit, are evaluated side by side.

It reads no files, writes none and takes no times.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from jaxedit.edited import scoring
from jaxedit.edited.lm import LanguageModel
from jaxedit.eval import metrics
from jaxedit.eval.scorers.base import (
    Generation,
    Prompt,
    Questions,
    Replies,
    Scorer,
)
from jaxedit.models.spec import ModelSpec
from jaxedit.types import EditRequest, InputError, Progress, silent


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How a model did.

  Attributes:
    per_record: for each request a dict of plain JSON types: 'number', 'id',
      'metrics' (id -> value), of long answers and where they are given
      'category' and 'case', and what scorers add, such as 'text'.
    summary: metric id -> {'mean', 'low', 'high', 'n'}, see `metrics.aggregate`;
      requests of one case weigh as one.
    preferred: for each request and each probe that agreement is of (those of
      locality, of other attributes, distracting neighbours) the most
      probable tokens at the right answer; what `before` is read for.
  """

  per_record: list[dict[str, Any]]
  summary: dict[str, dict[str, Any]]
  preferred: tuple[tuple[tuple[int, ...], ...], ...]


def evaluate(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    scorers: Sequence[Scorer],
    *,
    before: Evaluation | None = None,
    edit_ids: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
  """Evaluates a model on requests.

  Args:
    lm: the model.
    requests: the edits, with what they are judged by.
    scorers: what to measure.
    before: the unedited model's evaluation of the same requests, for
      `locality_agreement`; without it that metric is absent.
    edit_ids: with edits side by side, which one each request is judged under.
    seed: of the intervals.
    progress: progress display.

  Returns:
    The evaluation.

  Raises:
    InputError: requests that the model cannot take, all at once; `before` or
      `edit_ids` of other requests.
  """
  _check_given(requests, before, edit_ids)
  asked = [scorer.prepare(requests) for scorer in scorers]
  errors = _errors(lm.spec, requests, scorers, asked)
  problems = [
      f'record {request.number} (id {request.id}), {error}'
      for request, found in zip(requests, errors)
      for error in found
  ]
  InputError.raise_for(problems)
  replies = _ask(lm, scorers, asked, edit_ids, progress)
  old = None if before is None else before.preferred
  judged = [
      scorer.judge(requests, own, old) for scorer, own in zip(scorers, replies)
  ]
  entries, preferred = [], []
  for request, *parts in zip(requests, *judged):
    entry: dict[str, Any] = {'number': request.number, 'id': request.id}
    for name in ('category', 'case'):
      if request.subject is None or getattr(request, name):
        entry[name] = getattr(request, name)
    entry['metrics'] = {}
    for part in parts:
      entry['metrics'] |= part.metrics
      entry |= part.fields
    entries.append(entry)
    preferred.append(tuple(p for part in parts for p in part.preferred))
  return _summed(entries, preferred, seed)


def errors(
    spec: ModelSpec, scorers: Sequence[Scorer], requests: Sequence[EditRequest]
) -> list[list[str]]:
  """Lists what `evaluate` would refuse; a check for a loader.

  Args:
    spec: the architecture.
    scorers: what to measure.
    requests: the edits.

  Returns:
    For each request sentences that do not name it.
  """
  asked = [scorer.prepare(requests) for scorer in scorers]
  return _errors(spec, requests, scorers, asked)


def select(evaluation: Evaluation, indices: Sequence[int]) -> Evaluation:
  """Picks some requests of an evaluation, e.g. as the `before` of a part.

  Args:
    evaluation: of all requests.
    indices: which to keep.

  Returns:
    Their entries, without a summary.
  """
  return Evaluation(
      [evaluation.per_record[i] for i in indices],
      {},
      tuple(evaluation.preferred[i] for i in indices),
  )


def join(parts: Sequence[Evaluation], *, seed: int) -> Evaluation:
  """Puts evaluations of different requests end to end and sums them up anew.

  Args:
    parts: one or more.
    seed: of the intervals.
  """
  entries = [entry for part in parts for entry in part.per_record]
  return _summed(entries, [p for part in parts for p in part.preferred], seed)


def by_category(
    evaluation: Evaluation, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
  """Sums up the requests of each category.

  Args:
    evaluation: of requests.
    seed: of the intervals.

  Returns:
    category -> metric id -> fields of `metrics.Interval`; empty where there
    are fewer than two categories.
  """
  groups: dict[str, list[dict[str, Any]]] = {}
  for entry in _in_force(evaluation.per_record):
    groups.setdefault(entry.get('category', ''), []).append(entry)
  if len(groups) < 2:
    return {}
  return {
      name: metrics.aggregate(metrics.by_case(entries), seed)
      for name, entries in sorted(groups.items())
  }


def _summed(
    entries: list[dict[str, Any]], preferred: Sequence[Any], seed: int
) -> Evaluation:
  summary = metrics.aggregate(metrics.by_case(_in_force(entries)), seed)
  return Evaluation(entries, summary, tuple(preferred))


def _in_force(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The records whose facts no later edit has written otherwise."""
  return [entry for entry in entries if not entry.get('superseded')]


def _check_given(
    requests: Sequence[EditRequest],
    before: Evaluation | None,
    edit_ids: Sequence[int] | None,
) -> None:
  """Refuses what was given for other requests."""
  problems = []
  if before is not None:
    names = [(entry['number'], entry['id']) for entry in before.per_record]
    if names != [(request.number, request.id) for request in requests]:
      problems.append(
          f'the unedited model was evaluated on {len(names)} other records than'
          f' the {len(requests)} given now; evaluate it on the same ones.'
      )
  if edit_ids is not None and len(edit_ids) != len(requests):
    problems.append(
        f'edit_ids has {len(edit_ids)} entries for {len(requests)} records;'
        ' give one a record'
    )
  InputError.raise_for(problems)


def _errors(
    spec: ModelSpec,
    requests: Sequence[EditRequest],
    scorers: Sequence[Scorer],
    asked: Sequence[Sequence[Questions]],
) -> list[list[str]]:
  """Lists what the scorers or the model cannot take of each request."""
  found = []
  for i, request in enumerate(requests):
    own, bad = [], {}  # text of a prompt, and more -> what is wrong
    for scorer, questions in zip(scorers, asked):
      own += scorer.errors(request)
      for text, query in questions[i].queries:
        if error := scoring.error(spec, query):
          bad[text, query.answers] = error
    scored = {text for text, _ in bad}
    for scorer, questions in zip(scorers, asked):
      for text, prompt in questions[i].prompts:
        new = scorer.generation.max_new_tokens
        if len(prompt.ids) + new > spec.max_positions and text not in scored:
          bad[text, new] = (
              f'its {len(prompt.ids)} tokens and {new} generated ones are more'
              f' than the {spec.max_positions} positions of the model; shorten'
              ' it or generate fewer'
          )
    what = 'question' if request.subject is None else 'prompt'
    messages = [f'{what} {t[:60]!r}: {error}.' for (t, _), error in bad.items()]
    found.append(own + messages)
  return found


def _ask(
    lm: LanguageModel,
    scorers: Sequence[Scorer],
    asked: Sequence[Sequence[Questions]],
    edit_ids: Sequence[int] | None,
    progress: Progress,
) -> list[list[Replies]]:
  """Puts all questions to the model, equal ones of one edit once."""
  edits = itertools.repeat(0) if edit_ids is None else edit_ids
  given = lambda keys: {
      'edit_ids': None if edit_ids is None else [edit for edit, *_ in keys],
      'progress': progress,
  }

  def key(scorer: Scorer, edit: int, one: Questions) -> tuple[list, list]:
    prompts = [(edit, x, _how(scorer, x)) for _, x in one.prompts]
    return [(edit, query) for _, query in one.queries], prompts

  keys = [
      [key(scorer, edit, one) for edit, one in zip(edits, some)]
      for scorer, some in zip(scorers, asked)
  ]
  queries, prompts = (
      [key for some in keys for one in some for key in one[part]]
      for part in range(2)
  )
  found = _once(
      queries, lambda keys: lm.score([q for _, q in keys], **given(keys))
  )
  for how in dict.fromkeys(how for *_, how in prompts):
    found |= _once(
        [key for key in prompts if key[-1] == how],
        lambda keys, how=how: lm.generate(
            [prompt.ids for _, prompt, _ in keys],
            streams=[prompt.stream for _, prompt, _ in keys],
            **how._asdict(),
            **given(keys),
        ),
    )
  return [
      [Replies(*([found[key] for key in part] for part in one)) for one in some]
      for some in keys
  ]


def _how(scorer: Scorer, prompt: Prompt) -> Generation:
  """How a prompt is continued."""
  how = scorer.generation
  if prompt.stop_ids is None:
    return how
  return how._replace(stop_ids=prompt.stop_ids)


def _once(
    keys: Sequence[Hashable], call: Callable[[list[Any]], list[Any]]
) -> dict[Hashable, Any]:
  """Returns the value of each key, from one call with the different ones."""
  unique = list(dict.fromkeys(keys))
  return dict(zip(unique, call(unique))) if unique else {}
