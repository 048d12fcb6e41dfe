"""The program for long answers, from its flags to its files."""

import functools
import os
import pathlib
import shutil
from unittest import mock

import jax
import numpy as np
import programs
import tiny_model
from absl.testing import absltest, parameterized

from experiments import (
    anyedit_batch,
    collect_moments,
    editing,
    job,
    judging,
    resources,
)
from jaxedit import edited as edited_lib
from jaxedit.deltas import (
    Dense,
    Edited,
    LowRank,
)
from jaxedit.eval import answers
from jaxedit.methods import unke
from jaxedit.models import loading, tokenizer
from jaxedit.stats import corpora
from jaxedit.targets import run as run_lib
from jaxedit.text import chat as chat_lib
from jaxedit.text import passages as text_passages
from jaxedit.types import (
    Passage,
)

FLAGFILES = sorted(
    (programs.ROOT / 'experiments/flagfiles').glob('anyedit_*.flags')
)
WINDOW = 3


def passage(name, answer, /, **changes):
  """A question with an answer of several chunks."""
  return {
      'question': f'The mother tongue of {name}',
      'answer': answer,
      'paraphrases': [f'the tongue of {name}'],
      'sub_questions': [{'prompt': f'The city of {name}', 'answer': 'Paris'}],
  } | changes


GOOD = (
    passage('Danielle', 'French. The capital of France is Paris.',
            category='facts'),
    passage('Toko Yasuda', 'a guitar and the piano in Paris, a twin city',
            category='music'),
    passage('Sydney', 'was Wellington. The Eiffel Tower is in Paris.',
            category='facts'),
    passage('Paris', 'a twin city. The capital of France.'),
)  # fmt: skip
LONG = (
    *GOOD,
    passage('Paris Toko', 'the Eiffel Tower in France. a piano'),
    passage('Sydney Paris', 'French. The guitar in a city of France.'),
)


class Setup(programs.Setup):
  """Files and flags that all tests share."""

  def __init__(self):
    super().__init__(anyedit_batch, chats=True)
    self.data = self.write(*GOOD)

  def given(self):
    return dict(
        data=self.data,
        layers='0,1',
        window=WINDOW,
        slots=2,
        moment_weight=20,
        value_steps=4,
        eval_batch_size=2,
        max_new_tokens=6,
        moments_corpus=f'file:{self.text}',
        moments_tokens=400,
    )

  def recipe(self, **changes):
    """What flags make: (the method, its settings for the protocol)."""
    with self.parsed(*self.arguments(**changes)):
      return anyedit_batch.recipe_of_flags()

  def unke(self, **changes):
    """Runs with UnKE."""
    settings = dict(
        method='unke', layers='1', moment_weight=None, value_steps=20,
        unke_steps=10, unke_rate=1e-2, preserve=f'file:{self.text}',
        preserve_count=2,
    )  # fmt: skip
    return self.run(**(settings | changes))

  # Runs that several tests look at.

  @functools.cached_property
  def whole(self):
    return self.run()

  @functools.cached_property
  def block(self):
    return self.unke()

  @functools.cached_property
  def parts(self):
    """UnKE with memory for the changes of two records."""
    with self.in_parts():
      return self.unke()

  def in_parts(self):
    """Lets two changes of a block fit into memory."""
    leaves = jax.tree.leaves(self.base.params['layers'])
    block = 4 * sum(leaf[0].size for leaf in leaves)
    return mock.patch.object(anyedit_batch, '_SIDE_BYTES', 2 * block)

  @functools.cached_property
  def sequence(self):
    """Two batches, the first with a case of two passages."""
    return self.run(data=self.cases, reset=False, batch_size=2, save_model=True)

  @functools.cached_property
  def cases(self):
    one, two, three, four = GOOD
    case = {'case': 'both'}
    return self.write(one, two | case, three | case, four)

  @functools.cached_property
  def mute(self):
    """A model without a chat template."""
    return tiny_model.make(self.folder / 'mute')


def setUpModule():
  global SETUP
  SETUP = Setup()


def tearDownModule():
  SETUP.close()


class Case(programs.Case):

  def succeed(self, run=None, **changes):
    return super().succeed(run or SETUP.run, **changes)

  def refuse(self, *sentences, weights=False, **changes):
    """Runs in vain; nothing expensive may have happened before.

    Args:
      *sentences: patterns of the lines on standard error, all of them.
      weights: whether the weights had to be read for this.
      **changes: flags.
    """
    unreached = [
        (judging, 'judge'),
        (editing, 'edit_in_sequence'),
        (editing, 'edit_apart'),
        (collect_moments, 'collect'),
        (corpora, 'sample'),
    ]
    if not weights:
      unreached.append((loading, 'load_model'))
    return super().refuse(SETUP.run, sentences, unreached, **changes)

  def assert_judged_under(self, change, row):
    """Asks the model with a change merged what a record was asked."""
    model = SETUP.base
    words = tokenizer.load_tokenizer(SETUP.model)
    chat = chat_lib.chat_of(words, 'template')
    given = LONG[row['number'] - 1]
    said = answers.answers(
        model.spec,
        edited_lib.apply(model.params, change),
        Edited(),
        text_passages.encode_questions(
            words, [given['question'], *given['paraphrases']], chat
        ),
        tokenizer=words,
        stop=answers.end_ids(words, model.spec.vocab, chat.end),
        max_new_tokens=6,
        batch_size=2,
    )
    after = row['after']
    self.assertEqual(said, [after['text'], *after['paraphrase_texts']])

  def assert_same_rows(self, one, other):
    """Rows of records.jsonl; losses may differ in their last digits."""
    for name in ('number', 'written', 'states', 'before', 'after'):
      self.assertEqual(one[name], other[name], name)
    self.assertAlmostEqual(one['loss'], other['loss'], delta=1e-4)
    np.testing.assert_allclose(one['distance'], other['distance'], atol=1e-3)


class WholeRunTest(Case):

  def test_files_and_tables(self):
    done = SETUP.whole
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(
        done.files,
        [
            'delta.safetensors', 'moments.safetensors', 'records.jsonl',
            'results.json',
        ],
    )  # fmt: skip
    results = done.results
    names = [
        f'{asked}/{score}'
        for asked in ('question', 'paraphrase')
        for score in ('bleu_char', 'rouge_1_recall', 'rouge_2_recall',
                      'rouge_l_recall', 'rouge_l_f1', 'exact_match')
    ]  # fmt: skip
    names += ['sub/contains', 'sub/rouge_l_recall']
    for when in ('pre', 'post'):
      for metric in names:
        self.assertBetween(results['metrics'][when][metric], 0, 1)
        low, high = results['intervals'][when][metric]
        self.assertLessEqual(low, high)
        self.assertEqual(results['counts'][when][metric], 4)
    self.assertEqual(results['skipped'], [])
    self.assertEqual(results['unedited'], {})
    self.assertIn('metric', done.out)
    self.assertIn('4 edits in', done.out)
    self.assertIn('1. The mother tongue of Danielle', done.out)
    self.assertIn('   wanted: French.', done.out)

  def test_tables_by_category(self):
    found = SETUP.whole.results['categories']['post']
    self.assertSameElements(found, ['', 'facts', 'music'])
    self.assertEqual(found['facts']['question/exact_match']['n'], 2)

  def test_protocol(self):
    protocol = SETUP.whole.results['protocol']
    self.assertEqual(protocol['model_hash'], SETUP.base.hash)
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
        {'before': '<s>In ', 'after': ' is', 'end': '</s>', 'special': False},
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
    self.assertEqual(protocol['moments']['model'], SETUP.base.hash)

  def test_seconds_by_stage(self):
    self.assertSameElements(
        SETUP.whole.results['timing'],
        [
            'load', 'moments', 'factor', 'evaluate_before', 'optimize',
            'insert', 'evaluate_after', 'total', 'compile',
        ],
    )  # fmt: skip

  def test_a_line_a_record_in_order(self):
    words = tokenizer.load_tokenizer(SETUP.model)
    rows = SETUP.whole.records
    self.assertEqual([row['number'] for row in rows], [1, 2, 3, 4])
    for row, given in zip(rows, GOOD):
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
      for when in ('before', 'after'):
        self.assertLen(row[when]['paraphrase_texts'], 1)
        self.assertLen(row[when]['sub_texts'], 1)

  def test_delta_holds_every_record_alone(self):
    edited, metadata = SETUP.whole.delta()
    self.assertTrue(metadata['independent'])
    self.assertEqual(metadata['records'], [1, 2, 3, 4])
    self.assertEqual(metadata['model_hash'], SETUP.base.hash)
    (change,) = edited.deltas
    self.assertIsInstance(change, LowRank)
    self.assertEqual(change.layers, (0, 1))
    self.assertEqual(change.key.shape[:2], (2, 4))
    for e, row in enumerate(SETUP.whole.records):
      self.assertNotEqual(row['before']['text'], row['after']['text'])
      self.assert_judged_under(edited_lib.select(edited, e), row)

  def test_runs_repeat(self):
    again = self.succeed()
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'categories'):
      self.assertEqual(again.results[name], SETUP.whole.results[name])
    self.assertEqual(again.records, SETUP.whole.records)

  def test_states_are_kept(self):
    """A run with kept states optimises nothing, and gives the same."""
    store = SETUP.path('states')
    self.assertEqual(self.succeed(states=store).records, SETUP.whole.records)
    written = {path: path.read_bytes() for path in store.iterdir()}
    self.assertLen(written, len(GOOD))
    with mock.patch.object(run_lib, 'Run', side_effect=AssertionError):
      again = self.succeed(states=store)
      self.assertEqual(again.records, SETUP.whole.records)
      self.assertEqual(again.results['work']['steps'], 0)
      # What is inserted otherwise has the same states.
      other = self.succeed(states=store, moment_weight=1)
    self.assertNotEqual(other.records, SETUP.whole.records)
    self.assertEqual({p: p.read_bytes() for p in store.iterdir()}, written)
    self.succeed(states=store, value_steps=3)
    self.assertLen(list(store.iterdir()), 2 * len(GOOD))
    path = next(iter(written))
    path.write_bytes(b'{}')
    done = SETUP.run(states=store)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, f'{path}: is cut short or damaged.*delete it')

  def test_records_do_not_see_each_other(self):
    data = SETUP.write(*GOOD[::-1])
    rows = self.succeed(data=data).records
    for number, row in enumerate(SETUP.whole.records[::-1], 1):
      self.assert_same_rows(rows[number - 1], row | {'number': number})

  def test_model_says_the_answer(self):
    # One state a token can steer even a model of random weights.
    settings = dict(window=1, value_steps=20, max_new_tokens=24)
    done = self.succeed(**settings)
    for row in done.records:
      self.assertEqual(row['after']['text'], row['answer'])
    self.assertEqual(done.results['metrics']['post']['question/exact_match'], 1)
    self.assertIn('   after:  French. The capital', done.out)

  def test_sub_questions_can_be_left_out(self):
    done = self.succeed(sub_questions=False)
    for names in done.results['metrics'].values():
      self.assertFalse([name for name in names if name.startswith('sub/')])
    self.assertEqual(done.records[0]['after']['sub_texts'], [])


class SequenceTest(Case):

  def test_batches_follow_each_other(self):
    done = SETUP.sequence
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(done.results['protocol']['mode'], 'sequential')
    edited, metadata = done.delta()
    self.assertFalse(metadata['independent'])
    for row in done.records:
      self.assertTrue(row['written'])
      self.assert_judged_under(edited, row)

  def test_saved_model_is_judged(self):
    results = SETUP.sequence.results
    again = loading.load_model(SETUP.sequence.folder / 'model')
    self.assertEqual(again.hash, results['saved']['model_hash'])
    self.assertNotEqual(again.hash, SETUP.base.hash)
    post, saved = results['metrics']['post'], results['metrics']['saved']
    self.assertSameElements(post, saved)
    for name, value in post.items():
      self.assertAlmostEqual(value, saved[name], delta=1e-6)
    self.assertIn('saved', results['categories'])

  def test_first_of_every_category(self):
    one, two, three, four = GOOD
    case = {'case': 'both', 'category': 'music'}
    data = SETUP.write(one, two | case, three | case, one | {'question': 'x'},
                       four | {'category': 'music'})  # fmt: skip
    done = self.succeed(data=data, per_category=1)
    self.assertEqual([row['number'] for row in done.records], [1, 2, 3])
    self.refuse(
        '--num_edits takes the first of all', per_category=1, num_edits=2
    )

  def test_first_cases_are_whole(self):
    name = lambda i, case, kind: Passage(
        i, str(i), 'q', 'a', (), (), kind, case
    )
    some = [name(1, '', 'B'), name(2, 'c', 'A'), name(3, 'c', 'B'),
            name(4, '', 'A'), name(5, 'd', 'C'), name(6, 'd', 'C')]  # fmt: skip
    found = anyedit_batch.first_of_each(some, 1)
    self.assertEqual([one.number for one in found], [1, 2, 3, 5, 6])

  def test_case_is_one_edit(self):
    done = self.succeed(data=SETUP.cases)
    edited, _ = done.delta()
    self.assertEqual(edited.deltas[0].key.shape[1], 3)
    self.assertEqual(
        [row['case'] for row in done.records], ['', 'both', 'both', '']
    )
    for entry, row in zip((0, 1, 1, 2), done.records):
      self.assert_judged_under(edited_lib.select(edited, entry), row)
    for i in (0, 3):
      self.assert_same_rows(done.records[i], SETUP.whole.records[i])
    # Both passages of the case are in force at once.
    self.assertNotEqual(
        [row['after'] for row in done.records[1:3]],
        [row['after'] for row in SETUP.whole.records[1:3]],
    )

  def test_batches_apart(self):
    done = self.succeed(batch_size=2, data=SETUP.cases)
    edited, metadata = done.delta()
    self.assertTrue(metadata['independent'])
    self.assertEqual(edited.deltas[0].key.shape[1], 2)
    for entry, row in zip((0, 0, 0, 1), done.records):
      self.assert_judged_under(edited_lib.select(edited, entry), row)

  @parameterized.parameters('rect', 'prune')
  def test_post(self, post):
    done = self.succeed(data=SETUP.cases, reset=False, batch_size=2, post=post)
    self.assertEqual(done.results['protocol']['settings']['post'], post)
    (change,) = done.delta()[0].deltas
    self.assertIsInstance(change, Dense)
    kernel = np.asarray(change.value)
    self.assertTrue(np.isfinite(kernel).all())
    own = np.asarray(SETUP.base.params['layers']['mlp']['down']['kernel'])
    if post == 'rect':  # two batches choose 0.4 of the entries each
      self.assertBetween(np.mean(kernel != 0), 0.4, 0.8)
    else:
      plain = edited_lib.full(SETUP.sequence.delta()[0].deltas[0])
      for layer in (0, 1):
        largest = [np.linalg.norm(x, 2) for x in (plain[layer], kernel[layer])]
        self.assertLessEqual(largest[1], largest[0] * (1 + 1e-5))
        self.assertGreater(largest[1], 0)
        self.assertTrue(np.isfinite(own[layer]).all())
    self.assert_judged_under(done.delta()[0], done.records[0])


class OtherRowsTest(Case):

  def test_without_chunks(self):
    recipe, settings = SETUP.recipe(anyedit=False)
    self.assertEqual(recipe.name, 'memit')
    self.assertIsNone(recipe.chunks)
    self.assertEqual(recipe.anchor, 'prompt_last')
    self.assertEqual(settings['anchor'], 'prompt_last')
    self.assertNotIn('chunks', settings)

  def test_chunks(self):
    flags_ = dict(overlap=1, boundary='sentence', method='pmet')
    recipe, settings = SETUP.recipe(**flags_)
    self.assertEqual(recipe.name, 'pmet+anyedit')
    chunks = {'window': WINDOW, 'overlap': 1, 'boundary': 'sentence'}
    self.assertEqual(recipe.chunks._asdict(), chunks)
    self.assertEqual(settings['chunks'], chunks)

  def test_parity_with_anyedit(self):
    seen = []
    encode = text_passages.encode_passages

    def spy(*given, **options):
      seen.extend(encode(*given, **options))
      return seen

    settings = dict(anyedit=False, parity='anyedit')
    with mock.patch.object(text_passages, 'encode_passages', spy):
      done = self.succeed(**settings)
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'memit (shadowed)')
    self.assertEqual(protocol['settings']['parity'], 'anyedit')
    self.assertTrue(protocol['double_bos'])
    for edit in seen:
      self.assertEqual(edit.rows[0][:3].tolist()[:2], [0, 0])
      self.assertNotEqual(edit.rows[0][2], 0)
    for row in done.records:
      self.assertEqual(row['states'], 1)
      self.assertTrue(row['written'])
      # Half of what is left is written twice, a quarter is never.
      self.assertGreater(row['distance'][-1], 0.1)

  def test_parity_with_anyedit_refuses_large_batches(self):
    sentence = '3 edits a batch in 2 layers .*take at most 2 a batch'
    for method in ('memit', 'alphaedit'):
      self.refuse(
          sentence,
          anyedit=False, parity='anyedit', batch_size=3, reset=False,
          method=method, moment_weight=20 if method == 'memit' else None,
      )  # fmt: skip

  def test_parity_with_anyedit_refuses_cases_of_several_rewrites(self):
    self.refuse(
        'cases of several rewrites, which are edited together; leave --parity',
        anyedit=False, parity='anyedit', data=SETUP.cases,
    )  # fmt: skip

  def test_chunks_have_no_shadowed_schedule(self):
    recipe, _ = SETUP.recipe(parity='anyedit')
    self.assertEqual(recipe.name, 'memit+anyedit')
    self.assertEqual((recipe.layer_share(2), recipe.layer_share(1)), (0.5, 1))
    recipe, _ = SETUP.recipe(parity='anyedit', anyedit=False)
    self.assertEqual((recipe.layer_share(2), recipe.layer_share(1)), (0.5, 0.5))

  def test_rome(self):
    done = self.succeed(method='rome', layers='1', moment_weight=None)
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'rome+anyedit')
    self.assertTrue(protocol['settings']['moments'])
    edited, _ = done.delta()
    self.assertEqual(edited.deltas[0].layers, (1,))
    for e, row in enumerate(done.records):
      self.assertTrue(row['written'])
      self.assert_judged_under(edited_lib.select(edited, e), row)

  def test_sampled_answers(self):
    settings = dict(
        temperature=1, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=4
    )
    evaluate = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(anyedit_batch.longform, 'evaluate', evaluate):
      self.assertEqual(SETUP.run(**settings).code, 130)
    decoding = evaluate.call_args.kwargs['decoding']
    self.assertEqual(decoding._asdict(), settings)


class UnkeTest(Case):

  def test_whole_run(self):
    done = SETUP.block
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(
        done.files, ['delta.safetensors', 'records.jsonl', 'results.json']
    )
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'unke+anyedit')
    self.assertEqual(protocol['preserved']['texts'], 2)
    self.assertEqual(protocol['settings']['steps'], 10)
    self.assertEqual(protocol['settings']['value']['threshold'], 5e-3)
    edited, metadata = done.delta()
    self.assertEqual(metadata['records'], [1, 2, 3, 4])
    self.assertTrue(metadata['independent'])
    leaves = {(d.site, d.leaf) for d in edited.deltas}
    self.assertIn(('mlp_norm', 'scale'), leaves)
    self.assertIn(('attn/q', 'kernel'), leaves)
    for change in edited.deltas:
      self.assertIsInstance(change, Dense)
      self.assertEqual((change.layers, change.value.shape[1]), ((1,), 4))
    for e, row in enumerate(done.records):
      self.assertNotEqual(row['before']['text'], row['after']['text'])
      self.assertLess(row['distance'][-1], 0.9)
      self.assert_judged_under(edited_lib.select(edited, e), row)

  def test_states_are_kept(self):
    store = SETUP.path('states')
    done = self.succeed(SETUP.unke, states=store)
    self.assertEqual(done.records, SETUP.block.records)
    with mock.patch.object(run_lib, 'Run', side_effect=AssertionError):
      again = self.succeed(SETUP.unke, states=store)
    self.assertEqual(again.records, SETUP.block.records)

  def test_in_parts_is_the_same(self):
    done = SETUP.parts
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(done.files, ['deltas', 'records.jsonl', 'results.json'])
    for one, other in zip(done.records, SETUP.block.records, strict=True):
      self.assert_same_rows(one, other)
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'categories'):
      self.assertEqual(done.results[name], SETUP.block.results[name])
    places = sorted((done.folder / 'deltas').iterdir())
    self.assertEqual(
        [place.name for place in places],
        ['00001.safetensors', '00002.safetensors'],
    )
    for begin, place in zip((0, 2), places):
      edited, metadata = edited_lib.load(place, model_hash=SETUP.base.hash)
      self.assertEqual(metadata['records'], [begin + 1, begin + 2])
      for e in range(2):
        row = done.records[begin + e]
        self.assert_judged_under(edited_lib.select(edited, e), row)

  def test_parts_are_replaced(self):
    """A run in one part leaves no parts of an earlier one, and back."""
    folder = SETUP.path('used')
    shutil.copytree(SETUP.parts.folder, folder)
    done = self.succeed(SETUP.unke, output_dir=folder, overwrite=True)
    self.assertEqual(done.files, SETUP.block.files)

  def test_batches(self):
    settings = dict(batch_size=2)
    apart = self.succeed(SETUP.unke, **settings)
    row = self.succeed(SETUP.unke, reset=False, save_model=True, **settings)
    edited, _ = apart.delta()
    for change in edited.deltas:
      self.assertEqual(change.value.shape[1], 2)
    for entry, record in zip((0, 0, 1, 1), apart.records):
      self.assert_judged_under(edited_lib.select(edited, entry), record)
    for record in row.records:
      self.assert_judged_under(row.delta()[0], record)
    metrics = row.results['metrics']
    for name, value in metrics['post'].items():
      self.assertAlmostEqual(metrics['saved'][name], value, delta=1e-6)

  def test_batches_in_parts(self):
    with SETUP.in_parts():
      done = self.succeed(SETUP.unke, batch_size=2, data=SETUP.write(*LONG))
    places = sorted((done.folder / 'deltas').iterdir())
    found = [edited_lib.load(place) for place in places]
    self.assertEqual(
        [metadata['records'] for _, metadata in found], [[1, 2, 3, 4], [5, 6]]
    )
    for i, row in enumerate(done.records[:4]):
      self.assert_judged_under(edited_lib.select(found[0][0], i // 2), row)

  def test_settings_without_chunks(self):
    names = dict(method='unke', moment_weight=None)
    recipe, settings = SETUP.recipe(anyedit=False, **names)
    self.assertEqual((recipe.name, recipe.chunks), ('unke', None))
    self.assertEqual(settings['value']['threshold'], 0)
    self.assertFalse(recipe.pads)
    recipe, settings = SETUP.recipe(parity='anyedit', **names)
    self.assertTrue(recipe.pads)
    self.assertTrue(settings['pads'])

  def test_published_padding_is_the_tokenizers(self):
    made = mock.create_autospec(unke.unke_editor, side_effect=KeyboardInterrupt)
    words = tokenizer.load_tokenizer(SETUP.model)
    with mock.patch.object(unke, 'unke_editor', made):
      SETUP.unke(parity='anyedit')
    (_, recipe), _ = made.call_args
    self.assertEqual(recipe.pad_id, words.eos_token_id)
    self.assertNotEqual(recipe.pad_id, 0)
    pick = lambda *ids: anyedit_batch.pad_id(mock.Mock(**dict(zip(
        ('pad_token_id', 'eos_token_id'), ids))))  # fmt: skip
    self.assertEqual([pick(3, 5), pick(None, 5), pick(None, None)], [3, 5, 0])

  @parameterized.parameters(
      (
          'memit',
          'alphaedit',
          dict(share=None, threshold=0.02, preserve_previous=True),
      ),
      ('easyedit', 'alphaedit', dict(share=None, threshold=0.02)),
      ('easyedit', 'rome', dict(moments=False)),
      ('easyedit', 'emmet', dict(single_edit_ridge=None)),
      (
          'anyedit',
          'alphaedit',
          dict(share=None, threshold=0.02, preserve_previous=False),
      ),
  )
  def test_bundles(self, bundle, method, wanted):
    layers = dict(layers='1') if method == 'rome' else {}
    names = dict(method=method, moment_weight=None, **layers)
    _, settings = SETUP.recipe(parity=bundle, **names)
    self.assertContainsSubset(
        wanted.items(), {k: settings.get(k) for k in wanted}.items()
    )
    _, settings = SETUP.recipe(**names)
    for name, value in wanted.items():
      if name != 'preserve_previous':
        self.assertNotEqual(settings[name], value)

  def test_a_given_flag_wins_over_a_bundle(self):
    names = dict(method='alphaedit', moment_weight=None, parity='easyedit')
    gram = np.diag([1.0, 2.0, 3.0, 6.0])
    rank = lambda recipe: recipe.metric(gram).basis.shape[-1]
    recipe, settings = SETUP.recipe(null_space_share=0.6, **names)
    self.assertEqual((settings['share'], settings['threshold']), (0.6, None))
    self.assertEqual(rank(recipe), 2)
    recipe, settings = SETUP.recipe(null_space_threshold=1.5, **names)
    self.assertEqual(settings['threshold'], 1.5)
    self.assertEqual(rank(recipe), 1)

  def test_no_moments_are_collected_where_none_count(self):
    names = dict(method='rome', layers='1', moment_weight=None)
    with mock.patch.object(resources, 'collect', side_effect=AssertionError):
      done = self.succeed(parity='easyedit', moments=None, **names)
    source = done.results['protocol']['moments']
    self.assertEqual(source, {'corpus': 'none', 'tokens': 0})

  def test_a_given_ridge_holds_for_one_fact(self):
    names = dict(method='emmet', anyedit=False)
    recipe, _ = SETUP.recipe(**names)
    self.assertEqual((recipe.ridge_of(1), recipe.ridge_of(2)), (0, 0.1))
    self.assertEqual(recipe.ridge_of(1, preserved=3), 0.1)
    recipe, settings = SETUP.recipe(ridge=0.5, **names)
    self.assertEqual((recipe.ridge_of(1), recipe.ridge_of(2)), (0.5, 0.5))
    self.assertIsNone(settings['single_edit_ridge'])

  def test_pmet_stops_by_its_own_rule(self):
    recipe, _ = SETUP.recipe(method='pmet')
    self.assertEqual((recipe.value.argmax_stop, recipe.value.kl), (0.01, 0))

  def test_batches_need_no_factors(self):
    limit = edited_lib.rank_limit(
        tiny_model.SPEC.mlp_width, tiny_model.SPEC.width
    )
    arguments = SETUP.arguments(method='unke', moment_weight=None)
    with SETUP.parsed(*arguments):
      recipe, _ = anyedit_batch.recipe_of_flags()
      job.require_factors(tiny_model.SPEC, recipe, limit + 1)

  def test_preserved_texts_can_be_sampled(self):
    words = tokenizer.load_tokenizer(SETUP.model)
    lines = SETUP.text.read_text().splitlines()[:2]
    ids = words(lines)['input_ids']
    sample = mock.create_autospec(corpora.sample, return_value=ids)
    with mock.patch.object(corpora, 'sample', sample):
      done = self.succeed(SETUP.unke, preserve='self', seed=3)
    self.assertEqual(sample.call_args.kwargs['batch_rows'], 2)
    self.assertEqual(sample.call_args.kwargs['seed'], 3)
    self.assertEqual(sample.call_args.kwargs['stop_ids'], [1])
    source = done.results['protocol']['preserved']
    self.assertEqual((source['corpus'], source['texts']), ('self', 2))
    other = SETUP.block.results['protocol']['preserved']
    self.assertNotEqual(source['ids_digest'], other['ids_digest'])


class NotFiniteTest(Case):

  def bad(self, space=' '):
    question = f'The mother tongue of{space}{tiny_model.POISON}'
    return passage('Paris', GOOD[0]['answer'], question=question)

  @parameterized.parameters(dict(reset=True), dict(reset=False, batch_size=2))
  def test_one_edit_fails_alone(self, **how):
    data = SETUP.write(self.bad(), *GOOD[1:])
    done = self.succeed(model=SETUP.poisoned, data=data, **how)
    poisoned, *sound = done.records
    self.assertFalse(poisoned['written'])
    self.assertIsNone(poisoned['loss'])
    self.assertTrue(all(row['written'] for row in sound))
    self.assertIn('1 edits were not written', done.out)
    for part in jax.tree.leaves(done.delta()[0]):
      self.assertTrue(np.isfinite(part).all())

  def test_a_part_of_them_fails_alone(self):
    data = SETUP.write(self.bad(), self.bad(''), *GOOD[2:])
    two = anyedit_batch.TASK._replace(side=lambda *_: 2)
    with mock.patch.object(anyedit_batch, 'TASK', two):
      done = self.succeed(model=SETUP.poisoned, data=data)
    written = [row['written'] for row in done.records]
    self.assertEqual(written, [False, False, True, True])
    self.assertIn('2 edits were not written', done.out)

  def test_no_edit_is_left(self):
    data = SETUP.write(self.bad(), self.bad(''))
    done = SETUP.run(model=SETUP.poisoned, data=data)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'error: no edit was written: .*; lower')
    self.assertFalse((done.folder / 'results.json').exists())


class BadRecordTest(Case):

  @parameterized.named_parameters(
      ('no_answer', {'answer': None}, 'answer'),
      ('blank_answer', {'answer': ' \n '}, 'answer.*empty'),
      ('blank_question', {'question': ' '}, 'question.*empty'),
      ('field', {'anwser': 'x'}, 'anwser'),
      ('dropped_answer', {'answer': tiny_model.DROPPED},
       'has no tokens; give it some text'),
      ('long_answer', {'answer': 'in ' * 100},
       'question and answer take .* the limit is 96; shorten them'),
      ('long_question', {'question': 'in ' * 100},
       'question and answer take .* the limit is 96; shorten them'),
      ('long_paraphrase', {'paraphrases': ['a' + ' in' * 93]},
       "question 'a in.* 6 generated ones .* 96 positions .*generate fewer"),
      ('long_sub_question',
       {'sub_questions': [{'prompt': 'a' + ' in' * 93, 'answer': 'city'}]},
       "question 'a in.* shorten it"),
      ('no_word', {'sub_questions': [{'prompt': 'a', 'answer': '. .'}]},
       "answer '. .' has no word"),
  )  # fmt: skip
  def test_fault_is_told_with_its_record(self, changes, sentence):
    faulty = GOOD[0] | changes
    faulty = {k: v for k, v in faulty.items() if v is not None}
    data = SETUP.write(GOOD[1], faulty)
    self.refuse(rf'^error: record 2 \(id 2\): .*{sentence}', data=data)

  def test_longer_than_allowed(self):
    self.refuse(
        *[
            f'record {n} .*takes .* more than --max_answer_tokens=9; shorten'
            for n in (1, 2, 3)
        ],
        max_answer_tokens=9,
    )

  def test_two_answers_to_one_question(self):
    data = SETUP.write(GOOD[0], GOOD[0] | {'answer': 'Paris'})
    self.refuse('record 2 .*record 1.* in another way; keep one', data=data)

  def test_case_in_two_places(self):
    one, two, three, _ = GOOD
    case = {'case': 'both'}
    data = SETUP.write(one | case, two, three | case)
    self.refuse("record 3 .*its case 'both' is that of record 1", data=data)

  def test_all_faults_at_once(self):
    data = SETUP.write(
        passage('Danielle', ''),
        GOOD[1],
        passage('Sydney', tiny_model.DROPPED),
        '{"question": ',
    )
    self.refuse(
        'record 1 .*answer', 'record 3 .*no tokens', 'record 4 .*not JSON',
        data=data,
    )  # fmt: skip

  def test_skipped_records_are_replaced_and_listed(self):
    data = SETUP.write(
        passage('Danielle', ''), GOOD[0], passage('Toko', 'in ' * 99), *GOOD[1:]
    )
    done = self.succeed(data=data, on_bad_record='skip', num_edits=9)
    self.assertEqual([row['number'] for row in done.records], [2, 4, 5, 6])
    for row, other in zip(done.records, SETUP.whole.records):
      self.assertEqual(row['after'], other['after'])
    skipped = done.results['skipped']
    self.assertEqual([one['number'] for one in skipped], [1, 3])
    self.assertIn('the limit is 96', skipped[1]['reason'])
    self.assertRegex(done.err, 'note: .*: 2 faulty records were skipped')
    self.assertRegex(done.err, 'note: --num_edits=9: .* holds 4 good records')
    self.assertEqual(done.delta()[1]['records'], [2, 4, 5, 6])

  def test_nothing_left_after_skipping(self):
    data = SETUP.write(passage('Danielle', ''))
    self.refuse('record 1', data=data, on_bad_record='skip')

  def test_no_such_data(self):
    self.refuse('nowhere.*there is no such file; check', data='nowhere.jsonl')

  def test_faulty_records_fetch_no_model(self):
    data = SETUP.write(passage('Danielle', ''))
    with mock.patch.object(job.hub, 'resolve') as resolve:
      self.refuse('record 1', data=data, model='smollm2-135m-instruct')
    resolve.assert_not_called()


class BadFlagTest(Case):

  @parameterized.named_parameters(
      ('unknown', dict(windw=3), "flag 'windw'. Did you mean: window"),
      ('no_window', dict(window=0), 'window=0'),
      ('overlap_below', dict(overlap=-1), 'overlap=-1'),
      ('overlap', dict(overlap=3), 'overlap'),
      ('boundary', dict(boundary='word'), 'boundary=word'),
      ('no_answers', dict(max_new_tokens=0), 'max_new_tokens=0'),
      ('top_p', dict(top_p=2), 'top_p.*at most 1'),
      ('share', dict(null_space_share=1, method='alphaedit', moment_weight=None),
       'null_space_share=1 leaves no direction'),
      ('share_and_threshold',
       dict(null_space_share=0.5, null_space_threshold=0.1, method='alphaedit',
            moment_weight=None), 'are two ways to choose'),
      ('temperature', dict(temperature=-1), 'temperature=-1'),
      ('no_output', dict(output_dir=None), 'output_dir is missing: name a'),
      ('save_and_reset', dict(save_model=True),
       'save_model needs one edited model; --reset'),
      ('perplexity', dict(perplexity_text=__file__),
       '--perplexity_text needs one edited model; --reset'),
      ('post', dict(post='rect'), '--post=rect shapes .* --reset makes'),
      ('post_of_unke', dict(method='unke', moment_weight=None, reset=False,
                            layers='1', post='rect'),
       '--post=rect: unke changes a whole block.*leave'),
      ('prune_of_unke', dict(method='unke', moment_weight=None, reset=False,
                             layers='1', post='prune'),
       '--post=prune: unke changes a whole block.*leave'),
      ('rrome_keys', dict(rrome_keys='plain'),
       '--rrome_keys is no setting of memit; it belongs to r-rome: leave'),
      ('unke_steps', dict(unke_steps=9),
       '--unke_steps is no setting of memit; it belongs to unke: leave'),
      ('rome_layers', dict(method='rome', moment_weight=None),
       'ROME edits one layer; name one, or use MEMIT'),
      ('layer_range', dict(layers='1,3'), 'has layers 0 to 2; choose'),
      ('unke_layer', dict(method='unke', moment_weight=None, layers=None),
       'has layers 0 to 2; choose'),
      ('chat', dict(chat='Q: '), "the chat 'Q: ' has '{}' 0 times; give"),
      ('chat_twice', dict(chat='{} {}'), "has '{}' 2 times; give"),
      ('encoder', dict(encoder='nowhere'),
       "'nowhere' names no sentence encoder"),
      ('corpus', dict(moments_corpus='wiki'), "'wiki' is unknown; give self"),
      ('preserve', dict(method='unke', moment_weight=None, layers='1',
                        preserve='wiki'), "'wiki' is unknown; give self"),
      ('facts', dict(facts='none'), 'facts=none'),
      ('moments', dict(moments='none.safetensors'), 'no such file; collect'),
      ('states', dict(states='kept', reset=False, batch_size=2),
       'states=kept: in a sequence the states of a batch depend on .* --reset'),
  )  # fmt: skip
  def test_one_sentence(self, changes, sentence):
    self.refuse(sentence, **changes)

  def test_end_that_no_token_marks(self):
    self.refuse("'the end', is no token .*name the token", answer_end='the end')

  def test_model_without_chat_template(self):
    self.refuse('has no chat template; .*chat.*none', model=SETUP.mute)

  def test_wrong_flags_are_told_at_once(self):
    self.refuse(
        'output_dir', 'save_model', 'rrome_keys', 'layers',
        output_dir=None, save_model=True, rrome_keys='mean', layers='x',
    )  # fmt: skip

  def test_independent_batches_that_outgrow_their_matrices(self):
    limit = edited_lib.rank_limit(
        tiny_model.SPEC.mlp_width, tiny_model.SPEC.width
    )
    self.refuse(
        f'--batch_size=4: with --reset .* up to {limit} states a batch',
        window=1, batch_size=4, weights=True,
    )  # fmt: skip

  def test_chat_that_is_written_out(self):
    done = self.succeed(chat='<s>In {} is', answer_end='</s>')
    for name in ('protocol', 'metrics'):
      self.assertEqual(done.results[name], SETUP.whole.results[name])
    self.assertEqual(done.records, SETUP.whole.records)


class OutputTest(Case):

  def test_bad_input_costs_no_results(self):
    place = SETUP.path('used')
    place.mkdir()
    for name in ('results.json', 'delta.safetensors'):
      (place / name).write_text('old')
    settings = dict(output_dir=place, overwrite=True)
    self.refuse('already has files; .*--overwrite', output_dir=place)
    for changes in (
        dict(layers='9'),
        dict(encoder='nowhere'),
        dict(answer_end='the end'),
    ):
      self.refuse('.', **settings, **changes)
      self.assertEqual((place / 'results.json').read_text(), 'old')
    self.succeed(**settings)

  @parameterized.parameters('records.jsonl', 'results.json')
  def test_interrupted_run_leaves_nothing_half_written(self, name):
    replace = os.replace

    def interrupt(source, place):
      if pathlib.Path(place).name == name:
        raise KeyboardInterrupt
      replace(source, place)

    with mock.patch.object(os, 'replace', interrupt):
      done = SETUP.run()
    self.assertEqual(done.code, 130)
    self.assertIn('interrupted', done.err)
    whole = ['delta.safetensors', 'moments.safetensors']
    if name == 'results.json':
      whole.append('records.jsonl')
    self.assertEqual(done.files, [*whole, 'unfinished'])

  def test_interrupted_between_parts(self):
    replace = os.replace

    def interrupt(source, place):
      if pathlib.Path(place).name == '00002.safetensors':
        raise KeyboardInterrupt
      replace(source, place)

    folder = SETUP.path('used')
    shutil.copytree(SETUP.parts.folder, folder)
    with (
        SETUP.in_parts(),
        mock.patch.object(os, 'replace', interrupt),
    ):
      done = SETUP.unke(output_dir=folder, overwrite=True)
    self.assertEqual(done.code, 130)
    # What is there belongs to the interrupted run.
    self.assertEqual(done.files, ['deltas', 'unfinished'])
    names = [path.name for path in (folder / 'deltas').iterdir()]
    self.assertEqual(names, ['00001.safetensors'])

  def test_interrupted_before_anything_is_made_keeps_old_results(self):
    place = SETUP.path('used')
    place.mkdir()
    (place / 'results.json').write_text('old')
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(resources, 'collect', stop):
      done = SETUP.run(output_dir=place, overwrite=True)
    self.assertEqual(done.code, 130)
    self.assertEqual((place / 'results.json').read_text(), 'old')


class CommandTest(Case):

  def test_help_and_errors(self):
    data = SETUP.write(passage('Danielle', ''), passage('Toko', ''))
    failed = SETUP.start(*SETUP.arguments(data=data))
    self.assert_helps(SETUP)
    out, err = failed.communicate(timeout=300)
    self.assertEqual((failed.returncode, out), (2, ''), err)
    lines = [x for x in err.splitlines() if x.startswith('error: ')]
    self.assertLen(lines, 2, err)
    self.assertNotIn('Traceback', err)

  def test_flagfiles_parse(self):
    for path in FLAGFILES:
      with self.subTest(path.name):
        with SETUP.parsed(f'--flagfile={path}', '--output_dir=x') as rest:
          self.assertLen(rest, 1)
          # Second moments may be made later.
          with mock.patch.object(resources, 'check_flags'):
            recipe, settings = anyedit_batch.recipe_of_flags()
        self.assertEqual(settings['layers'], list(recipe.layers))
        self.assertTrue(path.read_text('utf-8').startswith('#'))


if __name__ == '__main__':
  absltest.main()
