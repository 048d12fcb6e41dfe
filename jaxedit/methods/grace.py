"""GRACE: a codebook of outputs in one layer; weights stay as they are.

  key    q = input of the edited map at the last token of the prompt
  value  v = its output there that makes the model continue with the target
  a query whose key is within the radius of the nearest entry gets its value

Values are optimised on the unedited model, which no entry changes, so all edits
of a batch are optimised side by side; then each is entered in order, by the rules
of `edited.codebook`.

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
from jaxedit.edited import ledger as ledger_lib
from jaxedit.edited.codebook import (
    Entry,
    History,
    State,
    empty,
    entered,
    label_of,
    no_history,
)
from jaxedit.edited.ledger import Ledger
from jaxedit.methods import base
from jaxedit.methods import radius as radius_lib
from jaxedit.methods.config import TargetedConfig
from jaxedit.methods.settings import setting
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.targets import TargetConfig
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, InputError, Params, Tap

SITE = 'mlp/down'
# A value may take any length.
_UNBOUNDED = 1e6
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


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def _read_keys(
    spec: ModelSpec, params: Params, batch: PackedBatch, *, layer: int
) -> Array:
  """Keys [B, F] at the anchors of a packed batch of plain prompts."""
  index = batch.anchor[:, 0]
  read = lambda x: jnp.take(x[0], index, axis=0, mode='fill', fill_value=0)
  h = decoder.embed(spec, params, batch.tokens, batch.rows)
  tap = Tap(SITE, (layer,), read)
  _, (found,) = decoder.run_layers(
      spec, params, h, batch.rows, start=0, stop=layer + 1, taps=(tap,)
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
    keys = fetch(_read_keys(spec, params, batch, layer=layer))
    found.append(keys[batch.edit >= 0])
  return np.concatenate(found)


class Stream(NamedTuple):
  """A codebook between batches, and what edits with a name brought.

  Attributes:
    book: the codebook.
    history: grows by an edit's key and value.
    names: their ids, see `edited.ledger`.
  """

  book: State
  history: History
  names: np.ndarray


def grace(spec: ModelSpec, config: GraceConfig) -> base.Editor:
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
  base.check_layers(spec, config.layers)
  if len(config.layers) != 1:
    raise InputError(
        f'layers {list(config.layers)}: the codebook is in one layer; name one'
    )
  (layer,) = config.layers
  if layer < spec.encoder_layers:
    raise InputError(
        f'layer {layer} is of the encoder, and the key of a prompt is read where'
        f' its answer begins; name a layer from {spec.encoder_layers} to'
        f' {spec.layers - 1} (--layers)'
    )
  spec = dataclasses.replace(spec, activations=config.activations)

  def init(model: Any, resources: Mapping[base.Need, Any]) -> Stream:
    del resources
    dtype = wide(model.params['embed']['embedding'].dtype)
    widths = spec.mlp_width, spec.width
    return Stream(
        empty(config.capacity, *widths, dtype),
        no_history(*widths, dtype),
        ledger_lib.NO_NAMES,
    )

  def edit(
      model: Any, stream: Stream, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    state = stream.book
    if not batch.encoded:
      info = base.empty_info(spec, config.layers)
      return base.EditResult(_told(config, stream), stream, info)
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
    labels = [label_of(one.target) for one in batch.encoded]
    entries = list(map(Entry, keys, targets.z, labels))
    finite = targets.finite & np.isfinite(keys).all(-1)
    joint, group, limit = batch.joint, batch.groups, None
    if not joint:  # a book then holds its own entries only
      limit = int(state.count) + np.bincount(group).max()
    books, written = [], finite.copy()
    for number in range(int(group.max()) + 1):
      mine = np.flatnonzero((group == number) & finite)
      book, full = entered(
          state, [entries[i] for i in mine], config.radius, limit
      )
      written[mine[full]] = False
      books.append(book)
    report = base.TargetReport(
        targets,
        np.arange(len(entries), dtype=np.int32),
        np.stack([np.ones(len(entries)), ~written]).astype(targets.z.dtype),
    )
    reason = _FULL if finite.any() else base.NOT_FINITE
    info = base.target_info(report, written, (begin, middle), work, reason)
    if not joint:
      stacked = State(*map(np.stack, zip(*books)))
      edited = _edited(config, stacked, size=len(books))
      return base.EditResult(edited, stream, info)
    history, names, own = stream.history, stream.names, np.flatnonzero(written)
    if batch.requests:
      history = history.added([entries[i] for i in own], config.radius)
      names = ledger_lib.with_names(names, [batch.requests[i].id for i in own])
    after = Stream(books[0], history, names)
    return base.EditResult(_told(config, after), after, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del model
    return 4 * (spec.mlp_width + spec.width) * len(edits)

  return base.Editor((), init, edit, bytes_of=bytes_of, cumulative=True)


def _told(config: GraceConfig, stream: Stream) -> Edited:
  """The edit of a stream, with which edits it holds."""
  edited = _edited(config, stream.book)
  names = ledger_lib.names_of(stream.names)
  if not edited.deltas or not names:
    return edited
  names = tuple((name,) for name in names)
  return edited.replace(ledger=Ledger(names, history=stream.history))


def _edited(
    config: GraceConfig, book: State, size: int | None = None
) -> Edited:
  """The edit that a codebook is; of none without entries."""
  if not np.any(book.count):
    return Edited(size=size)
  leaves = (book.keys, book.values, book.radii, book.count)
  leaves = (jnp.asarray(x)[None] for x in leaves)
  return Edited((Codebook(config.layers, SITE, *leaves),), size=size)


METHOD = base.Method(
    'grace',
    'a codebook of outputs in one layer, for a stream of edits',
    GraceConfig,
    grace,
    chunkable=False,
    contexts=False,
    encoders=True,
    source='arXiv 2211.11031',
    small={'radius': 1e-3, 'capacity': 16},
    proposals={
        'radius': lambda config, inputs: radius_lib.propose(
            inputs, site=SITE, layer=config.layers[0]
        )
    },
)
