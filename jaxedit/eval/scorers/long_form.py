"""Lets an edited model answer in full, and scores the answers.

For every request the model is asked the question as edited, its rephrase probes
and its sub-questions, all in the words of the chat, and writes until it ends by
itself or has written `max_new_tokens`. Metrics are `<asked>/<score>`:

  question/...     the edited question against the edited answer
  paraphrase/...   each rephrase probe against the same answer, averaged
  sub/...          each sub-question against its own short answer, averaged

with the scores of `similarity`; of a short answer only the recalls, and whether
its words stand in what was said ('contains').

Source: the protocol of UnKEBench, AKEW and EditEverything in AnyEdit (Jiang et
al. 2025, arXiv 2502.05628), whose decoding is close to greedy; here greedy is
greedy unless `decoding` says otherwise.

A sampled answer is drawn from a stream of its own, which the request's number
and the place of the question in it give: it depends neither on the requests
that are evaluated together nor on batches, and before and after an edit the
same draws are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxedit.eval import matching, similarity
from jaxedit.eval.scorers import base
from jaxedit.eval.scorers.base import Generation, Judged, Prompt, Questions
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.models.encoder import Encoder
from jaxedit.text import passages
from jaxedit.text.chat import Chat
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import REPHRASE, SUB_QUESTION, EditRequest

_QUESTION, _PARAPHRASE, _SUB = 'question', 'paraphrase', 'sub'
_RECALLS = ('rouge_1_recall', 'rouge_2_recall', 'rouge_l_recall')


@dataclasses.dataclass(frozen=True)
class LongForm(base.Scorer):
  """The scorer; see the module head.

  Attributes:
    tokens: of the model's tokenizer.
    chat: words around a question.
    stop_ids: tokens that end an answer, see `base.end_ids`.
    double_bos: ask with two BOS tokens, see `text.passages`.
    sub_questions: whether to ask them.
    encoder: for `minilm_cosine`.
    decoding: how tokens are chosen.
    max_new_tokens: length of an answer, tokens.
  """

  tokens: TokenCache
  chat: Chat
  stop_ids: tuple[int, ...] = ()
  double_bos: bool = False
  sub_questions: bool = True
  encoder: Encoder | None = None
  decoding: Decoding = GREEDY
  max_new_tokens: int = 512

  @property
  def generation(self) -> Generation:
    return Generation(self.max_new_tokens, tuple(self.stop_ids), self.decoding)

  def prepare(self, requests: Sequence[EditRequest]) -> list[Questions]:
    asked = [self._asked(request) for request in requests]
    flat = [text for some in asked for _, text, _ in some]
    ids = iter(
        passages.encode_questions(self.tokens, flat, self.chat, self.double_bos)
    )
    return [
        Questions(
            prompts=[
                (text, Prompt(tuple(next(ids)), _stream(request, place)))
                for place, (_, text, _) in enumerate(some)
            ]
        )
        for request, some in zip(requests, asked)
    ]

  def errors(self, request: EditRequest) -> list[str]:
    wanted = dict.fromkeys(answer for *_, answer in self._asked(request))
    return [
        f'answer {answer[:40]!r} has no word to compare an answer with; write'
        ' it out or remove its question.'
        for answer in wanted
        if not similarity.has_words(answer)
    ]

  def judge(
      self,
      requests: Sequence[EditRequest],
      replies: Sequence[base.Replies],
      before: Any,
  ) -> list[Judged]:
    """As `Scorer.judge`; fields 'text', 'paraphrase_texts' and 'sub_texts'."""
    del before
    flat = [tokens for reply in replies for tokens in reply.tokens]
    said = base.texts(self.tokens.tokenizer, flat, self.stop_ids)
    asked = [self._asked(request) for request in requests]
    wanted = [answer for some in asked for *_, answer in some]
    scores = similarity.scores(said, wanted, encoder=self.encoder)
    rows = iter(zip(said, scores, strict=True))
    return [
        _judge([(kind, answer, *next(rows)) for kind, _, answer in some])
        for some in asked
    ]

  def _asked(self, request: EditRequest) -> list[tuple[str, str, str]]:
    """(kind, question, wanted answer) of all that is asked."""
    found = [(_QUESTION, request.question, request.target)]
    found += [
        (_PARAPHRASE, probe.prompt, request.target)
        for probe in request.probes_of(REPHRASE)
    ]
    # They come last, so that leaving them out moves no other random stream.
    if self.sub_questions:
      subs = request.probes_of(SUB_QUESTION)
      found += [(_SUB, probe.prompt, probe.answers[0]) for probe in subs]
    return found


def _judge(rows: Iterable[tuple[str, str, str, dict[str, float]]]) -> Judged:
  """Judges one request by (kind, wanted answer, what was said, its scores)."""
  texts: dict[str, list[str]] = {_PARAPHRASE: [], _SUB: []}
  groups: dict[str, list[dict[str, float]]] = {}
  for kind, answer, text, scores in rows:
    if kind == _SUB:
      scores = {name: scores[name] for name in _RECALLS}
      scores['contains'] = float(matching.contains(text, answer))
    texts.setdefault(kind, []).append(text)
    groups.setdefault(kind, []).append(scores)
  values = {
      f'{kind}/{name}': float(np.mean([one[name] for one in group]))
      for kind, group in groups.items()
      for name in group[0]
  }
  fields = {
      'text': texts[_QUESTION][0],
      'paraphrase_texts': texts[_PARAPHRASE],
      'sub_texts': texts[_SUB],
  }
  return Judged(values, fields)


def _stream(request: EditRequest, place: int) -> int:
  """The number of a question's random stream: 31 bits, equal in every run."""
  # Rewrites of one case have one number.
  name = f'{request.number}/{request.id}/{place}'.encode()
  digest = hashlib.blake2b(name, digest_size=4).digest()
  return int.from_bytes(digest, 'big') >> 1
