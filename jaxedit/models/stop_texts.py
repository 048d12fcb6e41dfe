"""Stop strings: a text ends with the token that completes one of its strings.

Decided on the text as generated: the new tokens together, special tokens
written out, nothing cleaned up. So a string may begin inside one token and end
inside another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxedit.types import InputError

Detokenize = Callable[[Sequence[int]], str]


def detokenizer(tokenizer: Any) -> Detokenize:
  """Returns the function from ids to text as generated.

  Args:
    tokenizer: a transformers tokenizer.

  Raises:
    InputError: there is none.
  """
  if tokenizer is None:
    raise InputError(
        'stop_texts end a text by what it says, which takes a tokenizer; load'
        ' the model with its own (jaxedit.load)'
    )
  return lambda ids: tokenizer.decode(
      ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
  )


def errors(stop_texts: Sequence[Sequence[str]], prompts: int) -> list[str]:
  """Says why stop strings cannot be used, messages."""
  if len(stop_texts) != prompts:
    return [
        f'stop_texts has {len(stop_texts)} entries for {prompts} prompts; give'
        ' each prompt a list of strings, which may be empty'
    ]
  return [
      f'prompt {i} has {some!r} for its stop strings; give a list of texts of at'
      ' least one character'
      for i, some in enumerate(stop_texts)
      if isinstance(some, str) or not all(some)
  ]


def end_of(
    tokens: Sequence[int],
    stops: Sequence[str],
    detokenize: Detokenize,
    *,
    seen: int = 0,
) -> int | None:
  """Finds where a text ends.

  Args:
    tokens: new tokens of a text.
    stops: its stop strings.
    detokenize: ids -> text.
    seen: so many first tokens are known to complete none.

  Returns:
    How many tokens it has with the one that completes a stop string; None where
    none does.
  """
  complete = lambda count: any(s in detokenize(tokens[:count]) for s in stops)
  if not stops or not complete(len(tokens)):
    return None
  ends = range(seen + 1, len(tokens))
  return next((count for count in ends if complete(count)), len(tokens))
