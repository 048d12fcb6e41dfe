"""Traces long answers: how far a pushed state reaches, and from which layer.

reach     the state before an answer is pushed (`reach`): by how much does each
          token of the answer move, by its distance?
locating  the question is corrupted and the state before a chunk is restored:
          in which layer does that bring most of the chunk back?
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit import statistics
from jaxedit.models import loading
from jaxedit.text import locate
from jaxedit.text.chat import Chat
from jaxedit.text.encoding import EncodedEdit
from jaxedit.trace import (
    causal,
    fact_trace,
    figures,
    noise,
    plots,
    reach,
    results,
)
from jaxedit.trace.restoration import HIDDEN
from jaxedit.types import Progress, silent

# Distances, tokens, that are averaged together: 1, 2, 3-4, 5-8, ...
_BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def text_of(edit: EncodedEdit) -> reach.Text:
  """A passage as `reach` takes it."""
  return reach.Text(
      np.concatenate([edit.rows[0], edit.target]), len(edit.rows[0])
  )


def question_span(
    tokenizer: Any, chat: Chat, question: str, prompt: np.ndarray
) -> tuple[int, int]:
  """Finds the question in a prompt.

  Args:
    tokenizer: the tokenizer.
    chat: words around the question.
    question: the bare question.
    prompt: [T] ids.

  Returns:
    Its first token and one past its last.
  """
  case = (chat.before, question, chat.after)
  ((ids, span),) = locate.locate_subjects(tokenizer, [case])
  # Where the chat brings the BOS token, the tokenizer's own is left out.
  extra = len(ids) - len(prompt)
  return span[0] - extra, span[1] + 1 - extra


def chunk_cases(
    edit: EncodedEdit, span: tuple[int, int], drawn: np.ndarray
) -> list[causal.Case]:
  """Makes a case of every chunk: the text up to it, its tokens scored.

  Args:
    edit: a passage as ids.
    span: the question's tokens.
    drawn: [n, tokens, D] noise for them.

  Returns:
    One case a chunk; the chunk's anchor is its first scored column.
  """
  prompt, target = edit.rows[0], edit.target
  return [
      causal.Case(
          np.concatenate([prompt, target[: end - 1]]),
          *span,
          noise=drawn,
          labels=target[begin:end],
      )
      for begin, end in edit.chunks or ((0, len(target)),)
  ]


def noisy_cases(
    model: loading.Model,
    edits: Sequence[EncodedEdit],
    spans: Sequence[tuple[int, int]],
    *,
    level: str,
    draws: int,
    seed: int,
) -> tuple[list[list[causal.Case]], noise.Noise]:
  """(cases of every passage, one a chunk; the noise that corrupts questions)."""
  asked = [edit.rows[0][slice(*span)] for edit, span in zip(edits, spans)]
  std = noise.embedding_std(model.params, np.concatenate(asked))
  found = noise.level(level, std)
  cases = []
  for edit, (first, end) in zip(edits, spans):
    shape = (draws, end - first, model.spec.width)
    drawn = noise.draw(found, shape, seed)
    cases.append(chunk_cases(edit, (first, end), drawn))
  return cases, found


def locating(
    model: loading.Model,
    cases: Sequence[Sequence[causal.Case]],
    progress: Progress = silent,
    pieces: Any = fact_trace.UNSAVED,
) -> dict[str, dict[str, Any]]:
  """Restores the state before every chunk.

  Args:
    model: the model.
    cases: of every passage, one a chunk.
    progress: told of cells.
    pieces: see `fact_trace.trace_facts`.

  Returns:
    'first' (chunk of a passage) and 'later' -> share of what the corruption took
    that restoring brings back, over all passages: 'mean' and 'half_width_95' by
    layer, 'count' of passages; and 'layer', where it is largest. Nothing for
    'later' where no answer has more than one chunk.
  """
  flat = [case for some in cases for case in some]
  anchors = [(len(case.ids) - len(case.labels),) for case in flat]
  run = functools.partial(
      causal.trace, model.spec, model.params,
      placement=model.placement, restorations=[HIDDEN], progress=progress,
  )  # fmt: skip
  found, _ = fact_trace.resumed(run, [HIDDEN.name], flat, anchors, pieces)
  effects = iter(
      [*(x.scores['hidden'][anchor] - x.low), x.high - x.low]
      for x, (anchor,) in zip(found, anchors)
  )
  rows = {'first': [], 'later': []}
  for some in cases:
    first, *later = [next(effects) for _ in some]
    rows['first'].append(first)
    if later:
      rows['later'].append(np.mean(later, axis=0))
  return {name: located(np.array(x)) for name, x in rows.items() if x}


def located(rows: np.ndarray) -> dict[str, Any]:
  """Sums up what restoring brings back.

  The share is one of means: where a corruption takes next to nothing, the share
  of a single passage says next to nothing either.

  Args:
    rows: [passages, L + 1] effects by layer and, last, what was lost.

  Returns:
    The entry of a chunk, see `locating`; the 'count' alone where nothing was
    lost.
  """
  rows = rows[np.isfinite(rows).all(1)]
  count = len(rows)
  share = lambda rows: rows[..., :-1].mean(-2) / rows[..., -1:].mean(-2)
  if not count or rows[:, -1].mean() <= 0:
    return {'count': 0}
  mean, drawn = share(rows), statistics.bootstrap(rows, share)
  half = statistics.QUANTILE * drawn.std(axis=0)
  known = count > 1 and np.isfinite(half).all()
  # The last layer's state is read as it stands, whatever came before.
  return {
      'count': count,
      'mean': mean.tolist(),
      'half_width_95': half.tolist() if known else [None] * len(half),
      'layer': int(np.argmax(mean[:-1])),
  }


def by_distance(
    reached: Sequence[reach.Reach], layers: Sequence[int]
) -> list[dict[str, Any]]:
  """Averages over passages what a push moved, by distance from the anchor.

  Args:
    reached: one a passage.
    layers: of the pushes.

  Returns:
    For every range of distances 'from', 'to' (tokens, both included), 'count'
    of passages that are so long, 'moved' (nats, mean by layer) and
    'half_width_95'.
  """
  table = []
  for low, high in zip(_BINS, _BINS[1:]):
    rows = [
        one.moved[:, low:high].mean(1)
        for one in reached
        if len(one.logprob) > low
    ]
    if not rows:
      break
    mean, half = statistics.normal_interval(np.array(rows))
    table.append(
        {
            'from': low + 1,
            'to': high,
            'count': len(rows),
            'moved': dict(zip(map(str, layers), mean.tolist())),
            'half_width_95': results.numbers(half),
        }
    )
  return table


def draw(
    table: Sequence[Mapping[str, Any]],
    located: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
  """Draws what `by_distance` and `locating` found."""
  with figures.styled():
    reached, axes = figures.new(3.4)
    for layer in table[0]['moved']:
      x = [row['from'] for row in table]
      y = [row['moved'][layer] for row in table]
      axes.plot(x, y, marker='o', markersize=3, label=f'layer {layer}')
    axes.set_xscale('log', base=2)
    axes.set_xlabel('distance from the pushed token, tokens')
    axes.set_ylabel('|change of log p|, nats')
    axes.legend(fontsize=7, ncol=2)
    located_in, axes = figures.new(3.4)
    for name, row in located.items():
      if row['count']:
        axes.plot(row['mean'], label=f'{name} chunk (best: {row["layer"]})')
    axes.set_xlabel('layer whose state before the chunk is restored')
    axes.set_ylabel('share of p brought back')
    axes.legend()
  plots.save(reached, folder, 'reach')
  plots.save(located_in, folder, 'locating')


def summary_lines(
    table: Sequence[Mapping[str, Any]], located: Mapping[str, Any]
) -> list[str]:
  """What a program prints at the end."""
  layers = list(table[0]['moved'])
  lines = ['', '|change of log p| by distance and pushed layer, nats:']
  lines.append('  tokens  ' + ''.join(f'{name:>8}' for name in layers))
  for row in table:
    where = f'{row["from"]}-{row["to"]}'
    numbers = ''.join(f'{row["moved"][name]:8.3f}' for name in layers)
    lines.append(f'  {where:<8}{numbers}')
  for name, row in located.items():
    if row['count']:
      best = row['layer']
      lines.append(
          f'{name} chunks: restoring layer {best} brings back'
          f' {row["mean"][best]:.0%} ({row["count"]} passages)'
      )
  return lines
