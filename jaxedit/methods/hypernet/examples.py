"""Examples that a hyper-network is trained on: ids, and states at hand.

A record is three texts: the prompt of the edit with its target, a rephrased
prompt with the same target, and a local prompt with its own answer. Texts are
padded to a few shapes; a batch has one of them. What the layers below the edited
ones compute is constant, so it is computed once a text and kept.

Axes as in `jaxedit.types`: B records of a batch, T tokens, O scored tokens.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.hypernet.factors import Maps, Sequences, Text
from jaxedit.methods.hypernet.network import subject_hash
from jaxedit.methods.hypernet.training import Batch, Training
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.text.locate import Continued
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import LOCALITY, REPHRASE, EditRequest, Progress

# Lengths to which texts are padded: of the edit, of others, and scored tokens.
_EDIT, _OTHER, _SCORED = (12, 16, 24), (12, 16, 24), (1, 4)
# A shape of fewer records than this share joins a larger one.
_LEAST = 0.1
# Texts that are run at once to find their states.
_AT_ONCE = 32

Shape = tuple[int, int, int]


class Example(NamedTuple):
  """One record as ids.

  Attributes:
    subject: hash of its subject.
    edit: the prompt with the target.
    outer: a rephrased prompt with the target.
    local: a prompt that the edit does not concern, with its answer.
  """

  subject: str
  edit: Text
  outer: Text
  local: Text


def example(
    request: EditRequest, tokens: TokenCache, training: Training, longest: int
) -> Example | None:
  """Encodes a request.

  Args:
    request: the request.
    tokens: of the model's tokenizer.
    training: settings of the method.
    longest: length of a text that is too long, tokens.

  Returns:
    The example; None if it lacks a probe, or a text has no token or too many.
  """
  local = request.probes_of(LOCALITY)[:1]
  outer = request.probes_of(REPHRASE)[:1]
  if not local or not outer:
    return None
  prompts = (request.question, outer[0].prompt, local[0].prompt)
  answers = (request.target, request.target, local[0].answers[0])
  spaces = (request.space, outer[0].space, local[0].space)
  continued = map(Continued, prompts, answers, spaces)
  prompts, answers = tokens.prompts(prompts), tokens.targets([*continued])
  if not all(map(len, (*prompts, *answers))):
    return None
  texts = [lib.answer(*one) for one in zip(prompts, answers)]
  texts[2] = _local(texts[2], training.locality_tokens)
  found = Example(subject_hash(request.subject), *texts)
  return found if _fits(found, longest) else None


def _local(text: Text, which: str) -> Text:
  """Chooses the tokens of a local text whose distributions are compared."""
  if which == 'answer':
    return text
  if which == 'after':
    tokens = np.append(text.tokens, text.labels[-1])
    return Text(tokens, text.index + 1, text.labels)
  index = np.flatnonzero(text.tokens >= 0).astype(np.int32)  # no source
  return Text(text.tokens, index, np.zeros_like(index))


def _fits(record: Example, longest: int) -> bool:
  # The text of an edit has one token more, its last label.
  return all(len(text.tokens) < longest for text in record[1:])


def _rung(n: int, ladder: Sequence[int]) -> int:
  """The least of a ladder that is not below n; beyond it, multiples of 8."""
  return next((x for x in ladder if x >= n), -(-n // 8) * 8)


def shapes_of(records: Sequence[Example], least: int = 1) -> list[Shape]:
  """Chooses the shape of every record, few in all.

  Args:
    records: the records.
    least: records of a shape, where there are more than one.

  Returns:
    (tokens of the edit, of others, scored tokens) a record.
  """
  found = []
  for one in records:
    others = max(len(text.tokens) for text in (one.outer, one.local))
    scored = max(len(text.index) for text in one[1:])
    lengths = (len(one.edit.tokens), others, scored)
    ladders = (_EDIT, _OTHER, _SCORED)
    found.append(tuple(map(_rung, lengths, ladders)))
  while True:
    count = collections.Counter(found)
    few = max(least, _LEAST * len(records))
    rare = [s for s, n in count.items() if n < few]
    if not rare or len(count) == 1:
      return found
    rare = min(rare, key=lambda s: (count[s], s))
    above = [s for s in count if s != rare and all(map(int.__ge__, s, rare))]
    goal = min(above, key=lambda s: (np.prod(s), s), default=None)
    if goal is None:  # the largest: it takes the most frequent one's place
      other = max((s for s in count if s != rare), key=lambda s: (-count[s], s))
      goal = tuple(map(max, rare, other))
      found = [goal if s in (rare, other) else s for s in found]
    else:
      found = [goal if s == rare else s for s in found]


class Prepared:
  """Examples with the states that enter the first edited layer."""

  def __init__(
      self,
      model: Model,
      maps: Maps,
      records: Sequence[Example],
      progress: Progress,
      least: int = 1,
  ):
    """Runs the layers below the edited ones.

    Args:
      model: the unedited model.
      maps: the edited maps.
      records: the records.
      progress: progress display.
      least: records of a shape at least, so that each gives a batch.
    """
    self.shapes = shapes_of(records, least)
    self._records = records
    self._place = np.zeros(len(records), np.int64)
    self._arrays: dict[Shape, list[Any]] = {}
    with progress('prepare', len(records), 'record') as advance:
      for shape in sorted(set(self.shapes)):
        mine = [i for i, s in enumerate(self.shapes) if s == shape]
        self._place[mine] = np.arange(len(mine))
        some = [records[i] for i in mine]
        self._arrays[shape] = _states(model, maps, some, shape, advance)

  def batch(self, indices: Sequence[int], count: int, outer: Any) -> Batch:
    """Makes a batch.

    Args:
      indices: records of one shape.
      count: B; records past the last one are empty.
      outer: [B] bool, whether a record is asked its rephrased prompt, not that
        of the edit.
    """
    shape = self.shapes[indices[0]]
    some = [self._records[i] for i in indices]
    place = self._place[np.asarray(indices)]
    edit_h, outer_h, local_h, local_out = self._arrays[shape]
    ends = (shape[0], shape[1], shape[1])
    pick = lambda x, width: _padded(x[place], count, width)
    asked = [one.outer if far else one.edit for one, far in zip(some, outer)]
    far = fetch(outer)[: len(some), None, None]
    chosen = np.where(
        far, outer_h[place], _wider(edit_h[place], outer_h.shape[1])
    )
    texts = ([one.edit for one in some], asked, [one.local for one in some])
    packed = [
        lib.pack(group, (count, end, shape[2]))
        for group, end in zip(texts, ends)
    ]
    return Batch(
        packed[0], pick(edit_h, ends[0]),
        packed[1], _padded(chosen, count, ends[1]),
        packed[2], pick(local_h, ends[2]),
        _padded(local_out[place], count, shape[2]),
    )  # fmt: skip

  def epoch(self, size: int, seed: Sequence[int]) -> Iterator[list[int]]:
    """Yields batches of one shape each, in random order, none of them short."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(self.shapes))
    waiting: dict[Shape, list[int]] = collections.defaultdict(list)
    for i in order:
      group = waiting[self.shapes[i]]
      group.append(int(i))
      if len(group) == size:
        yield list(group)
        group.clear()

  def everything(self, size: int) -> Iterator[list[int]]:
    """Yields all records in batches of one shape each, some of them short."""
    for shape in sorted(set(self.shapes)):
      mine = [i for i, s in enumerate(self.shapes) if s == shape]
      for first in range(0, len(mine), size):
        yield mine[first : first + size]


def _wider(x: np.ndarray, width: int) -> np.ndarray:
  """Pads or cuts [B, T, D] to a number of tokens."""
  x = x[:, :width]
  return np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)))


def _padded(x: np.ndarray, count: int, width: int) -> np.ndarray:
  """Pads [b, t, D] to [count, width, D]."""
  x = _wider(x, width)
  return np.pad(x, ((0, count - len(x)), (0, 0), (0, 0)))


def _states(
    model: Model,
    maps: Maps,
    records: Sequence[Example],
    shape: Shape,
    advance: Callable[[int], None],
) -> list[np.ndarray]:
  """States of edit, outer and local texts, and outputs of local ones."""
  found: list[list[np.ndarray]] = [[], [], [], []]
  widths = (shape[0], shape[1], shape[1])
  for first in range(0, len(records), _AT_ONCE):
    some = records[first : first + _AT_ONCE]
    for kind, width in enumerate(widths):
      texts = lib.pack(
          [one[1 + kind] for one in some], (_AT_ONCE, width, shape[2])
      )
      last = kind == 2
      h, out = enter(model.spec, model.params, texts, maps.layers[0], last)
      found[kind].append(fetch(h)[: len(some)])
      if last:
        found[3].append(fetch(out)[: len(some)])
    advance(len(some))
  return [np.concatenate(parts) for parts in found]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def enter(
    spec: ModelSpec, params: Any, texts: Sequences, first: int, outputs: bool
) -> tuple[Any, Any]:
  """Runs texts up to a layer, and to the end where outputs are wanted.

  Returns:
    ([B, T, D] states that enter the layer, [B, O, D] outputs of the last layer
    at scored tokens or None).
  """
  h = lib.enter(spec, params, texts, first)
  out = lib.leave(spec, params, h, texts, first=first)[0] if outputs else None
  return h, out
