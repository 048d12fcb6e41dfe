"""Finds the tokens of a subject, and turns prompts and targets into ids.

A subject fills the '{}' of a cloze; its tokens are those whose character span
meets the subject's span in the filled text:

  first, last = min, max of { t : start_t < subject_end, end_t > subject_start }

Character offsets make this right for tokenizers that add a BOS token, that
draw the space before a word into its first token, or that split one character
over several byte tokens (all of which carry the span of that character).
Tokenising the pieces one by one, as the first published code of ROME and MEMIT
does, adds a BOS to each piece and breaks where a token crosses the border.

A prompt and its target are tokenised apart and their ids joined; whether a
blank stands between them is `joining`'s. Ids are never
turned back into text and tokenised again: where a merge crosses the border, the
labels would not be the ids that are scored.

Source: the lookup index of Meng et al. 2022 (arXiv 2202.05262, section 3.1);
the last subject token as anchor is theirs, the offsets are ours.

It does not pad, batch on static shapes (see `batching`) or read files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import sources
from jaxedit.text.joining import continuation
from jaxedit.types import InputError

# Put before a text, so that a tokenizer adds no blank to it; the first that
# stays a token of its own is taken.
_FRONTS = ('\n', '.', ')', 'a')


class Continued(NamedTuple):
  """A target, and what it continues.

  Attributes:
    prompt: the text in front.
    target: the text.
    space: whether a blank stands between them; see `joining.continuation`.
  """

  prompt: str
  target: str
  space: bool | None = None


class Encoded(NamedTuple):
  """A text as ids.

  Attributes:
    text: what the offsets count in.
    ids: [T] int32.
    offsets: (begin, end) of each token's characters.
  """

  text: str
  ids: np.ndarray
  offsets: list[tuple[int, int]]


def valid_unicode(text: str) -> str:
  """Replaces unpaired surrogates, which no tokenizer accepts, by U+FFFD."""
  try:
    text.encode('utf-8')
    return text
  except UnicodeEncodeError:
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _require_fast(tokenizer: Any) -> None:
  if not getattr(tokenizer, 'is_fast', False):
    raise InputError(
        f'{type(tokenizer).__name__} gives no character offsets; load the fast'
        ' tokenizer of the model (a folder with tokenizer.json).'
    )


def _tokenize(tokenizer: Any, texts: Sequence[str], special: bool) -> Any:
  return tokenizer(
      list(texts),
      add_special_tokens=special,
      return_offsets_mapping=True,
      return_special_tokens_mask=True,
      return_attention_mask=False,
      return_token_type_ids=False,
      padding=False,
      truncation=False,
      verbose=False,
  )


def _encode(
    tokenizer: Any, texts: Sequence[str], double_bos: bool = False
) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
  """Returns ids and offsets a text, less what the tokenizer puts at the end.

  A text that brings the BOS token gets no other.
  """
  if not texts:
    return []
  _require_fast(tokenizer)
  out = _tokenize(tokenizer, texts, True)
  rows, bos = [], getattr(tokenizer, 'bos_token', None)
  for text, ids, spans, added in zip(
      texts, out['input_ids'], out['offset_mapping'], out['special_tokens_mask']
  ):
    start, stop = 0, len(ids)
    if bos and not double_bos and text.startswith(bos):
      while start < stop and added[start] and spans[start][1] == 0:
        start += 1
    # An EOS that the tokenizer appends would cut prompt and target apart.
    while stop > start and added[stop - 1] and len(set(spans[stop - 1])) == 1:
      stop -= 1
    if not stop and ids:  # no text: keep what stands in front of any text
      (mask,) = _tokenize(tokenizer, ['a'], True)['special_tokens_mask']
      stop = mask.index(0) if 0 in mask else 0
    rows.append((np.asarray(ids[start:stop], np.int32), spans[start:stop]))
  return rows


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], double_bos: bool = False
) -> list[np.ndarray]:
  """Tokenises texts that will be continued.

  Args:
    tokenizer: a fast transformers tokenizer.
    texts: the texts.
    double_bos: let the tokenizer add its BOS token even to a text that brings
      it, as published code does.

  Returns:
    One [T] int32 array a text, with BOS if the tokenizer adds one and without
    an EOS at the end; of an encoder-decoder's, see `jaxedit.sources`.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  texts = [valid_unicode(text) for text in texts]
  rows = _encode(tokenizer, texts, double_bos)
  return [sources.closed(tokenizer, ids) for ids, _ in rows]


def locate_subjects(
    tokenizer: Any, cases: Sequence[tuple[str, str, str]]
) -> list[tuple[np.ndarray, tuple[int, int] | None]]:
  """Tokenises many filled texts and finds the subject of each.

  Args:
    tokenizer: a fast transformers tokenizer.
    cases: (text before the subject, subject, text after it).

  Returns:
    (ids, (first, last)) a case; None in place of the pair where no token
    overlaps the subject.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  cases = [tuple(valid_unicode(part) for part in case) for case in cases]
  found = []
  rows = _encode(tokenizer, [''.join(case) for case in cases])
  for (before, subject, _), (ids, spans) in zip(cases, rows):
    begin, end = len(before), len(before) + len(subject)
    # Empty spans are added tokens or trimmed white space: they overlap nothing.
    hits = [
        t
        for t, (start, stop) in enumerate(spans)
        if start < stop and start < end and stop > begin
    ]
    ids = sources.closed(tokenizer, ids)
    found.append((ids, (hits[0], hits[-1]) if hits else None))
  return found


def no_subject(subject: str) -> str:
  """Says that no token overlaps the subject."""
  return (
      f'the subject {subject!r} has no token left after tokenisation; give a'
      ' subject with characters that the tokenizer keeps.'
  )


def encode_targets(
    tokenizer: Any, targets: Sequence[Continued], special: Sequence[str] = ()
) -> list[np.ndarray]:
  """Tokenises texts that continue a prompt.

  A blank joins a target to its prompt where `joining.continuation` says so.
  No BOS is added.

  Args:
    tokenizer: a fast transformers tokenizer.
    targets: the texts, and what they continue.
    special: texts of the tokenizer's special tokens, behind which no blank
      stands.

  Returns:
    One [n] int32 array a target; n is 0 where nothing is left to tokenise.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  texts = [continuation(*one, special) for one in targets]
  return [one.ids for one in encode_continuations(tokenizer, texts)]


def encode_continuations(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
  """Tokenises texts as they continue another one, without special tokens.

  Tokenizers that put a blank before every text by themselves (SentencePiece
  models of the Llama 2 kind) would make a token of the text's own blank, so it
  is left out; and a text without one is tokenised behind a character whose
  tokens are dropped.

  Args:
    tokenizer: a fast transformers tokenizer.
    texts: the texts, with the blank that they begin with, if any.

  Returns:
    One entry a text. Its own text lacks the blank that was left out.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  if not texts:
    return []
  _require_fast(tokenizer)
  texts = [valid_unicode(text) for text in texts]
  if sources.border(tokenizer):  # an answer is a text of its own
    return _plain(tokenizer, [text.removeprefix(' ') for text in texts])
  adds, doubles = _adds_blank(tokenizer)
  plain = [text.removeprefix(' ' if doubles else '') for text in texts]
  found = _plain(tokenizer, plain)
  if adds:
    glued = [i for i, t in enumerate(texts) if t and not t.startswith(' ')]
    inside = _inside(tokenizer, [texts[i] for i in glued])
    for i, one in zip(glued, inside):
      found[i] = one
  return found


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
  """Tokenises texts by themselves."""
  out = _tokenize(tokenizer, texts, False)
  found = []
  for text, ids, spans in zip(texts, out['input_ids'], out['offset_mapping']):
    # Some tokenizers add their BOS token whatever they are asked to.
    own = ids[:1] == [tokenizer.bos_token_id] and spans[0][1] == 0
    found.append(Encoded(text, np.asarray(ids[own:], np.int32), spans[own:]))
  return found


def _inside(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
  """Tokenises texts as they stand inside another one."""
  found: list[Encoded | None] = [None] * len(texts)
  for front in _FRONTS:
    left = [i for i, one in enumerate(found) if one is None]
    rows = _plain(tokenizer, [front + texts[i] for i in left]) if left else ()
    for i, row in zip(left, rows):
      count = sum(end <= 1 for _, end in row.offsets)
      spans = [(begin - 1, end - 1) for begin, end in row.offsets[count:]]
      if all(begin >= 0 for begin, _ in spans):
        found[i] = Encoded(texts[i], row.ids[count:], spans)
  if None in found:
    own = _plain(tokenizer, texts)
    found = [old if one is None else one for one, old in zip(found, own)]
  return found


def _adds_blank(tokenizer: Any) -> tuple[bool, bool]:
  """Whether the tokenizer puts a blank before a text.

  Returns:
    (before one that has none, also before one that begins with one).
  """
  texts = [*_plain(tokenizer, ['a', ' a']), *_inside(tokenizer, ['a'])]
  plain, spaced, inside = (one.ids.tolist() for one in texts)
  first = ''.join(map(str, tokenizer.convert_ids_to_tokens(plain[:1])))
  return plain != inside, plain != spaced and first.startswith('\u2581')


def no_target(target: str) -> str:
  """Says that a target has no tokens."""
  return f'the target {target!r} has no tokens; give it some text.'


def unknown_target(target: str) -> str:
  """Says that a target has characters without tokens."""
  return (
      f'the target {target!r} has characters that the tokenizer has no token for;'
      ' write it with others.'
  )
