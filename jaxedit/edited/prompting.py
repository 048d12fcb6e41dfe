"""Facts kept as text, which a prompt reads before it is answered.

  prompt X  ->  contexts of the facts in force, `tail`, X

Which facts are in force is looked up per prompt, from its text alone:

  'all'      all facts of the prompt's edit, in order
  'nearest'  the fact whose key has the largest cosine with the prompt, by
             sentence embeddings, if it is above `threshold`; of equal ones the
             newest
  'closest'  the fact whose key has the least edit distance from the prompt, if
             it is below `threshold`; of equally near ones the oldest, of
             equal keys the newest

A prompt with no fact in force is read as it is, token for token. Of a prompt of
several sentences the last alone may be looked up (`last_sentence`).

Sources: Zheng et al. 2023 (IKE, arXiv 2305.12740) for contexts; Madaan et al.
2022 (MemPrompt, arXiv 2201.06009) for the edit distance and its keys.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from jaxedit import retrieval, sources
from jaxedit.deltas import Prompting, Speak
from jaxedit.models.encoder import Encoder
from jaxedit.types import InputError

LOOKUPS = ('all', 'nearest', 'closest')


@dataclasses.dataclass(frozen=True)
class Fact:
  """One stored fact.

  Attributes:
    id: of the edit request, by which it is forgotten.
    key: what prompts are compared with.
    context: what a prompt in its scope reads first.
    edit: number of the edit side by side that it belongs to.
  """

  id: str
  key: str
  context: str
  edit: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class FactMemory(Prompting):
  """A `deltas.Prompting` rule; see the module head.

  Attributes:
    facts: oldest first.
    tail: text between the contexts and the prompt.
    lookup: one of `LOOKUPS`.
    threshold: of a lookup, a cosine or a number of characters.
    embeddings: [N, D] of the keys, with 'nearest'; else None.
    encoder_hash: of the encoder that made them.
    last_sentence: whether a prompt is looked up by its last sentence alone.
    routes: whether a prompt with no fact in force is answered by the unedited
      model, without the deltas that stand beside the memory.
    tokenizer: the model's own; `bound` adds it to a memory from a file.
    encoder: embeds prompts, with 'nearest'.
  """

  facts: tuple[Fact, ...]
  tail: str = ''
  lookup: str = 'all'
  threshold: float = 0.0
  embeddings: np.ndarray | None = None
  encoder_hash: str = ''
  last_sentence: bool = False
  routes: bool = False
  tokenizer: Any = None
  encoder: Encoder | None = None

  @property
  def ids(self) -> list[str]:
    """See `deltas.Prompting`."""
    return [fact.id for fact in self.facts]

  def rewrite(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
      speak: Speak | None = None,
  ) -> list[list[int]]:
    """See `deltas.Prompting`; nothing is generated.

    Raises:
      InputError: the tokenizer or the encoder is missing, see `bound`.
    """
    del speak
    self._check_bound()
    texts = [sources.prompt_text(self.tokenizer, ids) for ids in prompts]
    contexts: dict[tuple[int, ...], str] = {}
    read = []
    for ids, text, mine in zip(prompts, texts, self.in_force(texts, edit_ids)):
      if not mine:
        read.append(list(ids))
        continue
      if mine not in contexts:
        contexts[mine] = ''.join(self.facts[i].context for i in mine)
      text = text if not self.tail else f'{self.tail} {text}'
      read.append(sources.prompt_ids(self.tokenizer, contexts[mine] + text))
    return read

  def in_force(
      self, texts: Sequence[str], edit_ids: Sequence[int] | None
  ) -> list[tuple[int, ...]]:
    """Looks up which facts each prompt reads, as their numbers.

    Args:
      texts: prompts.
      edit_ids: which edit a prompt is under; None for any.

    Returns:
      For each prompt the numbers of its facts, none out of scope.
    """
    if self.last_sentence:
      texts = [last_sentence(text) for text in texts]
    edit_of = np.array([fact.edit for fact in self.facts], int)
    ids = [None] * len(texts) if edit_ids is None else edit_ids
    known = {
        one: np.flatnonzero((edit_of == one) | (one is None))
        for one in set(ids)
    }
    if self.lookup == 'all':
      return [tuple(known[one].tolist()) for one in ids]
    different = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(different)}
    if self.lookup == 'nearest':
      scores = self._cosines(different)
    keys = [plain_key(fact.key) for fact in self.facts]
    found = []
    for text, one in zip(texts, ids):
      some = known[one]
      if not len(some):
        found.append(())
      elif self.lookup == 'nearest':
        score = scores[place[text], some]
        best = len(some) - 1 - int(np.argmax(score[::-1]))
        within = score[best] > self.threshold
        found.append((int(some[best]),) if within else ())
      else:
        most = int(np.ceil(self.threshold))
        mine = plain_key(text)
        away = [edit_distance(mine, keys[i], most) for i in some]
        best = int(np.argmin(away))
        # A fact that was stored again replaces the earlier one.
        same = [j for j, i in enumerate(some) if keys[i] == keys[some[best]]]
        best = same[-1]
        within = away[best] < self.threshold
        found.append((int(some[best]),) if within else ())
    return found

  def _cosines(self, texts: Sequence[str]) -> np.ndarray:
    """[N, facts] cosines of texts and keys."""
    vectors = retrieval.embed(self.encoder, texts)
    return vectors @ self.embeddings.T

  def _check_bound(self) -> None:
    problems = []
    if self.tokenizer is None:
      problems.append(
          'the memory has no tokenizer: open it with a model that has one'
          ' (jaxedit.load), or give it by `bound`'
      )
    if self.lookup == 'nearest' and self.encoder is None:
      problems.append(
          'the memory has no encoder to look facts up with: give the one that'
          ' it was made with by `bound`'
      )
    if problems:
      raise InputError(*problems)

  def bound(
      self, tokenizer: Any = None, encoder: Encoder | None = None
  ) -> Self:
    """Returns the memory with what files do not hold.

    Args:
      tokenizer: the model's.
      encoder: the one whose embeddings it has.

    Raises:
      InputError: another encoder than that of the stored embeddings.
    """
    if encoder is not None and self.embeddings is not None:
      if encoder.model.hash != self.encoder_hash:
        raise InputError(
            f'the memory was embedded by encoder {self.encoder_hash[:12]}, given'
            f' {encoder.model.hash[:12]}; give the one it was made with'
        )
    return dataclasses.replace(
        self,
        tokenizer=self.tokenizer or tokenizer,
        encoder=self.encoder or encoder,
    )

  def added(self, facts: Sequence[Fact]) -> Self:
    """Returns the memory with newer facts behind its own."""
    embeddings = self.embeddings
    if self.lookup == 'nearest' and facts:
      self._check_bound()
      new = retrieval.embed(self.encoder, [fact.key for fact in facts])
      embeddings = (
          new if embeddings is None else np.concatenate([embeddings, new])
      )
    return dataclasses.replace(
        self, facts=(*self.facts, *facts), embeddings=embeddings
    )

  def forgotten(self, id: str) -> Self:  # pylint: disable=redefined-builtin
    """Returns the memory without the facts of one edit request.

    Raises:
      InputError: it has none of that id.
    """
    kept = [i for i, fact in enumerate(self.facts) if fact.id != id]
    if len(kept) == len(self.facts):
      known = ', '.join(dict.fromkeys(fact.id for fact in self.facts[:20]))
      raise InputError(
          f'the memory has no fact of id {id!r}; its first ids are {known}'
      )
    return self._taken(kept, [self.facts[i].edit for i in kept])

  def without(self, indices: Sequence[int]) -> Self:
    """Returns the memory without the facts of these numbers."""
    kept = [i for i in range(len(self.facts)) if i not in set(indices)]
    return self._taken(kept, [self.facts[i].edit for i in kept])

  def _taken(self, kept: Sequence[int], edits: Sequence[int]) -> Self:
    facts = tuple(
        dataclasses.replace(self.facts[i], edit=edit)
        for i, edit in zip(kept, edits)
    )
    vectors = self.embeddings
    if vectors is not None:
      vectors = vectors[list(kept)]
    return dataclasses.replace(self, facts=facts, embeddings=vectors)

  def select(self, index: int) -> Self:
    """Returns the memory of one of the edits side by side."""
    kept = [i for i, fact in enumerate(self.facts) if fact.edit == index]
    return self._taken(kept, [0] * len(kept))

  def stack(self, others: Sequence[Self]) -> Self:
    """Returns the memories of independent edits side by side, this one first."""
    every = [self, *others]
    facts = tuple(
        dataclasses.replace(fact, edit=edit)
        for edit, one in enumerate(every)
        for fact in one.facts
    )
    vectors = [one.embeddings for one in every if one.embeddings is not None]
    return dataclasses.replace(
        self,
        facts=facts,
        embeddings=np.concatenate(vectors) if vectors else None,
    )

  def packed(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Writes the memory as arrays and plain JSON types."""
    arrays = {}
    if self.embeddings is not None:
      arrays['embeddings'] = self.embeddings
    record = {
        'facts': [dataclasses.asdict(fact) for fact in self.facts],
        'tail': self.tail,
        'lookup': self.lookup,
        'threshold': self.threshold,
        'encoder_hash': self.encoder_hash,
        'last_sentence': self.last_sentence,
        'routes': self.routes,
    }
    return arrays, record

  @classmethod
  def unpacked(
      cls, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
  ) -> Self:
    """Reads what `packed` wrote; `bound` adds tokenizer and encoder."""
    facts = tuple(Fact(**fact) for fact in record['facts'])
    rest = {name: value for name, value in record.items() if name != 'facts'}
    if rest['lookup'] not in LOOKUPS:
      raise ValueError(rest['lookup'])
    return cls(facts, embeddings=arrays.get('embeddings'), **rest)


def last_sentence(text: str) -> str:
  """Cuts off what stands before the last sentence of a text.

  A sentence ends with '.' or '!' after a word of three letters or more, or with a
  line; a question stays with what follows it. What is left has three words at
  least, or is the whole text.
  """
  ends = re.finditer(r'(?<=\w{3})[.!]["\')\]]*\s+(?=\W?[A-Z0-9])|\n+', text)
  for begin in reversed([0, *(one.end() for one in ends)]):
    if len(text[begin:].split()) >= 3:
      return text[begin:].strip()
  return text.strip()


def plain_key(text: str) -> str:
  """What edit distances compare: letters, digits and single blanks, lower case.

  Letters of any script count, unlike in published code, which keeps ASCII.
  """
  text = re.sub(r'<.*>', '', text).lower()
  return ' '.join(re.sub(r'[^\w ]|_', '', text).split())


def edit_distance(a: str, b: str, most: int) -> int:
  """Levenshtein distance, or `most` where it is not below.

  Source: Wagner & Fischer 1974, a row at a time.
  """
  if abs(len(a) - len(b)) >= most:
    return most
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    before, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      before, row[j] = row[j], min(
          row[j] + 1, row[j - 1] + 1, before + (x != y)
      )
    if min(row) >= most:
      return most
  return min(row[-1], most)
