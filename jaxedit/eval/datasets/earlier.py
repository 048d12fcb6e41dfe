"""What came before in a file: edits that must not repeat, cases that ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxedit.eval.datasets.entries import named
from jaxedit.types import EditRequest


class Converted(NamedTuple):
  """An entry as requests; they are good if there are no errors."""

  number: int
  id: str
  case: str = ''
  requests: Sequence[EditRequest] = ()
  errors: Sequence[str] = ()


class Earlier:
  """The edits and cases that came before."""

  def __init__(self, unique: bool):
    self._unique = unique
    self._cases: dict[str, Converted] = {}
    self._edits: dict[tuple[str, str], list[EditRequest]] = {}

  def errors(
      self, case: Sequence[Converted], found: Iterator[Sequence[str]]
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
