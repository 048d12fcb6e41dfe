"""L-BFGS on the balls of a change's halves, in plain numpy: lists and loops.

Written apart from `targets.solvers` and used by tests only.

Source: Liu and Nocedal 1989 (L-BFGS); Nocedal and Wright, Numerical
Optimization, algorithm 7.4.
"""

from __future__ import annotations

import numpy as np

PAIRS = 8


class Lbfgs:
  """One optimisation; changes are [half, D].

  Attributes:
    point: the change of the last step.
    loss: there.
    rejected: trials that were no steps.
  """

  def __init__(self, sizes: np.ndarray, clamp: float, first_step: float):
    """Starts at no change.

    Args:
      sizes: [half], |z0|.
      clamp: largest |d| / |z0|.
      first_step: length of the first trial / |z0|.
    """
    self.sizes, self.radius = np.asarray(sizes), clamp * np.asarray(sizes)
    self.first_step = first_step
    self.point, self.loss, self.rejected = None, None, 0
    self.gradient, self.p, self.t, self.pairs = None, None, 1.0, []
    self.again = False

  def project(self, x: np.ndarray) -> np.ndarray:
    out = x.copy()
    for h, radius in enumerate(self.radius):
      size = np.sqrt(x[h] @ x[h])
      if size > radius:
        out[h] = x[h] * (radius / size)
    return out

  def bound(self, x: np.ndarray, gradient: np.ndarray) -> list[bool]:
    """The halves that their ball keeps from going where the loss falls."""
    return [
      bool(np.linalg.norm(x[h]) >= (1 - 1e-5) * radius and x[h] @ gradient[h] < 0)
      for h, radius in enumerate(self.radius)
    ]  # fmt: skip

  def along(
      self, x: np.ndarray, gradient: np.ndarray, vector: np.ndarray
  ) -> np.ndarray:
    """Takes the radial part off a vector, in halves that are bound."""
    out = vector.copy()
    for h, bound in enumerate(self.bound(x, gradient)):
      if bound and x[h] @ x[h] > 0:
        out[h] -= (vector[h] @ x[h]) / (x[h] @ x[h]) * x[h]
    return out

  def tell(
      self, x: np.ndarray, loss: float, gradient: np.ndarray, renewed=False
  ) -> tuple[np.ndarray, bool]:
    """Returns (the change to evaluate next, whether `x` is a step)."""
    if self.point is None or self.again:
      accepted = True
    else:
      here = self.along(self.point, self.gradient, self.gradient)
      promised = min(np.sum(here * (x - self.point)), 0.0)
      accepted = loss <= self.loss + 1e-4 * promised
    if not accepted:
      self.rejected += 1
      self.t *= 0.35
      return self.project(self.point + self.t * self.p), False
    if self.point is not None and not self.again:
      before = self.along(self.point, self.gradient, self.gradient)
      s = self.along(x, gradient, x - self.point)
      y = self.along(x, gradient, gradient - before)
      convex = np.sum(s * y) > 1e-4 * np.linalg.norm(s) * np.linalg.norm(y)
      radial = np.linalg.norm(s) <= 1e-3 * np.linalg.norm(x - self.point)
      if convex and not radial:
        self.pairs = [*self.pairs, (s, y)][-PAIRS:]
    self.point, self.loss, self.gradient = x, loss, gradient
    self.p, self.again = self._direction(), renewed
    self.t = 0.0 if renewed else 1.0
    return self.project(self.point + self.t * self.p), True

  def _direction(self) -> np.ndarray:
    q = self.along(self.point, self.gradient, self.gradient)
    if not self.pairs:
      length = self.first_step * np.linalg.norm(self.sizes)
      return -q * length / max(np.linalg.norm(q), 1e-30)
    alphas = []
    for s, y in self.pairs[::-1]:
      alphas.append(np.sum(s * q) / np.sum(s * y))
      q = q - alphas[-1] * y
    s, y = self.pairs[-1]
    r = np.sum(s * y) / np.sum(y * y) * q
    for (s, y), alpha in zip(self.pairs, alphas[::-1]):
      beta = np.sum(y * r) / np.sum(s * y)
      r = r + s * (alpha - beta)
    return -self.along(self.point, self.gradient, r)


class Stagnation:
  """Says when a loss stands still; see `TargetConfig.stagnation`."""

  def __init__(self, share: float, steps: int):
    self.share, self.steps, self.mark, self.idle = share, steps, np.inf, 0

  def tell(self, loss: float) -> bool:
    self.idle += 1
    if loss < (1 - self.share) * self.mark:
      self.mark, self.idle = loss, 0
    return self.share > 0 and self.idle >= self.steps
