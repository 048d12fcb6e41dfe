"""Whether a text is, or contains, the words of another.

  words(text)    NFKC, lower case; apostrophes dropped, other punctuation turned
                 into spaces; a, an, the dropped
  exact_match    words(text) = words(target)
  contains       words(target) is a run of consecutive words of words(text)

Source: the normalised match of EasyEdit (Wang et al. 2023, arXiv 2308.07269).
Punctuation becomes a space here, where theirs joins the words around it.
"""

from __future__ import annotations

import unicodedata

_ARTICLES = ('a', 'an', 'the')
_APOSTROPHES = "'\u2019\u02bc"


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
