"""Forward replay and boundary layers against MEMIT and the whole model."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import Edited
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.closed_form.replay import replay
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder, loading
from jaxedit.targets import TargetConfig
from jaxedit.testing import facts, models
from jaxedit.types import Patch, Targets

TARGET = TargetConfig(steps=4, rate=0.1, clamp=5.0, threshold=0.0)


class ReplayTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.spec = models.tiny_spec('llama')
    self.edits = facts.random_edits(3, seed=1, contexts=2, targets=(3,))
    self.plan = plan_lib.plan_shapes(self.edits, slots=4, batch=4)
    with jax.enable_x64(True):
      params = models.random_params(self.spec, 0, jnp.float64)
    self.model = loading.Model(self.spec, params, pathlib.Path(), 'ab' * 32, {})

  def edit(self, name, layers, model=None, edits=None, group=None):
    method = METHODS[name]
    config = dataclasses.replace(
        method.configure(**method.small), layers=layers, target=TARGET
    )
    with jax.enable_x64(True):
      editor = method.editor(self.spec, config)
      moments = facts.random_moments(self.spec, (0, 1, 2), seed=0)
      state = editor.init(self.model, {n: moments for n in editor.needs})
      batch = EditBatch(edits or self.edits, self.plan, group)
      return editor.edit(model or self.model, state, batch, Run())

  def assert_equal(self, got, want):
    with jax.enable_x64(True):
      for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(
            edited_lib.full(a), edited_lib.full(b), rtol=1e-9, atol=1e-12
        )

  @parameterized.parameters('memit', 'alphaedit')
  def test_at_one_layer_it_is_the_method_itself(self, name):
    want = self.edit(name, (1,)).edited.deltas
    self.assert_equal(self.edit(f'{name}_fe', (1,)).edited.deltas, want)
    self.assert_equal(self.edit(f'{name}_blue', (1,)).edited.deltas, want)

  def test_replayed_targets_are_those_of_the_whole_model(self):
    rng, layers = np.random.default_rng(0), (0, 1, 2)
    z = rng.standard_normal((3, 1, self.spec.width))
    none = np.zeros(1)
    targets = [Targets(x, x, none, none, none, none) for x in z]
    with jax.enable_x64(True):
      params = self.model.params
      got = replay(self.spec, params, self.edits, targets, layers, self.plan)
      for i, edit in enumerate(self.edits):
        text, at = edit.rows[0][None], edit.anchors[0]
        layout = decoder.token_layout(np.ones(text.shape, bool))
        h = decoder.embed(self.spec, params, text, layout)
        for n, layer in enumerate(layers):
          patch = Patch('block', 'set', jnp.int32(0), np.array([at]), z[i])
          h, _ = decoder.run_layers(
              self.spec, params, h, layout, start=layer, stop=layer + 1,
              patches=[patch],
          )  # fmt: skip
          np.testing.assert_allclose(got[n, i], h[0, at], rtol=1e-9)

  def test_each_layer_is_written_before_the_next_is_optimised(self):
    first = self.edit('memit', (0,)).edited.deltas
    with jax.enable_x64(True):
      params = edited_lib.apply(self.model.params, Edited(first))
    written = dataclasses.replace(self.model, params=params)
    second = self.edit('memit', (2,), written).edited.deltas
    result = self.edit('memit_blue', (0, 2))
    self.assert_equal(result.edited.deltas, (*first, *second))
    self.assertLen(result.info.per_edit['distance'][0], 3)
    self.assertEqual(result.info.per_edit['steps'], [8, 8, 8])

  def test_own_models_side_by_side_share_prefixes_of_tokens_alone(self):
    self.assertGreater(self.plan.shared, 0)
    apart = self.edit('memit_blue', (0, 1), group=(0, 1, 2)).edited
    for i, one in enumerate(self.edits):
      alone = self.edit('memit_blue', (0, 1), edits=[one]).edited
      got = edited_lib.select(apart, i)
      self.assert_equal(got.deltas, alone.deltas)


if __name__ == '__main__':
  absltest.main()
