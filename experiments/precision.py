"""Compares bf16 arithmetic with f32 arithmetic on the same bf16 weights.

  python -m experiments.precision \
    --flagfile=experiments/flagfiles/counterfact_smollm2.flags \
    --data=counterfact.json --output_dir=runs/precision

Takes the flags of memit_batch. Both runs round the weights to bf16; one then
computes with them in bf16 (residuals, norms, losses and solves in f32 or wider,
as always, and activations as --activations says while targets are optimised and
written), the other widens them and computes in f32. Prints how far apart the
targets are and both tables, and writes precision.json to --output_dir.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import memit_batch
from experiments.benchmark.compare import cosines
from jaxedit import io
from jaxedit.runs import cli, editing, inputs, method_flags, report
from jaxedit.runs import config as config_lib
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.types import InputError, Targets

_SHOWN = ('es', 'ps', 'ns')


def define_flags() -> None:
  """Defines this program's flags, those of memit_batch."""
  memit_batch.define_flags()
  flags.adopt_module_key_flags(memit_batch)


def agreement(one: Targets, other: Targets) -> dict[str, Any]:
  """Says how far targets are apart.

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
    found = cosines(a[moved], b[moved]) if moved.any() else np.ones(1)
    return {'median': float(np.median(found)), 'lowest': float(found.min())}

  return {
      'z_cosine': spread(one.z, other.z),
      'delta_cosine': spread(one.z - one.z0, other.z - other.z0),
      'equal_steps': int((one.steps == other.steps).sum()),
      'compared': int(moved.sum()),
      'edits': len(one.steps),
  }


def compare(session: inputs.Session) -> dict[str, Any]:
  """Edits with both arithmetics.

  Args:
    session: with weights in bf16.

  Returns:
    What `agreement` says, and `report.tables` of both.
  """
  model = session.model
  widen = lambda x: x.astype(jnp.float32)
  wide = dataclasses.replace(model, params=jax.tree.map(widen, model.params))
  scorers = session.task.scorers(session.tokens, model.spec, model)
  # Preconditioners hold no weights, so both runs share them.
  state = session.editor.init(model, session.resources)
  evaluations, targets = {}, []
  for name, one in (('bfloat16', model), ('float32', wide)):
    mine = dataclasses.replace(session, model=one)
    outcome = editing.edit(mine, state, progress=cli.progress_bar)
    targets.append(outcome.info.targets.targets)
    evaluations[name] = editing.judge(
        mine, outcome, scorers, progress=cli.progress_bar
    )
  return {**agreement(*targets), **report.tables(evaluations)}


def main() -> None:
  config, chosen = cli.read(RunConfig), method_flags.from_flags('fact')
  problems = config_lib.errors(config)
  if config.dtype != 'bfloat16':
    problems.append(
        f'--dtype={config.dtype}: this program rounds weights to bfloat16; pass'
        ' --dtype=bfloat16'
    )
  InputError.raise_for(problems)
  with Output(
      config.output_dir, cli.given(), overwrite=config.overwrite
  ) as output:
    cli.use_compilation_cache(config.compilation_cache)
    session = inputs.load(
        config,
        chosen,
        'fact',
        clock=Clock(),
        progress=cli.progress_bar,
        begin=lambda: output.begin(['precision.json']),
    )
    found = compare(session)
    extra = {'protocol': session.meaning, 'versions': versions()}
    io.write_json(output.folder / 'precision.json', {**found, **extra})
  print(
      f'z cosine {found["z_cosine"]["median"]:.5f} median,'
      f' {found["z_cosine"]["lowest"]:.5f} lowest of {found["edits"]};'
      f' equal step counts for {found["equal_steps"]}'
  )
  for name, means in found['metrics'].items():
    shown = [f'{k} {means[k]:.3f}' for k in _SHOWN if k in means]
    print(f'{name:9} {", ".join(shown)}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
