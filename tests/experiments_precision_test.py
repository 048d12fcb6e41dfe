"""How far apart two runs of the value optimisation are said to be."""

import numpy as np
from absl.testing import absltest

from experiments import precision
from jaxedit.types import Targets


def targets(z, z0, steps) -> Targets:
  none = np.zeros(len(z), np.float32)
  return Targets(
      np.array(z, np.float32),
      np.array(z0, np.float32),
      none,
      none,
      np.array(steps),
      none == 0,
  )


class AgreementTest(absltest.TestCase):

  def test_cosines_and_steps(self):
    start = [[1, 0], [1, 0], [0, 2]]
    one = targets([[1, 1], [2, 0], [0, 4]], start, [3, 5, 7])
    other = targets([[1, 1], [2, 2], [0, 3]], start, [3, 4, 7])
    found = precision.agreement(one, other)
    self.assertEqual((found['equal_steps'], found['edits']), (2, 3))
    self.assertAlmostEqual(found['z_cosine']['median'], 1)
    self.assertAlmostEqual(found['z_cosine']['lowest'], 0.5**0.5)
    # (1, 0) against (1, 2).
    self.assertAlmostEqual(found['delta_cosine']['lowest'], 0.2**0.5)


if __name__ == '__main__':
  absltest.main()
