"""A disk that fills, or may not be written: a message, and nothing half written."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import tempfile
from unittest import mock

import editing_runs
from absl.testing import absltest, parameterized

from jaxedit import io
from jaxedit.checkpoint import Checkpoint

SEED = int(os.environ.get('JAXEDIT_RESUME_SEED', 0))


class _Stream:
  """A file that can be written no more."""

  def __init__(self, stream, number):
    self._stream, self._number = stream, number

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._stream.close()

  def fileno(self):
    raise OSError(self._number, os.strerror(self._number))

  def write(self, blob):
    self._stream.write(blob[: len(blob) // 2])
    raise OSError(self._number, os.strerror(self._number))


@contextlib.contextmanager
def failing(after, number):
  """Lets so many files be written and checkpoints be saved, and no more.

  Yields:
    A list with an entry a write.
  """
  written, save = [], Checkpoint.save

  def fails():
    written.append(None)
    return len(written) > after

  def opened(path, mode='r', *rest, **more):
    if 'x' not in mode:
      return open(path, mode, *rest, **more)
    if fails() and number == errno.EROFS:
      raise OSError(number, os.strerror(number), path)
    stream = open(path, mode, *rest, **more)
    return _Stream(stream, number) if len(written) > after else stream

  def saved(self, *given):
    if fails():  # as a place that is a file is refused
      with mock.patch.object(self, '_folder', io.pathlib.Path('/dev/null/x')):
        return save(self, *given)
    return save(self, *given)

  with mock.patch.object(io, 'open', opened, create=True):
    with mock.patch.object(Checkpoint, 'save', saved):
      yield written


class DiskTest(editing_runs.Case):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.setup = editing_runs.setup_of('FACT')
    cls.flags = dict(save_model=True, method='alphaedit', moment_weight=None)
    cls.whole = cls.run_alone()

  @classmethod
  def tearDownClass(cls):
    editing_runs.close()
    super().tearDownClass()

  @classmethod
  def run_alone(cls, cache=None, **changes):
    """Runs with a cache of its own, where moments are not yet."""
    with contextlib.ExitStack() as stack:
      cache = cache or stack.enter_context(tempfile.TemporaryDirectory())
      stack.enter_context(
          mock.patch.dict(os.environ, {'JAXEDIT_CACHE': str(cache)})
      )
      return cls.setup.run(**cls.flags, **changes)

  @parameterized.parameters(errno.ENOSPC, errno.EROFS, errno.EDQUOT)
  def test_at_random_writes(self, number):
    with failing(10**9, number) as written:
      self.assertEqual(self.run_alone().code, 0)
    total = len(written)
    self.assertGreater(total, 10)
    draw = random.Random(f'{SEED} {number}')
    for after in sorted(draw.sample(range(total), 4)):
      place, cache = self.setup.path('out'), self.setup.path('cache')
      with failing(after, number):
        done = self.run_alone(cache, output_dir=place)
      why = f'{after} of {total} writes, seed {SEED}: {done.err[-2000:]}'
      self.assertEqual(done.code, 2, why)
      errors = [x for x in done.err.splitlines() if x.startswith('error: ')]
      self.assertLen(errors, 1, why)
      self.assertRegex(errors[0], r'cannot be written \(.*\); .*(room|choose)')
      again = self.run_alone(cache, output_dir=place)
      self.assertEqual(again.code, 0, f'{why}\n{again.err[-2000:]}')
      self.assertEqual(again.files, self.whole.files)
      for name in (
          'delta.safetensors', 'records.jsonl', 'moments.safetensors',
          'templates.json', 'model/model.safetensors', 'model/config.json',
      ):  # fmt: skip
        one, other = (
            (x.folder / name).read_bytes() for x in (again, self.whole)
        )
        self.assertEqual(one, other, f'{name}, {why}')

  def test_a_folder_that_cannot_be_made(self):
    """Nothing is loaded before."""
    if not os.path.isdir('/proc/self'):
      self.skipTest('needs a file system that cannot be written')
    self.refuse(
        self.setup,
        '--output_dir=/proc/self/none: cannot be written .*another folder',
        output_dir='/proc/self/none',
    )


if __name__ == '__main__':
  absltest.main()
