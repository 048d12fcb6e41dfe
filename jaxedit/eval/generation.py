"""What an edited model says by itself, and whether that is the new object.

The continuation is the model's own: greedy, from the bare prompt, and ended by
the model alone, at its end-of-text token or at the first token whose text holds
a full stop or a line break. Nothing of the target is shown to it, neither its
tokens nor its length. A prompt that the model continues with more than the
object is the rule for clozes ("... was born in the country of" -> "France and
grew up in"), so `exact_match` is strict for them: a correct edit may well fail
it, and `contains` is the one to read. Targets that hold a full stop inside
("St. Louis") are cut short at it and can fail both.

  words(text)    NFKC, lower case; apostrophes dropped, other punctuation turned
                 into spaces; a, an, the dropped
  exact_match    words(text) = words(target)
  contains       words(target) is a run of consecutive words of words(text)

Source: the stop rule and the normalised match follow the judged generation of
EasyEdit (Wang et al. 2023, arXiv 2308.07269), without its judge and without a
chat template. Punctuation becomes a space here, where theirs joins the words
around it.

Not here: answers of any length (`answers`), fluency, perplexity.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from jaxedit.edited.lm import LanguageModel
from jaxedit.eval import answers

# As long as an object and the end of its clause; the text usually ends earlier.
MAX_NEW_TOKENS = 16
_ENDS = ('.', '\n')
_ARTICLES = ('a', 'an', 'the')
_APOSTROPHES = "'\u2019\u02bc"


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


def free_generation(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    stop: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    **settings: Any,
) -> list[str]:
  """Lets a model continue prompts until it stops by itself.

  Args:
    lm: the model.
    prompts: token ids, BOS included where the model wants one.
    tokenizer: turns the new tokens into text.
    stop: tokens that end a text, see `stop_ids`.
    max_new_tokens: tokens at most.
    **settings: of `LanguageModel.generate`.

  Returns:
    The new text of every prompt with the token that ended it, without special
    tokens and surrounding white space.

  Raises:
    InputError: see `LanguageModel.generate`.
  """
  tokens = lm.generate(
      prompts, stop_ids=stop, max_new_tokens=max_new_tokens, **settings
  )
  return answers.texts(tokenizer, tokens)


def words(text: str, articles: bool = False) -> list[str]:
  """Normalises a text for comparison.

  Args:
    text: any text.
    articles: whether to keep a, an and the.

  Returns:
    Its words, see the module head.
  """
  text = unicodedata.normalize('NFKC', text).lower()
  for mark in _APOSTROPHES:
    text = text.replace(mark, '')
  spaced = (
      ' ' if unicodedata.category(char).startswith('P') else char
      for char in text
  )
  found = ''.join(spaced).split()
  return found if articles else [w for w in found if w not in _ARTICLES]


def _pair(text: str, target: str) -> tuple[list[str], list[str]]:
  """Words of both; a target that is an article keeps its articles."""
  keep = not words(target)
  return words(text, keep), words(target, keep)


def exact_match(text: str, target: str) -> bool:
  """Says whether a text is the target, after normalisation.

  Args:
    text: what the model said.
    target: what it should say; one without any word is never matched.
  """
  said, wanted = _pair(text, target)
  return bool(wanted) and said == wanted


def contains(text: str, target: str) -> bool:
  """Says whether the target's words stand in a text, next to each other.

  Args:
    text: what the model said.
    target: what it should say; one without any word is never contained.
  """
  said, wanted = _pair(text, target)
  size = len(wanted)
  windows = (said[i : i + size] for i in range(len(said) - size + 1))
  return bool(wanted) and any(window == wanted for window in windows)
