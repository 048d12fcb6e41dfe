"""What every stage of an editing run works on: a model and records as ids.

Nothing here reads a flag.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.eval import datasets, generation, harness
from jaxedit.models import loading
from jaxedit.models.spec import ModelSpec
from jaxedit.text import (
    encoding,
    templates,
)
from jaxedit.types import Record

# Tokens that a sampled context and its full stop may add to a prompt.
_CONTEXT_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Workbench:
  """What every stage works on.

  Attributes:
    model: the unedited model; never changed.
    tokenizer: its tokenizer.
    loaded: the records to edit, facts or passages.
    batch_size: cases a batch.
    apart: batches know nothing of each other.
    slots: edits optimised side by side; None for as many as are of use and
      have room in memory.
    memory: bytes of the device's memory to plan with; None for all.
    templates: context templates, the bare '{}' first; of facts.
    encoded: the records as ids, once they are.
    plan: the static shapes that all batches share, once `shape` has run.
  """

  model: loading.Model
  tokenizer: Any
  loaded: datasets.Loaded
  batch_size: int
  apart: bool = False
  slots: int | None = None
  memory: float | None = None
  templates: tuple[str, ...] = ()
  encoded: tuple[encoding.EncodedEdit, ...] = ()
  plan: plan_lib.BatchPlan | None = None

  @property
  def records(self) -> Sequence[Any]:
    return self.loaded.records

  @functools.cached_property
  def cases(self) -> tuple[int, ...]:
    """Number of the case of every record."""
    return case_numbers(self.records)

  @property
  def each(self) -> bool:
    """Whether every case is edited alone, all of them side by side."""
    return self.apart and self.batch_size == 1

  def batches(self) -> list[list[int]]:
    """Indices of the records of every batch; cases are never cut."""
    found: dict[int, list[int]] = {}
    for i, case in enumerate(self.cases):
      found.setdefault(case // self.batch_size, []).append(i)
    return list(found.values())

  def edits(self, indices: Sequence[int]) -> list[encoding.EncodedEdit]:
    """Some records, encoded."""
    return [self.encoded[i] for i in indices]

  def parts(self, side: int | None) -> list[list[int]]:
    """Indices of the records whose changes are held at one time.

    Args:
      side: batches at a time, where they know nothing of each other; None for
        all.
    """
    if side is None or not self.apart:
      return [list(range(len(self.records)))]
    batches = self.batches()
    return [
        list(itertools.chain(*batches[first : first + side]))
        for first in range(0, len(batches), side)
    ]

  def part(self, indices: Sequence[int]) -> Workbench:
    """The same bench with some of the records."""
    loaded = dataclasses.replace(
        self.loaded, records=[self.records[i] for i in indices]
    )
    encoded = tuple(self.edits(indices))
    return dataclasses.replace(self, loaded=loaded, encoded=encoded)


def case_numbers(records: Sequence[Any]) -> tuple[int, ...]:
  """Numbers the cases of records; a fact is a case of its own."""
  numbers: dict[Any, int] = {}
  keys = (getattr(record, 'case', '') or i for i, record in enumerate(records))
  return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def shape(bench: Workbench, side: int | None) -> Workbench:
  """Adds the shapes that serve the encoded records.

  Args:
    bench: what to work on.
    side: batches whose changes are held side by side; None for all.

  Returns:
    The bench, complete.
  """
  batch = max(map(len, bench.batches()))
  if bench.each:
    batch = max(map(len, bench.parts(side)))
  plan = targets_lib.plan_batches(
      bench.model.spec,
      bench.model.params,
      bench.encoded,
      slots=bench.slots,
      batch=batch,
      memory=bench.memory,
  )
  return dataclasses.replace(bench, plan=plan)


def encode_facts(
    bench: Workbench, contexts: Sequence[str], anchor: str
) -> Workbench:
  """Adds context templates and the facts as ids under them.

  Args:
    bench: what to work on.
    contexts: the templates, the bare '{}' first.
    anchor: the edited token, as the method has it.

  Returns:
    The bench with both.

  Raises:
    InputError: records that are too long under them, all at once.
  """
  encoded = encoding.encode_edits(
      bench.tokenizer,
      bench.records,
      contexts,
      max_tokens=bench.model.spec.max_positions,
      anchor=anchor,
  )
  return dataclasses.replace(
      bench, templates=tuple(contexts), encoded=tuple(encoded)
  )


def record_check(
    tokenizer: Any,
    spec: ModelSpec,
    *,
    contexts: Sequence[str],
    max_new_tokens: int,
    anchor: str = 'subject_last',
) -> Callable[[Record], list[str]]:
  """Makes the check of a loader: all that editing or judging would refuse.

  Args:
    tokenizer: of the model.
    spec: the architecture.
    contexts: context templates; empty if they are sampled later, for which
      some room is left.
    max_new_tokens: length of generated texts, tokens.
    anchor: the edited token.

  Returns:
    record -> sentences that do not name the record.
  """
  edit = encoding.edit_check(
      tokenizer,
      contexts or (templates.BARE,),
      max_tokens=spec.max_positions - (0 if contexts else _CONTEXT_TOKENS),
      anchor=anchor,
  )
  evaluation = harness.record_check(
      spec, tokenizer, max_new_tokens=max_new_tokens
  )
  # What both find is told once, by the one that says more.
  return lambda record: edit(record) or evaluation(record)


def replace_model(bench: Workbench, model: loading.Model) -> Workbench:
  """The same records and tokenizer on another model."""
  return dataclasses.replace(bench, model=model)


def stop_tokens(bench: Workbench) -> tuple[int, ...]:
  """Tokens that end a free generation, found once a run."""
  return generation.stop_ids(bench.tokenizer, bench.model.spec.vocab)
