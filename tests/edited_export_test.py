"""Adapters: factors against the change, files against torch and gguf."""

from __future__ import annotations

import json
import pathlib
import tempfile
from unittest import mock

import gguf
import hf_oracle
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized
from safetensors.numpy import load_file

from jaxedit import edited as edited_lib
from jaxedit.convert import adapters
from jaxedit.convert import gguf as gguf_lib
from jaxedit.deltas import Dense, Edited, LowRank, Neurons
from jaxedit.edited import algebra
from jaxedit.models import decoder, loading
from jaxedit.models.spec import param_shapes
from jaxedit.testing import models
from jaxedit.types import InputError

DOWN = 'mlp/down'


def change(spec, site=DOWN, layers=(0, 2), pairs=3, seed=0) -> LowRank:
  """A change strong enough to show."""
  rng = np.random.default_rng(seed)
  kernel = param_shapes(spec)[f'layers/{site}/kernel']
  draw = lambda width: jnp.asarray(
      0.3 * rng.standard_normal((len(layers), pairs, width)), jnp.float32
  )
  return LowRank(layers, site, draw(kernel[1]), draw(kernel[2]))


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def loaded(self, family):
    """One random model in torch and here."""
    model = hf_oracle.make(family)
    hf_oracle.save(model, self.folder / 'model')
    return model, loading.load_model(self.folder / 'model')


class FactorsTest(Case):

  @parameterized.parameters('low-rank', 'dense', 'both')
  def test_they_are_the_change_and_balanced(self, form):
    spec = models.tiny_spec('llama')
    delta = change(spec)
    whole = algebra.full(delta)
    deltas = {
        'low-rank': (delta,),
        'dense': (Dense(delta.layers, DOWN, whole),),
        'both': (delta, Dense(delta.layers, DOWN, whole)),
    }[form]
    with mock.patch.object(adapters, 'write_peft') as written:
      reports, _ = edited_lib.write_adapter('x', spec, Edited(deltas))
    want = np.asarray(whole, np.float64) * (2 if form == 'both' else 1)
    for i, one in enumerate(written.call_args.args[2]):
      np.testing.assert_allclose((one.b @ one.a).T, want[i], atol=1e-6)
      self.assertAlmostEqual(np.linalg.norm(one.a), np.linalg.norm(one.b), 9)
      self.assertEqual((reports[i].layer, reports[i].rank), ((0, 2)[i], 3))
      self.assertLess(reports[i].error, 1e-6)

  def test_rank_and_what_it_leaves_out(self):
    spec = models.tiny_spec('llama')
    delta = change(spec, layers=(1,))
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    same = LowRank((1,), DOWN, twice(delta.key), twice(delta.value))
    with mock.patch.object(adapters, 'write_peft') as written:
      ((_, _, rank, _),), _ = self.export_of(spec, same)
      self.assertEqual(rank, 3)
      ((_, _, rank, error),), _ = self.export_of(spec, delta, rank=2)
    (one,) = written.call_args.args[2]
    left = np.asarray(algebra.full(delta)[0], np.float64) - (one.b @ one.a).T
    want = np.linalg.norm(left) / np.linalg.norm(algebra.full(delta))
    self.assertEqual(rank, 2)
    self.assertAlmostEqual(error, want, places=6)

  def export_of(self, spec, delta, **options):
    return edited_lib.write_adapter('x', spec, Edited((delta,)), **options)

  def test_what_no_adapter_holds(self):
    llama, gpt2 = models.tiny_spec('llama'), models.tiny_spec('gpt2')
    delta = change(llama)
    other = models.tiny_spec('llama', mlp_width=40)
    neurons = Neurons(
        (0,), DOWN, delta.key[:1], delta.key[:1, :, 0], delta.value[:1]
    )
    bias = Dense((0,), 'mlp/up', jnp.ones((1, 48)), leaf='bias')
    fused = LowRank((0,), 'attn/q', *[jnp.ones((1, 1, gpt2.width))] * 2)
    none = LowRank((0,), DOWN, delta.key[:1] * 0, delta.value[:1])
    nan = LowRank((0,), DOWN, delta.key[:1] * np.nan, delta.value[:1])
    side = algebra.stack([Edited((delta,))] * 2)
    for spec, edited, want in (
        (llama, side, '2 edits side by side.*select one of them'),
        (llama, Edited((neurons,)), 'Neurons, which no adapter holds'),
        (llama, Edited((bias,)), 'changes of a bias.*or merge it'),
        (other, Edited((delta,)), 'which the model does not have; name the'),
        (gpt2, Edited((fused,)), 'attn/q shares .*c_attn with other maps'),
        (llama, Edited((none,)), 'changes nothing'),
        (llama, Edited((nan,)), 'not finite'),
    ):
      with self.assertRaisesRegex(InputError, want):
        edited_lib.write_adapter(self.folder / 'x', spec, edited)
      self.assertFalse((self.folder / 'x').exists())
    with self.assertRaisesRegex(InputError, "format is 'x'; known are peft"):
      edited_lib.write_adapter('x', llama, Edited((delta,)), format='x')


class PeftTest(Case):

  @parameterized.parameters(
      ('llama', (DOWN, 'attn/q')), ('gpt2', (DOWN,)), ('gptj', (DOWN,))
  )
  def test_torch_with_the_adapter_is_the_edited_model(self, family, sites):
    theirs, ours = self.loaded(family)
    deltas = [
        change(ours.spec, site, pairs=2 + i, seed=i)
        for i, site in enumerate(sites)
    ]
    edited = Edited(tuple(deltas))
    place = self.folder / 'adapter'
    _, lines = edited_lib.write_adapter(
        place, ours.spec, edited, base='org/base', about={'made': 'here'}
    )
    config = json.loads((place / 'adapter_config.json').read_text())
    self.assertEqual(config['r'], config['lora_alpha'])
    self.assertEqual(config['r'], 1 + len(sites))  # one for all, by zeros
    self.assertEqual(config['base_model_name_or_path'], 'org/base')
    self.assertLen(config['target_modules'], 2 * len(sites))
    self.assertEqual(config['fan_in_fan_out'], family == 'gpt2')
    kept = json.loads((place / 'jaxedit.json').read_text())
    self.assertEqual(kept, {'made': 'here'})
    self.assertIn('vLLM', lines[1])
    tensors = load_file(place / 'adapter_model.safetensors')
    modules = dict(theirs.named_modules())
    for name in config['target_modules']:
      key = f'base_model.model.{name}'
      a, b = (tensors[f'{key}.lora_{x}.weight'] for x in 'AB')
      whole = b @ a  # torch's orientation
      weight = modules[name].weight
      weight.data += torch.tensor(whole.T if family == 'gpt2' else whole)
    tokens = np.random.default_rng(0).integers(2, 90, (2, 9))
    valid = np.ones(tokens.shape, bool)
    want = hf_oracle.logits(theirs, tokens, valid)
    layout = decoder.token_layout(valid)
    run = lambda e: np.asarray(
        edited_lib.apply_model(ours.spec, ours.params, e, tokens, layout)
    )
    np.testing.assert_allclose(run(edited), want, atol=2e-4)
    self.assertGreater(np.abs(run(edited) - run(Edited())).max(), 0.05)

  @parameterized.parameters('float16', 'bfloat16')
  def test_dtype(self, dtype):
    spec = models.tiny_spec('llama')
    place = self.folder / 'adapter'
    edited_lib.write_adapter(place, spec, Edited((change(spec),)), dtype=dtype)
    for array in load_file(place / 'adapter_model.safetensors').values():
      self.assertEqual(array.dtype, jnp.dtype(dtype))

  def test_vllm_takes_some_ranks_and_families(self):
    for family, pairs, want in (
        ('llama', 9, '--max-lora-rank 16'),
        ('gptj', 2, 'no adapters of gptj; merge'),
    ):
      spec = models.tiny_spec(family)
      delta = change(spec, pairs=pairs)
      _, lines = edited_lib.write_adapter(
          self.folder / family, spec, Edited((delta,))
      )
      self.assertIn(want, lines[1])


class GgufTest(Case):

  def test_tensors_are_read_back(self):
    spec = models.tiny_spec('llama', heads=4, kv_heads=2)
    deltas = [change(spec, site) for site in (DOWN, 'attn/q', 'attn/k')]
    path = self.folder / 'edit.gguf'
    edited_lib.write_adapter(path, spec, Edited(tuple(deltas)), format='gguf')
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    self.assertEqual(field('general.architecture'), 'llama')
    self.assertEqual(field('general.type'), 'adapter')
    self.assertEqual(field('adapter.type'), 'lora')
    self.assertEqual(field('adapter.lora.alpha'), 0.0)
    found = {one.name: one.data for one in reader.tensors}
    self.assertLen(found, 12)
    for delta, name, heads in zip(
        deltas, ('ffn_down', 'attn_q', 'attn_k'), (0, 4, 2)
    ):
      for i, layer in enumerate(delta.layers):
        a, b = (found[f'blk.{layer}.{name}.weight.lora_{x}'] for x in 'ab')
        whole = b @ a
        if heads:
          whole = gguf_lib._unpermute(whole, heads)
        np.testing.assert_allclose(whole.T, algebra.full(delta)[i], atol=1e-5)

  def test_what_llama_cpp_does_not_take(self):
    spec = models.tiny_spec('gptj')
    edited = Edited((change(spec),))
    with self.assertRaisesRegex(InputError, 'no adapters of gptj; merge'):
      edited_lib.write_adapter(self.folder / 'x', spec, edited, format='gguf')
    spec = models.tiny_spec('llama')
    edited = Edited((change(spec),))
    with self.assertRaisesRegex(InputError, 'float32 or float16, not bfloat16'):
      edited_lib.write_adapter(
          self.folder / 'x', spec, edited, format='gguf', dtype='bfloat16'
      )
    with mock.patch.dict('sys.modules', {'gguf': None}):
      with self.assertRaisesRegex(InputError, 'pip install'):
        edited_lib.write_adapter(self.folder / 'x', spec, edited, format='gguf')
    self.assertEmpty(list(self.folder.iterdir()))
    place = self.folder / 'base.gguf'
    place.write_bytes(b'base')
    with self.assertRaisesRegex(InputError, 'exists already'):
      edited_lib.write_adapter(place, spec, edited, format='gguf')
    self.assertEqual(place.read_bytes(), b'base')


if __name__ == '__main__':
  absltest.main()
