"""Sets our stages beside the published loop in PyTorch, on the same edits.

Both sides run in one process, turn and turn about, so that whatever else the
machine does hits both. Optimisation is compared over the first few edits, which
torch takes one at a time; we take all edits side by side, and of our seconds
these few have the share that they have in the FLOPs that all need. Insertion of
the few is one batch on both sides; edits that are made alone torch inserts one
at a time, and we side by side.

Agreement is told apart by cause: targets where both took equally many
steps, changes from each side's own states, and changes from torch's states on
both sides, which differ by the linear algebra alone.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmark import costs as loops
from experiments.benchmark import torch_baseline, torch_model
from experiments.benchmark.setup import Setup
from experiments.benchmark.stages import Stage, dtype_of
from jaxedit.methods import closed_form
from jaxedit.methods.base import EditBatch
from jaxedit.planning import costs, lengths
from jaxedit.planning.machine import timed
from jaxedit.solve.ridge import LowRankUpdate
from jaxedit.targets.budget import plan_batches
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Progress, Targets

# Names of the numbers of an edit.
_SECONDS = ('seconds', 'first_seconds', 'torch_seconds')
_FLOPS = ('flops', 'torch_flops')


@dataclasses.dataclass
class Comparison:
  """The same edits on both sides.

  Attributes:
    setup: what both run on.
    model: the torch model.
    count: edits compared, the first of all.
    found: torch's targets of every turn, those of an edit in order.
    inserted: torch's changes of every turn, a batch each.
    changes: ours, each [F, D], from our own states; all layers of a batch, then
      the next.
    insert_seconds: of ours for these edits; the first call compiles.
  """

  setup: Setup
  model: Any
  count: int
  found: list[list[torch_baseline.Found]] = dataclasses.field(
      default_factory=list
  )
  inserted: list[list[torch_baseline.Inserted]] = dataclasses.field(
      default_factory=list
  )
  changes: list[np.ndarray] = dataclasses.field(default_factory=list)
  insert_seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def edits(self) -> list[EncodedEdit]:
    """The edits compared."""
    return self.setup.edits[: self.count]

  @property
  def states(self) -> int:
    """How many states they have."""
    return sum(edit.stages for edit in self.edits)

  def ours(self, state: Any, targets: Targets, progress: Progress) -> None:
    """Times our insertion of these edits."""
    self.changes, seconds = _insert(self, state, targets, progress)
    self.insert_seconds.append(seconds)

  def theirs(self, progress: Progress) -> None:
    """Takes torch's turn."""
    recipe, found = self.setup.recipe, []
    layer, target = recipe.layers[-1], recipe.target
    with progress('torch optimize', self.count, 'edit') as advance:
      for edit in self.edits:
        found.append(
            torch_baseline.optimize(
                self.model, edit, layer=layer, config=target
            )
        )
        advance(1)
    self.found.append([state for states in found for state in states])
    (moments,) = self.setup.resources.values()
    insert = functools.partial(
        torch_baseline.insert,
        self.model,
        layers=recipe.layers,
        grams=[np.array(moments.layer(n)) for n in recipe.layers],
        weight=recipe.preconditioner.weight,
        texts=recipe.texts,
        progress=progress,
    )
    batches = [(self.edits, self.found[-1])]
    if self.setup.independent:
      batches = [([edit], states) for edit, states in zip(self.edits, found)]
    self.inserted.append([insert(x, z=_wanted(y)) for x, y in batches])

  def facts(
      self,
      state: Any,
      targets: Targets,
      stages: dict[str, Stage],
      *,
      progress: Progress,
  ) -> dict[str, Any]:
    """Everything that was found, as plain numbers."""
    theirs = [x for one in self.inserted[-1] for x in one.changes]
    wanted = _wanted(self.found[-1])
    same, _ = _insert(self, state, targets, progress, z=wanted)
    optimize, insert = self._optimize(targets, stages), self._insertion()
    return {
        'torch': torch_model.require().__version__,
        'torch_tf32': torch_model.tf32(),
        'edits': self.count,
        'optimize': optimize,
        'insert': insert,
        'both': _both(optimize, insert),
        'agreement': {
            **agreement(targets, self.found[-1]),
            'change_difference': difference(self.changes, theirs),
            'change_difference_same_states': difference(same, theirs),
        },
    }

  def _optimize(
      self, targets: Targets, stages: dict[str, Stage]
  ) -> dict[str, float]:
    """Seconds an edit and FLOPs of both sides."""
    spec, last = self.setup.model.spec, self.setup.recipe.layers[-1]
    needed = lambda edits, states: costs.ours_flops(
        spec, last, edits, targets.steps[:states]
    )
    ours = needed(self.edits, self.states)
    theirs = sum(
        loops.loop_flops(spec, last, *one.shape, one.steps)
        for one in self.found[-1]
    )
    # These edits may need more steps or fewer than the others.
    share = ours / needed(self.setup.edits, None) / self.count
    parts = [stages['prefill'], stages['optimize']]
    warm = share * sum(stage.median for stage in parts)
    first = share * sum(stage.seconds[0] for stage in parts)
    turns = [sum(one.seconds for one in turn) for turn in self.found]
    torch = statistics.median(turns) / self.count
    flops = [ours / self.count, theirs / self.count]
    rate = {'torch_flops_a_second': flops[1] / torch}
    return _sides((warm, first, torch), flops) | rate

  def _insertion(self) -> dict[str, float]:
    """Seconds an edit and FLOPs of both sides."""
    setup, n = self.setup, self.count
    spec, layers = setup.model.spec, setup.recipe.layers
    texts = setup.recipe.texts
    warm = statistics.median(self.insert_seconds[1:] or self.insert_seconds)
    turns = [sum(one.seconds for one in turn) for turn in self.inserted]
    torch = statistics.median(turns)
    solved = lengths.systems(
        self.edits, texts=texts, independent=setup.independent
    )
    ours = costs.insert_flops(
        spec, layers, lengths.lengths(self.edits, texts)
    ) + costs.solve_flops(spec, len(layers), solved)
    tokens = sum(one.tokens for one in self.inserted[-1])
    theirs = sum(loops.loop_insert_flops(spec, len(layers), tokens, solved))
    seconds = (warm / n, self.insert_seconds[0] / n, torch / n)
    return _sides(seconds, (ours / n, theirs / n))


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
    given = (model.config, model.spec, model.params)
    torch = torch_model.from_params(*given, dtype)
  else:
    torch = torch_model.load(model.folder, dtype)
  return Comparison(setup, torch, min(count, len(setup.edits)))


def _sides(
    seconds: Sequence[float], flops: Sequence[float]
) -> dict[str, float]:
  """Seconds (warm, first, torch's) and FLOPs (ours, theirs) of an edit."""
  warm, first, torch = seconds
  return {
      **dict(zip(_SECONDS, seconds)),
      'ratio': torch / warm,
      'ratio_with_compile': torch / first,
      **dict(zip(_FLOPS, flops)),
      'flop_ratio': flops[1] / flops[0],
  }


def _both(*parts: dict[str, float]) -> dict[str, float]:
  """The parts of an edit together."""
  total = lambda names: [sum(part[name] for part in parts) for name in names]
  return _sides(total(_SECONDS), total(_FLOPS))


def _wanted(states: Sequence[torch_baseline.Found]) -> np.ndarray:
  """[M, D] torch's states."""
  return np.stack([one.z for one in states])


def _insert(
    comparison: Comparison,
    state: Any,
    targets: Targets,
    progress: Progress,
    *,
    z: np.ndarray | None = None,
) -> tuple[list[np.ndarray], float]:
  """Our insertion of the compared edits: the changes, and seconds.

  States are those of `targets` unless `z` has others.
  """
  setup, count = comparison.setup, comparison.count
  targets = jax.tree.map(lambda x: x[: comparison.states], targets)
  if z is not None:
    targets = targets.replace(z=z)
  plan = plan_batches(setup.model, comparison.edits)
  group = range(count) if setup.independent else None
  insert = functools.partial(
      closed_form.insert,
      setup.model.spec,
      setup.model.params,
      setup.recipe,
      state,
      EditBatch(comparison.edits, plan, group),
      targets=targets,
      active=np.ones(comparison.states, bool),
      progress=progress,
  )
  written, seconds = timed(insert)
  solved = written.deltas
  if not setup.independent:
    return list(map(_matrix, solved)), seconds
  one = lambda change, group: LowRankUpdate(*(x[group] for x in change))
  changes = [_matrix(one(x, group)) for group in range(count) for x in solved]
  return changes, seconds


def _matrix(change: Any) -> np.ndarray:
  """A change as [F, D] float64, whether it is factors or a matrix."""
  if isinstance(change, LowRankUpdate):
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
  """Compares targets.

  Args:
    targets: ours; the first are compared.
    found: torch's.

  Returns:
    How many states took equally many steps, and over these the cosine of z and
    of z - z0, each the least and the median (None where there are none).
  """
  steps = np.asarray([one.steps for one in found])
  mine = np.asarray(targets.steps[: len(found)])
  equal = np.flatnonzero(steps == mine)
  facts: dict[str, Any] = {
      'states': len(found),
      'equal_steps': len(equal),
      'steps': mine.tolist(),
      'torch_steps': steps.tolist(),
  }
  z, z0 = (np.stack([getattr(one, x) for one in found]) for x in ('z', 'z0'))
  ours, ours0 = targets.z[: len(found)], targets.z0[: len(found)]
  for name, both in {'z': (ours, z), 'd': (ours - ours0, z - z0)}.items():
    some = cosines(*both)[equal].tolist()
    facts[f'{name}_cosine_min'] = min(some, default=None)
    facts[f'{name}_cosine_median'] = statistics.median(some) if some else None
  return facts


def cosines(a: Any, b: Any) -> np.ndarray:
  """Cosines of the rows of two [M, D] arrays, in f64; 1 for two zeros."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  product = np.sum(a * b, axis=-1)
  return np.divide(product, size, out=np.ones_like(size), where=size > 0)
