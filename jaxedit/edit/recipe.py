"""A closed-form method as a row, and what its editor keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxedit import values
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.metric import Metric
from jaxedit.types import Array, InputError


def even(remaining: int) -> float:
  """Spread that divides what is left by the layers left (MEMIT)."""
  return 1 / remaining


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One closed-form method.

  Attributes:
    name: the method's name, for reports.
    layers: layers to edit, ascending; z is the output of the last.
    metric: (gram [F, F] average second moment) -> metric S.
    value: settings of the value optimisation.
    ridge: r in the closed form.
    bare: weight of the bare prompt in the average of the keys; the other
      contexts share the rest evenly.
    spread: layers still to write, this one included -> share of the residual.
    site: the edited linear map.
    anchor: the edited token, 'subject_last' or 'prompt_last'.
  """

  name: str
  layers: tuple[int, ...]
  metric: Callable[[Array], Metric]
  value: values.Schedule
  ridge: float = 1.0
  bare: float = 0.5
  spread: Callable[[int], float] = even
  site: str = 'mlp/down'
  anchor: str = 'subject_last'


class State(NamedTuple):
  """What a closed-form editor keeps: one metric an edited layer, in f64."""

  metrics: tuple[Metric, ...]


def check_layers(spec: ModelSpec, layers: Sequence[int]) -> None:
  """Refuses layers that a model does not have.

  Args:
    spec: the architecture.
    layers: layers to edit.

  Raises:
    InputError: empty, out of range, repeated or not ascending.
  """
  wrong = [layer for layer in layers if not 0 <= layer < spec.layers]
  if wrong or not layers:
    raise InputError(
        f'layers {list(layers)}: the model has layers 0 to {spec.layers - 1};'
        ' choose from these'
    )
  if list(layers) != sorted(set(layers)):
    raise InputError(
        f'layers {list(layers)}: list each once, in ascending order'
    )
