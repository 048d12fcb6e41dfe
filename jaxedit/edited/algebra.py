"""Applying, adding, stacking and compacting deltas.

  apply      W_l + X_l in a copy of the edited leaves; nothing else is copied
  add        the running sum of sequential edits
  stack      independent edits side by side, on an axis of their own
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


def leaf(delta: Delta) -> str:
  """The parameter that a change is of, 'kernel', 'bias' or 'scale'."""
  return delta.leaf if isinstance(delta, Dense) else 'kernel'


def path(delta: Delta) -> str:
  """The canonical path of the changed parameter, see `models.spec`."""
  return f'layers/{delta.site}/{leaf(delta)}'


def kernel(delta: Delta) -> Array:
  """The change in full.

  Args:
    delta: a change without an edit axis.

  Returns:
    [n, in, out], or [n, size] of a bias or a scale.
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


def _place(delta: Delta) -> tuple[tuple[int, ...], str]:
  return delta.layers, path(delta)


def _add(a: Delta, b: Delta) -> Delta:
  """Adds two changes of one place."""
  if isinstance(a, LowRank) and isinstance(b, LowRank):
    join = lambda x, y: jnp.concatenate([x, y], axis=1)
    both = LowRank(a.layers, a.site, join(a.key, b.key), join(a.value, b.value))
    return compact(both)
  return Dense(a.layers, a.site, kernel(a) + kernel(b), leaf(a))


def add(first: Edited, second: Edited) -> Edited:
  """Adds the deltas of two edits made one after the other.

  Args:
    first: the earlier edit.
    second: an edit of the model that `first` gave.

  Returns:
    One edit with the effect of both.

  Raises:
    ValueError: the edits change different parameters or sets of layers.
  """
  if not first.deltas:
    return second
  if not second.deltas:
    return first
  later = {_place(delta): delta for delta in second.deltas}
  if {_place(delta) for delta in first.deltas} != set(later):
    raise ValueError(
        'only deltas of the same layers and sites can be added, kernels to'
        ' kernels, biases to biases and scales to scales'
    )
  return Edited(deltas=tuple(_add(a, later[_place(a)]) for a in first.deltas))


def apply(params: Params, edited: Edited, dtype: Any = None) -> Params:
  """Merges a change into a copy of the edited leaves.

  Args:
    params: canonical parameters; untouched, and shared wherever not edited.
    edited: changes without an edit axis.
    dtype: dtype of the edited leaves; theirs unless given. float32 keeps a
      change to bf16 weights free of rounding.

  Returns:
    Parameters of the edited model.

  Raises:
    ValueError: several edits lie side by side; pick `one`.
  """
  merged = params
  for delta in edited.deltas:
    if _side_by_side(delta):
      raise ValueError(
          f'the change of {path(delta)} is several edits side by side; pick'
          ' `one` of them'
      )
    names = path(delta).split('/')
    old = merged
    for name in names:
      old = old[name]
    rows = jnp.asarray(delta.layers)
    exact = old[rows].astype(wide(old.dtype)) + kernel(delta)
    new = old.astype(dtype or old.dtype)
    new = new.at[rows].set(exact.astype(new.dtype))
    merged = _replace(merged, names, new)
  return merged


def _side_by_side(delta: Delta) -> bool:
  """Whether a change has an edit (or row) axis."""
  if isinstance(delta, LowRank):
    return delta.key.ndim == 4
  return delta.kernel.ndim != (3 if delta.leaf == 'kernel' else 2)


def _replace(tree: Params, path: Sequence[str], leaf: Array) -> dict[str, Any]:
  """Copies a nested dict along one path."""
  name, *rest = path
  below = _replace(tree[name], rest, leaf) if rest else leaf
  return {**tree, name: below}


def stack(edits: Sequence[Edited]) -> Edited:
  """Puts independent edits side by side.

  Args:
    edits: edits of the same parameters, layers and rank.

  Returns:
    One `Edited` whose factors are [n, E, M, .], see `rows`, and whose full
    changes are [n, E, ...], see `one`.
  """
  return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *edits)


def rows(edited: Edited, owner: Array) -> Edited:
  """Gives every row of a batch the change of its owner.

  Args:
    edited: stacked factors [n, E, M, .]. No model runs rows under full changes
      of their own: give it the rows of `one` edit at a time.
    owner: [B] int32 edit of every row.

  Returns:
    Factors [n, B, M, .].
  """
  return jax.tree.map(lambda x: jnp.take(x, owner, axis=1), edited)


def one(edited: Edited, index: int) -> Edited:
  """Picks one of the stacked edits, as a change for any number of rows."""
  return jax.tree.map(lambda x: x[:, index], edited)
