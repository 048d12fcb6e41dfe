"""MEND: a network maps the factors of an edit's gradient to better ones.

  z      = [ (x - mean_x) / std_x ; (d - mean_d) / std_d ]      per token
  z     <- z + clamp( S_j (z V U + b) + H_j )      twice; S, H of matrix j
  x', d' = the two parts of z
  W_j   += alpha_j sum over t of x'_t d'_t^T

Matrices of one shape share V, U, b and the running mean and deviation of their
factors. V has rank R; U begins at 0, so training begins with the normalised
gradient, and alpha may be negative.

`clamp` is max(y, 0) with derivative 1 at 0: every y is 0 at first, and with the
usual derivative there (0, or 1/2) U would not train, or at half its rate.

Axes: n edited layers, S maps of one shape in a layer, B records, T tokens.

Source: Mitchell et al. 2022 (MEND, arXiv 2110.11309) and its published code.
Statistics of a batch are merged at once, not token by token, and before any
matrix is transformed. Deltas of several records are transformed apart and
summed; EasyEdit takes one gradient of their common mean (`joint`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit.methods.base import Method
from jaxedit.methods.hypernet import editor as editor_lib
from jaxedit.methods.hypernet import factors as factors_lib
from jaxedit.methods.hypernet import network as network_lib
from jaxedit.methods.hypernet.course import course_of
from jaxedit.methods.hypernet.editor import HypernetConfig
from jaxedit.methods.hypernet.training import Training
from jaxedit.methods.settings import setting
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import einsum
from jaxedit.types import Array

_EPS = 1e-7
_DEPTH = 2


@dataclasses.dataclass(frozen=True)
class MendTraining(Training):
  """Settings of training; the defaults are published."""

  rank: int = setting(
      1920, 'rank of the maps, at most in + out', source='MEND', low=1
  )
  scaled_init: bool = setting(
      False,
      'begin with V of standard deviation 1 / sqrt(in + out) instead of 1; it'
      ' suits learning rates that train in minutes',
  )
  step_size: float = setting(
      1e-4,
      'size of alpha at first: |alpha|',
      source='MEND',
      low=0,
      exclusive=True,
  )
  descend: bool = setting(
      False,
      'begin down the gradient of the edit (alpha < 0), not up it as published',
  )
  step_rate: float = setting(
      1e-4, 'learning rate of alpha', source='MEND', low=0, exclusive=True
  )
  one_rate: bool = setting(
      False,
      'train alpha at the rate of the other variables, as published code does'
      ' whatever it is told',
  )


def groups(
    spec: ModelSpec, maps: factors_lib.Maps
) -> dict[str, tuple[str, ...]]:
  """Sorts sites by shape: 'in x out' -> sites."""
  found: dict[str, tuple[str, ...]] = {}
  for site in maps.sites:
    name = 'x'.join(map(str, factors_lib.widths(spec, site)))
    found[name] = (*found.get(name, ()), site)
  return found


def clamp(y: Array) -> Array:
  """max(y, 0), with derivative 1 at exactly 0."""
  return jnp.where(y >= 0, y, 0)


@functools.cache
def network(
    spec: ModelSpec, maps: factors_lib.Maps, config: MendTraining | None = None
) -> network_lib.Network:
  """Makes the network.

  Args:
    spec: the architecture.
    maps: the edited maps.
    config: settings of training; None for a network that is only used.

  Returns:
    The network.
  """
  shapes = groups(spec, maps)

  def init(key: Array, dtype: Any) -> network_lib.Variables:
    trained, statistics = {}, {}
    for number, (name, sites) in enumerate(shapes.items()):
      fan_in, fan_out = factors_lib.widths(spec, sites[0])
      own = jax.random.fold_in(key, number)
      matrices = (len(maps.layers), len(sites))
      trained[name] = _variables(config, own, fan_in + fan_out, matrices, dtype)
      zeros = lambda *shape: jnp.zeros(shape, dtype)
      statistics[name] = {
          'count': zeros(),
          'mean_x': zeros(fan_in), 'square_x': zeros(fan_in),
          'mean_d': zeros(fan_out), 'square_d': zeros(fan_out),
      }  # fmt: skip
    return network_lib.Variables(trained, statistics)

  def observe(
      statistics: Any, factors: Mapping[str, factors_lib.Factors]
  ) -> Any:
    return {
        name: merge(statistics[name], [factors[site] for site in sites])
        for name, sites in shapes.items()
    }

  def transform(
      variables: network_lib.Variables,
      factors: Mapping[str, factors_lib.Factors],
      texts: factors_lib.Sequences,
      embedding: Array,
  ) -> dict[str, factors_lib.Pair]:
    del texts, embedding
    pairs: dict[str, factors_lib.Pair] = {}
    for name, sites in shapes.items():
      ours, known = variables.trained[name], variables.statistics[name]
      some = [factors[site] for site in sites]
      # [n, S, B, T, width]
      x, d, used = (
          jnp.stack(parts, axis=1)
          for parts in zip(*((one.x, one.d, one.used) for one in some))
      )
      key, value = _transform(ours, known, x, d)
      value = value * ours['alpha'][:, :, None, None, None]
      key, value = (jnp.where(used[..., None], y, 0) for y in (key, value))
      pairs |= {s: (key[:, i], value[:, i]) for i, s in enumerate(sites)}
    return pairs

  def rate_of(path: str, rate: float) -> float:
    own = path.endswith('alpha') and not config.one_rate
    return config.step_rate if own else rate

  return network_lib.Network(init, observe, transform, rate_of)


def _variables(
    config: MendTraining,
    key: Array,
    width: int,
    matrices: tuple[int, int],
    dtype: Any,
) -> dict[str, Array]:
  """Variables of the matrices of one shape, layers of the network first."""
  rank = min(config.rank, width)
  scale = width**-0.5 if config.scaled_init else 1.0
  reduce = scale * jax.random.normal(key, (_DEPTH, width, rank), dtype)
  alpha = -config.step_size if config.descend else config.step_size
  return {
      'reduce': reduce,
      'expand': jnp.zeros((_DEPTH, rank, width), dtype),
      'bias': jnp.zeros((_DEPTH, width), dtype),
      'scale': jnp.ones((_DEPTH, *matrices, width), dtype),
      'shift': jnp.zeros((_DEPTH, *matrices, width), dtype),
      'alpha': jnp.full(matrices, alpha, dtype),
  }


def _normalised(known: Mapping[str, Array], side: str, x: Array) -> Array:
  """Factors less their mean, in units of their standard deviation.

  The unit is 1 before there are two pairs.
  """
  square = known[f'square_{side}'] / jnp.maximum(known['count'] - 1, 1)
  unit = jnp.where(known['count'] > 1, jnp.sqrt(square) + _EPS, 1)
  return (x - known[f'mean_{side}']) / unit


def _transform(
    ours: Mapping[str, Array], known: Mapping[str, Array], x: Array, d: Array
) -> tuple[Array, Array]:
  """Maps factors [n, S, B, T, width] of the maps of one shape."""
  parts = [_normalised(known, 'x', x), _normalised(known, 'd', d)]
  z = jnp.concatenate(parts, axis=-1)
  for layer in range(_DEPTH):
    y = einsum('...w,wr->...r', z, ours['reduce'][layer])
    y = einsum('...r,rw->...w', y, ours['expand'][layer]) + ours['bias'][layer]
    scale, shift = (
        ours[name][layer][:, :, None, None] for name in ('scale', 'shift')
    )
    z = z + clamp(scale * y + shift)
  return z[..., : x.shape[-1]], z[..., x.shape[-1] :]


def merge(known: Mapping[str, Array], new: Any) -> dict[str, Array]:
  """Merges factors into running statistics.

  Args:
    known: 'count', and the mean and the sum of squared deviations of each side.
    new: factors of the sites that share them; pairs that are zero do not count.

  Returns:
    The statistics of all pairs so far.

  Source: Chan et al. 1983; equals Welford's update token by token.
  """
  used = jnp.concatenate([one.used.reshape(-1) for one in new])
  extra = used.sum().astype(known['count'].dtype)
  count = known['count'] + extra
  merged = {'count': count}
  for side in ('x', 'd'):
    rows = [getattr(one, side) for one in new]
    rows = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in rows])
    at = jnp.maximum(extra, 1)
    mean = jnp.where(used[:, None], rows, 0).sum(0) / at
    square = jnp.where(used[:, None], jnp.square(rows - mean), 0).sum(0)
    gap = mean - known[f'mean_{side}']
    whole = jnp.maximum(count, 1)
    merged[f'mean_{side}'] = known[f'mean_{side}'] + gap * extra / whole
    between = jnp.square(gap) * known['count'] * extra / whole
    merged[f'square_{side}'] = known[f'square_{side}'] + square + between
  return merged


_LATE = {'one_rate': True, 'late_update': True, 'accumulate': 10}
_TRAINER = network_lib.Trainer(
    MendTraining,
    course_of(network),
    network,
    small=MendTraining(layers=(0, 1), rank=5, step_size=3.0, descend=True),
    parity={
        'mend': _LATE,
        'easyedit': {
            **_LATE,
            'joint': True,
            'outer': 'edit',
            'locality_tokens': 'after',
            'patience': 0,
        },
    },
)

METHOD = Method(
    'mend',
    'one step of a trained network that rewrites the gradient of the edit',
    HypernetConfig,
    functools.partial(editor_lib.hypernet, 'mend', _TRAINER),
    accepts=frozenset({'fact'}),
    chunkable=False,
    contexts=False,
    parity={'easyedit': {'joint': True}},
    encoders=True,
    source='arXiv 2110.11309',
    trainer=_TRAINER,
    small={'editor': network_lib.UNTRAINED, 'layers': (0, 1)},
)
