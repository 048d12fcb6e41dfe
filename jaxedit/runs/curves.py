"""Curves of sequences that were judged along the way (`--judge_at`).

One line a run: a metric over the number of edits so far, with its 95% interval
where results.json has one.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxedit import io
from jaxedit.trace import figures, plots
from jaxedit.types import InputError

METRICS = ('reliability', 'generalization', 'locality_agreement', 'perplexity')


class Curve(NamedTuple):
  """One run.

  Attributes:
    name: of its folder.
    edits: numbers of edits at which it was judged, ascending.
    values: metric -> its mean at each.
    intervals: metric -> (low, high) at each; not every metric has them.
  """

  name: str
  edits: tuple[int, ...]
  values: Mapping[str, Sequence[float]]
  intervals: Mapping[str, Sequence[Sequence[float]]]


def read(folder: str | os.PathLike[str]) -> Curve:
  """Reads a run.

  Args:
    folder: its output folder.

  Raises:
    InputError: it has no results, or was not judged along the way.
  """
  folder = pathlib.Path(folder)
  found = io.read_json(folder / 'results.json')
  points = list(found.get('along', ()))
  if not points:
    raise InputError(
        f'{folder}: was not judged along the way; run it with --judge_at'
    )
  last = {name: found[name] for name in ('metrics', 'intervals', 'counts')}
  if 'perplexity' in found:
    last['perplexity'] = found['perplexity']['post']
  points.append({'edits': found['protocol']['data']['records'], **last})
  names = points[-1]['metrics']['post']
  values = {n: [one['metrics']['post'][n] for one in points] for n in names}
  intervals = {
      n: [one['intervals']['post'][n] for one in points] for n in names
  }
  if all('perplexity' in one for one in points):
    values['perplexity'] = [one['perplexity']['value'] for one in points]
  edits = tuple(one['edits'] for one in points)
  return Curve(folder.resolve().name, edits, values, intervals)


def draw(curves: Sequence[Curve], names: Sequence[str] = METRICS) -> Any:
  """Draws runs side by side.

  Args:
    curves: at least one.
    names: metrics, a picture each where any run has them.

  Returns:
    A figure of matplotlib.

  Raises:
    InputError: no run has any of the metrics.
  """
  shown = [n for n in names if any(n in curve.values for curve in curves)]
  if not shown:
    known = ', '.join(sorted({n for one in curves for n in one.values}))
    raise InputError(
        f'no run has {", ".join(names)}; they have {known or "no metric"}'
    )
  with figures.styled():
    figure, axes = figures.new(0.6 + 1.7 * len(shown), len(shown))
    axes = axes if len(shown) > 1 else [axes]
    for name, one in zip(shown, axes):
      one.set_title(name, loc='left')
      if name == 'perplexity':
        one.set_yscale('log')
        one.yaxis.set_major_formatter('{x:g}')
        one.yaxis.set_minor_formatter('{x:g}')
      for number, curve in enumerate(curves):
        _line(one, name, curve, number)
    axes[-1].set_xlabel('edits so far')
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc='outside lower center', ncols=4, fontsize=8
    )
  return figure


def _line(axes: Any, name: str, curve: Curve, number: int) -> None:
  """Draws one metric of one run; of a run without it, its entry alone."""
  values = curve.values.get(name, [float('nan')] * len(curve.edits))
  # The colours of figures, then the same as dashes.
  style = '-' if number < len(figures.LINES) else '--'
  colour = figures.LINES[number % len(figures.LINES)]
  axes.plot(
      curve.edits, values, style, color=colour, label=curve.name, marker='o',
      markersize=3, linewidth=1.4,
  )  # fmt: skip
  if bounds := curve.intervals.get(name):
    axes.fill_between(curve.edits, *zip(*bounds), alpha=0.1, lw=0, color=colour)


def write(
    folders: Sequence[str], out: str, names: Sequence[str] = METRICS
) -> None:
  """Reads runs and writes their curves.

  Args:
    folders: output folders.
    out: file to write, .svg or .png.
    names: see `draw`.

  Raises:
    InputError: a run cannot be read, another ending, or matplotlib is missing;
      of the runs all at once.
  """
  path, problems, found = pathlib.Path(out), [], []
  if path.suffix[1:] not in plots.FORMATS:
    problems.append(f'--out={out}: name a file that ends in .svg or .png')
  if not folders:
    problems.append('--runs: name the output folders of runs')
  for folder in folders:
    with InputError.collected(problems):
      found.append(read(folder))
  InputError.raise_for(problems)
  plots.require()
  figure = draw(found, names)
  plots.save(figure, path.parent, path.stem, [path.suffix[1:]])
