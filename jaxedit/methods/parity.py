"""Published behaviour that differs from what its authors meant.

Needed only to reproduce numbers that depend on it.
"""

from __future__ import annotations

import dataclasses
from typing import Self

from jaxedit.methods.closed_form import ClosedFormConfig, Recipe
from jaxedit.solve.preconditioner import NullSpace
from jaxedit.types import InputError


def shadowed(recipe: Recipe, edits: int | None) -> Recipe:
  """Gives a recipe the layer schedule of AnyEdit's baselines without chunks.

  Their loop over the edits of a batch overwrites the index of the layer, so that
  every layer gets the share 1 / (n - (edits - 1)) of what is left, and AlphaEdit
  takes the null space of layer number `edits - 1` for all of them. With one edit
  and five layers a third of the residual is never written.

  Args:
    recipe: MEMIT or AlphaEdit, without chunks.
    edits: edits a batch; None leaves the recipe as it is.

  Returns:
    The recipe.

  Raises:
    InputError: the divisor would be 0 or negative, where the published code
      fails or writes backwards.

  Source: the code of Jiang et al. 2025 (AnyEdit, arXiv 2502.05628).
  """
  if edits is None:
    return recipe
  left = len(recipe.layers) - (edits - 1)
  if left < 1:
    raise InputError(
        f'parity with AnyEdit: {edits} edits a batch in {len(recipe.layers)}'
        ' layers make its layer schedule divide by zero or less; take at most'
        f' {len(recipe.layers)} a batch'
    )
  shared = recipe.shared_preconditioner
  if isinstance(recipe.preconditioner, NullSpace):
    shared = edits - 1
  return dataclasses.replace(
      recipe,
      name=f'{recipe.name} (shadowed)',
      layer_share=1 / left,
      shared_preconditioner=shared,
  )


# Settings of the bundle that asks for it.
SHADOWED = {'shadowed_schedule': True}


@dataclasses.dataclass(frozen=True)
class ShadowedConfig(ClosedFormConfig):
  """Settings of a closed form that AnyEdit's code has as a baseline.

  Attributes:
    shadowed_schedule: whether `shadowed` holds for targets without chunks.
    schedule_edits: edits a batch, then; None where it does not hold.
  """

  shadowed_schedule: bool = False
  schedule_edits: int | None = None

  @property
  def even_batches(self) -> bool:
    """The schedule depends on the edits a batch."""
    return self.schedule_edits is not None

  def for_batches(self, edits: int) -> Self:
    """See `MethodConfig.for_batches`."""
    if not self.shadowed_schedule or self.chunks is not None:
      return self
    return dataclasses.replace(self, schedule_edits=edits)

  def shadowed(self, recipe: Recipe) -> Recipe:
    """A recipe as `shadowed` makes it, where that was asked for."""
    return shadowed(recipe, self.schedule_edits)
