"""Every closed form, plain and with AnyEdit, against slow oracles and its own
promises.

The oracle (naive_rows) runs full forwards of a transformers model whose weights
are really written, and solves the papers' dense systems.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from unittest import mock

import editors
import jax
import jax.numpy as jnp
import naive_oracle
import naive_rows
import numpy as np
import products
import torch
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit import targets as targets_lib
from jaxedit.batching import edits as edits_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import Dense, LowRank
from jaxedit.methods import closed_form, parity
from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.closed_form import sweep, systems
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder
from jaxedit.numerics import wide
from jaxedit.solve import preconditioner, ridge
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.testing import facts
from jaxedit.text import chunking
from jaxedit.types import InputError

WEIGHT, RIDGE, SHARE = 0.3, 0.2, 0.6
# name -> (method, settings, its slow twin)
ROWS = {
    'memit': (
        'memit',
        dict(layers=(0, 1), moment_weight=WEIGHT),
        naive_rows.memit(WEIGHT),
    ),
    'rome': ('rome', dict(layers=(1,)), naive_rows.rome()),
    'rome_plain_keys': (
        'rome',
        dict(layers=(1,), moments=False),
        naive_rows.rome()._replace(
            solve=lambda gram, *rest: naive_rows.rome().solve(
                np.eye(len(gram)), *rest
            )
        ),
    ),
    'r_rome_mean': (
        'r-rome',
        dict(layers=(1,)),
        naive_rows.rome(constraint='mean', measured='mean'),
    ),
    'r_rome_plain': (
        'r-rome',
        dict(layers=(1,), keys='plain'),
        naive_rows.rome(plain=1.0),
    ),
    'emmet': (
        'emmet',
        dict(layers=(1,), moment_weight=WEIGHT, ridge=RIDGE),
        naive_rows.emmet(WEIGHT, RIDGE, lone=RIDGE),
    ),
    'pmet': (
        'pmet',
        dict(layers=(0, 1, 2), moment_weight=WEIGHT),
        naive_rows.pmet(WEIGHT),
    ),
    'alphaedit': (
        'alphaedit',
        dict(layers=(0, 1), null_space_share=SHARE, ridge=RIDGE),
        naive_rows.alphaedit(SHARE, RIDGE),
    ),
}
STAGES = (
    sweep._enter,
    sweep._to_mlp,
    sweep._read_keys,
    sweep._measure,
    sweep._predict_final,
    sweep._through_mlp,
    systems._solve_factors,
    systems._solve_groups,
)
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


def full(edited, index=None):
  """[n, F, D] the change of every layer; of one of the edits side by side."""
  if index is not None:
    edited = edited_lib.select(edited, index)
  return np.asarray(edited_lib.full(edited.deltas[0]))


class Case:
  """One method on one small model; targets are given, not optimised."""

  def __init__(self, name, family='llama', chunks=False, **changes):
    method, settings, self.slow = ROWS[name]
    self.pair = naive_oracle.pair(family)
    config = METHODS[method].configure(**settings)
    if chunks:
      config = anyedit(config, window=3)
    self.set(dataclasses.replace(config.recipe(), **changes))
    self.layers, self.scale = config.layers, 0.3
    self.moments = facts.random_moments(
        self.pair.spec, self.layers, seed=2, scale=0.3
    )
    given = editors.resources(self.editor, self.pair.spec, seed=2, scale=0.3)
    self.state = self.editor.init(self.pair, given)

  def set(self, recipe):
    self.recipe = recipe
    self.editor = closed_form.closed_form(self.pair.spec, recipe)

  def edit(self, some, group=None, *, torch_model=None, lost=(), **given):
    """What the editor returns.

    Args:
      some: edits.
      group: see `EditBatch`.
      torch_model: has the parameters of `params`, if these are given.
      lost: numbers of edits whose targets are not finite.
      **given: `params`, `state` and `plan` instead of the case's own.
    """
    params = given.get('params', self.pair.params)
    dtype = wide(params['embed']['embedding'].dtype)

    def states(edit):
      found = naive_rows.states(
          torch_model or self.pair.torch, [edit], self.layers[-1], self.slow
      )
      return (found + np.nan if edit.number in lost else found).astype(dtype)

    shapes = given.get('plan') or plan_lib.plan_shapes(some, slots=4)
    return self.editor.edit(
        self.pair._replace(params=params),
        given.get('state', self.state),
        EditBatch(some, shapes, group),
        Run(editors.GivenTargets(states, self.scale)),
    )

  def naive(self, some, z, model=None, **options):
    return naive_rows.write(
        model or self.pair.torch,
        some,
        self.layers,
        self.slow,
        z=z,
        whole=self.recipe.texts,
        **{'grams': self.moments.gram, **options},
    )

  def check(self, test, some, **options):
    """Edits and compares with the oracle; returns (edited, report)."""
    edited, _, info = self.edit(some, **options)
    report = info.targets
    want, distance, _ = self.naive(some, report.targets.z)
    for a, b in zip(full(edited), want, strict=True):
      test.assertLess(editors.gap(a, b), 2e-3)
    np.testing.assert_allclose(report.distance, distance, atol=2e-3)
    return edited, report


class OracleTest(parameterized.TestCase):

  @parameterized.product(name=list(ROWS), family=['llama', 'gptj'])
  def test_facts(self, name, family):
    Case(name, family).check(self, edits(contexts=3))

  @parameterized.product(name=WITH_ANYEDIT, overlap=[0, 1])
  def test_chunks(self, name, overlap):
    some = texts(overlap=overlap)
    edited, report = Case(name, chunks=True).check(self, some)
    states = sum(edit.stages for edit in some)
    self.assertGreater(states, len(some))
    self.assertEqual(
        report.edit.tolist(),
        [i for i, edit in enumerate(some) for _ in range(edit.stages)],
    )
    # Preserved tokens shape the change, but add no rows to it.
    self.assertEqual(edited.deltas[0].key.shape[1], states)

  @parameterized.parameters('memit', 'alphaedit')
  def test_one_chunk_and_parallel_blocks(self, name):
    short = facts.random_edits(1, seed=8, contexts=1, targets=(1,), kl=False)
    Case(name, 'gptj', chunks=True).check(self, short)

  @parameterized.parameters(*WITH_ANYEDIT)
  def test_groups_are_edited_alone(self, name):
    case, some, group = Case(name, chunks=True), texts(), (0, 1, 0)
    edited, _, info = case.edit(some, group)
    self.assertEqual(edited.deltas[0].key.shape[1], 2)
    for number in (0, 1):
      mine = [i for i, g in enumerate(group) if g == number]
      rows = np.isin(info.targets.edit, mine)
      want, distance, _ = case.naive(
          [some[i] for i in mine], info.targets.targets.z[rows]
      )
      for a, b in zip(full(edited, number), want):
        self.assertLess(editors.gap(a, b), 2e-3)
      np.testing.assert_allclose(
          info.targets.distance[:, rows], distance, atol=2e-3
      )

  @parameterized.parameters('memit', 'rome')
  def test_tiles_and_where_they_wait_do_not_matter(self, name):
    case, some = Case(name), edits(count=5, contexts=4)
    whole, _, want = case.edit(some)
    small = plan_lib.plan_shapes(some, slots=4, token_budget=16)
    self.assertGreater(
        len(list(edits_lib.pack_prompts(some, small, plain=False))), 1
    )
    small = dataclasses.replace(small, resident_bytes=1000)
    parts, _, info = case.edit(some, plan=small)
    self.assertLess(editors.gap(full(parts), full(whole)), 1e-4)
    np.testing.assert_allclose(
        info.targets.distance, want.targets.distance, atol=1e-5
    )

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
    self.assertLess(editors.gap(full(matrix), full(factors)), 1e-5)

  def test_rect_is_written_before_the_next_layer(self):
    def shape(change, kernel):
      score = np.abs(change / (kernel + 1e-8))
      return np.where(score >= np.quantile(score, 0.6), change, 0)

    case = Case('memit', rect_density=0.4)
    case.slow = case.slow._replace(shape=shape)
    edited, _, info = case.edit(edits())
    want, _, _ = case.naive(edits(), info.targets.targets.z)
    got = np.asarray(edited.deltas[0].value)
    # A score at the very border falls on either side.
    self.assertLess(np.mean((got[0] != 0) != (want[0] != 0)), 1e-3)
    self.assertLess(editors.gap(got[0], want[0]), 2e-2)
    self.assertAlmostEqual(np.mean(got != 0), 0.4, delta=0.01)
    with self.assertRaisesRegex(InputError, 'change of a sequence'):
      case.edit(edits(), range(3))

  def test_rect_hides_no_singular_system(self):
    solve = systems.Joint.solve

    def singular(self, *given):
      return jax.tree.map(lambda x: x * np.nan, solve(self, *given))

    with mock.patch.object(systems.Joint, 'solve', singular):
      edited, _, info = Case('memit', rect_density=0.4).edit(edits())
    self.assertFalse(info.written.any())
    self.assertFalse(np.asarray(edited.deltas[0].value).any())


class MemitTest(parameterized.TestCase):
  """The oracle is naive_oracle.memit, in extended precision."""

  def check(self, case, some, edited, report):
    want, distance = naive_oracle.memit(
        case.pair.torch,
        some,
        case.layers,
        z=report.targets.z,
        grams=case.moments.gram,
        weight=WEIGHT,
    )
    for a, b in zip(full(edited), want, strict=True):
      self.assertLess(editors.gap(a, b), 1e-3)
    np.testing.assert_allclose(report.distance, distance, atol=1e-3)

  def test_whole(self):
    """Targets are optimised here, and then written."""
    case, some = Case('memit'), edits()
    target = targets_lib.TargetConfig(
        steps=5, rate=0.1, decay=0.5, clamp=5.0, threshold=0.0
    )
    case.set(dataclasses.replace(case.recipe, target=target))
    batch = EditBatch(some, plan_lib.plan_shapes(some, slots=2))
    edited, _, info = case.editor.edit(case.pair, case.state, batch, Run())
    self.assertTrue((info.targets.targets.loss > 0).all())
    self.check(case, some, edited, info.targets)

  @parameterized.named_parameters(
      ('gap_and_last_layer', 'llama', (0, 2), 2, 8),
      ('one_layer', 'llama', (1,), 2, 8),
      ('one_context', 'llama', (1, 2), 1, 8),
      ('three_contexts_in_tiles', 'llama', (0, 1, 2), 3, 3),
      ('parallel', 'gptj', (0, 2), 2, 8),
      ('learned_positions', 'gpt2', (1, 2), 2, 8),
  )
  def test_insertion(self, family, layers, contexts, slots):
    name, settings, slow = ROWS['memit']
    other = {'memit': (name, settings | dict(layers=layers), slow)}
    with mock.patch.dict(ROWS, other):
      case = Case('memit', family)
    some = edits(contexts=contexts, count=4)
    edited, _, info = case.edit(
        some, plan=plan_lib.plan_shapes(some, slots=slots)
    )
    self.check(case, some, edited, info.targets)

  def near_identity(self, group=None, **changes):
    """Distances where next to nothing stands in the way of writing.

    Blocks add little to the residual, moments are weak, the plain prompt is the
    only key.
    """
    case = Case('memit', **changes)
    params = jax.tree.map(lambda x: x, case.pair.params)
    for part, site in (('attn', 'out'), ('mlp', 'down')):
      layers = params['layers'][part]
      layers[site] = {'kernel': layers[site]['kernel'] * 0.02}
    weak = editors.resources(case.editor, case.pair.spec, scale=1e-3)
    some = edits(contexts=1)

    def states(edit):
      tokens = jnp.asarray(edit.rows[0][None])
      layout = decoder.token_layout(np.ones(tokens.shape, bool))
      h = targets_lib.lower(case.pair.spec, params, tokens, layout, layer=1)
      return np.asarray(h)[0, list(edit.anchors)]

    _, _, info = case.editor.edit(
        case.pair._replace(params=params),
        case.editor.init(case.pair, weak),
        EditBatch(some, plan_lib.plan_shapes(some, slots=4), group),
        Run(editors.GivenTargets(states, 0.01)),
    )
    return info.targets.distance

  @parameterized.parameters(None, [(0, 1, 2)])
  def test_distance_falls(self, group):
    distance = self.near_identity(group)
    self.assertEqual(distance.shape, (3, 3))
    # Every layer takes an even share.
    want = np.array([[1.0], [0.5], [0.0]]) + np.zeros(3)
    np.testing.assert_allclose(distance[0], want[0], atol=1e-3)
    np.testing.assert_allclose(distance, want, atol=0.1)

  def test_narrow_weights_move_changes_a_little(self):
    # Weights and keys rounded to bf16 move changes by about 1%.
    case = Case('memit')
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.pair.params)
    want, got = (
        case.edit(edits(), params=x)[0] for x in (case.pair.params, half)
    )
    self.assertLess(editors.gap(full(got), full(want)), 0.1)


class EditorTest(parameterized.TestCase):
  """What the common battery cannot know of a closed form."""

  def test_factors_have_a_row_an_edit_that_was_written(self):
    case, some = Case('memit'), edits()
    edited, _, info = case.edit(some)
    spec = case.pair.spec
    self.assertEqual(edited.deltas[0].key.shape, (2, 3, spec.mlp_width))
    self.assertEqual(edited.deltas[0].value.shape, (2, 3, spec.width))
    edited, _, info = case.edit(some, lost=[some[1].number])
    self.assertEqual(info.written.tolist(), [True, False, True])
    self.assertEqual(edited.deltas[0].key.shape[1], 2)
    want, _, _ = case.edit([some[0], some[2]])
    self.assertLess(editors.gap(full(edited), full(want)), 1e-4)

  def test_an_empty_batch_has_the_dtypes_of_others(self):
    case = Case('memit')
    batch = EditBatch([], plan_lib.plan_shapes(edits(), slots=4))
    empty = case.editor.edit(case.pair, case.state, batch, Run()).info.targets
    other = case.edit(edits()).info.targets
    dtypes = lambda report: jax.tree.map(lambda x: x.dtype, report)
    self.assertEqual(dtypes(empty), dtypes(other))
    self.assertEqual(empty.distance.shape, (3, 0))

  @parameterized.parameters(None, [(0, 1)])
  def test_fewer_edits_do_not_compile(self, group):
    # They leave slots empty and rows of the solve idle: only the delta, of
    # which each sequence takes its own, has another shape.
    case, some = Case('memit'), edits()
    shapes = plan_lib.plan_shapes(some, slots=4)
    case.edit(some, group and range(3), plan=shapes)
    sizes = [stage._cache_size() for stage in STAGES]
    case.edit(some[1:], group, plan=shapes)
    self.assertEqual([stage._cache_size() for stage in STAGES], sizes)

  def test_insert_writes_given_targets(self):
    """The part of an editor that a caller with targets of his own uses."""
    case, some = Case('memit'), edits()
    edited, _, info = case.edit(some)
    shapes = plan_lib.plan_shapes(some, slots=4)
    found = closed_form.insert(
        case.pair.spec,
        case.pair.params,
        case.recipe,
        case.state,
        EditBatch(some, shapes),
        targets=info.targets.targets,
        active=np.ones(3, bool),
    )
    np.testing.assert_array_equal(found.distance, info.targets.distance)
    for i, delta in enumerate(found.deltas):
      np.testing.assert_array_equal(delta.key, edited.deltas[0].key[i])
      np.testing.assert_array_equal(delta.value, edited.deltas[0].value[i])
    self.assertTrue(found.active.all())
    self.assertEqual([x.shape for x in found.keys], [(3, 48)] * 2)

  def test_moments_that_cannot_be_used_are_refused(self):
    case = Case('memit')
    (need,) = case.editor.needs
    gram = case.moments.gram.copy()
    gram[1] = 0
    broken = dataclasses.replace(case.moments, gram=gram)
    with self.assertRaisesRegex(InputError, 'layer 1 .*collect more tokens'):
      case.editor.init(case.pair, {need: broken})
    few = facts.random_moments(case.pair.spec, (0,), seed=0)
    with self.assertRaisesRegex(InputError, 'no second moments of layer 1'):
      case.editor.init(case.pair, {need: few})

  def test_groups_too_large_to_lie_side_by_side_are_refused(self):
    case = Case('memit')
    limit = edited_lib.rank_limit(case.pair.spec.mlp_width, 32)
    self.assertEmpty(case.editor.check(limit))
    self.assertRegex(
        case.editor.check(limit + 1)[0], f'up to {limit} targets a batch'
    )


class PromiseTest(parameterized.TestCase):

  @parameterized.parameters('rome', 'rome_plain_keys', 'r_rome_plain')
  def test_rome_moves_the_mlp_by_exactly_what_was_asked(self, name):
    case = Case(name)
    some = edits(contexts=3)
    edited, _, info = case.edit(some, range(3))
    self.assertEqual(edited.deltas[0].key.shape[2], 1)
    np.testing.assert_allclose(info.targets.distance[-1], 0, atol=1e-4)
    for i, edit in enumerate(some):
      # What we found, in the model of another library.
      model = copy.deepcopy(case.pair.torch)
      kernel = naive_oracle.down(model, 1)
      with torch.no_grad():
        kernel.weight += torch.tensor(full(edited, i)[0].T)
      after = naive_rows.states(model, [edit], 1, case.slow)
      np.testing.assert_allclose(after[0], info.targets.targets.z[i], atol=1e-4)

  def test_emmet_of_one_fact_is_rome_with_averaged_keys(self):
    some = edits(count=1)
    case = Case('emmet', single_edit_ridge=0.0)
    edited, _, info = case.edit(some)
    twin = naive_rows.rome(plain=0.5, constraint='mean')._replace(
        output='block'
    )
    case.slow = twin
    (want,), _, _ = case.naive(some, info.targets.targets.z)
    self.assertLess(editors.gap(full(edited)[0], want), 1e-3)

  @parameterized.parameters(
      ({}, 1, 0.0), ({}, 3, 0.1), (dict(ridge=0.5), 1, 0.5),
      (dict(ridge=0.1), 1, 0.1), (dict(ridge=0), 3, 0.0),
  )  # fmt: skip
  def test_emmets_ridge_is_the_formulas(self, given, facts_, mu):
    """In f64; published code has no ridge for one fact, unless one is given."""
    case, solve, seen = Case('emmet'), systems._solve_factors, []
    config = METHODS['emmet'].configure(
        layers=(1,), moment_weight=WEIGHT, **given
    )
    case.set(config.recipe())

    def spy(*args):
      seen.append((*args[1:], solve(*args)))
      return seen[-1][-1]

    with jax.enable_x64(True):
      params = jax.tree.map(lambda x: x.astype(jnp.float64), case.pair.params)
      with mock.patch.object(systems, '_solve_factors', spy):
        case.edit(edits(count=facts_), params=params)
    ((rows, _, got),) = seen
    active = np.asarray(rows.active)
    keys = np.asarray(rows.keys)[active]
    residuals = np.asarray(rows.residuals)[active]
    self.assertLen(keys, facts_)
    s_k = np.linalg.solve(WEIGHT * case.moments.gram[0], keys.T)
    want = s_k @ np.linalg.solve(keys @ s_k + mu * np.eye(facts_), residuals)
    found = np.asarray(got.key).T @ np.asarray(got.value)
    self.assertLess(editors.gap(found, want), 1e-10)

  def test_alphaedit_leaves_common_keys_alone(self):
    case = Case('alphaedit')
    edited, _, _ = case.edit(edits())
    for gram, change in zip(case.moments.gram, full(edited)):
      size, vectors = np.linalg.eigh(gram)
      preserved = np.cumsum(size[::-1]) >= SHARE * size.sum()
      kept = vectors[:, len(size) - 1 - int(preserved.argmax()) :]
      moved = np.linalg.norm(kept.T @ change)
      size = np.linalg.norm(change) * np.linalg.norm(kept)
      self.assertLess(moved, 1e-6 * size)

  def test_alphaedit_preserves_the_keys_of_earlier_batches(self):
    case = Case('alphaedit')
    first, second = edits(seed=1), edits(seed=5)
    one, state, info = case.edit(first)
    _, _, model = case.naive(first, info.targets.targets.z)
    # Published code reads the keys again, on the model that was edited.
    prior = [
        naive_rows.keys(model, first, layer, case.slow, False).mean
        for layer in case.layers
    ]
    params = edited_lib.apply(case.pair.params, one)
    edited = dict(params=params, torch_model=model)
    two, _, info = case.edit(second, state=state, **edited)
    want, _, _ = case.naive(second, info.targets.targets.z, model, prior=prior)
    for a, b in zip(full(two), want):
      self.assertLess(editors.gap(a, b), 2e-3)
    forgetful, _, _ = case.edit(second, **edited)
    self.assertGreater(editors.gap(full(forgetful), full(two)), 1e-2)

  def test_alphaedits_bounded_state_is_all_earlier_keys(self):
    """Three batches in f64, each beside a solve with the keys themselves."""
    case, solve, seen = Case('alphaedit'), systems._solve_factors, []

    def spy(*given):
      seen.append((*given[1:], solve(*given)))
      return seen[-1][-1]

    with jax.enable_x64(True):
      params = jax.tree.map(lambda x: x.astype(jnp.float64), case.pair.params)
      state, earlier = case.state, [np.zeros((0, 48))] * 2
      sizes = lambda s: [np.shape(x) for x in jax.tree.leaves(s)]
      for seed in (1, 5, 6):
        with mock.patch.object(systems, '_solve_factors', spy):
          edited, after, _ = case.edit(edits(seed), params=params, state=state)
        self.assertEqual(sizes(after), sizes(state))
        for i, (rows, r, got) in enumerate(seen):
          want = ridge.ridge_update(
              jax.tree.map(jnp.asarray, state.preconditioners[i]),
              rows.keys,
              rows.residuals,
              active=rows.active,
              ridge=r,
              preserved=jnp.asarray(earlier[i]),
          )
          self.assertEqual(got.key.dtype, np.float64)
          product = lambda x: np.asarray(x.key.T @ x.value)
          self.assertLess(editors.gap(product(got), product(want)), 1e-9)
          earlier[i] = np.concatenate([earlier[i], rows.keys[rows.active]])
          whitened = preconditioner.whiten(
              jax.tree.map(jnp.asarray, state.preconditioners[i]),
              jnp.asarray(earlier[i]),
          )
          self.assertLess(
              editors.gap(after.previous[i], whitened.T @ whitened), 1e-9
          )
        params = edited_lib.apply(params, edited)
        state = after
        seen.clear()
    self.assertEqual([len(x) for x in earlier], [9, 9])

  def test_independent_edits_remember_nothing(self):
    case = Case('alphaedit')
    _, state, _ = case.edit(edits(), range(3))
    self.assertIs(state, case.state)
    # Nor do they preserve what a sequence before them has left, or each other's.
    _, state, _ = case.edit(edits(seed=5))
    some = edits()
    for group in ((0, 1, 2), (0, 1, 1)):
      with self.subTest(group=group):
        apart, after, _ = case.edit(some, group, state=state)
        self.assertIs(after, state)
        for number in set(group):
          mine = [edit for edit, g in zip(some, group) if g == number]
          alone, _, _ = case.edit(mine)
          gap = editors.gap(full(apart, number), full(alone))
          self.assertLess(gap, 1e-4)

  @parameterized.parameters(*WITH_ANYEDIT)
  def test_preserved_tokens_move_less(self, name):
    some, gone = texts(), {}
    for preserved in (True, False):
      case = Case(name, chunks=True)
      case.set(dataclasses.replace(case.recipe, preserved=preserved))
      edited, _, _ = case.edit(some)
      found = naive_rows.keys(
          case.pair.torch, some, case.layers[0], case.slow, True
      )
      gone[preserved] = np.linalg.norm(found.preserved @ full(edited)[0])
    self.assertLess(gone[True], gone[False])


class SoundTest(parameterized.TestCase):

  def test_a_ridge_does_not_depend_on_neighbours(self):
    case = Case('emmet', single_edit_ridge=0.0, ridge=1e9)
    some = edits()
    edited, _, _ = case.edit(some, (0, 0, 1))
    alone, _, _ = case.edit(some[2:], (0,))
    for found, group in ((edited, 1), (alone, 0)):
      self.assertGreater(np.linalg.norm(full(found, group)), 1e-2)
    self.assertLess(np.linalg.norm(full(edited, 0)), 1e-3)

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
    edited, _, info = Case('rome', chunks=True).edit(some)
    self.assertTrue(info.written.all())
    self.assertTrue(np.isfinite(full(edited)).all())
    np.testing.assert_allclose(info.targets.distance[-1], 0, atol=1e-2)

  @parameterized.parameters(None, [(0, 1)])
  def test_a_singular_system_writes_nothing(self, group):
    # The same key twice, asked for two different outputs without any ridge.
    case, (one, *_) = Case('rome'), edits(count=1)
    some = [one, dataclasses.replace(one, number=2)]
    with mock.patch.object(
        systems, '_solve_factors', lambda *_: bad((2,))
    ), mock.patch.object(
        systems, '_solve_groups', lambda _, rows, ridge: bad((1, 1), ridge)
    ):
      edited, _, info = case.edit(some, group)
    self.assertEqual(info.written.tolist(), [False, group is not None])
    for leaf in jax.tree.leaves(edited):
      self.assertTrue(np.isfinite(leaf).all())

  def test_batches_of_any_number_of_preserved_keys_give_factors(self):
    some = [
        dataclasses.replace(
            edit, rows=(np.resize(edit.rows[0], 40),), anchors=(39,), number=i
        )
        for i, edit in enumerate(texts())
    ]
    case = Case('memit', chunks=True)
    self.assertGreater(3 * 40, case.pair.spec.mlp_width)
    edited, report = case.check(self, some)
    self.assertEqual(edited.deltas[0].key.shape[1], len(report.edit))


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
    case.set(parity.shadowed(case.recipe, count))
    self.assertEqual([case.recipe.share(left) for left in (2, 1)], [share] * 2)
    case.slow = case.slow._replace(share=lambda left: share)
    some = edits(count=count)
    edited, _, info = case.edit(some)
    want, _, _ = case.naive(some, info.targets.targets.z)
    for a, b in zip(full(edited), want):
      self.assertLess(editors.gap(a, b), 2e-3)

  def test_alphaedit_takes_one_null_space_for_all_layers(self):
    case = Case('alphaedit')
    case.set(parity.shadowed(case.recipe, 2))
    self.assertEqual(case.recipe.shared_preconditioner, 1)
    edited, _, info = case.edit(edits(count=2))
    case.slow = case.slow._replace(share=lambda left: 1.0)
    grams = [case.moments.gram[1]] * 2
    want, _, _ = case.naive(edits(count=2), info.targets.targets.z, grams=grams)
    for a, b in zip(full(edited), want):
      self.assertLess(editors.gap(a, b), 2e-3)

  def test_too_many_edits_are_refused(self):
    with self.assertRaisesRegex(InputError, 'at most 2 a batch'):
      parity.shadowed(Case('memit').recipe, 3)


class BadSettingsTest(parameterized.TestCase):

  @parameterized.parameters('rome', 'r-rome')
  def test_rome_edits_one_layer(self, name):
    with self.assertRaisesRegex(InputError, 'ROME edits one layer'):
      METHODS[name].configure(layers=(1, 2)).recipe()

  def test_unknown_keys(self):
    with self.assertRaisesRegex(InputError, 'mean or plain'):
      METHODS['r-rome'].configure(rrome_keys='all')
    config = dataclasses.replace(METHODS['r-rome'].config(), keys='all')
    with self.assertRaisesRegex(InputError, 'mean or plain'):
      config.recipe()

  @parameterized.parameters((0, 0), (3, 3), (3, -1))
  def test_chunks_that_cannot_be(self, window, overlap):
    with self.assertRaises(InputError):
      anyedit(METHODS['memit'].config(), window, overlap)


if __name__ == '__main__':
  absltest.main()
