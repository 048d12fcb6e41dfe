"""The stages of a causal trace, as functions that read no flag.

  encode -> choose (facts that the model completes) -> trace

A fact counts as completed where the model's most probable next token, decoded
and without white space, is the attribute, or is the first token of it. What is
scored is that token in any case.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import trace_plots, trace_results
from experiments.kept import Kept
from jaxedit.eval import known_facts
from jaxedit.models import loading
from jaxedit.text import locate
from jaxedit.trace import causal, noise
from jaxedit.trace.kinds import WINDOW, Kind
from jaxedit.types import InputError, Progress, silent

MODES = {'add': 'add', 'replace': 'set'}
_NOT_FINITE = 'has probabilities that are not finite'
_BATCH = 64  # prompts that are completed at a time, at least
_GRID = 'scores/'  # before the kind, among the arrays of a result


@dataclasses.dataclass(frozen=True)
class Config:
  """What to trace.

  Attributes:
    kinds: what to restore.
    window: layers restored at once by 'mlp' and 'attn'.
    level: noise level, as `noise.parse` takes it.
    mode: 'add' noise to the embeddings, or 'replace' them.
    draws: of noise a fact.
    seed: of the noise.
    num_facts: facts to trace; all unless given.
    keep_wrong: trace facts that the model does not complete, too.
    last_only: restore the last subject token alone.
    fact_plots: facts with heat maps of their own.
    formats: of plots; none to draw nothing.
  """

  kinds: tuple[Kind, ...]
  window: int = WINDOW
  level: str = noise.DEFAULT
  mode: str = 'add'
  draws: int = 10
  seed: int = noise.SEED
  num_facts: int | None = None
  keep_wrong: bool = False
  last_only: bool = False
  fact_plots: int = 30
  formats: tuple[str, ...] = trace_plots.FORMATS


@dataclasses.dataclass(frozen=True)
class Asked:
  """A fact as ids.

  Attributes:
    fact: the fact.
    ids: [T] int32 its prompt.
    span: first token of the subject and one past its last.
    answer: token that the model holds most probable next; -1 before it is run.
    completes: see `trace_results.Found`.
  """

  fact: known_facts.Fact
  ids: np.ndarray
  span: tuple[int, int]
  answer: int = -1
  completes: str = 'unasked'


def encode(words: Any, facts: Sequence[known_facts.Fact]) -> list[Asked]:
  """Turns facts into ids; each has been checked.

  Args:
    words: the model's tokenizer.
    facts: the facts.

  Returns:
    The same, not run yet.
  """
  places = locate.locate_subjects(words, [fact.parts for fact in facts])
  return [
      Asked(fact, ids, (span[0], span[1] + 1))
      for fact, (ids, span) in zip(facts, places, strict=True)
  ]


def noise_level(
    config: Config, model: loading.Model, asked: Sequence[Asked]
) -> noise.Noise:
  """Resolves the noise level by the subjects of all facts, traced or not."""
  std = None
  if noise.parse(config.level).relative:
    ids = np.concatenate([one.ids[slice(*one.span)] for one in asked])
    std = noise.embedding_std(model.params, ids)
  return noise.level(config.level, std)


def checker(
    words: Any, longest: int
) -> Callable[[known_facts.Fact], list[str]]:
  """Finds facts that cannot be traced as ids."""

  def check(fact: known_facts.Fact) -> list[str]:
    ((ids, span),) = locate.locate_subjects(words, [fact.parts])
    if span is None:
      return [locate.no_subject(fact.subject)]
    if len(ids) > longest:
      return [
          f'the prompt has {len(ids)} tokens, and the model takes {longest};'
          ' shorten it.'
      ]
    return []

  return check


def choose(
    config: Config,
    model: loading.Model,
    words: Any,
    asked: Sequence[Asked],
    *,
    progress: Progress = silent,
) -> tuple[list[Asked], list[dict[str, Any]]]:
  """Picks the facts to trace, in order.

  Args:
    config: how many, and which.
    model: the model.
    words: its tokenizer.
    asked: the facts.
    progress: told of facts.

  Returns:
    (the facts with the model's answers, those left out and why).

  Raises:
    InputError: none is left.
  """
  wanted = min(config.num_facts or len(asked), len(asked))
  size = max(_BATCH, 2 * wanted)
  picked, missed = [], []
  with progress('complete', len(asked), 'fact') as done:
    for begin in range(0, len(asked), size):
      part = asked[begin : begin + size]
      found = causal.predict(
          model.spec, model.params, [one.ids for one in part]
      )
      for one, token, p in zip(part, found.token, found.probability):
        if len(picked) == wanted:
          break
        one = _judged(words, one, int(token))
        reason = _reason(words, one, p, config.keep_wrong)
        if reason:
          missed.append(_left_out(one.fact, reason))
        else:
          picked.append(one)
      done(len(part))
      if len(picked) == wanted:
        break
  if not picked:
    raise InputError(_none(len(asked), missed))
  return picked, missed


def _none(count: int, missed: Sequence[dict[str, Any]]) -> str:
  first = missed[0]
  wrong = any(one['reason'] != _NOT_FINITE for one in missed)
  act = 'give facts that the model knows, or pass --keep_wrong'
  return (
      f'none of the {count} facts can be traced; the first (record'
      f' {first["number"]}) {first["reason"]};'
      f' {act if wrong else "check the model"}'
  )


def _left_out(fact: known_facts.Fact, reason: str) -> dict[str, Any]:
  return {'number': fact.number, 'id': fact.id, 'reason': reason}


def _judged(words: Any, one: Asked, token: int) -> Asked:
  """Compares the model's answer with the attribute."""
  attribute, completes = one.fact.attribute, 'unasked'
  if attribute:
    first = locate.encode_targets(words, [attribute])[0][:1]
    completes = 'begins' if token in first else 'misses'
    if words.decode([token]).strip() == attribute:
      completes = 'whole'
  return dataclasses.replace(one, answer=token, completes=completes)


def _reason(words: Any, one: Asked, p: float, keep_wrong: bool) -> str:
  """Why a fact is not traced, or nothing."""
  if not np.isfinite(p):
    return _NOT_FINITE
  if one.completes == 'misses' and not keep_wrong:
    answer = words.decode([one.answer]).strip()
    return f'is completed with {answer!r}, not {one.fact.attribute!r}'
  return ''


def alone(config: Config, kind: Kind) -> bool:
  """Whether a kind is restored at the last subject token alone."""
  return config.last_only or kind.sever is not None


def trace(
    config: Config,
    model: loading.Model,
    picked: Sequence[Asked],
    level: noise.Noise,
    *,
    pieces: Kept,
    timer: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> tuple[list[causal.Traced], float]:
  """Traces facts; severed kinds always at the last subject token alone.

  Args:
    config: what to restore.
    model: the model.
    picked: facts with the model's answers, which are scored.
    level: of the noise.
    pieces: results of an earlier run that was stopped, and a place for these.
    timer: tells seconds.
    progress: told of cells.

  Returns:
    (one result a fact, seconds that all of them took, whenever that was).
  """
  all_cases = cases(config, picked, level, model.spec.width)
  parts, seconds = [], 0.0
  for restricted in (False, True):
    kinds = [k for k in config.kinds if alone(config, k) == restricted]
    if kinds:
      run = functools.partial(
          causal.trace,
          model.spec,
          model.params,
          kinds=kinds,
          mode=MODES[config.mode],
          progress=progress,
      )
      tokens = None
      if restricted:
        tokens = [(case.end - 1,) for case in all_cases]
      found, spent = _trace(run, kinds, all_cases, tokens, pieces, timer)
      parts.append(found)
      seconds += spent
  return [
      same[0]._replace(
          scores={k: grid for one in same for k, grid in one.scores.items()}
      )
      for same in zip(*parts)
  ], seconds


def _trace(
    run: Callable[..., list[causal.Traced]],
    kinds: Sequence[Kind],
    all_cases: Sequence[causal.Case],
    tokens: Sequence[Sequence[int]] | None,
    pieces: Kept,
    timer: Callable[[], float],
) -> tuple[list[causal.Traced], float]:
  """Traces what is not at hand, and keeps it; see `trace`."""
  names = [kind.name for kind in kinds]

  def about(i: int) -> tuple[Any, ...]:
    ids, first, end, drawn, labels = all_cases[i]
    columns = list(tokens[i]) if tokens else None
    return names, ids, [first, end], drawn, labels, columns

  def keep(i: int, result: causal.Traced) -> None:
    nonlocal last
    now = timer()
    pieces.save(_packed(result, now - last), *about(missing[i]))
    spent.append(now - last)
    last = now

  at_hand = [pieces.load(*about(i)) for i in range(len(all_cases))]
  spent = [float(arrays['seconds'][0]) for arrays in at_hand if arrays]
  missing = [i for i, arrays in enumerate(at_hand) if arrays is None]
  last = timer()
  fresh = run(
      [all_cases[i] for i in missing],
      tokens=tokens and [tokens[i] for i in missing],
      found=keep,
  )
  waiting = iter(fresh)
  results = [next(waiting) if x is None else _unpacked(x) for x in at_hand]
  return results, sum(spent)


def about(config: Config, model: loading.Model) -> dict[str, Any]:
  """What the results of all facts depend on, as plain JSON types."""
  dtype = model.params['embed']['embedding'].dtype
  return {
      'model': model.hash,
      'dtype': str(dtype),
      'kinds': [list(kind) for kind in config.kinds],
      'mode': config.mode,
  }


def _packed(result: causal.Traced, seconds: float) -> dict[str, np.ndarray]:
  """A result as named arrays, and the seconds that it took."""
  return {
      'seconds': np.array([seconds]),
      'labels': result.labels,
      'effect': np.array([result.high, result.low]),
      **{f'{_GRID}{kind}': grid for kind, grid in result.scores.items()},
  }


def _unpacked(arrays: Mapping[str, np.ndarray]) -> causal.Traced:
  """What was packed."""
  high, low = map(float, arrays['effect'])
  grids = {
      name.removeprefix(_GRID): grid
      for name, grid in arrays.items()
      if name.startswith(_GRID)
  }
  return causal.Traced(arrays['labels'], high, low, grids)


def cases(
    config: Config, picked: Sequence[Asked], level: noise.Noise, width: int
) -> list[causal.Case]:
  """Facts with their noise; the model's answers are scored."""

  @functools.cache  # facts with subjects of one length share their noise
  def drawn(tokens: int) -> np.ndarray:
    shape = (config.draws, tokens, width)
    return noise.draw(level, shape, config.seed)

  return [
      causal.Case(
          one.ids,
          *one.span,
          noise=drawn(one.span[1] - one.span[0]),
          labels=np.array([one.answer], np.int32),
      )
      for one in picked
  ]


def collect(
    words: Any, picked: Sequence[Asked], results: Sequence[causal.Traced]
) -> tuple[list[trace_results.Found], list[dict[str, Any]]]:
  """Joins facts with what the trace found.

  Args:
    words: the model's tokenizer.
    picked: the facts.
    results: one a fact.

  Returns:
    (the traced facts, those left out as their numbers are not finite).

  Raises:
    InputError: none is left.
  """
  found, missed = [], []
  for one, result in zip(picked, results, strict=True):
    if not trace_results.finite(result):
      missed.append(_left_out(one.fact, _NOT_FINITE))
      continue
    texts = [words.decode([token]) for token in (*one.ids, one.answer)]
    found.append(
        trace_results.Found(
            fact=one.fact,
            ids=one.ids,
            tokens=tuple(texts[:-1]),
            span=one.span,
            answer=texts[-1],
            completes=one.completes,
            result=result,
        )
    )
  if not found:
    raise InputError(_none(len(picked), missed))
  return found, missed
