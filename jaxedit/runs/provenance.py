"""What a result was computed with."""

from __future__ import annotations

import importlib.metadata
import platform

from jaxedit.placement import device_names

_PACKAGES = (
    'jaxedit',
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'transformers',
    'numpy',
)


def versions() -> dict[str, str]:
  """Names Python, the packages and the device a result was computed with."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
      'python': platform.python_version(),
      **found,
      'device': device_names(),
  }
