"""Token ids of texts, each text tokenised once.

What is edited is asked again before and after the edit, and checked before
both: all of them share one cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jaxedit.text import locate
from jaxedit.text.chat import special_tokens
from jaxedit.text.joining import continuation


class TokenCache:
  """Tokenises like `locate`, and remembers.

  Attributes:
    tokenizer: a fast transformers tokenizer.
  """

  def __init__(self, tokenizer: Any):
    self.tokenizer = tokenizer
    self._known: dict[Hashable, dict[Any, Any]] = {}

  def prompts(
      self, texts: Sequence[str], double_bos: bool = False
  ) -> list[np.ndarray]:
    """See `locate.encode_prompts`."""
    if double_bos:
      return locate.encode_prompts(self.tokenizer, texts, True)
    return self._look_up(locate.encode_prompts, texts)

  def targets(self, targets: Sequence[locate.Continued]) -> list[np.ndarray]:
    """See `locate.encode_targets`."""
    texts = [continuation(*one, self.special) for one in targets]
    found = self._look_up(locate.encode_continuations, texts)
    return [one.ids for one in found]

  @functools.cached_property
  def special(self) -> tuple[str, ...]:
    """Texts of the tokenizer's special tokens."""
    return special_tokens(self.tokenizer)

  @functools.cached_property
  def unknown(self) -> int:
    """Id of what the tokenizer has no token for; -1 where it has all."""
    found = getattr(self.tokenizer, 'unk_token_id', None)
    names = ('bos_token_id', 'eos_token_id')
    others = [getattr(self.tokenizer, name, None) for name in names]
    return -1 if found is None or found in others else found

  def subjects(
      self, cases: Sequence[tuple[str, str, str]]
  ) -> list[tuple[np.ndarray, tuple[int, int] | None]]:
    """See `locate.locate_subjects`."""
    return self._look_up(locate.locate_subjects, cases)

  def known(self, settings: Hashable) -> dict[Any, Any]:
    """Returns what is kept under some settings, to read and to add to."""
    return self._known.setdefault(settings, {})

  def _look_up(
      self, encode: Callable[[Any, Sequence[Any]], list[Any]], items: Any
  ) -> list[Any]:
    known = self.known(encode)
    new = list(dict.fromkeys(item for item in items if item not in known))
    known.update(zip(new, encode(self.tokenizer, new)))
    return [known[item] for item in items]


def token_cache(tokenizer: Any) -> TokenCache:
  """Returns a tokenizer's cache; one that is a cache already is kept."""
  return (
      tokenizer if isinstance(tokenizer, TokenCache) else TokenCache(tokenizer)
  )
