"""Rounds of generation and retrieval: the model writes before it answers.

  demonstrations, Question: X
  Subquestion: ...            the model
  Tentative answer: ...       the model, up to the stop string 'Retrieved fact:'
  Retrieved fact: ...         the stored fact nearest to the sub-question
  Check: ...                  the model: does the fact contradict? what holds?
  Subquestion: ...            and so on, `rounds` times at most
  Final answer:               what comes now answers X

The transcript up to 'Final answer:' takes the place of the prompt. A generated
text goes on from it under the caller's settings; a scored answer is scored after
it. Rounds are greedy, so both read the same transcript.

Rounds end early, and the final answer is asked for, where the model names no
sub-question, writes nothing that ends a round within `round_tokens`, or would
outgrow the context window. All prompts of a call are in the same round, and
decode together.

Source: Zhong et al. 2023, "MQuAKE" (MeLLo, arXiv 2305.14795). There a question
whose rounds end early has no answer at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.deltas import Speak
from jaxedit.edited.prompting import FactMemory
from jaxedit.types import InputError

QUESTION, SUBQUESTION = 'Question:', 'Subquestion:'
TENTATIVE, RETRIEVED = 'Tentative answer:', 'Retrieved fact:'
CHECK, FINAL = 'Check:', 'Final answer:'
# A blank line is between demonstrations, so nothing of a round comes after it.
_STOPS = (RETRIEVED, FINAL, '\n\n')
# Tokens that a transcript leaves for the final answer.
_ANSWER = 64


class Transcript(NamedTuple):
  """What was written for one prompt.

  Attributes:
    text: up to and with 'Final answer:', demonstrations included.
    facts: numbers of the facts that were retrieved.
    ended: whether the model itself came to the final answer.
  """

  text: str
  facts: tuple[int, ...]
  ended: bool


@dataclasses.dataclass(frozen=True, eq=False)
class FactDialogue(FactMemory):
  """A `deltas.Prompting` rule over a memory; its lookup is 'nearest'.

  Attributes:
    demonstrations: questions answered in this form, blank lines between them.
    rounds: retrievals at most.
    round_tokens: tokens that the model may write in a round.
  """

  lookup: str = 'nearest'
  threshold: float = -2.0  # below every cosine
  demonstrations: str = ''
  rounds: int = 4
  round_tokens: int = 128

  def rewrite(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
      speak: Speak | None = None,
  ) -> list[list[int]]:
    """See `deltas.Prompting`; prompts of an edit without facts stay as they are.

    Raises:
      InputError: tokenizer, encoder or `speak` are missing, or a question does
        not fit the context window.
    """
    if speak is None:
      raise InputError(
          'a memory that is asked in rounds needs the model itself; open it with'
          ' jaxedit.open_model, which writes the rounds'
      )
    found = self.dialogues(prompts, edit_ids, speak)
    return [
        list(ids) if one is None else self._ids(one.text)
        for ids, one in zip(prompts, found)
    ]

  def dialogues(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
      speak: Speak,
  ) -> list[Transcript | None]:
    """Writes the transcripts; see `rewrite`. None where there is no fact."""
    self._check_bound()
    ids = [None] * len(prompts) if edit_ids is None else list(edit_ids)
    keys = [(tuple(p), edit) for p, edit in zip(prompts, ids)]
    known = {fact.edit for fact in self.facts}
    # Equal questions are asked once.
    first = {key: i for i, key in reversed([*enumerate(keys)])}
    asked = [
        i
        for i in sorted(first.values())
        if ids[i] in known or (ids[i] is None and known)
    ]
    found: dict[int, Transcript] = {}
    for i in asked:
      text = self.tokenizer.decode(prompts[i], skip_special_tokens=True)
      start = f'{self.demonstrations}\n\n{QUESTION} {text.strip()}\n'
      found[i] = Transcript(start.lstrip('\n'), (), False)
    self._check_window(found, speak.most)
    self._converse(found, ids, speak)
    for i, one in found.items():
      if not one.ended:
        found[i] = one._replace(text=f'{one.text.rstrip()}\n{FINAL}')
    return [found.get(first[key]) for key in keys]

  def _converse(
      self,
      found: dict[int, Transcript],
      edit_ids: Sequence[int | None],
      speak: Speak,
  ) -> None:
    """Runs the rounds; changes `found`."""
    waiting = list(found)
    ends = [i for i in [self.tokenizer.eos_token_id] if i is not None]
    # After the last retrieval the model may still say what follows from it.
    for turn in range(self.rounds + 1):
      texts = {i: self._ids(found[i].text) for i in waiting}
      longest = speak.most - self.round_tokens - _ANSWER
      waiting = [i for i in waiting if len(texts[i]) <= longest]
      if not waiting:
        return
      new = speak(
          [texts[i] for i in waiting],
          waiting,
          max_new_tokens=self.round_tokens,
          stop_ids=ends,
          stop_texts=_STOPS,
      )
      said = {}
      for i, tokens in zip(waiting, new, strict=True):
        text, stop = _cut(self.tokenizer.decode(tokens, **_AS_WRITTEN))
        ended = stop == FINAL
        body = found[i].text + text + (FINAL if ended else '')
        found[i] = found[i]._replace(text=body, ended=ended)
        if stop == RETRIEVED and (question := _subquestion(text)):
          said[i] = question
      if turn == self.rounds or not said:
        return
      own = [edit_ids[i] for i in said]
      facts = self.in_force(list(said.values()), None if None in own else own)
      for i, some in zip(said, facts, strict=True):
        fact = ' '.join(self.facts[n].context.strip() for n in some)
        found[i] = found[i]._replace(
            text=f'{found[i].text}{RETRIEVED} {fact}\n',
            facts=(*found[i].facts, *some),
        )
      waiting = list(said)

  def _ids(self, text: str) -> list[int]:
    return self.tokenizer(text)['input_ids']

  def _check_window(self, found: Mapping[int, Transcript], most: int) -> None:
    least = self.round_tokens + _ANSWER
    problems = []
    for i, one in found.items():
      count = len(self._ids(one.text))
      if count + least > most:
        problems.append(
            f'prompt {i} takes {count} tokens with its demonstrations, a round'
            f' {self.round_tokens} and an answer {_ANSWER} more, where the model'
            f' has {most} positions; shorten it or give fewer demonstrations'
        )
    if problems:
      raise InputError(*problems)

  def packed(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """See `FactMemory.packed`."""
    arrays, record = super().packed()
    names = ('demonstrations', 'rounds', 'round_tokens')
    own = {name: getattr(self, name) for name in names}
    return arrays, {**record, **own}


_AS_WRITTEN = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _cut(text: str) -> tuple[str, str]:
  """Cuts a text at its first stop string: (what is before it, which)."""
  found = [(text.find(stop), stop) for stop in _STOPS if stop in text]
  at, stop = min(found, default=(len(text), ''))
  return text[:at], stop


def _subquestion(text: str) -> str:
  """The last sub-question of what the model wrote; '' without one."""
  lines = [line.strip() for line in text.split('\n')]
  asked = [line for line in lines if line.startswith(SUBQUESTION)]
  return asked[-1].removeprefix(SUBQUESTION).strip() if asked else ''
