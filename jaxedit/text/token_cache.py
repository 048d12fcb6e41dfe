"""Token ids of texts, each text tokenised once.

What is edited is asked again before and after the edit, and checked before
both: all of them share one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jaxedit.text import locate


class TokenCache:
  """Tokenises like `locate`, and remembers.

  Attributes:
    tokenizer: a fast transformers tokenizer.
  """

  def __init__(self, tokenizer: Any):
    self.tokenizer = tokenizer
    self._known: dict[Hashable, dict[Any, Any]] = {}

  def prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `locate.encode_prompts`."""
    return self._look_up(locate.encode_prompts, texts)

  def targets(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `locate.encode_targets`."""
    return self._look_up(locate.encode_targets, texts)

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
