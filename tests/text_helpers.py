"""Texts as ids, for tests: one call for what a run does in steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxedit.text import encoding, locate, passages
from jaxedit.types import cloze_parts


class Located(NamedTuple):
  """Ids, and the first and the last token of the subject."""

  ids: np.ndarray
  first: int
  last: int


def locate_subject(
    tokenizer: Any, prompt: str, subject: str, prefix: str = ''
) -> Located:
  """Tokenises a filled cloze behind some text and finds its subject."""
  before, after = cloze_parts(prompt)
  case = (prefix + before, subject, after)
  ((ids, span),) = locate.locate_subjects(tokenizer, [case])
  return Located(ids, *span)


def encode_edits(tokenizer: Any, requests: Any, templates: Any, **options: Any):
  """Encodes facts."""
  encoder = encoding.fact_encoder(tokenizer, templates, **options)
  return encoder.encode(requests)


def encode_passages(tokenizer: Any, requests: Any, **options: Any):
  """Encodes long answers."""
  return passages.passage_encoder(tokenizer, **options).encode(requests)
