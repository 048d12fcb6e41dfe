"""What can be done with a saved edit: shown, exported, merged, taken apart.

Each action reads the edit and, where it changes it, writes another file with the
same provenance and what was done to it ('history').
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit import edited as edited_lib
from jaxedit.convert import hub
from jaxedit.deltas import Edited
from jaxedit.edited import files
from jaxedit.models import loading, saving
from jaxedit.types import InputError, Progress, silent

# Action -> flags that it needs.
ACTIONS: Mapping[str, tuple[str, ...]] = {
    'show': (),
    'export': ('model', 'out'),
    'merge': ('model', 'out'),
    'select': ('edit', 'out'),
    'add': ('other', 'out'),
    'forget': ('id', 'out'),
    'roll_back': ('count', 'out'),
}
_LISTED = 8  # ids


def run(given: Any, progress: Progress = silent) -> list[str]:
  """Does what the flags say.

  Args:
    given: the flags of `experiments.delta`.
    progress: progress display.

  Returns:
    Lines to print.

  Raises:
    InputError: the edit cannot be read, or cannot be treated so.
  """
  edited, about = edited_lib.load(given.delta)
  if given.do == 'show':
    return described(given.delta, edited, about)
  if given.do in ('export', 'merge'):
    if given.edit is not None:
      edited = _selected(edited, given.edit)
    return _with_model(given, edited, about, progress)
  if pathlib.Path(given.out).exists():
    raise InputError(f'{given.out}: exists already; give another place')
  what: dict[str, Any]
  if given.do == 'select':
    edited, what = _selected(edited, given.edit), {'select': given.edit}
  elif given.do == 'add':
    edited, what = _added(given, edited, about)
  elif given.do == 'forget':
    edited, what = edited_lib.forget(edited, given.id), {'forget': given.id}
  else:
    edited = edited_lib.roll_back(edited, given.count)
    what = {'roll_back': given.count}
  about = {
      **about,
      'independent': edited.size is not None,
      'history': [*about.get('history', ()), what],
  }
  edited_lib.save(given.out, edited, about)
  return described(given.out, edited, about)


def _selected(edited: Edited, index: int) -> Edited:
  if edited.size is None:
    raise InputError('the edit is one: leave --edit out')
  if index >= edited.size:
    raise InputError(
        f'--edit={index}: there are {edited.size} edits side by side, from 0'
    )
  return edited_lib.select(edited, index)


def _added(
    given: Any, edited: Edited, about: Mapping[str, Any]
) -> tuple[Edited, dict[str, Any]]:
  other, more = edited_lib.load(given.other)
  if more['model_hash'] != about['model_hash']:
    raise InputError(
        f'{given.other}: was made for another model than {given.delta}; edits'
        ' of one unedited model can be added'
    )
  try:
    both = edited_lib.add(edited, other)
  except ValueError as error:
    raise InputError(f'{given.delta} and {given.other}: {error}') from None
  kept = ('method', 'records', 'data', 'history')
  return both, {'add': {name: more[name] for name in kept if name in more}}


def _with_model(
    given: Any, edited: Edited, about: Mapping[str, Any], progress: Progress
) -> list[str]:
  """Exports or merges an edit."""
  folder = hub.resolve(given.model, revision=given.revision, progress=progress)
  # Read for its hash too: an adapter would fit another model of the same shapes.
  dtype = 'bfloat16' if given.do == 'export' else 'float32'
  model = loading.load_model(folder, dtype, progress)
  files.require_model(given.delta, about, model.hash)
  if given.do == 'merge':
    merged = edited_lib.apply(model.params, edited, dtype=jnp.float32)
    changed = edited_lib.changed(edited)
    saved = saving.save_model(
        model.folder, given.out, model.spec, merged, changed=changed
    )
    return [
        f'{given.out}: {len(saved.tensors)} tensors changed; rounding to their'
        f' dtype lost {saved.merge_error:.1e} of a change at most'
    ]
  maps, lines = edited_lib.write_adapter(
      given.out,
      model.spec,
      edited,
      format=given.format,
      base=given.base or _name(given.model, folder),
      rank=given.rank,
      tolerance=given.tolerance,
      dtype=given.dtype,
      about=about,
  )
  found = [
      f'layer {one.layer} {one.site}: rank {one.rank}, {one.error:.1e} of the'
      ' change left out'
      for one in maps
  ]
  return [*found, str(given.out), *lines]


def _name(given: str, folder: pathlib.Path) -> str:
  """What servers find a model by: its hub id, or a folder."""
  hub_id = '/' in given and not pathlib.Path(given).exists()
  return given if hub_id else str(folder)


def described(path: str, edited: Edited, about: Mapping[str, Any]) -> list[str]:
  """Says what an edit is.

  Args:
    path: of its file.
    edited: the edit.
    about: its metadata.

  Returns:
    Lines.
  """
  lines = [str(path)]
  made = [str(about[n]) for n in ('method', 'model') if about.get(n)]
  lines.append(
      f'  made by {" for ".join(made) or "an unnamed method"}, model'
      f' {about["model_hash"][:12]}'
  )
  history = about.get('history', ())
  if (records := about.get('records')) and not history:
    lines.append(f'  of {len(records)} records')
  if edited.size is not None:
    lines.append(f'  {edited.size} edits side by side, each for that model')
  for delta in edited.deltas:
    size = sum(x.nbytes for x in jax.tree.leaves(delta))
    layers = ', '.join(map(str, delta.layers))
    shapes = ', '.join(
        'x'.join(map(str, x.shape)) for x in jax.tree.leaves(delta)
    )
    where = 'in the weights' if delta.mergeable else 'beside the weights'
    lines.append(
        f'  {type(delta).__name__} of {delta.site}, layers {layers}: {shapes};'
        f' {size / 2**20:.2f} MiB, {where}'
    )
  lines += [f'  {rule}' for rule in edited.rules]
  try:
    ids = edited_lib.edits_in(edited)
  except InputError:
    ids = []
  if ids:
    more = f' and {len(ids) - _LISTED} more' if len(ids) > _LISTED else ''
    lines.append(f'  {len(ids)} edits: {", ".join(ids[-_LISTED:])}{more}')
  for one in history:
    ((action, value),) = one.items()
    if isinstance(value, Mapping):
      count = len(value.get('records', ()))
      value = f'{value.get("method", "an edit")} of {count} records'
    lines.append(f'  then {action}: {value}')
  return lines
