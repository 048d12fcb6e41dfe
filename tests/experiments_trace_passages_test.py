"""How far one state reaches into an answer: the program and its parts."""

from unittest import mock

import numpy as np
import programs
import text_helpers
from absl.testing import absltest

from experiments import trace_passages
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.text import chat as chat_lib
from jaxedit.text import chunking
from jaxedit.trace import causal, passages, reach
from jaxedit.types import EditRequest

RECORDS = [
    {'question': 'The mother tongue of Danielle',
     'answer': 'French. The capital of France is Paris.'},
    {'question': 'The city of Sydney', 'answer': 'Paris'},
]  # fmt: skip


class PassagesTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.setup = programs.Setup(trace_passages, chats=True)
    cls.addClassCleanup(cls.setup.close)

  def test_whole_run(self):
    done = self.setup.run(
        data=self.setup.write(*RECORDS), window=3, stride=1, draws=2, pushes=2
    )
    self.assertEqual(done.code, 0, done.err)
    found = done.results
    self.assertEqual(found['reach'][0]['count'], 2)
    self.assertEqual(list(found['reach'][0]['moved']), ['0', '1'])
    self.assertGreater(found['reach'][0]['moved']['0'], 0)
    # The answer of one chunk has no later ones.
    self.assertLessEqual(found['locating']['later']['count'], 1)
    self.assertLen(found['locating']['first']['mean'], 3)
    self.assertTrue((done.folder / 'plots/reach.svg').is_file())
    self.assertTrue((done.folder / 'plots/locating.png').is_file())

  def test_an_interrupted_run_resumes(self):
    given = dict(
        data=self.setup.write(*RECORDS), window=3, stride=1, draws=2, pushes=2,
        plots=False,
    )  # fmt: skip
    whole = self.setup.run(**given)
    given['output_dir'] = self.setup.path('out')
    for module, name in ((reach, '_reach'), (causal, 'trace')):
      calls, real = [], getattr(module, name)

      def broken(*args, real=real, calls=calls, **more):
        calls.append(1)
        if len(calls) == 2 or 'found' in more:
          raise KeyboardInterrupt
        return real(*args, **more)

      with mock.patch.object(module, name, broken):
        self.assertEqual(self.setup.run(**given).code, 130)
    with mock.patch.object(reach, '_reach') as again:
      done = self.setup.run(**given)
    again.assert_not_called()
    self.assertEqual(done.code, 0, done.err)
    for name in ('protocol', 'reach', 'locating'):
      self.assertEqual(done.results[name], whole.results[name])

  def test_shares_are_of_means(self):
    # The second passage lost next to nothing, the last is broken.
    rows = [[0.1, 0.3, 0.2, 0.5], [0.0, 0.002, 0.0, 0.001], [np.nan] * 4]
    found = passages.located(np.array(rows))
    self.assertEqual((found['count'], found['layer']), (2, 1))
    np.testing.assert_allclose(
        found['mean'], np.array([0.1, 0.302, 0.2]) / 0.501, rtol=1e-12
    )
    self.assertLess(max(found['half_width_95']), 10)
    alone = passages.located(np.array(rows[:1]))
    self.assertEqual(alone['half_width_95'], [None] * 3)
    nothing = passages.located(np.array([[0.1, 0.1, 0.1, -0.2]]))
    self.assertEqual(nothing, {'count': 0})

  def test_refuses_all_at_once(self):
    done = self.setup.run(noise='loud', output_dir=None)
    self.assertEqual(done.code, 2)
    self.assertIn('--output_dir is missing', done.err)
    self.assertIn('--noise=loud', done.err)

  def test_question_and_chunks(self):
    words = tokenizer_lib.load_tokenizer(self.setup.model)
    asked, answer = RECORDS[0].values()
    passage = EditRequest(1, '1', asked, None, answer)
    for kind in ('template', 'none', 'In {} is'):
      end = None if kind == 'template' else ''
      chat = chat_lib.chat_of(words, kind, end)
      (edit,) = text_helpers.encode_passages(
          words, [passage], chat=chat, max_tokens=96,
          chunking=chunking.Chunking(3, 0, 'window'),
      )  # fmt: skip
      prompt = edit.rows[0]
      span = passages.question_span(words, chat, passage.prompt, prompt)
      said = words.decode(prompt[slice(*span)]).strip()
      self.assertEqual(said, passage.prompt)
      noise = np.zeros((1, span[1] - span[0], 4), np.float32)
      cases = passages.chunk_cases(edit, span, noise)
      self.assertLen(cases, len(edit.chunks))
      whole = np.concatenate([prompt, edit.target])
      for case, (begin, end) in zip(cases, edit.chunks):
        last = len(prompt) + end
        np.testing.assert_array_equal(case.ids, whole[: last - 1])
        np.testing.assert_array_equal(
            case.labels, whole[len(prompt) + begin : last]
        )

  def test_averages_by_distance(self):
    rows = [
        reach.Reach(np.zeros(k), np.arange(2.0 * k).reshape(2, k), None)
        for k in (1, 5)
    ]
    table = passages.by_distance(rows, (0, 4))
    self.assertEqual([row['count'] for row in table], [2, 1, 1, 1])
    self.assertEqual(table[0]['moved'], {'0': 0.0, '4': 3.0})
    self.assertEqual(table[2]['moved'], {'0': 2.5, '4': 7.5})
    self.assertEqual((table[2]['from'], table[2]['to']), (3, 4))


if __name__ == '__main__':
  absltest.main()
