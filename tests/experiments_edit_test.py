"""The editing programs from their flags to their files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
from unittest import mock

import editing_runs
import jax
import numpy as np
import text_helpers
import tiny_model
from absl.testing import absltest, parameterized
from editing_runs import CONTEXTS, FACTS, TEXTS, WINDOW, Case, fact, text

from experiments import collect_moments, edit
from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import UNEDITED, Dense, LowRank
from jaxedit.eval import datasets
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder, loading, saving, tokenizer
from jaxedit.runs import editing, moments
from jaxedit.stats import moments as stats_moments
from jaxedit.text import encoding

SAME = ('metrics', 'intervals', 'counts', 'protocol', 'unedited')
PROMPTS = [
    'The mother tongue of Danielle is twin city',
    'The mother tongue of Sydney is capital Tower',
]
both_kinds = editing_runs.both_kinds
setup_of = editing_runs.setup_of


def setUpModule():
  global FACT, TEXT
  FACT, TEXT = map(setup_of, editing_runs.SETUPS)


def tearDownModule():
  editing_runs.close()


def logits(params):
  """[B, T, V] of `PROMPTS`, which have one length."""
  words = tokenizer.load_tokenizer(FACT.model)
  tokens = np.array(words(PROMPTS)['input_ids'], np.int32)
  layout = decoder.token_layout(np.ones(tokens.shape, bool))
  spec = FACT.base.spec
  run = jax.jit(edited_lib.apply_model, static_argnums=0)
  return np.asarray(run(spec, params, UNEDITED, tokens, layout))


class WholeRunTest(Case):

  def assert_tables(self, results, when, names):
    for name in names:
      value = results['metrics'][when][name]
      self.assertIsInstance(value, float)
      self.assertBetween(value, 0, 1)
      low, high = results['intervals'][when][name]
      self.assertLessEqual(low, high)
      self.assertEqual(results['counts'][when][name], 4)

  def test_files_and_tables_of_facts(self):
    done = FACT.whole
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(
        done.files,
        [
            'delta.safetensors', 'model', 'moments.safetensors',
            'records.jsonl', 'results.json', 'templates.json',
        ],
    )  # fmt: skip
    names = ('es', 'ps', 'ns', 'exact_match', 'locality_correct')
    for when in ('pre', 'post', 'saved'):
      self.assert_tables(done.results, when, names)
    self.assertIn('locality_agreement', done.results['metrics']['saved'])
    self.assertEqual(done.results['skipped'], [])
    self.assertIn('metric', done.out)
    self.assertIn('4 edits in', done.out)
    self.assertIn('1. The mother tongue of Danielle is -> twin city', done.out)

  def test_files_and_tables_of_long_answers(self):
    done = TEXT.whole
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(
        done.files,
        [
            'delta.safetensors', 'moments.safetensors', 'records.jsonl',
            'results.json',
        ],
    )  # fmt: skip
    names = [
        f'{asked}/{score}'
        for asked in ('question', 'paraphrase')
        for score in ('bleu_char', 'rouge_1_recall', 'rouge_2_recall',
                      'rouge_l_recall', 'rouge_l_f1', 'exact_match')
    ]  # fmt: skip
    names += ['sub/contains', 'sub/rouge_l_recall']
    for when in ('pre', 'post'):
      self.assert_tables(done.results, when, names)
    self.assertEqual(done.results['skipped'], [])
    self.assertEqual(done.results['unedited'], {})
    found = done.results['categories']['post']
    self.assertSameElements(found, ['', 'facts', 'music'])
    self.assertEqual(found['facts']['question/exact_match']['n'], 2)
    self.assertIn('metric', done.out)
    self.assertIn('4 edits in', done.out)
    self.assertIn('1. The mother tongue of Danielle', done.out)
    self.assertIn('   wanted: French.', done.out)

  def test_protocol_of_facts(self):
    protocol = FACT.whole.results['protocol']
    self.assertEqual(protocol['model_hash'], FACT.base.hash)
    self.assertEqual(protocol['dtype'], 'float32')
    self.assertEqual(protocol['method'], 'memit')
    self.assertEqual(protocol['batch_size'], 2)
    self.assertEqual(protocol['mode'], 'sequential')
    self.assertEqual(protocol['seed'], 0)
    self.assertIn('greedy, 3 new tokens', protocol['decoding'])
    self.assertEqual(protocol['settings']['layers'], [0, 1])
    self.assertEqual(protocol['settings']['moment_weight'], 20)
    self.assertEqual(protocol['settings']['value']['steps'], 5)
    self.assertEqual(protocol['templates'], CONTEXTS)
    digest = hashlib.sha256(FACT.data.read_bytes()).hexdigest()
    self.assertEqual(protocol['data']['sha256'], digest)
    self.assertEqual(protocol['moments']['model'], FACT.base.hash)
    self.assertGreaterEqual(protocol['moments']['tokens'], 400)
    self.assertIn('jax', FACT.whole.results['versions'])

  def test_protocol_of_long_answers(self):
    protocol = TEXT.whole.results['protocol']
    self.assertEqual(protocol['model_hash'], TEXT.base.hash)
    self.assertEqual(protocol['method'], 'memit+anyedit')
    self.assertEqual(protocol['mode'], 'independent')
    self.assertEqual(protocol['batch_size'], 1)
    settings = protocol['settings']
    self.assertEqual(settings['layers'], [0, 1])
    self.assertEqual(settings['parity'], 'none')
    self.assertEqual(settings['anchor'], 'prompt_last')
    self.assertEqual(settings['moment_weight'], 20)
    self.assertEqual(settings['value']['steps'], 4)
    self.assertEqual(settings['value']['kl'], 0)
    chunks = {'window': WINDOW, 'overlap': 0, 'boundary': 'window'}
    self.assertEqual(settings['chunks'], chunks)
    self.assertEqual(
        protocol['chat'],
        {'before': '<s>In ', 'after': ' is', 'end': '</s>'},
    )
    self.assertFalse(protocol['double_bos'])
    self.assertEqual(
        protocol['decoding'],
        {
            'temperature': 0, 'top_k': 0, 'top_p': 1, 'repetition_penalty': 1,
            'seed': 0, 'max_new_tokens': 6,
        },
    )  # fmt: skip
    self.assertEqual(protocol['encoder'], 'none')
    self.assertEqual(protocol['facts'], 'unstructured')
    self.assertEqual(protocol['moments']['model'], TEXT.base.hash)

  def test_seconds_by_stage(self):
    stages = [
        'load', 'templates', 'moments', 'factor', 'evaluate_before', 'optimize',
        'insert', 'evaluate_after', 'total', 'compile',
    ]  # fmt: skip
    self.assertSameElements(TEXT.whole.results['timing'], stages)
    timing = FACT.whole.results['timing']
    more = ['save_model', 'perplexity', 'choices']
    self.assertSameElements(timing, [*stages, *more])
    self.assertTrue(all(seconds >= 0 for seconds in timing.values()))
    total = timing.pop('total')
    self.assertLess(timing.pop('compile'), total)
    self.assertBetween(sum(timing.values()), 0.5 * total, total)

  def test_what_was_run(self):
    work = FACT.whole.results['work']
    self.assertBetween(work['wasted'], 0, 1)
    self.assertLessEqual(work['tokens_needed'], work['tokens_run'])
    (shape,) = work['shapes']
    self.assertEqual(shape['slots'], 2)

  def test_a_line_a_fact_in_order(self):
    rows = FACT.whole.records
    self.assertEqual([row['number'] for row in rows], [1, 2, 3, 4])
    for row, given in zip(rows, FACTS):
      for name in ('prompt', 'subject', 'target_new', 'target_true'):
        self.assertEqual(row[name], given[name])
      self.assertTrue(row['written'])
      self.assertEqual(row['states'], 1)
      self.assertBetween(row['steps'], 1, 5)
      self.assertIn('text', row['after'])
      self.assertLess(row['after']['nll_new'], row['before']['nll_new'] - 0.2)
      self.assertLess(row['distance'][-1], row['distance'][0])

  def test_a_line_a_long_answer_in_order(self):
    words = tokenizer.load_tokenizer(TEXT.model)
    rows = TEXT.whole.records
    self.assertEqual([row['number'] for row in rows], [1, 2, 3, 4])
    for row, given in zip(rows, TEXTS):
      for name in ('question', 'answer'):
        self.assertEqual(row[name], given[name])
      self.assertEqual(row['category'], given.get('category', ''))
      self.assertEqual(row['case'], '')
      self.assertTrue(row['written'])
      target = words(given['answer'] + '</s>', add_special_tokens=False)
      states = -(-len(target['input_ids']) // WINDOW)
      self.assertEqual(row['states'], states)
      self.assertBetween(row['steps'], states, 4 * states)
      self.assertLess(row['distance'][-1], row['distance'][0])
      self.assertNotEqual(row['before']['text'], row['after']['text'])
      for when in ('before', 'after'):
        self.assertLen(row[when]['paraphrase_texts'], 1)
        self.assertLen(row[when]['sub_texts'], 1)

  def test_given_contexts_are_used_verbatim(self):
    written = (FACT.whole.folder / 'templates.json').read_text()
    self.assertEqual(json.loads(written), CONTEXTS)

  def test_perplexity_before_and_after(self):
    found = FACT.whole.results['perplexity']
    for name in ('pre', 'post'):
      self.assertGreater(found[name]['value'], 1)
      self.assertLessEqual(found[name]['tokens'], 300)
      self.assertIn('token', found[name]['protocol'])
    self.assertNotEqual(found['pre']['value'], found['post']['value'])
    self.assertIn(f'perplexity of {FACT.text}: ', FACT.whole.out)

  def test_given_answers_before_and_after(self):
    found = FACT.whole.results['choices']
    for name in ('pre', 'post'):
      self.assertIn(found[name]['accuracy'], (0, 0.5, 1))
      self.assertEqual(found[name]['questions'], 2)
    self.assertBetween(found['post']['same'], 0, 1)
    self.assertNotIn('same', found['pre'])
    self.assertIn(f'right answers of {FACT.choices}: ', FACT.whole.out)

  def test_questions_are_read_before_anything_is_loaded(self):
    bad = FACT.write({'goal': 'x', 'sol1': 'y', 'label': 0})
    refused = FACT.run(choices=bad, model='nowhere')
    self.assertEqual(refused.code, 2)
    self.assertIn("record 1: field 'sol2' is missing", refused.err)

  @both_kinds
  def test_runs_repeat_in_the_program_for_all(self, name):
    """`edit` tells the kind of its data, and does what the others do."""
    setup, whole = setup_of(name), setup_of(name).whole
    stop = mock.Mock(side_effect=AssertionError('collected again'))
    more = dict(batch_size=1, reset=True) if setup is TEXT else {}
    with mock.patch.object(moments, 'collect', stop):
      again = self.succeed(setup, program=edit, **more)
    for entry in SAME:
      want = dict(whole.results[entry])
      want.pop('saved', None)
      self.assertEqual(again.results[entry], want)
    self.assertEqual(again.records, whole.records)

  @both_kinds
  def test_without_generated_texts(self, name):
    setup = setup_of(name)
    done = self.succeed(setup, max_new_tokens=0, num_edits=2)
    names = done.results['metrics']['post']
    if setup is FACT:
      self.assertIn('es', names)
      self.assertNotIn('text', done.records[0]['after'])
    else:
      self.assertSameElements(names, ['learned'])
    self.assertNotIn('1. The mother', done.out)
    self.assertTrue(all(row['written'] for row in done.records))

  def test_collected_moments_can_be_given(self):
    out = FACT.path('given.safetensors')
    given = dict(
        program=collect_moments, corpus=f'file:{FACT.text}', tokens=400, out=out
    )
    with mock.patch.object(FACT, 'given', dict):
      done = self.succeed(FACT, layers='0,1', output_dir=None, **given)
    self.assertIn('tokens/s', done.out)
    stop = mock.Mock(side_effect=AssertionError('collected'))
    with mock.patch.object(moments, 'collect', stop):
      done = self.succeed(FACT, moments=out, num_edits=2, max_new_tokens=0)
    self.assertFalse((done.folder / 'moments.safetensors').exists())
    self.assert_same_rows(done.records[0], FACT.pair.records[0])


class SkippedTest(Case):

  def test_skipped_facts_are_replaced_and_listed(self):
    data = FACT.write(
        fact('Danielle', target_new=''),
        FACTS[0],
        FACTS[1],
        fact('Toko', 'Tower'),
        fact('Sydney', tiny_model.DROPPED),
    )
    done = self.succeed(
        FACT, data=data, on_bad_record='skip', num_edits=6, batch_size=4
    )
    self.assertEqual([row['number'] for row in done.records], [2, 3])
    skipped = done.results['skipped']
    self.assertEqual([one['number'] for one in skipped], [1, 4, 5])
    self.assertIn('no tokens', skipped[2]['reason'])
    self.assertEqual(done.delta()[1]['records'], [2, 3])
    self.assertRegex(done.err, 'note: .*: 3 bad records were skipped')
    self.assertRegex(
        done.err,
        'note: --num_edits=6: .* holds 2 good records; all of them are edited',
    )
    for row, other in zip(done.records, FACT.pair.records):
      self.assert_same_rows(row, other | {'number': row['number']})

  def test_skipped_long_answers_are_replaced_and_listed(self):
    data = TEXT.write(
        text('Danielle', ''), TEXTS[0], text('Toko', 'in ' * 99), *TEXTS[1:]
    )
    done = self.succeed(TEXT, data=data, on_bad_record='skip', num_edits=9)
    self.assertEqual([row['number'] for row in done.records], [2, 4, 5, 6])
    for row, other in zip(done.records, TEXT.whole.records):
      self.assertEqual(row['after'], other['after'])
    skipped = done.results['skipped']
    self.assertEqual([one['number'] for one in skipped], [1, 3])
    self.assertIn('the limit is 96', skipped[1]['reason'])


class DeltaTest(Case):

  @both_kinds
  def test_delta_reproduces_the_numbers(self, name):
    setup = setup_of(name)
    edited, metadata = setup.whole.delta(model_hash=setup.base.hash)
    self.assertEqual(metadata['records'], [1, 2, 3, 4])
    self.assertEqual(metadata['model_hash'], setup.base.hash)
    self.assertEqual(metadata['independent'], setup is TEXT)
    (delta,) = edited.deltas
    self.assertIsInstance(delta, LowRank)
    self.assertEqual(delta.layers, (0, 1))
    self.assertEqual(delta.key.shape[:2], (2, 4))
    alone = setup is TEXT
    rows = [
        (e if alone else None, r) for e, r in enumerate(setup.whole.records)
    ]
    self.assert_judged(setup, edited, rows)

  def test_files_are_as_private_as_the_process_wants(self):
    umask = os.umask(0o077)
    try:
      done = self.succeed(
          FACT, num_edits=1, moments_tokens=200, save_model=True,
          max_new_tokens=0,
      )  # fmt: skip
    finally:
      os.umask(umask)
    written = [done.folder, *done.folder.rglob('*')]
    blob = (done.folder / 'moments.safetensors').read_bytes()
    (kept,) = (
        path
        for path in pathlib.Path(
            os.environ['JAXEDIT_CACHE'], 'moments'
        ).iterdir()
        if path.read_bytes() == blob
    )
    for path in (*written, kept):
      self.assertEqual(path.stat().st_mode & 0o077, 0, path)

  def test_batches_add_up(self):
    model = FACT.base
    config = METHODS['memit'].configure(
        layers=(0, 1), moment_weight=20.0, value_steps=5
    )
    editor = METHODS['memit'].editor(model.spec, config)
    (need,) = editor.needs
    found = stats_moments.load(FACT.whole.folder / 'moments.safetensors')
    state, params = editor.init(model, {need: found}), model.params
    encoded = text_helpers.encode_edits(
        tokenizer.load_tokenizer(FACT.model),
        datasets.load_requests(FACT.data).requests,
        CONTEXTS,
        max_tokens=model.spec.max_positions,
    )
    shapes = plan_lib.plan_shapes(encoded, slots=2, batch=2)
    for batch in (encoded[:2], encoded[2:]):
      edited, state, _ = editor.edit(
          dataclasses.replace(model, params=params), state,
          EditBatch(batch, shapes), Run(),
      )  # fmt: skip
      params = edited_lib.apply(params, edited)
    summed = edited_lib.apply(model.params, FACT.whole.delta()[0])
    one_by_one = logits(params)
    np.testing.assert_allclose(logits(summed), one_by_one, atol=2e-3)
    self.assertGreater(np.abs(one_by_one - logits(model.params)).max(), 0.5)

  def test_reset_starts_every_batch_anew(self):
    apart = self.succeed(FACT, reset=True)
    edited, metadata = apart.delta()
    self.assertTrue(metadata['independent'])
    self.assertEqual(apart.results['protocol']['mode'], 'independent')
    (first,) = edited_lib.select(edited, 0).deltas
    (alone,) = FACT.pair.delta()[0].deltas
    np.testing.assert_allclose(first.key, alone.key, atol=1e-5)
    np.testing.assert_allclose(first.value, alone.value, atol=1e-5)
    for row, other in zip(apart.records, FACT.pair.records):
      self.assert_same_rows(row, other)

  def test_reset_by_one_is_every_fact_alone(self):
    text = dict(perplexity_text=FACT.text, perplexity_tokens=60)
    text['choices'] = FACT.choices
    flags = dict(max_new_tokens=0) | text
    apart = self.succeed(FACT, reset=True, batch_size=1, **flags)
    data = FACT.write(FACTS[1])
    alone = self.succeed(FACT, data=data, **flags)
    (row,) = alone.records
    self.assert_same_rows(apart.records[1], row | {'number': 2})
    read, own = (x.results['perplexity']['post'] for x in (apart, alone))
    self.assertLen(read['each'], 4)
    self.assertAlmostEqual(read['each'][1], own['nats'], 4)
    self.assertAlmostEqual(read['nats'], np.mean(read['each']), 12)
    self.assertIn('under every edit by itself', read['protocol'])
    self.assertNotIn('each', own)
    chosen = apart.results['choices']['post']
    self.assertIn('mean over edits', chosen['protocol'])
    self.assertIn('tokens, mean over edits)', apart.out)

  def test_records_do_not_see_each_other(self):
    data = TEXT.write(*TEXTS[::-1])
    rows = self.succeed(TEXT, data=data).records
    for number, row in enumerate(TEXT.whole.records[::-1], 1):
      self.assert_same_rows(rows[number - 1], row | {'number': number})

  def test_case_is_one_edit(self):
    done = self.succeed(TEXT, data=TEXT.cases)
    edited, _ = done.delta()
    self.assertEqual(edited.deltas[0].key.shape[1], 3)
    self.assertEqual(
        [row['case'] for row in done.records], ['', 'both', 'both', '']
    )
    rows = list(zip((0, 1, 1, 2), done.records))
    self.assert_judged(TEXT, edited, rows, TEXT.cases)
    for i in (0, 3):
      self.assert_same_rows(done.records[i], TEXT.whole.records[i])
    # Both passages of the case are in force at once.
    self.assertNotEqual(
        [row['after'] for row in done.records[1:3]],
        [row['after'] for row in TEXT.whole.records[1:3]],
    )

  def test_independent_batches_of_cases(self):
    done = self.succeed(TEXT, batch_size=2, data=TEXT.cases)
    edited, metadata = done.delta()
    self.assertTrue(metadata['independent'])
    self.assertEqual(edited.deltas[0].key.shape[1], 2)
    rows = list(zip((0, 0, 0, 1), done.records))
    self.assert_judged(TEXT, edited, rows, TEXT.cases)

  def test_a_sequence_is_judged_along_the_way(self):
    text = dict(max_new_tokens=0, perplexity_text=FACT.text)
    done = self.succeed(FACT, judge_at='1,2,4', **text)
    (along,) = done.results['along']  # batches of two; the last one is the end
    self.assertEqual(along['edits'], 2)
    half = self.succeed(FACT, num_edits=2, **text).results
    for name, value in half['metrics']['post'].items():
      self.assertAlmostEqual(
          along['metrics']['post'][name], value, delta=1e-5, msg=name
      )
    self.assertEqual(along['counts'], {'post': half['counts']['post']})
    self.assertAlmostEqual(
        along['perplexity']['value'], half['perplexity']['post']['value'], 3
    )
    lines = done.out.splitlines()
    at = lines.index('after so many edits, of all so far:')
    self.assertEqual(
        [x.split()[0] for x in lines[at + 1 :][:3]], ['edits', '2', '4']
    )
    refused = FACT.run(judge_at='2', reset=True, max_new_tokens=0)
    self.assertEqual(refused.code, 2)
    self.assertIn('--judge_at needs one edited model', refused.err)

  @parameterized.parameters('rect', 'prune')
  def test_post(self, post):
    done = self.succeed(FACT, post=post, max_new_tokens=0)
    self.assertEqual(done.results['protocol']['settings']['post'], post)
    edited, _ = done.delta()
    (delta,) = edited.deltas
    self.assertIsInstance(delta, Dense)
    kernel = np.asarray(delta.value)
    self.assertTrue(np.isfinite(kernel).all())
    plain = np.asarray(edited_lib.full(FACT.whole.delta()[0].deltas[0]))
    if post == 'rect':  # two batches choose 0.4 of the entries each
      self.assertBetween(np.mean(kernel != 0), 0.4, 0.8)
    else:
      own = FACT.base.params['layers']['mlp']['down']['kernel']
      for layer in (0, 1):
        sizes = [np.linalg.norm(x[layer], 2) for x in (plain, kernel, own)]
        self.assertLessEqual(sizes[1], sizes[0] * (1 + 1e-5))
        if sizes[0] > sizes[2]:
          self.assertLess(sizes[1], sizes[0])
    for row in done.records:
      self.assertTrue(row['written'])
      self.assertNotEqual(row['before']['nll_new'], row['after']['nll_new'])
    self.assert_judged(FACT, edited, [(None, done.records[0])])


class SavedModelTest(Case):

  def test_saved_model_is_judged(self):
    results = FACT.whole.results
    again = loading.load_model(FACT.whole.folder / 'model')
    self.assertEqual(again.hash, results['saved']['model_hash'])
    self.assertNotEqual(again.hash, FACT.base.hash)
    self.assertEqual(results['saved']['merge_error'], 0)
    self.assertEqual(results['saved']['dtypes'], ['F32'])
    post, saved = results['metrics']['post'], results['metrics']['saved']
    self.assertSameElements(post, saved)
    for name, value in post.items():
      self.assertAlmostEqual(value, saved[name], delta=1e-3)

  def test_a_sequence_of_long_answers(self):
    """Two batches, the first with a case of two passages."""
    done = self.succeed(
        TEXT, data=TEXT.cases, reset=False, batch_size=2, save_model=True
    )
    self.assertEqual(done.results['protocol']['mode'], 'sequential')
    edited, metadata = done.delta()
    self.assertFalse(metadata['independent'])
    self.assertTrue(all(row['written'] for row in done.records))
    rows = [(None, row) for row in done.records]
    self.assert_judged(TEXT, edited, rows, TEXT.cases)
    again = loading.load_model(done.folder / 'model')
    self.assertEqual(again.hash, done.results['saved']['model_hash'])
    post, saved = (done.results['metrics'][x] for x in ('post', 'saved'))
    self.assertSameElements(post, saved)
    for name, value in post.items():
      self.assertAlmostEqual(value, saved[name], delta=1e-6)
    self.assertIn('saved', done.results['categories'])

  def test_original_comes_back(self):
    place = FACT.path('restored')
    saving.restore(FACT.whole.folder / 'model', place)
    for path in FACT.model.iterdir():
      self.assertEqual(
          (place / path.name).read_bytes(), path.read_bytes(), path.name
      )

  @absltest.skipIf(importlib.util.find_spec('torch') is None, 'needs torch')
  def test_transformers_reads_it(self):
    import torch
    import transformers

    folder = FACT.whole.folder / 'model'
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
      theirs = model(torch.tensor(words(PROMPTS)['input_ids'])).logits.numpy()
    edited, _ = FACT.whole.delta()
    params = edited_lib.apply(FACT.base.params, edited)
    np.testing.assert_allclose(logits(params), theirs, atol=1e-3)

  def test_rounding_of_bfloat16_is_told(self):
    # Without given contexts, so that these runs sample theirs as well.
    settings = dict(
        model=FACT.coarse,
        dtype='bfloat16',
        context_templates=None,
        save_model=True,
        num_edits=2,
        max_new_tokens=0,
    )
    source = self.succeed(FACT, **settings)
    wide = self.succeed(FACT, edited_dtype='float32', **settings)
    saved = [done.results['saved'] for done in (source, wide)]
    self.assertEqual(saved[0]['dtypes'], ['BF16'])
    self.assertEqual(saved[1]['dtypes'], ['F32'])
    self.assertBetween(saved[0]['merge_error'], 1e-4, 0.5)
    self.assertLess(saved[1]['merge_error'], saved[0]['merge_error'] / 100)
    given = source.results['protocol']['templates']
    self.assertEqual(given, wide.results['protocol']['templates'])
    self.assertLen(given, 6)
    self.assertEqual(given[0], '{}')
    for template in given:
      self.assertEqual(template.count('{}'), 1)


class OtherMethodsTest(Case):

  def test_alphaedit_in_two_batches(self):
    done = self.succeed(
        FACT, method='alphaedit', moment_weight=None, max_new_tokens=0
    )
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'alphaedit')
    settings = protocol['settings']
    self.assertEqual(settings['null_space_share'], 0.9)
    self.assertIsNone(settings['null_space_threshold'])
    self.assertTrue(settings['preserve_previous'])
    (delta,) = done.delta()[0].deltas
    self.assertEqual(delta.key.shape[:2], (2, 4))
    for row in done.records:
      self.assertTrue(row['written'])
      self.assertLess(row['distance'][-1], row['distance'][0])

  def test_rome_by_one(self):
    done = self.succeed(
        FACT, method='rome', layers='1', moment_weight=None, reset=True,
        batch_size=1, max_new_tokens=0,
    )  # fmt: skip
    self.assertEqual(done.results['protocol']['method'], 'rome')
    settings = done.results['protocol']['settings']
    self.assertEqual(settings['output'], 'mlp')
    self.assertTrue(settings['moments'])
    edited, metadata = done.delta()
    self.assertTrue(metadata['independent'])
    (delta,) = edited.deltas
    self.assertEqual((delta.layers, delta.key.shape[:3]), ((1,), (1, 4, 1)))
    for row in done.records:
      self.assertLess(row['after']['nll_new'], row['before']['nll_new'] - 0.2)

  def test_rome_chunk_by_chunk_without_moments(self):
    names = dict(method='rome', layers='1', moment_weight=None)
    with mock.patch.object(moments, 'collect', side_effect=AssertionError):
      done = self.succeed(TEXT, parity='easyedit', **names)
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'rome+anyedit')
    self.assertEqual(protocol['moments'], {'corpus': 'none', 'tokens': 0})
    edited, _ = done.delta()
    self.assertEqual(edited.deltas[0].layers, (1,))
    self.assertTrue(all(row['written'] for row in done.records))
    self.assert_judged(TEXT, edited, list(enumerate(done.records)))

  def test_parity_with_anyedit(self):
    seen = []
    encode = encoding.Encoder.encode

    def spy(self, requests):
      seen.extend(encode(self, requests))
      return seen

    with mock.patch.object(encoding.Encoder, 'encode', spy):
      done = self.succeed(TEXT, anyedit=False, parity='anyedit')
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'memit (shadowed)')
    self.assertEqual(protocol['settings']['schedule_edits'], 1)
    self.assertEqual(protocol['settings']['parity'], 'anyedit')
    self.assertTrue(protocol['double_bos'])
    self.assertLen(seen, 4)
    for one in seen:
      self.assertEqual(one.rows[0][:2].tolist(), [0, 0])
      self.assertNotEqual(one.rows[0][2], 0)
    for row in done.records:
      self.assertEqual(row['states'], 1)
      self.assertTrue(row['written'])
      # Half of what is left is written twice, a quarter is never.
      self.assertGreater(row['distance'][-1], 0.1)

  def test_model_says_the_answer(self):
    # One state a token can steer even a model of random weights.
    done = self.succeed(TEXT, window=1, value_steps=20, max_new_tokens=24)
    for row in done.records:
      self.assertEqual(row['after']['text'], row['answer'])
    self.assertEqual(done.results['metrics']['post']['question/exact_match'], 1)
    self.assertIn('   after:  French. The capital', done.out)

  def test_questions_that_are_asked(self):
    one, two, three, four = TEXTS
    case = {'case': 'both', 'category': 'music'}
    data = TEXT.write(one, two | case, three | case, one | {'question': 'x'},
                      four | {'category': 'music'})  # fmt: skip
    done = self.succeed(TEXT, data=data, per_category=1, sub_questions=False)
    self.assertEqual([row['number'] for row in done.records], [1, 2, 3])
    for names in done.results['metrics'].values():
      self.assertFalse([name for name in names if name.startswith('sub/')])
    self.assertEqual(done.records[0]['after']['sub_texts'], [])

  def test_chat_that_is_written_out(self):
    done = self.succeed(TEXT, chat='<s>In {} is', answer_end='</s>')
    for name in ('protocol', 'metrics'):
      self.assertEqual(done.results[name], TEXT.whole.results[name])
    self.assertEqual(done.records, TEXT.whole.records)

  def test_sampled_answers(self):
    settings = dict(
        temperature=1, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=4
    )
    judge = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(editing, 'judge', judge):
      self.assertEqual(TEXT.run(**settings).code, 130)
    (scorer,) = judge.call_args.args[2]
    self.assertEqual(scorer.decoding._asdict(), settings)


if __name__ == '__main__':
  absltest.main()
