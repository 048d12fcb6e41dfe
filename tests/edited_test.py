"""An edit is applied, added, stacked and reverted as it says."""

from __future__ import annotations

import edits
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.deltas import UNEDITED, Dense, Edited, LowRank
from jaxedit.edited import algebra, lm
from jaxedit.models import decoder, loading
from jaxedit.testing import models
from jaxedit.types import InputError

SPEC = models.tiny_spec('llama')
F, D = SPEC.mlp_width, SPEC.width
LAYERS, SITE = (0, 2), 'mlp/down'
run = jax.jit(lm.apply_model, static_argnums=0)


def low_rank(seed: int, rank: int = 3, layers=LAYERS, site=SITE) -> Edited:
  """A random edit that moves logits by about one."""
  rng = np.random.default_rng(seed)
  shape = dict(zip(('mlp/down', 'attn/out'), ((F, D), (D, D))))[site]
  draw = lambda size: jnp.asarray(
      rng.standard_normal((len(layers), rank, size)) / np.sqrt(size),
      jnp.float32,
  )
  return Edited(deltas=(LowRank(layers, site, draw(shape[0]), draw(shape[1])),))


def whole_block(seed: int, edits: int | None = None) -> Edited:
  """Random changes of a kernel, a bias and a scale, some of one site."""
  rng = np.random.default_rng(seed)
  lead = () if edits is None else (edits,)
  sizes = {
      ('attn/q', 'bias'): (SPEC.heads * SPEC.head_size,),
      ('attn/q', 'kernel'): (D, SPEC.heads * SPEC.head_size),
      ('mlp_norm', 'scale'): (D,),
  }
  return Edited(
      deltas=tuple(
          Dense(
              LAYERS,
              site,
              jnp.asarray(
                  0.3 * rng.standard_normal((len(LAYERS), *lead, *size)),
                  jnp.float32,
              ),
              leaf,
          )
          for (site, leaf), size in sizes.items()
      ),
      size=edits,
  )


def kernels(edited: Edited) -> list[np.ndarray]:
  return [np.asarray(edited_lib.full(d)) for d in edited.deltas]


class Base(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = models.random_params(SPEC, 0)
    tokens = np.random.default_rng(0).integers(0, SPEC.vocab, (4, 9))
    cls.tokens = jnp.asarray(tokens, jnp.int32)
    cls.layout = decoder.token_layout(np.ones((4, 9), bool))

  def logits(self, params, edited=UNEDITED, edit_ids=None):
    rest = self.tokens, self.layout
    return np.asarray(run(SPEC, params, edited, *rest, edit_ids=edit_ids))


class ApplyTest(Base):

  def test_base_is_untouched_and_shared(self):
    before = jax.tree.map(np.array, self.params)
    edited = low_rank(1)
    merged = edited_lib.apply(self.params, edited)
    for old, kept in zip(jax.tree.leaves(self.params), jax.tree.leaves(before)):
      np.testing.assert_array_equal(old, kept)
    leaves = jax.tree_util.tree_leaves_with_path(self.params)
    shared = dict(jax.tree_util.tree_leaves_with_path(merged))
    self.assertLen(shared, len(leaves))
    for path, leaf in leaves:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      self.assertEqual(shared[path] is leaf, name != 'layers/mlp/down/kernel')
    old = before['layers']['mlp']['down']['kernel']
    new = np.asarray(merged['layers']['mlp']['down']['kernel'])
    np.testing.assert_array_equal(new[1], old[1])
    change = np.einsum(
        'nmf,nmd->nfd', edited.deltas[0].key, edited.deltas[0].value
    )
    np.testing.assert_allclose(new[[0, 2]], old[[0, 2]] + change, atol=1e-6)

  def test_lazy_equals_merged(self):
    edited = low_rank(1)
    merged = self.logits(edited_lib.apply(self.params, edited))
    lazy = self.logits(self.params, edited)
    np.testing.assert_allclose(lazy, merged, atol=1e-4)
    self.assertGreater(np.abs(lazy - self.logits(self.params)).max(), 0.1)

  @parameterized.parameters('attn/out', 'mlp/down')
  def test_several_deltas(self, site):
    first, second = low_rank(1), low_rank(2, layers=(1,), site=site)
    both = Edited(deltas=first.deltas + second.deltas)
    one_by_one = edited_lib.apply(edited_lib.apply(self.params, first), second)
    merged = edited_lib.apply(self.params, both)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(one_by_one)):
      np.testing.assert_array_equal(a, b)

  def test_lazy_equals_merged_for_several_kinds(self):
    (thin,) = low_rank(1).deltas
    (wide,) = low_rank(2, layers=(1,), site='attn/out').deltas
    wide = Dense(wide.layers, wide.site, edited_lib.full(wide))
    both = Edited(deltas=(thin, wide))
    np.testing.assert_allclose(
        self.logits(self.params, both),
        self.logits(edited_lib.apply(self.params, both)),
        atol=1e-4,
    )

  def test_nothing_to_apply(self):
    self.assertIs(edited_lib.apply(self.params, Edited()), self.params)

  def test_dtype(self):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params)
    leaf = lambda p: p['layers']['mlp']['down']['kernel']
    edited = low_rank(1)
    kept = leaf(edited_lib.apply(half, edited))
    self.assertEqual(kept.dtype, jnp.bfloat16)
    exact = leaf(edited_lib.apply(half, edited, jnp.float32))
    self.assertEqual(exact.dtype, jnp.float32)
    change = exact - leaf(half).astype(jnp.float32)
    np.testing.assert_allclose(change[0], kernels(edited)[0][0], atol=1e-6)
    np.testing.assert_array_equal(kept, exact.astype(jnp.bfloat16))


class AddTest(Base):

  def test_sum(self):
    first, second = low_rank(1), low_rank(2, rank=2)
    both = edited_lib.add(first, second)
    self.assertIsInstance(both.deltas[0], LowRank)
    self.assertEqual(both.deltas[0].key.shape, (2, 5, F))
    want = kernels(first)[0] + kernels(second)[0]
    np.testing.assert_allclose(kernels(both)[0], want, atol=1e-6)
    later = edited_lib.apply(edited_lib.apply(self.params, first), second)
    once = edited_lib.apply(self.params, both)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(later)):
      np.testing.assert_allclose(a, b, atol=1e-6)

  def test_compaction(self):
    limit = algebra.rank_limit(F, D)
    self.assertLess(limit * (F + D), F * D)
    self.assertGreaterEqual((limit + 1) * (F + D), F * D)
    # The figures that the design gives for SmolLM2 and GPT-J.
    self.assertEqual(algebra.rank_limit(1536, 576), 418)
    self.assertEqual(algebra.rank_limit(16384, 4096), 3276)
    first, last = low_rank(1, rank=limit - 2), low_rank(3, rank=1)
    full = edited_lib.add(first, low_rank(2, rank=2))
    self.assertIsInstance(full.deltas[0], LowRank)
    over = edited_lib.add(full, last)
    self.assertIsInstance(over.deltas[0], Dense)
    want = kernels(full)[0] + kernels(last)[0]
    np.testing.assert_allclose(kernels(over)[0], want, atol=1e-5)
    for a, b in ((over, last), (last, over)):
      more = edited_lib.add(a, b)
      self.assertIsInstance(more.deltas[0], Dense)
      np.testing.assert_allclose(
          kernels(more)[0], want + kernels(last)[0], atol=1e-5
      )
    self.assertIs(edited_lib.compact(over.deltas[0]), over.deltas[0])

  def test_nothing_is_neutral(self):
    edited = low_rank(1)
    for both in (
        edited_lib.add(Edited(), edited),
        edited_lib.add(edited, Edited()),
    ):
      self.assertLen(both.deltas, 1)
      self.assertIs(both.deltas[0], edited.deltas[0])

  def test_other_places_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'same layers and sites'):
      edited_lib.add(low_rank(1), low_rank(2, layers=(0, 1)))
    two = Edited(
        deltas=low_rank(1).deltas + low_rank(2, site='attn/out').deltas
    )
    with self.assertRaises(ValueError):
      edited_lib.add(low_rank(1), two)

  def test_other_kinds_stand_after_changes_of_weights(self):
    draw = edits.Draw(SPEC)
    one, two = low_rank(1), low_rank(2)
    # At the site whose weights change, at another, and beside it.
    codebook, neurons, routed = (
        draw.codebook('mlp/down'), draw.neurons(), draw.routed('mlp/down')
    )  # fmt: skip
    first = Edited((codebook, *one.deltas))
    second = Edited((neurons, *two.deltas, routed))
    both = edited_lib.add(first, second)
    self.assertEqual(
        [type(d).__name__ for d in both.deltas],
        ['LowRank', 'Codebook', 'Neurons', 'Routed'],
    )
    self.assertEqual(both.deltas[0].key.shape, (2, 6, F))
    merged = edited_lib.apply(edited_lib.apply(self.params, one), two)
    rest = Edited((codebook, neurons, routed))
    want = self.logits(merged, rest)
    np.testing.assert_allclose(self.logits(self.params, both), want, atol=1e-4)
    self.assertGreater(np.abs(want - self.logits(merged)).max(), 0.1)
    for some in (edited_lib.add(rest, one), edited_lib.add(one, rest)):
      self.assertEqual(some.deltas, (*one.deltas, *rest.deltas))

  def test_the_later_codebook_sees_what_the_earlier_returns(self):
    first, second = (
        edits.Draw(SPEC, seed=seed).codebook('mlp', 'all') for seed in (0, 1)
    )
    always = second.replace(radii=jnp.full_like(second.radii, 1e3))
    never = second.replace(count=jnp.zeros_like(second.count))
    alone = lambda delta: self.logits(self.params, Edited((delta,)))
    for second, want in ((always, alone(always)), (never, alone(first))):
      both = edited_lib.add(Edited((first,)), Edited((second,)))
      np.testing.assert_array_equal(self.logits(self.params, both), want)


class RevertTest(Base):

  @parameterized.parameters('float32', 'bfloat16')
  def test_base_comes_back(self, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), self.params)
    draw = edits.Draw(SPEC)
    change = Edited(
        (draw.low_rank(), draw.dense(), draw.dense('mlp_norm', 'scale'))
    )
    for edited in (change, low_rank(1), Edited()):
      for wide in (None, jnp.float32):
        merged = edited_lib.apply(params, edited, wide)
        back = edited_lib.revert(merged, params, edited)
        for a, b in zip(
            jax.tree.leaves(back), jax.tree.leaves(params), strict=True
        ):
          self.assertIs(a, b)

  def test_another_edit_stays(self):
    first, second = low_rank(1), low_rank(2, site='attn/out')
    one = edited_lib.apply(self.params, first)
    both = edited_lib.apply(one, second)
    back = edited_lib.revert(both, self.params, second)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(one), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_nothing_was_merged_of_other_kinds(self):
    draw = edits.Draw(SPEC)
    held = (draw.neurons(), draw.codebook('block'), draw.routed())
    change = low_rank(1)
    edited = Edited((*held, *change.deltas))
    merged = edited_lib.apply(self.params, change)
    back = edited_lib.revert(merged, self.params, edited)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(self.params)):
      self.assertIs(a, b)


class StackTest(Base):

  def test_every_row_is_a_model_of_its_own(self):
    edits = [low_rank(seed) for seed in range(4)]
    stacked = edited_lib.stack(edits)
    self.assertEqual(stacked.size, 4)
    self.assertEqual(stacked.deltas[0].key.shape, (2, 4, 3, F))
    edit_ids = np.array([3, 0, 3, 1])
    got = self.logits(self.params, stacked, edit_ids)
    for row, edit in enumerate(edit_ids):
      merged = self.logits(edited_lib.apply(self.params, edits[edit]))
      np.testing.assert_allclose(got[row], merged[row], atol=1e-4)

  def test_select(self):
    edits = [low_rank(seed) for seed in range(4)]
    stacked = edited_lib.stack(edits)
    got = edited_lib.select(stacked, 2)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(edits[2])):
      np.testing.assert_array_equal(a, b)
    self.assertEqual(got.deltas[0].layers, LAYERS)
    self.assertIsNone(got.size)
    for edited, index in ((stacked, 4), (stacked, -1), (got, 0)):
      with self.assertRaisesRegex(InputError, 'side by side'):
        edited_lib.select(edited, index)

  def test_ranks_are_padded(self):
    first, second = low_rank(1, rank=1), low_rank(2, rank=4)
    stacked = edited_lib.stack([first, second])
    self.assertEqual(stacked.deltas[0].key.shape, (2, 2, 4, F))
    for i, edited in enumerate((first, second)):
      got = kernels(edited_lib.select(stacked, i))
      np.testing.assert_allclose(got, kernels(edited), atol=1e-6)


class LeafTest(parameterized.TestCase):
  """Changes of parameters other than kernels."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.spec = models.tiny_spec('qwen2')
    cls.params = models.random_params(cls.spec, 0)
    tokens = np.random.default_rng(0).integers(0, cls.spec.vocab, (4, 9))
    layout = decoder.token_layout(np.ones((4, 9), bool))
    cls.rest = jnp.asarray(tokens, jnp.int32), layout

  def logits(self, params, edited=UNEDITED, **edit_ids):
    return np.asarray(run(self.spec, params, edited, *self.rest, **edit_ids))

  def test_apply(self):
    edited = whole_block(1)
    before = jax.tree.map(np.array, self.params)
    merged = edited_lib.apply(self.params, edited)
    for old, kept in zip(jax.tree.leaves(self.params), jax.tree.leaves(before)):
      np.testing.assert_array_equal(old, kept)
    self.assertEqual(
        [algebra.path(d) for d in edited.deltas],
        [
            'layers/attn/q/bias',
            'layers/attn/q/kernel',
            'layers/mlp_norm/scale',
        ],
    )
    for delta in edited.deltas:
      old, new = (
          np.asarray(loading.get_leaf(p, algebra.path(delta)))
          for p in (before, merged)
      )
      np.testing.assert_array_equal(new[1], old[1])
      np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]] + delta.value)

  def test_lazy_equals_merged(self):
    edited = whole_block(1)
    merged = self.logits(edited_lib.apply(self.params, edited))
    np.testing.assert_allclose(
        self.logits(self.params, edited), merged, atol=1e-4
    )
    base = self.logits(self.params)
    for delta in edited.deltas:
      part = self.logits(self.params, Edited(deltas=(delta,)))
      self.assertGreater(np.abs(part - base).max(), 0.05)

  def test_generation(self):
    edited = whole_block(1)
    prompts, settings = [[3, 4, 5]], {'max_new_tokens': 6}
    merged = edited_lib.apply(self.params, edited)
    models_ = [models.as_model(self.spec, p) for p in (self.params, merged)]
    self.assertEqual(
        lm.open_model(models_[0], edited).generate(prompts, **settings),
        lm.open_model(models_[1]).generate(prompts, **settings),
    )

  def test_small_changes_are_not_rounded(self):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params)
    tiny = Dense((0,), 'mlp_norm', jnp.full((1, D), 1e-5), 'scale')
    params, kernels_left = lm.enter(half, (tiny,))
    scale = params['layers']['mlp_norm']['scale']
    self.assertEmpty(kernels_left)
    old = half['layers']['mlp_norm']['scale'].astype(jnp.float32)
    np.testing.assert_allclose((scale - old)[0], 1e-5, rtol=0.05)

  def test_sum(self):
    first, second = whole_block(1), whole_block(2)
    second = Edited(deltas=second.deltas[::-1])  # places count, not the order
    both = edited_lib.add(first, second)
    later = edited_lib.apply(edited_lib.apply(self.params, first), second)
    once = edited_lib.apply(self.params, both)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(later)):
      np.testing.assert_allclose(a, b, atol=1e-6)
    self.assertEqual([d.leaf for d in both.deltas], ['bias', 'kernel', 'scale'])
    bias, kernel, _ = first.deltas
    with self.assertRaisesRegex(ValueError, 'biases to biases'):
      edited_lib.add(Edited(deltas=(bias,)), Edited(deltas=(kernel,)))

  def test_side_by_side(self):
    edits = [whole_block(seed) for seed in range(3)]
    stacked = edited_lib.stack(edits)
    for a, b in zip(
        jax.tree.leaves(edited_lib.select(stacked, 1)),
        jax.tree.leaves(edits[1]),
    ):
      np.testing.assert_array_equal(a, b)
    self.assertEqual([d.value.shape[1] for d in stacked.deltas], [3, 3, 3])
    for refuse in (
        lambda: edited_lib.apply(self.params, stacked),
        lambda: self.logits(self.params, stacked),
        # A bias is merged, so that sequences cannot differ in it.
        lambda: self.logits(self.params, stacked, edit_ids=np.array([2, 0])),
    ):
      with self.assertRaisesRegex(ValueError, 'side by side'):
        refuse()

  def test_compact(self):
    for delta in whole_block(1).deltas:
      self.assertIs(edited_lib.compact(delta), delta)
      self.assertIs(edited_lib.full(delta), delta.value)


if __name__ == '__main__':
  absltest.main()
