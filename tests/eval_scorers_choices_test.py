"""Given answers: which one is preferred, against torch; and what is read."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import tempfile

import hf_oracle
import jax.numpy as jnp
import numpy as np
import text_tokenizers
import torch
from absl.testing import absltest, parameterized

from jaxedit.deltas import UNEDITED, Edited, LowRank
from jaxedit.edited import algebra, open_model
from jaxedit.eval.scorers import choices
from jaxedit.eval.scorers.choices import Item
from jaxedit.models import loading
from jaxedit.types import InputError

TOKENIZER = text_tokenizers.byte_level()
ITEMS = [
    Item('Where is the Eiffel Tower?', ('Paris', 'in the city of Sydney'), 0),
    Item('What does Toko Yasuda play?', ('the guitar', 'the piano'), 1),
    Item('Which city is a twin of Sydney?', ('Wellington', 'Paris', 'é'), 2),
    Item('What is the capital of France?', ('Sydney', 'Paris'), 1),
]
PIQA = {'goal': 'To open a door', 'sol1': 'turn the knob', 'sol2': 'sing'}


@functools.cache
def pair():
  """One random model in torch and here."""
  model = hf_oracle.make('llama', vocab_size=512)
  with tempfile.TemporaryDirectory() as folder:
    hf_oracle.save(model, folder)
    return model, loading.load_model(folder, 'float32')


def change(seed: int) -> Edited:
  spec, rng = pair()[1].spec, np.random.default_rng(seed)
  draw = lambda n: jnp.asarray(
      0.5 * rng.standard_normal((1, 2, n)), jnp.float32
  )
  return Edited(
      (LowRank((1,), 'mlp/down', draw(spec.mlp_width), draw(spec.width)),)
  )


def ask(edited=UNEDITED, items=ITEMS, params=None, **options):
  model = pair()[1]
  if params is not None:
    model = dataclasses.replace(model, params=params)
  lm = open_model(model, edited, batch_size=3)
  return choices.choose(lm, items, TOKENIZER, **options)


def oracle(item: Item) -> tuple[int, int]:
  """One forward pass an answer."""
  ids = lambda text: TOKENIZER(text, add_special_tokens=False)['input_ids']
  front, sums = ids(f'Question: {item.question}\nAnswer:'), []
  for choice in item.choices:
    back = ids(f' {choice}')
    with torch.no_grad():
      logits = pair()[0](torch.tensor([front + back])).logits[0]
    rows = torch.log_softmax(logits, -1)[len(front) - 1 : -1]
    sums.append(sum(row[token].item() for row, token in zip(rows, back)))
  bytes_of = [len(choice.encode()) for choice in item.choices]
  return int(np.argmax(sums)), int(np.argmax(np.divide(sums, bytes_of)))


class ChooseTest(absltest.TestCase):

  def test_equals_torch(self):
    want = np.array([oracle(item) for item in ITEMS])
    got = ask()
    np.testing.assert_array_equal(got.picked[:, 0], want.T)
    self.assertGreater(len(set(want[:, 0])), 1)
    self.assertTrue((want[:, 0] != want[:, 1]).any())  # both rules matter
    found, labels = got.report(), [item.label for item in ITEMS]
    self.assertEqual(found['accuracy'], np.mean(want[:, 0] == labels))
    self.assertEqual(found['accuracy_norm'], np.mean(want[:, 1] == labels))
    self.assertNotIn('same', found)
    low, high = found['intervals']['accuracy']
    self.assertBetween(found['accuracy'], low, high)

  def test_edits_side_by_side_answer_one_by_one(self):
    edits = [change(0), change(1)]
    apart = ask(algebra.stack(edits), edits=(0, 1))
    alone = [ask(one) for one in edits]
    np.testing.assert_array_equal(
        apart.picked, np.concatenate([one.picked for one in alone], axis=1)
    )
    before = ask()
    same = [one.report(before)['same'] for one in alone]
    self.assertLess(min(same), 1)
    self.assertAlmostEqual(apart.report(before)['same'], np.mean(same))
    self.assertIn('mean over edits', apart.report()['protocol'])
    joined = choices.join([apart, apart])
    self.assertEqual(joined.picked.shape, (2, 4, len(ITEMS)))

  def test_numbers_that_are_not_finite_choose_nothing(self):
    params = dict(pair()[1].params)
    params['final_norm'] = {'scale': params['final_norm']['scale'] * np.nan}
    found = ask(params=params)
    self.assertTrue((found.picked == -1).all())
    self.assertEqual(found.report()['accuracy'], 0)


class ReadTest(parameterized.TestCase):

  def read(self, rows, labels=None, limit=None):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = folder / 'valid.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    if labels is not None:
      (folder / 'valid-labels.lst').write_text(labels)
    return choices.read(str(path), limit)

  def test_piqa_with_and_without_labels_inside(self):
    want = Item(PIQA['goal'], (PIQA['sol1'], PIQA['sol2']), 1)
    self.assertEqual(self.read([PIQA | {'label': 1}]), [want])
    self.assertEqual(self.read([PIQA, PIQA], '0\n1\n')[1], want)

  def test_any_number_of_answers(self):
    row = {'question': 'Which?', 'choices': ['a', 'b', 'c'], 'label': 2}
    self.assertEqual(self.read([row]), [Item('Which?', ('a', 'b', 'c'), 2)])

  def test_limit(self):
    rows = [PIQA | {'label': 1}] * 3 + [{}]
    self.assertLen(self.read(rows, limit=2), 2)

  @parameterized.parameters(
      (PIQA, "record 1: field 'label' is None; give the number of the right"),
      (PIQA | {'label': 2}, "'label' is 2; .* 0 to 1"),
      (PIQA | {'label': True}, "'label' is True"),
      ({'goal': 'x', 'sol1': 'y', 'label': 0}, "'sol2' is missing; add it"),
      ({'question': 'x', 'choices': ['y'], 'label': 0}, 'two answers at least'),
      (['x'], 'record 1: is no object'),
      ({'question': 'x', 'choices': 'y', 'label': 0}, 'must be a list.$'),
  )
  def test_bad_questions(self, row, want):
    with self.assertRaisesRegex(InputError, want):
      self.read([row])

  def test_the_file_of_labels(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = folder / 'piqa.valid.jsonl'
    path.write_text('\n'.join([json.dumps(PIQA)] * 2))
    (folder / 'piqa.valid-labels.lst').write_text('1\n0\n')
    self.assertEqual([one.label for one in choices.read(str(path))], [1, 0])
    with self.assertRaisesRegex(InputError, '2 questions, and 3 lines in'):
      self.read([PIQA] * 2, '0\n1\n0\n')

  def test_a_label_that_is_no_number(self):
    with self.assertRaisesRegex(InputError, "'label' is 'x'"):
      self.read([PIQA], 'x')

  def test_nothing_to_ask(self):
    with self.assertRaisesRegex(InputError, 'holds no question'):
      self.read([])
    with self.assertRaisesRegex(InputError, 'cannot be read'):
      choices.read('nowhere.jsonl')


if __name__ == '__main__':
  absltest.main()
