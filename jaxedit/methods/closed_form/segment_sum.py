"""Sums vectors at the anchors of a packed batch by the target they belong to.

On the device, so that one row a target goes to the host and not one a context.

Axes as in `jaxedit.types`: B sequences, K chunks an edit, M targets of the
packed batch, C contexts an edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxedit.types import Array


class Segments(NamedTuple):
  """Targets of the anchors of a packed batch.

  Attributes:
    states: [M'] numbers of the targets that it has anchors of.
    index: [M, C] index of their anchors among all B K, M >= M'; B K where there
      is none.
  """

  states: np.ndarray
  index: np.ndarray


@jax.jit
def segment_sum(part: Array, index: Array) -> Array:
  """Sums [B, K, .] by target, always in the same order, to [M, .].

  Rows are gathered, not multiplied by weights, so a non-finite one affects its
  own target only.
  """
  rows = part.reshape(-1, part.shape[-1])
  return rows.at[index].get(mode='fill', fill_value=0).sum(1)


def find_segments(number: np.ndarray, contexts: int) -> Segments:
  """Finds the anchors of every target of a packed batch.

  Args:
    number: [B, K] the target that an anchor belongs to, -1 for none; sequences
      of an edit follow each other.
    contexts: sequences an edit.

  Returns:
    The segments; the shape of the index depends on the batch's shape alone.
  """
  rows, stages = number.shape
  edits = min(rows, -(-(rows - 1) // contexts) + 1)
  anchors = np.flatnonzero(number >= 0)
  taken = number.reshape(-1)[anchors]
  states, counts = np.unique(taken, return_counts=True)
  index = np.full((edits * stages, min(rows, contexts)), number.size)
  counts = np.pad(counts, (0, len(index) - len(counts)))
  index[np.arange(index.shape[1]) < counts[:, None]] = anchors[
      np.argsort(taken, kind='stable')
  ]
  return Segments(states, index)


def one_ahead(parts: Iterator[Array]) -> Iterator[Array]:
  """Yields each array while the device computes the next."""
  last = next(parts, None)
  for part in parts:
    yield last
    last = part
  if last is not None:
    yield last
