"""Text from files, data sets and the model itself."""

import json
import pathlib
import sys
import tempfile
import types as python_types
from unittest import mock

from absl.testing import absltest, parameterized

from jaxedit import testing
from jaxedit.models import decode
from jaxedit.stats import corpora
from jaxedit.testing import models
from jaxedit.types import InputError

WIKI = """ \n = First page = \n
 Some text about it . x = y = z
 = = A part = = \n
 More of it .
 = = = A smaller part = = = \n
 The end .
 = Second = page = \n
 Other text .
"""


class FileTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def write(self, text, name='a.txt'):
    path = self.folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

  def test_wikitext_is_cut_at_titles_of_the_first_level(self):
    pages = corpora.text_documents(self.write(WIKI))
    self.assertLen(pages, 2)
    self.assertStartsWith(pages[0], '= First page =')
    self.assertEndsWith(pages[0], 'The end .')
    self.assertStartsWith(pages[1], '= Second = page =')

  def test_real_wikitext(self):
    path = testing.data_path('wikitext2_valid.txt')
    pages = corpora.text_documents(path)
    self.assertLen(pages, 60)
    self.assertStartsWith(pages[0], '= Homarus gammarus =')

  @parameterized.parameters(
      ('one\ntwo\nthree\n', ['one', 'two', 'three']),
      ('one\nmore\n\n \ntwo\n', ['one\nmore', 'two']),
      ('  alone ', ['alone']),
  )
  def test_paragraphs_or_lines(self, text, want):
    self.assertEqual(corpora.text_documents(self.write(text)), want)

  def test_refuses_files_without_text(self):
    with self.assertRaisesRegex(InputError, 'holds no text'):
      corpora.text_documents(self.write(' \n\n'))
    with self.assertRaisesRegex(InputError, 'cannot be read'):
      corpora.text_documents(self.folder / 'none')
    with self.assertRaisesRegex(InputError, 'not UTF-8 text .byte 2'):
      corpora.text_documents(self.write(b'ab\xff'))

  def test_jsonl(self):
    lines = [json.dumps({'t': text}) for text in ('one', ' ', 'two\nlines')]
    path = self.write('\n\n'.join(lines))
    self.assertEqual(corpora.jsonl_documents(path, 't'), ['one', 'two\nlines'])
    # Marks that Unicode counts as line ends may stand in JSON as they are.
    text = 'a\u2028b\x85c'
    path = self.write(json.dumps({'t': text}, ensure_ascii=False))
    self.assertEqual(corpora.jsonl_documents(path, 't'), [text])

  def test_jsonl_tells_every_fault(self):
    path = self.write('{"t": "a"}\n{"u": 1, "v": 2}\nnope\n[1]\n{"t": 3}\n')
    with self.assertRaises(InputError) as caught:
      corpora.jsonl_documents(path, 't')
    problems = caught.exception.problems
    self.assertLen(problems, 4)
    self.assertIn("line 2 has no text in field 't'; its fields", problems[0])
    self.assertIn('u, v', problems[0])
    self.assertIn('line 3 is not valid JSON', problems[1])

  def test_jsonl_tells_few_of_many_faults(self):
    path = self.write('nope\n' * 50)
    with self.assertRaises(InputError) as caught:
      corpora.jsonl_documents(path, 't')
    self.assertLen(caught.exception.problems, 21)
    self.assertIn('30 more lines', caught.exception.problems[-1])

  def test_order_is_of_the_seed(self):
    path = self.write('\n'.join(map(str, range(100))))
    name = f'file:{path}'
    first = corpora.open_documents(name, seed=3)
    self.assertEqual(first, corpora.open_documents(name, seed=3))
    other = corpora.open_documents(name, seed=4)
    self.assertNotEqual(first, other)
    self.assertCountEqual(first, other)

  def test_names(self):
    path = self.write('{"a:b": 1, "t": "x"}\n')
    name = f'jsonl:{path}:t'
    self.assertEqual(corpora.open_documents(name, seed=0), ['x'])

  @parameterized.parameters(
      'file:', 'jsonl:x', 'jsonl::t', 'hf:', 'hf:a:b:c:d', 'http:x', 'x', 'self'
  )
  def test_unknown_names(self, name):
    with self.assertRaisesRegex(InputError, 'is unknown; give self, file:PATH'):
      corpora.open_documents(name, seed=0)


class _Stream(list):
  """What a streamed data set looks like."""

  def shuffle(self, seed, buffer_size):
    del buffer_size
    return self[seed:] + self[:seed]


class HubTest(absltest.TestCase):

  def open(self, name, load, seed=0):
    module = python_types.ModuleType('datasets')
    module.load_dataset = load
    with mock.patch.dict(sys.modules, {'datasets': module}):
      return list(corpora.open_documents(name, seed=seed))

  def test_reads_config_and_field(self):
    asked = []

    def load(name, config, split, streaming):
      asked.append((name, config, split, streaming))
      return _Stream([{'body': 'a'}, {'body': ' '}, {'body': 'b'}])

    got = self.open('hf:org/set:en:body', load, seed=2)
    self.assertEqual(got, ['b', 'a'])
    self.assertEqual(asked, [('org/set', 'en', 'train', True)])

  def test_names_the_fields_there_are(self):
    load = lambda *_, **__: _Stream([{'body': 'a', 'id': 1}])
    with self.assertRaisesRegex(InputError, "field 'text'; its .*: body, id"):
      self.open('hf:org/set', load)

  def test_tells_why_it_does_not_open(self):
    def load(*_, **__):
      raise ConnectionError('no\nnetwork')

    with self.assertRaisesRegex(InputError, 'does not open: no network'):
      self.open('hf:org/set', load)

  def test_says_what_to_install(self):
    with mock.patch.dict(sys.modules, {'datasets': None}):
      with self.assertRaisesRegex(InputError, "extra 'data'"):
        list(corpora.open_documents('hf:org/set', seed=0))


class SampleTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.spec = models.tiny_spec('llama', layers=1)
    cls.params = models.random_params(cls.spec, 0)

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / 'texts'

  def sample(self, tokens, starts=((1,), (2, 3)), **settings):
    defaults = dict(seed=5, length=6, batch_rows=3, stop_ids=(9,))
    return corpora.sample(
        self.spec, self.params, starts, tokens=tokens, **(defaults | settings)
    )

  def test_samples_from_every_start_up_to_the_wanted_tokens(self):
    texts = self.sample(60)
    self.assertGreaterEqual(sum(map(len, texts)), 60)
    self.assertLess(sum(map(len, texts)), 60 + 3 * 8)
    self.assertEqual([text[0] for text in texts[:4]], [1, 2, 1, 2])
    self.assertFalse(any(9 in text for text in texts))
    self.assertGreater(len(set(map(tuple, texts))), len(texts) // 2)

  def test_is_of_the_seed_and_a_prefix_of_more(self):
    few, many = self.sample(30), self.sample(70)
    self.assertEqual(few, many[: len(few)])
    self.assertNotEqual(few, self.sample(30, seed=6))

  def test_finished_batches_are_not_sampled_again(self):
    whole = self.sample(70)
    few = self.sample(30, store=self.path)
    calls = []
    generate = decode.generate
    with mock.patch.object(
        decode, 'generate', lambda *a, **k: calls.append(1) or generate(*a, **k)
    ):
      self.assertEqual(self.sample(70, store=self.path), whole)
      self.assertLen(calls, (len(whole) - len(few)) // 3)
      self.assertEqual(self.sample(70, store=self.path), whole)
    self.assertLen(calls, (len(whole) - len(few)) // 3)

  def test_refuses_the_store_of_another_run(self):
    self.sample(10, store=self.path)
    with self.assertRaisesRegex(InputError, 'another model, seed.*delete it'):
      self.sample(10, store=self.path, seed=6, model='other')
    self.path.write_bytes(self.path.read_bytes()[:-3])
    with self.assertRaisesRegex(InputError, 'damaged.*delete it'):
      self.sample(10, store=self.path)

  @parameterized.parameters(
      dict(tokens=0), dict(tokens=5, starts=()), dict(tokens=5, length=0)
  )
  def test_refuses_settings_that_cannot_be(self, **settings):
    with self.assertRaisesRegex(InputError, 'at least 1'):
      self.sample(**settings)

  def test_starts(self):
    class Tokenizer:
      bos_token_id, chat_template = 7, None

      def __call__(self, text):
        return {'input_ids': [len(text)]}

    tokenizer = Tokenizer()
    self.assertEqual(corpora.sample_starts(tokenizer), [[7]])
    tokenizer.chat_template = 'x'
    self.assertLen(corpora.sample_starts(tokenizer), len(corpora.STARTS))
    tokenizer.bos_token_id, tokenizer.chat_template = None, None
    self.assertLen(corpora.sample_starts(tokenizer), len(corpora.STARTS))

  def test_starts_are_short_and_different(self):
    self.assertLen(corpora.STARTS, 64)
    self.assertLen(set(corpora.STARTS), 64)

  def test_documents_are_tokenised_in_order_and_cut(self):
    def tokenizer(texts, truncation, max_length, return_attention_mask):
      self.assertTrue(truncation)
      del return_attention_mask
      return {'input_ids': [list(map(ord, t))[:max_length] for t in texts]}

    texts = [chr(65 + i % 26) * 5 for i in range(70)]
    got = list(corpora.tokenised(texts, tokenizer, 3))
    self.assertEqual(got, [[ord(text[0])] * 3 for text in texts])


if __name__ == '__main__':
  absltest.main()
