"""The tracing program from its flags to its page, and all it must refuse."""

import functools
import html.parser
import re
import sys
from unittest import mock

import numpy as np
import programs
import tiny_model
from absl.testing import absltest, parameterized

from experiments import causal_trace
from jaxedit.eval import datasets
from jaxedit.models import loading, tokenizer
from jaxedit.runs import cache
from jaxedit.testing import data_path
from jaxedit.trace import causal, fact_trace, facts, figures, plots
from jaxedit.trace.restoration import NAMES as ALL
from jaxedit.types import EditRequest, InputError

try:
  import matplotlib
except ImportError:
  matplotlib = None

PROMPTS = (
    ('In Paris the Danielle is', 'Danielle'),
    ('The mother tongue of Toko Yasuda is in', 'Toko Yasuda'),
    ('The mother tongue of Sydney is', 'Sydney'),
)


def known(prompt, subject, attribute, number):
  return {
      'known_id': 10 * number,
      'subject': subject,
      'attribute': attribute,
      'template': prompt.replace(subject, '{}'),
      'prediction': f' {attribute} and so on',
      'prompt': prompt,
      'relation_id': 'P1',
  }


class Setup(programs.Setup):
  """Files and flags that all tests share."""

  def __init__(self):
    super().__init__(causal_trace)

  def given(self):
    return dict(data=self.data, draws=2, window=2, plots=False)

  @functools.cached_property
  def answers(self):
    """What the model says after the prompts."""
    model = loading.load_model(self.model)
    words = tokenizer.load_tokenizer(self.model)
    rows = [np.array(words(p)['input_ids'], np.int32) for p, _ in PROMPTS]
    found = causal.predict(model.spec, model.params, rows)
    return [words.decode([token]).strip() for token in found.token]

  @functools.cached_property
  def data(self):
    """The model completes the first and the last."""
    attributes = [self.answers[0], 'nowhere', self.answers[2]]
    return self.write(
        *(
            known(*asked, attribute, number)
            for number, (asked, attribute) in enumerate(
                zip(PROMPTS, attributes), 1
            )
        )
    )

  @functools.cached_property
  def whole(self):
    return self.run(kinds=','.join(ALL), plots=matplotlib is not None)


def setUpModule():
  global SETUP
  SETUP = Setup()


def tearDownModule():
  SETUP.close()


class WholeRunTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.done = SETUP.whole
    self.assertEqual(self.done.code, 0, self.done.err)

  def test_takes_what_the_model_completes(self):
    results, rows = self.done.results, self.done.rows('facts.jsonl')
    self.assertEqual([row['number'] for row in rows], [1, 3])
    self.assertEqual([row['id'] for row in rows], ['10', '30'])
    self.assertEqual([row['completes'] for row in rows], ['whole', 'whole'])
    (missed,) = results['skipped']
    self.assertEqual((missed['number'], missed['id']), (2, '20'))
    self.assertIn("not 'nowhere'", missed['reason'])
    self.assertIn('2 facts to trace, 1 left out', self.done.err)
    self.assertIn('2 facts: p(answer)', self.done.out)

  def test_lines_say_where_the_subject_is(self):
    for row in self.done.rows('facts.jsonl'):
      first, end = row['subject_tokens']
      subject = ''.join(row['tokens'][first:end])
      self.assertEqual(subject.strip(), row['subject'])
      self.assertEqual(''.join(row['tokens']), row['prompt'])
      self.assertBetween(row['low'], 0, 1)
      self.assertEqual(set(row['best']), set(ALL))

  def test_arrays(self):
    arrays = np.load(self.done.folder / 'traces.npz')
    np.testing.assert_array_equal(arrays['numbers'], [1, 3])
    layers = tiny_model.SPEC.layers
    for i, row in enumerate(self.done.rows('facts.jsonl')):
      length, (first, end) = len(row['tokens']), row['subject_tokens']
      for kind in ALL:
        grid = arrays[f'{row["number"]}/{kind}']
        self.assertEqual(grid.shape, (length, layers))
        only = np.isfinite(grid).all(axis=1).nonzero()[0].tolist()
        severed = kind.startswith('severed')
        wanted = [end - 1] if severed else list(range(length))
        self.assertEqual(only, wanted)
        best = row['best'][kind]
        self.assertEqual(grid[best['column'], best['layer']], np.nanmax(grid))
      hidden = arrays[f'{row["number"]}/hidden']
      np.testing.assert_allclose(hidden[:first], row['low'])
      np.testing.assert_allclose(hidden[-1, -1], row['high'], rtol=1e-5)
      self.assertEqual(arrays['high'][i], row['high'])

  def test_averages_are_of_the_arrays(self):
    results, rows = self.done.results, self.done.rows('facts.jsonl')
    arrays = np.load(self.done.folder / 'traces.npz')
    table = results['average_effects']
    self.assertEqual(set(table), set(ALL))
    wanted = np.mean(
        [arrays[f'{r["number"]}/mlp'][-1] - r['low'] for r in rows], axis=0
    )
    np.testing.assert_allclose(table['mlp']['last token']['mean'], wanted)
    self.assertEqual(list(table['severed_mlp']), ['last subject token'])
    peak = table['mlp']['last token']['peak']
    self.assertEqual(peak['layer'], int(wanted.argmax()))
    total = np.mean([row['high'] - row['low'] for row in rows])
    self.assertAlmostEqual(results['total_effect']['mean'], total)
    self.assertIsNotNone(results['total_effect']['half_width_95'])

  def test_protocol(self):
    results = self.done.results
    protocol = results['protocol']
    self.assertEqual(protocol['kinds'], list(ALL))
    self.assertEqual(protocol['window'], 2)
    self.assertEqual(protocol['noise']['draws'], 2)
    self.assertEqual(protocol['noise']['seed'], 1)
    self.assertGreater(protocol['noise']['scale'], 0)
    self.assertEqual(protocol['data']['format'], 'known')
    self.assertEqual(results['facts']['completes']['whole'], 2)
    self.assertGreater(results['work']['ratio'], 1)
    self.assertIn('trace', results['timing'])
    self.assertIn('jax', results['versions'])

  def test_page_needs_nothing_else(self):
    text = (self.done.folder / 'index.html').read_text()
    self.assertNotRegex(text, r'https?://|//[a-z]|<script|<link|@import')
    for found in re.findall(r'(?:href|src)="([^"]*)"', text):
      self.assertRegex(found, r'^(#|data:)')
    ids = re.findall(r' id="([^"]*)"', text)
    self.assertEqual(len(ids), len(set(ids)))
    for target in re.findall(r'(?:url\(|href=")#([^")]*)', text):
      self.assertIn(target, ids)
    self.assertIn('<mark>Danielle</mark>', text)
    self.assertEqual(text.count('<details>'), 3)  # two facts, one left out
    self.assertIn('width=device-width', text)
    _Balanced().feed(text)

  def test_plots(self):
    if matplotlib is None:
      self.skipTest('needs matplotlib')
    names = {path.name for path in (self.done.folder / 'plots').iterdir()}
    stems = ['severed']
    for kind in ('hidden', 'mlp', 'attn'):
      stems += [f'average_{kind}', f'average_map_{kind}']
      stems += [f'fact_00001_{kind}', f'fact_00003_{kind}']
    self.assertEqual(
        names,
        {f'{stem}.{ending}' for stem in stems for ending in ('png', 'svg')},
    )
    for name in names:
      self.assertRegex(name, f'^{plots.NAMES}$')
      size = (self.done.folder / 'plots' / name).stat().st_size
      self.assertBetween(size, 1000, 100_000)
    text = (self.done.folder / 'index.html').read_text()
    self.assertEqual(text.count('<svg role="img" aria-label="'), len(stems))
    self.assertNotIn(
        figures.INK, re.sub(r'<style>.*</style>', '', text, flags=re.DOTALL)
    )


class _Balanced(html.parser.HTMLParser):
  """Fails where tags do not close in order."""

  open: list[str] = []
  void = ('meta', 'br')

  def handle_starttag(self, tag, attrs):
    del attrs
    if tag not in self.void:
      self.open = [*self.open, tag]

  def handle_endtag(self, tag):
    if self.open[-1] != tag:
      raise AssertionError(f'{tag} closes {self.open[-1]}')
    self.open = self.open[:-1]


class OtherRunsTest(absltest.TestCase):

  def test_one_prompt(self):
    done = SETUP.run(
        data=None, prompt='Toko Yasuda in Paris is', subject='Paris',
        kinds='hidden', noise='0.5',
    )  # fmt: skip
    self.assertEqual(done.code, 0, done.err)
    (row,) = done.rows('facts.jsonl')
    self.assertEqual(row['completes'], 'unasked')
    results = done.results
    self.assertEqual(results['protocol']['noise']['scale'], 0.5)
    self.assertIsNone(results['total_effect']['half_width_95'])
    text = (done.folder / 'index.html').read_text()
    self.assertIn('<details open>', text)
    self.assertIn('Toko Yasuda in <mark>Paris</mark> is', text)

  def test_last_subject_token_alone(self):
    kinds_asked = 'hidden,mlp,severed_mlp'
    done = SETUP.run(
        kinds=kinds_asked, tokens='subject_last', baseline='torch',
        baseline_cells=9, plots=matplotlib is not None,
    )  # fmt: skip
    self.assertEqual(done.code, 0, done.err)
    results = done.results
    for kind in kinds_asked.split(','):
      table = results['average_effects'][kind]
      self.assertEqual(list(table), ['last subject token'])
      whole = SETUP.whole.results['average_effects'][kind]
      np.testing.assert_allclose(
          table['last subject token']['mean'],
          whole['last subject token']['mean'],
          atol=1e-6,
      )
    self.assertEqual(results['work']['cells'], 2 * 3 * 3)
    self.assertLess(results['work']['torch']['largest_difference'], 1e-5)

  def test_published_loop_scores_the_same(self):
    done = SETUP.run(
        kinds=','.join(ALL), noise_mode='replace', keep_wrong=True,
        baseline='torch', baseline_cells=25,
    )  # fmt: skip
    self.assertEqual(done.code, 0, done.err)
    work = done.results['work']
    self.assertEqual(work['torch']['cells'], 25)
    self.assertLess(work['torch']['largest_difference'], 1e-5)
    self.assertGreater(work['torch']['wall_ratio'], 0)
    self.assertIn('times as long', done.out)

  def test_goes_on_where_it_was_stopped(self):
    folder, given = SETUP.path('out'), dict(kinds='hidden,severed_mlp')
    given |= dict(output_dir=folder, keep_wrong=True)
    save = cache.ArrayFiles.save
    saved = []

    def stop(self, arrays, *parts):
      if len(saved) == 4:  # all three facts hidden, one of them severed
        raise KeyboardInterrupt
      save(self, arrays, *parts)
      saved.append(arrays)

    with mock.patch.object(cache.ArrayFiles, 'save', stop):
      self.assertEqual(SETUP.run(**given).code, 130)
    self.assertFalse((folder / 'results.json').exists())
    traced = []

    def count(self, arrays, *parts):
      save(self, arrays, *parts)
      traced.append(arrays)

    with mock.patch.object(cache.ArrayFiles, 'save', count):
      done = SETUP.run(**given)
    self.assertEqual(done.code, 0, done.err)
    self.assertIn('4 traces of an interrupted run were kept', done.err)
    self.assertEqual(done.results['work']['traces_kept'], 4)
    self.assertLen(traced, 2)
    self.assertFalse((folder / 'unfinished').exists())
    spent = sum(one['seconds'].item() for one in [*saved, *traced])
    self.assertAlmostEqual(done.results['work']['seconds'], spent)
    whole = SETUP.run(**(given | dict(output_dir=SETUP.path('out'))))
    arrays, wanted = (np.load(x / 'traces.npz') for x in (folder, whole.folder))
    for name in wanted.files:
      np.testing.assert_allclose(arrays[name], wanted[name], atol=1e-6)
    refused = SETUP.run(**given)
    self.assertEqual(refused.code, 2)
    self.assertIn('already has files', refused.err)

  def test_wrong_ones_and_replacing(self):
    folder = SETUP.path('out')
    settings = dict(
        keep_wrong=True, noise='u0.5', noise_mode='replace', kinds='hidden',
        output_dir=folder,
    )  # fmt: skip
    done = SETUP.run(**settings)
    self.assertEqual(done.code, 0, done.err)
    self.assertLen(done.rows('facts.jsonl'), 3)
    (folder / 'plots').mkdir()
    (folder / 'plots' / 'fact_00009_mlp.png').write_text('old')
    (folder / 'plots' / 'mine.png').write_text('kept')
    self.assertIn('--overwrite', SETUP.run(**settings).err)
    done = SETUP.run(**settings, overwrite=True, num_facts=1)
    self.assertEqual(done.code, 0, done.err)
    self.assertLen(done.rows('facts.jsonl'), 1)
    self.assertEqual(
        [path.name for path in (folder / 'plots').iterdir()], ['mine.png']
    )

  def test_first_token_counts_as_completing(self):
    words = tokenizer.load_tokenizer(SETUP.model)
    fact = EditRequest(1, '1', '{} is', 'Ada', 'Paris nowhere')
    asked = facts.EncodedFact(fact, np.zeros(1, np.int32), (0, 1))
    first = words(' Paris')['input_ids'][0]
    judge = lambda token: facts.judged(words, asked, token).completes
    self.assertEqual(judge(first), 'begins')
    self.assertEqual(judge(first + 1), 'misses')

  def test_numbers_that_are_not_finite(self):
    model = tiny_model.make(SETUP.folder / 'poisoned', poisoned=True)
    data = SETUP.write(
        known('The city of Z is', 'Z', 'a', 1),
        known(*PROMPTS[0], 'b', 2),
    )
    done = SETUP.run(model=model, data=data, keep_wrong=True, kinds='hidden')
    # Clean runs overflow with Z alone, corrupted ones all do.
    self.assertEqual(done.code, 2)
    self.assertIn('1 facts to trace, 1 left out', done.err)
    self.assertRegex(
        done.err,
        r'none of the 1 facts.*record 2\).*not finite; check the model',
    )
    self.assertFalse((done.folder / 'results.json').exists())

  def test_facts_without_numbers_are_left_out(self):
    words, label = tokenizer.load_tokenizer(SETUP.model), np.zeros(1, np.int32)
    asked = [
        facts.EncodedFact(
            EditRequest(i, str(i), '{}', 'Ada', ''), label, (0, 1), 3
        )
        for i in (1, 2)
    ]
    traced = [
        causal.Traced(label, 0.5, 0.1, {'hidden': np.array([[nan, 1.0]])})
        for nan in (np.nan, 1.0)
    ]
    found, missed = fact_trace.collect(words, asked, traced)
    self.assertEqual([one.fact.number for one in found], [2])
    self.assertEqual([one['number'] for one in missed], [1])


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(output_dir=None), '--output_dir is missing'),
      (dict(kinds='hidden,nothing'), '--kinds=.*give some of hidden, mlp'),
      (dict(kinds='mlp,mlp'), 'names something twice'),
      (dict(formats='gif'), '--formats=gif: give some of png, svg'),
      (dict(noise='s-1'), '--noise=s-1: .*unknown'),
      (dict(data=None, prompt='Ada is'), '--prompt and --subject go together'),
      (dict(prompt='Ada is', subject='Ada'), '--data and --prompt'),
      (
          dict(data=None, prompt='Adam is', subject='Ada'),
          "--prompt: .*'Ada' is only inside a longer word",
      ),
      (dict(data='/nowhere.jsonl'), 'there is no such file'),
      (dict(draws=0), 'draws'),
  )
  def test_flags(self, changes, sentence):
    stop = mock.Mock(side_effect=AssertionError('too late'))
    with mock.patch.object(loading, 'load_model', stop):
      done = SETUP.run(**changes)
    self.assertEqual(done.code, 2, done.err)
    self.assertRegex(done.err, f'error: .*{sentence}')

  def test_all_faults_at_once(self):
    done = SETUP.run(kinds='no', noise='x', formats='', subject='Ada')
    self.assertEqual(done.code, 2)
    self.assertEqual(done.err.count('error: '), 4, done.err)

  def test_without_matplotlib(self):
    stop = mock.Mock(side_effect=AssertionError('too late'))
    with mock.patch.dict(sys.modules, {'matplotlib': None}):
      with mock.patch.object(loading, 'open_model', stop):
        done = SETUP.run(plots=True)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, r'jaxedit\[plot\].*--noplots')
    self.assertFalse(done.folder.exists())

  def test_facts_that_need_the_tokenizer(self):
    data = SETUP.write(
        known('The \u2603 is', '\u2603', 'a', 1),
        known('Paris ' * 120 + 'is', 'Paris', 'a', 2),
    )
    done = SETUP.run(data=data)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'record 1 .*no token left')
    self.assertRegex(done.err, r'record 2 .*tokens, and the model takes 96')

  def test_no_fact_that_the_model_knows(self):
    done = SETUP.run(data=SETUP.write(known(*PROMPTS[0], 'nowhere', 1)))
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'none of the 1 facts.*--keep_wrong')


class KnownFactsTest(parameterized.TestCase):

  def load(self, *records, **options):
    return datasets.load_requests(
        SETUP.write(*records), kinds=('known',), **options
    )

  def test_format(self):
    record = known('Ada lives in Oslo', 'Ada', ' Norway ', 4)
    (fact,) = self.load(record).requests
    self.assertEqual(
        fact, EditRequest(1, '40', '{} lives in Oslo', 'Ada', 'Norway')
    )
    self.assertEqual(fact.question, 'Ada lives in Oslo')
    self.assertEqual(fact.parts, ('', 'Ada', ' lives in Oslo'))

  def test_template_says_which_subject(self):
    record = known('Ada or Ada is', 'Ada', 'a', 1)
    record['template'] = 'Ada or {} is'
    self.assertEqual(self.load(record).requests[0].prompt, 'Ada or {} is')
    record['template'] = 'another {} text'
    self.assertEqual(self.load(record).requests[0].prompt, '{} or Ada is')
    del record['prompt']
    self.assertEqual(self.load(record).requests[0].question, 'another Ada text')

  def test_all_faults(self):
    with self.assertRaises(InputError) as caught:
      self.load(
          known('Ada is', 'Ada', 'a', 1),
          known('Ada is', 'Bob', 'a', 2),
          {'attribute': 3, 'subject': '', 'prompt': 'x'},
          known('{} and {}', 'Ada', 'a', 3),
      )
    told = '\n'.join(caught.exception.problems)
    self.assertRegex(told, "record 2 .*'Bob' is nowhere in the prompt")
    self.assertRegex(told, "record 3 .*'attribute' holds a number")
    self.assertRegex(told, "record 3 .*'subject' is empty")
    self.assertRegex(told, 'record 4 .*2 placeholders')

  def test_skips(self):
    loaded = self.load(
        known('Ada is', 'Bob', 'a', 1),
        known('Ada is', 'Ada', 'a', 2),
        on_bad_record='skip',
    )
    self.assertLen(loaded.requests, 1)
    self.assertEqual(loaded.skipped[0].number, 1)

  def test_facts_to_edit(self):
    loaded = datasets.load_requests('demo', kinds=('known',))
    self.assertLen(loaded.requests, 100)
    self.assertEqual(loaded.requests[0].target, 'Paris')
    with self.assertRaisesRegex(InputError, 'does not say what is true'):
      self.load({'prompt': '{} is', 'subject': 'Ada', 'target_new': 'here'})

  def test_names_what_a_fact_lacks(self):
    for record in ({}, known('Ada is', 'Ada', 'a', 1)):
      record = {'prompt': 'Ada is', 'subject': 'Ada'} | record
      record.pop('attribute', None)
      with self.assertRaisesRegex(InputError, "field 'attribute' is missing"):
        self.load(record)

  def test_real_file(self):
    loaded = datasets.load_requests(
        data_path('known_facts.jsonl'), kinds=('known',)
    )
    self.assertEqual(loaded.format, 'known')
    self.assertGreater(len(loaded.requests), 500)
    for fact in loaded.requests:
      self.assertEqual(fact.prompt.count('{}'), 1)


if __name__ == '__main__':
  absltest.main()
