"""Value optimisation equals a naive loop of full forwards, edit by edit."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import cases
import jax
import naive_oracle
import numpy as np
import products
from absl.testing import absltest, parameterized

from jaxedit import placement
from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.targets import budget, engine
from jaxedit.targets import run as run_lib
from jaxedit.testing import facts, models
from jaxedit.text import encoding

PLAIN = targets_lib.TargetConfig(
    steps=5, rate=0.1, decay=0.5, clamp=5.0, kl=0.0625, threshold=0.0
)
EDITS, SLOTS, LAYER = 4, 8, 1
# A window shorter than the rows makes 'mistral' differ from 'llama'.
WINDOW = {'mistral': dict(sliding_window=4)}


def model(family: str) -> naive_oracle.Pair:
  return naive_oracle.pair(family, **WINDOW.get(family, {}))


@functools.cache
def edits(kind: str = 'plain') -> tuple[encoding.EncodedEdit, ...]:
  """Random edits; 'no_kl' ones lack the KL row, 'short' end at the anchor."""
  some = facts.random_edits(EDITS, seed=1, contexts=2, kl=kind != 'no_kl')
  if kind == 'short':
    cut = lambda e: tuple(r[: a + 1] for r, a in zip(e.rows, e.anchors))
    some = [dataclasses.replace(edit, rows=cut(edit)) for edit in some]
  return tuple(some)


def optimize(pair, some, config, layer=LAYER, **shape):
  """Targets of edits in a frame of their own."""
  plan = plan_lib.plan_shapes(some, **{'slots': SLOTS, **shape})
  return run(pair, some, config, layer, plan=plan)[0]


def run(pair, some, config=PLAIN, layer=LAYER, **options):
  """(targets of all edits end to end, what was run)."""
  found, work = targets_lib.optimize(
      pair.spec,
      pair.params,
      some,
      objective=targets_lib.Objective(layer, config),
      **options,
  )
  return jax.tree.map(lambda *x: np.concatenate(x), *found), work


@functools.cache
def naive(family, kind='plain', config=PLAIN, layer=LAYER):
  return [
      naive_oracle.optimize(model(family).torch, edit, layer, config)
      for edit in edits(kind)
  ]


def split_threshold(found) -> float:
  """A threshold that some edits reach early, after an update, and others never.

  It lies in the middle of the widest gap between losses, so that rounding does
  not decide.
  """
  losses = np.sort(np.concatenate([f.losses for f in found]))
  best = (0.0, 0.0)
  for low, high in zip(losses, losses[1:]):
    middle = (low + high) / 2
    early = [min(f.losses[:-1]) < middle for f in found]
    # Not at once, and not only at the last loss.
    late = all(f.losses[0] > middle or not e for f, e in zip(found, early))
    never = any(min(f.losses) > middle for f in found)
    if late and any(early) and never:
      best = max(best, (high / low - 1, float(middle)))
  assert best[0] > 1e-3, best
  return best[1]


class OracleTest(parameterized.TestCase):
  """The oracle is naive_oracle.optimize, which runs the whole of every row."""

  def _check(self, family, config=PLAIN, kind='plain', layer=LAYER):
    want = naive(family, kind, config, layer)
    got = optimize(model(family), edits(kind), config, layer)
    self.assertEqual(got.steps.tolist(), [len(f.losses) for f in want])
    self.assertTrue(got.finite.all())
    for i, f in enumerate(want):
      error = np.linalg.norm(got.z[i] - f.z) / np.linalg.norm(f.z)
      self.assertLess(error, 1e-5)
      # The change is small beside the state: hold it to a bound of its own.
      error = np.linalg.norm((got.z - got.z0)[i] - (f.z - f.z0))
      self.assertLessEqual(error, 1e-4 * np.linalg.norm(f.z - f.z0))
      np.testing.assert_allclose(got.z0[i], f.z0, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(got.loss[i], f.losses[-1], rtol=2e-5)
      np.testing.assert_allclose(got.likelihood[i], f.likelihood, rtol=2e-5)
    return want

  @parameterized.parameters('llama', 'gptj', 'gpt2')
  def test_plain(self, family):
    want = self._check(family)
    self.assertLess(
        sum(f.losses[-1] for f in want), sum(f.losses[0] for f in want)
    )
    for f in want:
      self.assertEqual(f.clamped, 0)
      self.assertLen(f.losses, PLAIN.steps)

  @parameterized.parameters('llama', 'gptj', 'gpt2')
  def test_some_edits_stop_early(self, family):
    threshold = split_threshold(naive(family))
    want = self._check(family, PLAIN._replace(threshold=threshold))
    steps = [len(f.losses) for f in want]
    self.assertBetween(min(steps), 2, PLAIN.steps - 1)
    self.assertEqual(max(steps), PLAIN.steps)

  @parameterized.parameters('llama', 'gptj', 'gpt2')
  def test_clamp_from_the_first_step(self, family):
    config = PLAIN._replace(clamp=0.02)
    for f in self._check(family, config):
      self.assertEqual(f.clamped, config.steps - 1)
      moved = np.linalg.norm(f.z - f.z0)
      self.assertAlmostEqual(moved / np.linalg.norm(f.z0), 0.02, places=5)

  def test_no_kl_row_and_a_sliding_window(self):
    want = self._check('mistral', kind='no_kl')
    wide = naive('llama', 'no_kl')
    self.assertGreater(np.abs(want[1].z - wide[1].z).max(), 1e-2)

  @parameterized.parameters(dict(kl=2.0), dict(decay=30.0))
  def test_every_term_matters(self, **weights):
    strong = self._check('llama', PLAIN._replace(**weights))
    plain = naive('llama')
    self.assertGreater(np.abs(strong[1].z - plain[1].z).max(), 1e-2)

  def test_one_step_only_evaluates(self):
    for f in self._check('llama', PLAIN._replace(steps=1)):
      np.testing.assert_array_equal(f.z, f.z0)

  def test_last_layer(self):
    # Nothing runs above the last block: only the anchor's own logits change,
    # so the label must stand there.
    self._check('llama', kind='short', layer=2)


class Cache:
  """A `targets.TargetCache` in memory, by the number of an edit."""

  def __init__(self, exact=False):
    self.exact, self.known, self.told = exact, {}, []

  def get(self, edit):
    return self.known.get(edit.number)

  def put(self, edit, targets):
    self.told.append(edit.number)
    self.known[edit.number] = targets


class InvarianceTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pair = model('llama')
    cls.base = optimize(cls.pair, edits(), PLAIN)

  def _same(self, got, want):
    np.testing.assert_array_equal(got.steps, want.steps)
    for a, b in zip(got.z, want.z):
      self.assertLess(np.linalg.norm(a - b) / np.linalg.norm(b), 1e-5)
    np.testing.assert_allclose(got.loss, want.loss, rtol=2e-5)

  @parameterized.parameters(
      dict(slots=1),
      dict(slots=2),
      dict(slots=None, token_budget=24),
      dict(share=False),
      dict(max_suffixes=(3, 5)),
      dict(slots=1, share=False, max_suffixes=(4,)),
      dict(slots=2, shards=2),
  )
  def test_shapes(self, **shape):
    got = optimize(self.pair, edits(), PLAIN, **shape)
    self._same(got, self.base)

  def test_a_frame_of_more_edits(self):
    plan = plan_lib.plan_shapes(
        [*edits(), *facts.random_edits(9, seed=5, contexts=2)], slots=3
    )
    got, _ = run(self.pair, edits()[:2], plan=plan)
    self._same(got, jax.tree.map(lambda x: x[:2], self.base))

  def _long(self, count, chunked):
    """(edits with longer targets, what optimises them)."""
    some = facts.random_edits(
        count, seed=3, contexts=2, kl=not chunked, targets=(4, 6, 5)
    )
    if chunked:
      cut = lambda n: tuple((i, min(i + 2, n)) for i in range(0, n, 2))
      some = [dataclasses.replace(e, chunks=cut(len(e.target))) for e in some]
    return some, functools.partial(run, self.pair, some)

  # Chunked edits end one after the other, the others together.
  @cases.first(
      2,
      parameterized.parameters(
          (9, False, [4], 1),
          (9, True, [4, 2], 2),
          (9, True, [4, 2], 1),
          (7, False, [2], 1),
      ),
  )
  def test_the_last_edits_move_to_smaller_rooms(
      self, count, chunked, slots, shards
  ):
    some, run = self._long(count, chunked)
    plan = plan_lib.plan_shapes(some, slots=6, compactions=2, shards=shards)
    with mock.patch.object(engine, 'compact', wraps=engine.compact) as move:
      got, work = run(plan=plan)
    moves = [len(call.args[2]) for call in move.call_args_list]
    self.assertEqual(moves, slots)
    want, _ = run(plan=plan_lib.plan_shapes(some, slots=1))
    self.assertLess(work.computed, work.steps * plan.shapes[0].token_budget)
    self._same(got, want)

  @parameterized.parameters(False, True)
  def test_targets_in_the_cache_are_not_optimised_again(self, chunked):
    some, run = self._long(4, chunked)
    run = functools.partial(run, plan=plan_lib.plan_shapes(some, slots=2))
    cache = Cache()
    want, whole = run(cache=cache)
    self.assertCountEqual(cache.known, [edit.number for edit in some])
    del cache.known[some[1].number], cache.known[some[2].number]
    got, part = run(cache=cache)
    self.assertBetween(part.needed, 1, whole.needed - 1)
    self.assertLen(cache.told, 6)
    self._same(got, want)
    again, none = run(cache=cache)
    self.assertEqual(none.steps, 0)
    self.assertEqual([x.kept for x in (whole, part, none)], [0, 2, 4])
    jax.tree.map(np.testing.assert_array_equal, again, got)

  def test_an_exact_cache_is_used_by_whole_rounds(self):
    some, run = self._long(9, False)
    plan = plan_lib.plan_shapes(some, slots=2)
    with mock.patch.object(run_lib, 'ROUND_FILLS', 1):
      load = sum(int(plan_lib.edit_load(edit)[0]) for edit in some)
      rounds = np.array_split(
          [edit.number for edit in some], load // plan.shapes[0].token_budget
      )
      self.assertBetween(len(rounds), 3, 5)
      cache = Cache(exact=True)
      want, _ = run(plan=plan, cache=cache)
      lost = rounds[1][-1]  # every round but this one is complete
      del cache.known[lost]
      cache.told.clear()
      got, _ = run(plan=plan, cache=cache)
      self.assertCountEqual(cache.told, rounds[1])
      jax.tree.map(np.testing.assert_array_equal, got, want)
      cache.told.clear()
      run(plan=plan, cache=cache)
      self.assertEmpty(cache.told)
      cache.exact = False
      del cache.known[lost]
      run(plan=plan, cache=cache)
      self.assertEqual(cache.told, [lost])

  def test_order(self):
    order = np.array([2, 0, 3, 1])
    got = optimize(self.pair, [edits()[i] for i in order], PLAIN)
    self._same(got, jax.tree.map(lambda x: x[order], self.base))

  def test_leaving_early_and_f64(self):
    # Edits that stop at different steps leave slots to others; in f64 nothing
    # but the shapes can differ.
    config = PLAIN._replace(
        threshold=split_threshold(naive('llama')), steps=PLAIN.steps
    )
    with jax.enable_x64(True):
      params = jax.tree.map(
          lambda x: np.asarray(x, np.float64), self.pair.params
      )
      pair = self.pair._replace(params=params)
      want = optimize(pair, edits(), config, slots=EDITS)
      self.assertGreater(len(set(want.steps.tolist())), 1)
      self.assertEqual(want.z.dtype, np.float64)
      for shape in (
          dict(slots=1),
          dict(slots=2, share=False, max_suffixes=(3, 5)),
          dict(slots=None, token_budget=24),
      ):
        got = optimize(pair, edits()[::-1], config, **shape)
        np.testing.assert_array_equal(got.steps[::-1], want.steps)
        np.testing.assert_allclose(got.z[::-1], want.z, rtol=1e-10, atol=1e-10)

  @parameterized.parameters(EDITS, 2)
  def test_neighbours_of_one_shape_change_no_bit(self, slots):
    first, others = edits(), facts.random_edits(EDITS, seed=7, contexts=2)
    mixed = [first[0], *others[1:]]
    plan = plan_lib.plan_shapes([*first, *mixed], slots=slots, share=False)
    before, after = (run(self.pair, x, plan=plan)[0] for x in (first, mixed))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
      np.testing.assert_array_equal(a[0], b[0])
    changed = np.any(np.asarray(before.z) != np.asarray(after.z), axis=-1)
    self.assertEqual(changed.tolist(), [False, *[True] * (EDITS - 1)])

  def test_products_of_f32_are_exact(self):
    with products.watched(engine, 'prefill', 'step') as found:
      optimize(self.pair, edits(), PLAIN)
    self.assertSameElements(found, ('prefill', 'step'))
    self.assertTrue(products.highest(found), found)

  def test_work_is_counted(self):
    plan = plan_lib.plan_shapes(edits(), slots=2)
    _, work = run(self.pair, edits(), plan=plan)
    suffix = sum(
        len(row) + len(edit.target) - 1 - anchor
        for edit in edits()
        for row, anchor in zip(edit.rows, edit.anchors)
    )
    labels = sum(len(edit.target) * len(edit.rows) for edit in edits())
    self.assertEqual(work.last, suffix)
    self.assertEqual(work.needed, PLAIN.steps * suffix)
    self.assertEqual(work.scored, PLAIN.steps * labels)
    self.assertEqual(work.computed, work.steps * plan.shapes[0].token_budget)
    self.assertBetween(work.waste, 0, 0.6)


class MemoryTest(absltest.TestCase):

  def batch_shape(self, memory=None, free=None, count=200, batch=None):
    pair = model('llama')
    some = facts.random_edits(count, seed=5, contexts=2)
    one = models.as_model(pair.spec, pair.params)
    with mock.patch.object(placement.Placement, 'budget_bytes', free):
      plan = budget.plan_batches(one, some, batch=batch, memory=memory)
    return plan.shapes[0]

  def places(self, **settings):
    return self.batch_shape(**settings).token_budget

  def test_many_edits_have_a_larger_room(self):
    few, many = self.batch_shape(count=40), self.batch_shape(count=400)
    self.assertLess(few.token_budget, 400)
    self.assertGreater(many.token_budget, 400)
    self.assertEqual((few.compactions, many.compactions), (1, 2))
    # It is the edits of one batch that fill a room.
    self.assertLess(self.places(count=400, batch=40), 400)

  def test_rooms_fit_what_is_given(self):
    params = jax.tree.leaves(model('llama').params)
    weights = sum(x.nbytes for x in params)
    whole = self.places()
    small = self.places(memory=weights + 2e6)
    self.assertLess(small, whole)
    self.assertEqual(self.places(memory=weights + 1e12), whole)
    # What is free counts too, and so do the weights of what is given.
    self.assertEqual(self.places(memory=1e12, free=2e6), small)
    self.assertEqual(self.places(free=2e6), small)
    self.assertLess(self.places(memory=weights), small)


class FiniteTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pair = model('llama')
    cls.base = optimize(cls.pair, edits(), PLAIN)

  @parameterized.product(
      value=(np.nan, np.inf), where=('subject', 'context', 'target')
  )
  def test_an_edit_that_is_not_finite_fails_alone(self, value, where):
    bad, poison = 1, self.pair.spec.vocab - 1
    table = self.pair.params['embed']['embedding']
    params = self.pair.params | {
        'embed': {'embedding': table.at[poison].set(value)}
    }
    some = list(edits())
    some[bad] = poisoned(some[bad], where, poison)
    got = optimize(self.pair._replace(params=params), some, PLAIN)
    self.assertEqual(got.finite.tolist(), [i != bad for i in range(EDITS)])
    self.assertEqual(got.steps[bad], 1)
    good = got.finite
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(self.base)):
      np.testing.assert_allclose(a[good], b[good], rtol=1e-5, atol=1e-5)


def poisoned(edit, where: str, token: int):
  """Puts a token into an edit: at the anchor, in one context or the target."""
  rows = [row.copy() for row in edit.rows]
  target = edit.target.copy()
  if where == 'subject':
    for row, anchor in zip(rows, edit.anchors):
      row[anchor] = token
  elif where == 'context':
    rows[-1][0] = token
  else:
    target[0] = token
  return encoding.EncodedEdit(
      edit.number, tuple(rows), edit.anchors, target, edit.kl
  )


if __name__ == '__main__':
  absltest.main()
