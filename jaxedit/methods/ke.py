"""KE: a network turns the text of an edit into a gated, modulated gradient step.

  c   = tanh( A [h_fwd(last) ; h_bwd(first)] + a )     of an LSTM over the text
  u   = N2(tanh(N1 c)) = [ c_a | r_a | c_b | r_b | s ] for each edited matrix
  W  += m sigmoid(s) ( G o (c_a softmax(r_a)^T) + c_b softmax(r_b)^T )

G = sum over t of x_t d_t^T is the gradient of the edit [in, out], `o` the
elementwise product, N1 and N2 are linear maps with weight normalisation (each
output has a direction v / |v| and a length g). G is never formed:

  keys    c_a o x_t        and one more,  c_b
  values  m sigmoid(s) softmax(r_a) o d_t    and    m sigmoid(s) softmax(r_b)

The text is that of the edit, prompt and answer; its embeddings are the model's
own, frozen.

Axes: n edited layers, B records, T tokens.

Source: De Cao et al. 2021 (KE, arXiv 2104.08164), in the form of Mitchell et al.
2022 (EFK in arXiv 2110.11309), which edits decoders and trains with their loss.
The first trains a copy of the embeddings that shares its storage with the model,
and edits one record at a time.
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
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import einsum
from jaxedit.types import Array


@dataclasses.dataclass(frozen=True)
class KeTraining(Training):
  """Settings of training; the defaults are those of MEND's code for KE."""

  rate: float = setting(
      1e-5, 'learning rate of Adam', source='MEND', low=0, exclusive=True
  )
  lstm_width: int = setting(
      512, 'width of the LSTM, each way', source='MEND', low=1
  )
  condition_width: int = setting(
      768, 'width of the condition c', source='MEND', low=1
  )
  inner_width: int = setting(
      512, 'inner width of the conditioners', source='MEND', low=1
  )
  largest_step: float = setting(
      1.0, 'factor m on every change', source='KE', low=0, exclusive=True
  )


@functools.cache
def network(
    spec: ModelSpec, maps: factors_lib.Maps, config: KeTraining | None = None
) -> network_lib.Network:
  """Makes the network.

  Args:
    spec: the architecture.
    maps: the edited maps.
    config: settings of training; None for a network that is only used.

  Returns:
    The network.
  """

  def init(key: Array, dtype: Any) -> network_lib.Variables:
    keys = iter(jax.random.split(key, 5 + 4 * len(maps.sites)))
    n, inner, width = (
        len(maps.layers),
        config.lstm_width,
        config.condition_width,
    )

    def uniform(fan: int, *shape: int) -> Array:
      bound = fan**-0.5
      return jax.random.uniform(next(keys), shape, dtype, -bound, bound)

    def normed(name: str, fan_in: int, fan_out: int) -> dict[str, Array]:
      direction = uniform(fan_in, n, fan_in, fan_out)
      return {
          f'{name}_direction': direction,
          f'{name}_length': _norm(direction),
          f'{name}_bias': uniform(fan_in, n, fan_out),
      }

    # The two directions of the LSTM lie on the first axis.
    trained = {
        'text': {
            'kernel': uniform(inner, 2, spec.width, 4 * inner),
            'recurrent': uniform(inner, 2, inner, 4 * inner),
            'bias': uniform(inner, 2, 4 * inner),
            'out_kernel': uniform(2 * inner, 2 * inner, width),
            'out_bias': uniform(2 * inner, width),
        }
    }
    for site in maps.sites:
      outputs = 2 * sum(factors_lib.widths(spec, site)) + 1
      trained[_name(site)] = {
          **normed('in', width, config.inner_width),
          **normed('out', config.inner_width, outputs),
      }
    most = jnp.asarray(config.largest_step, dtype)
    return network_lib.Variables(trained, {'largest_step': most})

  def transform(
      variables: network_lib.Variables,
      factors: Mapping[str, factors_lib.Factors],
      texts: factors_lib.Sequences,
      embedding: Array,
  ) -> dict[str, factors_lib.Pair]:
    condition = condition_of(variables.trained['text'], texts, embedding)
    most = variables.statistics['largest_step']
    return {
        site: _modulated(
            variables.trained[_name(site)], condition, factors[site], most
        )
        for site in maps.sites
    }

  return network_lib.Network(
      init, lambda statistics, factors: statistics, transform
  )


def _name(site: str) -> str:
  """The name of a site's variables."""
  return site.replace('/', '_')


def _norm(direction: Array) -> Array:
  """Lengths [n, out] of the columns of [n, in, out]."""
  return jnp.sqrt(jnp.square(direction).sum(1))


def _linear(ours: Mapping[str, Array], name: str, x: Array) -> Array:
  """Applies a normalised map to [n, B, in]; [n, B, out]."""
  kernel = ours[f'{name}_direction']
  y = jnp.einsum('nbi,nio->nbo', x, kernel, precision='highest')
  y = y * (ours[f'{name}_length'] / _norm(kernel))[:, None]
  return y + ours[f'{name}_bias'][:, None]


def condition_of(
    ours: Mapping[str, Array], texts: factors_lib.Sequences, embedding: Array
) -> Array:
  """Reads texts with the LSTM.

  Args:
    ours: its variables; both directions on the first axis.
    texts: B edits; what is read is their inputs and the last target token.
    embedding: [V, D] the model's token table.

  Returns:
    [B, condition width].
  """
  count, width = texts.tokens.shape
  targets = texts.weight.sum(-1).astype(jnp.int32)
  last = jnp.take_along_axis(
      texts.labels, jnp.maximum(targets - 1, 0)[:, None], axis=1
  )[:, 0]
  tokens = jnp.pad(texts.tokens, ((0, 0), (0, 1)))
  tokens = tokens.at[jnp.arange(count), texts.length].set(last)
  there = jnp.arange(width + 1) <= texts.length[:, None]
  tokens = decoder.word_ids(tokens)
  x = jax.lax.stop_gradient(embedding[tokens]).astype(ours['kernel'].dtype)

  def run(kernel: Array, recurrent: Array, bias: Array, reverse: bool) -> Array:
    inputs = einsum('btd,dh->bth', x, kernel) + bias

    def cell(state: tuple[Array, Array], now: tuple[Array, Array]) -> Any:
      gates, here = now
      h, c = state
      gates = gates + einsum('bh,hg->bg', h, recurrent)
      i, f, g, o = jnp.split(gates, 4, axis=-1)
      c_new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)
      keep = lambda new, old: jnp.where(here[:, None], new, old)
      return (keep(h_new, h), keep(c_new, c)), None

    zeros = jnp.zeros((count, recurrent.shape[0]), x.dtype)
    by_time = (jnp.swapaxes(inputs, 0, 1), there.T)
    return jax.lax.scan(cell, (zeros, zeros), by_time, reverse=reverse)[0][0]

  ends = [
      run(*(ours[k][way] for k in ('kernel', 'recurrent', 'bias')), bool(way))
      for way in (0, 1)
  ]
  both = jnp.concatenate(ends, axis=-1)
  return jnp.tanh(
      einsum('bh,hc->bc', both, ours['out_kernel']) + ours['out_bias']
  )


def _modulated(
    ours: Mapping[str, Array],
    condition: Array,
    factors: factors_lib.Factors,
    most: Array,
) -> factors_lib.Pair:
  """The pair of one site, [n, B, T + 1, ...]."""
  fan_in, fan_out = factors.x.shape[-1], factors.d.shape[-1]
  n = ours['in_bias'].shape[0]
  shared = jnp.broadcast_to(condition, (n, *condition.shape))
  u = _linear(ours, 'out', jnp.tanh(_linear(ours, 'in', shared)))
  bounds = [fan_in, fan_in + fan_out, 2 * fan_in + fan_out, u.shape[-1] - 1]
  col_a, row_a, col_b, row_b, gate = jnp.split(u, bounds, axis=-1)
  size = most * jax.nn.sigmoid(gate)  # [n, B, 1]
  row_a, row_b = (size * jax.nn.softmax(row) for row in (row_a, row_b))
  # An empty text has no delta.
  some = factors.used.any(-1)[..., None]
  keys = [col_a[:, :, None] * factors.x, jnp.where(some, col_b, 0)[:, :, None]]
  values = [row_a[:, :, None] * factors.d, row_b[:, :, None]]
  return jnp.concatenate(keys, axis=2), jnp.concatenate(values, axis=2)


_TRAINER = network_lib.Trainer(
    KeTraining,
    course_of(network),
    network,
    small=KeTraining(
        layers=(0, 1), lstm_width=6, condition_width=7, inner_width=5,
        largest_step=9.0,
    ),
)  # fmt: skip

METHOD = Method(
    'ke',
    'one gradient step that a trained network gates and modulates by the text',
    HypernetConfig,
    functools.partial(editor_lib.hypernet, 'ke', _TRAINER),
    accepts=frozenset({'fact'}),
    chunkable=False,
    contexts=False,
    encoders=True,
    source='arXiv 2104.08164',
    trainer=_TRAINER,
    small={'editor': network_lib.UNTRAINED, 'layers': (0, 1)},
)
