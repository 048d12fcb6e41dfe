"""Locate-and-edit methods with a closed form; each is a row (`Recipe`).

For every edit a wanted state z at its anchor is optimised once (`values`), on
the unedited model, and then written into the edited layers (`insertion`).

Axes: E edits, M rows of a change, F key width, D width, n edited layers.

Source: Meng et al. 2022b (MEMIT, arXiv 2210.07229), algorithm 1. Unlike upstream,
templates are inputs, solves are M x M in f64, and params never change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import values
from jaxedit.edit.base import Editor, Info
from jaxedit.edit.insertion import Change, insert
from jaxedit.edit.recipe import Recipe, State, check_layers
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.ridge import Factors
from jaxedit.stats.moments import Moments
from jaxedit.text.batching import EncodedEdit
from jaxedit.text.seating import Frame
from jaxedit.types import (
    Delta,
    Dense,
    Edited,
    InputError,
    LowRank,
    Params,
    Progress,
    Targets,
    silent,
)

__all__ = ['Recipe', 'State', 'check_layers', 'closed_form', 'insert']


def closed_form(spec: ModelSpec, recipe: Recipe) -> Editor:
  """Makes an editor of a row.

  Args:
    spec: the architecture.
    recipe: the method.

  Returns:
    The editor. Its `init(params, moments)` factors the metrics in f64, once; its
    `edit(params, state, edits, frame=None, progress=silent)` takes what
    `text.batching.encode_edits` gives, and the frame of the run it is part of.

  Raises:
    InputError: a layer is out of range; from `init`, moments lack a layer or
      are not positive definite.
  """
  check_layers(spec, recipe.layers)

  def init(params: Params, moments: Moments) -> State:
    del params
    metrics = []
    with jax.enable_x64(True):
      for layer in recipe.layers:
        gram = jnp.asarray(moments.layer(layer), jnp.float64)
        metric = jax.block_until_ready(recipe.metric(gram))
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in metric):
          raise InputError(
              f'the second moments of layer {layer} are not positive definite;'
              ' collect more tokens (at least one a key dimension, better 20)'
          )
        # Held by the host: at width 16,384 a layer's takes 2 GB of the device.
        metrics.append(jax.tree.map(np.asarray, metric))
    return State(tuple(metrics))

  def run(
      params: Params,
      state: State,
      edits: Sequence[EncodedEdit],
      *,
      each: bool,
      frame: Frame | None,
      progress: Progress,
  ) -> tuple[Edited, State, Info]:
    if not edits:
      return Edited(), state, _nothing(spec, recipe)
    begin = time.monotonic()
    frame = frame or values.frame_for(spec, params, edits)
    targets, work = values.optimize(
        spec,
        params,
        edits,
        layer=recipe.layers[-1],
        schedule=recipe.value,
        frame=frame,
        progress=progress,
    )
    middle = time.monotonic()
    solved, distance, written = insert(
        spec,
        params,
        recipe,
        state,
        edits,
        targets=targets,
        active=targets.finite,
        each=each,
        frame=frame,
        progress=progress,
    )
    seconds = {
        'optimize': middle - begin,
        'insert': time.monotonic() - middle,
    }
    kept = np.ones_like(targets.finite) if each else targets.finite
    info = Info(targets, written, distance, seconds, work)
    return Edited(deltas=(_delta(recipe, solved, kept),)), state, info

  def edit(params, state, edits, *, frame=None, progress=silent):
    return run(params, state, edits, each=False, frame=frame, progress=progress)

  def edit_each(params, state, edits, *, frame=None, progress=silent):
    return run(params, state, edits, each=True, frame=frame, progress=progress)

  return Editor(init, edit, edit_each)


def _delta(recipe: Recipe, solved: Sequence[Change], kept: np.ndarray) -> Delta:
  """Joins the changes of all layers; `kept` rows of factors take part."""
  if isinstance(solved[0], Factors):
    key, value = (
        jnp.asarray(np.stack(x)[:, : len(kept)][:, kept]) for x in zip(*solved)
    )
    return LowRank(layers=recipe.layers, site=recipe.site, key=key, value=value)
  kernel = jnp.asarray(np.stack(solved))
  return Dense(layers=recipe.layers, site=recipe.site, kernel=kernel)


def _nothing(spec: ModelSpec, recipe: Recipe) -> Info:
  """The report on an empty batch."""
  state, one = np.zeros((0, spec.width), np.float32), np.zeros(0, np.float32)
  steps, yes = np.zeros(0, np.int32), np.zeros(0, bool)
  targets: Any = Targets(state, state, one, one, steps, yes)
  distance = np.zeros((len(recipe.layers) + 1, 0), np.float32)
  seconds = {'optimize': 0.0, 'insert': 0.0}
  return Info(targets, yes, distance, seconds, values.Work())
