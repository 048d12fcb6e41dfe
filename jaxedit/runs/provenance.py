"""What a result was computed with."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

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
  device = jax.devices()[0]
  return {
      'python': platform.python_version(),
      **found,
      'device': f'{len(jax.devices())} x {device.device_kind}',
  }
