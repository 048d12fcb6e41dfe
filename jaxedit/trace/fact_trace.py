"""Traces facts, and resumes where a run was interrupted."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit.models import loading
from jaxedit.trace import causal, facts, noise, results
from jaxedit.trace.causal import Case, Traced
from jaxedit.trace.facts import EncodedFact, TraceConfig
from jaxedit.types import Progress, silent

_GRID = 'scores/'  # before the name, among the arrays of a result


def trace_facts(
    config: TraceConfig,
    model: loading.Model,
    tokenizer: Any,
    picked: Sequence[EncodedFact],
    level: noise.Noise,
    *,
    pieces: Any,
    timer: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> results.FactTraces:
  """Traces facts; severed parts always at the last subject token alone.

  Args:
    config: what to restore.
    model: the model.
    tokenizer: its tokenizer.
    picked: facts with the model's answers, which are scored.
    level: of the noise.
    pieces: keeps the traces of each fact, so that an interrupted run can resume,
      such as `runs.cache.ArrayFiles`.
    timer: tells seconds.
    progress: told of cells.

  Returns:
    What was found, and the seconds that all of it took, whenever that was.

  Raises:
    InputError: no fact has finite numbers.
  """
  cases = _cases(config, picked, level, model.spec.width)
  parts, seconds = [], 0.0
  for alone in (False, True):
    restorations = [x for x in config.restorations if config.alone(x) == alone]
    if not restorations:
      continue
    run = functools.partial(
        causal.trace, model.spec, model.params,
        placement=model.placement, restorations=restorations,
        mode=facts.MODES[config.noise_mode], progress=progress,
    )  # fmt: skip
    tokens = [(case.end - 1,) for case in cases] if alone else None
    names = [one.name for one in restorations]
    found, spent = resumed(run, names, cases, tokens, pieces, timer)
    parts.append(found)
    seconds += spent
  scores = lambda same: {k: x for one in same for k, x in one.scores.items()}
  traced = [same[0]._replace(scores=scores(same)) for same in zip(*parts)]
  found, missed = collect(tokenizer, picked, traced)
  return results.FactTraces(
      config, tuple(found), tuple(missed), cases, traced, seconds
  )


class _Unsaved:
  """Keeps no pieces: every run begins anew."""

  def load(self, *parts: Any) -> None:
    del parts

  def save(self, arrays: Mapping[str, np.ndarray], *parts: Any) -> None:
    del arrays, parts


UNSAVED = _Unsaved()


def resumed(
    run: Callable[..., list[Traced]],
    names: Sequence[str],
    cases: Sequence[Case],
    tokens: Sequence[Sequence[int]] | None,
    pieces: Any,
    timer: Callable[[], float] = time.monotonic,
) -> tuple[list[Traced], float]:
  """Traces what was not saved before, and saves it.

  Args:
    run: `causal.trace` but for the cases, their tokens and `found`.
    names: of the restorations.
    cases: to trace.
    tokens: columns of each case; None for all.
    pieces: see `trace_facts`.
    timer: tells seconds.

  Returns:
    (what was traced, seconds of all runs).
  """

  def about(i: int) -> tuple[Any, ...]:
    ids, first, end, drawn, labels = cases[i]
    columns = list(tokens[i]) if tokens else None
    return names, ids, [first, end], drawn, labels, columns

  def keep(i: int, result: Traced) -> None:
    nonlocal last
    now = timer()
    pieces.save(_packed(result, now - last), *about(missing[i]))
    spent.append(now - last)
    last = now

  saved = [pieces.load(*about(i)) for i in range(len(cases))]
  spent = [float(arrays['seconds'][0]) for arrays in saved if arrays]
  missing = [i for i, arrays in enumerate(saved) if arrays is None]
  last = timer()
  fresh = run(
      [cases[i] for i in missing],
      tokens=tokens and [tokens[i] for i in missing],
      found=keep,
  )
  waiting = iter(fresh)
  found = [next(waiting) if x is None else _unpacked(x) for x in saved]
  return found, sum(spent)


def about(config: TraceConfig, model: loading.Model) -> dict[str, Any]:
  """What the results of all facts depend on, as plain JSON types."""
  dtype = model.params['embed']['embedding'].dtype
  return {
      'model': model.hash,
      'dtype': str(dtype),
      'kinds': [list(one) for one in config.restorations],
      'mode': config.noise_mode,
  }


def _packed(result: Traced, seconds: float) -> dict[str, np.ndarray]:
  """A result as named arrays, and the seconds that it took."""
  return {
      'seconds': np.array([seconds]),
      'labels': result.labels,
      'effect': np.array([result.high, result.low]),
      **{f'{_GRID}{name}': grid for name, grid in result.scores.items()},
  }


def _unpacked(arrays: Mapping[str, np.ndarray]) -> Traced:
  """What was packed."""
  high, low = map(float, arrays['effect'])
  grids = {
      name.removeprefix(_GRID): grid
      for name, grid in arrays.items()
      if name.startswith(_GRID)
  }
  return Traced(arrays['labels'], high, low, grids)


def _cases(
    config: TraceConfig,
    picked: Sequence[EncodedFact],
    level: noise.Noise,
    width: int,
) -> list[Case]:
  """Facts with their noise [draws, tokens, width]; answers are scored."""

  @functools.cache  # facts with subjects of one length share their noise
  def drawn(tokens: int) -> np.ndarray:
    return noise.draw(level, (config.draws, tokens, width), config.seed)

  return [
      Case(
          one.ids,
          *one.span,
          noise=drawn(one.span[1] - one.span[0]),
          labels=np.array([one.answer], np.int32),
      )
      for one in picked
  ]


def collect(
    tokenizer: Any, picked: Sequence[EncodedFact], traced: Sequence[Traced]
) -> tuple[list[results.TracedFact], list[dict[str, Any]]]:
  """(traced facts, those left out as their numbers are not finite)."""
  found, missed = [], []
  for one, result in zip(picked, traced, strict=True):
    if not results.finite(result):
      missed.append(facts.left_out(one.fact, facts.NOT_FINITE))
      continue
    *tokens, said = (tokenizer.decode([x]) for x in (*one.ids, one.answer))
    found.append(
        results.TracedFact(
            **vars(one), tokens=tuple(tokens), said=said, result=result
        )
    )
  if not found:
    raise facts.none_left(len(picked), missed)
  return found, missed
