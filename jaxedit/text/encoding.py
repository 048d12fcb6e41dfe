"""Turns records into rows of ids for value optimisation.

A row is one context with one edit's prompt, followed by all target tokens but
the last:

  t t t t t t t t A t t t t y y y
                  |     first label is foretold here: ^ ^ ^ ^
                  anchor

What lies left of the anchor A (the edited position) is constant while its value
is optimised. `rooms`, `tiles` and `seating` lay rows out for a device.

The KL row is the subject in a neutral cloze; only its columns up to its anchor
matter, because the distribution compared is the one at the anchor.

Source: the rows and labels of MEMIT (Meng et al. 2023, arXiv 2210.07229);
published code turns the target back into text and tokenises the whole again,
here ids are kept.

It holds numpy arrays only and knows nothing of models; it does not sample
templates or read files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import types
from jaxedit.text import locate
from jaxedit.text.templates import template_faults

ANCHORS = ('subject_last', 'prompt_last')
# Records tokenised at once: bounds the memory that character offsets take.
_CHUNK = 512


class Stage(NamedTuple):
  """One optimised state of one row.

  Attributes:
    anchor: column of the state.
    first: column whose next token is the first label.
    labels: [n] int32 tokens to foretell.
  """

  anchor: int
  first: int
  labels: np.ndarray

  @property
  def end(self) -> int:
    """One past the last column that is an input."""
    return self.first + len(self.labels)


@dataclasses.dataclass(frozen=True)
class EncodedEdit:
  """One edit as ids.

  Attributes:
    number: the record's number in its file.
    rows: C arrays [T] int32, the prompt in each context, without the target.
    anchors: C columns, the edited position of each row.
    target: [n] int32 ids of the new object.
    kl: [T] int32 ids of the KL row up to and including its anchor; empty if
      there is none.
    chunks: (begin, end) of the target's chunks, for states that are optimised
      one after the other: the state of a later chunk stands on the token before
      it. Empty for one state, at the anchor, that foretells the whole target.
  """

  number: int
  rows: tuple[np.ndarray, ...]
  anchors: tuple[int, ...]
  target: np.ndarray
  kl: np.ndarray
  chunks: tuple[tuple[int, int], ...] = ()

  @property
  def stages(self) -> int:
    """K, how many states are optimised one after the other."""
    return max(1, len(self.chunks))

  def stage(self, k: int, row: int) -> Stage:
    """Where the k-th state of a row acts and what it must foretell."""
    begin, end = self.chunks[k] if self.chunks else (0, len(self.target))
    first = len(self.rows[row]) + begin - 1
    anchor = first if k else self.anchors[row]
    return Stage(anchor, first, self.target[begin:end])

  def load(self, k: int) -> tuple[int, int]:
    """(columns from the anchors on, labels) of the k-th state, all contexts."""
    stages = [self.stage(k, row) for row in range(len(self.rows))]
    columns = sum(stage.end - stage.anchor for stage in stages)
    return columns, sum(len(stage.labels) for stage in stages)

  def text(self, row: int) -> np.ndarray:
    """A row's inputs: context, prompt and all target tokens but the last."""
    return np.concatenate([self.rows[row], self.target[:-1]])


def encode_edit(
    tokenizer: Any, record: types.Record, templates: Sequence[str], **options
) -> EncodedEdit:
  """Encodes one record; see `encode_edits` for the arguments."""
  return encode_edits(tokenizer, [record], templates, **options)[0]


def encode_edits(
    tokenizer: Any,
    records: Sequence[types.Record],
    templates: Sequence[str],
    *,
    max_tokens: int,
    anchor: str = 'subject_last',
    kl_template: str | None = '{} is a',
) -> list[EncodedEdit]:
  """Encodes records for value optimisation.

  Args:
    tokenizer: a fast transformers tokenizer.
    records: the edits.
    templates: contexts with one '{}' each, where the prompt goes.
    max_tokens: longest row in tokens, target included (less its last token,
      which is never an input); the model's context length.
    anchor: edited position, 'subject_last' (ROME, MEMIT) or 'prompt_last'.
    kl_template: cloze of the KL row (MEMIT's '{} is a'), or None for no row.

  Returns:
    One `EncodedEdit` a record, in order.

  Raises:
    types.InputError: a subject or target without tokens, an over-long row, a
      faulty template or an unknown anchor; all faults at once, by record.
  """
  _check_options(templates, anchor, kl_template)
  encoded, problems = [], []
  for begin in range(0, len(records), _CHUNK):
    chunk = records[begin : begin + _CHUNK]
    drafts = _draft(tokenizer, chunk, templates, (anchor, kl_template))
    for record, (edit, faults) in zip(chunk, drafts):
      faults = faults or _length_faults(edit, max_tokens)
      if faults:
        name = f'record {record.number} (id {record.id})'
        problems.extend(f'{name}: {fault}' for fault in faults)
      else:
        encoded.append(edit)
  if problems:
    raise types.InputError(*problems)
  return encoded


def edit_check(
    tokenizer: Any,
    templates: Sequence[str],
    *,
    max_tokens: int,
    anchor: str = 'subject_last',
    kl_template: str | None = '{} is a',
) -> Callable[[types.Record], list[str]]:
  """Makes the check that finds what `encode_edits` would refuse in a record.

  Args:
    tokenizer: see `encode_edits`, as for the other arguments.
    templates: contexts.
    max_tokens: longest row in tokens.
    anchor: edited position.
    kl_template: cloze of the KL row, or None.

  Returns:
    record -> sentences that do not name the record, for the `check` argument
    of a loader.

  Raises:
    types.InputError: a faulty template or an unknown anchor.
  """
  _check_options(templates, anchor, kl_template)

  def check(record: types.Record) -> list[str]:
    drafts = _draft(tokenizer, [record], templates, (anchor, kl_template))
    edit, faults = drafts[0]
    return faults or _length_faults(edit, max_tokens)

  return check


def _check_options(
    templates: Sequence[str], anchor: str, kl_template: str | None
) -> None:
  problems = template_faults(templates)
  if not templates:
    problems.append("no context templates were given; give at least '{}'.")
  if anchor not in ANCHORS:
    problems.append(
        f'anchor {anchor!r} is unknown; use {" or ".join(ANCHORS)}.'
    )
  if kl_template is not None:
    problems.extend(f'KL {fault}' for fault in template_faults([kl_template]))
  if problems:
    raise types.InputError(*problems)


def _draft(
    tokenizer: Any,
    records: Sequence[types.Record],
    templates: Sequence[str],
    options: tuple[str, str | None],
) -> list[tuple[EncodedEdit, list[str]]]:
  """Tokenises records in one go, leaving faults beside the edits."""
  anchor, kl_template = options
  cases = []
  for record in records:
    before, _, after = record.prompt.partition(locate.PLACEHOLDER)
    for template in templates:
      head, _, tail = template.partition(locate.PLACEHOLDER)
      cases.append((head + before, record.subject, after + tail))
    if kl_template is not None:
      head, _, tail = kl_template.partition(locate.PLACEHOLDER)
      cases.append((head, record.subject, tail))
  found = locate.locate_subjects(tokenizer, cases)
  targets = locate.encode_targets(tokenizer, [r.target_new for r in records])
  width = len(cases) // max(len(records), 1)
  drafts = []
  for i, (record, target) in enumerate(zip(records, targets)):
    mine = found[i * width : (i + 1) * width]
    faults = [] if len(target) else [locate.no_target(record.target_new)]
    if anchor == 'subject_last' and any(span is None for _, span in mine):
      faults.append(locate.no_subject(record.subject))
    anchors = tuple(
        span[1] if anchor == 'subject_last' and span else len(ids) - 1
        for ids, span in mine
    )
    rows = tuple(ids for ids, _ in mine)
    kl = np.zeros([0], np.int32)
    if kl_template is not None:
      kl = rows[-1][: anchors[-1] + 1]
      rows, anchors = rows[:-1], anchors[:-1]
    edit = EncodedEdit(record.number, rows, anchors, target, kl)
    drafts.append((edit, faults))
  return drafts


def _length_faults(edit: EncodedEdit, max_tokens: int) -> list[str]:
  longest = max(map(len, edit.rows))
  total = longest + len(edit.target) - 1
  faults = []
  if total > max_tokens:
    faults.append(
        f'its longest row takes {total} tokens ({longest} of context and'
        f' prompt, {len(edit.target)} of target less one), the limit is'
        f' {max_tokens}; shorten the prompt or the target.'
    )
  if len(edit.kl) > max_tokens:
    faults.append(
        f'its KL row takes {len(edit.kl)} tokens, the limit is {max_tokens};'
        ' shorten the subject.'
    )
  return faults
