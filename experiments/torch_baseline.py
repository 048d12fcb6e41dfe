"""MEMIT's published loop in plain PyTorch: what `benchmark` is compared with.

One edit at a time, all contexts and the KL row as one right-padded batch; every
step is a forward of the whole model with logits at all positions. Then, layer
by layer, full forwards for keys and for the present state, a dense F x F solve
in f64, and weights that are really written (and put back at the end).

  z = h + d,  d by Adam on  mean NLL + kl * KL + decay * |d| / |h|^2
  X = (lambda C + K^T K)^-1 K^T (z - z_now) / (layers left)

Written from the description of the method: Meng et al. 2022b (MEMIT, arXiv
2210.07229), algorithm 1 and appendix B. Unlike published code it takes ids, so
that both sides run the same tokens, and it computes the head once a step, not
twice. torch is imported when a function needs it, and nowhere else here.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.models import families, loading, tensors
from jaxedit.models.spec import ModelSpec
from jaxedit.text.batching import EncodedEdit
from jaxedit.types import InputError, Params, Progress, silent
from jaxedit.values import Schedule

_BLOCKS = ('model.layers', 'transformer.h', 'gpt_neox.layers')
_DOWN = ('down_proj', 'fc_out', 'c_proj', 'dense_4h_to_h')
# Rows of one forward for keys; MEMIT takes 128.
_ROWS = 128


class Found(NamedTuple):
  """What the optimisation of one edit gave.

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


def require() -> Any:
  """Returns torch.

  Raises:
    InputError: it is not installed.
  """
  try:
    import torch
  except ImportError:
    raise InputError(
        '--baseline=torch needs PyTorch, which is not installed: run `pip'
        ' install torch` (on a GPU the build for its CUDA version), or leave'
        ' --baseline out'
    ) from None
  return torch


def load(folder: str | os.PathLike[str], dtype: str) -> Any:
  """Loads a Hugging Face folder as a transformers torch model.

  Args:
    folder: config.json and safetensors.
    dtype: 'float32' or 'bfloat16'.

  Returns:
    The model, frozen, on the GPU if torch has one, with as many threads as
    there are cores.

  Raises:
    InputError: torch is not installed.
  """
  torch = require()
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, dtype)
  )
  return _ready(torch, model)


def from_params(
    config: Mapping[str, Any], spec: ModelSpec, params: Params, dtype: str
) -> Any:
  """Builds a transformers torch model with the weights of ours.

  Args:
    config: Hugging Face config fields, 'model_type' among them.
    spec: the architecture that they describe.
    params: canonical parameters.
    dtype: 'float32' or 'bfloat16', of the torch model.

  Returns:
    As for `load`.

  Raises:
    InputError: torch is not installed.
  """
  torch = require()
  import transformers

  fields = dict(config)
  described = transformers.AutoConfig.for_model(
      fields.pop('model_type'), **fields
  )
  model = transformers.AutoModelForCausalLM.from_config(
      described, dtype=getattr(torch, dtype)
  )
  own = dict(model.named_parameters())
  slots = tensors.upstream_slots(spec, families.get(spec.family).TENSORS)
  for name, parts in slots.items():
    leaves = []
    for slot in parts:
      leaf = loading.get_leaf(params, slot.path)
      leaf = leaf if slot.layer is None else leaf[slot.layer]
      leaves.append(np.asarray(leaf, np.float32))
    array = tensors.to_upstream(leaves, parts[0].source, spec.heads)
    with torch.no_grad():
      own[name].copy_(torch.tensor(array))
  return _ready(torch, model)


def _ready(torch: Any, model: Any) -> Any:
  """Freezes a model and puts it where it runs."""
  torch.set_num_threads(os.cpu_count() or 1)
  for parameter in model.parameters():
    parameter.requires_grad_(False)
  return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()


def block(model: Any, layer: int) -> Any:
  """The module of one transformer block."""
  for path in _BLOCKS:
    with contextlib.suppress(AttributeError):
      return model.get_submodule(path)[layer]
  raise InputError(f'{type(model).__name__}: its blocks were not found')


def down(model: Any, layer: int) -> Any:
  """The module of the second MLP matrix of one block."""
  for name in _DOWN:
    with contextlib.suppress(AttributeError):
      return block(model, layer).mlp.get_submodule(name)
  raise InputError(f'{type(model).__name__}: its MLP was not found')


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
    model: Any, edit: EncodedEdit, *, layer: int, schedule: Schedule
) -> Found:
  """Optimises the output of one block at the anchor, for one edit.

  Args:
    model: of `load`.
    edit: rows, anchors, target and KL row as ids.
    layer: block whose output is changed.
    schedule: settings.

  Returns:
    The wanted state, and what it took.
  """
  torch = require()
  begin = time.perf_counter()
  rows, columns = _rows(edit)
  put = lambda x: torch.as_tensor(np.asarray(x, np.int64), device=model.device)
  every, anchors = put(range(len(rows))), put(columns)
  loss_of = _loss(edit, schedule, put)
  start, delta, base = None, None, None

  def add(_, inputs, output):
    nonlocal start, delta
    h = output[0] if isinstance(output, tuple) else output
    if start is None:
      start = h[0, columns[0]].detach().float().clone()
      delta = torch.zeros_like(start, requires_grad=True)
    h = h.clone()
    h[every, anchors] += delta.to(h.dtype)
    return (h, *output[1:]) if isinstance(output, tuple) else h

  adam = None
  with _hooked(block(model, layer).register_forward_hook, add):
    for step in range(1, schedule.steps + 1):
      logprob = torch.log_softmax(_forward(model, rows).float(), dim=-1)
      if base is None:
        base = logprob[-1, columns[-1]].detach()
      loss = loss_of(logprob, base, delta, start)
      value = loss.item()
      if value < schedule.threshold or step == schedule.steps:
        break
      if adam is None:
        adam = torch.optim.Adam([delta], lr=schedule.rate)
      adam.zero_grad()
      loss.backward()
      adam.step()
      _clamp(delta, schedule.clamp * start.norm())
  z = (start + delta).detach().cpu().numpy()
  _wait(model)
  seconds = time.perf_counter() - begin
  shape = len(rows), max(map(len, rows))
  return Found(z, start.cpu().numpy(), step, value, seconds, shape)


def _rows(edit: EncodedEdit) -> tuple[list[np.ndarray], list[int]]:
  """Contexts with the target, and the KL row; the anchor of each."""
  rows = [np.concatenate([row, edit.target[:-1]]) for row in edit.rows]
  if not len(edit.kl):
    return rows, list(edit.anchors)
  return [*rows, edit.kl], [*edit.anchors, len(edit.kl) - 1]


def _loss(edit: EncodedEdit, schedule: Schedule, put: Any) -> Any:
  """Makes the loss of one edit, a function of all log-probabilities."""
  n, contexts = len(edit.target), len(edit.rows)
  rows = put(range(contexts))[:, None]
  columns = put([np.arange(len(r) - 1, len(r) - 1 + n) for r in edit.rows])
  labels = put(edit.target)[None]

  def loss(logprob: Any, base: Any, delta: Any, start: Any) -> Any:
    total = -logprob[rows, columns, labels].mean()
    total = total + schedule.decay * delta.norm() / start.norm() ** 2
    if len(edit.kl):
      now = logprob[-1, len(edit.kl) - 1]
      total = total + schedule.kl * (now.exp() * (now - base)).sum()
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
    progress: Progress = silent,
) -> Inserted:
  """Writes wanted states into the model, and puts its weights back.

  Args:
    model: of `load`.
    edits: E edits.
    layers: layers to edit, ascending.
    z: [E, D] wanted output of the last of them at the anchor.
    grams: [F, F] float64 average second moments, one a layer.
    weight: lambda, tokens.
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
      keys, ran = _keys(model, edits, layer)
      now, more = _states(model, edits, layers[-1])
      tokens += ran + more
      residuals = (wanted - now) / (len(layers) - i)
      gram = torch.as_tensor(grams[i], device=model.device).double()
      system = weight * gram + keys.T @ keys
      change = torch.linalg.solve(system, keys.T) @ residuals
      changes.append(change)
      # Linear stores [out, in], Conv1D [in, out].
      linear = isinstance(down(model, layer), torch.nn.Linear)
      kernels[i] += (change.T if linear else change).to(kernels[i].dtype)
      tell(1)
    _wait(model)
    seconds = time.perf_counter() - begin
    for kernel, old in zip(kernels, before):
      kernel.copy_(old)
  return Inserted([x.cpu().numpy() for x in changes], seconds, tokens)


def _keys(
    model: Any, edits: Sequence[EncodedEdit], layer: int
) -> tuple[Any, int]:
  """Averages the input of the second MLP matrix at the anchors.

  Returns:
    ([E, F] float64 keys, half the weight on the bare prompt; tokens run).
  """
  contexts = len(edits[0].rows)
  rows = [row for edit in edits for row in edit.rows]
  anchors = [anchor for edit in edits for anchor in edit.anchors]
  seen, keep = _reader(anchors, lambda inputs, output: inputs[0])
  tokens = _run(model, rows, down(model, layer), keep)
  found = require().cat(seen).unflatten(0, (len(edits), contexts))
  if contexts == 1:
    return found[:, 0], tokens
  return (found[:, 0] + found[:, 1:].mean(1)) / 2, tokens


def _states(
    model: Any, edits: Sequence[EncodedEdit], layer: int
) -> tuple[Any, int]:
  """[E, D] float64 output of a block at the anchors of the bare prompts."""
  first = lambda x: x[0] if isinstance(x, tuple) else x
  seen, keep = _reader(
      [edit.anchors[0] for edit in edits], lambda inputs, output: first(output)
  )
  bare = [edit.rows[0] for edit in edits]
  tokens = _run(model, bare, block(model, layer), keep)
  return require().cat(seen), tokens


def _reader(anchors: Sequence[int], pick: Any) -> tuple[list[Any], Any]:
  """A hook that keeps what lies at the anchors, batch after batch."""
  seen: list[Any] = []

  def keep(_, inputs, output):
    x = pick(inputs, output)
    at = sum(map(len, seen))
    columns = anchors[at : at + len(x)]
    seen.append(x[range(len(x)), columns].double())

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
