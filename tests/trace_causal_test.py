"""Causal tracing equals full forwards with hooks, cell by cell."""

from __future__ import annotations

import contextlib
import copy
import functools
import json

import cases
import hf_oracle
import jax
import jax.numpy as jnp
import naive_oracle
import naive_trace
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxedit import placement, testing
from jaxedit.models import families, loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.testing import models as tiny
from jaxedit.trace import causal, partial_run
from jaxedit.trace.restoration import NAMES, Restoration, restoration

LAYERS, WIDTH, DRAWS = 4, 32, 2
CHANGES = {
    'llama': dict(num_hidden_layers=LAYERS),
    'gptj': dict(n_layer=LAYERS),
    'gpt2': dict(n_layer=LAYERS),
    # A window shorter than the prompts.
    'mistral': dict(num_hidden_layers=LAYERS, sliding_window=4),
    'qwen2': dict(num_hidden_layers=LAYERS),
    'qwen3': dict(num_hidden_layers=LAYERS),
    'gpt_neox': dict(num_hidden_layers=LAYERS),
}
# Layers that an MLP and an attention are restored in.
WINDOWS = {
    'llama': (2, 3),
    'mistral': (1, 10),
    'qwen2': (10, 2),
    'qwen3': (2, 1),
    'gptj': (3, 1),
    'gpt_neox': (1, 2),
    'gpt2': (3, 1),
}
# The transformers model that computes in float64 alone.
DOUBLE = 'gpt2'
TOLERANCE = {family: 1e-5 for family in CHANGES} | {DOUBLE: 1e-11}
# (tokens, first corrupted one, one past the last). One padded width.
PLACES = {
    'subject first': (8, 0, 2),
    'one token in the middle': (7, 3, 4),
    'subject last': (5, 2, 5),
}
# Other widths; a prompt of one token, and one that is all subject.
LENGTHS = ((12, 4, 5), (1, 0, 1), (3, 0, 3))
SOME = (restoration('attn', 3),)


@functools.cache
def model(family: str) -> naive_oracle.Pair:
  pair = naive_oracle.pair(family, **CHANGES[family])
  if family != DOUBLE:
    return pair
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), pair.params)
  return pair._replace(torch=copy.deepcopy(pair.torch).double(), params=params)


def everything(family: str) -> tuple[Restoration, ...]:
  windows = dict(zip(('mlp', 'attn'), WINDOWS[family]))
  return tuple(restoration(name, windows.get(name, 1)) for name in NAMES)


def make_cases(shapes, *, seed=0, width=WIDTH, scale=0.3):
  """Random prompts with noise of the size of an embedding."""
  rng = np.random.default_rng(seed)
  cases = []
  for length, first, end in shapes:
    ids = rng.integers(2, 95, length).astype(np.int32)
    noise = scale * rng.standard_normal((DRAWS, end - first, width))
    cases.append(causal.Case(ids, first, end, noise.astype(np.float32)))
  return cases


def trace(family, cases, some=None, **how):
  pair = model(family)
  with jax.enable_x64(family == DOUBLE):
    return causal.trace(
        pair.spec,
        pair.params,
        cases,
        placement=placement.one_device(),
        restorations=some or everything(family),
        **how,
    )


@functools.cache
def plain(family):
  """(cases, results) that several tests read."""
  cases = make_cases(PLACES.values())
  if family == 'gptj':
    several = np.random.default_rng(1).integers(2, 95, 3).astype(np.int32)
    cases[0] = cases[0]._replace(labels=several)
    cases[2] = cases[2]._replace(labels=several[:2])
  elif family != 'llama':  # spares them the programs of a prediction
    torch_model = model(family).torch
    cases = [
        case._replace(labels=naive_trace.ends(torch_model, case).labels)
        for case in cases
    ]
  return cases, trace(family, cases)


def only(result, some):
  """A result without the other restorations."""
  return result._replace(scores={k.name: result.scores[k.name] for k in some})


def check(found, cases, family, some=None, mode='add'):
  """Holds every cell to the oracle; columns right of the first scored are NaN."""
  some = some or everything(family)
  theirs, atol = model(family).torch, TOLERANCE[family]
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
  for result, case in zip(found, cases, strict=True):
    want = naive_trace.ends(theirs, case, mode)
    np.testing.assert_array_equal(result.labels, want.labels)
    close(result.high, want.high)
    close(result.low, want.low)
    assert list(result.scores) == [one.name for one in some]
    scored = len(case.ids) - len(want.labels)
    cells = list(np.ndindex(scored + 1, LAYERS))
    for one in some:
      got = result.scores[one.name]
      assert got.dtype == np.float64
      table = naive_trace.scores(theirs, case, one, mode=mode, cells=cells)
      close(got, table, err_msg=f'{one} {case.first}')


def same(found, wanted, atol=2e-7):
  """Holds results to one another."""
  for got, want in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(got.labels, want.labels)
    np.testing.assert_allclose(got[1:3], want[1:3], rtol=0, atol=atol)
    assert list(got.scores) == list(want.scores)
    for name, table in want.scores.items():
      np.testing.assert_allclose(got.scores[name], table, rtol=0, atol=atol)


class OracleTest(parameterized.TestCase):
  """The oracle is naive_trace, which runs every cell in full."""

  def test_no_family_is_left_out(self):
    decoders = {*families.NAMES} - {*tiny.ENCODER_DECODERS}
    self.assertCountEqual(CHANGES, decoders)

  @cases.first(3, parameterized.parameters(*CHANGES))
  def test_family(self, family):
    cases, found = plain(family)
    check(found, cases, family)
    # Restorations differ, and effects are far larger than the tolerance.
    tables = [
        np.concatenate([result.scores[one.name] for result in found])
        for one in everything(family)
    ]
    for i, table in enumerate(tables):
      self.assertGreater(np.nanmax(table) - np.nanmin(table), 1e-3)
      for other in tables[:i]:
        self.assertGreater(np.nanmax(abs(table - other)[:, :-1]), 1e-3)

  @parameterized.parameters('llama', 'gpt2')
  def test_noise_in_place_of_embeddings(self, family):
    cases, added = plain(family)
    found = trace(family, cases, mode='set')
    check(found, cases, family, mode='set')
    for result, other in zip(found, added):
      self.assertGreater(abs(result.low - other.low), 1e-4)

  def test_lengths(self):
    cases, found = plain('llama')
    mixed = [case for both in zip(make_cases(LENGTHS), cases) for case in both]
    got = trace('llama', mixed, SOME)
    check(got[::2], mixed[::2], 'llama', SOME)
    same(got[1::2], [only(result, SOME) for result in found])


class PropertyTest(parameterized.TestCase):

  @parameterized.parameters('llama', 'gpt_neox', 'gpt2')
  def test_last_state_is_all(self, family):
    for case, result in zip(*plain(family)):
      hidden = result.scores['hidden']
      self.assertAlmostEqual(hidden[-1, -1] / result.high, 1, delta=2e-6)
      # Before the last token, the last state changes nothing.
      np.testing.assert_allclose(hidden[:-1, -1], result.low, rtol=2e-6)
      # Above it there is nothing to hold.
      for name in ('severed_mlp', 'severed_attn'):
        severed = result.scores[name]
        np.testing.assert_array_equal(severed[:, -1], hidden[:, -1])
      # Nothing left of the subject was corrupted.
      for table in result.scores.values():
        np.testing.assert_array_equal(table[: case.first], result.low)

  @parameterized.parameters('llama', 'gpt2')
  def test_embeddings_as_they_are(self, family):
    table = np.asarray(model(family).params['embed']['embedding'])
    cases = []
    for case in plain(family)[0]:
      own = table[case.ids[case.first : case.end]].astype(np.float32)
      cases.append(case._replace(noise=np.repeat(own[None], DRAWS, axis=0)))
    for result in trace(family, cases, mode='set'):
      self.assertAlmostEqual(result.low / result.high, 1, delta=2e-6)
      for scores in result.scores.values():
        np.testing.assert_allclose(scores, result.high, rtol=1e-5)

  def test_draws_are_averaged(self):
    cases, found = plain('llama')
    pick = lambda *draws: trace(
        'llama', [c._replace(noise=c.noise[list(draws)]) for c in cases]
    )
    same(pick(1, 0), found)
    for result, a, b in zip(found, pick(0, 0), pick(1, 1)):
      self.assertAlmostEqual(result.low, (a.low + b.low) / 2, delta=2e-7)
      for name, table in result.scores.items():
        mean = (a.scores[name] + b.scores[name]) / 2
        np.testing.assert_allclose(table, mean, rtol=0, atol=2e-7)

  @parameterized.parameters(1, 2, 3, 10)
  def test_windows_are_cut_at_the_ends(self, window):
    for layer in range(LAYERS):
      below, above = window // 2, -(-window // 2)
      wanted = {*range(layer - below, layer + above)} & {*range(LAYERS)}
      found = restoration('mlp', window).layers(layer, LAYERS)
      self.assertEqual({*range(*found)}, wanted)


class BatchTest(absltest.TestCase):

  def test_order_and_neighbours_do_not_matter(self):
    cases, found = plain('llama')
    same(trace('llama', cases[::-1])[::-1], found)
    strange = make_cases(PLACES.values(), seed=5, scale=100.0)
    for i, case in enumerate(cases):
      mixed = strange[:i] + [case] + strange[i + 1 :]
      same([trace('llama', mixed)[i]], [found[i]])

  def test_places_do_not_matter(self):
    cases, found = plain('llama')
    got = trace('llama', cases, SOME, token_budget=1)
    same(got, [only(result, SOME) for result in found])

  def test_some_tokens(self):
    cases, found = plain('llama')
    tokens = [[0, 4], [], [3, 3, 1]]
    wanted = []
    for result, columns in zip(found, tokens):
      scores = {}
      for one in SOME:
        table = result.scores[one.name]
        scores[one.name] = np.full_like(table, np.nan)
        scores[one.name][columns] = table[columns]
      wanted.append(result._replace(scores=scores))
    same(trace('llama', cases, SOME, tokens=tokens), wanted)

  def test_same_shapes_compile_once(self):
    plain('llama')
    programs = (partial_run.tables, partial_run.run_cells, partial_run.edge)
    before = [program._cache_size() for program in programs]
    trace('llama', make_cases(PLACES.values(), seed=9))
    self.assertEqual([p._cache_size() for p in programs], before)

  def test_progress_counts_cells(self):
    seen = []

    @contextlib.contextmanager
    def display(stage, total, unit):
      del stage
      seen.append((total, unit))
      yield seen.append

    cases, _ = plain('llama')
    trace('llama', cases, progress=display)
    total = 5 * LAYERS * sum(len(case.ids) for case in cases)
    self.assertEqual(seen[0], (total, 'cell'))
    self.assertEqual(sum(seen[1:]), total)

  def test_no_cases(self):
    self.assertEqual(trace('llama', []), [])


class PredictTest(absltest.TestCase):

  def test_is_the_most_probable_token(self):
    pair = model('llama')
    cases = make_cases([*LENGTHS, *PLACES.values()], seed=2)
    rows = [case.ids for case in cases]
    for batch in (2, 64):
      got = causal.predict(pair.spec, pair.params, rows, batch_rows=batch)
      for case, token, probability in zip(cases, *got, strict=True):
        want = naive_trace.ends(pair.torch, case)
        self.assertEqual(token, want.labels[0])
        self.assertAlmostEqual(probability, want.high, delta=1e-5)


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(first=3, end=3), {}, 'tokens 3 to 2'),
      (dict(end=9), {}, 'of 8'),
      (dict(noise=np.zeros((2, 1, 32), np.float32)), {}, 'but 2 tokens of'),
      (dict(noise=np.zeros((2, 2, 31), np.float32)), {}, 'of width 32'),
      (dict(ids=np.full(8, 97, np.int32)), {}, 'vocabulary of 97'),
      (dict(noise=np.zeros((3, 2, 32), np.float32)), {}, 'as many draws'),
      (dict(labels=np.zeros(9, np.int32)), {}, 'more labels'),
      ({}, dict(mode='replace'), "'add', 'set'"),
      (
          {},
          dict(some=[restoration('mlp', 2), restoration('mlp', 3)]),
          'one name',
      ),
      ({}, dict(some=[restoration('mlp', 0)]), 'window'),
      (
          {},
          dict(some=[restoration('mlp', 2)._replace(sever='attn')]),
          'severing',
      ),
      ({}, dict(tokens=[[1]]), 'columns for 1 of 3'),
      ({}, dict(tokens=[[8], [], []]), 'columns'),
      ({}, dict(tokens=[[-1], [], []]), 'columns'),
  )
  def test_says_what_is_wrong(self, changes, how, words):
    first, *others = make_cases(PLACES.values())
    with self.assertRaisesRegex(ValueError, words):
      trace('llama', [first._replace(**changes), *others], **how)


class SmolLm2Test(absltest.TestCase):
  """Real facts in a real model: 30 layers, windows of 10."""

  OPTIMIZE = True  # see conftest

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = testing.demo_model()
    facts = testing.data_path('known_facts.jsonl').read_text().splitlines()
    # Of one padded width: each has programs of its own.
    cls.facts = [json.loads(line) for line in facts[1:4]]
    cls.theirs = hf_oracle.load(folder)
    cls.ours = loading.load_model(folder)
    cls.tokenizer = tokenizer_lib.load_tokenizer(folder)

  @classmethod
  def tearDownClass(cls):
    # Half a GiB each.
    del cls.ours, cls.theirs
    super().tearDownClass()

  @pytest.mark.long
  def test_sampled_cells(self):
    rng = np.random.default_rng(0)
    spec, cases = self.ours.spec, []
    some = tuple(map(restoration, NAMES))
    for fact in self.facts:
      ids = np.array(self.tokenizer(fact['prompt'])['input_ids'], np.int32)
      # The subject opens the prompt.
      end = len(self.tokenizer(fact['subject'])['input_ids'])
      noise = 0.3 * rng.standard_normal((DRAWS, end, spec.width))
      cases.append(causal.Case(ids, 0, end, noise.astype(np.float32)))
    # The first token's activations are huge, its parts' differences as well.
    tokens = [[0], [cases[1].end - 1], [len(cases[2].ids) - 1]]
    found = causal.trace(
        spec,
        self.ours.params,
        cases,
        placement=placement.one_device(),
        restorations=some,
        tokens=tokens,
    )
    for result, case, (token,) in zip(found, cases, tokens):
      want = naive_trace.ends(self.theirs, case)
      np.testing.assert_array_equal(result.labels, want.labels)
      self.assertAlmostEqual(result.high, want.high, delta=1e-4)
      self.assertAlmostEqual(result.low, want.low, delta=1e-4)
      case = case._replace(labels=want.labels)
      for one in some:
        cell = token, int(rng.integers(0, spec.layers))
        table = naive_trace.scores(self.theirs, case, one, cells=[cell])
        got = result.scores[one.name][cell]
        self.assertAlmostEqual(got, table[cell], delta=1e-4)


if __name__ == '__main__':
  absltest.main()
