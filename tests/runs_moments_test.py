"""Second moments of a run: collected, kept for the next run, given and refused."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.methods.base import Moments as Need
from jaxedit.models import decode, loading
from jaxedit.runs import moments as runs_moments
from jaxedit.runs.config import RunConfig
from jaxedit.runs.moments import MomentsConfig
from jaxedit.stats import moments
from jaxedit.testing import facts, models
from jaxedit.types import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Tokenizer:
  """Bytes, folded into a small vocabulary."""

  bos_token_id, eos_token_id, chat_template = 1, 2, None

  def __call__(self, text, **settings):
    del settings
    if isinstance(text, str):
      return {'input_ids': [3 + byte % 90 for byte in text.encode()]}
    return {'input_ids': [self(one)['input_ids'][:16] for one in text]}


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    spec = models.tiny_spec('llama', mlp_width=8)
    params = models.random_params(spec, 0)
    self.model = loading.Model(spec, params, self.folder, 'abc', {})
    self.text = self.folder / 'text.txt'
    lines = (f'{i} is followed by {i + 1}' for i in range(40))
    self.text.write_text('\n'.join(lines))


class CollectTest(Case):

  def setUp(self):
    super().setUp()
    self.config = MomentsConfig(
        layers=(0, 2),
        out=self.folder / 'out' / 'm.safetensors',
        corpus=f'file:{self.text}',
        width=16,
    )

  def collect(self, **changes):
    config = dataclasses.replace(self.config, **changes)
    return runs_moments.collect(config, self.model, Tokenizer())

  def test_writes_what_can_be_loaded(self):
    report = self.collect()
    found = moments.load(self.config.out, model_hash='abc', layers=[0, 2])
    np.testing.assert_array_equal(found.gram, report.moments.gram)
    self.assertBetween(found.count, 160, 176)
    keys = (
        'model corpus corpus_sha256 seed dtype layers site width tokens texts'
        ' padding_share'
    )
    for key in keys.split():
      self.assertIn(key, found.provenance)
    self.assertRegex(
        report.line(),
        r'^1\d\d tokens, [\d,]+ tokens/s, padding \d.*, condition .*,'
        r' .*m.safetensors$',
    )
    self.assertEmpty(list(report.warnings()))
    self.assertLen(list(self.config.out.parent.iterdir()), 1)

  def test_order_is_of_the_seed(self):
    sums = [
        self.collect(seed=seed, overwrite=True).moments.provenance
        for seed in (0, 0, 1)
    ]
    sums = [provenance['corpus_sha256'] for provenance in sums]
    self.assertEqual(sums[0], sums[1])
    self.assertNotEqual(sums[0], sums[2])

  def test_keeps_an_existing_output(self):
    self.collect()
    with self.assertRaisesRegex(InputError, 'exists.*--overwrite'):
      self.collect()

  def test_warns_of_a_short_corpus_and_singular_moments(self):
    short = list(self.collect(tokens=10**6).warnings())
    self.assertLen(short, 1)
    self.assertIn('ended after 6', short[0])
    report = self.collect(tokens=5, width=5, overwrite=True)
    self.assertIn('singular', list(report.warnings())[0])
    self.assertIn('infinite (singular)', report.line())

  def test_interrupted_self_corpus_goes_on(self):
    whole = self.collect(corpus='self').moments
    generate, add = decode.generate, moments.add_batch
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(moments, 'add_batch', stop):
      with self.assertRaises(KeyboardInterrupt):
        self.collect(corpus='self', overwrite=True)
    again = mock.Mock(wraps=generate)
    with mock.patch.object(decode, 'generate', again):
      got = self.collect(corpus='self', overwrite=True).moments
    again.assert_not_called()
    self.assertIs(moments.add_batch, add)
    np.testing.assert_array_equal(got.gram, whole.gram)
    self.assertEqual(dict(got.provenance), dict(whole.provenance))
    self.assertLen(list(self.config.out.parent.iterdir()), 1)

  def test_settings_are_checked_before_sampling(self):
    with mock.patch.object(decode, 'generate') as generate:
      with self.assertRaisesRegex(InputError, 'between 0 and 2'):
        self.collect(corpus='self', layers=(9,))
    generate.assert_not_called()

  def test_condition_of_known_moments(self):
    gram = np.diag([1.0, 2.0, 50.0])[None]
    found = moments.Moments((0,), gram, 9, {})
    self.assertEqual(runs_moments.condition(found), '5.00e+01')

  def test_wrong_flags_are_told_at_once(self):
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.collect_moments', '--layers=a'],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn('error: --layers=', done.stderr)
    self.assertIn('error: --out: name the file to write', done.stderr)
    self.assertNotIn('Traceback', done.stderr)


class FindTest(Case):
  """What a run that needs moments does."""

  def setUp(self):
    super().setUp()
    cache = {'JAXEDIT_CACHE': str(self.folder / 'cache')}
    self.enter_context(mock.patch.dict(os.environ, cache))
    self.need = Need((0, 2), 'mlp/down')
    wrapped = mock.Mock(wraps=runs_moments.collect)
    self.collect = self.enter_context(
        mock.patch.object(runs_moments, 'collect', wrapped)
    )

  def find(self, need=None, model=None, **changes):
    config = RunConfig(
        moments_corpus=f'file:{self.text}',
        moments_tokens=100,
        output_dir=str(self.folder),
    )
    return runs_moments.find(
        dataclasses.replace(config, **changes),
        model or self.model,
        Tokenizer(),
        need or self.need,
    )

  def kept(self):
    (config, *_), _ = self.collect.call_args
    return config.out

  def test_they_are_collected_once(self):
    one, other = self.find(), self.find()
    np.testing.assert_array_equal(one.gram, other.gram)
    self.assertEqual(self.collect.call_count, 1)
    copy = self.folder / 'moments.safetensors'
    np.testing.assert_array_equal(moments.load(copy).gram, one.gram)
    self.assertTrue(self.kept().is_relative_to(self.folder / 'cache'))
    self.assertFalse(self.kept().samefile(copy))
    with copy.open('r+b') as file:  # in place
      file.write(b'not moments')
    np.testing.assert_array_equal(self.find().gram, one.gram)
    self.assertEqual(self.collect.call_count, 1)

  def test_whatever_they_depend_on_has_them_collected_anew(self):
    self.find()
    self.find(seed=1)
    self.find(moments_tokens=101)
    self.find(Need((0,), 'mlp/down'))
    self.find(Need((0, 2), 'attn/out'))
    self.find(model=dataclasses.replace(self.model, hash='def'))
    self.text.write_text(self.text.read_text() + '\nTower of Sydney')
    self.find()
    self.assertEqual(self.collect.call_count, 7)

  def test_a_damaged_file_is_replaced(self):
    want = self.find()
    blob = bytearray(self.kept().read_bytes())
    blob[-3] ^= 1
    self.kept().write_bytes(blob)
    np.testing.assert_array_equal(self.find().gram, want.gram)
    self.assertEqual(self.collect.call_count, 2)

  def test_a_cache_that_cannot_be_written(self):
    with mock.patch.dict(os.environ, {'JAXEDIT_CACHE': str(self.text)}):
      with self.assertRaisesRegex(
          InputError, 'cannot be kept there .*let JAXEDIT_CACHE'
      ):
        self.find()

  def test_given_ones_are_used(self):
    path = self.folder / 'given.safetensors'
    want = facts.random_moments(self.model.spec, (0, 2), seed=0)
    provenance = {**want.provenance, 'model': 'abc'}
    moments.save(path, dataclasses.replace(want, provenance=provenance))
    found = self.find(moments=str(path))
    np.testing.assert_array_equal(found.gram, want.gram)
    self.collect.assert_not_called()
    self.assertFalse((self.folder / 'moments.safetensors').exists())
    for check in (runs_moments.check, self._load):
      with self.assertRaisesRegex(InputError, 'of layers 0, 2, not of 1; coll'):
        check(str(path), Need((0, 1), 'mlp/down'))
    with self.assertRaisesRegex(InputError, "hash 'abc', not of 'x.*; collect"):
      runs_moments.check(str(path), self.need, 'x')

  def _load(self, path, need):
    return runs_moments.load(self.model, need, path)

  def test_a_folder_without_published_archives(self):
    runs_moments.check(str(self.folder), self.need)  # needs the model's width
    with self.assertRaises(InputError) as caught:
      self._load(self.folder, self.need)
    for i, problem in zip((0, 2), caught.exception.problems, strict=True):
      self.assertIn(f'0 archives of mlp/down in layer {i} (', problem)


if __name__ == '__main__':
  absltest.main()
