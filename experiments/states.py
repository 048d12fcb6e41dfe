"""Keeps optimised states, so that what follows can be tuned or run again alone.

Optimising the states takes most of a run and depends on nothing that insertion
does: not on the metric, its weight, the null space or the layers below the last.
With --states=FOLDER a run whose states are there skips the optimisation. They are
found by all that they depend on, so that none are ever taken for others: model,
edits as ids, layer, output and settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.kept import Kept
from jaxedit.edit.base import Editor
from jaxedit.models import loading
from jaxedit.text.batching import EncodedEdit
from jaxedit.types import Targets


def about(model: loading.Model, recipe: Any) -> dict[str, Any]:
  """What states depend on, beside the edits.

  Args:
    model: the unedited model.
    recipe: the method.

  Returns:
    Plain JSON types.
  """
  return {
      'model': model.hash,
      'dtype': str(model.params['embed']['embedding'].dtype),
      'layer': int(recipe.layers[-1]),
      'output': getattr(recipe, 'output', 'block'),
      'value': recipe.value._asdict(),
  }


def parts_of(edits: Sequence[EncodedEdit]) -> list[Any]:
  """Edits as `Kept` takes them."""
  parts: list[Any] = []
  for edit in edits:
    parts.append([[int(x) for x in edit.anchors], len(edit.rows)])
    parts.append([[int(x) for x in chunk] for chunk in edit.chunks or ()])
    parts += [np.asarray(x, np.int32) for x in (*edit.rows, edit.target)]
    parts.append(np.asarray(edit.kl, np.int32))
  return parts


def kept(editor: Editor, place: Kept, *, in_sequence: bool = False) -> Editor:
  """Makes an editor that keeps its states.

  Args:
    editor: the method.
    place: where; it depends on `about`.
    in_sequence: whether each call edits the model that the last one left. Then
      the place must depend on all that a run does, and states are those of the
      same call of an earlier run. Otherwise the editor must be given the
      unedited model every time.

  Returns:
    The editor.
  """
  calls = itertools.count()

  def call(edit: Any) -> Any:
    def run(params, state, edits, **more):
      parts = parts_of(edits)
      if in_sequence:
        parts.append(next(calls))
      arrays = place.load(*parts)
      targets = Targets(**arrays) if arrays else None
      out = edit(params, state, edits, targets=targets, **more)
      if targets is None and edits:
        place.save(vars(out[2].targets), *parts)
      return out

    return run

  return Editor(editor.init, call(editor.edit), call(editor.edit_each))
