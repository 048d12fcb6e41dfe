"""Edited models are written as upstream's folders and can be undone."""

from __future__ import annotations

import json
import pathlib
import tempfile

import hf_oracle
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from absl.testing import absltest, parameterized

from jaxedit.models import families, loading, saving, tensors
from jaxedit.types import InputError

DOWN = 'layers/mlp/down/kernel'


def _change(model, pairs, size=0.5, seed=3):
  """Adds noise to some (path, layer) and returns the new params."""
  rng = np.random.default_rng(seed)
  flat = {}
  for path, layer in pairs:
    leaf = flat.get(path, loading.get_leaf(model.params, path))
    where = leaf if layer is None else leaf[layer]
    new = where + size * jnp.asarray(rng.standard_normal(where.shape))
    new = new.astype(leaf.dtype)
    flat[path] = new if layer is None else leaf.at[layer].set(new)
  params = _copy(model.params)
  for path, leaf in flat.items():
    node = params
    *parents, last = path.split('/')
    for parent in parents:
      node = node[parent]
    node[last] = leaf
  return params


def _copy(tree):
  if not isinstance(tree, dict):
    return tree
  return {key: _copy(value) for key, value in tree.items()}


def _bytes(folder) -> dict[str, bytes]:
  return {
      path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()
  }


class SavingTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    root = self.enterContext(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(root)

  def _model(self, family, half=False, changes=(), **options):
    oracle = hf_oracle.make(family, **dict(changes))
    folder = self.root / 'source'
    hf_oracle.save(oracle.bfloat16() if half else oracle, folder, **options)
    (folder / 'tokenizer.json').write_text('{"version": "1.0"}')
    (folder / 'chat_template.jinja').write_text('{{ messages }}')
    (folder / 'training_args.bin').write_bytes(b'pickle')
    return folder, loading.load_model(folder)

  @parameterized.product(family=hf_oracle.FAMILIES, sharded=[False, True])
  def test_transformers_reads_the_edited_model(self, family, sharded):
    options = {'max_shard_size': '40KB'} if sharded else {}
    folder, model = self._model(family, **options)
    pairs = {(DOWN, 1), ('layers/attn/v/kernel', 2), ('final_norm/scale', None)}
    params = _change(model, sorted(pairs, key=str))
    out = self.root / 'out'
    report = saving.save_model(
        folder, out, model.spec, params,
        changed={p if layer is None else (p, layer) for p, layer in pairs},
    )  # fmt: skip
    self.assertLen(report.tensors, 3)
    self.assertEqual(report.merge_error, 0.0)
    again = loading.load_model(out)
    state = hf_oracle.state(folder)
    table = families.get(family).TENSORS
    for name, slots in tensors.upstream_slots(model.spec, table).items():
      parts = [loading.get_leaf(params, slot.path) for slot in slots]
      parts = [
          np.asarray(part if slot.layer is None else part[slot.layer])
          for part, slot in zip(parts, slots)
      ]
      state[name] = tensors.to_upstream(
          parts, slots[0].source, model.spec.heads
      )
    for name, value in hf_oracle.state(out).items():
      np.testing.assert_array_equal(value, state[name], err_msg=name)
    self.assertNotEqual(again.hash, model.hash)
    # What transformers computes from the folder is what it computes from a
    # model whose weights were set by hand.
    tokens = np.random.default_rng(1).integers(0, 97, (2, 12))
    valid = np.ones(tokens.shape, bool)
    by_hand = self.root / 'by_hand'
    hf_oracle.save(hf_oracle.load(folder), by_hand)
    safetensors.torch.save_file(
        {name: torch.tensor(np.array(value)) for name, value in state.items()},
        by_hand / 'model.safetensors',
        {'format': 'pt'},
    )
    (by_hand / 'model.safetensors.index.json').unlink(missing_ok=True)
    want = hf_oracle.logits(hf_oracle.load(by_hand), tokens, valid)
    before = hf_oracle.logits(hf_oracle.load(folder), tokens, valid)
    got = hf_oracle.logits(hf_oracle.load(out), tokens, valid)
    np.testing.assert_array_equal(got, want)
    self.assertGreater(np.abs(got - before).max(), 0.05)

  def test_no_change_is_a_copy(self):
    folder, model = self._model('gpt2', max_shard_size='40KB')
    report = saving.save_model(
        folder, self.root / 'out', model.spec, model.params, changed=()
    )
    self.assertEmpty(report.tensors)
    want = _bytes(folder)
    del want['training_args.bin']
    self.assertEqual(_bytes(self.root / 'out'), want)

  @parameterized.parameters(False, True)
  def test_restore_is_bit_exact(self, sharded):
    options = {'max_shard_size': '20KB'} if sharded else {}
    folder, model = self._model('gpt_neox', half=True, **options)
    pairs = [(DOWN, 0), ('layers/attn/q/kernel', 1)]
    edited = self.root / 'edited'
    saving.save_model(
        folder, edited, model.spec, _change(model, pairs), changed=set(pairs),
        keep_original=True, dtype='float32', extra_metadata={'edit': 'x'},
    )  # fmt: skip
    self.assertNotEqual(loading.load_model(edited).hash, model.hash)
    names = saving.restore(edited, self.root / 'restored')
    self.assertLen(names, 2)
    want = _bytes(folder)
    del want['training_args.bin']
    self.assertEqual(_bytes(self.root / 'restored'), want)

  def test_restore_refusals(self):
    folder, model = self._model('llama')
    plain = self.root / 'plain'
    params = _change(model, [(DOWN, 0)])
    saving.save_model(folder, plain, model.spec, params, changed={(DOWN, 0)})
    with self.assertRaisesRegex(InputError, 'without original.safetensors'):
      saving.restore(plain, self.root / 'restored')
    with self.assertRaisesRegex(InputError, 'no such folder'):
      saving.restore(self.root / 'absent', self.root / 'restored')
    kept = self.root / 'kept'
    saving.save_model(
        folder, kept, model.spec, params, changed={(DOWN, 0)},
        keep_original=True,
    )  # fmt: skip
    original = kept / 'original.safetensors'
    for path in (original, kept / 'model.safetensors'):
      whole = path.read_bytes()
      path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
      with self.assertRaisesRegex(InputError, 'is damaged; fetch'):
        saving.restore(kept, self.root / 'restored')
      path.write_bytes(whole)
    whole = original.read_bytes()
    for header in ('{', '[]', '{"a": 1}', '{"a": {"shape": 1}}'):
      metadata = {'header:model.safetensors': header}
      safetensors.torch.save_file({'x': torch.ones(1)}, original, metadata)
      with self.assertRaisesRegex(InputError, 'damaged'):
        saving.restore(kept, self.root / 'restored')
    original.write_bytes(whole)
    state = safetensors.torch.load_file(kept / 'model.safetensors')
    state['model.norm.weight'] = torch.ones(7)
    safetensors.torch.save_file(state, kept / 'model.safetensors')
    with self.assertRaisesRegex(InputError, 'do not belong together'):
      saving.restore(kept, self.root / 'restored')
    self.assertFalse((self.root / 'restored').exists())

  def test_rounding_report(self):
    folder, model = self._model('llama', half=True)
    pairs = [(DOWN, 1)]
    params = _change(model, pairs, size=1e-3)
    report = saving.save_model(
        folder, self.root / 'half', model.spec, params, changed=set(pairs)
    )
    name = 'model.layers.1.mlp.down_proj.weight'
    one = report.tensors[name]
    old = np.asarray(model.params['layers']['mlp']['down']['kernel'][1], float)
    new = np.asarray(params['layers']['mlp']['down']['kernel'][1], float)
    cast = np.asarray(jnp.asarray(new, jnp.bfloat16), float)
    norm = np.linalg.norm
    error = norm(cast - new)
    self.assertEqual(one.dtype, 'BF16')
    np.testing.assert_allclose(one.change, norm(new - old), rtol=1e-12)
    np.testing.assert_allclose(one.cast_error, error / norm(new), rtol=1e-12)
    np.testing.assert_allclose(
        one.merge_error, error / norm(new - old), rtol=1e-12
    )
    self.assertGreater(one.merge_error, 0.1)
    self.assertEqual(report.merge_error, one.merge_error)
    wide = saving.save_model(
        folder, self.root / 'wide', model.spec, params, changed=set(pairs),
        dtype='float32',
    )  # fmt: skip
    self.assertEqual(wide.tensors[name].dtype, 'F32')
    self.assertEqual(wide.merge_error, 0.0)
    again = loading.load_model(self.root / 'wide')
    np.testing.assert_array_equal(
        again.params['layers']['mlp']['down']['kernel'],
        params['layers']['mlp']['down']['kernel'],
    )
    oracle = hf_oracle.load(self.root / 'wide')
    np.testing.assert_array_equal(
        oracle.model.layers[1].mlp.down_proj.weight.detach().numpy().T, new
    )

  def test_float32_index_and_metadata(self):
    folder, model = self._model('gpt2', half=True, max_shard_size='20KB')
    pairs = [(DOWN, 0)]
    out = self.root / 'out'
    saving.save_model(
        folder, out, model.spec, _change(model, pairs), changed=set(pairs),
        dtype='float32', extra_metadata={'method': 'rome'},
    )  # fmt: skip
    index = json.loads((out / 'model.safetensors.index.json').read_text())
    sizes = sum(
        value.nbytes
        for path in out.glob('model-*.safetensors')
        for value in safetensors.torch.load_file(path).values()
    )
    self.assertEqual(index['metadata']['total_size'], sizes)
    shard = index['weight_map']['transformer.h.0.mlp.c_proj.weight']
    with safetensors.safe_open(out / shard, 'pt') as file:
      self.assertEqual(file.metadata(), {'format': 'pt', 'method': 'rome'})
    for other in set(index['weight_map'].values()) - {shard}:
      self.assertEqual(
          (out / other).read_bytes(), (folder / other).read_bytes()
      )

  def test_stored_copy_of_a_tied_head_follows(self):
    folder, model = self._model('gpt2')
    path = folder / 'model.safetensors'
    state = safetensors.torch.load_file(path)
    state['lm_head.weight'] = state['transformer.wte.weight'].clone()
    safetensors.torch.save_file(state, path, {'format': 'pt'})
    params = _change(model, [('embed/embedding', None)])
    out = self.root / 'out'
    report = saving.save_model(
        folder, out, model.spec, params, changed={'embed/embedding'}
    )
    self.assertLen(report.tensors, 2)
    again = loading.load_model(out)
    np.testing.assert_array_equal(
        again.params['embed']['embedding'], params['embed']['embedding']
    )

  def test_fused_parts_keep_the_sources_values(self):
    folder, wide = self._model('gpt2')
    # The params are rounded, the source is not: only what changed may differ.
    model = loading.load_model(folder, 'bfloat16')
    params = _change(model, [('layers/attn/k/kernel', 1)])
    out = self.root / 'out'
    saving.save_model(
        folder, out, model.spec, params, changed={('layers/attn/k/kernel', 1)}
    )
    again = loading.load_model(out).params['layers']['attn']
    before = wide.params['layers']['attn']
    np.testing.assert_array_equal(again['q']['kernel'], before['q']['kernel'])
    np.testing.assert_array_equal(
        again['k']['kernel'][0], before['k']['kernel'][0]
    )
    np.testing.assert_array_equal(
        again['k']['kernel'][1], params['layers']['attn']['k']['kernel'][1]
    )

  def test_refusals_leave_nothing_behind(self):
    folder, model = self._model('llama')
    out = self.root / 'out'

    def fails(words, params=model.params, changed=((DOWN, 0),), **options):
      with self.assertRaisesRegex(InputError, words):
        spec = options.pop('spec', model.spec)
        saving.save_model(
            folder, options.pop('out', out), spec, params, changed=changed,
            **options,
        )  # fmt: skip
      self.assertEqual([path.name for path in self.root.iterdir()], ['source'])

    fails("no leaf 'mlp/down'", changed=['mlp/down'])
    fails('has no layer 3', changed=[(DOWN, 3)])
    fails('not stacked', changed=[('final_norm/scale', 0)])
    fails('float16', dtype='float16')
    fails('strings alone', extra_metadata={'edits': 3})
    fails(
        'another architecture',
        spec=families.spec_from_hf(dict(model.config, rms_norm_eps=1.0)),
    )
    fails('not an empty folder', out=folder)
    fails('not finite', params=_change(model, [(DOWN, 0)], size=float('inf')))
    fails('do not fit', params={
        **model.params, 'final_norm': {'scale': jnp.ones(5)},
    }, changed=['final_norm/scale'])  # fmt: skip


if __name__ == '__main__':
  absltest.main()
