"""Records that an editor is trained on, split by subject."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxedit.eval import datasets
from jaxedit.eval.datasets import Loaded
from jaxedit.methods.hypernet.network import subject_hash
from jaxedit.types import EditRequest, InputError


@dataclasses.dataclass(frozen=True)
class Examples:
  """What is trained on and held out.

  Attributes:
    train: records, as `network.Course.example` makes them.
    held_out: records with other subjects.
    excluded: records that were left out for their subject.
    unusable: records that lack a probe, or are too long.
    loaded: what they were read from.
  """

  train: tuple[Any, ...]
  held_out: tuple[Any, ...]
  excluded: int
  unusable: int
  loaded: Loaded


def load(
    config: Any,
    training: Any,
    example: Callable[[EditRequest], Any],
    longest: int,
) -> Examples:
  """Reads records and splits them by subject.

  Args:
    config: `training.TrainConfig`.
    training: settings of the method.
    example: makes the example of a request, None if it is of no use.
    longest: a text's length that it refuses, tokens.

  Returns:
    The records.

  Raises:
    InputError: a file cannot be read, or too few records are left.
  """
  read = functools.partial(datasets.load_requests, on_bad_record='skip')
  loaded = read(config.data, limit=config.num_records)
  excluded = set()
  if config.exclude:
    kept_out = datasets.load_requests(config.exclude).requests
    excluded = {subject_hash(one.subject) for one in kept_out}
  left = [
      one
      for one in loaded.requests
      if subject_hash(one.subject) not in excluded
  ]
  found = [one for one in map(example, left) if one is not None]
  train, held_out = _split(found, config.held_out, config.seed)
  if training.batch_size % training.edits:
    raise InputError(
        f'--edits={training.edits} does not divide'
        f' --batch_size={training.batch_size}; change one of them'
    )
  least = max(2, training.batch_size)
  if len(train) < least or len(held_out) < training.edits:
    raise InputError(
        f'--data={config.data}: {len(train)} records to train on and'
        f' {len(held_out)} held out are too few, of {len(loaded.requests)} good'
        f' ones ({len(loaded.requests) - len(left)} excluded,'
        f' {len(left) - len(found)} without a rephrased and a local prompt, or'
        f' longer than {longest} tokens); {least} are needed to train on and'
        f' {training.edits} to hold out: give more records, or a lower'
        ' --batch_size or --held_out'
    )
  return Examples(
      tuple(train),
      tuple(held_out),
      len(loaded.requests) - len(left),
      len(left) - len(found),
      loaded,
  )


def _split(
    records: Sequence[Any], held_out: int, seed: int
) -> tuple[list[Any], list[Any]]:
  """Holds out the records of some subjects, drawn by a seed."""
  subjects = list(dict.fromkeys(one.subject for one in records))
  order = np.random.default_rng(seed).permutation(len(subjects))
  wanted, chosen = min(held_out, len(records) // 2), set()
  count = collections.Counter(one.subject for one in records)
  for i in order:
    if sum(count[s] for s in chosen) >= wanted:
      break
    chosen.add(subjects[i])
  train = [one for one in records if one.subject not in chosen]
  return train, [one for one in records if one.subject in chosen]
