"""What the library's functions refuse, and in which words."""

from __future__ import annotations

import pathlib

import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import api
from jaxedit.models import loading
from jaxedit.testing import models
from jaxedit.types import InputError, Probe

SPEC = models.tiny_spec('llama', vocab=400)
FACT = {'prompt': '{} is in', 'subject': 'Paris', 'target': 'Italy'}
PROBE = {'kind': 'locality', 'prompt': 'Rome is in', 'answer': 'Italy'}


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
    params = models.random_params(SPEC, 0)
    tokenizer = text_tokenizers.byte_level(begin=True)
    model = loading.Model(
        SPEC, params, pathlib.Path(), 'ab' * 32, {}, tokenizer=tokenizer
    )
    with self.assertRaisesRegex(InputError, f'method {method} needs --editor'):
      api.edit(model, FACT, method)


if __name__ == '__main__':
  absltest.main()
