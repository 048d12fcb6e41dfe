"""Generated texts: equal to torch's, and each the business of its prompt."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import tempfile

import hf_oracle
import jax
import numpy as np
import torch
from absl.testing import absltest, parameterized

from jaxedit.models import decode, decoder, loading
from jaxedit.testing import models as tiny
from jaxedit.types import InputError, LowRank

NEW = 10
SIZES = (4, 8, 1, 6, 2)


def setUpModule():
  # Tiny programs take longer to compile than to run.
  jax.config.update('jax_disable_most_optimizations', True)
  # On busy cores torch's threads wait for each other, seconds in all.
  torch.set_num_threads(1)


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', False)


def prompts_of(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(2, 97, size).tolist() for size in sizes]


def torch_texts(model, prompts, stop_ids):
  """Greedy texts of transformers for one left-padded batch, padding removed."""
  width = max(map(len, prompts))
  tokens = np.zeros((len(prompts), width), int)
  valid = np.zeros((len(prompts), width), int)
  for row, prompt in enumerate(prompts):
    tokens[row, width - len(prompt) :] = prompt
    valid[row, width - len(prompt) :] = 1
  model.generation_config.eos_token_id = list(stop_ids) or None
  model.generation_config.pad_token_id = 0
  with torch.no_grad():
    out = model.generate(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(valid),
        do_sample=False,
        max_new_tokens=NEW,
    )
  return [until_stop(row, stop_ids) for row in out[:, width:].tolist()]


def until_stop(text, stop_ids):
  """A text up to and with its first stop token."""
  stops = [i for i, token in enumerate(text) if token in stop_ids]
  return text[: stops[0] + 1] if stops else text


class TorchTest(parameterized.TestCase):

  @parameterized.parameters(*hf_oracle.FAMILIES)
  def test_greedy(self, family):
    # The longest prompts pass Mistral's window of 8, the others meet it on
    # the way.
    prompts = prompts_of((5, 12, 1, 8, 3, 9))
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    theirs = hf_oracle.make(family)
    hf_oracle.save(theirs, folder)
    ours = loading.load_model(folder)
    write = functools.partial(
        decode.generate, ours.spec, ours.params, prompts, max_new_tokens=NEW
    )
    whole = write()
    self.assertEqual(whole, torch_texts(theirs, prompts, ()))
    self.assertEqual(set(map(len, whole)), {NEW})
    # Tokens that come up on the way end a text now.
    stop_ids = (whole[0][2], whole[1][0], whole[4][6])
    stopped = write(stop_ids=stop_ids)
    self.assertEqual(stopped, torch_texts(theirs, prompts, stop_ids))
    self.assertGreater(len(set(map(len, stopped))), 1)


class GenerateTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.spec, self.params = tiny_model()

  def write(self, prompts, **settings):
    settings = dict(max_new_tokens=NEW, top_k=5) | settings
    return decode.generate(self.spec, self.params, prompts, **settings)

  @parameterized.parameters(0.0, 1.0)
  def test_batches_and_neighbours(self, temperature):
    prompts = prompts_of(SIZES)
    write = functools.partial(self.write, temperature=temperature)
    texts = write(prompts)
    for batch_size in (1, 2):
      self.assertEqual(write(prompts, batch_size=batch_size), texts)
    # Others that need more padding.
    others = prompts_of((12, 1, 3, 10, 5), seed=1)
    for i, prompt in enumerate(prompts):
      mixed = others[:i] + [prompt] + others[i + 1 :]
      self.assertEqual(write(mixed)[i], texts[i])

  def test_streams(self):
    write = functools.partial(self.write, [[7, 8, 9]] * 5, temperature=1.0)
    texts = write()
    self.assertEqual(write(), texts)
    self.assertLen(set(map(tuple, texts)), 5)
    other = write(seed=1)
    for text, same in zip(texts, other):
      self.assertNotEqual(text, same)
    # The first of several is what it is alone.
    self.assertEqual(write(max_new_tokens=1), [text[:1] for text in texts])

  def test_temperature_zero_is_greedy(self):
    prompts = prompts_of(SIZES)
    texts = self.write(prompts, top_k=5, seed=3)
    self.assertEqual(self.write(prompts, top_k=0), texts)
    # Without a cache, token by token.
    for prompt, text in zip(prompts, texts):
      tokens = np.zeros((1, max(SIZES) + NEW), int)
      tokens[0, : len(prompt + text)] = prompt + text
      logits = forward(self.spec, self.params, tokens)
      ends = slice(len(prompt) - 1, len(prompt) + NEW - 1)
      self.assertEqual(logits[0, ends].argmax(axis=-1).tolist(), text)

  @parameterized.parameters(0.0, 1.0)
  def test_stop_tokens(self, temperature):
    prompts = prompts_of(SIZES)
    write = functools.partial(self.write, prompts, temperature=temperature)
    texts = write()
    stop_ids = (texts[0][3], texts[1][0], texts[3][-1])
    stopped = write(stop_ids=stop_ids)
    self.assertEqual(stopped, [until_stop(t, stop_ids) for t in texts])
    self.assertEqual(stopped[1], texts[1][:1])
    self.assertLess(len(stopped[0]), NEW)
    # All rows of every batch at once: the loop is never entered.
    first = {text[0] for text in texts}
    self.assertEqual(write(stop_ids=list(first)), [t[:1] for t in texts])

  def test_changes(self):
    rng = np.random.default_rng(0)
    sizes = (2, 3, self.spec.mlp_width), (2, 3, self.spec.width)
    key, value = (
        0.3 * rng.standard_normal(size, np.float32) for size in sizes
    )
    delta = LowRank((0, 2), 'mlp/down', key, value)
    down = self.params['layers']['mlp']['down']['kernel']
    merged = jax.tree.map(lambda leaf: leaf, self.params)
    merged['layers']['mlp']['down']['kernel'] = down.at[np.array([0, 2])].add(
        np.einsum('lmf,lmd->lfd', key, value)
    )
    prompts = prompts_of(SIZES)
    texts = self.write(prompts, deltas=[delta])
    self.assertNotEqual(texts, self.write(prompts))
    self.params = merged
    self.assertEqual(texts, self.write(prompts))

  def test_progress_counts_texts(self):
    seen = []

    @contextlib.contextmanager
    def progress(stage, total, unit):
      seen.append((stage, total, unit))
      yield seen.append

    self.write(prompts_of(SIZES), batch_size=2, progress=progress)
    self.assertEqual(seen, [('generate', 5, 'text'), 2, 2, 1])

  def test_no_prompts(self):
    self.assertEqual(self.write([]), [])

  def test_faults_come_together(self):
    # 64 positions, ten of them for the answer.
    prompts = [*prompts_of((54, 55, 0, 3)), [], [96, 97, -1]]
    with self.assertRaises(InputError) as caught:
      self.write(prompts)
    words = [
        'prompt 1 has 55 tokens; with 10 new ones the model takes 1 to 54',
        'prompt 2 has 0 tokens',
        'prompt 4 has 0 tokens',
        'prompt 5 has token -1, but the model knows 0 to 96',
    ]
    self.assertLen(caught.exception.problems, 4)
    for problem, part in zip(caught.exception.problems, words):
      self.assertIn(part, problem)
    (text,) = self.write(prompts[:1])
    self.assertLen(text, NEW)


@functools.cache
def tiny_model():
  spec = tiny.tiny_spec('llama')
  return spec, tiny.random_params(spec, 0)


@functools.partial(jax.jit, static_argnums=0)
def forward(spec, params, tokens):
  columns = decoder.token_columns(tokens >= 0)
  return decoder.forward(spec, params, tokens, columns)


class SamplingTest(parameterized.TestCase):
  """Draws many tokens and counts."""

  TEXTS = 3000

  @parameterized.parameters((3, 1.0), (3, 2.5), (0, 1.0), (0, 0.5), (99, 1.0))
  def test_frequencies(self, top_k, temperature):
    spec, params = small_vocabulary()
    texts = decode.generate(
        spec, params, [[3, 1]] * self.TEXTS, max_new_tokens=2, top_k=top_k,
        temperature=temperature, batch_size=self.TEXTS, seed=5,
    )  # fmt: skip

    def chance(prompt):
      logits = np.asarray(forward(spec, params, np.array([prompt])))[0, -1]
      weights = np.exp(logits / temperature)
      if top_k:
        weights[np.argsort(logits)[:-top_k]] = 0
      return weights / weights.sum()

    first, second = np.array(texts).T
    self.assert_drawn(first, chance([3, 1]))
    # The second token has a draw of its own.
    best = np.bincount(first).argmax()
    self.assert_drawn(second[first == best], chance([3, 1, best]))

  def assert_drawn(self, tokens, chance):
    """Counts are within 4.5 deviations; what has no chance is absent."""
    counts = np.bincount(tokens, minlength=len(chance))
    deviation = np.sqrt(len(tokens) * chance * (1 - chance))
    self.assertGreater(len(tokens), self.TEXTS // 10)
    self.assertFalse(counts[chance == 0].any())
    gap = np.abs(counts - len(tokens) * chance)
    self.assertTrue((gap <= 4.5 * deviation).all(), (counts, chance))


@functools.cache
def small_vocabulary():
  """A model of seven tokens that all have a fair chance."""
  spec = tiny.tiny_spec('llama', vocab=7, layers=1)
  return spec, tiny.random_params(spec, 2)


if __name__ == '__main__':
  absltest.main()
