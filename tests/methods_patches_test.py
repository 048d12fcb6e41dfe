"""T-Patcher and CaliNET: the tail equals the whole model; losses by hand."""

from __future__ import annotations

import functools
import pathlib

import editors
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.edited import ledger as ledger_lib
from jaxedit.methods import patches, t_patcher
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.patches import Patch, Tail
from jaxedit.models import decoder, loading
from jaxedit.testing import facts, models

FAMILIES = ('llama', 'gpt2', 'gptj', 't5')


@functools.cache
def setup(family: str):
  """(spec, params, edits, plan) in f64."""
  spec = models.tiny_spec(family)
  with jax.enable_x64(True):
    params = models.random_params(spec, 0, jnp.float64)
  edits = facts.random_edits(3, seed=1, contexts=2, kl=False)
  if spec.encoder_layers:
    edits = facts.for_encoders(edits)
  return spec, params, edits, plan_lib.plan_shapes(edits, slots=4, batch=4)


def patch_of(spec, seed: int = 0, count: int = 3) -> Patch:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape)
  return Patch(draw(count, spec.width), draw(count), draw(count, spec.width))


class TailTest(parameterized.TestCase):

  @parameterized.parameters(*FAMILIES)
  def test_equals_the_whole_model(self, family):
    spec, params, edits, plan = setup(family)
    patch = patch_of(spec)
    with jax.enable_x64(True):
      tail = patches.tail_of(spec, params, edits, plan, plain=False)
      state = t_patcher.State(patch, 3, (), (), 0, ledger_lib.NO_NAMES)
      edited = patches.edited_of(spec, [state], 'relu', joint=True)
      out = tail.out + patches.added(patch, tail.x, 'relu')
      found = np.asarray(decoder.logits(spec, params, out))
      row = 0
      for edit in edits:
        for c in range(2):
          text, stage = edit.text(c)[None], edit.stage(0, c)
          source = decoder.source_of(spec, text)
          layout = decoder.token_layout(np.ones(text.shape, bool), source)
          want = edited_lib.apply_model(spec, params, edited, text, layout)
          n = len(stage.labels)
          np.testing.assert_allclose(
              found[row, :n], want[0, stage.first : stage.first + n], rtol=1e-9
          )
          self.assertEqual(tail.label[row, :n].tolist(), edit.target.tolist())
          self.assertEqual(int(tail.mask[row].sum()), n)
          row += 1

  def test_neurons_are_appended(self):
    spec = setup('llama')[0]
    first, second = patch_of(spec, 1, 60), patch_of(spec, 2, 10)
    empty = patches.no_neurons(spec.width, np.float64)
    grown = patches.appended(patches.appended(empty, 0, first), 60, second)
    self.assertLen(grown.bias, 128)
    np.testing.assert_array_equal(grown.key[:60], first.key)
    np.testing.assert_array_equal(grown.key[60:70], second.key)
    self.assertFalse(grown.value[70:].any())


class TPatcherTest(absltest.TestCase):

  def test_loss(self):
    spec, params, *_ = setup('llama')
    rng, n, m = np.random.default_rng(3), 4, 50
    draw = lambda *shape: rng.standard_normal(shape) / 4
    config = t_patcher.TPatcherConfig(
        top=7, memory_weight=2.0, memory_margin_1=0.5, memory_margin_2=0.5
    )
    tail = Tail(
        draw(n, spec.width), draw(n, spec.width), np.array([5, 6, 7, 0]),
        np.array([True, True, True, False]), None,
    )  # fmt: skip
    w = t_patcher.Weights(
        draw(3, spec.width), draw(3), draw(3, spec.width), draw(3, spec.width)
    )
    own = np.array([0, 2, n])  # the third neuron is unused
    memory, there = draw(m, spec.width), np.arange(m) < 40
    with jax.enable_x64(True):
      got, _ = t_patcher.loss_of(
          spec, params, w, tail, own, (memory, there), config
      )
      pre = tail.x @ w.key.T + w.bias
      act = np.maximum(pre, 0)[:, :2]
      out = tail.out + act @ (w.value * w.scale)[:2]
      logits = np.asarray(decoder.logits(spec, params, jnp.asarray(out)))
    logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = [0.9 * -logprob[i, t] - 0.1 * logprob[i].mean()
              for i, t in enumerate((5, 6, 7))]  # fmt: skip
    mine = np.array([pre[0, 0], pre[2, 1]])
    s = (memory[:40] @ w.key.T + w.bias)[:, :2]
    top = lambda x: np.sort(np.exp(x).ravel())[-7:].mean()
    want = np.mean(smooth) + np.exp(-mine).max()
    want += 2 * (top(s - mine + 0.5) + top(s + 0.5))
    np.testing.assert_allclose(got, want, rtol=1e-10)

  def test_first_neurons_are_active_at_one(self):
    spec, params, edits, plan = setup('llama')
    with jax.enable_x64(True):
      tail = patches.tail_of(spec, params, edits, plan, plain=True)
      row = jax.tree.map(lambda x: x[1], tail)
      own = jnp.array([0, 2, len(row.label)])
      start = t_patcher._start(row, own, 3, t_patcher.TPatcherConfig())
    pre = np.sum(row.x[[0, 2]] * np.asarray(start.key[:2]), axis=-1)
    np.testing.assert_allclose(pre, 1, rtol=1e-12)
    self.assertFalse(np.any(start.key[2]))

  def test_stream_is_kept_and_refused_edits_leave_nothing(self):
    spec, params, edits, plan = setup('llama')
    settings = dict(
        patch_rate=0.1, patch_scale=1.0, memory_weight=0.1,
        patch_check_from=0, patch_check_every=1,
    )  # fmt: skip
    with jax.enable_x64(True):
      model = loading.Model(spec, params, pathlib.Path(), 'ab' * 32, {})

      def run(**more):
        method = t_patcher.METHOD
        editor = method.editor(spec, method.configure(**settings, **more))
        state = editor.init(model, editors.resources(editor, spec))
        return editor.edit(model, state, EditBatch(edits, plan), Run())

      done = run(patch_steps=300)
      self.assertTrue(done.info.written.all(), done.info.per_edit)
      for edit in edits:
        text, stage = edit.text(0)[None], edit.stage(0, 0)
        layout = decoder.token_layout(np.ones(text.shape, bool))
        logits = edited_lib.apply_model(spec, params, done.edited, text, layout)
        best = np.argmax(logits[0, stage.first : stage.end], axis=-1)
        self.assertEqual(best.tolist(), edit.target.tolist())
      never = run(patch_steps=1)
    self.assertFalse(never.info.written.any())
    self.assertRegex(never.info.reason, 'no patch made .* in 1 updates; raise')
    self.assertEqual(never.edited.deltas, ())
    self.assertEqual(int(never.state.joined), 0)


if __name__ == '__main__':
  absltest.main()
