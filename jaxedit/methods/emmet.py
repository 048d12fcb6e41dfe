"""EMMET: many facts at once, each held exactly (up to a small ridge).

  X = S K^T (K S K^T + mu I)^-1 R,  S = (lambda C)^-1

With one fact and mu = 0 it is ROME with averaged keys.

Source: Gupta et al. 2024, "A Unified Framework for Model Editing" (arXiv
2403.14236), equation 13.
"""

from __future__ import annotations

import dataclasses

from jaxedit.methods.closed_form import (
    ClosedFormConfig,
    Recipe,
    closed_form_method,
)
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import Covariance


@dataclasses.dataclass(frozen=True)
class EmmetConfig(ClosedFormConfig):
  """Settings of EMMET; published for one layer.

  Attributes:
    moment_weight: lambda. It scales K S K^T, so the ridge acts as ridge * lambda
      (published 1 for GPT-J, 1000 for GPT2-XL; EasyEdit 100000).
    ridge: mu.
    single_edit_ridge: mu for a single fact; None for `ridge`.
  """

  layers: tuple[int, ...] = setting(
      (5,), 'layers to edit, ascending', source='GPT-J'
  )
  moment_weight: float = setting(
      1.0,
      'lambda: virtual tokens of text that the second moments count for',
      unit='tokens',
      source='GPT-J, published code',
      low=0,
      exclusive=True,
  )
  ridge: float = setting(
      0.1,
      'ridge of the solve, of one fact alone 0 unless given',
      source='EMMET',
      low=0,
      implies={'single_edit_ridge': None},
  )
  single_edit_ridge: float | None = 0.0

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    return self._recipe(
        'emmet',
        preconditioner=Covariance(self.moment_weight),
        ridge=self.ridge,
        single_edit_ridge=self.single_edit_ridge,
    )


METHOD = closed_form_method(
    'emmet',
    'many facts at once, each met exactly up to a small ridge',
    EmmetConfig,
    parity={'easyedit': {'single_edit_ridge': None}},
    source='arXiv 2403.14236',
    small={'moment_weight': 0.3},
)
