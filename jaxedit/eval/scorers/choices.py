"""Which of the given answers to a question a possibly edited model prefers.

  choice       = argmax_i sum_t log p(c_it | question, c_i1 .. c_i,t-1)
  choice_norm  = argmax_i of that sum / bytes of c_i

Protocol: "Question: {question}\\nAnswer:", a blank, the answer; no examples
before it. Accuracy is the share of questions whose choice is the right one; one
whose scores are not finite has no choice, which is wrong. PIQA (Bisk et al.
2020, arXiv 1911.11641) is read so, as lm-evaluation-harness reads it.

Of edits side by side each answers all questions by itself, and a question counts
with the mean over them.

Axis letters: E edits (1 where there is one model), Q questions, C answers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import io, statistics
from jaxedit.edited import scoring
from jaxedit.edited.lm import LanguageModel
from jaxedit.eval.datasets import entries as entries_lib
from jaxedit.eval.datasets.fields import Fields
from jaxedit.types import InputError, Progress, silent

_PIQA = ('sol1', 'sol2')


class Item(NamedTuple):
  """A question with given answers.

  Attributes:
    question: the question, or a goal.
    choices: C answers, at least two.
    label: the right one, counted from 0.
  """

  question: str
  choices: tuple[str, ...]
  label: int


class Choices(NamedTuple):
  """What a model prefers.

  Attributes:
    picked: [2, E, Q] int, the choice by the sum and by the sum a byte; -1 for
      none.
    labels: [Q] int.
  """

  picked: np.ndarray
  labels: np.ndarray

  def report(self, before: Choices | None = None) -> dict[str, Any]:
    """Shares of questions, as results.json has them.

    Args:
      before: of the unedited model.

    Returns:
      'accuracy' and 'accuracy_norm'; 'same', the questions whose choice is that
      of `before`; their intervals, the number of questions, and the protocol.
    """
    rows = dict(zip(('accuracy', 'accuracy_norm'), self.picked == self.labels))
    if before is not None:
      rows['same'] = self.picked[0] == before.picked[0]
    values = np.stack([row.mean(0) for row in rows.values()], axis=1)
    low, high = statistics.percentiles(statistics.bootstrap_means(values))
    found = dict(zip(rows, map(float, values.mean(0))))
    found['intervals'] = {
        name: [float(a), float(b)] for name, a, b in zip(rows, low, high)
    }
    apart = self.picked.shape[1] > 1
    protocol = '"Question: ...\\nAnswer:", then each answer; the largest sum of'
    protocol += ' log-probabilities, for accuracy_norm a byte of the answer'
    protocol += '; under every edit by itself, mean over edits' * apart
    return found | {'questions': len(self.labels), 'protocol': protocol}


def read(path: str, limit: int | None = None) -> list[Item]:
  """Reads questions.

  Args:
    path: JSON lines or a JSON list of objects: 'goal', 'sol1', 'sol2' as PIQA
      has them, or 'question' and 'choices', a list; 'label', the number of the
      right answer, from 0. Without labels they are the lines of
      '<stem>-labels.lst' beside it, as PIQA is published.
    limit: read this many and no more.

  Returns:
    The questions, in order.

  Raises:
    InputError: the file cannot be read, or an object is no such question; all
      of them at once.
  """
  try:
    blob, labels = io.read_bytes(path), _labels(pathlib.Path(path))
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
        f'{path}: cannot be read ({error}); give a file of questions, one object'
        ' a line'
    ) from None
  items, problems = [], []
  for entry in entries_lib.entries(blob, path):
    if limit is not None and entry.number > limit:
      break
    item, errors = _item(entry, labels)
    problems += [f'{path}: record {entry.number}: {e}' for e in errors]
    items.append(item)
  else:
    if labels is not None and len(labels) != len(items):
      problems.append(
          f'{path}: {len(items)} questions, and {len(labels)} lines in the'
          ' -labels.lst beside it; give one a question.'
      )
  if not items:
    problems.append(f'{path}: holds no question; give one object a line.')
  InputError.raise_for(entries_lib.shorten(problems, path))
  return items


def _labels(path: pathlib.Path) -> list[str] | None:
  """The lines of the file of labels beside questions, if there is one."""
  stem = path.name.removesuffix('.gz')
  stem = stem.rpartition('.')[0] or stem
  beside = path.with_name(f'{stem}-labels.lst')
  return io.read_bytes(beside).decode().split() if beside.is_file() else None


def _item(
    entry: entries_lib.Entry, labels: Sequence[str] | None
) -> tuple[Item | None, list[str]]:
  """Reads one object; returns its errors too."""
  if not isinstance(entry.data, dict):
    return None, [entry.error or 'is no object; write one a line.']
  fields = Fields(entry.data)
  if 'goal' in entry.data:
    question = fields.text('goal')
    choices = tuple(fields.text(name) for name in _PIQA)
  else:
    question, choices = fields.text('question'), fields.texts('choices')
    if len(choices) < 2 and not fields.errors:
      fields.error('choices', 'needs two answers at least; add them.')
  label = entry.data.get('label')
  if label is None and labels is not None and entry.number <= len(labels):
    line = labels[entry.number - 1]
    label = int(line) if line.isdigit() else line
  wrong = isinstance(label, bool) or label not in range(len(choices))
  if choices and wrong:
    fields.error(
        'label',
        f'is {label!r}; give the number of the right answer, 0 to'
        f' {len(choices) - 1}, here or in a -labels.lst beside the file.',
    )
  choices = tuple(choice.strip() for choice in choices)
  return Item(question.strip(), choices, label), fields.errors


def choose(
    lm: LanguageModel,
    items: Sequence[Item],
    tokenizer: Any,
    *,
    edits: Sequence[int] | None = None,
    progress: Progress = silent,
) -> Choices:
  """Asks a model; see the module head for the protocol.

  Args:
    lm: the model.
    items: Q questions.
    tokenizer: a fast transformers tokenizer, or its `TokenCache`.
    edits: of a model with edits side by side, those to ask it under.
    progress: progress display.

  Returns:
    The choices.

  Raises:
    InputError: a question is too long for the model, or has an answer without
      tokens; all at once.
  """
  asked = [
      (f'Question: {one.question}\nAnswer:', one.choices, True) for one in items
  ]
  queries = scoring.encode_queries(tokenizer, asked)
  times = 1 if edits is None else len(edits)
  ids = None if edits is None else np.repeat(edits, len(queries)).tolist()
  scored = lm.score(queries * times, edit_ids=ids, progress=progress)
  picked = [
      _picked(row, items[i % len(items)].choices)
      for i, row in enumerate(scored)
  ]
  picked = np.reshape(picked, (times, len(items), 2))
  return Choices(
      np.moveaxis(picked, 2, 0), np.array([one.label for one in items])
  )


def _picked(
    scores: Sequence[scoring.Scored], choices: Sequence[str]
) -> tuple[int, int]:
  """The choice by the sum of log-probabilities, and by that a byte."""
  total = np.array([-one.nll * len(one.argmax) for one in scores])
  if not np.isfinite(total).all():
    return -1, -1
  size = [len(choice.encode()) for choice in choices]
  return int(np.argmax(total)), int(np.argmax(total / size))


def join(parts: Sequence[Choices]) -> Choices:
  """Joins what edits side by side prefer, part by part.

  Args:
    parts: of the same questions.

  Returns:
    That of all edits.
  """
  picked = np.concatenate([part.picked for part in parts], axis=1)
  return Choices(picked, parts[0].labels)
