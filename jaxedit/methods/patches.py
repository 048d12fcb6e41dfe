"""What methods that add neurons to the last MLP share: T-Patcher and CaliNET.

  out'(x) = out + sum_i v_i act(k_i . x + b_i)

x is the input of the last block's MLP and out the output of that block. Added
neurons change neither, so a fit reads both once and then runs nothing but the
final norm and the head at the tokens that foretell the target.

Axis letters: E edits, R rows (an edit in one context), n foretelling tokens of
a row, P neurons, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching import edits as edits_lib
from jaxedit.batching.buckets import round_up
from jaxedit.batching.edits import PackedBatch
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import ACTIVATIONS, Edited, Neurons
from jaxedit.edited import ledger as ledger_lib
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, Params, Tap

SITE = 'mlp'
# Neurons are kept in arrays of at least so many, doubled when full, so that a
# stream of edits compiles few shapes.
_LEAST = 64


class Tail(NamedTuple):
  """The last block at the tokens that foretell targets.

  Attributes:
    x: [R, n, D] input of its MLP.
    out: [R, n, D] its output.
    label: [R, n] int32 tokens to foretell.
    mask: [R, n] bool, False at padding.
    edit: [R] int32 edit of a row.
  """

  x: Any
  out: Any
  label: Any
  mask: Any
  edit: Any


class Patch(NamedTuple):
  """Neurons; unused ones are zero and add nothing where act(0) = 0.

  Attributes:
    key: [P, D].
    bias: [P].
    value: [P, D].
  """

  key: Any
  bias: Any
  value: Any


@functools.partial(jax.jit, static_argnames='spec')
def _read(
    spec: ModelSpec, params: Params, batch: PackedBatch, index: Array
) -> tuple[Array, Array]:
  """(x, out) [B, n, D] at packed indices [B, n] of whole texts."""
  pick = lambda x: jnp.take(x[0], index, axis=0, mode='fill', fill_value=0)
  h = decoder.embed(spec, params, batch.tokens, batch.rows)
  tap = Tap('mlp/up', (spec.layers - 1,), pick)
  h, (x,) = decoder.run_layers(
      spec, params, h, batch.rows, start=0, stop=spec.layers, taps=(tap,)
  )
  exact = lambda y: y.astype(wide(y.dtype))
  return exact(x[0]), exact(pick(h))


def tail_of(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    *,
    plain: bool,
) -> Tail:
  """Runs texts through the model and keeps their tail.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits of one chunk each.
    plan: static shapes of the run.
    plain: the plain prompts alone; else all contexts.

  Returns:
    Numpy arrays, rows by edit; n is the same for all edits of a plan.
  """
  most = round_up(max(shape.labels for shape in plan.shapes))
  parts: list[Tail] = []
  for side in (True,) if plain else (True, False):
    plan = plan.independent()
    for batch in edits_lib.pack_prompts(edits, plan, plain=side, text=True):
      part = _part(edits, batch, most)
      x, out = _read(spec, params, batch, part.x)
      used = batch.edit >= 0
      part = part._replace(x=fetch(x), out=fetch(out))
      parts.append(Tail(*(leaf[used] for leaf in part)))
  whole = Tail(*map(np.concatenate, zip(*parts)))
  order = np.argsort(whole.edit, kind='stable')
  return Tail(*(leaf[order] for leaf in whole))


def _part(edits: Sequence[EncodedEdit], batch: PackedBatch, most: int) -> Tail:
  """Where the foretelling tokens of a packed batch are; `x` holds the index."""
  count = len(batch.edit)
  index = np.full((count, most), batch.tokens.shape[1], np.int32)
  label = np.zeros((count, most), np.int32)
  mask = np.zeros((count, most), bool)
  for b, (i, c) in enumerate(zip(batch.edit, batch.context)):
    if i < 0:
      continue
    stage = edits[i].stage(0, int(c))
    n = len(stage.labels)
    index[b, :n] = batch.rows.index[b, stage.first : stage.first + n]
    label[b, :n], mask[b, :n] = stage.labels, True
  return Tail(index, None, label, mask, batch.edit)


def inputs_of(
    spec: ModelSpec, params: Params, texts: Sequence[np.ndarray]
) -> np.ndarray:
  """Reads the inputs of the last MLP at all tokens of texts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    texts: token ids.

  Returns:
    [tokens, D], without those of a source.
  """
  width = round_up(max(map(len, texts)))
  found = []
  for first in range(0, len(texts), 8):
    some = texts[first : first + 8]
    tokens = np.zeros((8, width), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(some):
      tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    x = fetch(_inputs(spec, params, tokens, valid))
    found.append(x[valid & (tokens >= 0)])
  return np.concatenate(found)


@functools.partial(jax.jit, static_argnames='spec')
def _inputs(
    spec: ModelSpec, params: Params, tokens: Array, valid: Array
) -> Array:
  layout = decoder.token_layout(valid, decoder.source_of(spec, tokens))
  h = decoder.embed(spec, params, tokens, layout)
  tap = Tap('mlp/up', (spec.layers - 1,))
  _, (x,) = decoder.run_layers(
      spec, params, h, layout, start=0, stop=spec.layers, taps=(tap,)
  )
  return x[0].astype(wide(x.dtype))


def added(patch: Patch, x: Array, activation: str) -> Array:
  """What neurons add to the output at inputs [..., D]."""
  pre = jnp.einsum('...d,pd->...p', x, patch.key, precision='highest')
  act = ACTIVATIONS[activation](pre + patch.bias)
  return jnp.einsum('...p,pd->...d', act, patch.value, precision='highest')


def under(patch: Patch, tail: Tail, activation: str) -> Tail:
  """The tail of texts with neurons in force."""
  return tail._replace(out=tail.out + added(patch, tail.x, activation))


def no_neurons(width: int, dtype: Any) -> Patch:
  """Makes an empty array of neurons."""
  zeros = lambda *shape: np.zeros((_LEAST, *shape), dtype)
  return Patch(zeros(width), zeros(), zeros(width))


def appended(patch: Patch, count: int, more: Patch) -> Patch:
  """Puts neurons behind the first `count`; arrays are doubled when full."""
  need, size = count + len(more.bias), len(patch.bias)
  while size < need:
    size *= 2

  def join(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    whole = np.zeros((size, *old.shape[1:]), old.dtype)
    whole[:count], whole[count:need] = old[:count], new
    return whole

  return Patch(*map(join, patch, more))


def edited_of(
    spec: ModelSpec, states: Sequence[Any], activation: str, *, joint: bool
) -> Edited:
  """Makes the edit of one state, or of several side by side.

  Args:
    spec: the architecture.
    states: each with its `patch`, the `count` of neurons in use, and `groups`,
      which of them are whose (see `edited.ledger`).
    activation: of the neurons.
    joint: whether there is one state, that of all edits.

  Returns:
    The edit.
  """
  size = None if joint else len(states)
  if not any(state.count for state in states):
    return Edited(size=size)
  most = max(len(state.patch.bias) for state in states)
  padded = [grown(state.patch, most) for state in states]
  stack = (lambda x: x[0]) if joint else np.stack
  leaves = (jnp.asarray(stack(x))[None] for x in zip(*padded))
  layers = (spec.layers - 1,)
  neurons = Neurons(layers, SITE, *leaves, activation=activation)
  named = ledger_lib.names_of(states[0].groups) if joint else []
  ledger = ledger_lib.of_groups(named) if named else None
  return Edited((neurons,), size=size, ledger=ledger)


def grown(patch: Patch, size: int) -> Patch:
  """Pads neurons to `size` with unused ones."""
  pad = lambda x: np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
  return Patch(*map(pad, patch))


def seed_of(edit: EncodedEdit) -> int:
  """A seed that depends on the edit alone, not on its place in a batch."""
  return zlib.crc32(edit.text(0).astype(np.int32).tobytes())
