"""Causal tracing as it is defined, in plain torch: the oracle of its tests.

Every grid cell is a full forward pass with hooks, see
`experiments.benchmark.torch_trace`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmark import torch_trace


class Ends(NamedTuple):
  """What a case gives when nothing is restored."""

  labels: np.ndarray
  high: float
  low: float


def ends(model: Any, case: Any, mode: str = 'add') -> Ends:
  """Scores the clean and the corrupted run.

  Args:
    model: the transformers model.
    case: as `jaxedit.trace.causal.Case`.
    mode: whether the noise is added to the embeddings or 'set' in their place.
  """
  with torch.no_grad():
    rows = torch_trace.run_logits(model, case, {}, mode=mode)
  labels = np.asarray(case.labels)
  if not len(labels):
    labels = rows[0, -1:].argmax(-1).numpy()
  found = _score(rows, labels)
  return Ends(labels, float(found[0]), float(found[1:].mean()))


def scores(
    model: Any,
    case: Any,
    restoration: Any,
    *,
    mode: str = 'add',
    cells: Iterable[tuple[int, int]],
) -> np.ndarray:
  """Scores (token, layer) cells: [T, L] f64, NaN where there is no such cell."""
  labels = case.labels if len(case.labels) else ends(model, case, mode).labels
  table = np.full((len(case.ids), model.config.num_hidden_layers), np.nan)
  with torch.no_grad():
    for cell in cells:
      rows = torch_trace.cell_logits(model, case, restoration, *cell, mode=mode)
      table[cell] = _score(rows, labels)[1:].mean()
  return table


def _score(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
  """Mean probability, geometric, of K labels at the last K columns: [rows]."""
  where = torch.tensor(np.asarray(labels).astype(np.int64))
  rows = torch.log_softmax(logits.double(), dim=-1)
  found = rows[:, -len(where) :].gather(
      2, where[None, :, None].expand(len(rows), -1, 1)
  )
  return found[..., 0].mean(1).exp().numpy()
