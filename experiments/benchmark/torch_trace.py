"""Causal tracing as published, in PyTorch: what `causal_trace` is timed against.

A grid cell is a forward pass of the whole prompt in n + 1 rows through all layers,
with logits at every column: row 0 is clean, the others are corrupted, and hooks
write what is restored from row 0 into them. Nothing is kept between cells. A
severed part needs a pass more, for what it holds.

torch is imported when a function needs it. Source: Meng et al. 2022 (ROME, arXiv
2202.05262), appendix B.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark import torch_model
from jaxedit.trace import facts, results
from jaxedit.trace.causal import Case
from jaxedit.trace.restoration import Restoration
from jaxedit.types import Progress

_WARM = 2  # cells that are run before the clock starts


class GridCell(NamedTuple):
  """A cell of a grid.

  Attributes:
    case: which case.
    restoration: what is restored.
    token: the restored column.
    layer: the layer around which it is restored.
  """

  case: int
  restoration: Restoration
  token: int
  layer: int


def baseline(
    model: Any, found: results.FactTraces, *, count: int, progress: Progress
) -> dict[str, Any]:
  """Times the loop on some cells and compares it with a trace.

  Args:
    model: a transformers torch model.
    found: what the trace found.
    count: cells that are timed.
    progress: told of cells.

  Returns:
    Plain JSON types: 'cells' timed, 'seconds_a_cell' (mean over the cells of the
    trace, with 'spread', the standard error), 'seconds' all of those would take,
    'wall_ratio' and 'largest_difference' of a score.
  """
  config, cases = found.config, found.cases
  layers = model.config.num_hidden_layers
  rng = np.random.default_rng(config.seed)
  columns = [_columns(cases, one, config) for one in config.restorations]
  cells = []
  for number in range(count):
    kind = number % len(columns)  # evenly over restorations
    case, token = columns[kind][rng.integers(len(columns[kind]))]
    layer = int(rng.integers(layers))
    cells.append(GridCell(case, config.restorations[kind], token, layer))
  mode = facts.MODES[config.noise_mode]
  spent, scores = _run(model, cases, cells, mode, progress)
  grids = [found.traced[c.case].scores[c.restoration.name] for c in cells]
  ours = np.array([grid[c.token, c.layer] for grid, c in zip(grids, cells)])
  # Of some restorations the trace has more cells than of others.
  whole, square, total = 0.0, 0.0, 0
  for i, some in enumerate(columns):
    size = layers * len(some)
    mine = spent[i :: len(columns)]
    mine = mine if len(mine) > 1 else spent
    total += size
    whole += size * float(mine.mean())
    square += size**2 * float(mine.var(ddof=1)) / len(mine)
  return {
      'cells': len(cells),
      'seconds_a_cell': whole / total,
      'spread': square**0.5 / total,
      'seconds': whole,
      'wall_ratio': whole / found.seconds,
      'largest_difference': float(np.abs(ours - scores).max()),
  }


def _columns(
    cases: Sequence[Case], one: Restoration, config: facts.TraceConfig
) -> list[tuple[int, int]]:
  """(case, token) of all that a restoration was traced at."""
  if config.alone(one):
    return [(i, case.end - 1) for i, case in enumerate(cases)]
  return [(i, t) for i, case in enumerate(cases) for t in range(len(case.ids))]


def _run(
    model: Any,
    cases: Sequence[Case],
    cells: Sequence[GridCell],
    mode: str,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
  """([n] seconds, [n] scores) of the cells."""
  torch = torch_model.require()
  seconds, scores = [], []
  with progress('torch', len(cells), 'cell') as done, torch.no_grad():
    for cell in [*cells[:_WARM], *cells]:
      begin = time.perf_counter()
      case = cases[cell.case]
      logits = cell_logits(model, case, *cell[1:], mode=mode)
      p = torch.softmax(logits[1:, -1].float(), dim=-1)
      # The score is read by the host, so the device is done with it.
      scores.append(float(p[:, int(case.labels[0])].mean()))
      seconds.append(time.perf_counter() - begin)
      if len(seconds) > _WARM:
        done(1)
  return np.array(seconds[_WARM:]), np.array(scores[_WARM:])


def cell_logits(
    model: Any,
    case: Case,
    restoration: Restoration,
    token: int,
    layer: int,
    *,
    mode: str,
) -> Any:
  """[n + 1, T, V] logits of a clean row and of those that are restored."""
  layers = range(model.config.num_hidden_layers)
  changes: dict[tuple[int, str], Callable[[Any], None]] = {}

  def restore(x: Any) -> None:
    x[1:, token] = x[0, token]

  for k in range(*restoration.layers(layer, len(layers))):
    changes[k, restoration.part] = restore
  sever = restoration.sever
  if sever:
    kept: dict[int, Any] = {}

    def keep(k: int) -> Callable[[Any], None]:
      return lambda x: kept.update({k: x[1:, token].clone()})

    def hold(k: int) -> Callable[[Any], None]:
      return lambda x: x[1:, token].copy_(kept[k])

    run_logits(model, case, {(k, sever): keep(k) for k in layers}, mode=mode)
    changes |= {(k, sever): hold(k) for k in layers}
  return run_logits(model, case, changes, mode=mode)


def run_logits(
    model: Any,
    case: Case,
    changes: Mapping[tuple[int, str], Callable[[Any], None]],
    *,
    mode: str,
) -> Any:
  """[n + 1, T, V] logits of a clean row and of corrupted ones.

  Args:
    model: a transformers torch model.
    case: a prompt with its noise.
    changes: (layer, 'block' | 'mlp' | 'attn') -> changes that output in place.
    mode: 'add' noise to embeddings, or 'set' them to it.
  """
  torch = torch_model.require()
  noise = torch.tensor(case.noise, device=model.device)

  def corrupt(x: Any) -> None:
    here = x[1:, case.first : case.end]
    here.copy_(noise if mode == 'set' else here + noise)

  ids = torch.tensor(case.ids.astype(np.int64), device=model.device)
  with contextlib.ExitStack() as stack:
    tokens_at = {model.get_input_embeddings(): corrupt}
    for (layer, part), change in changes.items():
      tokens_at[torch_model.part(model, layer, part)] = change
    for module, change in tokens_at.items():
      handle = module.register_forward_hook(_hook(change))
      stack.callback(handle.remove)
    rows = ids.repeat(len(case.noise) + 1, 1)
    return model(input_ids=rows, use_cache=False).logits


def _hook(change: Callable[[Any], None]) -> Callable[..., None]:
  def hook(module: Any, inputs: Any, output: Any) -> None:
    del module, inputs
    change(output[0] if isinstance(output, tuple) else output)

  return hook
