"""The long answers that `benchmark` edits: read, checked, and cut into chunks.

Questions stand in the chat template of the tokenizer. Nothing here measures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jaxedit.eval import datasets
from jaxedit.models.spec import ModelSpec
from jaxedit.text import chat as chat_lib
from jaxedit.text import passages as text_passages
from jaxedit.text.chat import Chat
from jaxedit.text.chunking import Chunking
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import EditRequest


def chat(tokenizer: Any) -> Chat:
  """The words around a question.

  Raises:
    InputError: the tokenizer has no chat template that can be used.
  """
  return chat_lib.chat_of(tokenizer, chat_lib.TEMPLATE)


def read(
    source: str,
    tokenizer: Any,
    spec: ModelSpec,
    chunks: Chunking,
    *,
    limit: int,
    on_bad_record: str,
    max_answer_tokens: int | None,
) -> tuple[tuple[EditRequest, ...], list[EncodedEdit]]:
  """Reads questions with answers that can be edited.

  Args:
    source: "demo" or a file, see `eval.datasets`.
    tokenizer: of the model.
    spec: the architecture.
    chunks: how answers are cut.
    limit: how many; of a file with cases, how many cases.
    on_bad_record: 'fail' or 'skip'.
    max_answer_tokens: longest answer, its end left out, or None; a longer one
      is a bad record.

  Returns:
    (the requests, their ids).

  Raises:
    InputError: bad records, or no chat template.
  """
  encoder = text_passages.passage_encoder(
      tokenizer,
      chat=chat(tokenizer),
      max_tokens=spec.max_positions,
      chunking=chunks,
  )
  long = functools.partial(_too_long, tokenizer, max_answer_tokens)
  found = datasets.load_requests(
      source,
      kinds=(datasets.TEXT,),
      limit=limit,
      on_bad_record=on_bad_record,
      check=datasets.first_errors(encoder.check, long),
  ).requests
  return found, encoder.encode(found)


def _too_long(
    tokenizer: Any, limit: int | None, requests: Sequence[EditRequest]
) -> list[list[str]]:
  """Lists answers over the limit."""
  errors: list[list[str]] = [[] for _ in requests]
  for own, request in zip(errors, requests):
    ids = tokenizer(request.target, add_special_tokens=False)['input_ids']
    if limit is not None and len(ids) > limit:
      own.append(
          f'its answer takes {len(ids)} tokens, more than'
          f' --max_answer_tokens={limit}; shorten it, raise the limit or pass'
          ' over such records with --on_bad_record=skip.'
      )
  return errors
