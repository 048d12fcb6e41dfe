"""A closed-form method as plain data, and the state of its editor.

A recipe defines S, r, K, C and R of

  X = S K^T (r I + C S K^T)^-1 R :

which output at the anchor is optimised and measured, how keys are averaged over
contexts, the constraint keys, each layer's share of the residual, and which
other keys are preserved.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Self

import numpy as np

from jaxedit.methods.config import TargetedConfig
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import Factored, Preconditioner
from jaxedit.targets import TargetConfig
from jaxedit.text.chunking import Chunking

ANCHORS = ('subject_last', 'prompt_last')
POSTS = ('none', 'rect', 'prune')
RECT_DENSITY = 0.4  # published
# The settings of AnyEdit's code for all its methods, on long texts.
TEXT_LAYERS = (4, 5, 6, 7, 8)
TEXT_TARGET = TargetConfig(
    steps=25, rate=0.5, decay=1e-3, clamp=4.0, kl=0.0, threshold=1e-2
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One closed-form method; hashable and comparable.

  Attributes:
    name: the method's name, for reports.
    layers: layers to edit, ascending; z belongs to the last.
    preconditioner: S, before it is factored.
    target: settings of the optimisation of z.
    ridge: r in the closed form.
    single_edit_ridge: r of a system of one pair and nothing preserved; None for
      `ridge`.
    plain_weight: weight of the plain prompt in the average of the keys; the
      other contexts share the rest evenly. None for the same as any other.
    constraint: keys at which the change of the output is to be R: 'same' for
      the keys K, 'plain' for those of the plain prompt.
    activations: dtype of activations while targets are optimised and inserted,
      if wider than the weights; see `ModelSpec`.
    output: what z is: 'block' (the residual leaving the layer), 'mlp' (the
      MLP's output) or 'attn+mlp' (the MLP's, optimised with the attention's).
    measured: where the present state is read, on the 'plain' prompt or as the
      'mean' over contexts.
    layer_share: share of the residual that a layer inserts: 'even' (1 / layers
      left), 'root' (1 / sqrt(layers left)) or a fixed number.
    targets_at: where targets are: 'last', of the last layer; 'first', replayed
      from there to the others (`replay`); 'each', optimised at every layer in
      turn on the model with the layers below written (`boundary`). Other than
      'last', each layer inserts its whole residual.
    shared_preconditioner: index of the layer whose S all layers use; None for
      each its own.
    rect_density: share of a matrix's entries that are changed, those of largest
      relative change (RECT); 1 for all.
    prune: whether singular values of the change of a whole sequence are lowered
      (PRUNE).
    preserve_previous: preserve the keys of earlier batches, kept in the state.
    chunks: how long target texts are cut; None for one target an edit.
    preserved: with chunks, preserve the keys of all other tokens of prompt and
      target text.
    site: the edited linear map.
    anchor: the edited token, 'subject_last' or 'prompt_last'.
  """

  name: str
  layers: tuple[int, ...]
  preconditioner: Preconditioner
  target: TargetConfig
  ridge: float = 1.0
  single_edit_ridge: float | None = None
  plain_weight: float | None = 0.5
  constraint: str = 'same'
  activations: str = 'float32'
  output: str = 'block'
  measured: str = 'plain'
  layer_share: str | float = 'even'
  targets_at: str = 'last'
  shared_preconditioner: int | None = None
  rect_density: float = 1.0
  prune: bool = False
  preserve_previous: bool = False
  chunks: Chunking | None = None
  preserved: bool = True
  site: str = 'mlp/down'
  anchor: str = 'subject_last'

  @property
  def texts(self) -> bool:
    """Whether whole texts are run, for their preserved keys."""
    return self.chunks is not None and self.preserved

  @property
  def target_layer(self) -> int:
    """The layer at which targets are optimised."""
    return self.layers[0 if self.targets_at == 'first' else -1]

  def share(self, remaining: int) -> float:
    """Share of the residual of a layer; it is one of the `remaining` ones."""
    if self.layer_share == 'even':
      return 1 / remaining
    if self.layer_share == 'root':
      return 1 / math.sqrt(remaining)
    return self.layer_share

  def weight(self, contexts: int) -> float:
    """Weight of the plain prompt among `contexts` contexts."""
    if contexts == 1:
      return 1.0
    return 1 / contexts if self.plain_weight is None else self.plain_weight

  def ridge_of(self, pairs: int, preserved: int = 0) -> float:
    """r of a system of `pairs` pairs and `preserved` preserved keys."""
    single = pairs == 1 and not preserved
    if single and self.single_edit_ridge is not None:
      return self.single_edit_ridge
    return self.ridge


class State(NamedTuple):
  """State of a closed-form editor, by edited layer.

  Attributes:
    preconditioners: factored, f64.
    previous: [r, r] f64 Gram matrices of the whitened keys of earlier batches;
      None where the method does not preserve them.
  """

  preconditioners: tuple[Factored, ...]
  previous: tuple[np.ndarray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ClosedFormConfig(TargetedConfig):
  """Settings of all closed forms; each method adds `recipe`, itself as data.

  Attributes:
    post: what is done to a change besides.
  """

  post: str = setting(
      'none',
      'what is done to a change: rect keeps the entries of largest relative'
      f' change ({RECT_DENSITY} of them), prune lowers singular values above the'
      " kernel's own, once after all batches",
      choices=POSTS,
  )

  def recipe(self) -> Recipe:
    """Returns the method as data."""
    raise NotImplementedError

  @property
  def output(self) -> str:
    """What z is."""
    return self.recipe().output

  def objective(self) -> dict[str, Any]:
    """See `MethodConfig.objective`."""
    recipe = self.recipe()
    # Of several targets an edit, those of the first layer are kept.
    first = recipe.targets_at != 'last'
    layer = recipe.layers[0] if first else recipe.target_layer
    return {**super().objective(), 'layer': int(layer)}

  def label(self, name: str) -> str:
    """See `MethodConfig.label`."""
    del name
    return self.recipe().name

  def described(self) -> dict[str, Any]:
    """All that numbers depend on, as plain JSON types."""
    recipe = self.recipe()
    names = ('site', 'output', 'ridge', 'single_edit_ridge')
    return super().described() | {n: getattr(recipe, n) for n in names}

  def for_texts(self, chunked: bool) -> Self:
    """AnyEdit's settings for long texts."""
    layers = TEXT_LAYERS if len(self.layers) > 1 else self.layers
    # When PMET stops is its own rule.
    target = TEXT_TARGET._replace(argmax_stop=self.target.argmax_stop)
    return dataclasses.replace(
        super().for_texts(chunked), layers=layers, target=target
    )

  def _recipe(self, name: str, **terms: Any) -> Recipe:
    """The common settings, with those of a method."""
    return Recipe(
        name=super().label(name),
        **{
            'layers': self.layers,
            'target': self.target,
            'activations': self.activations,
            'rect_density': RECT_DENSITY if self.post == 'rect' else 1.0,
            'prune': self.post == 'prune',
            'chunks': self.chunks,
            'anchor': self.anchor,
            **terms,
        },
    )
