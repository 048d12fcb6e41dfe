"""What the library's functions refuse, in which words; edits of edited models."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

import chex
import editors
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import api
from jaxedit import edited as edited_lib
from jaxedit.deltas import UNEDITED
from jaxedit.methods.base import Run
from jaxedit.methods.closed_form.editor import pruned
from jaxedit.models import loading
from jaxedit.runs import editing
from jaxedit.testing import models
from jaxedit.types import InputError, Probe

SPEC = models.tiny_spec('llama', vocab=400)
FACT = {'prompt': '{} is in', 'subject': 'Paris', 'target': 'Italy'}
PROBE = {'kind': 'locality', 'prompt': 'Rome is in', 'answer': 'Italy'}


@functools.cache
def tiny():
  params = models.random_params(SPEC, 0)
  tokenizer = text_tokenizers.byte_level(begin=True)
  return loading.Model(
      SPEC, params, pathlib.Path(), 'ab' * 32, {}, tokenizer=tokenizer
  )


class RequestTest(parameterized.TestCase):

  def test_of_a_dict(self):
    for probes in (
        PROBE,
        [PROBE],
        [Probe('locality', 'Rome is in', ('Italy',))],
    ):
      one = api.request_of({**FACT, 'probes': probes}, 3)
      self.assertEqual((one.number, one.id, one.subject), (3, '3', 'Paris'))
      self.assertEqual(
          one.probes, (Probe('locality', 'Rome is in', ('Italy',)),)
      )
    many = api.request_of({**FACT, 'probes': [PROBE | {'answers': ['a', 'b']}]})
    self.assertEqual(many.probes[0].answers, ('a', 'b'))

  @parameterized.parameters(
      ('Paris', "request 1 is 'Paris'; give a dict of prompt, subject, target"),
      ({'prompt': 'a'}, "request 1: field 'target' is missing; add it"),
      ({**FACT, 'new': 'x'}, "request 1: field 'new' is unknown; known are"),
      (
          {**FACT, 'probes': [PROBE, {'kind': 'alias', 'prompt': 'It'}]},
          'request 1: probe 2 has no answer; add it',
      ),
      (
          {**FACT, 'probes': ['Rome is in']},
          'probe 1 has no kind and no prompt and no answer; add it',
      ),
  )
  def test_refuses(self, given, words):
    with self.assertRaisesRegex(InputError, words):
      api.request_of(given)

  @parameterized.parameters('MEMIT', 'R-ROME', 'AlphaEdit', 'ULTRAEDIT')
  def test_names_in_capitals_are_hinted_at(self, name):
    with self.assertRaisesRegex(
        InputError, f'method {name!r} is unknown; did you mean {name.lower()!r}'
    ):
      api.editor(SPEC, name)

  @parameterized.parameters('mend', 'ke', 'serac')
  def test_a_trained_editor_is_asked_for(self, method):
    with self.assertRaisesRegex(InputError, f'method {method} needs --editor'):
      api.edit(tiny(), FACT, method)


SETTINGS = {
    'memit': dict(layers=(0, 1), value_steps=2),
    'alphaedit': dict(layers=(0, 1), value_steps=2, null_space_share=0.5),
    'ft_l': dict(layers=(1,), fit_steps=2),
    'grace': dict(layers=(1,), value_steps=2),
    'memprompt': {},
}
FACTS = [FACT, FACT | {'subject': 'Rome', 'target': 'Ghana'}]


def needs_of(made):
  """What an editor of the tiny model needs."""
  found = editors.resources(made, SPEC)
  return {k: tiny().tokenizer if v is None else v for k, v in found.items()}


def edit(model, fact, method, **options):
  """Edits as the library does, with second moments that are made up."""
  settings = SETTINGS[method]
  return api.edit(
      model,
      fact,
      method,
      contexts=('{}',),
      resources=needs_of(api.editor(SPEC, method, **settings)),
      **settings | options,
  )


class SequenceTest(parameterized.TestCase):

  @parameterized.parameters(*SETTINGS)
  def test_goes_on_as_one_by_one(self, method):
    with mock.patch.object(editing, 'advance', wraps=editing.advance) as spy:
      first = edit(tiny(), FACTS[0], method)
      both = edit(first, FACTS[1], method)
    made = api.editor(SPEC, method, **SETTINGS[method])
    model, total = tiny(), UNEDITED
    state = made.init(model, needs_of(made))
    for call in spy.call_args_list:
      batch = call.args[4]
      result = made.edit(model, state, batch, Run())
      state, total = result.state, result.edited
      if not made.cumulative:
        params = edited_lib.apply(model.params, result.edited)
        model, total = dataclasses.replace(model, params=params), UNEDITED
    want = api.EditedModel(model, total, None)
    prompts = ('Paris is in', 'Rome is in')
    got = [both.score(prompt, 'Ghana') for prompt in prompts]
    self.assertNotEqual(got, [first.score(p, 'Ghana') for p in prompts])
    for one, other in zip(got, (want.score(p, 'Ghana') for p in prompts)):
      self.assertAlmostEqual(one, other, delta=1e-4)
    self.assertIs(both.revert(), tiny())

  def test_saved_and_loaded(self):
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'x'
    made = edit(tiny(), FACTS, 'ft_l', independent=True)
    made.save(path)
    again = api.load_edited(tiny(), path)
    chex.assert_trees_all_equal(again.edited, made.edited)
    score = lambda one: one.score('Paris is in', 'Ghana', edit_id=1)
    self.assertEqual(score(again), score(made))
    with self.assertRaisesRegex(InputError, 'edit its merge'):
      edit(again, FACT, 'ft_l')
    other = dataclasses.replace(tiny(), hash='cd' * 32)
    with self.assertRaisesRegex(InputError, 'made for model abab'):
      api.load_edited(other, path)
    made.save(path, chat={'before': 'Q: ', 'after': '\nA:', 'end': ''})
    self.assertIsNone(api.load_edited(tiny(), path).chat)  # as `edit` was told
    about = {'model_hash': tiny().hash, 'chat': {'before': 'Q: ', 'after': ''}}
    edited_lib.save(path, made.edited, about)
    self.assertEqual(api.load_edited(tiny(), path).chat, 'Q: {}')

  def test_an_adapter_needs_a_base(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    made = edit(tiny(), FACTS[0], 'memit')
    with self.assertRaisesRegex(InputError, 'lies in no folder: merge it'):
      made.export(folder / 'x')
    one, _ = made.export(folder / 'x', base='org/model')
    self.assertEqual((one.site, one.rank), ('mlp/down', 1))
    merged = dataclasses.replace(made.merge(), config={'a': 'folder'})
    again = edit(merged, FACTS[1], 'memit')
    with self.assertRaisesRegex(InputError, 'lies in no folder: merge it'):
      again.export(folder / 'y')

  def test_the_change_of_all_is_shaped_once(self):
    first = edit(tiny(), FACTS[0], 'memit', post='prune')
    both = edit(first, FACTS[1], 'memit', post='prune')
    total = both.so_far.total
    whole, want = (
        edited_lib.apply(tiny().params, one)
        for one in (total, pruned(tiny().params, total))
    )
    got = edited_lib.apply(tiny().params, both.edited)
    chex.assert_trees_all_equal(got, want)
    with self.assertRaises(AssertionError):
      chex.assert_trees_all_close(got, whole)

  def test_refuses(self):
    alone = edit(tiny(), FACTS, 'ft_l', independent=True)
    for one in (alone, alone.select(1)):
      with self.assertRaisesRegex(InputError, r'one batch .*; edit its merge'):
        edit(one, FACT, 'ft_l')
    first = edit(tiny(), FACTS[0], 'ft_l')
    with self.assertRaisesRegex(InputError, 'independent edits start from'):
      edit(first, FACTS[1], 'ft_l', independent=True)
    for method, options, words in (
        ('memit', {}, 'with ft_l'),
        ('ft_l', {'fit_steps': 3}, 'with other settings of ft_l'),
    ):
      with self.assertRaisesRegex(InputError, f'this sequence began {words};'):
        edit(first, FACTS[1], method, **options)
    again = edit(first.merge(), FACTS[1], 'memit')
    self.assertNotEqual(again.model.hash, tiny().hash)


if __name__ == '__main__':
  absltest.main()
