"""The registry, and the settings that flags, help and the documentation are made
from.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

from absl.testing import absltest, parameterized

from jaxedit.methods import settings
from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.registry import METHODS, method_of
from jaxedit.methods.settings import configure, setting, settings_of
from jaxedit.runs import method_flags
from jaxedit.targets import TargetConfig
from jaxedit.types import InputError

PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs/methods.md'
every_method = parameterized.named_parameters((name, name) for name in METHODS)


class RegistryTest(parameterized.TestCase):

  @every_method
  def test_entries_are_complete(self, name):
    method = METHODS[name]
    self.assertEqual(method.name, name)
    self.assertTrue(method.summary and method.source)
    self.assertTrue(method.accepts)
    self.assertLessEqual(method.accepts, {'fact', 'text'})
    for bundle, values in method.parity.items():
      self.assertIsInstance(method.configure(**values), method.config, bundle)
    for kind in {'fact', 'text'} - method.accepts:
      with self.assertRaisesRegex(InputError, f'{name} edits .*choose another'):
        method.published(kind)
    if 'text' in method.accepts:
      self.assertEqual(method.published('text').anchor, 'prompt_last')
      if method.chunkable:
        config = anyedit(method.published('text', True), window=7)
        self.assertEqual(
            (config.chunks.window, config.anchor), (7, 'prompt_last')
        )
      else:
        with self.assertRaisesRegex(InputError, 'chunk by chunk; switch'):
          method.published('text', True)

  @every_method
  def test_settings_are_described(self, name):
    config = METHODS[name].config()
    for flag, one in settings_of(METHODS[name].config).items():
      self.assertEqual(one.name, flag)
      self.assertTrue(one.help)
      self.assertNotIn('\n', one.help)
      self.assertEqual(one.of(config), one.default)
      self.assertEmpty(settings.errors(one, one.default))

  def test_unknown_methods(self):
    self.assertIs(method_of('rome'), METHODS['rome'])
    with self.assertRaisesRegex(InputError, "'mimit' is unknown.*'memit'"):
      method_of('mimit')
    with self.assertRaisesRegex(InputError, "'xyz' is unknown; known are ada"):
      method_of('xyz')


@dataclasses.dataclass(frozen=True)
class Config:
  target: TargetConfig = TargetConfig(clamp=4.0)
  share: float = setting(0.5, 'a share', low=0, flag='my_share')
  weight: float = setting(2.0, 'a weight', low=0, exclusive=True)
  keys: str = setting('mean', 'which keys', choices=('mean', 'plain'))
  hidden: int = 3
  rate: float = setting(0.1, 'a rate', implies={'hidden': 0})
  few: tuple[int, ...] = setting((1,), 'some', high=8, excludes=('path',))
  path: str | None = setting(None, 'a file')


class ConfigureTest(parameterized.TestCase):

  def test_settings_by_name_and_by_field(self):
    found = configure(
        Config(), dict(my_share=0.25, weight=1.0, hidden=4, value_rate=0.1)
    )
    self.assertEqual((found.share, found.weight, found.hidden), (0.25, 1, 4))
    self.assertEqual(found.target, TargetConfig(clamp=4.0, rate=0.1))
    self.assertEqual(configure(Config(), {'share': 0.25}).share, 0.25)
    self.assertEqual(configure(Config(), {}), Config())
    self.assertEqual(configure(Config(), dict(few=[2, 3])).few, (2, 3))

  def test_a_setting_of_targets_joins_a_whole_target(self):
    given = dict(target=TargetConfig(steps=3), clamp=1.0)
    self.assertEqual(
        configure(Config(), given).target, TargetConfig(steps=3, clamp=1.0)
    )

  def test_a_given_setting_may_imply_another(self):
    self.assertEqual(configure(Config(), dict(rate=0.1)).hidden, 0)
    self.assertEqual(configure(Config(), dict(hidden=4, rate=0.1)).hidden, 4)

  @parameterized.parameters(
      (dict(my_share=-1), 'my_share is -1; it must be at least 0'),
      (dict(my_share=float('nan')), 'my_share is nan; it must be at least 0'),
      (dict(weight=0), 'weight is 0; it must be above 0'),
      (dict(keys='all'), "keys is 'all'; use mean or plain"),
      (dict(value_steps=0), 'value_steps is 0; it must be at least 1'),
      (dict(wieght=1), "setting 'wieght' is unknown; did you mean 'weight'"),
      (dict(xyz=1), "setting 'xyz' is unknown; known are .*my_share"),
      (dict(share=-1), 'share is -1; it must be at least 0'),
      (dict(share='x'), "share is 'x'; give a number"),
      (dict(value_steps=True), 'value_steps is True; give a whole number'),
      (dict(keys=None), 'keys is None; give a text'),
      (dict(few=3), 'few is 3; give a list, each a whole number'),
      (dict(few=[1, 'x']), "few is 'x'; give a whole number"),
      (dict(few=(9,)), 'few is 9; it must be at most 8'),
      (dict(few=(1,), path='x'), 'few and path exclude each other: leave one'),
  )
  def test_refused(self, given, message):
    with self.assertRaisesRegex(InputError, f'^{message}') as caught:
      configure(Config(), given)
    self.assertLen(caught.exception.problems, 1)

  def test_all_problems_at_once(self):
    with self.assertRaises(InputError) as caught:
      configure(Config(), dict(weight=-1, keys='all', xyz=1))
    self.assertLen(caught.exception.problems, 3)

  def test_none_is_allowed_where_it_is_a_value(self):
    self.assertIsNone(
        METHODS['alphaedit'].configure(null_space_threshold=None)
        .null_space_threshold
    )  # fmt: skip


class PageTest(absltest.TestCase):
  """docs/methods.md; a comment in it says how its table is written."""

  def test_the_table_is_that_of_the_registry(self):
    text = PAGE.read_text('utf-8')
    table, _ = text.split("end='')\" -->\n")[1].split('<!-- End of the table')
    self.assertEqual(table, method_flags.table())

  def test_every_method_has_a_section(self):
    headings = re.findall('^## (.+)$', PAGE.read_text('utf-8'), re.M)
    slugs = [heading.lower().replace(' ', '-') for heading in headings]
    self.assertContainsSubset(METHODS, slugs)


if __name__ == '__main__':
  absltest.main()
