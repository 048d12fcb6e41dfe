"""A checkpoint gives back what was saved, complete or not at all."""

from __future__ import annotations

import pathlib
import resource
import tempfile
import time
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxedit.checkpoint import Checkpoint
from jaxedit.types import InputError

RECORD = {
    'infos': [{'written': [True], 'loss': 0.125}],
    'name': 'Zürich',
    'n': None,
}


class CheckpointTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder) / 'a' / 'sequence'
    self.checkpoint = Checkpoint(self.folder)

  def save(self, step, arrays, record=RECORD):
    self.checkpoint.save(step, arrays, record)

  def test_nothing_is_there_yet(self):
    self.assertIsNone(self.checkpoint.restore())
    self.folder.mkdir(parents=True)
    self.assertIsNone(self.checkpoint.restore())

  def test_round_trip(self):
    rng = np.random.default_rng(0)
    arrays = {
        '0/key': rng.standard_normal((2, 3)).astype(np.float32),
        'state/1': rng.standard_normal((4, 4)),  # f64 without jax_enable_x64
        'half': np.arange(4).astype(ml_dtypes.bfloat16),
        'ids': np.arange(5, dtype=np.int32),
        'on': np.array([True, False]),
        'scalar': np.float32(1.5),
        'device': jnp.arange(3.0),
    }
    self.save(3, arrays)
    step, got, record = Checkpoint(self.folder).restore()
    self.assertEqual((step, record), (3, RECORD))
    self.assertSameElements(got, arrays)
    for name, want in arrays.items():
      self.assertIsInstance(got[name], np.ndarray)
      self.assertEqual(got[name].dtype, want.dtype, name)
      np.testing.assert_array_equal(got[name], want)

  @parameterized.parameters(
      {'none': {}},
      {'none': {'x': np.zeros((0, 3), np.float32)}},
      {'none': {'x': np.zeros((2, 0), np.int32), 'y': np.ones(2)}},
  )
  def test_arrays_without_elements(self, none):
    self.save(0, none)
    _, got, _ = self.checkpoint.restore()
    self.assertSameElements(got, none)
    for name, want in none.items():
      self.assertEqual(
          (got[name].shape, got[name].dtype), (want.shape, want.dtype)
      )

  def test_the_newest_step_alone_is_kept(self):
    for step in (0, 1, 10):
      self.save(step, {'x': np.full(2, step)}, {'step': step})
    step, got, record = self.checkpoint.restore()
    self.assertEqual((step, record), (10, {'step': 10}))
    np.testing.assert_array_equal(got['x'], [10, 10])
    self.assertEqual([path.name for path in self.folder.iterdir()], ['10'])

  def test_what_is_half_written_is_not_there(self):
    self.save(0, {'x': np.zeros(2)})
    with mock.patch.object(
        pathlib.Path, 'rename', side_effect=KeyboardInterrupt
    ), mock.patch('os.rename', side_effect=KeyboardInterrupt), mock.patch(
        'os.replace', side_effect=KeyboardInterrupt
    ):
      with self.assertRaises(KeyboardInterrupt):
        self.save(1, {'x': np.ones(2)})
    step, got, _ = Checkpoint(self.folder).restore()
    self.assertEqual(step, 0)
    np.testing.assert_array_equal(got['x'], [0, 0])
    self.save(1, {'x': np.ones(2)})  # and is no obstacle
    self.assertEqual(Checkpoint(self.folder).restore()[0], 1)

  def test_clear(self):
    self.save(0, {})
    self.checkpoint.clear()
    self.assertFalse(self.folder.exists())
    self.checkpoint.clear()

  def test_damaged_and_unwritable_places_are_named(self):
    self.save(0, {'x': np.ones(4)})
    for path in sorted(self.folder.rglob('*')):
      if path.is_file():
        path.write_bytes(b'')
    with self.assertRaisesRegex(InputError, 'cannot be read .*; delete it'):
      self.checkpoint.restore()
    place = self.folder / 'file'
    place.write_text('')
    with self.assertRaisesRegex(InputError, 'cannot be written .*make room'):
      Checkpoint(place / 'below').save(0, {}, {})

  # Orbax closes its event loop at the first error; what else it was writing then
  # ends in a thread, where nobody can handle it.
  @pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
  def test_a_full_disk(self):
    """A limit on the size of files stands for it; both write what they can."""
    self.save(0, {'x': np.zeros(2)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {'x': np.random.default_rng(0).standard_normal(4096)}
    for most in (1000, 100):
      try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        with self.assertRaisesRegex(InputError, r'written \(.*File too large'):
          self.save(1, big)
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
      time.sleep(0.2)  # for those threads
      self.assertEqual(Checkpoint(self.folder).restore()[0], 0)
    self.save(1, big)
    self.assertEqual(Checkpoint(self.folder).restore()[0], 1)


if __name__ == '__main__':
  absltest.main()
