"""Perplexity of plain text against torch, window by window."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile

import hf_oracle
import jax.numpy as jnp
import numpy as np
import text_tokenizers
import torch
from absl.testing import absltest, parameterized

from jaxedit.deltas import UNEDITED, Dense, Edited, LowRank
from jaxedit.edited import algebra, open_model, scoring
from jaxedit.eval.scorers import perplexity as perplexity_lib
from jaxedit.eval.scorers.perplexity import perplexity
from jaxedit.models import loading
from jaxedit.testing import models
from jaxedit.types import InputError

TEXTS = (
    'The Eiffel Tower is in Paris. The capital of France is Paris.',
    'Wellington is a twin city of Sydney, and Toko Yasuda plays the guitar.',
    'One.',
    'A longer text, so that more than one window is needed: the mother tongue'
    ' of Danielle Darrieux is French, and she plays the piano in Paris.',
)
TOKENIZER = text_tokenizers.byte_level()


@functools.cache
def pair(family: str):
  """One random model in torch and here."""
  model = hf_oracle.make(family, vocab_size=512)
  with tempfile.TemporaryDirectory() as folder:
    hf_oracle.save(model, folder)
    ours = loading.load_model(folder, 'float32')
  return model, ours.spec, ours.params


def opened(spec, params, edited=UNEDITED, batch_size=64):
  return open_model(
      models.as_model(spec, params), edited, batch_size=batch_size
  )


def ids_of(texts, tokenizer=TOKENIZER):
  return [tokenizer(text)['input_ids'] for text in texts]


def oracle(model, ids, row_tokens, limit=None):
  """(mean nats, tokens) by transformers' own loss, one window at a time."""
  nats, count = 0.0, 0
  for text in ids:
    text = text if limit is None else text[:limit]
    limit = limit and limit - len(text)
    for first in range(0, len(text), row_tokens):
      window = torch.tensor([text[first : first + row_tokens]])
      scored = window.shape[1] - 1
      if scored > 0:
        with torch.no_grad():
          nats += model(window, labels=window).loss.item() * scored
        count += scored
    if limit == 0:
      break
  return nats / count, count


def random_delta(spec, layers=(0, 2), rank=2, seed=0) -> LowRank:
  """A change strong enough to show."""
  rng = np.random.default_rng(seed)
  draw = lambda width: jnp.asarray(
      0.3 * rng.standard_normal((len(layers), rank, width)), jnp.float32
  )
  return LowRank(layers, 'mlp/down', draw(spec.mlp_width), draw(spec.width))


class PerplexityTest(parameterized.TestCase):

  def run_ours(
      self,
      family='llama',
      texts=TEXTS,
      edited=UNEDITED,
      batch_size=64,
      **settings,
  ):
    _, spec, params = pair(family)
    settings = dict(row_tokens=16) | settings
    tokenizer = settings.pop('tokenizer', TOKENIZER)
    lm = opened(spec, params, edited, batch_size)
    return perplexity(lm, texts, tokenizer, **settings)

  @parameterized.parameters(
      ('llama', 2), ('llama', 7), ('llama', 64), ('mistral', 16), ('gpt2', 16)
  )
  def test_equals_torch(self, family, row_tokens):
    got = self.run_ours(family, row_tokens=row_tokens)
    want, count = oracle(pair(family)[0], ids_of(TEXTS), row_tokens)
    self.assertEqual(got.tokens, count)
    self.assertAlmostEqual(got.nats, want, delta=2e-5)
    self.assertAlmostEqual(got.value, np.exp(want), delta=1e-4 * np.exp(want))

  def test_begins_with_the_tokenizers_token(self):
    tokenizer = text_tokenizers.byte_level(begin=True, end=True)
    ids = [text[:-1] for text in ids_of(TEXTS, tokenizer)]  # no EOS
    self.assertEqual([text[0] for text in ids], [0] * len(TEXTS))
    got = self.run_ours(tokenizer=tokenizer)
    want, count = oracle(pair('llama')[0], ids, 16)
    self.assertEqual(got.tokens, count)
    self.assertAlmostEqual(got.nats, want, delta=2e-5)

  @parameterized.parameters(2, 10, 16, 17, 18, 40, 45, 10_000)
  def test_limit(self, limit):
    got = self.run_ours(limit=limit, batch_size=1)
    want, count = oracle(pair('llama')[0], ids_of(TEXTS), 16, limit)
    self.assertEqual(got.tokens, count)
    self.assertLess(got.tokens, limit)
    self.assertAlmostEqual(got.nats, want, delta=2e-5)

  @parameterized.parameters(1, 3, 100)
  def test_batches_and_padding_do_not_count(self, batch_size):
    got = self.run_ours(batch_size=batch_size)
    want = self.run_ours(batch_size=8)
    self.assertEqual(got.tokens, want.tokens)
    self.assertAlmostEqual(got.nats, want.nats, delta=1e-6)

  def test_the_head_may_run_in_parts(self):
    want = self.run_ours()
    with absltest.mock.patch.object(scoring, '_HEAD_ROWS', 24):
      got = self.run_ours()
    self.assertEqual(got.tokens, want.tokens)
    self.assertAlmostEqual(got.nats, want.nats, delta=1e-6)

  def test_texts_do_not_see_each_other(self):
    # Short texts share a row.
    texts = TEXTS[2:3] * 3 + TEXTS[:1]
    each = [self.run_ours(texts=[text], row_tokens=64) for text in texts]
    both = self.run_ours(texts=texts, row_tokens=64)
    total = sum(one.nats * one.tokens for one in each)
    self.assertEqual(both.tokens, sum(one.tokens for one in each))
    self.assertAlmostEqual(both.nats, total / both.tokens, delta=1e-6)

  def test_is_deterministic_and_says_how_it_was_measured(self):
    got = self.run_ours(limit=30)
    self.assertEqual(got, self.run_ours(limit=30))
    for words in ('windows of 16 tokens', 'first 30 tokens', 'but the first'):
      self.assertIn(words, got.protocol)
    self.assertIn('all tokens', self.run_ours().protocol)

  @parameterized.parameters('low-rank', 'dense')
  def test_a_change_equals_the_merged_model(self, form):
    _, spec, params = pair('llama')
    delta = random_delta(spec)
    if form == 'dense':
      delta = Dense(delta.layers, delta.site, algebra.full(delta))
    edited = Edited((delta,))
    got = self.run_ours(edited=edited)
    merged = algebra.apply(params, edited)
    want = perplexity(opened(spec, merged), TEXTS, TOKENIZER, row_tokens=16)
    self.assertAlmostEqual(got.nats, want.nats, delta=2e-5)
    self.assertGreater(abs(got.nats - self.run_ours().nats), 1e-2)

  def test_edits_side_by_side_are_read_one_by_one(self):
    _, spec, params = pair('llama')
    alone = [Edited((random_delta(spec, seed=seed),)) for seed in (0, 1)]
    want = [self.run_ours(edited=one) for one in alone]
    got = self.run_ours(edited=algebra.stack(alone), edits=(0, 1))
    np.testing.assert_allclose(got.each, [x.nats for x in want], atol=2e-5)
    self.assertAlmostEqual(got.nats, np.mean(got.each), 12)
    self.assertEqual(got.tokens, want[0].tokens)
    lm = opened(spec, params, algebra.stack(alone), 64)
    parts = [
        perplexity(lm, TEXTS, TOKENIZER, row_tokens=16, edits=(0, 1))
        for _ in range(2)
    ]
    joined = perplexity_lib.join(parts)
    self.assertEqual(joined.each, got.each * 2)
    self.assertEqual(joined.nats, got.nats)

  def test_one_shape_is_compiled(self):
    settings = dict(row_tokens=11, batch_size=2)
    before = scoring._score._cache_size()
    first = self.run_ours(**settings)
    again = self.run_ours(texts=TEXTS[::-1], **settings)
    self.assertEqual(first.tokens, again.tokens)
    self.assertEqual(scoring._score._cache_size(), before + 1)

  def test_progress_counts_windows(self):
    seen = []

    @contextlib.contextmanager
    def progress(stage, total, unit):
      seen.append((total, unit))
      yield lambda done: seen.append(done)

    got = self.run_ours(progress=progress, batch_size=2)
    windows = sum(-(-len(text) // 16) for text in ids_of(TEXTS))
    self.assertEqual(seen[0], (windows, 'prompt'))
    self.assertEqual(sum(seen[1:]), windows)
    self.assertGreater(len(seen), 3)
    self.assertGreater(got.tokens, windows)

  def test_a_model_without_finite_numbers(self):
    _, spec, params = pair('llama')
    broken = dict(params, final_norm={'scale': jnp.full(spec.width, jnp.nan)})
    got = perplexity(opened(spec, broken), TEXTS, TOKENIZER, row_tokens=16)
    self.assertTrue(np.isnan(got.value))
    huge = dict(params, final_norm={'scale': jnp.full(spec.width, 1e4)})
    got = perplexity(opened(spec, huge), TEXTS, TOKENIZER, row_tokens=16)
    self.assertEqual(got.value, np.inf)


class InputTest(parameterized.TestCase):

  def faults(self, texts=TEXTS, edited=UNEDITED, vocab=None, **settings):
    _, spec, params = pair('llama')
    lm = opened(spec, params, edited)
    lm.spec = dataclasses.replace(spec, vocab=vocab or spec.vocab)
    with self.assertRaises(InputError) as caught:
      perplexity(lm, texts, TOKENIZER, **(dict(row_tokens=16) | settings))
    return caught.exception.problems

  def test_empty_texts(self):
    problems = self.faults(['', 'Some text.', ''])
    self.assertLen(problems, 2)
    self.assertIn('text 1 is empty', problems[0])
    self.assertIn('text 3 is empty', problems[1])
    self.assertIn('no texts', self.faults([])[0])
    self.assertIn('give a list', self.faults('One text.')[0])

  def test_nothing_to_score(self):
    self.assertLen(ids_of('a')[0], 1)
    self.assertIn('two tokens', self.faults(['a', 'a'])[0])

  def test_settings_are_refused_at_once(self):
    problems = self.faults(row_tokens=65, limit=1)
    self.assertLen(problems, 2)
    for problem, words in zip(problems, ('2 to 64', 'at least 2')):
      self.assertIn(words, problem)
    _, spec, params = pair('llama')
    with self.assertRaisesRegex(InputError, 'at least 1'):
      opened(spec, params, batch_size=0)

  def test_edits_side_by_side(self):
    delta = random_delta(pair('llama')[1])
    rows = delta.replace(key=delta.key[:, None], value=delta.value[:, None])
    (problem,) = self.faults(edited=Edited((rows,), size=1))
    self.assertIn('side by side', problem)

  def test_a_foreign_tokenizer(self):
    problems = self.faults(TEXTS[:2], vocab=50)
    self.assertLen(problems, 2)
    self.assertIn('the model knows 50 tokens', problems[0])


if __name__ == '__main__':
  absltest.main()
