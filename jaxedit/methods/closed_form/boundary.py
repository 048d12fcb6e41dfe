"""Targets of every edited layer, each optimised on the layers below as written.

  for layer l in order:  z_l on the model so far;  X_l inserts z_l - now whole

So every layer is a closed form of one layer. Independent edits lie side by side:
from the second layer on each has a model of its own. These models differ below
the targets only, in what is run once a target.

Source: BLUE (arXiv 2502.03748) and its published code, which takes the first and
the last of MEMIT's layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxedit import edited as edited_lib
from jaxedit.deltas import Below, Edited
from jaxedit.methods.base import (
    EditBatch,
    Editor,
    EditResult,
    Info,
    Method,
    Need,
    Run,
    empty_info,
)
from jaxedit.methods.closed_form.editor import closed_form
from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch


def boundary(spec: ModelSpec, recipe: Recipe) -> Editor:
  """Makes an editor of a recipe whose targets are at each layer.

  Args:
    spec: the architecture.
    recipe: the method.

  Returns:
    The editor; its state holds one of the closed form a layer, its needs are
    those of all layers.

  Raises:
    InputError: see `closed_form`.
  """
  whole = closed_form(spec, recipe)  # checks; its needs are for all layers
  editors = [
      closed_form(
          spec, dataclasses.replace(recipe, layers=(layer,), targets_at='last')
      )
      for layer in recipe.layers
  ]

  def init(model: Any, resources: Mapping[Need, Any]) -> tuple[Any, ...]:
    given = [
        dict(zip(one.needs, [resources[need] for need in whole.needs]))
        for one in editors
    ]
    return tuple(one.init(model, found) for one, found in zip(editors, given))

  def edit(
      model: Any, state: tuple[Any, ...], batch: EditBatch, run: Run
  ) -> EditResult:
    if not batch.encoded:
      return EditResult(Edited(), state, empty_info(spec, recipe.layers))
    current, below, deltas, done = model, None, (), []
    for editor, one in zip(editors, state):
      if done:
        # Targets depend on what the layers below became.
        run = run._replace(cache=None)
        if batch.joint:
          params = edited_lib.apply(model.params, Edited(deltas))
          current = dataclasses.replace(model, params=params)
        else:
          below = Below(jax.tree.map(fetch, deltas), batch.groups)
      done.append(editor.edit(current, one, batch, run, below))
      deltas += done[-1].edited.deltas
    info = _summed([result.info for result in done])
    if not batch.joint:
      return EditResult(Edited(deltas, size=done[0].edited.size), state, info)
    states = tuple(result.state for result in done)
    return EditResult(Edited(deltas), states, info)

  return whole._replace(init=init, edit=edit)


def _summed(infos: Sequence[Info]) -> Info:
  """The report of an edit of which each layer had one."""
  first, last = infos[0], infos[-1]
  seconds = {
      stage: sum(one.seconds[stage] for one in infos) for stage in last.seconds
  }
  each = {**last.per_edit}
  each['steps'] = [
      sum(steps) for steps in zip(*(one.per_edit['steps'] for one in infos))
  ]
  each['distance'] = [
      [*(far for part in parts[:-1] for far in part[:-1]), *parts[-1]]
      for parts in zip(*(one.per_edit['distance'] for one in infos))
  ]
  distance = [one.targets.distance for one in infos]
  distance = np.concatenate([*(x[:-1] for x in distance[:-1]), distance[-1]])
  steps = sum(one.targets.targets.steps for one in infos)
  targets = last.targets.targets.replace(steps=steps)
  work = first.work
  for one in infos[1:]:
    work = work + one.work
  return Info(
      written=np.logical_and.reduce([one.written for one in infos]),
      seconds=seconds,
      per_edit=each,
      targets=last.targets._replace(targets=targets, distance=distance),
      work=work,
      reason=next((one.reason for one in infos if one.reason), ''),
  )


def closed_form_method(
    name: str, summary: str, config: type, **details: Any
) -> Method:
  """Makes the registry's entry of a closed form.

  Args:
    name: its id.
    summary: a phrase.
    config: a `ClosedFormConfig` with a method `recipe`.
    **details: of `Method`.

  Returns:
    The entry.
  """

  def editor(spec: ModelSpec, config: Any) -> Editor:
    recipe = config.recipe()
    make = boundary if recipe.targets_at == 'each' else closed_form
    return make(spec, recipe)

  return Method(name, summary, config, editor, **details)
