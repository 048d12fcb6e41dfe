"""Measures edits for `costs`: tokens, labels, targets and systems to solve.

An edit has one target, or one for every chunk of its target, which stands on the
token before it. Axis letters as in `jaxedit.types`; M states of all edits.
Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.text.encoding import EncodedEdit


class Lengths(NamedTuple):
  """What edits measure; each an [E] int64 array, contexts summed.

  Attributes:
    tokens: tokens of the rows, targets but their last token included.
    left: tokens left of the first anchors.
    kl: tokens of the KL row.
    reach: tokens that take part in insertion: up to the last anchors, these
      included, or with their texts all of them.
    plain: those of the plain prompt up to its last anchor.
    keys: tokens whose keys are read: the anchors, or all.
    states: targets, and anchors of the plain prompt.
  """

  tokens: np.ndarray
  left: np.ndarray
  kl: np.ndarray
  reach: np.ndarray
  plain: np.ndarray
  keys: np.ndarray
  states: np.ndarray


class Loads(NamedTuple):
  """What a step of every state measures; each [M] int64, contexts summed.

  Attributes:
    suffix: tokens from the anchors on.
    scored: labels.
    pairs: a suffix token and a token that it attends to.
    kl: tokens of the KL row.
  """

  suffix: np.ndarray
  scored: np.ndarray
  pairs: np.ndarray
  kl: np.ndarray


class System(NamedTuple):
  """What is solved for together in a layer.

  Attributes:
    states: rows with a residual.
    preserved: rows whose output stays as it is.
  """

  states: int
  preserved: int = 0


def lengths(edits: Sequence[EncodedEdit], texts: bool = False) -> Lengths:
  """Measures edits.

  Args:
    edits: E edits.
    texts: insertion runs whole texts, whose other tokens' keys are preserved.

  Returns:
    Their lengths, in order.
  """
  found = []
  for edit in edits:
    target, last = len(edit.target), edit.stages - 1
    anchors = [edit.stage(last, c).anchor for c in range(len(edit.rows))]
    whole = sum(len(row) + target for row in edit.rows)
    found.append(
        Lengths(
            tokens=whole - len(edit.rows),
            left=sum(edit.anchors),
            kl=len(edit.kl),
            reach=whole if texts else sum(anchors) + len(anchors),
            plain=anchors[0] + 1,
            keys=whole if texts else len(anchors) * edit.stages,
            states=edit.stages,
        )
    )
  return Lengths(*_columns(found, len(Lengths._fields)))


def _columns(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
  """[width, rows] of counts, also where there are no rows."""
  return np.asarray(rows, np.int64).reshape(-1, width).T


def loads(edits: Sequence[EncodedEdit]) -> Loads:
  """Measures the states of edits, those of an edit one after the other.

  Args:
    edits: E edits with M states.

  Returns:
    What a step of each takes.
  """
  found = []
  for edit in edits:
    for k in range(edit.stages):
      stages = [edit.stage(k, c) for c in range(len(edit.rows))]
      pairs = sum(_pairs(x.end) - _pairs(x.anchor) for x in stages)
      kl = 0 if k else len(edit.kl)
      found.append(Loads(*edit.load(k), pairs, kl))
  return Loads(*_columns(found, len(Loads._fields)))


def systems(
    edits: Sequence[EncodedEdit],
    *,
    texts: bool = False,
    independent: bool = False,
) -> list[System]:
  """Lists what is solved for in a layer.

  Args:
    edits: E edits.
    texts: the other tokens of their texts are preserved.
    independent: every edit is solved for alone.

  Returns:
    A system an edit, or one of all.
  """
  sizes = lengths(edits, texts)
  preserved = (sizes.keys - sizes.states) * texts
  if independent:
    return [System(int(m), int(p)) for m, p in zip(sizes.states, preserved)]
  return [System(int(sizes.states.sum()), int(preserved.sum()))]


def own(sizes: Lengths, shared_prefix: Sequence[int]) -> Lengths:
  """Takes off what all edits share at the head of their rows, but for one.

  Args:
    sizes: of E edits.
    shared_prefix: C lengths, tokens that a context shares over all edits.

  Returns:
    Lengths whose sums over the edits count shared tokens once.
  """
  spare = np.arange(len(sizes.tokens)) > 0
  cut = lambda x, count: x - spare * count
  whole = sum(shared_prefix)
  return sizes._replace(
      tokens=cut(sizes.tokens, whole),
      left=cut(sizes.left, whole),
      reach=cut(sizes.reach, whole),
      plain=cut(sizes.plain, shared_prefix[0]),
  )


def _pairs(tokens: int) -> int:
  """Query and key pairs of a causal row."""
  return tokens * (tokens + 1) // 2
