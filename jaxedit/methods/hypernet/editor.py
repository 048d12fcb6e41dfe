"""The editor that a trained network makes: one backward pass, no optimisation.

  factors of record b -> network -> keys and values of its delta

Records are run some at a time, each with a gradient and a delta of its own; the
delta of records that are edited together is the sum. The model is edited as it
stands, so later batches of a sequence use gradients of the edited model with
statistics of the unedited one.

Axes as in `jaxedit.types`: E edits, B of them at a time, T tokens, n layers.
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

from jaxedit.deltas import Edited, LowRank
from jaxedit.methods import base
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.hypernet import network as network_lib
from jaxedit.methods.hypernet.factors import Maps, Sequences
from jaxedit.methods.settings import setting
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, Params

_NOTHING = (
    'every gradient or delta is not finite; load the model with --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class HypernetConfig(MethodConfig):
  """Settings of an edit by a trained editor."""

  anchor: str = 'prompt_last'
  editor: str | None = setting(
      None, 'folder of a trained editor (experiments.train_editor)'
  )
  allow_overlap: bool = setting(
      False, 'edit records whose subject the editor was trained on, too'
  )
  layers: tuple[int, ...] | None = setting(
      None, 'layers to edit, ascending; those that the editor was trained for'
  )
  joint: bool = setting(
      False,
      'divide the loss of an edit by the tokens of all edits of its batch, as'
      ' EasyEdit does, instead of its own',
  )
  edit_scale: float = setting(
      1.0, 'factor on the delta; less is weaker and more local', low=0
  )
  side_by_side: int = 16


class State(NamedTuple):
  """What the editor keeps.

  Attributes:
    variables: of the trained network.
  """

  variables: network_lib.Variables


def hypernet(
    method: str,
    trainer: network_lib.Trainer,
    spec: ModelSpec,
    config: HypernetConfig,
) -> base.Editor:
  """Makes an editor.

  Args:
    method: id of the method.
    trainer: how its network is made.
    spec: the architecture.
    config: settings.

  Returns:
    The editor. It needs a trained network. Its deltas are `LowRank`, one an
    edited map.

  Raises:
    InputError: a layer is out of range.
  """
  need = network_lib.Trained(
      method, config.editor, config.allow_overlap, trainer
  )
  maps = need.maps(spec, config.layers)
  base.check_layers(spec, maps.layers)
  made = trainer.network(spec, maps, None)

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    trained: network_lib.TrainedEditor = resources[need]
    dtype = wide(model.params['embed']['embedding'].dtype)
    return State(network_lib.as_dtype(trained.variables, dtype))

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    count = len(batch.encoded)
    if not count:
      nothing = base.Info(np.zeros(0, bool), {'edit': 0.0}, {'loss': []})
      return base.EditResult(Edited(), state, nothing)
    begin = time.monotonic()
    group = batch.groups
    share = _share(batch.encoded, group, config.joint)
    parts = []
    with run.progress('edit', count, 'edit') as advance:
      for first in range(0, count, config.side_by_side):
        some = slice(first, first + config.side_by_side)
        parts.append(
            _pairs(
                (spec, maps, made),
                model.params,
                state.variables,
                batch.encoded[some],
                weights=(share[some], config.edit_scale),
            )
        )
        advance(len(batch.encoded[some]))
    pairs, loss, written = _joined(parts)
    edited = batch.edited(_grouped(maps, pairs, group))
    info = base.Info(
        written=written,
        seconds={'edit': time.monotonic() - begin},
        per_edit={'loss': base.json_numbers(loss)},
        reason='' if written.any() else _NOTHING,
    )
    return base.EditResult(edited, state, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del model
    shape = lib.shape_of(edits)
    width = sum(sum(lib.widths(spec, site)) for site in maps.sites)
    return 4 * len(maps.layers) * len(edits) * (shape[1] + 1) * width

  return base.Editor((need,), init, edit, bytes_of=bytes_of)


def _share(
    edits: Sequence[EncodedEdit], group: Sequence[int], joint: bool
) -> np.ndarray:
  """[E] share of every target token of an edit in the loss that is transformed."""
  tokens = np.array([len(edit.target) for edit in edits], np.float64)
  if joint:
    tokens = np.bincount(group, tokens)[np.asarray(group)]
  return 1 / tokens


def _pairs(
    bound: tuple[ModelSpec, Maps, network_lib.Network],
    params: Params,
    variables: network_lib.Variables,
    edits: Sequence[EncodedEdit],
    *,
    weights: tuple[np.ndarray, float],
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
  """(site -> pair, [E] loss, [E] bool, whether finite) of some edits."""
  shape, count = lib.shape_of(edits), len(edits)
  texts = lib.pack_answers(edits, shape)
  share, scale = weights
  share = np.pad(share, (0, shape[0] - count))[:, None] * texts.weight
  found = transform(*bound, params, variables, texts, (share, scale))
  pairs, loss, fine = jax.tree.map(fetch, found)
  return (
      {site: tuple(x[:, :count] for x in pair) for site, pair in pairs.items()},
      loss[:count],
      fine[:count],
  )


def _joined(parts: Sequence[Any]) -> tuple[dict[str, Any], Any, Any]:
  """Puts what `_pairs` gave end to end; shorter texts are padded with zeros."""
  most = max(jax.tree.leaves(part[0])[0].shape[2] for part in parts)

  def join(*arrays: np.ndarray) -> np.ndarray:
    grow = lambda x: ((0, 0), (0, 0), (0, most - x.shape[2]), (0, 0))
    return np.concatenate([np.pad(x, grow(x)) for x in arrays], axis=1)

  pairs = jax.tree.map(join, *(part[0] for part in parts))
  return pairs, *(np.concatenate([part[i] for part in parts]) for i in (1, 2))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def transform(
    spec: ModelSpec,
    maps: Maps,
    network: network_lib.Network,
    params: Params,
    variables: network_lib.Variables,
    texts: Sequences,
    weights: tuple[Array, Array],
) -> tuple[dict[str, lib.Pair], Array, Array]:
  """Makes the deltas of records.

  Args:
    spec: the architecture.
    maps: the edited maps.
    network: the network.
    params: canonical parameters.
    variables: of the network.
    texts: B records.
    weights: ([B, O] weights of tokens in the loss, [] factor on deltas).

  Returns:
    (site -> pair, 0 where not finite; [B] mean negative log-likelihood before
    the edit, nats; [B] bool, whether all is finite).
  """
  share, scale = weights
  h = lib.enter(spec, params, texts, maps.layers[0])
  found, loss = lib.edit_factors(spec, params, maps, h, texts, share=share)
  pairs = network.transform(
      variables, found, texts, network_lib.embedding(params)
  )
  pairs = {site: (key, scale * value) for site, (key, value) in pairs.items()}
  whole = share.sum(-1)
  loss = loss / jnp.where(whole > 0, whole, 1)
  checks = [jnp.isfinite(x).all((0, 2, 3)) for x in jax.tree.leaves(pairs)]
  fine = jnp.isfinite(loss) & jnp.stack(checks).all(0)
  clean = lambda x: jnp.where(fine[:, None, None], x, 0)
  return jax.tree.map(clean, pairs), loss, fine


def _grouped(
    maps: Maps,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    group: Sequence[int],
) -> tuple[LowRank, ...]:
  """Puts the pairs [n, E, M, width] of every group end to end."""
  order, size = np.asarray(group), max(group) + 1
  most = np.bincount(order).max()
  place = np.zeros(len(order), np.int64)
  for number in range(size):
    mine = np.flatnonzero(order == number)
    place[mine] = np.arange(len(mine))

  def join(x: np.ndarray) -> np.ndarray:
    n, _, rank, width = x.shape
    whole = np.zeros((n, size, most, rank, width), x.dtype)
    whole[:, order, place] = x
    return whole.reshape(n, size, most * rank, width)

  return lib.low_rank(maps, {s: tuple(map(join, p)) for s, p in pairs.items()})
