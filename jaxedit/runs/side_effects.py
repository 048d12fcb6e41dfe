"""What edits do to the rest of the model: perplexity of a text, given answers.

Both are measured on the unedited model and after the edits: of a sequence on the
edited model, of independent edits under every one by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxedit import edited as edited_lib
from jaxedit import io
from jaxedit.deltas import Edited
from jaxedit.eval.scorers import choices as choices_lib
from jaxedit.eval.scorers import perplexity as perplexity_lib
from jaxedit.eval.scorers.choices import Choices
from jaxedit.eval.scorers.perplexity import Perplexity
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.types import InputError, Progress

if TYPE_CHECKING:
  from jaxedit.runs.inputs import Session

_WINDOW = 512  # tokens
_TEXT_BYTES = 1 << 31  # of its file
_TEXT_CHARACTERS = 32  # read for each token that is scored
_TEXT_BATCH = 32  # windows of 512 tokens run eight together
_EDITS = 32  # of those side by side, measured at a time


class SideEffects(NamedTuple):
  """What was measured; None for what was not asked for."""

  perplexity: Perplexity | None = None
  choices: Choices | None = None

  def report(self, before: SideEffects | None = None) -> dict[str, Any]:
    """Both as results.json has them, by name; `before`: the unedited model."""
    found = {}
    if self.perplexity is not None:
      read = self.perplexity._asdict()
      # Of a ruined model they may be none that JSON has.
      read |= {name: io.json_number(read[name]) for name in ('value', 'nats')}
      read['each'] = [io.json_number(one) for one in read['each']]
      if not read['each']:
        del read['each']
      found['perplexity'] = read
    if self.choices is not None:
      found['choices'] = self.choices.report(before and before.choices)
    return found


def check(config: RunConfig) -> None:
  """Reads the questions, before anything is loaded.

  Args:
    config: of the run.

  Raises:
    InputError: see `choices.read`.
  """
  if config.choices:
    choices_lib.read(config.choices, config.num_choices)


def measure(
    session: Session, edited: Edited, clock: Clock, progress: Progress
) -> SideEffects:
  """Measures what the run asks for.

  Args:
    session: what is worked on.
    edited: the edit, or edits side by side, that the model is under.
    clock: the stages are timed here.
    progress: progress display.

  Raises:
    InputError: a file cannot be read, or holds nothing to score.
  """
  config, parts = session.config, []
  text = _text(config) if config.perplexity_text else None
  items = None
  if config.choices:
    items = choices_lib.read(config.choices, config.num_choices)
  if text is None and items is None:
    return SideEffects()

  def measured(edited: Edited, edits: Sequence[int] | None = None):
    return _measured(session, edited, edits, text, items, clock, progress)

  if edited.size is None:
    return measured(edited)
  if session.alone:
    # Some at a time: all tokens' scores of thousands of edits would fill memory.
    for first in range(0, edited.size, _EDITS):
      some = range(first, min(first + _EDITS, edited.size))
      parts.append(measured(edited, some))
  else:
    # A change of many facts a sequence would not fit.
    for i in range(edited.size):
      parts.append(measured(edited_lib.select(edited, i)))
  return join(parts)


def _measured(
    session: Session,
    edited: Edited,
    edits: Sequence[int] | None,
    text: str | None,
    items: Sequence[choices_lib.Item] | None,
    clock: Clock,
    progress: Progress,
) -> SideEffects:
  """Measures under one edit, or under some of those side by side."""
  config = session.config
  found: dict[str, Any] = {}
  if text is not None:
    with clock('perplexity'):
      lm = edited_lib.open_model(session.model, edited, batch_size=_TEXT_BATCH)
      found['perplexity'] = perplexity_lib.perplexity(
          lm,
          [text],
          session.tokenizer,
          row_tokens=min(_WINDOW, lm.spec.max_positions),
          limit=config.perplexity_tokens,
          edits=edits,
          progress=progress,
      )
  if items is not None:
    with clock('choices'):
      lm = edited_lib.open_model(
          session.model, edited, batch_size=config.eval_batch_size
      )
      found['choices'] = choices_lib.choose(
          lm, items, session.tokens, edits=edits, progress=progress
      )
  return SideEffects(**found)


def _text(config: RunConfig) -> str:
  """The text whose perplexity is measured, as far as it is read."""
  path = config.perplexity_text
  try:
    text = io.read_bytes(path, _TEXT_BYTES).decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(
        f'{path}: cannot be read as UTF-8 text ({e}); name a plain text'
    ) from None
  # Tokenising takes 600 times a text's memory.
  return text[: _TEXT_CHARACTERS * config.perplexity_tokens]


def join(parts: Sequence[SideEffects]) -> SideEffects:
  """Joins what was measured of edits side by side, part by part."""
  texts, choices = zip(*parts)
  return SideEffects(
      None if texts[0] is None else perplexity_lib.join(texts),
      None if choices[0] is None else choices_lib.join(choices),
  )


def results(before: SideEffects, after: SideEffects) -> dict[str, Any]:
  """Entries of results.json: what was measured, 'pre' and 'post'."""
  pre, post = before.report(), after.report(before)
  return {name: {'pre': pre[name], 'post': post[name]} for name in post}


def lines(config: RunConfig, found: Mapping[str, Any]) -> list[str]:
  """Lines to print of results."""
  printed = []
  if read := found.get('perplexity'):
    old, new = read['pre'], read['post']
    apart = ', mean over edits' if 'each' in new else ''
    number = lambda x: 'not finite' if x is None else f'{x:.2f}'
    printed.append(
        f'perplexity of {config.perplexity_text}: {number(old["value"])} before,'
        f' {number(new["value"])} after ({new["tokens"]} tokens{apart})'
    )
  if read := found.get('choices'):
    old, new = read['pre'], read['post']
    low, high = new['intervals']['accuracy']
    printed.append(
        f'right answers of {config.choices}: {old["accuracy"]:.3f} before,'
        f' {new["accuracy"]:.3f} [{low:.3f}, {high:.3f}] after, the same choice'
        f' {new["same"]:.3f} ({new["questions"]} questions)'
    )
  return printed
