"""What tests of editors share: data that editors need, given targets, compile
counts.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxedit.methods import base
from jaxedit.methods.base import Editor, Need
from jaxedit.methods.finetune.editor import SpecialToken
from jaxedit.models.spec import ModelSpec
from jaxedit.testing import facts
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Targets, silent

PAD = 7


def resources(
    editor: Editor, spec: ModelSpec, *, seed: int = 0, scale: float = 1.0
) -> Mapping[Need, Any]:
  """Makes all that an editor needs.

  Args:
    editor: the editor.
    spec: the architecture.
    seed: of numpy's generator.
    scale: of second moments, see `facts.random_moments`.

  Returns:
    What `Editor.init` takes.
  """

  def provide(need: Need) -> Any:
    if isinstance(need, base.Moments):
      return facts.random_moments(spec, need.layers, seed=seed, scale=scale)
    if isinstance(need, base.PreservedTexts):
      return preserved(seed)
    if isinstance(need, base.PadToken):
      return PAD
    if isinstance(need, SpecialToken):
      return PAD
    if isinstance(need, base.Tokenizer):
      return None  # edits are ids
    return need.provide(types.SimpleNamespace(spec=spec), seed, silent)

  return {need: provide(need) for need in editor.needs}


def preserved(seed: int = 0) -> list[np.ndarray]:
  """Random texts whose outputs shall stay."""
  rng = np.random.default_rng(seed)
  return [rng.integers(2, 90, n).astype(np.int32) for n in (5, 12, 9)]


class GivenTargets:
  """A `targets.TargetCache` that has targets of any edit: z0 and a random step.

  Editors that are given it optimise nothing.
  """

  exact = False

  def __init__(
      self, states: Callable[[EncodedEdit], np.ndarray], scale: float = 0.5
  ):
    """Makes the cache.

    Args:
      states: edit -> [K, D] its present states z0.
      scale: standard deviation of an entry of z - z0.
    """
    self._states, self._scale = states, scale

  def get(self, edit: EncodedEdit) -> Targets:
    z0 = self._states(edit)
    rng = np.random.default_rng(int(edit.rows[0].sum()))
    z = z0 + (self._scale * rng.standard_normal(z0.shape)).astype(z0.dtype)
    none = np.zeros(len(z), z.dtype)
    fine = np.isfinite(z).all(1)
    return Targets(z, z0, none, none, none.astype(np.int32), fine)

  def put(self, edit: EncodedEdit, targets: Targets) -> None:
    raise AssertionError('targets were optimised')


class _Compiles:
  """A listener that counts compiled programs."""

  count = 0

  def __call__(self, event: str, seconds: float, **details: Any) -> None:
    del seconds, details
    self.count += event == '/jax/core/compile/backend_compile_duration'


@contextlib.contextmanager
def compiles() -> Iterator[_Compiles]:
  """Counts what is compiled while open, in `count` of what it yields."""
  found = _Compiles()
  jax.monitoring.register_event_duration_secs_listener(found)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(found)


def gap(got: np.ndarray, want: np.ndarray) -> float:
  """Relative difference in the Frobenius norm."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_targets(self, got, want, tolerance=1e-5):
  """A method of tests: compares targets with those of a naive oracle.

  Args:
    self: the test.
    got: `Targets` of each edit.
    want: what the oracle found, a list of stages an edit.
    tolerance: relative.
  """
  self.assertLen(got, len(want))
  for targets, stages in zip(got, want):
    self.assertEqual(targets.steps.tolist(), [len(f.losses) for f in stages])
    self.assertTrue(targets.finite.all())
    for k, f in enumerate(stages):
      error = np.linalg.norm(targets.z[k] - f.z) / np.linalg.norm(f.z)
      self.assertLess(error, tolerance)
      # The change is small beside the state: hold it to a bound of its own.
      moved = np.linalg.norm(f.z - f.z0)
      error = np.linalg.norm((targets.z - targets.z0)[k] - (f.z - f.z0))
      self.assertLessEqual(error, 10 * tolerance * moved)
      error = np.linalg.norm(targets.z0[k] - f.z0) / np.linalg.norm(f.z0)
      self.assertLess(error, tolerance)
      rtol = 2 * tolerance
      np.testing.assert_allclose(targets.loss[k], f.loss, rtol=rtol)
      np.testing.assert_allclose(targets.likelihood[k], f.likelihood, rtol=rtol)
