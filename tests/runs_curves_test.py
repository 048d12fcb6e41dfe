"""Curves of sequences: what is read of results, and which are refused."""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
import unittest
from unittest import mock

import programs
from absl.testing import absltest, parameterized

from experiments import plot_sequences
from jaxedit import io
from jaxedit.runs import curves
from jaxedit.types import InputError


def results(along=True, perplexity=True):
  """results.json of three edits, judged after one and after all."""
  point = lambda x: {
      'metrics': {'post': {'reliability': x}},
      'intervals': {'post': {'reliability': [x - 0.1, x]}},
      'counts': {'post': {'reliability': 1}},
  }
  fluency = {'perplexity': {'value': 21.0}} if perplexity else {}
  found = {'protocol': {'data': {'records': 3}}, **point(0.5)}
  if along:
    found['along'] = [{'edits': 1, **point(1.0), **fluency}]
  if perplexity:
    found['perplexity'] = {'pre': {'value': 20.0}, 'post': {'value': 30.0}}
  return found


class CurvesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
        self.enter_context(tempfile.TemporaryDirectory())
    )

  def run_of(self, name, **given):
    folder = self.folder / name
    folder.mkdir()
    io.write_json(folder / 'results.json', results(**given))
    return str(folder)

  def test_read(self):
    found = curves.read(self.run_of('memit'))
    self.assertEqual(found.name, 'memit')
    self.assertEqual(found.edits, (1, 3))
    want = {'reliability': [1.0, 0.5], 'perplexity': [21.0, 30.0]}
    self.assertEqual(found.values, want)
    self.assertEqual(found.intervals, {'reliability': [[0.9, 1.0], [0.4, 0.5]]})
    plain = curves.read(self.run_of('plain', perplexity=False))
    self.assertNotIn('perplexity', plain.values)

  def test_all_that_cannot_be_read_is_told(self):
    runs = [self.run_of('once', along=False), str(self.folder / 'none')]
    with self.assertRaises(InputError) as caught:
      curves.write(runs, 'x.pdf')
    told = '\n'.join(caught.exception.problems)
    self.assertLen(caught.exception.problems, 3)
    self.assertRegex(told, r'once: was not judged .* --judge_at')
    self.assertIn('ends in .svg or .png', told)

  @unittest.skipUnless(importlib.util.find_spec('matplotlib'), 'draws')
  def test_program(self):
    runs = [self.run_of('memit'), self.run_of('plain', perplexity=False)]
    setup = mock.Mock(program=plot_sequences)
    given = [f'--runs={",".join(runs)}', f'--out={self.folder / "s.svg"}']
    setup.arguments.return_value = given
    done = programs.Setup.run(setup)
    self.assertEqual(done.code, 0, done.err)
    drawn = (self.folder / 's.svg').read_text()
    for word in ('memit', 'plain', 'reliability', 'perplexity', 'edits so far'):
      self.assertIn(word, drawn)
    self.assertNotIn('generalization', drawn)
    with self.assertRaisesRegex(InputError, 'no run has es; they have'):
      curves.draw([curves.read(runs[0])], ['es'])


if __name__ == '__main__':
  absltest.main()
