"""The output folder of runs that are interrupted, resume, and are refused."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from jaxedit import io
from jaxedit.runs.output import Output, make_folder
from jaxedit.types import InputError

ALL, LAST = {'tokens': 'all'}, {'tokens': 'last'}


class OutputTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)

  def claim(self, command, overwrite=False):
    return Output(str(self.folder), command, overwrite=overwrite)

  def interrupt(self, command=ALL, found=True):
    """Leaves what an interrupted run leaves."""
    output = self.claim(command)
    self.assertFalse(output.resumed)
    output.begin()
    (self.folder / 'moments.safetensors').write_bytes(b'')
    if found:
      (output.unfinished / 'piece').write_text('x')

  def names(self):
    return sorted(path.name for path in self.folder.iterdir())

  @parameterized.parameters(True, False)
  def test_the_same_command_resumes(self, found):
    self.interrupt(found=found)
    with self.claim(ALL) as output:
      self.assertTrue(output.resumed)
      output.begin()
      self.assertEqual((output.unfinished / 'piece').exists(), found)
    self.assertEqual(self.names(), ['moments.safetensors'])
    with self.assertRaisesRegex(InputError, 'already has files; .*--overwrite'):
      self.claim(ALL)

  def test_another_command_loses_nothing_unasked(self):
    self.interrupt(ALL | {'kinds': 'mlp'})
    other = LAST | {'kinds': 'mlp'}
    message = r'run with other flags \(--tokens\) had found .*--overwrite'
    with self.assertRaisesRegex(InputError, message):
      self.claim(other)
    # A flag that only one of them was given differs too.
    with self.assertRaisesRegex(InputError, r'\(--kinds, --seed\)'):
      self.claim(ALL | {'seed': '1'})
    self.assertFalse(self.claim(other, overwrite=True).resumed)
    # Nothing was begun, so nothing was lost.
    output = self.claim(ALL | {'kinds': 'mlp'})
    self.assertTrue(output.resumed)
    self.assertTrue((output.unfinished / 'piece').exists())
    del output  # and its lock
    output = self.claim(other, overwrite=True)
    output.begin()
    self.assertFalse((output.unfinished / 'piece').exists())

  def test_a_run_that_found_nothing_is_in_nobodys_way(self):
    self.interrupt(found=False)
    (self.folder / 'moments.safetensors').unlink()
    self.assertFalse(self.claim(LAST).resumed)

  @parameterized.parameters(True, False)
  def test_what_is_refused_leaves_nothing_but_what_was_found(self, found):
    with self.assertRaises(InputError):
      with self.claim(ALL) as output:
        output.begin()
        if found:
          (output.unfinished / 'piece').write_text('x')
        raise InputError('refused')
    self.assertEqual((self.folder / 'unfinished').exists(), found)

  def test_what_is_refused_takes_back_what_it_wrote(self):
    (self.folder / 'moments.safetensors').write_text('given')
    with self.assertRaises(InputError):
      writes = ('templates.json', 'moments.safetensors')
      with Output(
          str(self.folder), ALL, overwrite=True, writes=writes
      ) as output:
        output.begin()
        (self.folder / 'templates.json').write_text('[]')
        (self.folder / 'notes.txt').write_text('of a user')
        (output.unfinished / 'targets').mkdir()
        output.forget()
        raise InputError('refused')
    self.assertEqual(self.names(), ['moments.safetensors', 'notes.txt'])

  @parameterized.parameters(True, False)
  def test_a_folder_that_a_refused_run_made_is_removed(self, begun):
    place = self.folder / 'new'
    with self.assertRaises(InputError):
      with Output(str(place), ALL, overwrite=False) as output:
        if begun:
          output.begin()
        raise InputError('refused')
    self.assertFalse(place.exists())

  def test_a_folder_is_of_one_run_at_a_time(self):
    first = self.claim(ALL)
    with self.assertRaisesRegex(InputError, 'another run is at work there'):
      self.claim(LAST, overwrite=True)
    with first:
      first.begin()
    self.assertEqual(self.names(), [])
    self.claim(LAST)

  def test_a_run_that_is_killed_holds_no_lock(self):
    code = (
        'import sys, time; from jaxedit.runs.output import Output\n'
        'held = Output(sys.argv[1], {}, overwrite=True)\n'
        'print("held", flush=True); time.sleep(100)'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', code, str(self.folder)], stdout=subprocess.PIPE
    )
    self.assertEqual(process.stdout.readline(), b'held\n')
    with self.assertRaisesRegex(InputError, 'another run is at work there'):
      self.claim(ALL)
    process.kill()
    process.communicate()
    self.claim(ALL)

  def test_drafts_of_runs_that_were_killed_are_removed(self):
    dead, own = 2**22 + 1, os.getpid()
    for name in ('model', 'delta.safetensors'):
      draft = io._draft(self.folder / name).name
      for pid in (dead, own):  # containers give every run the same number
        token = draft[-8:] if pid == dead else 'ffff0000'
        path = draft.replace(f'{own}-{draft[-8:]}', f'{pid}-{token}')
        (self.folder / path).mkdir()
    kept = io._draft(self.folder / 'own')
    kept.touch()
    self.claim(ALL, overwrite=True)
    self.assertEqual(self.names(), [kept.name])

  def test_what_is_interrupted_can_be_resumed(self):
    with self.assertRaises(KeyboardInterrupt):
      with self.claim(ALL) as output:
        output.begin()
        raise KeyboardInterrupt
    self.assertTrue(self.claim(ALL).resumed)

  def test_a_run_killed_as_it_began_is_in_nobodys_way(self):
    (self.folder / 'unfinished').mkdir()
    output = self.claim(ALL)
    self.assertFalse(output.resumed)
    output.begin()

  def test_a_run_killed_while_it_wrote_its_command_is_in_nobodys_way(self):
    (self.folder / 'unfinished').mkdir()
    draft = io._draft(self.folder / 'unfinished' / 'command.json')
    dead = str(2**22 + 1)  # no process has this number
    draft.with_name(draft.name.replace(str(os.getpid()), dead)).write_text('{')
    self.assertFalse(self.claim(ALL).resumed)

  def test_a_run_killed_at_its_end_has_ended(self):
    with mock.patch.object(shutil, 'rmtree', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        with self.claim(ALL) as output:
          io.write_json(self.folder / 'results.json', {})
          output.unfinished.mkdir()
          (output.unfinished / 'piece').write_text('x')
    self.assertFalse((self.folder / 'unfinished').exists())
    with self.assertRaisesRegex(InputError, 'already has files'):
      self.claim(ALL)

  @parameterized.parameters(False, True)
  def test_a_folder_that_is_not_ours_stays(self, overwrite):
    (self.folder / 'unfinished').mkdir()
    (self.folder / 'unfinished' / 'novel.txt').write_text('old')
    with self.assertRaisesRegex(InputError, 'no interrupted run has left it'):
      self.claim(ALL, overwrite)
    self.assertTrue((self.folder / 'unfinished' / 'novel.txt').is_file())

  def test_stale_results_go_when_the_run_begins(self):
    for name in ('results.json', 'keep.txt'):
      (self.folder / name).write_text('old')
    (self.folder / 'model').mkdir()
    output = self.claim(ALL, overwrite=True)
    self.assertEqual(self.names(), ['keep.txt', 'model', 'results.json'])
    output.begin(['results.json', 'model', 'deltas'])
    self.assertEqual(self.names(), ['keep.txt', 'unfinished'])
    (self.folder / 'results.json').write_text('old')
    output.clear(['results.json'])
    self.assertEqual(self.names(), ['keep.txt', 'unfinished'])
    self.assertEqual(io.read_json(output.unfinished / 'command.json'), ALL)

  def test_a_link_to_a_folder_is_unlinked_and_not_followed(self):
    elsewhere = self.folder / 'elsewhere'
    elsewhere.mkdir()
    (elsewhere / 'keep.txt').write_text('old')
    (self.folder / 'model').symlink_to(elsewhere)
    self.claim(ALL, overwrite=True).begin(['model'])
    self.assertTrue((elsewhere / 'keep.txt').is_file())
    self.assertFalse((self.folder / 'model').exists())

  def test_places_that_cannot_be_written(self):
    path = self.folder / 'file'
    path.write_text('')
    for place in (path, path / 'below'):
      with self.assertRaisesRegex(InputError, 'cannot be written .*; choose'):
        make_folder(str(place))


if __name__ == '__main__':
  absltest.main()
