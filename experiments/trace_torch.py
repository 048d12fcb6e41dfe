"""Causal tracing as published, in PyTorch: what `causal_trace` is timed against.

A cell is a forward pass of the whole prompt in n + 1 rows through all layers,
with logits at every column: row 0 is clean, the others are corrupted, and hooks
write what is restored from row 0 into them. Nothing is kept between cells. A
severed kind needs a pass more, for what it holds.

torch is imported when a function needs it. Source: Meng et al. 2022 (ROME, arXiv
2202.05262), appendix B.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import benchmark_torch
from jaxedit.trace.causal import Case
from jaxedit.trace.kinds import Kind
from jaxedit.types import InputError, Progress

_ATTENTION = ('self_attn', 'attn', 'attention')
_WARM = 2  # cells that are run before the clock starts


class Cell(NamedTuple):
  """A cell of a grid.

  Attributes:
    case: which case.
    kind: what is restored.
    token: the restored column.
    layer: the layer around which it is restored.
  """

  case: int
  kind: Kind
  token: int
  layer: int


class Timed(NamedTuple):
  """What the loop took.

  Attributes:
    seconds: [n] of every cell.
    scores: [n] of every cell.
  """

  seconds: np.ndarray
  scores: np.ndarray


def sample(
    cases: Sequence[Case],
    kinds: Sequence[Kind],
    layers: int,
    *,
    count: int,
    seed: int,
    last_only: bool = False,
) -> list[Cell]:
  """Draws cells, evenly over kinds.

  Args:
    cases: what was traced; severed kinds at the last corrupted token alone.
    kinds: what was restored.
    layers: L.
    count: cells in all.
    seed: of the draw.
    last_only: whether all kinds were.

  Returns:
    The cells; the longer a prompt, the more of its cells, as in the whole.
  """
  rng = np.random.default_rng(seed)
  columns = [
      (i, t) for i, case in enumerate(cases) for t in range(len(case.ids))
  ]
  last = [(i, case.end - 1) for i, case in enumerate(cases)]
  found = []
  for number in range(count):
    kind = kinds[number % len(kinds)]
    some = last if kind.sever or last_only else columns
    case, token = some[rng.integers(len(some))]
    found.append(Cell(case, kind, token, int(rng.integers(layers))))
  return found


def counts(
    cases: Sequence[Case],
    kinds: Sequence[Kind],
    layers: int,
    *,
    last_only: bool = False,
) -> dict[str, int]:
  """How many cells of every kind a trace has; see `sample`."""
  columns = sum(len(case.ids) for case in cases)
  return {
      kind.name: layers * (len(cases) if kind.sever or last_only else columns)
      for kind in kinds
  }


def run(
    model: Any,
    cases: Sequence[Case],
    cells: Sequence[Cell],
    *,
    mode: str,
    progress: Progress,
) -> Timed:
  """Times the loop.

  Args:
    model: a transformers torch model.
    cases: prompts with their noise and the one token that is scored.
    cells: what to run.
    mode: 'add' noise to embeddings, or 'set' them to it.
    progress: told of cells.

  Returns:
    Seconds and scores.
  """
  torch = benchmark_torch.require()
  seconds, scores = [], []
  with progress('torch', len(cells), 'cell') as done, torch.no_grad():
    for cell in [*cells[:_WARM], *cells]:
      begin = time.perf_counter()
      # The score is read by the host, so the device is done with it.
      scores.append(_score(torch, model, cases[cell.case], cell, mode))
      seconds.append(time.perf_counter() - begin)
      if len(seconds) > _WARM:
        done(1)
  return Timed(np.array(seconds[_WARM:]), np.array(scores[_WARM:]))


def _score(torch: Any, model: Any, case: Case, cell: Cell, mode: str) -> float:
  """Runs a cell."""
  kind, token = cell.kind, cell.token
  layers = range(model.config.num_hidden_layers)
  changes: dict[tuple[int, str], Callable[[Any], None]] = {}

  def restore(x: Any) -> None:
    x[1:, token] = x[0, token]

  for layer in range(*kind.layers(cell.layer, len(layers))):
    changes[layer, kind.part] = restore
  if kind.sever:
    kept: dict[int, Any] = {}

    def keep(layer: int) -> Callable[[Any], None]:
      return lambda x: kept.update({layer: x[1:, token].clone()})

    def hold(layer: int) -> Callable[[Any], None]:
      return lambda x: x[1:, token].copy_(kept[layer])

    _forward(
        torch, model, case, mode, {(k, kind.sever): keep(k) for k in layers}
    )
    changes |= {(k, kind.sever): hold(k) for k in layers}
  logits = _forward(torch, model, case, mode, changes)
  rows = torch.softmax(logits[1:, -1].float(), dim=-1)
  return float(rows[:, int(case.labels[0])].mean())


def _forward(
    torch: Any,
    model: Any,
    case: Case,
    mode: str,
    changes: Mapping[tuple[int, str], Callable[[Any], None]],
) -> Any:
  """[n + 1, T, V] logits of a clean row and of corrupted ones."""
  noise = torch.tensor(case.noise, device=model.device)

  def corrupt(x: Any) -> None:
    here = x[1:, case.first : case.end]
    here.copy_(noise if mode == 'set' else here + noise)

  ids = torch.tensor(case.ids.astype(np.int64), device=model.device)
  with contextlib.ExitStack() as stack:
    places = {model.get_input_embeddings(): corrupt}
    for (layer, part), change in changes.items():
      places[_part(model, layer, part)] = change
    for module, change in places.items():
      handle = module.register_forward_hook(_hook(change))
      stack.callback(handle.remove)
    rows = ids.repeat(len(case.noise) + 1, 1)
    return model(input_ids=rows, use_cache=False).logits


def _hook(change: Callable[[Any], None]) -> Callable[..., None]:
  def hook(module: Any, inputs: Any, output: Any) -> None:
    del module, inputs
    change(output[0] if isinstance(output, tuple) else output)

  return hook


def _part(model: Any, layer: int, part: str) -> Any:
  """The module whose output is 'block', 'mlp' or 'attn'."""
  block = benchmark_torch.block(model, layer)
  if part == 'block':
    return block
  for name in ('mlp',) if part == 'mlp' else _ATTENTION:
    with contextlib.suppress(AttributeError):
      return block.get_submodule(name)
  raise InputError(f'{type(model).__name__}: its {part} was not found')


def compare(
    cells: Sequence[Cell],
    timed: Timed,
    grids: Sequence[Mapping[str, np.ndarray]],
    *,
    seconds: float,
    totals: Mapping[str, int],
) -> dict[str, Any]:
  """Compares the loop with a trace.

  Args:
    cells: the cells of the loop.
    timed: what they took and gave.
    grids: kind -> [T, L] scores of every case.
    seconds: of the whole trace, compiled before.
    totals: kind -> cells of the trace.

  Returns:
    Plain JSON types: 'cells' timed, 'seconds_a_cell' (mean over the cells of the
    trace, with 'spread', the standard error), 'seconds' all of those would take,
    'wall_ratio' and 'largest_difference' of a score.
  """
  ours = np.array([grids[c.case][c.kind.name][c.token, c.layer] for c in cells])
  # Cells are drawn evenly over kinds, of which the trace has more or fewer.
  whole, square, names = 0.0, 0.0, np.array([c.kind.name for c in cells])
  for name, count in totals.items():
    some = timed.seconds[names == name]
    some = some if len(some) > 1 else timed.seconds
    whole += count * float(some.mean())
    square += count**2 * float(some.var(ddof=1)) / len(some)
  cells_in_all = sum(totals.values())
  return {
      'cells': len(cells),
      'seconds_a_cell': whole / cells_in_all,
      'spread': square**0.5 / cells_in_all,
      'seconds': whole,
      'wall_ratio': whole / seconds,
      'largest_difference': float(np.abs(ours - timed.scores).max()),
  }
