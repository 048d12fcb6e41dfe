"""Edits on disk: one safetensors file with what is needed to trust it.

Tensors are named `<number>/<leaf>`, stacked over layers as in memory. The
record in the header (see `jaxedit.io`) holds `deltas`, the kind and the static
fields of every delta; `size`; and `metadata`, the source model's hash and
whatever the editor recorded (method, settings, data). Files of the first format
(`<site>/<layer>/key` and so on) are read as well.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxedit import deltas as deltas_lib
from jaxedit import io
from jaxedit.deltas import Dense, Edited, LowRank, SiteDelta
from jaxedit.edited.dialogue import FactDialogue
from jaxedit.edited.ledger import Ledger
from jaxedit.edited.prompting import FactMemory
from jaxedit.placement import fetch
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
# Prompting rules that have a file form.
RULES: Mapping[str, type] = {
    kind.__name__: kind for kind in (FactMemory, FactDialogue)
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
  rule = ({}, {}) if edited.prompting is None else edited.prompting.packed()
  if edited.routing is not None or rule is None:
    raise InputError(
        f'{path}: cannot be written, as the edit has'
        f' {" and ".join(edited.rules)}, which no file holds; save what it was'
        ' made from'
    )
  tensors, kinds = packed(edited)
  record = {'deltas': kinds, 'size': edited.size, 'metadata': dict(metadata)}
  if edited.prompting is not None:
    arrays, kept = rule
    record['prompting'] = {'rule': type(edited.prompting).__name__, **kept}
    tensors |= {f'prompting/{name}': x for name, x in arrays.items()}
  if edited.ledger is not None:
    arrays, record['ledger'] = edited.ledger.packed()
    tensors |= {f'ledger/{name}': x for name, x in arrays.items()}
  io.write_tensors(path, tensors, kind=_FORMAT, record=record)


def packed(
    edited: Edited,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
  """Writes the deltas of an edit as arrays and plain JSON types.

  Args:
    edited: the edit, or edits side by side.

  Returns:
    (name -> array, the kind and static fields of each delta).
  """
  tensors: dict[str, np.ndarray] = {}
  kinds = []
  for number, delta in enumerate(edited.deltas):
    leaves = _leaves(type(delta))
    for name in leaves:
      tensors[f'{number}/{name}'] = fetch(getattr(delta, name))
    static = {
        field.name: getattr(delta, field.name)
        for field in dataclasses.fields(delta)
        if field.name not in leaves
    }
    kinds.append({'kind': type(delta).__name__, **static})
  return tensors, kinds


def unpacked(
    tensors: Mapping[str, np.ndarray], kinds: Sequence[Mapping[str, Any]]
) -> tuple[SiteDelta, ...]:
  """Reads the deltas that `packed` wrote."""
  deltas = []
  for number, fields in enumerate(kinds):
    kind = KINDS[fields['kind']]
    static = {k: v for k, v in fields.items() if k != 'kind'}
    static['layers'] = tuple(static['layers'])
    arrays = {
        name: jnp.asarray(tensors[f'{number}/{name}']) for name in _leaves(kind)
    }
    deltas.append(kind(**static, **arrays))
  return tuple(deltas)


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
    InputError: no such file, damaged, with numbers that are not finite, not a
      delta, or made for another model.
  """
  remedy = 'copy or make it again'
  formats = (_FORMAT, _FIRST_FORMAT)
  tensors, record = io.read_tensors(path, formats, remedy)
  read = _edited if 'metadata' in record else _first_format
  metadata = record.get('metadata', record)
  try:
    made_for = metadata['model_hash']
    edited = read(tensors, record)
    _check(edited, made_for)
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise InputError(f'{path}: damaged ({error}); {remedy}') from error
  if model_hash is not None:
    require_model(path, metadata, model_hash)
  return edited, metadata


def require_model(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], model_hash: str
) -> None:
  """Refuses a saved edit that was made for another model.

  Args:
    path: of its file.
    metadata: what `load` returned beside the edit.
    model_hash: of the model.
  """
  made_for = metadata['model_hash']
  if made_for != model_hash:
    raise InputError(
        f'{path}: made for model {made_for[:12]}, given'
        f' {model_hash[:12]}; load the model it was made for'
    )


def _check(edited: Edited, made_for: Any) -> None:
  """Refuses an edit that fits no model; raises ValueError."""
  if type(made_for) is not str:
    raise ValueError('it does not say which model it was made for')
  size = edited.size
  if size is not None and (type(size) is not int or size < 1):
    raise ValueError(f'it holds {size!r} edits side by side')
  for delta in edited.deltas:
    name = f'the {type(delta).__name__} delta of {delta.site!r}'
    layers = delta.layers
    if not all(type(n) is int and n >= 0 for n in layers) or (
        type(delta.site) is not str
    ):
      raise ValueError(f'{name} has layers {str(layers)[:80]}')
    lead = (len(layers),) if size is None else (len(layers), size)
    for leaf in _leaves(type(delta)):
      array = getattr(delta, leaf)
      if array.shape[: len(lead)] != lead:
        raise ValueError(f'{leaf} of {name} has shape {array.shape}')
      array = fetch(array)
      bound = leaf in ('radii', 'thresholds')  # which may be infinite
      if not (np.isinf(array) & bound | np.isfinite(array)).all():
        raise ValueError(f'{leaf} of {name} holds numbers that are not finite')


def _edited(
    tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> Edited:
  """Rebuilds an edit."""
  deltas = unpacked(tensors, record['deltas'])
  prompting, ledger = None, None
  if kept := record.get('prompting'):
    kept = {'rule': FactMemory.__name__, **kept}
    rule = RULES[kept.pop('rule')]
    prompting = rule.unpacked(_below(tensors, 'prompting/'), kept)
  if kept := record.get('ledger'):
    ledger = Ledger.unpacked(_below(tensors, 'ledger/'), kept)
  return Edited(deltas, prompting, size=record['size'], ledger=ledger)


def _below(
    tensors: Mapping[str, np.ndarray], begin: str
) -> dict[str, np.ndarray]:
  """The tensors whose names begin so, by the rest of their names."""
  return {
      name.removeprefix(begin): x
      for name, x in tensors.items()
      if name.startswith(begin)
  }


def _first_format(
    tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> Edited:
  """Rebuilds an edit of the first format, one delta a changed parameter.

  It does not tell how many edits lie side by side: their axis does.
  """
  del record
  found_at: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}
  for name, tensor in tensors.items():
    site, layer, field = name.rsplit('/', 2)
    kind = '' if field in ('key', 'value') else field
    layers = found_at.setdefault((site, kind), {})
    layers.setdefault(int(layer), {})[field] = tensor
  deltas: list[SiteDelta] = []
  size = None
  for (site, leaf), found in sorted(found_at.items()):
    layers = tuple(sorted(found))
    stacked = {
        field: jnp.asarray(np.stack([found[layer][field] for layer in layers]))
        for field in found[layers[0]]
    }
    if leaf:
      delta = Dense(layers, site, stacked[leaf], leaf)
    else:
      delta = LowRank(layers, site, **stacked)
    deltas.append(delta)
    if delta.value.ndim == 2 + len(delta.axes['value'].split()):
      size = delta.value.shape[1]
  return Edited(tuple(deltas), size=size)
