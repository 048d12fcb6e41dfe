"""Texts that the package ships in place of the demo model's own samples."""

from __future__ import annotations

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from jaxedit.stats import shipped


class Tokenizer:
  """Token ids are code points, but for 'ab', which is 256."""

  def __call__(self, texts):
    if isinstance(texts, str):
      return {'input_ids': [ord(c) for c in texts.replace('ab', chr(256))]}
    return {'input_ids': [self(text)['input_ids'] for text in texts]}

  def decode(self, ids):
    return ''.join(map(chr, ids)).replace(chr(256), 'ab')


class ShippedTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / 'texts.jsonl'
    self.enter_context(mock.patch.object(shipped, '_FILE', self.path))
    # The second is not what the tokenizer makes of its text.
    self.ids, self.identity = [[97, 99], [97, 98], [256]], {'model': 'x'}
    about = {'identity': self.identity, 'batches': 2}
    shipped.write(self.path, self.ids, Tokenizer(), about)

  def test_they_are_read_as_they_were_sampled(self):
    found = shipped.texts(self.identity, Tokenizer())
    self.assertEqual(found, (self.ids, 2))
    lines = self.path.read_text('utf-8').splitlines()
    self.assertEqual(list(map(json.loads, lines[1:])), ['ac', [97, 98], 'ab'])

  def test_of_another_model_or_tokenizer_there_are_none(self):
    self.assertEqual(shipped.texts({'model': 'y'}, None), ([], 0))
    other = lambda texts: {'input_ids': [[1] for _ in texts]}
    self.assertEqual(shipped.texts(self.identity, other), ([], 0))


if __name__ == '__main__':
  absltest.main()
