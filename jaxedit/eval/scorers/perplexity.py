"""How well a possibly edited model predicts plain text.

  perplexity = exp(-1/n sum_t log p(x_t | x_s .. x_{t-1}))

where s is the first token of t's window and the sum runs over the n scored
tokens.

Protocol: every text is tokenised by itself, with the token that begins texts if
the tokenizer adds one and without an end token, and cut into consecutive windows
of `row_tokens` tokens that do not overlap; the last may be shorter. A window is
read without anything before it. Every token but the first of a window is scored.
All scored tokens count alike, whatever text they are from. A value depends on
the tokenizer and on the length of windows, so compare only what was measured
with the same of both.

Of edits side by side the text is read under each by itself; nats are their mean,
so that the value is the geometric mean of theirs.

Not here: strides that overlap, perplexity a word or a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.edited.lm import LanguageModel
from jaxedit.edited.scoring import Query
from jaxedit.models.loading import require_decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.text.locate import encode_prompts
from jaxedit.types import InputError, Progress, silent

# Texts tokenised at once; with a limit, few beyond it are.
_TEXTS = 16


class Perplexity(NamedTuple):
  """A perplexity and what it was measured on.

  Attributes:
    value: exp(nats).
    nats: mean negative log-likelihood of a scored token.
    tokens: how many were scored.
    protocol: how, in words.
    each: nats a token under each of the edits side by side.
  """

  value: float
  nats: float
  tokens: int
  protocol: str
  each: tuple[float, ...] = ()


def perplexity(
    lm: LanguageModel,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    row_tokens: int = 512,
    limit: int | None = None,
    edits: Sequence[int] | None = None,
    progress: Progress = silent,
) -> Perplexity:
  """Measures the perplexity of texts; see the module head for the protocol.

  Args:
    lm: the model.
    texts: plain texts, e.g. documents; a file's whole text is one.
    tokenizer: a fast transformers tokenizer.
    row_tokens: length of a window, which is the longest context, tokens.
    limit: read this many tokens from the beginning and no more; None for all.
    edits: of a model with edits side by side, those to read it under.
    progress: progress display.

  Returns:
    The perplexity; not finite where the model's numbers are not.

  Raises:
    InputError: settings that the model cannot take, a text without tokens or
      with tokens unknown to the model, or nothing to score; all at once.
  """
  require_decoder(lm.spec, 'perplexity')
  _check(lm.spec, row_tokens, limit)
  windows = _windows(
      tokenizer, texts, length=row_tokens, limit=limit, vocab=lm.spec.vocab
  )
  queries = [
      Query(tuple(w[:1].tolist()), (tuple(w[1:].tolist()),)) for w in windows
  ]
  count = sum(len(window) - 1 for window in windows)
  ids = None if edits is None else np.repeat(edits, len(queries)).tolist()
  times = 1 if edits is None else len(edits)
  scored = lm.score(queries * times, edit_ids=ids, progress=progress)
  lost = [one.nll * len(one.argmax) for (one,) in scored]
  each = np.reshape(lost, (times, -1)).sum(1) / count
  return _found(
      each, count, _protocol(row_tokens, limit), apart=edits is not None
  )


def join(parts: Sequence[Perplexity]) -> Perplexity:
  """Joins what was measured of edits side by side, part by part.

  Args:
    parts: of the same text.

  Returns:
    That of all edits.
  """
  each = [nats for part in parts for nats in part.each or (part.nats,)]
  return _found(each, parts[0].tokens, parts[0].protocol, apart=True)


def _found(
    each: Sequence[float], count: int, protocol: str, *, apart: bool
) -> Perplexity:
  nats = float(np.mean(each))
  with np.errstate(over='ignore'):
    value = float(np.exp(nats))
  if not apart:
    return Perplexity(value, nats, count, protocol)
  words = '; under every edit by itself, mean nats'
  protocol = protocol.removesuffix(words) + words
  return Perplexity(value, nats, count, protocol, tuple(map(float, each)))


def _protocol(row_tokens: int, limit: int | None) -> str:
  """Says how a perplexity was measured."""
  read = 'all tokens' if limit is None else f'the first {limit} tokens'
  return (
      f'perplexity a token; {read}; every text by itself in consecutive windows'
      f' of {row_tokens} tokens without overlap; every token but the first of a'
      ' window scored, given those before it in the window'
  )


def _check(spec: ModelSpec, row_tokens: int, limit: int | None) -> None:
  """Refuses settings that no text could be scored with."""
  problems = []
  if not 2 <= row_tokens <= spec.max_positions:
    problems.append(
        f'windows of {row_tokens} tokens: give 2 to {spec.max_positions}, the'
        ' positions of the model.'
    )
  if limit is not None and limit < 2:
    problems.append(f'a limit of {limit} tokens: give at least 2, or none.')
  InputError.raise_for(problems)


def _windows(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int,
    limit: int | None,
    vocab: int,
) -> list[np.ndarray]:
  """Tokenises texts and cuts them into windows with something to score.

  Returns:
    Arrays of 2 to `length` ids, in the order of the texts.

  Raises:
    InputError: see `perplexity`.
  """
  problems = [
      f'text {number} is empty; leave it out or give it some text.'
      for number, text in enumerate(texts, 1)
      if not text
  ]
  if isinstance(texts, str) or not texts:
    problems.append('there are no texts; give a list with at least one.')
  InputError.raise_for(problems)
  windows, left = [], np.inf if limit is None else limit
  for number, ids in _encoded(tokenizer, texts):
    if not len(ids):
      problems.append(
          f'text {number} has no tokens; leave it out or give it other text.'
      )
    elif ids.max() >= vocab:
      problems.append(
          f'text {number} has token {ids.max()} but the model knows {vocab}'
          " tokens; use the model's own tokenizer."
      )
    ids = ids[: int(min(left, len(ids)))]
    windows += [ids[at : at + length] for at in range(0, len(ids), length)]
    left -= len(ids)
    if left <= 0:
      break
  windows = [window for window in windows if len(window) > 1]
  if not windows and not problems:
    problems.append(
        'no text has two tokens, so there is nothing to score; give longer ones.'
    )
  InputError.raise_for(problems)
  return windows


def _encoded(
    tokenizer: Any, texts: Sequence[str]
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (number from 1, ids) of every text, tokenised as they are asked."""
  for first in range(0, len(texts), _TEXTS):
    some = encode_prompts(tokenizer, texts[first : first + _TEXTS])
    yield from enumerate(some, first + 1)
