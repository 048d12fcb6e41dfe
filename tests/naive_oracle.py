"""Slow, obvious versions of the editing core, in plain torch and numpy.

No padding, no batching of edits, no caching: every row is a full forward of a
transformers model, changes of activations are hooks, changes of weights are
really written, and linear systems are dense. Used by tests only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hf_oracle
import naive_lbfgs
import numpy as np
import torch

from experiments.benchmark.torch_model import block, down, part
from jaxedit.models import loading
from jaxedit.targets import TargetConfig
from jaxedit.text.encoding import EncodedEdit


class Pair(NamedTuple):
  """One random model on both sides."""

  torch: Any
  spec: Any
  params: Any


@functools.cache
def pair(family: str, **changes: Any) -> Pair:
  """Makes a random torch model and loads it as canonical parameters."""
  # Rows are tiny; threads only wait for each other.
  torch.set_num_threads(1)
  model = hf_oracle.make(family, **changes)
  with tempfile.TemporaryDirectory() as folder:
    hf_oracle.save(model, folder)
    ours = loading.load_model(folder, 'float32')
  for parameter in model.parameters():
    parameter.requires_grad_(False)
  return Pair(model, ours.spec, ours.params)


@contextlib.contextmanager
def hooked(module: Any, function: Any) -> Iterator[None]:
  """Applies a function to the [1, T, D] output of a module while open."""

  def hook(_, inputs, output):
    del inputs
    if isinstance(output, tuple):
      return (function(output[0]), *output[1:])
    return function(output)

  handle = module.register_forward_hook(hook)
  try:
    yield
  finally:
    handle.remove()


def run(model: Any, ids: Sequence[int]) -> torch.Tensor:
  """Logits [T, V] of one unpadded row."""
  tokens = torch.tensor(np.asarray(ids)[None].astype(np.int64))
  return model(input_ids=tokens, use_cache=False).logits[0]


# What a change is added to -> the modules whose outputs it is added to.
SITES = {'block': ('block',), 'mlp': ('mlp',), 'attn+mlp': ('attn', 'mlp')}


def changed(
    model: Any, ids: Sequence[int], layer: int, changes: dict, output: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
  """Runs a row with changes at some columns: column -> one change a site.

  Returns:
    (log-probabilities [T, V], the sites' outputs [T, D] before the change).
  """
  seen = []

  def add(i, h):
    seen.append(h[0].detach().clone())
    h = h.clone()
    for column, change in changes.items():
      h[0, column] += change[i]
    return h

  with contextlib.ExitStack() as stack:
    for i, site in enumerate(SITES[output]):
      module = part(model, layer, site)
      stack.enter_context(hooked(module, functools.partial(add, i)))
    return torch.log_softmax(run(model, ids), dim=-1), seen


class Found(NamedTuple):
  """What the optimisation of one edit gave."""

  z: np.ndarray
  z0: np.ndarray
  losses: list[float]  # of every forward
  likelihood: float  # at z
  clamped: int  # changes that were too long after an update
  found: list[bool]  # for every forward, whether the labels came first
  terms: list[float]  # for every forward, the KL term as it weighs
  loss: float  # at z
  rejected: int  # trials of L-BFGS that were no steps


def _descend(
    evaluate: Any, inits: Sequence[torch.Tensor], config: TargetConfig
) -> tuple[Found, list[torch.Tensor]]:
  """Adam, or L-BFGS, on one change a site.

  Args:
    evaluate: changes -> (likelihood, divergence, whether the labels came first).
    inits: unedited outputs of the sites at the bare prompt's anchor.
    config: settings.

  Returns:
    (what happened, the changes).
  """
  deltas = [torch.zeros_like(x, requires_grad=True) for x in inits]
  adam = torch.optim.Adam(deltas, lr=config.rate)
  lbfgs = naive_lbfgs.Lbfgs(
      [x.norm().item() for x in inits], config.clamp, config.first_step
  )
  still = naive_lbfgs.Stagnation(config.stagnation, config.stagnation_steps)
  losses, found, terms, clamped = [], [], [], 0
  weight, kept = config.nll, None
  while True:
    likelihood, divergence, first = evaluate(deltas)
    term = config.kl * divergence
    loss = weight * likelihood + term
    for delta, init in zip(deltas, inits):
      loss = loss + config.decay * delta.norm() / init.norm() ** 2
    losses.append(loss.item())
    found.append(first)
    terms.append(term.item())
    stands = still.tell(losses[-1])
    following = config.nll * (0.1 if first else 1)
    renewed = bool(config.argmax_stop) and following != weight
    accepted, proposed = True, None
    adam.zero_grad()
    loss.backward()
    if config.solver == 'lbfgs':
      flat = lambda some: np.stack([x.detach().numpy() for x in some])
      gradient = flat([delta.grad for delta in deltas])
      proposed, accepted = lbfgs.tell(
          flat(deltas), losses[-1], gradient, renewed
      )
    if accepted:
      copies = [delta.detach().clone() for delta in deltas]
      kept = (copies, likelihood.item(), losses[-1])
      if renewed:
        weight, still.mark = following, np.inf
    if kept[2] < config.threshold or stands or len(losses) == config.steps:
      break
    if config.argmax_stop and accepted:
      if first and terms[-1] <= config.argmax_stop:
        break
    if proposed is not None:
      with torch.no_grad():
        for delta, value in zip(deltas, proposed):
          delta.copy_(torch.tensor(value))
      continue
    adam.step()
    with torch.no_grad():
      for delta, init in zip(deltas, inits):
        radius = config.clamp * init.norm()
        if delta.norm() > radius:
          clamped += 1
          delta.mul_(radius / delta.norm())
  deltas, likelihood, loss = kept
  z0 = inits[-1]
  z = (z0 + deltas[-1]).numpy()
  result = Found(
      z,
      z0.numpy(),
      losses,
      likelihood,
      clamped,
      found,
      terms,
      loss,
      lbfgs.rejected,
  )
  return result, deltas


def optimize(
    model: Any,
    edit: EncodedEdit,
    layer: int,
    config: TargetConfig,
    output: str = 'block',
) -> Found:
  """Optimises outputs of one block at the anchor, for one edit.

  Args:
    model: the transformers model.
    edit: rows, anchors, target and KL row as ids.
    layer: block whose output is changed.
    config: settings.
    output: which output, a key of `SITES`.

  Returns:
    The wanted state (of the last site), and what happened.

  Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), section 4.2 and its
  published settings; Li et al. 2023 (PMET, arXiv 2308.08742) and its code.
  """
  target = torch.tensor(edit.target.astype(np.int64))
  shifted = lambda ids, column, deltas: changed(
      model, ids, layer, {column: deltas}, output
  )
  nothing = [0.0] * len(SITES[output])
  with torch.no_grad():
    _, seen = shifted(edit.rows[0], edit.anchors[0], nothing)
    inits = [h[edit.anchors[0]] for h in seen]
    if len(edit.kl):
      base = shifted(edit.kl, len(edit.kl) - 1, nothing)[0][-1]

  def evaluate(deltas):
    nlls, first, divergence = [], [], torch.tensor(0.0)
    for row, anchor in zip(edit.rows, edit.anchors):
      ids = np.concatenate([row, edit.target[:-1]])
      logprob = shifted(ids, anchor, deltas)[0][len(row) - 1 :]
      nlls.append(-logprob.gather(1, target[:, None]).mean())
      first.append(bool((logprob.argmax(-1) == target).all()))
    if len(edit.kl):
      now = shifted(edit.kl, len(edit.kl) - 1, deltas)[0][-1]
      divergence = (now.exp() * (now - base)).sum()
    return torch.stack(nlls).mean(), divergence, all(first)

  return _descend(evaluate, inits, config)[0]


def chain(
    model: Any,
    edit: EncodedEdit,
    layer: int,
    config: TargetConfig,
    output: str = 'block',
) -> list[Found]:
  """Optimises the chunks of one edit's target, one after the other.

  The changes of earlier chunks are applied again in every forward, and a row
  ends with the last input that a chunk needs. The KL term is the first chunk's.

  Args:
    model: the transformers model.
    edit: rows, anchors, target, chunks and KL row as ids.
    layer: block whose output is changed.
    config: settings, of every chunk.
    output: which output, a key of `SITES`.

  Returns:
    What happened to every chunk; `z0` is the unedited model's state.

  Source: Jiang et al. 2025 (AnyEdit, arXiv 2502.05628), section 4.
  """
  forward = lambda ids, changes: changed(model, ids, layer, changes, output)

  def evaluate(k, deltas):
    nlls, first, divergence = [], [], torch.tensor(0.0)
    for c, changes in enumerate(earlier):
      stage = edit.stage(k, c)
      labels = torch.tensor(stage.labels).long()
      changes = {**changes, stage.anchor: deltas}
      logprob = forward(edit.text(c)[: stage.end], changes)[0][stage.first :]
      nlls.append(-logprob.gather(1, labels[:, None]).mean())
      first.append(bool((logprob.argmax(-1) == labels).all()))
    if len(edit.kl) and k == 0:
      now = forward(edit.kl, {len(edit.kl) - 1: deltas})[0][-1]
      divergence = (now.exp() * (now - base)).sum()
    return torch.stack(nlls).mean(), divergence, all(first)

  with torch.no_grad():
    unedited = forward(edit.text(0), {})[1]
    base = forward(edit.kl, {})[0][-1] if len(edit.kl) else None
  earlier, results = [{} for _ in edit.rows], []
  for k in range(edit.stages):
    inits = [h[edit.stage(k, 0).anchor] for h in unedited]
    result, deltas = _descend(functools.partial(evaluate, k), inits, config)
    for c, changes in enumerate(earlier):
      changes[edit.stage(k, c).anchor] = deltas
    results.append(result)
  return results


def dense_update(
    system: np.ndarray, keys: np.ndarray, residuals: np.ndarray
) -> np.ndarray:
  """Solves (B + K^T K) X = K^T R as it is written, in extended precision.

  Args:
    system: [F, F] B, for MEMIT lambda C.
    keys: [M, F] K.
    residuals: [M, D] R.

  Returns:
    [F, D] X, the change of a kernel that is stored [in, out].

  Source: Meng et al. 2022b (MEMIT), equation 14.
  """
  keys, residuals = (x.astype(np.longdouble) for x in (keys, residuals))
  matrix = system.astype(np.longdouble) + keys.T @ keys
  return _solve(matrix, keys.T @ residuals)


def _solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Gaussian elimination with pivoting; numpy's own ends at float64."""
  a, b = a.copy(), b.copy()
  for i in range(len(a)):
    pivot = i + np.argmax(np.abs(a[i:, i]))
    a[[i, pivot]], b[[i, pivot]] = a[[pivot, i]], b[[pivot, i]]
    ratio = a[i + 1 :, i] / a[i, i]
    a[i + 1 :] -= ratio[:, None] * a[i]
    b[i + 1 :] -= ratio[:, None] * b[i]
  for i in reversed(range(len(a))):
    b[i] = (b[i] - a[i, i + 1 :] @ b[i + 1 :]) / a[i, i]
  return b


def memit(
    model: Any,
    edits: Sequence[EncodedEdit],
    layers: Sequence[int],
    *,
    z: np.ndarray,
    grams: Sequence[np.ndarray],
    weight: float,
) -> tuple[list[np.ndarray], np.ndarray]:
  """MEMIT's second half: writes wanted states into a copy of a model.

  Args:
    model: the transformers model; not changed.
    edits: E edits.
    layers: layers to edit, ascending.
    z: [E, D] wanted output of the last of them at the anchor.
    grams: [F, F] average second moments, one a layer.
    weight: lambda.

  Returns:
    (the change of every layer's kernel, [F, D] float64; [n + 1, E] distance to
    z before each layer and after the last, as a multiple of the first).

  Source: Meng et al. 2022b (MEMIT), algorithm 1, with the published weights
  of the contexts in a key (1/2 for the bare prompt).
  """
  model = copy.deepcopy(model)
  changes, gaps = [], []

  def gap():
    now = np.stack([_state(model, edit, layers[-1]) for edit in edits])
    gaps.append(z.astype(np.float64) - now)
    return gaps[-1]

  for i, layer in enumerate(layers):
    keys = np.stack([_key(model, edit, layer) for edit in edits])
    residuals = gap() / (len(layers) - i)
    change = dense_update(weight * grams[i], keys, residuals)
    changes.append(change.astype(np.float64))
    kernel = down(model, layer)
    written = torch.tensor(changes[-1])
    # Linear stores [out, in], Conv1D [in, out].
    linear = isinstance(kernel, torch.nn.Linear)
    with torch.no_grad():
      kernel.weight += (written.T if linear else written).to(torch.float32)
  gap()
  length = np.linalg.norm(gaps, axis=-1)
  return changes, length / length[0]


def _key(model: Any, edit: EncodedEdit, layer: int) -> np.ndarray:
  """Averages the input of the second MLP matrix at the anchor, [F]."""
  seen = []

  def outputs(_, inputs):
    seen.append(inputs[0][0].detach().double().numpy())

  handle = down(model, layer).register_forward_pre_hook(outputs)
  with torch.no_grad():
    for row in edit.rows:
      run(model, row)
  handle.remove()
  bare, *others = [x[anchor] for x, anchor in zip(seen, edit.anchors)]
  return (bare + np.mean(others, axis=0)) / 2 if others else bare


def _state(model: Any, edit: EncodedEdit, layer: int) -> np.ndarray:
  """Output of a block at the anchor of the bare prompt, [D]."""
  seen = []
  outputs = lambda h: seen.append(h[0, edit.anchors[0]].double().numpy()) or h
  with hooked(block(model, layer), outputs), torch.no_grad():
    run(model, edit.rows[0])
  return seen[0]
