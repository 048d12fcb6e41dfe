"""Targets and traces in files: the same is found again, and nothing else."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.methods.registry import METHODS
from jaxedit.methods.settings import configure
from jaxedit.runs import cache
from jaxedit.runs.cache import ArrayFiles, TargetFiles, digest, edit_digest
from jaxedit.testing import facts
from jaxedit.types import InputError, Targets

A, B, C = facts.random_edits(3, seed=1, contexts=2, targets=(3,))


def targets(value: float, chunks: int = 1) -> Targets:
  state = np.full((chunks, 2), value, np.float32)
  one = np.ones(chunks, np.float32)
  steps = np.ones(chunks, np.int32)
  return Targets(state, state - 1, one, one, steps, np.ones(chunks, bool))


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder) / 'targets'

  def open(self, about=None, exact=False):
    return TargetFiles(self.folder, about or {'model': 'm'}, exact=exact)


class TargetFilesTest(Case):

  def test_round_trip(self):
    files = self.open()
    self.assertIsNone(files.get(A))  # the folder is not there yet
    want = targets(3, chunks=2)
    files.put(A, want)
    again = self.open()
    got = again.get(A)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    self.assertEqual(dtypes(got), dtypes(want))

  def test_an_edit_is_known_by_its_ids_and_not_by_its_number(self):
    files = self.open()
    files.put(A, targets(1))
    self.assertIsNotNone(files.get(dataclasses.replace(A, number=99)))
    other = lambda **changes: dataclasses.replace(A, **changes)
    for edit in (
        other(rows=(A.rows[0] + 1, *A.rows[1:])),
        other(rows=A.rows[:1]),
        other(anchors=(A.anchors[0] + 1, *A.anchors[1:])),
        other(target=A.target[::-1].copy()),
        other(target=np.append(A.target, 5)),
        other(kl=A.kl[:0]),
        other(chunks=((0, 1), (1, 2))),
        B,
    ):
      self.assertIsNone(files.get(edit))

  def test_what_they_depend_on_is_part_of_the_name(self):
    self.open().put(A, targets(1))
    for about in ({'model': 'n'}, {'model': 'm', 'layer': 1}):
      self.assertIsNone(self.open(about).get(A))

  def test_edits_after_others_are_others(self):
    files = self.open()
    files.put(A, targets(1))
    after = files.after(digest('', edit_digest(B)))
    self.assertIsNone(after.get(A))
    after.put(A, targets(2))
    np.testing.assert_array_equal(after.get(A).z, targets(2).z)
    np.testing.assert_array_equal(files.get(A).z, targets(1).z)
    self.assertIsNone(files.after(digest('', edit_digest(C))).get(A))
    self.assertEqual(self.open(exact=True).after('x').exact, True)

  def test_a_damaged_file_is_named(self):
    files = self.open()
    files.put(A, targets(1))
    (path,) = self.folder.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with self.assertRaisesRegex(
        InputError, f'{path.name}: is cut short or damaged.*delete it'
    ):
      files.get(A)

  def test_bytes_follow_from_the_values(self):
    self.open().put(A, targets(1))
    (path,) = self.folder.iterdir()
    before = path.read_bytes()
    self.open().put(A, targets(1))
    self.assertEqual(path.read_bytes(), before)


class SettingsTest(parameterized.TestCase):

  @parameterized.parameters(
      dict(target_solver='lbfgs'),
      dict(value_first_step=0.25),
      dict(stagnation=0.1),
      dict(stagnation_steps=5),
  )
  def test_what_decides_about_targets_is_in_the_name(self, **given):
    for method in ('memit', 'pmet', 'unke'):
      config = METHODS[method].config()
      changed = configure(config, given)
      self.assertNotEqual(
          digest(config.objective()), digest(changed.objective())
      )


class DigestTest(absltest.TestCase):

  def test_arrays_differ_by_dtype_and_shape(self):
    ids = np.arange(4, dtype=np.int32)
    some = [
        (ids,), (ids + 1,), (ids.astype(np.int64),), (ids[None],),
        (ids, [1]), (ids, [2]), (ids, [1], None), ([1], ids),
    ]  # fmt: skip
    self.assertLen({digest(*parts) for parts in some}, len(some))
    self.assertEqual(digest(ids, [1]), digest(ids.copy(), [1]))
    self.assertEqual(digest(ids[::2]), digest(ids[::2].copy()))


class ArrayFilesTest(Case):

  def test_the_same_is_found_again(self):
    files = ArrayFiles(self.folder, {'model': 'm'})
    ids = np.arange(3, dtype=np.int32)
    self.assertIsNone(files.load(ids, [1, 2], None))
    files.save({'x': np.eye(2)[:, :1]}, ids, [1, 2], None)
    again = ArrayFiles(self.folder, {'model': 'm'})
    found = again.load(ids.copy(), [1, 2], None)
    np.testing.assert_array_equal(found['x'], [[1], [0]])
    self.assertEqual(again.found, 1)
    for parts in ((ids + 1, [1, 2], None), (ids, [1, 2], [0])):
      self.assertIsNone(again.load(*parts))
    other = ArrayFiles(self.folder, {'model': 'n'})
    self.assertIsNone(other.load(ids, [1, 2], None))
    self.assertEqual(other.found, 0)


class NamesTest(absltest.TestCase):

  def test_names_are_short_and_plain(self):
    self.assertRegex(cache.digest(1), '^[0-9a-f]{32}$')


if __name__ == '__main__':
  absltest.main()
