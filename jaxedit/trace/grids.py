"""Runs the cells of groups of cases and fills their grids.

`grid_cells` lays cells out, `partial_run` runs them. Cells that nothing can
change are filled in:

  tokens before the corrupted ones         low
  last layer, other than the first scored  low
  last layer, first scored column          its head alone, `partial_run.edge`
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxedit.batching import packer
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.trace import grid_cells as cells_lib
from jaxedit.trace import partial_run
from jaxedit.trace.cases import Case, Traced
from jaxedit.trace.groups import Group, padded
from jaxedit.trace.restoration import Restoration
from jaxedit.types import Params

# Tiles that a device has waiting.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Grids:
  """What all groups of a trace have in common.

  Attributes:
    spec: the architecture.
    params: canonical parameters.
    cases: all cases, with labels.
    wanted: the columns to restore in every case.
    restorations: what to restore.
    mode: what the noise does.
    token_budget: columns run at a time.
  """

  spec: ModelSpec
  params: Params
  cases: Sequence[Case]
  wanted: Sequence[Sequence[int]]
  restorations: tuple[Restoration, ...]
  mode: str
  token_budget: int

  @property
  def draws(self) -> int:
    return len(self.cases[0].noise)

  def run(
      self, groups: Sequence[Group], done: Callable[[int], None]
  ) -> Iterator[tuple[int, Traced]]:
    """Traces groups of one width.

    Args:
      groups: the groups.
      done: told of cells.

    Yields:
      (case, its result).
    """
    plans = {r.name: self._plan(groups, r) for r in self.restorations}
    for number, group in enumerate(groups):
      found = self._tables(group)
      high, low = fetch(found.high), fetch(found.low)
      low = low.reshape(group.size, self.draws, -1)
      scores = {}
      cells = sum(len(self.wanted[i]) for i in group.indices)
      for one in self.restorations:
        shape, rows = plans[one.name]
        plan = (shape, *rows[number])
        total, reported = self._sum(group, found, one, plan, done)
        self._fill(group, found, one, low=low, total=total)
        scores[one.name] = total
        done(self.spec.layers * cells - reported)
      for i, index in enumerate(group.indices):
        case = self.cases[index]
        k = len(case.labels)
        yield index, Traced(
            labels=case.labels,
            high=float(_score(high[i, :k])),
            low=float(np.mean(_score(low[i, :, :k]))),
            scores={name: grid[i] for name, grid in scores.items()},
        )

  def _tables(self, group: Group) -> partial_run.Tables:
    """Runs a group clean and corrupted."""
    mine = [self.cases[i] for i in group.indices]
    ids, valid = padded([case.ids for case in mine], group.size, group.width)
    most = max(len(case.labels) for case in self.cases)
    noise = np.zeros(
        (group.size, self.draws, group.width, self.spec.width), np.float32
    )
    corrupted = np.zeros(ids.shape, bool)
    scored, labels = (np.zeros((group.size, most), np.int32) for _ in range(2))
    for i, case in enumerate(mine):
      noise[i, :, case.first : case.end] = case.noise
      corrupted[i, case.first : case.end] = True
      k = len(case.labels)
      scored[i, :k] = len(case.ids) - k + np.arange(k)
      labels[i, :k] = case.labels
    return partial_run.tables(
        self.spec, self.params, ids, valid, noise,
        corrupted=corrupted, scored=scored, labels=labels, mode=self.mode,
        parts=partial_run.parts_of(self.restorations),
        entries=any(one.part == 'attn' for one in self.restorations),
    )  # fmt: skip

  def _plan(self, groups: Sequence[Group], restoration: Restoration) -> Any:
    """(shape of all tiles, (rows, tiles) of every group)."""
    rows = [self._rows(group, restoration) for group in groups]
    sizes = [(length, mine.entry) for mine, length in rows]
    token_budget = cells_lib.choose_budget(sizes, self.token_budget)
    parts = [
        list(packer.groups(length[:, None], (token_budget,), kind=mine.entry))
        for mine, length in rows
    ]
    most = max((p.stop - p.start for part in parts for p in part), default=1)
    width = max((int(x.max()) for x, _ in sizes if len(x)), default=1)
    scored = max(len(case.labels) for case in self.cases)
    shape = cells_lib.Shape(most, token_budget, width, scored)
    return shape, [(mine, part) for (mine, _), part in zip(rows, parts)]

  def _rows(
      self, group: Group, restoration: Restoration
  ) -> tuple[cells_lib.GridCells, Any]:
    """The rows of a group that can change, and their lengths."""
    tokens = [
        [t for t in self.wanted[i] if t >= self.cases[i].first]
        for i in group.indices
    ]
    rows = cells_lib.grid_cells(
        restoration, tokens, self.draws, self.spec.layers
    )
    rows = rows.take(np.flatnonzero(rows.entry < self.spec.layers - 1))
    lengths = np.array([len(self.cases[i].ids) for i in group.indices])
    return rows, lengths[rows.case] - rows.token

  def _sum(
      self,
      group: Group,
      found: partial_run.Tables,
      restoration: Restoration,
      plan: tuple[cells_lib.Shape, cells_lib.GridCells, Sequence[slice]],
      done: Callable[[int], None],
  ) -> tuple[list[np.ndarray], int]:
    """([T, L] scores of the cells that are run, of every case; cells told)."""
    shape, rows, parts = plan
    mine = [self.cases[i] for i in group.indices]
    total = [np.zeros((len(x.ids), self.spec.layers)) for x in mine]
    lengths = np.array([len(case.ids) for case in mine])
    labels = [case.labels for case in mine]
    waiting: collections.deque[tuple[cells_lib.GridCells, Any]]
    waiting = collections.deque()
    program, reported = restoration.program, 0

    def add() -> int:
      here, out = waiting.popleft()
      counts = np.array([len(labels[case]) for case in here.case])
      out = fetch(out, np.float64)[: counts.sum()]
      means = np.add.reduceat(out, np.cumsum(counts) - counts) / counts
      for case in np.unique(here.case):
        at = here.case == case
        where = here.token[at], here.layer[at]
        np.add.at(total[case], where, np.exp(means[at]) / self.draws)
      done(len(counts) // self.draws)
      return len(counts) // self.draws

    for part in parts:
      here = rows.take(part)
      packed = cells_lib.packed(
          here, shape, lengths=lengths, labels=labels, draws=self.draws
      )
      out = partial_run.run_cells(
          self.spec, self.params, found, packed, restoration=program
      )
      waiting.append((here, out))
      if len(waiting) > _AHEAD:
        reported += add()
    while waiting:
      reported += add()
    return total, reported

  def _fill(
      self,
      group: Group,
      found: partial_run.Tables,
      restoration: Restoration,
      *,
      low: np.ndarray,
      total: list[np.ndarray],
  ) -> None:
    """Fills in the cells that were not run."""
    layers = self.spec.layers
    entry = np.array([restoration.layers(i, layers)[0] for i in range(layers)])
    at_edge = entry == layers - 1
    edge = self._edge(group, found, restoration, low) if at_edge.any() else None
    for i, index in enumerate(group.indices):
      case, grid = self.cases[index], total[i]
      k = len(case.labels)
      base = np.mean(_score(low[i, :, :k]))
      grid[: case.first] = base
      grid[:, at_edge] = base
      if edge is not None:
        grid[len(case.ids) - k, at_edge] = edge[i]
      missing = np.setdiff1d(np.arange(len(grid)), self.wanted[index])
      grid[missing] = np.nan

  def _edge(
      self,
      group: Group,
      found: partial_run.Tables,
      restoration: Restoration,
      low: np.ndarray,
  ) -> list[float]:
    """Scores of restoring the first scored column in the last layer."""
    counts = [len(self.cases[i].labels) for i in group.indices]
    first, label = np.zeros((2, group.size), np.int32)
    for i, index in enumerate(group.indices):
      first[i] = len(self.cases[index].ids) - counts[i]
      label[i] = self.cases[index].labels[0]
    spread = lambda x: np.repeat(x, self.draws)
    out = partial_run.edge(
        self.spec, self.params, found, spread(first), spread(label),
        part=restoration.part,
    )  # fmt: skip
    low = np.array(low)
    low[:, :, 0] = fetch(out).reshape(group.size, self.draws)
    return [np.mean(_score(low[i, :, :k])) for i, k in enumerate(counts)]


def _score(logprob: np.ndarray) -> np.ndarray:
  """exp of the mean over the last axis, f64."""
  return np.exp(np.mean(fetch(logprob, np.float64), axis=-1))
