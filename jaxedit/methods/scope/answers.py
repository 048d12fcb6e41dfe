"""The counterfactual model: the language model, which reads the fact, and deltas.

  h(X) = model + V^T K at MLPs of some layers, on  "New Fact: F / Prompt: X"

K and V are trained on rephrased prompts, one change for all facts; without training
h is the model itself. As EasyEdit trains it, answers are those of a mixture,

  log p = log((1 - s) f + s h),   f the model on X, s the classifier's probability,

  loss  = edit_weight * nll of the edit's own answer + KL(f || p) at local prompts

so that the classifier learns from answers alone, and from no rephrased prompt.

Axes as in `jaxedit.types`: B records, T tokens, O scored tokens, R rank, V vocabulary.

Source: Mitchell et al. 2022 (SERAC, arXiv 2206.06520) and EasyEdit. They train a
smaller model h; a change of the same model needs no second one in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import ActiveDeltas, LowRank
from jaxedit.methods.demonstrations import new_fact
from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.hypernet.factors import Maps, Sequences, Text
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.text.locate import Continued
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import Array, EditRequest, Params, Probe

# Multiples that tokens and scored tokens of a batch are rounded up to.
_TOKENS, _SCORED = 16, 4


class Answers(NamedTuple):
  """Prompts with their answers, of one record or (`Sequences`) of a batch.

  Attributes:
    near: the fact, a rephrased prompt, the edit's answer.
    own: the fact, the edit's prompt, the edit's answer.
    local: the fact, a local prompt, its own answer.
    plain_own: as `own`, without the fact.
    plain_local: as `local`, without the fact.
  """

  near: Any
  own: Any
  local: Any
  plain_own: Any
  plain_local: Any


def answers_of(
    request: EditRequest,
    near: Probe,
    local: Probe,
    tokens: TokenCache,
    *,
    longest: int,
) -> Answers | None:
  """Encodes the answers of a record.

  Args:
    request: the record.
    near: its rephrased prompt.
    local: its local prompt.
    tokens: of the model's tokenizer.
    longest: tokens of a text at most.

  Returns:
    Texts; None if one has no token or too many.
  """
  fact = f'{new_fact(request)}Prompt: '
  target = request.target
  found = [
      Continued(fact + near.prompt, target, near.space),
      Continued(fact + request.question, target, request.space),
      Continued(fact + local.prompt, local.answers[0], local.space),
      Continued(request.question, target, request.space),
      Continued(local.prompt, local.answers[0], local.space),
  ]
  prompts = tokens.prompts([one.prompt for one in found])
  targets = tokens.targets(found)
  if not all(map(len, (*prompts, *targets))):
    return None
  texts = Answers(*(lib.answer(*one) for one in zip(prompts, targets)))
  return texts if all(len(x.tokens) <= longest for x in texts) else None


def pack(texts: Sequence[Text]) -> Sequences:
  """Puts texts in one shape, of which there are few."""
  up = lambda sizes, step: -(-max(sizes) // step) * step
  width = up([len(one.tokens) for one in texts], _TOKENS)
  scored = up([len(one.index) for one in texts], _SCORED)
  return lib.pack(texts, (len(texts), width, scored))


def packed(records: Sequence[Answers], config: Any) -> Answers:
  """Puts the answers of records in one shape, the kinds that training asks for.

  Args:
    records: the records.
    config: a `training.SeracTraining`.

  Returns:
    `Sequences`, () for kinds that are not asked for. Of rephrased prompts every
    fourth is the edit's own.
  """
  mixed = [a.near if i % 4 else a.own for i, a in enumerate(records)]
  kinds = zip(*(one._replace(near=n) for one, n in zip(records, mixed)))
  found = Answers(*map(pack, kinds))
  if config.supervised:
    return Answers(found.near, (), (), (), ())
  return found._replace(near=())


def init(
    spec: ModelSpec, maps: Maps, rank: int, seed: int, dtype: Any
) -> dict[str, dict[str, Array]]:
  """The factors before training: K random, V zero, by site ('/' as '.')."""
  found, rng = {}, np.random.default_rng(seed)
  for site in maps.sites:
    fan_in, fan_out = lib.widths(spec, site)
    key = rng.standard_normal((len(maps.layers), rank, fan_in)) * fan_in**-0.5
    value = jnp.zeros((len(maps.layers), rank, fan_out), dtype)
    found[site.replace('/', '.')] = {
        'key': jnp.array(key, dtype),
        'value': value,
    }
  return found


def deltas_of(
    maps: Maps, trained: Mapping[str, Mapping[str, Array]]
) -> tuple[LowRank, ...]:
  """The deltas of factors, one a site."""
  of = lambda site: trained[site.replace('/', '.')]
  return tuple(
      LowRank(maps.layers, s, of(s)['key'], of(s)['value'])
      for s in maps.sites
      if trained
  )


def log_probabilities(
    spec: ModelSpec,
    params: Params,
    texts: Sequences,
    deltas: Sequence[LowRank] = (),
) -> Array:
  """[B, O, V] of the tokens that answers have, in nats."""
  layout = lib.layout_of(spec, texts)
  first = deltas[0].layers[0] if deltas else spec.layers
  h = lib.enter(spec, params, texts, first)
  if deltas:
    h, _ = decoder.run_layers(
        spec,
        params,
        jax.lax.stop_gradient(h),
        layout,
        start=first,
        stop=spec.layers,
        deltas=ActiveDeltas(tuple(deltas)),
        remat=decoder.SAVE_PRODUCTS,
    )
  h = jnp.take_along_axis(h, texts.index[..., None], axis=1)
  return jax.nn.log_softmax(decoder.logits(spec, params, h))


def nll(found: Array, texts: Sequences) -> tuple[Array, Array]:
  """(mean over scored tokens, nats; [B] bool, all of a record the most probable)."""
  mine = jnp.take_along_axis(found, texts.labels[..., None], axis=-1)[..., 0]
  scored = texts.weight > 0
  right = (found.argmax(-1) == texts.labels) | ~scored
  mean = jnp.where(scored, -mine, 0).sum() / jnp.maximum(scored.sum(), 1)
  return mean, right.all(-1)


def mixture(f: Array, h: Array, odds: tuple[Array, Array]) -> Array:
  """log((1 - s) f + s h); odds are (log s, log(1 - s)), [B] each."""
  yes, no = (x[..., None, None] for x in odds)
  return jnp.logaddexp(no + f, yes + h)


def mixture_loss(
    f: tuple[Array, Array],
    h: tuple[Array, Array],
    odds: tuple[Any, Any],
    texts: Answers,
    edit_weight: float,
) -> Array:
  """The loss of the port's training.

  Args:
    f: log-probabilities of the model at (own, local) prompts, [B, O, V] each.
    h: those of the counterfactual model.
    odds: (log s, log(1 - s)) of (own, local) prompts with their own entry.
    texts: the answers.
    edit_weight: weight of the first term.

  Returns:
    [] loss, nats.
  """
  own, local = (mixture(*three) for three in zip(f, h, odds))
  kept = texts.plain_local.weight > 0
  kl = jnp.sum(jnp.exp(f[1]) * (f[1] - local), axis=-1)
  kl = jnp.where(kept, kl, 0).sum() / jnp.maximum(kept.sum(), 1)
  return edit_weight * nll(own, texts.plain_own)[0] + kl
