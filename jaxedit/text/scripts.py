"""Which characters belong together, in any script.

Some scripts are written without blanks between words: Chinese, Japanese, Thai,
Lao, Khmer, Myanmar, Tibetan and a few more. A character there, with the marks
on it, is the smallest unit that texts can be compared by without a dictionary;
so is an emoji. Everywhere else it is the word.

Ranges are blocks of the Unicode Standard, version 15.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_UNSPACED = re.compile(
    '[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df'
    '\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029'
    '\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff'
    '\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f'
    '\U0001b000-\U0001b16f\U00020000-\U0003ffff]'
)
_EMOJI = re.compile('[\u2600-\u27bf\U0001f000-\U0001f3fa\U0001f400-\U0001faff]')
_SKIN_TONE = re.compile('[\U0001f3fb-\U0001f3ff]')
_JOINER = '\u200d'
_JOINERS = ('\u200c', _JOINER)


def is_unspaced(char: str) -> bool:
  """Whether a character's script has no blanks between words."""
  return bool(_UNSPACED.match(char))


def is_word(char: str) -> bool:
  """Whether a character is a letter, a mark, a digit or an emoji."""
  return unicodedata.category(char)[0] in 'LMN' or bool(_EMOJI.match(char))


def strip_invisible(text: str) -> str:
  """Drops characters that only direct how a text is drawn or broken.

  Args:
    text: any text; joiners, which tell words and emoji apart, stay.
  """
  return ''.join(
      char
      for char in text
      if not '\ufe00' <= char <= '\ufe0f'
      and (unicodedata.category(char) != 'Cf' or char in _JOINERS)
  )


def pieces(
    text: str, keep: Callable[[str], bool] = lambda char: True
) -> list[str]:
  """Splits a text into what is compared: words, characters, emoji.

  Args:
    text: any text.
    keep: characters for which it is False separate, like white space.

  Returns:
    Words of scripts with blanks whole; of other scripts each character with the
    marks on it; each emoji with what modifies it.
  """
  found, open_word, joined = [], False, False
  for char in text:
    extends = (
        unicodedata.category(char)[0] == 'M'
        or char in _JOINERS
        or _SKIN_TONE.match(char)
    )
    single = is_unspaced(char) or _EMOJI.match(char)
    if found and found[-1] and (extends or (joined and single)):
      found[-1] += char
    elif char.isspace() or not keep(char):
      found.append('')
      open_word = False
    elif open_word and not single:
      found[-1] += char
    else:
      found.append(char)
      open_word = not single
    joined = char == _JOINER
  return [piece for piece in found if piece]
