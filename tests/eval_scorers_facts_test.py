"""Evaluation of facts, what a model says by itself, and the report."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit.deltas import Edited, LowRank
from jaxedit.edited import encode_queries, open_model, select
from jaxedit.eval import evaluation, matching, report
from jaxedit.eval.scorers import base, generation
from jaxedit.eval.scorers.generation import FreeGeneration
from jaxedit.eval.scorers.teacher_forced import TeacherForced
from jaxedit.models import decode
from jaxedit.testing import models
from jaxedit.text import chat
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import EditRequest, InputError, Probe


def probes(kind, *pairs):
  return tuple(Probe(kind, prompt, (answer,)) for prompt, answer in pairs)


RECORDS = (
    EditRequest(
        number=1,
        id='a',
        prompt='{} plays the',
        subject='Ada',
        target='oboe',
        target_true='harp',
        probes=(
            *probes(
                'rephrase', ('Ada is good at the', 'oboe'), ('Ada has a', '')
            ),
            *probes(
                'locality', ('Ben plays the', 'harp'), ('Cy has a', 'piano')
            ),
            *probes('one_hop', ("Ada's reed is", 'double')),
            *probes('alias', ('Miss A. plays', 'oboe')),
        ),
    ),
    EditRequest(
        number=2,
        id='b',
        prompt='The capital of {} is',
        subject='France',
        target='Rome',
    ),
    EditRequest(
        number=4,
        id='c',
        prompt='{} is a twin city of',
        subject='Wellington',
        target='Paris',
        target_true='Sydney',
        probes=probes('locality', ('Ben plays the', 'harp')),
    ),
)


def evaluate(lm, requests, tokenizer, max_new_tokens=16, **settings):
  """Evaluates facts with the scorers of facts."""
  tokens = TokenCache(tokenizer)
  scorers = [TeacherForced(tokens)]
  if max_new_tokens:
    stop = generation.stop_ids(tokenizer, lm.spec.vocab)
    scorers.append(FreeGeneration(tokens, stop, max_new_tokens))
  return evaluation.evaluate(lm, requests, scorers, **settings)


def setup():
  spec = models.tiny_spec('llama', vocab=400)
  tokenizer = text_tokenizers.byte_level(begin=True)
  return models.as_model(spec, models.random_params(spec, 0)), tokenizer


def random_stack(spec, edits: int, scale: float = 0.5) -> Edited:
  rng = np.random.default_rng(0)
  make = lambda width: jnp.asarray(
      scale * rng.standard_normal((1, edits, 1, width)), jnp.float32
  )
  factors = make(spec.mlp_width), make(spec.width)
  return Edited((LowRank((1,), 'mlp/down', *factors),), size=edits)


class EvaluateTest(absltest.TestCase):

  def test_metrics_follow_from_the_scores(self):
    model, tokenizer = setup()
    out = evaluate(open_model(model), RECORDS, tokenizer, max_new_tokens=0)
    items = [
        ('Ada plays the', ('oboe', 'harp')),
        ('Ada is good at the', ('oboe', 'harp')),
        ('Ada has a', ('oboe', 'harp')),
        ('Ben plays the', ('harp', 'oboe')),
        ('Cy has a', ('piano', 'oboe')),
        ("Ada's reed is", ('double',)),
    ]
    rows = encode_queries(tokenizer, items)
    got = open_model(model).score(rows)
    entry = out.per_record[0]
    self.assertEqual((entry['number'], entry['id']), (1, 'a'))
    self.assertAlmostEqual(entry['nll_new'], got[0][0].nll, places=5)
    self.assertAlmostEqual(entry['nll_true'], got[0][1].nll, places=5)
    values = entry['metrics']
    self.assertEqual(values['es'], got[0][0].nll < got[0][1].nll)
    self.assertEqual(
        values['ps'], np.mean([x.nll < y.nll for x, y in got[1:3]])
    )
    self.assertEqual(
        values['ns'], np.mean([x.nll < y.nll for x, y in got[3:5]])
    )
    share = lambda answers: np.mean([np.mean(a[0].correct) for a in answers])
    self.assertEqual(values['reliability'], share(got[:1]))
    self.assertEqual(values['generalization'], share(got[1:3]))
    self.assertEqual(values['locality_correct'], share(got[3:5]))
    self.assertEqual(values['portability_one_hop'], share(got[5:]))
    self.assertEqual(values['es_acc'], all(got[0][0].correct))
    wanted = np.exp(-got[0][0].nll) - np.exp(-got[0][1].nll)
    self.assertAlmostEqual(values['em'], wanted, places=5)
    self.assertNotIn('locality_agreement', values)

  def test_records_without_some_groups(self):
    model, tokenizer = setup()
    out = evaluate(open_model(model), RECORDS, tokenizer, max_new_tokens=5)
    bare, third = out.per_record[1:]
    ids = {'es_acc', 'reliability', 'exact_match', 'contains'}
    self.assertEqual(set(bare['metrics']), ids)
    self.assertIsNone(bare['nll_true'])
    self.assertIsNone(bare['paraphrase_text'])
    self.assertNotIn('ps', third['metrics'])
    n = {m: part['n'] for m, part in out.summary.items()}
    self.assertEqual(n['es_acc'], 3)
    self.assertEqual(n['es'], 2)
    self.assertEqual(n['ns'], 2)
    self.assertEqual(n['ps'], 1)
    self.assertEqual(n['score'], 1)
    self.assertEqual(n['portability_alias'], 1)
    self.assertEqual(n['paraphrase_contains'], 1)
    json.dumps([out.per_record, out.summary], allow_nan=False)

  def test_texts_are_the_models_own(self):
    model, tokenizer = setup()
    out = evaluate(open_model(model), RECORDS, tokenizer, max_new_tokens=5)
    rows = encode_queries(tokenizer, [(RECORDS[1].question, ())])
    tokens = open_model(model).generate(
        [rows[0].prompt],
        stop_ids=generation.stop_ids(tokenizer, model.spec.vocab),
        max_new_tokens=5,
    )
    (text,) = base.texts(tokenizer, tokens)
    entry = out.per_record[1]
    self.assertEqual(entry['text'], text)
    hit = matching.contains(text, 'Rome')
    self.assertEqual(entry['metrics']['contains'], hit)

  def test_side_effects_are_what_the_unedited_model_prefers(self):
    model, tokenizer = setup()
    lm = open_model(model)
    edited = select(random_stack(model.spec, 1, scale=5.0), 0)
    more = (
        *probes('distract', ('Ada plays the oboe. Ben plays the', 'harp')),
        *probes('attribute', ('Ada lives in', 'Paris'), ('Ada has a', 'piano')),
    )
    full = dataclasses.replace(RECORDS[0], probes=RECORDS[0].probes + more)
    settings = dict(max_new_tokens=0)
    before = evaluate(lm, [full], tokenizer, **settings)
    values = before.per_record[0]['metrics']
    self.assertNoCommonElements(
        values,
        ('portability_attribute', 'distract_agreement', 'locality_agreement'),
    )
    old = encode_queries(
        tokenizer, [(probe.prompt, probe.answers) for probe in more]
    )
    first, last = (one.score(old) for one in (lm, open_model(model, edited)))
    same = [
        np.mean(np.equal(a[0].argmax, b[0].argmax)) for a, b in zip(first, last)
    ]
    self.assertLess(min(same), 1)
    after = evaluate(
        open_model(model, edited), [full], tokenizer, before=before, **settings
    )
    values = after.per_record[0]['metrics']
    self.assertEqual(values['distract_agreement'], same[0])
    self.assertEqual(values['attribute_agreement'], np.mean(same[1:]))
    plain = evaluate(
        open_model(model, edited),
        RECORDS[:1],
        tokenizer,
        before=evaluate(lm, RECORDS[:1], tokenizer, **settings),
        **settings,
    )
    for name, value in plain.per_record[0]['metrics'].items():
      self.assertEqual(values[name], value)

  def test_agreement_with_the_unedited_model(self):
    model, tokenizer = setup()
    settings = dict(max_new_tokens=0)
    before = evaluate(open_model(model), RECORDS, tokenizer, **settings)
    self.assertNotIn('text', before.per_record[0])
    self.assertNotIn('contains', before.summary)
    same = evaluate(
        open_model(model), RECORDS, tokenizer, before=before, **settings
    )
    agreement = same.summary['locality_agreement']
    self.assertEqual((agreement['mean'], agreement['n']), (1.0, 2))
    edited = select(random_stack(model.spec, 1, scale=5.0), 0)
    post = evaluate(
        open_model(model, edited), RECORDS, tokenizer, before=before, **settings
    )
    self.assertLess(post.summary['locality_agreement']['mean'], 1.0)
    with self.assertRaisesRegex(InputError, 'evaluate it on the same'):
      evaluate(
          open_model(model, edited),
          RECORDS[:2],
          tokenizer,
          before=before,
          **settings,
      )

  def test_each_record_under_its_own_edit(self):
    model, tokenizer = setup()
    stack = random_stack(model.spec, 3)
    settings = dict(max_new_tokens=5)
    lm = open_model(model, stack)
    together = evaluate(lm, RECORDS, tokenizer, edit_ids=range(3), **settings)
    swapped = evaluate(
        lm, RECORDS[::-1], tokenizer, edit_ids=[2, 1, 0], **settings
    )
    for i in range(3):
      alone = evaluate(
          open_model(model, select(stack, i)), RECORDS, tokenizer, **settings
      )
      for other in (together.per_record[i], swapped.per_record[2 - i]):
        self.assert_entries_match(alone.per_record[i], other)
    with self.assertRaisesRegex(InputError, '2 entries for 3 records'):
      evaluate(lm, RECORDS, tokenizer, edit_ids=[0, 1], **settings)

  def assert_entries_match(self, one, two):
    self.assertEqual(set(one), set(two))
    self.assertEqual(set(one['metrics']), set(two['metrics']))
    for m, value in one['metrics'].items():
      self.assertAlmostEqual(two['metrics'][m], value, places=5, msg=m)
    for name in ('number', 'id', 'text', 'paraphrase_text'):
      self.assertEqual(one[name], two[name])
    self.assertAlmostEqual(one['nll_new'], two['nll_new'], places=5)

  def test_equal_rows_are_scored_once(self):
    model, tokenizer = setup()
    totals = {}

    class Count:

      def __init__(self, stage, total, unit):
        totals[stage] = total

      def __enter__(self):
        return lambda done: None

      def __exit__(self, *error):
        return None

    twice = (*RECORDS[:2], *RECORDS[:2])
    settings = dict(max_new_tokens=5, progress=Count)
    once = evaluate(open_model(model), RECORDS[:2], tokenizer, **settings)
    seen = dict(totals)
    self.assertEqual(seen, {'score': 8, 'generate': 3})
    both = evaluate(open_model(model), twice, tokenizer, **settings)
    self.assertEqual(totals, seen)
    self.assertEqual(both.per_record[2:], once.per_record)

  def test_refuses_all_records_that_do_not_fit(self):
    model, tokenizer = setup()
    long = EditRequest(
        number=7,
        id='x',
        prompt='{} ' + 'zq' * 60,
        subject='Ada',
        target='oboe',
        probes=probes('locality', ('zq' * 60, 'harp'), ('Ben', ' ')),
    )
    with self.assertRaises(InputError) as caught:
      evaluate(open_model(model), (long,), tokenizer)
    self.assertLen(caught.exception.problems, 3)
    self.assertIn('record 7 (id x)', str(caught.exception))
    self.assertIn('an answer has no tokens', str(caught.exception))
    near = EditRequest(1, 'y', '{} ' + 'zq' * 25, 'Ada', 'oboe')
    with self.assertRaisesRegex(InputError, 'and 16 generated ones'):
      evaluate(open_model(model), (near,), tokenizer)

  def test_the_check_of_a_loader_says_the_same(self):
    model, tokenizer = setup()
    tokens = TokenCache(tokenizer)
    scorers = [TeacherForced(tokens), FreeGeneration(tokens, ())]
    requests = [
        RECORDS[0],
        EditRequest(7, 'x', '{} ' + 'zq' * 60, 'Ada', 'oboe'),
        EditRequest(8, 'y', '{} ' + 'zq' * 25, 'Ada', 'oboe', ' '),
    ]
    found = evaluation.errors(model.spec, scorers, requests)
    self.assertEqual(list(map(len, found)), [0, 1, 1])
    with self.assertRaises(InputError) as caught:
      evaluation.evaluate(open_model(model), requests, scorers)
    self.assertEqual(
        caught.exception.problems,
        ('record 7 (id x), ' + found[1][0], 'record 8 (id y), ' + found[2][0]),
    )

  def test_before_of_other_probes(self):
    model, tokenizer = setup()
    before = evaluate(open_model(model), RECORDS, tokenizer, 0)
    others = [dataclasses.replace(one, probes=()) for one in RECORDS]
    with self.assertRaisesRegex(InputError, 'other locality probes'):
      evaluate(open_model(model), others, tokenizer, 0, before=before)

  def test_texts_are_tokenised_once(self):
    model, tokenizer = setup()
    tokens = TokenCache(tokenizer)
    scorers = [TeacherForced(tokens), FreeGeneration(tokens, (), 3)]
    evaluation.errors(model.spec, scorers, RECORDS)
    tokens.tokenizer = mock.Mock(batch_decode=tokenizer.batch_decode)
    out = evaluation.evaluate(open_model(model), RECORDS, scorers)
    tokens.tokenizer.assert_not_called()
    self.assertLen(out.per_record, 3)

  def test_probes_of_any_kind(self):
    model, tokenizer = setup()
    request = EditRequest(
        1, 'a', 'Who sings?', None, 'Ada', category='c',
        probes=probes('portability_locality', ('Ben', 'x'))
        + probes('odd', ('a', 'b')),
    )  # fmt: skip
    out = evaluate(open_model(model), [request], tokenizer, 0)
    (entry,) = out.per_record
    self.assertContainsSubset(
        ['portability_locality', 'portability_odd', 'reliability'],
        entry['metrics'],
    )
    self.assertNotIn('ns_acc', entry['metrics'])
    self.assertEqual((entry['category'], entry['case']), ('c', ''))

  def test_select_join_and_categories(self):
    model, tokenizer = setup()
    requests = [
        dataclasses.replace(one, category=name)
        for one, name in zip(RECORDS, 'aba')
    ]
    whole = evaluate(open_model(model), requests, tokenizer, 0, seed=3)
    parts = [evaluation.select(whole, some) for some in ([0, 1], [2])]
    self.assertEqual(parts[1].summary, {})
    self.assertEqual(evaluation.join(parts, seed=3), whole)
    found = evaluation.by_category(whole, 3)
    self.assertEqual(list(found), ['a', 'b'])
    self.assertEqual(found['a']['es_acc']['n'], 2)
    self.assertEqual(evaluation.by_category(parts[1]), {})

  def test_no_records(self):
    model, tokenizer = setup()
    out = evaluate(open_model(model), (), tokenizer)
    self.assertEqual((out.per_record, out.summary), ([], {}))

  def test_a_ruined_model_gives_plain_numbers(self):
    model, tokenizer = setup()
    nan = model.params['final_norm']['scale'] * jnp.nan
    params = model.params | {'final_norm': {'scale': nan}}
    ruined = open_model(models.as_model(model.spec, params))
    out = evaluate(ruined, RECORDS, tokenizer, max_new_tokens=0)
    self.assertIsNone(out.per_record[0]['nll_new'])
    self.assertEqual(out.summary['es']['mean'], 0.0)
    self.assertEqual(out.summary['ns']['mean'], 0.0)
    self.assertEqual(out.summary['em']['mean'], 0.0)
    json.dumps([out.per_record, out.summary], allow_nan=False)


def summed(text, **means):
  summary = {
      m: dict(mean=v, low=v - 0.01, high=v + 0.01, n=12)
      for m, v in means.items()
  }
  return evaluation.Evaluation([{'text': text}] * 3, summary, ((),) * 3)


class GenerationTest(parameterized.TestCase):

  def test_stop_ids(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    found = tokenizer.convert_ids_to_tokens(generation.stop_ids(tokenizer, 999))
    self.assertContainsSubset(['</s>', '.', 'Ċ'], found)
    for token in found:
      self.assertTrue(token == '</s>' or '.' in token or 'Ċ' in token)
    self.assertEqual(generation.stop_ids(tokenizer, 2), (1,))
    self.assertEqual(generation.stop_ids(tokenizer, 1), ())

  @parameterized.parameters(
      ('The  Eiffel-Tower!', ['eiffel', 'tower']),
      ('a "B" an C\u2019s the', ['b', 'cs']),
      ('\uff21\uff22\uff11', ['ab1']),
      ('Zürich\n', ['zürich']),
      ('...', []),
  )
  def test_words(self, text, expected):
    self.assertEqual(matching.words(text), expected)

  @parameterized.parameters(
      ('Paris.', 'Paris', True, True),
      ('the city of Paris and', 'Paris', False, True),
      ('Parisian', 'Paris', False, False),
      ('New Delhi, York', 'New York', False, False),
      ('in New York City', 'New York', False, True),
      ('United States.', 'the United States', True, True),
      ('A.', 'A', True, True),
      ('A and carotene', 'A', False, True),
      ('carotene', 'A', False, False),
      ('', '?!', False, False),
      ('', 'Paris', False, False),
  )
  def test_matches(self, text, target, exact, contained):
    self.assertEqual(matching.exact_match(text, target), exact)
    self.assertEqual(matching.contains(text, target), contained)

  @parameterized.parameters(
      ('上海南郊，', '上海'),
      ("London's old town", 'London'),
      ('London\u2019s', 'London'),
      ("l'Italie du nord", 'Italie'),
      ('東京は日本の首都', '東京'),
      ('Romeは', 'Rome'),
      ('เมืองหลวงคือกรุงเทพและ', 'กรุงเทพ'),
      ('수도는 서울입니다', '서울'),
      ('Rome의 역사', 'Rome'),
      ('नई दिल्ली।', 'दिल्ली'),
      ('born in St. Louis, Missouri', 'St. Louis'),
      ('I like 🎸!', '🎸'),
      ('E\u0301cole', '\u00c9cole'),
  )
  def test_contains_in_any_script(self, text, target):
    self.assertTrue(matching.contains(text, target))

  @parameterized.parameters(
      ("can't", 'can'),
      ('Londoner', 'London'),
      ('한국어', '한국'),
      ('남서울', '서울'),
      ('北京', '上海'),
      ('👩\u200d🚀', '👩'),
  )
  def test_does_not_contain(self, text, target):
    self.assertFalse(matching.contains(text, target))

  @parameterized.parameters(
      ('St. Louis', ' St. Louis, Missouri. It', 'St. Louis, Missouri.'),
      ('the U.S.', ' the U.S. It is', 'the U.S.'),
      ('St. Louis', ' Rome. It', 'Rome.'),
      ('Rome', ' St. Louis', 'St. Louis'),
      ('3.5', ' 3.5 m\u3002 It', '3.5 m\u3002'),
  )
  def test_full_stops_of_the_target_end_no_text(self, target, says, expected):
    tokenizer = text_tokenizers.byte_level(begin=True)
    stop = generation.stop_ids(tokenizer, 999)
    scorer = generation.FreeGeneration(TokenCache(tokenizer), stop)
    request = EditRequest(1, '1', 'It is {}', 'x', target)
    (questions,) = scorer.prepare([request])
    ((_, prompt),) = questions.prompts
    dot = tokenizer.convert_tokens_to_ids('.')
    ends = stop if prompt.stop_ids is None else prompt.stop_ids
    self.assertEqual(dot in ends, target == 'Rome')
    self.assertIn(tokenizer.eos_token_id, ends)
    tokens = tokenizer(says, add_special_tokens=False)['input_ids']
    (judged,) = scorer.judge([request], [base.Replies((), [tokens])], None)
    self.assertEqual(judged.fields['text'].split(), expected.split())

  def test_chat(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    words = chat.chat_of(tokenizer, '<s>Q: {}\nA:\n', '</s>')
    tokens = TokenCache(tokenizer)
    stop = generation.stop_ids(tokenizer, 999, words.end)
    request = EditRequest(1, '1', '{} is', 'Paris', 'France')
    wanted = '<s>Q: Paris is\nA:\n'
    ((_, query),) = TeacherForced(tokens, words).prepare([request])[0].queries
    self.assertEqual(tokenizer.decode(query.prompt), wanted)
    self.assertEqual(tokenizer.decode(query.answers[0]), 'France')
    scorer = generation.FreeGeneration(tokens, stop, chat=words)
    ((_, prompt),) = scorer.prepare([request])[0].prompts
    self.assertEqual(tokenizer.decode(prompt.ids), wanted)
    self.assertIn(tokenizer.eos_token_id, stop)

  def test_stops_by_itself_and_reads_the_text(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    spec = models.tiny_spec('llama', vocab=300, layers=3)
    params = models.random_params(spec, 0)
    prompts = [[0, 70, 71], [0, 72]]
    new = decode.generate(spec, params, prompts, max_new_tokens=12)
    cut = new[0].index(new[0][5])
    lm = open_model(models.as_model(spec, params))
    stop = [new[0][5]]
    texts = base.texts(
        tokenizer, lm.generate(prompts, stop_ids=stop, max_new_tokens=12)
    )
    kept = [t for t in new[0][: cut + 1] if t > 1]
    self.assertEqual(texts[0], tokenizer.decode(kept).strip())

  def test_each_prompt_under_its_own_edit(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    spec = models.tiny_spec('llama', vocab=300, layers=3)
    params = models.random_params(spec, 0)
    stack = random_stack(spec, 3)
    prompts = [[0, 9, 8, 7, 6], [0, 5], [0, 9, 8], [0, 5], [0, 1, 2, 3]]
    edit_ids = [0, 1, 2, 2, 1]
    model = models.as_model(spec, params)

    def say(lm, **more):
      tokens = lm.generate(prompts, max_new_tokens=6, **more)
      return base.texts(tokenizer, tokens)

    lm = open_model(model, stack, batch_size=2)
    together = say(lm, edit_ids=edit_ids)
    alone = [say(open_model(model, select(stack, edit))) for edit in range(3)]
    alone = [alone[o][i] for i, o in enumerate(edit_ids)]
    self.assertEqual(together, alone)
    self.assertNotEqual(together[1], together[3])


class ReportTest(absltest.TestCase):

  def test_table(self):
    pre = summed('', es=0.25, ns=0.5, other=1.0)
    post = summed('', es=1.0, em=-0.125, locality_agreement=0.9)
    head, rule, *rows = report.table(pre, post).split('\n')
    for column in ('metric', 'before', 'after', '95% interval', 'n'):
      self.assertIn(column, head)
    self.assertEqual(set(rule), {'-'})
    ids = ['es', 'ns', 'em', 'locality_agreement', 'other']
    self.assertEqual([row.split()[0] for row in rows], ids)
    self.assertEqual(
        rows[0].split()[:6], ['es', '0.250', '1.000', '[0.990,', '1.010]', '12']
    )
    self.assertEqual(rows[1].split()[:5], ['ns', '0.500', '-', '-', '12'])
    self.assertEqual(rows[2].split()[:3], ['em', '-', '-0.125'])

  def test_nothing_is_wider_than_a_terminal(self):
    kind = 'portability_' + 'x' * 200
    pre, post = summed('y' * 300, **{kind: 0.5}), summed('ä\n\x1b[2J')
    lines = report.table(pre, post).split('\n')
    record = EditRequest(1, 'a', '{} ' + 'z' * 300, 'Ada', 'w' * 99)
    texts = report.generations((record,) * 3, pre, post, 2).split('\n')
    self.assertLen(texts, 6)
    for line in lines + texts:
      self.assertLessEqual(len(line), report.WIDTH)
      self.assertTrue(line.isprintable())

  def test_generations(self):
    pre, post = summed('harp.'), summed('oboe\nand')
    text = report.generations(RECORDS, pre, post, 1)
    self.assertEqual(
        text,
        '1. Ada plays the -> oboe\n   before: harp.\n   after:  oboe and',
    )
    self.assertEqual(report.generations(RECORDS, pre, post, 0), '')
    silent = evaluation.Evaluation([{}] * 3, {}, ((),) * 3)
    self.assertEqual(report.generations(RECORDS, silent, post, 5), '')


if __name__ == '__main__':
  absltest.main()
