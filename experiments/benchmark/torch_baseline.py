"""MEMIT's published loop in plain PyTorch: what `benchmark` is compared with.

One edit at a time, all contexts and the KL row as one right-padded batch; every
step is a forward of the whole model with logits at all positions. Then, layer
by layer, full forwards for keys and for the present state, a dense F x F solve
in f64, and weights that are really written (and put back at the end).

  z = h + d,  d by Adam on  mean NLL + kl * KL + decay * |d| / |h|^2
  X = (lambda C + K^T K + H^T H)^-1 K^T (z - z_now) / (layers left)

A target in chunks is foretold chunk by chunk (AnyEdit): every forward runs all
that comes before and adds the changes of earlier chunks again. H are the keys
at all other tokens of the text; without chunks there are none.

Written from the description of the methods: Meng et al. 2022b (MEMIT, arXiv
2210.07229), algorithm 1 and appendix B; Jiang et al. 2025 (AnyEdit, arXiv
2502.05628), section 4. Unlike published code it takes ids, so that both sides
run the same tokens, it computes the head once a step, not twice, and it sends
no gradient to the changes of earlier chunks. torch is imported when a function
needs it, and nowhere else here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.torch_model import block, down, require
from jaxedit.targets import TargetConfig
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Progress, silent

# Rows of one forward for keys; MEMIT takes 128.
_ROWS = 128


class Found(NamedTuple):
  """What the optimisation of one state gave.

  Attributes:
    z: [D] wanted state, float32.
    z0: [D] state of the unedited model.
    steps: losses evaluated.
    loss: nats, at z.
    seconds: wall time.
    shape: (rows, width) of the padded batch.
  """

  z: np.ndarray
  z0: np.ndarray
  steps: int
  loss: float
  seconds: float
  shape: tuple[int, int]


class Inserted(NamedTuple):
  """What the insertion of a batch gave.

  Attributes:
    changes: [F, D] float64 change of every edited kernel.
    seconds: wall time.
    tokens: padded tokens that its forwards ran.
  """

  changes: list[np.ndarray]
  seconds: float
  tokens: int


@contextlib.contextmanager
def _hooked(register: Any, hook: Any) -> Iterator[None]:
  """Keeps a hook while open."""
  handle = register(hook)
  try:
    yield
  finally:
    handle.remove()


def _forward(model: Any, rows: Sequence[np.ndarray]) -> Any:
  """Logits [B, T, V] of right-padded rows."""
  torch = require()
  width = max(map(len, rows))
  ids = np.zeros((len(rows), width), np.int64)
  mask = np.zeros_like(ids)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
    mask[i, : len(row)] = 1
  put = lambda x: torch.from_numpy(x).to(model.device)
  return model(
      input_ids=put(ids), attention_mask=put(mask), use_cache=False
  ).logits


def _wait(model: Any) -> None:
  """Waits for the device."""
  if model.device.type == 'cuda':
    require().cuda.synchronize()


def optimize(
    model: Any, edit: EncodedEdit, *, layer: int, config: TargetConfig
) -> list[Found]:
  """Optimises the output of one block at the anchors of one edit, in turn.

  Args:
    model: of `torch_model.load`.
    edit: rows, anchors, target, chunks and KL row as ids.
    layer: block whose output is changed.
    config: settings, of every state.

  Returns:
    The wanted state of every chunk, or of the whole target, and what it took.
  """
  found, earlier = [], []
  for k in range(edit.stages):
    state, change = _optimize_state(
        model, (edit, k), earlier, layer=layer, config=config
    )
    found.append(state)
    earlier.append(change)
  return found


def _optimize_state(
    model: Any,
    which: tuple[EncodedEdit, int],
    earlier: Sequence[tuple[Any, Any]],
    *,
    layer: int,
    config: TargetConfig,
) -> tuple[Found, tuple[Any, Any]]:
  """Optimises one state; gives its (columns a context, change [D]) too."""
  torch, begin = require(), time.perf_counter()
  rows, columns = _rows(*which)
  put = lambda x: torch.as_tensor(np.asarray(x, np.int64), device=model.device)
  every, anchors = put(range(len(rows))), put(columns)
  loss_of = _loss(*which, config, put)
  start, delta, base = None, None, None

  def add(_, inputs, output):
    nonlocal start, delta
    h = output[0] if isinstance(output, tuple) else output
    if start is None:
      start = h[0, columns[0]].detach().float().clone()
      delta = torch.zeros_like(start, requires_grad=True)
    h = h.clone()
    for tokens_at, change in earlier:  # where there are, there is no KL row
      h[every, tokens_at] += change.to(h.dtype)
    h[every, anchors] += delta.to(h.dtype)
    return (h, *output[1:]) if isinstance(output, tuple) else h

  adam = None  # made with `delta`, by the first forward
  with _hooked(block(model, layer).register_forward_hook, add):
    for step in range(1, config.steps + 1):
      logprob = torch.log_softmax(_forward(model, rows).float(), dim=-1)
      if base is None:
        base = logprob[-1, columns[-1]].detach()
      loss = loss_of(logprob, base, delta, start)
      value = loss.item()
      if value < config.threshold or step == config.steps:
        break
      if adam is None:
        adam = torch.optim.Adam([delta], lr=config.rate)
      adam.zero_grad()
      loss.backward()
      adam.step()
      _clamp(delta, config.clamp * start.norm())
  change = delta.detach()
  z = (start + change).cpu().numpy()
  _wait(model)
  seconds, shape = time.perf_counter() - begin, (len(rows), max(map(len, rows)))
  state = Found(z, start.cpu().numpy(), step, value, seconds, shape)
  return state, (anchors[: len(which[0].rows)], change)


def _rows(edit: EncodedEdit, k: int) -> tuple[list[np.ndarray], list[int]]:
  """Contexts up to a state's last input, and anchors; first the KL row too."""
  stages = [edit.stage(k, c) for c in range(len(edit.rows))]
  rows = [edit.text(c)[: stage.end] for c, stage in enumerate(stages)]
  anchors = [stage.anchor for stage in stages]
  if k or not len(edit.kl):
    return rows, anchors
  return [*rows, edit.kl], [*anchors, len(edit.kl) - 1]


def _loss(edit: EncodedEdit, k: int, config: TargetConfig, put: Any) -> Any:
  """Makes the loss of one state, a function of all log-probabilities."""
  stages = [edit.stage(k, c) for c in range(len(edit.rows))]
  n = np.arange(len(stages[0].labels))
  rows = put(range(len(stages)))[:, None]
  columns = put([stage.first + n for stage in stages])
  labels = put(stages[0].labels)[None]

  def loss(logprob: Any, base: Any, delta: Any, start: Any) -> Any:
    total = -logprob[rows, columns, labels].mean()
    total = total + config.decay * delta.norm() / start.norm() ** 2
    if len(edit.kl) and not k:
      now = logprob[-1, len(edit.kl) - 1]
      total = total + config.kl * (now.exp() * (now - base)).sum()
    return total

  return loss


def _clamp(delta: Any, radius: Any) -> None:
  """Shortens a change to at most `radius`, in place."""
  with require().no_grad():
    length = delta.norm()
    if length > radius:
      delta.mul_(radius / length)


def insert(
    model: Any,
    edits: Sequence[EncodedEdit],
    *,
    layers: Sequence[int],
    z: np.ndarray,
    grams: Sequence[np.ndarray],
    weight: float,
    texts: bool = False,
    progress: Progress = silent,
) -> Inserted:
  """Writes wanted states into the model, and puts its weights back.

  Args:
    model: of `torch_model.load`.
    edits: E edits with M states.
    layers: layers to edit, ascending.
    z: [M, D] wanted output of the last of them at the anchors.
    grams: [F, F] float64 average second moments, one a layer.
    weight: lambda, tokens.
    texts: run whole texts and hold the keys of their other tokens.
    progress: is told layers.

  Returns:
    The changes, and what they took.
  """
  torch = require()
  begin = time.perf_counter()
  kernels = [down(model, layer).weight for layer in layers]
  before = [kernel.detach().clone() for kernel in kernels]
  wanted = torch.as_tensor(z, device=model.device).double()
  changes, tokens = [], 0
  with torch.no_grad(), progress('torch insert', len(layers), 'layer') as tell:
    for i, layer in enumerate(layers):
      keys, preserved, ran = _keys(model, edits, layer, texts)
      now, more = _states(model, edits, layers[-1], texts)
      tokens += ran + more
      residuals = (wanted - now) / (len(layers) - i)
      gram = torch.as_tensor(grams[i], device=model.device).double()
      system = weight * gram + preserved.T @ preserved + keys.T @ keys
      changes.append(torch.linalg.solve(system, keys.T) @ residuals)
      kernels[i] += _stored(down(model, layer), changes[-1])
      tell(1)
    _wait(model)
    seconds = time.perf_counter() - begin
    for kernel, old in zip(kernels, before):
      kernel.copy_(old)
  return Inserted([x.cpu().numpy() for x in changes], seconds, tokens)


def _stored(module: Any, change: Any) -> Any:
  """A change [F, D] as a module's weight is stored."""
  # Linear stores [out, in], Conv1D [in, out].
  linear = isinstance(module, require().nn.Linear)
  return (change.T if linear else change).to(module.weight.dtype)


def _anchors(edit: EncodedEdit, c: int) -> list[int]:
  return [edit.stage(k, c).anchor for k in range(edit.stages)]


def _texts(edit: EncodedEdit, whole: bool) -> list[np.ndarray]:
  """Contexts as insertion runs them, up to the last anchor at least."""
  if whole:
    return [np.concatenate([row, edit.target]) for row in edit.rows]
  return [
      edit.text(c)[: max(len(row), _anchors(edit, c)[-1] + 1)]
      for c, row in enumerate(edit.rows)
  ]


def _keys(
    model: Any, edits: Sequence[EncodedEdit], layer: int, whole: bool
) -> tuple[Any, Any, int]:
  """Reads the input of the second MLP matrix.

  Returns:
    ([M, F] float64 average at the anchors, half the weight on the bare prompt;
    [P, F] at the other tokens of whole texts; tokens run).
  """
  rows = [row for edit in edits for row in _texts(edit, whole)]
  anchors = [_anchors(e, c) for e in edits for c in range(len(e.rows))]
  wanted = [range(len(row)) for row in rows] if whole else anchors
  seen, keep = _reader(wanted, lambda inputs, output: inputs[0])
  tokens = _run(model, rows, down(model, layer), keep)
  preserved = [seen[0][:0]]
  if whole:
    for i, at in enumerate(anchors):
      rest = np.setdiff1d(wanted[i], at)
      preserved.append(seen[i][rest])
      seen[i] = seen[i][at]
  found, each = [], iter(seen)
  for edit in edits:
    plain, *others = [next(each) for _ in edit.rows]
    found.append((plain + sum(others) / len(others)) / 2 if others else plain)
  return require().cat(found), require().cat(preserved), tokens


def _states(
    model: Any, edits: Sequence[EncodedEdit], layer: int, whole: bool
) -> tuple[Any, int]:
  """[M, D] float64 output of a block at the anchors of the bare prompts."""
  first = lambda x: x[0] if isinstance(x, tuple) else x
  wanted = [_anchors(edit, 0) for edit in edits]
  seen, keep = _reader(wanted, lambda inputs, output: first(output))
  plain = [_texts(edit, whole)[0] for edit in edits]
  tokens = _run(model, plain, block(model, layer), keep)
  return require().cat(seen), tokens


def _reader(
    wanted: Sequence[Sequence[int]], pick: Any
) -> tuple[list[Any], Any]:
  """A hook that keeps columns of every row, in float64, batch after batch."""
  seen: list[Any] = []

  def keep(_, inputs, output):
    for row in pick(inputs, output):
      seen.append(row[list(wanted[len(seen)])].double())

  return seen, keep


def _run(model: Any, rows: Sequence[np.ndarray], module: Any, hook: Any) -> int:
  """Runs rows through the whole model; returns the padded tokens."""
  tokens = 0
  with _hooked(module.register_forward_hook, hook):
    for first in range(0, len(rows), _ROWS):
      batch = rows[first : first + _ROWS]
      _forward(model, batch)
      tokens += len(batch) * max(map(len, batch))
  return tokens
