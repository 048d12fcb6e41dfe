"""Applying, adding, stacking and compacting deltas.

  apply      W_l + X_l in a copy of the edited leaves; nothing else is copied
  add        the running sum of sequential edits
  stack      independent edits side by side, on a row axis
  compact    factors while they are smaller than the matrix, else dense

X_l = key_l^T value_l costs M (F + D) numbers against F D: factors are smaller
while M < F D / (F + D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.models.blocks import wide
from jaxedit.types import Array, Delta, Dense, Edited, LowRank, Params


def kernel(delta: Delta) -> Array:
  """The change as full matrices.

  Args:
    delta: a change without a row axis.

  Returns:
    [n, in, out].
  """
  if isinstance(delta, Dense):
    return delta.kernel
  return jnp.einsum('lmf,lmd->lfd', delta.key, delta.value, precision='highest')


def rank_limit(fan_in: int, fan_out: int) -> int:
  """The largest M at which factors are smaller than the matrix."""
  return (fan_in * fan_out - 1) // (fan_in + fan_out)


def compact(delta: Delta) -> Delta:
  """Turns factors into matrices where that is smaller.

  Args:
    delta: a change without a row axis.

  Returns:
    The same change in the smaller form.
  """
  if isinstance(delta, Dense):
    return delta
  rank, fan_in = delta.key.shape[-2:]
  if rank <= rank_limit(fan_in, delta.value.shape[-1]):
    return delta
  return Dense(delta.layers, delta.site, kernel(delta))


def _same_place(a: Delta, b: Delta) -> bool:
  return (a.layers, a.site) == (b.layers, b.site)


def _add(a: Delta, b: Delta) -> Delta:
  """Adds two changes of the same layers and site."""
  if isinstance(a, LowRank) and isinstance(b, LowRank):
    join = lambda x, y: jnp.concatenate([x, y], axis=1)
    both = LowRank(a.layers, a.site, join(a.key, b.key), join(a.value, b.value))
    return compact(both)
  return Dense(a.layers, a.site, kernel(a) + kernel(b))


def add(first: Edited, second: Edited) -> Edited:
  """Adds the deltas of two edits made one after the other.

  Args:
    first: the earlier edit.
    second: an edit of the model that `first` gave.

  Returns:
    One edit with the effect of both.

  Raises:
    ValueError: the edits change overlapping but different sets of layers, or
      are not both changes of kernels.
  """
  if not first.deltas:
    return second
  if not second.deltas:
    return first
  pairs = list(zip(first.deltas, second.deltas, strict=True))
  if not all(_same_place(a, b) for a, b in pairs):
    raise ValueError('only deltas of the same layers and sites can be added')
  return Edited(deltas=tuple(_add(a, b) for a, b in pairs))


def apply(params: Params, edited: Edited, dtype: Any = None) -> Params:
  """Merges a change into a copy of the edited leaves.

  Args:
    params: canonical parameters; untouched, and shared wherever not edited.
    edited: kernel changes without a row axis.
    dtype: dtype of the edited leaves; theirs unless given. float32 keeps a
      change to bf16 weights free of rounding.

  Returns:
    Parameters of the edited model.
  """
  merged = params
  for delta in edited.deltas:
    path = ('layers', *delta.site.split('/'), 'kernel')
    old = merged
    for name in path:
      old = old[name]
    rows = jnp.asarray(delta.layers)
    exact = old[rows].astype(wide(old.dtype)) + kernel(delta)
    new = old.astype(dtype or old.dtype)
    new = new.at[rows].set(exact.astype(new.dtype))
    merged = _replace(merged, path, new)
  return merged


def _replace(tree: Params, path: Sequence[str], leaf: Array) -> dict[str, Any]:
  """Copies a nested dict along one path."""
  name, *rest = path
  below = _replace(tree[name], rest, leaf) if rest else leaf
  return {**tree, name: below}


def stack(edits: Sequence[Edited]) -> Edited:
  """Puts independent low-rank edits side by side.

  Args:
    edits: edits of the same layers, sites and rank.

  Returns:
    One `Edited` whose factors are [n, E, M, .]; see `rows`.
  """
  return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *edits)


def rows(edited: Edited, owner: Array) -> Edited:
  """Gives every row of a batch the change of its owner.

  Args:
    edited: stacked factors [n, E, M, .].
    owner: [B] int32 edit of every row.

  Returns:
    Factors [n, B, M, .].
  """
  return jax.tree.map(lambda x: jnp.take(x, owner, axis=1), edited)


def one(edited: Edited, index: int) -> Edited:
  """Picks one of the stacked edits, as a change for any number of rows."""
  return jax.tree.map(lambda x: x[:, index], edited)
