"""Causal tracing of many facts at once.

A clean run keeps every activation; in n corrupted runs the embeddings of some
tokens are noise. Restoring one activation (t, l) of the clean run in a corrupted
one gives back part of the answer's probability, the indirect effect:

  high = p(answer | clean)    low = mean over draws of p(answer | corrupted)
  score(t, l) = the same, with the activation restored    IE = score - low

Every cell of the grid is a tail of the corrupted run (see `tail`); cells, draws
and facts lie side by side. Cells that nothing can change are filled in without
being run: tokens before the corrupted ones score `low`.

Several tokens can be scored at once, for answers of more than one. The score of
a draw is then their geometric mean, exp(mean log p), which is the probability
itself for one token.

Axis letters: K scored tokens, n draws; the others as in `jaxedit.types`.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1 and appendix B.
Their code computes the corrupted score of replaced embeddings by addition; here
all corrupted runs are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.trace import cells as cells_lib
from jaxedit.trace import tail
from jaxedit.trace.kinds import Kind
from jaxedit.types import Params, Progress, silent

# Tokens that a device runs at a time; and memory for the tables of a group.
_PLACES = {'cpu': 1024}
_ACCELERATOR_PLACES = 8192
_TABLE_BYTES = 2 * 2**30
# Prompts are padded to a multiple of so many tokens, long ones to an eighth of a
# power of two: every width is a program.
_STEP = 4


class Case(NamedTuple):
  """A prompt to trace.

  Attributes:
    ids: [T] int32.
    first: first corrupted token.
    end: one past the last corrupted token.
    noise: [n, end - first, D] what their embeddings get.
    labels: [K] int32 tokens that are scored, at the last K columns; none for
      what the clean model holds most probable after the last one.
  """

  ids: np.ndarray
  first: int
  end: int
  noise: np.ndarray
  labels: np.ndarray = np.zeros(0, np.int32)


class Traced(NamedTuple):
  """What a trace found.

  Attributes:
    labels: [K] int32 what was scored.
    high: score of the clean model.
    low: score with nothing restored, mean over draws.
    scores: kind -> [T, L] f64 mean over draws; NaN where it was not asked for.
  """

  labels: np.ndarray
  high: float
  low: float
  scores: dict[str, np.ndarray]


class Prediction(NamedTuple):
  """What a model holds most probable next.

  Attributes:
    token: [E] int32.
    probability: [E].
  """

  token: np.ndarray
  probability: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Group:
  """Cases of one padded length, whose tables are held at one time."""

  indices: tuple[int, ...]
  width: int
  size: int


def predict(
    spec: ModelSpec,
    params: Params,
    rows: Sequence[np.ndarray],
    *,
    batch_rows: int = 64,
) -> Prediction:
  """Finds the most probable next token of prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    rows: [T] ids a prompt.
    batch_rows: prompts run at once.

  Returns:
    The predictions.
  """
  token = np.zeros(len(rows), np.int32)
  probability = np.zeros(len(rows))
  lengths = np.array([len(row) for row in rows])
  for group in _groups(lengths, batch_rows):
    ids, valid = padded(
        [rows[i] for i in group.indices], group.size, group.width
    )
    best, logprob = _next(spec, params, ids, valid)
    index = list(group.indices)
    token[index] = np.asarray(best)[: len(index)]
    probability[index] = np.exp(np.asarray(logprob)[: len(index)])
  return Prediction(token, probability)


@functools.partial(jax.jit, static_argnames=('spec',))
def _next(
    spec: ModelSpec, params: Params, ids: Any, valid: Any
) -> tuple[Any, Any]:
  """([G] most probable next token, [G] its log-probability)."""
  columns = decoder.token_columns(valid)
  h = decoder.embed(spec, params, ids, columns)
  h, _ = decoder.run_layers(spec, params, h, columns, start=0, stop=spec.layers)
  last = jnp.sum(valid, axis=1) - 1
  h = jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]
  _, best = decoder.label_logprob(spec, params, h, jnp.zeros_like(last))
  return best, decoder.label_logprob(spec, params, h, best)[0]


def trace(
    spec: ModelSpec,
    params: Params,
    cases: Sequence[Case],
    *,
    kinds: Sequence[Kind],
    mode: str = 'add',
    tokens: Sequence[Sequence[int]] | None = None,
    places: int | None = None,
    progress: Progress = silent,
) -> list[Traced]:
  """Traces prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    cases: prompts with their noise, all of as many draws.
    kinds: what to restore.
    mode: 'add' noise to embeddings, or 'set' them to it.
    tokens: the columns to restore in every case, none right of the first
      scored one; None for all of these.
    places: columns run at a time; chosen for the device unless given.
    progress: told of cells.

  Returns:
    One result a case.

  Raises:
    ValueError: cases that cannot be traced.
  """
  kinds = tuple(kinds)
  _check(spec, cases, kinds, mode)
  if not cases:
    return []
  cases = _labelled(spec, params, cases)
  wanted = _wanted(cases, tokens)
  places = places or _PLACES.get(jax.default_backend(), _ACCELERATOR_PLACES)
  lengths = np.array([len(case.ids) for case in cases])
  size = _group_size(spec, params, cases, kinds)
  found = [Traced(case.labels, np.nan, np.nan, {}) for case in cases]
  total = len(kinds) * spec.layers * sum(map(len, wanted))
  with progress('trace', total, 'cell') as done:
    for same in _by_width(_groups(lengths, size)):
      job = _Job(spec, params, cases, wanted, kinds, mode, places)
      for index, result in job.run(same, done):
        found[index] = result
  return found


def _check(
    spec: ModelSpec, cases: Sequence[Case], kinds: Sequence[Kind], mode: str
) -> None:
  """Refuses what cannot be traced."""
  if mode not in ('add', 'set'):
    raise ValueError(f"mode {mode!r}: one of 'add', 'set'")
  if len({kind.name for kind in kinds}) != len(kinds):
    raise ValueError('two kinds have one name')
  for kind in kinds:
    if kind.window < 1 or kind.window > 1 and kind.part == 'block':
      raise ValueError(f'{kind}: a window has layers, and a block has one')
    if kind.sever and kind.part != 'block':
      raise ValueError(f'{kind}: severing goes with a restored block')
  draws = {len(case.noise) for case in cases}
  if len(draws) > 1 or 0 in draws:
    raise ValueError('all cases need as many draws of noise, at least one')
  for number, case in enumerate(cases):
    for fault in _faults(spec, case):
      raise ValueError(f'case {number}: {fault}')


def _faults(spec: ModelSpec, case: Case) -> Iterator[str]:
  """What keeps a case from being traced."""
  length, count = len(case.ids), case.end - case.first
  if not 0 <= case.first < case.end <= length:
    yield f'corrupts tokens {case.first} to {case.end - 1} of {length}'
  if case.noise.shape[1:] != (count, spec.width):
    yield (
        f'noise [n, {case.noise.shape[1:]}], but {count} tokens of width'
        f' {spec.width} are corrupted'
    )
  if len(case.labels) > length:
    yield 'more labels than tokens'
  if spec.max_positions and length > spec.max_positions:
    yield f'{length} tokens, but the model takes {spec.max_positions}'
  if length and not 0 <= np.min(case.ids) <= np.max(case.ids) < spec.vocab:
    yield f'ids outside of the vocabulary of {spec.vocab}'


def _labelled(
    spec: ModelSpec, params: Params, cases: Sequence[Case]
) -> list[Case]:
  """Gives cases without labels the clean model's answer."""
  bare = [i for i, case in enumerate(cases) if not len(case.labels)]
  found = predict(spec, params, [cases[i].ids for i in bare]).token
  cases = list(cases)
  for i, token in zip(bare, found):
    cases[i] = cases[i]._replace(labels=np.array([token], np.int32))
  return cases


def _wanted(
    cases: Sequence[Case], tokens: Sequence[Sequence[int]] | None
) -> list[list[int]]:
  """The columns to restore in every case."""
  if tokens is None:
    return [list(range(len(case.ids) - len(case.labels) + 1)) for case in cases]
  if len(tokens) != len(cases):
    raise ValueError(f'columns for {len(tokens)} of {len(cases)} cases')
  wanted = [sorted(set(columns)) for columns in tokens]
  for number, (case, columns) in enumerate(zip(cases, wanted)):
    last = len(case.ids) - len(case.labels)
    if columns and not 0 <= columns[0] <= columns[-1] <= last:
      raise ValueError(
          f'case {number}: columns {columns}; those from 0 to {last} can be'
          ' restored, the first scored one'
      )
  return wanted


def _groups(lengths: np.ndarray, size: int) -> list[_Group]:
  """Puts cases of like length together, in groups of one size."""
  power = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
  step = np.maximum(_STEP, 2 ** np.maximum(power - 3, 0))
  width = -(-lengths // step) * step
  groups = []
  for w in np.unique(width):
    mine = np.flatnonzero(width == w)
    count = -(-len(mine) // size)
    each = -(-len(mine) // count)
    for begin in range(0, len(mine), each):
      indices = tuple(int(i) for i in mine[begin : begin + each])
      groups.append(_Group(indices, int(w), each))
  return groups


def _by_width(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
  """Groups whose shapes are shared."""
  for width in sorted({group.width for group in groups}):
    yield [group for group in groups if group.width == width]


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
  ids = np.zeros((count, width), np.int32)
  valid = np.zeros((count, width), bool)
  valid[:, 0] = True
  for i, row in enumerate(rows):
    ids[i, : len(row)], valid[i, : len(row)] = row, True
  return ids, valid


def _group_size(
    spec: ModelSpec, params: Params, cases: Sequence[Case], kinds: Any
) -> int:
  """Cases whose tables are held at one time."""
  longest = max(len(case.ids) for case in cases)
  store = params['layers']['attn']['k']['kernel'].dtype.itemsize
  tables = len(tail.parts_of(kinds)) + any(k.part == 'attn' for k in kinds)
  column = 4 * spec.width * tables
  column += 2 * store * spec.kv_heads * spec.head_size
  each = len(cases[0].noise) * longest * spec.layers * column
  return max(1, _TABLE_BYTES // each)


@dataclasses.dataclass(frozen=True)
class _Job:
  """What all groups of a trace have in common."""

  spec: ModelSpec
  params: Params
  cases: Sequence[Case]
  wanted: Sequence[Sequence[int]]
  kinds: tuple[Kind, ...]
  mode: str
  places: int

  @property
  def draws(self) -> int:
    return len(self.cases[0].noise)

  def run(
      self, groups: Sequence[_Group], done: Any
  ) -> Iterator[tuple[int, Traced]]:
    """Traces groups of one width."""
    plans = {k.name: self._plan(groups, k) for k in self.kinds}
    for number, group in enumerate(groups):
      mine = [self.cases[i] for i in group.indices]
      found = self._tables(group, mine)
      high, low = np.asarray(found.high), np.asarray(found.low)
      low = low.reshape(group.size, self.draws, -1)
      scores = {}
      for kind in self.kinds:
        shape, rows = plans[kind.name]
        scores[kind.name] = self._grid(
            group, found, kind, low, (shape, *rows[number])
        )
        done(self.spec.layers * sum(len(self.wanted[i]) for i in group.indices))
      for i, (index, case) in enumerate(zip(group.indices, mine)):
        k = len(case.labels)
        yield index, Traced(
            labels=case.labels,
            high=float(_score(high[i, :k])),
            low=float(np.mean(_score(low[i, :, :k]))),
            scores={name: grid[i] for name, grid in scores.items()},
        )

  def _tables(self, group: _Group, mine: Sequence[Case]) -> tail.Tables:
    """Runs a group clean and corrupted."""
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
    return tail.tables(
        self.spec,
        self.params,
        ids,
        valid,
        noise,
        corrupted=corrupted,
        scored=scored,
        labels=labels,
        mode=self.mode,
        parts=tail.parts_of(self.kinds),
        entries='attn' in {kind.part for kind in self.kinds},
    )

  def _plan(self, groups: Sequence[_Group], kind: Kind) -> Any:
    """(shape of all tiles, (rows, their lengths, tiles) of every group)."""
    rows = [self._rows(group, kind) for group in groups]
    sizes = [(length, mine.entry) for mine, length in rows]
    places = cells_lib.choose_places(sizes, self.places)
    parts = [
        cells_lib.pack(length, mine.entry, places) for mine, length in rows
    ]
    most = max((p.stop - p.start for part in parts for p in part), default=1)
    shape = cells_lib.Shape(
        rows=most,
        places=places,
        width=max((int(x.max()) for x, _ in sizes if len(x)), default=1),
        scored=max(len(case.labels) for case in self.cases),
    )
    return shape, [(mine, part) for (mine, _), part in zip(rows, parts)]

  def _rows(self, group: _Group, kind: Kind) -> tuple[cells_lib.Cells, Any]:
    """The rows of a group that can change, and their lengths."""
    tokens = [
        [t for t in self.wanted[i] if t >= self.cases[i].first]
        for i in group.indices
    ]
    rows = cells_lib.cells(kind, tokens, self.draws, self.spec.layers)
    rows = rows.take(np.flatnonzero(rows.entry < self.spec.layers - 1))
    lengths = np.array([len(self.cases[i].ids) for i in group.indices])
    return rows, lengths[rows.case] - rows.token

  def _grid(
      self,
      group: _Group,
      found: tail.Tables,
      kind: Kind,
      low: np.ndarray,
      plan: tuple[cells_lib.Shape, cells_lib.Cells, Sequence[slice]],
  ) -> list[np.ndarray]:
    """[T, L] scores of every case of a group."""
    shape, rows, parts = plan
    mine = [self.cases[i] for i in group.indices]
    lengths = np.array([len(case.ids) for case in mine])
    labels = [case.labels for case in mine]
    total = [
        np.zeros((len(x), self.spec.layers)) for x in (c.ids for c in mine)
    ]
    pending, how = [], tail.how_of(kind)
    for part, tile in cells_lib.tiles(
        rows, parts, shape, lengths=lengths, labels=labels, draws=self.draws
    ):
      out = tail.tails(self.spec, self.params, found, tile, how=how)
      pending.append((part, out))
    for part, out in pending:
      here = rows.take(np.arange(part.start, part.stop))
      counts = np.array([len(labels[case]) for case in here.case])
      out = np.asarray(out, np.float64)[: counts.sum()]
      means = np.add.reduceat(out, np.cumsum(counts) - counts) / counts
      for case in np.unique(here.case):
        at = here.case == case
        np.add.at(
            total[case],
            (here.token[at], here.layer[at]),
            np.exp(means[at]) / self.draws,
        )
    self._fill(group, found, kind, low, total)
    return total

  def _fill(
      self,
      group: _Group,
      found: tail.Tables,
      kind: Kind,
      low: np.ndarray,
      total: list[np.ndarray],
  ) -> None:
    """Fills in the cells that were not run."""
    layers = self.spec.layers
    entry = np.array([kind.layers(i, layers)[0] for i in range(layers)])
    at_edge = entry == layers - 1
    edge = self._edge(group, found, kind, low) if at_edge.any() else None
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
      self, group: _Group, found: tail.Tables, kind: Kind, low: np.ndarray
  ) -> list[float]:
    """Scores of restoring the first scored column in the last layer."""
    mine = [self.cases[i] for i in group.indices]
    first = np.zeros(group.size, np.int32)
    label = np.zeros(group.size, np.int32)
    for i, case in enumerate(mine):
      first[i], label[i] = len(case.ids) - len(case.labels), case.labels[0]
    spread = lambda x: np.repeat(x, self.draws)
    out = tail.edge(
        self.spec, self.params, found, spread(first), spread(label),
        part=kind.part,
    )  # fmt: skip
    low = np.array(low)
    low[:, :, 0] = np.asarray(out).reshape(group.size, self.draws)
    return [
        np.mean(_score(low[i, :, : len(case.labels)]))
        for i, case in enumerate(mine)
    ]


def _score(logprob: np.ndarray) -> np.ndarray:
  """exp of the mean over the last axis, f64."""
  return np.exp(np.mean(np.asarray(logprob, np.float64), axis=-1))
