"""Texts to be learned, as packed sequences of static shapes.

Axes as in `jaxedit.types`; `groups` independent edits or joint batches,
`minibatches` of a group; labels: tokens scored at one output.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxedit.batching import packer
from jaxedit.batching.buckets import round_up
from jaxedit.types import Array, OutputTokens, PackedSequences


class Example(NamedTuple):
  """One text and what it shall say.

  Attributes:
    ids: [T] int32.
    first: the column of the first output; the others follow.
    labels: [O, labels] int32.
  """

  ids: np.ndarray
  first: int
  labels: np.ndarray


class Answers(NamedTuple):
  """Texts without their sources, N' tokens.

  Attributes:
    tokens: these tokens of the B texts.
    outputs: where labels are scored, among them.
  """

  tokens: OutputTokens
  outputs: OutputTokens


class Examples(NamedTuple):
  """Examples end to end.

  Attributes:
    tokens: [1, N] int32.
    rows: the B texts on N packed tokens.
    outputs: where labels are scored.
    labels: [O, labels] int32.
    weights: [O, labels]; those of a text sum to 1.
    share: [B] weight of a text in the loss.
    salt: [N] uint32, for `loop.Noise`.
    answers: the texts without their sources; None where they have none, or a
      group has several minibatches.
  """

  tokens: Array
  rows: PackedSequences
  outputs: OutputTokens
  labels: Array
  weights: Array
  share: Array
  salt: Array
  answers: Answers | None = None


class Shape(NamedTuple):
  """Static shapes of a slab of groups."""

  groups: int
  minibatches: int
  texts: int
  length: int
  tokens: int
  output_length: int
  outputs: int
  labels: int
  answer_length: int = 0
  answer_tokens: int = 0


def shape_of(
    groups: Sequence[Sequence[Sequence[Example]]], count: int
) -> Shape:
  """Chooses static shapes.

  Args:
    groups: the minibatches of every group.
    count: groups side by side.

  Returns:
    A shape that holds them, rounded up so that others share compiled code.
  """
  minibatches = [some for group in groups for some in group]
  every = [example for some in minibatches for example in some]
  most = lambda f, some: max(map(f, some), default=1)
  up = lambda least, n: round_up(max(least, n))
  run, scored = (lambda one: len(one.ids)), (lambda one: len(one.labels))
  total = lambda f: most(lambda some: sum(map(f, some)), minibatches)
  texts, longest = most(len, minibatches), most(scored, every)
  # Fewer are not worth compiled code of their own.
  length = up(16, most(run, every))
  output_length = 1 if longest == 1 else up(4, longest)
  tokens, outputs = length, output_length
  if texts > 1:
    texts = up(4, texts)
    tokens = max(length, up(64, total(run)))
    outputs = texts if longest == 1 else up(32, total(scored))
  outputs += outputs == tokens  # `loop.Noise` tells them apart
  labels = most(lambda one: one.labels.shape[1], every)
  answer_length = answer_tokens = 0
  # Kept for all minibatches at once, keys and values would be many.
  alone = most(len, groups) == 1
  if alone and any((one.ids < 0).any() for one in every):
    own = lambda one: int((one.ids >= 0).sum())
    answer_length = answer_tokens = up(4, most(own, every))
    if texts > 1:
      answer_tokens = max(answer_length, up(32, total(own)))
    answer_tokens += answer_tokens == outputs
  return Shape(
      groups=count,
      minibatches=most(len, groups),
      texts=texts,
      length=length,
      tokens=tokens,
      output_length=output_length,
      outputs=outputs,
      labels=1 if labels == 1 else up(8, labels),
      answer_length=answer_length,
      answer_tokens=answer_tokens,
  )


def pack(
    examples: Sequence[Example],
    shape: Shape,
    by_token: bool,
    *,
    sources: bool = False,
) -> Examples:
  """Packs the examples of one minibatch.

  Args:
    examples: at most `shape.texts`.
    shape: large enough.
    by_token: whether every target token counts the same, or every text.
    sources: whether texts have a source (`jaxedit.sources`).

  Returns:
    Numpy arrays.
  """
  none = [0] * (shape.texts - len(examples))
  each = lambda f: np.array([*map(f, examples), *none], np.int32)
  rows = packer.end_to_end(
      each(lambda _: 0),
      each(lambda one: len(one.ids)),
      width=shape.length,
      token_budget=shape.tokens,
  )
  tokens = np.zeros([1, shape.tokens], np.int32)
  salt = np.zeros([shape.tokens], np.uint32)
  labels = np.zeros([shape.outputs, shape.labels], np.int32)
  weights = np.zeros(labels.shape, np.float64)
  at = out = 0
  for one in examples:
    here, (count, several) = slice(at, at + len(one.ids)), one.labels.shape
    tokens[0, here], salt[here] = one.ids, _salt(one.ids)
    labels[out : out + count, :several] = one.labels
    weights[out : out + count, :several] = 1 / one.labels.size
    at, out = here.stop, out + count
  first, scored = each(lambda one: one.first), each(lambda one: len(one.labels))
  scoring = functools.partial(
      packer.select, width=shape.output_length, budget=shape.outputs
  )
  answers = None
  rows = packer.with_sources(rows, tokens, always=sources)
  if shape.answer_tokens:
    read = each(lambda one: (one.ids < 0).sum())
    own = packer.select(
        rows, read, each(lambda one: len(one.ids)) - read,
        width=shape.answer_length, budget=shape.answer_tokens,
    )  # fmt: skip
    layout = own.rows.layout.replace(source=None)
    own = own.replace(rows=own.rows.replace(layout=layout))
    answers = Answers(own, scoring(own.rows, first - read, scored))
  outputs = scoring(rows, first, scored)
  share = each(lambda one: one.labels.size if by_token else 1)
  share = share / max(share.sum(), 1)
  return Examples(tokens, rows, outputs, labels, weights, share, salt, answers)


def _salt(ids: np.ndarray) -> np.ndarray:
  """[T] uint32 numbers that depend on a text and a column alone."""
  start = zlib.crc32(np.asarray(ids, np.int32).tobytes())
  return (start + 2654435761 * np.arange(len(ids))).astype(np.uint32)


def pack_groups(
    groups: Sequence[Sequence[Sequence[Example]]], shape: Shape, by_token: bool
) -> Examples:
  """Packs the minibatches of groups: arrays [groups, minibatches, ...]."""
  nothing = lambda n: [()] * n
  every = (one for group in groups for some in group for one in some)
  sources = any((one.ids < 0).any() for one in every)
  packed = [
      [
          pack(some, shape, by_token, sources=sources)
          for some in (*group, *nothing(shape.minibatches - len(group)))
      ]
      for group in (*groups, *nothing(shape.groups - len(groups)))
  ]
  stack = lambda *x: np.stack(x)
  return jax.tree.map(stack, *(jax.tree.map(stack, *some) for some in packed))
