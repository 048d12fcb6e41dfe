"""Edit requests from files: one loader, one file of code a format.

  counterfact, counterfact_flat, zsre   facts
  akew, unke                            questions with long answers
  jaxedit                               our own, of both kinds, see `own`
  known                                 facts to trace, see `known_facts`

Each module says which fields it reads; `reading` what all files have in common.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jaxedit.eval.datasets import (
    akew,
    counterfact,
    counterfact_flat,
    known_facts,
    own,
    unke,
    zsre,
)
from jaxedit.eval.datasets.fields import FACT, KNOWN, TEXT, Format, Options
from jaxedit.eval.datasets.reading import (
    Check,
    Loaded,
    RequestFile,
    Skipped,
    first_errors,
    unknown,
)
from jaxedit.types import InputError

__all__ = (
    'FACT', 'FORMATS', 'KNOWN', 'TEXT', 'Check', 'Loaded', 'RequestFile',
    'Skipped', 'first_errors', 'kind_of', 'load_requests', 'open_requests',
)  # fmt: skip

_FACTS = (
    counterfact.FORMAT, zsre.FORMAT, counterfact_flat.FORMAT, own.FACTS
)  # fmt: skip
# Tried in this order.
FORMATS: tuple[Format, ...] = (
    akew.FORMAT,
    *_FACTS,
    unke.FORMAT,
    own.TEXTS,
    *map(known_facts.traced, _FACTS),
    known_facts.FORMAT,
)


def load_requests(
    path_or_name: str | os.PathLike[str],
    *,
    check: Check | None = None,
    **options: Any,
) -> Loaded:
  """Loads and validates requests.

  Args:
    path_or_name: a file or the name of a demo.
    check: see `RequestFile.load`.
    **options: of `open_requests`.

  Returns:
    The requests with where they came from.

  Raises:
    InputError: see `open_requests` and `RequestFile.load`.
  """
  return open_requests(path_or_name, **options).load(check)


def open_requests(
    path_or_name: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = (FACT,),
    format: str = 'auto',  # pylint: disable=redefined-builtin
    limit: int | None = None,
    on_bad_record: str = 'fail',
    batch_size: int | None = None,
    **options: Any,
) -> RequestFile:
  """Opens a file of requests, to load with one check or another.

  Args:
    path_or_name: a file; 'demo' for the facts that come with the package, or
      the long answers if those alone are wanted; 'demo_passages' for these.
    kinds: what to read: 'fact', 'text' (long answers) or both; or 'known',
      facts to trace.
    format: name of a format, or 'auto' to tell it by the fields.
    limit: most cases to return, where a request without a case counts as one;
      all by default. With 'fail' only so many are looked at, with 'skip' so
      many good ones are found if the file has them.
    on_bad_record: 'fail' raises, 'skip' passes over cases with bad records.
    batch_size: cases a batch, if they are edited in a sequence of batches: a
      later batch may then edit a fact again.
    **options: fields of `Options`.

  Returns:
    The file.

  Raises:
    InputError: an unreadable file or unknown options, all at once.
  """
  formats = [one for one in FORMATS if one.kind in kinds]
  names = ('auto', *dict.fromkeys(one.name for one in formats))
  chosen = Options(**options)
  problems = unknown('format', format, names)
  problems += unknown('on_bad_record', on_bad_record, ('fail', 'skip'))
  problems += unknown('zsre_target', chosen.zsre_target, zsre.TARGETS)
  problems += unknown('facts', chosen.facts, akew.FACTS)
  if chosen.triplets < 0:
    problems.append(f'triplets {chosen.triplets} is below 0; give 0 or more.')
  if limit is not None and limit < 1:
    problems.append(f'limit {limit} leaves no record; give 1 or more.')
  InputError.raise_for(problems)
  return RequestFile(
      os.fspath(path_or_name),
      formats,
      chosen,
      format=format,
      limit=limit,
      on_bad_record=on_bad_record,
      batch_size=batch_size,
  )


def kind_of(path_or_name: str | os.PathLike[str]) -> str:
  """Says whether a file holds facts ('fact') or long answers ('text').

  Raises:
    InputError: neither, or the file cannot be read.
  """
  return open_requests(path_or_name, kinds=(FACT, TEXT)).kind
