"""What a closed form takes before it runs, see `jaxedit.planning`.

Axis letters as in `jaxedit.types`; n edited layers, M targets of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxedit.batching import edits as edits_lib
from jaxedit.batching.plan import BatchPlan
from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.methods.closed_form.systems import pays
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.planning import costs, lengths
from jaxedit.planning.stages import Stage, added, itemsize, products
from jaxedit.text.encoding import EncodedEdit


def stages(
    spec: ModelSpec,
    recipe: Recipe,
    model: Model,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    batches: Sequence[Sequence[int]],
    independent: bool,
) -> list[Stage]:
  """The stages of a closed form beside its targets.

  Args:
    spec: the architecture, with the activations of the optimisation.
    recipe: the method.
    model: as shapes.
    edits: all edits.
    plan: made for them.
    batches: indices of the edits of every batch.
    independent: whether batches lie side by side, each on the unedited model.

  Returns:
    Factors of the preconditioners, and insertion with its solves.
  """
  return [
      _factor(spec, recipe),
      _insertion(spec, recipe, model, edits, plan, batches, independent),
  ]


def _factor(spec: ModelSpec, recipe: Recipe) -> Stage:
  n, size = len(recipe.layers), 8.0 * spec.mlp_width**2
  if not recipe.preconditioner.moments:
    return Stage('factor', 'nothing to factor')
  return Stage(
      'factor',
      f'{n} x [{spec.mlp_width}, {spec.mlp_width}] in f64',
      flops={'float64': costs.factor_flops(spec, n)},
      moved=2 * n * size,
      device=3 * size,  # moments, their factor and its transpose
      kept=n * size,
  )


def _insertion(
    spec: ModelSpec,
    recipe: Recipe,
    model: Model,
    edits: Sequence[EncodedEdit],
    plan: BatchPlan,
    batches: Sequence[Sequence[int]],
    independent: bool,
) -> Stage:
  n, width, inner = len(recipe.layers), spec.width, spec.mlp_width
  shared = [len(prefix) for prefix in plan.shared_prefix]
  model_flops = solve = 0.0
  for some in batches:
    mine = [edits[i] for i in some]
    sizes = lengths.lengths(mine, recipe.texts)
    sizes = sizes if independent else lengths.own(sizes, shared)
    model_flops += costs.insert_flops(spec, recipe.layers, sizes)
    solve += costs.solve_flops(
        spec, n, lengths.systems(mine, texts=recipe.texts)
    )
  together = [edits[i] for i in max(batches, key=len)]
  if independent and len(max(batches, key=len)) == 1:
    together = list(edits[: plan.batch])  # all of them side by side
  m = sum(edit.stages for edit in together)
  packed = math.prod(plan.prompts.upto[1:2]) * _packs(together, plan, recipe)
  activations = packed * width * (4 + itemsize(model))
  resident = min(activations, plan.resident_bytes)
  one = max(plan.prompts.upto[1], plan.prompts.text[1] * recipe.texts)
  if pays(m, inner, width) or independent:
    change, system = 8.0 * m * (inner + width), 8.0 * (m * inner + 2 * m * m)
    if independent:
      system = 8.0 * m * inner * 2
  else:
    change = 8.0 * inner * width
    rows = min(m, inner)
    system = 8.0 * (rows * inner + 2 * rows * (rows if m <= inner else width))
  keys = 4.0 * m * inner
  device = resident + one * 4.0 * (3 * inner + 4 * width) + keys + system
  device += 8.0 * inner**2 * bool(recipe.preconditioner.moments) + change
  return Stage(
      'insert',
      f'{n} layers, {m:,} targets together, keys of {inner}',
      flops=added((products(model, spec), model_flops), ('float64', solve)),
      moved=len(batches)
      * (
          costs.model_bytes(spec, recipe.layers[-1] + 1, itemsize(model))
          + 8.0 * n * inner**2
      ),
      device=device,
      host=(activations - resident) + (n + 2) * keys + n * change / 2,
      kept=n * change / 2,
  )


def _packs(
    edits: Sequence[EncodedEdit], plan: BatchPlan, recipe: Recipe
) -> int:
  """Packed batches of all prompts."""
  sides = (True,) if plan.contexts == 1 else (True, False)
  return sum(
      1
      for plain in sides
      for _ in edits_lib.pack_prompts(
          edits, plan, plain=plain, text=recipe.texts
      )
  )
