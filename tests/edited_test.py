"""A delta is applied, added, stacked, saved and refused as it says."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import tempfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
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


class FileTest(Base):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.path = self.folder / 'delta.safetensors'
    self.metadata = {'model_hash': 'ab' * 32, 'method': 'memit', 'n': [1, 2]}

  def _save(self, edited):
    edited_lib.save(self.path, edited, self.metadata)

  def test_round_trip(self):
    dense = Dense(LAYERS, 'attn/out', jnp.ones((2, D, D), jnp.float32) / 3)
    # More than ten layers: names sort otherwise than numbers.
    many = low_rank(1, layers=tuple(range(12)))
    stacked = edited_lib.stack([low_rank(0), low_rank(1)])
    *first, last = whole_block(2).deltas
    mixed = Edited(deltas=(*first, *low_rank(1).deltas, last))
    for edited in (
        low_rank(1),
        Edited(deltas=(dense, *many.deltas)),
        stacked,
        whole_block(1),
        whole_block(1, edits=3),
        mixed,
        Edited(),
    ):
      self._save(edited)
      got, metadata = edited_lib.load(self.path, model_hash='ab' * 32)
      self.assertEqual(metadata, self.metadata)
      self.assertEqual(jax.tree.structure(got), jax.tree.structure(edited))
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(edited)):
        self.assertEqual(a.dtype, b.dtype)
        np.testing.assert_array_equal(a, b)

  def test_file_is_whole_and_of_normal_mode(self):
    self._save(low_rank(1))
    self._save(low_rank(2))
    self.assertEqual(os.listdir(self.folder), ['delta.safetensors'])
    self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o644)

  def test_failed_save_leaves_what_was(self):
    self._save(low_rank(1))
    before = self.path.read_bytes()
    self.metadata['method'] = object()
    with self.assertRaises(TypeError):
      self._save(low_rank(2))
    self.assertEqual(os.listdir(self.folder), ['delta.safetensors'])
    self.assertEqual(self.path.read_bytes(), before)

  def test_place_that_cannot_be_written(self):
    (self.folder / 'missing').write_text('a file')
    self.path = self.folder / 'missing' / 'delta.safetensors'
    with self.assertRaisesRegex(InputError, 'missing.*cannot be written'):
      self._save(low_rank(1))

  def _refused(self, pattern, **options):
    with self.assertRaisesRegex(InputError, pattern) as caught:
      edited_lib.load(self.path, **options)
    self.assertIn(str(self.path), str(caught.exception))

  def test_other_model_is_refused(self):
    self._save(low_rank(1))
    self._refused('made for model abab.*given cdcd', model_hash='cd' * 32)
    self.assertLen(edited_lib.load(self.path)[0].deltas, 1)

  def test_missing_file_is_refused(self):
    self._refused('no such file')

  def test_folder_is_refused(self):
    self.path = self.folder
    self._refused('no safetensors file')

  @parameterized.parameters(0, 5, 100, -1)
  def test_cut_file_is_refused(self, size):
    self._save(low_rank(1))
    self.path.write_bytes(self.path.read_bytes()[:size])
    self._refused('cut short or damaged')

  @parameterized.parameters(3, -5)
  def test_altered_file_is_refused(self, place):
    self._save(low_rank(1))
    data = bytearray(self.path.read_bytes())
    data[place] ^= 0x40
    self.path.write_bytes(data)
    self._refused('copy or make it again')

  @parameterized.named_parameters(
      ('no_header', None, "is not a file of 'jaxedit-delta-2'"),
      (
          'other_format',
          {'format': 'other'},
          "is not a file of 'jaxedit-delta-2'",
      ),
      ('no_metadata', {'format': 'jaxedit-delta-1'}, 'damaged'),
      (
          'metadata_cut',
          {'format': 'jaxedit-delta-1', 'jaxedit': '{', 'crc32': '{}'},
          'damaged',
      ),
      (
          'no_hash',
          {'format': 'jaxedit-delta-1', 'jaxedit': '{}', 'crc32': '{}'},
          'damaged',
      ),
  )
  def test_other_files_are_refused(self, header, pattern):
    tensors = {'mlp/down/0/key': np.zeros((1, F), np.float32)}
    safetensors.numpy.save_file(tensors, self.path, header)
    self._refused(pattern, model_hash='ab' * 32)

  def test_first_format(self):
    (delta,) = low_rank(1, layers=(2, 10)).deltas
    tensors = {
        f'{delta.site}/{layer}/{name}': np.asarray(getattr(delta, name)[i])
        for i, layer in enumerate(delta.layers)
        for name in ('key', 'value')
    }
    tensors['norm_mlp/3/scale'] = np.arange(D, dtype=np.float32)
    sums = {name: zlib.crc32(array) for name, array in tensors.items()}
    header = {
        'format': 'jaxedit-delta-1',
        'jaxedit': json.dumps(self.metadata),
        'crc32': json.dumps(sums),
    }
    safetensors.numpy.save_file(tensors, self.path, header)
    got, metadata = edited_lib.load(self.path, model_hash='ab' * 32)
    self.assertEqual(metadata, self.metadata)
    dense = Dense(
        (3,), 'norm_mlp', jnp.arange(D, dtype=jnp.float32)[None], 'scale'
    )
    jax.tree.map(
        np.testing.assert_array_equal, got, Edited(deltas=(delta, dense))
    )

  def test_no_written_edit(self):
    self._save(low_rank(1, rank=0))
    got, _ = edited_lib.load(self.path)
    self.assertEqual(got.deltas[0].key.shape, (2, 0, F))

  def test_half_precision(self):
    edited = jax.tree.map(lambda x: x.astype(jnp.bfloat16), low_rank(1))
    self._save(edited)
    got, _ = edited_lib.load(self.path)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(edited)):
      self.assertEqual(a.dtype, jnp.bfloat16)
      np.testing.assert_array_equal(a, b)


if __name__ == '__main__':
  absltest.main()
