"""The loop of every method that fits parameters by gradient descent.

  values <- project(values + optimizer(grad loss(values)))

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
    loss: [] at the values before the last update.
    steps: [] int32, updates made.
  """

  values: Any
  loss: Array
  steps: Array


def fit(
    loss: Callable[[Any], Array],
    values: Any,
    optimizer: optax.GradientTransformation,
    *,
    steps: Array | int,
    stop_loss: Array | float | None = None,
    project: Callable[[Any], Any] = lambda values: values,
) -> Fit:
  """Minimises a loss.

  Args:
    loss: values -> [] loss.
    values: where to begin, a pytree of float arrays; their dtypes are kept.
    optimizer: an optax transformation, its learning rate included.
    steps: updates at most.
    stop_loss: no update is made once the loss is below; None never stops.
    project: applied to the values after each update, e.g. a box.

  Returns:
    The fit.
  """

  def update(values: Any, state: Any) -> tuple[Any, Any, Array]:
    value, grad = jax.value_and_grad(loss)(values)
    updates, state = optimizer.update(grad, state, values)
    moved = jax.tree.map(lambda w, u: (w + u).astype(w.dtype), values, updates)
    return project(moved), state, value

  dtype = jnp.result_type(*jax.tree.leaves(values))
  start = (values, optimizer.init(values), jnp.zeros([], dtype))
  if stop_loss is None:
    values, _, value = jax.lax.fori_loop(
        0, steps, lambda _, now: update(*now[:2]), start
    )
    return Fit(values, value, jnp.asarray(steps, jnp.int32))

  def goes_on(now: tuple[Any, Any, Array, Array, Array]) -> Array:
    return (now[3] < steps) & ~now[4]

  def step(now: tuple[Any, Any, Array, Array, Array]) -> Any:
    moved, state, value = update(*now[:2])
    done = value < stop_loss
    moved = jax.tree.map(lambda w, m: jnp.where(done, w, m), now[0], moved)
    return moved, state, value, now[3] + ~done, done

  start = (*start, jnp.int32(0), jnp.asarray(False))
  values, _, value, count, _ = jax.lax.while_loop(goes_on, step, start)
  return Fit(values, value, count)


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
