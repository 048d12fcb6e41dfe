"""Counts the arithmetic of the published loops by hand, for `benchmark`.

What our own stages take is counted in `jaxedit.planning.costs`, by the same
rules.

Source of the published loops: Meng et al. 2022b (MEMIT, arXiv 2210.07229),
algorithm 1 and appendix B; for chunks Jiang et al. 2025 (AnyEdit, arXiv
2502.05628) and its code.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxedit.models.flops import attention_flops, head_weights, layer_weights
from jaxedit.models.spec import ModelSpec
from jaxedit.planning.costs import above
from jaxedit.planning.lengths import System


def loop_flops(
    spec: ModelSpec, layer: int, rows: int, width: int, steps: int
) -> float:
  """FLOPs of the published loop for one state.

  Every step runs all layers and the head forward over a padded [rows, width]
  batch, and every step but the last goes back through the head and the layers
  above the edited one.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    rows: contexts and the KL row.
    width: tokens of the longest, up to the last input that a label needs.
    steps: losses evaluated.
  """
  tokens, pairs = float(rows * width), float(rows * width * width)
  upper, back = above(spec, layer), max(steps - 1, 0)
  passes = steps * spec.layers + back * upper
  products = 2 * tokens * passes * layer_weights(spec)
  products += 2 * tokens * (steps + back) * head_weights(spec)
  return (
      products
      + attention_flops(spec, pairs, spec.layers * steps)
      + 2 * attention_flops(spec, pairs, upper * back)
  )


def loop_insert_flops(
    spec: ModelSpec, layers: int, tokens: int, solved: Sequence[System]
) -> tuple[float, float]:
  """FLOPs of the published insertion, attention left out.

  Args:
    spec: the architecture.
    layers: edited layers.
    tokens: padded tokens that all its full forwards run, over all layers.
    solved: the systems of a layer.

  Returns:
    (forwards in the weights' dtype; dense F x F solves and products in f64).
  """
  f, d, dense = float(spec.mlp_width), float(spec.width), 0.0
  for m, p in solved:
    dense += 2 * f**3 / 3 + 2 * f * f * (2 * m + p) + 2 * f * m * d
  weights = spec.layers * layer_weights(spec) + head_weights(spec)
  return 2.0 * tokens * weights, layers * dense
