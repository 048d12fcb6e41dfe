"""From flags to a method with its settings, and all that is refused on the way."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
import programs
from absl import flags
from absl.testing import absltest, parameterized

from experiments import anyedit_batch, edit, memit_batch
from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.registry import METHODS
from jaxedit.methods.settings import settings_of
from jaxedit.runs import cli, method_flags
from jaxedit.types import InputError

PROGRAMS = {'fact': memit_batch, 'text': anyedit_batch}
PAIRS = [
    (kind, name) for kind in PROGRAMS for name in method_flags.methods_for(kind)
]
EMMET = dict(method='emmet', anyedit=False)
ALPHA = dict(method='alphaedit')


@contextlib.contextmanager
def parsed(program, given):
  with programs.defined(program) as names:
    cli.parse(['program', *(f'--{k}={v}' for k, v in given.items())])
    yield names


def chosen(kind='text', **given):
  with parsed(PROGRAMS[kind], given):
    return method_flags.from_flags(kind)


def recipe(kind='text', **given):
  return chosen(kind, **given).config.recipe()


class ChosenTest(parameterized.TestCase):

  @parameterized.parameters(*PAIRS)
  def test_settings_are_the_published_ones(self, kind, name):
    found, method = chosen(kind, method=name), METHODS[name]
    self.assertIs(found.method, method)
    config = method.published(kind, method.chunkable and kind == 'text')
    if kind == 'text':
      if method.chunkable:
        config = anyedit(config)
        self.assertEqual(found.name, f'{name}+anyedit')
      plain = chosen(kind, method=name, anyedit=False)
      self.assertEqual(plain.config, method.published(kind))
    self.assertEqual(found.config, config)

  @parameterized.parameters(*PAIRS)
  def test_every_setting_can_be_given(self, kind, name):
    examples = {bool: False, int: 3, float: 0.25, str: 'x'}
    for flag, one in settings_of(METHODS[name].config).items():
      if one.only not in ('', kind):
        continue
      example = examples[one.kind]
      if one.choices:
        example = one.choices[-1]
      given = {flag: example}
      if flag == 'activations':
        given['dtype'] = example
      found = one.of(chosen(kind, method=name, **given).config)
      self.assertEqual(found, (example,) if one.many else example, flag)

  def test_protocol_has_all_settings(self):
    settings = chosen('fact', method='memit', layers='0,1').settings
    self.assertEqual(settings['layers'], [0, 1])
    self.assertEqual(settings['value']['steps'], 25)
    self.assertEqual(settings['moment_weight'], 15000)
    self.assertEqual((settings['post'], settings['parity']), ('none', 'none'))
    self.assertEqual((settings['site'], settings['ridge']), ('mlp/down', 1))
    self.assertEqual(settings['anchor'], 'subject_last')

  def test_without_chunks(self):
    found = chosen(anyedit=False)
    self.assertEqual(found.name, 'memit')
    self.assertIsNone(found.settings['chunks'])
    self.assertEqual(found.settings['anchor'], 'prompt_last')

  def test_chunks(self):
    found = chosen(window=3, overlap=1, boundary='sentence', method='pmet')
    self.assertEqual(found.name, 'pmet+anyedit')
    chunks = {'window': 3, 'overlap': 1, 'boundary': 'sentence'}
    self.assertEqual(found.config.chunks._asdict(), chunks)
    self.assertEqual(found.settings['chunks'], chunks)

  def test_pmet_stops_by_its_own_rule(self):
    target = chosen(method='pmet').config.target
    self.assertEqual((target.argmax_stop, target.kl), (0.01, 0))

  def test_unke_stops_early_with_chunks_alone(self):
    for anyedit_, threshold in ((True, 5e-3), (False, 0)):
      found = chosen(method='unke', anyedit=anyedit_)
      self.assertEqual(found.config.target.threshold, threshold)
      self.assertEqual(found.settings['value']['threshold'], threshold)
      self.assertFalse(found.config.pads)

  @parameterized.parameters(0.5, 0.1)
  def test_a_given_ridge_holds_for_one_fact(self, ridge):
    found = recipe(**EMMET)
    self.assertEqual((found.ridge_of(1), found.ridge_of(2)), (0, 0.1))
    self.assertEqual(found.ridge_of(1, preserved=3), 0.1)
    given = chosen(**EMMET, ridge=ridge)
    found = given.config.recipe()
    self.assertEqual((found.ridge_of(1), found.ridge_of(2)), (ridge, ridge))
    self.assertIsNone(given.settings['single_edit_ridge'])

  def test_rect(self):
    found = recipe('fact', post='rect')
    self.assertEqual((found.rect_density, found.prune), (0.4, False))
    found = recipe('fact', post='prune')
    self.assertEqual((found.rect_density, found.prune), (1, True))


class ParityTest(parameterized.TestCase):

  @parameterized.parameters(
      (
          'memit',
          'alphaedit',
          dict(null_space_threshold=0.02, preserve_previous=True),
      ),
      ('easyedit', 'alphaedit', dict(null_space_threshold=0.02)),
      ('easyedit', 'rome', dict(moments=False)),
      ('easyedit', 'emmet', dict(single_edit_ridge=None)),
      (
          'easyedit',
          'kn',
          dict(
              quantity='easyedit', sharing=0.0, row_norms=False, new_weight=1.0
          ),
      ),
      ('easyedit', 'ft_l', dict(train_begin=True)),
      ('easyedit', 'ft_m', dict(append_end=False)),
      (
          'anyedit',
          'alphaedit',
          dict(null_space_threshold=0.02, preserve_previous=False),
      ),
      ('anyedit', 'unke', dict(pads=True)),
      (
          'easyedit',
          'wise',
          dict(counts_one_more=True, decays_all=True, whole_rows=True),
      ),
      ('anyedit', 'memit', dict(shadowed_schedule=True)),
      ('ultraedit', 'ultraedit', dict(prior_tokens=0.0, unbiased=True)),
  )
  def test_bundles(self, bundle, method, wanted):
    kind = 'text' if 'text' in METHODS[method].accepts else 'fact'
    found = chosen(kind, parity=bundle, method=method).settings
    plain = chosen(kind, method=method).settings
    self.assertEqual(found['parity'], bundle)
    for name, value in wanted.items():
      self.assertEqual(found[name], value)
      if name != 'preserve_previous':
        self.assertNotEqual(plain[name], value)
    if 'null_space_threshold' in wanted:  # the share has no effect
      self.assertNotIn('null_space_share', found)
      self.assertIn('null_space_share', plain)

  def test_mend_as_easyedit(self):
    found = chosen('fact', parity='easyedit', method='mend').settings
    self.assertTrue(found['joint'])
    self.assertFalse(chosen('fact', method='mend').settings['joint'])

  def test_every_bundle_is_tested(self):
    bundles = {b: set(m.parity) for b, m in METHODS.items() if m.parity}
    want = {
        'alphaedit': {'memit', 'easyedit', 'anyedit'},
        'emmet': {'easyedit'},
        'ft_l': {'easyedit'},
        'ft_m': {'easyedit'},
        'kn': {'easyedit'},
        'memit': {'anyedit'},
        'mend': {'easyedit'},
        'rome': {'easyedit'},
        'ultraedit': {'ultraedit'},
        'unke': {'anyedit'},
        'wise': {'easyedit'},
    }
    self.assertEqual(bundles, want)

  def test_a_given_flag_wins_over_a_bundle(self):
    gram = np.diag([1.0, 2.0, 3.0, 6.0])
    rank = (
        lambda found: found.config.recipe()
        .preconditioner.factor(gram)
        .basis.shape[-1]
    )
    found = chosen(**ALPHA, parity='easyedit', null_space_share=0.6)
    self.assertEqual(found.settings['null_space_share'], 0.6)
    self.assertIsNone(found.settings['null_space_threshold'])
    self.assertEqual(rank(found), 2)
    found = chosen(**ALPHA, parity='easyedit', null_space_threshold=1.5)
    self.assertEqual(found.settings['null_space_threshold'], 1.5)
    self.assertEqual(rank(found), 1)

  def test_only_plain_methods_have_the_shadowed_schedule(self):
    layers = dict(parity='anyedit', layers='0,1')
    found = recipe(**layers)
    self.assertEqual((found.name, found.share(2)), ('memit+anyedit', 0.5))
    self.assertEqual(found.share(1), 1)
    found = recipe(**layers, anyedit=False)
    self.assertEqual(found.name, 'memit (shadowed)')
    self.assertEqual((found.share(2), found.share(1)), (0.5, 0.5))


class RefusedTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(layers='a,b'), '--layers=a,b: give whole numbers'),
      (dict(layers=''), '--layers=: give whole numbers'),
      (dict(rrome_keys='plain'), '--rrome_keys is no setting of memit; it belong'
       's to r-rome: leave'),
      (dict(unke_steps=9), '--unke_steps is no setting of memit; it belongs to '
       'unke: leave'),
      (dict(activations='bfloat16'), '--activations=bfloat16 rounds nothing .*'
       'give --dtype=bfloat16'),
      (dict(kl_weight=0.1), '--kl_weight is for facts, and these are long'),
      (ALPHA | dict(null_space_share=1), 'null_space_share=1 leaves no direction'),
      (ALPHA | dict(null_space_share=0.5, null_space_threshold=0.1),
       'exclude each other: leave one'),
      (dict(method='unke', post='rect'), '--post is no setting of unke; .*leave'),
      (dict(method='pmet', parity='easyedit'), '--parity=easyedit sets nothing '
       'for pmet, but for alphaedit and emmet and .*rome and wise: leave'),
      (dict(window=3, overlap=3), 'overlap'),
      (dict(method='rome', layers='1,2'), 'ROME edits one layer; name one'),
      (dict(anyedit=False, parity='anyedit', layers='0,1', batch_size=3),
       '3 edits a batch in 2 layers .*take at most 2 a batch'),
      (ALPHA | dict(anyedit=False, parity='anyedit', layers='0,1', batch_size=3),
       '3 edits a batch in 2 layers .*take at most 2 a batch'),
  )  # fmt: skip
  def test_one_message(self, given, message):
    with self.assertRaises(InputError) as caught:
      chosen(**given)
    (found,) = caught.exception.problems
    self.assertRegex(found, message)

  @parameterized.parameters(*PAIRS)
  def test_settings_of_other_methods(self, kind, name):
    owned, given, want = settings_of(METHODS[name].config), {}, []
    for flag, owners in method_flags._known(kind).items():
      if flag in owned:
        continue
      one = next(iter(owners.values()))
      given[flag] = one.choices[0] if one.choices else 1
      want.append(
          f'--{flag} is no setting of {name}; it belongs to'
          f' {" and ".join(owners)}: leave it out or change --method'
      )
    with self.assertRaises(InputError) as caught:
      chosen(kind, method=name, **given)
    self.assertSameElements(caught.exception.problems, want)

  def test_all_at_once(self):
    with self.assertRaises(InputError) as caught:
      chosen(rrome_keys='mean', unke_steps=1, layers='x')
    self.assertLen(caught.exception.problems, 3)

  @parameterized.parameters(
      ('fact', dict(method='unke'), 'method=unke: value should be one of'),
      ('text', dict(window=0), 'window=0'),
      ('text', dict(overlap=-1), 'overlap=-1'),
      ('text', dict(boundary='word'), 'boundary=word'),
      ('fact', dict(clamp='much'), 'clamp=much: give a number'),
      ('fact', dict(value_rate='nan'), 'value_rate=nan.*finite'),
      ('fact', dict(moment_weight=0), 'moment_weight=0.*above 0'),
      ('fact', dict(value_steps=0), 'value_steps=0'),
      ('fact', dict(modle='x'), "flag 'modle'. Did you mean: model"),
      ('text', dict(windw=3), "flag 'windw'. Did you mean: window"),
      ('fact', dict(num_edits='few'), 'num_edits=few: give a whole number'),
      ('fact', dict(dtype='float16'), 'dtype=float16: .*float32'),
      ('fact', dict(batch_size=0), 'batch_size=0'),
      ('fact', dict(seed=-1), 'seed=-1'),
      ('fact', dict(max_new_tokens=-1), 'max_new_tokens=-1'),
      ('text', dict(facts='none'), 'facts=none'),
      ('text', dict(temperature=-1), 'temperature=-1'),
  )
  def test_flags_that_do_not_parse_end_with_code_2(self, kind, given, message):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      with self.assertRaises(SystemExit) as caught:
        chosen(kind, **given)
    self.assertEqual(caught.exception.code, 2)
    (line,) = err.getvalue().splitlines()
    self.assertRegex(line, f'^error: .*{message}')


class HelpTest(parameterized.TestCase):

  @parameterized.parameters(*PAIRS)
  def test_every_setting_is_there_with_its_default(self, kind, name):
    with parsed(PROGRAMS[kind], {}):
      self.assertRegex(
          flags.FLAGS['method'].help, f'{name}: {METHODS[name].summary}'
      )
      for flag, owners in method_flags._known(kind).items():
        if name not in owners:
          continue
        text = flags.FLAGS[flag].help
        default = method_flags.written(owners[name].default)
        shown = re.search(r'Default: (.*)\.$', text)[1].split('; ')
        mine = [x for x in shown if re.search(rf'\b(all|{name})\b', x)]
        self.assertTrue(any(x.endswith(f' {default}') for x in mine), text)

  def test_one_program_takes_the_flags_of_all(self):
    every = set()
    for program in PROGRAMS.values():
      with programs.defined(program) as names:
        every |= set(names)
    with programs.defined(edit) as names:
      self.assertSameElements(names, every | {'kind'})


if __name__ == '__main__':
  absltest.main()
