"""Edited parameters back into a Hugging Face folder.

The folder has upstream's names, shards and files. A tensor that no edit touched
is copied byte for byte; a changed one is put back into upstream's layout and
rounded to the source's dtype (or kept in float32). Rounding can swallow a small
edit, so the report gives, for every changed tensor,

  cast_error  = ||cast(new) - new|| / ||new||
  merge_error = ||cast(new) - new|| / ||new - old||      (Frobenius norms)

where the second says which part of the edit was lost. With `keep_original` the
replaced tensors and headers lie beside the weights, and `restore` rebuilds the
source's files bit by bit.

Nothing here makes a config: the source folder's own files are copied. A loader
that follows their dtype rounds float32 tensors to it again; load such a folder
in float32.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping

import numpy as np

from jaxedit import io
from jaxedit.models import checkpoint, loading, tensors
from jaxedit.models import spec as spec_lib
from jaxedit.placement import fetch
from jaxedit.types import InputError, Params

Changed = Collection[str | tuple[str, int]]

# Files that go with the weights; anything else in a folder is not copied.
_SMALL = ('.json', '.txt', '.model', '.jinja', '.tiktoken', '.vocab', '.md')
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class TensorReport:
  """How one changed tensor was written.

  Attributes:
    dtype: safetensors code it was written in.
    change: Frobenius norm of new - old.
    cast_error: relative error of the rounding.
    merge_error: that error relative to the change; 0 if nothing changed.
  """

  dtype: str
  change: float
  cast_error: float
  merge_error: float


@dataclasses.dataclass(frozen=True)
class SaveReport:
  """What was written.

  Attributes:
    folder: the new folder.
    tensors: upstream name -> report, for the changed tensors.
  """

  folder: pathlib.Path
  tensors: Mapping[str, TensorReport]

  @property
  def merge_error(self) -> float:
    """The largest merge error of a tensor, 0 without changes."""
    return max((one.merge_error for one in self.tensors.values()), default=0.0)


def save_model(
    source_folder: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    spec: spec_lib.ModelSpec,
    params: Params,
    *,
    changed: Changed,
    dtype: str | None = None,
    keep_original: bool = False,
    extra_metadata: Mapping[str, str] | None = None,
) -> SaveReport:
  """Writes a model as a Hugging Face folder like the one it came from.

  Args:
    source_folder: the folder the model was loaded from.
    out_folder: new or empty; appears when everything has been written.
    spec: the architecture; must be the source's.
    params: canonical parameters; only the changed leaves are read.
    changed: canonical leaf paths, or (path, layer) pairs of stacked leaves.
    dtype: None rounds changed tensors to the source's dtype, 'float32' keeps
      them in float32.
    keep_original: whether to write original.safetensors, which `restore` needs.
    extra_metadata: strings for the headers of the files that changed.

  Returns:
    The rounding of every changed tensor.

  Raises:
    InputError: the source cannot be read, the spec is another model's, a
      changed path or layer does not exist, new values are not finite or
      overflow the dtype, or the place is taken.
  """
  if dtype not in (None, 'float32'):
    raise InputError(
        f"dtype {dtype!r} is not supported; use None for the source's dtype or "
        "'float32'"
    )
  for key, text in (extra_metadata or {}).items():
    if not isinstance(text, str):
      raise InputError(
          f'extra_metadata {key!r} is {text!r}; headers hold strings alone'
      )
  _, source, layout = loading.open_model(source_folder)
  if layout.spec != spec:
    raise InputError(
        f'{source.folder} holds another architecture than the one to save: '
        f'{layout.spec} and {spec}'
    )
  writer = _Writer(source, layout, params, _spread(spec, changed), dtype)
  files = writer.changed_files()
  with io.new_folder(out_folder) as folder:
    _copy_small(source.folder, folder)
    for name, header in source.headers.items():
      if name in files:
        writer.write(folder / name, header, extra_metadata or {})
      else:
        shutil.copyfile(source.folder / name, folder / name)
    if writer.problems:
      raise InputError(*writer.problems)
    if source.index is not None:
      _write_index(source, folder)
    if keep_original:
      _write_original(source, folder, files, writer.names)
  return SaveReport(pathlib.Path(out_folder), writer.reports)


def _spread(
    spec: spec_lib.ModelSpec, changed: Changed
) -> set[tuple[str, int | None]]:
  """Turns changed paths into (path, layer) pairs, layer None if unstacked."""
  shapes = spec_lib.param_shapes(spec)
  pairs: set[tuple[str, int | None]] = set()
  problems = []
  for item in changed:
    path, layer = (item, None) if isinstance(item, str) else item
    stacked = path.startswith('layers/')
    rows = shapes[path][0] if path in shapes else 0
    layers = range(spec.layers - rows, spec.layers)
    if path not in shapes:
      problems.append(
          f'there is no leaf {path!r}; known are {", ".join(shapes)}'
      )
    elif layer is None:
      every = layers if stacked else (None,)
      pairs |= {(path, one) for one in every}
    elif not stacked or layer not in layers:
      problems.append(
          f'leaf {path!r} has no layer {layer}; '
          + (
              f'the layers are {layers.start} to {spec.layers - 1}'
              if stacked
              else 'it is not stacked'
          )
      )
    else:
      pairs.add((path, layer))
  if problems:
    raise InputError(*problems)
  return pairs


class _Writer:
  """Writes weight files, one tensor in memory at a time."""

  def __init__(
      self,
      source: checkpoint.Checkpoint,
      layout: loading.Layout,
      params: Params,
      pairs: set[tuple[str, int | None]],
      dtype: str | None,
  ):
    self._source, self._layout, self._params = source, layout, params
    self._pairs, self._dtype = pairs, dtype
    slots = dict(layout.slots)
    # A stored copy of a tied head follows its embedding.
    slots.update({copy: slots[name] for copy, name in layout.copies.items()})
    self._slots = {
        name: leaves
        for name, leaves in slots.items()
        if any((slot.path, slot.layer) in pairs for slot in leaves)
    }
    self.reports: dict[str, TensorReport] = {}
    self.problems: list[str] = []

  @property
  def names(self) -> Collection[str]:
    """Upstream tensors that change."""
    return self._slots.keys()

  def changed_files(self) -> set[str]:
    """Files that hold a changed tensor."""
    return {self._source.tensors[name].path.name for name in self._slots}

  def write(
      self,
      path: pathlib.Path,
      header: checkpoint.Header,
      extra: Mapping[str, str],
  ) -> None:
    """Writes one file."""
    kinds = {
        name: (self._code(tensor), tensor.shape)
        for name, tensor in header.tensors.items()
    }

    def read(name: str) -> np.ndarray:
      tensor = header.tensors[name]
      return self._changed(tensor) if name in self._slots else tensor.read()

    with open(path, 'wb') as stream:
      io.stream_tensors(stream, kinds, read, {**header.metadata, **extra})

  def _code(self, tensor: checkpoint.Tensor) -> str:
    """The dtype code a tensor is written in."""
    if tensor.name in self._slots and self._dtype == 'float32':
      return 'F32'
    return tensor.code

  def _changed(self, tensor: checkpoint.Tensor) -> np.ndarray:
    """Builds a changed tensor, notes its rounding, and returns it cast."""
    heads = self._layout.spec.heads
    slots, old = self._slots[tensor.name], tensor.read()
    leaves = []
    for slot in slots:
      if (slot.path, slot.layer) in self._pairs:
        leaf = loading.get_leaf(self._params, slot.path)
        if slot.layer is not None:
          depth = self._layout.spec.layers
          leaf = leaf[spec_lib.row(depth, len(leaf), slot.layer)]
        part = fetch(leaf)
      else:  # an untouched part of a fused tensor keeps the source's values
        part = tensors.to_canonical(old, slot.source, heads)
      leaves.append(part.astype(np.promote_types(part.dtype, np.float32)))
    new = tensors.to_upstream(leaves, slots[0].source, heads)
    if new.shape != old.shape:
      self.problems.append(
          f'tensor {tensor.name} would have shape {list(new.shape)} instead of '
          f'{list(old.shape)}; the parameters do not fit the architecture'
      )
      return old
    code = self._code(tensor)
    with np.errstate(over='ignore'):
      cast = new.astype(io.DTYPES[code])
    self.reports[tensor.name] = _compare(old, new, cast, code)
    if not np.isfinite(cast.astype(np.float32)).all():
      self.problems.append(
          f'tensor {tensor.name} has new values that are not finite in {code}; '
          "the edit diverged, or save with dtype='float32'"
      )
    return cast


def _compare(
    old: np.ndarray, new: np.ndarray, cast: np.ndarray, code: str
) -> TensorReport:
  """Measures a cast in f64, piece by piece."""
  flat = [array.reshape(-1) for array in (old, new, cast)]
  change = error = size = 0.0
  for start in range(0, new.size, _CHUNK):
    a, b, c = (one[start : start + _CHUNK].astype(np.float64) for one in flat)
    with np.errstate(invalid='ignore'):
      change += float(np.sum((b - a) ** 2))
      error += float(np.sum((c - b) ** 2))
      size += float(np.sum(b**2))
  change, error, size = math.sqrt(change), math.sqrt(error), math.sqrt(size)

  def ratio(whole: float) -> float:
    return error / whole if error else 0.0

  return TensorReport(code, change, ratio(size), ratio(change))


def _copy_small(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies config, tokenizer and other small files, but no weight index."""
  for path in sorted(source.iterdir()):
    weights = path.name.endswith('.index.json')
    if path.is_file() and path.suffix in _SMALL and not weights:
      shutil.copyfile(path, folder / path.name)


def _write_index(source: checkpoint.Checkpoint, folder: pathlib.Path) -> None:
  """Copies the index, with the total size that the new shards have."""
  total = 0
  for name in source.headers:
    header = checkpoint.read_header(folder / name)
    total += sum(tensor.size for tensor in header.tensors.values())
  metadata = source.index.get('metadata') or {}
  if metadata.get('total_size') in (None, total):
    shutil.copyfile(source.folder / checkpoint.INDEX, folder / checkpoint.INDEX)
    return
  index = {**source.index, 'metadata': {**metadata, 'total_size': total}}
  io.write_json(folder / checkpoint.INDEX, index)


def _write_original(
    source: checkpoint.Checkpoint,
    folder: pathlib.Path,
    files: Collection[str],
    names: Collection[str],
) -> None:
  """Keeps the replaced tensors, and the headers of the files they were in."""
  old = {name: source.tensors[name] for name in names}
  metadata = {
      f'header:{name}': _raw_header(source.folder / name) for name in files
  } | {
      f'crc32:{name}': str(io.file_crc32(source.folder / name))
      for name in files
  }
  if source.index is not None:
    text = (source.folder / checkpoint.INDEX).read_bytes().decode()
    metadata[f'file:{checkpoint.INDEX}'] = text
  kinds = {name: (tensor.code, tensor.shape) for name, tensor in old.items()}
  with open(folder / checkpoint.ORIGINAL, 'wb') as stream:
    io.stream_tensors(stream, kinds, lambda name: old[name].read(), metadata)


def _raw_header(path: pathlib.Path) -> str:
  """Reads the header of a checked file as it stands, padding included."""
  with open(path, 'rb') as stream:
    return stream.read(int.from_bytes(stream.read(8), 'little')).decode()


def restore(
    folder: str | os.PathLike[str], out_folder: str | os.PathLike[str]
) -> tuple[str, ...]:
  """Rebuilds the folder that an edited one was made from, bit by bit.

  Args:
    folder: written by `save_model` with `keep_original`.
    out_folder: new or empty.

  Returns:
    Upstream names of the tensors put back.

  Raises:
    InputError: original.safetensors is missing or does not go with the folder,
      or the place is taken.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f'{folder}: there is no such folder')
  path = folder / checkpoint.ORIGINAL
  if not path.is_file():
    raise InputError(
        f'{folder}: cannot be restored without {checkpoint.ORIGINAL}; save '
        'with keep_original=True, or fetch the original model again'
    )
  original = checkpoint.read_header(path)
  edited = checkpoint.open_folder(folder)
  with io.new_folder(out_folder) as out:
    _copy_small(folder, out)
    for name in edited.headers:
      raw = original.metadata.get(f'header:{name}')
      if raw is None:
        shutil.copyfile(folder / name, out / name)
      else:
        _restore_file(out / name, raw.encode(), original, edited)
        # Folders of earlier versions have no checksums.
        crc = original.metadata.get(f'crc32:{name}')
        if crc not in (None, str(io.file_crc32(out / name))):
          raise InputError(
              f'{folder}: {name} cannot be restored, as {name} or'
              f' {checkpoint.ORIGINAL} is damaged; fetch the original model'
          )
    index = original.metadata.get(f'file:{checkpoint.INDEX}')
    if index is not None:
      (out / checkpoint.INDEX).write_bytes(index.encode())
    # Reading it back checks that sizes and index fit each other.
    checkpoint.open_folder(out)
  return tuple(original.tensors)


def _restore_file(
    path: pathlib.Path,
    raw: bytes,
    original: checkpoint.Header,
    edited: checkpoint.Checkpoint,
) -> None:
  """Writes one file under its old header."""
  try:
    entries = io.parse_json(raw)
    entries.pop('__metadata__', None)
    order = sorted(entries, key=lambda name: entries[name]['data_offsets'])
    shapes = {name: entry['shape'] for name, entry in entries.items()}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(
        f'{edited.folder}: {checkpoint.ORIGINAL} is damaged ({error}); fetch the'
        ' original model again'
    ) from error
  with open(path, 'wb') as stream:
    stream.write(len(raw).to_bytes(8, 'little') + raw)
    for name in order:
      tensor = original.tensors.get(name) or edited.tensors.get(name)
      if tensor is None or list(tensor.shape) != shapes[name]:
        raise InputError(
            f'{edited.folder}: tensor {name} is missing or has another shape '
            f'than {checkpoint.ORIGINAL} expects; the files do not belong '
            'together'
        )
      stream.write(io.tensor_bytes(tensor.read()))
