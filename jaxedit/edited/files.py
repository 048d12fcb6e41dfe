"""Deltas on disk: one safetensors file with what is needed to trust it.

Tensors are named `<site>/<layer>/key` and `.../value` for factors, and
`.../kernel`, `.../bias` or `.../scale` for a parameter's change in full; the
header's metadata holds `format`, and as JSON the source model's hash and
whatever the editor recorded (method, settings, data), and a checksum a tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxedit.types import Delta, Dense, Edited, InputError, LowRank

_FORMAT = 'jaxedit-delta-1'


def save(
    path: str | os.PathLike[str], edited: Edited, metadata: Mapping[str, Any]
) -> None:
  """Writes a delta, atomically.

  Args:
    path: file to write.
    edited: changes; with an edit axis, edits side by side.
    metadata: JSON values; must have 'model_hash'.

  Raises:
    InputError: the file cannot be written.
  """
  tensors: dict[str, np.ndarray] = {}
  for delta in edited.deltas:
    for i, layer in enumerate(delta.layers):
      for name, array in _fields(delta).items():
        part = np.ascontiguousarray(np.asarray(array[i]))
        tensors[f'{delta.site}/{layer}/{name}'] = part
  header = {
      'format': _FORMAT,
      'jaxedit': json.dumps(metadata),
      'crc32': json.dumps(_checksums(tensors)),
  }
  path = pathlib.Path(path)
  draft = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    save_file(tensors, draft, metadata=header)
    draft.chmod(0o644)  # safetensors makes its files private
    os.replace(draft, path)
  except (OSError, safetensors.SafetensorError) as e:
    raise InputError(
        f'{path}: cannot be written ({e}); choose another place or make room'
        ' there'
    ) from None
  finally:
    with contextlib.suppress(OSError):
      draft.unlink()


def load(
    path: str | os.PathLike[str], *, model_hash: str | None = None
) -> tuple[Edited, dict[str, Any]]:
  """Reads a delta.

  Args:
    path: file that `save` wrote.
    model_hash: hash of the model it shall be applied to; None skips the check.

  Returns:
    (the change, its metadata).

  Raises:
    InputError: no such file, damaged, not a delta, or made for another model.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as f:
      header = f.metadata() or {}
      tensors = {name: f.get_tensor(name) for name in f.keys()}
  except FileNotFoundError:
    raise InputError(f'{path}: no such file') from None
  except Exception as e:
    raise InputError(
        f'{path}: not a readable safetensors file ({e}); copy or make it again'
    ) from None
  if header.get('format') != _FORMAT:
    raise InputError(f'{path}: not a delta of jaxedit ({_FORMAT})')
  try:
    metadata = json.loads(header['jaxedit'])
    made_for = metadata['model_hash']
    intact = json.loads(header['crc32']) == _checksums(tensors)
  except (KeyError, TypeError, ValueError):
    intact = False
  if not intact:
    raise InputError(f'{path}: damaged; copy or make it again')
  if model_hash is not None and made_for != model_hash:
    raise InputError(
        f'{path}: made for model {made_for[:12]}, given'
        f' {model_hash[:12]}; load the model it was made for'
    )
  return Edited(deltas=_deltas(tensors)), metadata


def _checksums(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
  """CRC-32 of every tensor's bytes."""
  # The view also serves dtypes that numpy cannot hand out as a buffer.
  return {k: zlib.crc32(v.view(np.uint8)) for k, v in tensors.items()}


def _fields(delta: Delta) -> dict[str, Any]:
  """The arrays of a change by their names in a file."""
  if isinstance(delta, LowRank):
    return {'key': delta.key, 'value': delta.value}
  return {delta.leaf: delta.kernel}


def _deltas(tensors: Mapping[str, np.ndarray]) -> tuple[Delta, ...]:
  """Rebuilds the deltas of a file, one a changed parameter."""
  places: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}
  for name, tensor in tensors.items():
    site, layer, field = name.rsplit('/', 2)
    kind = '' if field in ('key', 'value') else field
    layers = places.setdefault((site, kind), {})
    layers.setdefault(int(layer), {})[field] = tensor
  deltas: list[Delta] = []
  for (site, leaf), found in sorted(places.items()):
    layers = tuple(sorted(found))
    stacked = {
        field: jnp.asarray(np.stack([found[layer][field] for layer in layers]))
        for field in found[layers[0]]
    }
    if leaf:
      deltas.append(Dense(layers, site, stacked[leaf], leaf))
    else:
      deltas.append(LowRank(layers, site, **stacked))
  return tuple(deltas)
