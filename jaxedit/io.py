"""Files: written whole or not at all, checked as they are read.

A file or folder is filled under another name beside its place and then renamed
into it, so that a run that is killed leaves no part of one. JSON from outside
is bounded in size and nesting, has no key twice and no broken Unicode. Tensors
lie in safetensors files whose header says what the file is, holds a JSON record
and a CRC-32 a tensor:

  format    kind and version of the file, e.g. 'jaxedit-delta-1'
  jaxedit   the record
  crc32     tensor name -> checksum
  header_crc32   of all that the header says: the strings above, and each
                 tensor's name, dtype and shape

Safetensors files are written by hand, as `safetensors.numpy.save_file` needs all
tensors in memory, orders metadata at random and makes its files private; and
read by hand, header first, as a header may be anything.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxedit.types import InputError

StrPath = str | os.PathLike[str]

# Of a JSON file, and of the header of a safetensors file.
MOST_BYTES = 1 << 26
_MOST_NESTED = 100
_MOST_VALUES = 1 << 23
_JSON_NAMES = {dict: 'an object', list: 'a list'}
# A lone half of a surrogate pair; before it, what only looks like one.
_SURROGATE = re.compile(
    r'\\\\|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(\\u[dD][89a-fA-F]\w\w)'
)
_HEADER_SUM = 'header_crc32'
# The strings of files that were written without it.
_EARLIER = (
    {'format', 'jaxedit', 'crc32'}, {'kind', 'record'},
)  # fmt: skip
_MAKE_ROOM = 'choose another place or make room there'

# Safetensors' dtype codes.
DTYPES = {
    code: np.dtype(dtype)
    for code, dtype in {
        'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
        'BF16': ml_dtypes.bfloat16, 'F8_E4M3': ml_dtypes.float8_e4m3fn,
        'F8_E5M2': ml_dtypes.float8_e5m2, 'I64': np.int64, 'I32': np.int32,
        'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32,
        'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
    }.items()
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PROCESS = secrets.token_hex(2)  # tells processes of one number apart


# Drafts beside their place.


def _draft_prefix(place: pathlib.Path) -> str:
  host = zlib.crc32(platform.node().encode())
  return f'.{place.name}.{host:08x}-'


def _draft(place: pathlib.Path) -> pathlib.Path:
  name = f'{_draft_prefix(place)}{os.getpid()}-{_PROCESS}{secrets.token_hex(2)}'
  return place.with_name(name)


def _is_running(pid: int, token: str) -> bool:
  if pid == os.getpid():  # in a container, often that of an earlier run
    return token.startswith(_PROCESS)
  if os.name != 'posix':
    return True  # elsewhere the call below is no mere question
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass
  return True


def sweep(place: StrPath) -> None:
  """Removes the drafts of a file or folder whose processes are gone.

  Args:
    place: the file or folder; drafts of other machines are left alone.
  """
  place = pathlib.Path(place)
  _sweep(place.parent, glob.escape(_draft_prefix(place)))


def sweep_folder(folder: StrPath) -> None:
  """Removes the drafts of all files and folders in a folder; see `sweep`."""
  _sweep(pathlib.Path(folder), f'.*{_draft_prefix(pathlib.Path())[1:]}')


def _sweep(folder: pathlib.Path, prefix: str) -> None:
  """Removes drafts whose names begin with a pattern, of processes that ended."""
  for path in folder.glob(f'{prefix}*-' + '[0-9a-f]' * 8):
    pid, token = path.name.split('-')[-2:]
    if not pid.isdecimal() or _is_running(int(pid), token):
      continue
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def remove_folder(folder: StrPath) -> None:
  """Removes a folder; a process that is killed leaves all of it or a draft.

  Args:
    folder: the folder; it need not exist.
  """
  draft = _draft(pathlib.Path(folder))
  with contextlib.suppress(FileNotFoundError):
    os.replace(folder, draft)
  shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: StrPath) -> Iterator[BinaryIO]:
  """Opens a draft that becomes the file when all went well.

  Args:
    path: file to create or replace; its folder is made.

  Yields:
    The draft, open for writing.

  Raises:
    InputError: it cannot be written.
  """
  path = pathlib.Path(path)
  draft = _draft(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(draft, 'xb') as stream:
      yield stream
    os.replace(draft, path)
  except OSError as error:
    raise InputError(
        f'{path}: cannot be written ({error.strerror or error}); {_MAKE_ROOM}'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(
    folder: StrPath,
    is_complete: Callable[[pathlib.Path], bool] | None = None,
    *,
    remedy: str = _MAKE_ROOM,
) -> Iterator[pathlib.Path]:
  """Fills a draft that becomes the folder when all went well.

  Args:
    folder: must not exist, or be empty, unless `is_complete` is given.
    is_complete: of a folder that several processes may build at once: whether
      what is in its place will do. The first complete one stays, an incomplete
      one is replaced.
    remedy: ends the message where it cannot be written.

  Yields:
    The draft; its parent is scratch space on the same disk.

  Raises:
    InputError: the place is taken, or cannot be written.
  """
  folder = pathlib.Path(folder).absolute()
  taken = folder.exists() and not (
      folder.is_dir() and not any(folder.iterdir())
  )
  if taken and is_complete is None:
    raise InputError(
        f'{folder}: exists already and is not an empty folder; remove it or'
        ' give another place'
    )
  sweep(folder)
  work = _draft(folder)
  try:
    (work / 'new').mkdir(parents=True)
    yield work / 'new'
    _put(work / 'new', folder, is_complete)
  except OSError as error:
    raise InputError(
        f'{folder}: cannot be written ({error.strerror or error}); {remedy}'
    ) from error
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _put(
    new: pathlib.Path,
    folder: pathlib.Path,
    is_complete: Callable[[pathlib.Path], bool] | None,
) -> None:
  """Renames a finished folder into its place; whoever came first wins."""
  for last in (False, True):
    try:
      os.replace(new, folder)
      return
    except OSError:
      if is_complete is not None and is_complete(folder):
        return
      if last or is_complete is None or not folder.exists():
        raise
    # What is in the way lacks files, since nothing half made gets here.
    with contextlib.suppress(FileNotFoundError):  # another took it away first
      os.replace(folder, new.with_name('old'))


def write_bytes(path: StrPath, blob: bytes) -> None:
  """Writes a file; see `new_file`."""
  with new_file(path) as stream:
    stream.write(blob)


def write_text(path: StrPath, text: str) -> None:
  """Writes a text as UTF-8; see `new_file`."""
  # A path that is no UTF-8 holds surrogates; no run shall end on one.
  write_bytes(path, text.encode('utf-8', 'replace'))


def json_number(value: Any) -> float | None:
  """A number that JSON can hold: None stands for one that is not finite."""
  return float(value) if math.isfinite(value) else None


def write_json(path: StrPath, value: Any) -> None:
  """Writes one JSON document; NaN and infinity are a ValueError."""
  text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
  write_text(path, text + '\n')


def write_jsonl(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes one JSON object a line; NaN and infinity are a ValueError."""
  dump = lambda row: json.dumps(row, ensure_ascii=False, allow_nan=False)
  write_text(path, ''.join(dump(row) + '\n' for row in rows))


# Files from outside.


def file_size(path: StrPath) -> int:
  """The bytes of a file.

  Raises:
    OSError: there is none, or it is a folder, a pipe or a device.
  """
  found = os.stat(path)
  if stat.S_ISDIR(found.st_mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
  if not stat.S_ISREG(found.st_mode):
    # It may never end, or wait for a writer for ever.
    raise OSError(errno.EINVAL, 'a pipe or a device, not a file', path)
  return found.st_size


def read_bytes(path: StrPath, most: int = MOST_BYTES) -> bytes:
  """Reads a file into memory.

  Args:
    path: the file.
    most: bytes that it may have.

  Raises:
    OSError: it cannot be read, is larger, or is a pipe or a device.
  """
  size = file_size(path)
  if size > most:
    text = f'{size} bytes, more than the {most} that such a file may have'
    raise OSError(errno.EFBIG, text, path)
  return pathlib.Path(path).read_bytes()


def file_crc32(path: StrPath) -> int:
  """CRC-32 of a file, which takes a second a GiB."""
  crc, piece = 0, memoryview(bytearray(1 << 22))
  with open(path, 'rb', buffering=0) as file:
    while size := file.readinto(piece):
      crc = zlib.crc32(piece[:size], crc)
  return crc


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
  """Parses JSON from outside.

  Args:
    text: one document; bytes are UTF-8, with or without a byte order mark.
    finite: refuse NaN and infinite numbers, which Python reads and JSON lacks.

  Returns:
    The value; unpaired surrogates, which no tokenizer accepts, are U+FFFD.

  Raises:
    ValueError: it is no JSON, has a key twice in an object, is nested more than
      100 deep, has more than 8 million values, or numbers that are not finite.
  """
  if isinstance(text, bytes):
    text = text.decode('utf-8-sig')
  # Each value takes some 60 bytes, whatever its size in the file.
  if text.count(',') + text.count('[') + text.count('{') > _MOST_VALUES:
    raise ValueError(f'it has more than {_MOST_VALUES} values')
  if '\\u' in text:
    text = _SURROGATE.sub(lambda m: r'\ufffd' if m[1] else m[0], text)
  too_deep = f'it is nested more than {_MOST_NESTED} deep'
  try:
    value = json.loads(text, object_pairs_hook=_object)
  except RecursionError:
    raise ValueError(too_deep) from None
  nodes = [value]
  for _ in range(_MOST_NESTED + 1):
    if finite and any(isinstance(x, float) and x - x != 0 for x in nodes):
      raise ValueError('it has a number that is not finite')
    nodes = [node for node in nodes if isinstance(node, dict | list)]
    if not nodes:
      return value
    children = (n.values() if isinstance(n, dict) else n for n in nodes)
    nodes = list(itertools.chain.from_iterable(children))
  raise ValueError(too_deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    for key, _ in pairs:
      if key in seen:
        raise ValueError(f'the key {key!r} stands twice in an object')
      seen.add(key)
  return found


def read_json(
    path: StrPath,
    kind: type = dict,
    *,
    remedy: str = 'fetch it again',
    finite: bool = False,
) -> Any:
  """Reads a JSON file from outside; see `parse_json`.

  Args:
    path: the file, of 64 MiB at most.
    kind: what it must hold, dict or list.
    remedy: ends every error message.
    finite: see `parse_json`.

  Raises:
    InputError: it cannot be read, is too large, or no such JSON.
  """
  try:
    value = parse_json(read_bytes(path), finite=finite)
  except OSError as error:
    raise InputError(
        f'{path}: cannot be read ({error.strerror or error}); {remedy}'
    ) from error
  except ValueError as error:
    raise InputError(
        f'{path}: is not valid JSON ({error}); {remedy}'
    ) from error
  if not isinstance(value, kind):
    raise InputError(
        f'{path}: holds {_JSON_NAMES.get(type(value), repr(value)[:40])} where'
        f' {_JSON_NAMES[kind]} is needed; {remedy}'
    )
  return value


# Tensors.


def tensor_bytes(array: np.ndarray) -> memoryview:
  """The bytes of a tensor as they lie in a file."""
  # The view also serves dtypes that numpy cannot hand out as a buffer.
  return np.asarray(array, order='C').reshape(-1).view(np.uint8).data


def stream_tensors(
    stream: BinaryIO,
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, one tensor in memory at a time.

  Args:
    stream: where to.
    kinds: tensor name -> (dtype code, shape).
    read: returns a tensor by its name.
    metadata: strings for the header.
  """
  # Torch cannot view a float32 tensor that starts at an odd bfloat16.
  order = sorted(kinds, key=lambda n: (-DTYPES[kinds[n][0]].itemsize, n))
  entries: dict[str, Any] = {}
  if metadata:
    entries['__metadata__'] = dict(sorted(metadata.items()))
  start = 0
  for name in order:
    code, shape = kinds[name]
    stop = start + math.prod(shape) * DTYPES[code].itemsize
    entries[name] = {
        'dtype': code, 'shape': list(shape), 'data_offsets': [start, stop],
    }  # fmt: skip
    start = stop
  raw = json.dumps(entries, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % 8)
  stream.write(len(raw).to_bytes(8, 'little') + raw)
  for name in order:
    stream.write(tensor_bytes(read(name)))


class TensorEntry(NamedTuple):
  """Where a tensor lies in a safetensors file.

  Attributes:
    code: its dtype code, of `DTYPES` or another.
    shape: its shape.
    start: bytes before it in the file.
    size: its bytes.
  """

  code: str
  shape: tuple[int, ...]
  start: int
  size: int


def read_header(
    path: StrPath, remedy: str = 'fetch it again'
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
  """Reads and checks the header of a safetensors file, and no tensor.

  Args:
    path: the file.
    remedy: ends every error message.

  Returns:
    (its free strings, name -> entry, in the order of the file); the tensors
    follow each other and end with the file.

  Raises:
    InputError: it is missing, cut short, damaged or no safetensors file.
  """
  try:
    size = file_size(path)
    with open(path, 'rb') as stream:
      length = int.from_bytes(stream.read(8), 'little')
      if size < 8 or length > min(size - 8, MOST_BYTES):
        raise ValueError(f'its header has {length} bytes, the file {size}')
      header = parse_json(stream.read(length))
    return _entries(header, 8 + length, size)
  except FileNotFoundError as error:
    raise InputError(f'{path}: there is no such file; {remedy}') from error
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(
        f'{path}: is cut short or damaged, or no safetensors file ({reason});'
        f' {remedy}'
    ) from error


def _entries(
    header: Any, start: int, size: int
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
  """Checks a parsed header; raises ValueError."""
  metadata = header.pop('__metadata__', {}) if type(header) is dict else None
  if type(metadata) is not dict or not all(
      type(x) is str for x in metadata.values()
  ):
    raise ValueError('its header is no table of tensors and texts')
  entries = {}
  for name, raw in header.items():
    try:
      code, shape = raw['dtype'], raw['shape']
      first, last = raw['data_offsets']
      whole = all(type(x) is int and x >= 0 for x in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
      whole = False
    if not whole or type(code) is not str or type(shape) is not list:
      raise ValueError(f'tensor {name[:80]!r} has no dtype, shape and place')
    known = DTYPES.get(code)
    if known and last - first != math.prod(shape) * known.itemsize:
      raise ValueError(f'tensor {name[:80]!r} has bytes for another shape')
    entries[name] = TensorEntry(code, tuple(shape), start + first, last - first)
  # Tensors without elements share their place with the next one.
  entries = dict(sorted(entries.items(), key=lambda x: (x[1].start, x[1].size)))
  for entry in entries.values():
    if entry.start != start or entry.size < 0:
      raise ValueError('its tensors overlap or leave gaps')
    start += entry.size
  if start != size:
    raise ValueError(f'its tensors end at byte {start}, the file at {size}')
  return metadata, entries


def read_tensor(path: StrPath, entry: TensorEntry) -> np.ndarray:
  """Reads one tensor, of a dtype of `DTYPES`, into memory of its own.

  Raises:
    OSError: the file ends before the tensor does, or cannot be read.
  """
  raw = np.empty(entry.size, np.uint8)
  with open(path, 'rb') as stream:
    stream.seek(entry.start)
    if stream.readinto(raw.data) != entry.size:
      raise OSError(errno.EIO, 'it became shorter while it was read', path)
  return raw.view(DTYPES[entry.code]).reshape(entry.shape)


def view_tensor(path: StrPath, entry: TensorEntry) -> np.ndarray:
  """Maps one tensor, of a dtype of `DTYPES`, without reading it.

  Raises:
    OSError: the file ends before the tensor does, or cannot be read.
  """
  if not entry.size:
    return read_tensor(path, entry)
  try:
    raw = np.memmap(path, np.uint8, 'r', entry.start, (entry.size,))
  except ValueError as error:
    raise OSError(errno.EIO, 'it ends before the tensor does', path) from error
  return raw.view(DTYPES[entry.code]).reshape(entry.shape)


def _header_sum(
    metadata: Mapping[str, str],
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
) -> str:
  """CRC-32 of all that a header says, but for itself and for offsets."""
  said = {k: v for k, v in metadata.items() if k != _HEADER_SUM}
  text = json.dumps([said, kinds], sort_keys=True)
  return str(zlib.crc32(text.encode()))


def write_tensors(
    path: StrPath,
    tensors: Mapping[str, np.ndarray],
    *,
    kind: str,
    record: Mapping[str, Any],
) -> None:
  """Writes tensors with what is needed to trust them.

  Args:
    path: file to create or replace; its folder is made.
    tensors: name -> array.
    kind: what the file is, checked as it is read.
    record: JSON for the header.

  Raises:
    InputError: the file cannot be written.
  """
  arrays = {name: np.asarray(one, order='C') for name, one in tensors.items()}
  kinds = {name: (_CODES[one.dtype], one.shape) for name, one in arrays.items()}
  sums = {name: zlib.crc32(tensor_bytes(one)) for name, one in arrays.items()}
  metadata = {
      'format': kind,
      'jaxedit': json.dumps(record, sort_keys=True),
      'crc32': json.dumps(sums, sort_keys=True),
  }
  metadata[_HEADER_SUM] = _header_sum(metadata, kinds)
  with new_file(path) as stream:
    stream_tensors(stream, kinds, arrays.__getitem__, metadata)


def read_tensors(
    path: StrPath,
    kind: str | tuple[str, ...],
    remedy: str,
    names: Iterable[str] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads tensors and checks their checksums, and that of the header.

  Args:
    path: file that `write_tensors` made. Files of earlier versions have no
      checksum of the header; they are read as well.
    kind: what it must be, or several of which it must be one.
    remedy: ends every error message.
    names: tensors to read; None reads all, () the record alone.

  Returns:
    (name -> array, the record).

  Raises:
    InputError: it is missing, cut short or of another kind, or a tensor is
      missing or altered.
  """
  metadata, entries = read_header(path, remedy)
  record, sums = _parse_header(metadata, entries, path, kind, remedy)
  tensors = {}
  for name in sorted(entries.keys() | sums) if names is None else names:
    array = None
    if name in entries and entries[name].code in DTYPES:
      try:
        array = read_tensor(path, entries[name])
      except (OSError, MemoryError) as error:
        raise InputError(
            f'{path}: {name} cannot be read ({error}); {remedy}'
        ) from error
    if array is None or zlib.crc32(tensor_bytes(array)) != sums.get(name):
      raise InputError(f'{path}: {name} is missing or damaged; {remedy}')
    tensors[name] = array
  return tensors, record


def take(
    record: Mapping[str, Any],
    kinds: Mapping[str, type],
    path: StrPath,
    remedy: str,
) -> list[Any]:
  """Takes fields out of the record of a file.

  Args:
    record: of `read_tensors`.
    kinds: name -> type that its value must have.
    path: the file.
    remedy: ends the message.

  Returns:
    The values, in the order of `kinds`.

  Raises:
    InputError: a field is missing or of another type.
  """
  for name, kind in kinds.items():
    if type(record.get(name)) is not kind:
      raise InputError(
          f'{path}: is damaged, its record has {str(record.get(name))[:40]!r} as'
          f' {name!r}; {remedy}'
      )
  return [record[name] for name in kinds]


def _parse_header(
    header: Mapping[str, str],
    entries: Mapping[str, TensorEntry],
    path: StrPath,
    kind: str | tuple[str, ...],
    remedy: str,
) -> tuple[dict[str, Any], dict[str, int]]:
  """Returns the record and the checksums of a header."""
  known = (kind,) if isinstance(kind, str) else kind
  # Moments of earlier versions say 'kind' and 'record', which holds the sums.
  if header.get('format', header.get('kind')) not in known:
    raise InputError(f'{path}: is not a file of {known[0]!r}; {remedy}')
  kinds = {name: (entry.code, entry.shape) for name, entry in entries.items()}
  try:
    # What is neither of now nor of earlier is of now, with a damaged key.
    if header.keys() not in _EARLIER and (
        header.get(_HEADER_SUM) != _header_sum(header, kinds)
    ):
      raise ValueError('its checksum is another')
    record = parse_json(header.get('jaxedit') or header['record'])
    sums = parse_json(header['crc32']) if 'crc32' in header else record['crc32']
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(
        f'{path}: is damaged, its header cannot be read ({error}); {remedy}'
    ) from error
  if not isinstance(record, dict) or not isinstance(sums, dict):
    raise InputError(f'{path}: is damaged, its header is no record; {remedy}')
  return record, sums
