"""UltraEdit: statistics and solves against numpy, features against the whole model."""

from __future__ import annotations

import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.methods import ultraedit as lib
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.ultraedit import Moments, UltraEditConfig
from jaxedit.models import decoder, loading
from jaxedit.testing import facts, models
from jaxedit.types import InputError

RNG = np.random.default_rng(0)


class StatisticsTest(parameterized.TestCase):

  def test_merged_is_numpy_over_all_rows(self):
    parts = [RNG.standard_normal((k, 5)) for k in (3, 1, 0, 7)]
    moments = Moments(np.float64(0), np.zeros(5), np.zeros(5))
    for part in parts:
      moments = lib.merged(moments, part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    variance = moments.square / (moments.count - 1)
    np.testing.assert_allclose(variance, rows.var(0, ddof=1), rtol=1e-12)

  def test_published_merge_is_too_large(self):
    rows, empty = RNG.standard_normal((4, 5)), np.zeros(5)
    found = lib.merged(Moments(np.float64(0), empty, empty), rows, True)
    deviation = np.sqrt(found.square / 3)
    np.testing.assert_allclose(
        deviation, rows.std(0, ddof=1) * np.sqrt(4 / 3), rtol=1e-12
    )

  def test_one_token_is_scaled_by_its_root_mean_square(self):
    row, empty = RNG.standard_normal((1, 6)), np.zeros(6)
    moments = lib.merged(Moments(np.float64(0), empty, empty), row)
    x, g = lib.normalised(row, 4, moments, 1e9)
    rms = lambda y: np.sqrt(np.square(y).mean())
    np.testing.assert_allclose(x, row[:, :4] / rms(row[:, :4]), rtol=1e-5)
    np.testing.assert_allclose(g, row[:, 4:] / rms(row[:, 4:]), rtol=1e-5)
    x, g = lib.normalised(row, 4, moments, 0.0)
    self.assertFalse(np.isnan(x).any() or np.isnan(g).any())

  def test_without_a_prior_it_is_the_published_normalisation(self):
    rows, empty = RNG.standard_normal((9, 6)), np.zeros(6)
    moments = lib.merged(Moments(np.float64(0), empty, empty), rows)
    x, g = lib.normalised(rows, 4, moments, 0.0)
    want = (rows - rows.mean(0)) / (rows.std(0, ddof=1) + lib._EPS)
    np.testing.assert_allclose(np.concatenate([x, g], 1), want, rtol=1e-12)

  def test_pairs_are_the_dense_solve(self):
    x, g = RNG.standard_normal((5, 8)), RNG.standard_normal((5, 3))
    moments = lib.merged(
        Moments(np.float64(0), np.zeros(11), np.zeros(11)), np.c_[x, g]
    )
    config = UltraEditConfig(rate=0.3, ridge=0.7, prior_tokens=2.0)
    key, value = lib.pairs_of(x, g, moments, config)
    dense = np.linalg.solve(x.T @ x + 0.7 * np.eye(8), x.T @ value)
    np.testing.assert_allclose(key.T @ value, dense, rtol=1e-9, atol=1e-12)


class EditorTest(parameterized.TestCase):

  @cases.first(1, parameterized.parameters('llama', 'gpt2', 'gptj'))
  def test_against_materialised_gradients(self, family):
    spec = models.tiny_spec(family)
    edits = facts.random_edits(3, seed=1, contexts=1, kl=False)
    plan = plan_lib.plan_shapes(edits, slots=4, batch=4)
    config = UltraEditConfig(layers=(0, 1), rate=0.1, together=2)
    with jax.enable_x64(True):
      params = models.random_params(spec, 0, jnp.float64)
      model = loading.Model(spec, params, pathlib.Path(), 'ab' * 32, {})
      editor = lib.ultraedit(spec, config)
      result = editor.edit(
          model, editor.init(model, {}), EditBatch(edits, plan), Run()
      )
      change = np.asarray(edited_lib.full(result.edited.deltas[0]))
      features = [self.features(spec, params, edits, layer) for layer in (0, 1)]
    count = sum(len(edit.target) for edit in edits)
    empty = np.zeros(spec.mlp_width + spec.width)
    moments = Moments(np.float64(0), empty, empty)
    for x, g in features:
      moments = lib.merged(moments, np.c_[x, g])
    self.assertEqual(moments.count, 2 * count)
    for layer, (x, g) in enumerate(features):
      key, value = lib.pairs_of(x, g, moments, config)
      np.testing.assert_allclose(
          change[layer], key.T @ value, rtol=1e-7, atol=1e-12
      )

  def features(self, spec, params, edits, layer):
    """(x, g) of all target tokens, by offsets of a whole forward pass."""
    groups, found = ((0, 1), (2,)), {}
    for group in groups:
      tokens = sum(len(edits[i].target) for i in group)
      for i in group:
        edit = edits[i]
        text, stage = edit.text(0)[None], edit.stage(0, 0)
        layout = decoder.token_layout(np.ones(text.shape, bool))
        at = stage.first + np.arange(len(stage.labels))

        def loss(offset):
          h = decoder.embed(spec, params, text, layout)
          h, _ = decoder.run_layers(
              spec, params, h, layout, start=0, stop=layer + 1
          )
          h, _ = decoder.run_layers(
              spec, params, h + offset, layout, start=layer + 1,
              stop=spec.layers,
          )  # fmt: skip
          logprob = jax.nn.log_softmax(decoder.logits(spec, params, h))[0, at]
          return -logprob[np.arange(len(at)), stage.labels].sum() / tokens

        g = jax.grad(loss)(jnp.zeros((*text.shape, spec.width)))[0, at]
        h = decoder.embed(spec, params, text, layout)
        h, _ = decoder.run_layers(spec, params, h, layout, start=0, stop=layer)
        _, seen = decoder.run_layer(spec, params, h, layout, layer=layer)
        found[i] = np.asarray(seen['mlp/down'][0, at]), np.asarray(g)
    return tuple(np.concatenate(x) for x in zip(*(found[i] for i in range(3))))

  def test_unknown_maps_are_refused(self):
    spec = models.tiny_spec('llama')
    with self.assertRaisesRegex(InputError, "'attn/q'.* known are mlp/down"):
      lib.ultraedit(spec, UltraEditConfig(layers=(0,), sites=('attn/q',)))


if __name__ == '__main__':
  absltest.main()
