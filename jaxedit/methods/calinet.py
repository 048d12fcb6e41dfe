"""CaliNET: a small MLP beside the last one, trained on many facts at once.

  out' = out + W2 act(W1 x),   W1 [P, D], W2 [D, P]

W1 and W2 minimise the mean loss of the targets after every prompt in every
context template, by AdamW; the model is frozen. Everything below the branch is
constant (`patches`), so a step runs the head at the targets' tokens only. The
new matrices start as linear layers do in published code, so the branch is not
zero at the start.

Axis letters as in `patches`.

Source: Dong et al. 2022, "Calibrating Factual Knowledge in Pretrained Language
Models" (arXiv 2210.03329). Published for encoder-decoders, on cloze patterns of
ParaRel, by Adafactor at a constant rate; here context templates stand for
patterns, decoder-only models get a plain branch beside a gated MLP too, and the
branch is in the last layer.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching.buckets import POWERS, round_up
from jaxedit.edited import ledger as ledger_lib
from jaxedit.methods import base, gradient, patches
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.patches import Patch, Tail
from jaxedit.methods.settings import setting
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import all_finite, wide
from jaxedit.placement import fetch
from jaxedit.types import Array, Params

ACTIVATION = 'relu'
# Logits that exist at one time, rows of the head.
_HEAD_ROWS = 512
_NOT_FINITE = (
    'every loss became non-finite; lower --branch_rate or load the model with'
    ' --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class CalinetConfig(MethodConfig):
  """Settings of CaliNET.

  Attributes:
    neurons: width of the branch.
    steps: updates.
    rate: learning rate of AdamW.
    decay: its decoupled weight decay.
    threshold: training ends below this mean loss.
  """

  neurons: int = setting(
      64,
      'neurons of the branch',
      source='100 facts, CaliNET',
      low=1,
      flag='branch_neurons',
  )
  steps: int = setting(
      5000,
      'updates of the branch',
      source='CaliNET',
      low=1,
      flag='branch_steps',
  )
  rate: float = setting(
      1e-2, 'learning rate', source='CaliNET', low=0, flag='branch_rate'
  )
  decay: float = 0.0
  threshold: float = setting(
      0.0, 'training ends below this mean loss', unit='nats', low=0,
      flag='branch_stop_loss',
  )  # fmt: skip


class State(NamedTuple):
  """All branches so far.

  Attributes:
    patch: their neurons.
    count: [] int32 neurons in use.
    groups: edits with a name and their branch, see `edited.ledger`.
  """

  patch: Patch
  count: np.ndarray
  groups: np.ndarray = ledger_lib.NO_NAMES


def loss_of(
    spec: ModelSpec, params: Params, weights: tuple[Array, Array], tail: Tail
) -> tuple[Array, Array]:
  """Losses of rows under a branch.

  Args:
    spec: the architecture.
    params: canonical parameters.
    weights: (W1 [P, D], W2^T [P, D]).
    tail: of R rows.

  Returns:
    ([R] mean negative log-likelihood of a target token, nats; [R] bool, whether
    all are the most probable ones).
  """
  key, value = weights
  zero = jnp.zeros(len(key), key.dtype)

  def rows(part: Tail) -> tuple[Array, Array]:
    out = part.out + patches.added(Patch(key, zero, value), part.x, ACTIVATION)
    logits = decoder.logits(spec, params, out)
    total = jax.nn.logsumexp(logits, axis=-1)
    at = jnp.take_along_axis(logits, part.label[..., None], -1)[..., 0]
    nll = jnp.sum(jnp.where(part.mask, total - at, 0), axis=-1)
    tokens = jnp.maximum(jnp.sum(part.mask, axis=-1), 1)
    best = jnp.argmax(logits, axis=-1) == part.label
    return nll / tokens, jnp.all(best | ~part.mask, axis=-1)

  return jax.lax.map(
      jax.checkpoint(lambda one: jax.tree.map(lambda x: x[0], rows(one))),
      jax.tree.map(lambda x: x[:, None], tail),
      batch_size=max(1, _HEAD_ROWS // tail.label.shape[1]),
  )


@functools.partial(jax.jit, static_argnames=('spec', 'neurons'))
def fit(
    spec: ModelSpec,
    params: Params,
    tail: Tail,
    weight: Array,
    earlier: Patch,
    seed: Array,
    *,
    neurons: int,
    rule: tuple[Array, Array, Array, Array],
) -> tuple[Patch, Array, Array, Array]:
  """Trains one branch.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tail: of R rows.
    weight: [R] weights of rows; 0 leaves one out.
    earlier: neurons in force.
    seed: [] uint32.
    neurons: P.
    rule: (updates, rate, decay, loss at which to end).

  Returns:
    (the branch, [R] losses, [R] whether a row is answered, [] updates).
  """
  steps, rate, decay, threshold = rule
  tail = patches.under(earlier, tail, ACTIVATION)
  first, second = jax.random.split(jax.random.key(seed))
  shape = (neurons, spec.width)

  def draw(key: Array, fan_in: int) -> Array:
    drawn = jax.random.uniform(key, shape, jnp.float32, -1, 1)
    return drawn.astype(tail.out.dtype) / np.sqrt(fan_in)

  start = draw(first, spec.width), draw(second, neurons)
  total = jnp.maximum(jnp.sum(weight), 1)

  def mean(weights: tuple[Array, Array], step: Array) -> tuple[Array, Array]:
    del step
    losses, _ = loss_of(spec, params, weights, tail)
    value = jnp.sum(jnp.where(weight > 0, weight * losses, 0)) / total
    return value, value

  optimizer = gradient.adamw(rate, decay)
  weights, _, count = gradient.fit(
      mean, start, optimizer, steps=steps, stop_loss=threshold
  )
  losses, found = loss_of(spec, params, weights, tail)
  finite = all_finite(weights)
  key, value = jax.tree.map(lambda w: jnp.where(finite, w, 0), weights)
  branch = Patch(key, jnp.zeros(neurons, key.dtype), value)
  return branch, losses, found & finite, count


def calinet(spec: ModelSpec, config: CalinetConfig) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. Its edit is `Neurons`, the branches of all batches so far. An
    edit whose states are not finite is left out of the fit and not written.
  """

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    del resources
    dtype = wide(model.params['embed']['embedding'].dtype)
    return State(patches.no_neurons(spec.width, dtype), np.int32(0))

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    edits, joint, group = batch.encoded, batch.joint, batch.groups
    if not edits:
      info = base.Info(np.zeros(0, bool), {'fit': 0.0}, _reports([], [], []))
      edited = patches.edited_of(spec, [state], ACTIVATION, joint=True)
      return base.EditResult(edited, state, info)
    begin = time.monotonic()
    tail = patches.tail_of(spec, model.params, edits, batch.plan, plain=False)
    finite = np.ones(len(edits), bool)
    fine = np.isfinite(tail.out).all((1, 2)) & np.isfinite(tail.x).all((1, 2))
    np.logical_and.at(finite, tail.edit, fine)
    states: list[State] = []
    loss, found = np.full(len(edits), np.nan), finite.copy()
    steps = [0] * len(edits)
    with run.progress('fit', len(edits), 'edit') as advance:
      for number in range(int(group.max()) + 1):
        mine = np.flatnonzero((group == number) & finite)
        branch, losses, right, count = _fit_group(
            (spec, model.params), config, state, tail, mine, edits
        )
        states.append(_with(state, branch) if len(mine) else state)
        whose = tail.edit[np.isin(tail.edit, mine)]
        for i in mine:
          loss[i], found[i] = losses[whose == i].mean(), right[whose == i].all()
          steps[i] = int(count)
        advance(int((group == number).sum()))
    written = finite & np.isfinite(loss)
    info = base.Info(
        written,
        {'fit': time.monotonic() - begin},
        _reports(loss, found, steps),
        reason='' if written.any() else _NOT_FINITE,
    )
    if joint and batch.requests and written.any():
      ids = [batch.requests[i].id for i in np.flatnonzero(written)]
      more = [[ids, int(state.count), int(states[0].count)]]
      groups = ledger_lib.with_names(state.groups, more)
      states = [states[0]._replace(groups=groups)]
    edited = patches.edited_of(spec, states, ACTIVATION, joint=joint)
    return base.EditResult(edited, states[0] if joint else state, info)

  def bytes_of(model: Any, edits: Sequence[Any]) -> int:
    del model, edits
    return 8 * spec.width * config.neurons

  return base.Editor((), init, edit, bytes_of=bytes_of, cumulative=True)


def _fit_group(
    model: tuple[ModelSpec, Params],
    config: CalinetConfig,
    state: State,
    tail: Tail,
    mine: np.ndarray,
    edits: Sequence[Any],
) -> tuple[Patch, np.ndarray, np.ndarray, np.ndarray]:
  """Trains the branch of one group.

  Returns:
    (the branch, [rows of the group] losses, whether they are answered, updates).
  """
  rows = np.flatnonzero(np.isin(tail.edit, mine))
  # A power of two, so that groups share compiled code.
  count = round_up(max(len(rows), 1), POWERS)
  weight = (np.arange(count) < len(rows)).astype(tail.out.dtype)
  if len(rows):
    clean = jax.tree.map(lambda x: x[np.resize(rows, count)], tail)
  else:
    clean = jax.tree.map(lambda x: np.zeros_like(x[[0] * count]), tail)
  # The seed depends on the edits alone, not on their order or other groups.
  seed = 0
  for i in mine:
    seed ^= patches.seed_of(edits[i])
  rule = config.steps, config.rate, config.decay, config.threshold
  found = fit(
      *model, clean, weight, state.patch, np.uint32(seed),
      neurons=config.neurons, rule=rule,
  )  # fmt: skip
  branch, losses, right, steps = jax.tree.map(fetch, found)
  return branch, losses[: len(rows)], right[: len(rows)], steps


def _with(state: State, branch: Patch) -> State:
  """Adds a branch."""
  count = int(state.count)
  patch = patches.appended(state.patch, count, branch)
  return State(patch, np.int32(count + len(branch.bias)), state.groups)


def _reports(
    loss: Sequence[float], found: Sequence[bool], steps: Sequence[int]
) -> dict[str, list[Any]]:
  """Values by edit, as plain JSON types."""
  return {
      'loss': base.json_numbers(loss),
      'answered': [bool(x) for x in found],
      'steps': [int(x) for x in steps],
  }


METHOD = base.Method(
    'calinet',
    'a small MLP beside the last one, trained on many facts at once',
    CalinetConfig,
    calinet,
    chunkable=False,
    encoders=True,
    source='arXiv 2210.03329',
    small={'branch_neurons': 4, 'branch_steps': 5},
)
