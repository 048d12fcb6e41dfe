"""MEMIT: many facts at once, spread over a few MLP layers.

  X_l = (lambda C_l + K^T K)^-1 K^T R / (layers left)

The defaults are the published settings for GPT-J; flagfiles hold the others.

Source: Meng et al. 2022b, "Mass-Editing Memory in a Transformer" (arXiv
2210.07229).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.solve.preconditioner import covariance
from jaxedit.targets import TargetConfig


def memit(
    layers: Sequence[int] = (3, 4, 5, 6, 7, 8),
    *,
    moment_weight: float = 15000.0,
    value: TargetConfig | None = None,
) -> Recipe:
  """The MEMIT row.

  Args:
    layers: layers to edit, ascending.
    moment_weight: lambda on the average second moment, tokens.
    value: settings of the value optimisation; None for those of GPT-J.

  Returns:
    The recipe, for `closed_form`.
  """
  return Recipe(
      name='memit',
      layers=tuple(layers),
      preconditioner=lambda gram: covariance(gram, moment_weight),
      value=value or TargetConfig(),
  )
