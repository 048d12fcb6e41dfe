"""MEMIT: many facts at once, spread over a few MLP layers.

  X_l = (lambda C_l + K^T K)^-1 K^T R / (layers left)

The defaults are the published settings for GPT-J; flagfiles hold the others.

Source: Meng et al. 2022b, "Mass-Editing Memory in a Transformer" (arXiv
2210.07229).
"""

from __future__ import annotations

import dataclasses

from jaxedit.methods.closed_form import (
    ClosedFormConfig,
    Recipe,
    closed_form_method,
)
from jaxedit.methods.parity import shadowed
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import Covariance


@dataclasses.dataclass(frozen=True)
class MemitConfig(ClosedFormConfig):
  """Settings of MEMIT; the defaults are those published for GPT-J.

  Attributes:
    moment_weight: lambda on the average second moment, tokens.
    schedule_edits: edits a batch, to reproduce `parity.shadowed`; None not to.
  """

  moment_weight: float = setting(
      15000.0,
      'lambda: virtual tokens of text that the second moments count for',
      unit='tokens',
      source='GPT-J, MEMIT appendix B',
      low=0,
      exclusive=True,
  )

  schedule_edits: int | None = None

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    weight = Covariance(self.moment_weight)
    recipe = self._recipe('memit', preconditioner=weight)
    return shadowed(recipe, self.schedule_edits)


METHOD = closed_form_method(
    'memit',
    'many facts at once, spread over a few layers',
    MemitConfig,
    source='arXiv 2210.07229',
)
