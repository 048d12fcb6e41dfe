"""Reads a file of JSON objects into edit requests, with all of its errors.

A file holds one JSON object a line, or one JSON list of objects (UTF-8). The
first object with fields of a known format tells the format.

Requests of one edit, a case, stand one after another in the file and are taken or
left as a whole: no limit and no error cuts a case.

White space around targets and answers and after prompts is dropped, as a target
brings its own space; the answer of a question may begin with some. Unpaired
surrogates become U+FFFD. Two facts that edit one (subject, prompt) are an error,
whether their targets agree or not. So are a question with two answers, and one
that is asked twice with the same answer, unless in two cases: those are edited
apart, and AKEW's share facts. White space counts as one space in that
comparison, and case matters. Facts to trace may repeat.

Errors that need a tokenizer come in through `check`.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxedit import io
from jaxedit.eval.datasets.fields import (
    JSON_NAMES,
    KNOWN,
    Fields,
    Format,
    Options,
)
from jaxedit.text import locate
from jaxedit.types import REPHRASE, EditRequest, InputError, Probe

Check = Callable[[Sequence[EditRequest]], Sequence[Sequence[str]]]

DEMO, DEMO_PASSAGES = 'demo', 'demo_passages'
_LISTED = 20  # errors reported in full before only their count is
_BLOCK = 512  # cases checked together
_CONTENT = {'fact': 'facts', 'text': 'passages', 'known': 'facts'}
_NEEDS = {
    'fact': 'prompt, subject and target_new',
    'text': 'question and answer',
    'known': 'prompt, subject and attribute',
}


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record left out, and why."""

  number: int
  id: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a file held.

  Attributes:
    requests: the good ones, in the file's order.
    skipped: the bad records that were passed over.
    source: the path as given, or the name of a demo.
    sha256: of the file's bytes, in hex.
    format: the format it was read as.
  """

  requests: tuple[EditRequest, ...]
  skipped: tuple[Skipped, ...]
  source: str
  sha256: str
  format: str


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
      for name in ('id', 'case_id', 'known_id'):
        value = self.data.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
          return locate.valid_unicode(str(value))
    return str(self.number)


class _Converted(NamedTuple):
  """An entry as requests; they are good if there are no errors."""

  number: int
  id: str
  case: str = ''
  requests: Sequence[EditRequest] = ()
  errors: Sequence[str] = ()


class RequestFile:
  """A file of requests that is read and converted once, see `open_requests`.

  Attributes:
    source: the path as given, or the name of a demo.
    sha256: of the file's bytes, in hex.
    format: the format it is read as.
    kind: of its requests, where several may be read that of the first.
  """

  def __init__(
      self,
      source: str,
      formats: Sequence[Format],
      options: Options,
      *,
      format: str,  # pylint: disable=redefined-builtin
      limit: int | None,
      on_bad_record: str,
  ):
    self.source = source
    self._kinds = tuple(dict.fromkeys(one.kind for one in formats))
    self._options, self._limit = options, limit
    self._skips = on_bad_record == 'skip'
    blob = self._read()
    self.sha256 = hashlib.sha256(blob).hexdigest()
    # A copy of a tee starts anew, and reads and converts nothing twice.
    (self._entries,) = itertools.tee(_entries(_decode(blob, source), source), 1)
    told = {one.name: one for one in reversed(formats)}.get(format)
    told = self._detect(formats) if told is None else told
    self.format, self.kind = told.name, told.kind
    self._formats = [one for one in formats if one.name == self.format]
    (self._cases,) = itertools.tee(self._convert(), 1)

  def load(self, check: Check | None = None) -> Loaded:
    """Accepts good requests.

    Args:
      check: finds further errors of requests, as sentences that do not name the
        request; those that need a tokenizer. It is asked about many at once.

    Returns:
      The requests with where they came from.

    Raises:
      InputError: no good record, or with 'fail' any error; the first 20 errors
        and their number are reported.
    """
    requests, skipped, errors = [], [], []
    earlier = _Earlier(unique=KNOWN not in self._kinds)
    for case, found in self._checked(check, earlier):
      if not any(found):
        requests += [request for one in case for request in one.requests]
        continue
      for one, messages in zip(case, found, strict=True):
        reason = ' '.join(messages) or 'another record of its case is bad.'
        skipped.append(Skipped(one.number, one.id, reason))
        errors.extend(f'{named(one)}: {message}' for message in messages)
    if errors and not (self._skips and requests):
      raise InputError(*_shorten(errors, self.source))
    if not requests:
      raise InputError(self._no_records())
    return Loaded(
        tuple(requests), tuple(skipped), self.source, self.sha256, self.format
    )

  def _checked(
      self, check: Check | None, earlier: _Earlier
  ) -> Iterator[tuple[list[_Converted], list[list[str]]]]:
    """Yields the cases up to the limit with all errors of their entries."""
    cases, counted = copy.copy(self._cases), 0
    while self._limit is None or counted < self._limit:
      left = _BLOCK if self._limit is None else self._limit - counted
      block = list(itertools.islice(cases, min(left, _BLOCK)))
      if not block:
        return
      good = [
          request
          for case in block
          for one in case
          if not one.errors
          for request in one.requests
      ]
      found = iter(check(good) if check else [()] * len(good))
      for case in block:
        errors = earlier.errors(case, found)
        counted += not (self._skips and any(errors))
        yield case, errors

  def _convert(self) -> Iterator[list[_Converted]]:
    """Yields the cases: runs of entries of one case, others alone."""
    case = lambda one: one.case or one.number
    entries = map(self._converted, self._entries)
    for _, run in itertools.groupby(entries, case):
      yield list(run)

  def _converted(self, entry: Entry) -> _Converted:
    name = {'number': entry.number, 'id': entry.id}
    error = entry.error
    if not error and not isinstance(entry.data, dict):
      given = JSON_NAMES[type(entry.data)]
      error = f'the record is {given}; it must be an object.'
    if error:
      return _Converted(**name, errors=[error])
    reader = self._formats[0]
    if len(self._formats) > 1:
      reader = _told(self._formats, entry.data) or reader
    case = entry.data.get(reader.case) if reader.case else ''
    case = case.strip() if isinstance(case, str) else ''
    fields = Fields(entry.data)
    requests = []
    for parts in reader.read(fields, entry.id, self._options):
      parts = {'subject': None} | reader.finish(parts, fields.errors)
      asked, target = parts.pop('rephrases', ()), (parts['target'],)
      probes = [Probe(REPHRASE, prompt, target) for prompt in asked]
      parts['probes'] = (*probes, *parts.get('probes', ()))
      requests.append(EditRequest(**name | parts))
    return _Converted(
        **name, case=case, requests=requests, errors=fields.errors
    )

  def _detect(self, formats: Sequence[Format]) -> Format:
    """Tells the format by the first object with known fields."""
    stranger, errors, empty = None, [], True
    for entry in copy.copy(self._entries):
      empty = False
      if isinstance(entry.data, dict):
        if found := _told(formats, entry.data):
          return found
        stranger = stranger or entry
      elif entry.error:
        errors.append(f'{named(entry)}: {entry.error}')
    if empty:
      raise InputError(self._no_records())
    if stranger is None and errors:
      raise InputError(*_shorten(errors, self.source))
    fields = ', '.join(map(repr, stranger.data)) if stranger else 'no objects'
    names = dict.fromkeys(one.name for one in formats)
    needs = ', or '.join(_NEEDS[kind] for kind in self._kinds)
    raise InputError(
        f'{self.source}: no known format has these fields ({fields}); known'
        f' formats are {", ".join(names)}; our own needs {needs}.'
    )

  def _read(self) -> bytes:
    name = self.source
    if name in (DEMO, DEMO_PASSAGES):
      long = name == DEMO_PASSAGES or self._kinds == ('text',)
      demo = 'demo_passages.jsonl' if long else 'demo_facts.jsonl'
      return pathlib.Path(__file__).with_name(demo).read_bytes()
    try:
      return pathlib.Path(name).read_bytes()
    except FileNotFoundError as error:
      raise InputError(
          f"{name}: there is no such file; check the path, or use '{DEMO}' for"
          f' the {self._content()} that come with the package.'
      ) from error
    except OSError as error:
      raise InputError(
          f'{name}: cannot be read ({error.strerror}); give a file of records.'
      ) from error

  def _no_records(self) -> str:
    content = self._content()
    return f'{self.source}: holds no records; give a file with {content}.'

  def _content(self) -> str:
    return ' or '.join(_CONTENT[kind] for kind in self._kinds)


class _Earlier:
  """The edits and cases that came before."""

  def __init__(self, unique: bool):
    self._unique = unique
    self._cases: dict[str, _Converted] = {}
    self._edits: dict[tuple[str, str], list[EditRequest]] = {}

  def errors(
      self, case: Sequence[_Converted], found: Iterator[Sequence[str]]
  ) -> list[list[str]]:
    """Lists the errors of a case's entries, and remembers it if it has none.

    Args:
      case: its entries.
      found: what the check said of each request of entries without errors.
    """
    own: dict[tuple[str, str], list[EditRequest]] = {}
    errors, cases = [], {}
    for one in case:
      # A case that returns is reported even if its first part was bad.
      names = (one.case, *(request.case for request in one.requests))
      cases |= {name: one for name in names if name}
      messages = list(one.errors)
      if not messages:
        messages += self._broken_case(one.requests[0].case)
        for i, request in enumerate(one.requests, 1):
          more, key = list(next(found)), _key(request)
          if self._unique:
            same = [*self._edits.get(key, ()), *own.get(key, ())]
            more += _repeated(request, same)
          title = f'rewrite {i}: ' if len(one.requests) > 1 else ''
          messages += [title + message for message in more]
          own.setdefault(key, []).append(request)
      errors.append(messages)
    self._cases |= cases
    if not any(errors):
      for key, requests in own.items():
        self._edits.setdefault(key, []).extend(requests)
    return errors

  def _broken_case(self, case: str) -> list[str]:
    earlier = self._cases.get(case)
    if earlier is None:
      return []
    return [
        f'its case {case!r} is that of {named(earlier)} too; give it another,'
        ' or let the records of a case stand together.'
    ]


def named(record: Any) -> str:
  """Returns the words that point a user to a record or a request."""
  return f'record {record.number} (id {record.id})'


def unknown(name: str, value: Any, known: Sequence[str]) -> list[str]:
  """Returns the error of an option that is none of the known values."""
  if value in known:
    return []
  return [f'{name} {value!r} is unknown; use one of {", ".join(known)}.']


def first_errors(*checks: Check) -> Check:
  """Joins checks; a request is reported by the first that finds something."""

  def check(requests: Sequence[EditRequest]) -> list[Sequence[str]]:
    errors: list[Sequence[str]] = [()] * len(requests)
    for one in checks:
      left = [i for i, found in enumerate(errors) if not found]
      for i, found in zip(left, one([requests[i] for i in left])):
        errors[i] = found
    return errors

  return check


def _key(request: EditRequest) -> tuple[str, str]:
  squeeze = lambda text: ' '.join(text.split())
  return squeeze(request.subject or ''), squeeze(request.prompt)


def _repeated(
    request: EditRequest, earlier: Sequence[EditRequest]
) -> list[str]:
  """Says what is wrong with an edit of what was edited before."""
  for one in earlier:
    if request.target.split() == one.target.split():
      if request.case == one.case:
        return [f'it makes the same edit as {named(one)}; drop one of them.']
    elif request.subject is None:
      return [
          f'it answers the question of {named(one)} in another way; keep one.'
      ]
    else:
      return [
          f'it writes {request.target!r} where {named(one)} writes'
          f' {one.target!r} for the same subject and prompt; keep one.'
      ]
  return []


def _told(formats: Sequence[Format], data: dict[str, Any]) -> Format | None:
  """Finds the format of an object by its fields."""
  found = [f for f in formats if any(sign in data for sign in f.signs)]
  certain = (one for one in found if one.tells(data))
  return next(certain, found[0] if found else None)


def _shorten(errors: Sequence[str], source: str) -> list[str]:
  if len(errors) <= _LISTED:
    return list(errors)
  return [
      *errors[:_LISTED],
      f'{source}: {len(errors)} errors in all, the first {_LISTED} are listed;'
      ' correct the file, or skip bad records.',
  ]


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
          f'{source}: not JSON at line {line} ({error}); correct the list there.'
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
