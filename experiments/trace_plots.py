"""Chooses and writes the plots of a trace; `trace_figures` draws them.

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

from experiments import trace_figures, trace_results
from experiments.trace_figures import MAPS
from jaxedit import io
from jaxedit.trace import effects
from jaxedit.types import InputError, Progress, silent

FORMATS = ('png', 'svg')
# Files that a run of causal_trace may write.
NAMES = r'(average|severed|suggest|fact_\d+)(_\w+)?\.(png|svg)'
MISSING = (
    'matplotlib is not installed, and plots need it; run `pip install'
    ' "jaxedit[plot]"`, or pass --noplots for arrays, JSON and tables alone'
)


def require() -> None:
  """Refuses to go on without matplotlib.

  Raises:
    InputError: it is not installed.
  """
  try:
    import matplotlib  # noqa: F401  pylint: disable=unused-import
  except ImportError:
    raise InputError(MISSING) from None


def draw_all(
    found: Sequence[trace_results.Found],
    averages: Mapping[str, effects.Average],
    folder: pathlib.Path,
    *,
    window: int,
    formats: Sequence[str],
    facts: int,
    progress: Progress = silent,
) -> dict[str, str]:
  """Draws averages, then facts.

  Args:
    found: the facts.
    averages: by kind.
    folder: where to write; made if missing.
    window: layers restored at once by 'mlp' and 'attn'.
    formats: of `FORMATS`; none to draw nothing.
    facts: the first so many get heat maps.
    progress: told of figures.

  Returns:
    Name without ending -> the figure as SVG.
  """
  if not formats:
    return {}
  folder.mkdir(exist_ok=True)
  jobs = {
      **_average_jobs(averages, window),
      **_fact_jobs(found[:facts], [k for k in averages if k in MAPS], window),
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
  for kind in [kind for kind in averages if kind in MAPS]:
    average = averages[kind]
    shown = [i for i, count in enumerate(average.count) if count]
    jobs[f'average_map_{kind}'] = functools.partial(
        trace_figures.heat_map,
        average.mean[shown],
        [effects.CLASSES[i] for i in shown],
        kind=kind,
        window=window,
        bar='average effect',
        floor=min(0.0, float(average.mean[shown].min())),
    )
    jobs[f'average_{kind}'] = functools.partial(
        trace_figures.effect_lines, average, kind=kind, window=window
    )
  if any(kind not in MAPS for kind in averages):
    jobs['severed'] = functools.partial(trace_figures.severed_bars, averages)
  return jobs


def _fact_jobs(
    found: Sequence[trace_results.Found], kinds: Sequence[str], window: int
) -> dict[str, Callable[[], Any]]:
  """Name -> what makes the figure, of facts."""
  jobs: dict[str, Callable[[], Any]] = {}
  for one in found:
    inside = range(*one.span)
    labels = [
        trace_figures.token_label(x, i in inside)
        for i, x in enumerate(one.tokens)
    ]
    for kind in kinds:
      jobs[f'fact_{one.fact.number:05}_{kind}'] = functools.partial(
          trace_figures.heat_map,
          one.result.scores[kind],
          labels,
          kind=kind,
          window=window,
          bar=f'p({trace_figures.token_label(one.answer, False)})',
          floor=one.result.low,
      )
  return jobs


def save(
    figure: Any, folder: pathlib.Path, name: str, formats: Sequence[str]
) -> str:
  """Writes a figure, each file atomically.

  Args:
    figure: of matplotlib.
    folder: where to write.
    name: file name without its ending.
    formats: of `FORMATS`.

  Returns:
    The figure as SVG.
  """
  with trace_figures.styled():
    drawn = {ending: BytesIO() for ending in {*formats, 'svg'}}
    for ending, out in drawn.items():
      options = (
          {'metadata': {'Date': None}} if ending == 'svg' else {'dpi': 150}
      )
      figure.savefig(out, format=ending, **options)
  for ending in formats:
    io.write_bytes(folder / f'{name}.{ending}', drawn[ending].getvalue())
  return drawn['svg'].getvalue().decode('utf-8')
