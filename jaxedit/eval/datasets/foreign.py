"""Formats of other projects' files that are told by name, but not read.

Their fields are partly ours, so that a record would be taken for one of another
format, and an error would speak of fields that it never had.

Sources: KnowEdit (Zhang et al. 2024, arXiv 2401.01286) with its part of WikiBio;
WikiBigEdit (Thede et al. 2025, arXiv 2503.05683); CKnowEdit (Fang et al. 2024,
arXiv 2409.05806); MQuAKE (Zhong et al. 2023, arXiv 2305.14795).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Data = Mapping[str, Any]


def _has(*names: str) -> Callable[[Data], bool]:
  return lambda data: all(name in data for name in names)


def _is_knowedit(data: Data) -> bool:
  flat = 'locality_prompt' in data or not _has('prompt', 'target_new')(data)
  given = (data.get('portability'), data.get('locality'))
  return not flat and 'ground_truth' in data and bool(any(given))


def _is_mquake(data: Data) -> bool:
  rewrites = data.get('requested_rewrite')
  if not isinstance(rewrites, list) or not rewrites or 'questions' not in data:
    return False
  return not any(isinstance(x, dict) and 'fact_new_uns' in x for x in rewrites)


_OWN = "write each as a record of our own format ('prompt', 'subject', 'target_new'"
# Name -> (whether an object is one of it, how to give its records instead).
_FORMATS: Mapping[str, tuple[Callable[[Data], bool], str]] = {
    'KnowEdit': (
        _is_knowedit,
        f"{_OWN}, 'target_true' from ground_truth; 'portability', and locality as"
        " 'neighbours')",
    ),
    'WikiBio of KnowEdit': (
        _has('text', 'labels', 'concept'),
        "write each as a record with 'question' (the text) and 'answer' (the"
        ' labels)',
    ),
    'WikiBigEdit': (
        _has('update', 'ans'),
        f"{_OWN}: update and ans; 'paraphrases' from rephrase, 'neighbours' from"
        ' loc)',
    ),
    'CKnowEdit': (
        _has('target_old', 'target_new', 'prompt'),
        f"{_OWN}, 'target_true' from target_old), or, where there is no subject,"
        " as one with 'question' and 'answer'",
    ),
    'MQuAKE': (
        _is_mquake,
        f"{_OWN}) a rewrite; its questions of several hops go to 'portability'",
    ),
}


def refused(data: Data) -> str | None:
  """Says that an object is of a format that is not read.

  Args:
    data: the object.

  Returns:
    A sentence to follow the record's name, or None.
  """
  for name, (matches, way) in _FORMATS.items():
    if matches(data):
      return f'is one of {name}, a format that is not read; {way}.'
  return None
