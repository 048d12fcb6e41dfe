"""What every closed-form editor must do, and MEMIT against its slow version.

A new method is one more row of `RECIPES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import naive_oracle
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import UNEDITED
from jaxedit.edited import apply_model
from jaxedit.methods import closed_form, memit
from jaxedit.methods.closed_form import (
    sweep,
    systems,
)
from jaxedit.models import decoder
from jaxedit.targets import engine
from jaxedit.testing import facts
from jaxedit.text import encoding
from jaxedit.types import InputError, Targets

WEIGHT = 0.1
RECIPES: dict[str, Callable[..., closed_form.Recipe]] = {
    'memit': functools.partial(memit.memit, moment_weight=WEIGHT),
}
VALUE = targets_lib.TargetConfig(
    steps=5, rate=0.1, decay=0.5, clamp=5.0, kl=0.0625, threshold=0.0
)
LAYERS = (0, 1)
EDITS, SLOTS = 4, 8
SEEDS = (1, 5, 6, 7)
STAGES = (
    engine.prefill,
    engine.assign,
    engine.optimize_until_done,
    sweep._enter,
    sweep._to_mlp,
    sweep._read_keys,
    sweep._measure,
    sweep._predict_final,
    sweep._through_mlp,
    systems._solve_factors,
    systems._solve_groups,
)
every_recipe = parameterized.named_parameters((name, name) for name in RECIPES)
run = jax.jit(apply_model, static_argnums=0)


def edits(seed: int = 1, **options: Any) -> list[encoding.EncodedEdit]:
  # Targets of one length: an edit alone then has the shape of its batch.
  options = {'seed': seed, 'contexts': 2, 'targets': (3,)} | options
  return facts.random_edits(EDITS, **options)


def plan(
    some: Sequence[encoding.EncodedEdit], slots: int
) -> plan_lib.BatchPlan:
  """One frame for all batches of a test."""
  if len(some[0].rows) == len(edits()[0].rows):
    some = [edit for seed in SEEDS for edit in edits(seed)]
  return plan_lib.plan_shapes(some, slots=slots, batch=EDITS)


class Bench(NamedTuple):
  """One method on a small model, and what it made of one batch."""

  pair: naive_oracle.Pair
  editor: Any
  state: Any
  edited: Any
  info: Any

  @property
  def params(self):
    return self.pair.params

  def edit(self, some, params=None, each=False, slots=SLOTS):
    call = self.editor.edit_independent if each else self.editor.edit
    given = self.params if params is None else params
    shapes = plan(some, slots) if some else None
    edited, state, info = call(given, self.state, some, plan=shapes)
    return Bench(self.pair, self.editor, state, edited, info)

  def kernels(self, edited=None) -> np.ndarray:
    return np.asarray(edited_lib.full((edited or self.edited).deltas[0]))


@functools.cache
def bench(name: str) -> Bench:
  """The bench of a method, with the common batch edited."""
  pair = naive_oracle.pair('llama')
  editor = closed_form.closed_form(
      pair.spec, RECIPES[name](LAYERS, value=VALUE)
  )
  moments = facts.random_moments(pair.spec, LAYERS, seed=0)
  state = editor.init(pair.params, moments)
  return Bench(pair, editor, state, None, None).edit(edits())


def error(got: np.ndarray, want: np.ndarray) -> float:
  """Relative difference in the Frobenius norm."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def poisoned(
    bench: Bench, some: Sequence[encoding.EncodedEdit], bad: Sequence[int]
) -> tuple[Any, list[encoding.EncodedEdit]]:
  """Parameters with one token that is not finite, and edits that use it."""
  token = bench.pair.spec.vocab - 1
  table = bench.params['embed']['embedding'].at[token].set(jnp.nan)
  params = {**bench.params, 'embed': {'embedding': table}}
  some = list(some)
  for i in bad:
    rows = tuple(r.copy() for r in some[i].rows)
    for row, anchor in zip(rows, some[i].anchors):
      row[anchor] = token
    some[i] = dataclasses.replace(some[i], rows=rows)
  return params, some


class Compiles:
  """Counts compilations of anything while open."""

  _EVENT = '/jax/core/compile/backend_compile_duration'

  def __init__(self):
    self.count = 0

  def __call__(self, event: str, seconds: float, **details: Any) -> None:
    del seconds, details
    self.count += event == self._EVENT

  @contextlib.contextmanager
  def return_kv(self):
    jax.monitoring.register_event_duration_secs_listener(self)
    try:
      yield self
    finally:
      jax.monitoring.unregister_event_duration_listener(self)


class BatteryTest(parameterized.TestCase):

  @every_recipe
  def test_params_are_untouched(self, name):
    b = bench(name)
    leaves = jax.tree.leaves(b.params)
    before = [np.array(x) for x in leaves]
    b.edit(edits(5))
    b.edit(edits(5), each=True)
    for leaf, now, old in zip(leaves, jax.tree.leaves(b.params), before):
      self.assertIs(now, leaf)
      np.testing.assert_array_equal(now, old)

  @every_recipe
  def test_same_batch_same_bits(self, name):
    again = bench(name).edit(edits())
    for a, b in zip(
        jax.tree.leaves(again.edited), jax.tree.leaves(bench(name).edited)
    ):
      np.testing.assert_array_equal(a, b)

  @parameterized.named_parameters(
      (f'{name}_each_{each}', name, each)
      for name in RECIPES
      for each in (False, True)
  )
  def test_second_batch_does_not_compile(self, name, each):
    b = bench(name)
    b.edit(edits(), each=each)
    with Compiles().return_kv() as compiles:
      b.edit(edits(6), each=each)
      self.assertEqual(compiles.count, 0)
      jax.jit(lambda x: x + len(name))(jnp.ones(3))
      self.assertGreater(compiles.count, 0, 'the counter counts nothing')
    # Fewer edits leave slots empty: only the delta has another shape.
    sizes = [stage._cache_size() for stage in STAGES]
    b.edit(edits(7)[1:], each=each)
    self.assertEqual([stage._cache_size() for stage in STAGES], sizes)

  @every_recipe
  def test_order_of_edits_does_not_matter(self, name):
    b, order = bench(name), np.array([3, 1, 0, 2])
    got = b.edit([edits()[i] for i in order])
    self.assertLess(error(got.kernels(), b.kernels()), 1e-4)
    np.testing.assert_allclose(
        got.info.targets.z, b.info.targets.z[order], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        got.info.distance, b.info.distance[:, order], atol=1e-4
    )

  @every_recipe
  def test_empty_batch_is_identity(self, name):
    b = bench(name)
    for each in (False, True):
      got = b.edit([], each=each)
      self.assertIs(got.state, b.state)
      self.assertIs(edited_lib.apply(b.params, got.edited), b.params)
      self.assertEqual(
          [x.shape[-1] for x in (got.info.written, got.info.distance)], [0, 0]
      )
      self.assertEqual(
          jax.tree.map(lambda x: x.dtype, got.info.targets),
          jax.tree.map(lambda x: x.dtype, b.info.targets),
      )

  @every_recipe
  def test_low_rank_equals_merged(self, name):
    b = bench(name)
    delta = b.edited.deltas[0]
    self.assertEqual(delta.layers, LAYERS)
    self.assertEqual(
        delta.key.shape, (len(LAYERS), EDITS, b.pair.spec.mlp_width)
    )
    self.assertEqual(delta.value.shape, (len(LAYERS), EDITS, b.pair.spec.width))
    tokens = np.random.default_rng(0).integers(2, 90, (4, 9)).astype(np.int32)
    rest = tokens, decoder.token_layout(np.ones(tokens.shape, bool))
    lazy = run(b.pair.spec, b.params, b.edited, *rest)
    merged = edited_lib.apply(b.params, b.edited)
    dense = run(b.pair.spec, merged, UNEDITED, *rest)
    np.testing.assert_allclose(lazy, dense, atol=1e-4)
    base = run(b.pair.spec, b.params, UNEDITED, *rest)
    self.assertGreater(np.abs(lazy - base).max(), 1e-2)

  @every_recipe
  def test_edit_each_is_every_edit_alone(self, name):
    b = bench(name)
    apart = b.edit(edits(), each=True)
    self.assertEqual(apart.edited.deltas[0].key.shape[:3], (2, EDITS, 1))
    for i, edit in enumerate(edits()):
      alone = b.edit([edit])
      got = apart.kernels(edited_lib.select(apart.edited, i))
      self.assertLess(error(got, alone.kernels()), 1e-4)
      np.testing.assert_allclose(
          apart.info.distance[:, i], alone.info.distance[:, 0], atol=1e-4
      )
    # Edits of one batch see each other, so together they differ.
    total = sum(
        apart.kernels(edited_lib.select(apart.edited, i)) for i in range(EDITS)
    )
    self.assertGreater(error(total, b.kernels()), 1e-2)

  @every_recipe
  def test_dtype_is_kept(self, name):
    b = bench(name)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), b.params)
    found, _ = targets_lib.optimize(
        b.pair.spec, half, edits(), layer=LAYERS[-1], config=VALUE
    )
    self.assertEqual((found.z.dtype, found.loss.dtype), (jnp.float32,) * 2)
    with mock.patch.object(targets_lib, 'optimize', random_targets):
      want, got = (b.edit(edits(), params) for params in (b.params, half))
    for array in jax.tree.leaves(got.edited):
      self.assertEqual(array.dtype, jnp.float32)
    merged = edited_lib.apply(half, got.edited)
    for old, new in zip(jax.tree.leaves(half), jax.tree.leaves(merged)):
      self.assertEqual((new.dtype, new.shape), (old.dtype, old.shape))
    # Weights and keys rounded to bf16 move changes by about 1%.
    self.assertLess(error(got.kernels(), want.kernels()), 0.1)

  @every_recipe
  def test_distance_falls(self, name):
    for each in (False, True):
      distance = near_identity(bench(name), each)
      self.assertEqual(distance.shape, (len(LAYERS) + 1, EDITS))
      np.testing.assert_allclose(distance[0], 1, atol=1e-3)
      self.assertTrue((np.diff(distance, axis=0) < 0).all(), distance)
      self.assertLess(distance[-1].max(), 0.1)

  @every_recipe
  def test_an_edit_that_is_not_finite_is_left_out(self, name):
    b, bad = bench(name), 1
    params, some = poisoned(b, edits(), [bad])
    good = [i for i in range(EDITS) if i != bad]
    got = b.edit(some, params)
    written = [i != bad for i in range(EDITS)]
    self.assertEqual(got.info.written.tolist(), written)
    self.assertEqual(got.edited.deltas[0].key.shape[1], EDITS - 1)
    want = b.edit([edits()[i] for i in good])
    self.assertLess(error(got.kernels(), want.kernels()), 1e-4)
    np.testing.assert_allclose(
        got.info.distance[:, good], want.info.distance, atol=1e-4
    )

    apart = b.edit(some, params, each=True)
    self.assertEqual(apart.info.written.tolist(), written)
    clean = b.edit(edits(), each=True).edited
    for i in range(EDITS):
      one = apart.kernels(edited_lib.select(apart.edited, i))
      want = clean.deltas[0].key[:, i].mT @ clean.deltas[0].value[:, i]
      np.testing.assert_allclose(one, want if i in good else 0, atol=1e-6)

  @every_recipe
  def test_no_finite_edit_changes_nothing(self, name):
    b = bench(name)
    params, some = poisoned(b, edits(), range(EDITS))
    got = b.edit(some, params)
    self.assertFalse(got.info.written.any())
    np.testing.assert_array_equal(got.kernels(), 0)

  @every_recipe
  def test_moments_that_cannot_be_used_are_refused(self, name):
    b = bench(name)
    moments = facts.random_moments(b.pair.spec, LAYERS, seed=0)
    gram = moments.gram.copy()
    gram[1] = 0
    broken = dataclasses.replace(moments, gram=gram)
    with self.assertRaisesRegex(InputError, 'layer 1 .*collect more tokens'):
      b.editor.init(b.params, broken)
    few = facts.random_moments(b.pair.spec, LAYERS[:1], seed=0)
    with self.assertRaisesRegex(InputError, 'no second moments of layer 1'):
      b.editor.init(b.params, few)

  @parameterized.parameters(((),), ((0, 3),), ((-1,),), ((1, 0),), ((1, 1),))
  def test_layers_that_cannot_be_edited_are_refused(self, layers):
    spec = naive_oracle.pair('llama').spec
    for recipe in RECIPES.values():
      with self.assertRaisesRegex(InputError, '^layers'):
        closed_form.closed_form(spec, recipe(layers))


_lower = jax.jit(targets_lib.lower, static_argnames=('spec', 'layer'))


def random_targets(spec, params, some, *, layer, scale=0.5, **ignored):
  """Stands for `targets_lib.optimize`: a random wanted state for every edit."""
  del ignored
  z0, moves = [], []
  for edit in some:
    row, anchor = edit.rows[0], edit.anchors[0]
    tokens = np.zeros([1, 16], np.int32)
    tokens[0, : len(row)] = row
    layout = decoder.token_layout(np.arange(16)[None] < len(row))
    h = _lower(spec, params, tokens, layout, layer=layer)
    z0.append(np.asarray(h)[0, anchor])
    rng = np.random.default_rng(int(row.sum()))
    moves.append(rng.standard_normal(h.shape[-1]))
  z0 = np.stack(z0)
  z = z0 + scale * np.stack(moves).astype(np.float32)
  none = np.zeros(len(z), np.float32)
  targets = Targets(z, z0, none, none, none.astype(np.int32), none == 0)
  return targets, targets_lib.Work()


def near_identity(b: Bench, each: bool) -> np.ndarray:
  """Distances where next to nothing stands in the way of writing.

  Blocks add little to the residual, moments are weak, the bare prompt is the
  only key.
  """
  layers = jax.tree.map(lambda x: x, b.params['layers'])
  for part, site in (('attn', 'out'), ('mlp', 'down')):
    layers[part][site] = {'kernel': layers[part][site]['kernel'] * 0.02}
  weak = facts.random_moments(b.pair.spec, LAYERS, seed=0, scale=1e-3)
  b = b._replace(state=b.editor.init(b.params, weak))
  small = functools.partial(random_targets, scale=0.01)
  with mock.patch.object(targets_lib, 'optimize', small):
    params = {**b.params, 'layers': layers}
    return b.edit(edits(contexts=1), params, each=each).info.distance


class MemitTest(parameterized.TestCase):
  """The oracle is naive_oracle.memit, which writes weights and solves F x F."""

  def _run(self, family, layers, some, slots=SLOTS, **changes):
    pair = naive_oracle.pair(family, **changes)
    recipe = memit.memit(layers, moment_weight=WEIGHT, value=VALUE)
    editor = closed_form.closed_form(pair.spec, recipe)
    moments = facts.random_moments(pair.spec, layers, seed=2, scale=0.3)
    state = editor.init(pair.params, moments)
    edited, _, info = editor.edit(
        pair.params, state, some, plan=plan_lib.plan_shapes(some, slots=slots)
    )
    want, distance = naive_oracle.memit(
        pair.torch,
        some,
        layers,
        z=info.targets.z,
        grams=moments.gram,
        weight=WEIGHT,
    )
    got = np.asarray(edited_lib.full(edited.deltas[0]))
    for a, b in zip(got, want):
      self.assertLess(error(a, b), 1e-3)
    np.testing.assert_allclose(info.distance, distance, atol=1e-3)
    return info

  def test_whole(self):
    info = self._run('llama', LAYERS, edits())
    self.assertTrue((info.targets.loss > 0).all())

  def test_every_layer_takes_an_even_share(self):
    distance = near_identity(bench('memit'), False)
    np.testing.assert_allclose(
        distance, np.array([[1.0], [0.5], [0.0]]) + np.zeros(EDITS), atol=0.1
    )

  @parameterized.named_parameters(
      ('gap_and_last_layer', 'llama', (0, 2), 2, SLOTS),
      ('one_layer', 'llama', (1,), 2, SLOTS),
      ('one_context', 'llama', (1, 2), 1, SLOTS),
      ('three_contexts_in_tiles', 'llama', (0, 1, 2), 3, 3),
      ('parallel', 'gptj', (0, 2), 2, SLOTS),
      ('learned_positions', 'gpt2', (1, 2), 2, SLOTS),
  )
  def test_insertion(self, family, layers, contexts, slots):
    some = edits(contexts=contexts)
    with mock.patch.object(targets_lib, 'optimize', random_targets):
      self._run(family, layers, some, slots)


if __name__ == '__main__':
  absltest.main()
