"""Files and settings that are wrong, or that would hurt: one clear message.

What each format refuses stands with its own tests and in `loaders_fuzz_test`;
here is what would take memory or time without bounds, tell the wrong cause, or
change numbers without a word.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import tempfile
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tiny_model
from absl import flags
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit import io
from jaxedit.checkpoint import Checkpoint
from jaxedit.deltas import Edited, LowRank
from jaxedit.edited import files
from jaxedit.eval import datasets
from jaxedit.models import assets, loading, saving, tokenizer_rules
from jaxedit.models import checkpoint as folders
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.runs import cli
from jaxedit.runs.config import RunConfig
from jaxedit.runs.moments import MomentsConfig
from jaxedit.runs.trace_config import TraceRunConfig
from jaxedit.stats import corpora
from jaxedit.testing import models
from jaxedit.text import render_check
from jaxedit.types import InputError

SPEC = models.tiny_spec('llama', layers=2)


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def refused(self, pattern, call, *args, lines=20, **kwargs):
    """Checks that there is one message, of bounded size and in bounded time."""
    start = time.process_time()
    with self.assertRaisesRegex(InputError, pattern) as caught:
      call(*args, **kwargs)
    self.assertLess(time.process_time() - start, 10)
    self.assertLessEqual(len(str(caught.exception).splitlines()), lines)
    self.assertLess(len(str(caught.exception)), 25_000)
    return caught.exception


class MessageTest(Case):

  def test_bounds(self):
    error = InputError(*(f'{i} ' + 'x' * 10**6 for i in range(10**3)))
    self.assertLen(error.problems, 1000)
    self.assertLen(error.lines(), 20)
    self.assertEqual(error.lines()[-1], 'and 981 more errors, 1000 in all')
    self.assertLess(len(str(error)), 20_000)
    self.assertLen(InputError(*'abcdefghijklmnopqrst').lines(), 20)
    self.assertEqual(InputError('a\nb\x1b[1m').lines(), ['a b [1m'])
    self.assertTrue(InputError('x' * 9999 + 'do this').lines()[0].endswith(
        'do this'))  # fmt: skip


class ModelTest(Case):

  def setUp(self):
    super().setUp()
    self.model = tiny_model.make(self.root / 'm', chats=True)

  def change(self, name, **fields):
    path = self.model / name
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | fields))

  def test_many_unknown_fields(self):
    self.change('config.json', **{f'a{i}': 'x' * 500 for i in range(10**5)})
    self.refused('unknown for llama', loading.open_model, self.model)

  def test_training_bookkeeping(self):
    self.change('config.json', unsloth_fixed=True, unsloth_version='2025.1')
    loading.open_model(self.model)

  def test_many_unknown_tensors(self):
    path = self.model / 'model.safetensors'
    tensors = safetensors.numpy.load_file(path)
    more = {f'{i}' + 'n' * 500: np.zeros(0, np.float32) for i in range(10**4)}
    safetensors.numpy.save_file(tensors | more, path)
    self.refused('has no place', loading.open_model, self.model)

  def test_many_layers(self):
    self.change('config.json', num_hidden_layers=10**7)
    self.refused('10000000 layers, but', loading.open_model, self.model)

  @parameterized.parameters(
      ({'a': []}, 'names the file'),
      ({'a': {'b': 1}}, 'names the file'),
      ({'a': 'x' * 5000}, 'names the file'),
      ({'a': 'x' * 5000 + '.safetensors'}, 'names the file'),
      ({str(i): [i] for i in range(10**5)}, 'names the file'),
  )
  def test_index(self, weights, pattern):
    (self.model / 'model.safetensors').rename(self.model / 'a.safetensors')
    self.change(folders.INDEX, weight_map=weights)
    self.refused(pattern, loading.open_model, self.model)

  def test_index_with_a_list_as_metadata(self):
    header = folders.read_header(self.model / 'model.safetensors')
    (self.model / 'model.safetensors').rename(self.model / 'a.safetensors')
    weights = dict.fromkeys(header.tensors, 'a.safetensors')
    self.change(folders.INDEX, weight_map=weights, metadata=[1])
    self.refused('its metadata is no object', loading.open_model, self.model)

  @parameterized.parameters('config.json', 'tokenizer_config.json')
  def test_auto_map_that_is_no_object(self, name):
    self.change(name, auto_map=5)
    self.refused("auto_map is '5'", tokenizer_lib.load_tokenizer, self.model)

  def test_tokens_that_cannot_be(self):
    (self.model / 'tokenizer_config.json').unlink()
    self.change('config.json', bos_token_id=10**30, eos_token_id=-5)
    tokenizer = tokenizer_lib.load_tokenizer(self.model)
    self.assertIsNone(tokenizer.bos_token)

  def test_a_pipe_in_the_folder(self):
    os.mkfifo(self.model / 'vocab.json')
    self.refused('vocab.json: is a pipe', tokenizer_lib.load_tokenizer,
                 self.model)  # fmt: skip
    (self.model / 'vocab.json').unlink()
    (self.model / 'config.json').unlink()
    os.mkfifo(self.model / 'config.json')
    self.refused('a pipe or a device', loading.open_model, self.model)

  @parameterized.parameters('special_tokens_map.json', 'added_tokens.json')
  def test_nested_json(self, name):
    (self.model / name).write_text('{"a": ' * 10**5)
    self.refused('nested', tokenizer_lib.load_tokenizer, self.model)

  def test_a_pattern_that_backtracks(self):
    path = self.model / 'tokenizer.json'
    settings = json.loads(path.read_text())
    settings['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [{
        'type': 'Split', 'pattern': {'Regex': '(a+)+$'},
        'behavior': 'Isolated', 'invert': False,
    }]}  # fmt: skip
    path.write_text(json.dumps(settings))
    self.refused(r"pattern '\(a\+\)\+\$' of pre_tokenizer repeats",
                 tokenizer_lib.load_tokenizer, self.model)  # fmt: skip

  def test_replacements_that_multiply(self):
    path = self.model / 'tokenizer.json'
    settings = json.loads(path.read_text())
    double = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
    settings['normalizer'] = {'type': 'Sequence', 'normalizers': [double] * 60}
    path.write_text(json.dumps(settings))
    self.refused('1000 times as long', tokenizer_lib.load_tokenizer, self.model)

  def test_full_disk(self):
    _, source, layout = loading.open_model(self.model)
    loaded = loading.load_model(self.model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    # Files of more bytes than this cannot be written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
      self.refused('out: cannot be written .*make room', saving.save_model,
                   self.model, self.root / 'out', layout.spec, loaded.params,
                   changed=['layers/mlp/down/kernel'])  # fmt: skip
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    self.assertEqual([path.name for path in self.root.iterdir()], ['m'])


class RulesTest(parameterized.TestCase):

  @parameterized.parameters(
      r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
      r'|\s+(?!\S)|\s+',
      r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
      r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+',
      r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:\'s|\'t)?|\p{N}{1,3}',
      r'\d{1,3}(?=(?:\d{3})*\b)',
      r' ?[^(\s|[.,!?…。，、])]+',
      r' {2,}',
      r'(?:a*|b*|c*|d*|e*)',
      r'[]*+]+(?#a)x',
      r'\(a+\)+',
  )
  def test_patterns_of_tokenizers(self, pattern):
    self.assertEqual(tokenizer_rules._runs_away(pattern), '')

  @parameterized.parameters(
      '(a+)+$', '(a|aa)*b', '(a*)*', '((a)+b?)*', '(?:a{1,3})+',
      '(?:(?:a?)b)+', 'a*a*a*a*b', '(?:x|y){2,}', '(?<n>a+)+', '(a+){30}',
      'a*a*(x|a*)a*a*', 'a{0,999}a{0,999}a{0,999}a*', r'(?<n>a|b\g<n>c)',
      'x' * 20_000,
  )  # fmt: skip
  def test_patterns_that_run_away(self, pattern):
    self.assertNotEqual(tokenizer_rules._runs_away(pattern), '')


class TemplateTest(Case):

  CHAT = (([{'role': 'user', 'content': 'x'}], True),)

  def test_plain_templates_need_no_process(self):
    template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}a"
        "{% endif %}{{ '<s>' + m['content'] + eos }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'b' }}{% endif %}"
    )
    with mock.patch.object(render_check, 'subprocess'):
      self.assertEqual(render_check.error(template, self.CHAT, {}), '')
    for other in (
        '{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}',
        '{% for a in range(9) %}{% endfor %}', "{{ 'a' * 9 }}", '{% set a = 1 %}',
        "{{ 'a' | center(9) }}", '{% macro f() %}{% endmacro %}', '{{ f() }}',
        '{% for a in messages recursive %}{{ loop(a) }}{% endfor %}', '{% bad',
    ):  # fmt: skip
      self.assertFalse(render_check.is_plain(other), other)

  @parameterized.parameters(
      ("{{ messages[0]['content'] | upper }}", ''),
      ("{{ 'a' * 10**10 }}", 'it takes too much memory'),
      ('{% for a in range(999) %}{% for b in range(999) %}{{ a }}'
       '{% endfor %}{% endfor %}', 'it writes .* characters'),
      ("{{ raise_exception('no roles') }}", 'no roles'),
  )  # fmt: skip
  def test_others_run_in_a_process(self, template, pattern):
    reason = render_check.error(template, self.CHAT, {}, 120)
    self.assertRegex(reason, f'^{pattern}$')

  def test_a_template_that_does_not_end(self):
    loop = '{% for a in range(99999) %}' * 3 + '{% endfor %}' * 3
    reason = render_check.error(loop, self.CHAT, {}, 6)
    self.assertEqual(reason, 'it does not end within 6 s')


class TextTest(Case):

  def test_long_texts_of_records(self):
    record = {
        'subject': 'a',
        'target_new': 'b',
        'prompt': '{}' + 'x ' * 5 * 10**6,
    }
    path = self.root / 'facts.jsonl'
    path.write_text(json.dumps(record))
    self.refused("'prompt' has 10,000,002 characters; give 200,000",
                 datasets.load_requests, path)  # fmt: skip

  def test_long_documents_are_cut_before_they_are_tokenised(self):
    tokenizer = mock.Mock(return_value={'input_ids': [[1]]})
    list(corpora.tokenised(['a' * 10**7], tokenizer, 10))
    (texts,), _ = tokenizer.call_args
    self.assertEqual(list(map(len, texts)), [640])

  @parameterized.parameters('pipe', '/dev/zero')
  def test_pipes_and_devices(self, name):
    os.mkfifo(self.root / 'pipe')
    path = str(self.root / name)
    self.refused('a pipe or a device', datasets.load_requests, path)
    self.refused('a pipe or a device', corpora.text_documents, path)
    self.refused('a pipe or a device', corpora.fingerprint, f'file:{path}')
    self.refused('a pipe or a device', io.read_json, path)
    self.refused('a pipe or a device', assets.sha256, pathlib.Path(path))


class FlagTest(Case):

  @parameterized.parameters(
      (RunConfig, 'moments_tokens', 10**15),
      (RunConfig, 'eval_batch_size', 10**9),
      (RunConfig, 'slots', 10**9),
      (RunConfig, 'preserve_count', 10**9),
      (RunConfig, 'show', 10**30),
      (MomentsConfig, 'tokens', 10**15),
      (MomentsConfig, 'batch_rows', 10**9),
      (TraceRunConfig, 'draws', 10**9),
  )
  def test_numbers_that_cannot_be(self, config, name, value):
    values = flags.FlagValues()
    with mock.patch.object(flags, 'FLAGS', values):
      with mock.patch.object(flags, 'DEFINE_integer') as define:
        with mock.patch.object(flags, 'register_validator'):
          cli.define(config, names=(name,))
    (call,) = define.call_args_list
    self.assertLess(call.kwargs['upper_bound'], value)


class CheckpointTest(Case):

  def test_damage_is_found(self):
    folder = self.root / 'c'
    kept = Checkpoint(folder)
    array = np.arange(3000, dtype=np.float32)
    record = {'a': [1, 2.5], 'b': {1: 'x'}}
    kept.save(1, {'x': array, 'none': np.zeros((0, 2))}, record)
    step, arrays, found = kept.restore()
    self.assertEqual((step, found['a'], found['b']), (1, [1, 2.5], {'1': 'x'}))
    np.testing.assert_array_equal(arrays['x'], array)
    (path,) = (p for p in folder.rglob('*') if p.is_file() and b'"a"' in
               p.read_bytes())  # fmt: skip
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'2.5', b'2.6'))
    self.refused('its checksums are others', kept.restore)
    # A step of an earlier version has none.
    said = json.loads(whole)
    said.pop('record_crc32')
    path.write_text(json.dumps(said))
    self.assertEqual(kept.restore()[0], 1)


class CacheTest(Case):

  def keep(self, text='whole'):
    def make(part):
      self.made += 1
      (part / 'a').write_text(text)

    return assets.keep(self.root / 'e', {'source': 'x'}, make)

  def test_an_altered_entry_is_made_again(self):
    self.made = 0
    folder = self.keep()
    self.keep()
    self.assertEqual(self.made, 1)
    (folder / 'a').write_text('whale')
    self.keep()
    self.assertEqual(self.made, 2)
    self.assertEqual((folder / 'a').read_text(), 'whole')
    # Entries of earlier versions have sizes alone.
    source = json.loads((folder / 'source.json').read_text())
    del source['crc32']
    (folder / 'source.json').write_text(json.dumps(source))
    self.keep()
    self.assertEqual(self.made, 2)


class DeltaTest(Case):

  def delta(self, layers=(0,), rows=1, width=None, value=1.0):
    width = SPEC.width if width is None else width
    key = jnp.ones((len(layers), rows, SPEC.mlp_width))
    return Edited((
        LowRank(layers, 'mlp/down', key, jnp.full((*key.shape[:2], width), value)),
    ))  # fmt: skip

  @parameterized.parameters(float('nan'), float('inf'))
  def test_numbers_that_are_not_finite(self, value):
    path = self.root / 'd'
    files.save(path, self.delta(value=value), {'model_hash': 'ab'})
    self.refused("value of .*'mlp/down' holds numbers that are not finite",
                 edited_lib.load, path)  # fmt: skip

  @parameterized.parameters(
      (dict(layers=(0, 7)), r'of layers \[0, 7\], which the model does not'),
      (dict(width=5), r'by \[\d+, 5\], where the model has'),
  )
  def test_other_models(self, changes, pattern):
    params = models.random_params(SPEC, 0)
    edited = self.delta(**changes)
    self.refused(pattern, edited_lib.apply, params, edited)


if __name__ == '__main__':
  absltest.main()
