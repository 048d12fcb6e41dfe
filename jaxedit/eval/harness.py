"""Evaluates an edited model on records: one call scores, one generates.

For every record these rows are scored (see `scoring`):

  edit prompt, paraphrases    answers: new object, old object if it is known
  neighbours                  answers: their own right one, new object
  probes of portability       answer: their own

and, unless switched off, the model continues the edit prompt and the first
paraphrase by itself (see `generation`). Equal rows of different records are
scored once. `metrics` says what each number means.

A record without `target_true` has no probability metrics at its edit prompt and
paraphrases, as these compare two objects; its accuracies stay.

With edits side by side every record is judged under the edit that `edit_ids`
names, so that many models, each with one edit, are evaluated side by side.

It reads no files, writes none and takes no times.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxedit.edited import scoring
from jaxedit.edited.lm import LanguageModel
from jaxedit.eval import generation, metrics
from jaxedit.models.spec import ModelSpec
from jaxedit.types import (
    InputError,
    Progress,
    Record,
    silent,
)

_EDIT, _PARAPHRASE, _NEIGHBOUR = 'edit', 'paraphrase', 'neighbour'
# Group -> ids of its success, magnitude, all-correct and token metrics.
_GROUPS = {
    _EDIT: ('es', 'em', 'es_acc', 'reliability'),
    _PARAPHRASE: ('ps', 'pm', 'ps_acc', 'generalization'),
    _NEIGHBOUR: ('ns', 'nm', 'ns_acc', 'locality_correct'),
}
# group, prompt, answers
_Question = tuple[str, str, tuple[str, ...]]
_Groups = Mapping[str, Sequence[Sequence[scoring.Scored]]]


class _Key(NamedTuple):
  """What makes two rows equal."""

  edit: int
  prompt: str
  answers: tuple[str, ...]


class _Results(NamedTuple):
  """What the model gave, by row."""

  keys: Sequence[Sequence[_Key]]  # of each record, as `_questions` lists them
  spoken: Sequence[Mapping[str, _Key | None]]  # of each record, see `_spoken`
  scores: Mapping[_Key, Sequence[scoring.Scored]]
  texts: Mapping[_Key, str]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How a model did.

  Attributes:
    per_record: for each record a dict of plain JSON types: 'number', 'id',
      'metrics' (id -> value), 'nll_new' and 'nll_true' (nats a token at the
      edit prompt; None where there is no old object or the model's number is
      not finite) and, if texts were generated, 'text' and 'paraphrase_text'
      (None without a paraphrase).
    summary: metric id -> {'mean', 'low', 'high', 'n'}, see `metrics.aggregate`.
    preferred: for each record and each of its neighbours the most probable
      tokens at the right answer; what `base` is read for.
  """

  per_record: list[dict[str, Any]]
  summary: dict[str, dict[str, Any]]
  preferred: tuple[tuple[tuple[int, ...], ...], ...]


def evaluate(
    lm: LanguageModel,
    records: Sequence[Record],
    tokenizer: Any,
    *,
    base: Evaluation | None = None,
    edit_ids: Sequence[int] | None = None,
    max_new_tokens: int = generation.MAX_NEW_TOKENS,
    stop: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
  """Evaluates a model on records.

  Args:
    lm: the model.
    records: the facts, with what they are judged by.
    tokenizer: a fast transformers tokenizer.
    base: the unedited model's evaluation of the same records, for
      `locality_agreement`; without it that metric is absent.
    edit_ids: with edits side by side, which one each record is judged under.
    max_new_tokens: length of generated texts, tokens; 0 generates none.
    stop: tokens that end a text; found in the tokenizer if not given, which
      takes a moment for every call.
    seed: of the intervals.
    progress: progress display.

  Returns:
    The evaluation.

  Raises:
    InputError: records that the model cannot take, all at once; a base or
      `edit_ids` of other records.
  """
  _check_base(base, records)
  check_edit_ids(edit_ids, records)
  keys = _keys(records, edit_ids)
  unique = list(dict.fromkeys(itertools.chain.from_iterable(keys)))
  encoded = scoring.encode_queries(tokenizer, [key[1:] for key in unique])
  rows = dict(zip(unique, encoded))
  spoken = [
      _spoken(own, record) if max_new_tokens else {}
      for own, record in zip(keys, records)
  ]
  _check_rows(records, keys, _faults(lm.spec, rows, spoken, max_new_tokens))

  def ids_of(chosen: Sequence[_Key]) -> list[int] | None:
    return None if edit_ids is None else [key.edit for key in chosen]

  scored = lm.score(encoded, edit_ids=ids_of(unique), progress=progress)
  said: list[str] = []
  chosen = list(dict.fromkeys(k for own in spoken for k in own.values() if k))
  if chosen:
    if stop is None:
      stop = generation.stop_ids(tokenizer, lm.spec.vocab)
    said = generation.free_generation(
        lm,
        [rows[key].prompt for key in chosen],
        tokenizer=tokenizer,
        stop=stop,
        edit_ids=ids_of(chosen),
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
  texts = dict(zip(chosen, said))
  results = _Results(keys, spoken, dict(zip(unique, scored)), texts)
  return _assemble(records, results, base=base, seed=seed)


def select(evaluation: Evaluation, indices: Sequence[int]) -> Evaluation:
  """Picks some records of an evaluation, e.g. as the base of a part.

  Args:
    evaluation: of all records.
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
  """Puts evaluations of different records end to end and sums them up anew.

  Args:
    parts: one or more.
    seed: of the intervals.
  """
  entries = [entry for part in parts for entry in part.per_record]
  preferred = tuple(p for part in parts for p in part.preferred)
  summary = metrics.aggregate(metrics.by_case(entries), seed)
  return Evaluation(entries, summary, preferred)


def record_check(
    spec: ModelSpec, tokenizer: Any, *, max_new_tokens: int
) -> Callable[[Record], list[str]]:
  """Makes the check that finds what `evaluate` would refuse in a record.

  Args:
    spec: the architecture.
    tokenizer: a fast transformers tokenizer.
    max_new_tokens: length of generated texts, tokens; 0 generates none.

  Returns:
    record -> sentences that do not name the record, for the `check` argument
    of a loader.
  """

  def check(record: Record) -> list[str]:
    (keys,) = _keys([record], None)
    encoded = scoring.encode_queries(tokenizer, [key[1:] for key in keys])
    spoken = _spoken(keys, record) if max_new_tokens else {}
    rows = dict(zip(keys, encoded))
    faults = _faults(spec, rows, [spoken], max_new_tokens)
    return [_sentence(key, fault) for key, fault in faults.items()]

  return check


def _keys(
    records: Sequence[Record], edit_ids: Sequence[int] | None
) -> list[list[_Key]]:
  """Lists what every record is scored on, see `_questions`."""
  edit_ids = [0] * len(records) if edit_ids is None else edit_ids
  return [
      [_Key(own, prompt, answers) for _, prompt, answers in _questions(record)]
      for record, own in zip(records, edit_ids)
  ]


def _questions(record: Record) -> list[_Question]:
  """Lists what a record is scored on, the edit prompt and paraphrases first."""
  objects = (record.target_new,)
  if record.target_true is not None:
    objects += (record.target_true,)
  questions = [(_EDIT, record.question, objects)]
  questions += [(_PARAPHRASE, p, objects) for p in record.paraphrases]
  questions += [
      (_NEIGHBOUR, probe.prompt, (probe.answer, record.target_new))
      for probe in record.neighbours
  ]
  questions += [
      (metrics.PORTABILITY + kind, probe.prompt, (probe.answer,))
      for kind, probes in record.portability.items()
      for probe in probes
  ]
  return questions


def _check_base(base: Evaluation | None, records: Sequence[Record]) -> None:
  """Refuses a base that was made of other records."""
  if base is None:
    return
  judged = [(entry['number'], entry['id']) for entry in base.per_record]
  counts = list(map(len, base.preferred))
  if judged != [(r.number, r.id) for r in records] or counts != [
      len(r.neighbours) for r in records
  ]:
    raise InputError(
        f'the unedited model was evaluated on {len(judged)} other records than'
        f' the {len(records)} given now; evaluate it on the same ones.'
    )


def check_edit_ids(
    edit_ids: Sequence[int] | None, records: Sequence[Any]
) -> None:
  """Refuses `edit_ids` that are not one a record."""
  if edit_ids is not None and len(edit_ids) != len(records):
    raise InputError(
        f'edit_ids has {len(edit_ids)} entries for {len(records)} records; give'
        ' one a record'
    )


def _faults(
    spec: ModelSpec,
    rows: Mapping[_Key, scoring.Query],
    spoken: Sequence[Mapping[str, _Key | None]],
    new: int,
) -> dict[_Key, str]:
  """Finds rows that cannot be scored, or continued by `new` tokens."""
  faults = {}
  for key in (key for own in spoken for key in own.values() if key):
    if len(rows[key].prompt) + new > spec.max_positions:
      faults[key] = (
          f'its {len(rows[key].prompt)} tokens and {new} generated ones are'
          f' more than the {spec.max_positions} positions of the model; shorten'
          ' it or generate fewer'
      )
  for key, row in rows.items():
    fault = scoring.error(spec, row)
    if fault:
      faults[key] = fault
  return faults


def _check_rows(
    records: Sequence[Record],
    keys: Sequence[Sequence[_Key]],
    faults: Mapping[_Key, str],
) -> None:
  """Raises one error for all faulty rows, by record."""
  problems = [
      f'record {record.number} (id {record.id}), ' + _sentence(key, faults[key])
      for record, own in zip(records, keys)
      for key in own
      if key in faults
  ]
  if problems:
    raise InputError(*problems)


def _sentence(key: _Key, fault: str) -> str:
  """Says of a row what is wrong with it."""
  return f'prompt {key.prompt[:60]!r}: {fault}.'


def _spoken(keys: Sequence[_Key], record: Record) -> dict[str, _Key | None]:
  """Picks the rows of a record whose prompts the model continues."""
  paraphrase = keys[1] if record.paraphrases else None
  return {'text': keys[0], 'paraphrase_text': paraphrase}


def _assemble(
    records: Sequence[Record],
    results: _Results,
    *,
    base: Evaluation | None,
    seed: int,
) -> Evaluation:
  """Turns scores and texts into metrics."""
  entries, preferred = [], []
  for i, (record, keys) in enumerate(zip(records, results.keys)):
    groups: dict[str, list[Sequence[scoring.Scored]]] = {}
    for (group, _, _), key in zip(_questions(record), keys):
      groups.setdefault(group, []).append(results.scores[key])
    spoken = results.spoken[i].items()
    said = {name: results.texts.get(key) for name, key in spoken}
    values = _score_metrics(groups) | _text_metrics(record, said)
    answers = groups.get(_NEIGHBOUR, ())
    preferred.append(tuple(scores[0].argmax for scores in answers))
    if base is not None and answers:
      values['locality_agreement'] = metrics.agreement(
          preferred[-1], base.preferred[i]
      )
    ((new, *true),) = groups[_EDIT]
    entries.append(
        {
            'number': record.number,
            'id': record.id,
            'nll_new': _finite(new.nll),
            'nll_true': _finite(true[0].nll) if true else None,
            'metrics': values,
            **said,
        }
    )
  summary = metrics.aggregate([e['metrics'] for e in entries], seed)
  return Evaluation(entries, summary, tuple(preferred))


def _score_metrics(groups: _Groups) -> dict[str, float]:
  """Metrics of one record that need its scores alone."""
  values = {}
  for group, prompts in groups.items():
    wanted = [scores[0] for scores in prompts]
    correct = [answer.correct for answer in wanted]
    if group not in _GROUPS:
      values[group] = metrics.token_accuracy(correct)
      continue
    success, magnitude, every, token = _GROUPS[group]
    if len(prompts[0]) == 2:
      pairs = [(first.nll, second.nll) for first, second in prompts]
      values[success] = metrics.success(pairs)
      values[magnitude] = metrics.magnitude(pairs)
      if group == _EDIT:
        true = [scores[1].correct for scores in prompts]
        values['true_preferred'] = metrics.success([p[::-1] for p in pairs])
        values['true_acc'] = metrics.all_correct(true)
    values[every] = metrics.all_correct(correct)
    values[token] = metrics.token_accuracy(correct)
  return values


def _text_metrics(
    record: Record, said: Mapping[str, str | None]
) -> dict[str, float]:
  """Metrics of one record that need its generated texts."""
  values = {}
  text, paraphrased = said.get('text'), said.get('paraphrase_text')
  if text is not None:
    match = generation.exact_match(text, record.target_new)
    values['exact_match'] = float(match)
    holds = generation.contains(text, record.target_new)
    values['contains'] = float(holds)
  if paraphrased is not None:
    holds = generation.contains(paraphrased, record.target_new)
    values['paraphrase_contains'] = float(holds)
  return values


def _finite(nll: float) -> float | None:
  """JSON has no NaN and no infinity."""
  return nll if math.isfinite(nll) else None
