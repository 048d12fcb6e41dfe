"""The one door through which an edited model is run.

Evaluation and serving call these functions and never ask which method made the
edit. Changes of kernels are added as the layers run; those of biases and norms
are small and are merged on the way in, inside jit as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxedit.models import decode, decoder
from jaxedit.models.blocks import wide
from jaxedit.models.spec import ModelSpec
from jaxedit.types import Array, Delta, Dense, Edited, Params, TokenLayout

UNEDITED = Edited()


def enter(params: Params, edited: Edited) -> tuple[Params, tuple[Delta, ...]]:
  """Merges what the layers cannot add as they run.

  Args:
    params: canonical parameters of the unedited model; untouched.
    edited: the change.

  Returns:
    (parameters with the changes of biases and scales merged, in f32 or wider so
    that nothing is rounded; the changes of kernels).

  Raises:
    ValueError: full changes of several edits lie side by side.
  """
  kernels: list[Delta] = []
  for delta in edited.deltas:
    if not isinstance(delta, Dense):
      kernels.append(delta)
      continue
    if delta.kernel.ndim != (3 if delta.leaf == 'kernel' else 2):
      raise ValueError(
          f'the full change of {delta.site} ({delta.leaf}) is that of several'
          ' edits side by side; run the model under one of them at a time'
      )
    if delta.leaf == 'kernel':
      kernels.append(delta)
    else:
      names = ('layers', *delta.site.split('/'), delta.leaf)
      params = _merge(params, names, delta)
  return params, tuple(kernels)


def _merge(tree: Params, names: Sequence[str], delta: Dense) -> Any:
  """Copies a nested dict along the path of the changed leaf."""
  if not names:
    layers = jnp.asarray(delta.layers)
    return tree.astype(wide(tree.dtype)).at[layers].add(delta.kernel)
  name, *rest = names
  return {**tree, name: _merge(tree[name], rest, delta)}


def hidden(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    tokens: Array,
    layout: TokenLayout,
) -> Array:
  """Runs an edited model up to its last block.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: the change; with a row axis in its factors every row of the batch
      is a model of its own.
    tokens: [B, T] int32.
    layout: [B, T] columns.

  Returns:
    [B, T, D] residual, ready for `decoder.logits` or `decoder.label_logprob`.
  """
  params, kernels = enter(params, edited)
  h = decoder.embed(spec, params, tokens, layout)
  h, _ = decoder.run_layers(
      spec,
      params,
      h,
      layout,
      start=0,
      stop=spec.layers,
      deltas=kernels,
  )
  return h


def forward(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    tokens: Array,
    layout: TokenLayout,
) -> Array:
  """Computes the logits of an edited model; see `hidden`.

  Returns:
    [B, T, V] logits, f32 or wider.
  """
  h = hidden(spec, params, edited, tokens, layout)
  return decoder.logits(spec, params, h)


def generate(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    prompts: Sequence[Sequence[int]],
    **settings: Any,
) -> list[list[int]]:
  """Continues prompts with an edited model; see `decode.generate`."""
  params, kernels = enter(params, edited)
  return decode.generate(spec, params, prompts, deltas=kernels, **settings)
