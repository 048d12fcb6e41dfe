"""The flags that choose and set what is trained, made from the registry."""

from __future__ import annotations

from typing import Any

from absl import flags

from jaxedit.methods.base import Method
from jaxedit.methods.registry import METHODS
from jaxedit.methods.settings import Setting, configure, settings_of
from jaxedit.runs import setting_flags
from jaxedit.runs.method_flags import written
from jaxedit.types import InputError

FLAGS = flags.FLAGS
TRAINED = {n: m for n, m in METHODS.items() if m.trainer is not None}


def _known() -> dict[str, dict[str, Setting]]:
  """Name of a setting -> method -> the setting."""
  found: dict[str, dict[str, Setting]] = {}
  for name, method in TRAINED.items():
    for one in settings_of(method.trainer.config).values():
      found.setdefault(one.name, {})[name] = one
  return found


def define_flags() -> None:
  """Defines the flags of all methods that are trained."""
  lines = '; '.join(f'{n}: {m.summary}' for n, m in TRAINED.items())
  flags.DEFINE_enum('method', 'mend', list(TRAINED), f'The method. {lines}.')
  for by_method in _known().values():
    first = next(iter(by_method.values()))
    defaults = '; '.join(
        f'{n} {written(one.default)}' for n, one in by_method.items()
    )
    text = f'{setting_flags.sentence(first)} Default: {defaults}.'
    setting_flags.define(first, None, text)
  bundles = sorted({b for m in TRAINED.values() for b in m.trainer.parity})
  flags.DEFINE_enum(
      'parity',
      'none',
      ('none', *bundles),
      'Train as published code does where that moves numbers; docs/methods.md'
      ' lists what each bundle sets.',
  )


def from_flags() -> tuple[Method, Any]:
  """Makes what flags name.

  Returns:
    (the method, its settings of training).

  Raises:
    InputError: all that is wrong with these flags.
  """
  method = TRAINED[FLAGS.method]
  known = settings_of(method.trainer.config)
  problems, given = [], {}
  for name, by_method in _known().items():
    value = FLAGS[name].value
    if value is None:
      continue
    if name not in known:
      problems.append(
          f'--{name} is no setting of {method.name}; it belongs to'
          f' {" and ".join(by_method)}: leave it out or change --method'
      )
      continue
    try:
      given[name] = setting_flags.read(known[name], value)
    except InputError as e:
      problems += e.problems
  bundle = method.trainer.parity.get(FLAGS.parity)
  if bundle is None and FLAGS.parity != 'none':
    problems.append(
        f'--parity={FLAGS.parity} sets nothing for {method.name}; leave it out'
    )
  try:
    # A given setting wins over a bundle.
    config = configure(method.trainer.config(), {**(bundle or {}), **given})
  except InputError as e:
    problems += [f'--{problem}' for problem in e.problems]
  if problems:
    raise InputError(*problems)
  return method, config
