"""Sets our stages beside the published loop in PyTorch, on the same edits.

Both sides run in one process, turn and turn about, so that whatever else the
machine does hits both. Optimisation is compared over the first few edits, which
torch takes one at a time; we take all edits side by side, and of our seconds
these few have the share that they have in the FLOPs that all need. Insertion of
the few is one batch on both sides.

Agreement is told apart by cause: wanted states where both took equally many
steps, changes from each side's own states, and changes from torch's states on
both sides, which differ by the linear algebra alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import costs, torch_baseline
from experiments.benchmark_setup import Setup
from experiments.benchmark_stages import Stage, dtype_of
from jaxedit.edit import closed_form
from jaxedit.solve.ridge import Factors
from jaxedit.types import Progress, Targets


@dataclasses.dataclass
class Comparison:
  """The same edits on both sides.

  Attributes:
    setup: what both run on.
    model: the torch model.
    count: edits compared, the first of all.
    found: torch's wanted states of every turn.
    inserted: torch's changes of every turn.
    changes: ours, each [F, D], from our own states.
    insert_seconds: of ours for these edits; the first call compiles.
    same: relative difference of the changes from torch's states.
  """

  setup: Setup
  model: Any
  count: int
  found: list[list[torch_baseline.Found]] = dataclasses.field(
      default_factory=list
  )
  inserted: list[torch_baseline.Inserted] = dataclasses.field(
      default_factory=list
  )
  changes: list[np.ndarray] = dataclasses.field(default_factory=list)
  insert_seconds: list[float] = dataclasses.field(default_factory=list)
  same: float = float('nan')

  def ours(self, state: Any, targets: Targets, progress: Progress) -> None:
    """Times our insertion of these edits."""
    part = jax.tree.map(lambda x: x[: self.count], targets)
    self.changes, seconds = _insert(self, state, part, progress)
    self.insert_seconds.append(seconds)

  def theirs(self, progress: Progress) -> None:
    """Takes torch's turn."""
    setup, edits = self.setup, self.setup.edits[: self.count]
    recipe, found = setup.recipe, []
    with progress('torch optimize', len(edits), 'edit') as advance:
      for edit in edits:
        found.append(
            torch_baseline.optimize(
                self.model,
                edit,
                layer=recipe.layers[-1],
                schedule=recipe.value,
            )
        )
        advance(1)
    self.found.append(found)
    self.inserted.append(
        torch_baseline.insert(
            self.model,
            edits,
            layers=recipe.layers,
            z=np.stack([one.z for one in found]),
            grams=[np.array(setup.moments.layer(n)) for n in recipe.layers],
            weight=setup.moment_weight,
            progress=progress,
        )
    )

  def check(self, state: Any, targets: Targets, progress: Progress) -> None:
    """Solves from torch's states on our side too."""
    part = jax.tree.map(lambda x: x[: self.count], targets)
    part = part.replace(z=np.stack([one.z for one in self.found[-1]]))
    changes, _ = _insert(self, state, part, progress)
    self.same = difference(changes, self.inserted[-1].changes)

  def facts(self, targets: Targets, stages: dict[str, Stage]) -> dict[str, Any]:
    """Everything that was found, as plain numbers."""
    return {
        'edits': self.count,
        'optimize': self._optimize(targets, stages),
        'insert': self._insertion(),
        'agreement': agreement(targets, self.found[-1])
        | {
            'change_difference': difference(
                self.changes, self.inserted[-1].changes
            ),
            'change_difference_same_states': self.same,
        },
    }

  def _optimize(
      self, targets: Targets, stages: dict[str, Stage]
  ) -> dict[str, float]:
    """Seconds an edit and FLOPs of both sides."""
    spec, last = self.setup.model.spec, self.setup.recipe.layers[-1]
    needed = lambda count: costs.ours_flops(
        spec,
        last,
        costs.lengths(self.setup.edits[:count]),
        targets.steps[:count],
    )
    ours = needed(self.count)
    theirs = sum(
        costs.loop_flops(spec, last, *one.shape, one.steps)
        for one in self.found[-1]
    )
    # These edits may need more steps or fewer than the others.
    share = ours / needed(len(self.setup.edits)) / self.count
    parts = [stages['prepare'], stages['optimize']]
    warm = share * sum(stage.median for stage in parts)
    first = share * sum(stage.seconds[0] for stage in parts)
    turns = [[one.seconds for one in turn] for turn in self.found]
    torch = statistics.median(map(statistics.fmean, turns))
    return _sides(warm, first, torch) | {
        'flops': ours / self.count,
        'torch_flops': theirs / self.count,
        'flop_ratio': theirs / ours,
        'torch_flops_a_second': theirs / self.count / torch,
    }

  def _insertion(self) -> dict[str, float]:
    """Seconds an edit and FLOPs of both sides."""
    spec, layers = self.setup.model.spec, self.setup.recipe.layers
    warm = statistics.median(self.insert_seconds[1:] or self.insert_seconds)
    torch = statistics.median(one.seconds for one in self.inserted)
    ours = costs.insert_flops(
        spec, layers, costs.lengths(self.setup.edits[: self.count])
    ) + costs.solve_flops(spec, len(layers), self.count)
    theirs = sum(
        costs.loop_insert_flops(
            spec, len(layers), self.inserted[-1].tokens, self.count
        )
    )
    n = self.count
    return _sides(warm / n, self.insert_seconds[0] / n, torch / n) | {
        'flops': ours / n,
        'torch_flops': theirs / n,
        'flop_ratio': theirs / ours,
    }


def build(setup: Setup, count: int) -> Comparison:
  """Loads the torch model.

  Args:
    setup: what both sides run on.
    count: edits to compare, at most.

  Raises:
    InputError: torch is not installed.
  """
  model, dtype = setup.model, dtype_of(setup)
  if setup.random:
    torch = torch_baseline.from_params(
        model.config, model.spec, model.params, dtype
    )
  else:
    torch = torch_baseline.load(model.folder, dtype)
  return Comparison(setup, torch, min(count, len(setup.edits)))


def _sides(warm: float, first: float, torch: float) -> dict[str, float]:
  """Seconds an edit of both sides."""
  return {
      'seconds': warm,
      'first_seconds': first,
      'torch_seconds': torch,
      'ratio': torch / warm,
      'ratio_with_compile': torch / first,
  }


def _insert(
    comparison: Comparison, state: Any, targets: Targets, progress: Progress
) -> tuple[list[np.ndarray], float]:
  """Our insertion of the compared edits: the changes, and seconds."""
  setup = comparison.setup
  begin = time.perf_counter()
  solved, _, _ = closed_form.insert(
      setup.model.spec,
      setup.model.params,
      setup.recipe,
      state,
      setup.edits[: comparison.count],
      targets=targets,
      active=np.ones(comparison.count, bool),
      progress=progress,
  )
  solved = jax.block_until_ready(solved)
  seconds = time.perf_counter() - begin
  return [_matrix(change) for change in solved], seconds


def _matrix(change: Any) -> np.ndarray:
  """A change as [F, D] float64, whether it is factors or a matrix."""
  if isinstance(change, Factors):
    key, value = (np.asarray(x, np.float64) for x in change)
    return key.T @ value
  return np.asarray(change, np.float64)


def difference(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]
) -> float:
  """Largest relative difference of a layer's change, in Frobenius norm."""
  norm = np.linalg.norm
  return max(float(norm(a - b) / norm(b)) for a, b in zip(ours, theirs))


def agreement(
    targets: Targets, found: Sequence[torch_baseline.Found]
) -> dict[str, Any]:
  """Compares wanted states.

  Args:
    targets: ours; the first are compared.
    found: torch's.

  Returns:
    How many edits took equally many steps, and over these the cosine of z and
    of z - z0, each the least and the median (None where there are none).
  """
  steps = np.asarray([one.steps for one in found])
  mine = np.asarray(targets.steps[: len(found)])
  equal = np.flatnonzero(steps == mine)
  facts: dict[str, Any] = {
      'equal_steps': len(equal),
      'steps': mine.tolist(),
      'torch_steps': steps.tolist(),
  }
  pairs = {
      'z': [(targets.z[i], found[i].z) for i in equal],
      'd': [
          (targets.z[i] - targets.z0[i], found[i].z - found[i].z0)
          for i in equal
      ],
  }
  for name, both in pairs.items():
    cosines = [_cosine(a, b) for a, b in both]
    facts[f'{name}_cosine_min'] = min(cosines, default=None)
    facts[f'{name}_cosine_median'] = (
        statistics.median(cosines) if cosines else None
    )
  return facts


def _cosine(a: Any, b: Any) -> float:
  """Cosine in f64; 1 for two zeros."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  size = np.linalg.norm(a) * np.linalg.norm(b)
  return float(a @ b / size) if size else 1.0
