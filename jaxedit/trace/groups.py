"""Puts prompts of like length together, so that few programs serve them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxedit.batching import packer
from jaxedit.batching.buckets import octaves, round_up
from jaxedit.types import PADDING

# Widths to which prompts are padded: every one is a program.
_WIDTHS = octaves(4, step=4)


@dataclasses.dataclass(frozen=True)
class Group:
  """Cases of one padded length, whose tables are held at one time.

  Attributes:
    indices: the cases.
    width: padded length, tokens.
    size: G, as many rows as the largest group of that width has cases.
  """

  indices: tuple[int, ...]
  width: int
  size: int


def groups(lengths: np.ndarray, size: int) -> list[Group]:
  """Puts cases of like length together.

  Args:
    lengths: [E] tokens of every case.
    size: cases a group at most.

  Returns:
    The groups; those of one width have one size.
  """
  width = np.array([round_up(int(length), _WIDTHS) for length in lengths])
  found = []
  for w in np.unique(width):
    mine = np.flatnonzero(width == w)
    count = -(-len(mine) // size)
    each = -(-len(mine) // count)
    for begin in range(0, len(mine), each):
      indices = tuple(int(i) for i in mine[begin : begin + each])
      found.append(Group(indices, int(w), each))
  return found


def padded(
    rows: Sequence[np.ndarray], count: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows on the right.

  Args:
    rows: [T] ids a row.
    count: G, at least as many; a row that is missing has one token.
    width: T of all.

  Returns:
    ([G, T] int32 ids, [G, T] bool where there are any).
  """
  rows = [*rows, *[np.zeros(1, np.int32)] * (count - len(rows))]
  ids, layout = packer.pad(rows, (count, width))
  return ids, layout.segment_ids != PADDING
