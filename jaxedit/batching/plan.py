"""Chooses the few static shapes in which token ids go to a device.

The sequences of an edit are its C contexts and, last, its KL prompt. What all
edits have in common at the start of a context (usually the context itself) is
its shared prefix and is run once. The rest of a sequence belongs to the edit:
tokens before the anchor A, then the suffix from the anchor on:

  shared prefix     prefix  suffix
  t t t t t t t t | t t t | A t t t y y y

A packed batch (`edits`) holds prefix and suffix of some edits. Suffixes are
optimised by continuous batching: a batch has a fixed number of slots, a token
budget and a logit budget; a finished edit frees them for the next (`slots`). So
there is no padding, and one compiled shape serves edits of any length up to the
longest suffix of the shape. Edits that are much longer than others get a batch
shape of their own, as attention does pad sequences.

Axis letters as in `jaxedit.types`: E slots, C contexts, B sequences, N token
budget, S suffix tokens, P prefix tokens, O logit budget.

The package uses numpy arrays only; models import it, not the reverse.
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

# Suffix lengths up to which edits share a batch shape.
MAX_SUFFIXES = (16, 64, 256, 1024)
# Slots for each edit that fits the token budget on average, so that short edits
# do not leave tokens unused.
_SPARE = 1.2
# When no edit is waiting, the last ones move to a batch shape this many times
# smaller.
_COMPACTION = 2


class BatchShape(NamedTuple):
  """Static shapes of one running batch, and of the packed batches that feed it.

  Attributes:
    max_suffix: longest suffix of its edits, tokens.
    slots: E.
    token_budget: N, suffix tokens at a time.
    length: S, rounded up.
    logit_budget: O, scored tokens at a time.
    labels: most labels of a sequence.
    grow: prefix tokens for the finished chunks of an edit.
    prefill_shape: (slots, tokens, length) of a packed batch of whole sequences.
    prefix_shape: (tokens, length) of its tokens before the anchors.
    compactions: how often the last edits move to a smaller batch shape.
    shards: equal parts of slots, tokens and logits, one for each device over
      which batches are divided. An edit takes all from one of them: from that
      of its slot.
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
  shards: int = 1

  @property
  def compacted(self) -> BatchShape | None:
    """A smaller shape for the last edits; None if this one is small enough."""
    if not self.compactions or self.slots < 2 * _COMPACTION:
      return None

    def part(count: int, step: int) -> int:
      step *= self.shards
      return -(-count // (_COMPACTION * step)) * step

    smaller = self._replace(
        slots=part(self.slots, 1),
        token_budget=part(self.token_budget, 16),
        logit_budget=part(self.logit_budget, 4),
        compactions=self.compactions - 1,
    )
    return smaller if smaller.slots < self.slots else None

  def repeated(self, shards: int) -> BatchShape:
    """The shape of several shards, of which this one is the shape of each."""
    return self._replace(
        slots=shards * self.slots,
        token_budget=shards * self.token_budget,
        logit_budget=shards * self.logit_budget,
        prefill_shape=(
            shards * self.prefill_shape[0],
            shards * self.prefill_shape[1],
            self.prefill_shape[2],
        ),
        prefix_shape=(shards * self.prefix_shape[0], self.prefix_shape[1]),
        shards=shards,
    )


class PromptShapes(NamedTuple):
  """(sequences, tokens, length) of a packed batch of prompts.

  Attributes:
    upto: up to the last anchor.
    text: to the end of the target text.
  """

  upto: tuple[int, int, int]
  text: tuple[int, int, int]

  def divided(self, shards: int) -> PromptShapes:
    """The shapes with counts that a number of devices divides, rounded up."""
    full = lambda count: -(-count // shards) * shards
    return PromptShapes(*((full(b), full(n), t) for b, n, t in self))


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """The static shapes of a run, which all its batches share.

  Attributes:
    shared_prefix: the shared prefix of every context, C arrays [P] int32.
    kl: whether edits have a KL prompt.
    shapes: batch shapes by ascending longest suffix.
    batch: edits a batch at most.
    stages: chunks an edit at most.
    states: targets a batch at most.
    prompts: shapes of `pack_prompts`.
    unshared_prompts: the same without shared prefixes.
    resident_bytes: paused activations that stay on the device during insertion;
      the rest is kept on the host.
  """

  shared_prefix: tuple[np.ndarray, ...]
  kl: bool
  shapes: tuple[BatchShape, ...]
  batch: int
  stages: int
  states: int
  prompts: PromptShapes
  unshared_prompts: PromptShapes
  resident_bytes: float = np.inf

  def independent(self) -> BatchPlan:
    """The plan without shared prefixes, for edits whose models differ.

    It serves `pack_prompts`; runs of the unedited model share prefixes always.
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
    """Sequences an edit."""
    return self.contexts + self.kl

  @property
  def shared(self) -> int:
    """Tokens of the longest shared prefix."""
    return max(map(len, self.shared_prefix))

  def shape_of(self, edit: EncodedEdit) -> int:
    """Number of the batch shape that an edit belongs to."""
    suffix = _suffix(edit)
    for number, shape in enumerate(self.shapes):
      if suffix <= shape.max_suffix:
        return number
    raise ValueError(
        f'edit {edit.number} has a suffix of {suffix} tokens, longer than any'
        ' that this plan was made for'
    )


def plan_shapes(
    edits: Sequence[EncodedEdit],
    *,
    slots: int | None = None,
    batch: int | None = None,
    token_budget: int = 128,
    compactions: int = 1,
    shards: int = 1,
    share: bool = True,
    max_suffixes: Sequence[int] = MAX_SUFFIXES,
) -> BatchPlan:
  """Chooses the shapes for a run.

  Every shard of a batch shape has the shape that one device would have for its
  share of the edits, rounded up: so each holds the longest edit.

  Args:
    edits: all edits of the run, at least one, with the same number of contexts.
    slots: edits optimised side by side; None for as many as fill
      `token_budget`.
    batch: edits a batch at most; more slots than that are never made.
    token_budget: suffix tokens of a shard optimised side by side where `slots`
      is None.
    compactions: how often the last edits move to a smaller batch shape; each is
      compiled for.
    shards: devices over which batches are divided.
    share: run shared prefixes once. It must be off where edits differ in
      weights.
    max_suffixes: suffix lengths up to which edits share a batch shape,
      ascending.

  Returns:
    The plan.

  Raises:
    ValueError: no edits, no slots, edits with differing numbers of contexts, or
      chunks with a gap between them.
  """
  for name, given in (('slot', slots), ('edit a batch', batch)):
    if given is not None and given < 1:
      raise ValueError(f'at least one {name} is needed, got {given}')
  if not edits:
    raise ValueError('a plan is made for at least one edit')
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
  share_of = lambda count: -(-count // shards)
  shapes, rest = [], list(edits)
  limits = [*max_suffixes, max(map(_suffix, edits))]
  for max_suffix in sorted(set(limits)):
    members = [edit for edit in rest if _suffix(edit) <= max_suffix]
    rest = [edit for edit in rest if _suffix(edit) > max_suffix]
    if members:
      most = share_of(min(batch or len(members), len(members)))
      amount = (slots and share_of(slots), token_budget, most)
      shape = _batch_shape(
          members, shared_prefix, max_suffix, amount, compactions
      )
      shapes.append(shape.repeated(shards))
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
      prompts=_prompt_shapes(edits, shared_prefix, token_budget, shards),
      unshared_prompts=_prompt_shapes(edits, nothing, token_budget, shards),
  )


def _shared_prefix(edits: Sequence[EncodedEdit], c: int) -> np.ndarray:
  """The common start of one context in all edits, before all anchors."""
  first = edits[0].rows[c]
  length = min(edit.anchors[c] for edit in edits)
  if first[0] < 0:  # a source, whose tokens depend on later ones
    length = 0
  for edit in edits:
    differs = edit.rows[c][:length] != first[:length]
    if differs.any():
      length = int(differs.argmax())
  return first[:length]


def _prompt_shapes(
    edits: Sequence[EncodedEdit],
    shared_prefix: Sequence[np.ndarray],
    token_budget: int,
    shards: int,
) -> PromptShapes:
  """Shapes of `pack_prompts`, of about `token_budget` tokens a shard."""

  def shape(text: bool) -> tuple[int, int, int]:
    sizes = np.array(
        [
            len(prompt_ids(edit, c, text)) - len(head)
            for edit in edits
            for c, head in enumerate(shared_prefix)
        ]
    )
    wanted = round(token_budget * shards / sizes.mean())
    rows = max(1, min(len(sizes), wanted))
    return rows, _budget_for(sizes, rows), round_up(int(sizes.max()))

  return PromptShapes(shape(False), shape(True)).divided(shards)


def _batch_shape(
    members: Sequence[EncodedEdit],
    shared_prefix: Sequence[np.ndarray],
    max_suffix: int,
    amount: tuple[int | None, int, int],
    compactions: int,
) -> BatchShape:
  """Chooses the batch shape for the edits that belong to it."""
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
  """Budget that holds `count` average edits, or the largest one."""
  wanted = min(np.mean(sizes) * count, np.sum(sizes))
  return -(-int(max(np.ceil(wanted), np.max(sizes))) // step) * step


def _suffix(edit: EncodedEdit) -> int:
  """Tokens of the longest suffix of any chunk."""
  stages = _stages(edit)
  return max(stage.end - stage.anchor for _, stage in stages)


def _stages(edit: EncodedEdit) -> Iterator[tuple[int, Stage]]:
  for k in range(edit.stages):
    for c in range(len(edit.rows)):
      yield k, edit.stage(k, c)


def stage_load(edit: EncodedEdit, k: int) -> tuple[int, int]:
  """(tokens, scored tokens) of a chunk; the first one has the KL token too."""
  token_budget, logit_budget = edit.load(k)
  return token_budget + (k == 0 and len(edit.kl) > 0), logit_budget


def edit_load(edit: EncodedEdit) -> np.ndarray:
  """(tokens, scored tokens) that are enough for every chunk of an edit."""
  return np.max([stage_load(edit, k) for k in range(edit.stages)], axis=0)


def sequence_spans(
    edit: EncodedEdit, shared_prefix: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, int, int]]:
  """Tokens of every sequence: (ids, first position, how many before A)."""
  for c, head in enumerate(shared_prefix):
    start = len(head)
    yield edit.text(c)[start:], start, edit.anchors[c] - start
  if len(edit.kl):
    yield edit.kl, 0, len(edit.kl) - 1


def prompt_ids(edit: EncodedEdit, c: int, text: bool) -> np.ndarray:
  """Ids from which keys are read: up to the last anchor, or to the end."""
  if text:
    return np.concatenate([edit.rows[c], edit.target])
  return edit.text(c)[: edit.stage(edit.stages - 1, c).anchor + 1]
