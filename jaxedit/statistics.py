"""95 % intervals over records: normal, and percentiles of a bootstrap.

  normal      mean +- 1.96 s / sqrt(n)             s the sample's deviation
  bootstrap   records are drawn with replacement, all numbers of a record
              together; the interval is the 2.5 % and the 97.5 % percentile of a
              statistic of the draws (Efron 1979)

Axis letters: n records, R resamples. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

QUANTILE = 1.96  # of a standard normal distribution, at 97.5 %
_NUMBERS = 2**22  # drawn numbers held at one time


def normal_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Averages over records.

  Args:
    values: [n, m].

  Returns:
    (mean [m], half of its interval [m]); NaN below one and two records.
  """
  count, nothing = len(values), np.full(values.shape[1], np.nan)
  mean = values.mean(axis=0) if count else nothing
  if count < 2:
    return mean, nothing
  return mean, QUANTILE * values.std(axis=0, ddof=1) / np.sqrt(count)


def percentiles(drawn: np.ndarray) -> np.ndarray:
  """Returns (lower, upper) end of the interval, from [R, ...] resamples."""
  return np.nanpercentile(drawn, [2.5, 97.5], axis=0)


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
  """Resamples any statistic of records.

  Args:
    values: [n, ...].
    statistic: [R, n, ...] -> [R, ...].
    seed: of the draws.
    resamples: R.

  Returns:
    [R, ...] the statistic of every resample.
  """
  rng, count = np.random.default_rng(seed), len(values)
  draw = lambda size: rng.integers(0, count, (size, count))
  sizes = _sizes(resamples, values.size)
  return np.concatenate([statistic(values[draw(size)]) for size in sizes])


def bootstrap_means(
    values: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> np.ndarray:
  """Resamples means; as `bootstrap`, without copies of the records.

  Args:
    values: [n, m], NaN where a record lacks a number.
    seed: of the draws.
    resamples: R.

  Returns:
    [R, m]; NaN where no drawn record has the number.
  """
  rng, count = np.random.default_rng(seed), len(values)
  present = ~np.isnan(values)
  both = np.concatenate([np.where(present, values, 0.0), present], axis=1)
  share = np.full(count, 1 / count)
  # How often each record was drawn stands for the draws themselves.
  parts = [
      rng.multinomial(count, share, size) @ both
      for size in _sizes(resamples, count)
  ]
  total, known = np.split(np.concatenate(parts), 2, axis=1)
  return np.where(known > 0, total / np.maximum(known, 1), np.nan)


def paired_difference(
    one: np.ndarray,
    other: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
  """Returns the interval of statistic(other) - statistic(one), same draws.

  Args:
    one: [n, ...] of some records.
    other: the same of the same records.
    statistic: [R, n, ...] -> [R].
    seed: of the draws.
    resamples: R.

  Returns:
    (lower, upper) end.
  """

  def difference(drawn: np.ndarray) -> np.ndarray:
    return statistic(drawn[:, :, 1]) - statistic(drawn[:, :, 0])

  both = np.stack([one, other], axis=1)
  return percentiles(
      bootstrap(both, difference, seed=seed, resamples=resamples)
  )


def _sizes(resamples: int, numbers: int) -> list[int]:
  """Cuts resamples into parts that fit in memory."""
  step = max(1, _NUMBERS // numbers)
  return [min(step, resamples - first) for first in range(0, resamples, step)]
