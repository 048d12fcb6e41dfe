"""The loss of a trained editor, and one step of its training.

  delta_b = network(factors of record b)          b = 1 ... B, apart
  loss    = edit_weight * mean nll of outer_b under delta_b
          + locality_weight * mean KL(base || edited) of local_b under delta_b

outer is the answer to a rephrased prompt or to the prompt itself, local a prompt
that the edit does not concern. Factors are constants (first order): no gradient
flows through them. Means are over all scored tokens of a batch.

Everything below the first edited layer is constant and enters as states, so a
step runs the layers from there on, and the head at scored tokens. A sequence is
under its own delta, applied as factors.

Source: Mitchell et al. 2022 (MEND, arXiv 2110.11309), the trainer of its
published code. It steps first after accumulate + 1 batches; `parity` does too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.hypernet.factors import Maps, Sequences
from jaxedit.methods.hypernet.network import (
    Network,
    TrainingSettings,
    Variables,
    embedding,
)
from jaxedit.methods.settings import setting
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import all_finite
from jaxedit.types import Array, Params

OUTERS = ('rephrase', 'edit', 'mixed')
LOCAL_TOKENS = ('answer', 'all', 'after')


@dataclasses.dataclass(frozen=True)
class Training(TrainingSettings):
  """Settings of training; the defaults are those of MEND's published code."""

  edits: int = setting(
      1,
      'records whose deltas are summed before they are judged; the batches that'
      ' the editor will be used with',
      low=1,
  )
  joint: bool = setting(
      False,
      'divide the loss of an edit by the tokens of all edits of its batch, as'
      ' EasyEdit does, instead of its own',
  )
  locality_weight: float = setting(
      1.0, 'weight of the KL divergence on local prompts (cloc)',
      source='MEND', low=0,
  )  # fmt: skip
  outer: str = setting(
      'rephrase',
      'prompt that the edited answer is scored at: a rephrased one, that of the'
      ' edit (as EasyEdit does), or either at random',
      choices=OUTERS,
      source='MEND',
  )
  locality_tokens: str = setting(
      'answer',
      'tokens of a local prompt whose distributions are compared: those that'
      " predict its answer, all (MEND), or one later than the answer's"
      ' (EasyEdit)',
      choices=LOCAL_TOKENS,
  )
  local_prompts: int = setting(
      1, 'local prompts a record, of itself and its neighbours in the batch',
      low=1,
  )  # fmt: skip
  late_update: bool = setting(
      False,
      'make the first update one batch late, with a sum of one gradient more, as'
      ' published code does',
  )


class Batch(NamedTuple):
  """Records of one step, B of them.

  Attributes:
    edit: prompts with the answers to write.
    edit_h: [B, T, D] states that enter the first edited layer.
    outer: prompts at which the edited answer is scored.
    outer_h: likewise.
    local: prompts whose answers shall stay.
    local_h: likewise.
    local_out: [B, O, D] unedited output of the last layer at scored tokens.
  """

  edit: Sequences
  edit_h: Array
  outer: Sequences
  outer_h: Array
  local: Sequences
  local_h: Array
  local_out: Array


class Losses(NamedTuple):
  """Sums over the scored tokens of a batch.

  Attributes:
    nll: of edited answers, nats.
    tokens: how many they are.
    kl: divergences at local prompts, nats.
    local_tokens: how many they are.
    right: outer prompts at which every token of the answer is the most probable.
    outers: how many they are.
  """

  nll: Array
  tokens: Array
  kl: Array
  local_tokens: Array
  right: Array
  outers: Array


class State(NamedTuple):
  """What training changes.

  Attributes:
    variables: of the network.
    optimizer: optax's state.
    total: sum of gradients since the last update.
    step: [] int32, batches done.
    skipped: [] int32, batches whose gradient was not finite.
  """

  variables: Variables
  optimizer: Any
  total: Any
  step: Array
  skipped: Array


class Trial(NamedTuple):
  """What a compiled step is made for; hashable."""

  spec: ModelSpec
  maps: Maps
  network: Network
  config: Any


def optimizer_of(
    network: Network, config: Training
) -> optax.GradientTransformation:
  """Adam after clipping, with the learning rates of a network's leaves."""

  def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    named = lambda path: '/'.join(str(part.key) for part in path)
    updates = jax.tree_util.tree_map_with_path(
        lambda path, u: -network.rate_of(named(path), config.rate) * u, updates
    )
    return updates, state

  own = optax.GradientTransformation(lambda params: optax.EmptyState(), scale)
  return optax.chain(
      optax.clip_by_global_norm(config.clip), optax.scale_by_adam(), own
  )


def start(trial: Trial, seed: int, dtype: Any) -> State:
  """Makes the state before the first step.

  Args:
    trial: what is trained.
    seed: of the initial variables.
    dtype: of the variables, f32 or wider.
  """
  variables = trial.network.init(jax.random.key(seed), dtype)
  optimizer = optimizer_of(trial.network, trial.config)
  zeros = jax.tree.map(jnp.zeros_like, variables.trained)
  count = lambda: jnp.zeros([], jnp.int32)  # each in memory of its own
  return State(
      variables, optimizer.init(variables.trained), zeros, count(), count()
  )


def _share(trial: Trial, batch: Batch) -> Array:
  """[B, O] weights of tokens in the loss whose gradient is transformed."""
  config = trial.config
  weight = batch.edit.weight.astype(batch.edit_h.dtype)
  if not config.joint:
    return lib.per_record(weight, weight.dtype)
  groups = weight.reshape(-1, config.edits * weight.shape[-1]).sum(-1)
  total = jnp.repeat(groups, config.edits)[:, None]
  return weight / jnp.maximum(total, 1)


def _rolled(batch: Batch, count: int) -> tuple[Sequences, Array, Array]:
  """Local prompts of records and of the count - 1 records after each."""
  parts = (batch.local, batch.local_h, batch.local_out)
  if count == 1:
    return parts
  rolled = lambda i: jax.tree.map(lambda x: jnp.roll(x, -i, axis=0), parts)
  join = lambda *x: jnp.concatenate(x)
  return jax.tree.map(join, *map(rolled, range(count)))


def losses(trial: Trial, params: Params, pairs: Any, batch: Batch) -> Losses:
  """Judges deltas on a batch.

  Args:
    trial: what is trained.
    params: canonical parameters of the model.
    pairs: site -> pair of each record; {} for the unedited model.
    batch: the records.

  Returns:
    Sums.
  """
  spec, maps, config = trial.spec, trial.maps, trial.config
  first, count = maps.layers[0], config.local_prompts
  deltas = repeated = ()
  if pairs:
    pairs = lib.by_group(pairs, config.edits)
    deltas = lib.low_rank(maps, pairs)
    repeat = lambda x: jnp.concatenate([x] * count, axis=1)
    repeated = lib.low_rank(maps, jax.tree.map(repeat, pairs))
  run = functools.partial(lib.leave, spec, params, first=first)
  out, _ = run(batch.outer_h, batch.outer, deltas=deltas)
  nll, right = lib.token_nll(spec, params, out, batch.outer.labels)
  scored = batch.outer.weight > 0
  local, local_h, base = _rolled(batch, count)
  out, _ = run(local_h, local, deltas=repeated)
  old, new = (
      jax.nn.log_softmax(decoder.logits(spec, params, h)) for h in (base, out)
  )
  kl = jnp.sum(jnp.exp(old) * (old - new), axis=-1)
  kept = local.weight > 0
  asked = scored.any(-1)
  return Losses(
      jnp.where(scored, nll, 0).sum(),
      scored.sum(),
      jnp.where(kept, kl, 0).sum(),
      kept.sum(),
      ((right | ~scored).all(-1) & asked).sum(),
      asked.sum(),
  )


def total(config: Training, found: Losses) -> Array:
  """The weighted loss of sums."""
  nll = found.nll / jnp.maximum(found.tokens, 1)
  kl = found.kl / jnp.maximum(found.local_tokens, 1)
  return config.edit_weight * nll + config.locality_weight * kl


def _factors(trial: Trial, params: Params, batch: Batch) -> Any:
  share, h = _share(trial, batch), batch.edit_h
  return lib.edit_factors(
      trial.spec, params, trial.maps, h, batch.edit, share=share
  )[0]


def gradient(
    trial: Trial, params: Params, variables: Variables, batch: Batch
) -> tuple[Array, Any, Any]:
  """Differentiates the loss with respect to a network's variables.

  Args:
    trial: what is trained.
    params: canonical parameters of the model, constants.
    variables: of the network.
    batch: the records.

  Returns:
    ([] loss, gradient of `variables.trained`, statistics with this batch).
  """
  found = _factors(trial, params, batch)
  statistics = trial.network.observe(variables.statistics, found)

  def loss(trained: Any) -> Array:
    now = Variables(trained, statistics)
    pairs = trial.network.transform(now, found, batch.edit, embedding(params))
    return total(trial.config, losses(trial, params, pairs, batch))

  value, grads = jax.value_and_grad(loss)(variables.trained)
  return value, grads, statistics


@functools.partial(jax.jit, static_argnames='trial', donate_argnames='state')
def step(
    trial: Trial, params: Params, state: State, batch: Batch
) -> tuple[State, Array]:
  """Trains on one batch.

  A batch whose gradient is not finite is left out.

  Args:
    trial: what is trained.
    params: canonical parameters of the model.
    state: the state; its memory is reused.
    batch: the records.

  Returns:
    (the state after the batch, [] its loss).
  """
  config = trial.config
  value, grads, statistics = gradient(trial, params, state.variables, batch)
  sound = all_finite((value, grads))
  keep = functools.partial(
      jax.tree.map, lambda new, old: jnp.where(sound, new, old)
  )
  added = keep(jax.tree.map(jnp.add, state.total, grads), state.total)
  statistics = keep(statistics, state.variables.statistics)
  if config.late_update:
    due = (state.step > 0) & (state.step % config.accumulate == 0)
  else:
    due = (state.step + 1) % config.accumulate == 0
  optimizer = optimizer_of(trial.network, config)

  def update(trained: Any, inner: Any, added: Any) -> tuple[Any, Any, Any]:
    mean = jax.tree.map(lambda x: x / config.accumulate, added)
    updates, inner = optimizer.update(mean, inner, trained)
    zeros = jax.tree.map(jnp.zeros_like, added)
    return optax.apply_updates(trained, updates), inner, zeros

  trained, inner, added = jax.lax.cond(
      due & (sound | (config.accumulate > 1)),
      update,
      lambda *now: now,
      state.variables.trained,
      state.optimizer,
      added,
  )
  counts = state.step + 1, state.skipped + ~sound
  return State(Variables(trained, statistics), inner, added, *counts), value


@functools.partial(jax.jit, static_argnames='trial')
def judge(
    trial: Trial, params: Params, variables: Variables | None, batch: Batch
) -> Losses:
  """Judges a network on held-out records; None the unedited model."""
  pairs: Any = {}
  if variables is not None:
    found = _factors(trial, params, batch)
    pairs = trial.network.transform(
        variables, found, batch.edit, embedding(params)
    )
  return losses(trial, params, pairs, batch)
