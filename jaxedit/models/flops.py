"""Weights and FLOPs of a model, counted by hand.

A product of n tokens with a map of W weights is 2 n W FLOPs. Biases, norms,
softmax and other pointwise work are counted nowhere.
"""

from __future__ import annotations

import math

from jaxedit.models.spec import ModelSpec, param_shapes


def layer_weights(spec: ModelSpec, part: str = '') -> int:
  """Weights of the maps of a layer (W), or of its part 'attn' or 'mlp'.

  The mean over the layers of an encoder-decoder.
  """
  whole = sum(
      math.prod(shape)
      for path, shape in param_shapes(spec).items()
      if path.startswith(f'layers/{part}') and path.endswith('/kernel')
  )
  return whole // spec.layers


def head_weights(spec: ModelSpec) -> int:
  """Weights of the head, tied or not."""
  return spec.width * spec.vocab


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
