"""The editing program from its flags to its files, and all it must refuse."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import struct
import types
from unittest import mock

import chex
import jax
import numpy as np
import programs
import tiny_model
from absl.testing import absltest, parameterized

from experiments import (
    collect_moments,
    common,
    editing,
    job,
    job_report,
    judging,
    kept,
    memit_batch,
    resources,
)
from jaxedit import edited as edited_lib
from jaxedit import io
from jaxedit.edited import lm
from jaxedit.eval import datasets, harness
from jaxedit.methods import closed_form, memit
from jaxedit.models import loading, saving, tokenizer
from jaxedit.stats import moments
from jaxedit.targets import TargetConfig
from jaxedit.testing import facts
from jaxedit.text import encoding
from jaxedit.types import TokenLayout

CONTEXTS = ['{}', 'The Eiffel Tower. {}', 'Paris is in France. {}']
LAYERS = (0, 1)


def record(subject, target='twin city', /, **changes):
  """A fact; those with a subject of one token all have one shape."""
  return {
      'prompt': 'The mother tongue of {} is',
      'subject': subject,
      'target_new': target,
      'target_true': 'French',
      'paraphrases': [f'{subject} is in the city of'],
      'neighbours': ['The mother tongue of France is'],
  } | changes


GOOD = (
    record('Danielle'),
    record('Toko', 'guitar piano'),
    record('Sydney', 'capital Tower'),
    record('Paris', 'in was'),
)


class Setup(programs.Setup):
  """Files and flags that all tests share."""

  def __init__(self):
    super().__init__(memit_batch)
    self.data = self.write(*GOOD)
    self.contexts = self.path('contexts.json')
    self.contexts.write_text(json.dumps(CONTEXTS))

  def given(self):
    return dict(
        data=self.data,
        layers='0,1',
        batch_size=2,
        slots=2,
        moment_weight=20,
        value_steps=5,
        eval_batch_size=4,
        max_new_tokens=3,
        moments_corpus=f'file:{self.text}',
        moments_tokens=400,
        context_templates=self.contexts,
    )

  # Runs that several tests look at.

  @functools.cached_property
  def whole(self):
    return self.run(save_model=True, keep_original=True)

  @functools.cached_property
  def pair(self):
    return self.run(num_edits=2)

  @functools.cached_property
  def each(self):
    return self.run(reset=True, batch_size=1, max_new_tokens=0)

  @functools.cached_property
  def coarse(self):
    return tiny_model.make(self.folder / 'coarse', dtype='bfloat16')


def setUpModule():
  global SETUP
  SETUP = Setup()


def tearDownModule():
  SETUP.close()


class Case(programs.Case):

  def succeed(self, **changes):
    return super().succeed(SETUP.run, **changes)

  def refuse(self, *sentences, weights=False, **changes):
    """Runs in vain; nothing expensive may have happened before.

    Args:
      *sentences: patterns of the lines on standard error, all of them.
      weights: whether the weights had to be read for this.
      **changes: flags.
    """
    unreached = [
        (judging, 'judge'),
        (collect_moments, 'collect'),
        (editing, 'edit_in_sequence'),
    ]
    if not weights:
      unreached.append((loading, 'load_model'))
    return super().refuse(SETUP.run, sentences, unreached, **changes)


def logits(model, params, texts):
  """[B, T, V] of texts of one length, under no change."""
  words = tokenizer.load_tokenizer(model.folder)
  tokens = np.array(words(list(texts))['input_ids'], np.int32)
  position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  columns = TokenLayout(position, np.ones_like(tokens))
  h = lm.hidden(model.spec, params, lm.UNEDITED, tokens, columns)
  return np.asarray(lm.decoder.logits(model.spec, params, h))


TEXTS = [
    'The mother tongue of Danielle is twin city',
    'The mother tongue of Sydney is capital Tower',
]


class WholeRunTest(Case):

  def test_files_and_tables(self):
    done = SETUP.whole
    self.assertEqual(done.code, 0, done.err)
    self.assertSameElements(
        [path.name for path in done.folder.iterdir()],
        [
            'delta.safetensors', 'results.json', 'records.jsonl',
            'templates.json', 'moments.safetensors', 'model',
        ],
    )  # fmt: skip
    results = done.results
    for name in ('pre', 'post', 'saved'):
      for metric in ('es', 'ps', 'ns', 'exact_match', 'locality_correct'):
        value = results['metrics'][name][metric]
        self.assertIsInstance(value, float)
        self.assertBetween(value, 0, 1)
        low, high = results['intervals'][name][metric]
        self.assertLessEqual(low, high)
        self.assertEqual(results['counts'][name][metric], 4)
    self.assertIn('locality_agreement', results['metrics']['saved'])
    self.assertEqual(results['skipped'], [])
    self.assertIn('metric', done.out)
    self.assertIn('4 edits in', done.out)
    self.assertIn('1. The mother tongue of Danielle is -> twin city', done.out)

  def test_edits_take(self):
    for row in SETUP.whole.records:
      self.assertLess(row['after']['nll_new'], row['before']['nll_new'] - 0.2)
      self.assertLess(row['distance'][-1], row['distance'][0])

  def test_protocol(self):
    protocol = SETUP.whole.results['protocol']
    self.assertEqual(protocol['model_hash'], SETUP.base.hash)
    self.assertEqual(protocol['dtype'], 'float32')
    self.assertEqual(protocol['batch_size'], 2)
    self.assertEqual(protocol['mode'], 'sequential')
    self.assertEqual(protocol['seed'], 0)
    self.assertIn('greedy, 3 new tokens', protocol['decoding'])
    self.assertEqual(protocol['settings']['layers'], [0, 1])
    self.assertEqual(protocol['settings']['moment_weight'], 20)
    self.assertEqual(protocol['settings']['value']['steps'], 5)
    self.assertEqual(protocol['templates'], CONTEXTS)
    digest = hashlib.sha256(SETUP.data.read_bytes()).hexdigest()
    self.assertEqual(protocol['data']['sha256'], digest)
    self.assertEqual(protocol['moments']['model'], SETUP.base.hash)
    self.assertGreaterEqual(protocol['moments']['tokens'], 400)
    self.assertIn('jax', SETUP.whole.results['versions'])

  def test_seconds_by_stage(self):
    timing = SETUP.whole.results['timing']
    self.assertSameElements(
        timing,
        [
            'load', 'templates', 'moments', 'factor', 'evaluate_before',
            'optimize', 'insert', 'evaluate_after', 'save_model', 'total',
            'compile',
        ],
    )  # fmt: skip
    self.assertTrue(all(seconds >= 0 for seconds in timing.values()))
    total = timing.pop('total')
    self.assertLess(timing.pop('compile'), total)
    self.assertBetween(sum(timing.values()), 0.5 * total, total)

  def test_a_line_a_record_in_order(self):
    rows = SETUP.whole.records
    self.assertEqual([row['number'] for row in rows], [1, 2, 3, 4])
    for row, given in zip(rows, GOOD):
      self.assertEqual(row['subject'], given['subject'])
      self.assertEqual(row['target_new'], given['target_new'])
      self.assertTrue(row['written'])
      self.assertBetween(row['steps'], 1, 5)
      self.assertIn('text', row['after'])

  def test_given_contexts_are_used_verbatim(self):
    text = (SETUP.whole.folder / 'templates.json').read_text()
    self.assertEqual(json.loads(text), CONTEXTS)

  def test_runs_repeat(self):
    stop = mock.Mock(side_effect=AssertionError('collected again'))
    with mock.patch.object(collect_moments, 'collect', stop):
      again = self.succeed(save_model=True, keep_original=True)
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'unedited'):
      self.assertEqual(again.results[name], SETUP.whole.results[name])
    self.assertEqual(again.records, SETUP.whole.records)

  def test_changed_text_and_damaged_cache_are_collected_again(self):
    text = SETUP.path('text.txt')
    text.write_text(SETUP.text.read_text())
    settings = dict(
        moments_corpus=f'file:{text}', num_edits=2, max_new_tokens=0
    )
    wrapped = mock.Mock(wraps=collect_moments.collect)
    with mock.patch.object(collect_moments, 'collect', wrapped):
      first = self.succeed(**settings)
      self.succeed(**settings)
      self.assertEqual(wrapped.call_count, 1)
      (config,) = wrapped.call_args.args[:1]
      blob = bytearray(config.out.read_bytes())
      blob[-3] ^= 1
      config.out.unlink()  # the first run's folder has a link to it
      config.out.write_bytes(blob)
      again = self.succeed(**settings)
      self.assertEqual(wrapped.call_count, 2)
      text.write_text(SETUP.text.read_text() + '\nTower of Sydney')
      self.succeed(**settings)
      self.assertEqual(wrapped.call_count, 3)
    self.assertEqual(again.records, first.records)


class DeltaTest(Case):

  def test_delta_reproduces_the_numbers(self):
    edited, metadata = SETUP.whole.delta(model_hash=SETUP.base.hash)
    self.assertFalse(metadata['independent'])
    model = SETUP.base
    found = harness.evaluate(
        model.spec,
        edited_lib.apply(model.params, edited),
        lm.UNEDITED,
        datasets.load_records(SETUP.data).records,
        tokenizer.load_tokenizer(SETUP.model),
        max_new_tokens=0,
        batch_size=4,
    )
    for mine, row in zip(found.per_record, SETUP.whole.records):
      for name in ('nll_new', 'nll_true'):
        self.assertAlmostEqual(mine[name], row['after'][name], delta=1e-4)

  def test_batches_add_up(self):
    model = SETUP.base
    recipe = memit.memit(LAYERS, moment_weight=20, value=TargetConfig(steps=5))
    editor = closed_form.closed_form(model.spec, recipe)
    found = moments.load(SETUP.whole.folder / 'moments.safetensors')
    state, params = editor.init(model.params, found), model.params
    encoded = encoding.encode_edits(
        tokenizer.load_tokenizer(SETUP.model),
        datasets.load_records(SETUP.data).records,
        CONTEXTS,
        max_tokens=model.spec.max_positions,
    )
    for batch in (encoded[:2], encoded[2:]):
      edited, state, _ = editor.edit(params, state, batch)
      params = edited_lib.apply(params, edited)
    summed = edited_lib.apply(model.params, SETUP.whole.delta()[0])
    one_by_one = logits(model, params, TEXTS)
    np.testing.assert_allclose(
        logits(model, summed, TEXTS), one_by_one, atol=2e-3
    )
    before = logits(model, model.params, TEXTS)
    self.assertGreater(np.abs(one_by_one - before).max(), 0.5)

  def test_perplexity_before_and_after(self):
    done = self.succeed(perplexity_text=SETUP.text, perplexity_tokens=300)
    found = done.results['perplexity']
    for name in ('pre', 'post'):
      self.assertGreater(found[name]['value'], 1)
      self.assertLessEqual(found[name]['tokens'], 300)
      self.assertIn('token', found[name]['protocol'])
    self.assertNotEqual(found['pre']['value'], found['post']['value'])
    self.assertIn(f'perplexity of {SETUP.text}: ', done.out)
    work = done.results['work']
    self.assertBetween(work['wasted'], 0, 1)
    self.assertLessEqual(work['tokens_needed'], work['places_run'])

  def test_reset_starts_every_batch_anew(self):
    apart = self.succeed(reset=True)
    edited, metadata = apart.delta()
    self.assertTrue(metadata['independent'])
    self.assertEqual(apart.results['protocol']['mode'], 'independent')
    (first,) = edited_lib.select(edited, 0).deltas
    (alone,) = SETUP.pair.delta()[0].deltas
    np.testing.assert_allclose(first.key, alone.key, atol=1e-5)
    np.testing.assert_allclose(first.value, alone.value, atol=1e-5)
    for row, other in zip(apart.records, SETUP.pair.records):
      self.assert_same_numbers(row['after'], other['after'])

  def test_reset_by_one_is_every_record_alone(self):
    self.assertEqual(SETUP.each.code, 0, SETUP.each.err)
    alone = self.succeed(data=SETUP.write(GOOD[1]), max_new_tokens=0)
    self.assert_same_numbers(
        SETUP.each.records[1]['after'], alone.records[0]['after']
    )

  def assert_same_numbers(self, one, other):
    for name in ('nll_new', 'nll_true'):
      self.assertAlmostEqual(one[name], other[name], delta=1e-3)
    for name, value in one['metrics'].items():
      self.assertAlmostEqual(value, other['metrics'][name], delta=1e-3)
    self.assertEqual(one.get('text'), other.get('text'))


class JudgeTest(parameterized.TestCase):
  """What a change is judged under; the evaluation gives its arguments back."""

  def judge(self, dtype):
    model = loading.load_model(SETUP.model, dtype)
    outcome = editing.Outcome(
        edited_lib.load(SETUP.whole.folder / 'delta.safetensors')[0], None, None
    )
    bench = types.SimpleNamespace(
        model=model, tokenizer=None, records=[], each=False
    )
    _, params, edited, *_ = judging.judge(
        bench, outcome, None, evaluate=lambda *args, **_: args, seed=0
    )
    return model.params, outcome.edited, params, edited

  def test_f32_takes_the_change(self):
    base, change, params, edited = self.judge('float32')
    self.assertEqual(edited.deltas, ())
    chex.assert_trees_all_equal(params, edited_lib.apply(base, change))

  def test_bfloat16_would_round_it(self):
    base, change, params, edited = self.judge('bfloat16')
    self.assertIs(edited, change)
    self.assertIs(params, base)


class SavedModelTest(Case):

  def test_saved_model_is_judged(self):
    results = SETUP.whole.results
    again = loading.load_model(SETUP.whole.folder / 'model')
    self.assertEqual(again.hash, results['saved']['model_hash'])
    self.assertNotEqual(again.hash, SETUP.base.hash)
    self.assertEqual(results['saved']['merge_error'], 0)
    self.assertEqual(results['saved']['dtypes'], ['F32'])
    post, saved = results['metrics']['post'], results['metrics']['saved']
    self.assertSameElements(post, saved)
    for name, value in post.items():
      self.assertAlmostEqual(value, saved[name], delta=1e-3)

  def test_original_comes_back(self):
    place = SETUP.path('restored')
    saving.restore(SETUP.whole.folder / 'model', place)
    for path in SETUP.model.iterdir():
      self.assertEqual(
          (place / path.name).read_bytes(), path.read_bytes(), path.name
      )

  @absltest.skipIf(importlib.util.find_spec('torch') is None, 'needs torch')
  def test_transformers_reads_it(self):
    import torch
    import transformers

    folder = SETUP.whole.folder / 'model'
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
      theirs = model(torch.tensor(words(TEXTS)['input_ids'])).logits.numpy()
    edited, _ = SETUP.whole.delta()
    params = edited_lib.apply(SETUP.base.params, edited)
    np.testing.assert_allclose(
        logits(SETUP.base, params, TEXTS), theirs, atol=1e-3
    )

  def test_rounding_of_bfloat16_is_told(self):
    # Without given contexts, so that these runs sample theirs as well.
    settings = dict(
        model=SETUP.coarse,
        dtype='bfloat16',
        context_templates=None,
        save_model=True,
        num_edits=2,
        max_new_tokens=0,
    )
    source = self.succeed(**settings)
    wide = self.succeed(edited_dtype='float32', **settings)
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


class OtherRowsTest(Case):

  def test_alphaedit_in_two_batches(self):
    done = self.succeed(
        method='alphaedit', moment_weight=None, max_new_tokens=0
    )
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'alphaedit')
    self.assertEqual(protocol['mode'], 'sequential')
    settings = protocol['settings']
    self.assertEqual((settings['share'], settings['threshold']), (0.9, None))
    self.assertTrue(settings['remember'])
    (change,) = done.delta()[0].deltas
    self.assertEqual(change.key.shape[:2], (2, 4))
    for row in done.records:
      self.assertTrue(row['written'])
      self.assertLess(row['distance'][-1], row['distance'][0])

  def test_rome_by_one(self):
    done = self.succeed(
        method='rome', layers='1', moment_weight=None, reset=True,
        batch_size=1, max_new_tokens=0,
    )  # fmt: skip
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'rome')
    self.assertEqual(protocol['settings']['output'], 'mlp')
    edited, metadata = done.delta()
    self.assertTrue(metadata['independent'])
    (change,) = edited.deltas
    self.assertEqual((change.layers, change.key.shape[:3]), ((1,), (1, 4, 1)))
    for row in done.records:
      self.assertLess(row['after']['nll_new'], row['before']['nll_new'] - 0.2)

  @parameterized.parameters('rect', 'prune')
  def test_post(self, post):
    done = self.succeed(post=post, max_new_tokens=0)
    self.assertEqual(done.results['protocol']['settings']['post'], post)
    (change,) = done.delta()[0].deltas
    kernel = np.asarray(edited_lib.full(change))
    self.assertTrue(np.isfinite(kernel).all())
    plain = np.asarray(edited_lib.full(SETUP.whole.delta()[0].deltas[0]))
    if post == 'rect':  # two batches choose 0.4 of the entries each
      self.assertBetween(np.mean(kernel != 0), 0.4, 0.8)
    else:
      own = SETUP.base.params['layers']['mlp']['down']['kernel']
      for layer in LAYERS:
        sizes = [np.linalg.norm(x[layer], 2) for x in (plain, kernel, own)]
        self.assertLessEqual(sizes[1], sizes[0] * (1 + 1e-5))
        if sizes[0] > sizes[2]:
          self.assertLess(sizes[1], sizes[0])
    for row in done.records:
      self.assertTrue(row['written'])
      self.assertNotEqual(row['before']['nll_new'], row['after']['nll_new'])

  def test_post_needs_one_model(self):
    self.refuse('--post=rect shapes .*leave one', post='rect', reset=True)

  def test_settings_of_another_method(self):
    self.refuse(
        '--rrome_keys is no setting of memit; it belongs to r-rome',
        rrome_keys='plain',
    )

  def test_activations_of_float32_weights(self):
    self.refuse(
        '--activations=bfloat16 rounds nothing .*give --dtype=bfloat16',
        activations='bfloat16',
    )

  def test_methods_for_texts_alone(self):
    self.refuse('method=unke: value should be one of', method='unke')


class BadRecordTest(Case):

  @parameterized.named_parameters(
      ('field', {'target_new': None}, 'target_new'),
      ('subject', {'prompt': 'The tongue of Ada is'}, 'Danielle.* nowhere in'),
      ('places', {'prompt': '{} and {} are'}, '2 placeholders.*write'),
      ('empty_target', {'target_new': ''}, 'target_new'),
      ('blank_target', {'target_new': ' \t '}, 'target_new'),
      ('dropped_target', {'target_new': tiny_model.DROPPED},
       'has no tokens; give'),
      ('dropped_subject', {'subject': tiny_model.DROPPED},
       'no token left after tokenisation; give'),
      ('long_prompt', {'prompt': '{} is' + ' in' * 100},
       'limit is 96; shorten the prompt'),
      ('long_target', {'target_new': 'in ' * 100}, 'limit is 96; shorten'),
      ('long_paraphrase', {'paraphrases': ['is in' + ' in' * 100]},
       "prompt 'is in.*model has 96; shorten"),
      ('long_to_go_on', {'paraphrases': ['is in' + ' in' * 92]},
       "prompt 'is in.* 3 generated ones .*generate fewer"),
      ('long_neighbour',
       {'neighbours': [{'prompt': 'a' + ' in' * 100, 'answer': 'city'}]},
       "prompt 'a in.*; shorten them"),
      ('dropped_answer',
       {'neighbours': [{'prompt': 'a', 'answer': tiny_model.DROPPED}]},
       "prompt 'a': an answer has no tokens; give"),
  )  # fmt: skip
  def test_fault_is_told_with_its_record(self, changes, sentence):
    faulty = record('Danielle', **changes)
    faulty = {k: v for k, v in faulty.items() if v is not None}
    data = SETUP.write(GOOD[1], faulty)
    self.refuse(rf'^error: record 2 \(id 2\): .*{sentence}', data=data)

  def test_same_edit_twice(self):
    data = SETUP.write(GOOD[0], GOOD[1], GOOD[0])
    self.refuse(r'record 3 .* same edit as record 1 .*; drop', data=data)

  def test_conflicting_edits(self):
    data = SETUP.write(GOOD[0], record('Danielle', 'Tower', id='x'))
    sentence = r"record 2 \(id x\).*'Tower' where record 1 .*'twin city'.*keep"
    self.refuse(sentence, data=data)

  def test_all_faults_at_once_with_and_without_a_tokenizer(self):
    data = SETUP.write(
        record('Danielle', target_new=''),
        GOOD[1],
        record('Sydney', tiny_model.DROPPED),
        '{"prompt": ',
        record('Paris', prompt='{} or {}'),
    )
    self.refuse(
        'record 1 .*target_new',
        'record 3 .*no tokens',
        'record 4 .*not JSON at line 4',
        'record 5 .*2 placeholders',
        data=data,
    )

  def test_skipped_records_are_replaced_and_listed(self):
    good = SETUP.whole.records
    data = SETUP.write(
        record('Danielle', target_new=''),
        GOOD[0],
        GOOD[1],
        record('Toko', 'Tower'),
        record('Sydney', tiny_model.DROPPED),
        GOOD[2],
        GOOD[3],
    )
    done = self.succeed(data=data, on_bad_record='skip', num_edits=6)
    self.assertEqual([row['number'] for row in done.records], [2, 3, 6, 7])
    for row, other in zip(done.records, good):
      self.assertEqual(row['after'], other['after'])
    skipped = done.results['skipped']
    self.assertEqual([one['number'] for one in skipped], [1, 4, 5])
    self.assertIn('no tokens', skipped[2]['reason'])
    self.assertRegex(done.err, 'note: .*: 3 faulty records were skipped')
    self.assertRegex(
        done.err,
        'note: --num_edits=6: .* holds 4 good records; all of them are edited',
    )

  def test_nothing_left_after_skipping(self):
    data = SETUP.write(record('Danielle', ''), record('Toko', ''))
    self.refuse('record 1', 'record 2', data=data, on_bad_record='skip')

  def test_no_such_data(self):
    self.refuse('nowhere.*there is no such file; check', data='nowhere.jsonl')

  def test_data_without_records(self):
    self.refuse('holds no records', data=SETUP.write(''))

  def test_faulty_records_fetch_no_model(self):
    data = SETUP.write(record('Danielle', ''))
    with mock.patch.object(job.hub, 'resolve') as resolve:
      self.refuse('record 1', data=data, model='smollm2-135m-instruct')
    resolve.assert_not_called()


class BadFlagTest(Case):

  @parameterized.named_parameters(
      ('unknown', dict(modle='x'), "flag 'modle'. Did you mean: model"),
      ('enum', dict(dtype='float16'), 'dtype=float16: .*float32'),
      ('integer', dict(num_edits='few'), 'num_edits=few: give a whole number'),
      ('number', dict(clamp='much'), 'clamp=much: give a number'),
      ('below', dict(batch_size=0), 'batch_size=0'),
      ('negative_seed', dict(seed=-1), 'seed=-1'),
      ('not_finite', dict(value_rate='nan'), 'value_rate=nan.*finite'),
      ('no_weight', dict(moment_weight=0), 'moment_weight=0.*above 0'),
      ('words', dict(words=['more']), 'unexpected arguments: more'),
      ('layer_words', dict(layers='a,b'), '--layers=a,b: give layer numbers'),
      ('no_layers', dict(layers=''), '--layers=: give layer numbers'),
      ('layer_range', dict(layers='1,3'), 'has layers 0 to 2; choose'),
      ('layer_below', dict(layers='-1'), 'has layers 0 to 2; choose'),
      ('layer_twice', dict(layers='1,1'), 'once, in ascending order'),
      ('no_output', dict(output_dir=None), 'output_dir is missing: name a'),
      ('perplexity_and_reset', dict(perplexity_text=__file__, reset=True),
       '--perplexity_text needs one edited model; .*leave one of them out'),
      ('no_such_text', dict(perplexity_text='nowhere.txt'),
       '--perplexity_text=nowhere.txt: no such file; name a plain text'),
      ('save_and_reset', dict(save_model=True, reset=True),
       'save_model needs one edited model; --reset'),
      ('corpus', dict(moments_corpus='wiki'), "'wiki' is unknown; give self"),
      ('corpus_file', dict(moments_corpus='file:none.txt'),
       'none.txt: cannot be read .*; check the path'),
      ('moments', dict(moments='none.safetensors'), 'no such file; collect'),
      ('contexts', dict(context_templates='none.json'),
       'none.json: cannot be read'),
      ('model', dict(model='none'), "'none' names no model: .* Accepted"),
  )  # fmt: skip
  def test_one_sentence(self, changes, sentence):
    self.refuse(sentence, **changes)

  def test_independent_batches_that_outgrow_their_matrices(self):
    spec = SETUP.base.spec
    limit = edited_lib.rank_limit(spec.mlp_width, spec.width)
    data = SETUP.write(*[record(f'Toko {i}') for i in range(limit + 1)])
    self.refuse(
        f'--batch_size=999: with --reset .* up to {limit} states a batch',
        data=data, reset=True, batch_size=999,
    )  # fmt: skip

  def test_wrong_flags_are_told_at_once(self):
    self.refuse(
        'output_dir', 'save_model', 'layers',
        output_dir=None, save_model=True, reset=True, layers='x',
    )  # fmt: skip

  @parameterized.named_parameters(
      ('no_json', '["{}", ', 'not valid JSON .*give a JSON list'),
      ('object', '{"a": 1}', 'holds an object where a list is needed'),
      ('none', '["{}", "a b"]', r"template 2, 'a b', has '\{\}' 0 times"),
      ('two', '["{} {}"]', r"template 1, .* has '\{\}' 2 times; write it once"),
      ('number', '["{}", 3]', 'template 2 is int, not text'),
  )
  def test_context_templates(self, text, sentence):
    path = SETUP.path('contexts.json')
    path.write_text(text)
    self.refuse(sentence, context_templates=path)

  def test_records_too_long_under_sampled_contexts(self):
    long = ('{}', 'in ' * 90 + '{}')
    with mock.patch.object(resources, 'sample_templates', return_value=long):
      sentence = 'record {} .*limit is 96; shorten'
      self.refuse(
          *(sentence.format(number) for number in range(1, 5)),
          context_templates=None,
          weights=True,
      )

  def test_records_too_long_under_given_contexts(self):
    path = SETUP.path('contexts.json')
    path.write_text(json.dumps(['in ' * 90 + '{}']))
    self.refuse(*['limit is 96; shorten'] * 4, context_templates=path)


class OutputTest(Case):

  def test_place_that_cannot_be_written(self):
    sentence = 'cannot be written .*; choose another folder'
    self.refuse(sentence, output_dir=SETUP.data / 'below')
    self.refuse(sentence, output_dir=SETUP.data)

  def test_used_folder_needs_overwrite(self):
    place = SETUP.path('used')
    place.mkdir()
    for name in ('results.json', 'delta.safetensors', 'keep.txt'):
      (place / name).write_text('old')
    (place / 'model').mkdir()
    (place / 'model' / 'config.json').write_text('old')
    settings = dict(output_dir=place, num_edits=2)
    self.refuse('already has files; .*--overwrite', **settings)
    # Bad input must not cost the results that are there.
    self.refuse('layers', overwrite=True, layers='9', output_dir=place)
    self.assertEqual((place / 'results.json').read_text(), 'old')
    # A folder called model that no run has written is somebody's own.
    self.refuse(
        'model: exists, and no run .*; move it away',
        overwrite=True, save_model=True, **settings,
    )  # fmt: skip
    self.succeed(overwrite=True, **settings)
    self.assertEqual((place / 'model' / 'config.json').read_text(), 'old')
    shutil.rmtree(place / 'model')
    for _ in range(2):
      done = self.succeed(overwrite=True, save_model=True, **settings)
      self.assertIn('saved', done.results)
    self.assertEqual((place / 'keep.txt').read_text(), 'old')
    # A later run without --save_model leaves no model that is not its own.
    self.succeed(overwrite=True, **settings)
    self.assertFalse((place / 'model').exists())

  def test_own_source_is_not_overwritten(self):
    place = SETUP.path('used')
    shutil.copytree(SETUP.model, place / 'model')
    self.refuse(
        'model lies where .* would replace it; choose another',
        model=place / 'model', output_dir=place, overwrite=True,
    )  # fmt: skip

  def test_cache_that_cannot_be_written(self):
    place = {'JAXEDIT_CACHE': str(SETUP.data)}
    with mock.patch.dict(os.environ, place):
      self.refuse('cannot be kept there .*let JAXEDIT_CACHE', weights=True)

  @parameterized.parameters('records.jsonl', 'results.json')
  def test_interrupted_run_leaves_nothing_half_written(self, name):
    replace = os.replace

    def interrupt(source, place):
      if pathlib.Path(place).name == name:
        raise KeyboardInterrupt
      replace(source, place)

    with mock.patch.object(os, 'replace', interrupt):
      done = SETUP.run(num_edits=2, max_new_tokens=0)
    self.assertEqual(done.code, 130)
    self.assertIn('interrupted', done.err)
    left = {path.name for path in done.folder.iterdir()}
    whole = {'templates.json', 'moments.safetensors', 'delta.safetensors'}
    whole.add('unfinished')
    if name == 'results.json':
      whole.add('records.jsonl')
    self.assertEqual(left, whole)

  def test_sequence_goes_on_where_it_was_stopped(self):
    settings = dict(method='alphaedit', moment_weight=None, max_new_tokens=0)
    whole = self.succeed(**settings)
    save, saved = kept.Kept.save, []

    def stop(self, *args):
      if len(saved) == 3:  # one of the second batch's two
        raise KeyboardInterrupt
      saved.append(args)
      save(self, *args)

    with mock.patch.object(kept.Kept, 'save', stop):
      done = SETUP.run(**settings)
    self.assertEqual(done.code, 130)
    self.assertFalse((done.folder / 'delta.safetensors').exists())
    again = self.succeed(output_dir=done.folder, **settings)
    self.assertEqual(again.results['work']['states_kept'], 3)
    self.assertIn('the states of 3 of 4 edits were kept', again.err)
    self.assertNotIn('states_kept', whole.results['work'])
    self.assertFalse((done.folder / 'unfinished').exists())
    changes = [one.delta()[0] for one in (again, whole)]
    same = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(same, *changes)
    self.assertEqual(again.results['counts'], whole.results['counts'])

  def test_goes_on_where_the_saved_model_was_judged(self):
    settings = dict(num_edits=2, max_new_tokens=0, save_model=True)
    with mock.patch.object(
        job_report, 'write_results', side_effect=KeyboardInterrupt
    ):
      done = SETUP.run(**settings)
    self.assertEqual(done.code, 130)
    self.assertTrue((done.folder / 'model').is_dir())
    again = self.succeed(output_dir=done.folder, **settings)
    self.assertEqual(again.results['work']['states_kept'], 2)
    self.assertIn('saved', again.results)

  def test_interrupted_rerun_leaves_no_results_of_the_last(self):
    place = SETUP.path('used')
    place.mkdir()
    (place / 'results.json').write_text('old')
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(editing, 'edit_in_sequence', stop):
      done = SETUP.run(output_dir=place, overwrite=True, max_new_tokens=0)
    self.assertEqual(done.code, 130)
    self.assertFalse((place / 'results.json').exists())

  def test_full_disk(self):
    full = mock.Mock(side_effect=OSError(28, 'No space left on device'))
    with mock.patch.object(os, 'replace', full):
      with self.assertRaisesRegex(
          common.InputError, 'No space left.*make room'
      ):
        io.write_json(SETUP.path('x.json'), {})
    self.assertEmpty(list(SETUP.folder.glob('.*x.json*')))


class BadModelTest(Case):

  def copy(self):
    place = SETUP.path('model')
    shutil.copytree(SETUP.model, place)
    return place

  def test_truncated_weights(self):
    place = self.copy()
    weights = place / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    self.refuse('safetensors: is cut short or damaged.*; fetch', model=place)

  def test_corrupt_weights(self):
    place = self.copy()
    weights = place / 'model.safetensors'
    weights.write_bytes(b'\xff' * 1000)
    self.refuse('safetensors: .*no safetensors file.*; fetch', model=place)

  def test_truncated_gguf(self):
    path = SETUP.path('model.gguf')
    path.write_bytes(b'GGUF' + struct.pack('<IQQ', 3, 10, 5) + bytes(10))
    self.refuse(
        'model.gguf: .*it ends inside the header.*; fetch the file', model=path
    )

  def test_pickle_alone(self):
    place = self.copy()
    (place / 'model.safetensors').rename(place / 'pytorch_model.bin')
    self.refuse('only pickle weights .*convert them', model=place)

  def test_no_tokenizer(self):
    place = self.copy()
    (place / 'tokenizer.json').unlink()
    self.refuse('holds no tokenizer .*; copy', model=place)

  def test_weights_that_are_not_finite(self):
    bad = np.ones(tiny_model.SPEC.width, np.float32)
    bad[3] = np.nan
    place = tiny_model.make(
        SETUP.path('model'), changes={'model.norm.weight': bad}
    )
    self.refuse(
        'tensor model.norm.weight has values that are not finite.*fetch',
        model=place, weights=True,
    )  # fmt: skip


class BadMomentsTest(Case):

  def save(self, layers=LAYERS, model=None):
    found = facts.random_moments(tiny_model.SPEC, layers, seed=0)
    provenance = dict(found.provenance) | {'model': model or SETUP.base.hash}
    path = SETUP.path('moments.safetensors')
    moments.save(path, dataclasses.replace(found, provenance=provenance))
    return path

  def test_given_moments_are_used(self):
    stop = mock.Mock(side_effect=AssertionError('collected'))
    with mock.patch.object(collect_moments, 'collect', stop):
      done = self.succeed(moments=self.save(), num_edits=2, max_new_tokens=0)
    self.assertFalse((done.folder / 'moments.safetensors').exists())

  def test_of_another_model(self):
    path = self.save(model='other')
    self.refuse("hash 'other', not of .*; collect", moments=path, weights=True)
    # Nothing was written, so the mended command needs no --overwrite.
    done = self.refuse('other', moments=path, weights=True)
    self.assertEmpty(list(done.folder.iterdir()))

  def test_without_a_layer(self):
    self.refuse('of layers 0, not of 1; collect', moments=self.save((0,)))

  def test_cut_short(self):
    path = self.save()
    path.write_bytes(path.read_bytes()[:-10])
    self.refuse('is cut short or damaged', moments=path)

  def test_corrupt(self):
    path = self.save()
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)
    self.refuse('gram/. is missing or damaged', moments=path, weights=True)

  def test_published_folder_without_archives(self):
    self.refuse(
        '0 archives of mlp/down in layer 0',
        '0 archives of mlp/down in layer 1',
        moments=SETUP.model, weights=True,
    )  # fmt: skip

  def test_too_little_text(self):
    text = SETUP.path('text.txt')
    text.write_text('the tongue of Paris')
    with mock.patch.object(judging, 'judge') as judge:
      done = SETUP.run(moments_corpus=f'file:{text}')
    judge.assert_not_called()
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'error: .*not positive definite; collect more')


class NotFiniteTest(Case):

  def record(self):
    # One word less, as a token before the subject is a space.
    return record(tiny_model.POISON, prompt='The tongue of {} is')

  @parameterized.parameters(
      dict(reset=False, batch_size=2), dict(reset=True, batch_size=1)
  )
  def test_one_edit_fails_alone(self, **how):
    data = SETUP.write(self.record(), GOOD[0])
    done = self.succeed(model=SETUP.poisoned, data=data, **how)
    poisoned, sound = done.records
    self.assertFalse(poisoned['written'])
    self.assertIsNone(poisoned['loss'])
    self.assertTrue(sound['written'])
    self.assertLess(sound['after']['nll_new'], sound['before']['nll_new'] - 0.2)
    self.assertIn('1 edits were not written', done.out)
    for part in jax.tree.leaves(done.delta()[0]):
      self.assertTrue(np.isfinite(part).all())

  def test_no_edit_is_left(self):
    data = SETUP.write(self.record())
    done = SETUP.run(model=SETUP.poisoned, data=data)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'error: no edit was written: .*; lower')
    self.assertFalse((done.folder / 'results.json').exists())


class CommandTest(Case):
  """As a user starts it."""

  def test_errors_end_in_sentences_and_exit_code_2(self):
    data = SETUP.write(record('Danielle', ''), record('Toko', prompt='{} {}'))
    broken = SETUP.path('model')
    shutil.copytree(SETUP.model, broken)
    (broken / 'model.safetensors').write_bytes(b'\xff' * 99)
    cases = {
        'flag': (['--modle=x'], ["flag 'modle'. Did you mean: model"]),
        'file': (['--flagfile=none.flags'], ['flagfile: .*none.flags']),
        'data': (SETUP.arguments(data=data), ['record 1 .*', 'record 2 .*']),
        'model': (SETUP.arguments(model=broken), ['safetensors: .*fetch']),
    }
    running = {name: SETUP.start(*case[0]) for name, case in cases.items()}
    for name, process in running.items():
      out, err = process.communicate(timeout=300)
      with self.subTest(name):
        self.assertEqual(process.returncode, 2, err)
        self.assertEqual(out, '')
        lines = [x for x in err.splitlines() if x.startswith('error: ')]
        self.assertLen(lines, len(cases[name][1]), err)
        for line, sentence in zip(lines, cases[name][1]):
          self.assertRegex(line, sentence)
        for noise in ('Traceback', 'FATAL', 'ERROR'):
          self.assertNotIn(noise, err)

  def test_help_lists_all_flags(self):
    self.assert_helps(SETUP)


if __name__ == '__main__':
  absltest.main()
