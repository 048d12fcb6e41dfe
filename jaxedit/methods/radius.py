"""A radius for a codebook, proposed from data.

An entry answers a query whose key lies within its radius. So the radius should be
larger than the distance of an edit's key from those of its paraphrases, and
smaller than the distance of any edit's key from those of neighbours:

  reach  distance of a paraphrase from its own edit; infinite where the key of
         another edit is nearer
  away   distance of a neighbour from the nearest edit

What is proposed is the largest radius that reaches at most `share` of the
neighbours; where it reaches all paraphrases, the middle between the farthest of
them and it. Often no radius tells the two apart (keys follow wording), which is
reported.

Axis letters: E edits, R paraphrases, N neighbours, F key width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching import packer
from jaxedit.batching.buckets import round_up
from jaxedit.methods.base import Proposal, ProposalInputs
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.types import Array, InputError, Params, Tap

# Neighbours that a proposed radius may reach, as a share.
SHARE = 0.02
# Below this share of the keys' length, keys differ by rounding alone.
_LEAST = 1e-2
_ROWS = 32  # prompts a batch


class Distances(NamedTuple):
  """See the module head.

  Attributes:
    reach: [R].
    away: [N].
    length: median length of an edit's key.
  """

  reach: np.ndarray
  away: np.ndarray
  length: float


@functools.partial(jax.jit, static_argnames=('spec', 'site', 'layer'))
def _read(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    length: Array,
    *,
    site: str,
    layer: int,
) -> Array:
  """Inputs [B, F] of a site at the last tokens of right-padded prompts."""
  valid = jnp.arange(tokens.shape[1]) < length[:, None]
  layout = decoder.token_layout(valid, decoder.source_of(spec, tokens))
  last = lambda x: x[jnp.arange(len(x)), length - 1]
  h = decoder.embed(spec, params, tokens, layout)
  _, (found,) = decoder.run_layers(
      spec,
      params,
      h,
      layout,
      start=0,
      stop=layer + 1,
      taps=(Tap(site, (layer,), last),),
  )
  return found[0].astype(wide(found.dtype))


def keys_of(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    site: str,
    layer: int,
) -> np.ndarray:
  """Reads keys at the last tokens of prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    prompts: token ids.
    site: whose inputs the keys are.
    layer: layer number.

  Returns:
    [prompts, F].
  """
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  found = [np.zeros(0)] * len(prompts)
  for first in range(0, len(order), _ROWS):
    some = order[first : first + _ROWS]
    width = round_up(len(prompts[some[-1]]))
    tokens, _ = packer.pad([prompts[i] for i in some], (_ROWS, width))
    length = np.ones(_ROWS, np.int32)
    length[: len(some)] = [len(prompts[i]) for i in some]
    keys = _read(spec, params, tokens, length, site=site, layer=layer)
    for i, key in zip(some, fetch(keys)):
      found[i] = key
  return np.stack(found)


def distances(
    edits: np.ndarray,
    rephrases: np.ndarray,
    own: Sequence[int],
    neighbours: np.ndarray,
) -> Distances:
  """Measures keys.

  Args:
    edits: [E, F] keys.
    rephrases: [R, F].
    own: [R] edit of each paraphrase.
    neighbours: [N, F].

  Returns:
    The distances.
  """
  edits = edits.astype(np.float64)
  far = lambda key: np.linalg.norm(edits - key, axis=-1)
  reach = np.array([
      d[i] if d[i] <= d.min() else np.inf
      for i, d in zip(own, map(far, rephrases))
  ])  # fmt: skip
  away = np.array([far(key).min() for key in neighbours])
  return Distances(
      reach, away, float(np.median(np.linalg.norm(edits, axis=-1)))
  )


def radius_of(found: Distances, share: float = SHARE) -> float:
  """The proposed radius; see the module head.

  Raises:
    InputError: there is none, as neighbours have the keys of edits.
  """
  bound = float(np.sort(found.away)[int(share * len(found.away))])
  if bound <= _LEAST * found.length:
    raise InputError(
        f'neighbours have the keys of edits (distance {bound:.2g}, keys of length'
        f' {found.length:.3g}), so no radius leaves them out: choose another layer'
        ' (--layers)'
    )
  farthest = float(found.reach.max())
  return (farthest + bound) / 2 if farthest < bound else 0.999 * bound


def propose(
    inputs: ProposalInputs, *, site: str, layer: int, share: float = SHARE
) -> Proposal:
  """Proposes a radius.

  Args:
    inputs: the model and prompts.
    site: whose inputs keys are.
    layer: of the codebook.
    share: of the neighbours that it may reach.

  Returns:
    The radius, and a table of others.

  Raises:
    InputError: records lack paraphrases or neighbours, or no radius is of use.
  """
  rephrases = [ids for some in inputs.rephrases for ids in some]
  neighbours = [ids for some in inputs.neighbours for ids in some]
  problems = [
      f'no record has {name}, from which a radius is proposed; give data that has'
      for name, some in (
          ('paraphrases', rephrases), ('neighbours', neighbours)
      )
      if not some
  ]  # fmt: skip
  if problems:
    raise InputError(*problems)
  own = [i for i, some in enumerate(inputs.rephrases) for _ in some]
  parts = inputs.prompts, rephrases, neighbours
  every = [ids for part in parts for ids in part]
  keys = keys_of(inputs.spec, inputs.params, every, site=site, layer=layer)
  ends = np.cumsum([len(part) for part in parts])[:-1]
  edits, asked, others = np.split(keys, ends)
  found = distances(edits, asked, own, others)
  value = float(f'{radius_of(found, share):.3g}')
  return Proposal(value, tuple(_lines(found, value)))


def _lines(found: Distances, value: float) -> list[str]:
  """A table of radii, and what it says."""
  rows = sorted({value, *(float(f'{x:.3g}') for x in _others(found, value))})
  lines = [
      f'{"radius":>9}{"of the length of keys":>23}{"paraphrases reached":>21}'
      f'{"neighbours reached":>20}'
  ]
  for one in rows:
    hits = [float((x <= one).mean()) for x in (found.reach, found.away)]
    mark = ' *' if one == value else ''
    lines.append(
        f'{one:>9.3g}{one / found.length:>23.3f}{hits[0]:>21.2f}'
        f'{hits[1]:>20.2f}{mark}'
    )
  own = np.isfinite(found.reach)
  middle = float(np.median(found.reach[own])) if own.any() else np.nan
  apart = found.reach.max() < found.away.min()
  lines += [
      f'paraphrases nearest to their own edit: {own.mean():.2f}, at a median'
      f' distance of {middle:.3g}; neighbours from the nearest edit:'
      f' {np.median(found.away):.3g}',
      f'{"a" if apart else "no"} radius tells all of them apart',
  ]
  return lines


def _others(found: Distances, value: float) -> list[float]:
  """Radii to compare with."""
  finite = found.reach[np.isfinite(found.reach)]
  ways = [value / 2, value * 2, 0.1 * found.length, 0.2 * found.length]
  return ways + ([float(np.median(finite))] if len(finite) else [])
