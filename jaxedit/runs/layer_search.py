"""Searches the layers to edit in a model that nobody has edited before.

Traces say up to which layer a subject's states still matter; below, MEMIT is
tried on a few facts, with the last edited layer (the anchor) coarsely spaced at
first and then next to the best, one layer and a few layers wide. Hidden states
are optimised once an anchor and serve all widths, so a trial costs an insertion
and an evaluation.

  score = harmonic mean of ES, PS and NS

`layer_trials` tries layers, `layer_search_report` tells what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxedit import statistics
from jaxedit.eval import metrics
from jaxedit.types import InputError, Progress, silent

METRICS = ('es', 'ps', 'ns')
# Anchors that are tried first.
_COARSE = 6
# A layer is still read where restoring it gives back at least this share of the
# largest effect.
_READ = 0.5


class Trial(NamedTuple):
  """How MEMIT did with some layers.

  Attributes:
    layers: edited layers, the anchor last.
    records: for each fact its metrics, `METRICS` among them.
    distance: mean share of the way to the wanted states that was left.
  """

  layers: tuple[int, ...]
  records: tuple[Mapping[str, float], ...]
  distance: float

  @property
  def metrics(self) -> dict[str, float]:
    """Means over facts, and their score."""
    found = metrics.aggregate(self.records, resamples=1)
    return {name: found[name]['mean'] for name in ('score', *METRICS)}

  @property
  def interval(self) -> dict[str, float]:
    """The score: 'mean', and 'low' and 'high' of its 95% interval."""
    return metrics.aggregate(self.records)['score']


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
    probe: Callable[[tuple[int, ...]], Trial],
    anchors: Sequence[int],
    *,
    top: int,
    widths: Sequence[int],
    progress: Progress = silent,
) -> list[Trial]:
  """Tries anchors, and then those next to the best until none is better.

  Args:
    probe: tries layers.
    anchors: anchors to try first.
    top: last anchor allowed.
    widths: numbers of layers.
    progress: told of trials; there are a few more than those of the first round.

  Returns:
    All trials, the best first.
  """
  found: dict[tuple[int, ...], Trial] = {}
  wanted = list(anchors)
  with progress('probe', len(windows(anchors, widths)), 'try') as done:
    while wanted:
      for layers in windows(wanted, widths):
        found[layers] = probe(layers)
        done(1)
      best = ranked(found.values())[0].layers[-1]
      tried = {layers[-1] for layers in found}
      near = (best - 1, best + 1)
      wanted = [x for x in near if 0 <= x <= top and x not in tried]
  return ranked(found.values())


def ranked(trials: Iterable[Trial]) -> list[Trial]:
  """Sorts trials by score, the best first; of equal ones the lower layers."""
  return sorted(trials, key=lambda one: (-one.metrics['score'], one.layers))


def compare(
    one: Trial, other: Trial, *, seed: int = 0, resamples: int = 10000
) -> dict[str, float]:
  """Compares the scores of two trials on the same facts.

  Args:
    one: a trial.
    other: another.
    seed: of the bootstrap.
    resamples: of facts, the same for both.

  Returns:
    'difference' of scores, other - one, and its 95% interval 'low', 'high'.
  """
  by_fact = lambda trial: np.array(
      [[r.get(name) for name in METRICS] for r in trial.records], np.float64
  )
  low, high = statistics.paired_difference(
      by_fact(one), by_fact(other),
      lambda drawn: metrics.harmonic_mean(np.nanmean(drawn, axis=1)),
      seed=seed, resamples=resamples,
  )  # fmt: skip
  difference = other.metrics['score'] - one.metrics['score']
  return {'difference': difference, 'low': float(low), 'high': float(high)}
