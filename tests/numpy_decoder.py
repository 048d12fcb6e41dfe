"""A decoder in plain numpy: one unpadded text, one layer after the other.

Without batches, masks by segment, caches and interventions of the library, so
that none of them shows in its numbers.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

ACTIVATIONS = {
    'silu': lambda x: x / (1 + np.exp(-x)),
    'gelu': lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
    'gelu_tanh': lambda x: (
        x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    ),
}


def outputs(layer, site, x):
  """Intervenes nowhere."""
  del layer, site
  return x


def unedited(layer, site, x, y):
  """Edits nowhere."""
  del layer, site, x
  return y


def oracle_norm(spec, leaf, x):
  """RMS or layer normalisation."""
  if spec.norm == 'layer':
    x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + spec.norm_eps)
  return x * leaf['scale'] + leaf.get('bias', 0.0)


def oracle_rotary(spec, x):
  """Rotary positions as complex products; x is [T, heads, H]."""
  if spec.rotary == 'none':
    return x
  size, axis = spec.rotary_size, {'half': 2, 'interleaved': 3}[spec.rotary]
  freq = spec.rope_theta ** (-np.arange(0, size, 2) / size)
  rotary = np.exp(1j * np.arange(len(x))[:, None] * freq)[:, None]
  pair = (2, -1) if axis == 2 else (-1, 2)
  real, imaginary = np.moveaxis(
      x[..., :size].reshape(*x.shape[:2], *pair), axis, 0
  )
  z = (real + 1j * imaginary) * rotary
  z = np.stack([z.real, z.imag], axis=axis).reshape(*x.shape[:2], size)
  return np.concatenate([z, x[..., size:]], axis=-1)


def oracle_attention(spec, leaf, x, seen, edit):
  """Attention of every token to itself and those before it, by heads."""
  size = len(x)
  q, k, v = (
      oracle_linear(leaf, f'attn/{name}', x, seen, edit).reshape(
          size, -1, spec.head_size
      )
      for name in 'qkv'
  )
  if spec.qk_norm:
    q = oracle_norm(spec, leaf['attn']['q_norm'], q)
    k = oracle_norm(spec, leaf['attn']['k_norm'], k)
  q, k = oracle_rotary(spec, q), oracle_rotary(spec, k)
  seen['kv'] = np.moveaxis(k, 1, 0), np.moveaxis(v, 1, 0)
  ago = np.arange(size)[:, None] - np.arange(size)
  hidden = (ago < 0) | (ago >= (spec.window or size))
  heads = []
  for n in range(spec.heads):
    group = n // (spec.heads // spec.kv_heads)
    weights = q[:, n] @ k[:, group].T / spec.head_size**0.5
    weights = np.exp(np.where(hidden, -np.inf, weights))
    heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, group])
  mixed = np.concatenate(heads, axis=1)
  return oracle_linear(leaf, 'attn/out', mixed, seen, edit)


def oracle_linear(leaf, site, x, seen, edit):
  """A linear map, whose input is kept."""
  seen[site] = x
  part, name = site.split('/')
  y = x @ leaf[part][name]['kernel'] + leaf[part][name].get('bias', 0.0)
  return edit(site, x, y)


def oracle_mlp(spec, leaf, x, seen, edit):
  """The plain or the gated MLP."""
  activation = ACTIVATIONS[spec.activation]
  inner = oracle_linear(leaf, 'mlp/up', x, seen, edit)
  if spec.gated:
    inner = activation(oracle_linear(leaf, 'mlp/gate', x, seen, edit)) * inner
  else:
    inner = activation(inner)
  return oracle_linear(leaf, 'mlp/down', inner, seen, edit)


def oracle(spec, params, tokens, intervene=outputs, edit=unedited):
  """Runs one text [T] in numpy.

  Args:
    spec: the architecture.
    params: canonical parameters, f64.
    tokens: [T] ids.
    intervene: (layer, site, [T, D]) -> [T, D], on outputs.
    edit: (layer, site, [T, in], [T, out]) -> [T, out], on outputs and linear
      maps; before `intervene`.

  Returns:
    ([T, D] last residual, for every layer what was seen).
  """
  params = jax.tree.map(np.asarray, params)
  h = params['embed']['embedding'][np.asarray(tokens)]
  if spec.learned_positions:
    h = h + params['embed']['position'][: len(h)]
  layers = []
  for layer in range(spec.layers):
    leaf = jax.tree.map(lambda leaf, i=layer: leaf[i], params['layers'])
    seen = {}
    own = functools.partial(edit, layer)
    x = oracle_norm(spec, leaf['attn_norm'], h)
    a = own('attn', x, oracle_attention(spec, leaf, x, seen, own))
    a = seen['attn'] = intervene(layer, 'attn', a)
    if spec.residual != 'parallel_shared':
      base = h + a if spec.residual == 'sequential' else h
      x = oracle_norm(spec, leaf['mlp_norm'], base)
    m = own('mlp', x, oracle_mlp(spec, leaf, x, seen, own))
    m = seen['mlp'] = intervene(layer, 'mlp', m)
    h = own('block', h, h + a + m)
    h = seen['block'] = intervene(layer, 'block', h)
    layers.append(seen)
  return h, layers


def oracle_logits(spec, params, h):
  """[T, V] from the last residual [T, D]."""
  params = jax.tree.map(np.asarray, params)
  x = oracle_norm(spec, params['final_norm'], h)
  if spec.tied:
    return x @ params['embed']['embedding'].T
  return x @ params['head']['kernel'] + params['head'].get('bias', 0.0)
