"""Pieces of work: the same is found again, and nothing else."""

import contextlib
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl import flags
from absl.testing import absltest, parameterized

from experiments import common, kept, states
from jaxedit.methods import base
from jaxedit.testing import facts
from jaxedit.types import InputError, Targets


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)


class KeptTest(Case):

  def setUp(self):
    super().setUp()
    self.kept = kept.Kept(self.folder, {'model': 'm'})
    self.ids = np.arange(3, dtype=np.int32)
    self.kept.save({'x': np.eye(2)[:, :1]}, self.ids, [1, 2], None)

  def test_the_same_work_is_found(self):
    again = kept.Kept(self.folder, {'model': 'm'})
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
    other = kept.Kept(self.folder, {'model': 'n'})
    self.assertIsNone(other.load(self.ids, [1, 2], None))
    self.assertEqual(other.found + self.kept.found, 0)

  def test_a_damaged_piece_is_named(self):
    (path,) = self.folder.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with self.assertRaisesRegex(InputError, f'{path.name}: .*delete it'):
      self.kept.load(self.ids, [1, 2], None)


class OutputTest(Case):

  @contextlib.contextmanager
  def claim(self, overwrite=False, **given):
    """Claims the folder as a program with these flags does."""
    values = flags.FlagValues()
    for name in ('tokens', 'kinds', 'output_dir'):
      flags.DEFINE_string(name, None, '', flag_values=values)
    values(['program', *(f'--{k}={v}' for k, v in given.items())])
    with mock.patch.object(kept.flags, 'FLAGS', values):
      yield kept.Output(str(self.folder), overwrite)

  def stop(self, found=True, **given):
    """Leaves what a run that was stopped leaves."""
    with self.claim(**given) as output:
      self.assertFalse(output.resumed)
      output.begin()
      (self.folder / 'moments.safetensors').write_bytes(b'')
      if found:
        output.pieces({}).save({'x': np.ones(1)}, 1)

  @parameterized.parameters(True, False)
  def test_the_same_command_goes_on(self, found):
    self.stop(found, tokens='all', output_dir='a')
    with self.claim(tokens='all', output_dir='b') as output:
      self.assertTrue(output.resumed)
      output.begin()
      self.assertEqual(output.pieces({}).load(1) is not None, found)
      with output:
        pass
    self.assertEqual(
        [path.name for path in self.folder.iterdir()], ['moments.safetensors']
    )
    with self.assertRaisesRegex(InputError, 'already has files'):
      with self.claim(tokens='all'):
        pass

  def test_another_command_loses_nothing_unasked(self):
    self.stop(tokens='all', kinds='mlp')
    other = dict(tokens='last', kinds='mlp')
    sentence = r'run with other flags \(--tokens\) had found .*--overwrite'
    with self.assertRaisesRegex(InputError, sentence):
      with self.claim(**other):
        pass
    with self.claim(**other, overwrite=True) as output:
      self.assertFalse(output.resumed)
    with self.claim(tokens='all', kinds='mlp') as output:  # nothing was begun
      self.assertIsNotNone(output.pieces({}).load(1))
    with self.claim(**other, overwrite=True) as output:
      output.begin()
      self.assertIsNone(output.pieces({}).load(1))

  def test_a_stop_that_found_nothing_is_in_nobodys_way(self):
    self.stop(found=False, tokens='all')
    (self.folder / 'moments.safetensors').unlink()
    with self.claim(tokens='last') as output:
      self.assertFalse(output.resumed)

  def test_what_is_refused_leaves_nothing_but_what_was_found(self):
    for found in (False, True):
      with self.assertRaises(InputError):
        with self.claim(tokens='all') as output, output:
          output.begin()
          if found:
            output.pieces({}).save({'x': np.ones(1)}, 1)
          raise InputError('refused')
      self.assertEqual((self.folder / 'unfinished').exists(), found)

  def test_a_run_killed_as_it_began_is_in_nobodys_way(self):
    (self.folder / 'unfinished').mkdir()
    with self.claim(tokens='all') as output:
      self.assertFalse(output.resumed)
      output.begin()

  def test_a_folder_that_is_not_ours_stays(self):
    (self.folder / 'unfinished').mkdir()
    (self.folder / 'unfinished' / 'novel.txt').write_text('old')
    for overwrite in (False, True):
      with self.assertRaisesRegex(InputError, 'no run that was stopped'):
        with self.claim(overwrite=overwrite):
          pass
    self.assertTrue((self.folder / 'unfinished' / 'novel.txt').is_file())

  def test_versions_are_part_of_a_piece(self):
    self.stop(tokens='all')
    with self.claim(tokens='all') as output:
      with mock.patch.object(common, 'versions', return_value={'jax': '0'}):
        self.assertIsNone(output.pieces({}).load(1))


class StatesTest(Case):

  def edit(self, place, batches, **options):
    """Edits batches; tells which edits' states were not recalled."""
    missing = []

    def edit(params, state, edits, *, memory):
      del params, state
      for one in edits:
        found = memory.get(one)
        if found is None:
          missing.append(one.number)
          number = np.full((1, 2), one.number, np.float32)
          rest = (np.ones(1),) * 4
          memory.put(one, Targets(number, number, *rest))
        else:
          np.testing.assert_array_equal(found.z, [[one.number] * 2])

    editor = states.keeping(base.Editor(None, edit, edit), place, **options)
    for batch in batches:
      editor.edit(None, None, batch)
    return missing

  def test_edits_alone(self):
    a, b, c = facts.random_edits(3, seed=1, contexts=2)
    place = kept.Kept(self.folder, {})
    self.assertEqual(self.edit(place, [[a, b]]), [a.number, b.number])
    self.assertEqual(self.edit(place, [[b], [c, a]]), [c.number])

  def test_edits_in_a_sequence_depend_on_those_before(self):
    a, b, c = facts.random_edits(3, seed=1, contexts=2)
    place = kept.Kept(self.folder, {})
    run = lambda *batches: self.edit(place, batches, in_sequence=True)
    self.assertEqual(run([a], [b, c]), [a.number, b.number, c.number])
    self.assertEqual(run([a], [b, c]), [])
    self.assertEqual(run([a], [c, b]), [])  # within a batch none is first
    self.assertEqual(run([b], [a]), [b.number, a.number])
    self.assertEqual(run([a], [a]), [a.number])


if __name__ == '__main__':
  absltest.main()
