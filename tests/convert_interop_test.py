"""Trees of other JAX code become canonical parameters and go back."""

from __future__ import annotations

import pathlib
import tempfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxedit.convert import interop
from jaxedit.models import families, tensors
from jaxedit.testing import models as tiny
from jaxedit.types import InputError


def _equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


class _TunixLayer(nnx.Module):
  """A block with the names and shapes of tunix's Llama."""

  def __init__(self, layer):
    for name, value in layer.items():
      if isinstance(value, dict):
        setattr(self, name, _TunixLayer(value))
      else:
        setattr(self, name, nnx.Param(jnp.asarray(value)))


class _TunixModel(nnx.Module):

  def __init__(self, tree):
    tree = dict(tree)
    layers = tree.pop('layers')
    self.layers = nnx.List(
        [_TunixLayer(layers[str(i)]) for i in range(len(layers))]
    )
    for name, value in tree.items():
      setattr(self, name, _TunixLayer(value))


class HfFlaxTest(parameterized.TestCase):

  @parameterized.parameters(*tiny.FAMILIES, *tiny.ENCODER_DECODERS)
  def test_round_trip(self, family):
    spec = tiny.tiny_spec(family)
    params = tiny.random_params(spec, 0)
    tree = interop.to_hf_flax(params, spec)
    _equal(interop.from_hf_flax(tree, spec), params)
    _equal(interop.from_hf_flax({'params': tree}, spec), params)
    if family == 't5':  # tables are embeddings there
      bias = tree['encoder']['block']['0']['layer']['0']['SelfAttention']
      self.assertIn('embedding', bias['relative_attention_bias'])

  def test_gptj_names_and_layout(self):
    spec = tiny.tiny_spec('gptj')
    params = tiny.random_params(spec, 0)
    tree = interop.to_hf_flax(params, spec)
    block = tree['transformer']['h']['1']
    self.assertCountEqual(tree, ['transformer', 'lm_head'])
    self.assertCountEqual(tree['transformer'], ['wte', 'h', 'ln_f'])
    self.assertCountEqual(block, ['ln_1', 'attn', 'mlp'])
    self.assertCountEqual(tree['lm_head'], ['kernel', 'bias'])
    self.assertCountEqual(block['ln_1'], ['scale', 'bias'])
    np.testing.assert_array_equal(  # [in, out] as it is
        block['mlp']['fc_out']['kernel'],
        params['layers']['mlp']['down']['kernel'][1],
    )
    np.testing.assert_array_equal(
        tree['transformer']['wte']['embedding'], params['embed']['embedding']
    )

  def test_gpt2_conv_kernels_are_turned_round(self):
    spec = tiny.tiny_spec('gpt2')
    params = tiny.random_params(spec, 0)
    block = interop.to_hf_flax(params, spec)['transformer']['h']['2']
    attn = params['layers']['attn']
    np.testing.assert_array_equal(
        block['attn']['c_attn']['kernel'],  # [3 * D, D]
        np.concatenate([attn[n]['kernel'][2].T for n in 'qkv']),
    )
    np.testing.assert_array_equal(
        block['mlp']['c_fc']['kernel'],
        params['layers']['mlp']['up']['kernel'][2].T,
    )

  def test_llama_norms_say_weight(self):
    spec = tiny.tiny_spec('llama')
    tree = interop.to_hf_flax(tiny.random_params(spec, 0), spec)
    self.assertCountEqual(tree['model']['norm'], ['weight'])
    layer = tree['model']['layers']['0']
    self.assertCountEqual(layer['input_layernorm'], ['weight'])
    self.assertCountEqual(layer['self_attn']['q_proj'], ['kernel'])

  def test_msgpack_and_base_model(self):
    spec = tiny.tiny_spec('gpt2')
    params = tiny.random_params(spec, 0)
    tree = interop.to_hf_flax(params, spec)['transformer']
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'flax_model.msgpack'
    data = flax.serialization.msgpack_serialize(tree)
    path.write_bytes(data)
    _equal(interop.load_hf_flax_msgpack(path, spec), params)
    half = interop.load_hf_flax_msgpack(path, spec, 'bfloat16')
    self.assertEqual(half['embed']['embedding'].dtype, jnp.bfloat16)
    path.write_bytes(data[:-100])
    with self.assertRaisesRegex(InputError, 'damaged'):
      interop.load_hf_flax_msgpack(path, spec)
    path.write_bytes(b'\x01')
    with self.assertRaisesRegex(InputError, 'does not hold a tree'):
      interop.load_hf_flax_msgpack(path, spec)
    with self.assertRaisesRegex(InputError, 'no such file'):
      interop.load_hf_flax_msgpack(path.with_name('absent'), spec)

  def test_faults_come_together(self):
    spec = tiny.tiny_spec('gptj')
    tree = interop.to_hf_flax(tiny.random_params(spec, 0), spec)
    tree['extra'] = {'kernel': np.ones(3)}
    del tree['lm_head']['bias']
    block = tree['transformer']['h']['0']
    block['mlp']['fc_in']['kernel'] = block['mlp']['fc_in']['kernel'].T
    with self.assertRaises(InputError) as caught:
      interop.from_hf_flax(tree, spec)
    self.assertLen(caught.exception.problems, 3)

  @parameterized.parameters(*tiny.FAMILIES)
  def test_forms_invert(self, family):
    spec = tiny.tiny_spec(family)
    table = families.get(family).TENSORS
    rng = np.random.default_rng(0)
    for name, slots in tensors.upstream_slots(spec, table).items():
      value = rng.standard_normal(tensors.upstream_shape(slots[0]))
      parts = [tensors.to_canonical(value, s.source, spec.heads) for s in slots]
      for slot, part in zip(slots, parts):
        self.assertEqual(part.shape, slot.shape)
      back = tensors.to_upstream(parts, slots[0].source, spec.heads)
      np.testing.assert_array_equal(back, value, err_msg=name)


class NestedTest(parameterized.TestCase):

  def _like(self, spec):
    """Shapes of tunix's tree: the heads have an axis of their own."""
    heads, size, width = spec.heads, spec.head_size, spec.width
    shapes = {
        'q_proj': (width, heads, size),
        'k_proj': (width, spec.kv_heads, size),
        'v_proj': (width, spec.kv_heads, size),
        'o_proj': (heads, size, width),
    }
    flat = interop.flatten(
        interop.to_nested(
            tiny.random_params(spec, 1), spec, interop.TUNIX_LLAMA
        )
    )
    for name in flat:
      part = name.split('.')[-2]
      if part in shapes:
        flat[name] = np.zeros(shapes[part])
    return interop.unflatten(flat)

  def test_nnx_round_trip(self):
    spec = tiny.tiny_spec('llama')
    params = tiny.random_params(spec, 0)
    names = interop.TUNIX_LLAMA
    tree = interop.to_nested(params, spec, names, like=self._like(spec))
    query = tree['layers']['1']['attn']['q_proj']['w']
    self.assertEqual(query.shape, (32, 4, 8))
    _equal(interop.from_nested(tree, spec, names), params)
    state = nnx.state(_TunixModel(tree))
    _equal(interop.from_nested(state, spec, names), params)
    _equal(interop.from_nested(nnx.to_pure_dict(state), spec, names), params)

  def test_lists_and_plain_kernels(self):
    spec = tiny.tiny_spec('gptj')
    params = tiny.random_params(spec, 0)
    names = {
        path: path.replace('layers/', 'blocks/{}/').replace('/', '.')
        for path in families.get('gptj').TENSORS
    }
    tree = interop.to_nested(params, spec, names)
    tree['blocks'] = [tree['blocks'][str(i)] for i in range(spec.layers)]
    _equal(interop.from_nested(tree, spec, names), params)

  def test_faults_come_together(self):
    spec = tiny.tiny_spec('llama')
    names = interop.TUNIX_LLAMA
    tree = interop.to_nested(tiny.random_params(spec, 0), spec, names)
    mlp = tree['layers']['0']['mlp']
    mlp['up_proj']['kernel'] = mlp['up_proj']['kernel'].T
    del tree['final_norm']
    tree['rotary'] = np.ones(3)
    with self.assertRaises(InputError) as caught:
      interop.from_nested(tree, spec, names)
    self.assertLen(caught.exception.problems, 3)
    with self.assertRaisesRegex(InputError, 'no row for head/bias'):
      interop.from_nested(tree, tiny.tiny_spec('llama', head_bias=True), names)
    with self.assertRaisesRegex(InputError, 'cannot become'):
      interop.to_nested(
          tiny.random_params(spec, 0), spec, names, like={'a': np.ones(2)}
      )


if __name__ == '__main__':
  absltest.main()
