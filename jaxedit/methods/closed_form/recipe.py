"""A closed-form method as a row, and what its editor keeps.

A row says, in the terms of

  X = S K^T (r I + C S K^T)^-1 R

what S, r, K, C and R are: which output at the anchor is optimised and measured,
how keys are averaged over contexts, at which keys the change must be exact, how
the residual is spread over layers, and which other keys are held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.models.spec import ModelSpec
from jaxedit.solve.preconditioner import Preconditioner
from jaxedit.text.chunking import Chunking
from jaxedit.types import Array, InputError


def even(remaining: int) -> float:
  """Spread that divides what is left by the layers left (MEMIT)."""
  return 1 / remaining


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One closed-form method.

  Attributes:
    name: the method's name, for reports.
    layers: layers to edit, ascending; z belongs to the last.
    preconditioner: (gram [F, F] average second moment) -> metric S.
    value: settings of the value optimisation.
    ridge: r in the closed form.
    single_edit_ridge: r of a system of one row and none held; None for `ridge`.
    plain: weight of the bare prompt in the average of the keys; the other
      contexts share the rest evenly. None for the same as any other.
    constraint: keys at which the change is held to R, 'same' as those it is
      written along or 'bare' for those of the bare prompt.
    activations: their dtype while states are optimised and written, if wider
      than the weights; see `ModelSpec`.
    output: what z is: 'block' (the residual leaving the layer), 'mlp' (the
      MLP's output) or 'attn+mlp' (the MLP's, optimised with the attention's).
    measured: where the present state is read, on the 'bare' prompt or as the
      'mean' over contexts.
    layer_share: layers still to write, this one included -> share of the residual.
    shared_preconditioner: index of the layer whose metric serves all; None for its own.
    rect_density: share of a matrix's entries that are written, those of largest
      relative change (RECT); 1 for all.
    preserve_previous: keys of earlier batches are held as well, explicitly in the state.
    chunks: how long targets are cut; None for one state a target.
    preserved: with chunks, the other tokens of prompt and target are keys whose
      output stays as it is.
    site: the edited linear map.
    anchor: the edited token, 'subject_last' or 'prompt_last'.
  """

  name: str
  layers: tuple[int, ...]
  preconditioner: Callable[[Array], Preconditioner]
  value: targets_lib.TargetConfig
  ridge: float = 1.0
  single_edit_ridge: float | None = None
  plain: float | None = 0.5
  constraint: str = 'same'
  activations: str = 'float32'
  output: str = 'block'
  measured: str = 'plain'
  layer_share: Callable[[int], float] = even
  shared_preconditioner: int | None = None
  rect_density: float = 1.0
  preserve_previous: bool = False
  chunks: Chunking | None = None
  preserved: bool = True
  site: str = 'mlp/down'
  anchor: str = 'subject_last'

  @property
  def texts(self) -> bool:
    """Whether whole texts are run, for the keys that are held."""
    return self.chunks is not None and self.preserved

  def weight(self, contexts: int) -> float:
    """Weight of the bare prompt among that many contexts."""
    if contexts == 1:
      return 1.0
    return 1 / contexts if self.plain is None else self.plain

  def ridge_of(self, rows: int, preserved: int = 0) -> float:
    """r of a system with that many rows and held rows."""
    lone = rows == 1 and not preserved and self.single_edit_ridge is not None
    return self.single_edit_ridge if lone else self.ridge


class State(NamedTuple):
  """What a closed-form editor keeps, by edited layer.

  Attributes:
    preconditioners: factored metrics, f64.
    preserved_before: keys of earlier batches [P, F] that are held; None where the method
      does not remember.
  """

  preconditioners: tuple[Preconditioner, ...]
  preserved_before: tuple[np.ndarray, ...] | None = None


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
