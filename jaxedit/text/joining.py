"""Whether a blank stands between a prompt and what continues it.

A text is taken as it is written. Only where neither the prompt ends nor the
target begins with white space has something to be decided:

  no blank   where the script has none: the target is Chinese, Japanese, Thai, ...
             and so is some of the prompt; behind wide punctuation
             behind an open quote or bracket, a hyphen, a currency sign, and
             what code goes on from: 'pd.' 'std::' '->' '_' '/' '@' '#'
             behind a special token, e.g. the end of a chat's turn
             before punctuation that clings to the word in front: ', which', "'s"
  a blank    everywhere else

An edit or a probe may say so itself, see `EditRequest.space`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from jaxedit.text.scripts import is_unspaced

# What makes a last line, or a target, code: 'df = pd.' but not 'in St.'
_CODE = re.compile(r'[={}\[\]_;]|\w\(|->|::')
_OBJECT = re.compile(r'[\w)\]]\.$', re.ASCII)
_NAME = re.compile(r'[A-Za-z_]\w*(?:$|[(\[.;,)=])', re.ASCII)
_GLUES_AFTER = re.compile(
    r'(?:::|->|[\w)\]][-\u2010]|\d\u2013|\S[/\\]|[A-Za-z0-9]_|(?<!\w)[@#~])$'
)
# Points cling where nothing, white space or more of the kind follows: not .NET.
_CLINGS = re.compile(
    r'[,;:!?.]+(?:$|[\s"\'\u2019\u201d)\]])|[)\]}%](?![\w])|\u2026|\u2019'
    r"|['\u2019](?:s|re|ve|ll|d|m|t)\b"
)


def trim_prompt(prompt: str) -> str:
  """Drops blanks at the end of a prompt; line breaks are part of the text.

  Args:
    prompt: a text that will be continued.
  """
  stripped = prompt.rstrip()
  return prompt if _breaks(prompt[len(stripped) :]) else stripped


def trim_target(target: str) -> str:
  """Drops white space around a target, but not line breaks that it begins with.

  Args:
    target: a text that continues a prompt.
  """
  stripped, target = target.strip(), target.rstrip()
  return target if _breaks(target[: len(target) - len(stripped)]) else stripped


def continuation(
    prompt: str,
    target: str,
    space: bool | None = None,
    special: Sequence[str] = (),
) -> str:
  """Returns what follows a prompt: the target, with a blank or without.

  Args:
    prompt: the text in front, of which the end counts.
    target: the text that continues it; white space alone is no text.
    space: whether there is a blank; as the text asks for unless given.
    special: texts of special tokens.

  Returns:
    The target, behind one blank where there is to be one and neither text
    brings white space.
  """
  if not target.strip():
    return ''
  if target[0].isspace() or prompt[-1:].isspace() or space is False:
    return target
  if space is None and not _wants_blank(prompt, target, tuple(special)):
    return target
  return ' ' + target


def _breaks(text: str) -> bool:
  return '\n' in text or '\r' in text


def _wants_blank(prompt: str, target: str, special: tuple[str, ...]) -> bool:
  return not prompt or not (
      prompt.endswith(special)
      or _CLINGS.match(target)
      or _has_no_blanks(prompt, target)
      or _is_open(prompt)
      or _is_code(prompt, target)
  )


def _has_no_blanks(prompt: str, target: str) -> bool:
  """Whether a blank would be foreign to the scripts of both texts."""
  if _is_wide_mark(prompt[-1]) or (
      _is_wide_mark(target[0]) and unicodedata.category(target[0]) != 'Ps'
  ):
    return True
  first = next(filter(str.isalpha, target), '')
  if not first:  # digits, marks: those of the script in front
    if target[0].isascii() and not target[0].isdigit():
      return False
    first = next(filter(str.isalpha, reversed(prompt)), '')
  return bool(first) and is_unspaced(first) and any(map(is_unspaced, prompt))


def _is_wide_mark(char: str) -> bool:
  wide = unicodedata.east_asian_width(char) in 'WF'
  return wide and unicodedata.category(char)[0] == 'P'


def _is_open(prompt: str) -> bool:
  """Whether a text ends in a quote or bracket that is open, or in a currency."""
  last, before = prompt[-1], prompt[-2:-1]
  if last in '"\'`':
    # One behind a letter closes, or is an apostrophe.
    line = prompt.rsplit('\n', 1)[-1]
    odd = last == "'" or line.count(last) % 2 == 1
    return odd and not (before.isalnum() or before in (*'.!?)', last))
  if last == '$' and prompt.count(last) % 2 == 0:  # a formula ends
    return False
  return unicodedata.category(last) in ('Ps', 'Pi', 'Sc')


def _is_code(prompt: str, target: str) -> bool:
  """Whether a text ends in something that code goes on from at once."""
  if _GLUES_AFTER.search(prompt):
    return True
  line = prompt.rsplit('\n', 1)[-1]
  return bool(
      _OBJECT.search(prompt)
      and _NAME.match(target)
      and (_CODE.search(line) or _CODE.search(target))
  )
