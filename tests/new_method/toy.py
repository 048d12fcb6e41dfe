"""A method for tests: the anchor's embedding brings the target's into a layer.

It takes facts alone, and a file of factors that it reads by itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import Edited, LowRank
from jaxedit.methods.base import (
    Editor,
    EditResult,
    Info,
    Method,
    Need,
    check_layers,
)
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.settings import setting
from jaxedit.types import InputError


@dataclasses.dataclass(frozen=True)
class Factors(Need):
  """A factor a layer: of a JSON file, or 1."""

  path: str | None

  def check(self) -> None:
    if self.path and not pathlib.Path(self.path).exists():
      raise InputError(f'--toy_file={self.path}: no such file; leave it out')

  def provide(self, model: Any, seed: int, progress: Any) -> list[float]:
    if self.path:
      return json.loads(pathlib.Path(self.path).read_text())
    return [1] * model.spec.layers

  def source(self, value: Any) -> dict[str, Any]:
    return {'factors': value}


@dataclasses.dataclass(frozen=True)
class ToyConfig(MethodConfig):
  """Settings of every type."""

  layers: tuple[int, ...] = setting((1,), 'layers to edit, ascending')
  times: int = setting(2, 'how often it is added', low=1, flag='toy_times')
  rate: float = setting(0.5, 'its size', low=0, exclusive=True, flag='toy_rate')
  sign: str = setting(
      'plus', 'its sign', choices=('plus', 'minus'), flag='toy_sign'
  )
  parts: tuple[float, ...] = setting(
      (1.0, 0.5), 'sizes that are summed', high=2, flag='toy_parts'
  )
  whole: bool = setting(True, 'whether all of it', flag='toy_whole')
  file: str | None = setting(None, 'file of factors', flag='toy_file')

  @property
  def size(self) -> float:
    size = self.times * self.rate * sum(self.parts)
    return size * (1 if self.whole else 0.5) * (-1) ** (self.sign == 'minus')


def toy(spec: Any, config: ToyConfig) -> Editor:
  """Makes the editor."""
  check_layers(spec, config.layers)
  need = Factors(config.file)

  def init(model: Any, resources: Any) -> np.ndarray:
    return np.array(resources[need], np.float32)

  def edit(model: Any, state: Any, batch: Any, run: Any) -> EditResult:
    if not batch.encoded:
      info = Info(np.zeros(0, bool), {}, {'norm': []})
      return EditResult(Edited(), state, info)
    table = model.params['embed']['embedding']
    table = np.asarray(table, np.promote_types(table.dtype, np.float32))
    first = [(e.rows[0][e.anchors[0]], e.target[0]) for e in batch.encoded]
    key, value = (np.stack([table[i] for i in ids]) for ids in zip(*first))
    good = np.isfinite(key).all(1)
    key = np.where(good[:, None], key, 0)  # [E, D]
    info = Info(
        good,
        {'insert': 0.0},
        {'norm': np.linalg.norm(key, axis=1).tolist()},
        reason='' if good.any() else 'no embedding is finite',
    )
    wide = -(-spec.mlp_width // value.shape[1])
    value = config.size * np.tile(value, wide)[:, : spec.mlp_width]
    size = None
    if batch.group is not None:
      size = max(batch.group) + 1
      mine = np.arange(size)[:, None] == np.asarray(batch.group)
      key = key * mine[..., None]  # [size, E, D]
      value = np.broadcast_to(value, (size, *value.shape))
    key = np.stack([state[layer] * key for layer in config.layers])
    value = np.stack([value] * len(config.layers))
    delta = LowRank(
        config.layers,
        'mlp/up',
        *(jnp.asarray(x, table.dtype) for x in (key, value)),
    )
    return EditResult(Edited((delta,), size=size), state, info)

  return Editor((need,), init, edit)


METHOD = Method(
    'toy',
    'a toy',
    ToyConfig,
    toy,
    accepts=frozenset({'fact'}),
    chunkable=False,
    source='arXiv 0000.00000',
    small={'layers': (0, 1), 'toy_rate': 3.0},
)
