"""Forward replay: targets of the first edited layer, carried to the others.

  z_1 = h_1 + d                       optimised at the first edited layer
  z_l = output of layer l at the anchor when that of layer 1 is set to z_1

The prompt is run once without contexts, with the output of the first edited
layer set at the anchors; what every later edited layer then gives there is its
target. Each layer inserts its own residual whole.

Axis letters as in `jaxedit.types`; n edited layers, K chunks, B prompts a batch.

Source: MEMIT-FE (arXiv 2605.00358) and its code in EasyEdit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching.plan import BatchPlan
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, Params, Patch, Tap, Targets, TokenLayout

_ROWS = 16  # prompts a batch


def replay(
    spec: ModelSpec,
    params: Params,
    edits: Sequence[EncodedEdit],
    targets: Sequence[Targets],
    layers: tuple[int, ...],
    plan: BatchPlan,
) -> np.ndarray:
  """Carries targets up.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edits: E edits.
    targets: of every edit those of its K chunks, at the first of the layers.
    layers: n edited layers.
    plan: static shapes, made for these edits and maybe others.

  Returns:
    [n, M, D] targets of each layer, in the order of edits and chunks.
  """
  last = lambda edit: edit.stage(edit.stages - 1, 0).anchor
  stages, width = plan.stages, plan.unshared_prompts.text[2]
  parts = []
  for first in range(0, len(edits), _ROWS):
    some = edits[first : first + _ROWS]
    tokens = np.zeros((_ROWS, width), np.int32)
    valid = np.zeros(tokens.shape, bool)
    # Beyond the row: no token is there to be set.
    column = np.full((stages, _ROWS), width, np.int32)
    z = np.zeros((stages, _ROWS, spec.width), targets[0].z.dtype)
    for row, edit in enumerate(some):
      ids = edit.text(0)[: last(edit) + 1]
      tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
      for k in range(edit.stages):
        column[k, row] = edit.stage(k, 0).anchor
        z[k, row] = targets[first + row].z[k]
    layout = decoder.token_layout(valid)
    found = fetch(
        _replay(spec, params, tokens, layout, column, z, layers=layers)
    )
    parts += [found[:, row, : edit.stages] for row, edit in enumerate(some)]
  return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnames=('spec', 'layers'))
def _replay(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout,
    column: Array,
    z: Array,
    *,
    layers: tuple[int, ...],
) -> Array:
  """Outputs [n, B, K, D] of the layers at columns [K, B], the first set to z."""
  place = jnp.minimum(column.T, tokens.shape[1] - 1)
  read = lambda h: jnp.take_along_axis(h, place[..., None], axis=1)
  h = decoder.embed(spec, params, tokens, layout)
  _, (found,) = decoder.run_layers(
      spec,
      params,
      h,
      layout,
      start=0,
      stop=layers[-1] + 1,
      patches=[
          Patch('block', 'set', jnp.int32(layers[0]), column[k], z[k])
          for k in range(len(column))
      ],
      taps=(Tap('block', layers, read),),
  )
  return found
