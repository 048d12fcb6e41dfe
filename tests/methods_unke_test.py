"""UnKE equals a plain torch loop, and does what every editor must do.

The oracle trains the parameters of one block of a transformers model with
torch's AdamW, through full forwards of unpadded texts.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

import hf_oracle
import jax
import jax.numpy as jnp
import naive_oracle
import numpy as np
import torch
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import UNEDITED
from jaxedit.edited import apply_model
from jaxedit.methods import (
    regression,
    unke,
)
from jaxedit.models import decoder, loading
from jaxedit.models import spec as spec_lib
from jaxedit.targets import engine
from jaxedit.testing import facts
from jaxedit.text import encoding
from jaxedit.text.chunking import Chunking
from jaxedit.types import InputError, Targets

LAYER = 1
EDITS = 4
VALUE = targets_lib.TargetConfig(
    steps=4, rate=0.1, decay=0.5, clamp=5.0, kl=0.0, threshold=0.0
)
CLOSE = 1e-8  # of changes of about 5e-3, in f64
WINDOW = Chunking(3)
STAGES = (
    engine.prefill,
    engine.assign,
    engine.optimize_until_done,
    regression.enter,
    regression.reach,
    regression.aim,
    regression.read,
    regression.advance,
    regression.fit_groups,
)
PLAIN = unke.Unke(
    layers=(LAYER,), value=VALUE, steps=6, rate=1e-3, side_by_side=2
)
CHUNKED = dataclasses.replace(PLAIN, chunks=WINDOW)
RECIPES = {'plain': PLAIN, 'chunked': CHUNKED}
every_recipe = parameterized.named_parameters((name, name) for name in RECIPES)


def edits(seed: int = 1, chunked: bool = False) -> list[encoding.EncodedEdit]:
  """Random questions with answers of 5 to 8 tokens, in chunks of 3."""
  some = facts.random_edits(
      EDITS, seed=seed, contexts=1, targets=(5, 8, 6), kl=False
  )
  if not chunked:
    return some
  cut = lambda n: tuple((b, min(b + 3, n)) for b in range(0, n, 3))
  return [dataclasses.replace(e, chunks=cut(len(e.target))) for e in some]


def preserved(seed: int = 0) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(2, 90, n).astype(np.int32) for n in (5, 12, 9)]


@functools.cache
def bench(recipe: unke.Unke, family: str = 'llama'):
  """(pair, editor, state) of a method on a small model."""
  pair = naive_oracle.pair(family)
  editor = unke.unke_editor(pair.spec, recipe)
  return pair, editor, editor.init(pair.params, preserved())


def random_targets(spec, params, some, *, layer, **ignored):
  """Stands for `targets_lib.autoregressive`: random wanted states."""
  del ignored
  rows = [np.concatenate([edit.rows[0], edit.target]) for edit in some]
  shape = regression.shape_of([rows], False)
  packed = regression.pack(rows, (4, *shape[1:]))
  h = np.asarray(regression.enter(spec, params, packed, stop=layer + 1))[0]
  found = []
  for r, edit in enumerate(some):
    layout = [edit.stage(k, 0).anchor for k in range(edit.stages)]
    z0 = h[packed.rows.index[r, layout]]
    rng = np.random.default_rng(int(edit.rows[0].sum()))
    z = z0 + 0.5 * rng.standard_normal(z0.shape).astype(z0.dtype)
    none, fine = np.zeros(len(z), z.dtype), np.isfinite(z).all(1)
    found.append(Targets(z, z0, none, none, none.astype(np.int32), fine))
  return found, targets_lib.Work()


def made(
    recipe,
    some,
    *,
    params=None,
    each=False,
    family='llama',
    optimized=False,
    double=False,
    **options,
):
  """(edited, info) of one batch; random states unless optimised.

  Adam turns rounding into whole steps where a gradient is zero, so that weights
  are compared in f64.
  """
  pair, editor, state = bench(recipe, family)
  call = editor.edit_independent if each else editor.edit
  given = pair.params if params is None else params
  with contextlib.ExitStack() as stack:
    if double:
      stack.enter_context(jax.enable_x64(True))
      given = jax.tree.map(lambda x: x.astype(jnp.float64), given)
    if not optimized:
      stack.enter_context(
          mock.patch.object(targets_lib, 'autoregressive', random_targets)
      )
    edited, _, info = call(given, state, some, **options)
  return edited, info


def changes(edited, index: int | None = None) -> dict[str, np.ndarray]:
  """path -> change of the only layer."""
  if index is not None:
    edited = edited_lib.select(edited, index)
  return {f'{d.site}/{d.leaf}': np.asarray(d.value)[0] for d in edited.deltas}


def gap(got: dict, want: dict) -> float:
  """Largest difference of an entry, over all parameters."""
  assert set(got) == set(want), (set(got), set(want))
  return max(np.abs(got[k] - want[k]).max() for k in got)


class Torch:
  """The block of a model, trained by torch."""

  def __init__(self, family: str, layer: int, double: bool = False):
    model = copy.deepcopy(naive_oracle.pair(family).torch)
    self.model = model.double() if double else model
    self.block = naive_oracle.block(self.model, layer)
    self.spec, self.layer = naive_oracle.pair(family).spec, layer

  def out(self, ids) -> torch.Tensor:
    """Output [T, D] of the block."""
    seen = []
    outputs = lambda h: seen.append(h[0]) or h
    with naive_oracle.hooked(self.block, outputs):
      naive_oracle.run(self.model, ids)
    return seen[0]

  def padded(self, texts, pad: int) -> torch.Tensor:
    """Output [R, T, D] on right-padded texts, padding included."""
    longest, seen = max(map(len, texts)), []
    ids = torch.full([len(texts), longest], pad)
    mask = torch.zeros([len(texts), longest], dtype=torch.int64)
    for r, text in enumerate(texts):
      ids[r, : len(text)], mask[r, : len(text)] = torch.tensor(text), 1
    outputs = lambda h: seen.append(h) or h
    positions = torch.arange(longest)[None].expand(len(texts), -1)
    with naive_oracle.hooked(self.block, outputs):
      self.model(
          input_ids=ids,
          attention_mask=mask,
          position_ids=positions,
          use_cache=False,
      )
    return seen[0]

  def fit(self, texts, goals, recipe, pads: int | None = None):
    """Trains on texts, where goals[t] is {column: wanted state}."""

    def run(some):
      if pads is not None:
        return self.padded(some, pads)
      return torch.cat([self.out(ids) for ids in some])

    with torch.no_grad():
      outputs, want = run(preserved()), run(texts)
      starts = np.cumsum([0, *map(len, texts)])
      for t, wanted in enumerate(goals):
        for column, z in wanted.items():
          place = (t, column) if pads is not None else starts[t] + column
          want[place] = torch.tensor(z).to(want.dtype)
    groups = ([], [])
    for name, parameter in self.block.named_parameters():
      parameter.requires_grad_(True)
      norm = 'layernorm' in name or name.startswith('ln_')
      groups[norm].append(parameter)
    adam = torch.optim.AdamW(
        [
            {'params': groups[0], 'weight_decay': recipe.decay},
            {'params': groups[1], 'weight_decay': 0.0},
        ],
        lr=recipe.rate,
        eps=1e-8,
    )
    before = self.leaves()
    mse = torch.nn.functional.mse_loss
    for _ in range(recipe.steps):
      loss = mse(run(preserved()), outputs) + mse(run(texts), want)
      adam.zero_grad()
      loss.backward()
      adam.step()
    after = self.leaves()
    return {name: after[name] - before[name] for name in after}

  def leaves(self) -> dict[str, np.ndarray]:
    """The block's parameters as canonical leaves."""
    with tempfile.TemporaryDirectory() as folder:
      hf_oracle.save(copy.deepcopy(self.model).float(), folder)
      params = loading.load_model(folder, 'float32').params
    return {
        path.removeprefix('layers/'): np.asarray(
            loading.get_leaf(params, path), np.float64
        )[self.layer]
        for path in spec_lib.param_shapes(self.spec)
        if path.startswith('layers/')
    }


def goals(some, info, chosen=None) -> list[dict[int, np.ndarray]]:
  """Wanted states of every text by column."""
  found, at = [], 0
  for edit in some:
    layout = [edit.stage(k, 0).anchor for k in range(edit.stages)]
    states = info.targets.z[at : at + len(layout)]
    found.append(dict(zip(layout, states)))
    at += len(layout)
  return found


def texts(some, recipe) -> list[np.ndarray]:
  if recipe.chunks is None:
    return [edit.rows[0] for edit in some]
  return [np.concatenate([edit.rows[0], edit.target]) for edit in some]


def seen_by_loss(found: dict) -> dict:
  """Without the bias of keys, whose gradient is zero but for rounding."""
  return {k: v for k, v in found.items() if k != 'attn/k/bias'}


class OracleTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('chunked', 'llama', CHUNKED),
      ('parallel', 'gptj', CHUNKED),
      ('biases', 'gpt2', PLAIN),
      ('pads', 'llama', dataclasses.replace(CHUNKED, pads=True, pad_id=7)),
  )
  def test_torch(self, family, recipe):
    recipe = dataclasses.replace(recipe, steps=5, rate=2e-4)
    some = edits(chunked=recipe.chunks is not None)
    edited, info = made(recipe, some, family=family)
    pads = recipe.pad_id if recipe.pads else None
    want = Torch(family, LAYER).fit(
        texts(some, recipe), goals(some, info), recipe, pads
    )
    got = changes(edited)
    self.assertSetEqual(set(got), set(want))
    got, want = seen_by_loss(got), seen_by_loss(want)
    self.assertLess(gap(got, want), 1e-5)
    self.assertGreater(min(np.abs(x).max() for x in want.values()), 1e-4)

  def test_torch_in_f64(self):
    recipe = dataclasses.replace(CHUNKED, steps=20, rate=2e-4)
    some = edits(chunked=True)
    pair, rows = naive_oracle.pair('gpt2'), texts(some, recipe)
    rng = np.random.default_rng(0)
    wanted = [{len(r) - 2: rng.standard_normal(pair.spec.width)} for r in rows]
    want = Torch('gpt2', LAYER, double=True).fit(rows, wanted, recipe)
    with jax.enable_x64(True):
      params = jax.tree.map(lambda x: x.astype(jnp.float64), pair.params)
      sides = []
      for group, change in ((rows, wanted), (preserved(), [])):
        packed = regression.pack(group, regression.shape_of([group], False))
        h = regression.enter(pair.spec, params, packed, stop=LAYER)
        out = regression.enter(pair.spec, params, packed, stop=LAYER + 1)
        for t, goal in enumerate(change):
          for column, z in goal.items():
            out = out.at[0, packed.rows.index[t, column]].set(z)
        sides.append(regression.Side(h, out, packed))
      rule = regression.Rule(recipe.steps, recipe.rate, recipe.decay)
      block = decoder.layer_params(params, LAYER)
      edited = jax.tree.map(lambda x: jnp.asarray(x)[None], sides[0])
      change, sound = regression.fit_groups(
          pair.spec, block, edited, sides[1], rule
      )
      self.assertTrue(bool(sound.all()))
      got = {
          '/'.join(p.key for p in path): np.asarray(x)[0]
          for path, x in jax.tree_util.tree_leaves_with_path(change)
      }
    for x in got.values():
      self.assertEqual(x.dtype, np.float64)
    # The oracle's weights are read through f32: that is all that is left.
    self.assertLess(gap(got, want), 2e-7)


class EditorTest(parameterized.TestCase):

  def test_report(self):
    some = edits(chunked=True)
    edited, info = made(CHUNKED, some, optimized=True, plan=common_frame())
    states = sum(e.stages for e in some)
    number = [i for i, e in enumerate(some) for _ in range(e.stages)]
    self.assertEqual(info.edit.tolist(), number)
    self.assertEqual(info.targets.z.shape, (states, 32))
    self.assertEqual(info.distance.shape, (2, states))
    self.assertTrue(info.written.all())
    np.testing.assert_allclose(info.distance[0], 1, atol=1e-4)
    self.assertLess(info.distance[1].mean(), info.distance[0].mean())
    self.assertSetEqual(set(info.seconds), {'optimize', 'insert'})
    leaves = {
        path.removeprefix('layers/')
        for path in spec_lib.param_shapes(naive_oracle.pair('llama').spec)
        if path.startswith('layers/')
    }
    self.assertSetEqual(set(changes(edited)), leaves)

  @every_recipe
  def test_the_edited_model_has_the_states_reported(self, name):
    some = edits(chunked=name == 'chunked')
    edited, info = made(RECIPES[name], some)
    pair = naive_oracle.pair('llama')
    merged = edited_lib.apply(pair.params, edited)
    rows = texts(some, RECIPES[name])
    packed = regression.pack(rows, regression.shape_of([rows], False))
    h = np.asarray(regression.enter(pair.spec, merged, packed, stop=LAYER + 1))[
        0
    ]
    z, z0, at = info.targets.z, info.targets.z0, 0
    for t, goal in enumerate(goals(some, info)):
      for column in goal:
        now = h[packed.rows.index[t, column]]
        left = np.linalg.norm(z[at] - now) / np.linalg.norm(z[at] - z0[at])
        self.assertAlmostEqual(info.distance[1, at], left, delta=1e-4)
        at += 1

  def test_params_are_untouched(self):
    pair, some = naive_oracle.pair('llama'), edits(5, True)
    leaves = jax.tree.leaves(pair.params)
    before = [np.array(x) for x in leaves]
    edited, _ = made(CHUNKED, some)
    made(CHUNKED, some, each=True)
    edited_lib.apply(pair.params, edited)
    for leaf, now, old in zip(leaves, jax.tree.leaves(pair.params), before):
      self.assertIs(now, leaf)
      np.testing.assert_array_equal(now, old)

  def test_second_batch_does_not_compile(self):
    plan, recipe = common_frame(), CHUNKED
    first, second = (edits(seed, True) for seed in (1, 6))
    for each in (False, True):
      run = functools.partial(made, each=each, plan=plan, optimized=True)
      run(recipe, first)
      sizes = [stage._cache_size() for stage in STAGES]
      run(recipe, second)
      self.assertEqual([stage._cache_size() for stage in STAGES], sizes)
      # Nor do other settings.
      run(dataclasses.replace(recipe, rate=3e-3, steps=2), second)
      self.assertEqual([stage._cache_size() for stage in STAGES], sizes)

  @every_recipe
  def test_empty_batch_is_identity(self, name):
    pair, editor, state = bench(RECIPES[name])
    _, full = made(RECIPES[name], edits(chunked=name == 'chunked'))
    for call in (editor.edit, editor.edit_independent):
      edited, after, info = call(pair.params, state, [])
      self.assertIs(after, state)
      self.assertIs(edited_lib.apply(pair.params, edited), pair.params)
      self.assertEqual(info.distance.shape, (2, 0))
      self.assertEqual(
          jax.tree.map(lambda x: x.dtype, info.targets),
          jax.tree.map(lambda x: x.dtype, full.targets),
      )

  def test_company_does_not_matter(self):
    # Edits side by side, in whatever order, are edits alone.
    some = edits(chunked=True)
    apart, info = made(CHUNKED, some, each=True, double=True)
    self.assertEqual(apart.deltas[0].value.shape[:2], (1, EDITS))
    for i, edit in enumerate(some):
      alone, one = made(CHUNKED, [edit], double=True)
      self.assertLess(gap(changes(apart, i), changes(alone)), CLOSE)
      np.testing.assert_allclose(
          info.distance[:, info.edit == i], one.distance, atol=CLOSE
      )
    order = [3, 1, 0, 2]
    turned, _ = made(CHUNKED, [some[i] for i in order], double=True)
    together, _ = made(CHUNKED, some, double=True)
    self.assertLess(gap(changes(turned), changes(together)), CLOSE)
    total = {
        k: sum(changes(apart, i)[k] for i in range(EDITS))
        for k in changes(apart, 0)
    }
    self.assertGreater(gap(total, changes(together)), 1e-3)

  def test_groups(self):
    some, group = edits(chunked=True), [2, 0, 2, 2]
    groups, info = made(CHUNKED, some, each=True, group=group, double=True)
    self.assertEqual(groups.deltas[0].value.shape[:2], (1, 3))
    for number in (0, 2):
      mine = [e for e, g in zip(some, group) if g == number]
      want, one = made(CHUNKED, mine, double=True)
      self.assertLess(gap(changes(groups, number), changes(want)), CLOSE)
      here = np.isin(info.edit, [i for i in range(4) if group[i] == number])
      np.testing.assert_allclose(
          info.distance[:, here], one.distance, atol=CLOSE
      )
    for change in changes(groups, 1).values():
      np.testing.assert_array_equal(change, 0)
    for wrong in ([0, 1], [0, 1, 2, -1]):
      with self.assertRaisesRegex(InputError, 'group'):
        made(CHUNKED, some, each=True, group=wrong)

  def test_padding(self):
    # More room changes nothing.
    some, tight = edits(chunked=True), regression.shape_of
    got, _ = made(CHUNKED, some, double=True)
    roomy = lambda *args: tuple(2 * n for n in tight(*args))
    with mock.patch.object(regression, 'shape_of', roomy):
      want, _ = made(CHUNKED, some, double=True)
    self.assertLess(gap(changes(got), changes(want)), CLOSE)
    # Padding that is counted does.
    padded, _ = made(dataclasses.replace(CHUNKED, pads=True), some)
    self.assertGreater(gap(changes(padded), changes(got)), 1e-3)

  def test_sequential(self):
    pair = naive_oracle.pair('llama')
    first, second = (edits(seed, True) for seed in (1, 6))
    one, _ = made(CHUNKED, first)
    merged = edited_lib.apply(pair.params, one)
    two, info = made(CHUNKED, second, params=merged)
    alone, _ = made(CHUNKED, second)
    self.assertTrue(info.written.all())
    self.assertGreater(gap(changes(two), changes(alone)), 1e-3)
    both = edited_lib.apply(pair.params, edited_lib.add(one, two))
    for a, b in zip(
        jax.tree.leaves(both),
        jax.tree.leaves(edited_lib.apply(merged, two)),
    ):
      np.testing.assert_allclose(a, b, atol=1e-6)

  def test_several_layers_share_what_is_missing(self):
    recipe = dataclasses.replace(PLAIN, layers=(0, 2), steps=30)
    edited, info = made(recipe, edits())
    self.assertEqual(edited.deltas[0].layers, (0, 2))
    self.assertEqual(info.distance.shape, (3, EDITS))
    self.assertTrue((np.diff(info.distance.mean(1)) < -0.02).all())
    self.assertLess(info.distance[2].max(), 0.2)

  def test_delta_goes_to_disk_and_back(self):
    pair, some = naive_oracle.pair('llama'), edits(chunked=True)
    for each in (False, True):
      edited, _ = made(CHUNKED, some, each=each)
      with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'delta.safetensors'
        edited_lib.save(path, edited, {'model_hash': 'ab' * 32})
        loaded, _ = edited_lib.load(path)
      self.assertEqual(
          [(d.layers, d.site, d.leaf) for d in loaded.deltas],
          [(d.layers, d.site, d.leaf) for d in edited.deltas],
      )
      one = lambda x: edited_lib.select(x, 2) if each else x
      for a, b in zip(
          jax.tree.leaves(edited_lib.apply(pair.params, one(loaded))),
          jax.tree.leaves(edited_lib.apply(pair.params, one(edited))),
      ):
        np.testing.assert_array_equal(a, b)

  def test_lazy_equals_merged(self):
    pair = naive_oracle.pair('gpt2')
    edited, _ = made(PLAIN, edits(), family='gpt2')
    tokens = np.random.default_rng(0).integers(2, 90, (4, 9)).astype(np.int32)
    rest = tokens, decoder.token_layout(np.ones(tokens.shape, bool))
    run = jax.jit(apply_model, static_argnums=0)
    lazy = run(pair.spec, pair.params, edited, *rest)
    merged = edited_lib.apply(pair.params, edited)
    dense = run(pair.spec, merged, UNEDITED, *rest)
    np.testing.assert_allclose(lazy, dense, atol=1e-4)
    base = run(pair.spec, pair.params, UNEDITED, *rest)
    self.assertGreater(np.abs(lazy - base).max(), 1e-2)

  def test_half_precision_and_nothing_to_preserve(self):
    pair, editor, _ = bench(PLAIN)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.params)
    state = editor.init(half, [])
    with mock.patch.object(targets_lib, 'autoregressive', random_targets):
      edited, _, info = editor.edit(half, state, edits())
    self.assertTrue(info.written.all())
    for delta in edited.deltas:
      self.assertEqual(delta.value.dtype, jnp.float32)
      self.assertGreater(np.abs(delta.value).max(), 1e-3)
    self.assertLess(info.distance[1].mean(), info.distance[0].mean())

  @parameterized.named_parameters(
      # The state of a question is not finite, or that of a last answer token
      # alone, which no label stands behind.
      ('question', True),
      ('end_of_answer', False),
  )
  def test_an_edit_that_is_not_finite_is_left_out(self, in_question):
    pair, some, bad = naive_oracle.pair('llama'), edits(chunked=True), 1
    token = pair.spec.vocab - 1
    table = pair.params['embed']['embedding'].at[token].set(jnp.nan)
    params = {**pair.params, 'embed': {'embedding': table}}
    spoilt, good = list(some), [i for i in range(EDITS) if i != bad]
    if in_question:
      row = some[bad].rows[0].copy()
      row[-1] = token
      spoilt[bad] = dataclasses.replace(some[bad], rows=(row,))
    else:
      target = some[bad].target.copy()
      target[-1] = token
      spoilt[bad] = dataclasses.replace(some[bad], target=target)
    edited, info = made(CHUNKED, spoilt, params=params, double=True)
    self.assertEqual(info.written.tolist(), [i != bad for i in range(EDITS)])
    want, other = made(CHUNKED, [some[i] for i in good], double=True)
    self.assertLess(gap(changes(edited), changes(want)), CLOSE)
    kept = info.edit != bad
    np.testing.assert_allclose(
        info.distance[:, kept], other.distance, atol=CLOSE
    )
    self.assertTrue(np.isnan(info.distance[:, ~kept]).all())
    apart, info = made(CHUNKED, spoilt, params=params, each=True, double=True)
    clean, _ = made(CHUNKED, some, each=True, double=True)
    self.assertEqual(info.written.tolist(), [i != bad for i in range(EDITS)])
    for i in range(EDITS):
      want = changes(clean, i)
      if i == bad:
        want = {k: 0 * v for k, v in want.items()}
      self.assertLess(gap(changes(apart, i), want), CLOSE)

  def test_a_fit_that_is_not_finite_changes_nothing(self):
    recipe = dataclasses.replace(PLAIN, rate=1e30)
    edited, info = made(recipe, edits())
    self.assertFalse(info.written.any())
    for change in changes(edited).values():
      np.testing.assert_array_equal(change, 0)

  def test_what_cannot_be_used_is_refused(self):
    spec = naive_oracle.pair('llama').spec
    with self.assertRaisesRegex(InputError, 'layers'):
      unke.unke_editor(spec, dataclasses.replace(PLAIN, layers=(3,)))
    with self.assertRaisesRegex(InputError, 'side_by_side is 0'):
      unke.unke_editor(spec, dataclasses.replace(PLAIN, side_by_side=0))
    with self.assertRaisesRegex(InputError, 'record 1.*chunks'):
      made(PLAIN, edits(chunked=True))
    pair, editor, _ = bench(PLAIN)
    long = np.zeros(spec.max_positions + 1, np.int32)
    with self.assertRaisesRegex(InputError, '(?s)text 2 .*tokens.*text 3 .*97'):
      editor.init(pair.params, [preserved()[0], long, np.array([97])])
    table = pair.params['embed']['embedding'].at[5].set(jnp.nan)
    params = {**pair.params, 'embed': {'embedding': table}}
    with self.assertRaisesRegex(InputError, 'text 2 .*not finite'):
      editor.init(params, [np.array([3]), np.array([5, 6])])


def common_frame():
  """One frame for all batches."""
  some = [e for seed in (1, 6) for e in edits(seed, True)]
  return plan_lib.plan_shapes(some, slots=4, batch=EDITS)


if __name__ == '__main__':
  absltest.main()
