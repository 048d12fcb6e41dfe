"""Values that route every prompt: batches, caches, and prompts in no scope."""

from __future__ import annotations

import functools
import pathlib
import types
from unittest import mock

import edits
import jax
import jax.numpy as jnp
import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit import retrieval
from jaxedit.deltas import Edited
from jaxedit.edited import Query, open_model
from jaxedit.edited.prompting import Fact, FactMemory, last_sentence
from jaxedit.models import decoder, loading
from jaxedit.testing import models

SPEC = models.tiny_spec('llama', vocab=400, max_positions=256)
KINDS = ('codebook', 'routed', 'memory', 'memory_with_deltas')
MEMORIES = KINDS[2:]
NEW = 9
SUBJECTS = ('Paris', 'Sydney', 'Toko Yasuda', 'the Eiffel Tower')
ENCODER = types.SimpleNamespace(model=types.SimpleNamespace(hash='e' * 64))


def embed(encoder, texts, **options):
  """Counts of letters: texts of like letters are near."""
  del encoder, options
  found = np.zeros((len(texts), 128), np.float32)
  for row, text in zip(found, texts):
    for char in text:
      row[ord(char) % 128] += 1
  return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1)


@functools.cache
def model():
  params = models.random_params(SPEC, 0)
  tokenizer = text_tokenizers.byte_level(begin=True)
  return loading.Model(
      SPEC, params, pathlib.Path(), 'ab' * 32, {}, tokenizer=tokenizer
  )


def memory(**options):
  empty = FactMemory(
      (), 'Prompt:', 'nearest', 0.8, encoder_hash='e' * 64,
      tokenizer=model().tokenizer, encoder=ENCODER, **options,
  )  # fmt: skip
  facts = [
      Fact(str(i), f'{name} is in', f'New Fact: {name} is in {i}\n')
      for i, name in enumerate(SUBJECTS)
  ]
  return empty.added(facts)


@functools.cache
def value(kind):
  """A value by the name of its kind; made under a mocked `embed`."""
  draw = edits.Draw(SPEC, layers=edits.LAYERS)
  return {
      'codebook': lambda: Edited((draw.codebook('mlp'),)),
      'routed': lambda: Edited((draw.routed('attn/out'),)),
      'memory': lambda: Edited(prompting=memory()),
      'memory_with_deltas': lambda: Edited(
          (draw.low_rank(),), prompting=memory(routes=True)
      ),
  }[kind]()  # fmt: skip


def prompts():
  """64 prompts: in the scope of each fact, and in none."""
  forms = ('{} is in', 'In {} is', '{} is not in', 'qqq {} zzzzzzzzzzzz 0123')
  texts = [
      form.format(name) + ' a' * times
      for form in forms
      for name in SUBJECTS
      for times in range(4)
  ]
  return [model().tokenizer(text)['input_ids'] for text in texts]


def in_scope(kind):
  """Which facts of a memory the prompts read."""
  texts = [
      model().tokenizer.decode(ids, skip_special_tokens=True)
      for ids in prompts()
  ]
  return value(kind).prompting.in_force(texts, None)


@mock.patch.object(retrieval, 'embed', embed)
class RoutedTest(parameterized.TestCase):

  @parameterized.parameters(*KINDS)
  def test_a_batch_generates_what_each_prompt_does(self, kind):
    some = prompts()
    self.assertLen(some, 64)
    lm = open_model(model(), value(kind), batch_size=64)
    together = lm.generate(some, max_new_tokens=NEW)
    alone = [lm.generate([one], max_new_tokens=NEW)[0] for one in some]
    self.assertEqual(together, alone)
    plain = open_model(model()).generate(some, max_new_tokens=NEW)
    same = [a == b for a, b in zip(together, plain)]
    self.assertIn(False, same)
    if kind in MEMORIES:
      routes = in_scope(kind)
      self.assertEqual(set(routes), {(), (0,), (1,), (2,), (3,)})
      for route, equal in zip(routes, same):
        if not route:
          self.assertTrue(equal)

  @parameterized.parameters(*MEMORIES)
  def test_a_prompt_in_no_scope_is_answered_bit_for_bit(self, kind):
    queries = [Query(tuple(ids), ((7, 9), (11,))) for ids in prompts()]
    found = open_model(model(), value(kind), batch_size=16).score(queries)
    want = open_model(model(), batch_size=16).score(queries)
    missed = [not route for route in in_scope(kind)]
    self.assertBetween(sum(missed), 8, 56)
    for got, plain, miss in zip(found, want, missed):
      (self.assertEqual if miss else self.assertNotEqual)(got, plain)

  @parameterized.parameters(*MEMORIES)
  def test_a_cache_changes_nothing(self, kind):
    # Codebooks and shards: `edited_lm_test`.
    edited, some = value(kind), prompts()[::5]
    texts = open_model(model(), edited).generate(some, max_new_tokens=NEW)
    read = edited.prompting.rewrite(some, None)
    changed = edited_lib.apply(model().params, Edited(edited.deltas))
    run = jax.jit(_logits)
    for prompt, as_read, text in zip(some, read, texts):
      params = changed if as_read != prompt else model().params
      tokens = list(as_read)
      for token in text:
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = run(params, padded, len(tokens))
        self.assertEqual(int(logits.argmax()), token)
        tokens.append(token)

  def test_scopes_that_route_are_stacked_selected_and_packed(self):
    both = edited_lib.stack([value('memory_with_deltas')] * 2)
    self.assertTrue(edited_lib.select(both, 1).prompting.routes)
    some = prompts()[::7]
    ids = [i % 2 for i in range(len(some))]
    found = open_model(model(), both).generate(
        some, max_new_tokens=4, edit_ids=ids
    )
    want = open_model(model(), value('memory_with_deltas')).generate(
        some, max_new_tokens=4
    )
    self.assertEqual(found, want)
    packed = FactMemory.unpacked(*both.prompting.packed())
    self.assertTrue(packed.routes)
    self.assertFalse(packed.last_sentence)


def _logits(params, tokens, length):
  layout = decoder.token_layout(jnp.arange(tokens.shape[1])[None] < length)
  h = decoder.embed(SPEC, params, tokens, layout)
  h, _ = decoder.run_layers(SPEC, params, h, layout, start=0, stop=SPEC.layers)
  return decoder.logits(SPEC, params, h[0, length - 1])


class LastSentenceTest(parameterized.TestCase):

  @parameterized.parameters(
      ('and Sallie Riley. Madrid is located in', 'Madrid is located in'),
      ('Dr. Who plays the', 'Dr. Who plays the'),
      ('J. R. R. Tolkien wrote in', 'J. R. R. Tolkien wrote in'),
      ('Where is Rabat? It is in', 'Where is Rabat? It is in'),
      ('A long stray one.\nLinks\n\nWhere it is', 'Where it is'),
      ('They were there. So it is', 'So it is'),
      ('It is far away. Why', 'It is far away. Why'),
      ('', ''),
  )
  def test_by_hand(self, text, want):
    self.assertEqual(last_sentence(text), want)


if __name__ == '__main__':
  absltest.main()
