"""Packs short texts into rows of one width.

A row holds several texts side by side as segments 2, 3, ...; positions restart
with every text. By the rule of `types.Columns` attention is then block-diagonal
and causal, so a text is computed exactly as if it were alone (the prefix segment
1, which later columns see, is never used):

  tokens    a a a b b b b c c .
  segment   2 2 2 3 3 3 3 4 4 0
  position  0 1 2 0 1 2 3 0 1 0

Texts go first-fit, in the order in which they come, into a few open rows, so a
corpus of any size streams through and the order of its documents decides
everything.

Not here: tokenizing (`corpora`), splitting one text over several rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.types import PADDING, SHARED, InputError

# Open rows. On WikiText-2 paragraphs 16 leave a few per mille of padding.
OPEN_ROWS = 16


class Row(NamedTuple):
  """One packed row of T columns.

  Attributes:
    tokens: [T] int32, 0 at padding.
    positions: [T] int32, from 0 in every text.
    segment_ids: [T] int32, `PADDING` or 2, 3, ... one a text.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray

  @property
  def count(self) -> int:
    """Tokens, without padding."""
    return int(np.count_nonzero(self.segment_ids != PADDING))

  @property
  def texts(self) -> int:
    """Texts in the row."""
    return max(int(self.segment_ids.max(initial=PADDING)) - SHARED, 0)


def _close(texts: Sequence[Sequence[int]], width: int) -> Row:
  """Lays texts side by side."""
  row = Row(*(np.zeros(width, np.int32) for _ in Row._fields))
  first = 0
  for i, text in enumerate(texts):
    last = first + len(text)
    row.tokens[first:last] = text
    row.positions[first:last] = np.arange(len(text))
    row.segment_ids[first:last] = SHARED + 1 + i
    first = last
  return row


def pack(
    texts: Iterable[Sequence[int]],
    width: int = 512,
    *,
    max_length: int | None = None,
    open_rows: int = OPEN_ROWS,
) -> Iterator[Row]:
  """Packs token sequences into rows.

  A text longer than the limit loses its end. A text goes into the first open
  row with room; where none has room a new row is opened, and the fullest is
  given out when too many are open.

  Args:
    texts: token ids, special tokens included; empty ones are skipped.
    width: columns a row (T).
    max_length: longest text, tokens; None for the width of the row.
    open_rows: rows that wait for texts that fit.

  Yields:
    Rows with at least one text each.

  Raises:
    InputError: a size is not positive.
  """
  limit = width if max_length is None else min(max_length, width)
  if min(width, limit, open_rows) < 1:
    raise InputError(
        f'cannot pack: the width {width}, the longest text {limit} and the'
        f' number of open rows {open_rows} must be at least 1'
    )
  waiting: list[list[Sequence[int]]] = []
  free: list[int] = []
  for text in texts:
    text = text[:limit]
    if not len(text):
      continue
    place = next((i for i, r in enumerate(free) if r >= len(text)), None)
    if place is None:
      if len(waiting) == open_rows:
        fullest = free.index(min(free))
        free.pop(fullest)
        yield _close(waiting.pop(fullest), width)
      waiting.append([])
      free.append(width)
      place = len(waiting) - 1
    waiting[place].append(text)
    free[place] -= len(text)
    if not free[place]:
      free.pop(place)
      yield _close(waiting.pop(place), width)
  for row in waiting:
    yield _close(row, width)


def stack(rows: Sequence[Row], number: int) -> Row:
  """Stacks rows into one batch of a fixed number of rows.

  Args:
    rows: at least one and at most `number` rows of one width T.
    number: rows of the batch (B); the missing ones are padding.

  Returns:
    A `Row` whose arrays are [B, T].
  """
  missing = ((0, number - len(rows)), (0, 0))
  return Row(*(np.pad(np.stack(part), missing) for part in zip(*rows)))
