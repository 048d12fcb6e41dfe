"""The loop of every method that fits parameters by gradient descent.

  values <- project(values + optimizer(grad loss(values, step)))

One jit-compiled loop over any pytree: a block (UnKE), a leaf or factors
(fine-tuning, adapters), added neurons. It may be vmapped over independent fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class Fit(NamedTuple):
  """What a fit came to.

  Attributes:
    values: the fitted parameters.
    loss: [] watched loss at the values before the last update; the mean of the
      last epoch of several minibatches.
    steps: [] int32, updates made.
  """

  values: Any
  loss: Array
  steps: Array


def fit(
    loss: Callable[[Any, Array], tuple[Array, Array]],
    values: Any,
    optimizer: optax.GradientTransformation,
    *,
    steps: Array | int,
    stop_loss: Array | float | None = None,
    project: Callable[[Any], Any] = lambda values: values,
    minibatches: int = 1,
) -> Fit:
  """Minimises a loss.

  Args:
    loss: (values, number of the step) -> ([] loss, [] the part of it that is
      watched, e.g. without a penalty).
    values: where to begin, a pytree of float arrays; their dtypes are kept.
    optimizer: an optax transformation, its learning rate included.
    steps: epochs at most, each of `minibatches` updates.
    stop_loss: a minibatch whose watched loss is below makes no update; an epoch
      whose mean is below is the last. None never stops.
    project: applied to the values after each update, e.g. a box.
    minibatches: losses that take turns; the loss of step i is that of number
      i % minibatches.

  Returns:
    The fit.
  """

  def update(values: Any, state: Any, i: Array) -> tuple[Any, Any, Array]:
    (_, value), grad = jax.value_and_grad(loss, has_aux=True)(values, i)
    updates, state = optimizer.update(grad, state, values)
    moved = jax.tree.map(lambda w, u: (w + u).astype(w.dtype), values, updates)
    return project(moved), state, value

  dtype = jnp.result_type(*jax.tree.leaves(values))
  start = (values, optimizer.init(values), jnp.zeros([minibatches], dtype))
  total = jnp.asarray(steps * minibatches, jnp.int32)

  def advance(i: Array, now: Any) -> Any:
    values, state, value = update(*now[:2], i)
    return values, state, now[2].at[i % minibatches].set(value)

  if stop_loss is None:
    values, _, losses = jax.lax.fori_loop(0, total, advance, start)
    return Fit(values, jnp.mean(losses), total)

  def goes_on(now: Any) -> Array:
    *_, i, _, done = now
    return (i < total) & ~done

  def step(now: Any) -> Any:
    *old, i, count, _ = now
    *new, losses = advance(i, old)
    kept = losses[i % minibatches] < stop_loss
    new = jax.tree.map(lambda w, m: jnp.where(kept, w, m), old[:2], new)
    last = (i + 1) % minibatches == 0
    done = last & (jnp.mean(losses) < stop_loss)
    return *new, losses, i + 1, count + ~kept, done

  start = (*start, jnp.int32(0), jnp.int32(0), jnp.asarray(False))
  values, _, losses, _, count, _ = jax.lax.while_loop(goes_on, step, start)
  return Fit(values, jnp.mean(losses), count)


def adamw(
    rate: Array | float,
    decay: Array | float = 0.0,
    decays: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """AdamW whose settings may be traced.

  Args:
    rate: learning rate.
    decay: decoupled weight decay.
    decays: (values) -> a tree of bools, which of them decay; None for all.

  Returns:
    The transformation.

  Source: Loshchilov & Hutter 2019 (arXiv 1711.05101).
  """
  return optax.chain(
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
      optax.add_decayed_weights(decay, mask=decays),
      optax.scale(-rate),
  )
