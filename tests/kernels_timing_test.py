"""The benchmark of the kernel: its table, its shapes, its refusal."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest

from jaxedit.kernels import timing
from jaxedit.kernels.linear_logprob import bench


def broken(x):
  raise NotImplementedError('no such instruction\nand more')


class TimingTest(absltest.TestCase):

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

  def test_small_cases_compute_the_same(self):
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
        bench.main()
    lines = out.getvalue().splitlines()[2:]
    self.assertLen(lines, 8)
    for line, name in zip(lines, 4 * ['reference', 'pallas_tpu']):
      self.assertIn(f' {name} ', line)
      self.assertNotIn('failed', line)

  @absltest.skipIf(jax.default_backend() == 'tpu', 'there is a TPU')
  def test_refuses_without_a_tpu(self):
    result = subprocess.run(
        [sys.executable, '-m', 'jaxedit.kernels.linear_logprob.bench'],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(result.returncode, 2)
    self.assertIn('jax sees no TPU', result.stderr)


if __name__ == '__main__':
  absltest.main()
