"""Edits a workbench: batches in a sequence, or apart; and writes the change.

Nothing here reads a flag. Stages take a `types.Progress`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.workbench import Workbench
from jaxedit import edited as edited_lib
from jaxedit.deltas import (
    Dense,
    Edited,
)
from jaxedit.methods.base import (
    Editor,
    Info,
)
from jaxedit.models import saving
from jaxedit.solve import shaping
from jaxedit.types import (
    InputError,
    Progress,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What editing gave.

  Attributes:
    edited: the change; of independent batches with a batch axis, [n, batches,
      ...].
    owner: batch of every record, for independent batches, else None.
    info: of all records together.
  """

  edited: Edited
  owner: tuple[int, ...] | None
  info: Info


def edit_in_sequence(
    bench: Workbench, editor: Editor, state: Any, progress: Progress
) -> Outcome:
  """Edits batch after batch, each on the model that the last one left.

  Args:
    bench: what to work on.
    editor: the method.
    state: what its `init` returned.
    progress: progress display.

  Returns:
    The sum of all changes.
  """
  params, total, infos = bench.model.params, Edited(), []
  batches = bench.batches()
  for i, indices in enumerate(batches):
    edited, state, info = editor.edit(
        params,
        state,
        bench.edits(indices),
        plan=bench.plan,
        progress=progress,
    )
    total = edited_lib.add(total, edited)
    infos.append(info)
    if i + 1 < len(batches):
      # From the base each time: bf16 weights are rounded once in all.
      params = edited_lib.apply(bench.model.params, total)
  total = Edited(deltas=tuple(edited_lib.compact(d) for d in total.deltas))
  return Outcome(total, None, _join(infos))


def edit_apart(
    bench: Workbench, editor: Editor, state: Any, progress: Progress
) -> Outcome:
  """Edits batches that know nothing of each other.

  Args:
    bench: what to work on.
    editor: the method.
    state: what its `init` returned; every batch starts from it.
    progress: progress display.

  Returns:
    The changes side by side, one a batch.
  """
  if bench.each:
    edited, _, info = editor.edit_independent(
        bench.model.params,
        state,
        bench.encoded,
        group=bench.cases,
        plan=bench.plan,
        progress=progress,
    )
    return Outcome(edited, bench.cases, info)
  edits, infos = [], []
  for indices in bench.batches():
    edited, _, info = editor.edit(
        bench.model.params,
        state,
        bench.edits(indices),
        plan=bench.plan,
        progress=progress,
    )
    edits.append(edited)
    infos.append(info)
  owner = tuple(b for b, some in enumerate(bench.batches()) for _ in some)
  return Outcome(edited_lib.stack(edits), owner, _join(infos))


def _join(infos: Sequence[Info]) -> Info:
  """Puts the reports of batches end to end."""
  seconds: dict[str, float] = {}
  for info in infos:
    for stage, value in info.seconds.items():
      seconds[stage] = seconds.get(stage, 0.0) + value
  before = np.cumsum([0] + [len(info.written) for info in infos])
  return Info(
      jax.tree.map(lambda *x: np.concatenate(x), *(i.targets for i in infos)),
      np.concatenate([i.edit + n for i, n in zip(infos, before)]),
      np.concatenate([i.written for i in infos]),
      np.concatenate([i.distance for i in infos], axis=1),
      seconds,
      functools.reduce(operator.add, (i.work for i in infos)),
  )


def join_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
  """Puts the reports of parts end to end; their changes are on disk."""
  return Outcome(Edited(), None, _join([one.info for one in outcomes]))


def prune(bench: Workbench, outcome: Outcome) -> Outcome:
  """Lowers the singular values of a sequence's change (PRUNE).

  Args:
    bench: what to work on.
    outcome: a change that all records share.

  Returns:
    The same with one matrix a layer.
  """
  pruned = []
  for delta in outcome.edited.deltas:
    kernel = bench.model.params['layers']
    for name in (*delta.site.split('/'), 'kernel'):
      kernel = kernel[name]
    changes = [
        shaping.prune(change, kernel[layer])
        for change, layer in zip(edited_lib.full(delta), delta.layers)
    ]
    pruned.append(Dense(delta.layers, delta.site, jnp.stack(changes)))
  return dataclasses.replace(outcome, edited=Edited(deltas=tuple(pruned)))


def save_folder(
    bench: Workbench,
    outcome: Outcome,
    folder: pathlib.Path,
    *,
    keep_float32: bool,
    keep_original: bool,
) -> saving.SaveReport:
  """Merges the change and writes a Hugging Face folder.

  Args:
    bench: what to work on.
    outcome: a change that all records share.
    folder: the folder to write.
    keep_float32: write edited matrices in float32, not the source's dtype.
    keep_original: keep the replaced matrices beside, for an exact restore.

  Returns:
    The rounding that merging cost.
  """
  model = bench.model
  merged = edited_lib.apply(model.params, outcome.edited, dtype=jnp.float32)
  changed = [
      (f'layers/{delta.site}/{getattr(delta, "leaf", "kernel")}', layer)
      for delta in outcome.edited.deltas
      for layer in delta.layers
  ]
  return saving.save_model(
      model.folder,
      folder,
      model.spec,
      merged,
      changed=changed,
      dtype='float32' if keep_float32 else None,
      keep_original=keep_original,
  )


def require_some(info: Info) -> None:
  """Refuses a run in which no edit could be written.

  Raises:
    InputError: no loss stayed finite, or nothing could be solved for.
  """
  if not len(info.written) or info.written.any():
    return
  if info.targets.finite.any():
    raise InputError(
        'no edit was written: the system to solve is singular, as the keys that'
        ' are held leave no direction free; edit fewer together (--batch_size)'
        ' or with a ridge, as MEMIT does'
    )
  raise InputError(
      'no edit was written: every loss stopped being finite; lower'
      ' --value_rate or load the model with --dtype=float32'
  )


def write_delta(
    path: pathlib.Path, outcome: Outcome, metadata: Mapping[str, Any]
) -> None:
  """Writes the change with what it was made for."""
  independent = outcome.owner is not None
  with contextlib.suppress(OSError):  # the next line tells what is wrong
    path.parent.mkdir(exist_ok=True)
  edited_lib.save(
      path, outcome.edited, {**metadata, 'independent': independent}
  )
