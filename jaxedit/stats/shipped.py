"""Texts that the demo model has sampled, shipped so that a first run need not.

`smollm2_135m_instruct.jsonl` holds an object that says what was sampled how, then
a text a line in the order of sampling: a string, or a list of token ids where the
tokenizer would cut the string otherwise. They are what `corpora.sample` draws for
the same identity, and stand for its first batches; a larger sample goes on from
there. To make them anew: `python -m experiments.collect_moments` with the flags
that the object names, interrupted after the sampling, leaves the ids beside --out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit import io

_FILE = pathlib.Path(__file__).parent / 'smollm2_135m_instruct.jsonl'


def texts(
    identity: Mapping[str, Any], tokenizer: Any
) -> tuple[list[list[int]], int]:
  """Finds texts that were sampled with the same model and settings.

  Args:
    identity: all that samples depend on, see `corpora.sample`.
    tokenizer: of the model.

  Returns:
    (token ids of every text, batches they are of), ([], 0) where there are none.
  """
  with _FILE.open(encoding='utf-8') as lines:
    about = io.parse_json(next(lines))
    if about['identity'] != dict(identity):
      return [], 0
    found = list(map(io.parse_json, lines))
  strings = [one for one in found if isinstance(one, str)]
  read = iter(tokenizer(strings)['input_ids'])
  ids = [next(read) if isinstance(one, str) else one for one in found]
  # Another version of the tokenizer may cut texts otherwise.
  return (ids, about['batches']) if digest(ids) == about['ids'] else ([], 0)


def digest(ids: Sequence[Sequence[int]]) -> str:
  """SHA-256 of texts as ids."""
  found = hashlib.sha256(np.array(list(map(len, ids)), '<i4').tobytes())
  found.update(np.array(list(itertools.chain(*ids)), '<i4').tobytes())
  return found.hexdigest()


def write(
    path: io.StrPath,
    ids: Sequence[Sequence[int]],
    tokenizer: Any,
    about: Mapping[str, Any],
) -> None:
  """Writes such a file.

  Args:
    path: the file.
    ids: texts.
    tokenizer: of the model.
    about: 'identity', 'batches' and what a reader should know.
  """
  lines: list[Any] = [{**about, 'ids': digest(ids)}]
  for text in map(list, ids):
    string = tokenizer.decode(text)
    lines.append(string if tokenizer(string)['input_ids'] == text else text)
  dump = lambda line: json.dumps(line, ensure_ascii=False) + '\n'
  io.write_text(path, ''.join(map(dump, lines)))
