"""A scope classifier: a text encoder, and a cosine above which a fact is meant.

  u_i = e(x) . e(c_i)                       |e| = 1, c_i the text of entry i
  log s_i = -softplus(-a (u_i - b))         a, b trained           ('sigmoid')
  log s_i = -|e(x) - e(c_i)|^2 = 2 u_i - 2                         ('distance')

A prompt x is in the scope of the entry with the largest u_i if s_i > 1/2: u_i > b,
or u_i > 1 - ln(2) / 2. So whatever the rule, a trained classifier is an encoder and
a threshold, and a memory looks facts up by them (`edited.prompting`).

  loss = mean over (rephrase_i, entry_i) of -log s
       + mean over negatives of -log(1 - s)

Negatives of a query are its nearest entry of the batch that it does not ask for
('hardest', which a lookup among many entries must survive), all of them ('all'), or
the entry of its own record ('own', as published). Queries are rephrased prompts,
local prompts and prompts of other relations of the same subject.

Axes: B records, Q queries of a batch, N tokens end to end, D width of the encoder.

Source: Mitchell et al. 2022 (SERAC, arXiv 2206.06520) and its published code. There
e is not of length 1 and is read at the first token; the sigmoid is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching.packer import end_to_end
from jaxedit.models import encoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import Array, PackedSequences, Params

RULES = ('sigmoid', 'distance')
NEGATIVES = ('hardest', 'all', 'own')
# Tokens of a batch are rounded up to a multiple, so that few shapes compile.
_STEP = 256
_EPS = float(np.finfo(np.float32).eps)
# The sigmoid before training: of MiniLM's cosines, paraphrases lie around 0.8.
_SLOPE, _CUT = 20.0, 0.7


class Texts(NamedTuple):
  """Texts end to end.

  Attributes:
    tokens: [1, N] int32.
    rows: where each text lies among them.
  """

  tokens: Array
  rows: PackedSequences


class ScopeBatch(NamedTuple):
  """Queries and entries of B records.

  Attributes:
    texts: 4 B texts: what is stored; rephrased prompts; prompts that the edits do
      not concern; prompts of another relation of the records' subjects, empty
      where there is none.
    same: [B, B] bool, records of one subject.
    answers: `answers.Answers` of the first records; () where none are trained.
  """

  texts: Texts
  same: Array
  answers: Any = ()


def init(params: Params, dtype: Any) -> dict[str, Any]:
  """The variables before training: the encoder's layers and the sigmoid's."""
  cast = lambda x: jnp.array(x, dtype)
  return {
      'layers': jax.tree.map(cast, params['layers']),
      'slope': cast(_SLOPE),
      'cut': cast(_CUT),
  }


def threshold(rule: str, trained: Mapping[str, Any]) -> float:
  """The cosine above which a prompt is in scope."""
  return float(trained['cut']) if rule == 'sigmoid' else 1 - np.log(2) / 2


def pack(ids: Sequence[Sequence[int]], width: int) -> Texts:
  """Puts texts of at most `width` tokens end to end."""
  length = np.array([len(one) for one in ids], np.int32)
  budget = max(1, -(-int(length.sum()) // _STEP)) * _STEP
  tokens = np.zeros((1, budget), np.int32)
  tokens[0, : length.sum()] = [token for one in ids for token in one]
  rows = end_to_end(
      np.zeros_like(length), length, width=width, token_budget=budget
  )
  return Texts(tokens, rows)


def embed(spec: ModelSpec, params: Params, texts: Texts, pooling: str) -> Array:
  """Embeds texts: [B, D] of length 1, zeros for empty ones."""
  h = encoder.hidden_states(spec, params, texts.tokens, texts.rows)
  return encoder.pool(h, texts.rows, pooling)


def log_odds(
    rule: str, trained: Mapping[str, Any], cosine: Array
) -> tuple[Array, Array]:
  """(log s, log(1 - s)) of cosines."""
  if rule == 'sigmoid':
    z = trained['slope'] * (cosine - trained['cut'])
    return -jax.nn.softplus(-z), -jax.nn.softplus(z)
  score = 2 * jnp.minimum(cosine, 1) - 2
  left = -jnp.expm1(score)
  return score, jnp.log(jnp.where(left > 0, left, _EPS))


def loss(
    config: Any,
    trained: Mapping[str, Any],
    cosine: tuple[Array, Array, Array],
    same: Array,
) -> Array:
  """The loss of cosines.

  Args:
    config: a `training.SeracTraining`.
    trained: see `init`.
    cosine: [B, B] each, of rephrased, local and other prompts with entries.
    same: [B, B] bool, records of one subject.

  Returns:
    [] loss, nats.
  """
  eye = jnp.eye(len(same), dtype=bool)
  near, local, other = (log_odds(config.rule, trained, x) for x in cosine)
  hits = -jnp.diagonal(near[0])
  if config.negatives == 'own':
    kinds = [(local, eye, 1.0), (other, eye, config.other_relations)]
  else:
    everything = jnp.ones_like(eye)
    kinds = [
        (near, ~same, 1.0),
        (local, everything, 1.0),
        (other, eye | ~same, config.other_relations),
    ]
  total = weight = 0.0
  for (_, wrong), allowed, share in kinds:
    some = jnp.where(allowed, -wrong, 0)
    if config.negatives == 'all':
      total += share * some.sum()
      weight += share * allowed.sum()
    else:
      asked = allowed.any(-1)
      total += share * jnp.where(asked, some.max(-1), 0).sum()
      weight += share * asked.sum()
  return hits.mean() + total / jnp.maximum(weight, 1)


def cosines(entries: Array, queries: Array) -> tuple[Array, Array, Array]:
  """Splits the products of [3 B, D] queries with [B, D] entries by kind."""
  found = jnp.einsum('qd,bd->qb', queries, entries, precision='highest')
  return tuple(jnp.split(found, 3))


def batch_loss(
    spec: ModelSpec,
    params: Params,
    config: Any,
    trained: Mapping[str, Any],
    batch: ScopeBatch,
    pooling: str,
) -> tuple[Array, tuple[Array, Array, Array]]:
  """The loss of a batch, and its cosines.

  Args:
    spec: of the encoder.
    params: of the encoder as it comes; its layers are replaced.
    config: a `training.SeracTraining`.
    trained: see `init`.
    batch: the records.
    pooling: of the encoder.
  """
  own = {**params, 'layers': trained['layers']}
  vectors = embed(spec, own, batch.texts, pooling)
  count = len(batch.same)
  cosine = cosines(vectors[:count], vectors[count:])
  return loss(config, trained, cosine, batch.same), cosine


run_embed = functools.partial(jax.jit, static_argnames=('spec', 'pooling'))(
    embed
)
