"""MEMIT: many facts at once, spread over a few MLP layers.

  X_l = (lambda C_l + K^T K)^-1 K^T R / (layers left)

The defaults are the published settings for GPT-J; flagfiles hold the others.

Source: Meng et al. 2022b, "Mass-Editing Memory in a Transformer" (arXiv
2210.07229).
"""

from __future__ import annotations

import dataclasses

from jaxedit.methods.closed_form import Recipe, closed_form_method
from jaxedit.methods.parity import SHADOWED, ShadowedConfig
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import Covariance


@dataclasses.dataclass(frozen=True)
class MemitConfig(ShadowedConfig):
  """Settings of MEMIT; the defaults are those published for GPT-J.

  Attributes:
    moment_weight: lambda on the average second moment, tokens.
  """

  moment_weight: float = setting(
      15000.0,
      'lambda: virtual tokens of text that the second moments count for',
      unit='tokens',
      source='GPT-J, MEMIT appendix B',
      low=0,
      exclusive=True,
  )

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    weight = Covariance(self.moment_weight)
    recipe = self._recipe('memit', preconditioner=weight)
    return self.shadowed(recipe)


METHOD = closed_form_method(
    'memit',
    'many facts at once, spread over a few layers',
    MemitConfig,
    parity={'anyedit': SHADOWED},
    source='arXiv 2210.07229',
    small={'moment_weight': 0.1},
)
