"""Effects of a trace, averaged over facts by the role of a token.

  TE       = high - low             total effect: clean minus corrupted
  IE(t, l) = score(t, l) - low      indirect effect of restoring token t, layer l

Tokens have one of six roles (`CLASSES`). The effects of a fact's tokens of one
role are averaged first, so that every fact that has the role counts once; then

  mean over facts  +-  1.96 * s / sqrt(facts)       s the sample's deviation

is the average effect with its 95 % interval.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1, figure 2 and
appendix B. As in their program, the only token of a subject is its first and its
last one, and the only token after it the first subsequent and the last one.
Their program averages over the tokens of all facts together, takes s of scores
and not of effects, and divides by one number of facts for all roles.

numpy alone; not here: plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.statistics import normal_interval

CLASSES = (
    'first subject token',
    'middle subject tokens',
    'last subject token',
    'first subsequent token',
    'further tokens',
    'last token',
)


class Average(NamedTuple):
  """Effects averaged over facts; 6 stands for `CLASSES`.

  Attributes:
    mean: [6, L] f64; NaN where no fact has the role.
    half_width: [6, L] f64, half of the 95 % interval; NaN below two facts.
    count: [6] facts that have the role.
  """

  mean: np.ndarray
  half_width: np.ndarray
  count: np.ndarray


def token_classes(length: int, first: int, end: int) -> list[list[int]]:
  """Sorts the columns of a prompt by role.

  Args:
    length: tokens of the prompt.
    first: first token of the subject.
    end: one past its last token.

  Returns:
    Columns of each of `CLASSES`, maybe none. Those before the subject have no
    role. A prompt that ends with its subject has no subsequent token.
  """
  last = length - 1
  return [
      [first],
      list(range(first + 1, end - 1)),
      [end - 1],
      [end] if end < length else [],
      list(range(end + 1, last)),
      [last],
  ]


def average(
    traced: Sequence[Any], spans: Sequence[tuple[int, int]], kind: str
) -> Average:
  """Averages the indirect effects of one kind.

  Args:
    traced: F results of `causal.trace`. Their prompts end with the first scored
      column. Tokens that were not asked for (NaN) are left out; a role without
      any other token is one the fact lacks.
    spans: (first, end) of every fact's subject.
    kind: name of the kind.

  Returns:
    The average by role and layer.
  """
  means: list[list[np.ndarray]] = [[] for _ in CLASSES]
  layers = 0
  for result, span in zip(traced, spans, strict=True):
    effect = result.scores[kind] - result.low
    layers = effect.shape[1]
    asked = ~np.isnan(effect).all(axis=1)
    length = len(effect) + 1 - len(result.labels)
    for role, columns in zip(means, token_classes(length, *span)):
      columns = [t for t in columns if asked[t]]
      if columns:
        role.append(effect[columns].mean(axis=0))
  rows = [normal_interval(np.reshape(role, (-1, layers))) for role in means]
  return Average(
      mean=np.stack([mean for mean, _ in rows]),
      half_width=np.stack([half for _, half in rows]),
      count=np.array([len(role) for role in means]),
  )


def total_effect(traced: Sequence[Any]) -> tuple[float, float]:
  """Averages high - low.

  Args:
    traced: F results of `causal.trace`.

  Returns:
    (mean, half of the 95 % interval); NaN below one and two facts.
  """
  effects = np.array([[result.high - result.low] for result in traced])
  mean, half = normal_interval(effects.reshape(-1, 1))
  return float(mean[0]), float(half[0])
