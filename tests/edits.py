"""Random edits of every kind, and what each does to one text, in plain numpy.

The rules are written from the docstrings of `jaxedit.deltas`. They know no
batches, padding, caches or edits side by side.
"""

from __future__ import annotations

import functools
import types

import jax.numpy as jnp
import numpy as np
from numpy_decoder import ACTIVATIONS

from jaxedit.deltas import Codebook, Dense, LowRank, Neurons, Routed
from jaxedit.edited import Query
from jaxedit.models.spec import param_shapes
from jaxedit.testing import models

LENGTHS = (4, 11, 1, 7, 2, 9, 5, 3, 6)
SPEC = models.tiny_spec('llama')
LAYERS = (1, 2)
OUTPUTS = ('attn', 'mlp', 'block')
_ACTS = {**ACTIVATIONS, 'relu': lambda x: np.maximum(x, 0)}


class Draw:
  """Draws deltas of every kind.

  Attributes:
    lead: leading axes of every leaf, those of layers and edits.
  """

  def __init__(self, spec, *, seed=0, layers=(0, 2), edits=None, dtype=None):
    self._rng, self._spec = np.random.default_rng(seed), spec
    self.layers, self._dtype = layers, dtype or jnp.float32
    self.lead = (len(layers), *(() if edits is None else (edits,)))

  def normal(self, *shape, scale=1.0):
    draw = scale * self._rng.standard_normal((*self.lead, *shape))
    return jnp.asarray(draw, self._dtype)

  def widths(self, site):
    if site in OUTPUTS:
      return (self._spec.width,) * 2
    return param_shapes(self._spec)[f'layers/{site}/kernel'][1:]

  def low_rank(self, site='mlp/down', rank=2):
    fan_in, fan_out = self.widths(site)
    key, value = self.normal(rank, fan_in), self.normal(rank, fan_out)
    return LowRank(self.layers, site, 0.3 * key, 0.3 * value)

  def dense(self, site='mlp/gate', leaf='kernel'):
    shape = param_shapes(self._spec)[f'layers/{site}/{leaf}'][1:]
    return Dense(self.layers, site, self.normal(*shape, scale=0.2), leaf)

  def neurons(self, site='mlp', activation='gelu'):
    fan_in, fan_out = self.widths(site)
    return Neurons(
        self.layers, site, self.normal(3, fan_in, scale=0.3), self.normal(3),
        self.normal(3, fan_out, scale=0.5), activation,
    )  # fmt: skip

  def codebook(self, site='mlp/down', replacement='last'):
    """Four entries and two free ones; a prompt nearest to entry 1 has none."""
    fan_in, fan_out = self.widths(site)
    radii = np.broadcast_to([1e3, -1, 1e3, 1e3, 1e3, 1e3], (*self.lead, 6))
    return Codebook(
        self.layers, site, self.normal(6, fan_in, scale=0.5),
        self.normal(6, fan_out),
        jnp.asarray(radii, self._dtype), jnp.full(self.lead, 4, jnp.int32),
        replacement,
    )  # fmt: skip

  def routed(self, site='mlp/down', activation='silu'):
    """Three shards, all of which some prompts choose, and some none."""
    fan_in, fan_out = self.widths(site)
    shards = self.normal(3, fan_in, fan_out, scale=0.8 / fan_in**0.5)
    thresholds = np.broadcast_to([1.7, 2.9, 1.5], (*self.lead, 3))
    thresholds = jnp.asarray(thresholds, self._dtype)
    return Routed(self.layers, site, shards, thresholds, activation)


def deltas_of(name, edit_count=None, dtype=None, seed=0):
  """Deltas of a kind by its name."""
  draw = Draw(SPEC, layers=LAYERS, edits=edit_count, dtype=dtype, seed=seed)
  return {
      'low_rank': lambda: (draw.low_rank(),),
      'dense': lambda: (draw.dense(), draw.dense('attn_norm', 'scale')),
      'neurons': lambda: (draw.neurons(),),
      'last': lambda: (draw.codebook('mlp', 'last'),),
      'prompt': lambda: (draw.codebook('block', 'prompt'),),
      'all': lambda: (draw.codebook('mlp/down', 'all'),),
      'routed': lambda: (draw.routed('attn/out'),),
      'mixed': lambda: (
          draw.codebook('mlp', 'prompt'), draw.low_rank('mlp/down'),
          draw.routed('mlp/up'), draw.neurons('attn'),
      ),
  }[name]()  # fmt: skip


CHOOSING = ('last', 'prompt', 'all', 'routed', 'mixed')
KINDS = ('low_rank', 'dense', 'neurons', *CHOOSING)


def random_prompts(seed=0, lengths=LENGTHS):
  rng = np.random.default_rng(seed)
  return [rng.integers(2, 97, n).tolist() for n in lengths]


def random_queries(seed=0):
  """A query a prompt, with one to three answers."""
  rng = np.random.default_rng(seed + 1)
  answer = lambda: tuple(rng.integers(2, 97, rng.integers(1, 5)).tolist())
  return [
      Query(tuple(prompt), tuple(answer() for _ in range(1 + i % 3)))
      for i, prompt in enumerate(random_prompts(seed))
  ]


@functools.cache
def model(dtype='float32'):
  params = models.random_params(SPEC, 1, jnp.dtype(dtype))
  return models.as_model(SPEC, params)


def rule(deltas, prompt, chosen=None):
  """Returns the `edit` of `numpy_decoder.oracle` for a text.

  Args:
    deltas: of one edit.
    prompt: how many tokens of the text, from the first on, are the prompt.
    chosen: a list for what deltas choose, -1 for nothing.
  """
  chosen = [] if chosen is None else chosen

  def edit(layer, site, x, y):
    for delta in sorted(deltas, key=lambda d: not d.mergeable):
      if delta.site == site and layer in delta.layers:
        i = delta.layers.index(layer)
        leaves = {n: np.asarray(getattr(delta, n))[i] for n in delta.axes}
        leaf = types.SimpleNamespace(**leaves)
        y = _RULES[type(delta)](delta, leaf, x, y, prompt, chosen)
    return y

  return edit


def _low_rank(delta, leaf, x, y, prompt, chosen):
  del delta, prompt, chosen
  return y + x @ leaf.key.T @ leaf.value


def _dense(delta, leaf, x, y, prompt, chosen):
  del delta, prompt, chosen
  return y + x @ leaf.value


def _neurons(delta, leaf, x, y, prompt, chosen):
  del prompt, chosen
  return y + _ACTS[delta.activation](x @ leaf.key.T + leaf.bias) @ leaf.value


def _codebook(delta, leaf, x, y, prompt, chosen):
  best, least = -1, np.inf
  for i in range(leaf.count if prompt else 0):
    distance = np.sqrt(np.sum((x[prompt - 1] - leaf.keys[i]) ** 2))
    if distance < least:
      best, least = i, distance
  if best >= 0 and least > leaf.radii[best]:
    best = -1
  chosen.append(best)
  replaced = {
      'last': [prompt - 1],
      'prompt': list(range(prompt - 1)),
      'all': list(range(len(y))),
  }
  y = y.copy()
  if best >= 0:
    y[replaced[delta.replacement]] = leaf.values[best]
  return y


def _routed(delta, leaf, x, y, prompt, chosen):
  act, best, most = _ACTS[delta.activation], -1, -np.inf
  for i, (shard, threshold) in enumerate(zip(leaf.shards, leaf.thresholds)):
    gap = act(y[:prompt]) - act(y[:prompt] + x[:prompt] @ shard)
    score = np.mean(np.linalg.norm(gap, axis=1)) if prompt else 0.0
    if score > threshold and score > most:
      best, most = i, score
  chosen.append(best)
  return y if best < 0 else y + x @ leaf.shards[best]


_RULES = {
    LowRank: _low_rank,
    Dense: _dense,
    Neurons: _neurons,
    Codebook: _codebook,
    Routed: _routed,
}
