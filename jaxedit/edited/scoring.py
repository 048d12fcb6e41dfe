"""Scores answers to prompts under teacher forcing, one pass for all of them.

  nll(x, a) = -1/|a| sum_j log p(a_j | x, a_<j)          nats a token

A sequence is a query: a prompt (the shared prefix) and its answers, each a
segment that attends to the prompt and itself (`types.TokenLayout`). The last
token of an answer is predicted and never read, so a segment has all tokens but
the last, and an answer of one token needs none:

  index      0 1 2 3 | 4 5 | 6             answers a = a0 a1 a2, b = b0 b1
  token      x x x x | a0 a1 | b0
  position   0 1 2 3 | 4 5 | 4
  scored           ^   ^ ^   ^             a0, b0 at 3; a1, a2 at 4, 5; b1 at 6

The head runs at scored tokens only. Prompt and answers are tokenised separately
and joined as ids, so tokens never merge across their border.

Queries are sorted by length and padded on the right to a few lengths, with one
of two batch sizes a length: a data set compiles a handful of shapes, and later
calls of the same kind none.

Axis letters as in `jaxedit.types`: B sequences, T tokens, O scored tokens of a
batch, E edits.

Source: the quantities are those of CounterFact (Meng et al. 2022, arXiv
2202.05262, section 3.4); their code runs every answer as a text of its own.

Not here: requests and metrics (see `eval`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit import deltas as deltas_lib
from jaxedit import sources
from jaxedit.batching import beginnings, packer
from jaxedit.batching.buckets import POWERS, octaves, round_up
from jaxedit.batching.packer import Segment
from jaxedit.deltas import SiteDelta
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.text.locate import Continued
from jaxedit.text.token_cache import token_cache
from jaxedit.types import (
    SHARED,
    Array,
    InputError,
    Params,
    Progress,
    TokenLayout,
    silent,
)

# Lengths of a batch, tokens, and scored tokens a query on average.
_LENGTHS = (8, 12, 16, 20, *octaves(2, 24))
_SCORED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, *octaves(1, 64))
# Longer batches have fewer queries: attention needs B T T numbers.
_FULL_WIDTH = 128
# Cost of a batch beside its tokens, in tokens: weights are read once more.
_BATCH_COST = 128
# Cost of a further shape, in tokens: it may have to be compiled.
_SHAPE_COST = 512
# Scored tokens whose logits exist at one time.
_HEAD_ROWS = 1024


class Query(NamedTuple):
  """A prompt and the answers to score, as ids; see `encode_queries`.

  Attributes:
    prompt: what all answers follow.
    answers: each with what it follows on its own.
    given: of each answer, how many first tokens are read and not scored; () for
      none.
  """

  prompt: tuple[int, ...]
  answers: tuple[tuple[int, ...], ...]
  given: tuple[int, ...] = ()

  @property
  def tokens(self) -> int:
    """Tokens of the sequence."""
    return len(self.prompt) + sum(len(a) - 1 for a in self.answers)

  @property
  def scored(self) -> int:
    """Labels of all answers."""
    return sum(map(len, self.answers)) - sum(self.given)

  @property
  def parts(self) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(answer, tokens of it that are not scored) of every answer."""
    return tuple(zip(self.answers, self.given or (0,) * len(self.answers)))


class Scored(NamedTuple):
  """The scores of one answer.

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
  """Queries as the arrays of one call; numpy."""

  tokens: np.ndarray  # [B, T]
  layout: TokenLayout  # [B, T]
  index: np.ndarray  # [parts, O / parts] into the B T tokens
  labels: np.ndarray  # same shape
  edit_ids: np.ndarray  # [B]


def encode_queries(
    tokenizer: Any, items: Sequence[tuple[Any, ...]]
) -> list[Query]:
  """Tokenises prompts and their answers.

  Args:
    tokenizer: a fast transformers tokenizer, or its `TokenCache`.
    items: (prompt, answers), and where the text does not say so itself whether
      a blank joins them, see `text.joining`; an answer is given without it.

  Returns:
    One query an item. An answer without tokens is empty there, which `error`
    and `check` refuse.

  Raises:
    InputError: the tokenizer gives no character offsets.
  """
  tokens = token_cache(tokenizer)
  prompts = tokens.prompts([prompt for prompt, *_ in items])
  answers = iter(
      tokens.targets(
          [
              Continued(prompt, answer, *space)
              for prompt, given, *space in items
              for answer in given
          ]
      )
  )
  ids = lambda row: tuple(row.tolist())
  return [
      Query(ids(prompt), tuple(ids(next(answers)) for _ in given))
      for prompt, (_, given, *_) in zip(prompts, items)
  ]


def branched(
    queries: Sequence[Query], *, least: int = beginnings.LEAST, most: int = 32
) -> list[tuple[Query, list[int]]]:
  """Joins queries whose prompts begin alike, so that the beginning is run once.

  Args:
    queries: N queries without `given` tokens.
    least: tokens that a common beginning must have.
    most: answers of a joined query.

  Returns:
    (query, which of the N it is made of, in the order of its answers); each of
    the N is in one of them.
  """
  order = sorted(range(len(queries)), key=lambda i: queries[i].prompt)
  groups: list[list[int]] = []
  for i in order:
    group = groups[-1] if groups else []
    answers = sum(len(queries[j].answers) for j in group)
    answers += len(queries[i].answers)
    fits = group and answers <= most
    if (
        fits
        and beginnings.common(queries[group[0]].prompt, queries[i].prompt)
        >= least
    ):
      group.append(i)
    else:
      groups.append([i])
  return [(_branches([queries[i] for i in some]), some) for some in groups]


def _branches(queries: Sequence[Query]) -> Query:
  """One query of several: their common beginning, and the rest of each."""
  if len(queries) == 1:
    return queries[0]
  # In order, so the first and the last differ soonest; a prompt keeps a token.
  shared = min(
      beginnings.common(queries[0].prompt, queries[-1].prompt),
      *(len(q.prompt) - 1 for q in queries),
  )
  rest = [(q.prompt[shared:], answer) for q in queries for answer in q.answers]
  return Query(
      queries[0].prompt[:shared],
      tuple(own + answer for own, answer in rest),
      tuple(len(own) for own, _ in rest),
  )


def error(
    spec: ModelSpec, row: Query, advice: str = 'shorten them'
) -> str | None:
  """Says why a query cannot be scored.

  Args:
    spec: the architecture.
    row: the query.
    advice: what to do about one that is too long.

  Returns:
    A message, or None for a good query.
  """
  if not row.prompt:
    return 'the prompt has no tokens; give it some text'
  if not all(row.answers):
    return 'an answer has no tokens; give it some text'
  tokens = len(row.prompt) + max(map(len, row.answers), default=0) - 1
  if tokens > spec.max_positions:
    return (
        f'prompt and answer take {tokens} positions but the model has'
        f' {spec.max_positions}; {advice}'
    )
  prompt = row.prompt
  if spec.encoder_layers:
    if problem := sources.error(prompt):
      return problem
    prompt = sources.plain(prompt)
  parts = {'it': prompt, 'its answer': sum(row.answers, ())}
  for name, ids in parts.items():
    if max(ids, default=0) >= spec.vocab:
      return (
          f'{name} has token {max(ids)} but the model knows {spec.vocab}'
          " tokens; use the model's own tokenizer"
      )
  return None


def check(
    spec: ModelSpec,
    queries: Sequence[Query],
    *,
    more: Sequence[str] = (),
    advice: str = 'shorten them',
) -> None:
  """Refuses queries that cannot be scored.

  Args:
    spec: the architecture.
    queries: prompts with answers.
    more: further problems that the caller has found.
    advice: see `error`.

  Raises:
    InputError: with a message a query.
  """
  errors = [(i, error(spec, query, advice)) for i, query in enumerate(queries)]
  problems = [f'query {i}: {text}.' for i, text in errors if text]
  if more or problems:
    raise InputError(*more, *problems)


def score(
    spec: ModelSpec,
    params: Params,
    deltas: Sequence[SiteDelta],
    queries: Sequence[Query],
    *,
    edit_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[list[Scored]]:
  """Scores every answer of every query.

  Args:
    spec: the architecture.
    params: canonical parameters.
    deltas: of one edit, or of E edits side by side; those of biases and scales
      must be merged already.
    queries: prompts with answers that `check` accepts.
    edit_ids: with edits side by side, which one each query is under.
    batch_size: queries a batch, rounded up to a power of two; batches wider
      than 128 tokens have proportionally fewer.
    progress: progress display.

  Returns:
    For each query the scores of its answers, in order.
  """
  results: list[list[Scored]] = [[] for _ in queries]
  ids_of = [0] * len(queries) if edit_ids is None else list(edit_ids)

  def read(chosen: list[int], labels: np.ndarray, out: Any) -> int:
    taken = _split([queries[i] for i in chosen], labels.reshape(-1), out)
    for i, scores in zip(chosen, taken):
      results[i] = scores
    return len(chosen)

  with progress('score', len(queries), 'prompt') as advance:
    waiting = None
    for chosen, shape, scored in _cut(queries, batch_size):
      batch = _lay_out(
          [queries[i] for i in chosen],
          [ids_of[i] for i in chosen],
          shape=shape,
          scored=scored,
      )
      # This batch is computed while the results of the last one are read.
      out = _score(
          spec, params, tuple(deltas), batch, per_edit=edit_ids is not None
      )
      if waiting is not None:
        advance(read(*waiting))
      waiting = chosen, batch.labels, out
    if waiting is not None:
      advance(read(*waiting))
  return results


def lower(
    spec: ModelSpec,
    params: Params,
    queries: Sequence[Query],
    *,
    batch_size: int,
) -> tuple[list[tuple[int, int]], jax.stages.Lowered]:
  """Lowers the program of the largest batch that `score` would run.

  Args:
    spec: the architecture.
    params: canonical parameters, or their shapes.
    queries: as for `score`, at least one.
    batch_size: as for `score`.

  Returns:
    ((tokens, scored tokens) of every batch, padding included; the program).
  """
  batches = _cut(queries, batch_size)
  sizes = [(b * t, b * scored) for _, (b, t), scored in batches]
  chosen, shape, scored = batches[sizes.index(max(sizes))]
  batch = _lay_out(
      [queries[i] for i in chosen],
      [0] * len(chosen),
      shape=shape,
      scored=scored,
  )
  return sizes, _score.lower(spec, params, (), batch, per_edit=False)


@functools.partial(jax.jit, static_argnames=('spec', 'per_edit'))
def _score(
    spec: ModelSpec,
    params: Params,
    deltas: tuple[SiteDelta, ...],
    batch: _Batch,
    *,
    per_edit: bool,
) -> tuple[Array, Array]:
  """Log-probabilities [O] of the labels, nats, and [O] most probable ids."""
  active = deltas_lib.active(deltas, batch.edit_ids if per_edit else None)
  h = decoder.embed(spec, params, batch.tokens, batch.layout)
  h, _ = decoder.run_layers(
      spec, params, h, batch.layout, start=0, stop=spec.layers, deltas=active
  )
  h = h.reshape(-1, spec.width)
  head = lambda part: decoder.label_logprob(spec, params, h[part[0]], part[1])
  if batch.index.shape[0] == 1:
    logprob, best = head((batch.index[0], batch.labels[0]))
  else:
    logprob, best = jax.lax.map(head, (batch.index, batch.labels))
  return logprob.reshape(-1), best.reshape(-1)


def _cut(
    queries: Sequence[Query], batch_size: int
) -> list[tuple[list[int], tuple[int, int], int]]:
  """Divides the queries into batches, the longest first, at the least cost.

  A batch has the full number of queries for its length or a quarter of it, so
  that a few long queries do not lengthen a batch of short ones. It is as long
  as its queries need, or as the batch before it, whose program is compiled
  already.

  Returns:
    (which queries, (B, T), scored tokens a query) of every batch; B may be
    larger than their number, and batches of one shape have equally many scored
    tokens.
  """
  order = sorted(range(len(queries)), key=lambda i: -queries[i].tokens)
  most = round_up(max(1, min(batch_size, len(queries))), POWERS)

  def counts(width: int) -> set[int]:
    full = max(1, min(most, most * _FULL_WIDTH // width))
    full = 1 << (full.bit_length() - 1)
    return {full, max(1, full // 4)}

  # Query reached -> last shape -> the cheapest way there: its cost in tokens,
  # and its batches, the last one first.
  ways = {0: {(0, 0): (0, None)}}
  while (first := min(ways)) < len(order):
    own = round_up(queries[order[first]].tokens, _LENGTHS)
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
    need = -(-sum(queries[i].scored for i in chosen) // shape[0])
    scored[shape] = max(scored.get(shape, 1), round_up(need, _SCORED))
  return [(*batch, scored[batch[1]]) for batch in reversed(batches)]


def _lay_out(
    queries: Sequence[Query],
    edit_ids: Sequence[int],
    *,
    shape: tuple[int, int],
    scored: int,
) -> _Batch:
  """Writes queries into arrays of shape (B, T), with B * `scored` labels."""
  rows: list[list[Segment]] = []
  index: list[int] = []
  labels: list[int] = []
  for r, query in enumerate(queries):
    length = len(query.prompt)
    rows.append([Segment(query.prompt)])
    end = r * shape[1] + length
    last = end - 1
    for branch, (answer, given) in enumerate(query.parts, SHARED + 1):
      rows[-1].append(Segment(answer[:-1], length, branch))
      begin, end = end, end + len(answer) - 1
      index += [last, *range(begin, end)][given:]
      labels += answer[given:]
  tokens, layout = packer.pad_segments(rows, shape)
  chunks = _chunks(shape[0], scored)
  spare = [0] * (chunks[0] * chunks[1] - len(index))
  return _Batch(
      tokens,
      layout,
      np.asarray(index + spare, np.int32).reshape(chunks),
      np.asarray(labels + spare, np.int32).reshape(chunks),
      np.asarray([*edit_ids, *[0] * (shape[0] - len(queries))], np.int32),
  )


def _chunks(count: int, scored: int) -> tuple[int, int]:
  """Divides count * scored tokens for the head: (parts, tokens each)."""
  fits = [
      together
      for together in range(1, scored + 1)
      if scored % together == 0 and together * count <= _HEAD_ROWS
  ]
  together = max(fits, default=1)
  return scored // together, together * count


def _split(
    queries: Sequence[Query], labels: np.ndarray, out: tuple[Array, Array]
) -> Iterator[list[Scored]]:
  """Reads the results of a batch, answer by answer.

  Args:
    queries: the batch's queries.
    labels: [O] the tokens of the answers.
    out: [O] log-probabilities and [O] most probable tokens.

  Yields:
    The scores of each query's answers.
  """
  logprob, best = map(fetch, out)
  correct = (best == labels) & np.isfinite(logprob)
  at = 0
  for query in queries:
    scores = []
    for answer, given in query.parts:
      part = slice(at, at + len(answer) - given)
      nll = -float(np.mean(logprob[part], dtype=np.float64))
      names, right = best[part].tolist(), correct[part].tolist()
      scores.append(Scored(nll, tuple(names), tuple(right)))
      at = part.stop
    yield scores
