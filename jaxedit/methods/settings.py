"""Settings as dataclass fields that know their help, unit and source.

A config is a frozen dataclass. Flags, `--help`, the documentation's table and
`jaxedit.edit(**settings)` all come from its fields and their types: bool, int,
float, str or a tuple of one of these, or None too.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxedit.targets.state import TargetConfig
from jaxedit.types import InputError

_NOUNS = {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    str: 'a text',
}
_ACCEPTED = {int: numbers.Integral, float: numbers.Real}


class Setting(NamedTuple):
  """One setting.

  Attributes:
    name: its name as a flag and as a keyword.
    path: where it stands in the config: (field,) or ('target', field).
    default: the published default.
    kind: type of the value; of each entry where it is a tuple.
    many: whether it is a tuple.
    optional: whether it may be None.
    help: what it means, a phrase.
    unit: of a number, e.g. 'nats'; '' for none.
    source: where the default comes from; '' if it is ours.
    choices: allowed values, () for any.
    low: least allowed number; None for any.
    high: largest allowed number; None for any.
    exclusive: whether `low` itself is refused.
    only: 'fact' or 'text', the kind of requests that alone has it; '' for both.
    implies: field -> value that a given value sets too.
    excludes: names of settings that are not given together with this one.
  """

  name: str
  path: tuple[str, ...]
  default: Any
  kind: type
  many: bool
  optional: bool
  help: str
  unit: str = ''
  source: str = ''
  choices: tuple[str, ...] = ()
  low: float | None = None
  high: float | None = None
  exclusive: bool = False
  only: str = ''
  implies: Mapping[str, Any] = types.MappingProxyType({})
  excludes: tuple[str, ...] = ()

  def of(self, config: Any) -> Any:
    """The value that a config has."""
    for part in self.path:
      config = getattr(config, part)
    return config

  def described(self) -> str:
    """What it means, with its unit."""
    return f'{self.help}, {self.unit}' if self.unit else self.help


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


def redefault(config: type, name: str, default: Any, **details: Any) -> Any:
  """Makes a field with another default, and maybe other details.

  Args:
    config: class that has the field.
    name: the field.
    default: the default.
    **details: see `setting`.
  """
  known = config.__dataclass_fields__[name].metadata
  return setting(default, **{**known, **details})


def settings_of(config: type) -> dict[str, Setting]:
  """Lists the settings of a config class by name, those of a `TargetConfig`
  field included.
  """
  found = {}
  hints = typing.get_type_hints(config)
  for field in dataclasses.fields(config):
    if isinstance(field.default, TargetConfig):
      inner = typing.get_type_hints(TargetConfig)
      for name, details in TARGET_SETTINGS.items():
        default = getattr(field.default, name)
        one = _setting((field.name, name), default, inner[name], details)
        found[one.name] = one
    elif 'help' in field.metadata:
      one = _setting(
          (field.name,), field.default, hints[field.name], field.metadata
      )
      found[one.name] = one
  return found


def _setting(
    path: tuple[str, ...], default: Any, hint: Any, details: Mapping[str, Any]
) -> Setting:
  """One setting of a config, with the type that its annotation gives."""
  parts = typing.get_args(hint)
  optional = types.NoneType in parts
  if optional:
    (hint,) = (part for part in parts if part is not types.NoneType)
    parts = typing.get_args(hint)
  many = typing.get_origin(hint) is tuple
  rest = {k: v for k, v in details.items() if k != 'flag'}
  return Setting(
      name=details.get('flag', path[-1]),
      path=path,
      default=default,
      kind=parts[0] if many else hint,
      many=many,
      optional=optional,
      **rest,
  )


def configure(config: Any, given: Mapping[str, Any]) -> Any:
  """Replaces settings of a config.

  Args:
    config: an instance.
    given: name of a setting, or of a field, -> value.

  Returns:
    A config with these values.

  Raises:
    InputError: unknown names, values of another type or out of range, settings
      that exclude each other; all at once.
  """
  known, problems = settings_of(type(config)), []
  fields = {field.name for field in dataclasses.fields(config)}
  by_field = {one.path[0]: one for one in known.values() if len(one.path) == 1}
  changed, target, implied = {}, {}, {}
  for name, value in given.items():
    found = known.get(name) or by_field.get(name)
    if found is not None:
      value = tuple(value) if isinstance(value, list) else value
      problems += errors(found, value, name)
      problems += [
          f'{name} and {other} exclude each other: leave one of them out'
          for other in found.excludes
          if given.get(other) is not None and value is not None
      ]
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
  InputError.raise_for(problems)
  if target:
    base: TargetConfig = changed.get('target', config.target)
    changed['target'] = base._replace(**target)
  return dataclasses.replace(config, **{**implied, **changed})


def errors(setting: Setting, value: Any, name: str = '') -> list[str]:
  """Says why a setting cannot have a value, in messages by its name."""
  name = name or setting.name
  if value is None and setting.optional:
    return []
  if not setting.many:
    return _errors(setting, value, name)
  if not isinstance(value, tuple):
    return [f'{name} is {value!r}; give a list, each {_NOUNS[setting.kind]}']
  return [p for entry in value for p in _errors(setting, entry, name)]


def _errors(setting: Setting, value: Any, name: str) -> list[str]:
  """`errors` of one entry."""
  low, high = setting.low, setting.high
  accepted = _ACCEPTED.get(setting.kind, setting.kind)
  if not isinstance(value, accepted) or (
      isinstance(value, bool) and setting.kind is not bool
  ):
    return [f'{name} is {value!r}; give {_NOUNS[setting.kind]}']
  if setting.choices and value not in setting.choices:
    return [f'{name} is {value!r}; use {" or ".join(setting.choices)}']
  if low is not None:
    bad = value <= low if setting.exclusive else value < low
    if bad or value != value:
      bound = f'above {low:g}' if setting.exclusive else f'at least {low:g}'
      return [f'{name} is {value}; it must be {bound}']
  if high is not None and not value <= high:
    return [f'{name} is {value}; it must be at most {high:g}']
  return []


# Of the fields of `TargetConfig`; flags keep the papers' names.
TARGET_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    'steps': dict(
        flag='value_steps',
        help='losses evaluated a target at most (v_num_grad_steps)',
        source='MEMIT, appendix B',
        low=1,
    ),
    'rate': dict(
        flag='value_rate',
        help='learning rate of Adam (v_lr), for width 4096: the first step has'
        ' length rate * sqrt(width)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'decay': dict(
        flag='value_decay',
        help='weight of |d| / |z0|^2 (v_weight_decay)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'clamp': dict(
        flag='clamp',
        help='largest |d| / |z0| (clamp_norm_factor)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'kl': dict(
        flag='kl_weight',
        help='weight of the KL term (kl_factor)',
        source='MEMIT, appendix B',
        low=0,
        only='fact',
    ),
    'threshold': dict(
        flag='stop_loss',
        help='a target stops below this loss',
        unit='nats',
        source='MEMIT, published code',
        low=0,
    ),
    'solver': dict(
        flag='target_solver',
        help='optimiser of a target: Adam as published, or L-BFGS, which has no'
        ' rate and evaluates fewer losses',
        source='ROME, published code',
        choices=('adam', 'lbfgs'),
    ),
    'first_step': dict(
        flag='value_first_step',
        help='first |d| / |z0| that L-BFGS tries',
        low=0,
        exclusive=True,
    ),
    'stagnation': dict(
        flag='stagnation',
        help='a target stops when --stagnation_steps losses in a row were not'
        ' below the lowest before by this share of it; 0 never',
        low=0,
        high=0.99,
    ),
    'stagnation_steps': dict(
        flag='stagnation_steps',
        help='losses without such a fall that stop a target, see --stagnation',
        low=1,
    ),
}
