"""Enforces who may import whom, by reading the code and not by running it.

Every import counts, also one inside a function or under TYPE_CHECKING, and an
import by name through importlib.
"""

from __future__ import annotations

import ast
import pathlib
import sys
from collections.abc import Iterator

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ('jaxedit', 'kernels', 'experiments')

# Package -> what its modules may import beside their own package, `types` and
# `io`.
# A package's name allows all of its modules, a dotted name that module alone.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    'types': (),
    'numerics': (),
    'sources': (),
    'deltas': ('numerics',),
    'io': (),
    'hosts': (),
    'placement': ('hosts',),
    'checkpoint': (),
    'kernels': (),
    'solve': (),
    'statistics': (),
    'text': (),
    'batching': ('text',),
    'models': ('kernels', 'batching'),
    'convert': ('models',),
    'stats': ('batching', 'models', 'text'),
    'trace': ('batching', 'models', 'statistics', 'text'),
    'targets': ('batching', 'models', 'text'),
    'planning': (
        'batching',
        'edited',
        'models',
        'stats',
        'targets',
        'text',
    ),
    'edited': ('batching', 'convert', 'models', 'retrieval', 'text'),
    'retrieval': ('batching', 'models'),
    'methods': (
        'batching',
        'edited',
        'models',
        'planning',
        'retrieval',
        'solve',
        'stats',
        'targets',
        'text',
    ),
    'eval': (
        'batching',
        'edited',
        'models',
        'retrieval',
        'statistics',
        'text',
    ),
    'runs': (
        'batching',
        'checkpoint',
        'convert',
        'edited',
        'eval',
        'methods',
        'models',
        'planning',
        'retrieval',
        'solve',
        'statistics',
        'stats',
        'targets',
        'text',
        'trace',
    ),
    'api': (
        'convert',
        'edited',
        'eval',
        'methods',
        'models',
        'retrieval',
        'runs',
        'targets',
        'text',
    ),
    'testing': ('convert', 'models', 'stats.storage', 'text.encoding'),
}
# What the files of methods/ may import of it: a method never another method.
SHARED_BY_METHODS = tuple(
    f'methods.{name}'
    for name in (
        'base',
        'closed_form',
        'config',
        'demonstrations',
        'finetune',
        'gradient',
        'hypernet',
        'parity',
        'memories',
        'patches',
        'radius',
        'regression',
        'scope',
        'settings',
    )
)
# What every package may import; among themselves `types` and, of `deltas`,
# `numerics` alone.
BOTTOM = (
    *('types', 'io', 'numerics', 'sources', 'deltas', 'hosts'),
    'placement',
)
# transformers looks for a package of this name, so ours is never called so.
HIDDEN = 'kernels'


def own_modules() -> dict[str, pathlib.Path]:
  """Finds every module of the repository by its installed name."""
  found = {}
  for folder in FOLDERS:
    for path in sorted((ROOT / folder).rglob('*.py')):
      parts = path.relative_to(ROOT).with_suffix('').parts
      parts = ('jaxedit', *parts) if folder == 'kernels' else parts
      parts = parts[:-1] if parts[-1] == '__init__' else parts
      found['.'.join(parts)] = path
  return found


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
  """Lists what a module imports.

  Args:
    tree: the module.
    package: the package that relative imports start from.

  Yields:
    (line, dotted name); `from a import b` is a.b, which may be a name in a.
    A name that is made at run time is given as '?'.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        parents = package.split('.')[: len(package.split('.')) - node.level + 1]
        base = '.'.join([*parents, base] if base else parents)
      for alias in node.names:
        yield node.lineno, f'{base}.{alias.name}'
    elif isinstance(node, ast.Call):
      called = ast.unparse(node.func).rsplit('.', 1)[-1]
      if called in ('import_module', '__import__') and node.args:
        yield node.lineno, _named_at_run_time(node.args[0], package)


def _named_at_run_time(argument: ast.expr, package: str) -> str:
  """What a call imports: a literal name, or something in its own package."""
  if isinstance(argument, ast.Constant):
    return str(argument.value)
  if ast.unparse(argument).startswith(("f'{__name__}.", "f'{__package__}.")):
    return f'{package}.?'
  return '?'


def _short(module: str) -> str:
  """A module's name as the table has it, without the leading jaxedit."""
  return module.removeprefix('jaxedit.')


def _row(module: str) -> str:
  return _short(module).split('.')[0]


def faults(module: str, source: str, package: str) -> list[str]:
  """Lists the imports of a module that the table forbids.

  Args:
    module: installed name, e.g. 'jaxedit.models.decoder'.
    source: its text.
    package: the package that its relative imports start from.

  Returns:
    A sentence a fault.
  """
  problems = []
  for line, name in imported(ast.parse(source), package):
    fault = _fault(module, name)
    if fault:
      problems.append(f'{module}, line {line}: imports {name}; {fault}')
  return problems


def _fault(module: str, name: str) -> str:
  """Says what is wrong with one import, or nothing."""
  top = name.split('.')[0]
  if name == '?':
    return 'name the module, so that this test can read it'
  if top == HIDDEN:
    return 'our package is called jaxedit.kernels'
  if module.split('.')[0] == 'experiments':
    return ''
  if top == 'experiments':
    return 'only experiments import experiments'
  if top == 'torch':
    return 'nothing here needs torch'
  row = _row(module)
  if top != 'jaxedit':
    if row == 'kernels' and top not in ('jax', *sys.stdlib_module_names):
      return 'kernels import jax only'
    return ''
  return _own_fault(module, row, _short(name))


def _own_fault(module: str, row: str, target: str) -> str:
  """Says what is wrong with an import of ours, or nothing."""
  if row == 'jaxedit' and target == '?':
    return ''  # its public names, loaded when they are first used
  if row == 'jaxedit' or target == 'jaxedit':
    return 'the package itself imports nothing'
  within = lambda allowed: any(
      target == part or target.startswith(f'{part}.') for part in allowed
  )
  if within(('types',) if row in BOTTOM else BOTTOM):
    return ''
  if (
      row == 'methods'
      and _row(target) == 'methods'
      and 'registry' not in module
  ):
    own = _short(module).split('.')[1:2]
    if not own or within(SHARED_BY_METHODS):
      return ''
    return 'a method does not import another: move down what they share'
  if within((row, *MAY_IMPORT.get(row, ()))):
    return ''
  allowed = (
      ', '.join(MAY_IMPORT.get(row, ())) or 'nothing of ours but types and io'
  )
  return f'{row} may import {allowed}'


class ImportGraphTest(parameterized.TestCase):

  def test_every_package_has_a_row(self):
    for module in own_modules():
      if module == 'jaxedit' or module.split('.')[0] == 'experiments':
        continue
      self.assertIn(
          _row(module), MAY_IMPORT,
          f'{module}: decide what {_row(module)} may import and add a row',
      )  # fmt: skip

  def test_all_modules(self):
    modules = own_modules()
    for known in ('jaxedit.models.decoder', 'jaxedit.kernels', 'experiments'):
      self.assertIn(known, modules)
    problems = []
    for module, path in modules.items():
      is_package = path.name == '__init__.py'
      package = module if is_package else module.rpartition('.')[0]
      problems += faults(module, path.read_text('utf-8'), package)
    self.assertEmpty(problems, '\n'.join(problems))

  @parameterized.parameters(
      ('models.decoder', 'from jaxedit import kernels, types'),
      ('models.decoder', 'from . import blocks'),
      ('models.decoder', 'from ..kernels import linear_logprob'),
      ('models.families.llama', 'from ...models import spec'),
      ('models.families', "import_module(f'{__name__}.{model_type}')"),
      ('targets.run', 'from jaxedit.batching.edits import PackedBatch'),
      ('targets', 'from jaxedit.text import encoding'),
      ('methods.memit', 'from jaxedit.methods import base, closed_form'),
      ('methods.memit', 'import jaxedit.stats.moments'),
      ('methods', 'from jaxedit.methods import memit'),
      ('eval.scoring', 'from jaxedit.edited.lm import hidden'),
      ('kernels.topk.reference', 'import functools\nimport jax.numpy as jnp'),
      ('kernels.topk.api', 'from jaxedit.kernels.topk import reference'),
      ('text.locate', 'import numpy as np\nimport transformers'),
  )
  def test_allowed(self, module, source):
    self.assertEmpty(self.check(module, source))

  @parameterized.parameters(
      ('models.decoder', 'import jaxedit.targets', 'models may import kernels'),
      ('models.decoder', 'def f():\n  from jaxedit import text', 'may import'),
      ('models.decoder', 'from .. import eval', 'may import kernels'),
      (
          'models.loading',
          'from jaxedit.convert import hub',
          'may import kernels',
      ),
      (
          'models.decoder',
          'from jaxedit.models_old import x',
          'may import kernels',
      ),
      ('models.decoder', 'import jaxedit', 'imports nothing'),
      ('convert.hub', 'if x:\n  import torch.nn as nn', 'needs torch'),
      ('convert.hub', 'def f():\n  from torch import nn', 'needs torch'),
      ('convert.hub', "import_module('torch')", 'needs torch'),
      ('convert.hub', 'importlib.import_module(name)', 'name the module'),
      ('convert.hub', "__import__('jaxedit.methods')", 'may import models'),
      ('testing', 'import experiments.common', 'only experiments'),
      ('testing', 'from jaxedit import methods', 'testing may import convert'),
      ('models.decoder', 'from kernels.x import y', 'called jaxedit.kernels'),
      ('text.locate', 'from jaxedit.models import spec', 'nothing of ours'),
      ('solve.ridge', 'from jaxedit.models import blocks', 'nothing of ours'),
      ('targets', 'from jaxedit import edited', 'targets may import'),
      ('text.locate', 'from jaxedit import batching', 'nothing of ours'),
      ('methods.memit', 'from jaxedit.methods import rome', 'another'),
      ('methods.memit', 'from . import rome', 'another'),
      ('methods.memit', 'from jaxedit import methods', 'another'),
      ('methods.memit', 'from jaxedit import eval', 'methods may import'),
      ('eval.scoring', 'from jaxedit.methods import memit', 'eval may import'),
      ('eval.scoring', 'from jaxedit import stats', 'eval may import'),
      ('kernels.topk.api', 'import numpy', 'jax only'),
      ('kernels.topk.api', 'from jaxedit import models', 'kernels may import'),
      ('types', 'from jaxedit.models import spec', 'nothing of ours'),
  )
  def test_forbidden(self, module, source, words):
    (problem,) = self.check(module, source)
    self.assertIn(words, problem)

  def test_experiments(self):
    source = 'import torch\nfrom experiments import common\nimport jaxedit.eval'
    self.assertEmpty(faults('experiments.x', source, 'experiments'))
    self.assertLen(faults('experiments.x', 'import kernels', 'experiments'), 1)

  def check(self, module, source):
    packages = ('models.families', 'methods', 'testing')
    name = f'jaxedit.{module}'
    package = name if module in packages else name.rpartition('.')[0]
    return faults(name, source, package)


if __name__ == '__main__':
  absltest.main()
