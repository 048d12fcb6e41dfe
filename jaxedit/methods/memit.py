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
from jaxedit.targets import TargetConfig


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


@dataclasses.dataclass(frozen=True)
class MemitFeConfig(MemitConfig):
  """Settings of MEMIT with forward replay, published for Llama-3-8B."""

  layers: tuple[int, ...] = setting(
      (4, 5, 6, 7, 8), 'layers to edit, ascending', source='Llama-3-8B'
  )
  target: TargetConfig = TargetConfig(rate=0.1, clamp=4.0)

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    return dataclasses.replace(
        super().recipe(), name='memit_fe', targets_at='first', layer_share=1.0
    )


@dataclasses.dataclass(frozen=True)
class MemitBlueConfig(MemitConfig):
  """Settings of MEMIT at its boundary layers, published for Llama-3-8B."""

  layers: tuple[int, ...] = setting(
      (4, 8), 'layers to edit, ascending', source='Llama-3-8B'
  )
  target: TargetConfig = TargetConfig(rate=0.1)

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    return dataclasses.replace(
        super().recipe(), name='memit_blue', targets_at='each', layer_share=1.0
    )


METHODS = (
    closed_form_method(
        'memit',
        'many facts at once, spread over a few layers',
        MemitConfig,
        parity={'anyedit': SHADOWED},
        source='arXiv 2210.07229',
        small={'moment_weight': 0.1},
    ),
    closed_form_method(
        'memit_fe',
        'MEMIT with targets of the first layer replayed to the others',
        MemitFeConfig,
        accepts=frozenset({'fact'}),
        chunkable=False,
        source='arXiv 2605.00358',
        small={'moment_weight': 0.1},
    ),
    closed_form_method(
        'memit_blue',
        'MEMIT at the first and the last layer, each with its own targets',
        MemitBlueConfig,
        accepts=frozenset({'fact'}),
        chunkable=False,
        source='arXiv 2502.03748',
        small={'moment_weight': 0.1},
    ),
)
