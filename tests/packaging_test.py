"""What ships: packages that need no extras, flagfiles that parse, live links."""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import importlib.util
import json
import pathlib
import re
import runpy
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Packages of the extras, by the name they are imported under.
EXTRAS = ('gguf', 'matplotlib', 'datasets', 'sacrebleu', 'rouge_score')

# Reads the names of modules; writes those that cannot be imported, with why.
IMPORT_ALL = """
import importlib, json, sys
blocked, names = json.loads(sys.stdin.read())
for name in blocked:
  sys.modules[name] = None
faults = {}
for name in names:
  try:
    importlib.import_module(name)
  except Exception as error:
    faults[name] = (getattr(error, 'name', None), repr(error))
print('\\n' + json.dumps(faults))
"""
# Reads a program and its flagfiles; writes what is wrong with each, if anything.
# A method's settings are put together too, as they must belong to it.
PARSE_FLAGS = """
import importlib.util, json, sys
from absl import flags
from jaxedit.methods.registry import METHODS
from jaxedit.runs import method_flags, training_flags
from jaxedit.types import InputError
name, paths = json.loads(sys.stdin.read())
is_folder = importlib.util.find_spec(name).submodule_search_locations
program = importlib.import_module(name + '.__main__' * bool(is_folder))
program.define_flags()
own = [n for n in flags.FLAGS if n != 'flagfile']
faults = {}
for path in paths:
  for flag in own:
    flags.FLAGS[flag].unparse()
  try:
    rest = flags.FLAGS([name, '--flagfile=' + path])[1:]
    if rest:
      raise flags.Error(f'no flags: {rest}')
    if 'edit_weight' in own:
      training_flags.from_flags()
    elif 'method' in own:
      takes = METHODS[flags.FLAGS.method].accepts
      kind = 'text' if 'anyedit' in own and 'text' in takes else 'fact'
      method_flags.from_flags(kind)
  except (flags.Error, InputError) as error:
    faults[path] = str(error)
print('\\n' + json.dumps(faults))
"""
# transformers asks whether there is a package called kernels, and which
# version, when the code of a model is imported.
TRANSFORMERS = """
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import import_utils
assert not import_utils.is_kernels_available()
if import_utils.is_torch_available():
  from transformers import LlamaForCausalLM
import jaxedit.kernels
import kernels
print(kernels.__file__)
"""


def modules(folder: str, name: str) -> list[str]:
  """Names every module in a folder, as it is imported."""
  found = []
  for path in sorted((ROOT / folder).rglob('*.py')):
    parts = path.relative_to(ROOT / folder).with_suffix('').parts
    parts = parts[:-1] if parts[-1] == '__init__' else parts
    found.append('.'.join([name, *parts]))
  return found


def run_python(program: str, text: str = '') -> str:
  """Runs a program in the repository's root; returns what it prints."""
  result = subprocess.run(
      [sys.executable, '-c', program],
      cwd=ROOT,
      input=text,
      capture_output=True,
      text=True,
      check=False,
  )
  if result.returncode:
    raise AssertionError(result.stderr)
  return result.stdout


def setup_arguments() -> dict[str, object]:
  """What setup.py tells setuptools."""
  with contextlib.chdir(ROOT), mock.patch('setuptools.setup') as setup:
    runpy.run_path('setup.py')
  return setup.call_args.kwargs


class KernelsTest(absltest.TestCase):

  def test_transformers_beside_the_folder(self):
    # Python finds the folder of that name first, and it does no harm.
    found = run_python(TRANSFORMERS).split()[-1]
    self.assertEqual(pathlib.Path(found), ROOT / 'kernels' / '__init__.py')

  def test_installed_under_our_name(self):
    kernels = importlib.import_module('jaxedit.kernels')
    (folder,) = kernels.__path__
    self.assertEqual(pathlib.Path(folder).resolve(), ROOT / 'kernels')
    reference = importlib.import_module(
        'jaxedit.kernels.linear_logprob.reference'
    )
    self.assertEqual(
        reference.linear_logprob.__module__,
        'jaxedit.kernels.linear_logprob.reference',
    )


@absltest.skipIf(
    importlib.util.find_spec('setuptools') is None, 'setuptools is missing'
)
class SetupTest(absltest.TestCase):

  def test_every_package_is_listed(self):
    listed = setup_arguments()['packages']
    self.assertCountEqual(listed, set(listed))
    wanted = []
    for folder, name in (
        ('jaxedit', 'jaxedit'),
        ('kernels', 'jaxedit.kernels'),
        ('experiments', 'experiments'),
    ):
      for path in (ROOT / folder).rglob('*.py'):
        parts = path.parent.relative_to(ROOT / folder).parts
        wanted.append('.'.join([name, *parts]))
    # A folder with code and without __init__.py would be left out.
    self.assertCountEqual(listed, set(wanted))
    for package in listed:
      importlib.import_module(package)

  def test_package_data(self):
    data = setup_arguments()['package_data']
    self.assertIn('*.jsonl', data['jaxedit.eval.datasets'])
    self.assertIn('*.jsonl', data['jaxedit.stats'])
    self.assertIn('*.j2', data['jaxedit.trace'])
    self.assertIn('flagfiles/*.flags', data['experiments'])
    for name in ('demo_facts.jsonl', 'demo_passages.jsonl'):
      demo = importlib.resources.files('jaxedit.eval.datasets') / name
      lines = demo.read_text('utf-8').splitlines()
      self.assertNotEmpty(lines)
      for line in lines:
        self.assertIsInstance(json.loads(line), dict)

  def test_torch_is_for_tests(self):
    arguments = setup_arguments()
    needed = ' '.join(arguments['install_requires'])
    self.assertNotIn('torch', needed)
    for name, packages in arguments['extras_require'].items():
      self.assertEqual('torch' in ' '.join(packages), name == 'test', name)


class ImportTest(absltest.TestCase):

  def test_without_torch_and_extras(self):
    names = [
        *modules('jaxedit', 'jaxedit'),
        *modules('kernels', 'jaxedit.kernels'),
        *modules('experiments', 'experiments'),
    ]
    for known in ('jaxedit.models.decoder', 'jaxedit.eval.evaluation'):
      self.assertIn(known, names)
    out = run_python(IMPORT_ALL, json.dumps([['torch', *EXTRAS], names]))
    faults = {
        name: reason
        for name, (missing, reason) in json.loads(out.splitlines()[-1]).items()
        # Programs that draw or download may ask for their extra at once.
        if not (name.startswith('experiments.') and missing in EXTRAS)
    }
    self.assertEqual(faults, {})


def comment_of(path: pathlib.Path) -> str:
  """The comment that a flagfile opens with."""
  lines = path.read_text('utf-8').splitlines()
  return '\n'.join(line for line in lines if line.startswith('#'))


FLAGFILES = tuple(sorted((ROOT / 'experiments' / 'flagfiles').glob('*.flags')))


class FlagfileTest(parameterized.TestCase):

  @parameterized.named_parameters((path.stem, path) for path in FLAGFILES)
  def test_comment(self, path):
    comment = comment_of(path)
    self.assertRegex(
        comment,
        r'python -m experiments\.\w+ --flagfile='
        rf'experiments/flagfiles/{re.escape(path.name)}\b',
    )
    for head in ('# Cost', '# Expected'):
      self.assertIn(f'\n{head}', comment)
    folder = f'--output_dir=runs/{path.stem}'
    self.assertIn(folder, path.read_text('utf-8').splitlines())

  def test_parsed_by_the_program_that_its_comment_names(self):
    programs: dict[str, list[str]] = {}
    for path in FLAGFILES:
      found = re.search(r'python -m (experiments\.\w+)', comment_of(path))
      programs.setdefault(found[1], []).append(str(path))
    for name, paths in programs.items():
      with self.subTest(name):
        out = run_python(PARSE_FLAGS, json.dumps([name, paths]))
        self.assertEqual(json.loads(out.splitlines()[-1]), {})


PAGES = (
    'README.md',
    'BUILD.md',
    'BENCHMARKS.md',
    'docs/data.md',
    'docs/glossary.md',
    'docs/lab_notes.md',
    'docs/methods.md',
    'docs/scaling.md',
    'docs/tracing.md',
)
_FENCE = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'\[([^\]]*)\]\(([^)\s]+)\)')


def anchors(text: str) -> set[str]:
  """The names that GitHub gives to the headings of a page."""
  heads = re.findall(r'^#+ (.*)$', _FENCE.sub('', text), re.MULTILINE)
  bare = (re.sub(r'[^\w\- ]', '', head.lower()) for head in heads)
  return {head.strip().replace(' ', '-') for head in bare}


class LinkTest(parameterized.TestCase):

  @parameterized.parameters(*PAGES)
  def test_links_lead_somewhere(self, page):
    text = (ROOT / page).read_text('utf-8')
    for words, target in _LINK.findall(_FENCE.sub('', text)):
      if target.startswith('https://'):
        continue
      path, _, anchor = target.partition('#')
      place = (ROOT / page).parent / path if path else ROOT / page
      with self.subTest(target):
        self.assertTrue(place.exists(), target)
        if anchor:
          self.assertIn(anchor, anchors(place.read_text('utf-8')))
        # A name in code is one that the linked file defines.
        if place.suffix == '.py' and re.fullmatch(r'`\w+`', words):
          self.assertRegex(
              place.read_text('utf-8'),
              rf'(?m)^(def |class )?{words[1:-1]}\b[(:]',
          )


if __name__ == '__main__':
  absltest.main()
