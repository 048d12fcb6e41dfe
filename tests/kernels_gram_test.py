"""Every implementation of gram against f64 formulas, and the table of wins.

One test base runs over the reference and the Pallas kernel, which is
interpreted here; that it also lowers for GPUs at the shapes of real models is
tested without one.

Tolerances, relative to the largest entry: f64 1e-13; f32 and bf16 1e-6, as
products of bf16 are exact in f32 and sums are of fewer than 100 rows.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import ops
from jaxedit.kernels.gram import api, pallas_gpu, reference
from jaxedit.stats import moments
from jaxedit.types import InputError

TOLERANCE = {'float64': 1e-13, 'float32': 1e-6, 'bfloat16': 1e-6}
TILES = pallas_gpu.Tiles(16, 16, 2, 4, 2)
kernel_op = functools.partial(pallas_gpu.gram, tiles=TILES, interpret=True)


def draw(count, size, dtype='float32'):
  """Draws keys and a mask that leaves out every third row."""
  rng = np.random.default_rng(count + size)
  keys = jnp.asarray(rng.normal(size=(count, size)), dtype)
  return keys, jnp.arange(count) % 3 > 0


class GramTestBase(parameterized.TestCase):
  """What any implementation has to do."""

  op = None

  def check(self, keys, mask):
    got = jax.jit(self.op)(keys, mask)
    self.assertEqual(got.dtype, jnp.promote_types(keys.dtype, jnp.float32))
    real = np.asarray(keys).astype(np.float64)[np.asarray(mask)]
    want = real.T @ real
    error = np.abs(np.asarray(got) - want).max()
    limit = TOLERANCE[keys.dtype.name] * max(np.abs(want).max(), 1e-30)
    self.assertTrue(error <= limit, f'{error} > {limit}')
    np.testing.assert_array_equal(got, got.T)

  @parameterized.parameters('float64', 'float32', 'bfloat16')
  def test_dtypes(self, dtype):
    with jax.enable_x64(dtype == 'float64'):
      self.check(*draw(70, 50, dtype))

  @parameterized.parameters((1, 40), (37, 1), (32, 64), (5, 100))
  def test_odd_sizes(self, count, size):
    keys, _ = draw(count, size)
    self.check(keys, jnp.ones((count,), bool))

  def test_nothing_to_sum(self):
    keys, mask = draw(20, 24)
    op = jax.jit(self.op)
    np.testing.assert_array_equal(op(keys, mask & False), 0)
    np.testing.assert_array_equal(op(keys[:0], mask[:0]), 0)

  def test_masked_rows_may_hold_anything(self):
    keys, mask = draw(40, 24)
    op = jax.jit(self.op)
    dirty = keys.at[0].set(jnp.nan).at[3].set(jnp.inf)
    np.testing.assert_array_equal(op(dirty, mask), op(keys, mask))

  def test_extreme_keys(self):
    # Nothing is lost between 1e-18 and 1e18.
    keys, mask = draw(40, 24)
    self.check(keys * jnp.logspace(-18, 18, 24), mask)

  def test_transformations(self):
    keys, mask = draw(40, 24)
    many = jax.jit(jax.vmap(self.op, in_axes=(0, None)))
    once, twice = many(jnp.stack([keys, 2 * keys]), mask)
    np.testing.assert_array_equal(twice, 4 * once)
    self.assertGreater(once.max(), 1)


class ReferenceTest(GramTestBase):
  op = staticmethod(reference.gram)

  @parameterized.parameters('float32', 'bfloat16')
  def test_means_what_the_moments_mean(self, dtype):
    keys, mask = draw(42, 50, dtype)
    want = jax.jit(moments.gram)(keys.reshape(2, 21, 50), mask.reshape(2, 21))
    got = jax.jit(reference.gram)(keys, mask)
    np.testing.assert_allclose(
        np.triu(got), np.triu(want), rtol=1e-6, atol=1e-5
    )


class PallasTest(GramTestBase):
  op = staticmethod(kernel_op)

  def test_chosen_tiles(self):
    run = jax.jit(functools.partial(pallas_gpu.gram, interpret=True))
    want = jax.jit(reference.gram)
    for dtype in ('float32', 'bfloat16'):
      keys, mask = draw(40, 130, dtype)
      np.testing.assert_allclose(
          run(keys, mask), want(keys, mask), rtol=1e-5, atol=1e-4
      )

  @parameterized.product(
      shape=((16384, 18944), (512, 1536), (1000, 1500)),
      dtype=('float32', 'bfloat16'),
  )
  def test_lowers_for_gpus(self, shape, dtype):
    keys = jax.ShapeDtypeStruct(shape, dtype)
    mask = jax.ShapeDtypeStruct(shape[:1], bool)
    with _gpu():
      traced = jax.jit(pallas_gpu.gram).trace(keys, mask)
      text = traced.lower(lowering_platforms=('cuda',)).as_text()
    self.assertIn('triton', text)


# Only those that name an operation are run.
del GramTestBase


def _gpu():
  """The GPU to lower for where there is none; older jax assumes one."""
  if not hasattr(jax.sharding, 'AbstractDevice'):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(
      device_kind='NVIDIA H100', num_cores=132, platform='gpu'
  )
  mesh = jax.sharding.AbstractMesh((1,), ('a',), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


class ApiTest(absltest.TestCase):

  def test_all_faults_at_once(self):
    keys, mask = draw(4, 3)
    with self.assertRaises(InputError) as raised:
      api.gram(keys[0], mask.astype(int), implementation='none')
    self.assertLen(raised.exception.problems, 3)


class OpsTest(absltest.TestCase):

  def test_reference_by_default(self):
    keys, mask = draw(10, 6)
    with mock.patch.object(reference, 'gram') as plain:
      ops.gram(keys, mask)
    plain.assert_called_once()

  def test_wins_name_implementations(self):
    for (operation, _), name in ops.WINS.items():
      self.assertIn(operation, ops.__all__)
      self.assertIn(name, api.IMPLEMENTATIONS)

  def test_a_win_is_used_on_its_platform_alone(self):
    keys, mask = draw(10, 6)
    for platform, used in ((jax.default_backend(), True), ('abacus', False)):
      wins = {('gram', platform): 'pallas_gpu'}
      with mock.patch.object(ops, 'WINS', wins):
        with mock.patch.object(pallas_gpu, 'gram') as fused:
          ops.gram(keys, mask)
      self.assertEqual(fused.called, used)

  def test_ops_do_not_need_pallas(self):
    program = (
        'import sys\n'
        "sys.modules['jax.experimental.pallas'] = None\n"
        'import jax.numpy as jnp\n'
        'from jaxedit import ops\n'
        'ops.gram(jnp.ones((3, 2)), jnp.ones(3, bool))\n'
    )
    subprocess.run([sys.executable, '-c', program], check=True)


if __name__ == '__main__':
  absltest.main()
