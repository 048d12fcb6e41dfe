"""Answers of a model under evaluation, saved so that an evaluation resumes.

Questions are cut into pieces, the longest first; a piece is a call of the model,
so that its numbers do not depend on which pieces were found before. Pieces are
found again by all that they depend on.
"""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxedit.checkpoint import Checkpoint
from jaxedit.deltas import Edited
from jaxedit.edited.lm import LanguageModel, counted
from jaxedit.edited.scoring import Query, Scored
from jaxedit.placement import fetch
from jaxedit.runs.cache import ArrayFiles, digest
from jaxedit.types import Progress, Stopped, silent

# Batches of a piece: what an interrupted run may lose.
_BATCHES = 16

Arrays = Mapping[str, np.ndarray]


class Answers:
  """Pieces of answers in a checkpoint."""

  def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
    """Reads what is there.

    Args:
      folder: of the checkpoint, which need not exist.
      about: what all answers depend on, plain JSON types.
    """
    self._checkpoint, self._about = Checkpoint(folder), about
    self._pieces: dict[str, Arrays] = {}
    # Seconds: of pieces that are not saved, and of a save; the first one loads
    # Orbax.
    self._unsaved, self._cost = 0.0, 1.0
    if found := self._checkpoint.restore():
      _, arrays, record = found
      self._pieces = _apart(arrays, record['pieces'])

  def open(
      self, lm: LanguageModel, edited: Edited, batch_size: int
  ) -> LanguageModel:
    """The same model, whose answers are saved.

    Args:
      lm: the model.
      edited: its edit.
      batch_size: sequences that it runs together.
    """
    leaves = [fetch(leaf) for leaf in jax.tree.leaves(edited.deltas)]
    about = digest(self._about, list(edited.rules), *leaves)
    return _Resumable(lm, self, about, _BATCHES * batch_size)

  def __contains__(self, key: str) -> bool:
    return key in self._pieces

  def __getitem__(self, key: str) -> Arrays:
    return self._pieces[key]

  def add(self, key: str, piece: Arrays, seconds: float) -> None:
    """Adds a piece that took so long; saves it if it is time."""
    self._pieces[key] = piece
    self._unsaved += seconds
    # Saving takes a tenth of the time at most.
    if self._unsaved > 10 * self._cost:
      self.save()

  def save(self) -> None:
    """Saves all pieces, if any is new."""
    if not self._unsaved:
      return
    begin = time.monotonic()
    arrays, pieces = _together(self._pieces)
    self._checkpoint.save(len(pieces), arrays, {'pieces': pieces})
    self._unsaved, self._cost = 0.0, time.monotonic() - begin


class KeptAnswers(Answers):
  """Pieces of answers as files of a folder, which other runs read too."""

  def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
    """See `Answers`; the folder need not exist."""
    # pylint: disable=super-init-not-called
    self._about, self._pieces = about, {}
    self._files = ArrayFiles(folder, {})

  def __contains__(self, key: str) -> bool:
    if key not in self._pieces:
      found = self._files.load(key)
      if found is not None:
        self._pieces[key] = found
    return key in self._pieces

  def add(self, key: str, piece: Arrays, seconds: float) -> None:
    del seconds
    self._pieces[key] = piece
    self._files.save(piece, key)

  def save(self) -> None:
    pass  # each piece was, as it came


def _together(
    pieces: Mapping[str, Arrays],
) -> tuple[dict[str, np.ndarray], list[Any]]:
  """Joins the arrays of a name: a checkpoint of few arrays is written faster.

  Returns:
    (name -> array, [key, name -> length] of every piece).
  """
  names = sorted({name for arrays in pieces.values() for name in arrays})
  joined = {
      name: np.concatenate([a[name] for a in pieces.values() if name in a])
      for name in names
  }
  lengths = lambda arrays: {name: len(x) for name, x in arrays.items()}
  return joined, [[key, lengths(arrays)] for key, arrays in pieces.items()]


def _apart(arrays: Arrays, pieces: Sequence[Any]) -> dict[str, Arrays]:
  """What `_together` has joined."""
  ends = dict.fromkeys(arrays, 0)
  found: dict[str, Arrays] = {}
  for key, lengths in pieces:
    found[key] = {}
    for name, length in lengths.items():
      found[key][name] = arrays[name][ends[name] : ends[name] + length]
      ends[name] += length
  return found


class _Resumable:
  """A `LanguageModel` whose answers are saved piece by piece."""

  def __init__(
      self, lm: LanguageModel, answers: Answers, about: str, size: int
  ):
    self.spec = lm.spec
    self._lm, self._answers, self._about, self._size = lm, answers, about, size

  def score(
      self,
      queries: Sequence[Query],
      *,
      edit_ids: Sequence[int] | None = None,
      progress: Progress = silent,
  ) -> list[list[Scored]]:
    """See `LanguageModel.score`."""

    def call(some: list[int], ids: Any, progress: Progress) -> Arrays:
      asked = [queries[i] for i in some]
      found = self._lm.score(asked, edit_ids=ids, progress=progress)
      return _packed_scores(found)

    return self._by_pieces(
        call,
        [query.tokens for query in queries],
        key=lambda some: ['score', [queries[i] for i in some]],
        unpack=_unpacked_scores,
        edit_ids=edit_ids,
        stage=('score', 'prompt', progress),
    )

  def generate(
      self,
      prompts: Sequence[Sequence[int]],
      *,
      streams: Sequence[int] | None = None,
      stop_texts: Sequence[Sequence[str]] | None = None,
      edit_ids: Sequence[int] | None = None,
      progress: Progress = silent,
      **settings: Any,
  ) -> list[list[int]]:
    """See `LanguageModel.generate`."""
    numbers = range(len(prompts)) if streams is None else streams
    each = lambda some, of: None if of is None else [of[i] for i in some]

    def call(some: list[int], ids: Any, progress: Progress) -> Arrays:
      texts = self._lm.generate(
          each(some, prompts),
          streams=each(some, numbers),
          stop_texts=each(some, stop_texts),
          edit_ids=ids,
          progress=progress,
          **settings,
      )
      return _ragged('text', texts, np.int32)

    def key(some: list[int]) -> list[Any]:
      asked = [list(map(int, prompts[i])) for i in some]
      others = repr((each(some, numbers), each(some, stop_texts)))
      return ['generate', repr(sorted(settings.items())), others, asked]

    return self._by_pieces(
        call,
        [len(prompt) for prompt in prompts],
        key=key,
        unpack=lambda arrays: _rows('text', arrays),
        edit_ids=edit_ids,
        stage=('generate', 'text', progress),
    )

  def _by_pieces(
      self,
      call: Callable[..., Arrays],
      lengths: Sequence[int],
      *,
      key: Callable[[list[int]], list[Any]],
      unpack: Callable[[Arrays], list[Any]],
      edit_ids: Sequence[int] | None,
      stage: tuple[str, str, Progress],
  ) -> list[Any]:
    """Asks piece by piece; returns all answers in order."""
    # Pieces of equal lengths, as the model batches by length.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    results: list[Any] = [None] * len(order)
    name, unit, progress = stage
    known = self._answers
    try:
      with progress(name, len(order), unit) as advance:
        for begin in range(0, len(order), self._size):
          some = order[begin : begin + self._size]
          ids = None if edit_ids is None else [int(edit_ids[i]) for i in some]
          piece = digest(self._about, key(some), ids)
          if piece in known:
            advance(len(some))
          else:
            start = time.monotonic()
            found = call(some, ids, counted(advance))
            known.add(piece, found, time.monotonic() - start)
          for i, answer in zip(some, unpack(known[piece]), strict=True):
            results[i] = answer
    except Stopped:
      known.save()
      raise
    return results


def _packed_scores(found: Sequence[Sequence[Scored]]) -> Arrays:
  """Scores as arrays of one axis."""
  answers = list(itertools.chain.from_iterable(found))
  return {
      'answers': np.array([len(one) for one in found], np.int32),
      'nll': np.array([one.nll for one in answers], np.float64),
      **_ragged('argmax', [one.argmax for one in answers], np.int32),
      **_ragged('correct', [one.correct for one in answers], bool),
  }


def _unpacked_scores(arrays: Arrays) -> list[list[Scored]]:
  """What `_packed_scores` has packed."""
  rows = zip(
      arrays['nll'].tolist(),
      map(tuple, _rows('argmax', arrays)),
      map(tuple, _rows('correct', arrays)),
  )
  scores = itertools.starmap(Scored, rows)
  return [list(itertools.islice(scores, n)) for n in arrays['answers'].tolist()]


def _ragged(name: str, rows: Sequence[Any], dtype: Any) -> Arrays:
  """Rows of different lengths as two arrays."""
  flat = list(itertools.chain.from_iterable(rows))
  return {
      name: np.array(flat, dtype),
      f'{name}_lengths': np.array([len(row) for row in rows], np.int32),
  }


def _rows(name: str, arrays: Arrays) -> list[list[Any]]:
  """What `_ragged` has joined."""
  flat = iter(arrays[name].tolist())
  lengths = arrays[f'{name}_lengths'].tolist()
  return [list(itertools.islice(flat, n)) for n in lengths]
