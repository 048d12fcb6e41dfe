"""Traced facts as numbers, plots and a page."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.models.flops import layer_weights
from jaxedit.testing import models
from jaxedit.trace import facts, figures, flops, plots, report, results
from jaxedit.trace.causal import Traced
from jaxedit.types import EditRequest

try:
  import matplotlib
except ImportError:
  matplotlib = None


def traced(config, tokens, scores, answer='b'):
  """Traces of one fact that is all subject."""
  ids = np.arange(len(tokens), dtype=np.int32)
  result = Traced(np.zeros(1, np.int32), 0.5, 0.25, scores)
  one = results.TracedFact(
      fact=EditRequest(7, '7', '{}', 'x', ''), ids=ids,
      span=(0, len(tokens)), tokens=tokens, said=answer, result=result,
  )  # fmt: skip
  return results.FactTraces(config, (one,), (), [], [result], 2.0)


class ReportTest(parameterized.TestCase):

  @parameterized.parameters(
      (' Tower', True, 'Tower*'),
      ('\n', False, '\u23ce'),
      (' ', False, '\u2423'),
      ('a' * 30, False, 'a' * 15 + '\u2026'),
  )
  def test_token_labels(self, text, inside, wanted):
    self.assertEqual(figures.token_label(text, inside), wanted)

  def test_texts_of_facts_stay_texts(self):
    row = {
        'prompt': '<b>"Ada"</b> is', 'cloze': '<b>"{}"</b> is',
        'subject': 'Ada', 'answer': '&', 'completes': 'misses',
        'attribute': '<i>', 'number': 1, 'high': 0.5, 'low': 0.1,
        'best': {
            'mlp': {'token': '<u>', 'layer': 1, 'score': 0.4, 'effect': 0.3}
        },
    }  # fmt: skip
    noise = {'level': '<s>', 'kind': 'gaussian', 'scale': 0.1, 'draws': 2}
    document = {
        'protocol': {
            'model': '<em>', 'layers': 2, 'dtype': 'float32', 'window': 1,
            'noise': noise,
        },
        'facts': {'traced': 1}, 'high': 0.5, 'low': 0.1,
        'total_effect': {'mean': 0.4, 'half_width_95': None},
        'average_effects': {}, 'skipped': [],
        'work': {'cells': 2, 'flops': 1.0, 'naive_flops': 2.0, 'ratio': 2.0},
        'timing': {'total': 1.0}, 'versions': {},
    }  # fmt: skip
    drawn = {'fact_00001_mlp': '<svg height="1" width="2"></svg>'}
    text = report.page(document, [row], drawn)
    self.assertNotRegex(text, '<b>|<i>|<u>|<s>|<em>')
    self.assertIn('&lt;b&gt;&#34;<mark>Ada</mark>', text)
    self.assertRegex(text, '<svg role="img" aria-label="[^"<]*&quot;Ada&quot;')

  def test_arithmetic(self):
    spec = models.tiny_spec('llama', layers=4)
    count = flops.work(
        spec, traced(facts.TraceConfig(('hidden',), draws=3), ('a',), {})
    )
    self.assertEqual(count['cells'], 4)
    # 4 rows; then a draw has partial runs of 3, 2, 1 and 0 layers.
    layers = 4 * 4 + 3 * (3 + 2 + 1)
    heads = 4 + 3 * 3
    per_layer = 2 * layer_weights(spec) + 4 * spec.heads * spec.head_size
    head = 2 * spec.width * spec.vocab
    self.assertAlmostEqual(count['flops'], layers * per_layer + heads * head)
    scratch = 4 * (1 + 4) * (4 * per_layer + head)
    self.assertAlmostEqual(count['naive_flops'], scratch)

  @absltest.skipIf(matplotlib is None, 'needs matplotlib')
  def test_plots_of_one_fact_and_strange_tokens(self):
    found = traced(
        facts.TraceConfig(('mlp',), window=2),
        ('$x^$', '\ud7a3\n'), {'mlp': np.full((2, 3), 0.25)}, answer='$',
    )  # fmt: skip
    self.assertEqual(found.averages['mlp'].count.sum(), 3)
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      drawn = plots.draw_all(found, folder, formats=('svg',), facts=1)
      files = [path.name for path in folder.iterdir()]
    self.assertIn('$x^$*', drawn['fact_00007_mlp'])
    self.assertCountEqual(files, [f'{name}.svg' for name in drawn])


if __name__ == '__main__':
  absltest.main()
