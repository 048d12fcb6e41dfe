"""An edit as an adapter: its changes as low-rank factors, trimmed and balanced.

  X = K^T V = Q_k (R_k R_v^T) Q_v^T = Q_k U S W^T Q_v^T
  A = sqrt(S) (Q_k U)^T,   B = Q_v W sqrt(S)              B A = X^T

with singular values below a share of the largest left out. A and B weigh alike,
so that rounding to 16 bits loses least. What is left out is reported as
|X^T - B A| / |X| (Frobenius).

Axis letters: M pairs, r rank; `in` and `out` widths of a map.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.convert import adapters
from jaxedit.convert.adapters import Change
from jaxedit.deltas import Dense, Edited, LowRank
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import fetch
from jaxedit.types import InputError

FORMATS = ('peft', 'gguf')
TOLERANCE = 1e-6


class Exported(NamedTuple):
  """What was written of one map.

  Attributes:
    site: the map, e.g. 'mlp/down'.
    layer: its layer.
    rank: r.
    error: the share of the change that was left out, before rounding.
  """

  site: str
  layer: int
  rank: int
  error: float


def write_adapter(
    path: str | os.PathLike[str],
    spec: ModelSpec,
    edited: Edited,
    *,
    format: str = 'peft',  # pylint: disable=redefined-builtin
    base: str = '',
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    dtype: str = 'float32',
    about: Mapping[str, Any] | None = None,
) -> tuple[list[Exported], list[str]]:
  """Writes an edit as an adapter.

  Args:
    path: a new folder (PEFT) or a file (GGUF).
    spec: the architecture.
    edited: one edit that is a change of linear maps.
    format: one of `FORMATS`.
    base: the name by which a server finds the unedited model.
    rank: keep so many singular values of a map at most; None for all.
    tolerance: leave out singular values below this share of the largest.
    dtype: of the tensors, a key of `adapters.DTYPES`.
    about: JSON values that a PEFT folder keeps in jaxedit.json.

  Returns:
    (a report of every map, lines that say how to load the adapter).

  Raises:
    InputError: the edit is none that an adapter can hold, or see
      `adapters.write_peft` and `adapters.write_gguf`.
  """
  for name, value, known in (
      ('format', format, FORMATS),
      ('dtype', dtype, tuple(adapters.DTYPES)),
  ):
    if value not in known:
      raise InputError(f'{name} is {value!r}; known are {", ".join(known)}')
  changes, reports = [], []
  for (site, layer), parts in _by_map(spec, edited).items():
    change, error = _factors(parts, rank, tolerance)
    if not len(change[0]):
      continue  # nothing was written there
    changes.append(Change(site, layer, *change))
    reports.append(Exported(site, layer, len(change[0]), error))
  if not changes:
    raise InputError('the edit changes nothing, so there is nothing to export')
  if format == 'peft':
    lines = adapters.write_peft(
        path, spec, changes, base=base, dtype=dtype, about=about
    )
  else:
    lines = adapters.write_gguf(path, spec, changes, dtype=dtype)
  return reports, lines


def _by_map(
    spec: ModelSpec, edited: Edited
) -> dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray | None]]]:
  """The changes of every map: (K, V), or (X, None)."""
  if edited.size is not None:
    raise InputError(
        f'there are {edited.size} edits side by side, each for the unedited'
        ' model; select one of them (--edit)'
    )
  if edited.prompting is not None or edited.routing is not None:
    what = ' and '.join(edited.rules)
    raise InputError(f'the edit has {what}, which no adapter holds')
  found: dict[tuple[str, int], list[Any]] = {}
  for delta in edited.deltas:
    kernel = getattr(delta, 'leaf', 'kernel') == 'kernel'
    if not isinstance(delta, LowRank | Dense) or not kernel:
      what = type(delta).__name__ if kernel else f'changes of a {delta.leaf}'
      raise InputError(
          f'{delta.site} has {what}, which no adapter holds; save the edit as it'
          ' is' + (', or merge it' if delta.mergeable else '')
      )
    one = isinstance(delta, Dense)
    arrays = (delta.value,) if one else (delta.key, delta.value)
    arrays = [fetch(x).astype(np.float64) for x in arrays]
    if not all(np.isfinite(x).all() for x in arrays):
      raise InputError(
          f'the change of {delta.site} has numbers that are not finite'
      )
    for i, layer in enumerate(delta.layers):
      mine = (arrays[0][i], None if one else arrays[1][i])
      _check(spec, delta.site, layer, mine)
      found.setdefault((delta.site, layer), []).append(mine)
  return dict(sorted(found.items(), key=lambda one: (one[0][1], one[0][0])))


def _check(
    spec: ModelSpec,
    site: str,
    layer: int,
    change: tuple[np.ndarray, np.ndarray | None],
) -> None:
  """Refuses a change of a map that the model does not have."""
  key, value = change
  shape = key.shape if value is None else (key.shape[1], value.shape[1])
  want = param_shapes(spec).get(f'layers/{site}/kernel')
  layers = range(spec.layers - want[0], spec.layers) if want else ()
  if layer not in layers or want[1:] != shape:
    raise InputError(
        f'the edit changes a map {site} of layer {layer} with shape'
        f' {list(shape)}, which the model does not have; name the model that it'
        ' was made for'
    )


def _factors(
    parts: Sequence[tuple[np.ndarray, np.ndarray | None]],
    rank: int | None,
    tolerance: float,
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
  """A [r, in] and B [out, r] of a sum of changes, and what they leave out."""
  if all(value is not None for _, value in parts):
    key = np.concatenate([key for key, _ in parts])
    value = np.concatenate([value for _, value in parts])
    (left, upper), (right, lower) = np.linalg.qr(key.T), np.linalg.qr(value.T)
    u, s, vt = np.linalg.svd(upper @ lower.T, full_matrices=False)
    u, v = left @ u, right @ vt.T
  else:
    whole = sum(x if v is None else x.T @ v for x, v in parts)
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    v = vt.T
  kept = int((s > tolerance * s[0]).sum()) if len(s) and s[0] > 0 else 0
  kept = min(kept, len(s) if rank is None else rank)
  size = np.linalg.norm(s)
  error = float(np.linalg.norm(s[kept:]) / size) if size else 0.0
  root = np.sqrt(s[:kept])
  return ((u[:, :kept] * root).T, v[:, :kept] * root), error
