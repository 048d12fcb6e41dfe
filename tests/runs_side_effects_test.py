"""Side effects as results.json has them, whatever the numbers."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest

from jaxedit.eval.scorers.choices import Choices
from jaxedit.eval.scorers.perplexity import Perplexity
from jaxedit.runs import side_effects
from jaxedit.runs.config import RunConfig
from jaxedit.runs.side_effects import SideEffects

CONFIG = RunConfig(perplexity_text='text.txt', choices='piqa.jsonl')


class SideEffectsTest(absltest.TestCase):

  def test_numbers_that_are_not_finite(self):
    before = SideEffects(Perplexity(20.0, np.log(20.0), 99, 'how'))
    ruined = SideEffects(
        Perplexity(np.nan, np.nan, 99, 'how', (3.0, np.nan)),
    )
    found = side_effects.results(before, ruined)
    json.dumps(found, allow_nan=False)
    self.assertEqual(found['perplexity']['post']['each'], [3.0, None])
    self.assertIsNone(found['perplexity']['post']['value'])
    (line,) = side_effects.lines(CONFIG, found)
    self.assertIn('20.00 before, not finite after', line)

  def test_parts_are_joined(self):
    one = SideEffects(
        Perplexity(np.e, 1.0, 9, 'how'),
        Choices(np.array([[[0, 1]], [[0, 1]]]), np.array([0, 0])),
    )
    two = SideEffects(
        Perplexity(np.e**3, 3.0, 9, 'how'),
        Choices(np.array([[[0, 0]], [[0, 0]]]), np.array([0, 0])),
    )
    both = side_effects.join([one, two])
    self.assertEqual(both.perplexity.nats, 2.0)
    self.assertEqual(both.perplexity.each, (1.0, 3.0))
    again = side_effects.join([both, both])
    self.assertEqual(again.perplexity.protocol.count('by itself'), 1)
    found = both.report(one)['choices']
    self.assertEqual(found['accuracy'], 0.75)
    self.assertEqual(found['same'], 0.75)
    self.assertEqual(side_effects.join([SideEffects()] * 2), SideEffects())
    self.assertEqual(side_effects.results(SideEffects(), SideEffects()), {})


if __name__ == '__main__':
  absltest.main()
