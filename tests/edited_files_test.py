"""Edits on disk: they come back as they were, or are refused."""

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
from edits import KINDS, Draw, deltas_of, model, random_queries

from jaxedit import edited as edited_lib
from jaxedit.deltas import Dense, Edited
from jaxedit.testing import models
from jaxedit.types import InputError

SPEC = models.tiny_spec('qwen2')  # which has biases
F, D = SPEC.mlp_width, SPEC.width


def low_rank(seed: int, rank: int = 3, layers=(0, 2)) -> Edited:
  return Edited((Draw(SPEC, seed=seed, layers=layers).low_rank(rank=rank),))


def whole_block(seed: int, size: int | None = None) -> Edited:
  """Changes of a kernel, a bias and a scale, some of one site."""
  draw = Draw(SPEC, seed=seed, edits=size)
  return Edited(
      (
          draw.dense('attn/q', 'bias'),
          draw.dense('attn/q'),
          draw.dense('mlp_norm', 'scale'),
      ),
      size=size,
  )


def first_format(edited: Edited, metadata: dict) -> dict:
  """Arguments of `safetensors.numpy.save_file` that give an old file."""
  tensors = {}
  for delta in edited.deltas:
    leaf = getattr(delta, 'leaf', '')
    fields = (
        {leaf: delta.value} if leaf else dict(key=delta.key, value=delta.value)
    )
    for i, layer in enumerate(delta.layers):
      for name, array in fields.items():
        part = np.ascontiguousarray(np.asarray(array)[i])
        tensors[f'{delta.site}/{layer}/{name}'] = part
  sums = {n: zlib.crc32(x.view(np.uint8)) for n, x in tensors.items()}
  header = {
      'format': 'jaxedit-delta-1',
      'jaxedit': json.dumps(metadata),
      'crc32': json.dumps(sums),
  }
  return dict(tensor_dict=tensors, metadata=header)


class FileTest(parameterized.TestCase):

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
    dense = Dense((0, 2), 'attn/out', jnp.ones((2, D, D), jnp.float32) / 3)
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
        whole_block(1, size=3),
        mixed,
        *(Edited(deltas_of(kind)) for kind in KINDS),
        Edited(deltas_of('mixed', 3), size=3),
        Edited(),
        Edited(size=2),
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

  @parameterized.product(
      name=('low_rank', 'whole_block', 'both'),
      size=(None, 3),
      tells=(False, True),
  )
  def test_first_format(self, name, size, tells):
    # Layers from ten on; not every editor told whether edits are independent.
    thin = Edited(
        (Draw(SPEC, edits=size, layers=(2, 10)).low_rank(),), size=size
    )
    whole = whole_block(1, size)
    both = Edited((*whole.deltas[:2], *thin.deltas, whole.deltas[2]), size=size)
    edited = dict(low_rank=thin, whole_block=whole, both=both)[name]
    if tells:
      self.metadata['independent'] = size is not None
    safetensors.numpy.save_file(
        filename=self.path, **first_format(edited, self.metadata)
    )
    got, metadata = edited_lib.load(self.path, model_hash='ab' * 32)
    self.assertEqual(metadata, self.metadata)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(edited))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(edited)):
      np.testing.assert_array_equal(a, b)

  @parameterized.product(name=KINDS, size=(None, 3))
  def test_scores_come_back(self, name, size):
    # The first format keeps no order but that of sites.
    deltas = sorted(deltas_of(name, size), key=lambda delta: delta.site)
    edited = Edited(tuple(deltas), size=size)
    self._save(edited)
    files = [edited_lib.load(self.path)[0]]
    if name in ('low_rank', 'dense'):
      safetensors.numpy.save_file(
          filename=self.path, **first_format(edited, self.metadata)
      )
      files.append(edited_lib.load(self.path)[0])
    ids = None if size is None else [i % 3 for i in range(9)]
    score = lambda e: edited_lib.open_model(model(), e).score(
        random_queries(), edit_ids=ids
    )
    self.assertEqual(files[0].deltas[0].layers, edited.deltas[0].layers)
    for got in files:
      self.assertEqual(got.size, size)
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(edited)):
        self.assertEqual(a.dtype, b.dtype)
        np.testing.assert_array_equal(a, b)
      self.assertEqual(score(got), score(edited))

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
