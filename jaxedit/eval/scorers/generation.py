"""What an edited model says by itself, and whether that is the new object.

The continuation is the model's own: greedy, from the plain prompt, and ended by
the model alone, at its end-of-text token or at the first token whose text holds
a full stop or a line break. Nothing of the target is shown to it, neither its
tokens nor its length. A prompt that the model continues with more than the
object is the rule for clozes ("... was born in the country of" -> "France and
grew up in"), so `exact_match` is strict for them: a correct edit may well fail
it, and `contains` is the one to read. Where the target itself holds a full stop
inside ("St. Louis"), a full stop that follows the same words ends no text. Full
stops of other scripts (Chinese, Hindi, Urdu, ...) count like '.'.

Source: the stop rule and the normalised match (`matching`) follow the judged
generation of EasyEdit (Wang et al. 2023, arXiv 2308.07269), without its judge
and without a chat template.

Not here: answers of any length (`long_form`), fluency, perplexity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jaxedit.eval import matching
from jaxedit.eval.scorers import base
from jaxedit.eval.scorers.base import Generation, Judged, Prompt, Questions
from jaxedit.text.chat import Chat
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import REPHRASE, EditRequest

# As long as an object and the end of its clause; the text usually ends earlier.
MAX_NEW_TOKENS = 16
_STOPS = '.\u3002\uff0e\uff61\u0964\u06d4\u1362'
_BREAK = '\n'


@dataclasses.dataclass(frozen=True)
class FreeGeneration(base.Scorer):
  """Continues the edit prompt and the first rephrase probe.

  Attributes:
    tokens: of the model's tokenizer.
    stop_ids: tokens that end a text, see `stop_ids`.
    max_new_tokens: tokens at most.
    chat: words around every prompt.
  """

  tokens: TokenCache
  stop_ids: tuple[int, ...]
  max_new_tokens: int = MAX_NEW_TOKENS
  chat: Chat = Chat()

  @property
  def generation(self) -> Generation:
    return Generation(self.max_new_tokens, tuple(self.stop_ids))

  def prepare(self, requests: Sequence[EditRequest]) -> list[Questions]:
    asked = [_asked(request) for request in requests]
    wrapped = [self.chat.wrap(text) for some in asked for text in some]
    ids = iter(self.tokens.prompts(wrapped))
    return [
        Questions(
            prompts=[
                (text, Prompt(tuple(next(ids).tolist()), stop_ids=stop))
                for text in some
            ]
        )
        for some, stop in zip(asked, map(self._own_stop, requests))
    ]

  def _own_stop(self, request: EditRequest) -> tuple[int, ...] | None:
    """The stop tokens of a request, where they are not those of all."""
    if not _stops_inside(request.target):
      return None
    return tuple(i for i in self.stop_ids if i not in self._full_stops)

  @functools.cached_property
  def _full_stops(self) -> frozenset[int]:
    """Stop tokens with a full stop and without a line break."""
    texts = base.texts_of(self.tokens.tokenizer, self.stop_ids)
    return frozenset(
        token
        for token, text in zip(self.stop_ids, texts)
        if set(_STOPS) & set(text) and _BREAK not in text
    )

  def _cut(self, tokens: Sequence[int], target: str) -> Sequence[int]:
    """Ends a text at a full stop that is not one inside the target."""
    inside = _stops_inside(target)
    for i, token in enumerate(tokens if inside else ()):
      if token in self._full_stops:
        text = self.tokens.tokenizer.decode(
            tokens[: i + 1], clean_up_tokenization_spaces=False
        )
        last = max(map(text.rfind, _STOPS))
        if not _squeeze(text[: last + 1]).endswith(inside):
          return tokens[: i + 1]
    return tokens

  def judge(
      self,
      requests: Sequence[EditRequest],
      replies: Sequence[base.Replies],
      before: Any,
  ) -> list[Judged]:
    del before
    flat = [
        self._cut(tokens, request.target)
        for request, reply in zip(requests, replies)
        for tokens in reply.tokens
    ]
    said = iter(base.texts(self.tokens.tokenizer, flat))
    found = []
    for request, reply in zip(requests, replies):
      target = request.target
      text, *more = [_until_stop(next(said), target) for _ in reply.tokens]
      values = {
          'exact_match': float(matching.exact_match(text, target)),
          'contains': float(matching.contains(text, target)),
      }
      if more:
        contained = matching.contains(more[0], target)
        values['paraphrase_contains'] = float(contained)
      fields = {'text': text, 'paraphrase_text': more[0] if more else None}
      found.append(Judged(values, fields))
    return found


def stop_ids(tokenizer: Any, vocab: int, chat_end: str = '') -> tuple[int, ...]:
  """Lists the tokens that end a free generation.

  Args:
    tokenizer: a transformers tokenizer.
    vocab: rows of the model's embedding; ids from there up cannot occur.
    chat_end: text that ends a turn of the chat; '' without one.

  Returns:
    Ids of the end-of-text token, of those that end a turn, and of every token whose text holds a full stop,
    of any script, or a line break.
  """
  size = min(len(tokenizer), vocab)
  texts = base.texts_of(tokenizer, range(size))
  stops = {i for i, t in enumerate(texts) if set(_STOPS + _BREAK) & set(t)}
  return tuple(sorted(stops.union(base.end_ids(tokenizer, vocab, chat_end))))


def _squeeze(text: str) -> str:
  return ' '.join(text.casefold().split())


def _stops_inside(target: str) -> tuple[str, ...]:
  """The target up to each full stop that stands before its end."""
  target = _squeeze(target)
  ends = [i + 1 for i, char in enumerate(target) if char in _STOPS]
  return tuple(target[:end] for end in ends if end < len(target))


def _until_stop(text: str, target: str) -> str:
  """Ends a text at a full stop that may be several tokens, so none but '.'."""
  inside = _stops_inside(target)
  for i, char in enumerate(text):
    if char in _STOPS[1:] and not _squeeze(text[: i + 1]).endswith(inside):
      return text[: i + 1]
  return text


def _asked(request: EditRequest) -> list[str]:
  rephrases = request.probes_of(REPHRASE)[:1]
  return [request.question, *(probe.prompt for probe in rephrases)]
