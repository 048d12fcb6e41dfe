"""Pieces of work: the same is found again, and nothing else."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from experiments import common, kept
from jaxedit.types import InputError


class KeptTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.kept = kept.unfinished(self.folder, {'model': 'm'})
    self.ids = np.arange(3, dtype=np.int32)
    self.kept.save({'x': np.eye(2)[:, :1]}, self.ids, [1, 2], None)

  def test_the_same_work_is_found(self):
    again = kept.unfinished(self.folder, {'model': 'm'})
    found = again.load(self.ids.copy(), [1, 2], None)
    np.testing.assert_array_equal(found['x'], [[1], [0]])
    self.assertEqual(again.found, 1)

  def test_other_work_is_not(self):
    for parts in (
        (self.ids + 1, [1, 2], None),
        (self.ids.astype(np.int64), [1, 2], None),
        (self.ids[None], [1, 2], None),
        (self.ids, [1, 3], None),
        (self.ids, [1, 2], [0]),
    ):
      self.assertIsNone(self.kept.load(*parts))
    other = kept.unfinished(self.folder, {'model': 'n'})
    self.assertIsNone(other.load(self.ids, [1, 2], None))
    self.assertEqual(other.found + self.kept.found, 0)

  def test_a_damaged_piece_is_named(self):
    (path,) = (self.folder / common.UNFINISHED).iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with self.assertRaisesRegex(InputError, f'{path.name}: .*delete it'):
      self.kept.load(self.ids, [1, 2], None)

  def test_only_the_folder_of_a_stopped_run_is_taken_again(self):
    (self.folder / 'traces.npz').write_bytes(b'')
    common.claim_folder(str(self.folder), False)
    self.kept.clear()
    with self.assertRaisesRegex(InputError, 'already has files'):
      common.claim_folder(str(self.folder), False)


if __name__ == '__main__':
  absltest.main()
