"""Keeps optimised states, so that what follows can be tuned or run again alone.

Optimising the states takes most of a run and depends on nothing that insertion
does: not on the metric, its weight, the null space or the layers below the last.
With --states=FOLDER a run whose states are there skips the optimisation. They are
found by all that they depend on, so that none are ever taken for others: model,
edits as ids, layer, output and settings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments import common
from experiments.kept import Kept, digest
from jaxedit.methods.base import Editor
from jaxedit.models import loading
from jaxedit.text.encoding import EncodedEdit
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
      'jaxedit': common.versions()['jaxedit'],
      'model': model.hash,
      'dtype': str(model.params['embed']['embedding'].dtype),
      'layer': int(recipe.layers[-1]),
      'activations': recipe.activations,
      'output': getattr(recipe, 'output', 'block'),
      'value': recipe.value._asdict(),
  }


class States:
  """A memory in files; see `values.Memory`."""

  def __init__(self, place: Kept, *more: Any):
    """Opens it.

    Args:
      place: where the files are.
      *more: what states depend on, beside what all in that place does.
    """
    self._place, self._more = place, more

  def get(self, edit: EncodedEdit) -> Targets | None:
    arrays = self._place.load(*self._more, *_parts(edit))
    return Targets(**arrays) if arrays else None

  def put(self, edit: EncodedEdit, targets: Targets) -> None:
    self._place.save(vars(targets), *self._more, *_parts(edit))


def _parts(edit: EncodedEdit) -> list[Any]:
  """An edit as `Kept` takes it, without its number."""
  anchors = [int(x) for x in edit.anchors]
  chunks = [[int(x) for x in chunk] for chunk in edit.chunks]
  ids = [*edit.rows, edit.target, edit.kl]
  return [anchors, chunks, *(np.asarray(x, np.int32) for x in ids)]


def keeping(
    editor: Editor, place: Kept, *, in_sequence: bool = False
) -> Editor:
  """Makes an editor that keeps its states.

  Args:
    editor: the method.
    place: where; it depends on `about`.
    in_sequence: whether each call edits the model that the last one left. Then
      the place must depend on all that a run does, and states depend on the
      edits of all earlier calls, too. Otherwise the editor must be given the
      unedited model every time.

  Returns:
    The editor.
  """
  earlier = digest()

  def call(edit: Any) -> Any:
    def run(params, state, edits, **more):
      nonlocal earlier
      memory = States(place)
      if in_sequence:
        memory = States(place, earlier)
        earlier = digest(earlier, *(x for one in edits for x in _parts(one)))
      return edit(params, state, edits, memory=memory, **more)

    return run

  return Editor(editor.init, call(editor.edit), call(editor.edit_independent))
