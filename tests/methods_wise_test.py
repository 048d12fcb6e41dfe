"""WISE: losses against whole models, masks, merges and routing by hand."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import editors
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import UNEDITED
from jaxedit.methods import wise
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.wise import WiseConfig
from jaxedit.models import decoder, loading
from jaxedit.testing import facts, models
from jaxedit.types import InputError, Tap

LAYER = 1
CONFIG = WiseConfig(
    layers=(LAYER,), rate=2.0, steps=6, alpha=0.1, beta=0.4, gamma=0.2,
    act_ratio=0.5, shards=2, decay=1e-2,
)  # fmt: skip


@functools.cache
def setup(family: str):
  """(spec, params, edits, plan) in f64."""
  spec = models.tiny_spec(family)
  with jax.enable_x64(True):
    params = models.random_params(spec, 0, jnp.float64)
  edits = facts.random_edits(4, seed=1, contexts=2, kl=False)
  return spec, params, edits, plan_lib.plan_shapes(edits, slots=4, batch=4)


def made(config: WiseConfig, edits=None, state=None, group=None):
  """What editing the tiny Llama gives."""
  spec, params, some, plan = setup('llama')
  with jax.enable_x64(True):
    model = loading.Model(spec, params, pathlib.Path(), 'ab' * 32, {})
    editor = wise.wise(spec, config)
    state = state or editor.init(model, editors.resources(editor, spec))
    batch = EditBatch(some if edits is None else edits, plan, group)
    return editor.edit(model, state, batch, Run())


def shards_of(result) -> np.ndarray:
  return np.asarray(result.edited.deltas[0].shards[0])


def with_shard(params, shard):
  """Parameters with a shard added to the map."""
  kernel = params['layers']['mlp']['down']['kernel'].at[LAYER].add(shard)
  down = {**params['layers']['mlp']['down'], 'kernel': kernel}
  mlp = {**params['layers']['mlp'], 'down': down}
  return {**params, 'layers': {**params['layers'], 'mlp': mlp}}


def naive_gap(spec, params, shard, ids, count: int):
  """a of one text, from two runs of all layers up to the map."""
  layout = decoder.token_layout(np.ones((1, len(ids)), bool))

  def output(params):
    h = decoder.embed(spec, params, ids[None], layout)
    _, (y,) = decoder.run_layers(
        spec, params, h, layout, start=0, stop=LAYER + 1,
        taps=(Tap('mlp', (LAYER,)),),
    )  # fmt: skip
    return jax.nn.silu(y[0, 0, :count])

  change = output(with_shard(params, shard)) - output(params)
  return jnp.mean(jnp.linalg.norm(change, axis=-1))


def naive_loss(spec, params, config, shard, edit, texts):
  """The loss of an edit, one full forward a text."""
  nll, inside = [], []
  changed = with_shard(params, shard)
  for c in range(len(edit.rows)):
    ids, stage = edit.text(c), edit.stage(0, c)
    layout = decoder.token_layout(np.ones((1, len(ids)), bool))
    logits = decoder.forward(spec, changed, ids[None], layout)
    logprob = jax.nn.log_softmax(logits[0, stage.first : stage.end])
    at = logprob[jnp.arange(len(stage.labels)), stage.labels]
    n = len(stage.labels) + config.counts_one_more
    nll.append(-jnp.sum(at) / n)
    count = len(ids) if config.whole_rows else len(edit.rows[c])
    inside.append(naive_gap(spec, params, shard, ids, count))
  outside = [naive_gap(spec, params, shard, t, len(t)) for t in texts]

  inside, outside = jnp.stack(inside), jnp.stack(outside)

  def mean(x):
    return jnp.sum(jnp.maximum(x, 0)) / jnp.maximum(jnp.sum(x > 0), 1)

  loss = sum(nll) / len(nll)
  loss += mean(outside[:, None] - inside[None] + config.gamma)
  loss += mean(outside - config.alpha)
  return loss + mean(config.beta - inside)


def naive_nll(spec, params, shard, edit):
  """The loss at no change, where a length has no slope: the target's alone."""
  total = 0.0
  for c in range(len(edit.rows)):
    ids, stage = edit.text(c), edit.stage(0, c)
    layout = decoder.token_layout(np.ones((1, len(ids)), bool))
    logits = decoder.forward(spec, with_shard(params, shard), ids[None], layout)
    logprob = jax.nn.log_softmax(logits[0, stage.first : stage.end])
    at = logprob[jnp.arange(len(stage.labels)), stage.labels]
    total -= jnp.mean(at) / len(edit.rows)
  return total


class LossTest(absltest.TestCase):

  def parts(self, config, edit):
    """(own, irrelevant, texts) of an edit."""
    spec, params, _, plan = setup('llama')
    texts, labels = wise._own(edit, plan, config)
    own = wise.read(spec, params, *texts, layer=LAYER)
    some = editors.preserved()[:2]
    tokens = np.zeros((2, 12), np.int32)
    valid = np.zeros((2, 12), bool)
    for row, ids in enumerate(some):
      tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    out = wise.read(spec, params, tokens, valid, valid, layer=LAYER)
    return (own, labels), out, some

  def test_loss_and_steps_of_a_whole_model(self):
    spec, params, edits, _ = setup('llama')
    rng = np.random.default_rng(3)
    shape = spec.mlp_width, spec.width
    mask = rng.uniform(size=shape) < 0.2
    # Where nothing has moved a gap has no slope, as published.
    first = jax.jit(jax.grad(lambda s: naive_nll(spec, params, s, edits[0])))
    loss_of = jax.jit(wise.loss_of, static_argnums=(0, 2))
    for changed in ({}, dict(counts_one_more=True, whole_rows=True)):
      config = dataclasses.replace(CONFIG, steps=4, **changed)
      with jax.enable_x64(True):
        own, out, texts = self.parts(config, edits[0])
        naive = jax.jit(
            jax.value_and_grad(
                lambda s: naive_loss(spec, params, config, s, edits[0], texts)  # pylint: disable=cell-var-from-loop
            )
        )
        shard = jnp.asarray(0.05 * rng.standard_normal(shape))
        got = loss_of(spec, params, config, shard, own, out).loss
        np.testing.assert_allclose(got, naive(shard)[0], rtol=1e-8)
        if changed:
          continue
        fit = lambda config: wise.fit(
            spec, params, jnp.zeros(shape), mask, own, out, config=config  # pylint: disable=cell-var-from-loop
        )
        got, losses, steps, finite = fit(config)
        kernel = params['layers']['mlp']['down']['kernel'][LAYER]
        shard = jnp.zeros(shape)
        for slope in (first, *[lambda s: naive(s)[1]] * 3):  # pylint: disable=cell-var-from-loop
          decay = config.decay * (kernel + shard)
          shard -= config.rate * jnp.where(mask, slope(shard) + decay, 0)
          shard = jnp.clip(shard, -config.bound, config.bound)
        np.testing.assert_allclose(got, shard, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(losses.loss, naive(shard)[0], rtol=1e-8)
        self.assertEqual((int(steps), bool(finite)), (4, True))
        self.assertFalse(np.asarray(got)[~mask].any())
        moved, *_ = fit(dataclasses.replace(config, decays_all=True))
        self.assertTrue(np.asarray(moved)[~mask].all())


class ShardsTest(absltest.TestCase):

  def test_ties_by_hand(self):
    first = np.array([[5.0, -1, 0.1], [4, 2, 0], [-3, 0.2, 0]])
    second = np.array([[3.0, -2, 0.1], [-6, 0.3, 0], [3, 1, 0.2]])
    # Five of nine are kept: 5 -1 4 2 -3, and 3 -2 -6 3 1.
    want = [[4.0, -1.5, 0], [-6, 2, 0], [3, 1, 0]]  # -3 + 3 = 0 elects +
    got = wise.ties(np.stack([first, second]), 5 / 9 + 1e-9)
    np.testing.assert_allclose(got, want)

  def test_nothing_changes_outside_the_mask(self):
    result = made(CONFIG)
    self.assertTrue(result.info.written.all())
    (shard,) = shards_of(result)
    mask = np.asarray(wise.mask_of(
        np.uint32(42), np.uint32(0), shape=shard.shape, share=0.2
    ))  # fmt: skip
    self.assertBetween(mask.mean(), 0.15, 0.25)
    self.assertFalse(shard[~mask].any())
    self.assertTrue((shard[mask] != 0).all())
    bounded = made(dataclasses.replace(CONFIG, bound=1e-3))
    self.assertLessEqual(np.abs(shards_of(bounded)).max(), 1e-3)

  def test_shards_masks_thresholds_and_capacity(self):
    config = dataclasses.replace(CONFIG, save_every=1, merge_shards=0)
    result = made(config)
    self.assertEqual(result.info.written.tolist(), [True, True, False, False])
    shards = shards_of(result)
    self.assertLen(shards, 2)
    both = ((shards[0] != 0) & (shards[1] != 0)).mean()
    self.assertBetween(both, 0.02, 0.07)  # 0.2 of 0.2: another mask
    inside = result.info.per_edit['gap_edit']
    got = result.edited.deltas[0].thresholds[0]
    np.testing.assert_allclose(got, 0.5 * np.array(inside[:2]))
    self.assertIsNone(inside[2])
    nothing = made(config, state=result.state)
    self.assertFalse(nothing.info.written.any())
    self.assertRegex(nothing.info.reason, r'^all shards are full; .*--shards')
    np.testing.assert_array_equal(shards_of(nothing), shards)

  def test_a_stream_is_merged(self):
    edits = setup('llama')[2]
    config = dataclasses.replace(CONFIG, save_every=1, merge_shards=0)
    apart = shards_of(made(config, edits[:2]))
    config = dataclasses.replace(config, merge_shards=2)
    first = made(config, edits[:2])
    want = wise.ties(apart, config.merge_density)
    np.testing.assert_array_equal(shards_of(first), want[None])
    least = min(first.info.per_edit['gap_edit'])
    np.testing.assert_allclose(first.state.least, [least, np.inf])
    more = made(config, edits[2:3], first.state)
    self.assertLen(shards_of(more), 2)
    np.testing.assert_array_equal(shards_of(more)[0], want)

  def test_one_after_the_other_is_one_batch(self):
    edits = setup('llama')[2]
    want, state = made(CONFIG), None
    for edit in edits:
      result = made(CONFIG, [edit], state)
      state = result.state
    np.testing.assert_array_equal(shards_of(result), shards_of(want))
    np.testing.assert_array_equal(state.least, want.state.least)

  def test_one_layer(self):
    with self.assertRaisesRegex(InputError, 'in one layer; name one'):
      wise.wise(setup('llama')[0], WiseConfig(layers=(0, 1)))


class RoutingTest(absltest.TestCase):

  def test_rows_that_miss_are_those_of_the_unedited_model(self):
    spec, params, edits, _ = setup('llama')
    result = made(CONFIG)
    (delta,) = result.edited.deltas
    rows = [e.rows[0] for e in edits]
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(rows):
      tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    with jax.enable_x64(True):
      shard = delta.shards[0, 0]
      score = np.array(
          [naive_gap(spec, params, shard, ids, len(ids)) for ids in rows]
      )
      # Between the two middle ones of the rows.
      edge = np.sort(score)[1:3].mean()
      edited = result.edited.replace(
          deltas=(delta.replace(thresholds=jnp.full((1, 1), edge)),)
      )
      layout = decoder.token_layout(valid)
      run = jax.jit(edited_lib.apply_model, static_argnums=0)
      base = run(spec, params, UNEDITED, tokens, layout)
      mixed = run(spec, params, edited, tokens, layout)
      far = edited.replace(
          deltas=(delta.replace(thresholds=jnp.full((1, 1), np.inf)),)
      )
      missed = run(spec, params, far, tokens, layout)
      changed = run(spec, with_shard(params, shard), UNEDITED, tokens, layout)
    hit = score > edge
    self.assertEqual(hit.sum(), 2)
    text = valid[..., None]
    same = lambda a, b: np.testing.assert_array_equal(  # bit for bit
        np.where(text, a, 0), np.where(text, b, 0)
    )
    same(missed, base)
    where = lambda x: np.where(text, x, 0)[~hit]
    np.testing.assert_array_equal(where(mixed), where(base))
    np.testing.assert_allclose(
        np.where(text, mixed, 0)[hit], np.where(text, changed, 0)[hit],
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
