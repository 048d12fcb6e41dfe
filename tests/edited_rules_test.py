"""Prompting and routing rules, and the edits and prompts that are refused."""

from __future__ import annotations

import pathlib
import tempfile

import chex
import edits
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from edits import KINDS, LENGTHS, SPEC, deltas_of, model, random_queries

from jaxedit import api
from jaxedit import edited as edited_lib
from jaxedit.deltas import UNEDITED, Edited, Prompting
from jaxedit.edited import Query, apply_model, open_model
from jaxedit.models import decoder
from jaxedit.models.decode import Decoding
from jaxedit.types import InputError


class Prefixed(Prompting):
  """Puts tokens of each prompt's edit before it."""

  def __init__(self):
    self.calls = []

  def rewrite(self, prompts, edit_ids, speak=None):
    self.calls.append((prompts, edit_ids))
    ids = [0] * len(prompts) if edit_ids is None else edit_ids
    return [[50 + i, 60, *prompt] for i, prompt in zip(ids, prompts)]


class LongOnly:
  """Lets the edit answer prompts of more than four tokens."""

  def __init__(self):
    self.calls = []

  def applies(self, prompts, edit_ids):
    self.calls.append((prompts, edit_ids))
    return [len(prompt) > 4 for prompt in prompts]


class RuleTest(parameterized.TestCase):

  def both(self, edited, queries, edit_ids=None):
    """(scores, texts) of queries and their prompts."""
    lm = open_model(model(), edited, batch_size=4)
    texts = lm.generate(
        [list(query.prompt) for query in queries],
        max_new_tokens=8,
        edit_ids=edit_ids,
        decoding=Decoding(temperature=1.0),
    )
    return lm.score(queries, edit_ids=edit_ids), texts

  @parameterized.product(name=('low_rank', 'dense', 'mixed'), size=(None, 2))
  def test_prompts_are_routed_and_rewritten(self, name, size):
    prompting, routing = Prefixed(), LongOnly()
    deltas = deltas_of(name, size)
    queries = random_queries()
    ids = None if size is None else [i % 2 for i in range(9)]
    own = lambda i: 0 if ids is None else ids[i]
    long = [i for i, n in enumerate(LENGTHS) if n > 4]
    written = [
        Query((50 + own(i), 60, *query.prompt), query.answers)
        for i, query in enumerate(queries)
    ]
    plain, base = dict(deltas=deltas, size=size), self.both(UNEDITED, queries)
    for rules, answered, asked in (
        (dict(prompting=prompting), range(9), written),
        (dict(routing=routing), long, queries),
        (dict(prompting=prompting, routing=routing), long, written),
    ):
      got = self.both(Edited(**plain, **rules), queries, ids)
      edited = self.both(Edited(**plain), asked, ids)
      for i in range(9):
        want = edited if i in answered else base
        self.assertEqual(got[1][i], want[1][i])
        for one, other in zip(got[0][i], want[0][i], strict=True):
          self.assertAlmostEqual(one.nll, other.nll, delta=1e-5)
          self.assertEqual(one[1:], other[1:])
      for one, other in zip(got, base):
        self.assertNotEqual(
            [one[i] for i in answered], [other[i] for i in answered]
        )
    # Rules see prompts as they were written, once a call, those routed away
    # not at all.
    self.assertLen(prompting.calls, 4)
    self.assertLen(routing.calls, 4)
    as_written = [query.prompt for query in queries]
    self.assertEqual(routing.calls[-1], (as_written, ids))
    some = [as_written[i] for i in long]
    self.assertEqual(
        prompting.calls[-1], (some, ids and [ids[i] for i in long])
    )

  def test_rewritten_prompts_are_checked(self):
    class Long(Prompting):

      def rewrite(self, prompts, edit_ids, speak=None):
        return [[3] * 80, [500], *prompts[2:]]

    lm = open_model(model(), Edited(prompting=Long()))
    queries = [Query((4, 5), ((6,),))] * 3
    with self.assertRaises(InputError) as caught:
      lm.score(queries)
    self.assertLen(caught.exception.problems, 2)
    self.assertIn('--demonstration_count', caught.exception.problems[0])
    with self.assertRaises(InputError) as caught:
      lm.generate([[4, 5]] * 3, max_new_tokens=4)
    self.assertLen(caught.exception.problems, 2)

  def test_edits_side_by_side_are_merged_one_by_one(self):
    both = Edited(deltas_of('low_rank', 2), size=2)
    front = api.EditedModel(model(), both, None)
    with self.assertRaisesRegex(InputError, 'select one of them'):
      front.merge()
    merged = [front.select(i).merge() for i in range(2)]
    for i, one in enumerate(merged):
      want = edited_lib.apply(model().params, edited_lib.select(both, i))
      chex.assert_trees_all_equal(one.params, want)
    # Each is a model of its own to what is kept by a model's hash.
    self.assertLen({model().hash, *(one.hash for one in merged)}, 3)
    again = front.select(0).merge()
    self.assertEqual(again.hash, merged[0].hash)
    with self.assertRaisesRegex(InputError, 'edit 2 was asked for'):
      front.select(2)

  def test_what_cannot_be_merged_or_written(self):
    params = model().params
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    codebook, routed, neurons = (
        deltas_of(name) for name in ('last', 'routed', 'neurons')
    )
    rules = dict(prompting=Prefixed(), routing=LongOnly())
    for edited, words in (
        (Edited(codebook), 'it has Codebook deltas, which are no change'),
        (Edited(routed + neurons), 'Neurons deltas and Routed deltas, which'),
        (Edited(prompting=Prefixed()), 'it has a prompting rule, which'),
        (Edited(routing=LongOnly()), 'it has a routing rule, which'),
        (
            Edited(codebook, **rules),
            'Codebook deltas and a prompting rule and a routing rule, which',
        ),
        (Edited(deltas_of('low_rank', 2), size=2), '2 independent edits side'),
    ):
      self.assertFalse(edited.mergeable)
      with self.assertRaisesRegex(InputError, f'cannot be merged: .*{words}'):
        edited_lib.apply(params, edited)
    for rule in rules:
      edited = Edited(codebook, **{rule: rules[rule]})
      with self.assertRaisesRegex(InputError, f'has a {rule} rule, which no'):
        edited_lib.save(folder / 'x', edited, {'model_hash': 'ab'})
      with self.assertRaisesRegex(InputError, f'has a {rule} rule.*open_model'):
        tokens = np.array([[3, 4]])
        layout = decoder.token_layout(tokens > 0)
        apply_model(SPEC, params, edited, tokens, layout)
      with self.assertRaisesRegex(ValueError, 'only single edits without'):
        edited_lib.stack([edited, edited])
      with self.assertRaisesRegex(ValueError, f'both edits have a {rule} rule'):
        edited_lib.add(edited, edited)
      front = api.EditedModel(model(), edited, None)
      with self.assertRaisesRegex(
          InputError, f'merged: .*a {rule} rule, which'
      ):
        front.merge()
      with self.assertRaisesRegex(
          InputError, f'merged: .*a {rule} rule, which'
      ):
        front.merge(folder / 'merged')
      with self.assertRaisesRegex(InputError, f'has a {rule} rule, which no'):
        front.save(folder / 'x')
      self.assertEmpty([*folder.iterdir()])
      both = edited_lib.add(edited, Edited(neurons))
      self.assertIs(getattr(both, rule), rules[rule])


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters('low_rank', 'dense', 'last', 'mixed')
  def test_edit_ids(self, name):
    many = open_model(model(), Edited(deltas_of(name, 3), size=3))
    one = open_model(model(), Edited(deltas_of(name)))
    for lm, ids, words in (
        (many, None, '3 independent edits lie side by side: let edit_ids'),
        (one, [0, 0], 'where no edits lie side by side'),
        (many, [0], 'edit_ids has 1 entries for 2'),
        (many, [0, 1, 2], 'edit_ids has 3 entries for 2'),
        (many, [0, 3], 'edit_ids has 3; the model has edits 0 to 2'),
        (many, [-1, 0], 'edit_ids has -1; the model has edits 0 to 2'),
    ):
      with self.assertRaisesRegex(InputError, words):
        lm.score([Query((4, 5), ((6,),))] * 2, edit_ids=ids)
      with self.assertRaisesRegex(InputError, words):
        lm.generate([[4, 5]] * 2, max_new_tokens=2, edit_ids=ids)

  @parameterized.product(
      name=('low_rank', 'dense', 'neurons', 'last', 'routed'), size=(None, 2)
  )
  def test_deltas_that_do_not_fit(self, name, size):
    delta = deltas_of(name, size)[0]
    wide = lambda x: jnp.concatenate([x, x], axis=-1)
    last = list(delta.axes)[-1] if name != 'last' else 'values'
    other = {n: getattr(delta, n)[:1] for n in delta.axes}
    for faulty, words in (
        (
            delta.replace(layers=(0, 3)),
            'layers are .0, 3., where some of 0 to 2',
        ),
        (delta.replace(layers=(-1, 2)), 'layers are .-1, 2., where some of'),
        (delta.replace(layers=(2, 0)), 'ascending order'),
        (delta.replace(layers=(1, 1)), 'ascending order'),
        (delta.replace(site='mlp/middle'), 'no layers/mlp/middle/kernel'),
        (delta.replace(site='attn_norm'), 'no layers/attn_norm/kernel'),
        (delta.replace(site='attn/q/kernel'), 'no layers/attn/q/kernel/kernel'),
        (delta.replace(site=''), 'no layers//kernel'),
        (delta.replace(**{last: wide(getattr(delta, last))}), f'{last!r} has'),
        (
            delta.replace(**other),
            r'has shape \[1, .*, where \[2, .* is expected',
        ),
        (delta.replace(site='attn/v'), 'has shape .* is expected'),
    ):
      with self.assertRaisesRegex(InputError, words) as caught:
        open_model(model(), Edited((faulty,), size=size))
      self.assertIn('load the model it was made for', str(caught.exception))
    # The axis of edits is there exactly where the edit says so.
    for wrong in (None, 2, 3):
      if wrong != size:
        with self.assertRaisesRegex(InputError, 'has shape .* is expected'):
          open_model(model(), Edited((delta,), size=wrong))
    open_model(model(), Edited((delta,), size=size))

  def test_output_sites(self):
    draw = edits.Draw(SPEC)
    for delta in (draw.low_rank(), draw.dense()):
      for site in ('attn', 'mlp', 'block'):
        with self.assertRaisesRegex(InputError, f'no layers/{site}/kernel'):
          open_model(model(), Edited((delta.replace(site=site),)))

  def test_nothing_to_choose_from(self):
    for name in ('last', 'routed'):
      (delta,) = deltas_of(name)
      leaves = {n: a for n, a in delta.axes.items() if a}
      none = delta.replace(**{n: getattr(delta, n)[:, :0] for n in leaves})
      with self.assertRaisesRegex(InputError, 'nothing to choose from'):
        open_model(model(), Edited((none,)))

  def test_problems_come_together(self):
    (good,), (bad,) = deltas_of('last'), deltas_of('neurons')
    bad = bad.replace(layers=(0, 9))
    worse = good.replace(layers=(4, 5), site='mlp/middle')
    with self.assertRaises(InputError) as caught:
      open_model(model(), Edited((good, bad, worse)))
    self.assertLen(caught.exception.problems, 3)

  def test_batch_size(self):
    with self.assertRaisesRegex(InputError, 'batch_size is 0'):
      open_model(model(), batch_size=0)

  def test_no_prompts(self):
    for name in KINDS:
      lm = open_model(model(), Edited(deltas_of(name, 2), size=2))
      self.assertEqual(lm.score([], edit_ids=[]), [])
      self.assertEqual(lm.generate([], max_new_tokens=3, edit_ids=[]), [])


if __name__ == '__main__':
  absltest.main()
