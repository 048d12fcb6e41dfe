"""Counts the arithmetic of every stage by hand, for `benchmark`.

A product of n tokens with a map of W weights is 2 n W FLOPs; its gradient with
respect to the tokens is as much again, and weights here have no gradient. So a
step of value optimisation costs

  4 (suffix tokens * U * W + scored positions * weights of the head)

and that, over all edits and steps, is the floor: no padding, no KL row, no
attention, nothing that runs once. The last step of an edit only needs its loss;
the strict floor takes its backward pass off.

Axis letters as in `jaxedit.types`; W weights a layer. Biases, norms, softmax
and other pointwise work are counted nowhere. Nothing here measures.

Source of the published loop: Meng et al. 2022b (MEMIT, arXiv
2210.07229), algorithm 1 and appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.text.batching import EncodedEdit


class Lengths(NamedTuple):
  """What edits measure; each an [E] int64 array, contexts summed.

  Attributes:
    tokens: tokens of the rows, targets but their last token included.
    left: tokens left of the anchors.
    suffix: tokens from the anchors on.
    scored: labels.
    pairs: a suffix token and a token that it attends to.
    kl: tokens of the KL row.
    reach: tokens up to the anchors, the anchors included.
    bare: those of the bare prompt alone.
    anchors: anchors, one a context.
  """

  tokens: np.ndarray
  left: np.ndarray
  suffix: np.ndarray
  scored: np.ndarray
  pairs: np.ndarray
  kl: np.ndarray
  reach: np.ndarray
  bare: np.ndarray
  anchors: np.ndarray


def lengths(edits: Sequence[EncodedEdit]) -> Lengths:
  """Measures edits.

  Args:
    edits: E edits.

  Returns:
    Their lengths, in order.
  """
  found = []
  for edit in edits:
    sizes = [len(row) + len(edit.target) - 1 for row in edit.rows]
    anchors = edit.anchors
    found.append(
        Lengths(
            tokens=sum(sizes),
            left=sum(anchors),
            suffix=sum(sizes) - sum(anchors),
            scored=len(edit.rows) * len(edit.target),
            pairs=sum(_pairs(n) - _pairs(a) for n, a in zip(sizes, anchors)),
            kl=len(edit.kl),
            reach=sum(anchors) + len(anchors),
            bare=anchors[0] + 1,
            anchors=len(anchors),
        )
    )
  return Lengths(
      *np.asarray(found, np.int64).reshape(-1, len(Lengths._fields)).T
  )


def own(sizes: Lengths, trunk: Sequence[int]) -> Lengths:
  """Takes off what all edits share at the head of their rows, but for one.

  Args:
    sizes: of E edits.
    trunk: C lengths, tokens that a context shares over all edits.

  Returns:
    Lengths whose sums over the edits count shared tokens once.
  """
  spare = np.arange(len(sizes.tokens)) > 0
  cut = lambda x, count: x - spare * count
  whole = sum(trunk)
  return sizes._replace(
      tokens=cut(sizes.tokens, whole),
      left=cut(sizes.left, whole),
      reach=cut(sizes.reach, whole),
      bare=cut(sizes.bare, trunk[0]),
  )


def _pairs(tokens: int) -> int:
  """Query and key pairs of a causal row."""
  return tokens * (tokens + 1) // 2


def layer_weights(spec: ModelSpec, part: str = '') -> int:
  """Weights of the maps of a layer (W), or of its part 'attn' or 'mlp'."""
  return sum(
      math.prod(shape[1:])
      for path, shape in param_shapes(spec).items()
      if path.startswith(f'layers/{part}') and path.endswith('/kernel')
  )


def head_weights(spec: ModelSpec) -> int:
  """Weights of the head, tied or not."""
  return spec.width * spec.vocab


def above(spec: ModelSpec, layer: int) -> int:
  """Layers above `layer` (U)."""
  return spec.layers - 1 - layer


def attention_flops(spec: ModelSpec, pairs: float, layers: int) -> float:
  """FLOPs of scores and weighted sums.

  Args:
    spec: the architecture.
    pairs: pairs of a query and a key column.
    layers: layers run.

  Returns:
    4 N H FLOPs a pair and layer, forward alone; backward is twice that.
  """
  return 4.0 * spec.heads * spec.head_size * pairs * layers


def value_flops(
    spec: ModelSpec, layer: int, tokens: float, scored: float
) -> float:
  """FLOPs of value optimisation, forward and backward; see the module.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    tokens: suffix tokens times steps.
    scored: scored positions times steps.
  """
  upper = tokens * above(spec, layer) * layer_weights(spec)
  return 4.0 * (upper + scored * head_weights(spec))


def value_bytes(
    spec: ModelSpec, layer: int, steps: float, itemsize: int
) -> float:
  """Bytes of weights that `steps` steps read, forward and backward.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    steps: steps run, of whatever number of edits at once.
    itemsize: bytes a weight.
  """
  upper = above(spec, layer) * layer_weights(spec)
  return 2.0 * steps * (upper + head_weights(spec)) * itemsize


def prepare_flops(spec: ModelSpec, layer: int, sizes: Lengths) -> float:
  """FLOPs of all that stays constant while values are optimised.

  All tokens go through the layers up to `layer`, those left of their anchor
  through the rest too, as far as the keys and values of the last layer; the KL
  row is one more row whose anchor is its end.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    sizes: of the edits, see `own`.
  """
  tokens = float(sizes.tokens.sum() + sizes.kl.sum())
  left = float(sizes.left.sum() + np.maximum(sizes.kl - 1, 0).sum())
  below = tokens * (layer + 1) * layer_weights(spec)
  upper = above(spec, layer)
  if not upper:
    return 2.0 * below
  read = 2 * spec.width * spec.kv_heads * spec.head_size
  return 2.0 * (below + left * ((upper - 1) * layer_weights(spec) + read))


def insert_flops(
    spec: ModelSpec, layers: Sequence[int], sizes: Lengths
) -> float:
  """FLOPs of one pass up through the edited layers, without the solves.

  Columns up to the anchors climb once, as far as the attention of the last
  edited layer and, at the anchors, its key. Before each write the bare prompts
  are run on from where they are, to see what is left; of the last layer's MLP
  only the anchor's column is needed.

  Args:
    spec: the architecture.
    layers: edited layers, ascending.
    sizes: of the edits, see `own`.
  """
  last, weights = layers[-1], layer_weights(spec)
  mlp, down = layer_weights(spec, 'mlp'), spec.mlp_width * spec.width
  edits, anchors = len(sizes.bare), float(sizes.anchors.sum())
  climbs = float(sizes.reach.sum()) * ((last + 1) * weights - mlp)
  looks = float(sizes.bare.sum()) * weights * sum(last - n for n in layers)
  return 2.0 * (
      climbs + anchors * (mlp - down) + looks + len(layers) * edits * mlp
  )


def solve_flops(spec: ModelSpec, layers: int, edits: int) -> float:
  """FLOPs of the M x M closed forms, on factored metrics.

  Two triangular solves with M right-hand sides of F, their products with the
  keys, a Cholesky factor and two solves for the residuals.

  Args:
    spec: the architecture; the edited map is [F, D].
    layers: edited layers.
    edits: M, key rows.
  """
  f, d, m = float(spec.mlp_width), float(spec.width), float(edits)
  one = 2 * f * f * m + 2 * f * m * m + m**3 / 3 + 2 * m * m * d
  return layers * one


def factor_flops(spec: ModelSpec, layers: int) -> float:
  """FLOPs of the Cholesky factors of F x F metrics, once a model."""
  return layers * float(spec.mlp_width) ** 3 / 3


def moment_flops(
    spec: ModelSpec, layers: Sequence[int], tokens: int
) -> tuple[float, float]:
  """FLOPs of second moments.

  Args:
    spec: the architecture.
    layers: layers collected, ascending.
    tokens: tokens of text.

  Returns:
    (the model's part, up to the key of the last layer; one triangle of the
    Gram matrices, which are products in f32 whatever the weights are).
  """
  down = spec.mlp_width * spec.width
  weights = (layers[-1] + 1) * layer_weights(spec) - down
  triangle = spec.mlp_width * (spec.mlp_width + 1)
  return 2.0 * tokens * weights, float(len(layers) * tokens * triangle)


def score_flops(spec: ModelSpec, tokens: int, scored: int) -> float:
  """FLOPs of scoring: a forward pass, the head at scored positions alone."""
  weights = spec.layers * layer_weights(spec)
  return 2.0 * (tokens * weights + scored * head_weights(spec))


def model_bytes(
    spec: ModelSpec, layers: int, itemsize: int, head: bool = False
) -> float:
  """Bytes of the weights of some layers, and of the head, read once."""
  weights = layers * layer_weights(spec) + head * head_weights(spec)
  return float(weights * itemsize)


def ours_flops(
    spec: ModelSpec, layer: int, sizes: Lengths, steps: np.ndarray
) -> float:
  """FLOPs that value optimisation needs, KL row and attention included.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    sizes: of E edits.
    steps: [E] losses evaluated.

  Returns:
    FLOPs of all steps, and of what is prepared once.
  """
  kl = (sizes.kl > 0).astype(np.int64)  # one token of suffix, one scored
  every = lambda count: float((count * steps).sum())
  flops = value_flops(
      spec, layer, every(sizes.suffix + kl), every(sizes.scored + kl)
  )
  pairs = every(sizes.pairs + sizes.kl)
  flops += 3 * attention_flops(spec, pairs, above(spec, layer))
  return flops + prepare_flops(spec, layer, sizes)


def loop_flops(
    spec: ModelSpec, layer: int, rows: int, width: int, steps: int
) -> float:
  """FLOPs of the published loop for one edit.

  Every step runs all layers and the head forward over a padded [rows, width]
  batch, and every step but the last goes back through the head and the layers
  above the edited one.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    rows: contexts and the KL row.
    width: tokens of the longest.
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
    spec: ModelSpec, layers: int, tokens: int, edits: int
) -> tuple[float, float]:
  """FLOPs of the published insertion, attention left out.

  Args:
    spec: the architecture.
    layers: edited layers.
    tokens: padded tokens that all its full forwards run, over all layers.
    edits: M, edits solved for together.

  Returns:
    (forwards in the weights' dtype; dense F x F solves and products in f64).
  """
  f, d, m = float(spec.mlp_width), float(spec.width), float(edits)
  weights = spec.layers * layer_weights(spec) + head_weights(spec)
  dense = 2 * f**3 / 3 + 4 * f * f * m + 2 * f * m * d
  return 2.0 * tokens * weights, layers * dense
