"""Settings of methods as dataclass fields that know their help, unit and source.

A method's config is a frozen dataclass. Flags, `--help`, the documentation's
table and `jaxedit.edit(**settings)` all come from its fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxedit.targets.state import SETTINGS as TARGET_SETTINGS
from jaxedit.targets.state import TargetConfig
from jaxedit.types import InputError


class Setting(NamedTuple):
  """One setting of a method.

  Attributes:
    name: its name as a flag and as a keyword.
    path: where it stands in the config: (field,) or ('target', field).
    default: the published default.
    help: what it means, a phrase.
    unit: of a number, e.g. 'nats'; '' for none.
    source: where the default comes from; '' if it is ours.
    choices: allowed values, () for any.
    low: least allowed number; None for any.
    exclusive: whether `low` itself is refused.
    implies: field -> value that a given value sets too.
  """

  name: str
  path: tuple[str, ...]
  default: Any
  help: str
  unit: str = ''
  source: str = ''
  choices: tuple[str, ...] = ()
  low: float | None = None
  exclusive: bool = False
  implies: Mapping[str, Any] = types.MappingProxyType({})


def setting(default: Any, help: str, **details: Any) -> Any:  # pylint: disable=redefined-builtin
  """Makes a dataclass field that is a setting.

  Args:
    default: the default.
    help: what it means.
    **details: `unit` and what follows it in `Setting`, and `flag`, its name as a
      flag where that differs from the field's.

  Returns:
    The field.
  """
  return dataclasses.field(default=default, metadata={'help': help, **details})


def settings_of(config: type) -> dict[str, Setting]:
  """Lists the settings of a config class by name, those of `target` included."""
  found = {}
  for field in dataclasses.fields(config):
    if field.name == 'target':
      for name, details in TARGET_SETTINGS.items():
        default = getattr(field.default, name)
        path = ('target', name)
        flag = details['flag']
        rest = {k: v for k, v in details.items() if k != 'flag'}
        found[flag] = Setting(flag, path, default, **rest)
    elif 'help' in field.metadata:
      details = dict(field.metadata)
      flag = details.pop('flag', field.name)
      found[flag] = Setting(flag, (field.name,), field.default, **details)
  return found


def configure(config: Any, given: Mapping[str, Any]) -> Any:
  """Replaces settings of a config.

  Args:
    config: an instance.
    given: name of a setting, or of a field, -> value.

  Returns:
    A config with these values.

  Raises:
    InputError: unknown names and values out of range, all at once.
  """
  known, problems = settings_of(type(config)), []
  fields = {field.name for field in dataclasses.fields(config)}
  by_field = {one.path[0]: one for one in known.values() if len(one.path) == 1}
  changed, target, implied = {}, {}, {}
  for name, value in given.items():
    found = known.get(name) or by_field.get(name)
    if found is not None:
      problems += errors(found, value, name)
      *outer, leaf = found.path
      (target if outer else changed)[leaf] = value
      implied |= found.implies
    elif name in fields:
      changed[name] = value
    else:
      near = difflib.get_close_matches(name, [*known, *fields], 1)
      hint = f'; did you mean {near[0]!r}' if near else ''
      problems.append(
          f'setting {name!r} is unknown{hint}; known are {", ".join(known)}'
      )
  if problems:
    raise InputError(*problems)
  if target:
    base: TargetConfig = changed.get('target', config.target)
    changed['target'] = base._replace(**target)
  return dataclasses.replace(config, **{**implied, **changed})


def errors(setting: Setting, value: Any, name: str = '') -> list[str]:
  """Says why a value is out of a setting's range, in messages by its name."""
  if value is None:
    return []
  name, low = name or setting.name, setting.low
  if setting.choices and value not in setting.choices:
    return [f'{name} is {value!r}; use {" or ".join(setting.choices)}']
  if low is not None:
    bad = value <= low if setting.exclusive else value < low
    if bad or value != value:
      bound = f'above {low:g}' if setting.exclusive else f'at least {low:g}'
      return [f'{name} is {value}; it must be {bound}']
  return []
