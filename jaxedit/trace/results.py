"""What a causal trace leaves behind: arrays, lines, averages, a summary.

traces.npz holds plain arrays, by record number as in facts.jsonl:

  <number>/ids      [T] int32 tokens of the prompt
  <number>/subject  [2] int32 first token of the subject and one past its last
  <number>/<kind>   [T, L] float64 p(answer) with that state restored; NaN where
                    it was not computed
  numbers, answers  [E] int32 record numbers, and tokens that were scored
  high, low         [E] float64 p(answer), clean and corrupted
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit.io import json_number
from jaxedit.trace import effects
from jaxedit.trace.causal import Case, Traced
from jaxedit.trace.facts import EncodedFact, TraceConfig

LAST_SUBJECT = effects.CLASSES.index('last subject token')
_LISTED = 5  # facts left out that a note names; results.json has all


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedFact(EncodedFact):
  """A traced fact.

  Attributes:
    tokens: texts of the prompt's tokens.
    said: text of the answer, the token that was scored.
    result: of the trace.
  """

  tokens: tuple[str, ...]
  said: str
  result: Traced


def finite(result: Traced) -> bool:
  """Whether all numbers of a trace that was asked for are finite."""
  grids = result.scores.values()
  # A column that was not asked for is NaN in all layers.
  asked = [grid[~np.isnan(grid).all(axis=1)] for grid in grids]
  numbers = [np.array([result.high, result.low]), *asked]
  return all(len(x) and np.isfinite(x).all() for x in numbers)


@dataclasses.dataclass(frozen=True)
class FactTraces:
  """What a run found.

  Attributes:
    config: what was restored.
    facts: the traced facts.
    missed: those left out as their numbers are not finite.
    cases: what was traced, those left out too.
    traced: what `causal.trace` found, one a case.
    seconds: that tracing took.
  """

  config: TraceConfig
  facts: tuple[TracedFact, ...]
  missed: tuple[dict[str, Any], ...]
  cases: Sequence[Case]
  traced: Sequence[Traced]
  seconds: float

  @property
  def numbers(self) -> list[int]:
    """Record numbers of all that was traced."""
    missed = [one['number'] for one in self.missed]
    return sorted([*(one.fact.number for one in self.facts), *missed])

  @functools.cached_property
  def averages(self) -> dict[str, effects.Average]:
    """Restoration -> effects averaged over facts, by role of a token.

    Of what was restored at the last subject token alone all other roles are left
    out: a subject's only token would count as its first one there.
    """
    found = [one.result for one in self.facts]
    spans = [one.span for one in self.facts]
    table = {}
    for one in self.config.restorations:
      average = table[one.name] = effects.average(found, spans, one.name)
      if self.config.alone(one):
        other = np.arange(len(effects.CLASSES)) != LAST_SUBJECT
        average.mean[other] = average.half_width[other] = np.nan
        average.count[other] = 0
    return table

  def report(self, missed: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The numbers of results.json; `missed` were left out before."""
    found, missed = [one.result for one in self.facts], [*missed, *self.missed]
    mean, half = effects.total_effect(found)
    ways = ('whole', 'begins', 'misses', 'unasked')
    count = lambda way: sum(one.completes == way for one in self.facts)
    return {
        'facts': {
            'traced': len(found),
            'left_out': len(missed),
            'completes': {way: count(way) for way in ways},
        },
        'high': float(np.mean([one.high for one in found])),
        'low': float(np.mean([one.low for one in found])),
        'total_effect': {'mean': mean, 'half_width_95': json_number(half)},
        'average_effects': {
            name: _by_role(average) for name, average in self.averages.items()
        },
        'skipped': missed,
    }

  def rows(self) -> list[dict[str, Any]]:
    """The lines of facts.jsonl."""
    return [
        {
            'number': one.fact.number,
            'id': one.fact.id,
            'prompt': one.fact.question,
            'subject': one.fact.subject,
            'cloze': one.fact.prompt,
            'attribute': one.fact.target or None,
            'tokens': list(one.tokens),
            'subject_tokens': list(one.span),
            'answer': one.said,
            'answer_token': one.answer,
            'completes': one.completes,
            'high': one.result.high,
            'low': one.result.low,
            'best': {name: _best_cell(one, name) for name in self.config.kinds},
        }
        for one in self.facts
    ]

  def arrays(self) -> bytes:
    """The file traces.npz; see the module."""
    numbers = [one.fact.number for one in self.facts]
    found = [one.result for one in self.facts]
    arrays = {
        'numbers': np.array(numbers, np.int32),
        'answers': np.array([one.answer for one in self.facts], np.int32),
        'high': np.array([one.high for one in found], np.float64),
        'low': np.array([one.low for one in found], np.float64),
    }
    for name, one in zip(numbers, self.facts):
      arrays[f'{name}/ids'] = np.asarray(one.ids, np.int32)
      arrays[f'{name}/subject'] = np.array(one.span, np.int32)
      for kind, grid in one.result.scores.items():
        arrays[f'{name}/{kind}'] = np.asarray(grid, np.float64)
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def notes(
    wanted: int | None, found: int, missed: Sequence[Mapping], source: str
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


def _roles(average: effects.Average) -> list[int]:
  """Rows of the roles that there are effects of."""
  return [row for row, count in enumerate(average.count) if count]


def _by_role(average: effects.Average) -> dict[str, Any]:
  """Writes an average by role; roles without effects are left out."""
  return {
      effects.CLASSES[row]: {
          'facts': int(average.count[row]),
          'mean': numbers(average.mean[row]),
          'half_width_95': numbers(average.half_width[row]),
          'peak': _peak(average, row),
      }
      for row in _roles(average)
  }


def _peak(average: effects.Average, row: int) -> dict[str, Any]:
  """The layer at which a role's average effect is largest."""
  mean, half = average.mean[row], average.half_width[row]
  layer = int(np.argmax(mean))
  mean, half = numbers([mean[layer], half[layer]])
  return {'layer': layer, 'mean': mean, 'half_width_95': half}


def _best_cell(one: TracedFact, name: str) -> dict[str, Any]:
  """The grid cell of a fact that restores most."""
  grid = one.result.scores[name]
  token, layer = np.unravel_index(int(np.nanargmax(grid)), grid.shape)
  score = float(grid[token, layer])
  return {
      'column': int(token),
      'token': one.tokens[token],
      'layer': int(layer),
      'score': score,
      'effect': score - one.result.low,
  }


def summary_lines(report: Mapping[str, Any]) -> list[str]:
  """What a program prints at the end.

  Args:
    report: of `FactTraces.report`, with 'work' of `flops.work`.
  """
  work = report['work']
  lines = [
      '',
      f'{report["facts"]["traced"]} facts: p(answer) {report["high"]:.3f} clean,'
      f' {report["low"]:.3f} corrupted; total effect'
      f' {interval(**report["total_effect"])}',
      '',
      'largest average indirect effect by kind and token'
      ' (95% interval over facts):',
      f'  {"kind":<13} {"token":<23} {"layer":>5}  effect',
  ]
  for kind, roles in report['average_effects'].items():
    peaks = [(role, one['peak']) for role, one in roles.items()]
    for role, top in sorted(peaks, key=lambda x: -x[1]['mean'])[:2]:
      layer, effect = top['layer'], interval(top['mean'], top['half_width_95'])
      lines.append(f'  {kind:<13} {role:<23} {layer:>5}  {effect}')
  lines += [
      '',
      f'{work["cells"]:,} cells; {work["flops"]:.3g} FLOPs where computing'
      f' every cell from scratch takes {work["naive_flops"]:.3g}'
      f' ({work["ratio"]:.1f} times as many)',
      f'{work["seconds"]:.1f} s without compilation,'
      f' {work["flops_a_second"] / 1e9:.1f} GFLOP/s',
  ]
  if 'torch' in work:
    other = work['torch']
    lines.append(
        f'PyTorch, {other["cells"]} cells: {other["seconds_a_cell"]:.3f}'
        f' \N{PLUS-MINUS SIGN} {other["spread"]:.3f} s a cell,'
        f' {other["wall_ratio"]:.1f} times as long for all; scores differ by'
        f' {other["largest_difference"]:.1e} at most'
    )
  return lines


def interval(mean: float, half_width_95: float | None) -> str:
  """Writes a mean with half of its interval, if there is one."""
  if half_width_95 is None:
    return f'{mean:+.3f}'
  return f'{mean:+.3f} \N{PLUS-MINUS SIGN} {half_width_95:.3f}'


def numbers(values: Iterable[float]) -> list[float | None]:
  """Numbers that JSON can hold."""
  return [json_number(value) for value in values]
