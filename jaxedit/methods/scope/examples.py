"""Records as the texts that a scope classifier is trained on.

Hard negatives are of two kinds. Batches hold records whose prompts are near each
other, so that their rephrased and local prompts are negatives of each other. And
every record has a prompt of another relation of its subject: the prompt of another
record with the subject exchanged. Which relations differ is told by their objects:
those of two wordings of one relation are alike.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import retrieval
from jaxedit.edited.prompting import last_sentence
from jaxedit.methods.hypernet.factors import Sequences
from jaxedit.methods.hypernet.network import subject_hash
from jaxedit.methods.scope.answers import (
    Answers,
    answers_of,
    packed,
)
from jaxedit.methods.scope.answers import pack as pack_answers
from jaxedit.methods.scope.classifier import ScopeBatch, pack
from jaxedit.models.encoder import Encoder
from jaxedit.types import LOCALITY, REPHRASE, EditRequest

# As published: neighbours that are drawn from, and the temperature.
_NEIGHBOURS, _TEMPERATURE = 100, 0.1
# Wordings that share more of their objects than this are of one relation.
_OVERLAP = 0.2
_TRIES = 20  # records that are tried for another relation


class Scoped(NamedTuple):
  """One record.

  Attributes:
    subject: hash of its subject.
    request: the record.
    near: its rephrased prompt.
    local: its local prompt.
    answers: ids of its answers; None where they are not trained.
  """

  subject: str
  request: EditRequest
  near: str
  local: str
  answers: Answers | None = None

  @property
  def wording(self) -> str:
    """The prompt, '{}' where its subject goes."""
    return self.request.prompt

  @property
  def object(self) -> str:
    """The object that tells the relation."""
    return self.request.target_true or self.request.target


def example(
    request: EditRequest, tokens: Any, settings: Any, longest: int
) -> Scoped | None:
  """Makes the example of a request; None without a subject or a probe."""
  near = request.probes_of(REPHRASE)[:1]
  local = request.probes_of(LOCALITY)[:1]
  if not near or not local or not request.subject:
    return None
  found = Scoped(
      subject_hash(request.subject), request, near[0].prompt, local[0].prompt
  )
  texts = (entry_text(request), found.near, found.local)
  if not all(len(x.split()) < longest for x in texts):
    return None
  if not settings.answered:
    return found
  # Of a fact and a prompt.
  coded = answers_of(request, near[0], local[0], tokens, longest=2 * longest)
  return None if coded is None else found._replace(answers=coded)


def entry_text(request: EditRequest, with_target: bool = False) -> str:
  """What is stored of a fact: its prompt, or its target too, as published."""
  prompt = last_sentence(request.question)
  return f'{prompt}[SEP]{request.target}[SEP]' if with_target else prompt


def other_relations(
    records: Sequence[Scoped], seed: Sequence[int]
) -> list[str]:
  """Draws a prompt of another relation of each record's subject.

  Args:
    records: the records.
    seed: of numpy's generator.

  Returns:
    Prompts; '' where no other relation was found.
  """
  objects = collections.defaultdict(set)
  for one in records:
    objects[one.wording].add(one.object)
  rng = np.random.default_rng(seed)
  found = []
  for one in records:
    ours, text = objects[one.wording], ''
    for k in rng.integers(len(records), size=_TRIES):
      theirs = objects[records[k].wording]
      shared = len(ours & theirs) / min(len(ours), len(theirs))
      if records[k].wording != one.wording and shared <= _OVERLAP:
        text = records[k].wording.replace('{}', one.request.subject)
        break
    found.append(last_sentence(text))
  return found


class ScopeExamples:
  """Records as ids, with their neighbours."""

  def __init__(
      self,
      records: Sequence[Scoped],
      encoder: Encoder,
      *,
      config: Any,
      longest: int,
      seed: int = 0,
  ):
    """Encodes records and finds their neighbours.

    Args:
      records: the records.
      encoder: the encoder as it comes; its cosines choose neighbours.
      config: a `training.SeracTraining`.
      longest: tokens that are read of a text.
      seed: of the other relations.
    """
    self._records, self._config = records, config
    with_target = config.entry == 'fact'
    entries = [entry_text(one.request, with_target) for one in records]
    near = [last_sentence(one.near) for one in records]
    local = [last_sentence(one.local) for one in records]
    other = other_relations(records, (seed, 1))
    self.subjects = np.array([one.subject for one in records])
    self.texts = [
        _ids(encoder, texts, longest) for texts in (entries, near, local, other)
    ]
    self.width = longest
    count = min(_NEIGHBOURS + 1, len(records))
    vectors = retrieval.embed(encoder, entries)
    self._cosine, self._neighbours = retrieval.search(vectors, vectors, count)

  def __len__(self) -> int:
    return len(self.subjects)

  def batch(self, indices: Sequence[int]) -> ScopeBatch:
    """Makes the batch of some records."""
    some = [kind[i] for kind in self.texts for i in indices]
    subjects = self.subjects[np.asarray(indices)]
    same = subjects[:, None] == subjects
    texts = pack(some, self.width)
    if not self._config.answered:
      return ScopeBatch(texts, same)
    return ScopeBatch(
        texts, same, self.answers(indices[: self._config.answers])
    )

  def rephrased(self, count: int) -> Sequences:
    """Packs the answers of the first records to their rephrased prompts."""
    return pack_answers([one.answers.near for one in self._records[:count]])

  def answers(self, indices: Sequence[int]) -> Answers:
    """Packs the answers of some records."""
    return packed([self._records[i].answers for i in indices], self._config)

  def epochs(self, size: int, share: float, seed: int) -> Iterator[list[int]]:
    """Yields the records of batches, without end.

    Args:
      size: records of a batch.
      share: of the second half of a batch, how many are drawn from the
        neighbours of the first; the others are drawn from all.
      seed: of all that is drawn.
    """
    for epoch in itertools.count():
      rng = np.random.default_rng((seed, epoch))
      order = rng.permutation(len(self))
      first = max(1, (size + 1) // 2)
      for begin in range(0, len(order) - first + 1, first):
        some = order[begin : begin + first].tolist()
        for i in some[: size - first]:
          hard = rng.random() < share
          some.append(self._neighbour(i, rng) if hard else -1)
        fill = rng.integers(len(self), size=size)
        yield [int(i if i >= 0 else j) for i, j in zip(some, fill)]

  def _neighbour(self, i: int, rng: np.random.Generator) -> int:
    """Draws a neighbour of another subject; -1 where there is none."""
    near = self._neighbours[i]
    fine = self.subjects[near] != self.subjects[i]
    if not fine.any():
      return -1
    weight = np.exp((self._cosine[i] - 1) / _TEMPERATURE) * fine
    return int(rng.choice(near, p=weight / weight.sum()))


def _ids(
    encoder: Encoder, texts: Sequence[str], longest: int
) -> list[list[int]]:
  """Token ids of texts, none for an empty text; the end of a long one."""
  most = encoder.max_tokens
  found = encoder.tokenizer(
      list(texts), truncation=True, max_length=most, padding=False
  )['input_ids']
  cut = (
      lambda ids: ids if len(ids) <= longest else [ids[0], *ids[1 - longest :]]
  )
  return [cut(ids) if text else [] for ids, text in zip(found, texts)]
