"""EMMET: many facts at once, each held exactly (up to a small ridge).

  X = S K^T (K S K^T + mu I)^-1 R,  S = (lambda C)^-1

With one fact and mu = 0 it is ROME with averaged keys.

Source: Gupta et al. 2024, "A Unified Framework for Model Editing" (arXiv
2403.14236), equation 13.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.solve.preconditioner import covariance
from jaxedit.targets import TargetConfig


def emmet(
    layers: Sequence[int] = (5,),
    *,
    moment_weight: float = 1.0,
    ridge: float = 0.1,
    single_edit_ridge: float | None = 0.0,
    value: TargetConfig | None = None,
) -> Recipe:
  """The EMMET row.

  Args:
    layers: layers to edit, ascending; published one.
    moment_weight: lambda. It scales K S K^T, so the ridge acts as ridge * lambda
      (published 1 for GPT-J, 1000 for GPT2-XL; EasyEdit 100000).
    ridge: mu.
    single_edit_ridge: mu for a single fact; published 0, None for `ridge` (EasyEdit).
    value: settings of the value optimisation; None for those of GPT-J.

  Returns:
    The recipe, for `closed_form`.
  """
  return Recipe(
      name='emmet',
      layers=tuple(layers),
      preconditioner=lambda gram: covariance(gram, moment_weight),
      value=value or TargetConfig(),
      ridge=ridge,
      single_edit_ridge=single_edit_ridge,
  )
