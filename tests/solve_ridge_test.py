"""The one closed form equals the formulas as papers write them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import naive_oracle
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.solve import preconditioner as preconditioners
from jaxedit.solve.ridge import ridge_dense, ridge_update

F, D = 24, 10
LAMBDA = 15.0


@functools.cache
def gram(kind: str) -> np.ndarray:
  """Random second moments [F, F].

  'random' is well conditioned. The others have condition 1e8: 'graded' because
  key dimensions have very different sizes, 'turned' in no particular basis.
  """
  rng = np.random.default_rng(0)
  keys = rng.standard_normal((4 * F, F))
  if kind == 'graded':
    keys *= np.logspace(0, -4, F)
  c = keys.T @ keys / len(keys)
  if kind == 'turned':
    basis = np.linalg.qr(rng.standard_normal((F, F)))[0]
    c = basis * np.logspace(0, -8, F) @ basis.T
  return (c + c.T) / 2


def draw(rows: int, kind: str = 'random') -> tuple[np.ndarray, np.ndarray]:
  """Keys with the second moment of `kind` and residuals."""
  rng = np.random.default_rng(rows)
  factor = np.linalg.cholesky(gram(kind))
  keys = rng.standard_normal((rows, F)) @ factor.T
  return keys, rng.standard_normal((rows, D))


def solve(kind, keys, residuals, ridge=1.0, active=None):
  """Factors of `ridge_update` in f64, as numpy arrays."""
  with jax.enable_x64(True):
    s = preconditioners.covariance(jnp.asarray(gram(kind)), LAMBDA)
    found = jax.jit(ridge_update)(
        s, jnp.asarray(keys), jnp.asarray(residuals), ridge=ridge, active=active
    )
    for array in (*s, *found):
      assert array.dtype == jnp.float64, array.dtype
  return tuple(np.asarray(x) for x in found)


def solve_dense(
    kind, keys, residuals, ridge=1.0, active=None, block=1024, basis=None
):
  """The matrix of `ridge_dense` in f64; the metric of a basis where given."""
  with jax.enable_x64(True):
    if basis is None:
      s = preconditioners.covariance(jnp.asarray(gram(kind)), LAMBDA)
    else:
      s = preconditioners.NullSpaceBasis(jnp.asarray(basis))
    found = jax.jit(ridge_dense, static_argnames='block')(
        s,
        jnp.asarray(keys),
        jnp.asarray(residuals),
        ridge=ridge,
        active=active,
        block=block,
    )
    assert found.dtype == jnp.float64, found.dtype
  return np.asarray(found)


def orthonormal(rank: int) -> np.ndarray:
  """Random orthonormal columns [F, rank]."""
  rng = np.random.default_rng(rank)
  return np.linalg.qr(rng.standard_normal((F, rank)))[0]


def error(got: np.ndarray, want: np.ndarray) -> float:
  """Relative difference in the Frobenius norm."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class FactorsTest(parameterized.TestCase):

  @parameterized.product(kind=('random', 'graded'), rows=(1, 5, F, 2 * F))
  def test_equals_the_dense_formula(self, kind, rows):
    keys, residuals = draw(rows, kind)
    key, value = solve(kind, keys, residuals)
    self.assertEqual((key.shape, value.shape), ((rows, F), (rows, D)))
    want = naive_oracle.dense_update(LAMBDA * gram(kind), keys, residuals)
    self.assertLess(error(key.T @ value, want), 1e-10)

  @parameterized.parameters(1, 5, F, 2 * F)
  def test_is_as_exact_as_the_moments_allow(self, rows):
    # The last bit of C moves X by up to condition * 2^-52 when C is ill
    # conditioned in no particular basis; a dense f64 solve is off as much.
    condition = np.linalg.cond(gram('turned'))
    self.assertBetween(condition, 0.9e8, 1.1e8)
    self.assertGreater(np.linalg.cond(gram('graded')), 1e8)
    keys, residuals = draw(rows, 'turned')
    key, value = solve('turned', keys, residuals)
    want = naive_oracle.dense_update(LAMBDA * gram('turned'), keys, residuals)
    self.assertLess(error(key.T @ value, want), condition * 2**-52)

  @parameterized.parameters('random', 'graded')
  def test_rows_without_residual_preserve_their_output(self, kind):
    keys, residuals = draw(8, kind)
    residuals[5:] = 0
    key, value = solve(kind, keys, residuals)
    # B + K_all^T K_all on the left, the edited rows alone on the right.
    system = LAMBDA * gram(kind) + keys[5:].T @ keys[5:]
    want = naive_oracle.dense_update(system, keys[:5], residuals[:5])
    self.assertLess(error(key.T @ value, want), 1e-10)
    alone = solve(kind, keys[:5], residuals[:5])
    moved = lambda factors: np.linalg.norm(keys[5:] @ factors[0].T @ factors[1])
    self.assertLess(moved((key, value)), moved(alone))

  @parameterized.product(kind=('random', 'graded'), rows=(1, 5, F))
  def test_ridge_zero_is_exact(self, kind, rows):
    keys, residuals = draw(rows, kind)
    key, value = solve(kind, keys, residuals, 0.0)
    self.assertLess(error(keys @ key.T @ value, residuals), 1e-8)

  def test_ridge_zero_is_the_limit_of_small_ridges(self):
    keys, residuals = draw(5)
    key, value = solve('random', keys, residuals, 0.0)
    small = solve('random', keys, residuals, 1e-9)
    self.assertLess(error(small[0].T @ small[1], key.T @ value), 1e-6)

  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_inactive_rows_are_as_if_absent(self, ridge):
    keys, residuals = draw(8)
    active = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    # What an edit that failed leaves behind must not matter.
    keys[1], residuals[4] = np.nan, np.inf
    key, value = solve('random', keys, residuals, ridge, active)
    want = solve('random', keys[active], residuals[active], ridge)
    np.testing.assert_array_equal(key[~active], 0)
    np.testing.assert_array_equal(value[~active], 0)
    for got, wanted in zip((key, value), want):
      self.assertLess(error(got[active], wanted), 1e-13)

  def test_no_active_row_changes_nothing(self):
    keys, residuals = draw(8)
    key, value = solve('random', keys, residuals, 1.0, np.zeros(8, bool))
    np.testing.assert_array_equal(key.T @ value, np.zeros((F, D)))

  def test_order_of_rows_does_not_matter(self):
    keys, residuals = draw(5)
    key, value = solve('random', keys, residuals)
    back = solve('random', keys[::-1], residuals[::-1])
    self.assertLess(error(back[0].T @ back[1], key.T @ value), 1e-12)

  def test_moments_that_are_not_positive_give_nan(self):
    with jax.enable_x64(True):
      s = preconditioners.covariance(jnp.asarray(-gram('random')), LAMBDA)
    self.assertTrue(np.isnan(s.factor).any())

  def test_independent_systems_can_be_batched(self):
    keys, residuals = draw(6)
    active = np.array([1, 1, 0, 1, 1, 1], bool)
    one = lambda s, key, residual, on: ridge_update(
        s, key[None], residual[None], ridge=1.0, active=on[None]
    )
    with jax.enable_x64(True):
      s = preconditioners.covariance(jnp.asarray(gram('random')), LAMBDA)
      every = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))
      key, value = every(s, *map(jnp.asarray, (keys, residuals, active)))
    self.assertEqual((key.shape, value.shape), ((6, 1, F), (6, 1, D)))
    for i in range(6):
      want = solve('random', keys[i : i + 1], residuals[i : i + 1])
      for got, wanted in zip((key[i], value[i]), want):
        np.testing.assert_allclose(got, wanted * active[i], rtol=1e-12)

  def test_keys_may_be_narrower_than_the_metric(self):
    keys, residuals = (x.astype(np.float32) for x in draw(5))
    narrow = solve('random', keys, residuals)
    wide = solve('random', keys.astype(np.float64), residuals)
    for got, wanted in zip(narrow, wide):
      np.testing.assert_array_equal(got, wanted)
    got = solve_dense('random', keys, residuals)
    wanted = solve_dense('random', keys.astype(np.float64), residuals)
    np.testing.assert_array_equal(got, wanted)


class DenseTest(parameterized.TestCase):

  @parameterized.product(
      kind=('random', 'graded'), rows=(1, F - 1, F, F + 1, 3 * F)
  )
  def test_equals_the_dense_formula(self, kind, rows):
    keys, residuals = draw(rows, kind)
    got = solve_dense(kind, keys, residuals)
    want = naive_oracle.dense_update(LAMBDA * gram(kind), keys, residuals)
    self.assertLess(error(got, want), 1e-10)

  @parameterized.parameters(5, F, F + 1, 3 * F)
  def test_is_as_exact_as_the_moments_allow(self, rows):
    condition = np.linalg.cond(gram('turned'))
    keys, residuals = draw(rows, 'turned')
    got = solve_dense('turned', keys, residuals)
    want = naive_oracle.dense_update(LAMBDA * gram('turned'), keys, residuals)
    self.assertLess(error(got, want), condition * 2**-52)

  @parameterized.product(rows=(F - 1, F, F + 1), ridge=(0.3, 1.0))
  def test_both_systems_agree_around_the_rank(self, rows, ridge):
    keys, residuals = draw(rows)
    key, value = solve('random', keys, residuals, ridge)  # always M x M
    got = solve_dense('random', keys, residuals, ridge)
    self.assertLess(error(got, key.T @ value), 1e-11)

  @parameterized.product(rows=(5, F, 2 * F + 3), block=(1, 4, 7, F))
  def test_blocks_do_not_matter(self, rows, block):
    keys, residuals = draw(rows)
    active = np.arange(rows) % 3 > 0
    whole = solve_dense('random', keys, residuals, 0.3, active)
    parts = solve_dense('random', keys, residuals, 0.3, active, block)
    self.assertLess(error(parts, whole), 1e-12)

  @parameterized.product(rows=(8, 2 * F), block=(3, 1024), ridge=(0.3, 1.0))
  def test_inactive_rows_are_as_if_absent(self, rows, block, ridge):
    keys, residuals = draw(rows)
    active = np.arange(rows) % 4 > 0
    keys[4], residuals[0] = np.nan, np.inf
    got = solve_dense('random', keys, residuals, ridge, active, block)
    want = solve_dense('random', keys[active], residuals[active], ridge)
    self.assertLess(error(got, want), 1e-12)

  @parameterized.parameters(8, 2 * F)
  def test_no_active_row_changes_nothing(self, rows):
    keys, residuals = draw(rows)
    got = solve_dense('random', keys, residuals, 1.0, np.zeros(rows, bool))
    np.testing.assert_array_equal(got, np.zeros((F, D)))

  @parameterized.parameters(1, 5, F)
  def test_ridge_zero_is_exact(self, rows):
    keys, residuals = draw(rows)
    got = solve_dense('random', keys, residuals, 0.0)
    self.assertLess(error(keys @ got, residuals), 1e-8)

  def test_ridge_zero_is_least_squares_for_many_keys(self):
    keys, residuals = draw(3 * F)
    got = solve_dense('random', keys, residuals, 0.0)
    want = np.linalg.lstsq(keys, residuals, rcond=None)[0]
    self.assertLess(error(got, want), 1e-11)

  @parameterized.product(rows=(1, 7, 8, 9, 2 * F), ridge=(0.5, 10.0))
  def test_a_null_space_keeps_changes_within_it(self, rows, ridge):
    # P (K^T K P + r I)^-1 K^T R, the formula with the projection P [F, F].
    keys, residuals = draw(rows)
    basis = orthonormal(8)
    got = solve_dense('', keys, residuals, ridge, basis=basis)
    p = basis @ basis.T
    system = keys.T @ keys @ p + ridge * np.eye(F)
    want = p @ np.linalg.solve(system, keys.T @ residuals)
    self.assertLess(error(got, want), 1e-11)
    outside = np.eye(F) - p
    self.assertLess(np.linalg.norm(outside @ got), 1e-12 * np.linalg.norm(got))


if __name__ == '__main__':
  absltest.main()
