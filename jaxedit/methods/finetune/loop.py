"""Fits parameters to targets by gradient descent, edits side by side.

  loss = sum over texts of share * mean over target tokens of -log P(token)

by Adam, each independent edit on parameters of its own, until its own loss is
below a threshold; then it stays as it is. A `Fitted` says which parameters: a
matrix (`ft`) or factors (`lora`).

What lies below the lowest of them is run once, before the first update, and is
kept: the residual stream, and the input of the map where only 'mlp/down'
changes there. A step runs the layers above, the last one and the head at
scored tokens only. No token is constant above that layer, as the change of a
map acts on all of them: unlike in `targets` there is no constant prefix. But for
sources: layers over an encoder leave them as they are, so where only such layers
change, their keys and values are kept and a step runs the other tokens.

Axes as in `jaxedit.types`; `groups` independent edits or joint batches,
`minibatches` of a group; labels: tokens scored at one output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxedit.deltas import SiteDelta
from jaxedit.methods import gradient
from jaxedit.methods.finetune.examples import Examples
from jaxedit.models import decoder, packing
from jaxedit.models.spec import ModelSpec
from jaxedit.types import KV, PADDING, Array, Params, Tap

# The linear map whose output is added to the residual stream at once.
_DOWN = 'mlp/down'
# Outputs whose logits are held at one time; more are scored piece by piece.
_PIECE = 256


class Noise(NamedTuple):
  """Randomness of one step, the same for a text wherever it lies.

  Attributes:
    key: of the step.
    salt: [N] uint32, differs from token to token.
    output_salt: [O], that of the output tokens; O is not N.
  """

  key: Array
  salt: Array
  output_salt: Array

  def salt_of(self, tokens: int) -> Array:
    """Salt of the tokens that a map sees: all, or in the last layer outputs."""
    return self.salt if tokens == self.salt.shape[-1] else self.output_salt


class Fitted(Protocol):
  """Parameters that are fitted; hashable. `values` is a pytree of one group.

  Attributes:
    layers: ascending layer numbers.
    sites: linear maps that change.
    noisy: whether `deltas` uses noise.
  """

  layers: tuple[int, ...]
  sites: tuple[str, ...]
  noisy: bool

  def deltas(
      self, values: Any, fixed: Any, noise: Noise | None
  ) -> tuple[SiteDelta, ...]:
    """The change of the model, differentiable in `values`."""

  def penalty(self, values: Any) -> Array:
    """[] what is added to the loss."""

  def project(self, values: Any, fixed: Any) -> Any:
    """The nearest values that are allowed."""


class Rule(NamedTuple):
  """Settings of a fit; numbers, so changing one does not recompile.

  Attributes:
    epochs: passes over all minibatches at most.
    rate: Adam's learning rate.
    stop_loss: nats, see `gradient.fit`.
    seed: of noise.
  """

  epochs: int
  rate: float
  stop_loss: float
  seed: int = 0


class Entry(NamedTuple):
  """Where the layers that can change begin.

  Attributes:
    h: [1, N, D] residual stream before them; [1, N', D] without sources, where
      they are constant.
    key: [1, N, F] input of 'mlp/down' of the layer before them, which changes
      too; None where none does.
    sources: keys and values of constant sources.
  """

  h: Array
  key: Array | None
  sources: KV | None = None


@functools.partial(jax.jit, static_argnames=('spec', 'fitted'))
def enter(
    spec: ModelSpec, params: Params, fitted: Fitted, examples: Examples
) -> tuple[Entry, Array]:
  """Runs the layers that stay as they are, and then the others once.

  Args:
    spec: the architecture.
    params: canonical parameters.
    fitted: what changes.
    examples: [groups, minibatches, ...].

  Returns:
    (where the layers that change begin, [groups, minibatches, ...]; [groups,
    minibatches, B] mean negative log-likelihood of a target token of the
    unchanged model, nats).
  """
  lowest = fitted.layers[0]
  down = fitted.sites == (_DOWN,)
  taps = (Tap(_DOWN, (lowest,)),) if down else ()
  above = tuple(range(lowest + down, spec.layers))

  def one(examples: Examples) -> tuple[Entry, Array]:
    rows, answers = examples.rows, examples.answers
    h = decoder.embed(spec, params, examples.tokens, rows)
    h, seen = decoder.run_layers(
        spec, params, h, rows, start=0, stop=lowest + down, taps=taps
    )
    entry = Entry(h, seen[0][0] if down else None)
    if _cut_off(spec, fitted, examples):
      own = lambda x: packing.take(x, answers.tokens)
      kept = None
      if above:
        _, (kv,) = decoder.run_layers(
            spec, params, h, rows, start=above[0], stop=spec.layers,
            taps=(Tap('kv', above),),
        )  # fmt: skip
        layout = rows.layout
        segments = jnp.where(layout.source, layout.segment_ids, PADDING)
        kept = KV(*kv, layout.replace(segment_ids=segments))
      entry = Entry(own(h), own(entry.key) if down else None, kept)
    return entry, _scores(spec, params, fitted, (), examples, entry)

  return jax.vmap(jax.vmap(one))(examples)


def _cut_off(spec: ModelSpec, fitted: Fitted, examples: Examples) -> bool:
  """Whether there are sources whose keys and values are constant."""
  read = {'cross/k', 'cross/v'} & {*fitted.sites}
  lower = fitted.layers[0] < spec.encoder_layers
  return examples.answers is not None and not lower and not read


def _scores(
    spec: ModelSpec,
    params: Params,
    fitted: Fitted,
    deltas: Sequence[SiteDelta],
    examples: Examples,
    entry: Entry,
) -> Array:
  """[B] mean negative log-likelihood of a target token, nats."""
  h, rows, outputs = entry.h, examples.rows, examples.outputs
  lowest = fitted.layers[0]
  if _cut_off(spec, fitted, examples):
    rows, outputs = examples.answers.tokens.rows, examples.answers.outputs
  if entry.key is not None:
    others = decoder.passing(spec, rows, lowest)
    lowest += 1
    for delta in deltas:
      first = jax.tree.map(lambda x: x[0], delta)
      changed = first(entry.key, h).astype(h.dtype)
      h = changed if others is None else jnp.where(others, h, changed)
  h, _ = decoder.run_layers(
      spec, params, h, rows, start=lowest, stop=spec.layers,
      prefix=entry.sources, deltas=deltas, outputs=outputs,
      remat=decoder.SAVE_PRODUCTS,
  )  # fmt: skip
  nll = _nll(spec, params, h[0], examples.labels, examples.weights)
  row = outputs.rows.row
  mine = row == jnp.arange(len(examples.share))[:, None]
  return jnp.sum(jnp.where(mine, nll, 0), axis=1)


def _nll(
    spec: ModelSpec, params: Params, h: Array, labels: Array, weights: Array
) -> Array:
  """[O] weighted negative log-likelihood of the labels of outputs [O, D]."""

  def some(args: tuple[Array, Array, Array]) -> Array:
    h, labels, weights = args
    logits = decoder.logits(spec, params, h)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprob = jnp.take_along_axis(logits, labels, axis=1) - total
    return -jnp.sum(jnp.where(weights > 0, weights * logprob, 0), axis=1)

  args = h, labels, weights
  if len(h) <= _PIECE:
    return some(args)
  rest = -len(h) % _PIECE
  pad = lambda x: jnp.pad(x, ((0, rest), (0, 0)))
  cut = lambda x: pad(x).reshape(-1, _PIECE, x.shape[1])
  found = jax.lax.map(jax.checkpoint(some), jax.tree.map(cut, args))
  return found.reshape(-1)[: len(h)]


@functools.partial(jax.jit, static_argnames=('spec', 'fitted'))
def fit_groups(
    spec: ModelSpec,
    params: Params,
    fitted: Fitted,
    values: Any,
    fixed: Any,
    examples: Examples,
    entry: Entry,
    rule: Rule,
) -> tuple[gradient.Fit, Array]:
  """Fits the values of every group; see the head of this module.

  Args:
    spec: the architecture.
    params: canonical parameters.
    fitted: what changes.
    values: where all groups begin.
    fixed: what `Fitted` takes besides.
    examples: [groups, minibatches, ...].
    entry: what `enter` gave.
    rule: settings.

  Returns:
    ([groups, ...] fits; [groups, minibatches, B] mean negative log-likelihood
    of a target token under them, without noise, nats).
  """
  minibatches = examples.tokens.shape[1]
  score = functools.partial(_scores, spec, params, fitted)

  def group(examples: Examples, entry: Entry) -> tuple[gradient.Fit, Array]:
    def loss(values: Any, step: Array) -> tuple[Array, Array]:
      i = step % minibatches if minibatches > 1 else 0
      now, start = jax.tree.map(lambda x: x[i], (examples, entry))
      noise = None
      if fitted.noisy:
        key = jax.random.fold_in(jax.random.key(rule.seed), step)
        salt, outputs = now.salt, now.outputs
        if _cut_off(spec, fitted, now):
          pick = functools.partial(jnp.take, mode='fill', fill_value=0)
          salt = pick(salt, now.answers.tokens.index)
          outputs = now.answers.outputs
        picked = jnp.take(salt, outputs.index, mode='fill', fill_value=0)
        noise = Noise(key, salt, picked)
      nll = score(fitted.deltas(values, fixed, noise), now, start)
      value = jnp.sum(jnp.where(now.share > 0, now.share * nll, 0))
      return value + fitted.penalty(values), value

    fit = gradient.fit(
        loss,
        values,
        optax.adam(rule.rate),
        steps=rule.epochs,
        stop_loss=rule.stop_loss,
        project=lambda values: fitted.project(values, fixed),
        minibatches=minibatches,
    )
    deltas = fitted.deltas(fit.values, fixed, None)
    one = lambda examples, entry: score(deltas, examples, entry)
    return fit, jax.vmap(one)(examples, entry)

  return jax.vmap(group)(examples, entry)
