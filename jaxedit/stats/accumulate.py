"""Sums over packed rows, merged in float64 and saved across interruptions.

Rows come in batches. The caller adds a batch to a partial sum; here partial sums
are merged in f64, counted, hashed, and now and then saved to a file, with the
partial sum that is not merged yet. A later run over the same rows counts and
hashes what the file covers without computing it, checks that it is the same text,
and continues with the same bits.

The file is written in place of an Orbax checkpoint, whose writer copies all sums
twice, gigabytes for large F; and several runs may collect the same moments for a
cache that they share.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxedit import io
from jaxedit.batching.packer import Row
from jaxedit.placement import fetch
from jaxedit.types import Array, InputError, Stopped

# What the file says it is.
KIND = 'jaxedit partial second moments 2'


class Total(NamedTuple):
  """What has been summed so far.

  Attributes:
    gram: [n, F, F] float64, merged sums, upper block triangle.
    part: [n, F, F], sums of the last batches, not merged; None for none.
    unmerged: how many batches that are.
    rows: rows of all of them.
    tokens: their tokens.
    texts: their texts.
    digest: sha256 over the rows.
  """

  gram: np.ndarray
  part: Array | None = None
  unmerged: int = 0
  rows: int = 0
  tokens: int = 0
  texts: int = 0
  digest: str = ''


def batches_of(rows: Iterable[Row], cap: int, size: int) -> Iterator[list[Row]]:
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
  return total._replace(
      rows=total.rows + len(rows),
      tokens=total.tokens + sum(row.count for row in rows),
      texts=total.texts + sum(row.texts for row in rows),
      digest=hasher.hexdigest(),
  )


_ANEW = 'delete it to start anew'


def read_partial(
    path: pathlib.Path | None,
    identity: Mapping[str, Any],
    kind: str,
    kinds: Mapping[str, type],
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
  """Reads what an interrupted run left in a file.

  Args:
    path: the file; None for none.
    identity: what the results of the run depend on.
    kind: what the file says it is.
    kinds: name -> type of the entries of its record beside the identity.

  Returns:
    (arrays, entries), or None where there is no file.

  Raises:
    InputError: it is damaged or of another run.
  """
  if path is None or not path.exists():
    return None
  io.sweep(path)
  tensors, record = io.read_tensors(path, kind, _ANEW)
  theirs, *entries = io.take(record, {'identity': dict, **kinds}, path, _ANEW)
  other = [name for name, x in identity.items() if theirs.get(name) != x]
  if other:
    raise InputError(
        f'{path}: is of an interrupted run with another {", ".join(other)};'
        f' repeat that run to finish it, or {_ANEW}'
    )
  return tensors, dict(zip(kinds, entries))


class Store:
  """The sums of one run in a file; does nothing without a path."""

  def __init__(
      self,
      path: str | os.PathLike[str] | None,
      seconds: float,
      identity: Mapping[str, Any],
  ):
    """Names the file, which need not exist.

    Args:
      path: the file, or None.
      seconds: least time between two times that it is written, so that writing
        takes a tenth of the run at most; 0 writes after every batch.
      identity: what the sums depend on, plain JSON types.
    """
    self._path = None if path is None else pathlib.Path(path)
    self._identity = identity
    self._seconds = self._pause = seconds
    self._written = time.monotonic()

  def read(self) -> Total | None:
    """Returns what an interrupted run left; refuses another run's."""
    kinds = {'unmerged': int, 'rows': int, 'tokens': int, 'texts': int}
    kinds |= {'digest': str}
    found = read_partial(self._path, self._identity, KIND, kinds)
    if found is None:
      return None
    tensors, done = found
    if 'gram' not in tensors or ('part' in tensors) != (done['unmerged'] > 0):
      raise InputError(f'{self._path}: is damaged, it has no sums; {_ANEW}')
    if 'part' in tensors:
      done['part'] = jnp.asarray(tensors['part'])
    return Total(tensors['gram'], **done)

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
    if start - self._written < self._pause:
      return
    self.write(total)
    self._written = time.monotonic()
    if self._seconds:
      self._pause = max(self._seconds, 9 * (self._written - start))

  def write(self, total: Total) -> str | None:
    """Writes the sums; returns where they lie, if anywhere."""
    if self._path is None:
      return None
    record = {'identity': self._identity, **total._asdict()}
    tensors = {name: record.pop(name) for name in ('gram', 'part')}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    io.write_tensors(self._path, tensors, kind=KIND, record=record)
    return str(self._path)


def accumulate(
    total: Total,
    batches: Iterable[Sequence[Row]],
    add: Callable[[Array | None, Sequence[Row]], Array],
    store: Store,
    *,
    merge: int,
    advance: Callable[[int], None],
) -> Total:
  """Sums all batches, on from a file where there is one.

  Args:
    total: zeros; its sums are changed in place.
    batches: the rows.
    add: adds a batch to a partial sum; None is zero.
    store: keeps sums.
    merge: batches in a partial sum.
    advance: called with tokens.

  Returns:
    The sums, all merged.

  Raises:
    Stopped: by `advance`; the sums are saved.
  """
  old, hasher = store.read(), hashlib.sha256()
  try:
    for rows in batches:
      before = total
      total = _count(total, rows, hasher)
      if old is not None:
        total = store.reached(total, old)
        old = None if total is old else old
      else:
        part, unmerged = add(total.part, rows), total.unmerged + 1
        total = total._replace(part=part, unmerged=unmerged)
        total = _merged(total) if unmerged == merge else total
        store.maybe_write(total)
      advance(total.tokens - before.tokens)
  except Stopped as stopped:
    where = store.write(total if old is None else old)
    stopped.saved += [where] if where else []
    raise
  if old is not None:
    store.reached(total._replace(rows=old.rows, digest=''), old)
  return _merged(total)


def _merged(total: Total) -> Total:
  """Adds the partial sum in float64."""
  if total.part is not None:
    # A sum in place: a copy of [n, F, F] in f64 is gigabytes for large F.
    np.add(total.gram, fetch(total.part), out=total.gram)
  return total._replace(part=None, unmerged=0)
