"""The long answers that `benchmark` edits: read, checked, and cut into chunks.

Questions stand in the chat template of the tokenizer. Nothing here measures.
"""

from __future__ import annotations

from typing import Any

from jaxedit.eval import passages
from jaxedit.models.spec import ModelSpec
from jaxedit.text import chat as chat_lib
from jaxedit.text import passages as text_passages
from jaxedit.text.chat import Chat
from jaxedit.text.chunking import Chunking
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Passage


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
) -> tuple[tuple[Passage, ...], list[EncodedEdit]]:
  """Reads passages that can be edited.

  Args:
    source: "demo" or a file, see `eval.passages`.
    tokenizer: of the model.
    spec: the architecture.
    chunks: how answers are cut.
    limit: how many passages; of a file with cases, how many cases.
    on_bad_record: 'fail' or 'skip'.
    max_answer_tokens: longest answer, its end left out, or None; a longer one
      is a faulty record.

  Returns:
    (the passages, their ids).

  Raises:
    InputError: faulty records, or no chat template.
  """
  options = dict(
      chat=chat(tokenizer), max_tokens=spec.max_positions, chunking=chunks
  )
  check = text_passages.passage_check(tokenizer, **options)
  found = passages.load_passages(
      source,
      limit=limit,
      on_bad_record=on_bad_record,
      check=lambda x: check(x) or _too_long(tokenizer, x, max_answer_tokens),
  ).records
  edits = text_passages.encode_passages(tokenizer, found, **options)
  return tuple(found), edits


def _too_long(tokenizer: Any, passage: Passage, limit: int | None) -> list[str]:
  """The fault of an answer over the limit."""
  ids = tokenizer(passage.answer, add_special_tokens=False)['input_ids']
  if limit is None or len(ids) <= limit:
    return []
  return [
      f'its answer takes {len(ids)} tokens, more than'
      f' --max_answer_tokens={limit}; shorten it, raise the limit or pass over'
      ' such records with --on_bad_record=skip.'
  ]
