"""Fine-tuning equals a naive loop: full forward passes of one text each, the
changed weights really written, Adam in numpy.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import editors
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxedit.methods import finetune, gradient
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.finetune import editor as editor_lib
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder
from jaxedit.models.spec import row
from jaxedit.testing import facts, models
from jaxedit.types import InputError

END, BEGIN = 3, 5
CLOSE = 1e-10
STEPS = 3
COUNT = 2
CONFIGS = {
    'ft_l': dict(layers=(1,)),
    'ft_m': dict(layers=(1,), box=0.01),
    'ft_m_two_layers': dict(layers=(0, 2), box=3e-3, box_unit='absolute'),
    'ft_l_up': dict(layers=(1, 2), site='mlp/up', append_end=True),
    'lora': dict(layers=(0, 1, 2), rank=2, dropout=0.0),
    'lora_mlp': dict(
        layers=(1, 2), rank=2, dropout=0.0, sites=('mlp/up', 'mlp/down')
    ),
    'adalora': dict(layers=(1, 2), rank=3, dropout=0.0),
    # Over an encoder; sources are constant but in the second.
    'ft_m_decoder': dict(layers=(2, 3)),
    'lora_cross': dict(
        layers=(2, 3), rank=2, dropout=0.0,
        sites=('attn/q', 'cross/q', 'cross/v'),
    ),
    'lora_decoder': dict(
        layers=(2, 3), rank=2, dropout=0.0, sites=('attn/v', 'cross/q')
    ),
}  # fmt: skip


def method_of(case: str) -> Any:
  return METHODS['_'.join(case.split('_')[: 2 if case[:2] == 'ft' else 1])]


@functools.cache
def model(family: str) -> Any:
  spec = models.tiny_spec(family)
  with jax.enable_x64(True):
    return models.as_model(spec, models.random_params(spec, 2, jnp.float64))


def edits(family: str = 'llama', seed: int = 1) -> list[Any]:
  some = facts.random_edits(COUNT, seed=seed, contexts=1, kl=False)
  return facts.for_encoders(some) if family == 't5' else some


def resources(editor: Any) -> dict[Any, int]:
  ids = {'eos': END, 'bos': BEGIN}
  return {need: ids[need.name] for need in editor.needs}


def made(case: str, family: str = 'llama', group: Any = None, **settings: Any):
  """(result of an editor in f64, its state at first)."""
  method, m = method_of(case), model(family)
  given = {'fit_steps': STEPS, 'fit_rate': 1e-2, 'fit_stop_loss': 0.0}
  config = method.configure(**{**given, **CONFIGS[case], **settings})
  with jax.enable_x64(True):
    editor = method.editor(m.spec, config)
    state = editor.init(m, resources(editor))
    batch = EditBatch(edits(family), None, group)
    return editor.edit(m, state, batch, Run()), state, config


class Naive:
  """One joint edit by full forward passes."""

  def __init__(self, family: str, config: Any, some: Any, state: Any):
    self.model, self.config, self.some = model(family), config, some
    self.state = state

  def written(self, changes: Any) -> Any:
    """Parameters with changes {(site, leaf): [n, ...]}."""
    layers, depth = jnp.asarray(self.config.layers), self.model.spec.layers
    flat = jax.tree_util.tree_map_with_path

    def put(path, old):
      *site, leaf = (part.key for part in path)
      change = changes.get(('/'.join(site), leaf))
      if change is None:
        return old
      return old.at[row(depth, len(old), layers)].add(change)

    return {
        **self.model.params, 'layers': flat(put, self.model.params['layers'])
    }  # fmt: skip

  def nll(self, params: Any, edit: Any) -> Any:
    """[n] minus log-probabilities of the target tokens of an edit."""
    prompt, target = edit.rows[0], edit.target
    if self.config.append_end:
      target = np.append(target, END)
    one = self.config.scored == 'prompt_last'
    ids = prompt if one else np.concatenate([prompt, target[:-1]])
    spec = self.model.spec
    source = decoder.source_of(spec, ids[None])
    layout = decoder.token_layout(np.ones((1, len(ids)), bool), source)
    logits = decoder.forward(spec, params, ids[None], layout)[0]
    logprob = jax.nn.log_softmax(logits, axis=-1)
    if one:
      return -logprob[-1][target]
    return -logprob[len(prompt) - 1 :][np.arange(len(target)), target]

  def loss(self, changes: Any) -> Any:
    params = self.written(changes)
    found = [self.nll(params, edit) for edit in self.some]
    if self.config.by_token:
      return jnp.mean(jnp.concatenate(found))
    return jnp.mean(jnp.stack([x.mean() for x in found]))

  def adam(self, loss: Any, values: Any, clip: Any = lambda x: x) -> Any:
    m = v = jax.tree.map(np.zeros_like, values)
    slope = jax.jit(jax.grad(loss))
    for t in range(1, STEPS + 1):
      grad = jax.tree.map(np.asarray, slope(values))
      m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grad)
      v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grad)

      def step(w, m, v):
        m, v = m / (1 - 0.9**t), v / (1 - 0.999**t)
        return w - self.config.rate * m / (np.sqrt(v) + 1e-8)

      values = clip(jax.tree.map(step, values, m, v))
    return values

  def ft(self) -> Any:
    site, layers = self.config.site, list(self.config.layers)
    leaves = self.model.params['layers']
    for part in site.split('/'):
      leaves = leaves[part]
    start, box = {}, {}
    for name, leaf in leaves.items():
      old = np.asarray(leaf)[layers]
      start[site, name] = np.zeros_like(old)
      rms = np.array([np.sqrt(np.mean(x**2)) for x in old])
      eps = self.config.box or np.inf
      eps = eps * (rms if self.config.box_unit == 'rms' else np.ones_like(rms))
      box[site, name] = eps.reshape(-1, *(1,) * (old.ndim - 1))
    clip = lambda x: {k: np.clip(x[k], -box[k], box[k]) for k in x}
    return self.adam(self.loss, start, clip)

  def lora(self) -> Any:
    config, ada = self.config, 'e' in next(iter(self.state.values.values()))
    scale = config.alpha / (config.rank + 1e-5 * ada)

    def changes(values: Any) -> Any:
      found = {}
      for site, one in values.items():
        b = one['b'] * one['e'][..., None] if ada else one['b']
        found[site, 'kernel'] = scale * jnp.einsum('nri,nro->nio', one['a'], b)
      return found

    def loss(values: Any) -> Any:
      total, norms = self.loss(changes(values)), []
      for one in values.values() if ada else ():
        for x in [*one['a'], *one['b']]:
          norms.append(jnp.linalg.norm(x @ x.T - np.eye(len(x))))
      return total + (0.5 * sum(norms) / len(norms) if ada else 0.0)

    start = jax.tree.map(np.asarray, self.state.values)
    return changes(self.adam(loss, start))


def full(delta: Any) -> np.ndarray:
  if hasattr(delta, 'key'):
    return np.einsum('nrf,nrd->nfd', delta.key, delta.value)
  return np.asarray(delta.value)


class OracleTest(parameterized.TestCase):

  @cases.first(
      9,
      parameterized.parameters(
          ('ft_m', 'llama'),
          ('ft_l', 'gptj'),
          ('ft_m', 't5'),
          ('ft_m_decoder', 't5'),
          ('lora_cross', 't5'),
          ('lora_decoder', 't5'),
          ('lora', 'gptj'),
          ('ft_m_two_layers', 'gpt2'),
          ('adalora', 'llama'),
          ('ft_l_up', 'llama'),
          ('ft_m', 'gpt2'),
          ('ft_m', 'gptj'),
          ('lora', 'gpt2'),
          ('lora', 'llama'),
          ('lora_mlp', 'gptj'),
      ),
  )
  def test_naive_loop(self, case, family):
    got, state, config = made(case, family)
    with jax.enable_x64(True):
      naive = Naive(family, config, edits(family), state)
      want = naive.lora() if 'lora' in case else naive.ft()
      changed = {
          (d.site, getattr(d, 'leaf', 'kernel')): full(d)
          for d in got.edited.deltas
      }
      self.assertSameElements(changed, want)
      for name, change in changed.items():
        self.assertLess(editors.gap(change, np.asarray(want[name])), CLOSE)
        self.assertGreater(np.abs(change).max(), 1e-4)
      params = naive.written(want)
      score = jax.jit(lambda p: [naive.nll(p, e).mean() for e in naive.some])
      loss, first = score(params), score(naive.model.params)
    np.testing.assert_allclose(got.info.per_edit['loss'], loss, rtol=1e-9)
    np.testing.assert_allclose(
        got.info.per_edit['loss_before'], first, rtol=1e-9
    )
    self.assertEqual(got.info.per_edit['steps'], [STEPS] * COUNT)


class SourceTest(absltest.TestCase):

  def test_answers_as_long_as_a_whole_text(self):
    """Rounded up, a text without its source has the size of all of it."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(2, 90, n).astype(np.int32)
    row, target = facts.source(draw(1)), draw(36)
    edit = dataclasses.replace(edits('t5')[0], rows=(row,), target=target)
    config = METHODS['ft_m'].configure(layers=(3,), fit_steps=2, fit_rate=1e-2)
    with jax.enable_x64(True):
      editor = METHODS['ft_m'].editor(model('t5').spec, config)
      state = editor.init(model('t5'), resources(editor))
      got = editor.edit(
          model('t5'), state, EditBatch([edit], None, None), Run()
      )
      naive = Naive('t5', config, [edit], state)
      want = float(naive.nll(naive.model.params, edit).mean())
    self.assertAlmostEqual(got.info.per_edit['loss_before'][0], want, 9)


class ExampleTest(parameterized.TestCase):

  def edit(self, target: Any) -> Any:
    (edit,) = facts.random_edits(1, seed=1, contexts=1, kl=False)
    rows = (np.array([BEGIN, 9, 8], np.int32),)
    return dataclasses.replace(edit, rows=rows, target=np.array(target))

  @parameterized.parameters(
      ('target', -1, -1, [6, 7], [[6], [7]]),
      ('target', END, -1, [6, 7], [[6], [7], [END]]),
      ('target', END, -1, [6, END], [[6], [END]]),  # it has one
      ('prompt_last', -1, -1, [6, 7], [[6, 7]]),
      ('prompt_last', END, BEGIN, [6], [[BEGIN, 6, END]]),
      ('prompt_last', -1, 4, [6], [[6]]),  # the prompt begins otherwise
  )
  def test_labels(self, scored, end, begin, target, labels):
    state = finetune.State(np.int32(end), np.int32(begin))
    found = editor_lib._example(scored, state, self.edit(target))
    self.assertEqual(found.labels.tolist(), labels)
    self.assertEqual(found.first, 2)
    self.assertLen(found.ids, 2 + len(labels))

  def test_one_token_behind_the_prompt_is_both_objectives(self):
    some = facts.random_edits(2, seed=3, contexts=1, targets=(1,), kl=False)
    found = []
    for name in ('ft_l', 'ft_m'):
      config = METHODS[name].configure(
          layers=(1,), fit_steps=2, append_end=False
      )
      editor = METHODS[name].editor(model('llama').spec, config)
      with jax.enable_x64(True):
        state = editor.init(model('llama'), {})
        batch = EditBatch(some, None, None)
        found.append(editor.edit(model('llama'), state, batch, Run()).edited)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-10),
        *(one.deltas[0].value for one in found),
    )

  @parameterized.parameters(
      ('ft_m', dict(site='mlp/out')), ('lora', dict(sites=('attn/q', 'attn/q')))
  )
  def test_maps_that_a_model_lacks(self, name, given):
    config = METHODS[name].configure(layers=(1,), **given)
    with self.assertRaisesRegex(InputError, '^sites .*attn/q, .*mlp/down'):
      METHODS[name].editor(model('llama').spec, config)


class FitTest(parameterized.TestCase):

  @parameterized.parameters(0.0, 0.4, 3.0)
  def test_minibatches_take_turns(self, stop):
    goals = np.array([[1.0, 0.0], [0.2, 2.0], [0.0, -1.0]])
    value = lambda w, i: np.square(w - goals[i]).sum()
    w, rate, updates, epochs = np.zeros(2), 0.1, 0, 4
    for _ in range(epochs):
      losses = []
      for i in range(3):
        losses.append(value(w, i))
        if losses[-1] >= stop:
          w, updates = w - rate * 2 * (w - goals[i]), updates + 1
      if np.mean(losses) < stop:
        break

    def loss(w: Any, step: Any) -> Any:
      x = jnp.sum(jnp.square(w - jnp.asarray(goals)[step % 3]))
      return x, x

    with jax.enable_x64(True):
      fit = gradient.fit(
          loss, jnp.zeros(2), optax.sgd(rate), steps=epochs, stop_loss=stop,
          minibatches=3,
      )  # fmt: skip
    np.testing.assert_allclose(fit.values, w, atol=1e-12)
    np.testing.assert_allclose(fit.loss, np.mean(losses), atol=1e-12)
    self.assertEqual(fit.steps, updates)


if __name__ == '__main__':
  absltest.main()
