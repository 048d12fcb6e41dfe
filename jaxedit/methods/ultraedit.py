"""UltraEdit: normalised gradient features and one ridge solve a turn; no training.

For every edited map, over the tokens i of a turn that foretell its targets, x_i
is the map's input and g_i the gradient of the loss with respect to its output:

  [x^; g^] = ([x; g] - mean) / deviation      over all tokens of all turns so far
  v_i      = - rate |x^_i|^2 g^_i
  W       += X^T (X X^T + ridge I)^-1 V       X and V hold a row a token

Maps of one shape share their statistics. The change has one pair a token, so its
factors are (X X^T + ridge I)^-1 X and V.

Few tokens say little about deviations: `prior_tokens` tokens without direction
(mean 0, the mean square of the turn's own features) are counted with them. A
turn of one token then has x^ = x over its root mean square; in published code it
becomes NaN for good.

Axis letters: B records at a time, O foretelling tokens of a record, M tokens of a
turn, n edited layers.

Source: Gu et al. 2025, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong
Editing in Large Language Models" (arXiv 2505.14679). Its code merges unbiased
variances of batches, which makes deviations too large by sqrt(k / (k - 1)) for
batches of k tokens (`unbiased` brings that back).
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
from jaxedit.methods.hypernet import factors as factors_lib
from jaxedit.methods.hypernet.factors import Maps, Sequences
from jaxedit.methods.settings import setting
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, InputError, Params

_EPS = 1.1920929e-07  # of float32, as published
_NOTHING = (
    'every gradient or delta is not finite; load the model with --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class UltraEditConfig(MethodConfig):
  """Settings of UltraEdit; the defaults are those published for GPT-J.

  Attributes:
    layers: layers to edit, ascending.
    sites: edited maps of these layers.
    rate: of v.
    ridge: of the solve.
    together: edits whose loss is one mean over all their tokens.
    prior_tokens: see the module head.
    unbiased: merge variances as published code does.
    side_by_side: records that are run together.
  """

  anchor: str = 'prompt_last'
  layers: tuple[int, ...] = setting(
      tuple(range(18, 27)), 'layers to edit, ascending', source='GPT-J'
  )
  sites: tuple[str, ...] = setting(
      ('mlp/down',),
      'edited maps of the MLP: mlp/gate, mlp/up, mlp/down',
      source='GPT-J',
  )
  rate: float = setting(
      1e-6,
      'learning rate, for width 4096 and half precision; smaller models need'
      ' 1e-3 to 3e-3',
      source='UltraEdit',
      low=0,
      flag='ultra_rate',
  )
  ridge: float = setting(
      1.0, 'ridge of the solve', source='UltraEdit', low=0, exclusive=True,
      flag='ultra_ridge',
  )  # fmt: skip
  together: int = setting(
      10,
      'edits whose loss is one mean over their tokens',
      source='UltraEdit',
      low=1,
      flag='ultra_together',
  )
  prior_tokens: float = setting(
      8.0, 'tokens without direction that deviations count', low=0
  )
  unbiased: bool = False
  side_by_side: int = 16


class Moments(NamedTuple):
  """Statistics of the features of maps of one shape.

  Attributes:
    count: [] f64 tokens.
    mean: [in + out] f64.
    square: [in + out] f64 sum of squared deviations.
  """

  count: np.ndarray
  mean: np.ndarray
  square: np.ndarray


State = Mapping[str, Moments]  # by shape, 'in x out'


def merged(old: Moments, rows: np.ndarray, unbiased: bool = False) -> Moments:
  """Adds feature rows [k, in + out] to statistics.

  Source: Chan, Golub & LeVeque 1979; with `unbiased`, as published code.
  """
  k = len(rows)
  if not k:
    return old
  mean = rows.mean(0)
  square = np.square(rows - mean).sum(0)
  if unbiased and k > 1:
    square *= k / (k - 1)
  count = old.count + k
  away = mean - old.mean
  return Moments(
      np.float64(count),
      old.mean + away * k / count,
      old.square + square + np.square(away) * old.count * k / count,
  )


def normalised(
    rows: np.ndarray, split: int, moments: Moments, extra: float
) -> tuple[np.ndarray, np.ndarray]:
  """Normalises feature rows by statistics and tokens without direction.

  Args:
    rows: [M, in + out].
    split: in.
    moments: of all turns, this one included.
    extra: tokens without direction.

  Returns:
    ([M, in], [M, out]).
  """
  size = lambda x: np.full(x.shape[1], np.square(x).mean())
  parts = np.split(rows, [split], axis=1)
  isotropic = np.concatenate([size(x) for x in parts])
  total = moments.count + extra
  mean = moments.mean * moments.count / total
  away = np.square(moments.mean) * moments.count * extra / total
  square = moments.square + away + extra * isotropic
  deviation = np.sqrt(square / max(total - 1, 1)) + _EPS
  found = (rows - mean) / deviation
  return found[:, :split], found[:, split:]


def pairs_of(
    x: np.ndarray, g: np.ndarray, moments: Moments, config: UltraEditConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Solves one map for one turn.

  Args:
    x: [M, in] inputs.
    g: [M, out] gradients with respect to outputs.
    moments: of the map's shape, this turn included.
    config: settings.

  Returns:
    (keys [M, in], values [M, out]) of its change.
  """
  if not len(x):
    return x, g
  rows = np.concatenate([x, g], axis=1)
  xs, gs = normalised(rows, x.shape[1], moments, config.prior_tokens)
  values = -config.rate * np.square(xs).sum(1, keepdims=True) * gs
  system = x @ x.T + config.ridge * np.eye(len(x))
  return np.linalg.solve(system, x), values


@functools.partial(jax.jit, static_argnames=('spec', 'maps'))
def _features(
    spec: ModelSpec, params: Params, maps: Maps, texts: Sequences, share: Array
) -> tuple[dict[str, tuple[Array, Array]], Array]:
  """(site -> (x, g) [n, B, O, .] at scored tokens, [B] weighted losses)."""
  h = factors_lib.enter(spec, params, texts, maps.layers[0])
  found, loss = factors_lib.edit_factors(
      spec, params, maps, h, texts, share=share
  )
  index = texts.index[None, :, :, None]
  pick = lambda y: jnp.take_along_axis(y, index, axis=2)
  return {s: (pick(f.x), pick(f.d)) for s, f in found.items()}, loss


def ultraedit(spec: ModelSpec, config: UltraEditConfig) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. A batch is one turn; statistics last from turn to turn.
    Independent edits are turns of their own that begin with the state's
    statistics. Deltas are `LowRank`, one a map.

  Raises:
    InputError: a layer or a map that the model lacks.
  """
  base.check_layers(spec, config.layers)
  known = set(factors_lib.maps_of(spec, config.layers).sites)
  if strange := sorted(set(config.sites) - known) or not config.sites:
    raise InputError(
        f'sites {list(config.sites)}: {strange or "none"} cannot be edited;'
        f' known are {", ".join(sorted(known))}'
    )
  maps = Maps(config.layers, tuple(config.sites))
  shapes = {site: factors_lib.widths(spec, site) for site in maps.sites}
  names = {site: 'x'.join(map(str, shape)) for site, shape in shapes.items()}

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    del model, resources
    zeros = {names[s]: np.zeros(sum(shape)) for s, shape in shapes.items()}
    return {n: Moments(np.float64(0), x, x.copy()) for n, x in zeros.items()}

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    count, group = len(batch.encoded), batch.groups
    if not count:
      nothing = base.Info(np.zeros(0, bool), {'edit': 0.0}, {'loss': []})
      return base.EditResult(Edited(), state, nothing)
    begin = time.monotonic()
    with run.progress('edit', count, 'edit') as advance:
      found, loss = _all_features(
          (spec, model.params, maps), batch.encoded, group, config, advance
      )
    fine = np.isfinite(loss)
    for x, g in found.values():
      fine &= np.isfinite(x).all((0, 2, 3)) & np.isfinite(g).all((0, 2, 3))
    turns = []
    used = np.array([len(edit.target) for edit in batch.encoded])
    # An edit that is left out is no part of the mean loss of the others.
    before = _tokens_together(used, group, config.together)
    after = _tokens_together(np.where(fine, used, 0), group, config.together)
    ratio = (before / np.maximum(after, 1))[None, :, None, None]
    found = {site: (x, g * ratio) for site, (x, g) in found.items()}
    for number in range(group.max() + 1):
      mine = np.flatnonzero((group == number) & fine)
      turns.append(_turn(found, state, mine, used, names, config))
    deltas = _deltas(maps, shapes, [pairs for pairs, _ in turns])
    dtype = wide(model.params['embed']['embedding'].dtype)
    deltas = jax.tree.map(lambda x: x.astype(dtype), deltas)
    info = base.Info(
        written=fine,
        seconds={'edit': time.monotonic() - begin},
        per_edit={'loss': base.json_numbers(loss)},
        reason='' if fine.any() else _NOTHING,
    )
    if batch.joint:
      state = turns[0][1]
    return base.EditResult(batch.edited(deltas), state, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del model
    tokens = sum(len(edit.target) for edit in edits)
    width = sum(sum(shape) for shape in shapes.values())
    return 4 * len(maps.layers) * tokens * width

  return base.Editor((), init, edit, bytes_of=bytes_of)


Features = dict[str, tuple[np.ndarray, np.ndarray]]


def _all_features(
    model: tuple[ModelSpec, Params, Maps],
    edits: Sequence[EncodedEdit],
    group: np.ndarray,
    config: UltraEditConfig,
    advance: Any,
) -> tuple[Features, np.ndarray]:
  """(site -> x, g [n, E, O, .] of all edits, [E] mean losses, nats)."""
  spec, params, maps = model
  tokens = np.array([len(edit.target) for edit in edits])
  share = 1 / _tokens_together(tokens, group, config.together)
  most = factors_lib.shape_of(edits)
  parts, losses = [], []
  for first in range(0, len(edits), config.side_by_side):
    some = edits[first : first + config.side_by_side]
    shape = (*factors_lib.shape_of(some)[:2], most[2])
    texts = factors_lib.pack_answers(some, shape)
    mine = np.zeros(shape[0])
    mine[: len(some)] = share[first : first + len(some)]
    found, loss = _features(
        spec, params, maps, texts, mine[:, None] * texts.weight
    )
    keep = lambda y: fetch(y)[:, : len(some)]  # pylint: disable=cell-var-from-loop
    parts.append({s: tuple(map(keep, pair)) for s, pair in found.items()})
    losses.append(fetch(loss)[: len(some)])
    advance(len(some))
  join = lambda *y: np.concatenate(y, axis=1).astype(np.float64)
  loss = np.concatenate(losses) / (share * tokens)
  return jax.tree.map(join, *parts), loss


def _tokens_together(
    tokens: np.ndarray, group: np.ndarray, together: int
) -> np.ndarray:
  """[E] target tokens of the edits whose loss is one mean with an edit's own."""
  found = np.zeros(len(tokens), np.float64)
  for number in np.unique(group):
    mine = np.flatnonzero(group == number)
    for first in range(0, len(mine), together):
      some = mine[first : first + together]
      found[some] = tokens[some].sum()
  return found


def _turn(
    found: Features,
    state: State,
    mine: np.ndarray,
    used: np.ndarray,
    names: Mapping[str, str],
    config: UltraEditConfig,
) -> tuple[dict[str, list[tuple[np.ndarray, np.ndarray]]], State]:
  """Solves all maps for the edits of one turn; returns the new statistics."""
  rows = {
      site: tuple(
          np.concatenate(
              [y[:, i, : used[i]] for i in mine] or [y[:, 0, :0]], axis=1
          )
          for y in pair
      )
      for site, pair in found.items()
  }
  moments = dict(state)
  for site, (x, g) in rows.items():
    for layer in np.concatenate([x, g], axis=2):
      moments[names[site]] = merged(
          moments[names[site]], layer, config.unbiased
      )
  pairs = {
      site: [
          pairs_of(x, g, moments[names[site]], config) for x, g in zip(*both)
      ]
      for site, both in rows.items()
  }
  return pairs, moments


def _deltas(
    maps: Maps,
    shapes: Mapping[str, tuple[int, int]],
    turns: Sequence[Mapping[str, list[tuple[np.ndarray, np.ndarray]]]],
) -> tuple[LowRank, ...]:
  """Puts turns side by side, [n, turns, M, .]; shorter ones are padded."""
  deltas = []
  for site, widths in shapes.items():
    most = max(len(turn[site][0][0]) for turn in turns)
    lead = (len(maps.layers), len(turns), most)
    leaves = [np.zeros((*lead, width)) for width in widths]
    for t, turn in enumerate(turns):
      for layer, pair in enumerate(turn[site]):
        for whole, part in zip(leaves, pair):
          whole[layer, t, : len(part)] = part
    deltas.append(LowRank(maps.layers, site, *leaves))
  return tuple(deltas)


METHOD = base.Method(
    'ultraedit',
    'normalised gradients and one ridge solve a turn, for long streams',
    UltraEditConfig,
    ultraedit,
    chunkable=False,
    contexts=False,
    parity={'ultraedit': {'prior_tokens': 0.0, 'unbiased': True}},
    source='arXiv 2505.14679',
    small={'layers': (0, 1), 'ultra_rate': 0.05},
)
