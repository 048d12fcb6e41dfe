"""What the program for saved edits does with them."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import programs
from absl.testing import absltest
from safetensors.numpy import load_file

from experiments import delta as program
from jaxedit import edited as edited_lib
from jaxedit.deltas import Edited, LowRank
from jaxedit.edited import algebra
from jaxedit.edited.prompting import Fact, FactMemory
from jaxedit.models import loading

SITE = 'mlp/down'


def change(spec, seed: int) -> Edited:
  rng = np.random.default_rng(seed)
  draw = lambda width: jnp.asarray(
      0.3 * rng.standard_normal((2, 3, width)), jnp.float32
  )
  return Edited(
      (LowRank((0, 1), SITE, draw(spec.mlp_width), draw(spec.width)),)
  )


class ProductsTest(programs.Case):

  def setUp(self):
    super().setUp()
    self.setup = programs.Setup(program)
    self.addCleanup(self.setup.close)
    self.hash = self.setup.base.hash
    self.one, self.two = (change(self.setup.base.spec, i) for i in (0, 1))

  def save(self, edited, **about):
    path = self.setup.path('delta.safetensors')
    about = {'model_hash': self.hash, 'method': 'memit'} | about
    edited_lib.save(path, edited, about)
    return path

  def run_it(self, **flags):
    given = dict(compilation_cache=None, output_dir=None, model=None) | flags
    return self.setup.run(**given)

  def done(self, **flags):
    return self.succeed(self.run_it, **flags).out

  def refused(self, want, **flags):
    self.refuse(self.run_it, [want], (), **flags)

  def test_show(self):
    side = algebra.stack([self.one, self.two])
    out = self.done(delta=self.save(side, records=[4, 7], model='tiny'))
    self.assertIn(f'made by memit for tiny, model {self.hash[:12]}', out)
    self.assertIn('of 2 records', out)
    self.assertIn('2 edits side by side', out)
    self.assertIn('LowRank of mlp/down, layers 0, 1: 2x2x3x', out)
    self.assertIn('in the weights', out)

  def test_select_then_add(self):
    side = self.save(algebra.stack([self.one, self.two]), records=[4, 7])
    alone, both = (self.setup.path('x.safetensors') for _ in range(2))
    out = self.done(delta=side, do='select', edit=1, out=alone)
    self.assertIn('then select: 1', out)
    self.assertNotIn('2 records', out)
    got, about = edited_lib.load(alone, model_hash=self.hash)
    np.testing.assert_array_equal(got.deltas[0].key, self.two.deltas[0].key)
    self.assertFalse(about['independent'])
    first = self.save(self.one)
    out = self.done(delta=first, do='add', other=alone, out=both)
    self.assertIn('then add: memit of 2 records', out)
    got, _ = edited_lib.load(both)
    want = algebra.add(self.one, self.two)
    np.testing.assert_array_equal(got.deltas[0].value, want.deltas[0].value)
    self.refused('side by side are not added', delta=side, do='add',
                 other=first, out=self.setup.path('x'))  # fmt: skip
    self.refused('exists already', delta=side, do='select', edit=0, out=both)
    self.refused('from 0', delta=side, do='select', edit=2, out='x')
    self.refused('the edit is one', delta=first, do='select', edit=0, out='x')
    stranger = self.save(self.one, model_hash='ab' * 32)
    self.refused('of one unedited model', delta=first, do='add', other=stranger,
                 out='x')  # fmt: skip

  def test_forget_and_roll_back(self):
    facts = [Fact(name, f'{name} plays the', 'oboe') for name in 'abc']
    path = self.save(Edited(prompting=FactMemory(tuple(facts))))
    out = self.done(delta=path)
    self.assertIn('3 edits: a, b, c', out)
    less, last = (self.setup.path('x.safetensors') for _ in range(2))
    out = self.done(delta=path, do='forget', id='b', out=less)
    self.assertIn('2 edits: a, c', out)
    self.done(delta=less, do='roll_back', count=1, out=last)
    got, about = edited_lib.load(last)
    self.assertEqual(edited_lib.edits_in(got), ['a'])
    self.assertEqual(about['history'], [{'forget': 'b'}, {'roll_back': 1}])
    self.refused("no edit of id 'z'", delta=path, do='forget', id='z', out='x')
    sums = self.save(self.one)
    self.refused('sums', delta=sums, do='forget', id='a', out='x')

  def test_export_and_merge(self):
    side = self.save(algebra.stack([self.one, self.two]))
    adapter, folder = self.setup.path('adapter'), self.setup.path('model')
    model = dict(model=self.setup.model, delta=side)
    out = self.done(do='export', edit=1, out=adapter, **model)
    self.assertIn('layer 1 mlp/down: rank 3', out)
    self.assertIn('PeftModel.from_pretrained', out)
    kept = json.loads((adapter / 'jaxedit.json').read_text())
    self.assertEqual(kept['model_hash'], self.hash)
    tensors = load_file(adapter / 'adapter_model.safetensors')
    key = 'base_model.model.model.layers.1.mlp.down_proj.lora'
    got = tensors[f'{key}_B.weight'] @ tensors[f'{key}_A.weight']
    want = algebra.full(self.two.deltas[0])
    np.testing.assert_allclose(got.T, want[1], atol=1e-5)
    out = self.done(do='merge', edit=1, out=folder, **model)
    self.assertIn('2 tensors changed', out)
    merged = loading.load_model(folder).params['layers']['mlp']['down']
    base = self.setup.base.params['layers']['mlp']['down']['kernel']
    np.testing.assert_allclose(merged['kernel'][:2] - base[:2], want, atol=1e-5)
    place = self.setup.path('x')
    self.refused('2 edits side by side', do='export', out=place, **model)
    self.refused('exists already', do='export', edit=0, out=adapter, **model)
    self.refused('--out is missing', do='export', **model)
    self.refused('made for model', delta=side, do='export', edit=0, out=place,
                 model=self.setup.poisoned)  # fmt: skip


if __name__ == '__main__':
  absltest.main()
