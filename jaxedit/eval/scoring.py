"""Scores answers to prompts under teacher forcing, one pass for all of them.

  nll(x, a) = -1/|a| sum_j log p(a_j | x, a_<j)          nats a token

A row is a prompt (the trunk) and its answers, each a branch of its own that
sees the trunk and itself (see `types.Columns`). The last token of an answer is
predicted and never read, so a branch holds all tokens but the last and an
answer of one token costs no column at all:

  column     0 1 2 3 | 4 5 | 6             answers a = a0 a1 a2, b = b0 b1
  token      x x x x | a0 a1 | b0
  position   0 1 2 3 | 4 5 | 4
  scored           ^   ^ ^   ^             a0, b0 at 3; a1, a2 at 4, 5; b1 at 6

The head runs at scored columns only. Prompt and answers are tokenised apart and
joined as ids, so nothing depends on how their border would merge.

Rows are sorted by length and padded on the right to a short ladder of widths,
with one of two numbers of rows a width: a data set compiles a handful of shapes
and later calls of the same kind none.

Axis letters: B rows, T columns, R scored columns of a batch, n edited layers,
E edits, M key-value rows.

Source: the quantities are those of CounterFact (Meng et al. 2022, arXiv
2202.05262, section 3.4); their code runs every answer as a text of its own.

It knows no records and no metrics (see `harness`, `metrics`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit.batching.buckets import round_up
from jaxedit.edited import lm
from jaxedit.models import decode, decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.text.locate import encode_prompts, encode_targets
from jaxedit.types import (
    SHARED,
    Array,
    Edited,
    InputError,
    Params,
    Progress,
    TokenLayout,
    silent,
)

# Widths of a batch, in columns, and scored columns a row on average.
_LENGTHS = (8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_SCORED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
_ROWS = tuple(2**i for i in range(16))
# Rows of wide batches are fewer: attention needs B T T numbers.
_FULL_WIDTH = 128
# What a batch costs besides its columns, in columns: weights are read once more.
_BATCH_COST = 128
# What a further shape costs, in columns: it may have to be compiled.
_SHAPE_COST = 512
# Scored columns whose logits exist at one time.
_HEAD_ROWS = 1024


class Row(NamedTuple):
  """A prompt and the answers to score, as ids; see `encode_rows`."""

  prompt: tuple[int, ...]
  answers: tuple[tuple[int, ...], ...]

  @property
  def columns(self) -> int:
    """TokenLayout that the row needs."""
    return len(self.prompt) + sum(len(a) - 1 for a in self.answers)

  @property
  def scored(self) -> int:
    """Labels of all answers."""
    return sum(map(len, self.answers))


class Scored(NamedTuple):
  """What the model makes of one answer.

  Attributes:
    nll: mean negative log-likelihood, nats a token.
    argmax: the most probable token at each token of the answer.
    correct: whether it is the answer's token; False where the model's numbers
      are not finite.
  """

  nll: float
  argmax: tuple[int, ...]
  correct: tuple[bool, ...]


class _Batch(NamedTuple):
  """Rows laid out for one call; numpy arrays."""

  tokens: np.ndarray  # [B, T]
  columns: TokenLayout  # [B, T]
  index: np.ndarray  # [chunks, R / chunks] into the B T columns
  labels: np.ndarray  # same shape
  owner: np.ndarray  # [B]


def encode_rows(
    tokenizer: Any, items: Sequence[tuple[str, Sequence[str]]]
) -> list[Row]:
  """Tokenises prompts and their answers.

  Args:
    tokenizer: a fast transformers tokenizer.
    items: (prompt, answers); an answer is given without leading space.

  Returns:
    One row an item. An answer that leaves no token is empty there, which
    `fault` and `score` refuse.

  Raises:
    InputError: the tokenizer gives no character offsets.
  """
  prompts = list(dict.fromkeys(prompt for prompt, _ in items))
  answers = list(dict.fromkeys(a for _, given in items for a in given))
  prompt_ids, answer_ids = (
      {text: tuple(map(int, ids)) for text, ids in zip(texts, encoded)}
      for texts, encoded in (
          (prompts, encode_prompts(tokenizer, prompts)),
          (answers, encode_targets(tokenizer, answers)),
      )
  )
  return [
      Row(prompt_ids[prompt], tuple(answer_ids[a] for a in given))
      for prompt, given in items
  ]


def fault(spec: ModelSpec, row: Row) -> str | None:
  """Says why a row cannot be scored.

  Args:
    spec: the architecture.
    row: the row.

  Returns:
    Half a sentence, or None for a good row.
  """
  if not row.prompt:
    return 'the prompt has no tokens; give it some text'
  if not all(row.answers):
    return 'an answer has no tokens; give it some text'
  tokens = len(row.prompt) + max(map(len, row.answers), default=0) - 1
  if tokens > spec.max_positions:
    return (
        f'prompt and answer take {tokens} positions but the model has'
        f' {spec.max_positions}; shorten them'
    )
  highest = max(row.prompt + sum(row.answers, ()))
  if highest >= spec.vocab:
    return (
        f'it has token {highest} but the model knows {spec.vocab} tokens; use'
        " the model's own tokenizer"
    )
  return None


def score(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    rows: Sequence[Row],
    *,
    stack: Edited | None = None,
    owner: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[list[Scored]]:
  """Scores every answer of every row.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: a change that all rows share.
    rows: prompts with answers, see `encode_rows`.
    stack: E changes side by side, low-rank factors [n, E, M, .]; row i is
      scored by the model that has change owner[i] besides `edited`.
    owner: an index into `stack` a row; given exactly when `stack` is.
    batch_size: rows a batch, rounded up to a power of two; batches wider than
      128 columns have proportionally fewer.
    progress: progress display.

  Returns:
    For each row the scores of its answers, in order.

  Raises:
    InputError: rows that cannot be scored, all at once, or a stack that does
      not fit (see `with_owned`).
  """
  faults = [(i, fault(spec, row)) for i, row in enumerate(rows)]
  if any(message for _, message in faults):
    raise InputError(*(f'row {i}: {text}.' for i, text in faults if text))
  check_stack(edited, stack, owner, len(rows))
  owner = [0] * len(rows) if owner is None else list(owner)
  results: list[list[Scored]] = [[] for _ in rows]

  def read(chosen: list[int], labels: np.ndarray, out: Any) -> int:
    taken = _split([rows[i] for i in chosen], labels.reshape(-1), out)
    for i, scores in zip(chosen, taken):
      results[i] = scores
    return len(chosen)

  with progress('score', len(rows), 'prompt') as advance:
    waiting = None
    for chosen, shape, scored in _cut(rows, batch_size):
      batch = _lay_out(
          [rows[i] for i in chosen],
          [owner[i] for i in chosen],
          shape=shape,
          scored=scored,
      )
      # This batch is under way while the results of the last one are read.
      out = _score(spec, params, (edited, stack), batch)
      if waiting is not None:
        advance(read(*waiting))
      waiting = chosen, batch.labels, out
    if waiting is not None:
      advance(read(*waiting))
  return results


def check_stack(
    edited: Edited,
    stack: Edited | None,
    owner: Sequence[int] | None,
    rows: int,
) -> None:
  """Refuses a stack of changes that cannot be applied row by row.

  Args:
    edited: the change that all rows share.
    stack: E changes side by side, or None.
    owner: an index into the stack a row, or None.
    rows: number of rows.

  Raises:
    InputError: one of `stack` and `owner` is missing, a change is not low-rank
      with an edit axis, an index is out of range, or both changes touch one
      kernel.
  """
  deltas = None if stack is None else stack.deltas
  problems = decode.stack_faults(edited.deltas, deltas, owner, rows)
  if problems:
    raise InputError(*(f'{problem}.' for problem in problems))


def with_owned(edited: Edited, stack: Edited | None, owner: Array) -> Edited:
  """Joins a shared change with each row's own one.

  Args:
    edited: the change that all rows share.
    stack: E changes side by side, factors [n, E, M, .], or None.
    owner: [B] int32 index into the stack.

  Returns:
    A change whose factors have a row axis, [n, B, M, .], where they come from
    the stack.
  """
  if stack is None:
    return edited
  own = (
      d.replace(key=d.key[:, owner], value=d.value[:, owner])
      for d in stack.deltas
  )
  return edited.replace(deltas=(*edited.deltas, *own))


@functools.partial(jax.jit, static_argnames='spec')
def _score(
    spec: ModelSpec,
    params: Params,
    change: tuple[Edited, Edited | None],
    batch: _Batch,
) -> tuple[Array, Array]:
  """Log-probabilities of the labels and the most probable tokens.

  Args:
    spec: the architecture.
    params: canonical parameters.
    change: the shared change and the stack.
    batch: what to run.

  Returns:
    ([R] nats, [R] int32).
  """
  edited = with_owned(*change, batch.owner)
  h = lm.hidden(spec, params, edited, batch.tokens, batch.columns)
  h = h.reshape(-1, spec.width)
  head = lambda part: decoder.label_logprob(spec, params, h[part[0]], part[1])
  if batch.index.shape[0] == 1:
    logprob, best = head((batch.index[0], batch.labels[0]))
  else:
    logprob, best = jax.lax.map(head, (batch.index, batch.labels))
  return logprob.reshape(-1), best.reshape(-1)


def _cut(
    rows: Sequence[Row], batch_size: int
) -> list[tuple[list[int], tuple[int, int], int]]:
  """Cuts the rows into batches, the widest first, at the least cost.

  A batch has the full number of rows for its width or a quarter of it, so that
  a few long rows do not widen a batch of short ones. It is as wide as its rows
  need, or as the batch before it, whose shape is at hand.

  Returns:
    (which rows, [B, T], scored columns a row) of every batch; B may be more
    than the rows are, and batches of one shape score as many columns.
  """
  order = sorted(range(len(rows)), key=lambda i: -rows[i].columns)
  most = round_up(max(1, min(batch_size, len(rows))), _ROWS)

  def counts(width: int) -> set[int]:
    full = max(1, min(most, most * _FULL_WIDTH // width))
    full = 1 << (full.bit_length() - 1)
    return {full, max(1, full // 4)}

  # Row reached -> last shape -> the cheapest way there: its cost in columns, and
  # its batches, the last one first.
  ways = {0: {(0, 0): (0, None)}}
  while (first := min(ways)) < len(order):
    own = round_up(rows[order[first]].columns, _LENGTHS)
    for last, (cost, path) in ways.pop(first).items():
      for width in {own, max(own, last[1])}:
        for shape in ((count, width) for count in counts(width)):
          total = cost + shape[0] * width + _BATCH_COST
          total += _SHAPE_COST * (shape != last)
          end = min(first + shape[0], len(order))
          known = ways.setdefault(end, {})
          if shape not in known or total < known[shape][0]:
            known[shape] = total, (path, order[first:end], shape)
  _, path = min(ways[len(order)].values(), key=lambda way: way[0])
  batches, scored = [], {}
  while path is not None:
    path, chosen, shape = path
    batches.append((chosen, shape))
    need = -(-sum(rows[i].scored for i in chosen) // shape[0])
    scored[shape] = max(scored.get(shape, 1), round_up(need, _SCORED))
  return [(*batch, scored[batch[1]]) for batch in reversed(batches)]


def _lay_out(
    rows: Sequence[Row],
    owner: Sequence[int],
    *,
    shape: tuple[int, int],
    scored: int,
) -> _Batch:
  """Writes rows into arrays of [B, T] = shape, with B `scored` labels."""
  tokens, position, segment = np.zeros((3, *shape), np.int32)
  index: list[int] = []
  labels: list[int] = []
  for r, row in enumerate(rows):
    length = len(row.prompt)
    tokens[r, :length] = row.prompt
    position[r, :length] = np.arange(length)
    segment[r, :length] = SHARED
    end = length
    for branch, answer in enumerate(row.answers, SHARED + 1):
      begin, end = end, end + len(answer) - 1
      tokens[r, begin:end] = answer[:-1]
      position[r, begin:end] = length + np.arange(end - begin)
      segment[r, begin:end] = branch
      own = range(r * shape[1] + begin, r * shape[1] + end)
      index += [r * shape[1] + length - 1, *own]
      labels += answer
  chunks = _chunks(shape[0], scored)
  spare = [0] * (chunks[0] * chunks[1] - len(index))
  return _Batch(
      tokens,
      TokenLayout(position, segment),
      np.asarray(index + spare, np.int32).reshape(chunks),
      np.asarray(labels + spare, np.int32).reshape(chunks),
      np.asarray([*owner, *[0] * (shape[0] - len(rows))], np.int32),
  )


def _chunks(count: int, scored: int) -> tuple[int, int]:
  """Divides count * scored columns for the head: (chunks, columns each)."""
  fits = [
      together
      for together in range(1, scored + 1)
      if scored % together == 0 and together * count <= _HEAD_ROWS
  ]
  together = max(fits, default=1)
  return scored // together, together * count


def _split(
    rows: Sequence[Row], labels: np.ndarray, out: tuple[Array, Array]
) -> Iterator[list[Scored]]:
  """Reads the results of a batch, answer by answer.

  Args:
    rows: the batch's rows.
    labels: [R] what was asked for.
    out: [R] log-probabilities and [R] most probable tokens.

  Yields:
    The scores of each row's answers.
  """
  logprob, best = map(np.asarray, out)
  correct = (best == labels) & np.isfinite(logprob)
  at = 0
  for row in rows:
    scores = []
    for answer in row.answers:
      part = slice(at, at + len(answer))
      nll = -float(np.mean(logprob[part], dtype=np.float64))
      names, right = best[part].tolist(), correct[part].tolist()
      scores.append(Scored(nll, tuple(names), tuple(right)))
      at = part.stop
    yield scores
