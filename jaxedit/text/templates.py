"""Context templates: short openings under which an edit must hold as well.

A template is a text with exactly one '{}', where a prompt goes. The bare '{}'
comes first: the unedited state z0 is read there. The others are sampled from
the model that will be edited, from a few common openings:

  templates = ('{}', clean(sample(start)) + '. {}', ...)

Source: the context templates of MEMIT (Meng et al. 2023, arXiv 2210.07229);
ROME draws 20 of them from an empty opening, at lengths 5 and 10. Published code
samples them without a seed, once a process, so that numbers vary from run to
run: here the seed is an argument and the result can be saved. Texts that open
with the literal BOS token, which published code keeps for some models, lose it.

It does not sample by itself, and it does not know any model.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence

from jaxedit import io
from jaxedit.text.cloze import PLACEHOLDER
from jaxedit.text.locate import valid_unicode
from jaxedit.types import InputError

Sample = Callable[[list[str], int, int], list[str]]

PLAIN = PLACEHOLDER
STARTS = ('The', 'Therefore', 'Because', 'I', 'You')
# The names that tokenizers of the common families give to their own tokens.
_SPECIAL = re.compile(
    r'<\|[^<>|]*\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|\[(?:PAD|UNK|BOS|EOS)\]'
)
_BREAK = re.compile('\n\n|\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]')
_BRACE = re.compile('[{}]')


def clean(text: str, special_tokens: Sequence[str] = ()) -> str:
  """Makes generated text safe to stand before a placeholder.

  Normalises to NFKD, removes the literal text of special tokens and turns line
  breaks and braces into spaces; two line feeds in a row become one space.

  Args:
    text: generated text.
    special_tokens: further texts to remove, e.g. a tokenizer's own list.

  Returns:
    The text, without braces and line breaks.
  """
  text = unicodedata.normalize('NFKD', valid_unicode(text))
  for token in sorted(filter(None, special_tokens), key=len, reverse=True):
    text = text.replace(token, '')
  text = _SPECIAL.sub('', text)
  return _BRACE.sub(' ', _BREAK.sub(' ', text))


def sample_templates(
    sample: Sample,
    *,
    seed: int,
    starts: Sequence[str] = STARTS,
    length: int = 10,
    per_start: int = 1,
    special_tokens: Sequence[str] = (),
) -> tuple[str, ...]:
  """Draws context templates from a model.

  The defaults are MEMIT's: five openings, one text each, ten tokens in all.

  Args:
    sample: (prompts, seed, most tokens of a text with prompt and BOS) -> one
      text a prompt, the prompt included, special tokens left out.
    seed: for `sample`.
    starts: openings; the empty text means sampling from the BOS token alone.
    length: tokens of a text, its opening and the BOS token included.
    per_start: texts drawn from each opening.
    special_tokens: texts to remove besides the usual ones; see `clean`.

  Returns:
    The bare '{}', then len(starts) * per_start templates.

  Raises:
    ValueError: `sample` returned another number of texts.
  """
  prompts = [start for start in starts for _ in range(per_start)]
  texts = sample(prompts, seed, length) if prompts else []
  if len(texts) != len(prompts):
    raise ValueError(
        f'sample returned {len(texts)} texts for {len(prompts)} prompts'
    )
  cleaned = (clean(text, special_tokens) for text in texts)
  return (PLAIN, *(f'{text}. {PLACEHOLDER}' for text in cleaned))


def template_errors(entries: Sequence[object]) -> list[str]:
  """Lists what is wrong with templates, one sentence each.

  Args:
    entries: the would-be templates.

  Returns:
    Sentences that name entries by their place, counted from 1.
  """
  errors = []
  for number, entry in enumerate(entries, 1):
    if not isinstance(entry, str):
      errors.append(
          f'template {number} is {type(entry).__name__}, not text; write a'
          " string with one '{}'."
      )
    elif entry.count(PLACEHOLDER) != 1:
      errors.append(
          f"template {number}, {entry!r}, has '{{}}'"
          f' {entry.count(PLACEHOLDER)} times; write it once, where the prompt'
          ' goes.'
      )
  return errors


def load_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
  """Reads templates from a JSON list of strings.

  Args:
    path: the file.

  Returns:
    The templates with the bare '{}' first, put there if it is missing and
    moved there if it stands elsewhere.

  Raises:
    InputError: the file is missing or no JSON list, or entries have not exactly
      one '{}'; every faulty entry is named.
  """
  remedy = "give a JSON list of strings, each with one '{}'"
  entries = io.read_json(path, list, remedy=remedy)
  errors = template_errors(entries)
  if errors:
    raise InputError(*(f'{path}: {error}' for error in errors))
  if PLAIN in entries:
    entries.remove(PLAIN)
  return (PLAIN, *map(valid_unicode, entries))
