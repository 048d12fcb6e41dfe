"""A radius proposed from data: by hand, and from a program's flags to its lines."""

from __future__ import annotations

import shlex

import numpy as np
import programs
from absl.testing import absltest, parameterized
from editing_runs import fact

from experiments import edit
from jaxedit.methods import base, radius
from jaxedit.models import decoder, loading
from jaxedit.testing import models
from jaxedit.types import InputError, Tap

SPEC = models.tiny_spec('llama')
# Two edits, 10 apart, on the first axis.
EDITS = np.array([[10.0, 0.0], [20.0, 0.0]])


class DistanceTest(parameterized.TestCase):

  def measured(self, rephrases, own, neighbours):
    return radius.distances(
        EDITS, np.array(rephrases), own, np.array(neighbours)
    )

  def test_by_hand(self):
    found = self.measured(
        [[10.0, 3.0], [18.0, 0.0], [20.0, 1.0]], [0, 0, 1],
        [[13.0, 4.0], [20.0, 6.0]],
    )  # fmt: skip
    # The second paraphrase is nearer to the other edit.
    np.testing.assert_allclose(found.reach, [3, np.inf, 1])
    np.testing.assert_allclose(found.away, [5, 6])
    self.assertEqual(found.length, 15)

  def test_between_paraphrases_and_neighbours(self):
    found = self.measured([[10.0, 3.0]], [0], [[10.0, 5.0], [10.0, -7.0]])
    self.assertEqual(radius.radius_of(found), 4)

  def test_below_neighbours_where_nothing_is_between(self):
    away = [[10.0, float(d)] for d in range(1, 101)]
    found = self.measured([[10.0, 30.0]], [0], away)
    # 2 of 100 neighbours may be reached: those at 1 and 2.
    self.assertAlmostEqual(radius.radius_of(found, 0.02), 0.999 * 3)
    self.assertAlmostEqual(radius.radius_of(found, 0.0), 0.999 * 1)

  def test_refused_where_neighbours_have_the_keys_of_edits(self):
    found = self.measured([[10.0, 3.0]], [0], [[10.0, 0.0]])
    with self.assertRaisesRegex(
        InputError, 'no radius leaves them out: choose'
    ):
      radius.radius_of(found)

  def test_keys_are_the_inputs_at_last_tokens(self):
    params = models.random_params(SPEC, 0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 97, n).tolist() for n in (5, 1, 40, 8)]
    found = radius.keys_of(SPEC, params, prompts, site='mlp/down', layer=1)
    for ids, key in zip(prompts, found):
      tokens = np.array([ids])
      layout = decoder.token_layout(tokens >= 0)
      _, (want,) = decoder.run_layers(
          SPEC, params, decoder.embed(SPEC, params, tokens, layout), layout,
          start=0, stop=2, taps=(Tap('mlp/down', (1,)),),
      )  # fmt: skip
      np.testing.assert_allclose(key, want[0, 0, -1], rtol=0, atol=1e-5)

  def test_records_without_paraphrases_or_neighbours(self):
    inputs = base.ProposalInputs(SPEC, None, [[5]], [[]], [[]])
    with self.assertRaises(InputError) as caught:
      radius.propose(inputs, site='mlp/down', layer=1)
    self.assertLen(caught.exception.problems, 2)


class ProgramTest(programs.Case):

  def test_from_a_flag_to_a_run(self):
    setup = programs.Setup(edit)
    self.addCleanup(setup.close)
    records = [
        fact(
            name,
            neighbours=['The guitar of the capital Tower'],
            paraphrases=[f'Paris. The mother tongue of {name} is'],
        )
        for name in ('Danielle', 'Toko', 'Sydney')
    ]
    given = dict(
        data=setup.write(*records), method='grace', layers='1', value_steps=2,
        max_new_tokens=0,
    )  # fmt: skip
    proposed = self.succeed(setup.run, suggest_radius=True, **given)
    self.assertFalse(proposed.folder.exists())
    *_, value, command = proposed.out.splitlines()
    self.assertRegex(value, r'^--radius=\S+ is proposed:$')
    python, *words = shlex.split(command)
    self.assertEqual([python, *words[:1]], ['python', '-m'])
    self.assertIn(value.split()[0], words)
    self.assertNotIn('suggest', command)
    self.succeed(setup.run, words=words[2:])
    (delta,) = proposed.delta()[0].deltas  # the folder that was named
    radius_ = float(value.split()[0].partition('=')[2])
    self.assertAlmostEqual(float(delta.radii[0, 0]), radius_, delta=1e-5)
    self.refuse(
        setup.run,
        ['--suggest_radius: nothing is proposed for memit, but for grace'],
        [(loading, 'load_model')],
        suggest_radius=True,
        **given | dict(method='memit'),
    )


if __name__ == '__main__':
  absltest.main()
