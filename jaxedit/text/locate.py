"""Finds the tokens of a subject, and turns prompts and targets into ids.

A subject fills the '{}' of a cloze; its tokens are those whose character span
meets the subject's span in the filled text:

  first, last = min, max of { t : start_t < subject_end, end_t > subject_start }

Character offsets make this right for tokenizers that add a BOS token, that
draw the space before a word into its first token, or that split one character
over several byte tokens (all of which carry the span of that character).
Tokenising the pieces one by one, as the first published code of ROME and MEMIT
does, adds a BOS to each piece and breaks where a token crosses the border.

A prompt and its target are tokenised apart and their ids joined. Ids are never
turned back into text and tokenised again: where a merge crosses the border, the
labels would not be the ids that are scored.

Source: the lookup index of Meng et al. 2022 (arXiv 2202.05262, section 3.1);
the last subject token as anchor is theirs, the offsets are ours.

It does not pad, batch on static shapes (see `batching`) or read files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.types import InputError

PLACEHOLDER = '{}'
# Scripts written without spaces that are not East Asian wide: Thai and Lao,
# Myanmar, Khmer. A subject may border on another word there.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))


class Located(NamedTuple):
  """A filled text as ids, and where its subject lies.

  Attributes:
    ids: [T] int32, with the BOS token if the tokenizer adds one.
    first: index of the first token that overlaps the subject.
    last: index of the last one.
  """

  ids: np.ndarray
  first: int
  last: int


def valid_unicode(text: str) -> str:
  """Replaces unpaired surrogates, which no tokenizer accepts, by U+FFFD."""
  try:
    text.encode('utf-8')
    return text
  except UnicodeEncodeError:
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


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
    inside = _joined(prompt[at - 1 : at], prompt[at]) or _joined(
        prompt[end - 1], prompt[end : end + 1]
    )
    if not inside:
      return prompt[:at] + PLACEHOLDER + prompt[end:]
    at = prompt.find(subject, at + 1)
  return None


def _joined(left: str, right: str) -> bool:
  """Whether two neighbouring characters belong to one word."""
  if not left or not right:
    return False
  if unicodedata.category(right)[0] == 'M':  # an accent on the left character
    return True
  return _in_word(left) and _in_word(right)


def _in_word(char: str) -> bool:
  if unicodedata.east_asian_width(char) in 'WF':
    return False
  if any(low <= ord(char) <= high for low, high in _UNSPACED):
    return False
  return char == '_' or unicodedata.category(char)[0] in 'LMN'


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
    tokenizer: Any, texts: Sequence[str]
) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
  """Returns ids and offsets a text, less what the tokenizer puts at the end."""
  if not texts:
    return []
  _require_fast(tokenizer)
  out = _tokenize(tokenizer, texts, True)
  rows = []
  for ids, spans, added in zip(
      out['input_ids'], out['offset_mapping'], out['special_tokens_mask']
  ):
    stop = len(ids)
    # An EOS that the tokenizer appends would cut prompt and target apart.
    while stop and added[stop - 1] and spans[stop - 1][0] == spans[stop - 1][1]:
      stop -= 1
    if not stop and ids:  # no text: keep what stands in front of any text
      (mask,) = _tokenize(tokenizer, ['a'], True)['special_tokens_mask']
      stop = mask.index(0) if 0 in mask else 0
    rows.append((np.asarray(ids[:stop], np.int32), spans[:stop]))
  return rows


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
  """Tokenises texts that will be continued.

  Args:
    tokenizer: a fast transformers tokenizer.
    texts: the texts.

  Returns:
    One [T] int32 array a text, with BOS if the tokenizer adds one and without
    an EOS at the end.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  texts = [valid_unicode(text) for text in texts]
  return [ids for ids, _ in _encode(tokenizer, texts)]


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
    found.append((ids, (hits[0], hits[-1]) if hits else None))
  return found


def locate_subject(
    tokenizer: Any, prompt: str, subject: str, prefix_text: str = ''
) -> Located:
  """Tokenises a filled cloze and finds its subject.

  Args:
    tokenizer: a fast transformers tokenizer.
    prompt: cloze with exactly one '{}'.
    subject: text for the '{}'; it may occur elsewhere in the prompt as well.
    prefix_text: text put before the prompt as it is, e.g. a context.

  Returns:
    The ids of the whole text and the subject's first and last token.

  Raises:
    InputError: the prompt has not one '{}', no token overlaps the subject, or
      the tokenizer gives no offsets.
  """
  if prompt.count(PLACEHOLDER) != 1:
    raise InputError(
        f'the prompt {prompt!r} has {prompt.count(PLACEHOLDER)} placeholders;'
        " write '{}' once, where the subject goes."
    )
  before, _, after = prompt.partition(PLACEHOLDER)
  case = (prefix_text + before, subject, after)
  ((ids, span),) = locate_subjects(tokenizer, [case])
  if span is None:
    raise InputError(no_subject(subject))
  return Located(ids, *span)


def no_subject(subject: str) -> str:
  """Says that no token overlaps the subject."""
  return (
      f'the subject {subject!r} has no token left after tokenisation; give a'
      ' subject with characters that the tokenizer keeps.'
  )


def encode_targets(tokenizer: Any, targets: Sequence[str]) -> list[np.ndarray]:
  """Tokenises texts that continue a prompt.

  One space is put before a target that does not start with white space, and no
  BOS is added. Tokenizers that put a space before every text by themselves
  (SentencePiece models of the Llama 2 kind) get the bare target, as they would
  turn the space into a token of its own.

  Args:
    tokenizer: a fast transformers tokenizer.
    targets: the texts.

  Returns:
    One [n] int32 array a target; n is 0 where nothing is left to tokenise.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  if not targets:
    return []
  _require_fast(tokenizer)
  doubles = _doubles_space(tokenizer)
  texts = []
  for target in map(valid_unicode, targets):
    if not target.strip():
      target = ''
    elif doubles:
      target = target.removeprefix(' ')
    elif not target[0].isspace():
      target = ' ' + target
    texts.append(target)
  rows = _tokenize(tokenizer, texts, False)['input_ids']
  return [np.asarray(ids, np.int32) for ids in rows]


def _doubles_space(tokenizer: Any) -> bool:
  """Whether the tokenizer adds a space even where the text begins with one."""
  plain, spaced = _tokenize(tokenizer, ['a', ' a'], False)['input_ids']
  first = tokenizer.convert_ids_to_tokens(plain[:1])
  return plain != spaced and bool(first) and str(first[0]).startswith('\u2581')


def encode_target(tokenizer: Any, target: str) -> np.ndarray:
  """Tokenises one target; see `encode_targets`.

  Args:
    tokenizer: a fast transformers tokenizer.
    target: the text that continues a prompt.

  Returns:
    [n] int32, n at least 1.

  Raises:
    InputError: nothing is left to tokenise.
  """
  (ids,) = encode_targets(tokenizer, [target])
  if not len(ids):
    raise InputError(no_target(target))
  return ids


def no_target(target: str) -> str:
  """Says that a target has no tokens."""
  return f'the target {target!r} has no tokens; give it some text.'
