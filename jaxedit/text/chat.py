"""Wraps questions and answers in the words of a chat model.

  text = before + question + after + answer + end

The parts come from the model's own chat template, which is rendered once with
a marker in place of the question and once with one in place of the answer, or
from a literal text with one '{}'. Nothing else of a template is used, so it may
not depend on what the question says.

Published code writes the templates of a few models into its own source; one
repository gives that of Llama 2 to every model. Where such a text brings the
BOS token and the tokenizer adds its own as well, models are edited and asked
with two of them; here one is left out, see `locate`.

It does not tokenise, and it holds no conversation: one question, one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxedit.text import render_check
from jaxedit.text.cloze import PLACEHOLDER
from jaxedit.types import InputError

NONE = 'none'
TEMPLATE = 'template'
# No special token contains it, no template changes it.
_MARKER = 'qzxjqzxj'
_FAILS = (
    'the chat template of the tokenizer fails ({}); mend it, or give the chat as a'
    " text with '{{}}' where the question goes."
)


class Chat(NamedTuple):
  """The words around a question and behind its answer.

  Attributes:
    before: text in front of the question.
    after: text between the question and its answer.
    end: text that ends the answer, as a rule the end-of-turn token.
  """

  before: str = ''
  after: str = ''
  end: str = ''

  def wrap(self, question: str) -> str:
    """Returns the text that asks a question."""
    return self.before + question + self.after


PLAIN = Chat()


def chat_of(tokenizer: Any, kind: str, end: str | None = None) -> Chat:
  """Finds the words that a model wants around a question.

  Args:
    tokenizer: the model's, from transformers.
    kind: 'none' for the bare question, 'template' for the tokenizer's chat
      template, or a text with one '{}' where the question goes.
    end: text that ends an answer; None for the template's own end of turn, or
      no text where there is no template.

  Returns:
    The words.

  Raises:
    InputError: the kind is neither known nor a text with one '{}', or the
      tokenizer has no chat template or one that cannot be used.
  """
  before = after = own = ''
  if kind == TEMPLATE:
    before, after, own = _from_template(tokenizer, end is None)
  elif kind.count(PLACEHOLDER) == 1:
    before, _, after = kind.partition(PLACEHOLDER)
  elif kind != NONE:
    raise InputError(
        f"the chat {kind!r} has '{{}}' {kind.count(PLACEHOLDER)} times; give"
        f" {NONE!r}, {TEMPLATE!r}, or a text with '{{}}' once, where the"
        ' question goes.'
    )
  return Chat(before, after, own if end is None else end)


def _from_template(tokenizer: Any, ends: bool) -> tuple[str, str, str]:
  """Reads (before, after, end) out of the tokenizer's template."""
  if not getattr(tokenizer, 'chat_template', None):
    raise InputError(
        'the tokenizer has no chat template; add one to its folder'
        f' (chat_template.jinja), give the chat {NONE!r} for bare questions, or'
        " a text with '{}' where the question goes."
    )
  asked = [{'role': 'user', 'content': _MARKER}]
  answered = [
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': _MARKER},
  ]
  turns = [(asked, True), (answered, False)]
  _check(tokenizer, turns if ends else turns[:1])
  before, after = _around(_render(tokenizer, asked, True), 'question')
  if not ends:
    return before, after, ''
  _, rest = _around(_render(tokenizer, answered, False), 'answer')
  return before, after, _first_special(tokenizer, rest)


def _check(
    tokenizer: Any, conversations: Sequence[tuple[list[dict[str, str]], bool]]
) -> None:
  """Refuses a template that fails, does not end or needs too much memory."""
  try:
    template = tokenizer.get_chat_template()
  except ValueError as error:  # several templates, none of them the default
    raise InputError(
        f'the tokenizer has no chat template to use ({error}); give the chat as'
        " a text with '{}' where the question goes."
    ) from error
  special = tokenizer.special_tokens_map
  special = {k: v for k, v in special.items() if isinstance(v, str)}
  if reason := render_check.error(template, conversations, special):
    raise InputError(_FAILS.format(reason))


def _render(
    tokenizer: Any, turns: Sequence[dict[str, str]], prompt: bool
) -> str:
  try:
    return tokenizer.apply_chat_template(
        list(turns), tokenize=False, add_generation_prompt=prompt
    )
  except Exception as error:  # a template is a program and may raise anything
    raise InputError(_FAILS.format(error)) from error


def _around(text: str, part: str) -> tuple[str, str]:
  """Returns what stands before and after the marker."""
  if text.count(_MARKER) != 1:
    raise InputError(
        f'the chat template of the tokenizer writes the {part}'
        f' {text.count(_MARKER)} times, not once; give the chat as a text with'
        " '{}' where the question goes."
    )
  before, _, after = text.partition(_MARKER)
  return before, after


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
  """Lists the texts of a tokenizer's special tokens.

  Args:
    tokenizer: from transformers.

  Returns:
    The texts, in order, none of them empty.
  """
  added = tokenizer.added_tokens_decoder.values()
  tokens = {str(token) for token in added if token.special}
  return tuple(sorted(filter(None, tokens | set(tokenizer.all_special_tokens))))


def _first_special(tokenizer: Any, text: str) -> str:
  """Returns the first special token in a text, else the EOS token."""
  found = [
      (text.index(token), -len(token), token)
      for token in special_tokens(tokenizer)
      if token in text
  ]
  return min(found)[2] if found else tokenizer.eos_token or ''
