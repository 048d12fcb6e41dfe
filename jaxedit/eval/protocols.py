"""In what order requests are edited and judged, as values.

  independent(n)   every case alone, each from the unedited model; n of them are
                   held side by side
  batches(n)       n cases are one edit, each batch from the unedited model; with
                   reset=False from the model that the last one left
  sequence(n)      batches of n cases, each on the model that the last one left,
                   judged at the end or along the way

A protocol is asked for its steps over case numbers, see `case_numbers`; cases
are never cut. It edits nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxedit.types import EditRequest

IMMEDIATE, FINAL = 'immediate', 'final'


class Step(NamedTuple):
  """Requests to edit together or side by side, and those to judge after it.

  Attributes:
    batch: indices of the requests to edit.
    judge: indices of the requests to judge next, none for no evaluation.
  """

  batch: tuple[int, ...]
  judge: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """See `independent`, `batches` and `sequence`.

  Attributes:
    cases: how many cases a step has; None for all.
    alone: whether each case of a step is an edit of its own.
    reset: whether every step starts from the unedited model.
    judge_at: 'immediate', every step's requests after it; 'final', all after
      the last; or numbers of edited cases, at which all edited ones are.
  """

  cases: int | None
  alone: bool = False
  reset: bool = True
  judge_at: str | tuple[int, ...] = IMMEDIATE

  def steps(self, cases: Sequence[int]) -> Iterator[Step]:
    """Yields the steps.

    Args:
      cases: number of the case of every request, from 0 on without gaps.
    """
    count = max(cases, default=-1) + 1
    size = self.cases or max(count, 1)
    batches: list[list[int]] = [[] for _ in range(-(-count // size))]
    for i, case in enumerate(cases):
      batches[case // size].append(i)
    edited: list[int] = []
    for number, batch in enumerate(batches, 1):
      edited += batch
      done = min(number * size, count)
      if self.judge_at == IMMEDIATE:
        judge = batch
      elif self.judge_at == FINAL:
        judge = edited if done == count else ()
      else:
        reached = any(done - size < n <= done for n in self.judge_at)
        judge = edited if reached else ()
      yield Step(tuple(batch), tuple(sorted(judge)))


def independent(n: int | None = None) -> Protocol:
  """Every case alone, n of them side by side; all unless given."""
  return Protocol(n, alone=True)


def batches(n: int, *, reset: bool = True) -> Protocol:
  """n cases an edit, judged right after it; with `reset` each starts anew."""
  return Protocol(n, reset=reset)


def sequence(n: int, *, judge_at: str | Sequence[int] = FINAL) -> Protocol:
  """n cases an edit, each on the model that the last one left.

  Args:
    n: cases a batch.
    judge_at: 'immediate', 'final' or numbers of edited cases, as `Protocol`.
  """
  at = judge_at if isinstance(judge_at, str) else tuple(judge_at)
  return Protocol(n, reset=False, judge_at=at)


def case_numbers(requests: Sequence[EditRequest]) -> tuple[int, ...]:
  """Numbers the cases of requests; one without a case is a case of its own."""
  numbers: dict[str | int, int] = {}
  keys = (request.case or i for i, request in enumerate(requests))
  return tuple(numbers.setdefault(key, len(numbers)) for key in keys)
