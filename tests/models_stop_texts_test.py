"""Stop strings: by hand, and in cached generation against a naive loop."""

from __future__ import annotations

import functools

import jax
import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit.models import decode, decoder, stop_texts
from jaxedit.testing import models as tiny
from jaxedit.types import InputError

NEW = 70  # three segments


class Letters:
  """A tokenizer whose tokens are given texts."""

  def __init__(self, *parts):
    self._parts = parts

  def decode(self, ids, **options):
    assert not any(options.values()), options
    return ''.join(self._parts[i] for i in ids)


class EndTest(parameterized.TestCase):

  @parameterized.parameters(
      ('abcd', ('bc',), 3),  # within
      ('abcd', ('a',), 1),
      ('abcd', ('cd', 'b'), 2),  # whichever is complete first
      ('abcd', ('x',), None),
      ('abcd', (), None),
      ('', ('a',), None),
  )
  def test_one_letter_a_token(self, text, stops, want):
    detokenize = stop_texts.detokenizer(Letters(*'abcd'))
    ids = ['abcd'.index(char) for char in text]
    self.assertEqual(stop_texts.end_of(ids, stops, detokenize), want)

  def test_a_string_begins_and_ends_inside_tokens(self):
    # 'Retrieved fact:' over three tokens, the last of which says more.
    detokenize = stop_texts.detokenizer(
        Letters('a. Ret', 'rieved', ' fact: x', 'Retrieved fact', ': y', '')
    )
    end = functools.partial(
        stop_texts.end_of, stops=('Retrieved fact:',), detokenize=detokenize
    )
    self.assertIsNone(end([0, 1]))
    self.assertIsNone(end([0, 2, 1]))
    self.assertEqual(end([0, 5, 3, 4, 1]), 4)
    self.assertEqual(end([3, 4, 3, 4]), 2)
    self.assertEqual(end([3, 0, 3, 4], seen=2), 4)

  def test_refused(self):
    self.assertEmpty(stop_texts.errors([['a'], []], 2))
    (one,) = stop_texts.errors([['a']], 2)
    self.assertIn('stop_texts has 1 entries for 2 prompts', one)
    found = stop_texts.errors([['a', ''], 'ab'], 2)
    self.assertLen(found, 2)
    with self.assertRaisesRegex(InputError, 'takes a tokenizer'):
      stop_texts.detokenizer(None)


class GenerateTest(absltest.TestCase):

  def test_equal_to_a_naive_loop(self):
    tokenizer = text_tokenizers.byte_level()
    spec = tiny.tiny_spec('llama', vocab=400, max_positions=128)
    params = tiny.random_params(spec, 0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 390, n).tolist() for n in (5, 2, 9, 4, 7, 3)]
    settings = dict(temperature=1.5, max_new_tokens=NEW)
    write = functools.partial(
        decode.generate, spec, params, prompts, **settings
    )
    whole = write()
    # Strings that come up early, over a border of tokens, late, never, at once.
    said = [tokenizer.decode(ids) for ids in whole]
    middle = lambda ids, n: tokenizer.decode(ids[:n])[-2:]
    stops = [
        [middle(whole[0], 3)],
        [said[1][30:34], middle(whole[1], 60)],
        [middle(whole[2], 50)],
        ['never said'],
        [said[4][:1]],
        [],
    ]
    naive = []
    for ids, some in zip(whole, stops):
      count = 0
      while count < len(ids):
        count += 1
        text = tokenizer.decode(ids[:count])
        if any(stop in text for stop in some):
          break
      naive.append(ids[:count])
    self.assertLess(len(naive[0]), 5)
    self.assertLen(naive[4], 1)
    self.assertEqual([len(naive[i]) for i in (3, 5)], [NEW, NEW])
    for batch_size in (64, 4, 1):
      found = write(
          stop_texts=stops, tokenizer=tokenizer, batch_size=batch_size
      )
      self.assertEqual(found, naive)

  def test_greedy_equal_to_full_passes(self):
    """The naive loop runs the whole text for every token, without a cache."""
    tokenizer = text_tokenizers.byte_level()
    spec = tiny.tiny_spec('llama', vocab=400, max_positions=64, layers=1)
    params = tiny.random_params(spec, 1)
    prompt = [5, 9, 11]

    @jax.jit
    def following(tokens, count):
      layout = decoder.token_layout(np.ones((1, 44), bool))
      logits = decoder.forward(spec, params, tokens, layout)
      return logits[0, count - 1].argmax()

    def naive(stop):
      new = []
      while len(new) < 40:
        tokens = np.zeros((1, 44), int)
        tokens[0, : 3 + len(new)] = prompt + new
        new.append(int(following(tokens, 3 + len(new))))
        if stop in tokenizer.decode(new):
          break
      return new

    whole = naive('never said')
    for count in (2, 20, 36):
      stop = tokenizer.decode(whole[:count])[-3:]
      (found,) = decode.generate(
          spec, params, [prompt], max_new_tokens=40, stop_texts=[[stop]],
          tokenizer=tokenizer,
      )  # fmt: skip
      self.assertEqual(found, naive(stop))


if __name__ == '__main__':
  absltest.main()
