"""KN: attributions against the whole model, the update against written weights.

The battery holds it with ids alone; old answers, which are texts, are here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import cases
import flax
import jax
import jax.numpy as jnp
import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.methods import kn
from jaxedit.methods.base import EditBatch, Run, Tokenizer
from jaxedit.methods.kn import KnConfig, Prompt
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder
from jaxedit.testing import facts, models
from jaxedit.text import encoding
from jaxedit.types import EditRequest, InputError, Tap

SPEC = models.tiny_spec('llama', vocab=400, max_positions=64)
SUBJECTS = ('Paris', 'Sydney', 'Toko')
REQUESTS = [
    EditRequest(i, str(i), '{} is in', subject, 'Oz', target_true='Fiji')
    for i, subject in enumerate(SUBJECTS, 1)
]


@flax.struct.dataclass
class Replaced:
  """Another output of a site at the last token."""

  layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
  site: str = flax.struct.field(pytree_node=False)
  output: Any
  mergeable: ClassVar[bool] = False
  chooses: ClassVar[bool] = False

  def __call__(self, x, y, choice=(), prompt=None):
    return y.at[:, -1].set(self.output)


@functools.cache
def setup(family: str):
  """(spec, params in f64, two prompts)."""
  spec = models.tiny_spec(family)
  with jax.enable_x64(True):
    params = models.random_params(spec, 0, jnp.float64)
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(2, 90, n).astype(np.int32)
  prompts = [Prompt(0, 0, draw(7), 11), Prompt(1, 0, draw(4), 12)]
  if family == 't5':
    prompts = [one._replace(ids=facts.source(one.ids)) for one in prompts]
  return spec, params, prompts


class Naive:
  """P of a prompt as a function of w in one layer: the whole model."""

  def __init__(self, family: str, prompt: Prompt, layer: int, quantity: str):
    self.spec, self.params, _ = setup(family)
    self.layer, self.label = layer, prompt.label
    self.tokens = prompt.ids[None]
    source = decoder.source_of(self.spec, self.tokens)
    self.layout = decoder.token_layout(np.ones(self.tokens.shape, bool), source)
    self.paper = quantity == 'paper'
    site = 'gate' if self.spec.gated else 'up'
    self.site = 'mlp/down' if self.paper else f'mlp/{site}'
    weights = self.params['layers'][self.site.split('/')[0]]
    self.map = jax.tree.map(
        lambda x: x[layer], weights[self.site.split('/')[1]]
    )
    h = decoder.embed(self.spec, self.params, self.tokens, self.layout)
    _, (seen,) = decoder.run_layers(
        self.spec, self.params, h, self.layout, start=0, stop=layer + 1,
        taps=(Tap(self.site, (layer,)),),
    )  # fmt: skip
    read = seen[0, 0, -1]
    self.w = read if self.paper else self.through(read)

  def through(self, x):
    return x @ self.map['kernel'] + self.map.get('bias', 0)

  def __call__(self, w):
    output = self.through(w) if self.paper else w
    logits = decoder.forward(
        self.spec, self.params, self.tokens, self.layout,
        deltas=(Replaced((self.layer,), self.site, output[None]),),
    )  # fmt: skip
    return jax.nn.softmax(logits[0, -1])[self.label]


class AttributionTest(parameterized.TestCase):

  @cases.first(
      3,
      parameterized.parameters(
          ('llama', 'paper'),
          ('gpt2', 'easyedit'),
          ('t5', 'paper'),
          ('llama', 'easyedit'),
          ('gptj', 'paper'),
      ),
  )
  def test_equals_gradients_of_the_whole_model(self, family, quantity):
    spec, params, prompts = setup(family)
    steps, config = 5, KnConfig(quantity=quantity, steps=5)
    with jax.enable_x64(True):
      ((found, chance),) = kn.attribute(spec, params, prompts, config)
      border = spec.encoder_layers
      self.assertFalse(found[:, :border].any())
      # In different prompts and layers.
      for b, layer in ((0, border or 1), (1, border + 1 if border else 2)):
        naive = Naive(family, prompts[b], layer, quantity)
        value_and_grad, total = jax.jit(jax.value_and_grad(naive)), 0
        for k in range(steps):
          share = k / steps if quantity == 'paper' else k / (steps - 1)
          total += value_and_grad(share * naive.w)[1]
        want = naive.w * total / steps
        np.testing.assert_allclose(found[b, layer], want, rtol=0, atol=1e-11)
        self.assertGreater(np.abs(want).max(), 1e-5)
        p, _ = value_and_grad(naive.w)
        self.assertAlmostEqual(chance[b], float(p), delta=1e-12)

  def test_equals_finite_differences_and_sums_to_the_whole(self):
    spec, params, prompts = setup('llama')
    prompt, layer, step, m = prompts[0], 0, 1e-4, 80
    with jax.enable_x64(True):
      config = KnConfig(steps=m)
      ((found, _),) = kn.attribute(spec, params, [prompt], config)
      naive = Naive('llama', prompt, layer, 'paper')
      chance = jax.jit(jax.vmap(naive))
      shares = jnp.arange(m)[:, None] / m
      for i in (0, 7, 30):
        move = step * jnp.eye(spec.mlp_width)[i]
        far, near = (chance(shares * naive.w + d) for d in (move, -move))
        want = naive.w[i] * jnp.mean(far - near) / (2 * step)
        np.testing.assert_allclose(found[0, layer, i], want, atol=1e-8)
      ends = jnp.array([0, 1e-4, 1 - 1e-4, 1])[:, None]
      low, after, short, high = chance(ends * naive.w)
      # What the left sum of m points lacks, to first order.
      rest = float((high - short) - (after - low)) / 1e-4 / (2 * m)
      total = float(high - low)
    got = found[0, layer].sum() + rest
    self.assertAlmostEqual(got, total, delta=0.01 * abs(total))

  def test_tokens_of_an_answer(self):
    edit = encoding.EncodedEdit(
        1,
        (np.array([5, 6], np.int32), np.array([9, 5, 6], np.int32)),
        (1, 2),
        np.array([3], np.int32),
        np.zeros(0, np.int32),
    )
    ids = lambda config: [
        (one.context, one.ids.tolist(), one.label)
        for one in kn.prompts_of([edit], [[7, 8]], config)
    ]
    self.assertEqual(
        ids(KnConfig()),
        [
            (0, [5, 6], 7),
            (0, [5, 6, 7], 8),
            (1, [9, 5, 6], 7),
            (1, [9, 5, 6, 7], 8),
        ],
    )
    self.assertEqual(
        ids(KnConfig(quantity='easyedit', sharing=0.0)),
        [(0, [5, 6], 7), (0, [5, 6], 8)],
    )


class NeuronsTest(absltest.TestCase):

  def found(self, rows, **settings):
    found = np.asarray(rows, float).reshape(len(rows), 2, -1)
    return kn.neurons_of(found, KnConfig(**settings)).tolist()

  def test_one_prompt(self):
    row = [[1.0, 0.21, 0.2, -1.0, 0.5, 0.0]]
    self.assertEqual(self.found(row), [[0, 0], [1, 1], [0, 1]])
    self.assertEqual(self.found(row, limit=2), [[0, 0], [1, 1]])
    self.assertEqual(self.found([[-1.0, -2.0]]), [])

  def test_shared(self):
    # Neuron 0 counts in 4 prompts of 5, neuron 1 in 3, neuron 2 in 2.
    rows = [
        [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1],
    ]  # fmt: skip
    # 0.7 leaves one alone, so the share falls to 0.6; 3 prompts are the least.
    self.assertEqual(self.found(rows), [[0, 0], [0, 1]])


@functools.cache
def bench(dtype=jnp.float64):
  with jax.enable_x64(True):
    params = models.random_params(SPEC, 0, dtype)
  encoder = encoding.fact_encoder(
      text_tokenizers.byte_level(begin=True),
      ('{}', 'So {}', 'Yes, {}'),
      max_tokens=64,
      anchor='prompt_last',
  )
  return models.as_model(SPEC, params), encoder


def run(requests, group=None, **settings):
  model, encoder = bench()
  encoded = encoder.encode(requests)
  editor = METHODS['kn'].editor(SPEC, METHODS['kn'].configure(**settings))
  state = editor.init(
      model, {Tokenizer(): text_tokenizers.byte_level(begin=True)}
  )
  plan = plan_lib.plan_shapes(encoded)
  with jax.enable_x64(True):
    batch = EditBatch(encoded, plan, group, requests)
    return editor.edit(model, state, batch, Run())


def kernel_of(edited=None):
  model, _ = bench()
  params = model.params
  if edited is not None:
    with jax.enable_x64(True):
      params = edited_lib.apply(params, edited)
  return np.asarray(params['layers']['mlp']['down']['kernel'])


class EditTest(parameterized.TestCase):

  @parameterized.parameters('paper', 'easyedit', 'erase')
  def test_equals_written_weights(self, kind):
    settings = {
        'paper': {},
        'easyedit': METHODS['kn'].parity['easyedit'],
        'erase': {'neuron_change': 'erase'},
    }[kind]
    got = run(REQUESTS[:1], **settings)
    self.assertTrue(got.info.written.all())
    old, new = kernel_of(), kernel_of(got.edited)
    table = np.asarray(bench()[0].params['embed']['embedding'])
    tokenizer = text_tokenizers.byte_level()
    ids = [tokenizer(t, add_special_tokens=False)['input_ids']
           for t in (' Fiji', ' Oz')]  # fmt: skip
    e_old, e_new = (table[one].sum(0) for one in ids)
    changed = np.argwhere((new != old).any(-1))
    self.assertLen(changed, got.info.per_edit['neuron_count'][0])
    want = old.copy()
    for layer, i in changed:
      row = old[layer, i]
      if kind == 'paper':
        size = np.linalg.norm(row)
        row = row - size * e_old / np.linalg.norm(e_old)
        row += 8 * size * e_new / np.linalg.norm(e_new)
      elif kind == 'easyedit':
        row = row - e_old + e_new
      else:
        row = 0 * row
      want[layer, i] = row
    np.testing.assert_allclose(new, want, rtol=1e-12, atol=1e-12)

  def test_a_neuron_of_two_edits(self):
    twice = [REQUESTS[0], dataclasses.replace(REQUESTS[0], number=9, id='9')]
    delta = lambda requests, **s: kernel_of(run(requests, **s).edited)
    once = delta(twice[:1]) - kernel_of()
    both = delta(twice) - kernel_of()
    np.testing.assert_allclose(both, 2 * once, rtol=1e-12, atol=1e-12)
    erase = {'neuron_change': 'erase'}
    np.testing.assert_array_equal(
        delta(twice, **erase), delta(twice[:1], **erase)
    )

  def test_independent_edits_are_edits_alone(self):
    apart = run(REQUESTS, [0, 1, 2])
    for i, one in enumerate(REQUESTS):
      want = kernel_of(run([one]).edited)
      got = kernel_of(edited_lib.select(apart.edited, i))
      np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

  def test_without_an_old_answer(self):
    bad = dataclasses.replace(REQUESTS[1], target_true=None)
    with self.assertRaisesRegex(
        InputError, r'^record 2 \(id 2\): .*old answer'
    ):
      run([REQUESTS[0], bad])
    with self.assertRaisesRegex(InputError, 'given token ids alone'):
      run([REQUESTS[0]]) and METHODS['kn'].editor(SPEC, KnConfig()).edit(
          bench()[0],
          kn.State(None),
          EditBatch(bench()[1].encode(REQUESTS[:1]), None),
          Run(),
      )
    # To erase, the target stands in for it.
    got = run([bad], neuron_change='erase')
    self.assertTrue(got.info.written.all())


if __name__ == '__main__':
  absltest.main()
