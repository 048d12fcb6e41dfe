"""Generated texts: equal to torch's, and each the business of its prompt."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import tempfile
from unittest import mock

import hf_oracle
import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from jaxedit.batching import beginnings
from jaxedit.deltas import LowRank
from jaxedit.models import decode, decode_state, decoder, loading, sampling
from jaxedit.testing import models as tiny
from jaxedit.types import InputError

NEW = 10
SIZES = (4, 8, 1, 6, 2)


def setUpModule():
  # On busy cores torch's threads wait for each other, seconds in all.
  torch.set_num_threads(1)


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

  @parameterized.parameters('llama', 'gpt2')
  def test_greedy_with_a_penalty(self, family):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    theirs = hf_oracle.make(family)
    hf_oracle.save(theirs, folder)
    ours = loading.load_model(folder)
    prompts = prompts_of((5, 12, 1))
    write = functools.partial(
        decode.generate, ours.spec, ours.params, prompts, max_new_tokens=40
    )
    texts = write(repetition_penalty=1.3)
    for prompt, text in zip(prompts, texts):
      # One at a time: transformers takes padding for a token of the text.
      with torch.no_grad():
        (row,) = theirs.generate(
            input_ids=torch.tensor([prompt]), do_sample=False,
            max_new_tokens=40, repetition_penalty=1.3, pad_token_id=0,
            eos_token_id=None,
        ).tolist()  # fmt: skip
      self.assertEqual(text, row[len(prompt) :])
    plain = write()
    for text, other in zip(texts, plain):
      self.assertNotEqual(text, other)
    # What is called sampling with next to no temperature.
    cold = dict(temperature=1e-3, top_p=0.8, top_k=20, repetition_penalty=1.3)
    self.assertEqual(write(**cold), texts)

  @parameterized.parameters(
      (1.0, 0, 0.9, 1.0),
      (1.0, 0, 0.3, 1.0),
      (0.7, 5, 1.0, 1.0),
      (0.7, 20, 0.8, 1.05),
      (2.0, 200, 0.99, 0.8),
      (1.0, 0, 1e-6, 1.0),
      (1.0, 0, 0.999999, 1.7),
  )
  def test_candidates(self, temperature, top_k, top_p, penalty):
    logits, seen = random_logits()
    ours = sampling.penalise(logits, seen, penalty)
    scores, names = sampling.candidates(
        ours, temperature=temperature, top_k=top_k,
        top_p=None if top_p == 1 else top_p,
    )  # fmt: skip
    chance = np.zeros_like(logits)
    np.put_along_axis(
        chance, np.asarray(names), np.asarray(jax.nn.softmax(scores)), axis=-1
    )
    warpers = [
        transformers.RepetitionPenaltyLogitsProcessor(penalty),
        transformers.TemperatureLogitsWarper(temperature),
    ]
    if top_k:
      warpers.append(transformers.TopKLogitsWarper(top_k))
    warpers.append(transformers.TopPLogitsWarper(top_p))
    for row in range(len(logits)):
      words = torch.tensor(np.flatnonzero(seen[row])[None])
      theirs = torch.tensor(logits[row][None])
      for warper in warpers:
        theirs = warper(words, theirs)
      theirs = theirs.softmax(-1)[0].numpy()
      np.testing.assert_array_equal(chance[row] > 0, theirs > 0)
      np.testing.assert_allclose(chance[row], theirs, rtol=0, atol=1e-6)


def random_logits():
  """Six rows of logits, flat to peaked, and which tokens were there."""
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((6, 97), np.float32)
  logits *= np.array([0.1, 0.5, 1, 2, 4, 8], np.float32)[:, None]
  return logits, rng.random((6, 97)) < 0.3


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
    key, value = (0.3 * rng.standard_normal(size, np.float32) for size in sizes)
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

  def test_every_prompt_under_its_own_change(self):
    rng = np.random.default_rng(0)
    draw = lambda width: 0.3 * rng.standard_normal((2, 8, 2, width), np.float32)
    key, value = draw(self.spec.mlp_width), draw(self.spec.width)
    stack = LowRank((0, 2), 'mlp/down', key, value)
    prompts = prompts_of(SIZES * 3)
    edit_ids = rng.permutation(np.arange(len(prompts)) % 8).tolist()
    settings = dict(temperature=1.0, repetition_penalty=1.2)
    write = functools.partial(self.write, prompts, **settings)
    own = dict(deltas=[stack], edit_ids=edit_ids)
    texts = write(**own)
    self.assertEqual(write(**own, batch_size=4), texts)
    base, down = self.params, self.params['layers']['mlp']['down']['kernel']
    for edit in range(8):
      self.params = jax.tree.map(lambda leaf: leaf, base)
      self.params['layers']['mlp']['down']['kernel'] = down.at[
          np.array([0, 2])
      ].add(np.einsum('lmf,lmd->lfd', key[:, edit], value[:, edit]))
      merged = self.write(prompts, **settings)
      for i, text in enumerate(merged):
        (self.assertEqual if edit_ids[i] == edit else self.assertNotEqual)(
            text, texts[i]
        )

  def test_streams_can_be_named(self):
    prompts = prompts_of(SIZES)
    write = functools.partial(self.write, temperature=1.0)
    texts = write(prompts)
    some = [4, 1]
    again = write([prompts[i] for i in some], streams=some)
    self.assertEqual(again, [texts[i] for i in some])
    self.assertLen(write(prompts[:1], streams=[2**31 - 1]), 1)
    with self.assertRaises(InputError) as caught:
      write(prompts, streams=[2**31, -1])
    count, number = caught.exception.problems
    self.assertIn('streams has 2 entries for 5 prompts', count)
    self.assertIn('stream 2147483648 does not exist', number)

  def test_a_number_does_not_recompile(self):
    programs = decode_state.prefill, decode_state.step
    count = lambda: [program._cache_size() for program in programs]
    write = functools.partial(self.write, prompts_of(SIZES))
    write(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    before = count()
    write(temperature=0.4, top_p=0.6, repetition_penalty=1.2, seed=9)
    write(temperature=0.4, top_p=0.6, repetition_penalty=1.2, max_new_tokens=5)
    write(temperature=0.1, top_p=0.1, repetition_penalty=0.9, stop_ids=[5])
    self.assertEqual(count(), before)

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

  def test_settings_out_of_range(self):
    with self.assertRaises(InputError) as caught:
      self.write(
          [[1]], temperature=float('nan'), top_k=-1, top_p=0, batch_size=0,
          repetition_penalty=0.0, max_new_tokens=0, stop_ids=[97],
      )  # fmt: skip
    names = (
        'max_new_tokens', 'batch_size', 'temperature', 'top_k', 'top_p',
        'repetition_penalty', 'stop token 97',
    )  # fmt: skip
    self.assertLen(caught.exception.problems, len(names))
    for problem, name in zip(caught.exception.problems, names):
      self.assertStartsWith(problem, name)


class LongTest(parameterized.TestCase):
  """Texts over many segments, with prompts waiting and rows running out."""

  def setUp(self):
    super().setUp()
    self.spec = tiny.tiny_spec('llama', max_positions=256, vocab=61, layers=1)
    self.params = tiny.random_params(self.spec, 0)
    rng = np.random.default_rng(0)
    sizes = (3, 30, 1, 20, 9, 2, 12, 5)
    self.prompts = [rng.integers(2, 61, size).tolist() for size in sizes]

  def write(self, prompts, **settings):
    settings = dict(max_new_tokens=90, stop_ids=(0,)) | settings
    return decode.generate(self.spec, self.params, prompts, **settings)

  @parameterized.parameters((0.0, 1.5), (1.0, 1.0))
  def test_batches(self, temperature, penalty):
    settings = dict(temperature=temperature, repetition_penalty=penalty)
    texts = self.write(self.prompts, **settings)
    self.assertEqual(self.write(self.prompts, batch_size=3, **settings), texts)
    lengths = [len(text) for text in texts]
    self.assertLess(min(lengths), 32)
    self.assertGreater(max(lengths), 64)
    for text in texts:
      self.assertNotIn(0, text[:-1])
      self.assertTrue(len(text) == 90 or text[-1] == 0)

  def test_a_batch_that_fits_is_not_copied(self):
    moved, whole = [], decode_state.resize

    def resize(state, kept, width):
      _, rows, _, layout, _ = state.cache[0].shape
      moved.append((layout, width))
      self.assertNotEqual((rows, layout), (len(kept), width))
      return whole(state, kept, width)

    with mock.patch.object(decode_state, 'resize', resize):
      self.write(self.prompts, stop_ids=(), batch_size=4)
    self.assertEqual(moved, [(64, 128), (128, 64), (64, 128)])

  def test_without_a_cache(self):
    texts = self.write(self.prompts, stop_ids=(), batch_size=4)
    tokens = np.zeros((len(texts), 30 + 90), int)
    for row, (prompt, text) in enumerate(zip(self.prompts, texts)):
      tokens[row, : len(prompt + text)] = prompt + text
    logits = np.asarray(forward(self.spec, self.params, tokens))
    for row, (prompt, text) in enumerate(zip(self.prompts, texts)):
      own = logits[row, len(prompt) - 1 :][:90]
      best = own.max(axis=-1)
      # Long greedy texts meet near ties; the choice is right up to rounding.
      chosen = own[np.arange(90), text]
      np.testing.assert_allclose(chosen, best, rtol=0, atol=1e-4)


class ShareTest(parameterized.TestCase):
  """What prompts begin with alike is run once."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(2, 61, n).tolist()
    one, other = draw(70), draw(40)
    # Two groups and two prompts that are alone; a group member is the beginning.
    self.prompts = [
        one + draw(3), other + draw(2), draw(5), one + draw(9), one, draw(50),
        other + draw(30), one + draw(1),
    ]  # fmt: skip

  def spec(self, family):
    return tiny.tiny_spec(family, max_positions=256, vocab=61, layers=2)

  def test_groups(self):
    groups = beginnings.groups(self.prompts)
    self.assertSameElements(groups, [0, 1, 3, 4, 6, 7])
    self.assertEqual({groups[i] for i in (0, 3, 4, 7)}, {(groups[0][0], 69)})
    self.assertEqual([groups[i][1] for i in (1, 6)], [40, 40])
    self.assertEmpty(beginnings.groups([[1] * 32, [1] * 32]))
    self.assertLen(beginnings.groups([[1] * 33, [1] * 33]), 2)

  @parameterized.parameters(('llama', 1.4), ('mistral', 1.0))
  def test_same_texts(self, family, penalty):
    spec = self.spec(family)
    params = tiny.random_params(spec, 0)
    settings = dict(
        max_new_tokens=40, temperature=1.0, repetition_penalty=penalty
    )
    write = functools.partial(
        decode.generate, spec, params, self.prompts, **settings
    )
    want = write()
    whole = decode_state.begin
    with mock.patch.object(decode_state, 'begin', wraps=whole) as begin:
      self.assertEqual(write(share=True), want)
      self.assertEqual(begin.call_count, 2)
      self.assertEqual(write(share=True, batch_size=3), want)
      write()
      self.assertEqual(begin.call_count, 4)

  @parameterized.parameters('llama', 'gpt2')
  def test_prefill_equals_a_full_run(self, family):
    spec = self.spec(family)
    params = tiny.random_params(spec, 1)
    rule, numbers = sampling.split(sampling.GREEDY)
    inputs = decode_state.DecodeInputs(
        numbers, np.zeros(61, bool), np.int32(4), ()
    )
    zero = np.zeros(2, np.int32)
    run = functools.partial(
        decode_state.prefill, spec, params, inputs, stream=zero, edit_id=zero,
        rule=rule,
    )  # fmt: skip
    some = [self.prompts[0], self.prompts[3]]
    tokens = np.zeros((2, 80), np.int32)
    for row, ids in zip(tokens, some):
      row[: len(ids)] = ids
    length = np.array([73, 79], np.int32)
    want, first = run(tokens, length=length)
    begun = np.zeros(128, np.int32)
    begun[:70] = tokens[0, :70]
    beginning = decode_state.begin(spec, params, inputs, begun, np.int32(70))
    rest = np.zeros((2, 16), np.int32)
    rest[:, :10] = tokens[:, 70:]
    got, same = run(rest, length=length - 70, beginning=beginning)
    np.testing.assert_array_equal(same, first)
    for one, other in zip(got.rows, want.rows):
      np.testing.assert_array_equal(one, other)
    for one, other in zip(got.cache, want.cache):
      for row, n in enumerate(length):
        np.testing.assert_allclose(
            one[:, row, :, :n], other[:, row, :, :n], rtol=0, atol=1e-4
        )


@functools.cache
def tiny_model():
  spec = tiny.tiny_spec('llama')
  return spec, tiny.random_params(spec, 0)


@functools.partial(jax.jit, static_argnums=0)
def forward(spec, params, tokens):
  layout = decoder.token_layout(tokens >= 0)
  return decoder.forward(spec, params, tokens, layout)


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
