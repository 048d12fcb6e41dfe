"""Picks, for every fused operation, the kernel or its reference.

A kernel runs only where `WINS` names it. No accelerator was measured so far, so
the table is empty and every operation runs its reference; a row is added with
its figures in BENCHMARKS.md, from `python -m jaxedit.kernels.<op>.bench`.

What a row would change: `linear_logprob` serves scoring, perplexity and tracing,
not the value optimisation, whose KL rows need all logits anyway. `gram` is called
by nothing yet: `stats.moments` sums the upper triangle alone, half the products,
and a kernel has to win against that before it takes its place.
"""

from __future__ import annotations

import jax

from jaxedit.kernels.gram import api as gram_api
from jaxedit.kernels.linear_logprob import api as linear_logprob_api

__all__ = ['WINS', 'gram', 'linear_logprob']

# (operation, platform as jax names it) -> the implementation that was measured
# to be at least 1.2 times as fast as the reference there.
WINS: dict[tuple[str, str], str] = {}


def linear_logprob(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    *,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Scores labels under a linear head.

  Args:
    x: [R, D] normed hidden states, in the dtype of the kernel.
    kernel: [D, V].
    bias: [V] or None.
    labels: [R] int32 vocabulary ids.
    tied: the kernel is given as `embedding.T`.

  Returns:
    ([R] log-probability of the label in nats, f32 or wider; [R] int32 id of the
    most probable token).
  """
  return linear_logprob_api.linear_logprob(
      x, kernel, bias, labels, tied=tied, implementation=_pick('linear_logprob')
  )


def gram(keys: jax.Array, mask: jax.Array) -> jax.Array:
  """Sums k k^T over the rows that the mask names.

  Args:
    keys: [N, F] floats.
    mask: [N] bool, True for the rows to sum.

  Returns:
    [F, F] f32 or wider, exactly symmetric.
  """
  return gram_api.gram(keys, mask, implementation=_pick('gram'))


def _pick(operation: str) -> str:
  return WINS.get((operation, jax.default_backend()), 'reference')
