"""Solvers of targets: from an evaluated loss to the change to evaluate next.

  adam    d <- project(d - rate * m / (sqrt(v) + 1e-8)), every change accepted
  lbfgs   project(x + t p) with p = -H q is tried and accepted where the loss
          falls enough, otherwise t <- 0.35 t; H from the last 8 moves

A slot is a state machine: it is given one evaluation at a time and decides by
itself whether that was a rejected trial or a step. So backtracking needs no
inner loop, in which all slots would wait for the slowest line search (as with
optax's, hence code of our own), and a trial costs what any evaluation costs.

Each half of a change has its own ball |d| <= radius. Where x is on the sphere
and the loss falls outwards, q is the gradient's part along the sphere, and p
and the pairs of H are taken along it too, so that H includes the curvature of
the sphere: most targets end there. Elsewhere q is the gradient.

Shapes are those of one slot, a change being [D] or [half, D]; `engine` maps
over slots.

Source: Kingma and Ba 2015 (Adam, arXiv 1412.6980), algorithm 1; Liu and Nocedal
1989 (L-BFGS), algorithm 2.1 with the two-loop recursion. Backtracking and the
treatment of the ball are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxedit.targets.objective import norm
from jaxedit.targets.state import TargetConfig
from jaxedit.types import Array

_PAIRS = 8
_SHRINK = 0.35
# A step's loss falls by this share of what the gradient promises, at least.
_ENOUGH = 1e-4
# Least cosine between a move and the change of the gradient along it.
_CONVEX = 1e-4
# Least share of a move that is along the sphere; the rest would be rounding.
_ALONG = 1e-3
# Share of the radius from which on a change is on the sphere; rounding.
_SPHERE = 1 - 1e-5


class Evaluated(NamedTuple):
  """One evaluation of a slot, and what bounds its changes.

  Attributes:
    delta: the change that was evaluated.
    loss: [] nats.
    grad: of the shape of the change.
    renewed: [] bool, the loss is another function from here on.
    size: [] or [half], |z0|.
  """

  delta: Array
  loss: Array
  grad: Array
  renewed: Array
  size: Array


class Advice(NamedTuple):
  """A solver's answer.

  Attributes:
    state: its state.
    delta: the change to evaluate next.
    best: the change of the last step; later trials were rejected.
    accepted: [] bool, whether that is the change just evaluated.
  """

  state: Any
  delta: Array
  best: Array
  accepted: Array


class Solver(NamedTuple):
  """Optimises the change of one slot.

  Attributes:
    init: a change -> the state before any evaluation.
    update: (state, evaluation, settings) -> `Advice`.
  """

  init: Callable[[Array], Any]
  update: Callable[[Any, Evaluated, TargetConfig], Advice]


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def _adam(state: Any, now: Evaluated, config: TargetConfig) -> Advice:
  """Adam as published."""
  direction, state = _ADAM.update(now.grad, state)
  delta = now.delta - config.rate * direction
  delta = project(delta, config.clamp * now.size)
  return Advice(state, delta, now.delta, jnp.bool_(True))


def project(delta: Array, radius: Array) -> Array:
  """Shortens changes [..., D] to at most `radius` [...]."""
  size = norm(delta)
  scale = jnp.where(size > radius, radius / jnp.maximum(size, 1e-30), 1)
  return delta * scale[..., None]


class Lbfgs(NamedTuple):
  """L-BFGS's state of one slot; arrays of changes unless a shape is given."""

  point: Array  # x, the change of the last step
  grad: Array  # at x
  direction: Array  # p
  loss: Array  # [] at x
  scale: Array  # [] t
  fresh: Array  # [] bool, `loss` and `grad` are not of the present function
  moves: Array  # [pairs, ...], latest last
  turns: Array  # [pairs, ...] change of the gradient along each move
  weights: Array  # [pairs] 1 / (move . turn); 0 for none


def _lbfgs_init(delta: Array) -> Lbfgs:
  """The state before any evaluation."""
  zero = jnp.zeros([], delta.dtype)
  pairs = jnp.zeros([_PAIRS, *delta.shape], delta.dtype)
  return Lbfgs(
      point=delta,
      grad=delta,
      direction=delta,
      loss=zero,
      scale=zero,
      fresh=jnp.bool_(True),
      moves=pairs,
      turns=pairs,
      weights=jnp.zeros([_PAIRS], delta.dtype),
  )


def _lbfgs(state: Lbfgs, now: Evaluated, config: TargetConfig) -> Advice:
  """Projected L-BFGS with backtracking."""
  radius = config.clamp * now.size
  move = now.delta - state.point
  along = _tangent(state.point, state.grad, radius)
  slope = jnp.minimum(jnp.sum(along(state.grad) * move), 0)
  accepted = state.fresh | (now.loss <= state.loss + _ENOUGH * slope)
  stepped = _remember(state, now, move, radius)
  stepped = stepped._replace(
      direction=_direction(stepped, now, radius, config.first_step)
  )
  # Where the function changes, the same change is evaluated once more.
  stepped = stepped._replace(
      scale=jnp.where(now.renewed, 0, stepped.scale), fresh=now.renewed
  )
  state = jax.tree.map(
      lambda new, old: jnp.where(accepted, new, old),
      stepped,
      state._replace(scale=_SHRINK * state.scale),
  )
  delta = project(state.point + state.scale * state.direction, radius)
  return Advice(state, delta, state.point, accepted)


def _tangent(
    point: Array, grad: Array, radius: Array
) -> Callable[[Array], Array]:
  """Projects on the sphere's tangent, in halves where the ball holds `point`.

  It does where the point is on the sphere and the gradient points inwards.
  """
  outwards = jnp.sum(point * grad, axis=-1) < 0
  bound = outwards & (norm(point) >= _SPHERE * radius)
  normal = point / jnp.maximum(norm(point), 1e-30)[..., None]

  def along(x: Array) -> Array:
    part = jnp.sum(x * normal, axis=-1, keepdims=True) * normal
    return x - jnp.where(bound[..., None], part, 0)

  return along


def _remember(
    state: Lbfgs, now: Evaluated, move: Array, radius: Array
) -> Lbfgs:
  """Steps to the change just evaluated; keeps the pair if it is convex."""
  before = _tangent(state.point, state.grad, radius)
  along = _tangent(now.delta, now.grad, radius)
  whole, move = move, along(move)
  turn = along(now.grad - before(state.grad))
  product, size = jnp.sum(move * turn), _size(move)
  kept = ~state.fresh & (product > _CONVEX * size * _size(turn))
  kept &= size > _ALONG * _size(whole)
  weight = 1 / jnp.where(kept, product, 1)
  push = lambda old, new: jnp.where(
      kept, jnp.concatenate([old[1:], new[None]]), old
  )
  return state._replace(
      point=now.delta,
      grad=now.grad,
      loss=now.loss,
      scale=jnp.ones_like(state.scale),
      moves=push(state.moves, move),
      turns=push(state.turns, turn),
      weights=push(state.weights, weight),
  )


def _size(x: Array) -> Array:
  """Euclidean norm over all axes."""
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def _direction(
    state: Lbfgs, now: Evaluated, radius: Array, first: Array | float
) -> Array:
  """p = -H q by the two-loop recursion, along the sphere where it holds x.

  Without pairs, p has length `first` times |z0|.
  """
  along = _tangent(state.point, state.grad, radius)
  q = along(state.grad)
  steepest = first * _size(now.size) / jnp.maximum(_size(q), 1e-30)
  square = jnp.maximum(jnp.sum(jnp.square(state.turns[-1])), 1e-30)
  weight = state.weights[-1]
  curved = 1 / jnp.maximum(weight, 1e-30) / square
  scale = jnp.where(weight > 0, curved, steepest)
  pairs = (state.moves, state.turns, state.weights)

  def back(q: Array, pair: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    move, turn, weight = pair
    share = weight * jnp.sum(move * q)
    return q - share * turn, share

  def forth(p: Array, pair: tuple[Any, Array]) -> tuple[Array, None]:
    (move, turn, weight), share = pair
    return p + (share - weight * jnp.sum(turn * p)) * move, None

  q, shares = jax.lax.scan(back, q, pairs, reverse=True)
  p, _ = jax.lax.scan(forth, scale * q, (pairs, shares))
  return -along(p)


SOLVERS: Mapping[str, Solver] = {
    'adam': Solver(_ADAM.init, _adam),
    'lbfgs': Solver(_lbfgs_init, _lbfgs),
}
