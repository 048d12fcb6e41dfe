"""Proposes the layers to edit in a model that nobody has edited before.

Traces say up to which layer a subject's states still matter; below, MEMIT is
tried on a few facts, with the last edited layer (the anchor) coarsely spaced at
first and then next to the best, one layer and a few layers wide. States are
optimised once an anchor and serve all widths, so a try costs an insertion and a
reading.

  score = harmonic mean of ES, PS and NS

It reads no flags and draws nothing but the one plot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import (
    editing,
    states,
    trace_figures,
    trace_results,
    workbench,
)
from experiments.kept import Kept
from jaxedit.eval import metrics
from jaxedit.methods import closed_form
from jaxedit.methods.closed_form.recipe import (
    Recipe,
    State,
)
from jaxedit.stats.moments import Moments
from jaxedit.types import InputError, Progress

# Anchors that are tried first.
_COARSE = 6
# The subject is read no more where restoring it gives back less than this share
# of the largest effect.
_READ = 0.5
# Every anchor has programs of its own; those of two dozen have run into the number
# of memory maps that Linux allows a process.
_ANCHORS = 8


class Tried(NamedTuple):
  """How MEMIT did with some layers.

  Attributes:
    layers: edited layers, the anchor last.
    records: for each fact its metrics, 'es', 'ps' and 'ns' among them.
    distance: mean share of the way to the wanted states that was left.
  """

  layers: tuple[int, ...]
  records: tuple[Mapping[str, float], ...]
  distance: float

  @property
  def metrics(self) -> dict[str, float]:
    """Means over facts, and their score."""
    found = metrics.aggregate(self.records, resamples=1)
    return {name: found[name]['mean'] for name in ('score', 'es', 'ps', 'ns')}

  @property
  def interval(self) -> dict[str, float]:
    """The score: 'mean', and 'low' and 'high' of its 95% interval."""
    return metrics.aggregate(self.records)['score']


class Prober:
  """Tries MEMIT with layers on facts; every try starts from the same model."""

  def __init__(
      self,
      bench: workbench.Workbench,
      recipe: Recipe,
      moments: Moments,
      *,
      judge: Callable[..., Any],
      pieces: Kept,
      progress: Progress,
  ):
    """Makes a prober.

    Args:
      bench: facts as ids under their templates, with its shapes.
      recipe: the method; its layers are replaced.
      moments: of all layers that may be tried.
      judge: (bench, outcome, base) -> evaluation.
      pieces: states of an earlier run that was stopped, and a place for these.
      progress: of the optimisation.
    """
    self._bench, self._recipe, self._moments = bench, recipe, moments
    self._judge, self._pieces, self._progress = judge, pieces, progress
    self._base = judge(bench, None, None)
    self._preconditioners: dict[int, Any] = {}
    self._anchors: set[int] = set()  # those with programs in memory

  def __call__(self, layers: tuple[int, ...]) -> Tried:
    """Edits all facts at once in these layers and reads them."""
    bench, model = self._bench, self._bench.model
    self._anchors.add(layers[-1])
    if len(self._anchors) > _ANCHORS:
      jax.clear_caches()
      self._anchors = {layers[-1]}
    recipe = dataclasses.replace(self._recipe, layers=layers)
    editor = closed_form.closed_form(model.spec, recipe)
    memory = states.States(self._pieces, states.about(model, recipe))
    state = State(tuple(self._preconditioner(layer) for layer in layers), None)
    edited, _, info = editor.edit(
        model.params,
        state,
        bench.encoded,
        plan=bench.plan,
        memory=memory,
        progress=self._progress,
    )
    outcome = editing.Outcome(edited, None, info)
    found = self._judge(bench, outcome, self._base)
    rows = tuple(row['metrics'] for row in found.per_record)
    return Tried(layers, rows, float(np.nanmean(info.distance[-1])))

  def _preconditioner(self, layer: int) -> Any:
    """The factored metric of a layer."""
    if layer not in self._preconditioners:
      recipe = dataclasses.replace(self._recipe, layers=(layer,))
      editor = closed_form.closed_form(self._bench.model.spec, recipe)
      state = editor.init(self._bench.model.params, self._moments)
      (self._preconditioners[layer],) = state.preconditioners
    return self._preconditioners[layer]


def windows(
    anchors: Sequence[int], widths: Sequence[int]
) -> list[tuple[int, ...]]:
  """Lists runs of layers that end with an anchor.

  Args:
    anchors: last layers.
    widths: numbers of layers; a run that would start below layer 0 is left out.
  """
  return [
      tuple(range(anchor - width + 1, anchor + 1))
      for anchor in anchors
      for width in widths
      if width <= anchor + 1
  ]


def last_read(effect: np.ndarray) -> int:
  """The last layer whose state at the subject the model still reads.

  Args:
    effect: [L] average indirect effect of the state at the last subject token.

  Returns:
    The last layer with half of the largest effect.

  Raises:
    InputError: nothing that was restored had an effect.
  """
  most = np.nanmax(effect) if np.isfinite(effect).any() else 0.0
  if not most > 0:
    raise InputError(
        'restoring the last subject token brings no answer back, so traces say'
        ' nothing about layers; give more facts, or facts that the model knows'
    )
  return int(np.flatnonzero(effect >= _READ * most)[-1])


def first_anchors(hidden: np.ndarray, mlp: np.ndarray | None) -> list[int]:
  """Chooses the anchors to try first.

  Args:
    hidden: [L] average effect of the state at the last subject token.
    mlp: same of MLPs, if they were traced; its peak is tried as well.

  Returns:
    Anchors, ascending, none above the last layer that is read.
  """
  top = last_read(hidden)
  anchors = {round(x) for x in np.linspace(0, top, min(_COARSE, top + 1))}
  if mlp is not None and np.isfinite(mlp[: top + 1]).any():
    anchors.add(int(np.nanargmax(mlp[: top + 1])))
  return sorted(anchors)


def search(
    probe: Callable[[tuple[int, ...]], Tried],
    anchors: Sequence[int],
    *,
    top: int,
    widths: Sequence[int],
    done: Callable[[int], None] = lambda count: None,
) -> list[Tried]:
  """Tries anchors, and then those next to the best until none is better.

  Args:
    probe: tries layers.
    anchors: anchors to try first.
    top: last anchor allowed.
    widths: numbers of layers.
    done: told of tries.

  Returns:
    All tries, the best first.
  """
  found: dict[tuple[int, ...], Tried] = {}
  wanted = list(anchors)
  while wanted:
    for layers in windows(wanted, widths):
      found[layers] = probe(layers)
      done(1)
    best = ranked(found.values())[0].layers[-1]
    tried = {layers[-1] for layers in found}
    near = (best - 1, best + 1)
    wanted = [x for x in near if 0 <= x <= top and x not in tried]
  return ranked(found.values())


def ranked(tries: Any) -> list[Tried]:
  """Sorts tries by score, the best first; of equal ones the lower layers."""
  return sorted(tries, key=lambda one: (-one.metrics['score'], one.layers))


def compare(
    one: Tried, other: Tried, *, seed: int = 0, resamples: int = 10000
) -> dict[str, float]:
  """Compares the scores of two tries on the same facts.

  Args:
    one: a try.
    other: another.
    seed: of the bootstrap.
    resamples: of facts, the same for both.

  Returns:
    'difference' of scores, other - one, and its 95% interval 'low', 'high'.
  """
  names = ('es', 'ps', 'ns')
  tables = [
      np.array([[r.get(n) for n in names] for r in t.records], np.float64)
      for t in (one, other)
  ]
  rng = np.random.default_rng(seed)
  count = len(one.records)
  drawn = []
  for _ in range(resamples):
    index = rng.integers(0, count, count)
    a, b = (
        metrics.harmonic_mean(np.nanmean(table[index], axis=0))
        for table in tables
    )
    drawn.append(b - a)
  low, high = np.nanpercentile(drawn, [2.5, 97.5])
  difference = other.metrics['score'] - one.metrics['score']
  return {
      'difference': float(difference),
      'low': float(low),
      'high': float(high),
  }


def report(tries: Sequence[Tried]) -> list[dict[str, Any]]:
  """Tries as plain JSON types, in their order."""
  return [
      {
          'layers': list(t.layers),
          **t.metrics,
          'distance': trace_results.number(t.distance),
      }
      for t in tries
  ]


def flagfile(
    best: Tried, flags: Mapping[str, Any], comment: Sequence[str]
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


def table(tries: Sequence[Tried], count: int = 8) -> list[str]:
  """The best tries as lines to print."""
  lines = [f'{"layers":<10}{"score":>8}{"ES":>8}{"PS":>8}{"NS":>8}']
  for one in tries[:count]:
    ends = sorted({one.layers[0], one.layers[-1]})
    found = one.metrics
    numbers = (found[name] for name in ('score', 'es', 'ps', 'ns'))
    lines.append(
        f'{"-".join(map(str, ends)):<10}'
        + ''.join(f'{number:8.3f}' for number in numbers)
    )
  return lines


def figure(tries: Sequence[Tried], effects: Mapping[str, np.ndarray]) -> Any:
  """Draws scores and effects by layer.

  Args:
    tries: what was tried.
    effects: name -> [L] average effect at the last subject token.

  Returns:
    A matplotlib figure.
  """
  with trace_figures.styled():
    made, (above, below) = trace_figures.new(4.6, rows=2)
    widths = sorted({len(t.layers) for t in tries})
    for place, width in enumerate(widths):
      mine = sorted(t for t in tries if len(t.layers) == width)
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
    best = ranked(tries)[0]
    above.axvline(best.layers[-1], color=trace_figures.INK, ls=':', lw=0.8)
    above.set_ylabel('MEMIT score')
    above.set_title('by the last edited layer', loc='left')
    for name, effect in effects.items():
      below.plot(effect, label=name)
    below.axhline(0, color=trace_figures.INK, linewidth=0.6)
    below.set_ylabel('average effect')
    below.set_title('restored at the last subject token', loc='left')
    below.set_xlabel('layer')
    for axes in (above, below):
      axes.legend(fontsize=8)
  return made
