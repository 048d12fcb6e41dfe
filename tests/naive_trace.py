"""Causal tracing as it is defined, in plain torch: the oracle of its tests.

A cell is a full forward of n + 1 equal prompts, of which row 0 stays clean and
rows 1 to n are corrupted at the output of the token embedding; hooks write what
is restored. Nothing is kept from one cell to the next, and there is no padding.
Used by tests only.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1 and appendix B.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import naive_oracle
import numpy as np
import torch

# (layer, 'block' | 'mlp' | 'attn') -> what becomes of that output [n + 1, T, D]
Changes = Mapping[tuple[int, str], Callable[[torch.Tensor], torch.Tensor]]


class Ends(NamedTuple):
  """What a case gives when nothing is restored."""

  labels: np.ndarray
  high: float
  low: float


def depth(model: Any) -> int:
  """Number of layers."""
  return model.config.num_hidden_layers


def span(kind: Any, layer: int, layers: int) -> list[int]:
  """Layers that a kind restores around one."""
  below, above = kind.window // 2, -(-kind.window // 2)
  return [k for k in range(layer - below, layer + above) if 0 <= k < layers]


def ends(model: Any, case: Any, mode: str = 'add') -> Ends:
  """Scores the clean and the corrupted run.

  Args:
    model: the transformers model.
    case: ids, first, end, noise and labels as `jaxedit.trace.causal.Case`.
    mode: whether the noise is added to the embeddings or 'set' in their place.

  Returns:
    The labels, and both scores.
  """
  rows = _run(model, case, mode, {})
  labels = np.asarray(case.labels)
  if not len(labels):
    labels = rows[0, -1:].argmax(-1).numpy()
  scores = _score(rows, labels)
  return Ends(labels, float(scores[0]), float(scores[1:].mean()))


def scores(
    model: Any,
    case: Any,
    kind: Any,
    *,
    mode: str = 'add',
    cells: Iterable[tuple[int, int]] | None = None,
) -> np.ndarray:
  """Scores cells of one kind.

  Args:
    model: the transformers model.
    case: as `ends` takes it.
    kind: name, part, window and sever as `jaxedit.trace.kinds.Kind`.
    mode: as `ends` takes it.
    cells: (token, layer) pairs; all of them if None.

  Returns:
    [T, L] f64, NaN where there is no such cell.
  """
  labels = case.labels if len(case.labels) else ends(model, case, mode).labels
  table = np.full((len(case.ids), depth(model)), np.nan)
  for t, l in np.ndindex(table.shape) if cells is None else cells:
    table[t, l] = _score(_cell(model, case, kind, mode, (t, l)), labels)[
        1:
    ].mean()
  return table


def _cell(
    model: Any, case: Any, kind: Any, mode: str, cell: tuple[int, int]
) -> torch.Tensor:
  """Runs one cell; log-probabilities [n + 1, T, V]."""
  token, layer = cell
  layers = range(depth(model))
  changes = {}

  def restore(x):
    x[1:, token] = x[0, token]
    return x

  for k in span(kind, layer, len(layers)):
    changes[k, kind.part] = restore
  if kind.sever is None:
    return _run(model, case, mode, changes)

  corrupted: dict[int, torch.Tensor] = {}

  def outputs(k):
    return lambda x: corrupted.setdefault(k, x.clone())

  def hold(k):
    def held(x):
      x[1:, token] = corrupted[k][1:, token]
      return x

    return held

  _run(model, case, mode, {(k, kind.sever): outputs(k) for k in layers})
  changes |= {(k, kind.sever): hold(k) for k in layers}
  return _run(model, case, mode, changes)


def _run(model: Any, case: Any, mode: str, changes: Changes) -> torch.Tensor:
  """Runs 1 clean and n corrupted rows; log-probabilities [n + 1, T, V]."""
  noise = torch.tensor(case.noise)
  ids = torch.tensor(np.asarray(case.ids).astype(np.int64))

  def corrupt(x):
    here = x[1:, case.first : case.end]
    new = noise.to(x.dtype)
    x[1:, case.first : case.end] = here + new if mode == 'add' else new
    return x

  with contextlib.ExitStack() as stack:
    places = {model.get_input_embeddings(): corrupt}
    for (layer, part), change in changes.items():
      places[naive_oracle.part(model, layer, part)] = change
    for module, change in places.items():
      copied = lambda x, change=change: change(x.clone())
      stack.enter_context(naive_oracle.hooked(module, copied))
    stack.enter_context(torch.no_grad())
    tokens = ids.repeat(1 + len(noise), 1)
    logits = model(input_ids=tokens, use_cache=False).logits
  return torch.log_softmax(logits.double(), dim=-1)


def _score(rows: torch.Tensor, labels: np.ndarray) -> np.ndarray:
  """Mean probability, geometric, of K labels at the last K columns: [rows]."""
  where = torch.tensor(np.asarray(labels).astype(np.int64))
  found = rows[:, -len(where) :].gather(
      2, where[None, :, None].expand(len(rows), -1, 1)
  )
  return found[..., 0].mean(1).exp().numpy()
