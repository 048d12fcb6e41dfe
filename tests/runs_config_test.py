"""Settings of a run that do not go together, found without any model."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

from absl import flags
from absl.testing import absltest, parameterized

from jaxedit.runs import cli
from jaxedit.runs.config import RunConfig, errors


class ErrorsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.config = RunConfig(output_dir=str(self.folder / 'out'))

  def errors(self, **changes):
    return errors(dataclasses.replace(self.config, **changes))

  def test_nothing_is_wrong_with_the_defaults(self):
    self.assertEmpty(self.errors())
    self.assertEmpty(self.errors(reset=False, save_model=True))

  @parameterized.parameters(
      (dict(output_dir=None), 'output_dir is missing: name a'),
      (
          dict(save_model=True, reset=True),
          'save_model needs one edited model; --reset',
      ),
      (
          dict(perplexity_text='nowhere.txt'),
          '--perplexity_text=nowhere.txt: is no file; name a plain text',
      ),
      (dict(moments='none.safetensors'), 'no such file; collect them with'),
      (dict(top_p=2.0), '--top_p.*at most 1'),
      (
          dict(per_category=1, num_edits=2),
          '--num_edits takes the first of all, --per_category of every',
      ),
  )
  def test_one_message(self, changes, message):
    (found,) = self.errors(**changes)
    self.assertRegex(found, message)

  def test_all_at_once(self):
    found = self.errors(
        output_dir=None, save_model=True, reset=True, moments='none'
    )
    self.assertLen(found, 3)

  def test_the_models_own_folder_is_not_replaced(self):
    self.config = dataclasses.replace(self.config, output_dir=str(self.folder))
    for model in ('model', 'model/deeper'):
      (found,) = self.errors(model=str(self.folder / model))
      self.assertRegex(found, 'model.* lies where .* would replace it; choose')
    self.assertEmpty(self.errors(model=str(self.folder / 'models')))


class FlagsTest(absltest.TestCase):
  """Flags of a config are its fields."""

  def define(self, *given, **options):
    known = set(flags.FLAGS)
    cli.define(RunConfig, **options)
    names = set(flags.FLAGS) - known
    self.addCleanup(
        lambda: [delattr(flags.FLAGS, name) for name in sorted(names)]
    )
    cli.parse(['program', *given])
    return names

  def test_defaults_are_those_of_the_config(self):
    names = self.define('--output_dir=x')
    fields = dataclasses.fields(RunConfig)
    self.assertSameElements(names, [field.name for field in fields])
    self.assertEqual(cli.read(RunConfig), RunConfig(output_dir='x'))
    for field in fields:
      self.assertTrue(flags.FLAGS[field.name].help, field.name)

  def test_a_kind_has_its_own_and_a_program_its_defaults(self):
    names = self.define('--seed=3', only='fact', reset=True)
    self.assertNotIn('answer_end', names)
    self.assertIn('zsre_target', names)
    found = cli.read(RunConfig)
    self.assertEqual((found.reset, found.seed), (True, 3))
    self.assertEqual(found.chat, RunConfig().chat)
    self.assertEqual(cli.given(), {'seed': '--seed=3'})

  def test_some_fields(self):
    names = self.define(names=cli.MODEL_FIELDS)
    self.assertSameElements(names, cli.MODEL_FIELDS)


if __name__ == '__main__':
  absltest.main()
