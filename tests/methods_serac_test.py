"""SERAC: its classifier by hand, trained through its program, and its memory."""

from __future__ import annotations

import functools
import itertools
import json
from unittest import mock

import jax
import numpy as np
import programs
import pytest
import tiny_encoder
import tiny_model
from absl.testing import absltest, parameterized
from editing_runs import fact

from experiments import edit, train_editor
from jaxedit import edited as edited_lib
from jaxedit.convert import hub
from jaxedit.deltas import Edited
from jaxedit.methods import serac
from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.hypernet import network
from jaxedit.methods.hypernet.factors import Sequences, Text, maps_of
from jaxedit.methods.scope import answers, classifier, examples, training
from jaxedit.methods.scope.training import SeracTraining
from jaxedit.models import loading, tokenizer
from jaxedit.runs import training as runs_training
from jaxedit.testing import models
from jaxedit.types import LOCALITY, REPHRASE, EditRequest, InputError, Probe

NAMES = [
    f'{a} {b}'
    for a in 'Anna Boris Clara Dora Emil Franz'.split()
    for b in 'Mill Stone River Field'.split()
]
FORMS = (
    ('The mother tongue of {} is', '{} speaks', ('French', 'Danish')),
    ('{} plays the', 'The instrument of {} is', ('piano', 'guitar')),
)


def record(i, name):
  prompt, near, objects = FORMS[i % 2]
  other = NAMES[(i + 7) % len(NAMES)]
  return fact(
      name, objects[i // 2 % 2], prompt=prompt, target_true='Thai',
      paraphrases=[near.format(name)], neighbours=[prompt.format(other)],
  )  # fmt: skip


def request(i, name):
  prompt, near, objects = FORMS[i % 2]
  probes = (
      Probe(REPHRASE, near.format(name), (objects[0],)),
      Probe(LOCALITY, prompt.format('Nobody'), ('Thai',)),
  )
  return EditRequest(
      i + 1, str(i + 1), prompt, name, objects[0], objects[1], probes=probes
  )


class ClassifierTest(parameterized.TestCase):
  """The loss of three records, the first two of one subject."""

  SAME = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
  TRAINED = {'slope': 10.0, 'cut': 0.5}

  def cosines(self):
    near, local, other = np.random.default_rng(0).uniform(-0.2, 1, (3, 3, 3))
    return near, local, other

  def by_hand(self, config):
    near, local, other = self.cosines()
    if config.rule == 'sigmoid':
      yes = lambda u: 1 / (1 + np.exp(-10 * (u - 0.5)))
    else:
      yes = lambda u: np.exp(-(2 - 2 * u))  # |a - b|^2 of vectors of length 1
    hits = np.mean([-np.log(yes(near[i, i])) for i in range(3)])
    cost = lambda u: -np.log(1 - yes(u))
    found = []  # (weight, costs of a query's entries)
    for i in range(3):
      apart = [j for j in range(3) if not self.SAME[i, j]]
      if config.negatives == 'own':
        kinds = [(1, [local[i, i]]), (2, [other[i, i]])]
      else:
        kinds = [
            (1, near[i, apart]),
            (1, local[i]),
            (2, [*other[i, apart], other[i, i]]),
        ]
      found += [(w, [cost(u) for u in some]) for w, some in kinds]
    if config.negatives == 'all':
      found = [(w, [c]) for w, costs in found for c in costs]
    total = sum(w * max(costs) for w, costs in found)
    return hits + total / sum(w for w, _ in found)

  @parameterized.product(negatives=classifier.NEGATIVES, rule=classifier.RULES)
  def test_loss(self, negatives, rule):
    config = SeracTraining(negatives=negatives, rule=rule, other_relations=2.0)
    with jax.enable_x64(True):
      found = classifier.loss(config, self.TRAINED, self.cosines(), self.SAME)
      self.assertAlmostEqual(float(found), self.by_hand(config), delta=1e-12)

  def test_equal_texts(self):
    # s = 1 there: 1 - s is replaced, and its gradient is finite.
    score = lambda u: classifier.log_odds('distance', {}, u)[1]
    value, grad = jax.value_and_grad(score)(1.0)
    self.assertAlmostEqual(value, np.log(np.finfo(np.float32).eps), delta=1e-4)
    self.assertTrue(np.isfinite(grad))
    self.assertAlmostEqual(
        classifier.threshold('distance', {}), 1 - np.log(2) / 2
    )


class AnswersTest(parameterized.TestCase):
  """The mixture of two models, and its loss, by hand."""

  def draw(self, *shape):
    x = np.random.default_rng(0).standard_normal(shape)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  def test_mixture(self):
    f, h = self.draw(2, 3, 2, 5)
    s = np.array([0.2, 0.0, 1.0])
    with jax.enable_x64(True), np.errstate(divide='ignore'):
      found = answers.mixture(f, h, (np.log(s), np.log(1 - s)))
    part = s[:, None, None]
    want = np.log((1 - part) * np.exp(f) + part * np.exp(h))
    np.testing.assert_allclose(found, want, atol=1e-12)
    np.testing.assert_array_equal(found[1], f[1])
    np.testing.assert_array_equal(found[2], h[2])

  def test_loss(self):
    f, h = self.draw(2, 2, 3, 2, 5)
    labels = np.random.default_rng(1).integers(5, size=(2, 3, 2))
    weight = np.array([[1, 1], [1, 0], [1, 1]], np.float32)
    pack = lambda kind: Sequences((), (), (), labels[kind], weight)
    texts = answers.Answers((), (), (), pack(0), pack(1))
    s = np.array([[0.9, 0.8, 0.7], [0.3, 0.1, 0.2]])
    odds = [(np.log(x), np.log(1 - x)) for x in s]
    with jax.enable_x64(True):
      found = answers.mixture_loss(tuple(f), tuple(h), odds, texts, 0.1)
    nll = kl = 0.0
    for b, o in itertools.product(range(3), range(2)):
      if not weight[b, o]:
        continue
      mix = [
          (1 - s[k, b]) * np.exp(f[k, b, o]) + s[k, b] * np.exp(h[k, b, o])
          for k in range(2)
      ]
      nll -= np.log(mix[0][labels[0, b, o]])
      kl += np.sum(np.exp(f[1, b, o]) * (f[1, b, o] - np.log(mix[1])))
    self.assertAlmostEqual(float(found), (0.1 * nll + kl) / 5, delta=1e-12)

  def test_the_changed_model(self):
    spec = models.tiny_spec('llama')
    params, maps = models.random_params(spec, 0), maps_of(spec, (1, 2))
    trained = answers.init(spec, maps, 2, 0, np.float32)
    tokens = np.random.default_rng(0).integers(3, 90, (2, 8))
    some = [Text(one, np.array([5, 7]), np.array([4, 9])) for one in tokens]
    texts = lib.pack(some, (2, 10, 3))
    run = functools.partial(answers.log_probabilities, spec)
    plain = run(params, texts)
    # V begins at zero: nothing changes.
    deltas = answers.deltas_of(maps, trained)
    np.testing.assert_allclose(run(params, texts, deltas), plain, atol=1e-5)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    deltas = answers.deltas_of(maps, trained)
    changed = edited_lib.apply(params, Edited(deltas))
    found = run(params, texts, deltas)
    np.testing.assert_allclose(found, run(changed, texts), atol=1e-5)
    self.assertGreater(np.abs(found - plain).max(), 1e-2)


class ExamplesTest(parameterized.TestCase):

  def records(self, count=12):
    some = [request(i, name) for i, name in enumerate(NAMES[:count])]
    return [examples.example(one, None, SeracTraining(), 32) for one in some]

  def test_other_relations(self):
    some = self.records()
    for one, text in zip(some, examples.other_relations(some, (0,))):
      other = FORMS[one.request.number % 2][0]
      self.assertEqual(text, other.format(one.request.subject))
    alike = [one for one in some if one.request.number % 2]
    self.assertEqual(set(examples.other_relations(alike, (0,))), {''})

  def test_what_is_stored(self):
    one = request(1, 'Anna')
    stray = EditRequest(1, '1', 'No such word. {} is in', 'Anna', 'Rome')
    self.assertEqual(examples.entry_text(one), 'Anna plays the')
    self.assertEqual(examples.entry_text(stray), 'Anna is in')
    self.assertEqual(
        examples.entry_text(one, True), 'Anna plays the[SEP]piano[SEP]'
    )
    self.assertIsNone(examples.example(stray, None, SeracTraining(), 32))


class Setup(programs.Setup):
  """A classifier that was trained on 20 facts and validated on four."""

  def __init__(self):
    super().__init__(train_editor)
    self.encoder = self.folder / 'encoder'
    self.encoder.mkdir()
    tiny_encoder.write_encoder(self.encoder)
    some = enumerate(NAMES)
    self.data = self.write(*(record(i, name) for i, name in some))
    self.others = self.write(
        *(record(i, x) for i, x in enumerate(('Gerd Hill', 'Hans Ford')))
    )

  def given(self):
    return dict(
        data=self.data, method='serac', encoder=self.encoder, rate=1e-3,
        scope_rate=1e-2, batch_size=4, steps=40, validate_every=20, held_out=4,
    )  # fmt: skip

  def edit(self, **changes):
    """Edits with a trained classifier."""
    given = dict.fromkeys(self.given())
    given |= dict(
        data=self.others, method='serac', encoder=self.encoder, batch_size=1,
        max_new_tokens=2, eval_batch_size=4, editor=WHOLE.folder,
    )  # fmt: skip
    return self.run(edit, **{**given, **changes})


def setUpModule():
  global RUNS, WHOLE
  RUNS = Setup()
  WHOLE = RUNS.run()


def tearDownModule():
  RUNS.close()


class TrainingTest(programs.Case):

  def test_held_out_loss_falls(self):
    self.assertEqual(WHOLE.code, 0, WHOLE.err)
    log = json.loads((WHOLE.folder / 'training.json').read_text())
    self.assertEqual([x['step'] for x in log['log']], [0, 20, 40])
    self.assertLess(log['held_out_loss']['trained'], log['log'][0]['loss'])
    self.assertContainsSubset(('hit', 'miss', 'other'), log['log'][-1])
    trained = network.load(WHOLE.folder)
    self.assertEqual(trained.subjects, {network.subject_hash(x) for x in NAMES})
    self.assertEqual(trained.record['encoder']['width'], 24)

  def test_interrupted_training_resumes_with_the_same_bits(self):
    folder, step, count = RUNS.path('again'), training.step, itertools.count()

    def stop(*args):
      if next(count) == 31:
        raise KeyboardInterrupt
      return step(*args)

    with mock.patch.object(training, 'step', stop):
      self.assertEqual(RUNS.run(output_dir=folder).code, 130)
    self.succeed(RUNS.run, output_dir=folder)
    same = lambda path: (path / network.FILE).read_bytes()
    self.assertEqual(same(folder), same(WHOLE.folder))

  def test_as_published(self):
    done = self.succeed(RUNS.run, parity='serac', steps=20)
    record = network.load(done.folder).record
    self.assertEqual((record['rule'], record['entry']), ('distance', 'fact'))
    self.succeed(RUNS.edit, editor=done.folder)

  def test_a_trained_counterfactual_model(self):
    done = self.succeed(
        RUNS.run, counterfactual='trained', layers='1,2', rank=2, answers=2,
        answer_rate=1e-2, longest=48,
    )  # fmt: skip
    log = json.loads((done.folder / 'training.json').read_text())['log']
    self.assertLess(log[-1]['nll'], log[0]['nll'])
    run = self.succeed(RUNS.edit, editor=done.folder)
    edited, _ = run.delta(model_hash=RUNS.base.hash)
    self.assertTrue(edited.prompting.routes)
    self.assertEqual({d.layers for d in edited.deltas}, {(1, 2)})
    self.assertLen(edited.deltas, 3)
    apart = self.succeed(
        RUNS.edit, editor=done.folder, reset=True, batch_size=1
    )
    for name in ('reliability', 'generalization'):
      one, other = (x.results['metrics'] for x in (run, apart))
      self.assertEqual(set(one), set(other), name)

  @pytest.mark.long
  def test_the_way_of_the_port(self):
    done = self.succeed(
        RUNS.run,
        parity='easyedit',
        steps=20,
        answers=2,
        edit_weight=1.0,
        longest=48,
    )
    settings = network.load(done.folder).record['settings']
    self.assertFalse(settings['supervised'])
    self.succeed(RUNS.edit, editor=done.folder)

  @parameterized.named_parameters(
      ('records', dict(num_records=5, batch_size=8), 'are too few'),
      ('setting', dict(lstm_width=4), 'no setting of serac'),
      ('rule', dict(scope_rule='cosine'), 'scope_rule'),
      ('encoder', dict(encoder='nothing'), 'nothing'),
  )
  def test_refused(self, changes, message):
    unreached = [(loading, 'load_model'), (runs_training, 'fit')]
    out = RUNS.path('refused')
    changes = {'output_dir': out, **changes}
    self.refuse(RUNS.run, [message], unreached, **changes)
    self.assertFalse(out.exists())


class EditingTest(programs.Case):

  def test_a_sequence_and_its_file(self):
    done = self.succeed(RUNS.edit)
    protocol = json.dumps(done.results['protocol'])
    self.assertIn('editor', protocol)
    edited, _ = done.delta(model_hash=RUNS.base.hash)
    memory = edited.prompting
    self.assertLen(memory.facts, 2)
    own = tokenizer.load_tokenizer(RUNS.model)
    base, trained = hub.load_encoder(RUNS.encoder), network.load(WHOLE.folder)
    with self.assertRaisesRegex(InputError, 'embedded by encoder'):
      memory.bound(own, base)
    encoder, cut = serac.scope_encoder(trained, base)
    self.assertEqual(memory.threshold, cut)
    bound = memory.bound(own, encoder)
    key = memory.facts[1].key
    self.assertEqual(bound.in_force([key], None), [(1,)])
    # The newest of equal facts counts; forgotten, the older one does again.
    again = bound.added([bound.facts[1]])
    self.assertEqual(again.in_force([f'A stray text. {key}'], None), [(2,)])
    left = again.forgotten(memory.facts[0].id)
    self.assertEqual([one.key for one in left.facts], [key, key])
    self.assertEqual(left.forgotten(memory.facts[1].id).facts, ())
    with self.assertRaisesRegex(InputError, 'made for model'):
      edited_lib.load(done.folder / 'delta.safetensors', model_hash='c' * 64)

  def refused(self, message, **changes):
    out = RUNS.path('refused')
    self.refuse(RUNS.edit, [message], [], output_dir=out, **changes)

  def test_another_model(self):
    other = tiny_model.make(RUNS.path('other'), seed=3)
    self.refused('trained for model', model=other)

  def test_another_encoder(self):
    other = RUNS.path('wide')
    other.mkdir()
    tiny_encoder.write_encoder(other, hidden_size=32)
    self.refused(
        r'trained on encoder \w+ \(3 layers of width 24\), given \w+ \(3 layers'
        r' of width 32\)',
        encoder=other,
    )

  def test_subjects_that_it_was_trained_on(self):
    seen = RUNS.write(record(0, 'Ida Lake'), record(1, NAMES[2]))
    self.refused(r'subjects of 1 of 2 records \(record 2\)', data=seen)

  def test_no_editor(self):
    self.refused('needs --editor', editor=None)


if __name__ == '__main__':
  absltest.main()
