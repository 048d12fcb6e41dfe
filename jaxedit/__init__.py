"""Knowledge editing for language models in JAX: `edit(model, requests) -> delta`.

  import jaxedit as je

The names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    'api': (
        'EditedModel',
        'edit',
        'editor',
        'evaluate',
        'load',
        'load_edited',
    ),
    'deltas': ('Codebook', 'Dense', 'Edited', 'LowRank', 'Neurons', 'Routed'),
    'edited': ('LanguageModel', 'apply_model', 'open_model'),
    'eval.datasets': ('load_requests',),
    'methods.registry': ('METHODS',),
    'types': ('EditRequest', 'InputError', 'Probe'),
}
_MODULE_OF = {name: m for m, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
  if name not in _MODULE_OF:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_MODULE_OF[name]}')
  return getattr(module, name)


def __dir__() -> list[str]:
  return __all__
