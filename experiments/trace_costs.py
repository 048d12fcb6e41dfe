"""Counts the arithmetic of a trace by hand, and that of the obvious program.

  naive   every cell a run of the whole prompt through all layers, for the clean
          row and n corrupted ones, as in the program of Meng et al.
  here    one clean and n corrupted runs a fact (twice with severed kinds); a
          cell is n tails, columns from the restored one on, layers above the
          first restored one

Products with weights and of queries with keys are counted, as in `costs`; the
head at one column of each row here, at every column there. Not counted: padding,
norms, and the run that finds the answer. Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import costs
from experiments.trace_results import Found
from jaxedit.models.spec import ModelSpec
from jaxedit.trace.kinds import Kind


def work(
    spec: ModelSpec,
    found: Sequence[Found],
    kinds: Sequence[Kind],
    draws: int,
    last_only: bool = False,
) -> dict[str, Any]:
  """Counts the arithmetic of a trace and of computing every cell from scratch.

  From scratch, each cell is a run of the whole prompt through all layers for
  the clean row and every draw, as in the program of Meng et al. Here a cell is
  a tail: columns from the restored one on, layers above the first restored one.
  Products with weights and of queries with keys are counted, as in `costs`;
  padding is not.

  Args:
    spec: the architecture.
    found: the facts.
    kinds: what was restored, severed kinds at the last subject token alone.
    draws: n.
    last_only: whether all kinds were.

  Returns:
    {'cells', 'flops', 'naive_flops', 'ratio'}.
  """
  runs = np.zeros(4)  # tokens x layers, pairs x layers, scored rows, cells
  naive = np.zeros(4)
  # Severed kinds are a trace of their own, see `trace_stages.trace`.
  alone = lambda kind: last_only or kind.sever is not None
  passes = len({alone(kind) for kind in kinds})
  for one in found:
    length = len(one.ids)
    pairs = length * (length + 1) / 2
    whole = np.array([length * spec.layers, pairs * spec.layers, 1.0, 0])
    runs += passes * (1 + draws) * whole
    for kind in kinds:
      mine = (one.span[1] - 1,) if alone(kind) else range(length)
      runs += _tails(spec, kind, mine, first=one.span[0], length=length) * draws
      count = len(mine) * spec.layers
      # One more run tells the score with nothing restored.
      every = whole * [1, 1, length, 0]  # logits of all columns
      naive += (1 + draws) * (1 + count) * every + [0, 0, 0, count]
  flops, scratch = _flops(spec, runs), _flops(spec, naive)
  return {
      'cells': int(naive[3]),
      'flops': flops,
      'naive_flops': scratch,
      'ratio': scratch / flops if flops else None,
  }


def _tails(
    spec: ModelSpec,
    kind: Kind,
    tokens: Sequence[int],
    *,
    first: int,
    length: int,
) -> np.ndarray:
  """What the cells of a kind cost a draw, as `work` counts it."""
  entry = np.array([kind.layers(i, spec.layers)[0] for i in range(spec.layers)])
  layers = float((spec.layers - 1 - entry).sum())
  total = np.zeros(4)
  for token in tokens:
    if token >= first:
      columns = length - token
      pairs = sum(range(token + 1, length + 1))
      total += [
          columns * layers,
          pairs * layers,
          float((entry < spec.layers - 1).sum()),
          0,
      ]
  if kind.part == 'attn':  # an MLP more at every token, see `trace.tail`
    share = costs.layer_weights(spec, 'mlp') / costs.layer_weights(spec)
    total[0] += share * length * spec.layers
  return total


def _flops(spec: ModelSpec, counted: np.ndarray) -> float:
  tokens, pairs, scored, _ = counted
  return float(
      2 * tokens * costs.layer_weights(spec)
      + 2 * scored * costs.head_weights(spec)
      + costs.attention_flops(spec, pairs, 1)
  )
