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

import dataclasses

from jaxedit.methods.closed_form import (
    ClosedFormConfig,
    Recipe,
    closed_form_method,
)
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import Covariance
from jaxedit.targets import TargetConfig


@dataclasses.dataclass(frozen=True)
class PmetConfig(ClosedFormConfig):
  """Settings of PMET; the defaults are those published for GPT-J.

  Attributes:
    moment_weight: lambda on the average second moment, tokens.
  """

  target: TargetConfig = TargetConfig(
      steps=30, rate=0.2, kl=1.0, argmax_stop=0.01
  )
  moment_weight: float = setting(
      6000.0,
      'lambda: virtual tokens of text that the second moments count for',
      unit='tokens',
      source='GPT-J, published code',
      low=0,
      exclusive=True,
  )

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    return self._recipe(
        'pmet',
        preconditioner=Covariance(self.moment_weight),
        output='attn+mlp',
        layer_share='root',
    )


METHOD = closed_form_method(
    'pmet',
    'MEMIT with the states of attention and MLP optimised together',
    PmetConfig,
    source='arXiv 2308.08742',
    small={'moment_weight': 0.3},
)
