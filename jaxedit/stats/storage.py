"""Second moments on disk.

The file is safetensors: one F64 [F, F] matrix a layer, named `gram/<layer>`,
and in the header (see `jaxedit.io`) a record with the token count and the
provenance. A file that is of another model, lacks a layer, or is cut short or
altered is refused with what to do.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit import io
from jaxedit.types import InputError

_MOMENTS = 'jaxedit second moments 1'
# What a file begins with that is given by mistake.
_SIGNS = {
    b'PK': 'a zip file (one .npz archive, or a .pt file of torch)',
    b'\x93NUMPY': 'a numpy array',
    b'\x80': 'a pickle, which can run code when opened',
    b'GGUF': 'a GGUF model',
    b'\x1f\x8b': 'a gzip file',
    b'{': 'a text file',
    b'[': 'a text file',
}
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
    width: int | None = None,
) -> dict[str, Any]:
  """Reads the header of second moments and checks that they are those wanted.

  Args:
    path: file that `save` wrote.
    model_hash: hash of the model they must come from; None takes any.
    layers: layers wanted; None takes what there is.
    site: linear map whose input they must be of.
    width: key width F that the model needs; None takes any.

  Returns:
    The header's record.

  Raises:
    InputError: missing or cut short, another kind of file, of another model,
      site or width, without tokens or a layer; all faults at once.
  """
  advice = _advice(path, layers)
  if other := _other_kind(path):
    raise InputError(
        f'{path}: is {other}, not second moments; give a file of'
        ' collect_moments, or a folder of the .npz files that ROME and MEMIT'
        f' publish, or {advice}'
    )
  _, record = io.read_tensors(path, _MOMENTS, advice, names=())
  kinds = {'layers': list, 'count': int, 'provenance': dict}
  have, count, provenance = io.take(record, kinds, path, advice)
  problems = []
  if count < 1:
    problems.append(f'{path}: says that {count} tokens were averaged; {advice}')
  if not have or not all(type(n) is int for n in have):
    problems.append(f'{path}: is damaged, its layers are no numbers; {advice}')
    have = []
  problems += _misshapen(path, have, width, advice)
  model, of = provenance.get('model'), provenance.get('site')
  if model_hash not in (None, model):
    problems.append(
        f'{path}: these second moments are of the model with hash {model!r},'
        f' not of {model_hash!r}; {advice}'
    )
  if of != site:
    problems.append(
        f'{path}: these second moments are of the input of {of!r}, not of'
        f' {site!r}; {advice} --site={site}'
    )
  missing = [n for n in layers or () if n not in have]
  if have and missing:
    problems.append(
        f'{path}: has second moments of layers {_listed(have)}, not of'
        f' {_listed(missing)}; {advice}'
    )
  InputError.raise_for(problems)
  return record


def load(
    path: str | os.PathLike[str],
    *,
    model_hash: str | None = None,
    layers: Sequence[int] | None = None,
    site: str = 'mlp/down',
    width: int | None = None,
) -> Moments:
  """Reads second moments and checks that they are the ones wanted.

  Args:
    path: file that `save` wrote.
    model_hash: hash of the model they must come from; None takes any.
    layers: layers wanted; only these are read. None reads all.
    site: linear map whose input they must be of.
    width: key width F that the model needs; None takes any.

  Returns:
    The moments of `layers`, in that order.

  Raises:
    InputError: as for `check`, damaged, or no moments of any text.
  """
  record = check(
      path, model_hash=model_hash, layers=layers, site=site, width=width
  )
  chosen = tuple(record['layers'] if layers is None else layers)
  names = [f'gram/{layer}' for layer in chosen]
  advice = _advice(path, layers)
  tensors, _ = io.read_tensors(path, _MOMENTS, advice, names)
  for layer, name in zip(chosen, names):
    check_gram(tensors[name], f'{path}: layer {layer}', advice)
  gram = np.stack([tensors[name] for name in names])
  return Moments(chosen, gram, record['count'], record['provenance'])


def check_gram(gram: np.ndarray, where: str, advice: str) -> None:
  """Refuses what is no second moment of any numbers.

  What is looked at: every number is finite, the diagonal is not negative, and
  |C_ij| <= sqrt(C_ii C_jj), which averages of k k^T obey. A matrix may pass and
  still have a negative eigenvalue; solves find that.

  Args:
    gram: [F, F].
    where: begins the message.
    advice: ends it.

  Raises:
    InputError: it cannot be.
  """
  root = np.diagonal(gram)
  bad = ''
  if not all(np.isfinite(row).all() for row in gram):
    bad = 'holds numbers that are not finite'
  elif (root < 0).any():
    bad = 'has negative mean squares'
  else:
    root = np.sqrt(root) * (1 + 1e-3)
    if any((abs(row) > r * root).any() for row, r in zip(gram, root)):
      bad = 'has products larger than the squares they are of'
  if bad:
    raise InputError(f'{where}: {bad}, so it is no second moment; {advice}')


def _misshapen(
    path: str | os.PathLike[str],
    layers: Sequence[int],
    width: int | None,
    advice: str,
) -> list[str]:
  """Compares the matrices of a file with its record, by their shapes."""
  _, entries = io.read_header(path, advice)
  for layer in layers:
    entry = entries.get(f'gram/{layer}')
    size = entry.shape[-1] if entry and entry.shape else 0
    if not size or entry.shape != (size, size) or entry.code != 'F64':
      return [f'{path}: is damaged, layer {layer} has no matrix; {advice}']
    if width not in (None, size):
      return [
          f'{path}: these second moments are of keys of width {size}, where the'
          f' model has {width}; {advice}'
      ]
  return []


def _other_kind(path: str | os.PathLike[str]) -> str:
  """Names what a file is instead of second moments; '' if it may be some."""
  try:
    metadata, _ = io.read_header(path)
  except InputError:
    return _by_sign(path)
  said = metadata.get('format', metadata.get('kind', ''))
  if said.startswith('jaxedit') and said != _MOMENTS:
    return f'a file of {said[:40]!r}'
  return '' if said == _MOMENTS else 'a safetensors file of something else'


def _by_sign(path: str | os.PathLike[str]) -> str:
  """Names what a file is by how it begins; '' if that says nothing."""
  try:
    io.file_size(path)
    with open(path, 'rb') as stream:
      head = stream.read(8)
  except OSError:
    return ''
  return next((x for sign, x in _SIGNS.items() if head.startswith(sign)), '')


def _advice(path: str | os.PathLike[str], layers: Sequence[int] | None) -> str:
  """What to do about moments that cannot be used; overwrites no file."""
  wanted = '...' if layers is None else ','.join(map(str, layers))
  place, number = pathlib.Path(path), 1
  while os.path.lexists(place):
    number += 1
    place = place.with_name(f'{pathlib.Path(path).stem}-{number}.safetensors')
  return _COLLECT.format(layers=wanted, path=place)


def _listed(layers: Sequence[int]) -> str:
  """'4, 5, 6'."""
  return ', '.join(map(str, layers))
