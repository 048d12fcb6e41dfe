"""What the settings of every method answer for themselves.

A run asks nothing else of them, so a method is one file: a frozen dataclass that
extends `MethodConfig`, or `TargetedConfig` where hidden states are optimised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jaxedit.methods.settings import setting
from jaxedit.targets import TargetConfig
from jaxedit.text.chunking import Chunking


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  """Settings of a method; what is a flag too is made by `setting`.

  Attributes:
    chunks: how long targets are cut (AnyEdit); None for one target an edit.
    anchor: the token of a fact's prompt that edits stand at, 'subject_last' or
      'prompt_last'.
  """

  chunks: Chunking | None = None
  anchor: str = 'subject_last'

  @property
  def even_batches(self) -> bool:
    """Whether all batches must have the same number of edits."""
    return False

  @property
  def preserves_edits(self) -> bool:
    """Whether a batch leaves the edits of earlier batches as they are."""
    return False

  def label(self, name: str) -> str:
    """The method's id, with what was combined with it."""
    return name if self.chunks is None else f'{name}+anyedit'

  def described(self) -> dict[str, Any]:
    """All that numbers depend on, as plain JSON types."""
    found = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, tuple) and hasattr(value, '_asdict'):
        value = value._asdict()
      name = 'value' if field.name == 'target' else field.name
      found[name] = list(value) if isinstance(value, tuple) else value
    return found

  def for_texts(self, chunked: bool) -> Self:
    """The published settings for long texts, of those for facts.

    Args:
      chunked: whether AnyEdit will cut them.
    """
    del chunked
    return dataclasses.replace(self, anchor='prompt_last')

  def for_batches(self, edits: int) -> Self:
    """The settings for batches of so many edits."""
    del edits
    return self

  def errors(self, dtype: str) -> list[str]:
    """Says why weights of a dtype cannot be edited so, in messages by setting."""
    del dtype
    return []

  def objective(self) -> Mapping[str, Any] | None:
    """What optimised hidden states depend on, beside model and edits.

    Returns:
      Plain JSON types; None where no hidden states are optimised.
    """
    return None


@dataclasses.dataclass(frozen=True)
class TargetedConfig(MethodConfig):
  """Settings of a method that optimises hidden states and writes them.

  Attributes:
    layers: layers to edit, ascending; the hidden state z belongs to the last.
    target: settings of the optimisation of z.
    activations: dtype of activations meanwhile, if wider than the weights; see
      `ModelSpec`.
  """

  layers: tuple[int, ...] = setting(
      (3, 4, 5, 6, 7, 8), 'layers to edit, ascending', source='GPT-J'
  )
  target: TargetConfig = TargetConfig()
  activations: str = setting(
      'float32',
      'dtype of activations while targets are optimised, where weights are'
      ' bfloat16: float32 gives the targets of float32 arithmetic, on an'
      ' accelerator by two products of bfloat16 for each; bfloat16 rounds them'
      ' and takes one',
      choices=('float32', 'bfloat16'),
  )

  @property
  def output(self) -> str:
    """What z is, see `targets.Objective`."""
    return 'block'

  def errors(self, dtype: str) -> list[str]:
    """See `MethodConfig.errors`."""
    if self.activations == 'float32' or dtype != 'float32':
      return []
    return [
        f'activations={self.activations} rounds nothing where weights are'
        ' float32: give --dtype=bfloat16 too, or leave it out'
    ]

  def objective(self) -> dict[str, Any]:
    """See `MethodConfig.objective`."""
    return {
        'layer': int(self.layers[-1]),
        'activations': self.activations,
        'output': self.output,
        'value': self.target._asdict(),
    }
