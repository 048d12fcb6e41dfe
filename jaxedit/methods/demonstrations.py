"""Facts as texts that are read before a prompt, after demonstrations.

A demonstration is a fact of another record with a question about it; of each 32
about 3 ask for the fact itself (copy), 10 for a paraphrase (update), 19 for a
neighbour, which keeps its true object (retain). Those nearest to the edit are
taken, the nearest last.

Source: Zheng et al. 2023 (IKE, arXiv 2305.12740).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxedit import retrieval
from jaxedit.methods.memories import statement
from jaxedit.models.encoder import Encoder
from jaxedit.types import LOCALITY, REPHRASE, EditRequest

_COPY, _UPDATE, _RETAIN = 3, 10, 19  # of 32, as published


def new_fact(request: EditRequest) -> str:
  """What is read before a prompt in the scope of a fact."""
  return f'New Fact: {statement(request)}\n'


def demonstrations(
    request: EditRequest,
    pool: Sequence[EditRequest],
    nearest: Sequence[int],
    *,
    count: int,
    shuffle: int,
    retain: bool = True,
) -> str:
  """Writes the demonstrations of one edit.

  Args:
    request: the edit.
    pool: other records.
    nearest: numbers of records of the pool, the nearest first.
    count: how many.
    shuffle: seed of the order of kinds.
    retain: whether some ask for neighbours.

  Returns:
    Their text, the nearest last.
  """
  whole = _COPY + _UPDATE + _RETAIN * retain
  kinds = [REPHRASE] * round(count * _UPDATE / whole)
  kinds += [LOCALITY] * (round(count * _RETAIN / whole) * retain)
  kinds += [''] * (count - len(kinds))
  order = np.random.default_rng(shuffle).permutation(count)
  some = [pool[i] for i in nearest if pool[i].subject != request.subject]
  shown = [
      _demonstration(one, kinds[order[i]]) for i, one in enumerate(some[:count])
  ]
  return ''.join(reversed(shown))


def contexts(
    requests: Sequence[EditRequest],
    encoder: Encoder,
    pool: Sequence[EditRequest],
    *,
    count: int,
    shuffle: int,
    retain: bool = True,
) -> list[str]:
  """Writes what is read before a prompt: demonstrations, and the fact at the end.

  Args:
    requests: the edits.
    encoder: finds the demonstrations that are nearest to an edit.
    pool: other records.
    count: how many.
    shuffle: seed of the order of kinds.
    retain: whether some ask for neighbours.

  Returns:
    A text of each edit.
  """
  if not requests:
    return []
  keys = retrieval.embed(encoder, [new_fact(one) for one in pool])
  queries = retrieval.embed(encoder, [new_fact(one) for one in requests])
  # Records of the same subject are left out of those found.
  most = min(len(pool), count + 16)
  _, nearest = retrieval.search(queries, keys, most)
  made = []
  for one, order in zip(requests, nearest):
    shown = demonstrations(
        one, pool, order, count=count, shuffle=shuffle, retain=retain
    )
    itself = f'{new_fact(one)}Prompt: {statement(one)}\n\n'
    made.append(shown + itself + new_fact(one))
  return made


def _demonstration(one: EditRequest, kind: str) -> str:
  """A fact and a question about it: a paraphrase, a neighbour, or itself."""
  prompt, answer = one.question, one.target
  if kind and (probes := one.probes_of(kind)):
    prompt = probes[0].prompt
    if kind == REPHRASE:
      prompt = cleaned(prompt, one.subject)
    else:
      answer = probes[0].answers[0]
  return f'{new_fact(one)}Prompt: {prompt} {answer}\n\n'


def cleaned(prompt: str, subject: str | None) -> str:
  """A paraphrase without the unrelated text that some sets put before it."""
  at = prompt.find(subject) if subject else -1
  if at < 0:
    return prompt
  begin = max(prompt.rfind(mark, 0, at) for mark in ('. ', '\n'))
  return prompt[begin + 1 :].lstrip() if begin >= 0 else prompt
