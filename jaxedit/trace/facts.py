"""What to trace: settings, facts as ids, and which of them the model completes.

A fact counts as completed where the model's most probable next token, decoded
and without white space, is the attribute, or is the first token of it. What is
scored is that token in any case.

The attribute is the `target` of a fact; '' leaves open what should follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxedit.models import loading
from jaxedit.text import locate
from jaxedit.trace import causal
from jaxedit.trace import noise as noise_lib
from jaxedit.trace.restoration import NAMES, WINDOW, Restoration, restoration
from jaxedit.types import EditRequest, InputError, Progress, silent

MODES = {'add': 'add', 'replace': 'set'}  # of noise -> of `causal.trace`
NOT_FINITE = 'has probabilities that are not finite'
_BATCH = 64  # prompts that are completed at a time, at least


def _setting(default: Any, help: str, **details: Any) -> Any:  # pylint: disable=redefined-builtin
  return dataclasses.field(default=default, metadata={'help': help, **details})


@dataclasses.dataclass(frozen=True)
class TraceConfig:
  """What to trace; help and choices stand with the fields, which are flags."""

  kinds: tuple[str, ...] = _setting(
      ('hidden', 'mlp', 'attn'),
      f'what to restore, of {", ".join(NAMES)}. hidden: the output of a block;'
      ' mlp, attn: the outputs of that part in --window layers; severed_*: as'
      ' hidden, while that part keeps its corrupted output above, at the last'
      ' subject token alone',
  )
  tokens: str = _setting(
      'all',
      'restore every token, or the last one of the subject alone, which takes a'
      ' fraction of the time and is all that --suggest_layers needs',
      choices=('all', 'subject_last'),
  )
  window: int = _setting(
      WINDOW,
      'layers that mlp and attn restore at once (default of ROME)',
      low=1,
  )
  noise: str = _setting(
      noise_lib.DEFAULT,
      's3: gaussian, 3 standard deviations of the embeddings of all subjects in'
      ' the file (default of ROME); 0.1: gaussian of that deviation; u0.1:'
      ' uniform between -0.1 and 0.1',
  )
  noise_mode: str = _setting(
      'add',
      'add noise to the embeddings, or put it in their place',
      choices=tuple(MODES),
  )
  draws: int = _setting(
      10, 'corrupted copies of a prompt (ROME: 10)', low=1, high=1000
  )
  seed: int = noise_lib.SEED

  @property
  def restorations(self) -> tuple[Restoration, ...]:
    """What is restored."""
    return tuple(restoration(name, self.window) for name in self.kinds)

  @property
  def last_only(self) -> bool:
    """Whether the last subject token alone is restored."""
    return self.tokens == 'subject_last'

  def alone(self, one: Restoration) -> bool:
    """Whether that is done at the last subject token alone."""
    return self.last_only or one.sever is not None


@dataclasses.dataclass(frozen=True)
class EncodedFact:
  """A fact as ids.

  Attributes:
    fact: the fact.
    ids: [T] int32 its prompt.
    span: first token of the subject and one past its last.
    answer: token that the model holds most probable next; -1 before it is run.
    completes: 'whole' if that is the attribute, 'begins' if it is its first
      token, 'misses' if neither, 'unasked' if there is no attribute.
  """

  fact: EditRequest
  ids: np.ndarray
  span: tuple[int, int]
  answer: int = -1
  completes: str = 'unasked'


def encode(tokenizer: Any, facts: Sequence[EditRequest]) -> list[EncodedFact]:
  """Turns facts into ids; each has passed `checker`."""
  located = locate.locate_subjects(tokenizer, [fact.parts for fact in facts])
  return [
      EncodedFact(fact, ids, (span[0], span[1] + 1))
      for fact, (ids, span) in zip(facts, located, strict=True)
  ]


def noise_level(
    config: TraceConfig, model: loading.Model, encoded: Sequence[EncodedFact]
) -> noise_lib.Noise:
  """Resolves the noise level by the subjects of all facts, traced or not."""
  std = None
  if noise_lib.parse(config.noise).relative:
    ids = np.concatenate([one.ids[slice(*one.span)] for one in encoded])
    std = noise_lib.embedding_std(model.params, ids)
  return noise_lib.level(config.noise, std)


def checker(
    tokenizer: Any, longest: int
) -> Callable[[Sequence[EditRequest]], list[list[str]]]:
  """Finds facts that cannot be traced as ids of `longest` tokens at most."""

  def check(facts: Sequence[EditRequest]) -> list[list[str]]:
    located = locate.locate_subjects(tokenizer, [fact.parts for fact in facts])
    return [
        _errors(fact.subject, len(ids), span is not None, longest)
        for fact, (ids, span) in zip(facts, located, strict=True)
    ]

  return check


def _errors(subject: str, count: int, located: bool, longest: int) -> list[str]:
  if not located:
    return [locate.no_subject(subject)]
  if count <= longest:
    return []
  return [
      f'the prompt has {count} tokens, and the model takes {longest}; shorten it.'
  ]


def choose(
    model: loading.Model,
    tokenizer: Any,
    encoded: Sequence[EncodedFact],
    *,
    count: int | None = None,
    keep_wrong: bool = False,
    progress: Progress = silent,
) -> tuple[list[EncodedFact], list[dict[str, Any]]]:
  """Picks the facts to trace, in order.

  Args:
    model: the model.
    tokenizer: its tokenizer.
    encoded: the facts.
    count: how many; all unless given.
    keep_wrong: whether to keep those that the model does not complete.
    progress: told of facts.

  Returns:
    (the facts with the model's answers, those left out and why).

  Raises:
    InputError: none is left.
  """
  wanted = min(count or len(encoded), len(encoded))
  size = max(_BATCH, 2 * wanted)
  picked, missed = [], []
  with progress('complete', len(encoded), 'fact') as done:
    for begin in range(0, len(encoded), size):
      part = encoded[begin : begin + size]
      rows = [one.ids for one in part]
      found = causal.predict(model.spec, model.params, rows)
      for one, token, p in zip(part, found.token, found.probability):
        if len(picked) == wanted:
          break
        one = judged(tokenizer, one, int(token))
        if reason := _reason(tokenizer, one, p, keep_wrong):
          missed.append(left_out(one.fact, reason))
        else:
          picked.append(one)
      done(len(part))
      if len(picked) == wanted:
        break
  if not picked:
    raise none_left(len(encoded), missed)
  return picked, missed


def none_left(count: int, missed: Sequence[dict[str, Any]]) -> InputError:
  """What is raised where none of `count` facts can be traced."""
  first = missed[0]
  wrong = any(one['reason'] != NOT_FINITE for one in missed)
  act = 'give facts that the model knows, or pass --keep_wrong'
  return InputError(
      f'none of the {count} facts can be traced; the first (record'
      f' {first["number"]}) {first["reason"]};'
      f' {act if wrong else "check the model"}'
  )


def left_out(fact: EditRequest, reason: str) -> dict[str, Any]:
  """Names a fact, and why it is not traced."""
  return {'number': fact.number, 'id': fact.id, 'reason': reason}


def judged(tokenizer: Any, one: EncodedFact, token: int) -> EncodedFact:
  """Compares the model's answer with the attribute."""
  attribute, completes = one.fact.target, 'unasked'
  if attribute:
    asked = locate.Continued(one.fact.question, attribute, one.fact.space)
    first = locate.encode_targets(tokenizer, [asked])[0][:1]
    completes = 'begins' if token in first else 'misses'
    if tokenizer.decode([token]).strip() == attribute:
      completes = 'whole'
  return dataclasses.replace(one, answer=token, completes=completes)


def _reason(
    tokenizer: Any, one: EncodedFact, p: float, keep_wrong: bool
) -> str:
  """Why a fact is not traced, or nothing."""
  if not np.isfinite(p):
    return NOT_FINITE
  if one.completes == 'misses' and not keep_wrong:
    answer = tokenizer.decode([one.answer]).strip()
    return f'is completed with {answer!r}, not {one.fact.target!r}'
  return ''
