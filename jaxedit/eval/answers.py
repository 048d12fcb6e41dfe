"""What a model answers in full, and the tokens that end an answer.

Not here: what an answer is worth (`similarity`, `metrics`), chat templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxedit.edited.lm import LanguageModel
from jaxedit.types import InputError


def end_ids(
    tokenizer: Any, vocab: int, chat_end: str = '', named: Iterable[int] = ()
) -> tuple[int, ...]:
  """Lists the tokens that end an answer.

  Args:
    tokenizer: a transformers tokenizer.
    vocab: rows of the model's embedding; ids from there up cannot occur.
    chat_end: text that ends a turn of the chat, '' without one. Of several
      tokens the special ones count.
    named: further ids, those of the model's generation_config.json.

  Returns:
    Ids of the end-of-text token, of the end of a turn and those named,
    ascending.

  Raises:
    InputError: the end of a turn is several tokens, all of them ordinary.
  """
  ends = {tokenizer.eos_token_id, *named} - {None}
  if chat_end:
    ids = tokenizer(chat_end, add_special_tokens=False)['input_ids']
    if len(ids) > 1:
      ids = [i for i in ids if i in tokenizer.added_tokens_decoder]
    if not ids:
      raise InputError(
          f'the end of a turn, {chat_end!r}, is no token of this tokenizer, so'
          ' nothing can stop at it; name the token that ends a turn, or none'
      )
    ends |= set(ids)
  return tuple(sorted(i for i in ends if i < vocab))


def answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    stop: Sequence[int],
    **settings: Any,
) -> list[str]:
  """Lets a model answer prompts until it stops by itself.

  Args:
    lm: the model.
    prompts: token ids, BOS included where the model wants one.
    tokenizer: turns the new tokens into text.
    stop: tokens that end a text, see `end_ids`.
    **settings: of `LanguageModel.generate`.

  Returns:
    The answer to every prompt as it was written, without the token that ended
    it, special tokens and surrounding white space.

  Raises:
    InputError: see `LanguageModel.generate`.
  """
  tokens = lm.generate(prompts, stop_ids=stop, **settings)
  ends = set(stop)
  return texts(
      tokenizer, [t[:-1] if t and t[-1] in ends else t for t in tokens]
  )


def texts(tokenizer: Any, tokens: Sequence[Sequence[int]]) -> list[str]:
  """Turns new tokens into text.

  Args:
    tokenizer: a transformers tokenizer.
    tokens: ids of each text.

  Returns:
    The texts without special tokens and surrounding white space; what is inside
    stays as it is.
  """
  if not tokens:  # which a tokenizer takes for one text without tokens
    return []
  decoded = tokenizer.batch_decode(
      tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  return [text.strip() for text in decoded]
