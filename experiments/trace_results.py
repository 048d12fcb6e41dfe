"""What a causal trace leaves behind: arrays, lines, averages, a summary.

traces.npz holds plain arrays, by record number as in facts.jsonl:

  <number>/ids      [T] int32 tokens of the prompt
  <number>/subject  [2] int32 first token of the subject and one past its last
  <number>/<kind>   [T, L] float64 p(answer) with that state restored; NaN where
                    it was not computed
  numbers, answers  [E] int32 record numbers, and tokens that were scored
  high, low         [E] float64 p(answer), clean and corrupted

Nothing here reads a flag, runs a model or draws.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from jaxedit import io
from jaxedit.eval.known_facts import Fact
from jaxedit.trace import causal, effects

LAST_SUBJECT = effects.CLASSES.index('last subject token')
_LISTED = 5  # facts left out that are told at once; results.json has all


class Found(NamedTuple):
  """A traced fact.

  Attributes:
    fact: what was asked.
    ids: [T] int32 tokens of the prompt.
    tokens: their texts.
    span: first token of the subject and one past its last.
    answer: text of the token that was scored.
    completes: 'whole' if that is the attribute, 'begins' if it is its first
      token, 'misses' if neither, 'unasked' if there is no attribute.
    result: of the trace.
  """

  fact: Fact
  ids: np.ndarray
  tokens: tuple[str, ...]
  span: tuple[int, int]
  answer: str
  completes: str
  result: causal.Traced


def finite(result: causal.Traced) -> bool:
  """Whether all numbers of a trace that was asked for are finite."""
  grids = result.scores.values()
  # A column that was not asked for is NaN in all layers.
  asked = [grid[~np.isnan(grid).all(axis=1)] for grid in grids]
  numbers = [np.array([result.high, result.low]), *asked]
  return all(len(x) and np.isfinite(x).all() for x in numbers)


def averages(
    found: Sequence[Found], kinds: Sequence[str], last_only: bool = False
) -> dict[str, effects.Average]:
  """Averages the effects of every kind over facts, by role of a token.

  Args:
    found: the facts.
    kinds: what was restored.
    last_only: whether it was at the last subject token alone, as severed kinds
      always are. A subject's only token would pass for its first one there, so
      all other roles are left out.
  """
  results = [one.result for one in found]
  spans = [one.span for one in found]
  table = {kind: effects.average(results, spans, kind) for kind in kinds}
  for kind, average in table.items():
    if last_only or kind.startswith('severed'):
      other = np.arange(len(effects.CLASSES)) != LAST_SUBJECT
      average.mean[other] = average.half_width[other] = np.nan
      average.count[other] = 0
  return table


def results_of(
    found: Sequence[Found],
    averages: Mapping[str, effects.Average],
    missed: Sequence[dict[str, Any]],
) -> dict[str, Any]:
  """The numbers of results.json."""
  traced = [one.result for one in found]
  mean, half = effects.total_effect(traced)
  count = lambda how: sum(one.completes == how for one in found)
  ways = ('whole', 'begins', 'misses', 'unasked')
  return {
      'facts': {
          'traced': len(found),
          'left_out': len(missed),
          'completes': {how: count(how) for how in ways},
      },
      'high': float(np.mean([one.high for one in traced])),
      'low': float(np.mean([one.low for one in traced])),
      'total_effect': {
          'mean': mean, 'half_width_95': number(half),
      },
      'average_effects': {
          kind: average_table(average)
          for kind, average in averages.items()
      },
      'skipped': list(missed),
  }  # fmt: skip


def notes(
    wanted: int | None,
    found: int,
    missed: Sequence[dict[str, Any]],
    source: str,
) -> list[str]:
  """What a user should know of the facts that were left out."""
  lines = []
  if missed:
    lines.append(
        f'note: {source}: {found} facts to trace, {len(missed)} left out;'
        ' results.json lists them, the first are'
    )
    lines += [
        f'  record {one["number"]} (id {one["id"]}) {one["reason"]}'
        for one in missed[:_LISTED]
    ]
  if wanted and found < wanted:
    lines.append(
        f'note: --num_facts={wanted}: {source} holds {found} that can be traced'
    )
  return lines


def roles(average: effects.Average) -> list[int]:
  """Rows of the roles that there are effects of."""
  return [row for row, count in enumerate(average.count) if count]


def average_table(average: effects.Average) -> dict[str, Any]:
  """Writes an average by role; roles without effects are left out."""
  return {
      effects.CLASSES[row]: {
          'facts': int(average.count[row]),
          'mean': _numbers(average.mean[row]),
          'half_width_95': _numbers(average.half_width[row]),
          'peak': peak(average, row),
      }
      for row in roles(average)
  }


def peak(average: effects.Average, row: int) -> dict[str, Any]:
  """The layer at which a role's average effect is largest."""
  layer = int(np.argmax(average.mean[row]))
  mean, half = _numbers(
      [average.mean[row][layer], average.half_width[row][layer]]
  )
  return {'layer': layer, 'mean': mean, 'half_width_95': half}


def best_cell(one: Found, kind: str) -> dict[str, Any]:
  """The cell of a fact that gives most back."""
  grid = one.result.scores[kind]
  token, layer = np.unravel_index(int(np.nanargmax(grid)), grid.shape)
  score = float(grid[token, layer])
  return {
      'column': int(token),
      'token': one.tokens[token],
      'layer': int(layer),
      'score': score,
      'effect': score - one.result.low,
  }


def fact_rows(
    found: Sequence[Found], kinds: Sequence[str]
) -> list[dict[str, Any]]:
  """Makes the lines of facts.jsonl."""
  return [
      {
          'number': one.fact.number,
          'id': one.fact.id,
          'prompt': one.fact.question,
          'subject': one.fact.subject,
          'cloze': one.fact.prompt,
          'attribute': one.fact.attribute or None,
          'tokens': list(one.tokens),
          'subject_tokens': list(one.span),
          'answer': one.answer,
          'answer_token': int(one.result.labels[0]),
          'completes': one.completes,
          'high': one.result.high,
          'low': one.result.low,
          'best': {kind: best_cell(one, kind) for kind in kinds},
      }
      for one in found
  ]


def write_arrays(path: pathlib.Path, found: Sequence[Found]) -> None:
  """Writes traces.npz; see the module."""
  arrays: dict[str, np.ndarray] = {
      'numbers': np.array([one.fact.number for one in found], np.int32),
      'answers': np.array([one.result.labels[0] for one in found], np.int32),
      'high': np.array([one.result.high for one in found], np.float64),
      'low': np.array([one.result.low for one in found], np.float64),
  }
  for one in found:
    name = one.fact.number
    arrays[f'{name}/ids'] = np.asarray(one.ids, np.int32)
    arrays[f'{name}/subject'] = np.array(one.span, np.int32)
    for kind, grid in one.result.scores.items():
      arrays[f'{name}/{kind}'] = np.asarray(grid, np.float64)
  out = BytesIO()
  np.savez_compressed(out, **arrays)
  io.write_bytes(path, out.getvalue())


def summary_lines(
    found: Sequence[Found],
    by_kind: Mapping[str, effects.Average],
    effort: Mapping[str, Any],
) -> list[str]:
  """What the program prints at the end."""
  mean, half = effects.total_effect([one.result for one in found])
  high = np.mean([one.result.high for one in found])
  low = np.mean([one.result.low for one in found])
  lines = [
      '',
      f'{len(found)} facts: p(answer) {high:.3f} clean, {low:.3f} corrupted;'
      f' total effect {interval(mean, half)}',
      '',
      'largest average indirect effect by kind and token'
      ' (95% interval over facts):',
      f'  {"kind":<13} {"token":<23} {"layer":>5}  effect',
  ]
  for kind, average in by_kind.items():
    for row in _strongest(average):
      top = peak(average, row)
      lines.append(
          f'  {kind:<13} {effects.CLASSES[row]:<23} {top["layer"]:>5}  '
          + interval(top['mean'], top['half_width_95'])
      )
  lines += [
      '',
      f'{effort["cells"]:,} cells; {effort["flops"]:.3g} FLOPs where computing'
      f' every cell from scratch takes {effort["naive_flops"]:.3g}'
      f' ({effort["ratio"]:.1f} times as many)',
      f'{effort["seconds"]:.1f} s without compilation,'
      f' {effort["flops_a_second"] / 1e9:.1f} GFLOP/s',
  ]
  if 'torch' in effort:
    other = effort['torch']
    lines.append(
        f'PyTorch, {other["cells"]} cells: {other["seconds_a_cell"]:.3f} \N{PLUS-MINUS SIGN}'
        f' {other["spread"]:.3f} s a cell, {other["wall_ratio"]:.1f} times as long'
        f' for all; scores differ by {other["largest_difference"]:.1e} at most'
    )
  return lines


def _strongest(average: effects.Average) -> list[int]:
  """Rows of the two roles with the largest effects, largest first."""
  rank = lambda row: -average.mean[row].max()
  return sorted(roles(average), key=rank)[:2]


def interval(mean: float, half: float | None) -> str:
  """Writes a mean with half of its interval, if there is one."""
  if half is None or np.isnan(half):
    return f'{mean:+.3f}'
  return f'{mean:+.3f} \N{PLUS-MINUS SIGN} {half:.3f}'


def number(value: float) -> float | None:
  """A number that JSON can hold."""
  return float(value) if np.isfinite(value) else None


def _numbers(values: Sequence[float]) -> list[float | None]:
  return [number(value) for value in values]
