"""How upstream checkpoints name and lay out the canonical leaves.

A family's key table maps a canonical leaf path to a `Source`: an upstream
tensor name, with the layer number as '{}', and the form that the weights have
there. Four invertible forms cover every family:

  same       the leaf itself (embeddings, norms, biases, GPT-2's Conv1D)
  transpose  [out, in], torch's nn.Linear
  thirds     q, k, v side by side on the last axis, [in, 3 * out] or [3 * out]
  heads      q, k, v of one head after another, [(N, 3, H), in] or [(N, 3, H)]

Axis letters: L layers, N heads, H head size. Arrays may be numpy or JAX. This
module reads no file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit.models import spec as spec_lib

_FUSED = ('thirds', 'heads')


@dataclasses.dataclass(frozen=True)
class Source:
  """Where upstream keeps one canonical leaf.

  Attributes:
    name: tensor name, the layer number as '{}'.
    form: 'same', 'transpose', 'thirds' or 'heads'.
    part: 0, 1, 2 for q, k, v in a fused tensor.
    upper: the name in the layers over an encoder, which are counted from 0 again.
  """

  name: str
  form: str = 'same'
  part: int = 0
  upper: str = ''

  @property
  def parts(self) -> int:
    """How many canonical leaves share the upstream tensor."""
    return 3 if self.form in _FUSED else 1

  def tensor(self, layer: int | None, encoder_layers: int = 0) -> str:
    """The tensor's name in a layer, of a model with so many of an encoder."""
    if self.upper and layer >= encoder_layers:
      return self.upper.format(layer - encoder_layers)
    return self.name.format(layer)


@dataclasses.dataclass(frozen=True)
class Slot:
  """One matrix or vector of the canonical tree.

  Attributes:
    path: canonical leaf path.
    layer: its layer, None for a leaf without layers.
    source: where it comes from.
    shape: shape without the layer axis.
  """

  path: str
  layer: int | None
  source: Source
  shape: tuple[int, ...]


def linear(name: str) -> Source:
  """A torch nn.Linear kernel, [out, in]."""
  return Source(name, 'transpose')


def norms(names: Mapping[str, str]) -> dict[str, Source]:
  """The rows of a key table for norms: leaf -> upstream module."""
  return {
      f'{leaf}/{ending}': Source(f'{name}.{suffix}')
      for leaf, name in names.items()
      for ending, suffix in (('scale', 'weight'), ('bias', 'bias'))
  }


def maps(
    names: Mapping[str, str], form: str = 'transpose'
) -> dict[str, Source]:
  """The rows of a key table for linear maps: leaf -> upstream module."""
  kernels = {
      f'{x}/kernel': Source(f'{n}.weight', form) for x, n in names.items()
  }
  return kernels | {f'{x}/bias': Source(f'{n}.bias') for x, n in names.items()}


def fused(name: str, form: str) -> dict[str, Source]:
  """The rows of a key table for one fused q, k, v map with its bias."""
  return {
      f'layers/attn/{leaf}/{ending}': Source(f'{name}.{suffix}', form, part)
      for part, leaf in enumerate('qkv')
      for ending, suffix in (('kernel', 'weight'), ('bias', 'bias'))
  }


def upstream_slots(
    spec: spec_lib.ModelSpec, table: Mapping[str, Source]
) -> dict[str, tuple[Slot, ...]]:
  """Lists the upstream tensors of a model and what each of them fills.

  Args:
    spec: the architecture; decides which rows of the table apply.
    table: canonical leaf path -> source.

  Returns:
    Upstream name, prefix included -> its slots in the order of their parts.
  """
  found: dict[str, list[Slot]] = {}
  for path, shape in spec_lib.param_shapes(spec).items():
    source = table[path]
    stacked = path.startswith('layers/')
    above = range(spec.layers - shape[0], spec.layers)
    for layer in above if stacked else (None,):
      name = source.tensor(layer, spec.encoder_layers)
      slot = Slot(path, layer, source, shape[1:] if stacked else shape)
      found.setdefault(name, []).append(slot)
  return {
      name: tuple(sorted(slots, key=lambda slot: slot.source.part))
      for name, slots in found.items()
  }


def upstream_shape(slot: Slot) -> tuple[int, ...]:
  """The shape that upstream's tensor must have to fill this slot."""
  form, shape = slot.source.form, slot.shape
  if form == 'transpose':
    return shape[::-1]
  if form == 'thirds':
    return (*shape[:-1], 3 * shape[-1])
  if form == 'heads':
    return (3 * shape[-1], *shape[:-1])
  return shape


def to_canonical(tensor: Any, source: Source, heads: int) -> Any:
  """Takes one canonical leaf out of an upstream tensor.

  Args:
    tensor: upstream's array.
    source: its form and the part wanted.
    heads: N, query heads, which 'heads' needs.

  Returns:
    The leaf without its layer axis, [in, out] for kernels.
  """
  if source.form == 'transpose':
    return tensor.T
  if source.form == 'thirds':
    size = tensor.shape[-1] // 3
    return tensor[..., source.part * size : (source.part + 1) * size]
  if source.form == 'heads':
    rest = tensor.shape[1:]
    by_head = tensor.reshape(heads, 3, -1, *rest)  # [N, 3, H, in]
    return by_head[:, source.part].reshape(-1, *rest).T
  return tensor


def to_upstream(
    leaves: Sequence[np.ndarray], source: Source, heads: int
) -> np.ndarray:
  """Puts canonical leaves back into upstream's layout, on the host.

  Args:
    leaves: every part of the upstream tensor, in order.
    source: the form; its own part number is not read.
    heads: N, query heads.

  Returns:
    Upstream's tensor, contiguous.
  """
  if source.form == 'transpose':
    tensor = leaves[0].T
  elif source.form == 'thirds':
    tensor = np.concatenate(leaves, axis=-1)
  elif source.form == 'heads':
    rest = leaves[0].shape[:-1]
    parts = [leaf.T.reshape(heads, -1, *rest) for leaf in leaves]
    tensor = np.stack(parts, axis=1).reshape(-1, *rest)
  else:
    tensor = leaves[0]
  return np.ascontiguousarray(tensor)


def find_name(name: str, prefix: str, present: Iterable[str]) -> str | None:
  """Finds a tensor under its full name or, in a base model, without prefix."""
  if name in present:
    return name
  short = name.removeprefix(prefix)
  return short if short in present else None


def is_ignored(name: str, prefix: str, ignored: Sequence[str]) -> bool:
  """Whether a tensor is one that a family knows and does not need.

  Args:
    name: upstream tensor name.
    prefix: the family's base model prefix; `ignored` is written with it.
    ignored: names with the layer number as '{}'.
  """
  template = re.sub(r'(?<![^.])\d+(?![^.])', '{}', name)
  return template in ignored or prefix + template in ignored
