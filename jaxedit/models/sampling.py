"""How the next token follows from logits: settings and what they do.

In this order, as transformers orders its processors:

  repetition penalty r   a token that the text holds already, prompt included:
                         l / r where l > 0, l r else
  temperature t          l / t; 0 takes the most probable token, nothing is drawn
  top_k                  the k most probable tokens stay
  top_p                  of these the fewest whose probability exceeds p together,
                         one at least

Axes: B rows, V vocabulary, K candidates.

Source: Keskar et al. 2019 (arXiv 1909.05858, section 4.1) for the penalty, with
the division turned into a product where logits are negative, as everybody runs
it; Fan et al. 2018 (arXiv 1805.04833) for top_k; Holtzman et al. 2020 (arXiv
1904.09751) for top_p. Among equally probable tokens at the border of top_k the
ones with lower numbers stay, where transformers keeps them all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.types import Array


class Decoding(NamedTuple):
  """How texts are continued; the defaults are greedy.

  Attributes:
    temperature: divides the logits; 0 is greedy.
    top_k: draw among the k most probable tokens; 0 among all.
    top_p: draw among the fewest tokens that together are more probable than
      this; 1 among all.
    repetition_penalty: above 1 makes tokens of the prompt and of the new text
      less probable, 1 leaves them, below 1 favours them. Greedy texts obey it
      too.
    seed: of the random streams, one a prompt.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def errors(self) -> list[str]:
    """Says what is out of range, a sentence a setting."""
    penalty = self.repetition_penalty
    allowed = {
        'temperature': (0 <= self.temperature < math.inf, 'at least 0'),
        'top_k': (self.top_k >= 0, 'at least 0'),
        'top_p': (0 < self.top_p <= 1, 'above 0 and at most 1'),
        'repetition_penalty': (0 < penalty < math.inf, 'above 0'),
    }
    return [
        f'{name} is {getattr(self, name)}; it must be {words}'
        for name, (fits, words) in allowed.items()
        if not fits
    ]


GREEDY = Decoding()


class Rule(NamedTuple):
  """The part of `Decoding` that makes another program; hashable, static."""

  greedy: bool
  top_k: int
  nucleus: bool
  penalised: bool


class Numbers(NamedTuple):
  """The part of `Decoding` that is free to change; scalars."""

  temperature: Array
  top_p: Array
  penalty: Array
  root: Array  # [] random key


def split(decoding: Decoding) -> tuple[Rule, Numbers]:
  """Parts settings into what is compiled and what is handed over."""
  greedy = decoding.temperature == 0
  rule = Rule(
      greedy=greedy,
      top_k=0 if greedy else decoding.top_k,
      nucleus=not greedy and decoding.top_p < 1,
      penalised=decoding.repetition_penalty != 1,
  )
  numbers = decoding.temperature, decoding.top_p, decoding.repetition_penalty
  root = jax.random.key(decoding.seed)
  return rule, Numbers(*map(jnp.float32, numbers), root)


def penalise(logits: Array, seen: Array, penalty: Array | float) -> Array:
  """Applies the repetition penalty.

  Args:
    logits: [B, V].
    seen: [B, V] bool, tokens that the text holds.
    penalty: r of the module head.

  Returns:
    [B, V].
  """
  worse = jnp.where(logits < 0, logits * penalty, logits / penalty)
  return jnp.where(seen, worse, logits)


def candidates(
    logits: Array,
    *,
    temperature: Array | float,
    top_k: int = 0,
    top_p: Array | float | None = None,
) -> tuple[Array, Array | None]:
  """Finds what may be drawn.

  Args:
    logits: [B, V], penalised if they shall be.
    temperature: above 0.
    top_k: static; 0 keeps all.
    top_p: None keeps all.

  Returns:
    ([B, K] logits of a draw, -inf at tokens that are out; [B, K] int32 their
    tokens, most probable first, or None for 0, 1, ..., V - 1).
  """
  if not top_k and top_p is None:
    return logits / temperature, None
  size = logits.shape[-1]
  kept, names = jax.lax.top_k(logits, min(top_k, size) if top_k else size)
  scores = kept / temperature
  if top_p is not None:
    # Summed from the least probable up, so that a long tail is not rounded.
    chance = jax.nn.softmax(scores, axis=-1)
    tail = jnp.cumsum(chance[:, ::-1], axis=-1)[:, ::-1]
    inside = (tail > 1 - top_p).at[:, 0].set(True)
    scores = jnp.where(inside, scores, -jnp.inf)
  return scores, names


def choose(
    rule: Rule,
    numbers: Numbers,
    logits: Array,
    *,
    seen: Array | None,
    stream: Array,
    step: Array,
) -> Array:
  """Chooses the next token of every row.

  Args:
    rule: static settings.
    numbers: the others.
    logits: [B, V].
    seen: [B, V] bool where the rule penalises, else None.
    stream: [B] int32 number of the row's random stream.
    step: [B] int32 place of the token in its new text.

  Returns:
    [B] int32.
  """
  if rule.penalised:
    logits = penalise(logits, seen, numbers.penalty)
  if rule.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  scores, names = candidates(
      logits,
      temperature=numbers.temperature,
      top_k=rule.top_k,
      top_p=numbers.top_p if rule.nucleus else None,
  )

  def draw(stream: Array, step: Array, row: Array) -> Array:
    key = jax.random.fold_in(jax.random.fold_in(numbers.root, stream), step)
    return jax.random.categorical(key, row)

  drawn = jax.vmap(draw)(stream, step, scores)
  if names is not None:
    drawn = jnp.take_along_axis(names, drawn[:, None], axis=-1)[:, 0]
  return drawn.astype(jnp.int32)
