"""Lays token sequences out in arrays of a static shape; numpy only.

There are two layouts. In a packed batch sequences lie end to end on one axis of
N tokens (`types.PackedSequences`): linear maps run without padding, and only
attention sees sequences. In padded rows [B, T] a row holds segments side by side
(`types.TokenLayout`): a prompt and the answers that branch from it, or texts
that do not see each other:

  tokens    a a a b b b b c c .
  segment   2 2 2 3 3 3 3 4 4 0
  position  0 1 2 0 1 2 3 0 1 0

`end_to_end` makes a packed batch at once and `Packer` one whose sequences come
and go (`slots`); `groups` cuts a list of sequences into batches, and `first_fit`
a stream of texts into rows, whose number nobody knows.

Axis letters as in `jaxedit.types`: B sequences, T tokens of a sequence, N packed
tokens, O output tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.types import (
    PADDING,
    SHARED,
    InputError,
    OutputTokens,
    PackedSequences,
    TokenLayout,
)

# Open rows. On WikiText-2 paragraphs 16 leave a few per mille of padding.
OPEN_ROWS = 16


class Packer:
  """Packed sequences under construction."""

  def __init__(self, rows: int, width: int, token_budget: int, shards: int = 1):
    self._shards = shards
    self.index = np.full([rows, width], token_budget, np.int32)
    self.positions = np.zeros([rows, width], np.int32)
    self.segment_ids = np.full([rows, width], PADDING, np.int32)
    self.row = np.full([token_budget], rows, np.int32)
    self.column = np.zeros([token_budget], np.int32)

  def put(self, row: int, index: np.ndarray, start: int) -> None:
    """Makes a sequence of the packed tokens `index`, from position `start`."""
    column = np.arange(len(index), dtype=np.int32)
    self.index[row, : len(index)] = index
    self.positions[row, : len(index)] = start + column
    self.segment_ids[row, : len(index)] = SHARED
    self.row[index] = row
    self.column[index] = column

  def clear(self, row: int) -> np.ndarray:
    """Removes a sequence and returns the packed indices of its tokens."""
    used = self.segment_ids[row] != PADDING
    index = self.index[row, used]
    self.index[row] = len(self.row)
    self.positions[row] = 0
    self.segment_ids[row] = PADDING
    self.row[index] = len(self.index)
    self.column[index] = 0
    return index

  def packing(self) -> PackedSequences:
    """A copy of the sequences as they are now."""
    layout = TokenLayout(self.positions.copy(), self.segment_ids.copy())
    copies = (x.copy() for x in (self.index, self.row, self.column))
    return PackedSequences(layout, *copies, shards=self._shards)


def end_to_end(
    start: np.ndarray,
    length: np.ndarray,
    *,
    width: int,
    token_budget: int,
    real: np.ndarray | None = None,
    shards: int = 1,
) -> PackedSequences:
  """Packs sequences in order.

  Args:
    start: [B] position of the first token.
    length: [B] tokens.
    width: T, no sequence is longer.
    token_budget: N, no fewer than all tokens, in every shard.
    real: [B] tokens that others may attend to, the first ones; the rest are
      padding that is run. All unless given.
    shards: see `types.PackedSequences`.

  Returns:
    The sequences.
  """
  parts = length.reshape(shards, -1)
  part = token_budget // shards
  assert parts.sum(axis=1).max(initial=0) <= part
  assert length.max(initial=0) <= width
  column = np.arange(width, dtype=np.int32)
  inside = column < length[:, None]
  first = np.cumsum(parts, axis=1) - parts
  first = (first + part * np.arange(shards)[:, None]).reshape(-1)
  place = lambda of, empty: np.where(inside, of[:, None] + column, empty)
  index = place(first, token_budget).astype(np.int32)
  row = np.full([token_budget], len(length), np.int32)
  back = np.zeros([token_budget], np.int32)
  row[index[inside]], back[index[inside]] = np.nonzero(inside)
  seen = inside if real is None else column < real[:, None]
  return PackedSequences(
      TokenLayout(
          place(start, 0).astype(np.int32),
          np.where(seen, SHARED, PADDING).astype(np.int32),
      ),
      index,
      row,
      back,
      shards,
  )


def with_sources(
    rows: PackedSequences, tokens: np.ndarray, *, always: bool = False
) -> PackedSequences:
  """Marks tokens of sources, whose ids are below 0 (see `jaxedit.sources`).

  Args:
    rows: packed sequences.
    tokens: [1, N] int32.
    always: also where there are none, so that batches have one structure.

  Returns:
    The sequences.
  """
  read = np.append(tokens[0] < 0, False)
  if not (always or read.any()):
    return rows
  return rows.replace(layout=rows.layout.replace(source=read[rows.index]))


def select(
    rows: PackedSequences,
    begin: np.ndarray,
    count: np.ndarray,
    *,
    width: int,
    budget: int,
) -> OutputTokens:
  """Selects consecutive tokens of every sequence, in order.

  Args:
    rows: B packed sequences.
    begin: [B] first token, an index into the sequence.
    count: [B] how many; nobody asks where that is 0.
    width: no count is larger.
    budget: O, no fewer than all that are selected, in every shard.

  Returns:
    The tokens.
  """
  start = rows.layout.positions[:, 0] + begin
  chosen = end_to_end(
      start, count, width=width, token_budget=budget, shards=rows.shards
  )
  row, column = np.nonzero(chosen.index < budget)
  index = np.full([budget], len(rows.row), np.int32)
  index[chosen.index[row, column]] = rows.index[row, begin[row] + column]
  if rows.layout.source is not None:
    source = np.zeros(chosen.index.shape, bool)
    source[row, column] = rows.layout.source[row, begin[row] + column]
    chosen = chosen.replace(layout=chosen.layout.replace(source=source))
  return OutputTokens(index, chosen)


def groups(
    loads: Iterable[Sequence[int]],
    limits: Sequence[int],
    *,
    most: int | None = None,
    kind: Sequence[Any] | None = None,
) -> Iterator[slice]:
  """Cuts a list where the next entry would not fit.

  Args:
    loads: what an entry takes of every limit; one alone may exceed them.
    limits: what a group has.
    most: entries a group at most.
    kind: of every entry; a group has one.

  Yields:
    The entries of every group.
  """
  begin, end, used = 0, 0, (0,) * len(limits)
  for end, load in enumerate(loads):
    total = tuple(map(int.__add__, used, map(int, load)))
    if end > begin and (
        end - begin == most
        or any(x > limit for x, limit in zip(total, limits))
        or (kind is not None and kind[end] != kind[begin])
    ):
      yield slice(begin, end)
      begin, total = end, tuple(map(int, load))
    used = total
    end += 1
  if end > begin:
    yield slice(begin, end)


class Segment(NamedTuple):
  """Tokens side by side in a padded row.

  Attributes:
    ids: token ids.
    start: position of the first one.
    segment_id: see `types.TokenLayout`.
  """

  ids: Sequence[int]
  start: int = 0
  segment_id: int = SHARED


def pad_segments(
    rows: Sequence[Iterable[Segment]], shape: tuple[int, int]
) -> tuple[np.ndarray, TokenLayout]:
  """Lays segments side by side and pads every row on the right.

  Args:
    rows: segments of every row.
    shape: (B, T); there may be fewer rows.

  Returns:
    ([B, T] int32 tokens, 0 at padding; their layout).
  """
  tokens, positions, segment_ids = np.zeros((3, *shape), np.int32)
  for r, row in enumerate(rows):
    end = 0
    for ids, start, segment_id in row:
      begin, end = end, end + len(ids)
      tokens[r, begin:end] = ids
      positions[r, begin:end] = np.arange(start, start + len(ids))
      segment_ids[r, begin:end] = segment_id
  source = tokens < 0
  return tokens, TokenLayout(
      positions, segment_ids, source if source.any() else None
  )


def pad(
    rows: Iterable[Sequence[int]], shape: tuple[int, int]
) -> tuple[np.ndarray, TokenLayout]:
  """Pads sequences on the right; see `pad_segments`."""
  return pad_segments([[Segment(ids)] for ids in rows], shape)


class Row(NamedTuple):
  """One row of T tokens with texts side by side.

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
  row = [Segment(ids, 0, i) for i, ids in enumerate(texts, SHARED + 1)]
  (tokens,), layout = pad_segments([row], (1, width))
  return Row(tokens, layout.positions[0], layout.segment_ids[0])


def first_fit(
    texts: Iterable[Sequence[int]],
    width: int = 512,
    *,
    max_length: int | None = None,
    open_rows: int = OPEN_ROWS,
) -> Iterator[Row]:
  """Packs a stream of texts into rows; their order decides everything.

  A text longer than the limit loses its end. A text goes into the first open
  row with room; where none has room a new row is opened, and the fullest is
  given out when too many are open.

  Args:
    texts: token ids, special tokens included; empty ones are skipped.
    width: tokens a row (T).
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
