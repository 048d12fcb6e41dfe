"""Scoring in one pass against a plain forward pass an answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit.deltas import UNEDITED, Edited, LowRank
from jaxedit.edited import open_model, scoring, select
from jaxedit.models import decoder
from jaxedit.testing import models
from jaxedit.types import InputError


def random_rows(count: int, seed: int = 0, vocab: int = 97):
  """Rows of 1 to 8 prompt tokens with 1 to 3 answers of 1 to 4 tokens."""
  rng = np.random.default_rng(seed)
  draw = lambda n: tuple(rng.integers(0, vocab, n).tolist())
  return [
      scoring.Query(
          draw(rng.integers(1, 9)),
          tuple(draw(rng.integers(1, 5)) for _ in range(rng.integers(1, 4))),
      )
      for _ in range(count)
  ]


def score(spec, params, rows, edited=UNEDITED, batch_size=64, **settings):
  model = models.as_model(spec, params)
  lm = open_model(model, edited, batch_size=batch_size)
  return lm.score(rows, **settings)


def naive(spec, params, deltas, row):
  """(nll, argmax) of every answer, each a text of its own."""
  count, width = 3, 16
  ids = np.zeros((count, width), np.int32)
  valid = np.zeros((count, width), bool)
  for i, answer in enumerate(row.answers):
    text = row.prompt + answer
    ids[i, : len(text)], valid[i, : len(text)] = text, True
  logits = plain(spec, params, ids, decoder.token_layout(valid), deltas)
  out = []
  for i, answer in enumerate(row.answers):
    first = len(row.prompt) - 1
    own = np.asarray(logits[i], np.float64)[first : first + len(answer)]
    logprob = own - np.log(np.sum(np.exp(own), -1, keepdims=True))
    nll = -np.mean([logprob[j, token] for j, token in enumerate(answer)])
    out.append((nll, tuple(np.argmax(own, -1).tolist())))
  return out


@jax.jit(static_argnums=0)
def plain(spec, params, ids, columns, deltas):
  return decoder.forward(spec, params, ids, columns, deltas=deltas)


def random_stack(spec, edits: int, seed: int = 0) -> Edited:
  """Rank-2 changes of two layers' MLP, strong enough to show."""
  rng = np.random.default_rng(seed)
  shape = lambda width: (2, edits, 2, width)
  make = lambda width: jnp.asarray(
      rng.standard_normal(shape(width)), jnp.float32
  )
  key, value = make(spec.mlp_width), make(spec.width)
  delta = LowRank((1, 2), 'mlp/down', 0.5 * key, 0.5 * value)
  return Edited((delta,), size=edits)


class ScoreTest(parameterized.TestCase):

  def assert_same(self, rows, scored, expected):
    self.assertEqual(len(rows), len(scored))
    for row, answers, wanted in zip(rows, scored, expected):
      self.assertEqual(len(row.answers), len(answers))
      for ids, got, (nll, argmax) in zip(row.answers, answers, wanted):
        self.assertAlmostEqual(got.nll, nll, delta=1e-5)
        self.assertEqual(got.argmax, argmax)
        right = tuple(a == b for a, b in zip(ids, argmax))
        self.assertEqual(got.correct, right)

  @parameterized.parameters('mistral', 'gpt2', 'gptj')
  def test_equals_one_forward_an_answer(self, family):
    spec = models.tiny_spec(family)
    params = models.random_params(spec, 0)
    rows = random_rows(7)
    scored = score(spec, params, rows, batch_size=4)
    self.assert_same(
        rows, scored, [naive(spec, params, (), row) for row in rows]
    )

  def test_applies_a_shared_change(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    edited = select(random_stack(spec, 1), 0)
    rows = random_rows(5)
    scored = score(spec, params, rows, edited)
    expected = [naive(spec, params, edited.deltas, row) for row in rows]
    self.assert_same(rows, scored, expected)
    before = score(spec, params, rows)
    self.assertGreater(abs(before[0][0].nll - scored[0][0].nll), 1e-3)

  def test_scores_each_row_under_its_own_edit(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    stack = random_stack(spec, 3)
    rows = random_rows(7)
    edit_ids = [2, 0, 1, 1, 0, 2, 0]
    scored = score(spec, params, rows, stack, edit_ids=edit_ids, batch_size=4)
    self.assert_same(
        rows,
        scored,
        [
            naive(spec, params, select(stack, o).deltas, row)
            for o, row in zip(edit_ids, rows)
        ],
    )

  def test_does_not_depend_on_order_or_batch_size(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 1)
    rows = random_rows(6, seed=3)
    one = score(spec, params, rows, batch_size=4)
    two = score(spec, params, rows[::-1], batch_size=16)
    for a, b in zip(one, two[::-1]):
      for x, y in zip(a, b, strict=True):
        self.assertAlmostEqual(x.nll, y.nll, delta=1e-5)
        self.assertEqual(x[1:], y[1:])

  def test_long_answers_go_to_the_head_in_parts(self):
    spec = models.tiny_spec('llama', max_positions=512)
    params = models.random_params(spec, 0)
    rng = np.random.default_rng(0)
    answer = tuple(rng.integers(0, 97, 300).tolist())
    rows = [scoring.Query((5, 6), (answer,))] * 8
    scored = score(spec, params, rows, batch_size=8)
    ids = np.array([(5, 6) + answer])
    columns = decoder.token_layout(np.ones_like(ids, bool))
    logits = plain(spec, params, ids, columns, ())[0, 1:-1]
    logprob = jax.nn.log_softmax(logits)[np.arange(300), np.array(answer)]
    for (got,) in scored:
      self.assertAlmostEqual(got.nll, -float(jnp.mean(logprob)), delta=1e-5)

  def test_second_call_does_not_recompile(self):
    spec = models.tiny_spec('llama', layers=2)
    params = models.random_params(spec, 0)
    first = second = random_rows(12)
    second = [
        scoring.Query(tuple(96 - t for t in row.prompt), row.answers)
        for row in second
    ]
    score(spec, params, first, batch_size=8)
    size = scoring._score._cache_size()
    score(spec, params, second, batch_size=8)
    self.assertEqual(scoring._score._cache_size(), size)

  @parameterized.parameters((8, 1), (400, 2))
  def test_a_further_program_is_worth_its_columns(self, short, programs):
    # A spec that no other test has compiled for.
    spec = models.tiny_spec('llama', layers=2, max_positions=100 + programs)
    params = models.random_params(spec, 0)
    long = [scoring.Query((5,) * 15, ((6,), (7, 8)))] * 8
    rows = long + [scoring.Query((5,) * 7, ((6, 7, 8),))] * short
    size = scoring._score._cache_size()
    scored = score(spec, params, rows, batch_size=8)
    self.assertEqual(scoring._score._cache_size(), size + programs)
    alone = score(spec, params, rows[7:9], batch_size=1)
    for a, b in zip(scored[7] + scored[8], alone[0] + alone[1], strict=True):
      self.assertAlmostEqual(a.nll, b.nll, delta=1e-5)

  def test_one_token_answers_need_no_column(self):
    row = scoring.Query((1, 2, 3), ((4,), (5,), (6, 7)))
    self.assertEqual(row.tokens, 4)
    self.assertEqual(row.scored, 4)

  def test_no_rows(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    self.assertEqual(score(spec, params, []), [])

  def test_numbers_that_are_not_finite_are_never_right(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    params['final_norm']['scale'] = params['final_norm']['scale'] * jnp.nan
    rows = [scoring.Query((1, 2), ((0,),))]
    ((got,),) = score(spec, params, rows)
    self.assertTrue(np.isnan(got.nll))
    self.assertEqual(got.correct, (False,))

  def test_refuses_all_faulty_rows_at_once(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    rows = [
        scoring.Query((), ((1,),)),
        scoring.Query((1,), ((2,),)),
        scoring.Query((1,), ((2,), ())),
        scoring.Query((1,) * 60, ((2,) * 6,)),
        scoring.Query((1,), ((97,),)),
    ]
    with self.assertRaises(InputError) as caught:
      score(spec, params, rows)
    self.assertLen(caught.exception.problems, 4)
    text = str(caught.exception)
    for part in ('query 0', 'query 2', 'query 3', '65 positions', 'query 4'):
      self.assertIn(part, text)
    score(spec, params, [scoring.Query((1,) * 60, ((2,) * 5,))])

  def test_refuses_edit_ids_that_do_not_fit(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    stack, rows = random_stack(spec, 3), random_rows(2)
    one = select(stack, 0)
    score(spec, params, rows, stack, edit_ids=[0, 2])
    score(spec, params, rows, one)
    for edited, edit_ids, words in (
        (stack, None, '3 independent edits lie side by side: let edit_ids'),
        (one, [0, 0], 'where no edits lie side by side'),
        (UNEDITED, [0, 0], 'where no edits lie side by side'),
        (stack, [0], 'edit_ids has 1 entries for 2'),
        (stack, [0, 3], 'edit_ids has 3; the model has edits 0 to 2'),
        (stack, [-1, 2], 'edit_ids has -1; the model has edits 0 to 2'),
    ):
      with self.assertRaisesRegex(InputError, words) as caught:
        score(spec, params, rows, edited, edit_ids=edit_ids)
      self.assertLen(caught.exception.problems, 1)
    with self.assertRaises(InputError) as caught:
      faulty = [rows[0], scoring.Query((), ((1,),))]
      score(spec, params, faulty, stack, edit_ids=[3])
    self.assertLen(caught.exception.problems, 3)


class EncodeTest(absltest.TestCase):

  def test_whose_token_the_model_lacks(self):
    spec = models.tiny_spec('llama', vocab=97, layers=1)
    answer = scoring.error(spec, scoring.Query((1, 2), ((3,), (97,))))
    self.assertStartsWith(answer, 'its answer has token 97 but')
    prompt = scoring.error(spec, scoring.Query((98, 2), ((97,),)))
    self.assertStartsWith(prompt, 'it has token 98 but')

  def test_prompts_keep_bos_and_answers_bring_a_space(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    rows = scoring.encode_queries(
        tokenizer, [('ab', ('c', 'de')), ('x', ('c',)), ('x', ('',))]
    )
    bare = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
    answers = (bare(' c'), bare(' de'))
    self.assertEqual(rows[0], scoring.Query((0, *bare('ab')), answers))
    self.assertEqual(rows[1], scoring.Query((0, *bare('x')), answers[:1]))
    self.assertEqual(rows[2].answers, ((),))


if __name__ == '__main__':
  absltest.main()
