"""GRACE: a codebook of outputs in one layer; weights stay as they are.

  key    q = input of the edited map at the last token of the prompt
  value  v = its output there that makes the model continue with the target
  a query whose key is within the radius of the nearest entry gets its value

Values are optimised on the unedited model, which no entry changes, so all edits
of a batch are optimised side by side; then each is entered in order:

  nearest entry j at distance d         what is done
  none, or d > radius + radius_j        a new entry
  else, another target, d > 0           a new entry of radius d / 2; radius_j is
                                        lowered below d / 2
  else, another target, d = 0           entry j gets the new target and value
  else, the same target                 radius_j becomes d where it is less; the
                                        entry keeps its value

Axis letters: E edits, C entries of the codebook, F key width, D width.

Source: Hartvigsen et al. 2023, "Aging with GRACE" (arXiv 2211.11031). Unlike the
published code, targets are compared as token ids (not by their mean), an entry
that is edited again is overwritten (there its radius becomes negative), a split
never widens a radius, a value that joins an entry is not trained further, and
the codebook is read at the last token of the prompt, once, also while text is
generated from a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.batching import edits as edits_lib
from jaxedit.batching.edits import PackedBatch
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import Codebook, Edited
from jaxedit.methods import radius as radius_lib
from jaxedit.methods.base import (
    NOT_FINITE,
    EditBatch,
    Editor,
    EditResult,
    Info,
    Method,
    Need,
    Run,
    TargetReport,
    check_layers,
    empty_info,
    per_edit,
)
from jaxedit.methods.config import TargetedConfig
from jaxedit.methods.settings import setting
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.targets import TargetConfig
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, InputError, Params, Tap

SITE = 'mlp/down'
# A value may take any length.
_UNBOUNDED = 1e6
# Keys nearer than this share of their length are the same prompt.
_SAME = 1e-6
# A split radius stays this much below half the distance, as published.
_GAP = 1e-5
_FULL = (
    'the codebook is full; give it more entries (--capacity) or a larger radius'
)


@dataclasses.dataclass(frozen=True)
class GraceConfig(TargetedConfig):
  """Settings of GRACE; the defaults are those published for GPT-J.

  Attributes:
    radius: first radius of an entry.
    capacity: entries at most.
  """

  layers: tuple[int, ...] = setting(
      (25,), 'layer of the codebook', source='GPT-J, EasyEdit'
  )
  target: TargetConfig = TargetConfig(
      steps=200, rate=1.0, decay=0.0, clamp=_UNBOUNDED, kl=0.0, threshold=0.0
  )
  radius: float = setting(
      1.0,
      'radius of a new entry, Euclidean distance between keys; a tenth of their'
      ' median length is a start for other models, --suggest_radius proposes one',
      source='GRACE',
      low=0,
      exclusive=True,
  )
  capacity: int = setting(4096, 'entries of the codebook at most', low=1)
  anchor: str = 'prompt_last'

  @property
  def output(self) -> str:
    """Values are outputs of the edited map."""
    return 'mlp'


class State(NamedTuple):
  """A codebook on the host; rows past `count` are zero.

  Attributes:
    keys: [C, F].
    values: [C, D].
    radii: [C].
    labels: [C, 8] uint32, digest of an entry's target.
    count: [] int32 entries in use.
  """

  keys: np.ndarray
  values: np.ndarray
  radii: np.ndarray
  labels: np.ndarray
  count: np.ndarray


class Entry(NamedTuple):
  """One edit on its way into a codebook."""

  key: np.ndarray  # [F]
  value: np.ndarray  # [D]
  label: np.ndarray  # [8]


def empty(capacity: int, fan_in: int, fan_out: int, dtype: Any) -> State:
  """Makes a codebook without entries."""
  zeros = lambda *shape: np.zeros((capacity, *shape), dtype)
  labels = np.zeros((capacity, 8), np.uint32)
  return State(zeros(fan_in), zeros(fan_out), zeros(), labels, np.int32(0))


def label_of(target: Sequence[int]) -> np.ndarray:
  """Digest [8] uint32 of a target's token ids."""
  ids = np.ascontiguousarray(target, np.int64)
  return np.frombuffer(hashlib.sha256(ids.tobytes()).digest(), np.uint32)


def enter(book: State, entry: Entry, radius: float) -> bool:
  """Enters one edit into a codebook, in place; see the module head.

  Args:
    book: whose arrays are changed, all but `count`, which the caller raises
      where an entry was added.
    entry: the edit.
    radius: first radius of an entry.

  Returns:
    Whether an entry was added.

  Raises:
    IndexError: it needs an entry and it is full.
  """
  count = int(book.count)
  near, distance = -1, np.inf
  if count:
    away = book.keys[:count].astype(np.float64) - entry.key
    distances = np.linalg.norm(away, axis=-1)
    near = int(np.argmin(distances))
    distance = float(distances[near])
  if distance <= radius + (book.radii[near] if count else 0):
    same = np.array_equal(book.labels[near], entry.label)
    if same:
      book.radii[near] = max(book.radii[near], distance)
      return False
    if distance <= _SAME * max(float(np.linalg.norm(entry.key)), 1e-30):
      book.values[near], book.labels[near] = entry.value, entry.label
      return False
    radius = distance / 2
  if count == len(book.keys):
    raise IndexError
  if distance < np.inf and radius == distance / 2:
    book.radii[near] = min(book.radii[near], max(distance / 2 - _GAP, 0))
  book.keys[count], book.values[count] = entry.key, entry.value
  book.radii[count], book.labels[count] = radius, entry.label
  return True


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _read_keys(
    spec: ModelSpec, params: Params, batch: PackedBatch, *, layer: int
) -> Array:
  """Keys [B, F] at the anchors of a packed batch of plain prompts."""
  index = batch.anchor[:, 0]
  read = lambda x: jnp.take(x[0], index, axis=0, mode='fill', fill_value=0)
  h = decoder.embed(spec, params, batch.tokens, batch.rows)
  _, (found,) = decoder.run_layers(
      spec,
      params,
      h,
      batch.rows,
      start=0,
      stop=layer + 1,
      taps=(Tap(SITE, (layer,), read),),
  )
  return found[0].astype(wide(found.dtype))


def keys_of(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    *,
    layer: int,
) -> np.ndarray:
  """Reads the keys of edits at the last tokens of their prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits.
    plan: static shapes of the run.
    layer: of the codebook.

  Returns:
    [E, F] keys.
  """
  found = []
  for batch in edits_lib.pack_prompts(edits, plan.independent(), plain=True):
    keys = np.asarray(_read_keys(spec, params, batch, layer=layer))
    found.append(keys[batch.edit >= 0])
  return np.concatenate(found)


def grace(spec: ModelSpec, config: GraceConfig) -> Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. Its edit is a `Codebook` of all entries so far. Independent edits
    start from the state's codebook.

  Raises:
    InputError: not exactly one layer, or one that the model lacks.
  """
  check_layers(spec, config.layers)
  if len(config.layers) != 1:
    raise InputError(
        f'layers {list(config.layers)}: the codebook is in one layer; name one'
    )
  (layer,) = config.layers
  spec = dataclasses.replace(spec, activations=config.activations)

  def init(model: Any, resources: Mapping[Need, Any]) -> State:
    del resources
    dtype = wide(model.params['embed']['embedding'].dtype)
    return empty(config.capacity, spec.mlp_width, spec.width, dtype)

  def edit(model: Any, state: State, batch: EditBatch, run: Run) -> EditResult:
    if not batch.encoded:
      info = empty_info(spec, config.layers)
      return EditResult(_edited(config, state, state.count), state, info)
    begin = time.monotonic()
    found, work = targets_lib.optimize(
        spec,
        model.params,
        batch.encoded,
        plan=batch.plan,
        objective=targets_lib.Objective(layer, config.target, config.output),
        cache=run.cache,
        progress=run.progress,
    )
    targets = jax.tree.map(lambda *x: np.concatenate(x), *found)
    middle = time.monotonic()
    keys = keys_of(spec, model.params, batch.encoded, batch.plan, layer=layer)
    entries = [
        Entry(key, value, label_of(one.target))
        for key, value, one in zip(keys, targets.z, batch.encoded)
    ]
    finite = targets.finite & np.isfinite(keys).all(-1)
    joint = batch.group is None
    group = np.zeros(len(entries), int) if joint else np.asarray(batch.group)
    books, written = [], finite.copy()
    for number in range(int(group.max()) + 1):
      mine = np.flatnonzero((group == number) & finite)
      # Side by side, a book holds its own entries only.
      limit = None if joint else int(state.count) + np.bincount(group).max()
      book, full = _entered(state, [entries[i] for i in mine], config, limit)
      written[mine[full]] = False
      books.append(book)
    report = TargetReport(
        targets,
        np.arange(len(entries), dtype=np.int32),
        np.stack([np.ones(len(entries)), ~written]).astype(targets.z.dtype),
    )
    reason = _FULL if finite.any() else NOT_FINITE
    info = Info(
        written=written,
        seconds={
            'optimize': middle - begin,
            'insert': time.monotonic() - middle,
        },
        per_edit=per_edit(report, len(entries)),
        targets=report,
        work=work,
        reason='' if written.any() else reason,
    )
    if joint:
      return EditResult(
          _edited(config, books[0], books[0].count), books[0], info
      )
    stacked = State(*map(np.stack, zip(*books)))
    edited = _edited(config, stacked, stacked.count, size=len(books))
    return EditResult(edited, state, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del model
    return 4 * (spec.mlp_width + spec.width) * len(edits)

  return Editor((), init, edit, bytes_of=bytes_of, cumulative=True)


def _entered(
    state: State,
    entries: Sequence[Entry],
    config: GraceConfig,
    limit: int | None,
) -> tuple[State, list[int]]:
  """Enters edits in order.

  Returns:
    (a new codebook, of `limit` entries where given; which edits found it full).
  """
  size = slice(limit)
  book = State(*(np.array(x[size]) for x in state[:-1]), state.count)
  full = []
  for i, entry in enumerate(entries):
    try:
      added = enter(book, entry, config.radius)
    except IndexError:
      full.append(i)
      continue
    book = book._replace(count=np.int32(book.count + added))
  return book, full


def _edited(
    config: GraceConfig, book: State, count: np.ndarray, size: int | None = None
) -> Edited:
  """The edit that a codebook is; of none without entries."""
  if not np.any(count):
    return Edited(size=size)
  lead = lambda x: jnp.asarray(x)[None]
  codebook = Codebook(
      config.layers,
      SITE,
      lead(book.keys),
      lead(book.values),
      lead(book.radii),
      lead(count),
  )
  return Edited((codebook,), size=size)


METHOD = Method(
    'grace',
    'a codebook of outputs in one layer, for a stream of edits',
    GraceConfig,
    grace,
    chunkable=False,
    contexts=False,
    source='arXiv 2211.11031',
    small={'radius': 1e-3, 'capacity': 16},
    proposals={
        'radius': lambda config, inputs: radius_lib.propose(
            inputs, site=SITE, layer=config.layers[0]
        )
    },
)
