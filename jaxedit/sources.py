"""Sources: what an encoder-decoder reads, as ids and as text.

Its prompt is one sequence (see `models.decoder`): the source, whose ids i are
written ~i (below 0), with the token that ends it, and the token that the decoder
starts with. An answer is a text of its own behind it. Of a decoder a prompt is
what the tokenizer makes of the text, and nothing here changes it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

# Where a tokenizer keeps `border`.
_BORDER = 'jaxedit_border'


def with_border(tokenizer: Any, start: int | None = None) -> Any:
  """Makes a tokenizer that of an encoder-decoder.

  Args:
    tokenizer: a transformers tokenizer.
    start: id that the decoder starts with; that of padding unless given.

  Returns:
    A copy that knows what ends a source, and this id; itself if it knows.
  """
  if border(tokenizer):
    return tokenizer
  if start is None:
    start = tokenizer.pad_token_id
  found = copy.copy(tokenizer)
  end = tokenizer('')['input_ids']
  setattr(found, _BORDER, (*(~i for i in end), start))
  return found


def border(tokenizer: Any) -> tuple[int, ...]:
  """Returns the ids between source and answer; () of a decoder's tokenizer."""
  return getattr(tokenizer, _BORDER, ())


def closed(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
  """Makes a prompt of the ids of its text.

  Args:
    tokenizer: a transformers tokenizer.
    ids: [T] int32, without what ends a text.

  Returns:
    [T'] int32; `ids` themselves for a decoder.
  """
  end = border(tokenizer)
  if not end:
    return ids
  return np.concatenate([~ids, np.asarray(end, ids.dtype)])


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
  """Makes the prompt of a text, as the tokenizer reads it."""
  end = border(tokenizer)
  ids = tokenizer(text, add_special_tokens=not end)['input_ids']
  return [*(~i for i in ids), *end] if end else ids


def prompt_text(
    tokenizer: Any, ids: Sequence[int], *, special: bool = False
) -> str:
  """The text of a prompt; `special` tokens are left out unless asked for."""
  end = border(tokenizer)
  if end:
    # All but the end; sentinels such as <extra_id_0> are part of a text.
    own = [i for i in ids if i < 0]
    own = own[: len(own) - (len(end) - 1)]
    ids, special = [~i for i in own], True
  if not special:
    return tokenizer.decode(ids, skip_special_tokens=True)
  return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def error(ids: Sequence[int]) -> str | None:
  """Says why ids are no prompt of an encoder-decoder, or returns None."""
  count = next((n for n, i in enumerate(ids) if i >= 0), len(ids))
  if 0 < count < len(ids) and min(ids[count:]) >= 0:
    return None
  return (
      'it is no source (ids ~i, below 0) with the token behind it that the'
      " decoder starts with; make it by text.locate.encode_prompts with the model's"
      ' own tokenizer (jaxedit.load)'
  )


def plain(ids: Sequence[int]) -> list[int]:
  """The ids of tokens, those of a source too."""
  return [~i if i < 0 else i for i in ids]
