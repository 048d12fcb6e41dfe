"""Every method by its id: found in the files of this package, never listed."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping

from jaxedit import methods
from jaxedit.methods.base import Method
from jaxedit.types import InputError


def discover() -> dict[str, Method]:
  """Imports the files of `jaxedit.methods` and collects their methods.

  Returns:
    id -> method, by id.
  """
  found: dict[str, Method] = {}
  for module in pkgutil.iter_modules(methods.__path__):
    if module.name == 'registry':
      continue
    loaded = importlib.import_module(f'{__package__}.{module.name}')
    one = getattr(loaded, 'METHOD', None)
    for method in getattr(loaded, 'METHODS', (one,) if one else ()):
      found[method.name] = method
  return dict(sorted(found.items()))


METHODS: Mapping[str, Method] = discover()


def method_of(name: str) -> Method:
  """Returns the method of an id.

  Raises:
    InputError: there is none.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name.lower(), METHODS, 1)
    hint = f'; did you mean {near[0]!r}' if near else ''
    raise InputError(
        f'method {name!r} is unknown{hint}; known are {", ".join(METHODS)}'
    )
  return METHODS[name]
