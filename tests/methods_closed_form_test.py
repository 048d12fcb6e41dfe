"""Every row, plain and with AnyEdit, against slow oracles and its own promises.

The oracle (naive_rows) runs full forwards of a transformers model whose weights
are really written, and solves the papers' dense systems.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from unittest import mock

import jax
import naive_oracle
import naive_rows
import numpy as np
import products
import torch
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit import targets as targets_lib
from jaxedit.batching import (
    packer,
)
from jaxedit.batching import (
    plan as plan_lib,
)
from jaxedit.deltas import (
    Dense,
    LowRank,
)
from jaxedit.methods import (
    alphaedit,
    anyedit,
    closed_form,
    emmet,
    memit,
    parity,
    pmet,
    rome,
)
from jaxedit.methods.closed_form import (
    sweep,
    systems,
)
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.testing import facts
from jaxedit.text import chunking
from jaxedit.types import (
    InputError,
    Targets,
)

WEIGHT, RIDGE, SHARE = 0.3, 0.2, 0.6
# name -> (row, its slow twin, layers)
ROWS = {
    'memit': (
        functools.partial(memit.memit, moment_weight=WEIGHT),
        naive_rows.memit(WEIGHT),
        (0, 1),
    ),
    'rome': (rome.rome, naive_rows.rome(), (1,)),
    'rome_plain_keys': (
        functools.partial(rome.rome, moments=False),
        naive_rows.rome()._replace(
            solve=lambda gram, *rest: naive_rows.rome().solve(
                np.eye(len(gram)), *rest
            )
        ),
        (1,),
    ),
    'r_rome_mean': (
        rome.r_rome,
        naive_rows.rome(constraint='mean', measured='mean'),
        (1,),
    ),
    'r_rome_plain': (
        functools.partial(rome.r_rome, keys='plain'),
        naive_rows.rome(plain=1.0),
        (1,),
    ),
    'emmet': (
        functools.partial(emmet.emmet, moment_weight=WEIGHT, ridge=RIDGE),
        naive_rows.emmet(WEIGHT, RIDGE),
        (1,),
    ),
    'pmet': (
        functools.partial(pmet.pmet, moment_weight=WEIGHT),
        naive_rows.pmet(WEIGHT),
        (0, 1, 2),
    ),
    'alphaedit': (
        functools.partial(alphaedit.alphaedit, share=SHARE, ridge=RIDGE),
        naive_rows.alphaedit(SHARE, RIDGE),
        (0, 1),
    ),
}
WITH_ANYEDIT = ('memit', 'rome', 'emmet', 'alphaedit')


def edits(seed=1, contexts=2, count=3):
  return facts.random_edits(count, seed=seed, contexts=contexts)


@functools.cache
def texts(seed=3, overlap=0):
  """Edits of one context whose long targets are cut in chunks."""
  some = facts.random_edits(
      3, seed=seed, contexts=1, targets=(7, 1, 5), kl=False
  )
  return tuple(
      dataclasses.replace(
          edit, chunks=chunking.spans(len(edit.target), 3, overlap)
      )
      if len(edit.target) > 3
      else edit
      for edit in some
  )


@contextlib.contextmanager
def wanted(model, row, layers, scale=0.3):
  """Random wanted states stand for the optimised ones while open."""

  def chain(spec, params, some, **ignored):
    del spec, params, ignored
    found = []
    for edit in some:
      z0 = naive_rows.states(model, [edit], layers[-1], row)
      rng = np.random.default_rng(int(edit.rows[0].sum()))
      z = z0 + scale * rng.standard_normal(z0.shape)
      none = np.zeros(len(z), np.float32)
      z, z0 = z.astype(np.float32), z0.astype(np.float32)
      found.append(Targets(z, z0, none, none, none.astype(np.int32), none == 0))
    return found, targets_lib.Work()

  def join(*given, **options):
    found, work = chain(*given, **options)
    return jax.tree.map(lambda *x: np.concatenate(x), *found), work

  with (
      mock.patch.object(targets_lib, 'optimize', join),
      mock.patch.object(targets_lib, 'autoregressive', chain),
  ):
    yield


def error(got, want):
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class Case:
  """One row on one small model."""

  def __init__(self, name, family='llama', chunks=False, **changes):
    make, self.slow, self.layers = ROWS[name]
    self.pair = naive_oracle.pair(family)
    recipe = dataclasses.replace(make(self.layers), **changes)
    if chunks:
      recipe = anyedit.anyedit(recipe, window=3)
    self.recipe = recipe
    self.editor = closed_form.closed_form(self.pair.spec, recipe)
    self.moments = facts.random_moments(
        self.pair.spec, self.layers, seed=2, scale=0.3
    )
    self.state = self.editor.init(self.pair.params, self.moments)

  def edit(self, some, *, each=False, model=None, **options):
    call = self.editor.edit_independent if each else self.editor.edit
    options = {'plan': plan_lib.plan_shapes(some, slots=4)} | options
    given = {'params': self.pair.params, 'state': self.state} | {
        k: options.pop(k) for k in ('params', 'state') if k in options
    }
    with wanted(model or self.pair.torch, self.slow, self.layers):
      return call(given['params'], given['state'], some, **options)

  def naive(self, some, z, model=None, **options):
    return naive_rows.write(
        model or self.pair.torch,
        some,
        self.layers,
        self.slow,
        z=z,
        grams=self.moments.gram,
        whole=self.recipe.texts,
        **options,
    )

  def check(self, test, some, **options):
    edited, _, info = self.edit(some, **options)
    want, distance, _ = self.naive(some, info.targets.z)
    got = np.asarray(edited_lib.full(edited.deltas[0]))
    for a, b in zip(got, want):
      test.assertLess(error(a, b), 2e-3)
    np.testing.assert_allclose(info.distance, distance, atol=2e-3)
    return edited, info


class OracleTest(parameterized.TestCase):

  @parameterized.product(name=list(ROWS), family=['llama', 'gptj'])
  def test_facts(self, name, family):
    Case(name, family).check(self, edits(contexts=3))

  @parameterized.product(name=WITH_ANYEDIT, overlap=[0, 1])
  def test_chunks(self, name, overlap):
    some = texts(overlap=overlap)
    edited, info = Case(name, chunks=True).check(self, some)
    states = sum(edit.stages for edit in some)
    self.assertGreater(states, len(some))
    self.assertEqual(
        info.edit.tolist(),
        [i for i, edit in enumerate(some) for _ in range(edit.stages)],
    )
    # Held tokens shape the change, but add no rows to it.
    self.assertEqual(edited.deltas[0].key.shape[1], states)

  @parameterized.parameters('memit', 'alphaedit')
  def test_one_chunk_and_parallel_blocks(self, name):
    short = facts.random_edits(1, seed=8, contexts=1, targets=(1,), kl=False)
    Case(name, 'gptj', chunks=True).check(self, short)

  @parameterized.parameters(*WITH_ANYEDIT)
  def test_groups_are_edited_alone(self, name):
    case, some, group = Case(name, chunks=True), texts(), (0, 1, 0)
    edited, _, info = case.edit(some, each=True, group=group)
    delta = edited.deltas[0]
    self.assertEqual(delta.key.shape[1], 2)
    for number in (0, 1):
      mine = [i for i, g in enumerate(group) if g == number]
      rows = np.isin(info.edit, mine)
      want, distance, _ = case.naive(
          [some[i] for i in mine], info.targets.z[rows]
      )
      got = edited_lib.full(edited_lib.select(edited, number).deltas[0])
      for a, b in zip(np.asarray(got), want):
        self.assertLess(error(a, b), 2e-3)
      np.testing.assert_allclose(info.distance[:, rows], distance, atol=2e-3)

  @parameterized.parameters('memit', 'rome')
  def test_tiles_and_where_they_wait_do_not_matter(self, name):
    case, some = Case(name), edits(count=5, contexts=4)
    whole, _, want = case.edit(some)
    small = plan_lib.plan_shapes(some, slots=4, token_budget=16)
    self.assertGreater(
        len(list(packer.pack_prompts(some, small, plain=False))), 1
    )
    with mock.patch.object(sweep, '_resident_bytes', lambda: 1000):
      parts, _, info = case.edit(some, plan=small)
    got, wanted_ = (
        np.asarray(edited_lib.full(x.deltas[0])) for x in (parts, whole)
    )
    self.assertLess(error(got, wanted_), 1e-4)
    np.testing.assert_allclose(info.distance, want.distance, atol=1e-5)

  def test_products_of_f32_are_exact(self):
    names = (
        '_enter',
        '_to_mlp',
        '_predict_final',
        '_read_keys',
        '_measure',
        '_through_mlp',
    )
    with products.watched(sweep, *names) as found:
      Case('memit').edit(edits())
    self.assertSameElements(found, names)
    self.assertTrue(products.highest(found), found)

  @parameterized.parameters('memit', 'alphaedit')
  def test_one_matrix_where_factors_would_be_larger(self, name):
    case = Case(name)
    factors, _, _ = case.edit(edits())
    with mock.patch.object(systems, 'pays', lambda *sizes: False):
      matrix, _, _ = case.edit(edits())
    self.assertIsInstance(factors.deltas[0], LowRank)
    self.assertIsInstance(matrix.deltas[0], Dense)
    got, want = (
        np.asarray(edited_lib.full(x.deltas[0])) for x in (matrix, factors)
    )
    self.assertLess(error(got, want), 1e-5)

  def test_rect_is_written_before_the_next_layer(self):
    def shape(change, kernel):
      score = np.abs(change / (kernel + 1e-8))
      return np.where(score >= np.quantile(score, 0.6), change, 0)

    case = Case('memit', rect_density=0.4)
    case.slow = case.slow._replace(shape=shape)
    edited, _, info = case.edit(edits())
    want, _, _ = case.naive(edits(), info.targets.z)
    got = np.asarray(edited.deltas[0].value)
    # A score at the very border falls on either side.
    self.assertLess(np.mean((got[0] != 0) != (want[0] != 0)), 1e-3)
    self.assertLess(error(got[0], want[0]), 2e-2)
    self.assertAlmostEqual(np.mean(got != 0), 0.4, delta=0.01)
    with self.assertRaisesRegex(InputError, 'one sequence'):
      case.edit(edits(), each=True)

  def test_rect_hides_no_singular_system(self):
    solve = systems.Joint.solve

    def singular(self, *given):
      return jax.tree.map(lambda x: x * np.nan, solve(self, *given))

    with mock.patch.object(systems.Joint, 'solve', singular):
      edited, _, info = Case('memit', rect_density=0.4).edit(edits())
    self.assertFalse(info.written.any())
    self.assertFalse(np.asarray(edited.deltas[0].value).any())


class PromiseTest(parameterized.TestCase):

  @parameterized.parameters('rome', 'rome_plain_keys', 'r_rome_plain')
  def test_rome_moves_the_mlp_by_exactly_what_was_asked(self, name):
    case = Case(name)
    some = edits(contexts=3)
    edited, _, info = case.edit(some, each=True)
    self.assertEqual(edited.deltas[0].key.shape[2], 1)
    np.testing.assert_allclose(info.distance[-1], 0, atol=1e-4)
    for i, edit in enumerate(some):
      # What we found, in the model of another library.
      change = edited_lib.full(edited_lib.select(edited, i).deltas[0])[0]
      model = copy.deepcopy(case.pair.torch)
      kernel = naive_oracle.down(model, 1)
      with torch.no_grad():
        kernel.weight += torch.tensor(np.asarray(change).T)
      after = naive_rows.states(model, [edit], 1, case.slow)
      np.testing.assert_allclose(after[0], info.targets.z[i], atol=1e-4)

  def test_emmet_of_one_fact_is_rome_with_averaged_keys(self):
    some = edits(count=1)
    case = Case('emmet')
    edited, _, info = case.edit(some)
    twin = naive_rows.rome(plain=0.5, constraint='mean')._replace(
        output='block'
    )
    case.slow = twin
    (want,), _, _ = case.naive(some, info.targets.z)
    got = np.asarray(edited_lib.full(edited.deltas[0]))[0]
    self.assertLess(error(got, want), 1e-3)

  def test_alphaedit_leaves_common_keys_alone(self):
    case = Case('alphaedit')
    edited, _, _ = case.edit(edits())
    for i, change in enumerate(edited_lib.full(edited.deltas[0])):
      size, vectors = np.linalg.eigh(case.moments.gram[i])
      preserved = np.cumsum(size[::-1]) >= SHARE * size.sum()
      kept = vectors[:, len(size) - 1 - int(preserved.argmax()) :]
      moved = np.linalg.norm(kept.T @ np.asarray(change))
      size = np.linalg.norm(change) * np.linalg.norm(kept)
      self.assertLess(moved, 1e-6 * size)

  def test_alphaedit_holds_the_keys_of_earlier_batches(self):
    case = Case('alphaedit')
    first, second = edits(seed=1), edits(seed=5)
    one, state, info = case.edit(first)
    self.assertEqual([len(keys) for keys in state.preserved_before], [3, 3])
    _, _, model = case.naive(first, info.targets.z)
    # Published code reads the keys again, on the model that was edited.
    prior = [
        naive_rows.keys(model, first, layer, case.slow, False).mean
        for layer in case.layers
    ]
    for got, want in zip(state.preserved_before, prior):
      self.assertLess(error(got, want), 1e-4)
    params = edited_lib.apply(case.pair.params, one)
    two, state, info = case.edit(
        second, params=params, state=state, model=model
    )
    self.assertEqual([len(keys) for keys in state.preserved_before], [6, 6])
    want, _, _ = case.naive(second, info.targets.z, model, prior=prior)
    got = np.asarray(edited_lib.full(two.deltas[0]))
    for a, b in zip(got, want):
      self.assertLess(error(a, b), 2e-3)
    forgetful, _, _ = case.edit(second, params=params, model=model)
    other = np.asarray(edited_lib.full(forgetful.deltas[0]))
    self.assertGreater(error(other, got), 1e-2)

  def test_independent_edits_remember_nothing(self):
    case = Case('alphaedit')
    _, state, _ = case.edit(edits(), each=True)
    self.assertIs(state, case.state)
    # Nor do they hold what a sequence before them has left, or each other's.
    _, state, _ = case.edit(edits(seed=5))
    some = edits()
    for group in (None, (0, 1, 1)):
      with self.subTest(group=group):
        each, after, _ = case.edit(some, each=True, state=state, group=group)
        self.assertIs(after, state)
        for number in set(group or (0, 1, 2)):
          mine = [
              edit for edit, g in zip(some, group or (0, 1, 2)) if g == number
          ]
          alone, _, _ = case.edit(mine)
          got = edited_lib.full(edited_lib.select(each, number).deltas[0])
          want = edited_lib.full(alone.deltas[0])
          self.assertLess(error(np.asarray(got), np.asarray(want)), 1e-4)

  @parameterized.parameters(*WITH_ANYEDIT)
  def test_held_tokens_move_less(self, name):
    some, gone = texts(), {}
    for preserved in (True, False):
      case = Case(name, chunks=True)
      recipe = dataclasses.replace(case.recipe, preserved=preserved)
      case.editor = closed_form.closed_form(case.pair.spec, recipe)
      edited, _, _ = case.edit(some)
      change = np.asarray(edited_lib.full(edited.deltas[0]))[0]
      found = naive_rows.keys(
          case.pair.torch, some, case.layers[0], case.slow, True
      )
      gone[preserved] = np.linalg.norm(found.preserved @ change)
    self.assertLess(gone[True], gone[False])


class SoundTest(parameterized.TestCase):

  def test_a_ridge_does_not_depend_on_neighbours(self):
    case = Case('emmet')
    strong = dataclasses.replace(case.recipe, ridge=1e9)
    case.editor = closed_form.closed_form(case.pair.spec, strong)
    some = edits()
    edited, _, _ = case.edit(some, each=True, group=(0, 0, 1))
    alone, _, _ = case.edit(some[2:], each=True)
    for found, group in ((edited, 1), (alone, 0)):
      change = edited_lib.full(edited_lib.select(found, group).deltas[0])
      self.assertGreater(np.linalg.norm(change), 1e-2)
    paired = edited_lib.full(edited_lib.select(edited, 0).deltas[0])
    self.assertLess(np.linalg.norm(paired), 1e-3)

  def test_texts_that_open_alike_can_be_held_exactly(self):
    # Two questions in the same chat: their first keys are one and the same.
    opening = np.array([5, 9, 7], np.int32)
    some = [
        dataclasses.replace(
            edit,
            rows=(np.concatenate([opening, edit.rows[0]]),),
            anchors=(edit.anchors[0] + 3,),
        )
        for edit in texts()
    ]
    case = Case('rome', chunks=True)
    edited, _, info = case.edit(some)
    self.assertTrue(info.written.all())
    change = np.asarray(edited_lib.full(edited.deltas[0]))
    self.assertTrue(np.isfinite(change).all())
    np.testing.assert_allclose(info.distance[-1], 0, atol=1e-2)

  @parameterized.parameters(False, True)
  def test_a_singular_system_through_mlps_nothing(self, each):
    # The same key twice, asked for two different outputs without any ridge.
    case, (one, *_) = Case('rome'), edits(count=1)
    some = [one, dataclasses.replace(one, number=2)]
    with mock.patch.object(
        systems, '_solve_factors', lambda *_: bad((2,))
    ), mock.patch.object(
        systems, '_solve_groups', lambda _, rows, ridge: bad((1, 1), ridge)
    ):
      edited, _, info = case.edit(
          some, each=each, **({'group': (0, 1)} if each else {})
      )
    self.assertEqual(info.written.tolist(), [False, each])
    for leaf in jax.tree.leaves(edited):
      self.assertTrue(np.isfinite(leaf).all())

  def test_batches_of_any_number_of_held_keys_give_factors(self):
    some = tuple(
        dataclasses.replace(edit, rows=(np.resize(edit.rows[0], 40),))
        for edit in texts()
    )
    some = [
        dataclasses.replace(edit, anchors=(39,), number=i, target=edit.target)
        for i, edit in enumerate(some)
    ]
    case = Case('memit', chunks=True)
    self.assertGreater(3 * 40, case.pair.spec.mlp_width)
    edited, info = case.check(self, some)
    self.assertEqual(edited.deltas[0].key.shape[1], len(info.edit))


def bad(shape, ridge=(0.0,)):
  """Factors of which the first system is not finite."""
  wide = np.ones((len(ridge), *shape[1:], 48)) if len(shape) > 1 else None
  if wide is None:
    return LowRankUpdate(np.full((*shape, 48), np.nan), np.ones((*shape, 32)))
  key, value = wide, np.ones((len(ridge), *shape[1:], 32))
  key[0] = np.nan
  return LowRankUpdate(key, value)


class ParityTest(parameterized.TestCase):

  @parameterized.parameters((1, 0.5), (2, 1.0))
  def test_a_shadowed_index_gives_every_layer_one_share(self, count, share):
    case = Case('memit')
    recipe = parity.shadowed(case.recipe, count)
    self.assertEqual([recipe.layer_share(left) for left in (2, 1)], [share] * 2)
    case.editor = closed_form.closed_form(case.pair.spec, recipe)
    case.slow = case.slow._replace(share=lambda left: share)
    some = edits(count=count)
    edited, _, info = case.edit(some)
    want, _, _ = case.naive(some, info.targets.z)
    for a, b in zip(edited_lib.full(edited.deltas[0]), want):
      self.assertLess(error(np.asarray(a), b), 2e-3)

  def test_alphaedit_takes_one_null_space_for_all_layers(self):
    case = Case('alphaedit')
    recipe = parity.shadowed(case.recipe, 2)
    self.assertEqual(recipe.shared_preconditioner, 1)
    case.editor = closed_form.closed_form(case.pair.spec, recipe)
    edited, _, info = case.edit(edits(count=2))
    case.slow = case.slow._replace(share=lambda left: 1.0)
    grams = [case.moments.gram[1]] * 2
    want, _, _ = naive_rows.write(
        case.pair.torch, edits(count=2), case.layers, case.slow,
        z=info.targets.z, grams=grams,
    )  # fmt: skip
    for a, b in zip(edited_lib.full(edited.deltas[0]), want):
      self.assertLess(error(np.asarray(a), b), 2e-3)

  def test_too_many_edits_are_refused(self):
    with self.assertRaisesRegex(InputError, 'at most 2 a batch'):
      parity.shadowed(Case('memit').recipe, 3)


class BadSettingsTest(parameterized.TestCase):

  def test_rome_edits_one_layer(self):
    with self.assertRaisesRegex(InputError, 'ROME edits one layer'):
      rome.rome((1, 2))

  def test_unknown_keys(self):
    with self.assertRaisesRegex(InputError, 'mean or plain'):
      rome.r_rome(keys='all')

  @parameterized.parameters((0, 0), (3, 3), (3, -1))
  def test_chunks_that_cannot_be(self, window, overlap):
    with self.assertRaises(InputError):
      anyedit.anyedit(memit.memit(), window, overlap)


if __name__ == '__main__':
  absltest.main()
