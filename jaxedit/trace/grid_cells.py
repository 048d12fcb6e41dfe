"""Lays the grid cells of a trace out for a device.

A cell restores one token t in the layers around one layer. Only columns from t on
can change, and only above the first restored layer, so a cell is n rows (one a
draw of noise) of T - t columns that enter after that layer. Rows that enter after
the same layer lie end to end in a tile (see `types.PackedSequences`); all tiles of a group
have one shape, chosen so that they hold few empty places.

Axis letters: R rows of a tile, N places, W columns of a row, K scored places.

It holds numpy arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax
import numpy as np

from jaxedit.batching import packer
from jaxedit.trace.restoration import Restoration
from jaxedit.types import Array, OutputTokens, PackedSequences


class GridCells(NamedTuple):
  """Grid cells to run, a row a draw, in one order.

  Attributes:
    case: [n] int which case of the group.
    draw: [n] draw of noise.
    token: [n] restored column t.
    layer: [n] layer around which it is restored.
    entry: [n] first restored layer.
    stop: [n] one past the last restored layer.
  """

  case: np.ndarray
  draw: np.ndarray
  token: np.ndarray
  layer: np.ndarray
  entry: np.ndarray
  stop: np.ndarray

  def take(self, index: np.ndarray | slice) -> GridCells:
    """Picks rows."""
    return GridCells(*(x[index] for x in self))


class Shape(NamedTuple):
  """Static sizes of a tile.

  Attributes:
    rows: R.
    token_budget: N.
    width: W.
    scored: scored columns of a row.
  """

  rows: int
  token_budget: int
  width: int
  scored: int


@flax.struct.dataclass
class PackedBatch:
  """Rows that enter after one layer.

  Attributes:
    entry: [] int32 that layer.
    cell_ids: [R] int32 corrupted row (case * draws + draw) that a row goes on from.
    token: [R] int32 its first column t.
    stop: [R] int32 one past the last layer restored at t.
    rows: the columns from t on.
    outputs: the scored places.
    label: [K] int32 token scored there.
  """

  entry: Array
  cell_ids: Array
  token: Array
  stop: Array
  rows: PackedSequences
  outputs: OutputTokens
  label: Array


def grid_cells(
    restoration: Restoration,
    tokens: Sequence[Sequence[int]],
    draws: int,
    layers: int,
) -> GridCells:
  """Lists the rows of a group that must be run.

  Args:
    restoration: what is restored.
    tokens: the restored columns of every case.
    draws: n.
    layers: L.

  Returns:
    Rows by entry layer, case, token and draw.
  """
  windows = np.array([restoration.layers(i, layers) for i in range(layers)])
  rows = np.array(
      [
          (windows[layer, 0], case, token, draw, layer, windows[layer, 1])
          for layer in range(layers)
          for case, columns in enumerate(tokens)
          for token in columns
          for draw in range(draws)
      ],
      np.int32,
  ).reshape(-1, 6)
  rows = rows[np.argsort(rows[:, 0], kind='stable')]
  entry, case, token, draw, layer, stop = rows.T
  return GridCells(case, draw, token, layer, entry, stop)


def choose_budget(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], most: int
) -> int:
  """Finds the number of places that leaves fewest empty.

  Args:
    groups: (lengths, entry layers) of the rows of every group.
    most: places at most, unless one row is longer.

  Returns:
    N.
  """
  counts = [np.bincount(entry, lengths) for lengths, entry in groups]
  totals = [int(total) for count in counts for total in count if total]
  longest = max((int(x.max()) for x, _ in groups if len(x)), default=1)
  if not totals:
    return longest
  # A tile ends at a row's end, so up to a row's length of it stays empty.
  slack = longest - 1
  sizes = range(max(16, most // 3), max(most, 17), 16)

  def padded(size: int) -> int:
    return (size + slack) * sum(-(-total // size) for total in totals)

  return min(min(sizes, key=padded) + slack, max(totals))


def packed(
    mine: GridCells,
    shape: Shape,
    *,
    lengths: np.ndarray,
    labels: Sequence[np.ndarray],
    draws: int,
) -> PackedBatch:
  """Builds a tile.

  Args:
    mine: its rows, one of `packer.groups`.
    shape: of all tiles.
    lengths: [cases] tokens of a case.
    labels: the tokens scored in every case.
    draws: n.

  Returns:
    The tile; its scored places come in the order of the rows.
  """
  pad = lambda x: np.pad(np.asarray(x, np.int32), (0, shape.rows - len(x)))
  token, length = pad(mine.token), pad(lengths[mine.case] - mine.token)
  rows = packer.end_to_end(
      token, length, width=shape.width, token_budget=shape.token_budget
  )
  wanted = [labels[case] for case in mine.case]
  count = pad([len(x) for x in wanted])
  label = np.zeros(shape.rows * shape.scored, np.int32)
  label[: count.sum()] = np.concatenate(wanted)
  return PackedBatch(
      entry=np.int32(mine.entry[0]),
      cell_ids=pad(mine.case * draws + mine.draw),
      token=token,
      stop=pad(mine.stop),
      rows=rows,
      outputs=packer.select(
          rows, length - count, count, width=shape.scored, budget=len(label)
      ),
      label=label,
  )
