"""Files are whole or not there, and what comes from outside is checked."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import zlib
from unittest import mock

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from jaxedit import io
from jaxedit.types import InputError

KIND = 'test 1'


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.root / 'deep' / 'file'

  def left(self):
    return sorted(str(p.relative_to(self.root)) for p in self.root.rglob('*'))

  def refused(self, pattern, call, *args, **kwargs):
    with self.assertRaisesRegex(InputError, pattern):
      call(*args, **kwargs)


class WriteTest(Case):

  def test_contents(self):
    io.write_text(self.path, 'Zoë')
    self.assertEqual(self.path.read_text('utf-8'), 'Zoë')
    io.write_json(self.path, {'b': 'é', 'a': [1]})
    self.assertEqual(
        self.path.read_text('utf-8'), '{\n "b": "é",\n "a": [\n  1\n ]\n}\n'
    )
    io.write_jsonl(self.path, [{'a': 1}, {'b': None}])
    self.assertEqual(self.path.read_text('utf-8'), '{"a": 1}\n{"b": null}\n')
    io.write_text(self.path, os.fsdecode(b'a\xff'))
    self.assertEqual(self.path.read_bytes(), b'a?')
    self.assertEqual(self.left(), ['deep', 'deep/file'])

  def test_what_fails_leaves_the_old(self):
    io.write_text(self.path, 'old')
    with self.assertRaises(ValueError):
      io.write_json(self.path, float('nan'))
    with self.assertRaises(KeyboardInterrupt):
      with io.new_file(self.path) as stream:
        stream.write(b'new')
        raise KeyboardInterrupt
    self.refused('cannot be written', io.write_text, self.path / 'x', '')
    self.assertEqual(self.path.read_text(), 'old')
    self.assertEqual(self.left(), ['deep', 'deep/file'])

  @parameterized.parameters(0o022, 0o077, 0o002)
  def test_umask(self, umask):
    before = os.umask(umask)
    try:
      io.write_tensors(self.path, {}, kind=KIND, record={})
      with io.new_folder(self.root / 'folder'):
        pass
    finally:
      os.umask(before)
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    self.assertEqual(mode(self.path), 0o666 & ~umask)
    self.assertEqual(mode(self.root / 'folder'), 0o777 & ~umask)


class FolderTest(Case):

  def make(self, text, is_complete=None):
    with io.new_folder(self.root / 'f', is_complete) as part:
      (part / 'x').write_text(text)
      (part.parent / 'scratch').write_text('')

  def read(self):
    self.assertEqual(self.left(), ['f', 'f/x'])
    return (self.root / 'f' / 'x').read_text()

  def test_place(self):
    self.make('a')
    self.assertEqual(self.read(), 'a')
    self.refused('f: exists already and is not an empty', self.make, 'b')
    (self.root / 'f' / 'x').unlink()
    self.make('b')
    self.assertEqual(self.read(), 'b')

  def test_nothing_is_left_of_a_failure(self):
    with self.assertRaises(KeyboardInterrupt):
      with io.new_folder(self.root / 'f') as part:
        (part / 'x').write_text('')
        raise KeyboardInterrupt
    self.assertEmpty(self.left())
    self.path.parent.write_text('a file')
    with self.assertRaisesRegex(InputError, 'cannot be written .*; free some'):
      with io.new_folder(self.path, remedy='free some'):
        pass

  @parameterized.parameters((True, 'first'), (False, 'second'))
  def test_built_twice(self, complete, wanted):
    self.make('first', lambda folder: complete)
    self.make('second', lambda folder: complete)
    self.assertEqual(self.read(), wanted)

  def test_sweep(self):
    program = (
        'import os, signal\nfrom jaxedit import io\n'
        'with io.new_folder("f") as part, io.new_file("g") as stream:\n'
        '  (part / "x").write_text("x")\n'
        '  os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    run = lambda: subprocess.run(
        [sys.executable, '-c', program], cwd=self.root, check=False
    )
    run()
    killed = self.left()
    self.assertLen(killed, 4, killed)
    with mock.patch.object(io, '_is_running', return_value=True):
      self.make('a')
    self.assertContainsSubset(killed, self.left())
    with mock.patch.object(io.platform, 'node', return_value='elsewhere'):
      io.sweep(self.root / 'g')
    self.assertContainsSubset(killed, self.left())
    io.sweep(self.root / 'f')
    io.sweep(self.root / 'g')
    self.assertEqual(self.read(), 'a')
    # A process's own drafts are in use.
    with io.new_folder(self.root / 'h') as part:
      io.sweep(self.root / 'h')
      self.assertTrue(part.is_dir())


class JsonTest(Case):

  def test_unicode(self):
    text = r'["\ud83d\ude00", "\ud800", "\\ud800", "\udc00\ud800x"]'
    wanted = ['\U0001f600', '\ufffd', r'\ud800', '\ufffd\ufffdx']
    self.assertEqual(io.parse_json(text), wanted)
    self.assertEqual(io.parse_json(b'\xef\xbb\xbf"\xc3\xa9"'), 'é')

  @parameterized.parameters(
      ('{"a": 1, "b": {"c": 1, "c": 1}}', "key 'c' stands twice"),
      ('[' * 101 + ']' * 101, 'nested more than 100 deep'),
      ('[' * 10**6, 'nested more than 100 deep'),
      ('{"a"', 'delimiter'),
      (b'"\xff"', 'utf-8'),
  )
  def test_refusals(self, text, pattern):
    with self.assertRaisesRegex(ValueError, pattern):
      io.parse_json(text)

  def test_nesting(self):
    text = '[' * 100 + '1' + ']' * 100
    self.assertEqual(io.parse_json(text), json.loads(text))

  def test_files(self):
    read = lambda *args: io.read_json(self.path, *args, remedy='mend it')
    self.refused('file: cannot be read .No such file.*; mend it', read)
    io.write_text(self.path, '{')
    self.refused('file: is not valid JSON .*; mend it', read)
    io.write_text(self.path, '[]')
    self.refused('file: holds a list where an object is needed; mend', read)
    self.assertEqual(read(list), [])
    io.write_text(self.path, '12')
    self.refused('file: holds 12 where a list is needed; mend it', read, list)
    os.truncate(self.path, io.MOST_BYTES + 1)
    self.refused('cannot be read .67108865 bytes, more than .*; mend it', read)
    pipe = self.root / 'pipe'
    os.mkfifo(pipe)
    for path in (pipe, '/dev/zero'):
      self.refused('a pipe or a device.*fetch it again', io.read_json, path)
      self.refused('a pipe or a device.*fetch it again', io.read_header, path)

  def test_numbers_that_are_not_finite(self):
    for text in ('[{"a": NaN}]', '1e999', '[-Infinity]'):
      with self.assertRaisesRegex(ValueError, 'not finite'):
        io.parse_json(text, finite=True)
    self.assertEqual(io.parse_json('[1e999, 1e99]'), [float('inf'), 1e99])
    self.assertEqual(io.parse_json('[true, 2]', finite=True), [True, 2])

  def test_many_values(self):
    with self.assertRaisesRegex(ValueError, 'more than 8388608 values'):
      io.parse_json('[' + '[],' * 2**22 + '[]]')


class TensorsTest(Case):

  def setUp(self):
    super().setUp()
    self.tensors = {
        'half': np.arange(3).astype(ml_dtypes.bfloat16),
        'empty': np.zeros((2, 0), np.float32),
        'scalar': np.asarray(2.5),
        'turned': np.arange(6, dtype=np.int32).reshape(2, 3).T,
        'flag': np.array([True, False]),
    }
    self.write()

  def write(self, **record):
    io.write_tensors(self.path, self.tensors, kind=KIND, record=record)
    return self.path.read_bytes()

  def read(self, names=None, kind=KIND):
    return io.read_tensors(self.path, kind, 'make it again', names)

  def test_round_trip(self):
    self.write(a=[1, 'é'])
    found, record = self.read()
    self.assertEqual(record, {'a': [1, 'é']})
    self.assertCountEqual(found, self.tensors)
    for name, wanted in self.tensors.items():
      self.assertEqual(found[name].dtype, wanted.dtype)
      self.assertEqual(found[name].shape, wanted.shape)
      np.testing.assert_array_equal(found[name], wanted)
    self.assertCountEqual(self.read(['flag'])[0], ['flag'])
    self.assertEqual(self.read(()), ({}, record))

  def test_bytes_follow_from_the_values(self):
    first = self.write()
    self.tensors = dict(reversed(self.tensors.items()))
    self.assertEqual(self.write(), first)
    self.assertEqual(int.from_bytes(first[:8], 'little') % 8, 0)
    # The format's own reader agrees, and wide dtypes come first.
    with safetensors.safe_open(self.path, 'numpy') as source:
      starts = [source.get_tensor(n).itemsize for n in ('scalar', 'flag')]
    self.assertEqual(starts, [8, 1])
    self.assertLess(first.index(b'"scalar"'), first.index(b'"flag"'))

  def test_refusals(self):
    whole = self.path.read_bytes()
    self.refused("not a file of 'other'; make it", self.read, kind='other')
    self.refused('nope is missing or damaged', self.read, ['nope'])
    for size in (0, 5, 40, len(whole) - 1):
      self.path.write_bytes(whole[:size])
      self.refused('cut short or damaged.*; make it again', self.read)
    self.path.write_bytes(whole[:-1] + b'\7')
    self.refused('flag is missing or damaged; make it again', self.read)
    self.read(['half'])
    self.path.unlink()
    self.refused('file: there is no such file; make it again', self.read)
    self.path = self.root
    self.refused('no safetensors file', self.read)

  @parameterized.parameters(
      (None, 'not a file of'),
      ({'format': KIND}, 'damaged, its header'),
      ({'format': KIND, 'jaxedit': '{', 'crc32': '{}'}, 'damaged, its header'),
      ({'format': KIND, 'jaxedit': '[]', 'crc32': '{}'}, 'is no record'),
      ({'format': KIND, 'jaxedit': '{}', 'crc32': '{}'}, 'x is missing or dam'),
  )
  def test_other_headers(self, header, pattern):
    safetensors.numpy.save_file({'x': np.zeros(1)}, self.path, header)
    self.refused(pattern, self.read)

  def test_every_flipped_bit_is_found(self):
    self.tensors = {'x': np.arange(3, dtype=np.float32), 'y': np.zeros(2)}
    whole = self.write(count=5, name='a')
    for bit in range(8 * len(whole)):
      blob = bytearray(whole)
      blob[bit // 8] ^= 1 << bit % 8
      self.path.write_bytes(blob)
      with self.assertRaises(InputError, msg=f'bit {bit}'):
        self.read()

  def test_a_header_that_is_written_anew(self):
    def rewrite(change):
      whole = self.write(count=5)
      length = int.from_bytes(whole[:8], 'little')
      header = json.loads(whole[8 : 8 + length])
      change(header)
      raw = json.dumps(header).encode()
      blob = len(raw).to_bytes(8, 'little') + raw + whole[8 + length :]
      self.path.write_bytes(blob)

    rewrite(lambda header: None)
    self.read()
    for change in (
        lambda x: x['__metadata__'].update(jaxedit='{"count": 6}'),
        lambda x: x['__metadata__'].update(other=''),
        lambda x: x['__metadata__'].pop('header_crc32') and x.update(a={}),
        lambda x: x['turned'].update(dtype='F32'),
        lambda x: x['turned'].update(shape=[2, 3]),
        lambda x: x['turned'].update(shape=[-2, -3]),
        lambda x: x['turned'].update(shape=6),
        lambda x: x['turned'].update(shape=[3, 2.0]),
        lambda x: x['turned'].update(data_offsets=[0, 24]),
        lambda x: x['turned'].update(data_offsets=[-24, 0]),
        lambda x: x['turned'].update(data_offsets=[[], {}]),
        lambda x: x['turned'].update(data_offsets=[1]),
        lambda x: x.update(turned=[]),
        lambda x: x.update(__metadata__=[]),
        lambda x: x.update(__metadata__={'format': 5}),
    ):
      rewrite(change)
      self.refused('damaged', self.read)

  def test_earlier_layout(self):
    x = np.arange(4.0)
    record = {'layers': [1], 'crc32': {'x': zlib.crc32(x)}}
    header = {'kind': KIND, 'record': json.dumps(record)}
    safetensors.numpy.save_file({'x': x}, self.path, header)
    found, got = self.read()
    self.assertEqual(got['layers'], [1])
    np.testing.assert_array_equal(found['x'], x)


if __name__ == '__main__':
  absltest.main()
