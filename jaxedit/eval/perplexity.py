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

Windows of different texts lie side by side in one row where they fit, each a
segment of its own (see `types.Columns`); their numbers are those of a window
alone. All batches have one shape, and the head runs at scored columns only, a
part of them at a time.

Axis letters: B rows, T columns, R scored columns of a batch.

Not here: strides that overlap, perplexity a word or a byte.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit.edited import lm
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.text.locate import encode_prompts
from jaxedit.types import (
    SHARED,
    Array,
    Edited,
    InputError,
    LowRank,
    Params,
    Progress,
    TokenLayout,
    silent,
)

# Scored columns whose logits exist at one time.
_HEAD_ROWS = 1024
# Texts tokenised at once; with a limit, few beyond it are.
_TEXTS = 16


class Perplexity(NamedTuple):
  """A perplexity and what it was measured on.

  Attributes:
    value: exp(nats).
    nats: mean negative log-likelihood of a scored token.
    tokens: how many were scored.
    protocol: how, in words.
  """

  value: float
  nats: float
  tokens: int
  protocol: str


class _Batch(NamedTuple):
  """Rows laid out for one call; numpy arrays."""

  tokens: np.ndarray  # [B, T]
  columns: TokenLayout  # [B, T]
  index: np.ndarray  # [chunks, R / chunks] into the B T columns
  labels: np.ndarray  # same shape


def perplexity(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    row_tokens: int = 512,
    limit: int | None = None,
    batch_rows: int = 8,
    progress: Progress = silent,
) -> Perplexity:
  """Measures the perplexity of texts; see the module head for the protocol.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: the change.
    texts: plain texts, e.g. documents; a file's whole text is one.
    tokenizer: a fast transformers tokenizer.
    row_tokens: length of a window, which is the longest context, tokens.
    limit: read this many tokens from the beginning and no more; None for all.
    batch_rows: most rows a batch; changes no number beyond rounding.
    progress: is told scored tokens.

  Returns:
    The perplexity; not finite where the model's numbers are not.

  Raises:
    InputError: settings that the model cannot take, a text without tokens or
      with tokens unknown to the model, or nothing to score; all at once.
  """
  _check(spec, edited, row_tokens=row_tokens, limit=limit, rows=batch_rows)
  windows = _windows(
      tokenizer, texts, length=row_tokens, limit=limit, vocab=spec.vocab
  )
  rows = _pack(windows, row_tokens)
  batches = -(-len(rows) // batch_rows)
  # Spread evenly, so that the last batch is not mostly padding.
  shape = -(-len(rows) // batches), row_tokens
  count = sum(len(window) - 1 for window in windows)
  total = 0.0
  with progress('perplexity', count, 'token') as advance:
    for first in range(0, len(rows), shape[0]):
      batch, scored = _lay_out(rows[first : first + shape[0]], shape)
      logprob = np.asarray(_score(spec, params, edited, batch))[:scored]
      total -= float(np.sum(logprob, dtype=np.float64))
      advance(scored)
  nats = total / count
  with np.errstate(over='ignore'):
    value = float(np.exp(nats))
  return Perplexity(value, nats, count, _protocol(row_tokens, limit))


def _protocol(row_tokens: int, limit: int | None) -> str:
  """Says how a perplexity was measured."""
  read = 'all tokens' if limit is None else f'the first {limit} tokens'
  return (
      f'perplexity a token; {read}; every text by itself in consecutive windows'
      f' of {row_tokens} tokens without overlap; every token but the first of a'
      ' window scored, given those before it in the window'
  )


def _check(
    spec: ModelSpec,
    edited: Edited,
    *,
    row_tokens: int,
    limit: int | None,
    rows: int,
) -> None:
  """Refuses settings that no text could be scored with."""
  problems = []
  if not 2 <= row_tokens <= spec.max_positions:
    problems.append(
        f'windows of {row_tokens} tokens: give 2 to {spec.max_positions}, the'
        ' positions of the model.'
    )
  if limit is not None and limit < 2:
    problems.append(f'a limit of {limit} tokens: give at least 2, or none.')
  if rows < 1:
    problems.append(f'batches of {rows} rows: give at least 1.')
  for delta in edited.deltas:
    if isinstance(delta, LowRank) and delta.key.ndim != 3:
      problems.append(
          f'the change of {delta.site} differs from row to row; give the change'
          ' of one model.'
      )
  if problems:
    raise InputError(*problems)


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
  if problems:
    raise InputError(*problems)
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
  if problems:
    raise InputError(*problems)
  return windows


def _encoded(
    tokenizer: Any, texts: Sequence[str]
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (number from 1, ids) of every text, tokenised as they are asked."""
  for first in range(0, len(texts), _TEXTS):
    some = encode_prompts(tokenizer, texts[first : first + _TEXTS])
    yield from enumerate(some, first + 1)


def _pack(windows: Sequence[np.ndarray], width: int) -> list[list[np.ndarray]]:
  """Puts windows into rows of `width` columns: longest first, tightest fit."""
  rows: list[list[np.ndarray]] = []
  room: list[tuple[int, int]] = []  # (free columns, row), ascending
  for window in sorted(windows, key=len, reverse=True):
    at = bisect.bisect_left(room, (len(window), 0))
    if at == len(room):
      free, row = width, len(rows)
      rows.append([])
    else:
      free, row = room.pop(at)
    rows[row].append(window)
    bisect.insort(room, (free - len(window), row))
  return rows


def _lay_out(
    rows: Sequence[Sequence[np.ndarray]], shape: tuple[int, int]
) -> tuple[_Batch, int]:
  """Writes rows into arrays of [B, T] = shape, and counts what they score."""
  tokens, position, segment = np.zeros((3, *shape), np.int32)
  index, labels = [], []
  for r, row in enumerate(rows):
    end = 0
    for number, window in enumerate(row, SHARED + 1):
      first, end = end, end + len(window)
      tokens[r, first:end] = window
      position[r, first:end] = np.arange(len(window))
      segment[r, first:end] = number
      index.append(r * shape[1] + np.arange(first, end - 1))
      labels.append(window[1:])
  scored = sum(map(len, labels))
  places = shape[0] * shape[1]
  chunk = min(_HEAD_ROWS, places)
  spare = np.zeros(-(-places // chunk) * chunk - scored, np.int32)
  chunks = lambda parts: np.concatenate([*parts, spare]).reshape(-1, chunk)
  batch = _Batch(
      tokens,
      TokenLayout(position, segment),
      chunks(index).astype(np.int32),
      chunks(labels).astype(np.int32),
  )
  return batch, scored


@functools.partial(jax.jit, static_argnames='spec')
def _score(
    spec: ModelSpec, params: Params, edited: Edited, batch: _Batch
) -> Array:
  """Log-probabilities of the labels.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edited: the change.
    batch: what to run.

  Returns:
    [R] nats.
  """
  h = lm.hidden(spec, params, edited, batch.tokens, batch.columns)
  h = h.reshape(-1, spec.width)

  def head(part: tuple[Array, Array]) -> Array:
    return decoder.label_logprob(spec, params, h[part[0]], part[1])[0]

  return jax.lax.map(head, (batch.index, batch.labels)).reshape(-1)
