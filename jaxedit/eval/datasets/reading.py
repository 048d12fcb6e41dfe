"""Reads a file of JSON objects into edit requests, with all of its errors.

A file holds one JSON object a line, or one JSON list of objects (UTF-8). The
first object with fields of a known format tells the format.

Requests of one edit, a case, stand one after another in the file and are taken
or left as a whole: no limit and no error cuts a case.

White space around targets and answers and after prompts is dropped, as a target
brings its own space; the answer of a question may begin with some. Unpaired
surrogates become U+FFFD. Two facts that edit one (subject, prompt) are an
error, whether their targets agree or not, unless they stand in different batches
of a sequence (`batch_size`), of which the last wins. So are a question with two answers, and one
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxedit.eval.datasets import entries, foreign
from jaxedit.eval.datasets.earlier import Converted, Earlier
from jaxedit.eval.datasets.entries import named, shorten
from jaxedit.eval.datasets.fields import (
    JSON_NAMES,
    KNOWN,
    TEXT,
    Fields,
    Format,
    Options,
)
from jaxedit.types import REPHRASE, EditRequest, InputError, Probe

Check = Callable[[Sequence[EditRequest]], Sequence[Sequence[str]]]

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
    unread: fields of its records that were not looked at.
  """

  requests: tuple[EditRequest, ...]
  skipped: tuple[Skipped, ...]
  source: str
  sha256: str
  format: str
  unread: tuple[str, ...] = ()


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
      batch_size: int | None = None,
  ):
    self.source = source
    self._kinds = tuple(dict.fromkeys(one.kind for one in formats))
    self._options, self._limit, self._batch = options, limit, batch_size
    self._skips = on_bad_record == 'skip'
    long = self._kinds == (TEXT,)
    blob = entries.read(source, self._content(), long=long)
    self.sha256 = hashlib.sha256(blob).hexdigest()
    # A copy of a tee starts anew, and reads and converts nothing twice.
    (self._entries,) = itertools.tee(entries.entries(blob, source), 1)
    found = {one.name: one for one in reversed(formats)}.get(format)
    found = self._detect(formats) if found is None else found
    self.format, self.kind = found.name, found.kind
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
      InputError: no good record, or with 'fail' any error; the first 19 errors
        and their number are reported.
    """
    requests, skipped, errors, unread = [], [], [], set()
    earlier = Earlier(KNOWN not in self._kinds, self._batch)
    for case, found in self._checked(check, earlier):
      if not any(found):
        requests += [request for one in case for request in one.requests]
        unread.update(name for one in case for name in one.unread)
        continue
      for one, messages in zip(case, found, strict=True):
        reason = ' '.join(messages) or 'another record of its case is bad.'
        skipped.append(Skipped(one.number, one.id, reason))
        errors.extend(f'{named(one)}: {message}' for message in messages)
    if errors and not (self._skips and requests):
      raise InputError(*shorten(errors, self.source))
    if not requests:
      raise InputError(self._no_records())
    return Loaded(
        tuple(requests),
        tuple(skipped),
        self.source,
        self.sha256,
        self.format,
        tuple(sorted(unread)),
    )

  def _checked(
      self, check: Check | None, earlier: Earlier
  ) -> Iterator[tuple[list[Converted], list[list[str]]]]:
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

  def _convert(self) -> Iterator[list[Converted]]:
    """Yields the cases: runs of entries of one case, others alone."""
    case = lambda one: one.case or one.number
    converted = map(self._converted, self._entries)
    for _, run in itertools.groupby(converted, case):
      yield list(run)

  def _converted(self, entry: entries.Entry) -> Converted:
    name = {'number': entry.number, 'id': entry.id}
    if not isinstance(entry.data, dict):
      given = JSON_NAMES[type(entry.data)]
      error = f'the record is {given}; it must be an object.'
      return Converted(**name, errors=[entry.error or error])
    reader = self._formats[0]
    if len(self._formats) > 1:
      reader = _format_of(self._formats, entry.data) or reader
    case = entry.data.get(reader.case) if reader.case else ''
    case = case.strip() if isinstance(case, str) else ''
    fields = Fields(entry.data, id=entry.id)
    requests = []
    for parts in reader.read(fields, self._options):
      parts = {'subject': None} | reader.finish(parts, fields.errors)
      asked, target = parts.pop('rephrases', ()), (parts['target'],)
      probes = [Probe(REPHRASE, prompt, target) for prompt in asked]
      parts['probes'] = (*probes, *parts.get('probes', ()))
      requests.append(EditRequest(**name | parts))
    return Converted(
        **name,
        case=case,
        requests=requests,
        errors=fields.errors,
        unread=sorted(entry.data.keys() - fields.seen - entries.IDS),
    )

  def _detect(self, formats: Sequence[Format]) -> Format:
    """Tells the format by the first object with known fields."""
    strange, errors, empty = None, [], True
    for entry in copy.copy(self._entries):
      empty = False
      if isinstance(entry.data, dict):
        if sentence := foreign.refused(entry.data):
          raise InputError(f'{self.source}: {named(entry)} {sentence}')
        if found := _format_of(formats, entry.data):
          return found
        strange = strange or entry
      elif entry.error:
        errors.append(f'{named(entry)}: {entry.error}')
    if empty:
      raise InputError(self._no_records())
    if strange is None and errors:
      raise InputError(*shorten(errors, self.source))
    fields = ', '.join(map(repr, strange.data)) if strange else 'no objects'
    for name, value in (strange.data if strange else {}).items():
      if isinstance(value, list) and value and isinstance(value[0], dict):
        fields += f'; {name!r} holds a list of objects: give that list itself'
    names = dict.fromkeys(one.name for one in formats)
    needs = ', or '.join(_NEEDS[kind] for kind in self._kinds)
    raise InputError(
        f'{self.source}: no known format has these fields ({fields}); known'
        f' formats are {", ".join(names)}; our own needs {needs}.'
    )

  def _no_records(self) -> str:
    content = self._content()
    return f'{self.source}: holds no records; give a file with {content}.'

  def _content(self) -> str:
    return ' or '.join(_CONTENT[kind] for kind in self._kinds)


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


def _format_of(
    formats: Sequence[Format], data: dict[str, Any]
) -> Format | None:
  """Finds the format of an object by its fields."""
  found = [f for f in formats if any(sign in data for sign in f.signs)]
  matching = (one for one in found if one.matches(data))
  return next(matching, found[0] if found else None)
