"""Training an editor through its program, and editing with what it made."""

from __future__ import annotations

import json
import shutil
import signal
from unittest import mock

import numpy as np
import programs
import tiny_model
from absl.testing import absltest, parameterized
from editing_runs import fact

from experiments import edit, train_editor
from jaxedit.methods.hypernet import network, training
from jaxedit.methods.hypernet.examples import Example, shapes_of
from jaxedit.methods.hypernet.factors import Text
from jaxedit.models import loading
from jaxedit.runs import training as runs_training

_FIRST = 'Danielle Toko Sydney Paris France Yasuda'.split()
_LAST = 'Wellington Madrid Spain Tower'.split()
SUBJECTS = [f'{a} {b}' for a in _FIRST for b in _LAST]
TARGETS = ('piano', 'guitar', 'city', 'twin')


def facts(subjects):
  return [
      fact(name, TARGETS[i % len(TARGETS)]) for i, name in enumerate(subjects)
  ]


class Setup(programs.Setup):
  """Trainings on 24 facts, of which 4 are held out."""

  def __init__(self):
    super().__init__(train_editor)
    self.data = self.write(*facts(SUBJECTS))
    self.others = self.write(*facts(['Alan Turing', 'Ada Lovelace']))

  def given(self):
    return dict(
        data=self.data,
        method='mend',
        rank=8,
        scaled_init=True,
        descend=True,
        step_size=0.01,
        step_rate=1e-3,
        rate=1e-2,
        edit_weight=1,
        batch_size=4,
        steps=50,
        validate_every=10,
        held_out=4,
        longest=48,
    )

  def edit(self, **changes):
    """Edits with a trained editor."""
    given = dict.fromkeys(self.given())
    given |= dict(
        data=self.others,
        method='mend',
        batch_size=2,
        max_new_tokens=2,
        eval_batch_size=4,
    )
    return self.run(edit, **{**given, **changes})


def setUpModule():
  global RUNS, WHOLE
  RUNS = Setup()
  WHOLE = RUNS.run()


def tearDownModule():
  RUNS.close()


class TrainingTest(programs.Case):

  def log(self, folder):
    return json.loads((folder / 'training.json').read_text())

  def test_held_out_loss_falls(self):
    self.assertEqual(WHOLE.code, 0, WHOLE.err)
    self.assertEqual(WHOLE.files, ['editor.safetensors', 'training.json'])
    log = self.log(WHOLE.folder)
    self.assertEqual([x['step'] for x in log['log']], [0, 10, 20, 30, 40, 50])
    self.assertLess(
        log['held_out_loss']['trained'], 0.8 * log['log'][0]['loss']
    )
    self.assertIn('20 records to train on, 4 held out', WHOLE.err)
    self.assertIn('of the variables kept', WHOLE.out)

  def test_it_says_what_it_was_trained_on(self):
    trained = network.load(WHOLE.folder)
    self.assertEqual(trained.method, 'mend')
    self.assertEqual(trained.model_hash, loading.load_model(RUNS.model).hash)
    self.assertEqual(
        trained.subjects, {network.subject_hash(x) for x in SUBJECTS}
    )
    self.assertEqual(trained.record['settings']['rank'], 8)
    self.assertEqual(trained.maps.layers, (0, 1, 2))
    self.assertNotIn(b'Danielle', (WHOLE.folder / network.FILE).read_bytes())

  def test_interrupted_training_resumes_with_the_same_bits(self):
    folder, step, count = RUNS.path('again'), training.step, 0

    def stop(*args):
      nonlocal count
      count += 1
      if count == 36:  # between two checkpoints
        raise KeyboardInterrupt
      return step(*args)

    with mock.patch.object(training, 'step', stop):
      self.assertEqual(RUNS.run(output_dir=folder).code, 130)
    self.assertNotIn(network.FILE, [p.name for p in folder.iterdir()])
    with mock.patch.object(training, 'step', mock.Mock(side_effect=step)) as s:
      done = self.succeed(RUNS.run, output_dir=folder)
      self.assertEqual(s.call_count, 20)
    same = lambda path: (path / network.FILE).read_bytes()
    self.assertEqual(same(folder), same(WHOLE.folder))
    times = lambda log: [{**x, 'seconds': 0} for x in log['log']]
    self.assertEqual(times(self.log(folder)), times(self.log(WHOLE.folder)))
    self.assertEqual(done.files, WHOLE.files)

  def scripted(self, losses, **changes):
    """A run whose held-out losses are given, the unedited model's first."""
    script = iter(losses)
    judged = lambda self, variables: runs_training.Point(
        self.steps, next(script)
    )
    step = lambda trial, params, state, batch: (state, 0.0)
    with (
        mock.patch.object(runs_training._Fitting, '_judged', judged),  # pylint: disable=protected-access
        mock.patch.object(training, 'step', step),
    ):
      return RUNS.run(**changes)

  def test_sigterm_saves_the_present_step(self):
    """Before the first validation, at one, and between two."""
    folder, calls, step = RUNS.path('stopped'), 0, training.step

    def stop(*args):
      nonlocal calls
      calls += 1
      if calls in (3, 10, 23):
        signal.raise_signal(signal.SIGTERM)
      return step(*args)

    with mock.patch.object(training, 'step', stop):
      for steps in (3, 10, 23):
        done = RUNS.run(output_dir=folder)
        self.assertEqual(done.code, 143, done.err)
        self.assertIn(
            f"by SIGTERM in 'train', {steps} of 50 steps; saved in"
            f' {folder}/unfinished',
            done.err.splitlines()[-1],
        )
        self.assertEqual(calls, steps)
      self.succeed(RUNS.run, output_dir=folder)
      self.assertEqual(calls, 50)
    same = lambda path: (path / network.FILE).read_bytes()
    self.assertEqual(same(folder), same(WHOLE.folder))
    times = lambda log: [{**x, 'seconds': 0} for x in log['log']]
    self.assertEqual(times(self.log(folder)), times(self.log(WHOLE.folder)))

  def test_early_stopping_keeps_the_best(self):
    nan = float('nan')
    losses = [9.0, nan, 3.0, 2.0, nan, 5.0, 1.0]
    done = self.scripted(losses, patience=20)
    self.assertEqual(done.code, 0, done.err)
    log = self.log(done.folder)
    self.assertEqual(log['step'], 30)
    self.assertEqual(log['log'][-1]['step'], 50)
    self.assertIsNone(log['log'][1]['loss'])
    self.assertIn('no lower held-out loss since step 30', done.out)
    # As EasyEdit does: nothing stops, the last ones are kept.
    done = self.scripted([9.0, 5.0, 3.0, 2.0, 4.0, 5.0], patience=0)
    self.assertEqual(self.log(done.folder)['step'], 50)
    done = self.scripted([9.0, 5.0], minutes=1e-9)
    self.assertEqual(self.log(done.folder)['log'][-1]['step'], 10)

  def test_a_loss_that_is_never_finite(self):
    done = self.scripted([9.0] + 5 * [float('inf')])
    self.assertEqual(done.code, 2)
    self.assertIn('lower --rate', done.err)
    self.assertNotIn(network.FILE, done.files)

  def test_excluded_subjects(self):
    kept_out = RUNS.write(*facts([SUBJECTS[3].upper(), 'Nobody', SUBJECTS[7]]))
    with mock.patch.object(
        runs_training, 'fit', mock.Mock(side_effect=KeyboardInterrupt)
    ):
      done = RUNS.run(exclude=kept_out)
    self.assertIn('2 records left out: their subjects are in', done.err)
    self.assertIn('18 records to train on', done.err)

  @parameterized.named_parameters(
      ('records', dict(num_records=5, batch_size=8), 'too few'),
      ('groups', dict(edits=3), 'does not divide'),
      ('layers', dict(layers='2,3'), 'layers'),
      ('setting', dict(lstm_width=4), 'no setting of mend'),
      ('out', dict(output_dir=None), '--out is missing'),
      ('parity', dict(method='ke', parity='mend', rank=None, scaled_init=None,
                      descend=None, step_size=None, step_rate=None),
       'sets nothing for ke'),
  )  # fmt: skip
  def test_refused(self, changes, message):
    out = RUNS.path('refused')
    unreached = [(loading, 'load_model'), (runs_training, 'fit')]
    changes = {'output_dir': out} | changes
    self.refuse(RUNS.run, [message], unreached, **changes)
    self.assertFalse(out.exists())

  def test_help(self):
    self.assert_helps(RUNS)


class EditingTest(programs.Case):

  def test_new_facts(self):
    done = self.succeed(RUNS.edit, editor=WHOLE.folder)
    protocol = done.results['protocol']
    self.assertIn('editor', json.dumps(protocol))
    delta, _ = done.delta()
    self.assertEqual(delta.deltas[0].layers, (0, 1, 2))

  def refused(self, message, **changes):
    out = RUNS.path('refused')
    changes = {'editor': WHOLE.folder, 'output_dir': out} | changes
    self.refuse(RUNS.edit, [message], [], **changes)
    self.assertFalse(out.exists())

  def test_another_model(self):
    other = tiny_model.make(RUNS.path('other'), seed=3)
    self.refused('trained for model', model=other)

  def test_subjects_that_it_was_trained_on(self):
    seen = RUNS.write(*facts(['Ada Lovelace', SUBJECTS[2]]))
    self.refused(r'subjects of 1 of 2 records \(record 2\)', data=seen)
    self.succeed(RUNS.edit, editor=WHOLE.folder, data=seen, allow_overlap=True)

  def test_another_method(self):
    self.refused('trained for --method=mend, not ke', method='ke')

  def test_no_editor(self):
    self.refused('needs --editor', editor=None)
    self.refused('holds no trained editor', editor=RUNS.path('nothing'))

  def test_other_layers(self):
    self.refused('was trained for layers', layers='0,1')

  def test_damaged(self):
    folder = RUNS.path('damaged')
    shutil.copytree(WHOLE.folder, folder)
    blob = bytearray((folder / network.FILE).read_bytes())
    blob[-5] ^= 1
    (folder / network.FILE).write_bytes(blob)
    self.refused('damaged', editor=folder)


class ShapesTest(parameterized.TestCase):

  def example(self, edit_length, other=9, scored=1):
    text = lambda n: Text(np.zeros(n, np.int32), *[np.zeros(scored, int)] * 2)
    return Example('', text(edit_length), text(other), text(other))

  def test_rare_shapes_join_larger_ones(self):
    many = [self.example(5)] * 40 + [self.example(20, 20)] * 40
    some = many + [self.example(14)]
    shapes = shapes_of(some)
    self.assertEqual(set(shapes[:40]), {(12, 12, 1)})
    self.assertEqual(set(shapes[40:]), {(24, 24, 1)})
    # The largest is rare: it takes the most frequent one with it.
    shapes = shapes_of(many[:40] + [self.example(14, 9, 3)])
    self.assertEqual(set(shapes), {(16, 12, 4)})

  def test_every_text_fits(self):
    rng = np.random.default_rng(0)
    some = [self.example(*rng.integers(1, [40, 40, 6])) for _ in range(100)]
    for one, (own, other, scored) in zip(some, shapes_of(some, 10)):
      self.assertLessEqual(len(one.edit.tokens), own)
      self.assertLessEqual(len(one.local.tokens), other)
      self.assertLessEqual(len(one.edit.index), scored)


if __name__ == '__main__':
  absltest.main()
