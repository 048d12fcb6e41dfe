"""What came before in a file: edits that must not repeat, cases that ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxedit.eval.datasets.entries import named
from jaxedit.text.cloze import plain_form
from jaxedit.types import EditRequest

Key = tuple[str, str]


class Converted(NamedTuple):
  """An entry as requests; they are good if there are no errors."""

  number: int
  id: str
  case: str = ''
  requests: Sequence[EditRequest] = ()
  errors: Sequence[str] = ()
  unread: Sequence[str] = ()  # fields that no reader looks at


class Earlier:
  """The edits and cases that came before."""

  def __init__(self, unique: bool, batch: int | None = None):
    """Begins a file.

    Args:
      unique: whether nothing may be edited twice.
      batch: cases a batch of a sequence, in a later one of which a fact may be
        edited again; None for one batch.
    """
    self._unique, self._batch, self._count = unique, batch, 0
    self._cases: dict[str, Converted] = {}
    self._edits: dict[Key, list[EditRequest]] = {}  # of the batch

  def errors(
      self, case: Sequence[Converted], found: Iterator[Sequence[str]]
  ) -> list[list[str]]:
    """Lists the errors of a case's entries, and remembers it if it has none.

    Args:
      case: its entries.
      found: what the check said of each request of entries without errors.
    """
    if self._batch and self._count % self._batch == 0:
      self._edits = {}  # a batch begins
    own: dict[Key, list[EditRequest]] = {}
    errors, cases = [], {}
    for one in case:
      # A case that returns is reported even if its first part was bad.
      names = (one.case, *(request.case for request in one.requests))
      cases |= {name: one for name in names if name}
      messages = list(one.errors)
      if not messages:
        messages += self._broken_case(one.requests[0].case)
        for i, request in enumerate(one.requests, 1):
          more, key = list(next(found)), edit_key(request)
          if self._unique:
            same = [*self._edits.get(key, ()), *own.get(key, ())]
            more += _repeated(request, same, bool(self._batch))
          title = f'rewrite {i}: ' if len(one.requests) > 1 else ''
          messages += [title + message for message in more]
          own.setdefault(key, []).append(request)
      errors.append(messages)
    self._cases |= cases
    if not any(errors):
      self._count += 1
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


def edit_key(request: EditRequest) -> Key:
  """What a request edits: its subject and prompt, however they are written."""
  return _squeeze(request.subject or ''), _squeeze(request.prompt)


def _squeeze(text: str) -> str:
  """What texts have in common that differ in nothing but how they look."""
  return ' '.join(plain_form(text).split())


def _repeated(
    request: EditRequest, earlier: Sequence[EditRequest], batches: bool
) -> list[str]:
  """Says what is wrong with an edit of what was edited before."""
  keep = 'keep one'
  if batches:
    keep += ', or let them stand in different batches (--batch_size)'
  for one in earlier:
    if _squeeze(request.target) == _squeeze(one.target):
      if request.case == one.case:
        return [f'it makes the same edit as {named(one)}; drop one of them.']
    elif request.subject is None:
      return [
          f'it answers the question of {named(one)} in another way; {keep}.'
      ]
    else:
      return [
          f'it writes {request.target!r} where {named(one)} writes'
          f' {one.target!r} for the same subject and prompt; {keep}.'
      ]
  return []
