"""Chooses the plots of a trace, and makes files of them; `figures` draws.

average_map_<kind>    average effects by role of a token and layer
average_<kind>        the same as lines with their 95 % intervals
severed               ordinary and severed effects at the last subject token
fact_<number>_<kind>  p(answer) of one fact by token and layer
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from jaxedit import io
from jaxedit.trace import effects, figures
from jaxedit.trace.figures import MAPS
from jaxedit.trace.results import FactTraces, TracedFact
from jaxedit.types import InputError, Progress, silent

FORMATS = ('png', 'svg')
# Files of these plots, and of `runs.layer_search`.
NAMES = r'(average|severed|suggest|fact_\d+)(_\w+)?\.(png|svg)'
MISSING = (
    'matplotlib is not installed, and plots need it; run `pip install'
    ' "jaxedit[plot]"`, or pass --noplots for arrays, JSON and tables alone'
)


def require() -> None:
  """Raises an InputError where matplotlib is not installed."""
  try:
    import matplotlib  # noqa: F401  pylint: disable=unused-import
  except ImportError:
    raise InputError(MISSING) from None


def draw_all(
    found: FactTraces,
    folder: pathlib.Path,
    *,
    facts: int,
    formats: Sequence[str] = FORMATS,
    progress: Progress = silent,
) -> dict[str, str]:
  """Draws averages, then facts.

  Args:
    found: what a trace found.
    folder: where to write.
    facts: the first so many get heat maps.
    formats: of `FORMATS`.
    progress: told of figures.

  Returns:
    Name without ending -> the figure as SVG.
  """
  window = found.config.window
  names = [name for name in found.config.kinds if name in MAPS]
  jobs = {
      **_average_jobs(found.averages, window),
      **_fact_jobs(found.facts[:facts], names, window),
  }
  drawn = {}
  with progress('plot', len(jobs), 'figure') as done:
    for name, job in jobs.items():
      drawn[name] = save(job(), folder, name, formats)
      done(1)
  return drawn


def _average_jobs(
    averages: Mapping[str, effects.Average], window: int
) -> dict[str, Callable[[], Any]]:
  """Name -> what makes the figure, of averages."""
  jobs: dict[str, Callable[[], Any]] = {}
  for name in [name for name in averages if name in MAPS]:
    average = averages[name]
    shown = [i for i, count in enumerate(average.count) if count]
    jobs[f'average_map_{name}'] = functools.partial(
        figures.heat_map,
        average.mean[shown], [effects.CLASSES[i] for i in shown],
        name=name, window=window, bar='average effect',
        floor=min(0.0, float(average.mean[shown].min())),
    )  # fmt: skip
    jobs[f'average_{name}'] = functools.partial(
        figures.effect_lines, average, name=name, window=window
    )
  if any(name not in MAPS for name in averages):
    jobs['severed'] = functools.partial(figures.severed_bars, averages)
  return jobs


def _fact_jobs(
    found: Sequence[TracedFact], names: Sequence[str], window: int
) -> dict[str, Callable[[], Any]]:
  """Name -> what makes the figure, of facts."""
  jobs: dict[str, Callable[[], Any]] = {}
  for one in found:
    rows = [
        figures.token_label(token, one.span[0] <= i < one.span[1])
        for i, token in enumerate(one.tokens)
    ]
    draw = functools.partial(
        figures.heat_map, labels=rows, window=window, floor=one.result.low,
        bar=f'p({figures.token_label(one.said, False)})',
    )  # fmt: skip
    for name in names:
      jobs[f'fact_{one.fact.number:05}_{name}'] = functools.partial(
          draw, one.result.scores[name], name=name
      )
  return jobs


def save(
    figure: Any,
    folder: pathlib.Path,
    name: str,
    formats: Sequence[str] = FORMATS,
) -> str:
  """Writes a figure of matplotlib.

  Args:
    figure: the figure.
    folder: where to write.
    name: file name without its ending.
    formats: of `FORMATS`.

  Returns:
    The figure as SVG.
  """
  options = {'svg': {'metadata': {'Date': None}}, 'png': {'dpi': 150}}
  drawn = {ending: BytesIO() for ending in dict.fromkeys((*formats, 'svg'))}
  with figures.styled():
    for ending, out in drawn.items():
      figure.savefig(out, format=ending, **options[ending])
  for ending in formats:
    io.write_bytes(folder / f'{name}.{ending}', drawn[ending].getvalue())
  return drawn['svg'].getvalue().decode('utf-8')
