"""The objects of a file, one by one, and what keeps one from being read."""

from __future__ import annotations

import dataclasses
import gzip
import io as io_lib
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxedit import io
from jaxedit.text import locate
from jaxedit.types import InputError

IDS = dict.fromkeys(('id', 'case_id', 'known_id')).keys()
DEMO, DEMO_PASSAGES = 'demo', 'demo_passages'
_MOST_UNPACKED = 1 << 28
# The first line of one object over several lines.
_OPEN = re.compile(r'\s*\{[^\n]*(?<=[{\[,])[ \t\r]*\n')
_MOST_BYTES = 1 << 31
_LISTED = 19  # errors listed before the one that counts them


@dataclasses.dataclass(frozen=True)
class Entry:
  """One object of the file, or what kept it from being read."""

  number: int
  data: Any
  error: str = ''

  @property
  def id(self) -> str:
    """The data set's identifier, or the number where it gives none."""
    if isinstance(self.data, dict):
      for name in IDS:
        value = self.data.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
          return locate.valid_unicode(str(value))
    return str(self.number)


def named(record: Any) -> str:
  """Returns the words that point a user to a record or a request."""
  return f'record {record.number} (id {record.id})'


def read(name: str, content: str, *, long: bool) -> bytes:
  """Reads a file.

  Args:
    name: its path, or that of a demo.
    content: what it should hold, in words.
    long: whether 'demo' are the long answers.

  Returns:
    Its bytes.

  Raises:
    InputError: it cannot be read.
  """
  if name in (DEMO, DEMO_PASSAGES):
    long = long or name == DEMO_PASSAGES
    demo = 'demo_passages.jsonl' if long else 'demo_facts.jsonl'
    return pathlib.Path(__file__).with_name(demo).read_bytes()
  try:
    return io.read_bytes(name, _MOST_BYTES)
  except FileNotFoundError as error:
    raise InputError(
        f"{name}: there is no such file; check the path, or use '{DEMO}' for"
        f' the {content} that come with the package.'
    ) from error
  except OSError as error:
    raise InputError(
        f'{name}: cannot be read ({error.strerror}); give a file of records.'
    ) from error


def entries(blob: bytes, source: str) -> Iterator[Entry]:
  """Yields the objects of a list, or of the lines, numbered from 1.

  Args:
    blob: the file, UTF-8, which may be compressed by gzip.
    source: its name, for errors.

  Raises:
    InputError: no UTF-8, or a list that is no JSON.
  """
  text = _decode(_decompressed(blob, source), source)
  if text.lstrip()[:1] == '[' or _OPEN.match(text):
    try:
      values = io.parse_json(text)
    except ValueError as error:
      line = getattr(error, 'lineno', 1)
      raise InputError(
          f'{source}: not JSON at line {line} ({error}); correct it there, or'
          ' write one object a line.'
      ) from error
    values = values if isinstance(values, list) else [values]
    yield from (Entry(i, value) for i, value in enumerate(values, 1))
    return
  number = 0
  # Not splitlines: JSON texts may hold U+2028 and its like as they are.
  for line, piece in enumerate(text.split('\n'), 1):
    if not piece.strip():
      continue
    number += 1
    try:
      yield Entry(number, io.parse_json(piece))
    except ValueError as error:
      reason = getattr(error, 'msg', error)
      yield Entry(
          number,
          None,
          f'not JSON at line {line} ({reason}); write one object a line, or'
          ' one list of objects.',
      )


def shorten(errors: Sequence[str], source: str) -> list[str]:
  """Leaves out all errors but the first, and says how many there are."""
  if len(errors) <= _LISTED + 1:
    return list(errors)
  return [
      *errors[:_LISTED],
      f'{source}: {len(errors)} errors in all, the first {_LISTED} are listed;'
      ' correct the file, or skip bad records.',
  ]


def _decompressed(blob: bytes, source: str) -> bytes:
  """Unpacks a gzip file; other bytes stay as they are."""
  if blob[:2] != b'\x1f\x8b':
    return blob
  try:
    with gzip.GzipFile(fileobj=io_lib.BytesIO(blob)) as packed:
      found = packed.read(_MOST_UNPACKED + 1)
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(
        f'{source}: is a damaged gzip file ({error}); pack it again or give the'
        ' plain file.'
    ) from error
  if len(found) > _MOST_UNPACKED:
    raise InputError(
        f'{source}: unpacks to more than {_MOST_UNPACKED} bytes; give a part of'
        ' it.'
    )
  return found


def _decode(blob: bytes, source: str) -> str:
  try:
    return blob.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = blob.count(b'\n', 0, error.start) + 1
    raise InputError(
        f'{source}: line {line} is not UTF-8; save the file as UTF-8.'
    ) from error
