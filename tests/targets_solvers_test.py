"""Solvers of targets: iterates, slots, line searches and stops."""

from __future__ import annotations

import copy
import dataclasses
import functools

import editors
import jax
import jax.numpy as jnp
import naive_lbfgs
import naive_oracle
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.targets import solvers
from jaxedit.testing import facts

LBFGS = targets_lib.TargetConfig(
    steps=12, rate=0.3, decay=0.5, clamp=5.0, threshold=0.0, solver='lbfgs'
)
# From the ball's middle to its sphere within a few steps.
TIGHT = LBFGS._replace(clamp=0.6, first_step=0.5)
LAYER = 1


class Bowl:
  """(x - c)' A (x - c) / 2 plus a quartic; jax and numpy alike."""

  def __init__(self, seed: int, shape: tuple[int, ...], quartic: float):
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    factor = rng.normal(size=(size, size)) / np.sqrt(size)
    self.matrix = factor @ factor.T + 0.05 * np.eye(size)
    self.center, self.shape, self.quartic = (
        rng.normal(size=size),
        shape,
        quartic,
    )

  def __call__(self, x):
    d = x.reshape(-1) - self.center
    return d @ self.matrix @ d / 2 + self.quartic * (d**4).sum()

  def grad(self, x):
    d = x.reshape(-1) - self.center
    found = self.matrix @ d + 4 * self.quartic * d**3
    return found.reshape(self.shape)


def told(bowl, delta, size, renewed=False):
  loss, grad = bowl(delta), bowl.grad(delta)
  return solvers.Evaluated(delta, loss, grad, jnp.bool_(renewed), size)


class IteratesTest(parameterized.TestCase):
  """Against tests/naive_lbfgs.py, in f64."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    self.solver = solvers.SOLVERS['lbfgs']
    self.update = jax.jit(self.solver.update)

  # clamp, first step, quartic: inside the ball, across its sphere, along it;
  # a first step that is far too long is cut.
  @parameterized.product(
      clamp=(50.0, 1.2, 0.3),
      first=(0.2, 1.0, 40.0),
      quartic=(0.0, 0.3),
      halves=(1, 2),
  )
  def test_iterates(self, clamp, first, quartic, halves):
    bowl = Bowl(halves, (halves, 6), quartic)
    size = np.array([1.3, 0.7])[:halves]
    naive = naive_lbfgs.Lbfgs(size, clamp, first)
    config = LBFGS._replace(clamp=clamp, first_step=first, solver=None)
    x = np.zeros([halves, 6])
    state, renewed = self.solver.init(jnp.asarray(x)), False
    for i in range(16):
      renewed = i == 7
      advice = self.update(state, told(bowl, x, size, renewed), config)
      want, accepted = naive.tell(x, bowl(x), bowl.grad(x), renewed)
      self.assertEqual(bool(advice.accepted), accepted)
      np.testing.assert_allclose(advice.delta, want, rtol=1e-9, atol=1e-9)
      np.testing.assert_allclose(advice.best, naive.point, rtol=1e-9, atol=1e-9)
      self.assertTrue(
          (np.linalg.norm(want, axis=-1) <= clamp * size * (1 + 1e-12)).all()
      )
      state, x = advice.state, want
    if first == 40.0 and clamp == 50.0:
      self.assertGreater(naive.rejected, 0)
    self.assertLess(naive.loss, bowl(np.zeros_like(x)))

  def _minimum(self, bowl, size, clamp):
    """The constrained minimum, by many small projected gradient steps."""
    naive = naive_lbfgs.Lbfgs(size, clamp, 1.0)
    x = np.zeros(bowl.shape)
    for _ in range(20000):
      x = naive.project(x - 0.05 * bowl.grad(x))
    return bowl(x)

  @parameterized.parameters(0.3, 1.2, 50.0)
  def test_minimum(self, clamp):
    bowl, size = Bowl(3, (1, 6), 0.0), np.array([1.0])
    config = LBFGS._replace(clamp=clamp, solver=None)
    x = jnp.zeros([1, 6])
    state = self.solver.init(x)
    for _ in range(40):
      advice = self.update(state, told(bowl, x, size), config)
      state, x = advice.state, advice.delta
    self.assertAlmostEqual(
        float(bowl(np.asarray(advice.best))),
        float(self._minimum(bowl, size, clamp)),
        places=6,
    )

  def test_slots_of_different_states_are_each_as_alone(self):
    bowls = [Bowl(i, (1, 6), 0.1 * i) for i in range(4)]
    size, config = np.array([1.0]), TIGHT._replace(solver=None, first_step=3.0)
    after, alone = {}, {}
    for i, bowl in enumerate(bowls):
      x, state = jnp.zeros([1, 6]), self.solver.init(jnp.zeros([1, 6]))
      for t in range(12):
        advice = self.update(state, told(bowl, x, size), config)
        alone[i, t] = advice.delta
        state, x = advice.state, advice.delta
        after[i, t] = (state, x)
    # Slot i is 2 i evaluations ahead of the first.
    stack = lambda some: jax.tree.map(lambda *x: jnp.stack(x), *some)
    mixed = [after[i, 2 * i] for i in range(4)]
    states, xs = stack([s for s, _ in mixed]), jnp.stack([x for _, x in mixed])
    together = jax.jit(jax.vmap(self.solver.update, in_axes=(0, 0, None)))
    kinds = set()
    for t in range(1, 5):
      now = stack([told(b, x, size) for b, x in zip(bowls, xs)])
      advice = together(states, now, config)
      kinds |= set(np.asarray(advice.accepted).tolist())
      states, xs = advice.state, advice.delta
      for i in range(4):
        np.testing.assert_allclose(xs[i], alone[i, 2 * i + t], atol=1e-9)
    self.assertEqual(kinds, {True, False})

  def test_trials_that_are_not_finite_are_rejected(self):
    size, config = np.array([1.0]), LBFGS._replace(solver=None)
    bowl, x = Bowl(0, (1, 6), 0.0), jnp.zeros([1, 6])
    advice = self.update(self.solver.init(x), told(bowl, x, size), config)
    bad = told(bowl, advice.delta, size)._replace(loss=jnp.nan)
    advice = self.update(advice.state, bad, config)
    self.assertFalse(advice.accepted)
    np.testing.assert_array_equal(advice.best, x)
    self.assertTrue(np.isfinite(advice.delta).all())


@functools.cache
def exact():
  """(torch model, canonical pair) in f64; GPT-2 keeps its weights' dtype."""
  pair = naive_oracle.pair('gpt2')
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), pair.params)
  return copy.deepcopy(pair.torch).double(), pair._replace(params=params)


@functools.cache
def edits(chunked: bool = False):
  some = facts.random_edits(
      4, seed=2, contexts=2, targets=(5, 4, 6, 3) if chunked else (1, 3, 2)
  )
  if chunked:
    cut = lambda n: tuple((i, min(i + 2, n)) for i in range(0, n, 2))
    some = [dataclasses.replace(e, chunks=cut(len(e.target))) for e in some]
  return tuple(some)


def run(some, config, output='block', slots=2, cache=None):
  """Targets in f64."""
  _, pair = exact()
  with jax.enable_x64(True):
    return targets_lib.optimize(
        pair.spec,
        pair.params,
        some,
        plan=plan_lib.plan_shapes(some, slots=slots),
        objective=targets_lib.Objective(LAYER, config, output),
        cache=cache,
    )


def naive(some, config, output='block'):
  model, _ = exact()
  return [
      naive_oracle.chain(model, edit, LAYER, config, output) for edit in some
  ]


class EngineTest(parameterized.TestCase):
  """Against full forwards of every row in torch, in f64."""

  agree = editors.assert_targets

  @parameterized.parameters(LBFGS, TIGHT, LBFGS._replace(first_step=8.0))
  def test_facts(self, *config):
    config = targets_lib.TargetConfig(*config)
    got, _ = run(edits(), config)
    self.agree(got, naive(edits(), config), 1e-7)

  def test_chunks_that_end_with_a_rejected_trial(self):
    # The next chunk's prefix must be that of the step, not of the trial.
    config = LBFGS._replace(first_step=8.0, steps=2)
    want = naive(edits(True), config)
    rejected = [f.rejected for edit in want for f in edit[:-1]]
    self.assertGreater(sum(rejected), 0)
    got, _ = run(edits(True), config)
    self.agree(got, want, 1e-7)
    longer = config._replace(steps=7)
    self.agree(run(edits(True), longer)[0], naive(edits(True), longer), 1e-7)

  def test_the_loss_changes_with_argmax_stop(self):
    config = LBFGS._replace(
        decay=0.05, kl=0.1, clamp=20.0, first_step=2.0, argmax_stop=1e-9
    )
    want = naive(edits(), config, 'attn+mlp')
    self.assertTrue(any(any(f.found) for (f,) in want))
    got, _ = run(edits(), config, 'attn+mlp')
    self.agree(got, want, 1e-6)

  def test_slots_and_neighbours(self):
    want, _ = run(edits(), TIGHT, slots=4)
    got, _ = run(edits()[::-1], TIGHT)
    for a, b in zip(got[::-1], want):
      np.testing.assert_array_equal(a.steps, b.steps)
      np.testing.assert_allclose(a.z, b.z, rtol=1e-9, atol=1e-9)

  def test_fewer_losses_than_adam_at_a_lower_loss(self):
    some, steps = edits(), {}
    adam, _ = run(some, LBFGS._replace(solver='adam', steps=25, clamp=0.75))
    threshold = max(float(x.loss[-1]) for x in adam)
    for solver in ('adam', 'lbfgs'):
      config = LBFGS._replace(
          solver=solver, steps=25, clamp=0.75, threshold=threshold
      )
      found, _ = run(some, config)
      self.assertTrue(all(x.loss[-1] <= threshold for x in found))
      steps[solver] = sum(int(x.steps.sum()) for x in found)
    self.assertLess(steps['lbfgs'], 0.65 * steps['adam'])


class StagnationTest(parameterized.TestCase):

  agree = editors.assert_targets

  @parameterized.parameters(('adam', False), ('lbfgs', True))
  def test_stops(self, solver, chunked):
    plain = LBFGS._replace(solver=solver, clamp=0.1, steps=20)
    config = plain._replace(stagnation=1e-2, stagnation_steps=3)
    some = edits(chunked)
    got, _ = run(some, config)
    want = naive(some, config)
    self.agree(got, want, 1e-7)
    steps = [len(f.losses) for edit in want for f in edit]
    self.assertLess(max(steps), plain.steps)
    # Nothing was to be gained.
    for stopped, whole in zip(naive(some, config), naive(some, plain)):
      self.assertLess(stopped[0].loss, 1.05 * whole[0].loss)

  def test_off_by_default(self):
    config = LBFGS._replace(clamp=0.0, steps=6)
    for found in run(edits(), config)[0]:
      self.assertEqual(found.steps.tolist(), [6])


class Cache:
  """Exact targets in memory."""

  exact = True

  def __init__(self):
    self.known = {}

  def get(self, edit):
    return self.known.get(edit.number)

  def put(self, edit, targets):
    self.known[edit.number] = targets


class ResumeTest(absltest.TestCase):

  def test_a_resumed_run_is_bit_identical(self):
    cache = Cache()
    want, _ = run(edits(), TIGHT, cache=cache)
    del cache.known[edits()[1].number]
    got, work = run(edits(), TIGHT, cache=cache)
    self.assertGreater(work.steps, 0)
    jax.tree.map(np.testing.assert_array_equal, got, want)


if __name__ == '__main__':
  absltest.main()
