"""Evaluation of whole records, and the report."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import text_tokenizers
from absl.testing import absltest

from jaxedit.deltas import Edited, LowRank
from jaxedit.edited import encode_queries, open_model, select
from jaxedit.eval import generation, harness, report
from jaxedit.testing import models
from jaxedit.types import InputError, Probe, Record

RECORDS = (
    Record(
        number=1,
        id='a',
        prompt='{} plays the',
        subject='Ada',
        target_new='oboe',
        target_true='harp',
        paraphrases=('Ada is good at the', 'Ada has a'),
        neighbours=(Probe('Ben plays the', 'harp'), Probe('Cy has a', 'piano')),
        portability={
            'one_hop': (Probe("Ada's reed is", 'double'),),
            'alias': (Probe('Miss A. plays', 'oboe'),),
        },
    ),
    Record(
        number=2,
        id='b',
        prompt='The capital of {} is',
        subject='France',
        target_new='Rome',
    ),
    Record(
        number=4,
        id='c',
        prompt='{} is a twin city of',
        subject='Wellington',
        target_new='Paris',
        target_true='Sydney',
        neighbours=(Probe('Ben plays the', 'harp'),),
    ),
)


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
    out = harness.evaluate(
        open_model(model), RECORDS, tokenizer, max_new_tokens=0
    )
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
    out = harness.evaluate(
        open_model(model), RECORDS, tokenizer, max_new_tokens=5
    )
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
    out = harness.evaluate(
        open_model(model), RECORDS, tokenizer, max_new_tokens=5
    )
    rows = encode_queries(tokenizer, [(RECORDS[1].question, ())])
    (text,) = generation.free_generation(
        open_model(model),
        [rows[0].prompt],
        tokenizer=tokenizer,
        stop=generation.stop_ids(tokenizer, model.spec.vocab),
        max_new_tokens=5,
    )
    entry = out.per_record[1]
    self.assertEqual(entry['text'], text)
    hit = generation.contains(text, 'Rome')
    self.assertEqual(entry['metrics']['contains'], hit)

  def test_agreement_with_the_unedited_model(self):
    model, tokenizer = setup()
    settings = dict(max_new_tokens=0)
    base = harness.evaluate(open_model(model), RECORDS, tokenizer, **settings)
    self.assertNotIn('text', base.per_record[0])
    self.assertNotIn('contains', base.summary)
    same = harness.evaluate(
        open_model(model), RECORDS, tokenizer, base=base, **settings
    )
    agreement = same.summary['locality_agreement']
    self.assertEqual((agreement['mean'], agreement['n']), (1.0, 2))
    edited = select(random_stack(model.spec, 1, scale=5.0), 0)
    post = harness.evaluate(
        open_model(model, edited), RECORDS, tokenizer, base=base, **settings
    )
    self.assertLess(post.summary['locality_agreement']['mean'], 1.0)
    with self.assertRaisesRegex(InputError, 'evaluate it on the same'):
      harness.evaluate(
          open_model(model, edited),
          RECORDS[:2],
          tokenizer,
          base=base,
          **settings,
      )

  def test_each_record_under_its_own_edit(self):
    model, tokenizer = setup()
    stack = random_stack(model.spec, 3)
    settings = dict(max_new_tokens=5)
    lm = open_model(model, stack)
    together = harness.evaluate(
        lm, RECORDS, tokenizer, edit_ids=range(3), **settings
    )
    swapped = harness.evaluate(
        lm, RECORDS[::-1], tokenizer, edit_ids=[2, 1, 0], **settings
    )
    for i in range(3):
      alone = harness.evaluate(
          open_model(model, select(stack, i)), RECORDS, tokenizer, **settings
      )
      for other in (together.per_record[i], swapped.per_record[2 - i]):
        self.assert_entries_match(alone.per_record[i], other)
    with self.assertRaisesRegex(InputError, '2 entries for 3 records'):
      harness.evaluate(lm, RECORDS, tokenizer, edit_ids=[0, 1], **settings)

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
    once = harness.evaluate(
        open_model(model), RECORDS[:2], tokenizer, **settings
    )
    seen = dict(totals)
    self.assertEqual(seen, {'score': 8, 'generate': 3})
    both = harness.evaluate(open_model(model), twice, tokenizer, **settings)
    self.assertEqual(totals, seen)
    self.assertEqual(both.per_record[2:], once.per_record)

  def test_refuses_all_records_that_do_not_fit(self):
    model, tokenizer = setup()
    long = Record(
        number=7,
        id='x',
        prompt='{} ' + 'zq' * 60,
        subject='Ada',
        target_new='oboe',
        neighbours=(Probe('zq' * 60, 'harp'), Probe('Ben', ' ')),
    )
    with self.assertRaises(InputError) as caught:
      harness.evaluate(open_model(model), (long,), tokenizer)
    self.assertLen(caught.exception.problems, 3)
    self.assertIn('record 7 (id x)', str(caught.exception))
    self.assertIn('an answer has no tokens', str(caught.exception))
    near = Record(1, 'y', '{} ' + 'zq' * 25, 'Ada', 'oboe')
    with self.assertRaisesRegex(InputError, 'and 16 generated ones'):
      harness.evaluate(open_model(model), (near,), tokenizer)

  def test_no_records(self):
    model, tokenizer = setup()
    out = harness.evaluate(open_model(model), (), tokenizer)
    self.assertEqual((out.per_record, out.summary), ([], {}))

  def test_a_ruined_model_gives_plain_numbers(self):
    model, tokenizer = setup()
    nan = model.params['final_norm']['scale'] * jnp.nan
    params = model.params | {'final_norm': {'scale': nan}}
    ruined = open_model(models.as_model(model.spec, params))
    out = harness.evaluate(ruined, RECORDS, tokenizer, max_new_tokens=0)
    self.assertIsNone(out.per_record[0]['nll_new'])
    self.assertEqual(out.summary['es']['mean'], 0.0)
    self.assertEqual(out.summary['ns']['mean'], 0.0)
    self.assertEqual(out.summary['em']['mean'], 0.0)
    json.dumps([out.per_record, out.summary], allow_nan=False)


def evaluation(text, **means):
  summary = {
      m: dict(mean=v, low=v - 0.01, high=v + 0.01, n=12)
      for m, v in means.items()
  }
  return harness.Evaluation([{'text': text}] * 3, summary, ((),) * 3)


class ReportTest(absltest.TestCase):

  def test_table(self):
    pre = evaluation('', es=0.25, ns=0.5, other=1.0)
    post = evaluation('', es=1.0, em=-0.125, locality_agreement=0.9)
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
    pre, post = evaluation('y' * 300, **{kind: 0.5}), evaluation('ä\n\x1b[2J')
    lines = report.table(pre, post).split('\n')
    record = Record(1, 'a', '{} ' + 'z' * 300, 'Ada', 'w' * 99)
    texts = report.generations((record,) * 3, pre, post, 2).split('\n')
    self.assertLen(texts, 6)
    for line in lines + texts:
      self.assertLessEqual(len(line), report.WIDTH)
      self.assertTrue(line.isprintable())

  def test_generations(self):
    pre, post = evaluation('harp.'), evaluation('oboe\nand')
    text = report.generations(RECORDS, pre, post, 1)
    self.assertEqual(
        text,
        '1. Ada plays the -> oboe\n   before: harp.\n   after:  oboe and',
    )
    self.assertEqual(report.generations(RECORDS, pre, post, 0), '')
    silent = harness.Evaluation([{}] * 3, {}, ((),) * 3)
    self.assertEqual(report.generations(RECORDS, silent, post, 5), '')


if __name__ == '__main__':
  absltest.main()
