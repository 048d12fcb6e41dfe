"""What is traced, and what a trace gives back.

Axis letters: K scored tokens, n draws; the others as in `jaxedit.types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.models.spec import ModelSpec
from jaxedit.trace.restoration import Restoration


class Case(NamedTuple):
  """A prompt to trace.

  Attributes:
    ids: [T] int32.
    first: first corrupted token.
    end: one past the last corrupted token.
    noise: [n, end - first, D] what their embeddings get.
    labels: [K] int32 tokens that are scored, at the last K columns; none for
      what the clean model holds most probable after the last one.
  """

  ids: np.ndarray
  first: int
  end: int
  noise: np.ndarray
  labels: np.ndarray = np.zeros(0, np.int32)


class Traced(NamedTuple):
  """What a trace found.

  Attributes:
    labels: [K] int32 what was scored.
    high: score of the clean model.
    low: score with nothing restored, mean over draws.
    scores: name of a restoration -> [T, L] f64 mean over draws; NaN where it
      was not asked for.
  """

  labels: np.ndarray
  high: float
  low: float
  scores: dict[str, np.ndarray]


def check(
    spec: ModelSpec,
    cases: Sequence[Case],
    restorations: Sequence[Restoration],
    mode: str,
) -> None:
  """Refuses what cannot be traced.

  Args:
    spec: the architecture.
    cases: prompts with their noise.
    restorations: what to restore.
    mode: what the noise does.

  Raises:
    ValueError: the first fault.
  """
  if mode not in ('add', 'set'):
    raise ValueError(f"mode {mode!r}: one of 'add', 'set'")
  if len({one.name for one in restorations}) != len(restorations):
    raise ValueError('two restorations have one name')
  for one in restorations:
    if one.window < 1 or one.window > 1 and one.part == 'block':
      raise ValueError(f'{one}: a window has layers, and a block has one')
    if one.sever and one.part != 'block':
      raise ValueError(f'{one}: severing goes with a restored block')
  draws = {len(case.noise) for case in cases}
  if len(draws) > 1 or 0 in draws:
    raise ValueError('all cases need as many draws of noise, at least one')
  for number, case in enumerate(cases):
    for error in _faults(spec, case):
      raise ValueError(f'case {number}: {error}')


def _faults(spec: ModelSpec, case: Case) -> Iterator[str]:
  """What keeps a case from being traced."""
  length, count = len(case.ids), case.end - case.first
  if not 0 <= case.first < case.end <= length:
    yield f'corrupts tokens {case.first} to {case.end - 1} of {length}'
  if case.noise.shape[1:] != (count, spec.width):
    yield (
        f'noise [n, {case.noise.shape[1:]}], but {count} tokens of width'
        f' {spec.width} are corrupted'
    )
  if len(case.labels) > length:
    yield 'more labels than tokens'
  if spec.max_positions and length > spec.max_positions:
    yield f'{length} tokens, but the model takes {spec.max_positions}'
  if length and not 0 <= np.min(case.ids) <= np.max(case.ids) < spec.vocab:
    yield f'ids outside of the vocabulary of {spec.vocab}'
