"""Edits are listed, forgotten by id and rolled back, and files keep who is who."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import editors
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import Codebook, Edited, LowRank, Neurons, Routed
from jaxedit.edited import edits_in, forget, roll_back
from jaxedit.edited.codebook import Entry, label_of, no_history
from jaxedit.edited.ledger import Ledger, of_groups
from jaxedit.edited.prompting import Fact, FactMemory
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.registry import METHODS
from jaxedit.models import loading
from jaxedit.runs.editing import _packed, _unpacked
from jaxedit.testing import facts, models
from jaxedit.types import EditRequest, InputError

SPEC = models.tiny_spec('llama')
A, B = (3, 4), (4, 3)
# (key, target): b splits a's radius, c overwrites a's entry, d widens far's.
STREAM = {'a': (0, A), 'b': (1, B), 'c': (0, B), 'far': (9, A), 'd': (9.5, A)}


def codebook(*names: str) -> Edited:
  """A codebook of some of the stream, with its ledger."""
  entries = [
      Entry(
          np.array([STREAM[name][0], 0.0]),
          np.array([float(ord(name[0]))]),
          label_of(STREAM[name][1]),
      )
      for name in names
  ]
  history = no_history(2, 1, np.float64).added(entries, 0.8)
  book = history.book(8)
  lead = lambda x: jnp.asarray(x)[None]
  delta = Codebook(
      (1,), 'mlp', *map(lead, (book.keys, book.values, book.radii, book.count))
  )
  names = tuple((name,) for name in names)
  return Edited((delta,), ledger=Ledger(names, history=history))


def assert_same(one: Edited, other: Edited) -> None:
  jax.tree.map(np.testing.assert_array_equal, one, other)


class CodebookTest(parameterized.TestCase):

  def test_a_history_is_entered_like_a_stream(self):
    whole = codebook(*STREAM)
    (delta,) = whole.deltas
    self.assertEqual(int(delta.count[0]), 3)
    np.testing.assert_allclose(delta.radii[0, :3], [0.49999, 0.5, 0.8])
    self.assertEqual(float(delta.values[0, 0, 0]), ord('c'))

  @parameterized.parameters(*STREAM)
  def test_forgotten_is_as_if_never_made(self, name):
    left = [one for one in STREAM if one != name]
    found = forget(codebook(*STREAM), name)
    assert_same(found, codebook(*left))
    self.assertEqual(edits_in(found), left)
    self.assertEqual(found.ledger.forgotten, (name,))

  def test_rolled_back(self):
    names = list(STREAM)
    for count in range(1, 5):
      found = roll_back(codebook(*names), count)
      assert_same(found, codebook(*names[:-count]))
    self.assertEqual(roll_back(codebook(*names), 5), Edited())
    assert_same(roll_back(codebook(*names), 0), codebook(*names))

  def test_file(self):
    found = forget(codebook(*STREAM), 'b')
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'delta.safetensors'
      edited_lib.save(path, found, {'model_hash': 'ab', 'method': 'grace'})
      loaded, metadata = edited_lib.load(path)
    self.assertEqual(metadata['method'], 'grace')
    self.assertEqual(loaded.ledger.forgotten, ('b',))
    self.assertEqual(edits_in(loaded), ['a', 'c', 'far', 'd'])
    assert_same(forget(loaded, 'c'), codebook('a', 'far', 'd'))


class RowsTest(parameterized.TestCase):

  def neurons(self) -> Edited:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(1, 8, *shape)))
    delta = Neurons((2,), 'mlp', draw(4), draw(), draw(4), 'relu')
    groups = [[['a'], 0, 2], [['b', 'c'], 2, 5], [['a'], 5, 6]]
    return Edited((delta,), ledger=of_groups(groups))

  def test_neurons_of_an_edit_go_with_it(self):
    edited = self.neurons()
    self.assertEqual(edits_in(edited), ['a', 'b', 'c', 'a'])
    (delta,) = forget(edited, 'a').deltas
    for name in ('key', 'bias', 'value'):
      old, new = getattr(edited.deltas[0], name), getattr(delta, name)
      self.assertFalse(new[0, [0, 1, 5]].any())
      np.testing.assert_array_equal(new[0, 2:5], old[0, 2:5])
    # The last alone: `a` as it was first.
    (delta,) = roll_back(edited, 1).deltas
    self.assertFalse(delta.value[0, 5].any())
    self.assertTrue(delta.value[0, :5].any(-1).all())

  def test_what_was_trained_together_goes_together(self):
    edited = self.neurons()
    with self.assertRaisesRegex(InputError, "2 edits were .*'c' shall stay"):
      forget(edited, 'b')
    with self.assertRaisesRegex(InputError, "'b' shall stay: all of a part"):
      roll_back(edited, 2)
    self.assertEqual(edits_in(roll_back(edited, 3)), ['a'])

  def test_a_shard_of_one_edit(self):
    shards = jnp.ones((1, 4, 3, 2))
    delta = Routed((1,), 'mlp/down', shards, jnp.ones((1, 4)))
    groups = [[['a'], 0, 1], [['b', 'c'], 1, 2]]
    edited = Edited((delta,), ledger=of_groups(groups))
    (left,) = forget(edited, 'a').deltas
    self.assertFalse(left.shards[0, 0].any())
    np.testing.assert_array_equal(left.thresholds[0], [np.inf, 1, 1, 1])
    with self.assertRaisesRegex(InputError, 'edit alone what may have to be'):
      forget(edited, 'c')


class OtherTest(absltest.TestCase):

  def test_a_memory(self):
    facts_ = [Fact(name, name, name) for name in 'abca']
    edited = Edited(prompting=FactMemory(tuple(facts_)))
    self.assertEqual(edits_in(edited), ['a', 'b', 'c', 'a'])
    self.assertEqual(edits_in(forget(edited, 'a')), ['b', 'c'])
    self.assertEqual(edits_in(roll_back(edited, 1)), ['a', 'b', 'c'])
    self.assertEqual(roll_back(edited, 4), Edited())

  def test_refused(self):
    ones = jnp.ones((1, 1, 2))
    weights = Edited((LowRank((0,), 'mlp/down', ones, ones),))
    for edited, words in (
        (weights, 'LowRank.* does not say which .* are sums'),
        (dataclasses.replace(weights, size=1), 'select one of them'),
    ):
      for call in (edits_in, lambda e: forget(e, 'a')):
        with self.assertRaisesRegex(InputError, words):
          call(edited)
    with self.assertRaisesRegex(InputError, "no edit of id 'x'; .* are a, c"):
      forget(codebook('a', 'c'), 'x')
    with self.assertRaisesRegex(InputError, '3 edits shall be .* there are 2'):
      roll_back(codebook('a', 'c'), 3)
    self.assertEqual(edits_in(Edited()), [])

  def test_added_beside_weights(self):
    ones = jnp.ones((1, 1, 2))
    weights = Edited((LowRank((0,), 'mlp/down', ones, ones),))
    both = edited_lib.add(weights, codebook('a', 'far'))
    left = forget(both, 'a')
    self.assertLen(left.deltas, 2)
    assert_same(left, edited_lib.add(weights, codebook('far')))
    twice = edited_lib.add(both, codebook('c'))
    self.assertIsNone(twice.ledger)

  def test_all_ledgers_are_one_to_compiled_code(self):
    count = jax.jit(lambda edited: edited.deltas[0].count)
    count(codebook('a', 'c'))
    count(codebook('a', 'far'))
    self.assertEqual(count._cache_size(), 1)


class MethodTest(parameterized.TestCase):
  """What editors note, batch after batch, through a checkpoint."""

  @parameterized.parameters(
      ('grace', {}),
      ('t_patcher', {}),
      ('calinet', {}),
      ('wise', {'save_every': 1, 'merge_shards': 0, 'shards': 4}),
  )
  def test_a_sequence_is_rolled_back(self, name, settings):
    method = METHODS[name]
    small = dict(method.small) | settings
    if name == 'grace':
      small |= {'layers': (1,), 'value_steps': 3}
    editor = method.editor(SPEC, method.configure(**small))
    model = loading.Model(
        SPEC, models.random_params(SPEC, 0), pathlib.Path(), 'ab' * 32, {}
    )
    start = editor.init(model, editors.resources(editor, SPEC))
    edits = facts.random_edits(
        4, seed=1, contexts=2 if method.contexts else 1, targets=(3,), kl=False
    )
    if not method.contexts:
      last = lambda edit: (len(edit.rows[0]) - 1,)
      edits = [dataclasses.replace(e, anchors=last(e)) for e in edits]
    plan = plan_lib.plan_shapes(edits, slots=4, batch=4)
    ask = lambda i: EditRequest(i, f'id{i}', '{} is', f'S{i}', 'x')
    state, made, infos = start, [], []
    for some in ((0, 1), (2, 3)):
      batch = EditBatch(
          [edits[i] for i in some], plan, None, [ask(i) for i in some]
      )
      result = editor.edit(model, state, batch, Run())
      self.assertTrue(result.info.written.all())
      infos.append(result.info)
      arrays, record = _packed(Edited(), result.state, start, infos)
      _, state, _ = _unpacked(arrays, record, start)
      made.append(result.edited)
    first, both = made
    self.assertEqual(edits_in(both), ['id0', 'id1', 'id2', 'id3'])
    found = roll_back(both, 2)
    self.assertEqual(edits_in(found), edits_in(first))
    (delta,), (want,) = found.deltas, first.deltas
    if name == 'wise':  # an edit has as many shards as it uses
      delta = jax.tree.map(lambda x: x[:, :2], delta)
    jax.tree.map(np.testing.assert_array_equal, delta, want)
    if name == 'calinet':
      with self.assertRaisesRegex(InputError, 'were trained together'):
        forget(both, 'id1')
      return
    left = forget(both, 'id1')
    self.assertEqual(edits_in(left), ['id0', 'id2', 'id3'])
    edited_lib.open_model(model, left).score([])


if __name__ == '__main__':
  absltest.main()
