"""Reads files of JSON objects into records, and tells every fault of a file.

A file holds one JSON object a line, or one JSON list of objects (UTF-8). A
library of such files names the formats its objects may have; the first object
with fields of a known format tells which one it is.

Records that are one edit together, a case, stand one after another in the file
and are taken or left as a whole: no limit and no fault cuts a case.

It does not know what a record is: that is the converter's business.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from jaxedit import io
from jaxedit.eval import formats
from jaxedit.text import locate
from jaxedit.types import InputError

DEMO = 'demo'
_LISTED = 20  # faults told in full before only their count is

Item = TypeVar('Item')


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record left out, and why."""

  number: int
  id: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[Item]):
  """What a file held.

  Attributes:
    records: the good records, in the file's order.
    skipped: the bad ones that were passed over.
    source: the path as given, or 'demo'.
    sha256: of the file's bytes, in hex.
    format: the format it was read as.
  """

  records: tuple[Item, ...]
  skipped: tuple[Skipped, ...]
  source: str
  sha256: str
  format: str


@dataclasses.dataclass(frozen=True)
class Entry:
  """One object of the file, or what kept it from being read."""

  number: int
  data: Any
  fault: str = ''

  @property
  def id(self) -> str:
    """The data set's identifier, or the number where it gives none."""
    if isinstance(self.data, dict):
      for name in ('id', 'case_id', 'known_id'):
        value = self.data.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
          return locate.valid_unicode(str(value))
    return str(self.number)


class Library(NamedTuple):
  """What files of one kind hold.

  Attributes:
    content: what a user calls the records, e.g. 'facts'.
    demo: the file that comes with the package.
    signs: format -> fields of which one is enough to tell it; formats are
      tried in this order.
    needs: what a record of our own format must have, in words.
  """

  content: str
  demo: str
  signs: Mapping[str, frozenset[str]]
  needs: str


class Converter(Protocol):
  """Makes records of entries and remembers what came before."""

  def case(self, entry: Entry) -> str:
    """Returns the name of the case that an entry belongs to, '' for none."""

  def __call__(
      self, entries: Sequence[Entry]
  ) -> tuple[Sequence[Any], list[list[str]]]:
    """Converts the entries of a case, all of them objects.

    Args:
      entries: those of one case; a single one without a case.

    Returns:
      The records, and the faults of each entry; the records are good if no
      entry has any.
    """


def load(
    path_or_name: str | os.PathLike[str],
    library: Library,
    converter: Callable[[str], Converter],
    *,
    format: str = 'auto',  # pylint: disable=redefined-builtin
    limit: int | None = None,
    on_bad_record: str = 'fail',
    problems: Sequence[str] = (),
) -> Loaded[Any]:
  """Loads and validates the records of a file.

  Args:
    path_or_name: a file, or 'demo' for the one that comes with the package.
    library: what such files hold.
    converter: makes the converter for a format.
    format: one of the library's formats, or 'auto' to tell by the fields.
    limit: most cases to return, where a record without a case counts as one;
      all by default. With 'fail' only so many are looked at, with 'skip' so
      many good ones are found if the file has them.
    on_bad_record: 'fail' raises, 'skip' passes over cases with bad records.
    problems: sentences about the caller's own options, raised with the others.

  Returns:
    The records with where they came from.

  Raises:
    InputError: an unreadable file, an unknown option, no good record, or with
      'fail' any fault; the first 20 faults and their number are told.
  """
  _check_options(library, format, limit, on_bad_record, problems)
  source = os.fspath(path_or_name)
  blob = _read(source, library)
  text = _decode(blob, source)
  kind = _detect(text, source, library) if format == 'auto' else format
  convert = converter(kind)
  cases = _cases(_entries(text, source), convert.case)
  records, skipped, faults = _collect(cases, convert, limit, on_bad_record)
  if faults and (on_bad_record == 'fail' or not records):
    raise InputError(*_shorten(faults, source))
  if not records:
    raise InputError(_no_records(source, library))
  digest = hashlib.sha256(blob).hexdigest()
  return Loaded(tuple(records), tuple(skipped), source, digest, kind)


def unknown(name: str, value: Any, known: Sequence[str]) -> list[str]:
  """Returns the sentence on an option that is none of the known values."""
  if value in known:
    return []
  return [f'{name} {value!r} is unknown; use one of {", ".join(known)}.']


def named(record: Any) -> str:
  """Returns the words that point a user to a record or an entry."""
  return f'record {record.number} (id {record.id})'


def squeeze(text: str) -> str:
  """Makes each run of white space one space, to compare texts."""
  return ' '.join(text.split())


def _check_options(
    library: Library,
    kind: str,
    limit: int | None,
    on_bad_record: str,
    problems: Sequence[str],
) -> None:
  found = unknown('format', kind, ('auto', *library.signs))
  found += unknown('on_bad_record', on_bad_record, ('fail', 'skip'))
  found += problems
  if limit is not None and limit < 1:
    found.append(f'limit {limit} leaves no record; give 1 or more.')
  if found:
    raise InputError(*found)


def _no_records(source: str, library: Library) -> str:
  return f'{source}: holds no records; give a file with {library.content}.'


def _shorten(faults: Sequence[str], source: str) -> list[str]:
  if len(faults) <= _LISTED:
    return list(faults)
  return [
      *faults[:_LISTED],
      f'{source}: {len(faults)} faults in all, the first {_LISTED} are listed;'
      ' mend the file, or skip bad records.',
  ]


def _read(source: str, library: Library) -> bytes:
  if source == DEMO:
    package = importlib.resources.files('jaxedit.eval')
    return package.joinpath(library.demo).read_bytes()
  try:
    return pathlib.Path(source).read_bytes()
  except FileNotFoundError as error:
    raise InputError(
        f"{source}: there is no such file; check the path, or use '{DEMO}' for"
        f' the {library.content} that come with the package.'
    ) from error
  except OSError as error:
    raise InputError(
        f'{source}: cannot be read ({error.strerror}); give a file of records.'
    ) from error


def _decode(blob: bytes, source: str) -> str:
  try:
    return blob.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = blob.count(b'\n', 0, error.start) + 1
    raise InputError(
        f'{source}: line {line} is not UTF-8; save the file as UTF-8.'
    ) from error


def _entries(text: str, source: str) -> Iterator[Entry]:
  """Yields the objects of a list, or of the lines, numbered from 1."""
  if text.lstrip()[:1] == '[':
    try:
      values = io.parse_json(text)
    except ValueError as error:
      line = getattr(error, 'lineno', 1)
      raise InputError(
          f'{source}: not JSON at line {line} ({error}); mend the list there.'
      ) from error
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


def _cases(
    entries: Iterator[Entry], case: Callable[[Entry], str]
) -> Iterator[list[Entry]]:
  """Yields runs of entries of one case; entries without a case stand alone."""

  def key(entry: Entry) -> str | int:
    whole = isinstance(entry.data, dict)
    return (whole and case(entry)) or entry.number

  for _, run in itertools.groupby(entries, key):
    yield list(run)


def _collect(
    cases: Iterator[list[Entry]],
    convert: Converter,
    limit: int | None,
    on_bad_record: str,
) -> tuple[list[Any], list[Skipped], list[str]]:
  """Returns the good records, the bad ones and all faults, up to the limit."""
  records, skipped, faults, good = [], [], [], 0
  for seen, entries in enumerate(cases):
    counted = seen if on_bad_record == 'fail' else good
    if limit is not None and counted >= limit:
      break
    made, found = _convert(convert, entries)
    if not any(found):
      records.extend(made)
      good += 1
      continue
    for entry, told in zip(entries, found, strict=True):
      reason = ' '.join(told) or 'another record of its case is bad.'
      skipped.append(Skipped(entry.number, entry.id, reason))
      faults.extend(f'{named(entry)}: {fault}' for fault in told)
  return records, skipped, faults


def _convert(
    convert: Converter, entries: Sequence[Entry]
) -> tuple[Sequence[Any], list[list[str]]]:
  """Converts a case; what is no object never reaches the converter."""
  first = entries[0]
  if first.fault:
    return (), [[first.fault]]
  if not isinstance(first.data, dict):
    given = formats.JSON_NAMES[type(first.data)]
    return (), [[f'the record is {given}; it must be an object.']]
  return convert(entries)


def _detect(text: str, source: str, library: Library) -> str:
  """Tells the format by the first object with known fields."""
  stranger, faults, empty = None, [], True
  for entry in _entries(text, source):
    empty = False
    if isinstance(entry.data, dict):
      for kind, signs in library.signs.items():
        if signs & entry.data.keys():
          return kind
      stranger = stranger or entry
    elif entry.fault:
      faults.append(f'{named(entry)}: {entry.fault}')
  if empty:
    raise InputError(_no_records(source, library))
  if stranger is None and faults:
    raise InputError(*_shorten(faults, source))
  fields = ', '.join(map(repr, stranger.data)) if stranger else 'no objects'
  raise InputError(
      f'{source}: no known format has these fields ({fields}); known formats'
      f' are {", ".join(library.signs)}; our own needs {library.needs}.'
  )
