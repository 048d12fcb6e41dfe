"""PMET: MEMIT with states of attention and MLP optimised apart.

Changes of both outputs at the anchor are optimised together; only the MLP's is
written, its residual measured at the MLP of the last layer and spread by the
square root of the layers left:

  X_l = (lambda C_l + K^T K)^-1 K^T R / sqrt(layers left)

In parallel blocks (GPT-J, NeoX) both outputs are summed, so the MLP's change
carries about half of what the loss asked for; the other half is let go of, as
published.

Source: Li et al. 2024, "PMET: Precise Model Editing in a Transformer" (arXiv
2308.08742).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.solve.preconditioner import covariance
from jaxedit.targets import TargetConfig


def root(remaining: int) -> float:
  """Spread by the square root of the layers left."""
  return 1 / math.sqrt(remaining)


def pmet(
    layers: Sequence[int] = (3, 4, 5, 6, 7, 8),
    *,
    moment_weight: float = 6000.0,
    value: TargetConfig | None = None,
) -> Recipe:
  """The PMET row.

  Args:
    layers: layers to edit, ascending.
    moment_weight: lambda on the average second moment, tokens.
    value: settings of the value optimisation; None for those of GPT-J.

  Returns:
    The recipe, for `closed_form`.
  """
  return Recipe(
      name='pmet',
      layers=tuple(layers),
      preconditioner=lambda gram: covariance(gram, moment_weight),
      value=value or TargetConfig(steps=30, rate=0.2, kl=1.0, argmax_stop=0.01),
      output='attn+mlp',
      layer_share=root,
  )
