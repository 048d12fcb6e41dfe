"""Sums what the anchors of a tile hold by the state that they belong to.

On the device, so that one row a state goes to the host in place of one a context.

Axes: R rows of a tile, K states an edit, L states of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxedit.types import Array


class Segments(NamedTuple):
  """Where a tile's anchors belong.

  Attributes:
    states: [L'] numbers of the states it has anchors of.
    index: [L, m] places among its R K anchors of each of them, L >= L'; R K
      where there is none.
  """

  states: np.ndarray
  index: np.ndarray


@jax.jit
def segment_sum(part: Array, index: Array) -> Array:
  """Sums anchors [R, K, .] by state, always in the same order; gives [L, .].

  Rows are picked, not weighed: what is not finite stays where it is.
  """
  rows = part.reshape(-1, part.shape[-1])
  return rows.at[index].get(mode='fill', fill_value=0).sum(1)


def find_segments(number: np.ndarray, contexts: int) -> Segments:
  """Finds the anchors of every state of a tile.

  Args:
    number: [R, K] the state that an anchor belongs to, -1 for none; rows of an
      edit follow each other.
    contexts: rows an edit.

  Returns:
    The fold; the shape of its index depends on that of the tile alone.
  """
  rows, stages = number.shape
  edits = min(rows, -(-(rows - 1) // contexts) + 1)
  places = np.flatnonzero(number >= 0)
  taken = number.reshape(-1)[places]
  states, counts = np.unique(taken, return_counts=True)
  index = np.full((edits * stages, min(rows, contexts)), number.size)
  counts = np.pad(counts, (0, len(index) - len(counts)))
  index[np.arange(index.shape[1]) < counts[:, None]] = places[
      np.argsort(taken, kind='stable')
  ]
  return Segments(states, index)


def one_ahead(parts: Iterator[Array]) -> Iterator[Array]:
  """Yields each while the device is at work on the next."""
  last = next(parts, None)
  for part in parts:
    yield last
    last = part
  if last is not None:
    yield last
