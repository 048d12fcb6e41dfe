"""What a tokenizer.json may ask for: nothing whose time or memory runs away.

Its patterns are matched by a backtracking engine inside the tokenizers library,
which cannot be stopped. A pattern takes exponential time where a repeated group
can match one text in several ways, as in (a+)+ or (a|aa)*. The rule here is
stricter and simple: inside a group that is repeated there is an alternative nor a
repetition of varying length. The patterns of all published tokenizers that we know
obey it. Three unbounded repetitions in one
alternative remain possible, whose time grows with the cube of a text at most;
more are refused.

Replacements in a row can multiply a text, so the product of their growths is
bounded too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

_MOST_PATTERN = 10_000  # characters of a pattern
_ENDLESS = 100  # repetitions that count as without bound
_MOST_REPEATS = 3  # without bound, in one alternative
_MOST_GROWTH = 1000  # of a text by all replacements together

# An escape, a set of characters, an opening, a repetition, or any character.
_PIECE = re.compile(
    r'\\[pPu]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]'
    r'|\((?:\?(?:[imsx-]+:|<?[=!]|[:>]|<\w+>|[imsx-]+(?=\))|\#[^)]*))?'
    r'|[*+?][+?]?|\{\d*,?\d*\}[+?]?|.',
    re.DOTALL,
)
_COUNT = re.compile(r'\{(\d*)(,?)(\d*)\}')


def errors(settings: Any) -> list[str]:
  """Finds patterns and replacements that could run away.

  Args:
    settings: the parsed tokenizer.json.

  Returns:
    Messages.
  """
  if not isinstance(settings, dict):
    return []
  found, growth = [], 1
  for part, value in settings.items():
    if part == 'model':  # its vocabulary holds no pattern
      continue
    for node in _objects(value):
      pattern = node.get('Regex')
      if isinstance(pattern, str) and (reason := _runs_away(pattern)):
        found.append(
            f'the pattern {pattern[:100]!r} of {part} {reason},'
            ' so that some texts would take forever; write it without, or use'
            ' another tokenizer.'
        )
      for name in ('content', 'prepend'):
        if isinstance(node.get(name), str) and part in (
            'normalizer', 'pre_tokenizer'
        ):  # fmt: skip
          growth *= max(1, len(node[name]))
          growth = min(growth, 10 * _MOST_GROWTH)
  if growth > _MOST_GROWTH:
    found.append(
        'its replacements could make a text more than'
        f' {_MOST_GROWTH} times as long; use another tokenizer.'
    )
  return found


def _objects(value: Any) -> Iterator[dict[str, Any]]:
  """Yields all objects of a JSON value."""
  waiting = [value]
  while waiting:
    node = waiting.pop()
    if isinstance(node, dict):
      yield node
      waiting += node.values()
    elif isinstance(node, list):
      waiting += node


@dataclasses.dataclass
class _Group:
  """A group of a pattern that is being read.

  Attributes:
    start: repetitions before it, in the alternative it stands in.
    most: repetitions at the end of the worst of its alternatives so far.
    varies: whether it can match one text in several ways: an alternative, or a
      repetition of varying length.
  """

  start: int = 0
  most: int = 0
  varies: bool = False


def _runs_away(pattern: str) -> str:
  """Says why a pattern may take exponential time; '' if it does not."""
  if len(pattern) > _MOST_PATTERN:
    return f'has {len(pattern)} characters'
  groups, repeats, closed = [_Group()], 0, None
  for piece in _PIECE.findall(pattern):
    group, last, closed = groups[-1], closed, None
    if piece[:2] in ('\\g', '\\k'):
      return 'refers to a part of itself'
    if piece[0] == '(' and not piece.startswith('(?#'):
      groups.append(_Group(repeats))
    elif piece == ')' and len(groups) > 1:
      closed = groups.pop()
      repeats = max(repeats, closed.most)
      groups[-1].varies |= closed.varies  # as does the one around it
    elif piece == '|':
      group.varies, group.most = True, max(group.most, repeats)
      repeats = group.start
    elif piece[0] in '*+?{' and (len(piece) > 1 or piece in '*+?'):
      low, high = _count(piece)
      if high > 1 and last and last.varies:
        return 'repeats what can be matched in several ways'
      repeats += high > _ENDLESS
      if repeats > _MOST_REPEATS:
        return f'has more than {_MOST_REPEATS} repetitions in a row'
      group.varies |= low != high
  return ''


def _count(piece: str) -> tuple[float, float]:
  """The least and the most repetitions that a piece asks for."""
  if piece[0] in '*+':
    return float(piece[0] == '+'), math.inf
  if piece[0] == '?':
    return 0, 1
  low, comma, high = _COUNT.match(piece).groups()
  low = float(low or 0)
  return low, float(high or math.inf) if comma else low
