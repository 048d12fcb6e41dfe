"""Every method's update equals the formula of its paper, solved as written."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.methods import emmet, memit, pmet, rome
from jaxedit.solve import preconditioner as preconditioners
from jaxedit.solve import shaping
from jaxedit.solve.ridge import ridge_dense, ridge_update

F, D = 24, 10
LAMBDA = 15.0
KINDS = ('random', 'graded', 'turned')


@functools.cache
def gram(kind: str) -> np.ndarray:
  """Random second moments [F, F]; 'graded' and 'turned' have condition 1e8."""
  rng = np.random.default_rng(1)
  keys = rng.standard_normal((4 * F, F))
  if kind == 'graded':
    keys *= np.logspace(0, -4, F)
  c = keys.T @ keys / len(keys)
  if kind == 'turned':
    basis = np.linalg.qr(rng.standard_normal((F, F)))[0]
    c = basis * np.logspace(0, -8, F) @ basis.T
  return (c + c.T) / 2


def tolerance(kind: str) -> float:
  """How exact a solution can be.

  The last bit of a matrix moves it by up to condition * 2^-52 when that is ill
  conditioned in no particular basis; a dense f64 solve is off as much. Not so
  where only the dimensions have very different sizes.
  """
  return 1e8 * 2**-52 if kind == 'turned' else 1e-10


def draw(rows: int, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Keys with the second moment of `kind` and residuals."""
  rng = np.random.default_rng([rows, seed])
  keys = rng.standard_normal((rows, F)) @ np.linalg.cholesky(gram(kind)).T
  return keys, rng.standard_normal((rows, D))


def solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a^-1 b: float64 solves, refined with residuals in extended precision."""
  inverse = np.linalg.inv(a.astype(np.float64))
  a, x = a.astype(np.longdouble), np.zeros(b.shape, np.longdouble)
  for _ in range(10):
    x += inverse @ (b - a @ x)
  return x


def long(*arrays: np.ndarray) -> list[np.ndarray]:
  return [x.astype(np.longdouble) for x in arrays]


def error(got: np.ndarray, want: np.ndarray) -> float:
  """Relative difference in the Frobenius norm."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def numbers(tree):
  return jax.tree.map(np.asarray, tree)


def metric_of(make, kind, *arguments, **options):
  with jax.enable_x64(True):
    return make(jnp.asarray(gram(kind)), *arguments, **options)


def both(preconditioner, keys, residuals, **given):
  """The change as factors and as one matrix, [F, D] each."""
  with jax.enable_x64(True):
    given = {k: jnp.asarray(v) for k, v in given.items()}
    arrays = (preconditioner, jnp.asarray(keys), jnp.asarray(residuals))
    key, value = numbers(jax.jit(ridge_update)(*arrays, **given))
    dense = np.asarray(jax.jit(ridge_dense)(*arrays, **given))
  assert key.shape == (len(keys), F), key.shape
  assert value.shape == (len(keys), D), value.shape
  assert dense.dtype == key.dtype == value.dtype == np.float64
  return {'factors': key.T @ value, 'matrix': dense}


class PublishedTest(parameterized.TestCase):

  def agree(self, found, want, atol):
    for name, got in found.items():
      with self.subTest(name):
        self.assertLess(error(got, want), atol)

  def rome(self, kind, chosen, weighed):
    """ROME's delta W = (v* - o) u^T / (k_b . u), u along C^-1 k*, [F, D]."""
    contexts, wanted = draw(21, kind)
    keys = {'plain': contexts[:1], 'mean': contexts.mean(0, keepdims=True)}
    star, base = keys[chosen], keys[weighed]
    (u,) = solve(gram(kind), star.T).T
    u /= np.linalg.norm(u)
    want = np.outer(u, wanted[0] / (base[0] @ u))
    return star, base, wanted[:1], want

  @parameterized.product(kind=KINDS, left=(1, 3, 6))
  def test_pmet(self, kind, left):
    """Of what is missing a layer writes one over the root of those left."""
    recipe = pmet.PmetConfig((0, 1, 2), moment_weight=LAMBDA).recipe()
    keys, residuals = draw(4, kind)
    k, r = long(keys, residuals)
    a = LAMBDA * long(gram(kind))[0] + k.T @ k
    want = solve(a, k.T @ r / np.sqrt(np.longdouble(left)))
    with jax.enable_x64(True):
      preconditioner = recipe.preconditioner.factor(jnp.asarray(gram(kind)))
    share = recipe.share(left)
    found = both(preconditioner, keys, share * residuals, ridge=recipe.ridge)
    self.agree(found, want, tolerance(kind))

  @parameterized.parameters(*KINDS)
  def test_rows_of_the_table(self, kind):
    """A recipe's own metric and ridge give the formula with its settings."""
    keys, residuals = draw(4, kind)
    c, k, r = long(gram(kind), keys, residuals)
    for config, weight, ridge in (
        (memit.MemitConfig((0,), moment_weight=LAMBDA), LAMBDA, 1.0),
        (rome.RomeConfig((0,)), 1.0, 0.0),
        (emmet.EmmetConfig((0,), moment_weight=LAMBDA, ridge=0.3), LAMBDA, 0.3),
    ):
      recipe = config.recipe()
      with self.subTest(recipe.name):
        along = solve(weight * c, k.T)
        want = along @ solve(k @ along + ridge * np.eye(4), r)
        with jax.enable_x64(True):
          preconditioner = recipe.preconditioner.factor(jnp.asarray(gram(kind)))
        found = both(preconditioner, keys, residuals, ridge=recipe.ridge_of(4))
        self.agree(found, want, tolerance(kind))

  def test_prune(self):
    """Singular values s above the kernel's S become log(s) - log(S) + S."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((F, D))
    change = rng.standard_normal((F, D)) * np.logspace(-1, 1.5, D)
    limit = np.linalg.svd(kernel, compute_uv=False)[0]
    u, s, v = np.linalg.svd(change, full_matrices=False)
    above = s > limit
    self.assertTrue(above.any() and not above.all())
    s[above] = np.log(s[above] / limit) + limit
    with jax.enable_x64(True):
      got = shaping.prune(jnp.asarray(change), jnp.asarray(kernel))
    self.assertLess(error(np.asarray(got), u * s @ v), 1e-10)

  @parameterized.parameters(*KINDS)
  def test_rome(self, kind):
    star, base, wanted, want = self.rome(kind, 'mean', 'plain')
    preconditioner = metric_of(preconditioners.covariance, kind, 1.0)
    found = both(preconditioner, star, wanted, ridge=0.0, constraint=base)
    self.agree(found, want, tolerance(kind))
    # The output at the bare prompt moves by exactly what was asked.
    for change in found.values():
      self.assertLess(error(base @ change, wanted), 1e-10)
      self.assertEqual(np.linalg.matrix_rank(change), 1)

  @parameterized.product(kind=KINDS, key=('mean', 'plain'))
  def test_r_rome(self, kind, key):
    star, _, wanted, want = self.rome(kind, key, key)
    preconditioner = metric_of(preconditioners.covariance, kind, 1.0)
    found = both(preconditioner, star, wanted, ridge=0.0)
    self.agree(found, want, tolerance(kind))

  def test_rome_without_moments(self):
    contexts, wanted = draw(21, 'random')
    star, base = contexts.mean(0), contexts[0]
    u = star / np.linalg.norm(star)
    want = np.outer(u, wanted[0] / (base @ u))
    preconditioner = metric_of(preconditioners.identity, 'random')
    given = {'ridge': 0.0, 'constraint': base[None]}
    self.agree(
        both(preconditioner, star[None], wanted[:1], **given), want, 1e-13
    )

  @parameterized.product(kind=KINDS, rows=(1, 5), others=(0, 3, F, 4 * F))
  def test_memit_with_other_tokens(self, kind, rows, others):
    keys, residuals = draw(rows, kind)
    preserved, _ = draw(others, kind, 1)
    c, k, r, kp = long(LAMBDA * gram(kind), keys, residuals, preserved)
    want = solve(c + kp.T @ kp + k.T @ k, k.T) @ r
    preconditioner = metric_of(preconditioners.covariance, kind, LAMBDA)
    found = both(
        preconditioner, keys, residuals, ridge=1.0, preserved=preserved
    )
    self.agree(found, want, tolerance(kind))

  @parameterized.product(kind=KINDS, rows=(1, 5, F - 1), ridge=(0.1, 3.0))
  def test_emmet(self, kind, rows, ridge):
    keys, residuals = draw(rows, kind)
    c, k, r = long(LAMBDA * gram(kind), keys, residuals)
    along = solve(c, k.T)  # B^-1 K^T
    want = along @ solve(k @ along + ridge * np.eye(rows), r)
    preconditioner = metric_of(preconditioners.covariance, kind, LAMBDA)
    found = both(preconditioner, keys, residuals, ridge=ridge)
    self.agree(found, want, tolerance(kind))

  @parameterized.parameters(*KINDS)
  def test_emmet_of_one_edit_is_rome_with_averaged_keys(self, kind):
    star, _, wanted, want = self.rome(kind, 'mean', 'mean')
    preconditioner = metric_of(preconditioners.covariance, kind, LAMBDA)
    mine = both(preconditioner, star, wanted, ridge=0.0)
    twin = both(preconditioner, star, wanted, ridge=0.0, constraint=star)
    self.agree(mine, want, tolerance(kind))
    self.agree(mine, twin['factors'], 1e-13)

  @parameterized.product(
      kind=KINDS, rows=(1, 5), prior=(0, 3, 4 * F), ridge=(1.0, 10.0)
  )
  def test_alphaedit(self, kind, rows, prior, ridge):
    keys, residuals = draw(rows, kind)
    preserved, _ = draw(prior, kind, 1)
    threshold = np.median(np.linalg.eigvalsh(gram(kind)))
    preconditioner = metric_of(
        preconditioners.null_space, kind, threshold=threshold
    )
    (basis,) = numbers(preconditioner)
    self.assertEqual(basis.shape, (F, F // 2))
    ridge = ridge * threshold  # neither term of the system drowns the other
    u, k, r, g = long(basis, keys, residuals, preserved)
    p = u @ u.T
    system = p @ (k.T @ k + g.T @ g) + ridge * np.eye(F)
    want = solve(system, p @ k.T @ r)
    found = both(
        preconditioner, keys, residuals, ridge=ridge, preserved=preserved
    )
    self.agree(found, want, 1e-10)

  @parameterized.product(kind=KINDS, share=(0.5, 0.9))
  def test_alphaedit_leaves_the_keys_of_text_alone(self, kind, share):
    keys, residuals = draw(5, kind)
    preconditioner = metric_of(preconditioners.null_space, kind, share=share)
    (basis,) = numbers(preconditioner)
    dropped = np.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]
    text = np.random.default_rng(2).standard_normal((9, dropped.shape[1]))
    text = text @ dropped.T
    for change in both(preconditioner, keys, residuals, ridge=1.0).values():
      scale = np.linalg.norm(change) * np.linalg.norm(text)
      self.assertLess(np.linalg.norm(text @ change), 1e-6 * scale)


if __name__ == '__main__':
  absltest.main()
