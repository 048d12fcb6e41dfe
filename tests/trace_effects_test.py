"""Noise of a trace, and averages of its effects, against plain formulas."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.testing import models
from jaxedit.trace import effects, noise
from jaxedit.types import InputError

LAYERS = 4


class Result(NamedTuple):
  """What averages read of a trace."""

  high: float
  low: float
  scores: dict[str, np.ndarray]
  labels: np.ndarray = np.zeros(1, np.int32)


class LevelTest(parameterized.TestCase):

  @parameterized.parameters(
      ('s3', 'gaussian', 3.0, True),
      ('s0.5', 'gaussian', 0.5, True),
      ('0.1', 'gaussian', 0.1, False),
      ('1e-2', 'gaussian', 0.01, False),
      (' u0.1 ', 'uniform', 0.1, False),
  )
  def test_reads(self, text, *want):
    self.assertEqual(noise.parse(text), noise.Noise(*want))

  @parameterized.parameters(
      '', 's', 'u', 'm', 't3', 'x3', 'us3', 's 3 1', '0', '-1', 's-3', 'nan',
      's0', 'inf', 'uinf', '0,1',
  )  # fmt: skip
  def test_refuses(self, text):
    with self.assertRaisesRegex(InputError, "write s and .*'u0.1'") as caught:
      noise.parse(text)
    self.assertIn(repr(text), str(caught.exception))

  def test_resolves(self):
    self.assertEqual(noise.level('s3', 0.5), noise.Noise('gaussian', 1.5))
    self.assertEqual(noise.level('0.1', 0.5), noise.Noise('gaussian', 0.1))
    self.assertEqual(noise.level('0.1'), noise.Noise('gaussian', 0.1))
    self.assertEqual(noise.level('u2'), noise.Noise('uniform', 2.0))
    self.assertEqual(noise.level(noise.DEFAULT, 1.0).scale, 3.0)
    for std in (None, 0.0, math.nan):
      with self.assertRaisesRegex(InputError, f'theirs is {std}'):
        noise.level('s3', std)


class EmbeddingTest(parameterized.TestCase):

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_is_over_all_elements(self, dtype):
    params = models.random_params(models.tiny_spec('gpt2'), 0, dtype)
    table = np.asarray(params['embed']['embedding']).astype(np.float64)
    ids = [7, 3, 7, 0, 96, 7]  # ids that come again count again
    vectors = np.concatenate([table[i] for i in ids])
    want = math.sqrt(((vectors - vectors.mean()) ** 2).sum() / (6 * 32 - 1))
    self.assertAlmostEqual(noise.embedding_std(params, ids), want, places=14)

  def test_refuses(self):
    params = models.random_params(models.tiny_spec('gpt2'), 0)
    with self.assertRaisesRegex(InputError, 'no subject tokens'):
      noise.embedding_std(params, [])
    for ids in ([-1, 4], [4, 97]):
      with self.assertRaisesRegex(InputError, 'embeddings 0 to 96'):
        noise.embedding_std(params, ids)


class DrawTest(absltest.TestCase):

  def test_is_the_published_stream(self):
    # The first numbers of numpy's generator with seed 1.
    gaussian = [1.62434536, -0.61175641, -0.52817175, -1.07296862]
    uniform = [-0.16595599, 0.44064899, -0.99977125, -0.39533485]
    for kind, want in (('gaussian', gaussian), ('uniform', uniform)):
      got = noise.draw(noise.Noise(kind, 2.0), (1, 2, 2))
      self.assertEqual(got.dtype, np.float32)
      np.testing.assert_allclose(got.ravel(), 2 * np.array(want), rtol=1e-6)

  def test_every_call_starts_anew(self):
    some = noise.Noise('gaussian', 0.3)
    first = noise.draw(some, (10, 3, 8))
    np.random.seed(5)
    np.testing.assert_array_equal(first, noise.draw(some, (10, 3, 8)))
    # Texts of other shapes share the leading part of the stream.
    other = noise.draw(some, (2, 5, 8))
    np.testing.assert_array_equal(first.ravel()[:80], other.ravel())
    self.assertFalse((first == noise.draw(some, (10, 3, 8), seed=2)).any())

  def test_scale(self):
    for kind, deviation in (('gaussian', 1.0), ('uniform', 3**-0.5)):
      got = noise.draw(noise.Noise(kind, 0.1), (100, 10, 10))
      self.assertAlmostEqual(got.std() / (0.1 * deviation), 1, delta=0.02)
      self.assertAlmostEqual(got.mean(), 0, delta=0.003)
    self.assertLessEqual(abs(got).max(), 0.1)


class ClassesTest(parameterized.TestCase):

  @parameterized.parameters(
      (9, 1, 5, [[1], [2, 3], [4], [5], [6, 7], [8]]),
      (5, 0, 2, [[0], [], [1], [2], [3], [4]]),
      # The only token of a subject is its first and its last.
      (4, 0, 1, [[0], [], [0], [1], [2], [3]]),
      # The only token after it is the first subsequent one and the last.
      (4, 0, 3, [[0], [1], [2], [3], [], [3]]),
      # The subject ends the prompt.
      (4, 1, 4, [[1], [2], [3], [], [], [3]]),
      (1, 0, 1, [[0], [], [0], [], [], [0]]),
  )
  def test_columns(self, length, first, end, want):
    self.assertLen(effects.CLASSES, 6)
    self.assertEqual(effects.token_classes(length, first, end), want)


def random_results():
  """Facts of several lengths, of which some lack a role."""
  rng = np.random.default_rng(0)
  spans = [(1, 5), (0, 2), (2, 3), (0, 3), (1, 4), (3, 6)]
  lengths = [9, 5, 6, 4, 4, 8]
  results = [
      Result(
          high=rng.uniform(0.5, 1),
          low=rng.uniform(0, 0.5),
          scores={k: rng.uniform(size=(n, LAYERS)) for k in ('mlp', 'attn')},
      )
      for n in lengths
  ]
  return results, spans


def naive_average(results, spans, kind):
  """Per role and layer: (mean, half width, facts), number by number."""
  table = np.full((6, LAYERS, 3), np.nan)
  for role, layer in np.ndindex(6, LAYERS):
    per_fact = []
    for result, (first, end) in zip(results, spans):
      scores = result.scores[kind][:, layer]
      mine = [
          scores[first : first + 1],
          scores[first + 1 : end - 1],
          scores[end - 1 : end],
          scores[end : end + 1],
          scores[end + 1 : -1],
          scores[-1:],
      ][role]
      mine = [x - result.low for x in mine if not math.isnan(x)]
      if mine:
        per_fact.append(sum(mine) / len(mine))
    n = len(per_fact)
    mean = sum(per_fact) / n if n else math.nan
    half = math.nan
    if n > 1:
      variance = sum((x - mean) ** 2 for x in per_fact) / (n - 1)
      half = 1.96 * math.sqrt(variance / n)
    table[role, layer] = mean, half, n
  return table


class AverageTest(absltest.TestCase):

  def _check(self, results, spans, kind):
    got = effects.average(results, spans, kind)
    want = naive_average(results, spans, kind)
    np.testing.assert_allclose(got.mean, want[..., 0], rtol=1e-12)
    np.testing.assert_allclose(got.half_width, want[..., 1], rtol=1e-12)
    np.testing.assert_array_equal(got.count, want[:, 0, 2])
    return got

  def test_is_the_formula(self):
    results, spans = random_results()
    got = self._check(results, spans, 'mlp')
    self.assertEqual(got.count.tolist(), [6, 4, 6, 5, 3, 6])
    self.assertTrue(np.isfinite(got.half_width).all())
    other = self._check(results, spans, 'attn')
    self.assertFalse((got.mean == other.mean).any())

  def test_cells_that_were_not_asked_for(self):
    results, spans = random_results()
    for result, (_, end) in zip(results, spans):
      asked = [end - 1, end + 1]
      for table in result.scores.values():
        left_out = [t for t in range(len(table)) if t not in asked]
        table[left_out] = np.nan
    got = self._check(results, spans, 'mlp')
    self.assertEqual(got.count[2], 6)
    self.assertEqual(got.count[1], 0)
    self.assertTrue(np.isnan(got.mean[1]).all())

  def test_prompt_ends_with_the_first_scored_column(self):
    results, spans = random_results()
    want = effects.average(results, spans, 'mlp')
    # Two columns more, of the answer's first two tokens, cannot be restored.
    longer = [
        result._replace(
            labels=np.zeros(3, np.int32),
            scores={
                kind: np.concatenate([table, np.full((2, LAYERS), np.nan)])
                for kind, table in result.scores.items()
            },
        )
        for result in results
    ]
    got = effects.average(longer, spans, 'mlp')
    for a, b in zip(got, want):
      np.testing.assert_array_equal(a, b)

  def test_one_fact_has_no_interval(self):
    results, spans = random_results()
    got = self._check(results[:1], spans[:1], 'mlp')
    self.assertTrue(np.isfinite(got.mean).all())
    self.assertTrue(np.isnan(got.half_width).all())

  def test_total_effect(self):
    results, _ = random_results()
    gaps = [r.high - r.low for r in results]
    mean, half = effects.total_effect(results)
    self.assertAlmostEqual(mean, np.mean(gaps), places=14)
    want = 1.96 * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    self.assertAlmostEqual(half, want, places=14)
    mean, half = effects.total_effect(results[:1])
    self.assertAlmostEqual(mean, gaps[0], places=14)
    self.assertTrue(math.isnan(half))
    self.assertTrue(np.isnan(effects.total_effect([])).all())


if __name__ == '__main__':
  absltest.main()
