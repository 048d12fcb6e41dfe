"""Turns questions with long answers into rows of ids.

A request has one row, its question in the words of the chat, and its target is
the answer with the text that ends it:

  t t t t t A | y y y y y y y y y y y e
            anchor: the row's last token

The answer is tokenised apart from the question and without special tokens in
front, so that the labels do not depend on the question. Special tokens that are
written out, such as the end of turn, become the tokens they name. With chunks
the target is foretold by several states, see `chunking`.

A blank joins an answer to what asks it where `joining.continuation` says so, as
it joins a fact's target.

Source: the rows of UnKE (Deng et al. 2024, arXiv 2405.15349) and AnyEdit (Jiang
et al. 2025, arXiv 2502.05628). Published code writes the BOS token of some
models into the question and has the tokenizer add another; `double_bos` keeps
both.

It holds numpy arrays only, knows nothing of models and reads no files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit.text import chunking as chunking_lib
from jaxedit.text import locate
from jaxedit.text.chat import Chat
from jaxedit.text.chunking import Chunking
from jaxedit.text.encoding import Drafted, EncodedEdit, Encoder
from jaxedit.text.joining import continuation
from jaxedit.text.token_cache import TokenCache, token_cache
from jaxedit.types import EditRequest


class _Options(NamedTuple):
  """What requests are encoded with; see `passage_encoder`."""

  chat: Chat
  max_tokens: int
  chunking: Chunking | None
  double_bos: bool


def passage_encoder(
    tokenizer: Any,
    *,
    chat: Chat,
    max_tokens: int,
    chunking: Chunking | None = None,
    double_bos: bool = False,
) -> Encoder:
  """Makes the encoder of questions with long answers.

  An `EncodedEdit` has one row, its last token as the anchor and no KL row. Its
  chunks are empty where one would do.

  Args:
    tokenizer: a fast transformers tokenizer, or its `TokenCache`.
    chat: words around the question and behind the answer.
    max_tokens: most tokens of question and answer together, the end included,
      as all of them are run at last; the model's context length.
    chunking: how to cut targets, or None for one state a request.
    double_bos: let the tokenizer add its special tokens even where the chat
      brings the BOS token.

  Returns:
    The encoder; it refuses questions and answers without tokens, and requests
    that are too long.

  Raises:
    InputError: chunks that cannot be.
  """
  if chunking is not None:
    chunking_lib.check_chunking(chunking)
  tokens = token_cache(tokenizer)
  options = _Options(chat, max_tokens, chunking, double_bos)
  return Encoder(
      functools.partial(_draft, tokens, options=options), tokens.known(options)
  )


def encode_questions(
    tokenizer: Any,
    questions: Sequence[str],
    chat: Chat,
    double_bos: bool = False,
) -> list[list[int]]:
  """Encodes questions as prompts for generation.

  Args:
    tokenizer: a fast transformers tokenizer, or its `TokenCache`.
    questions: the bare questions.
    chat: words around them.
    double_bos: see `passage_encoder`; asked like the edits were made.

  Returns:
    The ids of every question, up to where its answer begins.

  Raises:
    InputError: the tokenizer gives no offsets.
  """
  wrapped = [chat.wrap(question) for question in questions]
  rows = token_cache(tokenizer).prompts(wrapped, double_bos)
  return [row.tolist() for row in rows]


def _draft(
    tokens: TokenCache, requests: Sequence[EditRequest], options: _Options
) -> list[Drafted]:
  """Tokenises requests in one go, leaving errors beside the edits."""
  wrapped = [options.chat.wrap(request.prompt) for request in requests]
  rows = tokens.prompts(wrapped, options.double_bos)
  answers = _answers(tokens, requests, options.chat)
  drafts = []
  for request, row, (text, ids, offsets) in zip(requests, rows, answers):
    errors = []
    if not request.prompt.strip() or not len(row):
      errors.append(
          f'the question {request.prompt!r} has no tokens; give it some text.'
      )
    if not any(begin < min(end, len(text)) for begin, end in offsets):
      errors.append(
          f'the answer {request.target!r} has no tokens; give it some text.'
      )
    errors += _length_errors(len(row), len(ids), options.max_tokens)
    chunks = ()
    if options.chunking is not None and not errors:
      chunks = chunking_lib.chunk(text, ids, offsets, options.chunking)
    chunks = chunks if len(chunks) > 1 else ()
    kl = np.zeros([0], np.int32)
    anchors = (len(row) - 1,)
    edit = EncodedEdit(request.number, (row,), anchors, ids, kl, chunks)
    drafts.append((edit, errors))
  return drafts


def _answers(
    tokens: TokenCache, requests: Sequence[EditRequest], chat: Chat
) -> list[tuple[str, np.ndarray, list[tuple[int, int]]]]:
  """Tokenises answers with their ends: (text without end, ids, offsets)."""
  end, texts = locate.valid_unicode(chat.end), []
  for one in requests:
    asked, target = chat.wrap(one.prompt), locate.valid_unicode(one.target)
    texts.append(continuation(asked, target, one.space, tokens.special) + end)
  found = locate.encode_continuations(tokens.tokenizer, texts)
  return [(text.removesuffix(end), *rest) for text, *rest in found]


def _length_errors(question: int, answer: int, max_tokens: int) -> list[str]:
  total = question + answer
  if total <= max_tokens:
    return []
  return [
      f'question and answer take {total} tokens ({question} of question,'
      f' {answer} of answer), the limit is {max_tokens}; shorten them.'
  ]
