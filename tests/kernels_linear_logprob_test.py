"""Every implementation of linear_logprob against f64 formulas.

One test base runs over the reference and the Pallas kernel, which is
interpreted here; that it also lowers for TPUs at the shapes of real models is
tested without one.

Tolerances, relative to the largest value expected. f64: 1e-12. f32: 2e-5, sums
of 40 products of unit variance and of a few hundred exponentials. bf16: inputs
are rounded before both are computed, sums are f32, so the values keep the f32
tolerance; gradients are rounded to bf16 (2^-8), and the kernel rounds each
softmax once before the product, together 1e-2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.kernels.linear_logprob import api, pallas_tpu, reference
from jaxedit.types import InputError

VALUE = {'float64': 1e-12, 'float32': 2e-5, 'bfloat16': 2e-5}
GRADIENT = {'float64': 1e-12, 'float32': 2e-5, 'bfloat16': 1e-2}
# Small pieces, so that small heads have several blocks.
TILES = pallas_tpu.Tiles(16, 64)
kernel_op = functools.partial(
    pallas_tpu.linear_logprob, tiles=TILES, interpret=True
)


def draw(rows, width, vocabulary, dtype='float32', bias=True, scale=1.0):
  """Draws x, kernel, bias and labels; labels include both ends of V."""
  rng = np.random.default_rng(rows + width + vocabulary)
  x = rng.normal(size=(rows, width)) * scale
  kernel = rng.normal(size=(width, vocabulary))
  offsets = rng.normal(size=(vocabulary,)) if bias else None
  labels = rng.integers(0, vocabulary, rows)
  labels[:2] = [vocabulary - 1, 0][:rows]
  cast = lambda a: None if a is None else jnp.asarray(a, dtype)
  return cast(x), cast(kernel), cast(offsets), jnp.asarray(labels, jnp.int32)


def expected(x, kernel, bias, labels, weight):
  """Returns logprob, best and the gradient of sum(weight * logprob), in f64."""
  wide = lambda a: np.asarray(a).astype(np.float64)
  x, kernel = wide(x), wide(kernel)
  logits = x @ kernel + (0 if bias is None else wide(bias))
  top = logits.max(-1, keepdims=True)
  share = np.exp(logits - top)
  total = share.sum(-1, keepdims=True)
  rows = np.arange(len(x))
  logprob = (logits - top - np.log(total))[rows, labels]
  own = kernel.T[labels]
  slope = own - share / total @ kernel.T
  return logprob, logits.argmax(-1), weight[:, None] * slope


def value_and_gradient(op, x, kernel, bias, labels, weight):
  def loss(x):
    logprob, best = op(x, kernel, bias, labels)
    weights = jnp.asarray(weight, logprob.dtype)
    return jnp.sum(weights * logprob), (logprob, best)

  gradient, (logprob, best) = jax.jit(jax.grad(loss, has_aux=True))(x)
  return logprob, best, gradient


class LinearLogprobTestBase(parameterized.TestCase):
  """What any implementation has to do."""

  op = None

  def assert_close(self, got, want, tolerance):
    got = np.asarray(got).astype(np.float64)
    scale = max(np.abs(want).max(initial=0), 1e-30)
    error = np.abs(got - want).max(initial=0) / scale
    # NaN fails too.
    self.assertTrue(error <= tolerance, f'{error} > {tolerance}')

  def check(self, x, kernel, bias, labels, **options):
    weight = np.linspace(0.5, 2.0, len(x))
    want = expected(x, kernel, bias, labels, weight)
    op = functools.partial(self.op, **options)
    got = value_and_gradient(op, x, kernel, bias, labels, weight)
    dtype = x.dtype.name
    wide = jnp.promote_types(x.dtype, jnp.float32)
    self.assertEqual(got[0].dtype, wide)
    self.assertEqual(got[1].dtype, jnp.int32)
    self.assertEqual(got[2].dtype, x.dtype)
    self.assert_close(got[0], want[0], VALUE[dtype])
    np.testing.assert_array_equal(got[1], want[1])
    self.assert_close(got[2], want[2], GRADIENT[dtype])

  @parameterized.parameters(
      ('float64', True), ('float32', False), ('bfloat16', True)
  )
  def test_dtypes(self, dtype, bias):
    with jax.enable_x64(dtype == 'float64'):
      self.check(*draw(5, 40, 333, dtype, bias))

  @parameterized.parameters((1, 40, 333), (17, 16, 64), (3, 7, 129))
  def test_odd_sizes(self, rows, width, vocabulary):
    self.check(*draw(rows, width, vocabulary))

  def test_no_rows(self):
    x, kernel, bias, labels = draw(0, 8, 20)
    logprob, best = jax.jit(self.op)(x, kernel, bias, labels)
    self.assertEqual((logprob.shape, best.shape), ((0,), (0,)))

  def test_extreme_logits(self):
    # Logits to 1e4 and more: exponentials of all but one underflow.
    self.check(*draw(6, 40, 333, scale=1e3))

  def test_large_offset(self):
    # Each block's logits stand far above those of the block before.
    x, kernel, bias, labels = draw(4, 40, 333)
    self.check(x, kernel, bias + 20.0 * (jnp.arange(333) // 50), labels)

  def test_forbidden_tokens(self):
    # A bias of -inf over whole blocks, the first among them.
    x, kernel, bias, labels = draw(4, 40, 333)
    bias = jnp.where(jnp.arange(333) < 200, -jnp.inf, bias)
    self.check(x, kernel, bias, labels.at[:].set(250))

  def test_first_of_equal_logits(self):
    x = jnp.ones((2, 16))
    kernel = jnp.zeros((16, 300)).at[:, jnp.array([70, 71, 140, 299])].set(1.0)
    _, best = jax.jit(self.op)(x, kernel, None, jnp.array([0, 299]))
    np.testing.assert_array_equal(best, [70, 70])

  def test_nan_is_not_hidden(self):
    x, kernel, bias, labels = draw(3, 16, 100)
    logprob, _ = jax.jit(self.op)(x.at[1].set(jnp.nan), kernel, bias, labels)
    np.testing.assert_array_equal(jnp.isnan(logprob), [False, True, False])

  def test_vmap(self):
    x, kernel, bias, labels = draw(6, 16, 150)

    def f(x, label):
      return self.op(x[None], kernel, bias, label[None])[0][0]

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(f)))(x, labels)
    want = expected(x, kernel, bias, labels, np.ones(6))
    self.assert_close(values, want[0], 2e-5)
    self.assert_close(slopes, want[2], 2e-5)

  def test_inside_scan_and_checkpoint(self):
    # As the optimisation of values runs it: the head is a constant of a loop.
    x, kernel, bias, labels = draw(3, 16, 150)

    @jax.checkpoint
    def score(x):
      return self.op(x, kernel, bias, labels)[0].sum()

    def step(x, _):
      return x + 0.1 * jax.grad(score)(x), score(x)

    # The first of two values is before the step, which raises it.
    _, scores = jax.jit(lambda x: jax.lax.scan(step, x, length=2))(x)
    self.assertGreater(scores[1], scores[0])


class ReferenceTest(LinearLogprobTestBase):
  op = staticmethod(reference.linear_logprob)

  def test_gradient_of_the_head(self):
    x, kernel, bias, labels = draw(3, 16, 50)
    f = lambda *weights: api.linear_logprob(x, *weights, labels)[0].sum()
    for gradient in jax.jit(jax.grad(f, argnums=(0, 1)))(kernel, bias):
      self.assertGreater(jnp.abs(gradient).max(), 0)


class PallasTest(LinearLogprobTestBase):
  op = staticmethod(kernel_op)

  def test_tied(self):
    self.check(*draw(5, 40, 333, 'bfloat16'), tied=True)

  def test_tied_head_is_not_copied(self):
    # The compiled program holds no array in the order that the caller names.
    x, kernel, bias, labels = draw(5, 40, 333)
    embedding = jnp.array(kernel.T)

    def compiled(tied):
      def f(x, embedding):
        op = functools.partial(kernel_op, tied=tied)
        return jax.grad(lambda x: op(x, embedding.T, bias, labels)[0].sum())(x)

      return jax.jit(f).lower(x, embedding).compile().as_text()

    self.assertNotIn('f32[40,333]', compiled(tied=True))
    self.assertIn('f32[40,333]', compiled(tied=False))

  @parameterized.parameters(
      (576, 'bfloat16', 1024), (4096, 'bfloat16', 512), (9999, 'float32', 128)
  )
  def test_chosen_tiles(self, width, dtype, columns):
    self.assertEqual(pallas_tpu.tiles_for(width, dtype), (128, columns))
    x, kernel, bias, labels = draw(5, 40, 333)
    run = functools.partial(pallas_tpu.linear_logprob, interpret=True)
    default, _ = jax.jit(run)(x, kernel, bias, labels)
    want, _ = jax.jit(reference.linear_logprob)(x, kernel, bias, labels)
    np.testing.assert_allclose(default, want, rtol=1e-5, atol=1e-5)

  def test_weights_are_constants(self):
    x, kernel, bias, labels = draw(3, 16, 50)
    f = lambda *args: kernel_op(*args, labels)[0].sum()
    for argument in (1, 2):
      with self.assertRaisesRegex(InputError, 'stop_gradient, or use the ref'):
        jax.grad(f, argnums=argument)(x, kernel, bias)
    stopped = lambda x, kernel, bias: f(
        x, jax.lax.stop_gradient(kernel), jax.lax.stop_gradient(bias)
    )
    for gradient in jax.jit(jax.grad(stopped, (1, 2)))(x, kernel, bias):
      self.assertEqual(jnp.abs(gradient).max(), 0)

  def test_no_logits_in_memory(self):
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((64, 32), (32, 4096))
    ]
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)

    def f(x, kernel, labels):
      return jax.value_and_grad(
          lambda x: kernel_op(x, kernel, None, labels)[0].sum()
      )(x)

    traced = jax.jit(f).trace(*shapes, labels)
    self.assertNotIn('64,4096]', str(traced.jaxpr))
    self.assertIn('16,64]', str(traced.jaxpr))

  @parameterized.product(
      head=((1500, 4096, 50400, True, False), (8, 576, 49152, False, True)),
      dtype=('float32', 'bfloat16'),
  )
  def test_lowers_for_tpus(self, head, dtype):
    rows, width, vocabulary, has_bias, tied = head
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    size = (vocabulary, width) if tied else (width, vocabulary)
    bias = array(vocabulary) if has_bias else None
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def f(x, head, bias, labels):
      op = functools.partial(pallas_tpu.linear_logprob, tied=tied)
      kernel = head.T if tied else head
      return jax.value_and_grad(lambda x: op(x, kernel, bias, labels)[0].sum())(
          x
      )

    traced = jax.jit(f).trace(array(rows, width), array(*size), bias, labels)
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
    self.assertIn('linear_logprob', text)
    self.assertIn('tpu_custom_call', text)


# Only those that name an operation are run.
del LinearLogprobTestBase


class ApiTest(absltest.TestCase):

  def test_implementations_agree(self):
    args = draw(2, 16, 50)
    want, _ = jax.jit(api.linear_logprob)(*args)
    for name in api.IMPLEMENTATIONS:
      op = functools.partial(
          api.linear_logprob, implementation=name, interpret=True
      )
      np.testing.assert_allclose(jax.jit(op)(*args)[0], want, atol=1e-5)

  def test_all_faults_at_once(self):
    x, kernel, bias, labels = draw(2, 16, 50)
    with self.assertRaises(InputError) as raised:
      api.linear_logprob(
          x[:, 1:], kernel, bias[1:], labels[1:], implementation='none'
      )
    self.assertLen(raised.exception.problems, 4)
    self.assertIn('reference, pallas_tpu', str(raised.exception))

  def test_one_dtype(self):
    x, kernel, bias, labels = draw(2, 16, 50)
    with self.assertRaisesRegex(InputError, 'x is bfloat16'):
      kernel_op(x.astype(jnp.bfloat16), kernel, bias, labels)


if __name__ == '__main__':
  absltest.main()
