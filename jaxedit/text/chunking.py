"""Cuts a long target into chunks whose states are optimised one by one.

With windows, chunk k of a target of n tokens is

  [k s, min(k s + w, n)),   s = w - o   (window w, overlap o, stride s)

and the first chunk that reaches n is the last one, so that every chunk adds a
token. Published code goes on while k s < n; a tail no longer than the overlap
then becomes a chunk without a new token, whose labels are shifted by one.

With sentences, a text is cut where a reader would: at ends of sentences, of
list items, of lines of verse and of lines of code, and never inside a formula
or an environment of LaTeX that fits in a window. Of those that do not, lines stay
whole. What is longer than a window falls back to windows; short neighbours are
put together as long as they fit in one.

With surprise, chunks begin where the unedited model expects the text least
(`surprise_spans`); who has the model cuts, as `chunk` leaves the text whole.

Source: AnyEdit (Jiang et al. 2025, arXiv 2502.05628), windows of 40 or 50
tokens without overlap; AnyEdit++ (arXiv 2606.01053) for surprise. The sentences are our own rules: no model, no word
lists beyond the abbreviations below.

It knows character offsets, no tokenizer, and does not parse languages: code and
verse are told by the looks of their lines.
"""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxedit.types import InputError

Span = tuple[int, int]

BOUNDARIES = ('window', 'sentence', 'surprise')

# Marks that end a sentence whatever follows: full stops of scripts that use
# them for nothing else.
_PLAIN = '。｡！？।॥؟۔։።፧။។៕'
_CLOSERS = r'"\'”’»›)\]}」』）】》*_'
_OPENERS = '"\'“‘«‹„([{「『（【《*_¿¡-–—•# \t\r\n'
_MARK = re.compile(rf'(?:[.!?…]+|[{_PLAIN}]+)[{_CLOSERS}]*')
_BREAK = re.compile(r'(?:\s*\Z|\s*\n)?')
# The word before a full stop.
_WORD = re.compile(r'[^\s()\[\]{}"“”‘«»/*—–-]*$')
_DOTTED = re.compile(r'(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}')
_NUMBERING = re.compile(r'[\W_]*(?:\d{1,3}|[^\W\d_]|[ivxIVX]{2,4})')
_NUMBERED_AFTER = re.compile(r'[:;]\s+[*_(]*(?:\d{1,2}|[a-z])$')
# Abbreviations before names, before numbers, and those that may end a sentence.
_TITLES = frozenset(
    'Mr Mrs Ms Dr Prof Gen Col Lt Capt Sgt Cmdr Adm Rep Sen Gov Pres Rev Hon St'
    ' Mt Ft Messrs Mme Mlle Hr Fr Sr Sra Dra vs cf viz approx resp bzw ca e.g'
    ' i.e z.B d.h'.split()
)
_COUNTED = frozenset(
    'no nos nr fig figs eq eqs sec ch vol art p pp pt c jan feb mar apr jun jul'
    ' aug sep sept oct nov dec'.split()
)
_OPEN = frozenset('inc ltd co corp jr etc al usw dept est univ ave'.split())
# Words that begin a sentence even after an abbreviation.
_STARTERS = frozenset(
    'The A An It He She They We You I This That These Those There Here In On At'
    ' By For From With As But And So If When While After Before Since However'
    ' Its His Her Their Our My One Some Many Most Such What Who How Why Where'
    ' Then Thus Therefore Now First Finally Although Because During Note Let To'
    ' Is Are Each Every Both Also Given Next Another'.split()
)

_LINE_END = re.compile(r'\s*\n')
_FENCE = re.compile(r'\s*(?:```|~~~)')
_ITEM = re.compile(
    r'\s*(?:[-*+•–]|\(?\d{1,3}[.)]|\(?[a-zA-Z]\)|\(?[ivx]+[.)]|#+)\s'
)
# A comment at the head of a line is told from a heading by the code around it.
_COMMENT = re.compile(r'\s*(?:#+|--|;+|%+)\s')
# A block of text in code, not a word in bold: it opens and ends a line.
_QUOTED = re.compile(
    r'(?ms)^[ \t]*(?:[\w.]+[ \t]*=[ \t]*|return[ \t]+)?[rRuUbBfF]*'
    r'("""|\'\'\').*?\1[ \t]*$'
)
_ENVIRONMENT = re.compile(r'\\(begin|end)\{([^}]*)\}')
# Formulas and code inside a line. An amount of money is no formula: a closing
# dollar follows no space and stands before no digit.
_PROTECTED = re.compile(
    r'(?s)\\\[(?:(?!\n\s*\n).)*?\\\]'
    r'|\\\((?:(?!\n\s*\n).)*?\\\)'
    r'|\$\$(?:(?!\n\s*\n).)+?\$\$'
    r'|(?<![\\$\w])\$(?=[^\s$])[^$\n]*?(?<=[^\s\\])\$(?![\d$])'
    r'|(?<!`)`[^`\n]+`(?!`)'
)
_CODE = re.compile(r"""(?x)\s*(?:
      (?:async\s+)?(?:def|class|func|fn|struct|enum|interface)\s+\w.*[:({;]\s*
    | (?:public|private|protected|static|void|int|float|double|char|bool|auto
        |const|let|var|template|using|namespace|package)\b.*[({;=>,\])]\s*
    | function\b.*[({]\s*
    | import\s+[\w.,{}*\s'"]+(?:\s+as\s+\w+|\s+from\s+\S+)?;?\s*
    | from\s+[\w.]+\s+import\s.*
    | (?:if|elif|else|for|while|try|except|finally|with|switch|case|do)\b
        .*[:{]\s*(?:\#.*|//.*)?
    | (?:return|yield|raise|throw|assert|del|print|echo)\b(?!.*[a-z]\.$).*
    | [a-z_]+\s+(?:"[^"]*"|'[^']*')
    | (?:break|continue|pass|else|do|then|fi|done|end)\b;?\s*
    | (?:SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE|JOIN|GROUP\ BY)\s.*
    | \#\s*(?:include|define|ifdef|ifndef|endif|pragma|!)\b.*
    | (?://|/\*|\*/|<!--|>>>|\$\s|@\w).*
    | </?[a-zA-Z][^>]*>.*
    | "[^"]*"\s*:.*
    | (?![^"'\#]*[\w)][.!?]\s+[A-Z][\w']*\s+\S)
      [\w.\[\]'"()*&,]+(?:\s+[\w.\[\]'"()*&,]+){0,2}
        \s*(?:[-+*/%|&^:]|<<|>>|//|\*\*)?=(?!=)\s*\S.*
    | [\w.:>-]+\([^()]*(?:\([^()]*\)[^()]*)*\)[\w.()]*\s*;?\s*
    | [)\]}].*
    | (?=.*[=()\[\]<>]).*[;{}]\s*
    | \S+(?:\s\S+){0,2}[;{}]\s*
    )""")
_INDENTED = re.compile(r' {4}|[ ]*\t')
_PROSE = re.compile(r'\s*["“(]?[^\W\d_a-z][^={};_\[\]]*[.!?:]["”)]?')

# Columns of the longest line that is taken for verse, an East Asian character
# counting two, and of the narrowest prose that is broken into lines.
_VERSE = 60
_WRAP = 50
# Characters around a mark that decide about it.
_SIGHT = 80


class Chunking(NamedTuple):
  """How targets are cut.

  Attributes:
    window: tokens of a chunk at most; with 'sentence', without the overlap; with
      'surprise', on average. 40 is AnyEdit's for Llama 3, 50 for Qwen 2.5.
    overlap: tokens that a chunk repeats of the one before it.
    boundary: one of `BOUNDARIES`.
  """

  window: int = 40
  overlap: int = 0
  boundary: str = 'window'


class _Line(NamedTuple):
  """A line of text.

  Attributes:
    begin: its first character, or that of blank lines before the first line.
    end: one past its break and the blank lines after it.
    text: the line, without white space at its end.
    last: whether blank lines follow.
  """

  begin: int
  end: int
  text: str
  last: bool = False


def check_chunking(chunking: Chunking) -> None:
  """Refuses settings that make no chunks.

  Args:
    chunking: the settings.

  Raises:
    InputError: the window holds no token, the overlap is not shorter than it,
      or the boundary is unknown; all faults at once.
  """
  window, overlap, boundary = chunking
  problems = []
  if window < 1:
    problems.append(f'the window is {window} tokens; give at least 1.')
  elif not 0 <= overlap < window:
    problems.append(
        f'the overlap is {overlap} tokens with a window of {window}; give 0 to'
        f' {window - 1}.'
    )
  if boundary == 'surprise' and overlap:
    problems.append(
        f'the overlap is {overlap} tokens; chunks that begin at surprises do not'
        ' overlap: give 0.'
    )
  if boundary not in BOUNDARIES:
    problems.append(
        f'the boundary {boundary!r} is unknown; use {" or ".join(BOUNDARIES)}.'
    )
  InputError.raise_for(problems)


def spans(n: int, window: int, overlap: int) -> tuple[Span, ...]:
  """Cuts n tokens into windows.

  Args:
    n: tokens.
    window: tokens of a chunk at most.
    overlap: tokens that neighbours share, below `window`.

  Returns:
    (begin, end) of every chunk, ascending; each adds at least one token, and
    the last, which may be short, ends at n. Empty for no tokens.
  """
  found = []
  begin = end = 0
  while end < n:
    end = min(begin + window, n)
    found.append((begin, end))
    begin += window - overlap
  return tuple(found)


# Chunks that begin at surprises: the longest as a multiple of the window, and
# the shortest, tokens. Published code bounds neither.
_LONGEST, _SHORTEST = 2, 4


def surprise_spans(surprise: Sequence[float], window: int) -> tuple[Span, ...]:
  """Cuts a target where a model expects it least.

  The ceil(n / window) tokens of largest surprise begin chunks; the first token
  always does, in place of the least of them. A chunk of more than 2 windows is
  cut at its own largest surprise, and one of fewer than 4 tokens joins the one
  before it.

  Args:
    surprise: of every token, -log p given what is before it.
    window: tokens of a chunk on average.

  Returns:
    (begin, end) of the chunks, ascending and without gaps.

  Source: AnyEdit++ (arXiv 2606.01053) as published; bounds of length are ours.
  """
  n = len(surprise)
  if not n:
    return ()
  order = sorted(range(n), key=lambda t: (-surprise[t], t))
  begins = order[: -(-n // window)]
  if 0 not in begins:
    begins[-1] = 0
  begins.sort()
  cut: list[int] = []
  waiting = list(zip(begins, [*begins[1:], n]))[::-1]
  while waiting:
    begin, end = waiting.pop()
    if end - begin <= _LONGEST * window:
      cut.append(begin)
      continue
    inner = range(begin + 1, end)
    middle = max(inner, key=lambda t: (surprise[t], -t))
    waiting += [(middle, end), (begin, middle)]
  kept: list[int] = []
  for begin, end in zip(cut, [*cut[1:], n]):
    if not kept or end - begin >= _SHORTEST:
      kept.append(begin)
  return tuple(zip(kept, [*kept[1:], n]))


def chunk(
    text: str, ids: Sequence[int], offsets: Sequence[Span], chunking: Chunking
) -> tuple[Span, ...]:
  """Cuts the tokens of a text into chunks.

  Args:
    text: the text; tokens behind its end belong to its last chunk.
    ids: its n tokens.
    offsets: (begin, end) of their characters in the text. A token across the
      end of a sentence belongs to the chunk before.
    chunking: checked settings.

  Returns:
    (begin, end) of the chunks in tokens, ascending and without gaps. With
    'window' they have `window` tokens at most, with 'sentence' `window` and
    `overlap` together.
  """
  window, overlap, boundary = chunking
  if boundary == 'window':
    return spans(len(ids), window, overlap)
  if boundary == 'surprise':
    return spans(len(ids), len(ids), 0)
  if not len(ids):
    return ()
  ends, protected = cuts(text)
  starts = list(itertools.accumulate((a for a, _ in offsets), max))
  stops = list(itertools.accumulate((b for _, b in offsets), max))
  whole = []
  for first, last in protected:
    begin = bisect.bisect_right(stops, first)
    end = bisect.bisect_left(starts, last)
    if end - begin <= window:
      whole.append((begin, end))
    else:
      ends += [m.end() for m in _LINE_END.finditer(text, first, last)]
  borders = {bisect.bisect_left(starts, end) for end in ends}
  borders = sorted(borders - {0, len(ids)}) + [len(ids)]
  pieces: list[Span] = []
  for begin, end in itertools.pairwise([0, *borders]):
    for part in _windows(begin, end, window, whole):
      if pieces and part[1] - pieces[-1][0] <= window:
        pieces[-1] = (pieces[-1][0], part[1])
      else:
        pieces.append(part)
  chunks = pieces[:1]
  for begin, end in pieces[1:]:
    # Every chunk begins behind the one before it.
    chunks.append((max(begin - overlap, chunks[-1][0] + 1), end))
  return tuple(chunks)


def _windows(
    begin: int, end: int, window: int, whole: Sequence[Span]
) -> Iterator[Span]:
  """Cuts tokens into windows, less where a span must stay whole."""
  while begin < end:
    cut = min(begin + window, end)
    if cut < end:
      for first, last in reversed(whole):
        if begin < first < cut < last:
          cut = first
    yield begin, cut
    begin = cut


def cuts(text: str) -> tuple[list[int], list[Span]]:
  """Finds where a text may be cut.

  Args:
    text: prose, lists, verse, code and formulas, mixed as they come.

  Returns:
    (ascending ends in characters, the end of the text left out; spans of the
    formulas and the inline code, which hold no end).
  """
  lines = _lines(text)
  fenced = _fenced(text, lines)
  protected = _outermost(
      _environments(text),
      (
          match.span()
          for begin, end, inside in fenced
          if not inside
          for match in _PROTECTED.finditer(text, begin, end)
      ),
  )
  ends = set()
  for block in _blocks(lines, fenced):
    for begin, end, whole in block:
      ends.add(end)
      if not whole:
        ends.update(_sentences(text, begin, end))
  stop = len(text.rstrip())
  firsts = [begin for begin, _ in protected]

  def inside(end: int) -> bool:
    at = bisect.bisect_left(firsts, end) - 1
    return at >= 0 and end < protected[at][1]

  return sorted(e for e in ends if 0 < e < stop and not inside(e)), protected


def _environments(text: str) -> Iterator[Span]:
  """Yields LaTeX environments; one that is never closed is none."""
  opened: list[tuple[str, int]] = []
  for match in _ENVIRONMENT.finditer(text):
    kind, name = match.groups()
    if kind == 'begin':
      opened.append((name, match.start()))
    elif name in [other for other, _ in opened]:
      while True:
        other, begin = opened.pop()
        if other == name:
          yield begin, match.end()
          break


def _outermost(*spans_: Iterable[Span]) -> list[Span]:
  """Sorts spans and leaves out those that begin inside another."""
  found: list[Span] = []
  for begin, end in sorted(
      itertools.chain(*spans_), key=lambda s: (s[0], -s[1])
  ):
    if not found or begin >= found[-1][1]:
      found.append((begin, end))
  return found


def _lines(text: str) -> list[_Line]:
  """Lists the lines that hold something; blank ones go to the line before."""
  lines: list[_Line] = []
  begin = at = 0
  for raw in text.splitlines(keepends=True):
    at += len(raw)
    if raw.strip():
      lines.append(_Line(begin, at, raw.rstrip()))
      begin = at
    elif lines:
      lines[-1] = lines[-1]._replace(end=at, last=True)
      begin = at
  return lines


def _fenced(text: str, lines: Sequence[_Line]) -> list[tuple[int, int, bool]]:
  """Tells fenced code and quoted blocks from the rest: (begin, end, inside)."""
  parts: list[tuple[int, int, bool]] = []
  quoted = [match.span() for match in _QUOTED.finditer(text)]
  inside, block = False, 0
  for line in lines:
    fence = bool(_FENCE.match(line.text))
    while block < len(quoted) and quoted[block][1] <= line.begin:
      block += 1
    quote = block < len(quoted) and quoted[block][0] < line.end
    code = inside or fence or quote
    inside ^= fence
    if parts and parts[-1][2] == code:
      parts[-1] = (parts[-1][0], line.end, code)
    else:
      parts.append((line.begin, line.end, code))
  return parts


def _blocks(
    lines: Sequence[_Line], fenced: Sequence[tuple[int, int, bool]]
) -> Iterator[list[tuple[int, int, bool]]]:
  """Yields paragraphs as lists of (begin, end, whether nothing cuts inside)."""
  begins = [begin for begin, _, _ in fenced]
  code = {
      line.begin
      for line in lines
      if fenced[bisect.bisect(begins, line.begin) - 1][2]
  }
  alike = _alike(lines, code)
  coded = False
  for paragraph in _paragraphs(lines, code, alike):
    first = paragraph[0]
    looks = sum(line.begin in alike for line in paragraph)
    coded = (
        first.begin in code
        or 2 * looks >= len(paragraph)
        or (coded and first.text[0].isspace())
    )
    if coded:
      yield [(line.begin, line.end, True) for line in paragraph]
    elif _wrapped([line.text for line in paragraph]):
      yield [(first.begin, paragraph[-1].end, False)]
    else:
      several = len(paragraph) > 1
      yield [
          (
              line.begin,
              line.end,
              several and (line.begin in alike or _width(line.text) <= _VERSE),
          )
          for line in paragraph
      ]


def _alike(lines: Sequence[_Line], code: set[int]) -> set[int]:
  """Where lines begin that look like code, comments beside it included."""
  looks = [line.begin in code or _looks_like_code(line.text) for line in lines]
  # A comment goes with the line before it, unless parted from it, or with the
  # next that is none.
  comment = [bool(_COMMENT.match(line.text)) for line in lines]
  following = False
  for i in reversed(range(len(lines))):
    following = looks[i] or comment[i] and following
    looks[i] = following
  for i in range(1, len(lines)):
    looks[i] |= comment[i] and looks[i - 1] and not lines[i - 1].last
  return {line.begin for line, like in zip(lines, looks) if like}


def _paragraphs(
    lines: Sequence[_Line], code: set[int], alike: set[int]
) -> Iterator[list[_Line]]:
  """Groups lines; blank lines, list items and fences part them."""
  group: list[_Line] = []
  for line in lines:
    if group and (
        group[-1].last
        or (group[-1].begin in code) != (line.begin in code)
        or (_ITEM.match(line.text) and line.begin not in alike)
    ):
      yield group
      group = []
    group.append(line)
  if group:
    yield group


def _looks_like_code(line: str) -> bool:
  if _CODE.fullmatch(line):
    return True
  if not _INDENTED.match(line):
    return False
  return not (_PROSE.fullmatch(line) and len(line.split()) > 5)


def _width(text: str) -> int:
  """Columns that a text takes on a screen."""
  return sum(1 + (unicodedata.east_asian_width(c) in 'WF') for c in text)


def _wrapped(lines: Sequence[str]) -> bool:
  """Whether lines are prose, broken where the next word did not fit."""
  width = max(map(len, lines))
  if len(lines) < 2 or width < _WRAP:
    return False
  full = all(
      len(line) + 1 + len(after.split()[0]) > width
      for line, after in itertools.pairwise(lines)
  )
  return full and not all(line.lstrip()[0].isupper() for line in lines[1:])


def _sentences(text: str, begin: int, end: int) -> Iterator[int]:
  """Yields ends of sentences in a stretch of prose."""
  start = begin
  for match in _MARK.finditer(text, begin, end):
    stop = match.end()
    after = text[stop : min(end, stop + _SIGHT)]
    mark = match.group()
    if mark[0] in _PLAIN:
      # Quoted speech goes on in its sentence, as Japanese particles show.
      goes_on = mark[-1] in '」』' and '\u3041' <= after[:1] <= '\u309f'
    else:
      before = text[start : match.start()]
      goes_on = _goes_on(before, mark, after)
    if not goes_on:
      # A break belongs to the sentence that it ends.
      start = _BREAK.match(text, stop, end).end()
      yield start


def _goes_on(before: str, mark: str, after: str) -> bool:
  """Whether a sentence goes on after a Western mark.

  Args:
    before: the sentence so far.
    mark: the mark with the quotes and brackets it closes.
    after: what follows.
  """
  if after and not after[0].isspace():
    wide = unicodedata.east_asian_width(after[0]) in 'WF'
    return not (wide and mark[0] in '!?…')
  rest = after.lstrip(_OPENERS)
  if rest[:1].islower():
    return True
  if mark != '.':
    return False
  near = before[-_SIGHT:]
  if _NUMBERING.fullmatch(before) or _NUMBERED_AFTER.search(near):
    return True
  word = _WORD.search(near).group()
  low = word.lower()
  if word in _TITLES or low in _COUNTED and rest[:1].isdigit():
    return True
  initial = len(word) == 1 and word.isupper()
  if initial or low in _OPEN or _DOTTED.fullmatch(word):
    return re.match(r'\w*', rest).group() not in _STARTERS
  return False
