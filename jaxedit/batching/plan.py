"""Chooses the few static shapes in which rows of ids go to a device, end to end.

Rows of an edit are its C contexts and, last, its KL row. What all edits share at
the head of a context (the context itself, as a rule) is its trunk and is run
once. The rest of a row is the edit's own: own columns left of the anchor, then
the suffix:

  trunk            own
  t t t t t t t t | t t t | A t t t y y y

A tile (`tiles`) holds own columns of some edits. A room, filled by `slots`, is where
suffixes are optimised: a fixed number of slots (edits), places (tokens) and scored
places. An edit that is done leaves, and another takes its slot and any free
places; so rooms need no padding, and one compiled shape serves edits of any length
up to the room's width. Edits much longer than others get a room of their own, as
attention does pad rows to the width.

Axis letters: E slots, C contexts, R rows, N places, W columns of a suffix, P
columns before it, K scored places, n labels of a row.

This file, `tiles` and `slots` hold numpy arrays only and know nothing of models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.batching.buckets import round_up
from jaxedit.text.encoding import (
    EncodedEdit,
    Stage,
)

# Suffix lengths up to which edits share a room.
MAX_SUFFIXES = (16, 64, 256, 1024)
# A room has this many slots for every edit that fills its places on average, so
# that short edits do not leave places empty.
_SPARE = 1.2
# Once nobody waits, the last edits move to a room this many times smaller.
_COMPACTION = 2


class BatchShape(NamedTuple):
  """Static shapes of one room, and of the tiles that fill it.

  Attributes:
    max_suffix: longest suffix that comes here, tokens.
    slots: E.
    token_budget: N, suffix tokens at a time.
    length: W.
    logit_budget: K, scored tokens at a time.
    labels: n, most labels of a row.
    grow: columns for the chunks of an edit that are done.
    prefill_shape: (slots, places, width) of a tile of whole rows.
    prefix_shape: (places, width) of a tile's columns left of the anchor.
    compactions: how often the last edits move to a smaller room.
  """

  max_suffix: int
  slots: int
  token_budget: int
  length: int
  logit_budget: int
  labels: int
  grow: int
  prefill_shape: tuple[int, int, int]
  prefix_shape: tuple[int, int]
  compactions: int

  @property
  def compacted(self) -> BatchShape | None:
    """A smaller room, for the last edits; None if this one is small enough."""
    if not self.compactions or self.slots < 2 * _COMPACTION:
      return None
    token_budget, logit_budget = -(-self.token_budget // _COMPACTION), -(
        -self.logit_budget // _COMPACTION
    )
    return self._replace(
        slots=-(-self.slots // _COMPACTION),
        token_budget=-(-token_budget // 16) * 16,
        logit_budget=-(-logit_budget // 4) * 4,
        compactions=self.compactions - 1,
    )


class PromptShapes(NamedTuple):
  """(rows, places, width) of a tile of own columns.

  Attributes:
    upto: up to the last anchor.
    text: to the end of the target.
  """

  upto: tuple[int, int, int]
  text: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """The static shapes of a run, which all its batches share.

  Attributes:
    shared_prefix: the shared head of every context, C arrays [s] int32.
    kl: whether edits have a KL row.
    shapes: by ascending limit.
    batch: edits a batch at most.
    stages: states an edit at most.
    states: states a batch at most.
    prompts: shapes of `pack_prompts`.
    unshared_prompts: same, where nothing is shared.
  """

  shared_prefix: tuple[np.ndarray, ...]
  kl: bool
  shapes: tuple[BatchShape, ...]
  batch: int
  stages: int
  states: int
  prompts: PromptShapes
  unshared_prompts: PromptShapes

  def independent(self) -> BatchPlan:
    """The frame for edits that share nothing, as their models differ.

    It serves `pack_prompts`; what comes before editing can be shared in any case.
    """
    nothing = (np.zeros(0, np.int32),) * self.contexts
    return dataclasses.replace(
        self, shared_prefix=nothing, prompts=self.unshared_prompts
    )

  @property
  def contexts(self) -> int:
    """C."""
    return len(self.shared_prefix)

  @property
  def rows(self) -> int:
    """Rows an edit."""
    return self.contexts + self.kl

  @property
  def shared(self) -> int:
    """Tokens of the longest trunk."""
    return max(map(len, self.shared_prefix))

  def shape_of(self, edit: EncodedEdit) -> int:
    """Number of the room an edit belongs to."""
    suffix = _suffix(edit)
    for number, shape in enumerate(self.shapes):
      if suffix <= shape.max_suffix:
        return number
    raise ValueError(
        f'edit {edit.number} has a suffix of {suffix} tokens, longer than any'
        ' that this frame was made for'
    )


def plan_shapes(
    edits: Sequence[EncodedEdit],
    *,
    slots: int | None = None,
    batch: int | None = None,
    token_budget: int = 128,
    compactions: int = 1,
    share: bool = True,
    max_suffixes: Sequence[int] = MAX_SUFFIXES,
) -> BatchPlan:
  """Chooses the shapes for a run.

  Args:
    edits: all edits of the run, at least one, with one number of contexts.
    slots: edits optimised side by side; None for as many as fill `token_budget`.
    batch: edits a batch at most; more slots than that are never made.
    token_budget: suffix tokens optimised side by side where `slots` does not say.
    compactions: how often the last edits move to a smaller room, which compiles for
      it.
    share: run what all edits share once. It must be off where edits differ in
      weights.
    max_suffixes: suffix lengths up to which edits share a room, ascending.

  Returns:
    The frame.

  Raises:
    ValueError: no edits, no slots, edits with differing numbers of contexts, or
      chunks with a gap between them.
  """
  for name, given in (('slot', slots), ('edit a batch', batch)):
    if given is not None and given < 1:
      raise ValueError(f'at least one {name} is needed, got {given}')
  if not edits:
    raise ValueError('a frame is made for at least one edit')
  for edit in edits:
    for (a, b), (c, d) in itertools.pairwise(edit.chunks):
      if not a < c <= b < d:
        raise ValueError(
            f'edit {edit.number}: chunk {c}-{d} does not go on from {a}-{b}'
        )
  kinds = {(len(edit.rows), bool(len(edit.kl))) for edit in edits}
  if len(kinds) != 1:
    raise ValueError('edits differ in their contexts; encode them together')
  contexts, kl = kinds.pop()
  shared_prefix = tuple(
      _shared_prefix(edits, c) if share else np.zeros(0, np.int32)
      for c in range(contexts)
  )
  shapes, rest = [], list(edits)
  limits = [*max_suffixes, max(map(_suffix, edits))]
  for max_suffix in sorted(set(limits)):
    members = [edit for edit in rest if _suffix(edit) <= max_suffix]
    rest = [edit for edit in rest if _suffix(edit) > max_suffix]
    if members:
      amount = (slots, token_budget, min(batch or len(members), len(members)))
      shapes.append(
          _batch_shape(members, shared_prefix, max_suffix, amount, compactions)
      )
  nothing = (np.zeros(0, np.int32),) * contexts
  most = min(batch or len(edits), len(edits))
  stages = sorted((edit.stages for edit in edits), reverse=True)
  return BatchPlan(
      shared_prefix=shared_prefix,
      kl=kl,
      shapes=tuple(shapes),
      batch=most,
      stages=stages[0],
      states=sum(stages[:most]),
      prompts=_prompt_shapes(edits, shared_prefix, token_budget),
      unshared_prompts=_prompt_shapes(edits, nothing, token_budget),
  )


def _shared_prefix(edits: Sequence[EncodedEdit], c: int) -> np.ndarray:
  """The head that one context has in all edits, left of all anchors."""
  first = edits[0].rows[c]
  length = min(edit.anchors[c] for edit in edits)
  for edit in edits:
    differs = edit.rows[c][:length] != first[:length]
    if differs.any():
      length = int(differs.argmax())
  return first[:length]


def _prompt_shapes(
    edits: Sequence[EncodedEdit],
    shared_prefix: Sequence[np.ndarray],
    token_budget: int,
) -> PromptShapes:
  """Shapes of `pack_prompts`, of about `token_budget` columns each."""

  def shape(text: bool) -> tuple[int, int, int]:
    sizes = np.array(
        [
            len(prompt_ids(edit, c, text)) - len(head)
            for edit in edits
            for c, head in enumerate(shared_prefix)
        ]
    )
    rows = max(1, min(len(sizes), round(token_budget / sizes.mean())))
    return rows, _budget_for(sizes, rows), round_up(int(sizes.max()))

  return PromptShapes(shape(False), shape(True))


def _batch_shape(
    members: Sequence[EncodedEdit],
    shared_prefix: Sequence[np.ndarray],
    max_suffix: int,
    amount: tuple[int | None, int, int],
    compactions: int,
) -> BatchShape:
  """Chooses the shapes of a room for the edits that belong there."""
  slots, token_budget, most = amount
  loads = np.array([edit_load(edit) for edit in members])
  if slots is None:
    slots = max(1, round(token_budget / loads[:, 0].mean()))
  slots = min(slots, most)
  spans = [list(sequence_spans(edit, shared_prefix)) for edit in members]
  own = [sum(len(ids) for ids, _, _ in rows) for rows in spans]
  prefix_shape = [sum(cut for _, _, cut in rows) for rows in spans]
  side = -(-slots // 2)
  done = lambda edit, c: edit.stage(edit.stages - 1, c).anchor - edit.anchors[c]
  chained = any(edit.stages > 1 for edit in members)
  length = round_up(max(map(_suffix, members)))
  grow = max(
      done(edit, c) for edit in members for c in range(len(shared_prefix))
  )
  return BatchShape(
      max_suffix=max_suffix,
      slots=min(most, int(np.ceil(_SPARE * slots))),
      token_budget=_budget_for(loads[:, 0], slots),
      length=length,
      logit_budget=_budget_for(loads[:, 1], slots, 4),
      labels=max(len(stage.labels) for e in members for _, stage in _stages(e)),
      grow=round_up(grow + length) if chained else 0,
      prefill_shape=(
          side,
          _budget_for(own, side),
          round_up(max(len(ids) for rows in spans for ids, _, _ in rows)),
      ),
      prefix_shape=(
          max(1, _budget_for(prefix_shape, side)),
          round_up(max(1, *(cut for rows in spans for _, _, cut in rows))),
      ),
      compactions=compactions,
  )


def _budget_for(sizes: Sequence[int], count: float, step: int = 16) -> int:
  """Places that hold `count` average edits, or the largest one."""
  wanted = min(np.mean(sizes) * count, np.sum(sizes))
  return -(-int(max(np.ceil(wanted), np.max(sizes))) // step) * step


def _suffix(edit: EncodedEdit) -> int:
  """Tokens of the longest suffix of any stage."""
  stages = _stages(edit)
  return max(stage.end - stage.anchor for _, stage in stages)


def _stages(edit: EncodedEdit) -> Iterator[tuple[int, Stage]]:
  for k in range(edit.stages):
    for c in range(len(edit.rows)):
      yield k, edit.stage(k, c)


def stage_load(edit: EncodedEdit, k: int) -> tuple[int, int]:
  """(tokens, scored tokens) of a stage, its KL token with the first."""
  token_budget, logit_budget = edit.load(k)
  return token_budget + (k == 0 and len(edit.kl) > 0), logit_budget


def edit_load(edit: EncodedEdit) -> np.ndarray:
  """(tokens, scored tokens) that serve every stage of an edit."""
  return np.max([stage_load(edit, k) for k in range(edit.stages)], axis=0)


def sequence_spans(
    edit: EncodedEdit, shared_prefix: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, int, int]]:
  """Own columns of every row: (ids, first position, how many left of A)."""
  for c, head in enumerate(shared_prefix):
    start = len(head)
    yield edit.text(c)[start:], start, edit.anchors[c] - start
  if len(edit.kl):
    yield edit.kl, 0, len(edit.kl) - 1


def prompt_ids(edit: EncodedEdit, c: int, text: bool) -> np.ndarray:
  """What keys are read from: a row up to its last anchor, or to its end."""
  if text:
    return np.concatenate([edit.rows[c], edit.target])
  return edit.text(c)[: edit.stage(edit.stages - 1, c).anchor + 1]
