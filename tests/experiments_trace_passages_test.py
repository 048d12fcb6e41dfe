"""How far one state reaches into an answer: the program and its parts."""

import contextlib
import io
import json
import os
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
import tiny_model
from absl import flags
from absl.testing import absltest

from experiments import common, trace_passages
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.text import chat as chat_lib
from jaxedit.text import chunking
from jaxedit.text import passages as text_passages
from jaxedit.trace import reach
from jaxedit.types import Passage

RECORDS = [
    {'question': 'The mother tongue of Danielle',
     'answer': 'French. The capital of France is Paris.'},
    {'question': 'The city of Sydney', 'answer': 'Paris'},
]  # fmt: skip


class PassagesTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    stack = contextlib.ExitStack()
    cls.addClassCleanup(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    stack.enter_context(mock.patch.dict(os.environ, {'JAXEDIT_CACHE': folder}))
    option = 'jax_disable_most_optimizations'
    stack.callback(jax.config.update, option, jax.config.read(option))
    jax.config.update(option, True)
    known = set(flags.FLAGS)
    trace_passages.define_flags()
    cls.names = sorted(set(flags.FLAGS) - known)
    stack.callback(lambda: [delattr(flags.FLAGS, name) for name in cls.names])
    cls.model = tiny_model.make(cls.folder / 'tiny', chats=True)

  def run_program(self, **given):
    for name in self.names:
      flags.FLAGS[name].unparse()
    words = [f'--{k}={v}' for k, v in given.items()]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
      with contextlib.redirect_stderr(err):
        rest = common.parse(['trace_passages', *words])
        return common.attempt(trace_passages.main, rest), err.getvalue()

  def test_whole_run(self):
    data, out = self.folder / 'data.jsonl', self.folder / 'out'
    data.write_text('\n'.join(map(json.dumps, RECORDS)))
    code, err = self.run_program(
        model=self.model, data=data, output_dir=out, window=3, stride=1,
        draws=2, pushes=2, compilation_cache=False,
    )  # fmt: skip
    self.assertEqual(code, 0, err)
    found = json.loads((out / 'results.json').read_text())
    self.assertEqual(found['reach'][0]['count'], 2)
    self.assertEqual(list(found['reach'][0]['moved']), ['0', '1'])
    self.assertGreater(found['reach'][0]['moved']['0'], 0)
    # The answer of one chunk has no later ones.
    self.assertLessEqual(found['locating']['later']['count'], 1)
    self.assertLen(found['locating']['first']['mean'], 3)
    self.assertTrue((out / 'plots/reach.svg').is_file())
    self.assertTrue((out / 'plots/locating.png').is_file())

  def test_refuses_all_at_once(self):
    code, err = self.run_program(noise='loud')
    self.assertEqual(code, 2)
    self.assertIn('--output_dir is missing', err)
    self.assertIn('--noise=loud', err)

  def test_question_and_chunks(self):
    words = tokenizer_lib.load_tokenizer(self.model)
    passage = Passage(1, '1', **RECORDS[0])
    for kind in ('template', 'none', 'In {} is'):
      end = None if kind == 'template' else ''
      chat = chat_lib.chat_of(words, kind, end)
      (edit,) = text_passages.encode_passages(
          words, [passage], chat=chat, max_tokens=96,
          chunking=chunking.Chunking(3, 0, 'window'),
      )  # fmt: skip
      prompt = edit.rows[0]
      span = trace_passages.question_span(words, chat, passage.question, prompt)
      said = words.decode(prompt[slice(*span)]).strip()
      self.assertEqual(said, passage.question)
      noise = np.zeros((1, span[1] - span[0], 4), np.float32)
      cases = trace_passages.chunk_cases(edit, span, noise)
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
    table = trace_passages.by_distance(rows, (0, 4))
    self.assertEqual([row['count'] for row in table], [2, 1, 1, 1])
    self.assertEqual(table[0]['moved'], {'0': 0.0, '4': 3.0})
    self.assertEqual(table[2]['moved'], {'0': 2.5, '4': 7.5})
    self.assertEqual((table[2]['from'], table[2]['to']), (3, 4))


if __name__ == '__main__':
  absltest.main()
