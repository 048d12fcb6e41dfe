"""T-Patcher: a neuron in the last MLP for every token that a model gets wrong.

  out' = out + sum_i v_i * a_i relu(k_i . x + b_i)

For an edit, up to `neurons` of the tokens that the model (with the patches so
far) foretells wrongly get a neuron, which starts with k = x / |x|^2, so that it
is active there, and is trained on

  L = nll of the target, smoothed                      the edit
    + alc max_i exp(m_a - (k_i . x_i + b_i))           active on its own token
    + mlc top(exp(s - own + m_1)) + mlc top(exp(s + m_2)),   s = k_i . m + b_i

over a memory m of inputs that shall stay silent; top is the mean of the largest.
Training ends as soon as the model answers with the target. Then the patch is
frozen, its edit's own inputs join the memory, and the next edit starts.

Everything below the patch is constant (`patches`), so a step runs the head at
the target's tokens and products with the memory. Edits that know nothing of each
other are trained side by side.

Axis letters as in `patches`; M memory inputs, I neurons of one edit.

Source: Huang et al. 2023, "Transformer-Patcher: One Mistake Worth One Neuron"
(arXiv 2301.09785). Published code is for encoder-decoders and repeats each edit
8 times, so that its `top` of 1000 are 125 distinct pairs; here rows are not
repeated. Decoder-only models get neurons beside a gated MLP as beside a plain
one. No validation set: training stops at the first success.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxedit.batching.buckets import POWERS, round_up
from jaxedit.edited import ledger as ledger_lib
from jaxedit.methods import base, patches
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.patches import Patch, Tail
from jaxedit.methods.settings import setting
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import all_finite, wide
from jaxedit.placement import fetch
from jaxedit.types import Array, Params

ACTIVATION = 'relu'  # zero on negatives, as nothing else is
_SMOOTHING = 0.1
_CLIP = 5.0  # of the gradient's norm
_TIED = 1e-6  # relative difference of numbers that count as equal
_L2 = 0.01
# The plateau rule of the learning rate: looked at every so many steps.
_WINDOW, _FACTOR, _PATIENCE, _BETTER = 25, 0.5, 1, 0.05
# Inputs of edited texts that the memory holds; the oldest leave.
_JOINED = 1024
# Independent edits trained at once.
_SIDE_BY_SIDE = 16


@dataclasses.dataclass(frozen=True)
class TPatcherConfig(MethodConfig):
  """Settings of T-Patcher; the defaults are those published for zsRE.

  Attributes:
    neurons: of one edit at most.
    steps: updates of a patch at most.
    rate: learning rate of Adam.
    scale: a at the start.
    active_weight: alc.
    memory_weight: mlc.
    active_margin: m_a.
    memory_margin_1: m_1.
    memory_margin_2: m_2.
    top: pairs of input and neuron that the memory's loss counts.
    check_from: updates before success is looked for.
    check_every: updates between looks.
  """

  neurons: int = setting(5, 'neurons of one edit at most', low=1)
  steps: int = setting(
      2000, 'updates of a patch at most', low=1, flag='patch_steps'
  )
  rate: float = setting(
      1e-2, 'learning rate of a patch', low=0, flag='patch_rate'
  )
  scale: float = setting(
      10.0, 'factor on a neuron at the start', low=0, flag='patch_scale'
  )
  active_weight: float = setting(
      1.0, 'weight of being active on its own token (alc)', low=0
  )
  memory_weight: float = setting(
      10.0, 'weight of being silent on the memory (mlc)', low=0
  )
  active_margin: float = 0.0
  memory_margin_1: float = setting(
      0.0,
      'how much less active a neuron is on the memory than on its token (m_1)',
      low=0,
  )
  memory_margin_2: float = setting(
      0.0, 'how far below zero a neuron is on the memory (m_2)', low=0
  )
  top: int = setting(
      125,
      'pairs of memory input and neuron that count',
      low=1,
      flag='memory_top',
  )
  check_from: int = setting(
      100,
      'updates before success is looked for',
      low=0,
      flag='patch_check_from',
  )
  check_every: int = setting(
      25, 'updates between looks', low=1, flag='patch_check_every'
  )


class State(NamedTuple):
  """All patches so far, and what they shall leave alone.

  Attributes:
    patch: all neurons.
    count: [] int32 neurons in use.
    memory: [M, D] inputs of texts, then those of edited texts.
    valid: [M] bool, which of them are there.
    joined: [] int32 inputs of edited texts seen.
    groups: edits with a name and their neurons, see `edited.ledger`.
  """

  patch: Patch
  count: np.ndarray
  memory: np.ndarray
  valid: np.ndarray
  joined: np.ndarray
  groups: np.ndarray = ledger_lib.NO_NAMES


class Weights(NamedTuple):
  """The trained parameters of one edit's neurons: k, b, v [I, D] and a."""

  key: Array
  bias: Array
  value: Array
  scale: Array


class _Loop(NamedTuple):
  """State of one fit."""

  weights: Weights
  adam: Any
  loss: Array
  steps: Array
  done: Array
  rate: Array
  best: Array  # of the plateau rule
  bad: Array
  sum: Array


class Fitted(NamedTuple):
  """A trained patch: neurons, whether it answers, its loss, its steps."""

  patch: Patch
  success: Array
  loss: Array
  steps: Array
  used: Array


def loss_of(
    spec: ModelSpec,
    params: Params,
    weights: Weights,
    tail: Tail,
    own: Array,
    memory: tuple[Array, Array],
    config: TPatcherConfig,
) -> tuple[Array, Array]:
  """The loss of one edit's patch.

  Args:
    spec: the architecture.
    params: canonical parameters.
    weights: the patch.
    tail: of one row, [n, .]; `out` under earlier patches.
    own: [I] int32 place of each neuron's token; n where it has none.
    memory: ([M, D] inputs, [M] bool which are there).
    config: settings.

  Returns:
    ([] loss, [] bool whether all tokens are foretold).
  """
  n, live = len(tail.label), own < len(tail.label)
  pre = tail.x @ weights.key.T + weights.bias
  act = jnp.where(live, jax.nn.relu(pre), 0)
  out = tail.out + act @ (weights.value * weights.scale)
  logits = decoder.logits(spec, params, out)
  logprob = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logprob, tail.label[:, None], 1)[:, 0]
  smooth = (1 - _SMOOTHING) * nll - _SMOOTHING * jnp.mean(logprob, axis=-1)
  tokens = jnp.maximum(jnp.sum(tail.mask), 1)
  edit = jnp.sum(jnp.where(tail.mask, smooth, 0)) / tokens
  best = jnp.argmax(logits, axis=-1) == tail.label
  mine = pre[jnp.minimum(own, n - 1), jnp.arange(len(own))]
  active = _largest(jnp.where(live, jnp.exp(config.active_margin - mine), 0))
  inputs, there = memory
  seen = inputs @ weights.key.T + weights.bias
  counts = there[:, None] & live

  def top(x: Array) -> Array:
    x = jnp.where(counts, x, -jnp.inf).reshape(-1)
    largest = jax.lax.top_k(x, min(config.top, x.shape[0]))[0]
    found = largest > -jnp.inf
    total = jnp.sum(jnp.where(found, jnp.exp(jnp.where(found, largest, 0)), 0))
    return total / jnp.maximum(jnp.sum(found), 1)

  silent = top(seen - mine + config.memory_margin_1)
  silent += top(seen + config.memory_margin_2)
  loss = edit + config.active_weight * active + config.memory_weight * silent
  return loss, jnp.all(best | ~tail.mask)


def _largest(x: Array) -> Array:
  """The largest number; neurons start as active as each other, and rounding
  does not decide which of them has the gradient.
  """
  tied = x >= jax.lax.stop_gradient(jnp.max(x)) * (1 - _TIED)
  return jnp.sum(jnp.where(tied, x, 0)) / jnp.sum(tied)


def _plateau(loop: _Loop, loss: Array) -> dict[str, Array]:
  """Lowers the learning rate where the mean loss of a window stands still."""
  total = loop.sum + loss
  ends = (loop.steps + 1) % _WINDOW == 0
  mean = total / _WINDOW
  better = mean < loop.best * (1 - _BETTER)
  bad = jnp.where(better, 0, loop.bad + 1)
  lower = bad > _PATIENCE
  pick = lambda new, old: jnp.where(ends, new, old)
  return dict(
      rate=pick(jnp.where(lower, loop.rate * _FACTOR, loop.rate), loop.rate),
      best=pick(jnp.where(better, mean, loop.best), loop.best),
      bad=pick(jnp.where(lower, 0, bad), loop.bad),
      sum=jnp.where(ends, 0, total),
  )


@functools.partial(jax.jit, static_argnames=('spec', 'config'))
def fit(
    spec: ModelSpec,
    params: Params,
    tail: Tail,
    earlier: Patch,
    memory: tuple[Array, Array],
    seed: Array,
    *,
    config: TPatcherConfig,
) -> Fitted:
  """Trains the patches of edits side by side, each against its own memory.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tail: of G rows, [G, n, .].
    earlier: neurons in force, [G, P, .].
    memory: ([G, M, D], [G, M]).
    seed: [G] uint32.
    config: settings.

  Returns:
    The patches, [G, I, .].
  """
  one = functools.partial(_fit, spec, params, config)
  return jax.vmap(one)(tail, earlier, memory, seed)


def _fit(
    spec: ModelSpec,
    params: Params,
    config: TPatcherConfig,
    tail: Tail,
    earlier: Patch,
    memory: tuple[Array, Array],
    seed: Array,
) -> Fitted:
  """Trains one edit's patch; see `fit`."""
  n = len(tail.label)
  tail = patches.under(earlier, tail, ACTIVATION)
  best = jnp.argmax(decoder.logits(spec, params, tail.out), axis=-1)
  wrong = tail.mask & (best != tail.label)
  order = jnp.argsort(~wrong)[: config.neurons]  # the first wrong tokens
  own = jnp.where(wrong[order], order, n)
  own = jnp.pad(own, (0, config.neurons - len(own)), constant_values=n)
  start = _start(tail, own, seed, config)
  optimizer = optax.chain(
      optax.clip_by_global_norm(_CLIP),
      optax.add_decayed_weights(_L2),
      optax.scale_by_adam(),
  )
  loss = lambda w: loss_of(spec, params, w, tail, own, memory, config)

  def step(loop: _Loop) -> _Loop:
    (value, found), grad = jax.value_and_grad(loss, has_aux=True)(loop.weights)
    looks = (loop.steps >= config.check_from) & (
        (loop.steps - config.check_from) % config.check_every == 0
    )
    update, adam = optimizer.update(grad, loop.adam, loop.weights)
    done = found & looks
    weights = jax.tree.map(
        lambda w, u: jnp.where(done, w, w - loop.rate * u), loop.weights, update
    )
    rest = _plateau(loop, value)
    return _Loop(weights, adam, value, loop.steps + ~done, done, **rest)

  goes_on = lambda loop: (loop.steps < config.steps) & ~loop.done
  zero = jnp.zeros([], tail.out.dtype)
  loop = _Loop(
      start, optimizer.init(start), zero, jnp.int32(0), ~jnp.any(wrong),
      rate=zero + config.rate, best=zero + jnp.inf, bad=jnp.int32(0), sum=zero,
  )  # fmt: skip
  loop = jax.lax.while_loop(goes_on, step, loop)
  w = loop.weights
  value, success = loss(w)
  success &= all_finite((w, tail.out))
  keep = (own < n) & success
  patch = Patch(w.key, w.bias, w.value * w.scale)
  zeroed = lambda x: jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
  patch = Patch(*map(zeroed, patch))
  return Fitted(patch, success, value, loop.steps, jnp.sum(keep))


def _start(
    tail: Tail, own: Array, seed: Array, config: TPatcherConfig
) -> Weights:
  """Neurons that are active at 1 on their tokens."""
  x = jnp.take(tail.x, own, axis=0, mode='fill', fill_value=0)
  size = jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-30)
  # In f32 whatever x is, so that wider runs start alike.
  value = jax.random.normal(jax.random.key(seed), x.shape, jnp.float32)
  return Weights(
      x / size,
      jnp.zeros(len(own), x.dtype),
      value.astype(x.dtype),
      jnp.full_like(x, config.scale),
  )


def t_patcher(spec: ModelSpec, config: TPatcherConfig) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. It needs texts to be silent on. Its edit is `Neurons`, all so
    far; edits of a batch are made one after the other. An edit whose patch never
    makes the model answer with its target is not written.
  """

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    texts = resources[base.PreservedTexts()]
    inputs = patches.inputs_of(spec, model.params, texts)
    more = np.zeros((_JOINED, spec.width), inputs.dtype)
    valid = np.arange(len(inputs) + _JOINED) < len(inputs)
    dtype = wide(model.params['embed']['embedding'].dtype)
    patch, memory = patches.no_neurons(spec.width, dtype), [inputs, more]
    zero = np.int32(0)
    return State(patch, zero, np.concatenate(memory), valid, zero)

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    begin, edits = time.monotonic(), batch.encoded
    joint, group = batch.joint or not edits, batch.groups.tolist()
    count = max(group, default=0) + 1
    fitting = _Fitting(spec, model.params, config, state, count)
    if edits:
      tail = patches.tail_of(spec, model.params, edits, batch.plan, plain=True)
    with run.progress('fit', len(edits), 'edit') as advance:
      for indices in _rounds(group):
        seeds = [patches.seed_of(edits[i]) for i in indices]
        fitting.fit(indices, [group[i] for i in indices], tail, seeds)
        advance(len(indices))
    states = fitting.states
    if joint:
      states = [_named(states[0], fitting.rows, batch.requests)]
    found = [fitting.found[i] for i in range(len(edits))]
    written = np.array([one.success for one in found], bool)
    info = base.Info(
        written,
        {'fit': time.monotonic() - begin},
        _reports(found),
        reason='' if written.any() or not edits else _reason(config),
    )
    edited = patches.edited_of(spec, states, ACTIVATION, joint=joint)
    return base.EditResult(edited, states[0] if joint else state, info)

  def bytes_of(model: Any, edits: Sequence[Any]) -> int:
    del model
    return 8 * spec.width * config.neurons * len(edits)

  needs = (base.PreservedTexts(),)
  return base.Editor(
      needs, init, edit, bytes_of=bytes_of, cumulative=True, ordered=True
  )


def _reason(config: TPatcherConfig) -> str:
  return (
      f'no patch made the model answer with its target in {config.steps} updates;'
      ' raise --patch_steps or --patch_rate, or lower --memory_weight'
  )


def _reports(found: Sequence[Fitted]) -> dict[str, list[Any]]:
  """Values by edit, as plain JSON types."""
  return {
      'loss': base.json_numbers(one.loss for one in found),
      'steps': [int(one.steps) for one in found],
      'neurons': [int(one.used) for one in found],
  }


def _rounds(group: Sequence[int]) -> list[list[int]]:
  """Edits that are trained side by side: one of each group, in order."""
  rounds: dict[int, list[int]] = {}
  seen: collections.Counter[int] = collections.Counter()
  for i, number in enumerate(group):
    rounds.setdefault(seen[number], []).append(i)
    seen[number] += 1
  return [
      some[first : first + _SIDE_BY_SIDE]
      for some in rounds.values()
      for first in range(0, len(some), _SIDE_BY_SIDE)
  ]


class _Fitting:
  """The states of groups as their edits are made."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      config: TPatcherConfig,
      state: State,
      groups: int,
  ):
    self._model, self._config = (spec, params), config
    self.states = [state] * groups
    self.found: dict[int, Fitted] = {}
    self.rows: dict[int, tuple[int, int]] = {}  # neurons of those written

  def fit(
      self,
      indices: Sequence[int],
      groups: Sequence[int],
      tail: Tail,
      seeds: Sequence[int],
  ) -> None:
    """Trains one edit of each of some groups and freezes their patches."""
    mine = [self.states[g] for g in groups]
    most = max(len(one.patch.bias) for one in mine)
    # A power of two, so that small batches share compiled code.
    count = round_up(len(indices), POWERS)
    fill = [*range(len(indices)), *[0] * (count - len(indices))]
    pick = lambda values: np.stack([values[i] for i in fill])
    rows = Tail(*(leaf[pick(indices)] for leaf in tail))
    grown = [patches.grown(one.patch, most) for one in mine]
    earlier = Patch(*map(pick, zip(*grown)))
    memory = pick([s.memory for s in mine]), pick([s.valid for s in mine])
    seed = pick(seeds).astype(np.uint32)
    fitted = fit(*self._model, rows, earlier, memory, seed, config=self._config)
    fitted = jax.tree.map(fetch, fitted)
    for at, (i, g) in enumerate(zip(indices, groups)):
      one = jax.tree.map(lambda x: x[at], fitted)  # pylint: disable=cell-var-from-loop
      self.found[i] = one
      if one.success:
        inputs = tail.x[i][tail.mask[i]]
        first = int(self.states[g].count)
        self.states[g] = _frozen(self.states[g], one, inputs)
        self.rows[i] = first, int(self.states[g].count)


def _frozen(state: State, fitted: Fitted, inputs: np.ndarray) -> State:
  """Adds a patch, and its edit's own inputs to the memory."""
  used = fitted.patch.value.any(-1) | fitted.patch.key.any(-1)
  more = Patch(*(x[used] for x in fitted.patch))
  patch = patches.appended(state.patch, int(state.count), more)
  memory, valid = state.memory.copy(), state.valid.copy()
  texts = len(memory) - _JOINED
  at = texts + (int(state.joined) + np.arange(len(inputs))) % _JOINED
  memory[at], valid[at] = inputs, True
  count = np.int32(state.count + len(more.bias))
  joined = np.int32(state.joined + len(inputs))
  return State(patch, count, memory, valid, joined, state.groups)


def _named(
    state: State,
    rows: Mapping[int, tuple[int, int]],
    requests: Sequence[Any],
) -> State:
  """Notes which neurons are whose, where requests have names."""
  if not requests:
    return state
  more = [[[requests[i].id], *rows[i]] for i in sorted(rows)]
  return state._replace(groups=ledger_lib.with_names(state.groups, more))


METHOD = base.Method(
    't_patcher',
    'a neuron in the last MLP for every wrong token, for a stream of edits',
    TPatcherConfig,
    t_patcher,
    chunkable=False,
    contexts=False,
    encoders=True,
    source='arXiv 2301.09785',
    small={
        'neurons': 8,
        'patch_steps': 300,
        'patch_rate': 0.1,
        'patch_scale': 1.0,
        'memory_weight': 0.1,
        'patch_check_from': 0,
        'patch_check_every': 1,
    },
)
