"""Tells what a search for layers found: files, lines, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import io
from jaxedit.runs.layer_search import METRICS, Trial, ranked
from jaxedit.trace import figures, results

_LISTED = 8  # trials that are told; suggest.json has all


class Suggested(NamedTuple):
  """What a search found.

  Attributes:
    trials: all of them, the best first.
    judged: how a proposal compares with the best, if there was one.
    facts: on how many facts.
    plot: as SVG, if it was drawn.
  """

  trials: Sequence[Trial]
  judged: Mapping[str, Any] | None
  facts: int
  plot: str | None

  def lines(self) -> list[str]:
    """The best trials, and the comparison, to print."""
    lines = [f'{"layers":<10}{"score":>8}{"ES":>8}{"PS":>8}{"NS":>8}']
    for one in self.trials[:_LISTED]:
      numbers = ''.join(f'{x:8.3f}' for x in one.metrics.values())
      lines.append(f'{_ends(one):<10}{numbers}')
    if self.judged:
      lines.append(
          '{source}: score {score:.3f}, {difference:.3f} below the best here, 95%'
          ' interval {low:.3f} to {high:.3f}, {facts} facts'.format(
              facts=self.facts, **self.judged
          )
      )
    return lines

  def report(self) -> dict[str, Any]:
    """The same for results.json; suggest.json has all trials."""
    return {
        'facts': self.facts,
        'tries': rows(self.trials[:_LISTED]),
        'proposal': self.judged,
    }


def _ends(one: Trial) -> str:
  return '-'.join(map(str, sorted({one.layers[0], one.layers[-1]})))


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
  """Trials as plain JSON types, in their order."""
  return [
      {
          'layers': list(one.layers),
          **one.metrics,
          'distance': io.json_number(one.distance),
      }
      for one in trials
  ]


def document(
    trials: Sequence[Trial], effects: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """What suggest.json says of trials, and of the effects by layer."""
  return {
      'tries': rows(trials),
      'records': {
          _ends(one): [
              {name: record.get(name) for name in METRICS}
              for record in one.records
          ]
          for one in trials
      },
      'effects': {
          name: results.numbers(effect) for name, effect in effects.items()
      },
  }


def flagfile(
    best: Trial, flags: Mapping[str, Any], comment: Sequence[str]
) -> str:
  """Writes a flagfile for memit_batch.

  Args:
    best: the proposed setting.
    flags: name -> value of the other flags; None leaves one out.
    comment: lines for its head.

  Returns:
    Its text.
  """
  given = {'layers': ','.join(map(str, best.layers))} | dict(flags)
  lines = [f'# {line}'.rstrip() for line in comment]
  lines += [f'--{k}={v}' for k, v in given.items() if v is not None]
  return '\n'.join(lines) + '\n'


def figure(trials: Sequence[Trial], effects: Mapping[str, np.ndarray]) -> Any:
  """Draws scores and effects by layer.

  Args:
    trials: what was tried.
    effects: name -> [L] average effect at the last subject token.

  Returns:
    A matplotlib figure.
  """
  with figures.styled():
    made, (above, below) = figures.new(4.6, rows=2)
    widths = sorted({len(t.layers) for t in trials})
    for place, width in enumerate(widths):
      mine = sorted(t for t in trials if len(t.layers) == width)
      shift = 0.12 * (2 * place - len(widths) + 1)  # intervals side by side
      found = [t.interval for t in mine]
      above.errorbar(
          [t.layers[-1] + shift for t in mine],
          [x['mean'] for x in found],
          yerr=[
              # Rounding may leave a bound on the wrong side.
              [max(0, x['mean'] - x['low']) for x in found],
              [max(0, x['high'] - x['mean']) for x in found],
          ],
          marker='o',
          markersize=4,
          elinewidth=0.6,
          label='one layer' if width == 1 else f'{width} layers',
      )
    best = ranked(trials)[0].layers[-1]
    above.axvline(best, color=figures.INK, ls=':', lw=0.8)
    above.set_ylabel('MEMIT score')
    above.set_title('by the last edited layer', loc='left')
    for name, effect in effects.items():
      below.plot(effect, label=name)
    below.axhline(0, color=figures.INK, linewidth=0.6)
    below.set_ylabel('average effect')
    below.set_title('restored at the last subject token', loc='left')
    below.set_xlabel('layer')
    for axes in (above, below):
      axes.legend(fontsize=8)
  return made
