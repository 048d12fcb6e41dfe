"""How far apart two runs of the value optimisation are said to be."""

import json

import numpy as np
import programs
from absl.testing import absltest

from experiments import precision
from jaxedit.types import Targets

RECORDS = [
    {
        'prompt': 'The twin city of {} is',
        'subject': subject,
        'target_new': 'Rome',
        'target_true': 'Paris',
        'paraphrases': [f'{subject} is twinned with'],
    }
    for subject in ('Sydney', 'Wellington')
]


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


class ProgramTest(absltest.TestCase):

  def test_both_runs(self):
    setup = programs.Setup(precision)
    self.addCleanup(setup.close)
    contexts = setup.path('contexts.json')
    contexts.write_text('["{}", "In Paris. {}"]')
    given = dict(
        data=setup.write(*RECORDS), context_templates=contexts, layers='0,1',
        moment_weight=20, value_steps=3, max_new_tokens=0, moments_tokens=400,
    )  # fmt: skip
    refused = setup.run(**given)
    self.assertEqual(refused.code, 2)
    self.assertIn('pass --dtype=bfloat16', refused.err)
    done = setup.run(**given, dtype='bfloat16', activations='bfloat16')
    self.assertEqual(done.code, 0, done.err)
    found = json.loads((done.folder / 'precision.json').read_text())
    self.assertEqual(found['edits'], 2)
    self.assertCountEqual(found['metrics'], ['bfloat16', 'float32'])
    protocol = found['protocol']
    self.assertEqual(protocol['dtype'], 'bfloat16')
    self.assertEqual(protocol['settings']['activations'], 'bfloat16')
    cosine = found['z_cosine']
    # Rounded arithmetic is another, and not far away.
    self.assertLess(cosine['lowest'], 1)
    self.assertGreater(cosine['lowest'], 0.9)
    self.assertIn(f'{cosine["lowest"]:.5f} lowest of 2', done.out)


if __name__ == '__main__':
  absltest.main()
