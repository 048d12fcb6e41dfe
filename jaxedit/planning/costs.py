"""Counts the arithmetic of every stage of an editing run by hand.

A product of n tokens with a map of W weights is 2 n W FLOPs; its gradient with
respect to the tokens is as much again, and weights here have no gradient. So a
step of target optimisation costs

  4 (suffix tokens * U * W + scored positions * weights of the head)

and that, over all states and steps, is the floor: no padding, no KL row, no
attention, nothing that runs once. The last step of a state only needs its loss;
the strict floor takes its backward pass off. An edit has one state, or one for
every chunk of its target, whose suffix is the chunk alone.

Axis letters as in `jaxedit.types`; W weights a layer. Biases, norms, softmax
and other pointwise work are counted nowhere. Nothing here measures.

`experiments.benchmark` counts the published loops in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxedit.models.flops import attention_flops, head_weights, layer_weights
from jaxedit.models.spec import ModelSpec
from jaxedit.planning.lengths import Lengths, System, lengths, loads
from jaxedit.text.encoding import EncodedEdit


def above(spec: ModelSpec, layer: int) -> int:
  """Layers above `layer` (U)."""
  return spec.layers - 1 - layer


def target_flops(
    spec: ModelSpec, layer: int, tokens: float, scored: float
) -> float:
  """FLOPs of target optimisation, forward and backward; see the module.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    tokens: suffix tokens times steps.
    scored: scored positions times steps.
  """
  upper = tokens * above(spec, layer) * layer_weights(spec)
  return 4.0 * (upper + scored * head_weights(spec))


def target_bytes(
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


def prefill_flops(spec: ModelSpec, layer: int, sizes: Lengths) -> float:
  """FLOPs of all that stays constant while targets are optimised.

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

  What reaches up climbs once, as far as the attention of the last edited layer
  and, where keys are read, its key. Before each write the bare prompts are run
  on from where they are, to see what is left; of the last layer's MLP only the
  anchors' columns are needed.

  Args:
    spec: the architecture.
    layers: edited layers, ascending.
    sizes: of the edits, see `own`.
  """
  last, weights = layers[-1], layer_weights(spec)
  mlp, down = layer_weights(spec, 'mlp'), spec.mlp_width * spec.width
  states, keys = float(sizes.states.sum()), float(sizes.keys.sum())
  climbs = float(sizes.reach.sum()) * ((last + 1) * weights - mlp)
  looks = float(sizes.plain.sum()) * weights * sum(last - n for n in layers)
  return 2.0 * (
      climbs + keys * (mlp - down) + looks + len(layers) * states * mlp
  )


def solve_flops(
    spec: ModelSpec, layers: int, solved: Sequence[System]
) -> float:
  """FLOPs of the closed forms, on factored preconditioners.

  For M targets and P preserved keys: a triangular solve of F for every row and one
  more for every state, the products of either, their Cholesky factors, held
  rows taken off the states', and two solves for the residuals; with more rows
  than F one system of F x F, see `solve.ridge`.

  Args:
    spec: the architecture; the edited map is [F, D].
    layers: edited layers.
    solved: the systems of a layer.
  """
  f, d, total = float(spec.mlp_width), float(spec.width), 0.0
  for m, p in solved:
    m, p = float(m), float(p)
    if m + p > f:
      total += 3 * (m + p) * f * f + 2 * m * f * d + f**3 / 3 + 3 * f * f * d
      continue
    total += 2 * f * f * m + 2 * f * m * m + m**3 / 3 + 2 * m * m * d
    total += (
        f * f * p + 2 * f * p * p + p**3 / 3 + 4 * f * p * m + 2 * p * p * m
    )
  return layers * total


def factor_flops(spec: ModelSpec, layers: int) -> float:
  """FLOPs of the Cholesky factors of F x F preconditioners, once a model."""
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
    spec: ModelSpec,
    layer: int,
    edits: Sequence[EncodedEdit],
    steps: np.ndarray,
) -> float:
  """FLOPs that target optimisation needs, KL row and attention included.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    edits: E edits with M states.
    steps: [M] losses evaluated.

  Returns:
    FLOPs of all steps, and of what is prepared once.
  """
  sizes = loads(edits)
  kl = (sizes.kl > 0).astype(np.int64)  # one token of suffix, one scored
  every = lambda count: float((count * steps).sum())
  flops = target_flops(
      spec, layer, every(sizes.suffix + kl), every(sizes.scored + kl)
  )
  pairs = every(sizes.pairs + sizes.kl)
  flops += 3 * attention_flops(spec, pairs, above(spec, layer))
  return flops + prefill_flops(spec, layer, lengths(edits))


def gathered_bytes(spec: ModelSpec, layer: int, itemsize: int) -> float:
  """Bytes of weights that a device gathers in a step, where `fsdp` divides them.

  Every layer's weights twice, for the forward and the backward pass, and the
  head's. Bytes of results: a device sends 1 / devices less.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    itemsize: bytes a weight as it is gathered.
  """
  return target_bytes(spec, layer, 1, itemsize)


def assigned_bytes(
    spec: ModelSpec, layer: int, shape: tuple[int, int, int]
) -> float:
  """Bytes that assign an edit to a slot, where devices divide a batch.

  Keys and values of its prefixes in the layers above and the hidden states of
  its suffixes, which any device may have prefilled. Steps exchange nothing: the
  tokens of an edit are on the device of its slot. Bytes of results on a device,
  f32.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    shape: (sequences an edit, prefix tokens, suffix tokens), as padded.
  """
  rows, prefix, suffix = shape
  kv = 2 * above(spec, layer) * prefix * spec.kv_heads * spec.head_size
  return 4.0 * rows * (kv + suffix * spec.width)


def summed_bytes(spec: ModelSpec, layer: int, tokens: float) -> float:
  """Bytes of activations in a step, where `tensor` divides matrices.

  Attention and MLP each sum their outputs, and the gradient of their input for
  every map that reads it. Bytes of results on a device, f32.

  Args:
    spec: the architecture.
    layer: the layer whose output is optimised.
    tokens: packed tokens of a device.
  """
  sums = 2 + 3 + 1 + spec.gated
  return 4.0 * tokens * above(spec, layer) * sums * spec.width
