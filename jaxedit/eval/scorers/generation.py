"""What an edited model says by itself, and whether that is the new object.

The continuation is the model's own: greedy, from the plain prompt, and ended by
the model alone, at its end-of-text token or at the first token whose text holds
a full stop or a line break. Nothing of the target is shown to it, neither its
tokens nor its length. A prompt that the model continues with more than the
object is the rule for clozes ("... was born in the country of" -> "France and
grew up in"), so `exact_match` is strict for them: a correct edit may well fail
it, and `contains` is the one to read. Targets that hold a full stop inside
("St. Louis") are cut short at it and can fail both.

Source: the stop rule and the normalised match (`matching`) follow the judged
generation of EasyEdit (Wang et al. 2023, arXiv 2308.07269), without its judge
and without a chat template.

Not here: answers of any length (`long_form`), fluency, perplexity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxedit.eval import matching
from jaxedit.eval.scorers import base
from jaxedit.eval.scorers.base import Generation, Judged, Prompt, Questions
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import REPHRASE, EditRequest

# As long as an object and the end of its clause; the text usually ends earlier.
MAX_NEW_TOKENS = 16
_ENDS = ('.', '\n')


@dataclasses.dataclass(frozen=True)
class FreeGeneration(base.Scorer):
  """Continues the edit prompt and the first rephrase probe.

  Attributes:
    tokens: of the model's tokenizer.
    stop_ids: tokens that end a text, see `stop_ids`.
    max_new_tokens: tokens at most.
  """

  tokens: TokenCache
  stop_ids: tuple[int, ...]
  max_new_tokens: int = MAX_NEW_TOKENS

  @property
  def generation(self) -> Generation:
    return Generation(self.max_new_tokens, tuple(self.stop_ids))

  def prepare(self, requests: Sequence[EditRequest]) -> list[Questions]:
    asked = [_asked(request) for request in requests]
    ids = iter(self.tokens.prompts([text for some in asked for text in some]))
    return [
        Questions(
            prompts=[(t, Prompt(tuple(next(ids).tolist()))) for t in some]
        )
        for some in asked
    ]

  def judge(
      self,
      requests: Sequence[EditRequest],
      replies: Sequence[base.Replies],
      before: Any,
  ) -> list[Judged]:
    del before
    flat = [tokens for reply in replies for tokens in reply.tokens]
    said = iter(base.texts(self.tokens.tokenizer, flat))
    found = []
    for request, reply in zip(requests, replies):
      text, *more = [next(said) for _ in reply.tokens]
      target = request.target
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


def stop_ids(tokenizer: Any, vocab: int) -> tuple[int, ...]:
  """Lists the tokens that end a free generation.

  Args:
    tokenizer: a transformers tokenizer.
    vocab: rows of the model's embedding; ids from there up cannot occur.

  Returns:
    Ids of the end-of-text token and of every token whose text holds a full stop
    or a line break.
  """
  size = min(len(tokenizer), vocab)
  texts = tokenizer.batch_decode(
      [[token] for token in range(size)], clean_up_tokenization_spaces=False
  )
  stops = {i for i, t in enumerate(texts) if any(end in t for end in _ENDS)}
  if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < vocab:
    stops.add(tokenizer.eos_token_id)
  return tuple(sorted(stops))


def _asked(request: EditRequest) -> list[str]:
  rephrases = request.probes_of(REPHRASE)[:1]
  return [request.question, *(probe.prompt for probe in rephrases)]
