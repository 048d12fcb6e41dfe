"""Compares bf16 arithmetic with f32 arithmetic on the same bf16 weights.

  python -m experiments.precision \
    --flagfile=experiments/flagfiles/counterfact_smollm2.flags \
    --data=counterfact.json --output_dir=runs/precision

Takes the flags of memit_batch. Both runs round the weights to bf16; one then
computes with them in bf16 (residuals, norms, losses and solves in f32 or wider,
as always, and activations as --activations says while states are optimised and
written), the other widens them and computes in f32. Prints how far apart the
wanted states are and both tables, and writes precision.json to --output_dir.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import (
    common,
    editing,
    job,
    job_report,
    judging,
    memit_batch,
    timing,
    workbench,
)
from jaxedit import io
from jaxedit.methods import closed_form
from jaxedit.types import InputError, Targets

FLAGS = flags.FLAGS

_SHOWN = ('es', 'ps', 'ns')

define_flags = memit_batch.define_flags


def agreement(one: Targets, other: Targets) -> dict[str, Any]:
  """Says how far wanted states are apart.

  Args:
    one: targets of E edits.
    other: targets of the same edits.

  Returns:
    'z_cosine' and 'delta_cosine' (of z and of z - z0: median and lowest over
    'compared' edits, which are finite and have moved in both), 'equal_steps',
    'edits'.
  """

  moved = np.ones(len(one.steps), bool)
  for targets in (one, other):
    away = np.linalg.norm(targets.z - targets.z0, axis=-1)
    moved &= np.isfinite(away) & (away > 0)

  def spread(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    if not moved.any():
      return {'median': 1.0, 'lowest': 1.0}
    a, b = (x[moved].astype(np.float64) for x in (a, b))
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.sum(a * b, axis=-1) / length
    return {'median': float(np.median(cosine)), 'lowest': float(cosine.min())}

  return {
      'z_cosine': spread(one.z, other.z),
      'delta_cosine': spread(one.z - one.z0, other.z - other.z0),
      'equal_steps': int((one.steps == other.steps).sum()),
      'compared': int(moved.sum()),
      'edits': len(one.steps),
  }


def main() -> None:
  recipe, settings = memit_batch.recipe_of_flags()
  if FLAGS.dtype != 'bfloat16':
    raise InputError(
        f'--dtype={FLAGS.dtype}: this program rounds weights to bfloat16; pass'
        ' --dtype=bfloat16'
    )
  folder = common.claim_folder(FLAGS.output_dir, FLAGS.overwrite)
  common.use_compilation_cache(FLAGS.compilation_cache)
  clock = timing.Clock()
  task = memit_batch.TASK
  bench = job.load_bench(task, recipe, clock)
  bench, moments, source = task.complete(bench, recipe, clock, folder)
  bench = workbench.shape(bench, None)
  widen = lambda x: x.astype(jnp.float32)
  wide = dataclasses.replace(
      bench.model, params=jax.tree.map(widen, bench.model.params)
  )
  judge = memit_batch.judge_of_flags(bench)
  # Metrics hold no weights, so both runs share them.
  editor = closed_form.closed_form(bench.model.spec, recipe)
  state = editor.init(bench.model.params, moments)
  tables, targets = {}, {}
  for name, model in (('bfloat16', bench.model), ('float32', wide)):
    mine = workbench.replace_model(bench, model)
    outcome = editing.edit_in_sequence(mine, editor, state, common.progress_bar)
    targets[name] = outcome.info.targets
    tables[name] = judge(mine, outcome, None)
  found = agreement(targets['bfloat16'], targets['float32'])
  io.write_json(
      folder / 'precision.json',
      {
          **found,
          **judging.metric_tables(tables),
          'protocol': job_report.protocol(
              bench,
              recipe,
              settings=settings,
              source=source,
              scores=task.protocol(bench),
          ),
          'versions': common.versions(),
      },
  )
  print(
      f'z cosine {found["z_cosine"]["median"]:.5f} median,'
      f' {found["z_cosine"]["lowest"]:.5f} lowest of {found["edits"]};'
      f' equal step counts for {found["equal_steps"]}'
  )
  for name, table in tables.items():
    entries = {k: table.summary[k] for k in _SHOWN if k in table.summary}
    means = [f'{k} {entry["mean"]:.3f}' for k, entry in entries.items()]
    print(f'{name:9} {", ".join(means)}')


if __name__ == '__main__':
  define_flags()
  common.run(main)
