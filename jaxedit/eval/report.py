"""Writes evaluations as plain text for a terminal, at most 100 columns wide.

Fractions are shown as they are saved, not as percentages. Nothing is printed
here.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxedit.eval import metrics
from jaxedit.eval.evaluation import Evaluation
from jaxedit.types import EditRequest

WIDTH = 100
_ID = 28
_EXCERPT = 96


def table(pre: Evaluation, post: Evaluation) -> str:
  """Lays out the metrics before and after an edit.

  Args:
    pre: the unedited model's evaluation.
    post: the edited model's.

  Returns:
    Lines without a final line break: id, mean before, mean after, the 95 %
    interval of the latter, the number of records it is a mean of (of the former
    where only that exists), and the readable name. A dash stands for what one
    of the two lacks.
  """
  ids = [m for m in metrics.NAMES if m in pre.summary or m in post.summary]
  ids += sorted({*pre.summary, *post.summary}.difference(ids))
  head = ('metric', 'before', 'after', '95% interval', 'n', 'meaning')
  rows = [head, *(_cells(m, pre, post) for m in ids)]
  sizes = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for first, *numbers, last in rows:
    cells = [cell.rjust(size) for cell, size in zip(numbers, sizes[1:])]
    line = '  '.join([first.ljust(sizes[0]), *cells, ''])
    lines.append(line + _fit(last, WIDTH - len(line)))
  lines.insert(1, '-' * max(map(len, lines)))
  return '\n'.join(lines)


def _cells(
    metric: str, pre: Evaluation, post: Evaluation
) -> tuple[str, str, str, str, str, str]:
  """One row of the table."""
  before, after = pre.summary.get(metric), post.summary.get(metric)
  interval = '-'
  if after:
    interval = f'[{after["low"]:.3f}, {after["high"]:.3f}]'
  old, new = (f'{x["mean"]:.3f}' if x else '-' for x in (before, after))
  count = str((after or before)['n'])
  return (_fit(metric, _ID), old, new, interval, count, metrics.name(metric))


def generations(
    requests: Sequence[EditRequest],
    pre: Evaluation,
    post: Evaluation,
    count: int,
) -> str:
  """Shows what the model says before and after an edit.

  Args:
    requests: the facts that were evaluated.
    pre: the unedited model's evaluation of them.
    post: the edited model's.
    count: how many to show, from the first on.

  Returns:
    Three lines a fact, without a final line break; empty where no texts were
    generated.
  """
  blocks = []
  for request, old, new in zip(requests, pre.per_record, post.per_record):
    if old.get('text') is None or new.get('text') is None:
      continue
    # The object matters most: a long prompt is cut instead.
    wanted = _fit(request.target, WIDTH // 3)
    width = WIDTH - len(f'{request.number}.  -> {wanted}')
    lines = (
        f'{request.number}. {_fit(request.question, width)} -> {wanted}',
        f'   before: {_fit(old["text"], WIDTH - 11)}',
        f'   after:  {_fit(new["text"], WIDTH - 11)}',
    )
    blocks.append('\n'.join(lines))
  return '\n'.join(blocks[:count])


def excerpts(
    requests: Sequence[EditRequest],
    pre: Evaluation,
    post: Evaluation,
    count: int,
) -> str:
  """Shows how long answers begin before and after an edit.

  Args:
    requests: the long answers that were evaluated.
    pre: the unedited model's evaluation of them.
    post: the edited model's.
    count: how many to show, from the first on.

  Returns:
    Four lines a request, without a final line break.
  """
  shown = zip(requests[:count], pre.per_record, post.per_record)
  return '\n'.join(
      head + _fit(text, _EXCERPT - len(head))
      for request, old, new in shown
      for head, text in (
          (f'{request.number}. ', request.prompt),
          ('   wanted: ', request.target),
          ('   before: ', old['text']),
          ('   after:  ', new['text']),
      )
  )


def _fit(text: str, width: int) -> str:
  """Makes one printable line of at most `width` characters."""
  text = ''.join(char if char.isprintable() else ' ' for char in text)
  text = ' '.join(text.split())
  return text if len(text) <= width else text[: width - 3].rstrip() + '...'
