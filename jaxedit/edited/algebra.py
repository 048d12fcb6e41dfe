"""Applying, adding, stacking, selecting, reverting and compacting edits.

  apply      W_l + X_l in a copy of the edited leaves; nothing else is copied
  add        the running sum of edits made one after the other
  stack      independent edits side by side, on an axis of their own
  select     one of the edits side by side
  revert     weights of an edited model without the edit
  compact    factors while they are smaller than the matrix, else dense

X_l = key_l^T value_l costs M (F + D) numbers against F D: factors are smaller
while M < F D / (F + D).

Axis letters: n edited layers, E edits side by side, M pairs, F key width, D
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.deltas import Dense, Edited, LowRank, SiteDelta
from jaxedit.models import spec as spec_lib
from jaxedit.numerics import wide
from jaxedit.types import Array, InputError, Params


def leaf(delta: SiteDelta) -> str:
  """Returns the parameter a delta changes: 'kernel', 'bias' or 'scale'."""
  return delta.leaf if isinstance(delta, Dense) else 'kernel'


def path(delta: SiteDelta) -> str:
  """Returns the canonical path of the changed parameter, see `models.spec`."""
  return f'layers/{delta.site}/{leaf(delta)}'


def changed(edited: Edited) -> list[tuple[str, int]]:
  """Lists (path, layer) of every parameter that an edit changes."""
  return [(path(delta), n) for delta in edited.deltas for n in delta.layers]


def full(delta: LowRank | Dense) -> Array:
  """Computes a change of a parameter in full.

  Args:
    delta: of one edit.

  Returns:
    [n, in, out], or [n, size] of a bias or a scale.
  """
  if isinstance(delta, Dense):
    return delta.value
  return jnp.einsum('lmf,lmd->lfd', delta.key, delta.value, precision='highest')


def rank_limit(fan_in: int, fan_out: int) -> int:
  """Returns the largest M at which factors are smaller than the matrix."""
  return (fan_in * fan_out - 1) // (fan_in + fan_out)


def compact(delta: SiteDelta) -> SiteDelta:
  """Turns factors into matrices where that is smaller.

  Args:
    delta: of one edit.

  Returns:
    The same delta in the smaller form.
  """
  if not isinstance(delta, LowRank):
    return delta
  rank, fan_in = delta.key.shape[-2:]
  if rank <= rank_limit(fan_in, delta.value.shape[-1]):
    return delta
  return Dense(delta.layers, delta.site, full(delta))


def _place(delta: SiteDelta) -> tuple[tuple[int, ...], str]:
  return delta.layers, path(delta)


def _add(a: SiteDelta, b: SiteDelta) -> SiteDelta:
  """Adds two changes of the same parameters."""
  if isinstance(a, LowRank) and isinstance(b, LowRank):
    join = lambda x, y: jnp.concatenate([x, y], axis=1)
    both = LowRank(a.layers, a.site, join(a.key, b.key), join(a.value, b.value))
    return compact(both)
  return Dense(a.layers, a.site, full(a) + full(b), leaf(a))


def add(first: Edited, second: Edited) -> Edited:
  """Adds two edits made one after the other.

  Changes of weights are summed. Deltas of other kinds stand one after the
  other: the later one sees what the earlier one returns.

  Args:
    first: the earlier edit.
    second: an edit of the model that `first` gave.

  Returns:
    One edit with the effect of both.

  Raises:
    ValueError: the edits lie side by side, change different parameters or
      layers, or both have a prompting or a routing rule.
  """
  if first.size is not None or second.size is not None:
    raise ValueError('edits side by side are not added; select one of them')
  for rule in ('prompting', 'routing'):
    if getattr(first, rule) is not None and getattr(second, rule) is not None:
      raise ValueError(
          f'both edits have a {rule} rule; edit the memory of the first instead'
      )
  rules = {
      rule: getattr(first, rule) or getattr(second, rule)
      for rule in ('prompting', 'routing')
  }
  ours, theirs = ([d for d in e.deltas if d.mergeable] for e in (first, second))
  rest = [d for e in (first, second) for d in e.deltas if not d.mergeable]
  if ours and theirs:
    later = {_place(delta): delta for delta in theirs}
    if {_place(delta) for delta in ours} != set(later):
      raise ValueError(
          'only deltas of the same layers and sites can be added, kernels to'
          ' kernels, biases to biases and scales to scales'
      )
    ours, theirs = [_add(a, later[_place(a)]) for a in ours], []
  # Of two deltas beside the weights nothing would say what is whose.
  ledgers = [e.ledger for e in (first, second) if e.ledger is not None]
  ledger = ledgers[0] if len(ledgers) == 1 and len(rest) == 1 else None
  return Edited((*ours, *theirs, *rest), **rules, ledger=ledger)


def apply(params: Params, edited: Edited, dtype: Any = None) -> Params:
  """Merges an edit into a copy of the edited leaves.

  Args:
    params: canonical parameters; untouched, and shared wherever not edited.
    edited: an edit that is a change of weights.
    dtype: dtype of the edited leaves; theirs unless given. float32 keeps a
      change to bf16 weights free of rounding.

  Returns:
    Parameters of the edited model.

  Raises:
    InputError: the edit cannot be merged, or is of another model.
  """
  if edited.unmergeable:
    raise InputError(f'the edit cannot be merged: {edited.unmergeable}')
  merged = params
  for delta in edited.deltas:
    names = path(delta).split('/')
    old, rows = _leaf(merged, names), ()
    if old is not None:
      depth = spec_lib.depth_of(merged)
      rows = [spec_lib.row(depth, len(old), n) for n in delta.layers]
    if old is None or not all(0 <= n < len(old) for n in rows):
      raise InputError(
          f'the edit changes {path(delta)} of layers {list(delta.layers)}, which'
          ' the model does not have; load the model it was made for'
      )
    change = full(delta)
    if change.shape[1:] != old.shape[1:]:
      raise InputError(
          f'the edit changes {path(delta)} by {list(change.shape[1:])}, where the'
          f' model has {list(old.shape[1:])}; load the model it was made for'
      )
    rows = jnp.asarray(rows)
    exact = old[rows].astype(wide(old.dtype)) + change
    new = old.astype(dtype or old.dtype)
    new = new.at[rows].set(exact.astype(new.dtype))
    merged = _replace(merged, names, new)
  return merged


def revert(params: Params, base: Params, edited: Edited) -> Params:
  """Puts the original leaves back where an edit was merged.

  Args:
    params: parameters that `apply` returned.
    base: parameters before.
    edited: the edit.

  Returns:
    `params` with the edited leaves of `base`, bit for bit.
  """
  for delta in edited.deltas:
    if not delta.mergeable:
      continue
    names = path(delta).split('/')
    old = base
    for name in names:
      old = old[name]
    params = _replace(params, names, old)
  return params


def _leaf(params: Params, names: Sequence[str]) -> Array | None:
  """Looks up a leaf; None where there is none."""
  node: Any = params
  for name in names:
    node = node.get(name) if isinstance(node, Mapping) else None
  return None if isinstance(node, Mapping) else node


def _replace(tree: Params, path: Sequence[str], leaf: Array) -> dict[str, Any]:
  """Copies a nested dict along one path."""
  name, *rest = path
  below = _replace(tree[name], rest, leaf) if rest else leaf
  return {**tree, name: below}


def stack(edits: Sequence[Edited]) -> Edited:
  """Puts independent edits side by side.

  Args:
    edits: edits of the same kinds, sites and layers, without routing; all or
      none with prompting. Those of lower rank, fewer neurons, entries or shards are padded
      with zeros, which change nothing.

  Returns:
    One `Edited` of size E.

  Raises:
    ValueError: an edit lies side by side already, has a rule, or has other
      kinds, sites, layers or widths than the first.
  """
  for edited in edits:
    if edited.size is not None or edited.routing is not None:
      raise ValueError('only single edits without rules can be stacked')
  deltas = zip(*(edited.deltas for edited in edits), strict=True)
  first, *rest = (edited.prompting for edited in edits)
  if any((one is None) != (first is None) for one in rest):
    raise ValueError('some of the edits have a prompting rule and some do not')
  prompting = None if first is None else first.stack(rest)
  return Edited(
      tuple(_stack(*some) for some in deltas),
      prompting=prompting,
      size=len(edits),
  )


def _stack(*deltas: SiteDelta) -> SiteDelta:
  """Puts deltas of independent edits side by side."""

  def join(*leaves: Array) -> Array:
    if leaves[0].ndim > 1 and not isinstance(deltas[0], Dense):
      most = max(x.shape[1] for x in leaves)
      rest = ((0, 0),) * (leaves[0].ndim - 2)
      grow = lambda x: jnp.pad(x, ((0, 0), (0, most - x.shape[1]), *rest))
      leaves = map(grow, leaves)
    return jnp.stack([*leaves], axis=1)

  return jax.tree.map(join, *deltas)


def select(edited: Edited, index: int) -> Edited:
  """Returns one of the edits side by side, as an edit of its own.

  Raises:
    InputError: there is no such edit, or only one.
  """
  if edited.size is None or not 0 <= index < edited.size:
    raise InputError(
        f'edit {index} was asked for, where {edited.size or "no"} edits lie side'
        ' by side, counted from 0'
    )
  deltas = jax.tree.map(lambda x: x[:, index], edited.deltas)
  prompting = edited.prompting
  if prompting is not None:
    prompting = prompting.select(index)
  return edited.replace(deltas=deltas, prompting=prompting, size=None)
