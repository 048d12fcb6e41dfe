"""Turns edit requests into rows of ids for the optimisation of targets.

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
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.text import locate
from jaxedit.text.chat import PLAIN, Chat
from jaxedit.text.cloze import PLACEHOLDER
from jaxedit.text.templates import template_errors
from jaxedit.text.token_cache import TokenCache, token_cache
from jaxedit.types import EditRequest, InputError

ANCHORS = ('subject_last', 'prompt_last')
KL_TEMPLATE = '{} is a'  # MEMIT's
# Requests tokenised at once: bounds the memory that character offsets take.
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
    number: the request's number in its file.
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


class _Options(NamedTuple):
  """What facts are encoded with; see `fact_encoder`."""

  templates: tuple[str, ...]
  anchor: str
  kl_template: str | None
  chat: Chat
  max_tokens: int


Drafted = tuple[EncodedEdit, list[str]]
Draft = Callable[[Sequence[EditRequest]], list[Drafted]]


class Encoder:
  """Encodes requests, each of them once.

  Its `check` is that of a loader; what was checked is encoded already, also for
  another encoder of equal settings and the same `TokenCache`.
  """

  def __init__(self, draft: Draft, edits: dict[EditRequest, EncodedEdit]):
    """Makes an encoder of a function that tokenises requests in one go.

    Args:
      draft: requests -> (edit, errors) of each.
      edits: what is encoded already; more is added.
    """
    self._draft, self._edits = draft, edits

  def check(self, requests: Sequence[EditRequest]) -> list[list[str]]:
    """Lists what `encode` would refuse.

    Args:
      requests: the edits.

    Returns:
      Sentences that do not name the request, for each of them.
    """
    found = []
    for begin in range(0, len(requests), _CHUNK):
      chunk = requests[begin : begin + _CHUNK]
      for request, (edit, errors) in zip(chunk, self._draft(chunk)):
        if not errors:
          self._edits[request] = edit
        found.append(errors)
    return found

  def encode(self, requests: Sequence[EditRequest]) -> list[EncodedEdit]:
    """Encodes requests.

    Args:
      requests: the edits.

    Returns:
      One `EncodedEdit` a request, in order.

    Raises:
      InputError: requests that cannot be edited, all errors by record.
    """
    new = [request for request in requests if request not in self._edits]
    problems = [
        f'record {request.number} (id {request.id}): {error}'
        for request, errors in zip(new, self.check(new))
        for error in errors
    ]
    InputError.raise_for(problems)
    return [self._edits[request] for request in requests]


def fact_encoder(
    tokenizer: Any,
    templates: Sequence[str],
    *,
    max_tokens: int,
    anchor: str = 'subject_last',
    kl_template: str | None = KL_TEMPLATE,
    chat: Chat = PLAIN,
) -> Encoder:
  """Makes the encoder of facts.

  Args:
    tokenizer: a fast transformers tokenizer, or its `TokenCache`.
    templates: contexts with one '{}' each, where the prompt goes.
    max_tokens: longest row in tokens, target included (less its last token,
      which is never an input); the model's context length.
    anchor: edited position, 'subject_last' (ROME, MEMIT) or 'prompt_last'.
    kl_template: cloze of the KL row (MEMIT's '{} is a'), or None for no row.
    chat: words around the prompt and its context, and in front of the KL row.
      What ends an answer there is no part of a fact's target.

  Returns:
    The encoder; it refuses subjects and targets without tokens, and over-long
    rows.

  Raises:
    InputError: a faulty template or an unknown anchor.
  """
  _check_options(templates, anchor, kl_template)
  tokens = token_cache(tokenizer)
  options = _Options(tuple(templates), anchor, kl_template, chat, max_tokens)
  draft = functools.partial(_draft, tokens, options=options)
  return Encoder(draft, tokens.known(options))


def _check_options(
    templates: Sequence[str], anchor: str, kl_template: str | None
) -> None:
  problems = template_errors(templates)
  if not templates:
    problems.append("no context templates were given; give at least '{}'.")
  if anchor not in ANCHORS:
    problems.append(
        f'anchor {anchor!r} is unknown; use {" or ".join(ANCHORS)}.'
    )
  if kl_template is not None:
    problems.extend(f'KL {error}' for error in template_errors([kl_template]))
  InputError.raise_for(problems)


def _draft(
    tokens: TokenCache, requests: Sequence[EditRequest], options: _Options
) -> list[Drafted]:
  """Tokenises facts in one go, leaving errors beside the edits."""
  templates, anchor, kl_template, chat, max_tokens = options
  cases, continued = [], []
  for request in requests:
    before, subject, after = request.parts
    for template in templates:
      head, _, tail = template.partition(PLACEHOLDER)
      head, tail = chat.before + head + before, after + tail + chat.after
      cases.append((head, subject, tail))
    if kl_template is not None:
      head, _, tail = kl_template.partition(PLACEHOLDER)
      cases.append((chat.before + head, subject, tail))
    asked = chat.wrap(request.question)
    continued.append(locate.Continued(asked, request.target, request.space))
  found, targets = tokens.subjects(cases), tokens.targets(continued)
  width = len(cases) // max(len(requests), 1)
  drafts = []
  for i, (request, target) in enumerate(zip(requests, targets)):
    mine = found[i * width : (i + 1) * width]
    errors = [] if len(target) else [locate.no_target(request.target)]
    if tokens.unknown in target:
      errors.append(locate.unknown_target(request.target))
    if anchor == 'subject_last' and any(span is None for _, span in mine):
      errors.append(locate.no_subject(request.subject))
    anchors = tuple(
        span[1] if anchor == 'subject_last' and span else len(ids) - 1
        for ids, span in mine
    )
    rows = tuple(ids for ids, _ in mine)
    kl = np.zeros([0], np.int32)
    if kl_template is not None:
      kl = rows[-1][: anchors[-1] + 1]
      rows, anchors = rows[:-1], anchors[:-1]
    edit = EncodedEdit(request.number, rows, anchors, target, kl)
    drafts.append((edit, errors or _length_errors(edit, max_tokens)))
  return drafts


def _length_errors(edit: EncodedEdit, max_tokens: int) -> list[str]:
  longest = max(map(len, edit.rows))
  total = longest + len(edit.target) - 1
  errors = []
  if total > max_tokens:
    errors.append(
        f'its longest row takes {total} tokens ({longest} of context and'
        f' prompt, {len(edit.target)} of target less one), the limit is'
        f' {max_tokens}; shorten the prompt or the target.'
    )
  if len(edit.kl) > max_tokens:
    errors.append(
        f'its KL row takes {len(edit.kl)} tokens, the limit is {max_tokens};'
        ' shorten the subject.'
    )
  return errors
