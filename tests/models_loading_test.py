"""Folders are loaded exactly, run as torch runs them, or are refused."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import tempfile

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from absl.testing import absltest, parameterized

from jaxedit import types
from jaxedit.models import decoder, families, loading, tensors
from jaxedit.testing import models as tiny
from jaxedit.types import InputError

VARIANTS = dict(
    {name: (name, {}) for name in hf_oracle.FAMILIES},
    llama_linear=(
        'llama',
        dict(rope_parameters=dict(
            rope_type='linear', factor=3.0, rope_theta=10000.0
        )),
    ),
    llama_llama3=(
        'llama',
        dict(rope_parameters=dict(
            rope_type='llama3', factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=16,
            rope_theta=100.0,
        )),
    ),
    llama_biases=(
        'llama', dict(attention_bias=True, mlp_bias=True, head_dim=16)
    ),
    llama_tied=('llama', dict(tie_word_embeddings=True)),
    qwen2_untied=('qwen2', dict(tie_word_embeddings=False)),
    mistral_full=('mistral', dict(sliding_window=None)),
    gptj_tied=('gptj', dict(tie_word_embeddings=True)),
    gpt_neox_sequential=('gpt_neox', dict(use_parallel_residual=False)),
    gpt_neox_no_bias=('gpt_neox', dict(attention_bias=False)),
    gpt2_unscaled=('gpt2', dict(scale_attn_weights=False, n_inner=40)),
    gpt2_untied=('gpt2', dict(tie_word_embeddings=False)),
)  # fmt: skip


_forward = jax.jit(decoder.forward, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _forward_in_parts(spec, params, tokens, layout):
  h = decoder.embed(spec, params, tokens, layout)
  for start, stop in ((0, 1), (1, spec.layers)):
    h, _ = decoder.run_layers(spec, params, h, layout, start=start, stop=stop)
  return decoder.logits(spec, params, h)


def _leaves(params):
  return jax.tree.leaves_with_path(params)


class LoadingTest(parameterized.TestCase):

  def _temporary(self) -> pathlib.Path:
    return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def _folder(self, family='llama', name='model', **options) -> pathlib.Path:
    folder = self._temporary() / name
    changes = options.pop('changes', {})
    hf_oracle.save(hf_oracle.make(family, **changes), folder, **options)
    return folder

  @parameterized.parameters(*VARIANTS)
  def test_params_and_logits_equal_torch(self, variant):
    family, changes = VARIANTS[variant]
    oracle = hf_oracle.make(family, **changes)
    folder = self._temporary()
    hf_oracle.save(oracle, folder)
    model = loading.load_model(folder)
    spec, state = model.spec, hf_oracle.state(folder)
    table = families.get(family).TENSORS
    for name, slots in tensors.upstream_slots(spec, table).items():
      for slot in slots:
        leaf = loading.get_leaf(model.params, slot.path)
        np.testing.assert_array_equal(
            leaf if slot.layer is None else leaf[slot.layer],
            tensors.to_canonical(state[name], slot.source, spec.heads),
            err_msg=name,
        )
    tokens = np.random.default_rng(1).integers(0, 97, (4, 20))
    valid = np.ones(tokens.shape, bool)
    valid[1, :6], valid[2, 13:], valid[3, 1:] = False, False, False
    want = hf_oracle.logits(oracle, tokens, valid)
    layout = decoder.token_layout(jnp.asarray(valid))
    got = _forward(spec, model.params, tokens, layout)
    self.assertGreater(want[valid].std(), 0.5)
    np.testing.assert_allclose(got[valid], want[valid], atol=1e-4, rtol=0)

    if variant in hf_oracle.FAMILIES:
      parts = _forward_in_parts(spec, model.params, tokens, layout)
      np.testing.assert_allclose(parts[valid], got[valid], atol=1e-5, rtol=0)

  @parameterized.parameters(*hf_oracle.FAMILIES)
  def test_tiny_spec_is_the_oracles(self, family):
    config = hf_oracle.make(family).config.to_dict()
    self.assertEqual(families.spec_from_hf(config), tiny.tiny_spec(family))

  @parameterized.parameters('llama', 'gpt2')
  def test_shards_change_neither_params_nor_hash(self, family):
    whole = loading.load_model(self._folder(family))
    folder = self._folder(family, 'shards', max_shard_size='40KB')
    self.assertGreater(len(list(folder.glob('*.safetensors'))), 1)
    seen = []

    def progress(stage, total, unit):
      seen.append((stage, total, unit))
      return types.silent(stage, total, unit)

    shards = loading.load_model(folder, progress=progress)
    self.assertEqual(whole.hash, shards.hash)
    self.assertLen(seen, 1)
    jax.tree.map(np.testing.assert_array_equal, whole.params, shards.params)
    other = self._folder(family, 'other', changes=dict(seed=1))
    self.assertNotEqual(loading.load_model(other).hash, whole.hash)

  def test_bfloat16(self):
    oracle = hf_oracle.make('llama')
    folder = self._temporary()
    hf_oracle.save(oracle, folder)
    for path, leaf in _leaves(loading.load_model(folder, 'bfloat16').params):
      self.assertEqual(leaf.dtype, jnp.bfloat16, path)
    halves = self._temporary()
    hf_oracle.save(oracle.bfloat16(), halves)
    narrow = loading.load_model(halves, 'bfloat16')
    wide = loading.load_model(halves)
    self.assertEqual(narrow.hash, wide.hash)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b),
        narrow.params,
        wide.params,
    )

  def test_base_model_names_and_buffers(self):
    folder = self._folder('gpt2')
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    want = loading.load_model(folder)
    renamed = {
        name.removeprefix('transformer.'): value
        for name, value in state.items()
    }
    for layer in range(3):
      mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
      renamed[f'h.{layer}.attn.bias'] = mask
      renamed[f'h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
    renamed['lm_head.weight'] = state['transformer.wte.weight'].clone()
    safetensors.torch.save_file(renamed, folder / 'model.safetensors')
    got = loading.load_model(folder)
    self.assertEqual(got.hash, want.hash)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)

  def test_tied_copy_that_differs_is_refused(self):
    folder = self._folder('gpt2')
    path = folder / 'model.safetensors'
    state = safetensors.torch.load_file(path)
    state['lm_head.weight'] = state['transformer.wte.weight'] + 1
    safetensors.torch.save_file(state, path)
    with self.assertRaisesRegex(InputError, 'lm_head.weight differs from'):
      loading.load_model(folder)
    hf_oracle.edit_config(folder, tie_word_embeddings=False)
    model = loading.load_model(folder)
    np.testing.assert_array_equal(
        model.params['head']['kernel'], state['lm_head.weight'].numpy().T
    )

  def test_tensor_faults_come_together(self):
    folder = self._folder('llama')
    path = folder / 'model.safetensors'
    state = safetensors.torch.load_file(path)
    state['model.layers.1.mlp.extra.weight'] = torch.ones(2)
    state['model.layers.0.self_attn.q_proj.bias'] = torch.ones(32)
    state['model.norm.weight'] = torch.ones(31)
    del state['model.layers.2.mlp.down_proj.weight'], state['lm_head.weight']
    narrow = state['model.embed_tokens.weight'].to(torch.int8)
    state['model.embed_tokens.weight'] = narrow
    safetensors.torch.save_file(state, path)
    hf_oracle.edit_config(folder)
    with self.assertRaises(InputError) as caught:
      loading.load_model(folder)
    text = str(caught.exception)
    for words in (
        'mlp.extra.weight has no place',
        'layers.0.self_attn.q_proj.bias has no place',
        'model.norm.weight has shape [31]',
        'layers.2.mlp.down_proj.weight (for layers/mlp/down/kernel) is missing',
        'lm_head.weight (for head/kernel) is missing',
        'model.embed_tokens.weight has dtype I8',
    ):
      self.assertIn(words, text)
    self.assertLen(caught.exception.problems, 6)

  def test_weights_that_are_not_finite_are_named(self):
    folder = self._folder('llama')
    path = folder / 'model.safetensors'
    state = safetensors.torch.load_file(path)
    state['model.norm.weight'][3] = float('nan')
    state['model.layers.1.mlp.up_proj.weight'][0, 0] = float('inf')
    safetensors.torch.save_file(state, path)
    with self.assertRaises(InputError) as caught:
      loading.load_model(folder)
    self.assertLen(caught.exception.problems, 2)
    self.assertRegex(str(caught.exception), 'model.norm.weight has values')
    self.assertRegex(str(caught.exception), 'layers.1.mlp.up_proj.weight has')

  def test_folder_refusals(self):
    with self.assertRaisesRegex(InputError, 'no such folder'):
      loading.load_model('/nowhere/at/all')
    with self.assertRaisesRegex(InputError, 'float16'):
      loading.load_model('/nowhere/at/all', 'float16')
    folder = self._folder('llama')
    config = (folder / 'config.json').read_text()
    (folder / 'config.json').unlink()
    with self.assertRaisesRegex(
        InputError, 'config.json: cannot be read .*fetch it'
    ):
      loading.load_model(folder)
    (folder / 'config.json').write_text(config[:50])
    with self.assertRaisesRegex(InputError, 'not valid JSON'):
      loading.load_model(folder)
    (folder / 'config.json').write_text('[]')
    with self.assertRaisesRegex(InputError, 'a list where an object is needed'):
      loading.load_model(folder)
    (folder / 'config.json').write_text(config)
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with self.assertRaisesRegex(InputError, 'convert them to safetensors'):
      loading.load_model(folder)
    (folder / 'pytorch_model.bin').rename(folder / 'flax_model.msgpack')
    with self.assertRaisesRegex(InputError, 'load_hf_flax_msgpack'):
      loading.load_model(folder)
    (folder / 'flax_model.msgpack').unlink()
    with self.assertRaisesRegex(InputError, 'has neither'):
      loading.load_model(folder)

  @parameterized.parameters(
      ('cut', 'its tensors end at byte'),
      ('head', 'header'),
      ('empty', 'header'),
      ('json', 'Expecting value'),
      ('long', 'its tensors end at byte'),
      ('offsets', 'model.norm.weight'),
  )
  def test_damaged_files(self, damage, words):
    folder = self._folder('llama')
    path = folder / 'model.safetensors'
    data = path.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    header['model.norm.weight']['data_offsets'][0] += 4
    broken = json.dumps(header).encode()
    path.write_bytes(
        {
            'cut': data[:-5],
            'head': (10**9).to_bytes(8, 'little') + data[8:],
            'empty': b'',
            'json': data[:8] + b'!' * size + data[8 + size :],
            'long': data + b'x',
            'offsets': len(broken).to_bytes(8, 'little') + broken,
        }[damage]
    )
    pattern = f'is cut short or damaged.*{words}.*; fetch it again'
    with self.assertRaisesRegex(InputError, pattern):
      loading.load_model(folder)

  def test_damaged_shards(self):
    folder = self._folder('llama', max_shard_size='40KB')
    index_path = folder / 'model.safetensors.index.json'
    index = json.loads(index_path.read_text())

    def fails(words, **changes):
      index_path.write_text(json.dumps(index | changes))
      with self.assertRaisesRegex(InputError, words):
        loading.load_model(folder)

    weights = index['weight_map']
    moved = dict(weights, absent=weights['lm_head.weight'])
    fails('says that tensor absent is in', weight_map=moved)
    fails('no weight_map', weight_map={})
    fails(
        'not a plain .safetensors file name',
        weight_map=dict(weights, x='../model.safetensors'),
    )
    fewer = {k: v for k, v in weights.items() if k != 'model.norm.weight'}
    fails('model.norm.weight is not in the index', weight_map=fewer)
    index_path.write_text(json.dumps(index))
    first, second = sorted(set(weights.values()))[:2]
    shutil.move(folder / first, folder / 'elsewhere')
    (folder / second).write_bytes(b'too short')
    with self.assertRaises(InputError) as caught:
      loading.load_model(folder)
    self.assertLen(caught.exception.problems, 2)
    self.assertRegex(str(caught.exception), f'names the shard {first}')

  def test_config_and_weight_faults_come_together(self):
    folder = self._folder('llama')
    hf_oracle.edit_config(folder, logit_scale=2.0)
    (folder / 'model.safetensors').write_bytes(b'')
    with self.assertRaises(InputError) as caught:
      loading.load_model(folder)
    self.assertRegex(str(caught.exception), 'logit_scale')
    self.assertRegex(str(caught.exception), 'cut short or damaged')

  @parameterized.parameters(*tiny.FAMILIES)
  def test_random_params_run(self, family):
    spec = tiny.tiny_spec(family)
    with jax.enable_x64(True):
      wide = tiny.random_params(spec, 0, jnp.float64)
      for _, leaf in _leaves(wide):
        self.assertEqual(leaf.dtype, jnp.float64)
    params = tiny.random_params(spec, 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, wide
    )
    tokens = np.arange(80).reshape(4, 20)
    layout = decoder.token_layout(jnp.asarray(tokens) >= 0)
    out = _forward(spec, params, tokens, layout)
    self.assertBetween(float(out.std()), 0.3, 3.0)

  def test_random_params_refuse_silent_narrowing(self):
    with self.assertRaisesRegex(InputError, 'enable_x64'):
      tiny.random_params(tiny.tiny_spec('llama'), 0, jnp.float64)
    with self.assertRaisesRegex(InputError, 'known are'):
      tiny.tiny_spec('bloom')


if __name__ == '__main__':
  absltest.main()
