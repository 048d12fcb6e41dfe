"""Every closed-form row in plain torch and numpy, from the papers' formulas.

Weights are really written before the next layer is read, every text is a full
forward of its own, and all systems are dense and F x F (or have the keys'
number, where the paper has it so). Used by tests only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import naive_oracle
import numpy as np
import torch

from jaxedit.text.encoding import EncodedEdit


class Keys(NamedTuple):
  """Keys of one layer, as rows."""

  mean: np.ndarray  # [M, F]
  plain: np.ndarray  # [M, F]
  preserved: np.ndarray  # [P, F]


class Row(NamedTuple):
  """One method: how a layer's change follows from keys and residuals."""

  solve: Callable[[np.ndarray, Keys, np.ndarray], np.ndarray]
  plain: float | None = 0.5
  output: str = 'block'
  measured: str = 'plain'
  share: Callable[[int], float] = lambda left: 1 / left
  # (change, kernel) -> what is written of it
  shape: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, w: x


def memit(weight: float) -> Row:
  """(lambda C + K_all K_all^T)^-1 K R."""

  def solve(gram, keys, residuals):
    every = np.concatenate([keys.mean, keys.preserved])
    a = weight * gram + every.T @ every
    return np.linalg.solve(a, keys.mean.T @ residuals)

  return Row(solve)


def rome(
    plain: float | None = None, constraint: str = 'plain', **how: Any
) -> Row:
  """C^-1 k* (z - o) / (k_b C^-1 k*), for several facts all at once."""

  def solve(gram, keys, residuals):
    every = np.concatenate([keys.mean, keys.preserved])
    asked = keys.plain if constraint == 'plain' else keys.mean
    asked = np.concatenate([asked, keys.preserved])
    u = np.linalg.solve(gram, every.T)
    wanted = np.concatenate(
        [residuals, np.zeros((len(keys.preserved), residuals.shape[1]))]
    )
    return u @ np.linalg.solve(asked @ u, wanted)

  return Row(solve, plain=plain, output='mlp', **how)


def emmet(weight: float, ridge: float, lone: float = 0.0) -> Row:
  """B^-1 K (K^T B^-1 K + mu I)^-1 R."""

  def solve(gram, keys, residuals):
    every = np.concatenate([keys.mean, keys.preserved])
    b = np.linalg.solve(weight * gram, every.T)
    mu = ridge if len(keys.mean) > 1 else lone
    small = every @ b + mu * np.eye(len(every))
    wanted = np.concatenate(
        [residuals, np.zeros((len(keys.preserved), residuals.shape[1]))]
    )
    return b @ np.linalg.solve(small, wanted)

  return Row(solve)


def pmet(weight: float) -> Row:
  return memit(weight)._replace(
      output='mlp', share=lambda left: 1 / np.sqrt(left)
  )


def alphaedit(share: float, ridge: float) -> Row:
  """(P (K_all K_all^T) + L I)^-1 P K R, P of the smallest eigenvectors."""

  def solve(gram, keys, residuals):
    size, vectors = np.linalg.eigh(gram)
    preserved = np.cumsum(size[::-1]) >= share * size.sum()
    free = vectors[:, : len(size) - 1 - int(preserved.argmax())]
    project = free @ free.T
    every = np.concatenate([keys.mean, keys.preserved])
    a = project @ (every.T @ every) + ridge * np.eye(len(gram))
    return np.linalg.solve(a, project @ keys.mean.T @ residuals)

  return Row(solve)


def text(edit: EncodedEdit, c: int, whole: bool) -> np.ndarray:
  """What keys are read from."""
  end = edit.target if whole else edit.target[:-1]
  return np.concatenate([edit.rows[c], end])


def read(
    model: Any, edit: EncodedEdit, layer: int, whole: bool
) -> list[np.ndarray]:
  """Input of the second MLP matrix, [T, F] a context."""
  seen = []
  hook = lambda _, inputs: seen.append(inputs[0][0].double().numpy())
  handle = naive_oracle.down(model, layer).register_forward_pre_hook(hook)
  with torch.no_grad():
    for c in range(len(edit.rows)):
      naive_oracle.run(model, text(edit, c, whole))
  handle.remove()
  return seen


def anchors(edit: EncodedEdit, c: int) -> list[int]:
  return [edit.stage(k, c).anchor for k in range(edit.stages)]


def keys(
    model: Any, edits: Sequence[EncodedEdit], layer: int, row: Row, whole: bool
) -> Keys:
  """Keys of all edits in one layer."""
  mean, plain, preserved = [], [], []
  for edit in edits:
    found = read(model, edit, layer, whole)
    at = [x[anchors(edit, c)] for c, x in enumerate(found)]
    plain.append(at[0])
    weight = 1 / len(at) if row.plain is None else row.plain
    others = np.mean(at[1:], axis=0) if len(at) > 1 else at[0]
    mean.append(weight * at[0] + (1 - weight) * others)
    if whole:
      preserved.append(np.delete(found[0], anchors(edit, 0), axis=0))
  width = mean[0].shape[1]
  preserved = np.concatenate(preserved) if preserved else np.zeros((0, width))
  return Keys(np.concatenate(mean), np.concatenate(plain), preserved)


def states(
    model: Any, edits: Sequence[EncodedEdit], layer: int, row: Row
) -> np.ndarray:
  """What z is of, at the anchors, [M, D]."""
  module = naive_oracle.block(model, layer)
  module = module if row.output == 'block' else module.mlp
  found = []
  for edit in edits:
    mine = []
    for c in range(len(edit.rows) if row.measured == 'mean' else 1):
      seen = []
      outputs = lambda h: seen.append(h[0].double().numpy()) or h
      with naive_oracle.hooked(module, outputs), torch.no_grad():
        naive_oracle.run(model, text(edit, c, False))
      mine.append(seen[0][anchors(edit, c)])
    found.append(np.mean(mine, axis=0))
  return np.concatenate(found)


def write(
    model: Any,
    edits: Sequence[EncodedEdit],
    layers: Sequence[int],
    row: Row,
    *,
    z: np.ndarray,
    grams: Sequence[np.ndarray],
    whole: bool = False,
    prior: Sequence[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], np.ndarray, Any]:
  """Writes wanted states into a copy of a model, layer by layer.

  Returns:
    (the change of every layer's kernel [F, D]; [n + 1, M] distance to z before
    each layer and after the last, as a multiple of the first; the copy).
  """
  model = copy.deepcopy(model)
  changes, gaps = [], []

  def gap():
    gaps.append(z.astype(np.float64) - states(model, edits, layers[-1], row))
    return gaps[-1]

  for i, layer in enumerate(layers):
    found = keys(model, edits, layer, row, whole)
    if prior is not None:
      found = found._replace(
          preserved=np.concatenate([found.preserved, prior[i]])
      )
    residuals = gap() * row.share(len(layers) - i)
    kernel = naive_oracle.down(model, layer)
    linear = isinstance(kernel, torch.nn.Linear)
    weight = kernel.weight.T if linear else kernel.weight
    change = row.solve(grams[i], found, residuals)
    change = row.shape(change, weight.double().numpy())
    changes.append(change)
    with torch.no_grad():
      written = torch.tensor(change)
      kernel.weight += (written.T if linear else written).to(torch.float32)
  gap()
  length = np.linalg.norm(gaps, axis=-1)
  return changes, length / length[0], model
