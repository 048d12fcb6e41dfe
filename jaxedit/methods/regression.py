"""Fits one block to wanted outputs, all of its parameters at once.

  min over W of  mean |block_W(S_in) - S_out|^2 + mean |block_W(X_in) - X_out|^2

by a fixed number of AdamW steps. X are the texts to edit, S texts whose outputs
shall stay. The inputs come from frozen layers below, so no other layer is run.
Texts lie end to end (`types.PackedSequences`), so short ones are not padded to
the longest. Independent groups are fitted side by side, each on a copy of the
block.

Axes as in `jaxedit.types`: groups, B texts, T tokens, N packed tokens, M
anchors of a group, D width.

Source: Deng et al. 2024 (UnKE, arXiv 2405.15349); decoupled decay as in
Loshchilov & Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching import packer
from jaxedit.batching.buckets import round_up
from jaxedit.methods import gradient
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import all_finite, wide
from jaxedit.types import Array, PackedSequences, Params


class Rule(NamedTuple):
  """Settings of the fit; numbers, so changing one does not recompile.

  Attributes:
    steps: updates.
    rate: learning rate.
    decay: weights shrink by rate * decay a step; norms do not.
  """

  steps: int
  rate: float
  decay: float


class Texts(NamedTuple):
  """Texts end to end.

  Attributes:
    tokens: [1, N] int32.
    rows: the B texts on N packed tokens.
    counted: [N] bool, tokens that take part in the mean.
  """

  tokens: Array
  rows: PackedSequences
  counted: Array


class Side(NamedTuple):
  """One of the two terms.

  Attributes:
    h: [1, N, D] input of the block.
    want: [1, N, D] wanted output.
    texts: what the packed tokens are.
  """

  h: Array
  want: Array
  texts: Texts


class Goals(NamedTuple):
  """Wanted states of groups.

  Attributes:
    place: [groups, M] int32 packed indices of the anchors; N where there is
      none.
    z: [groups, M, D].
  """

  place: Array
  z: Array


# Fewer tokens, of a text or of all, are not worth compiled code of their own.
_LEAST = (16, 64)


def shape_of(
    groups: Sequence[Sequence[Sequence[int]]],
    pads: bool,
    up: Callable[[int], int] = round_up,
) -> tuple[int, int, int]:
  """Chooses static shapes.

  Args:
    groups: the texts of every group.
    pads: whether texts are padded to the longest of their group.
    up: rounds a length up, so that other texts share compiled code.

  Returns:
    (texts, tokens of a text, tokens of all) that hold any of the groups.
  """
  longest = [max(map(len, texts), default=0) for texts in groups]
  tokens = [
      width * len(texts) if pads else sum(map(len, texts))
      for width, texts in zip(longest, groups)
  ]
  rows = max((len(texts) for texts in groups), default=0)
  sizes = max(longest, default=0), max(tokens, default=0)
  return up(max(rows, 1)), *(up(max(n, m)) for n, m in zip(sizes, _LEAST))


def pack(
    texts: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
    pad: int | None = None,
) -> Texts:
  """Packs texts.

  Args:
    texts: ids.
    shape: (B, T, N), each large enough.
    pad: token that fills every text up to the longest on its right, where it is
      run and counted, yet no token attends to it; None for no padding.

  Returns:
    Numpy arrays.
  """
  count, width, budget = shape
  real = np.zeros(count, np.int32)
  real[: len(texts)] = [len(ids) for ids in texts]
  run = real.copy()
  if pad is not None:
    run[: len(texts)] = real.max(initial=0)
  rows = packer.end_to_end(
      np.zeros_like(run), run, width=width, token_budget=budget, real=real
  )
  tokens = np.zeros([1, budget], np.int32)
  tokens[0, : run.sum()] = 0 if pad is None else pad
  for index, ids in zip(rows.index, texts):
    tokens[0, index[: len(ids)]] = ids
  return Texts(tokens, rows, rows.row < count)


def run_block(
    spec: ModelSpec, block: Params, h: Array, rows: PackedSequences
) -> Array:
  """Runs one block alone.

  Args:
    spec: the architecture.
    block: its parameters, without a layer axis.
    h: [1, N, D] residual before it.
    rows: the texts as packed sequences.

  Returns:
    [1, N, D] residual after it.
  """
  stack = {'layers': jax.tree.map(lambda w: w[None], block)}
  return decoder.run_layer(spec, stack, h, rows, layer=0)[0]


def _run_layers(*model: Any, start: int, stop: int) -> Array:
  """The residual stream that `decoder.run_layers` returns, without taps."""
  return decoder.run_layers(*model, start=start, stop=stop)[0]


@functools.partial(jax.jit, static_argnames=('spec', 'stop'))
def enter(spec: ModelSpec, params: Params, texts: Texts, *, stop: int) -> Array:
  """Runs texts up to a layer, [groups, 1, N, D]; [1, N, D] without groups."""

  def one(texts: Texts) -> Array:
    h = decoder.embed(spec, params, texts.tokens, texts.rows)
    return _run_layers(spec, params, h, texts.rows, start=0, stop=stop)

  return one(texts) if texts.tokens.ndim == 2 else jax.vmap(one)(texts)


def _between(
    spec: ModelSpec,
    params: Params,
    h: Array,
    rows: PackedSequences,
    *,
    start: int,
    stop: int,
) -> Array:
  """Runs layers start to stop - 1; rows have a group axis, or h alone."""
  one = functools.partial(_run_layers, spec, params, start=start, stop=stop)
  if h.ndim == 3:
    return one(h, rows)
  return jax.vmap(one, in_axes=(0, 0 if rows.row.ndim == 2 else None))(h, rows)


reach = jax.jit(_between, static_argnames=('spec', 'start', 'stop'))


@functools.partial(jax.jit, static_argnames=('spec', 'layer', 'last'))
def aim(
    spec: ModelSpec,
    params: Params,
    h: Array,
    rows: PackedSequences,
    goals: Goals | None,
    *,
    layer: int,
    last: int,
    share: float,
) -> tuple[Array, Array | None]:
  """Computes the wanted output of a block.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [groups, 1, N, D] its input.
    rows: the texts as packed sequences.
    goals: targets, or None for the present output.
    layer: number of the block.
    last: layer whose output the targets are.
    share: share of the residuals that this block inserts.

  Returns:
    (wanted output like h, [groups, M, D] present states after `last`).
  """
  run = functools.partial(_between, spec, params)
  out = run(h, rows, start=layer, stop=layer + 1)
  if goals is None:
    return out, None
  now = read(run(out, rows, start=layer + 1, stop=last + 1), goals)
  add = lambda x, place, away: x.at[0, place].add(away, mode='drop')
  return jax.vmap(add)(out, goals.place, share * (goals.z - now)), now


@jax.jit
def read(h: Array, goals: Goals) -> Array:
  """[groups, M, D] states at the anchors."""
  pick = functools.partial(jnp.take, axis=0, mode='fill', fill_value=0)
  return jax.vmap(pick)(h[:, 0], goals.place)


@functools.partial(jax.jit, static_argnames='spec')
def advance(
    spec: ModelSpec,
    block: Params,
    change: Params,
    h: Array,
    rows: PackedSequences,
) -> Array:
  """Runs every group's own block."""

  def one(change: Params, h: Array, rows: PackedSequences) -> Array:
    new = jax.tree.map(lambda w, d: (w + d).astype(w.dtype), block, change)
    return run_block(spec, new, h, rows)

  axes = (0, 0 if h.ndim == 4 else None, 0 if rows.row.ndim == 2 else None)
  return jax.vmap(one, in_axes=axes)(change, h, rows)


take = jax.jit(decoder.layer_params)


def error(out: Array, side: Side) -> Array:
  """Mean square difference from the wanted output, [] over counted tokens."""
  counted = side.texts.counted
  square = jnp.square(out - side.want)[0]
  total = jnp.sum(jnp.where(counted[:, None], square, 0))
  return total / (jnp.maximum(jnp.sum(counted), 1) * out.shape[-1])


def _decays(block: Params) -> Params:
  """Which parameters of a block shrink: all but those of norms."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not path[0].key.endswith('norm'), block
  )


def fit(
    spec: ModelSpec, block: Params, edited: Side, kept: Side, rule: Rule
) -> tuple[Params, Array]:
  """Fits the block of one group.

  The weights are kept in f32 or wider, also where the model is run in bf16.

  Args:
    spec: the architecture.
    block: the present parameters of the block.
    edited: texts with new outputs.
    kept: texts with their present outputs.
    rule: settings.

  Returns:
    (new - old of every parameter, in f32 or wider; [] bool, whether the loss
    and the change are finite, else the change is 0).
  """
  exact = jax.tree.map(lambda w: w.astype(wide(w.dtype)), block)

  def loss(weights: Params, step: Array) -> tuple[Array, Array]:
    del step
    weights = jax.tree.map(lambda w, old: w.astype(old.dtype), weights, block)
    run = lambda s: run_block(spec, weights, s.h, s.texts.rows)
    total = error(run(kept), kept) + error(run(edited), edited)
    return total, total

  optimizer = gradient.adamw(rule.rate, rule.decay, _decays)
  weights, value, _ = gradient.fit(loss, exact, optimizer, steps=rule.steps)
  change = jax.tree.map(jnp.subtract, weights, exact)
  sound = all_finite((value, change))
  return jax.tree.map(lambda x: jnp.where(sound, x, 0), change), sound


@functools.partial(jax.jit, static_argnames='spec')
def fit_groups(
    spec: ModelSpec, block: Params, edited: Side, kept: Side, rule: Rule
) -> tuple[Params, Array]:
  """Fits a copy of the block for every group; see `fit`.

  Args:
    spec: the architecture.
    block: the present parameters of the block, the same for all groups.
    edited: with a leading axis G on every array.
    kept: without it where all groups have the same states; else `h` and `want`
      have it.
    rule: settings.

  Returns:
    (changes with a leading axis of groups, [groups] bool).
  """
  own = 0 if kept.h.ndim == 4 else None
  one = functools.partial(fit, spec)
  axes = (None, 0, Side(own, own, None), None)
  return jax.vmap(one, in_axes=axes)(block, edited, kept, rule)
