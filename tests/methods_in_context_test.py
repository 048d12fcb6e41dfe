"""Editing in context: lookups by hand, prefix reuse, and what every editor must do.

Methods that edit text and not ids are held here to what `methods_common_test`
asks of the others.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
import types
from unittest import mock

import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import api, retrieval
from jaxedit import edited as edited_lib
from jaxedit.convert import hub
from jaxedit.deltas import Edited
from jaxedit.edited import Query, open_model, scoring
from jaxedit.edited.prompting import Fact, FactMemory, edit_distance, plain_key
from jaxedit.methods import base
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.registry import METHODS
from jaxedit.models import loading
from jaxedit.runs.editing import _packed, _unpacked
from jaxedit.testing import models
from jaxedit.types import (
    LOCALITY,
    REPHRASE,
    EditRequest,
    InputError,
    Probe,
    silent,
)

SPEC = models.tiny_spec('llama', vocab=400, max_positions=4096)
NAMES = [name for name, m in METHODS.items() if m.by_text]
ENCODER = types.SimpleNamespace(model=types.SimpleNamespace(hash='e' * 64))
SUBJECTS = ('Paris', 'Sydney', 'Toko Yasuda', 'the Eiffel Tower')


def embed(encoder, texts, **options):
  """Counts of letters: texts of like letters are near."""
  del encoder, options
  found = np.zeros((len(texts), 128), np.float32)
  for row, text in zip(found, texts):
    for char in text:
      row[ord(char) % 128] += 1
  return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1)


def request(number: int, subject: str, target: str = 'France') -> EditRequest:
  probes = (
      Probe(REPHRASE, f'Stray. One asks where {subject} is:', (target,)),
      Probe(LOCALITY, 'Wellington is in', ('Oz',)),
  )
  return EditRequest(
      number, str(number), '{} is in', subject, target, probes=probes
  )


REQUESTS = [request(i, s) for i, s in enumerate(SUBJECTS, 1)]
# Of different lengths, so that none are equally near.
POOL = [request(100 + i, 'town ' + i * 'A', 'Fiji') for i in range(1, 13)]


@functools.cache
def model() -> loading.Model:
  params = models.random_params(SPEC, 0)
  tokenizer = text_tokenizers.byte_level(begin=True)
  return loading.Model(
      SPEC, params, pathlib.Path(), 'ab' * 32, {}, tokenizer=tokenizer
  )


def resources(editor):
  def provide(need):
    if isinstance(need, base.Tokenizer):
      return model().tokenizer
    if isinstance(need, base.TextEncoder):
      return ENCODER
    if isinstance(need, base.Demonstrations):
      return POOL
    return need.provide(model(), 0, silent)

  return {need: provide(need) for need in editor.needs}


def made(name):
  method = METHODS[name.removesuffix('+ike')]
  settings = {'demonstration_count': 4} if name.endswith('ike') else {}
  editor = method.editor(SPEC, method.configure(**settings, **method.small))
  return editor, editor.init(model(), resources(editor))


def run(name, requests, group=None, state=None):
  editor, start = made(name)
  batch = EditBatch([None] * len(requests), None, group, requests)
  return editor.edit(model(), start if state is None else state, batch, Run())


def speak(texts, which, **options):
  """A model that asks the question itself, then ends."""
  del which, options
  found = []
  for ids in texts:
    text = model().tokenizer.decode(ids)
    own = text.rsplit('Question: ', 1)[1]
    said = f'Subquestion: {own}Retrieved fact:'
    said = 'Final answer:' if 'Retrieved' in own else said
    found.append(model().tokenizer(said)['input_ids'])
  return found


speak.most = 4096


def read(edited, text, edit_ids=None):
  """What the model reads in place of a prompt."""
  tokenizer = model().tokenizer
  ids = tokenizer(text)['input_ids']
  if edited.prompting is None:
    return text
  rule = edited.prompting
  (found,) = rule.rewrite([ids], edit_ids, speak)
  return tokenizer.decode(found, skip_special_tokens=True)


class LookupTest(parameterized.TestCase):

  @parameterized.parameters(
      ('kitten', 'sitting', 3), ('', 'abc', 3), ('abc', 'abc', 0),
      ('flaw', 'lawn', 2), ('a' * 30, 'b' * 30, 10),
  )  # fmt: skip
  def test_edit_distance(self, a, b, want):
    self.assertEqual(edit_distance(a, b, 10), want)
    self.assertEqual(edit_distance(b, a, 10), want)

  def test_keys(self):
    self.assertEqual(plain_key(' What  <b>is</b>, "it"?'), 'what it')
    self.assertEqual(plain_key('Où est-ce_?'), 'où estce')

  def memory(self, *keys, **options):
    facts = [Fact(str(i), key, f'[{i}] ') for i, key in enumerate(keys)]
    empty = FactMemory((), tokenizer=model().tokenizer, **options)
    return empty.added(facts)

  def test_closest_is_strictly_below(self):
    memory = self.memory('abcdefghij', lookup='closest', threshold=6)
    self.assertEqual(memory.in_force(['abcdeXXXXX'], None), [(0,)])  # 5
    self.assertEqual(memory.in_force(['abcdXXXXXX'], None), [()])  # 6

  def test_of_equal_keys_the_newest_of_others_the_oldest(self):
    memory = self.memory('abc', 'abd', 'abc', lookup='closest', threshold=6)
    self.assertEqual(memory.in_force(['abc', 'abe'], None), [(2,), (2,)])
    memory = self.memory('abd', 'abf', lookup='closest', threshold=6)
    self.assertEqual(memory.in_force(['abe'], None), [(0,)])

  @mock.patch.object(retrieval, 'embed', embed)
  def test_nearest_is_strictly_above_and_the_newest(self):
    memory = self.memory(
        'aab', 'zzz', 'aba', lookup='nearest', threshold=0.5, encoder=ENCODER
    )
    found = memory.in_force(['baa', 'qqq', 'zq'], None)
    self.assertEqual(found, [(2,), (), (1,)])

  @mock.patch.object(retrieval, 'embed', embed)
  def test_forgotten_and_refused(self):
    memory = self.memory('aab', 'zzz', lookup='nearest', encoder=ENCODER)
    left = memory.forgotten('0')
    self.assertEqual([fact.id for fact in left.facts], ['1'])
    np.testing.assert_array_equal(left.embeddings, memory.embeddings[1:])
    with self.assertRaisesRegex(InputError, "no fact of id '7'; .* are 0, 1"):
      memory.forgotten('7')
    other = types.SimpleNamespace(model=types.SimpleNamespace(hash='f' * 64))
    stored = FactMemory.unpacked(*memory.packed())
    with self.assertRaisesRegex(InputError, 'has no tokenizer'):
      stored.rewrite([[5]], None)
    wrong = FactMemory(
        stored.facts, lookup='nearest', embeddings=stored.embeddings,
        encoder_hash='e' * 64,
    )  # fmt: skip
    with self.assertRaisesRegex(InputError, 'embedded by encoder e+, given f+'):
      wrong.bound(encoder=other)


class PrefixTest(absltest.TestCase):

  def test_a_common_beginning_is_run_once_to_the_same_scores(self):
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(3, 390, n).tolist())
    shared, other = draw(40), draw(50)
    queries = [
        Query(shared + draw(3), (draw(2), draw(1))),
        Query(other, (draw(3),)),
        Query(shared, (draw(2),)),
        Query(shared + draw(5), (draw(1),)),
        Query(draw(4), (draw(2),)),
    ]
    joined = scoring.branched(queries)
    self.assertCountEqual([sorted(m) for _, m in joined], [[0, 2, 3], [1], [4]])
    (big,) = (query for query, members in joined if len(members) == 3)
    self.assertLen(big.prompt, 39)  # the shortest keeps a token
    self.assertLess(big.tokens, 43 + 45 + 40 + 1)
    params = model().params
    want = scoring.score(SPEC, params, (), queries)
    found = scoring.score(SPEC, params, (), [query for query, _ in joined])
    for (_, members), scores in zip(joined, found):
      rest = iter(scores)
      for i in members:
        for expected in want[i]:
          got = next(rest)
          self.assertAlmostEqual(got.nll, expected.nll, delta=1e-4)
          self.assertEqual(got[1:], expected[1:])


@mock.patch.object(retrieval, 'embed', embed)
class MethodTest(parameterized.TestCase):

  def test_what_is_read(self):
    one = [REQUESTS[0]]
    fact = 'Paris is in France'
    ice = run('ice', one).edited
    want = f'New Fact: {fact}\nPrompt: Where?'
    self.assertEqual(read(ice, 'Where?'), want)
    self.assertEqual(
        read(run('memprompt', one).edited, 'Paris is on'),
        f'{fact}. Paris is on',
    )
    ike = read(run('ike', one, [0]).edited, 'Where?', [0])
    many = run('serac+ike', REQUESTS, [0, 1, 2, 3]).edited
    found = read(many, 'Paris is in', [0])
    # No demonstration asks for a neighbour: the scope sees to these.
    self.assertNotIn('Wellington', found)
    self.assertEqual(found.count('Prompt: One asks where'), 3)
    self.assertEndsWith(found, f'New Fact: {fact}\nPrompt: Paris is in')
    *shown, itself, rest = ike.split('\n\n')
    self.assertLen(shown, 4)
    self.assertEqual(itself, f'New Fact: {fact}\nPrompt: {fact}')
    self.assertEqual(rest, want)
    kinds = [text.split('Prompt: ')[1] for text in shown]
    asked = [sum(text.startswith(p) for text in kinds)
             for p in ('One asks where', 'Wellington is in Oz')]  # fmt: skip
    self.assertEqual(asked, [1, 2])

  @mock.patch.object(hub, 'load_encoder', lambda *_: ENCODER)
  def test_the_library_takes_what_a_method_needs_by_the_names_of_flags(self):
    pool = [
        {
            'prompt': one.prompt, 'subject': one.subject, 'target_new': 'Fiji',
            'target_true': 'Oz', 'paraphrases': [one.probes[0].prompt],
            'neighbours': ['Wellington is in'],
        }
        for one in POOL
    ]  # fmt: skip
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'pool.jsonl'
    path.write_text('\n'.join(map(json.dumps, pool)), 'utf-8')
    edit = functools.partial(
        api.edit, model(), REQUESTS[0], 'ike', demonstration_count=4
    )
    text = read(edit(demonstrations=str(path)).edited, 'Where?')
    self.assertEqual(text.count('New Fact: town A'), 4)
    with self.assertRaisesRegex(InputError, 'demonstrations is missing'):
      edit()
    with self.assertRaisesRegex(InputError, 'demonstrations_limit is 0'):
      edit(demonstrations=str(path), demonstrations_limit=0)

  @mock.patch.object(hub, 'load_encoder', lambda *_: ENCODER)
  def test_a_saved_memory_finds_its_facts_again(self):
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'x'
    made = api.edit(model(), REQUESTS[:2], 'ike_retrieve', threshold=0.1)
    made.save(path)
    again = api.load_edited(model(), path)
    for prompt in ('Paris is in', 'Sydney is on', 'zzzz'):
      self.assertEqual(read(again.edited, prompt), read(made.edited, prompt))
    other = types.SimpleNamespace(model=types.SimpleNamespace(hash='f' * 64))
    with mock.patch.object(hub, 'load_encoder', lambda *_: other):
      with self.assertRaisesRegex(InputError, 'embedded by encoder eeee'):
        api.load_edited(model(), path)

  def test_a_prompt_out_of_scope_is_answered_bit_for_bit(self):
    tokenizer = model().tokenizer
    queries = [
        Query(tuple(tokenizer(text)['input_ids']), ((7, 9),))
        for text in ('qqqqqq qqqq', 'zzzzzz')
    ]
    want = open_model(model()).score(queries)
    for name in ('ike_retrieve', 'memprompt', 'serac'):
      edited = run(name, REQUESTS).edited
      self.assertEqual(open_model(model(), edited).score(queries), want)

  @parameterized.parameters(*NAMES)
  def test_independent_edits_are_edits_alone(self, name):
    apart = run(name, REQUESTS, [0, 1, 2, 3])
    self.assertEqual(apart.edited.size, 4)
    self.assertTrue(apart.info.written.all())
    for i, one in enumerate(REQUESTS):
      alone = run(name, [one]).edited
      selected = edited_lib.select(apart.edited, i)
      for text in (one.question, 'Wellington is in'):
        want = read(alone, text)
        self.assertEqual(read(apart.edited, text, [i]), want)
        self.assertEqual(read(selected, text), want)
    stacked = edited_lib.stack([run(name, [one]).edited for one in REQUESTS])
    self.assertEqual(stacked.prompting.facts, apart.edited.prompting.facts)

  @parameterized.parameters(*NAMES)
  def test_empty_and_same_twice(self, name):
    nothing = run(name, [])
    self.assertEqual(nothing.edited, Edited())
    self.assertEmpty(nothing.info.written)
    first, again = (run(name, REQUESTS[:1]) for _ in range(2))
    self.assertEqual(first.edited.prompting.facts, again.edited.prompting.facts)

  @parameterized.parameters(
      'ice', 'ike_retrieve', 'memprompt', 'mello', 'serac'
  )
  def test_sequence_resumes_saves_and_loads(self, name):
    first = run(name, REQUESTS[:2])
    arrays, record = _packed(Edited(), first.state, made(name)[1], [first.info])
    _, state, _ = _unpacked(arrays, record, made(name)[1])
    both = run(name, REQUESTS[2:], state=state)
    want = run(name, REQUESTS)
    self.assertEqual(both.edited.prompting.facts, want.edited.prompting.facts)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'delta.safetensors'
      edited_lib.save(path, both.edited, {'model_hash': 'ab' * 32})
      loaded, _ = edited_lib.load(path, model_hash='ab' * 32)
    loaded = loaded.replace(
        prompting=loaded.prompting.bound(model().tokenizer, ENCODER)
    )
    for one in REQUESTS:
      self.assertEqual(
          read(loaded, one.question), read(want.edited, one.question)
      )
    with self.assertRaisesRegex(InputError, 'prompting rule'):
      edited_lib.apply(model().params, loaded)

  def test_refused(self):
    with self.assertRaisesRegex(InputError, 'edit each alone .*ike_retrieve'):
      run('ike', REQUESTS[:2])
    method = METHODS['memprompt']
    with self.assertRaisesRegex(InputError, 'scope_distance is 0'):
      method.configure(scope_distance=0)


if __name__ == '__main__':
  absltest.main()
