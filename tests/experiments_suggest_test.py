"""The search for layers: from traces to settings that memit_batch runs."""

import contextlib
import dataclasses
import io
import json
from unittest import mock

import jax
import numpy as np
import programs
import pytest
from absl.testing import absltest, parameterized

from experiments import causal_trace, memit_batch
from jaxedit.models.tokenizer import load_tokenizer
from jaxedit.runs import (
    cli,
    layer_inputs,
    layer_search,
    layer_trials,
    method_flags,
)
from jaxedit.runs.config import RunConfig
from jaxedit.runs.trace_config import TraceRunConfig
from jaxedit.stats import storage
from jaxedit.testing import facts
from jaxedit.types import InputError, silent

RECORDS = [
    {
        'prompt': f'The {what} of {{}} is',
        'subject': subject,
        'target_new': 'Paris',
        'target_true': 'France',
        'paraphrases': [f'{subject} has the {what}'],
        'neighbours': [{'prompt': f'The {what} of France is', 'answer': 'a'}],
    }
    for subject, what in (
        ('Danielle', 'mother tongue'),
        ('Toko Yasuda', 'piano'),
        ('Sydney', 'twin city'),
        ('Wellington', 'guitar'),
        ('Vienna', 'twin city'),
    )
]


def tried(layers, *scores):
  """A try whose records score so in es, ps and ns alike."""
  rows = tuple(dict(es=x, ps=x, ns=x) for x in scores)
  return layer_search.Trial(tuple(layers), rows, 0.0)


class SearchTest(parameterized.TestCase):

  def test_windows_end_with_their_anchor(self):
    found = layer_search.windows((0, 4), (1, 5))
    self.assertEqual(found, [(0,), (4,), (0, 1, 2, 3, 4)])

  def test_last_layer_that_is_read(self):
    self.assertEqual(layer_search.last_read(np.array([0.1, 0.4, 0.2, 0.1])), 2)
    for effect in ([0.0, -0.1], [np.nan, np.nan]):
      with self.assertRaisesRegex(InputError, 'brings no answer back'):
        layer_search.last_read(np.array(effect))

  def test_first_anchors(self):
    hidden = np.array([1.0] * 11 + [0.1] * 9)
    mlp = np.zeros(20)
    mlp[[3, 15]] = 1, 2  # the peak above is past what is read
    found = layer_search.first_anchors(hidden, mlp)
    self.assertEqual(found, [0, 2, 3, 4, 6, 8, 10])
    self.assertEqual(layer_search.first_anchors(hidden[:2], None), [0, 1])

  @parameterized.parameters(0, 3, 7, 11)
  def test_climbs_to_the_best(self, best):
    seen = []

    def probe(layers):
      self.assertNotIn(layers, seen)
      seen.append(layers)
      score = 1 / (1 + abs(layers[-1] - best) + 0.1 * (len(layers) == 1))
      return tried(layers, score, score)

    found = layer_search.search(probe, [0, 5, 11], top=11, widths=(1, 5))
    self.assertEqual(found[0].layers[-1], best)
    self.assertEqual({t.layers for t in found}, set(seen))
    self.assertLess(len(seen), 24)

  def test_compares_on_the_same_facts(self):
    one, other = tried([1], 0.5, 0.7, 0.9), tried([2], 0.6, 0.8, 1.0)
    found = layer_search.compare(one, other, resamples=200)
    self.assertAlmostEqual(found['difference'], 0.1)
    self.assertAlmostEqual(found['low'], 0.1)
    self.assertAlmostEqual(found['high'], 0.1)
    found = layer_search.compare(
        tried([1], 0, 1), tried([2], 1, 0), resamples=200
    )
    self.assertLess(found['low'], 0)
    self.assertGreater(found['high'], 0)


class ProgramTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.setup = programs.Setup(causal_trace)
    cls.addClassCleanup(cls.setup.close)
    contexts = cls.setup.path('contexts.json')
    contexts.write_text('["{}", "In Paris. {}"]')
    cls.given = dict(data=cls.setup.write(*RECORDS), context_templates=contexts)

  def suggest(self, **given):
    settings = dict(
        draws=2, window=2, plots=False, keep_wrong=True, suggest_layers=True,
        kinds='hidden,mlp', value_steps=4, moment_weight=20,
        moments_tokens=400, tokens='subject_last',
    )  # fmt: skip
    return self.setup.run(**(self.given | settings | given))

  @pytest.mark.long
  def test_flagfile_gives_what_was_measured(self):
    clear = mock.Mock()
    with (
        mock.patch.object(jax, 'clear_caches', clear),
        mock.patch.object(layer_trials, '_ANCHORS', 2),
    ):
      done = self.suggest(
          probe='all', probe_widths='1,2', probe_facts=3, probe_skip=1,
          plots=True,
      )  # fmt: skip
    self.assertEqual(done.code, 0, done.err)
    # With the third anchor the programs of the first two are let go of.
    self.assertEqual(clear.call_count, 1)
    found = json.loads((done.folder / 'suggest.json').read_text())
    self.assertIsNone(found['proposal'])
    self.assertEqual(found['facts']['numbers'], [2, 3, 4])
    layers = [one['layers'] for one in found['tries']]
    self.assertCountEqual(layers, [[0], [1], [2], [0, 1], [1, 2]])
    self.assertTrue((done.folder / 'plots/suggest.png').is_file())
    page = (done.folder / 'index.html').read_text()
    self.assertIn('<h2>Layers to edit</h2>', page)
    self.assertIn('aria-label="MEMIT score by', page)
    self.assertEqual(done.results['suggested']['tries'], found['tries'])
    scores = [one['score'] for one in found['tries']]
    self.assertEqual(scores, sorted(scores, reverse=True))
    again = self.setup.run(
        memit_batch,
        flagfile=done.folder / 'suggested.flags',
        model=None,
        data=self.setup.write(*RECORDS[1:4]),
        batch_size=3,
    )
    self.assertEqual(again.code, 0, again.err)
    results = again.results
    self.assertEqual(
        results['protocol']['settings']['layers'], found['tries'][0]['layers']
    )
    for name in ('es', 'ps', 'ns', 'score'):
      self.assertAlmostEqual(
          results['metrics']['post'][name], found['tries'][0][name], msg=name
      )

  @pytest.mark.long
  def test_judges_a_proposal_on_other_facts(self):
    same = dict(probe='all', probe_widths='1', num_facts=2)
    done = self.suggest(**same, probe_facts=2, probe_skip=1)
    self.assertEqual(done.code, 0, done.err)
    path = done.folder / 'suggest.json'
    seen = json.loads(path.read_text())
    self.assertEqual(seen['traced']['numbers'], [1, 2])
    self.assertEqual(seen['facts']['numbers'], [2, 3])
    judged = self.suggest(**same, probe_facts=2, proposal=path)
    self.assertEqual(judged.code, 0, judged.err)
    found = json.loads((judged.folder / 'suggest.json').read_text())
    self.assertEqual(found['facts']['numbers'], [4, 5])
    self.assertEqual(judged.code, 0, judged.err)
    self.assertIn('below the best here', judged.out)
    proposed = json.loads(path.read_text())['tries'][0]['layers']
    found = json.loads((judged.folder / 'suggest.json').read_text())
    known = {tuple(t['layers']): t['score'] for t in found['tries']}
    mine = found['proposal']
    self.assertEqual(judged.results['suggested']['proposal'], mine)
    page = (judged.folder / 'index.html').read_text()
    self.assertIn('<p>The proposed layers', page)
    self.assertEqual(mine['layers'], proposed)
    self.assertEqual(mine['score'], known[tuple(proposed)])
    self.assertAlmostEqual(
        mine['difference'], found['tries'][0]['score'] - mine['score']
    )
    self.assertLessEqual(mine['low'], mine['difference'])
    self.assertEqual(mine['searched_on']['numbers'], [2, 3])
    refused = self.suggest(**same, probe_skip=4, proposal=path)
    self.assertEqual(refused.code, 2)
    self.assertIn('and those that the search has seen', refused.err)

  def read(self, **given):
    """What the program reads for a search."""
    with self.setup.parsed(*self.setup.arguments(**(self.given | given))):
      return layer_inputs.read(
          cli.read(RunConfig), cli.read(TraceRunConfig),
          method_flags.from_flags('fact'), model=self.setup.base,
          tokenizer=load_tokenizer(self.setup.model), clock=None,
          progress=silent,
      )  # fmt: skip

  def test_moments_bound_the_search(self):
    model, path = self.setup.base, self.setup.path('moments.safetensors')
    found = facts.random_moments(model.spec, (0, 1), seed=0)
    about = {'model': model.hash, 'site': 'mlp/down'}
    storage.save(path, dataclasses.replace(found, provenance=about))
    given = dict(suggest_layers=True, moments=path)
    chosen = self.read(**given).chosen
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      tops = [layer_inputs.bounded(path, chosen, top) for top in (0, 1, 2)]
    self.assertEqual(tops, [0, 1, 1])
    self.assertIn(
        'layers 0 to 2, of which --moments has 0 to 1', err.getvalue()
    )
    with self.assertRaisesRegex(InputError, 'of layers 0, 1, not of 2'):
      self.read(**given, probe='all')
    about['model'] = 'another'
    storage.save(path, dataclasses.replace(found, provenance=about))
    with self.assertRaisesRegex(InputError, "with hash 'another'"):
      self.read(**given)

  @parameterized.parameters(
      (dict(layers='1'), '--layers is what --suggest_layers finds'),
      (dict(method='rome', moment_weight=None), 'searched with memit'),
      (dict(parity='anyedit'), '--parity=anyedit: layers are searched'),
      (dict(probe_widths='0'), 'give numbers of layers'),
      (dict(kinds='mlp'), 'needs the kind hidden'),
      (dict(moments='none.safetensors'), 'no such file; collect'),
      (dict(context_templates='none.json'), 'none.json'),
      (dict(ridge=1), '--ridge is no setting of memit'),
      (
          dict(proposal='none.json'),
          '--proposal=none.json: cannot be read (No such file',
      ),
      (dict(probe_skip=4), 'leave 1 after --probe_skip=4'),
  )
  def test_says_what_is_wrong(self, given, sentence):
    done = self.suggest(**given)
    self.assertEqual(done.code, 2)
    self.assertIn(sentence, done.err)


if __name__ == '__main__':
  absltest.main()
