"""Keeps optimised states between runs, so that what follows can be tuned alone.

Optimising the states takes most of a run and depends on nothing that insertion
does: not on the metric, its weight, the null space or the layers below the last.
With --states=FOLDER a run whose states are there skips the optimisation. A file
is found by all that the states depend on, so that none is ever taken for another:
model, edits as ids, layer, output and settings.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from experiments import common
from jaxedit.edit.base import Editor
from jaxedit.models import loading
from jaxedit.text.batching import EncodedEdit
from jaxedit.types import InputError, Targets


def about(model: loading.Model, recipe: Any) -> dict[str, Any]:
  """What states depend on, beside the edits.

  Args:
    model: the unedited model.
    recipe: the method.
  """
  return {
      'model': model.hash,
      'dtype': str(model.params['embed']['embedding'].dtype),
      'layer': int(recipe.layers[-1]),
      'output': getattr(recipe, 'output', 'block'),
      'value': recipe.value._asdict(),
  }


def fingerprint(facts: dict[str, Any], edits: Sequence[EncodedEdit]) -> str:
  """Names the states of edits; see `about`."""
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  for edit in edits:
    shape = (edit.anchors, edit.chunks, [len(row) for row in edit.rows])
    digest.update(json.dumps(shape, default=int).encode())
    for ids in (*edit.rows, edit.target, edit.kl):
      digest.update(np.asarray(ids, np.int32).tobytes() + b';')
  return digest.hexdigest()[:32]


def load(path: pathlib.Path) -> Targets | None:
  """Reads states; None where there are none.

  Raises:
    InputError: the file is damaged.
  """
  if not path.is_file():
    return None
  try:
    return Targets(**safetensors.numpy.load_file(path))
  except (safetensors.SafetensorError, TypeError, ValueError) as e:
    raise InputError(f'{path}: holds no states ({e}); delete it') from None


def save(path: pathlib.Path, targets: Targets) -> None:
  """Writes states atomically.

  Raises:
    InputError: they cannot be written.
  """
  arrays = {k: np.ascontiguousarray(v) for k, v in vars(targets).items()}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise InputError(
        f'{path.parent}: cannot be made ({e.strerror}); name another folder'
    ) from e
  common.write_bytes(path, safetensors.numpy.save(arrays))


def kept(editor: Editor, folder: str, facts: dict[str, Any]) -> Editor:
  """Makes an editor that keeps its states.

  Args:
    editor: the method.
    folder: where they are kept.
    facts: what they depend on, see `about`.

  Returns:
    The editor. It must be given the unedited model every time.
  """

  def call(edit: Any) -> Any:
    def run(params, state, edits, **more):
      path = pathlib.Path(folder, fingerprint(facts, edits) + '.safetensors')
      found = load(path)
      out = edit(params, state, edits, targets=found, **more)
      if found is None and edits:
        save(path, out[2].targets)
      return out

    return run

  return Editor(editor.init, call(editor.edit), call(editor.edit_each))
