"""Every kind of edit through the interface: scored, generated, side by side."""

from __future__ import annotations

import functools
from unittest import mock

import cases
import chex
import edits
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from edits import (
    CHOOSING,
    KINDS,
    SPEC,
    deltas_of,
    model,
    random_prompts,
    random_queries,
)
from numpy_decoder import oracle, oracle_logits

from jaxedit import edited as edited_lib
from jaxedit.deltas import UNEDITED, Edited
from jaxedit.edited import Query, apply_model, open_model, select
from jaxedit.models import decode, decode_state, decoder
from jaxedit.models.decode import Decoding

NEW = 40  # more than a segment, so that rows are refilled while others go on


def oracle_run(tokens, prompt, edited, chosen=None):
  """[T, V] logits of a text in numpy; the first tokens are its prompt."""
  params, edit = model('float64').params, edits.rule
  small = [d for d in edited.deltas if getattr(d, 'leaf', 'kernel') != 'kernel']
  params = edited_lib.apply(params, Edited(tuple(small)))
  rest = [d for d in edited.deltas if not any(d is s for s in small)]
  h, _ = oracle(SPEC, params, tokens, edit=edit(rest, prompt, chosen))
  return oracle_logits(SPEC, params, h)


class OracleTest(parameterized.TestCase):
  """Answers and generated texts against numpy, in f64."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.product(name=KINDS, size=(None, 3))
  def test_score(self, name, size):
    # The prompt is read once for all of its answers, and decides alone.
    edited = Edited(deltas_of(name, size, jnp.float64), size=size)
    queries, chosen = random_queries(), []
    ids = None if size is None else [i % 3 for i in range(len(queries))]
    lm = open_model(model('float64'), edited, batch_size=4)
    found = lm.score(queries, edit_ids=ids)
    for i, (query, scores) in enumerate(zip(queries, found, strict=True)):
      own = edited if size is None else select(edited, ids[i])
      for answer, got in zip(query.answers, scores, strict=True):
        text, size_ = query.prompt + answer, len(query.prompt)
        logits = oracle_run(text, size_, own, chosen)[size_ - 1 : -1]
        logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = -np.mean(logprob[np.arange(len(answer)), list(answer)])
        self.assertAlmostEqual(got.nll, want, delta=1e-10)
        self.assertEqual(got.argmax, tuple(logits.argmax(-1).tolist()))
    if name in CHOOSING:
      self.assertGreater(len({*chosen}), 2)
      if name != 'routed':
        self.assertIn(-1, chosen)

  @parameterized.product(name=KINDS, size=(None, 3))
  def test_generate(self, name, size):
    # Without a cache, the choice made once, on the prompt.
    edited = Edited(deltas_of(name, size, jnp.float64), size=size)
    prompts = random_prompts()
    ids = None if size is None else [i % 3 for i in range(len(prompts))]
    # Rows are refilled again and again, or leave as the batch shrinks.
    rows = 8 if size is None else 4
    lm = open_model(model('float64'), edited, batch_size=rows)
    with mock.patch.object(
        decode_state, 'resize', side_effect=decode_state.resize
    ) as resized:
      texts = lm.generate(
          prompts, max_new_tokens=NEW, stop_ids=range(9), edit_ids=ids
      )
    self.assertEqual(resized.called, size is None)
    lengths = [len(text) for text in texts]
    self.assertLess(min(lengths), 32)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
      own = edited if size is None else select(edited, ids[i])
      logits = oracle_run(prompt + text, len(prompt), own)
      best = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
      self.assertEqual(text, best)
      self.assertTrue(len(text) == NEW or text[-1] < 9)


class SideBySideTest(parameterized.TestCase):

  @parameterized.parameters('low_rank', 'dense', 'mixed')
  def test_each_is_the_edit_alone(self, name):
    edited = Edited(deltas_of(name, 3), size=3)
    queries, prompts = random_queries(), random_prompts(5)
    ids = np.random.default_rng(0).permutation(np.arange(9) % 3).tolist()
    decoding = Decoding(temperature=1.0, repetition_penalty=1.2)
    settings = dict(max_new_tokens=12, decoding=decoding)
    lm = open_model(model(), edited, batch_size=4)
    scores = lm.score(queries, edit_ids=ids)
    texts = lm.generate(prompts, edit_ids=ids, **settings)
    for edit in range(3):
      alone = open_model(model(), select(edited, edit), batch_size=4)
      found = alone.score(queries), alone.generate(prompts, **settings)
      for i, (answers, text) in enumerate(zip(*found)):
        if ids[i] != edit:
          continue
        self.assertEqual(text, texts[i])
        for got, want in zip(scores[i], answers, strict=True):
          self.assertAlmostEqual(got.nll, want.nll, delta=1e-4)
          self.assertEqual(got[1:], want[1:])
    base = open_model(model()).generate(prompts, **settings)
    self.assertNotEqual(texts, base)

  @parameterized.parameters('neurons', 'all', 'routed')
  def test_padded_with_what_changes_nothing(self, name):
    # Of another number of neurons, entries or shards.
    (small,), (large,) = deltas_of(name), deltas_of(name, seed=1)
    free = {n for n, axes in small.axes.items() if axes.split()[:1] != ['in']}
    cut = lambda n, x: x[:, :2] if n in free and x.ndim > 1 else x
    small = small.replace(
        **{n: cut(n, getattr(small, n)) for n in small.axes}
        | ({'count': jnp.array([2, 2])} if name == 'all' else {})
    )
    both = edited_lib.stack([Edited((small,)), Edited((large,))])
    queries = random_queries()
    for edit, delta in enumerate((small, large)):
      alone = open_model(model(), Edited((delta,))).score(queries)
      got = open_model(model(), both).score(queries, edit_ids=[edit] * 9)
      for one, other in zip(sum(got, []), sum(alone, []), strict=True):
        self.assertAlmostEqual(one.nll, other.nll, delta=1e-5)
        self.assertEqual(one.argmax, other.argmax)

  def test_a_second_batch_does_not_recompile(self):
    programs = (
        edited_lib.scoring._score, decode_state.prefill,
        decode_state.step,
    )  # fmt: skip
    sizes, queries, prompts = [], random_queries(), random_prompts()
    other = lambda ids: tuple(98 - i for i in ids)
    for seed in (0, 1):
      edited = Edited(deltas_of('mixed', 3, seed=seed), size=3)
      lm = open_model(model(), edited, batch_size=4)
      ids = [(i + seed) % 3 for i in range(9)]
      lm.score(queries, edit_ids=ids)
      lm.generate(prompts, edit_ids=ids, max_new_tokens=4 + seed)
      sizes.append([program._cache_size() for program in programs])
      queries = [Query(other(p), tuple(map(other, a))) for p, a, _ in queries]
      prompts = [list(other(prompt)) for prompt in prompts]
    self.assertEqual(*sizes)


class WeightsTest(parameterized.TestCase):
  """What weights and deltas a change of weights is run with."""

  def spied(self, here, edited):
    """(parameters, deltas) that queries and prompts are run with."""
    lm = open_model(here, edited)
    with mock.patch.object(
        edited_lib.scoring, 'score', return_value=[[None]]
    ) as score:
      lm.score([Query((4, 5), ((6,),))])
    with mock.patch.object(decode, 'generate', return_value=[[]]) as generate:
      lm.generate([[4, 5]], max_new_tokens=1)
    scored, written = score.call_args.args, generate.call_args
    self.assertIs(written.args[1], scored[1])
    self.assertIs(written.kwargs['deltas'], scored[2])
    return scored[1:3]

  def test_f32_takes_the_change(self):
    # Which then runs through the programs of the unedited model.
    here, change = model(), Edited(deltas_of('low_rank') + deltas_of('dense'))
    params, deltas = self.spied(here, change)
    self.assertEqual(deltas, ())
    chex.assert_trees_all_equal(params, edited_lib.apply(here.params, change))
    (codebook,) = deltas_of('last')
    mixed = Edited((codebook, *change.deltas))
    params, deltas = self.spied(here, mixed)
    self.assertLen(deltas, 1)
    self.assertIs(deltas[0], codebook)
    chex.assert_trees_all_equal(params, edited_lib.apply(here.params, change))

  def test_bfloat16_would_round_it(self):
    here, change = model('bfloat16'), Edited(deltas_of('low_rank'))
    params, deltas = self.spied(here, change)
    self.assertIs(params, here.params)
    self.assertLen(deltas, 1)
    self.assertIs(deltas[0], change.deltas[0])

  def test_changes_of_weights_come_first(self):
    # However they are listed, and whether they are merged or not.
    queries, (codebook,) = random_queries(), deltas_of('all')
    (change,) = deltas_of('low_rank')
    for dtype in ('float32', 'bfloat16'):
      one, other, without = (
          sum(open_model(model(dtype), Edited(some)).score(queries), [])
          for some in ((change, codebook), (codebook, change), (change,))
      )
      self.assertEqual(one, other)
      self.assertNotEqual(one, without)


class ScopeTest(parameterized.TestCase):
  """A prompt in no scope is answered by the unedited model, bit for bit."""

  OPTIMIZE = True

  @cases.first(1, parameterized.parameters('float32', 'bfloat16'))
  def test_out_of_scope(self, dtype):
    here, queries = model(dtype), random_queries()
    far = [
        d.replace(radii=jnp.full_like(d.radii, 1e-3))
        for name in ('prompt', 'all')
        for d in deltas_of(name, dtype=jnp.dtype(dtype))
    ]
    (near,) = deltas_of('last', dtype=jnp.dtype(dtype))
    (routed,) = deltas_of('routed', dtype=jnp.dtype(dtype))
    # In reach of the first prompt alone.
    near = near.replace(
        keys=near.keys.at[:, 2].set(self.key(here, near, queries[0].prompt)),
        radii=jnp.full_like(near.radii, 0.2),
    )
    routed = routed.replace(thresholds=jnp.full_like(routed.thresholds, 1e3))
    edited = Edited((near, *far, routed))
    first, *rest = open_model(here, edited).score(queries)
    base_first, *base_rest = open_model(here).score(queries)
    self.assertNotEqual(first, base_first)
    self.assertEqual(rest, base_rest)
    tokens = np.random.default_rng(3).integers(2, 97, (3, 8))
    layout = decoder.token_layout(np.ones((3, 8), bool))
    run = jax.jit(functools.partial(apply_model, SPEC))
    np.testing.assert_array_equal(
        *(run(here.params, e, tokens, layout) for e in (edited, UNEDITED))
    )

  def key(self, here, delta, prompt):
    """[n, D] input of the MLP at the last token, layer by layer."""
    tokens = np.array([prompt])
    layout = decoder.token_layout(tokens >= 0)
    h = decoder.embed(SPEC, here.params, tokens, layout)
    _, (seen,) = decoder.run_layers(
        SPEC, here.params, h, layout, start=0, stop=3,
        taps=[decoder.Tap('mlp/up', delta.layers)],
    )  # fmt: skip
    return seen[:, 0, -1].astype(delta.keys.dtype)


if __name__ == '__main__':
  absltest.main()
