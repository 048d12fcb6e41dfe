"""Metrics are what they say of key space, in factored form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.solve import preconditioner as preconditioners

F = 24
LAMBDA = 15.0


def gram(condition: float = 1e8) -> np.ndarray:
  """Second moments [F, F] in no particular basis."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.standard_normal((F, F)))[0]
  c = basis * np.logspace(0, -np.log10(condition), F) @ basis.T
  return (c + c.T) / 2


def orthonormal(rank: int) -> np.ndarray:
  """Random orthonormal columns [F, rank]."""
  rng = np.random.default_rng(rank)
  return np.linalg.qr(rng.standard_normal((F, rank)))[0]


def null_space(c: np.ndarray, **rule) -> np.ndarray:
  """The basis in f64."""
  with jax.enable_x64(True):
    (basis,) = preconditioners.null_space(jnp.asarray(c), **rule)
  assert basis.dtype == jnp.float64, basis.dtype
  return np.asarray(basis)


def error(got: np.ndarray, want: np.ndarray) -> float:
  """Relative difference in the Frobenius norm."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class MetricTest(parameterized.TestCase):

  @parameterized.parameters('covariance', 'null space', 'identity')
  def test_whitened_keys_are_a_root_of_the_metric(self, name):
    keys = np.random.default_rng(5).standard_normal((5, F))
    c = gram(10.0)
    with jax.enable_x64(True):
      if name == 'covariance':
        s = preconditioners.covariance(jnp.asarray(c), LAMBDA)
        want = np.linalg.inv(LAMBDA * c)
      elif name == 'null space':
        s = preconditioners.NullSpaceBasis(jnp.asarray(orthonormal(8)))
        want = orthonormal(8) @ orthonormal(8).T
      else:
        s = preconditioners.identity(jnp.asarray(c))
        want = np.eye(F)
      whitened = preconditioners.whiten(s, jnp.asarray(keys, jnp.float32))
      self.assertEqual(whitened.dtype, jnp.float64)
      whitened = preconditioners.whiten(s, jnp.asarray(keys))
      lifted = preconditioners.lift(s, whitened)
    self.assertEqual(whitened.shape, (5, preconditioners.rank(s)))
    whitened, lifted = np.asarray(whitened), np.asarray(lifted)
    self.assertLess(error(whitened @ whitened.T, keys @ want @ keys.T), 1e-12)
    self.assertLess(error(lifted, keys @ want), 1e-12)

  def test_the_identity_holds_no_matrix(self):
    s = preconditioners.identity(jnp.full((F, F), jnp.nan))
    self.assertEqual([x.shape for x in s], [(F,)])
    self.assertTrue(np.isfinite(s.ones).all())


class NullSpaceTest(parameterized.TestCase):

  @parameterized.parameters(0.1, 0.5, 0.9, 0.98, 1 - 1e-6)
  def test_the_fewest_directions_that_hold_the_share_are_dropped(self, share):
    c = gram()
    basis = null_space(c, share=share)
    p = basis @ basis.T
    kept = np.trace(p @ c) / np.trace(c)
    self.assertLessEqual(kept, 1 - share + 1e-12)
    # With the largest direction that is left it would be too much.
    largest = np.linalg.eigvalsh(basis.T @ c @ basis)[-1] / np.trace(c)
    dropped = np.linalg.eigvalsh(c - p @ c @ p)[-(F - basis.shape[1]) :]
    self.assertGreaterEqual(dropped.min() / np.trace(c), largest)
    self.assertGreater(kept + dropped.min() / np.trace(c), 1 - share)

  @parameterized.parameters(2e-2, 0.5, 1e-7)
  def test_a_threshold_is_the_published_rule(self, threshold):
    c = gram()
    u, values, _ = np.linalg.svd(c)
    u = u[:, values < threshold]
    basis = null_space(c, threshold=threshold)
    self.assertEqual(basis.shape, u.shape)
    # Rounding turns a space by the last bit over the gap beside it.
    gap = values[values >= threshold].min() - values[values < threshold].max()
    self.assertLess(error(basis @ basis.T, u @ u.T), F * 2**-52 / gap)

  @parameterized.parameters({'share': 0.7}, {'threshold': 2e-2}, {'share': 0.0})
  def test_is_an_orthogonal_projection(self, **rule):
    basis = null_space(gram(), **rule)
    p = basis @ basis.T
    self.assertLess(np.abs(p @ p - p).max(), 1e-10)
    self.assertLess(
        np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(), 1e-10
    )

  def test_everything_may_be_free(self):
    for rule in ({'share': 0.0}, {'threshold': 2.0}):
      self.assertEqual(null_space(gram(), **rule).shape, (F, F))

  def test_directions_without_keys_are_free(self):
    # What rounding makes of eigenvalues that are zero is of either sign.
    u = orthonormal(8)
    c = u @ u.T
    for rule in ({'share': 1.0}, {'threshold': 1e-6}):
      basis = null_space((c + c.T) / 2, **rule)
      if 'threshold' in rule:
        self.assertEqual(basis.shape, (F, F - 8))
      self.assertLess(np.abs(u.T @ basis).max(), 1e-12)

  def test_a_threshold_is_used_instead_of_a_share(self):
    want = null_space(gram(), threshold=2e-2)
    got = null_space(gram(), share=0.5, threshold=2e-2)
    np.testing.assert_array_equal(got, want)

  def test_nothing_left_to_change_is_refused(self):
    with self.assertRaisesRegex(ValueError, r'threshold 1e-09 rules out all'):
      null_space(gram(), threshold=1e-9)
    with self.assertRaisesRegex(ValueError, r'share 1.0 .* lower the share'):
      null_space(gram(10.0), share=1.0)

  @parameterized.parameters({'share': 0.5}, {'threshold': 2e-2})
  def test_a_negative_eigenvalue_is_refused(self, **rule):
    with self.assertRaisesRegex(ValueError, 'least eigenvalue is -.* second'):
      null_space(gram() - 0.01 * np.eye(F), **rule)

  @parameterized.parameters({}, {'share': 98.0}, {'share': -0.1})
  def test_a_rule_is_needed(self, **rule):
    with self.assertRaisesRegex(ValueError, 'between 0 and 1'):
      null_space(gram(), **rule)

  @parameterized.product(
      bad=(np.nan, np.inf), rule=({'share': 0.9}, {'threshold': 0.1})
  )
  def test_moments_that_are_not_finite_give_nan(self, bad, rule):
    c = gram()
    c[3, 2] = c[2, 3] = bad
    self.assertTrue(np.isnan(null_space(c, **rule)).any())


if __name__ == '__main__':
  absltest.main()
