"""The benchmarks of the kernels: their table, their shapes, their refusal."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxedit.kernels import timing
from jaxedit.kernels.gram import bench as gram_bench
from jaxedit.kernels.linear_logprob import bench as linear_logprob_bench

BENCHES = (gram_bench, linear_logprob_bench)


def broken(x):
  raise NotImplementedError('no such instruction\nand more')


class TimingTest(parameterized.TestCase):

  def test_rows(self):
    functions = {
        'reference': lambda x: (2 * x, jnp.arange(3)),
        'broken': broken,
        'other': lambda x: (2.02 * x, jnp.array([0, 1, 7])),
    }
    case = timing.Case('a shape', 'forward', (jnp.ones(4),), functions, 1e6)
    first, second, third = timing.rows(case, repeats=2)
    self.assertIn(' 1.00 ', first)
    self.assertTrue(second.endswith('NotImplementedError: no such instruction'))
    self.assertTrue(third.endswith('1.0e-02, 1 ids differ'), third)

  def test_nothing_to_compare_with(self):
    functions = {'reference': broken, 'other': lambda x: x}
    case = timing.Case('a shape', 'forward', (jnp.ones(4),), functions, 1e6)
    _, other = timing.rows(case, repeats=1)
    self.assertRegex(other, r'other +[\d.]+ +- ')

  def test_nan_is_the_worst_difference(self):
    bad = jnp.array([jnp.nan, 1.0])
    self.assertEqual(timing.difference((bad, bad[1:]), (bad, bad[1:])), 'nan')

  @parameterized.parameters(*BENCHES)
  def test_small_cases_compute_the_same(self, bench):
    found = list(bench.cases(['float32'], None, True))
    self.assertNotEmpty(found)
    for case in found:
      want, *others = (
          jax.eval_shape(f, *case.args) for f in case.functions.values()
      )
      for other in others:
        self.assertEqual(other, want)

  def test_main(self):
    flags = ['--interpret', '--repeats=1', '--dtypes=float32']
    out = io.StringIO()
    with mock.patch.object(sys, 'argv', ['bench', *flags]):
      with contextlib.redirect_stdout(out):
        gram_bench.main()
    by = [line.split()[5] for line in out.getvalue().splitlines()[2:]]
    self.assertEqual(by, ['reference', 'cast', 'pallas_gpu'])

  @absltest.skipIf(jax.default_backend() == 'gpu', 'there is a GPU')
  def test_refuses_without_a_gpu(self):
    result = subprocess.run(
        [sys.executable, '-m', 'jaxedit.kernels.gram.bench'],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(result.returncode, 2)
    self.assertIn('jax sees no GPU', result.stderr)


if __name__ == '__main__':
  absltest.main()
