"""Where the subject stands in a prompt: '{}' or the subject written out.

  The {} is in   +  Eiffel Tower     '{}' goes where the subject does
  The Eiffel Tower is in             its first occurrence as a whole word does

'{{}}' stands for a pair of braces that is part of the text, as in code. A '{}'
beside a subject that is written out may be either: it is refused where the
subject comes first, as no prompt names its subject and then refers to it by a
placeholder, and where '{}' stands in quotes or brackets.

A subject that is written with other quotes, blanks or in another Unicode form
than in the prompt is found, and then edited as the prompt has it; so is a
capital letter at the prompt's beginning. Other differences of case are errors.

Not here: tokens of the subject (see `locate`).
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from typing import NamedTuple

from jaxedit.text import scripts
from jaxedit.text.joining import trim_prompt
from jaxedit.types import LOCALITY, Probe, cloze_parts

PLACEHOLDER = '{}'
_ESCAPED = '{{}}'
_QUOTES = str.maketrans(
    '\u2018\u2019\u201a\u201b\u02bc\u2032\u201c\u201d\u201e\u201f\u2033',
    "''''''\"\"\"\"\"",
)
_INVISIBLE = '\u200b\u2060\ufeff\u00ad'


class Cloze(NamedTuple):
  """A prompt with one '{}', what goes there, and what is wrong with them."""

  prompt: str
  subject: str
  errors: tuple[str, ...] = ()


def resolve(prompt: str, subject: str) -> Cloze:
  """Finds the place of a subject in a prompt; see the module head.

  Args:
    prompt: with '{}', or with the subject written out.
    subject: the subject; white space around it is dropped.

  Returns:
    The cloze, without blanks at its end. With errors the rest means nothing;
    no error is told of an empty text.
  """
  given, subject, prompt = subject, _strip(subject), trim_prompt(prompt)
  if not prompt.strip() or not subject:
    return Cloze(prompt, subject)
  if PLACEHOLDER in subject and subject in prompt:
    before, _, after = prompt.partition(subject)
    prompt = before + PLACEHOLDER + after
  parts = cloze_parts(prompt)
  if len(parts) == 1:
    return _find(prompt, subject)
  error = ''
  if len(parts) > 2:
    error = (
        f"the prompt has {len(parts) - 1} placeholders; write '{{}}' once,"
        f" where the subject goes, and '{_ESCAPED}' for braces that are part"
        ' of the text.'
    )
  elif _is_braces(*parts, subject):
    error = (
        f"the prompt {prompt!r} has '{{}}' and the subject {subject!r}"
        f" written out as well; write '{_ESCAPED}' for braces that are part"
        " of the text, or '{}' at the subject's first place alone."
    )
  if error:
    return Cloze(prompt, subject, (error,))
  before, after = parts
  # White space that a subject brought parted it from what stands beside it.
  begin = given.find(subject)
  if begin and _joined(before[-1:], subject[0]):
    before += ' '
  if begin + len(subject) < len(given) and _joined(subject[-1], after[:1]):
    after = ' ' + after
  return Cloze(PLACEHOLDER.join(map(_escape, (before, after))), subject)


def fill(probe: Probe, subject: str) -> tuple[Probe, list[str]]:
  """Puts the subject in place of the '{}' of a probe.

  Args:
    probe: as a rule without '{}'; a locality probe is about another subject.
    subject: the subject.

  Returns:
    (the probe with '{{}}' as braces, what is wrong with it).
  """
  parts = cloze_parts(probe.prompt)
  found = None
  if probe.kind == LOCALITY and len(parts) > 1:
    found = "has '{}' but is about another subject; write that out"
  elif len(parts) > 2:
    found = "has '{}' more than once; write it once, for the subject"
  elif len(parts) == 2 and _is_braces(*parts, subject):
    found = "has the subject written out as well; write '{}' at one place"
  if found is None:
    prompt = subject.strip().join(parts)
    return dataclasses.replace(probe, prompt=prompt), []
  return probe, [
      f'the {probe.kind} prompt {probe.prompt[:60]!r} {found},'
      f" or '{_ESCAPED}' for braces that are part of the text."
  ]


def make_cloze(prompt: str, subject: str) -> str | None:
  """Puts '{}' at the first place where the subject stands as a whole word.

  The first place is taken because prompts open with their subject or name it
  once; text after it ("..., the") can only refer back.

  Args:
    prompt: text with the subject filled in.
    subject: text to look for, case-sensitive.

  Returns:
    The prompt with '{}' there, or None where the subject is absent or occurs
    only inside longer words.
  """
  at = prompt.find(subject)
  while subject and at >= 0:
    end = at + len(subject)
    if _is_whole(prompt, at, end):
      return prompt[:at] + PLACEHOLDER + prompt[end:]
    at = prompt.find(subject, at + 1)
  return None


def plain_form(text: str, case: bool = False) -> str:
  """Returns a text in one Unicode form, with plain quotes and single blanks.

  Args:
    text: any text.
    case: whether to drop case as well.
  """
  if text.isascii():
    text = re.sub(r'\s+', ' ', text)
    return text.casefold() if case else text
  return _plain_form(text, case)[0]


def _find(prompt: str, subject: str) -> Cloze:
  """Looks for a subject that is written out, as it is or nearly so."""
  cloze = make_cloze(prompt, subject)
  if cloze is not None:
    return Cloze(cloze, subject)
  for case in (False, True):
    span = _search(prompt, subject, case)
    if span is None:
      continue
    begin, end = span
    same = plain_form(prompt[begin + 1 : end]) == plain_form(subject[1:])
    if not case or (begin == 0 and same):
      cloze = prompt[:begin] + PLACEHOLDER + prompt[end:]
      return Cloze(cloze, prompt[begin:end])
    error = (
        f'the subject {subject!r} stands in the prompt as'
        f' {prompt[begin:end]!r}, in other case; write both alike.'
    )
    return Cloze(prompt, subject, (error,))
  where = 'only inside a longer word' if subject in prompt else 'nowhere'
  error = (
      f'the subject {subject!r} is {where} in the prompt {prompt!r}; write'
      " '{}' where the subject goes, or the subject as it stands there."
  )
  return Cloze(prompt, subject, (error,))


def _search(prompt: str, subject: str, case: bool) -> tuple[int, int] | None:
  """Returns the span of a subject that differs in what `plain_form` drops."""
  text, spans = _plain_form(prompt, case)
  wanted, _ = _plain_form(subject, case)
  at = text.find(wanted)
  while at >= 0:
    begin, end = spans[at][0], spans[at + len(wanted) - 1][1]
    if _is_whole(prompt, begin, end):
      return begin, end
    at = text.find(wanted, at + 1)
  return None


def _plain_form(text: str, case: bool) -> tuple[str, list[tuple[int, int]]]:
  """Returns what `plain_form` does, and the span of each of its characters."""
  out: list[str] = []
  spans: list[tuple[int, int]] = []
  begin = 0
  while begin < len(text):
    end = begin + 1
    while end < len(text) and _extends(text[end]):
      end += 1
    unit = unicodedata.normalize('NFC', text[begin:end]).translate(_QUOTES)
    unit = ''.join(char for char in unit if char not in _INVISIBLE)
    if unit.isspace():
      unit = ' '
    if unit == ' ' and out and out[-1] == ' ':
      spans[-1] = spans[-1][0], end
      unit = ''
    for char in unit.casefold() if case else unit:
      out.append(char)
      spans.append((begin, end))
    begin = end
  return ''.join(out), spans


def _extends(char: str) -> bool:
  """Whether a character completes the one before: a mark, a Hangul vowel."""
  return unicodedata.category(char)[0] == 'M' or '\u1160' <= char <= '\u11ff'


def _is_braces(before: str, after: str, subject: str) -> bool:
  """Whether '{}' may be part of the text, the subject being written out."""
  if make_cloze(before, subject) is not None:
    return True
  if before[-1:] not in tuple('"\'`([{<'):
    return False
  closed = after[:1] in tuple('"\'`)]}>,')
  return closed and make_cloze(after, subject) is not None


def _escape(text: str) -> str:
  return text.replace(PLACEHOLDER, _ESCAPED)


def _strip(subject: str) -> str:
  text = subject.strip().strip(_INVISIBLE)
  return text if text == subject else _strip(text)


def _is_whole(text: str, begin: int, end: int) -> bool:
  """Whether a part of a text is no part of a longer word."""
  return not (
      _joined(text[begin - 1 : begin] if begin else '', text[begin])
      or _joined(text[end - 1], text[end : end + 1])
  )


def _joined(left: str, right: str) -> bool:
  """Whether two neighbouring characters belong to one word."""
  if not left or not right:
    return False
  if unicodedata.category(right)[0] == 'M':  # an accent on the left character
    return True
  return _in_word(left) and _in_word(right)


def _in_word(char: str) -> bool:
  if unicodedata.east_asian_width(char) in 'WF' or scripts.is_unspaced(char):
    return False
  return char == '_' or unicodedata.category(char)[0] in 'LMN'
