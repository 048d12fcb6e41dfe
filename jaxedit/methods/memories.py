"""What methods share whose edit is a memory of facts as text.

No weight changes and nothing is optimised: an edit puts a fact into a memory
(`edited.prompting.FactMemory`), and a sequence of edits grows it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import numpy as np

from jaxedit.deltas import Edited
from jaxedit.edited.prompting import Fact, FactMemory
from jaxedit.methods.base import (
    EditBatch,
    Editor,
    EditResult,
    Info,
    Need,
    Run,
)
from jaxedit.types import EditRequest, InputError


def statement(request: EditRequest) -> str:
  """The fact of a request, as text."""
  return f'{request.question} {request.target}'


@flax.struct.dataclass
class State:
  """A memory between batches.

  Attributes:
    facts: the facts as JSON, uint8; arrays are what checkpoints hold.
    embeddings: [N, D] of their keys; [0, 0] without.
    empty: the memory without facts, static.
    resources: what the editor was given, static.
  """

  facts: np.ndarray
  embeddings: np.ndarray
  empty: FactMemory = flax.struct.field(pytree_node=False)
  resources: Mapping[Need, Any] = flax.struct.field(pytree_node=False)

  @property
  def memory(self) -> FactMemory:
    """The memory itself."""
    facts = json.loads(bytes(np.asarray(self.facts, np.uint8)))
    return dataclasses.replace(
        self.empty,
        facts=tuple(Fact(**fact) for fact in facts),
        embeddings=np.asarray(self.embeddings)
        if self.embeddings.size
        else None,
    )

  def holding(self, memory: FactMemory) -> State:
    """The state after the facts of a memory."""
    text = json.dumps([dataclasses.asdict(fact) for fact in memory.facts])
    vectors = memory.embeddings
    return self.replace(
        facts=np.frombuffer(text.encode(), np.uint8),
        embeddings=np.zeros((0, 0), np.float32) if vectors is None else vectors,
    )


def memory_editor(
    make: Callable[[Mapping[Need, Any]], FactMemory],
    facts_of: Callable[
        [Sequence[EditRequest], Mapping[Need, Any]], Sequence[Fact]
    ],
    needs: tuple[Need, ...],
    single: str = '',
) -> Editor:
  """Makes an editor whose edit is a memory.

  Args:
    make: resources -> an empty memory.
    facts_of: (requests, resources) -> a fact of each.
    needs: of the editor.
    single: why an edit has one fact alone, a sentence; '' for any number.
  """

  def init(model: Any, resources: Mapping[Need, Any]) -> State:
    del model
    none = np.zeros((0, 0), np.float32)
    empty = make(resources)
    return State(np.zeros(0, np.uint8), none, empty, resources).holding(empty)

  def edit(model: Any, state: State, batch: EditBatch, run: Run) -> EditResult:
    del model, run
    requests, begin = batch.requests, time.monotonic()
    joint, before = batch.group is None, state.memory
    group = [0] * len(requests) if joint else list(batch.group)
    size = None if joint else max(group, default=-1) + 1
    together = np.bincount(group, minlength=1).max() + len(before.facts)
    if single and together > 1:
      raise InputError(single)
    facts = [
        dataclasses.replace(one, edit=g)
        for one, g in zip(facts_of(requests, state.resources), group)
    ]
    if not joint and before.facts:  # each starts from what was there
      before = before.stack([before] * (size - 1))
    memory = before.added(facts)
    info = Info(
        np.ones(len(requests), bool),
        {'edit': time.monotonic() - begin},
        {'scope': [one.key for one in facts]},
    )
    edited = Edited(prompting=memory if memory.facts else None, size=size)
    changed = joint and bool(facts)
    return EditResult(edited, state.holding(memory) if changed else state, info)

  return Editor(needs, init, edit, cumulative=True)
