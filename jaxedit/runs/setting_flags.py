"""Flags of settings: one definition for every kind of value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxedit.methods.settings import Setting
from jaxedit.types import InputError

# A flag belongs to the module that asks for it, where --help shows it.
flags.disclaim_key_flags()
_MOST = 2**31 - 1  # of a whole number that has no bound of its own
_EXAMPLES = {int: 'whole numbers, e.g. 4,5,6,7,8', float: 'numbers, e.g. 0.1,1'}


def define(setting: Setting, default: Any, text: str) -> None:
  """Defines the flag of a setting.

  Args:
    setting: its name, type and range.
    default: its value unless given; None leaves it unset.
    text: the help.
  """
  name = setting.name
  if setting.many:
    entries = None if default is None else ','.join(map(str, default))
    flags.DEFINE_list(name, entries, text)
  elif setting.choices:
    flags.DEFINE_enum(name, default, setting.choices, text)
  elif setting.kind is bool:
    flags.DEFINE_bool(name, default, text)
  elif setting.kind is int:
    high = _MOST if setting.high is None else setting.high
    bounds = dict(lower_bound=setting.low, upper_bound=high)
    flags.DEFINE_integer(name, default, text, **bounds)
  elif setting.kind is float:
    _define_number(name, default, text, positive=setting.exclusive)
  else:
    flags.DEFINE_string(name, default, text)


def sentence(setting: Setting) -> str:
  """What a setting means, as help begins."""
  text = setting.described()
  return f'{text[0].upper()}{text[1:]}.'


def _define_number(
    name: str, default: float | None, text: str, *, positive: bool
) -> None:
  """Defines a flag for a finite number that is not negative, or positive."""
  flags.DEFINE_float(name, default, text)
  what = 'above 0' if positive else '0 or above'
  flags.register_validator(
      name,
      lambda x: x is None
      or (math.isfinite(x) and (x > 0 or (x == 0 and not positive))),
      message=f'give a finite number, {what}',
  )


def read(setting: Setting, value: Any) -> Any:
  """Reads the value of a setting's flag.

  Raises:
    InputError: a list that is no list of what it should hold.
  """
  if not setting.many or value is None or setting.kind is str:
    return tuple(value) if isinstance(value, list) else value
  return entries(value, setting.name, setting.kind)


def entries(
    names: Sequence[str] | None, flag: str, kind: type = int
) -> tuple[Any, ...]:
  """Reads a list flag.

  Args:
    names: the flag's value.
    flag: the flag's name, for the message.
    kind: type of an entry.

  Returns:
    The entries, as given.

  Raises:
    InputError: none, or entries of another type.
  """
  try:
    found = tuple(kind(name) for name in names or ())
  except ValueError:
    found = ()
  if not found:
    given = ','.join(names or ())
    raise InputError(f'--{flag}={given}: give {_EXAMPLES[kind]}')
  return found
