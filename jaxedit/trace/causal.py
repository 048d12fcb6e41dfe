"""Causal tracing of many facts at once.

A clean run keeps every activation; in n corrupted runs the embeddings of some
tokens are noise. Restoring one activation (t, l) of the clean run in a corrupted
one gives back part of the answer's probability, the indirect effect:

  high = p(answer | clean)    low = mean over draws of p(answer | corrupted)
  score(t, l) = the same, with the activation restored    IE = score - low

Every grid cell is a partial run of the model (see `partial_run`); cells, draws
and facts run in one batch. Cells that nothing can change are filled in without
a run: tokens before the corrupted ones score `low`.

Several tokens can be scored at once, for answers of more than one. The score of
a draw is then their geometric mean, exp(mean log p), which is the probability
itself for one token.

Axis letters: K scored tokens, n draws; the others as in `jaxedit.types`.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1 and appendix B.
Their code computes the corrupted score of replaced embeddings by addition; here
all corrupted runs are the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import Placement, fetch
from jaxedit.trace import partial_run
from jaxedit.trace.cases import Case, Traced, check
from jaxedit.trace.grids import Grids
from jaxedit.trace.groups import groups, padded
from jaxedit.trace.restoration import Restoration
from jaxedit.types import Params, Progress, silent

# Tokens that a device runs at a time; and memory for the tables of a group, whose
# results are told together: on a slow device groups are smaller.
_TOKENS = {'cpu': 1024}
_ACCELERATOR_TOKENS = 8192
_TABLE_BYTES = {'cpu': 2**29}
_ACCELERATOR_TABLE_BYTES = 2 * 2**30


class Prediction(NamedTuple):
  """What a model holds most probable next.

  Attributes:
    token: [E] int32.
    probability: [E].
  """

  token: np.ndarray
  probability: np.ndarray


def predict(
    spec: ModelSpec,
    params: Params,
    rows: Sequence[np.ndarray],
    *,
    batch_rows: int = 64,
) -> Prediction:
  """Finds the most probable next token of prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    rows: [T] ids a prompt.
    batch_rows: prompts run at once.

  Returns:
    The predictions.
  """
  token = np.zeros(len(rows), np.int32)
  probability = np.zeros(len(rows))
  lengths = np.array([len(row) for row in rows])
  for group in groups(lengths, batch_rows):
    ids, valid = padded(
        [rows[i] for i in group.indices], group.size, group.width
    )
    best, logprob = _next(spec, params, ids, valid)
    index = list(group.indices)
    token[index] = fetch(best)[: len(index)]
    probability[index] = np.exp(fetch(logprob)[: len(index)])
  return Prediction(token, probability)


@functools.partial(jax.jit, static_argnames=('spec',))
def _next(
    spec: ModelSpec, params: Params, ids: Any, valid: Any
) -> tuple[Any, Any]:
  """([G] most probable next token, [G] its log-probability)."""
  layout = decoder.token_layout(valid)
  h = decoder.embed(spec, params, ids, layout)
  h, _ = decoder.run_layers(spec, params, h, layout, start=0, stop=spec.layers)
  last = jnp.sum(valid, axis=1) - 1
  h = jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]
  _, best = decoder.label_logprob(spec, params, h, jnp.zeros_like(last))
  return best, decoder.label_logprob(spec, params, h, best)[0]


def trace(
    spec: ModelSpec,
    params: Params,
    cases: Sequence[Case],
    *,
    placement: Placement,
    restorations: Sequence[Restoration],
    mode: str = 'add',
    tokens: Sequence[Sequence[int]] | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
    found: Callable[[int, Traced], None] = lambda index, result: None,
) -> list[Traced]:
  """Traces prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    cases: prompts with their noise, all of as many draws.
    placement: of the model; it decides how much is run at a time.
    restorations: what to restore.
    mode: 'add' noise to embeddings, or 'set' them to it.
    tokens: the columns to restore in every case, none right of the first
      scored one; None for all of these.
    token_budget: columns run at a time; chosen for the device unless given.
    progress: told of cells.
    found: told of every result as soon as there is one: (index of its case,
      result).

  Returns:
    One result a case.

  Raises:
    ValueError: cases that cannot be traced.
  """
  restorations = tuple(restorations)
  check(spec, cases, restorations, mode)
  if not cases:
    return []
  cases = _labelled(spec, params, cases)
  wanted = _wanted(cases, tokens)
  most, tables = budgets(placement.platform)
  token_budget = token_budget or most
  lengths = np.array([len(case.ids) for case in cases])
  draws = len(cases[0].noise)
  one = table_bytes(spec, params, max(lengths), draws, restorations)
  size = max(1, tables // one)
  results = [Traced(case.labels, np.nan, np.nan, {}) for case in cases]
  total = len(restorations) * spec.layers * sum(map(len, wanted))
  with progress('trace', total, 'cell') as done:
    # Sorted by width already.
    for _, same in itertools.groupby(groups(lengths, size), lambda g: g.width):
      grids = Grids(
          spec, params, cases, wanted, restorations, mode, token_budget
      )
      for index, result in grids.run(list(same), done):
        results[index] = result
        found(index, result)
  return results


def _labelled(
    spec: ModelSpec, params: Params, cases: Sequence[Case]
) -> list[Case]:
  """Gives cases without labels the clean model's answer."""
  plain = [i for i, case in enumerate(cases) if not len(case.labels)]
  found = predict(spec, params, [cases[i].ids for i in plain]).token
  cases = list(cases)
  for i, token in zip(plain, found):
    cases[i] = cases[i]._replace(labels=np.array([token], np.int32))
  return cases


def _wanted(
    cases: Sequence[Case], tokens: Sequence[Sequence[int]] | None
) -> list[list[int]]:
  """The columns to restore in every case."""
  if tokens is None:
    return [list(range(len(case.ids) - len(case.labels) + 1)) for case in cases]
  if len(tokens) != len(cases):
    raise ValueError(f'columns for {len(tokens)} of {len(cases)} cases')
  wanted = [sorted(set(columns)) for columns in tokens]
  for number, (case, columns) in enumerate(zip(cases, wanted)):
    last = len(case.ids) - len(case.labels)
    if columns and not 0 <= columns[0] <= columns[-1] <= last:
      raise ValueError(
          f'case {number}: columns {columns}; those from 0 to {last} can be'
          ' restored, the first scored one'
      )
  return wanted


def budgets(platform: str) -> tuple[int, int]:
  """(columns run at a time, bytes for the tables of a group) of a platform."""
  return (
      _TOKENS.get(platform, _ACCELERATOR_TOKENS),
      _TABLE_BYTES.get(platform, _ACCELERATOR_TABLE_BYTES),
  )


def table_bytes(
    spec: ModelSpec,
    params: Params,
    longest: int,
    draws: int,
    restorations: Sequence[Restoration],
) -> int:
  """Memory that the tables of one case take, at most.

  Args:
    spec: the architecture.
    params: canonical parameters, or their shapes.
    longest: tokens of the longest case.
    draws: corrupted copies of a prompt.
    restorations: what to restore.
  """
  store = params['layers']['attn']['k']['kernel'].dtype.itemsize
  tables = len(partial_run.parts_of(restorations))
  tables += any(one.part == 'attn' for one in restorations)
  column = 4 * spec.width * tables
  column += 2 * store * spec.kv_heads * spec.head_size
  return draws * longest * spec.layers * column
