"""Edits on disk: one safetensors file with what is needed to trust it.

Tensors are named `<number>/<leaf>`, stacked over layers as in memory. The header's
metadata holds `format`; `deltas`, as JSON the kind and the static fields of every
delta; `size`; `jaxedit`, as JSON the source model's hash and whatever the editor
recorded (method, settings, data); and `crc32`, a checksum a tensor. Files of the
first format (`<site>/<layer>/key` and so on) are read as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from jaxedit import deltas as deltas_lib
from jaxedit.deltas import Dense, Edited, LowRank, SiteDelta
from jaxedit.types import InputError

_FORMAT, _FIRST_FORMAT = 'jaxedit-delta-2', 'jaxedit-delta-1'
KINDS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        LowRank,
        Dense,
        deltas_lib.Neurons,
        deltas_lib.Codebook,
        deltas_lib.Routed,
    )
}


def _leaves(kind: type) -> list[str]:
  """The array fields of a kind of delta."""
  return [
      field.name
      for field in dataclasses.fields(kind)
      if field.metadata.get('pytree_node', True)
  ]


def save(
    path: str | os.PathLike[str], edited: Edited, metadata: Mapping[str, Any]
) -> None:
  """Writes a delta, atomically.

  Args:
    path: file to write.
    edited: the edit, or edits side by side.
    metadata: JSON values; must have 'model_hash'.

  Raises:
    InputError: the file cannot be written, or the edit has a rule that has no
      file form.
  """
  if edited.prompting is not None or edited.routing is not None:
    raise InputError(
        f'{path}: a prompting or routing rule has no file form; save what it was'
        ' made from'
    )
  tensors: dict[str, np.ndarray] = {}
  kinds = []
  for number, delta in enumerate(edited.deltas):
    leaves = _leaves(type(delta))
    for name in leaves:
      array = np.ascontiguousarray(np.asarray(getattr(delta, name)))
      tensors[f'{number}/{name}'] = array
    static = {
        field.name: getattr(delta, field.name)
        for field in dataclasses.fields(delta)
        if field.name not in leaves
    }
    kinds.append({'kind': type(delta).__name__, **static})
  header = {
      'format': _FORMAT,
      'deltas': json.dumps(kinds),
      'size': json.dumps(edited.size),
      'jaxedit': json.dumps(metadata, sort_keys=True),
      'crc32': json.dumps(_checksums(tensors), sort_keys=True),
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
    (the edit, its metadata).

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
  if header.get('format') not in (_FORMAT, _FIRST_FORMAT):
    raise InputError(f'{path}: not a delta of jaxedit ({_FORMAT})')
  try:
    metadata = json.loads(header['jaxedit'])
    made_for = metadata['model_hash']
    intact = json.loads(header['crc32']) == _checksums(tensors)
    read = _first_format if header['format'] == _FIRST_FORMAT else _edited
    edited = read(header, tensors, metadata) if intact else None
  except (KeyError, TypeError, ValueError, IndexError):
    edited = None
  if edited is None:
    raise InputError(f'{path}: damaged; copy or make it again')
  if model_hash is not None and made_for != model_hash:
    raise InputError(
        f'{path}: made for model {made_for[:12]}, given'
        f' {model_hash[:12]}; load the model it was made for'
    )
  return edited, metadata


def _checksums(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
  """CRC-32 of every tensor's bytes."""
  # The view also serves dtypes that numpy cannot hand out as a buffer.
  return {k: zlib.crc32(v.view(np.uint8)) for k, v in tensors.items()}


def _edited(
    header: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
) -> Edited:
  """Rebuilds an edit."""
  del metadata
  deltas = []
  for number, fields in enumerate(json.loads(header['deltas'])):
    kind = KINDS[fields.pop('kind')]
    fields['layers'] = tuple(fields['layers'])
    arrays = {
        name: jnp.asarray(tensors[f'{number}/{name}']) for name in _leaves(kind)
    }
    deltas.append(kind(**fields, **arrays))
  return Edited(tuple(deltas), size=json.loads(header['size']))


def _first_format(
    header: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
) -> Edited:
  """Rebuilds an edit of the first format, one delta a changed parameter."""
  del header
  places: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}
  for name, tensor in tensors.items():
    site, layer, field = name.rsplit('/', 2)
    kind = '' if field in ('key', 'value') else field
    layers = places.setdefault((site, kind), {})
    layers.setdefault(int(layer), {})[field] = tensor
  deltas: list[SiteDelta] = []
  size = None
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
    if metadata.get('independent'):
      (size,) = {x.shape[1] for x in stacked.values()}
  return Edited(tuple(deltas), size=size)
