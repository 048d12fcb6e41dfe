"""Counts the arithmetic of a trace by hand, and that of the obvious program.

  naive   every cell a run of the whole prompt through all layers, for the clean
          row and n corrupted ones, as in the program of Meng et al.
  here    one clean and n corrupted runs a fact (twice with severed parts); a
          cell is n partial runs: columns from the restored one on, layers above
          the first restored one

Counted are products with weights and of queries with keys; the head at one
column of each row here, at every column there. Not counted: padding, norms, and
the run that finds the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxedit.models import flops
from jaxedit.models.spec import ModelSpec
from jaxedit.trace.facts import TraceConfig
from jaxedit.trace.restoration import Restoration
from jaxedit.trace.results import FactTraces


def work(spec: ModelSpec, found: FactTraces) -> dict[str, Any]:
  """Counts the arithmetic of a trace.

  Args:
    spec: the architecture.
    found: what the trace found.

  Returns:
    {'cells', 'flops', 'naive_flops', 'ratio', 'seconds', 'flops_a_second'}.
  """
  counted = count(spec, found.config, found.facts)
  rate = counted['flops'] / found.seconds
  return counted | {'seconds': found.seconds, 'flops_a_second': rate}


def count(
    spec: ModelSpec, config: TraceConfig, facts: Sequence[Any]
) -> dict[str, Any]:
  """Counts the arithmetic that a trace of facts takes.

  Args:
    spec: the architecture.
    config: what is traced.
    facts: each with its `ids` and the `span` of its subject.

  Returns:
    {'cells', 'flops', 'naive_flops', 'ratio'}.
  """
  # Each counts (tokens x layers, pairs x layers, scored rows).
  ours, naive, cells = np.zeros(3), np.zeros(3), 0
  draws = config.draws
  # Severed parts are traced apart, see `fact_trace.trace_facts`.
  passes = len({config.alone(one) for one in config.restorations})
  for fact in facts:
    length, (first, end) = len(fact.ids), fact.span
    pairs = length * (length + 1) / 2
    whole = np.array([length * spec.layers, pairs * spec.layers, 1.0])
    ours += passes * (1 + draws) * whole
    for one in config.restorations:
      tokens = (end - 1,) if config.alone(one) else range(length)
      ours += draws * _partial(spec, one, tokens, first=first, length=length)
      count = len(tokens) * spec.layers
      # One more run gives the score with nothing restored; logits everywhere.
      naive += (1 + draws) * (1 + count) * whole * [1, 1, length]
      cells += count
  ours, naive = _flops(spec, ours), _flops(spec, naive)
  return {
      'cells': cells,
      'flops': ours,
      'naive_flops': naive,
      'ratio': naive / ours,
  }


def _partial(
    spec: ModelSpec,
    restoration: Restoration,
    tokens: Sequence[int],
    *,
    first: int,
    length: int,
) -> np.ndarray:
  """What the cells of a restoration cost a draw, as `work` counts it."""
  count = spec.layers
  entry = np.array([restoration.layers(i, count)[0] for i in range(count)])
  layers = float((count - 1 - entry).sum())
  scored = float((entry < count - 1).sum())
  total = np.zeros(3)
  for token in tokens:
    if token >= first:
      pairs = sum(range(token + 1, length + 1))
      total += [(length - token) * layers, pairs * layers, scored]
  if restoration.part == 'attn':  # an MLP more a token, see `partial_run`
    share = flops.layer_weights(spec, 'mlp') / flops.layer_weights(spec)
    total[0] += share * length * count
  return total


def _flops(spec: ModelSpec, counted: np.ndarray) -> float:
  tokens, pairs, scored = counted
  return float(
      2 * tokens * flops.layer_weights(spec)
      + 2 * scored * flops.head_weights(spec)
      + flops.attention_flops(spec, pairs, 1)
  )
