"""AlphaEdit: changes that leave the keys of common text where they are.

  X = P K_all^T (r I + K_all P K_all^T)^-1 [R; 0] / (layers left)

P projects onto the null space of the second moments: what is left of key space
without the directions that hold most of it. K_all has the keys of this batch and
of the batches before, whose outputs are held; those are explicit state, and
independent edits never see them.

Source: Fang et al. 2025, "AlphaEdit: Null-Space Constrained Knowledge Editing
for Language Models" (arXiv 2410.02355), equation 14. Published code takes the
eigenvectors below an absolute eigenvalue, whose meaning changes with the scale
of a model's activations; here the null space leaves out a share of the trace
unless `threshold` is given.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxedit.methods.closed_form import Recipe, closed_form_method
from jaxedit.methods.parity import SHADOWED, ShadowedConfig
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import NullSpace
from jaxedit.targets import TargetConfig
from jaxedit.types import InputError

THRESHOLD = 2e-2  # published, absolute


@dataclasses.dataclass(frozen=True)
class AlphaEditConfig(ShadowedConfig):
  """Settings of AlphaEdit; the defaults are those published for Llama-3-8B.

  Attributes:
    null_space_share: of the trace of the second moments, held by the directions
      that may not be changed.
    null_space_threshold: eigenvalue below which a direction may be changed,
      instead (published 0.02).
    ridge: r (L2).
    preserve_previous: preserve the keys of earlier batches.
  """

  layers: tuple[int, ...] = setting(
      (4, 5, 6, 7, 8), 'layers to edit, ascending', source='Llama-3-8B'
  )
  target: TargetConfig = TargetConfig(rate=0.1)
  null_space_share: float = setting(
      0.9,
      'share of the second moments held by directions that may not be changed,'
      ' below 1',
      low=0,
      implies={'null_space_threshold': None},
      excludes=('null_space_threshold',),
  )
  null_space_threshold: float | None = setting(
      None,
      'eigenvalue below which a direction may be changed, instead of a share'
      ' (published 0.02)',
      low=0,
      exclusive=True,
  )
  ridge: float = setting(
      10.0, 'ridge of the solve (L2)', source='AlphaEdit', low=0, exclusive=True
  )
  preserve_previous: bool = setting(
      True, 'preserve the keys of earlier batches', flag='remember'
  )

  @property
  def preserves_edits(self) -> bool:
    """See `MethodConfig.preserves_edits`."""
    return self.preserve_previous

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    if self.null_space_share >= 1 and self.null_space_threshold is None:
      raise InputError(
          f'null_space_share={self.null_space_share:g} leaves no direction that'
          ' may be changed; give a share below 1'
      )
    recipe = self._recipe(
        'alphaedit',
        preconditioner=NullSpace(
            self.null_space_share, self.null_space_threshold
        ),
        ridge=self.ridge,
        preserve_previous=self.preserve_previous,
    )
    return self.shadowed(recipe)

  def described(self) -> dict[str, Any]:
    """All that numbers depend on, as plain JSON types."""
    found = super().described()
    if self.null_space_threshold is not None:
      del found['null_space_share']  # has no effect
    return found

  def for_texts(self, chunked: bool) -> AlphaEditConfig:
    """AnyEdit's settings; without chunks its targets never stop early."""
    config = super().for_texts(chunked)
    if chunked:
      return config
    target = config.target._replace(threshold=0.0)
    return dataclasses.replace(config, target=target)


@dataclasses.dataclass(frozen=True)
class AlphaEditFeConfig(AlphaEditConfig):
  """Settings of AlphaEdit with forward replay."""

  target: TargetConfig = TargetConfig(rate=0.1, clamp=4.0)

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    return dataclasses.replace(
        super().recipe(),
        name='alphaedit_fe',
        targets_at='first',
        layer_share=1.0,
    )


@dataclasses.dataclass(frozen=True)
class AlphaEditBlueConfig(AlphaEditConfig):
  """Settings of AlphaEdit at its boundary layers."""

  layers: tuple[int, ...] = setting(
      (4, 8), 'layers to edit, ascending', source='Llama-3-8B'
  )

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    return dataclasses.replace(
        super().recipe(),
        name='alphaedit_blue',
        targets_at='each',
        layer_share=1.0,
    )


_ALPHAEDIT = closed_form_method(
    'alphaedit',
    'changes in the null space of common keys only',
    AlphaEditConfig,
    parity={
        'memit': {'null_space_threshold': THRESHOLD},
        'easyedit': {'null_space_threshold': THRESHOLD},
        'anyedit': {
            'null_space_threshold': THRESHOLD,
            'preserve_previous': False,
            **SHADOWED,
        },
    },
    source='arXiv 2410.02355',
)

METHODS = (
    _ALPHAEDIT,
    closed_form_method(
        'alphaedit_fe',
        'AlphaEdit with targets of the first layer replayed to the others',
        AlphaEditFeConfig,
        accepts=frozenset({'fact'}),
        chunkable=False,
        source='arXiv 2605.00358',
    ),
    closed_form_method(
        'alphaedit_blue',
        'AlphaEdit at the first and the last layer, each with its own targets',
        AlphaEditBlueConfig,
        accepts=frozenset({'fact'}),
        chunkable=False,
        source='arXiv 2502.03748',
    ),
)
