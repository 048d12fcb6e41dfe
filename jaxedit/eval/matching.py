"""Whether a text is, or contains, the words of another, in any script.

  words(text)    NFKC, lower case; apostrophes dropped, other punctuation turned
                 into spaces; a, an, the dropped. Where a script has no blanks,
                 each character is a word, and so is an emoji
  exact_match    words(text) = words(target)
  contains       words(target) is a run of consecutive words of words(text);
                 what an apostrophe cuts off ("London's", "l'Italie") and Korean
                 particles may be attached

Source: the normalised match of EasyEdit (Wang et al. 2023, arXiv 2308.07269).
Punctuation becomes a space here, where theirs joins the words around it.
Inflected forms ("Moskvy" of "Moskva") do not match.
"""

from __future__ import annotations

import re
import unicodedata

from jaxedit.text import scripts

_ARTICLES = ('a', 'an', 'the')
_APOSTROPHES = "'\u2019\u02bc"
# A negation belongs to its verb: "can't" does not contain "can".
_ATTACHED = re.compile(f'(?<=\\w)(?<!n(?=.t\\b))[{_APOSTROPHES}](?=\\w)')
# What follows a Korean noun without a blank: particles, forms of the copula.
_PARTICLES = re.compile(
    '(?:가|이|은|는|을|를|의|에|도|만|로|으로|와|과|랑|이랑|나|이나|야|아|께|께서'
    '|한테|에게|에서|부터|까지|처럼|보다|마다|조차|밖에|라고|이라고|라는|이라는'
    '|이란|란|이며|며|이고|고|이자|이다|다|입니다|이에요|예요|이었다|였다'
    '|이었습니다|였습니다|이지만|지만|라|이라){1,3}'
)


def words(text: str, articles: bool = False) -> list[str]:
  """Normalises a text for comparison.

  Args:
    text: any text.
    articles: whether to keep a, an and the.

  Returns:
    Its words, see the module head.
  """
  text = scripts.strip_invisible(unicodedata.normalize('NFKC', text).lower())
  for mark in _APOSTROPHES:
    text = text.replace(mark, '')
  is_mark = lambda char: unicodedata.category(char).startswith('P')
  found = scripts.pieces(text, lambda char: not is_mark(char))
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
  cut = [_ATTACHED.sub(' ', one) for one in (text, target)]
  return _has_run(*_pair(text, target)) or _has_run(*_pair(*cut))


def _has_run(said: list[str], wanted: list[str]) -> bool:
  size = len(wanted)
  windows = (said[i : i + size] for i in range(len(said) - size + 1))
  return bool(wanted) and any(
      window[:-1] == wanted[:-1] and _is_noun(window[-1], wanted[-1])
      for window in windows
  )


def _is_noun(word: str, noun: str) -> bool:
  """Whether a word is a noun, with Korean particles or without."""
  if not word.startswith(noun):
    return False
  return word == noun or bool(_PARTICLES.fullmatch(word, len(noun)))
