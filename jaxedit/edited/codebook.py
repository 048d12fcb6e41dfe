"""A codebook as a stream of edits makes it, entry by entry.

  nearest entry j at distance d         what is done
  none, or d > radius + radius_j        a new entry
  else, another target, d > 0           a new entry of radius d / 2; radius_j is
                                        lowered below d / 2
  else, another target, d = 0           entry j gets the new target and value
  else, the same target                 radius_j becomes d where it is less; the
                                        entry keeps its value

A `History` keeps what every edit brought. Values do not depend on the entries
there are, so a codebook that is entered anew from some of the edits is the one
that these edits alone would have made.

Axis letters: C entries, N edits, F key width, D width.

Source: Hartvigsen et al. 2023, "Aging with GRACE" (arXiv 2211.11031); what is
different is said in `methods.grace`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Keys nearer than this share of their length are the same prompt.
_SAME = 1e-6
# A split radius stays this much below half the distance, as published.
_GAP = 1e-5


class State(NamedTuple):
  """A codebook on the host; rows past `count` are zero.

  Attributes:
    keys: [C, F].
    values: [C, D].
    radii: [C].
    labels: [C, 8] uint32, digest of an entry's target.
    count: [] int32 entries in use.
  """

  keys: np.ndarray
  values: np.ndarray
  radii: np.ndarray
  labels: np.ndarray
  count: np.ndarray


class Entry(NamedTuple):
  """One edit on its way into a codebook."""

  key: np.ndarray  # [F]
  value: np.ndarray  # [D]
  label: np.ndarray  # [8]


class History(NamedTuple):
  """What edits brought, in order; on the host.

  Attributes:
    keys: [N, F].
    values: [N, D].
    labels: [N, 8] uint32.
    radii: [N] first radius of each.
  """

  keys: np.ndarray
  values: np.ndarray
  labels: np.ndarray
  radii: np.ndarray

  def added(self, entries: Sequence[Entry], radius: float) -> History:
    """The history after further edits."""
    if not entries:
      return self
    more = [np.stack(leaf) for leaf in zip(*entries)]
    more.append(np.full(len(entries), radius))
    join = lambda old, new: np.concatenate([old, new.astype(old.dtype)])
    return History(*map(join, self, more))

  def taken(self, kept: Sequence[int]) -> History:
    """The history of some of the edits."""
    return History(*(leaf[list(kept)] for leaf in self))

  def book(self, capacity: int) -> State:
    """The codebook that these edits make."""
    fan_in, fan_out = self.keys.shape[1], self.values.shape[1]
    book = empty(capacity, fan_in, fan_out, self.keys.dtype)
    for *entry, radius in zip(*self):
      book, _ = entered(book, [Entry(*entry)], float(radius))
    return book


def no_history(fan_in: int, fan_out: int, dtype: Any) -> History:
  """Makes a history without edits."""
  zeros = lambda *shape: np.zeros((0, *shape), dtype)
  return History(
      zeros(fan_in), zeros(fan_out), np.zeros((0, 8), np.uint32), np.zeros(0)
  )


def empty(capacity: int, fan_in: int, fan_out: int, dtype: Any) -> State:
  """Makes a codebook without entries."""
  zeros = lambda *shape: np.zeros((capacity, *shape), dtype)
  labels = np.zeros((capacity, 8), np.uint32)
  return State(zeros(fan_in), zeros(fan_out), zeros(), labels, np.int32(0))


def label_of(target: Sequence[int]) -> np.ndarray:
  """Digest [8] uint32 of a target's token ids."""
  ids = np.ascontiguousarray(target, np.int64)
  return np.frombuffer(hashlib.sha256(ids.tobytes()).digest(), np.uint32)


def enter(book: State, entry: Entry, radius: float) -> bool:
  """Enters one edit into a codebook, in place; see the module head.

  Args:
    book: whose arrays are changed, all but `count`, which the caller raises
      where an entry was added.
    entry: the edit.
    radius: first radius of an entry.

  Returns:
    Whether an entry was added.

  Raises:
    IndexError: it needs an entry and it is full.
  """
  count = int(book.count)
  near, distance = -1, np.inf
  if count:
    away = book.keys[:count].astype(np.float64) - entry.key
    distances = np.linalg.norm(away, axis=-1)
    near = int(np.argmin(distances))
    distance = float(distances[near])
  if distance <= radius + (book.radii[near] if count else 0):
    same = np.array_equal(book.labels[near], entry.label)
    if same:
      book.radii[near] = max(book.radii[near], distance)
      return False
    if distance <= _SAME * max(float(np.linalg.norm(entry.key)), 1e-30):
      book.values[near], book.labels[near] = entry.value, entry.label
      return False
    radius = distance / 2
  if count == len(book.keys):
    raise IndexError
  if distance < np.inf and radius == distance / 2:
    book.radii[near] = min(book.radii[near], max(distance / 2 - _GAP, 0))
  book.keys[count], book.values[count] = entry.key, entry.value
  book.radii[count], book.labels[count] = radius, entry.label
  return True


def entered(
    state: State,
    entries: Sequence[Entry],
    radius: float,
    limit: int | None = None,
) -> tuple[State, list[int]]:
  """Enters edits in order.

  Args:
    state: the codebook; untouched.
    entries: the edits.
    radius: first radius of an entry.
    limit: entries of the result at most.

  Returns:
    (a new codebook, of `limit` entries where given; which edits found it full).
  """
  size = slice(limit)
  book = State(*(np.array(x[size]) for x in state[:-1]), state.count)
  full = []
  for i, entry in enumerate(entries):
    try:
      added = enter(book, entry, radius)
    except IndexError:
      full.append(i)
      continue
    book = book._replace(count=np.int32(book.count + added))
  return book, full
