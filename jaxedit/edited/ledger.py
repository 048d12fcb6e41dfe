"""Which edits an edit holds: they are listed, forgotten by id, rolled back.

  edits_in(edited)          ids, the oldest first
  forget(edited, id)        without one of them
  roll_back(edited, count)  as it was before the last `count`

How exact that is depends on what holds the edits:

  memory of facts   exact
  Codebook          exact: it is entered anew from the other edits, which restores
                    radii and values that the forgotten one had changed
  Neurons           a patch of one edit goes with its neurons; later patches were
                    trained beside it and stay as they are. Rolling back is exact
  Routed            a shard that one edit alone was trained in goes with it
  changes of weights, and neurons or shards of several edits
                    are refused: nothing tells what is whose

Axis letters as in `edited.codebook`; P neurons, S shards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import Codebook, Edited, Neurons, Routed, SiteDelta
from jaxedit.edited.codebook import History
from jaxedit.types import InputError

# The ids of no edits, as a leaf of an editor's state.
NO_NAMES = np.zeros(0, np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Ledger:
  """Which edits made the one delta of an edit that is no change of weights.

  No computation depends on it, so all of them are equal: an edit that holds more
  is the same to compiled code.

  Attributes:
    names: groups of edits that share rows, as their ids, the oldest first.
    rows: (first, end) of each group, neurons or shards; () of a codebook.
    history: of a codebook, a group an edit.
    forgotten: ids of edits that are gone, in the order in which they went.
  """

  names: tuple[tuple[str, ...], ...]
  rows: tuple[tuple[int, int], ...] = ()
  history: History | None = None
  forgotten: tuple[str, ...] = ()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Ledger)

  def __hash__(self) -> int:
    return hash(Ledger)

  def packed(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Writes it as arrays and plain JSON types."""
    arrays = {} if self.history is None else self.history._asdict()
    record = {
        'names': [list(some) for some in self.names],
        'rows': [list(some) for some in self.rows],
        'forgotten': list(self.forgotten),
    }
    return arrays, record

  @classmethod
  def unpacked(
      cls, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
  ) -> Ledger:
    """Reads what `packed` wrote; raises ValueError where parts do not fit."""
    found = cls(
        tuple(tuple(map(str, some)) for some in record['names']),
        tuple((int(first), int(end)) for first, end in record['rows']),
        History(**arrays) if arrays else None,
        tuple(map(str, record['forgotten'])),
    )
    parts = found.rows if found.history is None else found.history.keys
    if len(parts) != len(found.names):
      raise ValueError('its ledger names other edits than it holds')
    return found


def with_names(names: np.ndarray, more: Sequence[Any]) -> np.ndarray:
  """Adds JSON values, such as ids, to a leaf of an editor's state."""
  text = json.dumps([*names_of(names), *more])
  return np.frombuffer(text.encode(), np.uint8)


def names_of(names: np.ndarray) -> list[Any]:
  """Reads what `with_names` wrote."""
  text = bytes(np.asarray(names, np.uint8))
  return json.loads(text) if text else []


def of_groups(groups: Sequence[Sequence[Any]]) -> Ledger:
  """A ledger of [ids, first row, end] of groups."""
  return Ledger(
      tuple(tuple(ids) for ids, _, _ in groups),
      tuple((first, end) for _, first, end in groups),
  )


def edits_in(edited: Edited) -> list[str]:
  """Lists the edits of an edit, as ids of their requests.

  Args:
    edited: the edit.

  Returns:
    Ids, the oldest first; one that was edited again stands there again.

  Raises:
    InputError: it does not say.
  """
  if edited.size is not None:
    raise InputError(
        f'{edited.size} independent edits lie side by side: select one of them'
    )
  if edited.ledger is not None:
    return [one for some in edited.ledger.names for one in some]
  if edited.prompting is not None and edited.prompting.ids is not None:
    return list(edited.prompting.ids)
  if edited == Edited():
    return []
  kinds = sorted({type(delta).__name__ for delta in edited.deltas})
  raise InputError(
      f'the edit ({", ".join(kinds) or "a rule"}) does not say which of its edits'
      ' is where; changes of weights are sums, of which one edit is taken back by'
      ' making the others again'
  )


def forget(edited: Edited, id: str) -> Edited:  # pylint: disable=redefined-builtin
  """Returns an edit without one of its edits; see the module head.

  Args:
    edited: the edit; untouched.
    id: of the request, as `edits_in` lists it; all of that id go.

  Raises:
    InputError: it holds no such edit, or it cannot be told from others.
  """
  known = edits_in(edited)
  if id not in known:
    some = ', '.join(dict.fromkeys(known[:20]))
    raise InputError(f'there is no edit of id {id!r}; the first ids are {some}')
  return _without(edited, [i for i, one in enumerate(known) if one == id])


def roll_back(edited: Edited, count: int) -> Edited:
  """Returns an edit as it was before its last edits.

  Args:
    edited: the edit; untouched.
    count: how many of those that `edits_in` lists.

  Raises:
    InputError: it holds fewer, or they cannot be told from others.
  """
  total = len(edits_in(edited))
  if not 0 <= count <= total:
    raise InputError(
        f'{count} edits shall be rolled back, where there are {total}'
    )
  return _without(edited, range(total - count, total))


def _without(edited: Edited, indices: Sequence[int]) -> Edited:
  """Leaves out edits by their indices in `edits_in`."""
  if edited.ledger is not None:
    return _without_groups(edited, indices)
  if edited == Edited():
    return edited
  rule = edited.prompting.without(indices)
  return edited.replace(prompting=rule if rule.ids else None)


def _without_groups(edited: Edited, indices: Sequence[int]) -> Edited:
  """Leaves out edits of a delta."""
  ledger, indices = edited.ledger, set(indices)
  own = np.cumsum([0, *map(len, ledger.names)])
  going = [
      i
      for i, (first, end) in enumerate(zip(own, own[1:]))
      if indices & {*range(first, end)}
  ]
  for i in going:
    kept = [n for n in range(own[i], own[i + 1]) if n not in indices]
    if kept:
      ids = [one for some in ledger.names for one in some]
      raise InputError(
          f'{len(ledger.names[i])} edits were trained together in one part, of'
          f' which {ids[kept[0]]!r} shall stay: all of a part are left out, or'
          ' none; edit alone what may have to be forgotten'
      )
  beside = [d for d in edited.deltas if not d.mergeable]
  if len(beside) != 1:
    raise InputError(
        f'the edit has {len(beside)} deltas beside the weights, of which nothing'
        ' says what is whose; forget in each before they are added'
    )
  staying = [i for i in range(len(ledger.names)) if i not in going]
  pick = lambda parts: tuple(parts[i] for i in staying)
  gone = [one for i in going for one in ledger.names[i]]
  left = dataclasses.replace(
      ledger,
      names=pick(ledger.names),
      rows=pick(ledger.rows) if ledger.rows else (),
      history=ledger.history and ledger.history.taken(staying),
      forgotten=(*ledger.forgotten, *gone),
  )
  rest = tuple(d for d in edited.deltas if d.mergeable)
  if staying:
    rows = [ledger.rows[i] for i in going] if ledger.rows else []
    rest = (*rest, _cut(beside[0], rows, left.history))
  return edited.replace(deltas=rest, ledger=left if staying else None)


def _cut(
    delta: SiteDelta,
    rows: Sequence[tuple[int, int]],
    history: History | None,
) -> SiteDelta:
  """A delta without some rows, or as a history makes it; its shapes stay."""
  if isinstance(delta, Codebook):
    book = history.book(delta.keys.shape[1])
    lead = lambda x, old: jnp.asarray(x, old.dtype)[None]
    return delta.replace(
        keys=lead(book.keys, delta.keys),
        values=lead(book.values, delta.values),
        radii=lead(book.radii, delta.radii),
        count=lead(book.count, delta.count),
    )
  index = np.concatenate([np.arange(0), *(np.arange(*one) for one in rows)])
  index = index.astype(np.int32)
  clear = lambda x, value=0: x.at[:, index].set(value)
  if isinstance(delta, Neurons):
    return delta.replace(
        key=clear(delta.key), bias=clear(delta.bias), value=clear(delta.value)
    )
  assert isinstance(delta, Routed)
  return delta.replace(
      shards=clear(delta.shards), thresholds=clear(delta.thresholds, jnp.inf)
  )
