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

from collections.abc import Sequence

from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.solve.preconditioner import null_space
from jaxedit.targets import TargetConfig

THRESHOLD = 2e-2  # published, absolute


def alphaedit(
    layers: Sequence[int] = (4, 5, 6, 7, 8),
    *,
    share: float = 0.9,
    threshold: float | None = None,
    ridge: float = 10.0,
    preserve_previous: bool = True,
    value: TargetConfig | None = None,
) -> Recipe:
  """The AlphaEdit row.

  Args:
    layers: layers to edit, ascending.
    share: of the trace of the second moments, held by the directions that may
      not be changed.
    threshold: eigenvalue below which a direction may be changed, instead
      (published 0.02).
    ridge: r (L2; published 10).
    preserve_previous: hold the keys of earlier batches.
    value: settings of the value optimisation; None for those of Llama-3-8B.

  Returns:
    The recipe, for `closed_form`.
  """
  return Recipe(
      name='alphaedit',
      layers=tuple(layers),
      preconditioner=lambda gram: null_space(
          gram, share=share, threshold=threshold
      ),
      value=value or TargetConfig(rate=0.1),
      ridge=ridge,
      preserve_previous=preserve_previous,
  )
