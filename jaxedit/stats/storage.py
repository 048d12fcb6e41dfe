"""Second moments on disk.

The file is safetensors: one F64 [F, F] matrix a layer, named `gram/<layer>`,
and in the header (see `jaxedit.io`) a record with the token count and the
provenance. A file that is of another model, lacks a layer, or is cut short or
altered is refused with what to do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit import io
from jaxedit.types import InputError

_MOMENTS = 'jaxedit second moments 1'
_COLLECT = (
    'collect them with `python -m experiments.collect_moments'
    ' --model=... --layers={layers} --out={path}`'
)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Average second moments of the input of one linear map in some layers.

  Attributes:
    layers: layer numbers, in the order of `gram`.
    gram: [n, F, F] float64, C = (1 / count) sum over tokens of k k^T,
      uncentred; exactly symmetric.
    count: tokens averaged over.
    provenance: what the numbers come from: model (hash), corpus (name),
      corpus_sha256, seed, dtype, layers, site, width, texts, padding_share.
  """

  layers: tuple[int, ...]
  gram: np.ndarray
  count: int
  provenance: Mapping[str, Any]

  def layer(self, layer: int) -> np.ndarray:
    """Returns [F, F] float64 of one layer.

    Raises:
      InputError: that layer was not collected.
    """
    if layer not in self.layers:
      have = ', '.join(map(str, self.layers))
      raise InputError(
          f'there are no second moments of layer {layer}, only of {have}:'
          ' collect again with every layer that is edited'
      )
    return self.gram[self.layers.index(layer)]


def save(path: str | os.PathLike[str], moments: Moments) -> None:
  """Writes second moments.

  Args:
    path: file to create or replace.
    moments: what to write.

  Raises:
    InputError: the file cannot be written.
  """
  tensors = {
      f'gram/{layer}': gram for layer, gram in zip(moments.layers, moments.gram)
  }
  record = {
      'layers': list(moments.layers),
      'count': moments.count,
      'provenance': dict(moments.provenance),
  }
  io.sweep(path)
  io.write_tensors(path, tensors, kind=_MOMENTS, record=record)


def check(
    path: str | os.PathLike[str],
    *,
    model_hash: str | None = None,
    layers: Sequence[int] | None = None,
    site: str = 'mlp/down',
) -> dict[str, Any]:
  """Reads the header of second moments and checks that they are those wanted.

  Args:
    path: file that `save` wrote.
    model_hash: hash of the model they must come from; None takes any.
    layers: layers wanted; None takes what there is.
    site: linear map whose input they must be of.

  Returns:
    The header's record.

  Raises:
    InputError: missing or cut short, of another model or site, or without a
      layer; all faults at once.
  """
  advice = _advice(path, layers)
  _, record = io.read_tensors(path, _MOMENTS, advice, names=())
  provenance, have = record['provenance'], record['layers']
  problems = []
  model = provenance.get('model')
  if model_hash is not None and model != model_hash:
    problems.append(
        f'{path}: these second moments are of the model with hash {model!r},'
        f' not of {model_hash!r}; {advice}'
    )
  if provenance.get('site') != site:
    problems.append(
        f'{path}: these second moments are of the input of'
        f' {provenance.get("site")!r}, not of {site!r}; {advice} --site={site}'
    )
  missing = [n for n in layers or () if n not in have]
  if missing:
    problems.append(
        f'{path}: has second moments of layers {_listed(have)}, not of'
        f' {_listed(missing)}; {advice}'
    )
  if problems:
    raise InputError(*problems)
  return record


def load(
    path: str | os.PathLike[str],
    *,
    model_hash: str | None = None,
    layers: Sequence[int] | None = None,
    site: str = 'mlp/down',
) -> Moments:
  """Reads second moments and checks that they are the ones wanted.

  Args:
    path: file that `save` wrote.
    model_hash: hash of the model they must come from; None takes any.
    layers: layers wanted; only these are read. None reads all.
    site: linear map whose input they must be of.

  Returns:
    The moments of `layers`, in that order.

  Raises:
    InputError: as for `check`, or damaged.
  """
  record = check(path, model_hash=model_hash, layers=layers, site=site)
  chosen = tuple(record['layers'] if layers is None else layers)
  names = [f'gram/{layer}' for layer in chosen]
  tensors, _ = io.read_tensors(path, _MOMENTS, _advice(path, layers), names)
  gram = np.stack([tensors[name] for name in names])
  return Moments(chosen, gram, record['count'], record['provenance'])


def _advice(path: str | os.PathLike[str], layers: Sequence[int] | None) -> str:
  """What to do about moments that cannot be used."""
  wanted = '...' if layers is None else ','.join(map(str, layers))
  return _COLLECT.format(layers=wanted, path=path)


def _listed(layers: Sequence[int]) -> str:
  """'4, 5, 6'."""
  return ', '.join(map(str, layers))
