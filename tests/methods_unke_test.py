"""UnKE equals a plain torch loop, whatever the company of an edit.

The oracle trains the parameters of one block of a transformers model with
torch's AdamW, through full forwards of unpadded texts.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
from unittest import mock

import editors
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
from jaxedit.methods import regression
from jaxedit.methods.base import EditBatch, PadToken, PreservedTexts, Run
from jaxedit.methods.unke import METHOD, UnkeConfig, unke
from jaxedit.models import decoder, loading
from jaxedit.models import spec as spec_lib
from jaxedit.targets import engine
from jaxedit.testing import facts
from jaxedit.text import encoding
from jaxedit.text.chunking import Chunking
from jaxedit.types import InputError

LAYER = 1
EDITS = 4
TARGET = targets_lib.TargetConfig(
    steps=4, rate=0.1, decay=0.5, clamp=5.0, kl=0.0, threshold=0.0
)
CLOSE = 1e-8  # of changes of about 5e-3, in f64
WINDOW = Chunking(3)
STAGES = (
    engine.prefill,
    engine.assign,
    engine.step,
    regression.enter,
    regression.reach,
    regression.aim,
    regression.read,
    regression.advance,
    regression.fit_groups,
)
PLAIN = UnkeConfig(
    layers=(LAYER,), target=TARGET, steps=6, rate=1e-3, side_by_side=2
)
CHUNKED = dataclasses.replace(PLAIN, chunks=WINDOW)
CONFIGS = {'plain': PLAIN, 'chunked': CHUNKED}


def edits(seed: int = 1, chunked: bool = False) -> list[encoding.EncodedEdit]:
  """Random questions with answers of 5 to 8 tokens, in chunks of 3."""
  some = facts.random_edits(
      EDITS, seed=seed, contexts=1, targets=(5, 8, 6), kl=False
  )
  if not chunked:
    return some
  cut = lambda n: tuple((b, min(b + 3, n)) for b in range(0, n, 3))
  return [dataclasses.replace(e, chunks=cut(len(e.target))) for e in some]


@functools.cache
def common_plan(chunked: bool = False):
  """One plan for all batches."""
  some = [e for seed in (1, 6) for e in edits(seed, chunked)]
  return plan_lib.plan_shapes(some, slots=4, batch=EDITS)


@functools.cache
def bench(config: UnkeConfig, family: str = 'llama'):
  """(pair, editor, state) of a method on a small model."""
  pair = naive_oracle.pair(family)
  editor = unke(pair.spec, config)
  return pair, editor, editor.init(pair, editors.resources(editor, pair.spec))


def states(spec, params, edit, layer=LAYER) -> np.ndarray:
  """[K, D] states at the anchors of an edit, after the edited layer."""
  row = np.concatenate([edit.rows[0], edit.target])
  packed = regression.pack([row], regression.shape_of([[row]], False))
  h = np.asarray(regression.enter(spec, params, packed, stop=layer + 1))[0]
  anchors = [edit.stage(k, 0).anchor for k in range(edit.stages)]
  return h[packed.rows.index[0, anchors]]


def made(
    config,
    some,
    group=None,
    *,
    params=None,
    family='llama',
    optimized=False,
    double=False,
):
  """(edited, info) of one batch; random targets unless optimised.

  Adam turns rounding into whole steps where a gradient is zero, so that weights
  are compared in f64.
  """
  pair, editor, state = bench(config, family)
  given = pair.params if params is None else params
  with contextlib.ExitStack() as stack:
    if double:
      stack.enter_context(jax.enable_x64(True))
      given = jax.tree.map(lambda x: x.astype(jnp.float64), given)
    cache = editors.GivenTargets(
        functools.partial(states, pair.spec, given, layer=config.layers[-1])
    )
    edited, _, info = editor.edit(
        pair._replace(params=given),
        state,
        EditBatch(some, common_plan(config.chunks is not None), group),
        Run(None if optimized else cache),
    )
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

  def fit(self, texts, goals, config, pads: int | None = None):
    """Trains on texts, where goals[t] is {column: wanted state}."""

    def run(some):
      if pads is not None:
        return self.padded(some, pads)
      return torch.cat([self.out(ids) for ids in some])

    with torch.no_grad():
      outputs, want = run(editors.preserved()), run(texts)
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
            {'params': groups[0], 'weight_decay': config.decay},
            {'params': groups[1], 'weight_decay': 0.0},
        ],
        lr=config.rate,
        eps=1e-8,
    )
    before = self.leaves()
    mse = torch.nn.functional.mse_loss
    for _ in range(config.steps):
      loss = mse(run(editors.preserved()), outputs) + mse(run(texts), want)
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
    states = info.targets.targets.z[at : at + len(layout)]
    found.append(dict(zip(layout, states)))
    at += len(layout)
  return found


def texts(some, config) -> list[np.ndarray]:
  if config.chunks is None:
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
      ('pads', 'llama', dataclasses.replace(CHUNKED, pads=True)),
  )
  def test_torch(self, family, config):
    config = dataclasses.replace(config, steps=5, rate=2e-4)
    some = edits(chunked=config.chunks is not None)
    edited, info = made(config, some, family=family)
    pads = editors.PAD if config.pads else None
    want = Torch(family, LAYER).fit(
        texts(some, config), goals(some, info), config, pads
    )
    got = changes(edited)
    self.assertSetEqual(set(got), set(want))
    got, want = seen_by_loss(got), seen_by_loss(want)
    self.assertLess(gap(got, want), 1e-5)
    self.assertGreater(min(np.abs(x).max() for x in want.values()), 1e-4)

  def test_torch_in_f64(self):
    config = dataclasses.replace(CHUNKED, steps=20, rate=2e-4)
    some = edits(chunked=True)
    pair, rows = naive_oracle.pair('gpt2'), texts(some, config)
    rng = np.random.default_rng(0)
    wanted = [{len(r) - 2: rng.standard_normal(pair.spec.width)} for r in rows]
    want = Torch('gpt2', LAYER, double=True).fit(rows, wanted, config)
    with jax.enable_x64(True):
      params = jax.tree.map(lambda x: x.astype(jnp.float64), pair.params)
      sides = []
      for group, change in ((rows, wanted), (editors.preserved(), [])):
        packed = regression.pack(group, regression.shape_of([group], False))
        h = regression.enter(pair.spec, params, packed, stop=LAYER)
        out = regression.enter(pair.spec, params, packed, stop=LAYER + 1)
        for t, goal in enumerate(change):
          for column, z in goal.items():
            out = out.at[0, packed.rows.index[t, column]].set(z)
        sides.append(regression.Side(h, out, packed))
      rule = regression.Rule(config.steps, config.rate, config.decay)
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
    edited, info = made(CHUNKED, some, optimized=True)
    report = info.targets
    total = sum(e.stages for e in some)
    number = [i for i, e in enumerate(some) for _ in range(e.stages)]
    self.assertEqual(report.edit.tolist(), number)
    self.assertEqual(report.targets.z.shape, (total, 32))
    self.assertEqual(report.distance.shape, (2, total))
    self.assertTrue(info.written.all())
    np.testing.assert_allclose(report.distance[0], 1, atol=1e-4)
    self.assertLess(report.distance[1].mean(), report.distance[0].mean())
    self.assertSetEqual(set(info.seconds), {'optimize', 'insert'})
    leaves = {
        path.removeprefix('layers/')
        for path in spec_lib.param_shapes(naive_oracle.pair('llama').spec)
        if path.startswith('layers/')
    }
    self.assertSetEqual(set(changes(edited)), leaves)

  @parameterized.parameters(*CONFIGS)
  def test_the_edited_model_has_the_states_reported(self, name):
    some = edits(chunked=name == 'chunked')
    edited, info = made(CONFIGS[name], some)
    pair = naive_oracle.pair('llama')
    merged = edited_lib.apply(pair.params, edited)
    report = info.targets
    now = np.concatenate([states(pair.spec, merged, e) for e in some])
    if name == 'plain':  # the answers are not part of the fitted texts
      self.assertLen(now, EDITS)
    z, z0 = report.targets.z, report.targets.z0
    left = np.linalg.norm(z - now, axis=1) / np.linalg.norm(z - z0, axis=1)
    np.testing.assert_allclose(report.distance[1], left, atol=1e-4)

  def test_other_settings_do_not_compile(self):
    some = edits(6, True)
    for group in (None, range(EDITS)):
      made(CHUNKED, some, group, optimized=True)
      sizes = [stage._cache_size() for stage in STAGES]
      other = dataclasses.replace(CHUNKED, rate=3e-3, steps=2)
      made(other, some, group, optimized=True)
      self.assertEqual([stage._cache_size() for stage in STAGES], sizes)

  def test_empty_batches_have_the_dtypes_of_others(self):
    empty, full = (made(PLAIN, x)[1].targets for x in ([], edits()))
    dtypes = lambda report: jax.tree.map(lambda x: x.dtype, report)
    self.assertEqual(dtypes(empty), dtypes(full))
    self.assertEqual(empty.distance.shape, (2, 0))

  def test_company_does_not_change_a_weight(self):
    # Edits side by side, in whatever order, are edits alone.
    some = edits(chunked=True)
    apart, info = made(CHUNKED, some, range(EDITS), double=True)
    self.assertEqual(apart.deltas[0].value.shape[:2], (1, EDITS))
    report = info.targets
    for i, edit in enumerate(some):
      alone, one = made(CHUNKED, [edit], double=True)
      self.assertLess(gap(changes(apart, i), changes(alone)), CLOSE)
      np.testing.assert_allclose(
          report.distance[:, report.edit == i],
          one.targets.distance,
          atol=CLOSE,
      )
    order = [3, 1, 0, 2]
    turned, _ = made(CHUNKED, [some[i] for i in order], double=True)
    together, _ = made(CHUNKED, some, double=True)
    self.assertLess(gap(changes(turned), changes(together)), CLOSE)

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

  def test_several_layers_share_what_is_missing(self):
    config = dataclasses.replace(PLAIN, layers=(0, 2), steps=30)
    edited, info = made(config, edits())
    self.assertEqual(edited.deltas[0].layers, (0, 2))
    distance = info.targets.distance
    self.assertEqual(distance.shape, (3, EDITS))
    self.assertTrue((np.diff(distance.mean(1)) < -0.02).all())
    self.assertLess(distance[2].max(), 0.2)

  def test_half_precision_and_nothing_to_preserve(self):
    pair, editor, _ = bench(PLAIN)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.params)
    model = pair._replace(params=half)
    state = editor.init(model, {PreservedTexts(): []})
    cache = editors.GivenTargets(functools.partial(states, pair.spec, half))
    edited, _, info = editor.edit(
        model, state, EditBatch(edits(), common_plan()), Run(cache)
    )
    self.assertTrue(info.written.all())
    for delta in edited.deltas:
      self.assertEqual(delta.value.dtype, jnp.float32)
      self.assertGreater(np.abs(delta.value).max(), 1e-3)
    distance = info.targets.distance
    self.assertLess(distance[1].mean(), distance[0].mean())

  def test_an_answer_whose_end_is_not_finite_is_left_out(self):
    # The last token of an answer alone, which no label stands behind.
    pair, some, bad = naive_oracle.pair('llama'), edits(chunked=True), 1
    token = pair.spec.vocab - 1
    table = pair.params['embed']['embedding'].at[token].set(jnp.nan)
    params = {**pair.params, 'embed': {'embedding': table}}
    spoilt, good = list(some), [i for i in range(EDITS) if i != bad]
    target = some[bad].target.copy()
    target[-1] = token
    spoilt[bad] = dataclasses.replace(some[bad], target=target)
    edited, info = made(CHUNKED, spoilt, params=params, double=True)
    self.assertEqual(info.written.tolist(), [i != bad for i in range(EDITS)])
    want, other = made(CHUNKED, [some[i] for i in good], double=True)
    self.assertLess(gap(changes(edited), changes(want)), CLOSE)
    report = info.targets
    kept = report.edit != bad
    np.testing.assert_allclose(
        report.distance[:, kept], other.targets.distance, atol=CLOSE
    )
    self.assertTrue(np.isnan(report.distance[:, ~kept]).all())

  def test_a_fit_that_is_not_finite_changes_nothing(self):
    config = dataclasses.replace(PLAIN, rate=1e30)
    edited, info = made(config, edits())
    self.assertFalse(info.written.any())
    for change in changes(edited).values():
      np.testing.assert_array_equal(change, 0)

  def test_what_is_needed(self):
    spec = naive_oracle.pair('llama').spec
    self.assertEqual(unke(spec, PLAIN).needs, (PreservedTexts(),))
    padded = METHOD.configure(**METHOD.parity['anyedit'], layers=(1,))
    self.assertEqual(unke(spec, padded).needs, (PreservedTexts(), PadToken()))
    # Changes of blocks lie side by side on the host, however many.
    self.assertEmpty(unke(spec, PLAIN).check(10**6))

  def test_what_cannot_be_used_is_refused(self):
    spec = naive_oracle.pair('llama').spec
    with self.assertRaisesRegex(InputError, 'layers'):
      unke(spec, dataclasses.replace(PLAIN, layers=(3,)))
    with self.assertRaisesRegex(InputError, 'side_by_side is 0'):
      unke(spec, dataclasses.replace(PLAIN, side_by_side=0))
    with self.assertRaisesRegex(InputError, 'record 1.*chunks'):
      made(PLAIN, edits(chunked=True))
    pair, editor, _ = bench(PLAIN)
    long = np.zeros(spec.max_positions + 1, np.int32)
    some = [editors.preserved()[0], long, np.array([97])]
    with self.assertRaisesRegex(InputError, '(?s)text 2 .*tokens.*text 3 .*97'):
      editor.init(pair, {PreservedTexts(): some})
    table = pair.params['embed']['embedding'].at[5].set(jnp.nan)
    broken = pair._replace(
        params={**pair.params, 'embed': {'embedding': table}}
    )
    some = [np.array([3]), np.array([5, 6])]
    with self.assertRaisesRegex(InputError, 'text 2 .*not finite'):
      editor.init(broken, {PreservedTexts(): some})


if __name__ == '__main__':
  absltest.main()
