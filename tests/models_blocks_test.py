"""Attention, and products of f32 activations with narrow kernels.

What is rounded to bf16 is off by 2^-9 of its size, the second of two pieces by
2^-17; errors of a sum of N such terms grow with its root.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.models import blocks, decoder
from jaxedit.testing import models

OFF = {1: 2.0**-9, 2: 2.0**-17}
ROWS, FAN_IN, FAN_OUT = 40, 64, 96


def spec(activations=None):
  return dataclasses.replace(models.tiny_spec('llama'), activations=activations)


def elsewhere():
  """Where products of bf16 are not products of f32."""
  default = lambda *args, default, **platforms: default(*args)
  return mock.patch.object(jax.lax, 'platform_dependent', default)


def error(found, exact) -> float:
  """Root mean square error, relative to what was wanted."""
  found = np.asarray(found, np.float64)
  return np.linalg.norm(found - exact) / np.linalg.norm(exact)


class NarrowProductTest(parameterized.TestCase):
  OPTIMIZE = True  # see conftest: XLA may not take pieces together again

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    self.x, self.grad = draw(2, ROWS, FAN_IN), draw(2, ROWS, FAN_OUT)
    self.kernel = jnp.asarray(draw(FAN_IN, FAN_OUT), jnp.bfloat16)
    wide = lambda x: np.asarray(x, np.float64)
    self.exact = [wide(x) for x in (self.x, self.kernel, self.grad)]

  @parameterized.parameters(1, 2)
  def test_forward_and_backward(self, pieces):
    product = lambda x, w: blocks.narrow_product(x, w, pieces)
    total = lambda x, w: jnp.vdot(product(x, w), self.grad)
    x, kernel, grad = self.exact
    y = jax.jit(product)(self.x, self.kernel)
    back, weights = jax.jit(jax.grad(total, (0, 1)))(self.x, self.kernel)
    self.assertEqual((y.dtype, back.dtype), (jnp.float32,) * 2)
    for found, want in ((y, x @ kernel), (back, grad @ kernel.T)):
      self.assertLess(error(found, want), OFF[pieces])
      # No better either: it is the rounding that is measured.
      self.assertGreater(error(found, want), OFF[pieces] / 8)
    # Kernels get their gradient in their own dtype, from unrounded factors.
    self.assertEqual(weights.dtype, jnp.bfloat16)
    want = np.einsum('btf,btd->fd', x, grad)
    self.assertLess(error(weights, want), OFF[1])

  def test_a_cpu_widens_the_kernel(self):
    run = lambda *dtype: blocks.product(spec(*dtype), self.x, self.kernel)
    x, kernel, _ = self.exact
    self.assertLess(error(run('float32'), x @ kernel), 2.0**-22)
    with elsewhere():
      pieces = run('float32')
    self.assertGreater(error(pieces, x @ kernel), OFF[2] / 8)
    rounded = blocks.narrow_product(self.x, self.kernel, 1)
    for dtype in ((), ('bfloat16',)):
      np.testing.assert_array_equal(run(*dtype), rounded)

  @parameterized.parameters('float32', 'bfloat16')
  def test_a_wide_kernel_stays_as_it_is(self, activations):
    kernel = self.kernel.astype(jnp.float32)
    with elsewhere():
      got = blocks.product(spec(activations), self.x, kernel)
    want = jnp.einsum('btf,fd->btd', self.x, kernel, precision='highest')
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(
      ('bfloat16', 'bfloat16', 2),
      ('bfloat16', 'float32', 4),
      ('float32', 'float32', 2),
  )
  def test_results_are_saved_and_no_product_runs_again(
      self, weights, activations, products
  ):
    kernel = self.kernel.astype(weights)

    @functools.partial(jax.checkpoint, policy=decoder.SAVE_PRODUCTS)
    def body(x):
      y = blocks.product(spec(activations), x, kernel)
      return jnp.sum(jnp.square(y))

    with elsewhere():
      program = jax.jit(jax.grad(body)).lower(self.x).compile()
    one = 2 * 2 * ROWS * FAN_IN * FAN_OUT
    # Forward and backward; none for weights that nobody asked a gradient of.
    count = program.cost_analysis()['flops'] / one
    self.assertBetween(count, products, products + 0.5)


class AttendTest(parameterized.TestCase):

  @parameterized.product(layout=(1, 5), dtype=('float32', 'bfloat16'))
  def test_few_queries_and_many_against_the_formula(self, layout, dtype):
    batch, groups, heads, size, before = 3, 2, 2, 8, 40
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q = draw(batch, groups, layout, heads * size)
    k, v, old_k, old_v = (
        draw(batch, groups, n, size).astype(jnp.dtype(dtype))
        for n in (layout, layout, before, before)
    )
    mask = rng.random((batch, layout, before + layout)) < 0.7
    mask[..., -layout:] |= np.eye(layout, dtype=bool)
    got = blocks.attend(
        q, (k, v), (old_k, old_v), mask=jnp.asarray(mask), scale=0.3
    )
    exact = lambda x, y: np.concatenate([x, y], 2).astype(np.float64)
    key, value = exact(old_k, k), exact(old_v, v)
    each = q.astype(np.float64).reshape(batch, groups, layout, heads, size)
    logits = 0.3 * np.einsum('bgtnh,bgsh->bgtns', each, key)
    logits = np.where(mask[:, None, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum('bgtns,bgsh->bgtnh', weights, value).reshape(q.shape)
    bound = 1e-6 if dtype == 'float32' else 1e-2
    self.assertLess(error(got, want), bound)

  def test_gradients_of_few_queries(self):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    given = draw(3, 2, 1, 16), draw(3, 2, 1, 8), draw(3, 2, 40, 8)
    mask = jnp.ones((3, 1, 41), bool)

    def total(q, own, old):
      kv = (own, own), (old, old)
      return jnp.sum(jnp.sin(blocks.attend(q, *kv, mask=mask, scale=0.3)))

    few = jax.jit(jax.grad(total, (0, 1, 2)))(*given)
    with mock.patch.object(blocks, '_FEW', 1000):
      many = jax.grad(total, (0, 1, 2))(*given)
    for got, want in zip(few, many):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


if __name__ == '__main__':
  absltest.main()
