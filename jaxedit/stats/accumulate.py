"""Sums over packed rows, merged in float64 and kept across interruptions.

Rows come in rounds. The caller reduces a round to one array; here the rounds
are summed in f64, counted, hashed, and now and then written to a checkpoint. A
later run over the same rows counts and hashes what the checkpoint covers
without computing it, checks that it is the same text, and goes on with the same
bits.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import io
from jaxedit.batching.packer import Row
from jaxedit.types import InputError

# What the file of a checkpoint says it is.
KIND = 'jaxedit partial second moments 1'


class Total(NamedTuple):
  """What has been merged so far."""

  gram: np.ndarray  # [n, F, F] float64, sums, upper block triangle
  rows: int
  tokens: int
  texts: int
  digest: str  # sha256 over the rows


def rounds_of(rows: Iterable[Row], cap: int, size: int) -> Iterator[list[Row]]:
  """Groups rows until they hold `cap` tokens; only the last may be short."""
  given, waiting = 0, []
  for row in rows:
    waiting.append(row)
    given += row.count
    if len(waiting) == size or given >= cap:
      yield waiting
      waiting = []
    if given >= cap:
      return
  if waiting:
    yield waiting


def _count(total: Total, rows: Sequence[Row], hasher: Any) -> Total:
  """Counts rows without looking at their keys."""
  for row in rows:
    hasher.update(row.tokens.tobytes())
    hasher.update(row.segment_ids.tobytes())
  return Total(
      total.gram,
      total.rows + len(rows),
      total.tokens + sum(row.count for row in rows),
      total.texts + sum(row.texts for row in rows),
      hasher.hexdigest(),
  )


class Checkpoint:
  """Partial sums of one run on disk; does nothing without a path."""

  def __init__(
      self,
      path: str | os.PathLike[str] | None,
      seconds: float,
      identity: Mapping[str, Any],
  ):
    self._path = None if path is None else pathlib.Path(path)
    self._identity = identity
    self._seconds = self._pause = seconds
    self._written = time.monotonic()

  def read(self) -> Total | None:
    """Returns what an interrupted run left; refuses another run's."""
    if self._path is None or not self._path.exists():
      return None
    io.sweep(self._path)
    advice = 'delete it to start anew'
    tensors, record = io.read_tensors(self._path, KIND, advice)
    kinds = {'rows': int, 'tokens': int, 'texts': int, 'digest': str}
    theirs, *done = io.take(
        record, {'identity': dict, **kinds}, self._path, advice
    )
    other = [k for k, v in self._identity.items() if theirs.get(k) != v]
    if other:
      raise InputError(
          f'{self._path}: is of an interrupted run with another'
          f' {", ".join(other)}; repeat that run to finish it, or {advice}'
      )
    if tensors.keys() != {'gram'}:
      raise InputError(f'{self._path}: is damaged, it has no sums; {advice}')
    return Total(tensors['gram'], *done)

  def reached(self, total: Total, old: Total | None) -> Total:
    """Swaps in the old sums where counting has come as far as they go."""
    if old is None or total.rows < old.rows:
      return total
    if (total.rows, total.digest) != (old.rows, old.digest):
      raise InputError(
          f'{self._path}: is of an interrupted run on other text than the'
          ' corpus gives now; delete it to start anew'
      )
    return old

  def maybe_write(self, total: Total) -> None:
    """Writes the sums if it is time."""
    start = time.monotonic()
    if self._path is None or start - self._written < self._pause:
      return
    record = {'identity': self._identity, **total._asdict()}
    tensors = {'gram': record.pop('gram')}
    io.write_tensors(self._path, tensors, kind=KIND, record=record)
    self._written = time.monotonic()
    # Writing takes a tenth of the run at most.
    self._pause = max(self._seconds, 9 * (self._written - start))

  def remove(self) -> None:
    """Removes the file at the end of a run."""
    if self._path is not None:
      self._path.unlink(missing_ok=True)


def accumulate(
    total: Total,
    rounds: Iterable[Sequence[Row]],
    add: Callable[[Sequence[Row]], np.ndarray],
    store: Checkpoint,
    advance: Callable[[int], None],
) -> Total:
  """Sums all rounds, going on from a checkpoint where there is one."""
  old, hasher = store.read(), hashlib.sha256()
  for rows in rounds:
    before = total
    total = _count(total, rows, hasher)
    if old is not None:
      advance(total.tokens - before.tokens)
      total = store.reached(total, old)
      old = None if total is old else old
      continue
    # A sum in place: a copy of [n, F, F] in f64 is gigabytes for large F.
    np.add(total.gram, add(rows), out=total.gram)
    store.maybe_write(total)
  if old is not None:
    store.reached(total._replace(rows=old.rows, digest=''), old)
  return total
