"""What a scorer is: it asks about requests, and turns answers into metrics.

A scorer knows no model. What it asks is put to one by `evaluation.evaluate`,
equal questions of several scorers and requests once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxedit.edited.scoring import Query, Scored
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.types import EditRequest, InputError


class Prompt(NamedTuple):
  """A prompt to continue, as ids.

  Attributes:
    ids: its tokens.
    stream: the number of its random stream.
    stop_ids: tokens that end its text; those of the scorer unless given.
  """

  ids: tuple[int, ...]
  stream: int = 0
  stop_ids: tuple[int, ...] | None = None


class Generation(NamedTuple):
  """How prompts are continued; see `LanguageModel.generate`."""

  max_new_tokens: int
  stop_ids: tuple[int, ...]
  decoding: Decoding = GREEDY


class Questions(NamedTuple):
  """What a scorer asks about one request.

  Attributes:
    queries: (prompt as text, prompt and answers) to score.
    prompts: (prompt as text, prompt) to continue.
  """

  queries: Sequence[tuple[str, Query]] = ()
  prompts: Sequence[tuple[str, Prompt]] = ()


class Replies(NamedTuple):
  """What the model says to `Questions`.

  Attributes:
    scores: of each query, of each of its answers.
    tokens: new tokens of each prompt.
  """

  scores: Sequence[Sequence[Scored]]
  tokens: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Judged:
  """What a scorer says of one request.

  Attributes:
    metrics: id -> value, a fraction.
    fields: further entries of its record, plain JSON types.
    preferred: the most probable tokens at each probe that agreement is of, if
      read.
  """

  metrics: Mapping[str, float]
  fields: Mapping[str, Any]
  preferred: tuple[tuple[int, ...], ...] = ()


class Scorer:
  """Measures one thing; a frozen dataclass of settings."""

  @property
  def generation(self) -> Generation | None:
    """How its prompts are continued; None if it has none."""
    return None

  def prepare(self, requests: Sequence[EditRequest]) -> list[Questions]:
    """Returns what to ask about each request."""
    raise NotImplementedError

  def errors(self, request: EditRequest) -> list[str]:
    """Lists what cannot be measured; sentences that do not name the request.

    What the model cannot take is found by `evaluation.errors`.
    """
    del request
    return []

  def judge(
      self,
      requests: Sequence[EditRequest],
      replies: Sequence[Replies],
      before: Sequence[Sequence[Sequence[int]]] | None,
  ) -> list[Judged]:
    """Makes metrics of what the model says.

    Args:
      requests: those that were asked about.
      replies: to what was asked about each.
      before: the unedited model's `preferred` of each, if it was evaluated.
    """
    raise NotImplementedError


def texts(
    tokenizer: Any, tokens: Sequence[Sequence[int]], ends: Iterable[int] = ()
) -> list[str]:
  """Turns new tokens into text.

  Args:
    tokenizer: a transformers tokenizer.
    tokens: ids of each text.
    ends: tokens that are left out where a text ends in one.

  Returns:
    The texts without special tokens and surrounding white space; what is inside
    stays as it is.
  """
  if not tokens:  # which a tokenizer takes for one text without tokens
    return []
  ends = set(ends)
  cut = [ids[:-1] if ids and ids[-1] in ends else ids for ids in tokens]
  decoded = tokenizer.batch_decode(
      cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  return [text.strip() for text in decoded]


def texts_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
  """Turns single tokens into text, each by itself.

  Args:
    tokenizer: a transformers tokenizer.
    tokens: ids.
  """
  if not len(tokens):  # which a tokenizer takes for one text without tokens
    return []
  return tokenizer.batch_decode(
      [[token] for token in tokens], clean_up_tokenization_spaces=False
  )


def end_ids(
    tokenizer: Any, vocab: int, chat_end: str = '', named: Iterable[int] = ()
) -> tuple[int, ...]:
  """Lists the tokens that end an answer.

  Args:
    tokenizer: a transformers tokenizer.
    vocab: rows of the model's embedding; ids from there up cannot occur.
    chat_end: text that ends a turn of the chat, '' without one. Of several
      tokens the special ones count.
    named: further ids, those of the model's generation_config.json.

  Returns:
    Ids of the end-of-text token, of the end of a turn and those named,
    ascending.

  Raises:
    InputError: the end of a turn is several tokens, all of them ordinary.
  """
  ends = {tokenizer.eos_token_id, *named} - {None}
  if chat_end:
    ids = tokenizer(chat_end, add_special_tokens=False)['input_ids']
    if len(ids) > 1:
      ids = [i for i in ids if i in tokenizer.added_tokens_decoder]
    if not ids:
      raise InputError(
          f'the end of a turn, {chat_end!r}, is no token of this tokenizer, so'
          ' nothing can stop at it; name the token that ends a turn, or none'
      )
    ends |= set(ids)
  return tuple(sorted(i for i in ends if i < vocab))
