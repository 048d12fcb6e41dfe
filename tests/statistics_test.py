"""Intervals against loops over draws."""

from unittest import mock

import numpy as np
from absl.testing import absltest

from jaxedit import statistics


class StatisticsTest(absltest.TestCase):

  def test_normal(self):
    values = np.random.default_rng(0).random((5, 3))
    mean, half = statistics.normal_interval(values)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(half, 1.96 * values.std(0, ddof=1) / 5**0.5)
    self.assertTrue(np.isnan(statistics.normal_interval(values[:1])[1]).all())
    self.assertTrue(np.isnan(statistics.normal_interval(values[:0])).all())

  def test_draws_do_not_depend_on_memory(self):
    values = np.random.default_rng(0).random((7, 2))
    given = dict(seed=3, resamples=50)
    rng = np.random.default_rng(3)
    draws = [rng.integers(0, 7, 7) for _ in range(50)]
    median = lambda drawn: np.median(drawn, axis=1)
    for held in (1, 100, 2**22):
      with mock.patch.object(statistics, '_NUMBERS', held):
        found = statistics.bootstrap(values, median, **given)
        means = statistics.bootstrap_means(values, **given)
      wanted = [np.median(values[draw], axis=0) for draw in draws]
      np.testing.assert_array_equal(found, wanted)
      self.assertEqual(means.shape, (50, 2))

  def test_means_pass_over_what_a_record_lacks(self):
    values = np.array([[1.0, np.nan], [1.0, 2.0], [1.0, 4.0]])
    means = statistics.bootstrap_means(values, resamples=200)
    np.testing.assert_allclose(means[:, 0], 1.0)
    known = means[~np.isnan(means[:, 1]), 1]
    self.assertBetween(len(known), 150, 199)  # 1 in 27 draws the first alone
    self.assertTrue(((known >= 2) & (known <= 4)).all())

  def test_pairs_stay_together(self):
    one = np.random.default_rng(0).random(9)
    mean = lambda drawn: drawn.mean(1)
    low, high = statistics.paired_difference(one, one + 0.1, mean)
    self.assertAlmostEqual(low, 0.1)
    self.assertAlmostEqual(high, 0.1)


if __name__ == '__main__':
  absltest.main()
