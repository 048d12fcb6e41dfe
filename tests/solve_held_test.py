"""Held keys and constraints: the whole system, solved in a smaller one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.solve import preconditioner as preconditioners
from jaxedit.solve.ridge import ridge_dense, ridge_update

F, D = 24, 10
METRICS = ('covariance', 'null space', 'identity')


def draw(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Keys whose dimensions have different sizes, and residuals."""
  rng = np.random.default_rng([rows, seed])
  keys = rng.standard_normal((rows, F)) * np.logspace(0, -2, F)
  return keys, rng.standard_normal((rows, D))


def root(name: str) -> np.ndarray:
  """B [F, r] of the metric S = B B^T."""
  rng = np.random.default_rng(1)
  if name == 'covariance':
    keys, _ = draw(4 * F)
    return np.linalg.inv(np.linalg.cholesky(keys.T @ keys)).T
  return np.linalg.qr(rng.standard_normal((F, F - 4)))[0]


def preconditioner(name: str):
  """The metric; its root is exactly that of `root`, up to a rotation."""
  if name == 'covariance':
    keys, _ = draw(4 * F)
    return preconditioners.covariance(jnp.asarray(keys.T @ keys), 1.0)
  if name == 'identity':
    return preconditioners.identity(jnp.eye(F, dtype=jnp.float64))
  return preconditioners.NullSpaceBasis(jnp.asarray(root(name)))


_SOLVERS = {
    'factors': jax.jit(ridge_update),
    'matrix': jax.jit(ridge_dense, static_argnames='block'),
}


def call(solver, name, keys, residuals, *, block=1024, **given):
  """Runs a solver in f64."""
  static = {'block': block} if solver == 'matrix' else {}
  with jax.enable_x64(True):
    given = {k: jnp.asarray(v) for k, v in given.items() if v is not None}
    arrays = preconditioner(name), jnp.asarray(keys), jnp.asarray(residuals)
    found = _SOLVERS[solver](*arrays, **static, **given)
  return jax.tree.map(np.asarray, found)


factors = functools.partial(call, 'factors')
dense = functools.partial(call, 'matrix')


def product(found) -> np.ndarray:
  return found.key.T @ found.value


def whole(name, keys, residuals, *, ridge, preserved, constraint=None):
  """S K^T (r I + C S K^T)^-1 R with the held rows in K, C and R, [F, D]."""
  b = np.eye(F) if name == 'identity' else root(name)
  b, keys, preserved = (x.astype(np.longdouble) for x in (b, keys, preserved))
  rows = np.concatenate([keys, preserved])
  there = np.concatenate(
      [keys if constraint is None else constraint, preserved]
  )
  wanted = np.concatenate([residuals, np.zeros((len(preserved), D))])
  moved = b @ (rows @ b).T
  system = there @ moved + ridge * np.eye(len(rows))
  return moved @ solve(system, wanted)


def solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a^-1 b: float64 solves, refined with residuals in extended precision."""
  inverse = np.linalg.inv(a.astype(np.float64))
  x = np.zeros(b.shape, np.longdouble)
  for _ in range(10):
    x += inverse @ (b - a @ x)
  return x


def error(got: np.ndarray, want: np.ndarray) -> float:
  """Relative difference in the Frobenius norm."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class HeldTest(parameterized.TestCase):

  @parameterized.product(name=METRICS, others=(12, 3 * F), ridge=(0.3, 10.0))
  def test_are_rows_without_residual(self, name, others, ridge):
    keys, residuals = draw(4)
    preserved, nothing = draw(others, 1)
    given = {'ridge': ridge, 'preserved': preserved}
    found = factors(name, keys, residuals, **given)
    self.assertEqual((found.key.shape, found.value.shape), ((4, F), (4, D)))
    rows = np.concatenate([keys, preserved])
    wanted = np.concatenate([residuals, 0 * nothing])
    together = product(factors(name, rows, wanted, ridge=ridge))
    matrix = dense(name, keys, residuals, **given)
    self.assertLess(error(product(found), together), 1e-10)
    self.assertLess(error(matrix, together), 1e-10)
    want = whole(name, keys, residuals, **given)
    self.assertLess(error(product(found), want), 1e-10)

  @parameterized.product(name=METRICS, others=(0, 12), ridge=(0.0, 0.3))
  def test_go_together_with_a_constraint(self, name, others, ridge):
    keys, residuals = draw(4)
    preserved, _ = draw(others, 1)
    constraint = keys + 0.3 * draw(4, 2)[0]
    given = {'ridge': ridge, 'preserved': preserved, 'constraint': constraint}
    want = whole(name, keys, residuals, **given)
    found = product(factors(name, keys, residuals, **given))
    self.assertLess(error(found, want), 1e-10)
    self.assertLess(error(dense(name, keys, residuals, **given), want), 1e-10)
    if not ridge:
      self.assertLess(error(constraint @ found, residuals), 1e-9)
      self.assertLess(np.abs(preserved @ found).max(initial=0), 1e-9)

  @parameterized.parameters(None, 'constraint')
  def test_the_rank_is_the_number_of_edited_rows(self, constraint):
    keys, residuals = draw(3)
    given = {'ridge': 1.0, 'preserved': draw(60, 1)[0]}
    if constraint:
      given['constraint'] = draw(3, 2)[0]
    found = factors('covariance', keys, residuals, **given)
    self.assertEqual(found.key.shape[0], 3)
    self.assertEqual(np.linalg.matrix_rank(product(found)), 3)
    matrix = dense('covariance', keys, residuals, **given)
    self.assertEqual(np.linalg.matrix_rank(matrix, rtol=1e-12), 3)

  @parameterized.product(ridge=(0.0, 1e-6, 1e-2), near=(1e-3, 1e-5))
  def test_keys_close_to_the_held_ones_lose_little(self, ridge, near):
    preserved, _ = draw(12, 1)
    keys, residuals = draw(4)
    mixture = np.random.default_rng(3).standard_normal((4, 12))
    keys = near * keys + mixture @ preserved
    given = {'ridge': ridge, 'preserved': preserved}
    want = whole('covariance', keys, residuals, **given)
    found = product(factors('covariance', keys, residuals, **given))
    # What is left of K is so much smaller, and its last bit so much larger. One
    # Cholesky of all rows works with squares: 2e-4 at the least of both. Without
    # a ridge the little one that lets held keys repeat shows, by its square.
    bound = 1e-11 / near if ridge else 1e-11 / near**2
    self.assertLess(error(found, want), bound)

  def test_may_repeat_without_any_ridge(self):
    keys, residuals = draw(2)
    some, _ = draw(5, 3)
    preserved = np.concatenate([some, some[:3], some[:1] * (1 + 1e-9)])
    for constraint in (None, draw(2, 4)[0]):
      found = factors(
          'covariance', keys, residuals, ridge=0.0, preserved=preserved,
          constraint=constraint,
      )  # fmt: skip
      change = product(found)
      asked = keys if constraint is None else constraint
      self.assertLess(error(asked @ change, residuals), 1e-6)
      self.assertLess(np.abs(preserved @ change).max(), 1e-6)

  @parameterized.parameters(False, True)
  def test_may_repeat_beyond_the_rank(self, constraint):
    # Texts with one opening: many held keys that leave directions free.
    keys, residuals = draw(2)
    some, _ = draw(5, 3)
    given = {'ridge': 0.0, 'constraint': draw(2, 4)[0] if constraint else None}
    want = product(
        factors('covariance', keys, residuals, preserved=some, **given)
    )
    preserved = np.tile(some, (8, 1))
    self.assertGreater(len(preserved), F)
    found = factors('covariance', keys, residuals, preserved=preserved, **given)
    self.assertLess(error(product(found), want), 1e-4)
    matrix = dense('covariance', keys, residuals, preserved=preserved, **given)
    self.assertLess(error(matrix, want), 1e-4)
    self.assertLess(np.abs(preserved @ matrix).max(), 1e-4)

  @parameterized.parameters(False, True)
  def test_more_of_them_than_the_rank(self, constraint):
    keys, residuals = draw(3)
    preserved, _ = draw(3 * F, 5)
    given = dict(ridge=0.3, preserved=preserved)
    if constraint:
      given['constraint'] = draw(3, 6)[0]
    found = factors('covariance', keys, residuals, **given)
    self.assertEqual(found.key.shape, (3, F))
    want = whole('covariance', keys, residuals, **given)
    self.assertLess(error(product(found), want), 1e-9)

  @parameterized.product(ridge=(0.0, 0.3), constraint=(False, True))
  def test_inactive_rows_are_as_if_absent(self, ridge, constraint):
    keys, residuals = draw(6)
    preserved, there = draw(8, 1)[0], draw(6, 2)[0] if constraint else None
    on = np.array([1, 0, 1, 1, 0, 1], bool)
    held_on = np.arange(8) % 3 > 0
    pick = lambda x, on: None if x is None else x[on].copy()
    want = factors(
        'covariance',
        keys[on],
        residuals[on],
        ridge=ridge,
        preserved=preserved[held_on],
        constraint=pick(there, on),
    )
    keys[1], residuals[4], preserved[0], preserved[3] = (
        np.nan,
        np.inf,
        np.nan,
        np.inf,
    )
    if constraint:
      there[4] = np.nan
    given = {
        'ridge': ridge,
        'preserved': preserved,
        'constraint': there,
        'active': on,
        'preserved_active': held_on,
    }
    found = factors('covariance', keys, residuals, **given)
    for got, wanted in zip(found, want):
      np.testing.assert_array_equal(got[~on], 0)
      self.assertLess(error(got[on], wanted), 1e-12)
    matrix = dense('covariance', keys, residuals, **given)
    self.assertLess(error(matrix, product(want)), 1e-11)

  @parameterized.parameters(0.0, 1.0)
  def test_held_rows_that_are_all_inactive_hold_nothing(self, ridge):
    keys, residuals = draw(4)
    want = factors('covariance', keys, residuals, ridge=ridge)
    off = {'preserved': draw(8, 1)[0], 'preserved_active': np.zeros(8, bool)}
    none = {
        'preserved': np.zeros((0, F)),
        'preserved_active': np.zeros(0, bool),
    }
    for given in (off, none):
      found = factors('covariance', keys, residuals, ridge=ridge, **given)
      for got, wanted in zip(found, want):
        np.testing.assert_allclose(got, wanted, rtol=1e-13)
      matrix = dense('covariance', keys, residuals, ridge=ridge, **given)
      self.assertLess(error(matrix, product(want)), 1e-12)

  @parameterized.product(name=METRICS[:2], constraint=(False, True))
  def test_systems_side_by_side_are_as_one_by_one(self, name, constraint):
    count, rows, others = 3, 4, 9
    draws = [draw(rows, i) for i in range(count)]
    keys, residuals = (np.stack(x) for x in zip(*draws))
    preserved = np.stack([draw(others, 10 + i)[0] for i in range(count)])
    there = keys[::-1].copy() if constraint else None
    # Systems of different sizes, padded with rows that take no part.
    active = np.arange(rows) < np.array([[4], [1], [3]])
    on = np.arange(others) < np.array([[0], [9], [5]])

    def one(key, residual, there, preserved, active, on):
      return ridge_update(
          preconditioner(name),
          key,
          residual,
          ridge=0.1,
          constraint=there,
          preserved=preserved,
          active=active,
          preserved_active=on,
      )

    given = (keys, residuals, there, preserved, active, on)
    with jax.enable_x64(True):
      every = jax.jit(jax.vmap(one))(*jax.tree.map(jnp.asarray, given))
    for i, found in enumerate(zip(*map(np.asarray, every))):
      want = factors(
          name,
          keys[i],
          residuals[i],
          ridge=0.1,
          constraint=None if there is None else there[i],
          preserved=preserved[i],
          active=active[i],
          preserved_active=on[i],
      )
      for got, wanted in zip(found, want):
        self.assertLess(error(got, wanted), 1e-12)
        np.testing.assert_array_equal(got[~active[i]], 0)


class DenseTest(parameterized.TestCase):

  @parameterized.product(
      name=('covariance', 'null space'),
      sizes=('below', 'above', 'more held', 'more edited'),
      constraint=(False, True),
  )
  def test_equals_the_whole_system(self, name, sizes, constraint):
    rank = F if name == 'covariance' else F - 4
    rows, others = {
        'below': (rank - 7, 7),
        'above': (rank - 6, 7),
        'more held': (5, 2 * F),
        'more edited': (2 * F, 7),
    }[sizes]
    keys, residuals = draw(rows)
    preserved, _ = draw(others, 1)
    given = {'ridge': 0.3, 'preserved': preserved}
    if constraint:
      given['constraint'] = keys + 0.01 * draw(rows, 2)[0]
    got = dense(name, keys, residuals, **given)
    want = whole(name, keys, residuals, **given)
    self.assertLess(error(got, want), 1e-10)

  @parameterized.product(rows=(5, 2 * F), constraint=(False, True))
  def test_blocks_do_not_matter(self, rows, constraint):
    keys, residuals = draw(rows)
    given = {
        'ridge': 0.3,
        'active': np.arange(rows) % 3 > 0,
        'preserved': draw(11, 1)[0],
        'preserved_active': np.arange(11) % 4 > 0,
    }
    if constraint:
      given['constraint'] = keys + 0.01 * draw(rows, 2)[0]
    single = dense('covariance', keys, residuals, **given)
    parts = dense('covariance', keys, residuals, block=4, **given)
    self.assertLess(error(parts, single), 1e-11)

  def test_narrow_rows_are_widened(self):
    narrow = [x.astype(np.float32) for x in (*draw(4), draw(6, 1)[0])]
    wide = [x.astype(np.float64) for x in narrow]
    for solver in (factors, dense):
      found = [
          solver('covariance', k, r, ridge=1.0, preserved=h, constraint=k)
          for k, r, h in (narrow, wide)
      ]
      jax.tree.map(np.testing.assert_array_equal, *found)


if __name__ == '__main__':
  absltest.main()
