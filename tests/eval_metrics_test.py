"""Metrics and their means against values computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import statistics
from jaxedit.eval import metrics


class RecordTest(parameterized.TestCase):

  @parameterized.parameters(
      ([(1.0, 2.0)], 1.0),
      ([(2.0, 1.0)], 0.0),
      ([(1.5, 1.5)], 0.0),  # a tie is a failure
      ([(1.0, 2.0), (2.0, 1.0), (0.5, 3.0), (1.0, 1.0)], 0.5),
      ([(math.nan, 1.0)], 0.0),
      ([(1.0, math.nan)], 0.0),
      ([(math.inf, math.inf)], 0.0),
  )
  def test_success(self, pairs, expected):
    self.assertEqual(metrics.success(pairs), expected)

  def test_magnitude(self):
    pairs = [(math.log(2), math.log(4)), (math.log(10), math.log(2))]
    # (1/2 - 1/4 + 1/10 - 1/2) / 2
    self.assertAlmostEqual(metrics.magnitude(pairs), -0.075)
    self.assertEqual(metrics.magnitude([(math.nan, 0.0)]), -1.0)
    self.assertEqual(metrics.magnitude([(math.inf, math.nan)]), 0.0)

  def test_token_metrics(self):
    answers = [[True, True], [True, False, False, False]]
    self.assertEqual(metrics.all_correct(answers), 0.5)
    # The mean over prompts of 1 and 1/4, not 3 tokens of 6.
    self.assertEqual(metrics.token_accuracy(answers), 0.625)

  def test_agreement(self):
    after, before = [[7, 8], [9]], [[7, 1], [9]]
    self.assertEqual(metrics.agreement(after, before), 0.75)
    with self.assertRaises(ValueError):
      metrics.agreement([[1]], [[1, 2]])

  def test_harmonic_mean(self):
    self.assertAlmostEqual(metrics.harmonic_mean([1.0, 0.5, 0.25]), 3 / 7)
    self.assertEqual(metrics.harmonic_mean([1.0, 0.0, 1.0]), 0.0)

  def test_names(self):
    self.assertEqual(metrics.name('es'), metrics.NAMES['es'])
    self.assertIn('one hop', metrics.name('portability_one_hop'))
    self.assertEqual(metrics.name('other'), 'other')


class AggregateTest(absltest.TestCase):

  def test_means_by_hand_with_missing_groups(self):
    records = [
        {'es': 1.0, 'ps': 0.5, 'portability_one_hop': 0.25},
        {'es': 0.0, 'ns': 0.5},
        {'es': 0.5, 'ns': 1.0, 'ps': None},
        {'contains': 1.0},
    ]
    out = metrics.aggregate(records)
    ids = ['score', 'es', 'ps', 'ns', 'contains', 'portability_one_hop']
    self.assertEqual(list(out), ids)
    self.assertEqual({m: out[m]['n'] for m in ids}, {
        'score': 1, 'es': 3, 'ps': 1, 'ns': 2, 'contains': 1,
        'portability_one_hop': 1,
    })  # fmt: skip
    self.assertAlmostEqual(out['es']['mean'], 0.5)
    self.assertAlmostEqual(out['ns']['mean'], 0.75)
    # 3 / (1 / 0.5 + 1 / 0.5 + 1 / 0.75)
    self.assertAlmostEqual(out['score']['mean'], 9 / 16)
    self.assertEqual(out['ps'], dict(mean=0.5, low=0.5, high=0.5, n=1))
    json.dumps(out, allow_nan=False)

  def test_absent_without_records(self):
    self.assertEqual(metrics.aggregate([]), {})
    self.assertEqual(metrics.aggregate([{}, {'ps': None}]), {})
    out = metrics.aggregate([{'es': 1.0, 'ps': 1.0}])
    self.assertEqual(list(out), ['es', 'ps'])

  def test_score_is_zero_if_a_mean_is(self):
    out = metrics.aggregate([{'es': 1.0, 'ps': 1.0, 'ns': 0.0}] * 3)
    self.assertEqual(out['score'], dict(mean=0.0, low=0.0, high=0.0, n=3))

  def test_score_is_not_a_mean_of_scores(self):
    records = [
        {'es': 1.0, 'ps': 1.0, 'ns': 0.0},
        {'es': 0.0, 'ps': 1.0, 'ns': 1.0},
    ]
    # Each record's own harmonic mean is 0; of the means 0.5, 1, 0.5 it is 3/5.
    self.assertAlmostEqual(metrics.aggregate(records)['score']['mean'], 0.6)

  def test_interval_of_a_share(self):
    # Of 400 records 300 succeed: the interval is close to that of a normal
    # variable, 0.75 +- 1.96 sqrt(0.75 0.25 / 400) = 0.75 +- 0.0424.
    records = [{'es': float(i % 4 > 0)} for i in range(400)]
    out = metrics.aggregate(records, seed=1)['es']
    self.assertAlmostEqual(out['mean'], 0.75)
    self.assertAlmostEqual(out['low'], 0.7076, delta=0.01)
    self.assertAlmostEqual(out['high'], 0.7924, delta=0.01)

  def test_interval_of_all_equal_records(self):
    out = metrics.aggregate([{'es': 1.0}] * 7)['es']
    self.assertEqual(out, dict(mean=1.0, low=1.0, high=1.0, n=7))

  def test_a_case_weighs_as_one(self):
    entries = [
        {'case': 'c', 'metrics': {'es': 1.0, 'ps': 0.5}},
        {'case': '', 'metrics': {'es': 0.0}},
        {'case': 'c', 'metrics': {'es': 0.0, 'ps': None}},
        {'metrics': {'es': 1.0}},
    ]
    found = metrics.by_case(entries)
    self.assertEqual(found, [{'es': 0.5, 'ps': 0.5}, {'es': 0.0}, {'es': 1.0}])
    self.assertEqual(metrics.aggregate(found)['es']['n'], 3)

  def test_records_are_drawn_jointly(self):
    # ns fails exactly where es and ps succeed, so es + ns is 1 in every sample
    # and score = 3 / (2 / e + 1 / (1 - e)) cannot exceed its maximum over e.
    records = [
        {'es': float(i % 2), 'ps': float(i % 2), 'ns': float(1 - i % 2)}
        for i in range(10)
    ]
    drawn = statistics.bootstrap_means(
        np.array([list(r.values()) for r in records]), resamples=200
    )
    np.testing.assert_allclose(drawn[:, 0] + drawn[:, 2], 1.0)
    np.testing.assert_allclose(drawn[:, 0], drawn[:, 1])
    share = np.linspace(0.01, 0.99, 999)
    best = np.max(3 / (2 / share + 1 / (1 - share)))
    out = metrics.aggregate(records)['score']
    self.assertLessEqual(out['high'], best)
    self.assertLess(out['low'], out['mean'])

  def test_same_seed_same_interval(self):
    rng = np.random.default_rng(0)
    records = [{'pm': v} for v in rng.standard_normal(50)]
    one, two = metrics.aggregate(records, 3), metrics.aggregate(records, 3)
    self.assertEqual(one, two)
    self.assertNotEqual(one, metrics.aggregate(records, 4))
    more = metrics.aggregate([r | {'es': 1.0} for r in records], 3)
    for part in ('low', 'high', 'n'):
      self.assertEqual(one['pm'][part], more['pm'][part])


if __name__ == '__main__':
  absltest.main()
