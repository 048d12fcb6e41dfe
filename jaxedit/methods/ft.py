"""FT-L and FT-M: gradient descent on one linear map of a layer.

  min over W of  mean over edits of mean over target tokens of -log P(y_j)
  with  |W - W0| <= eps  entry by entry, if there is a box

FT-L scores all target tokens behind the prompt's last token; FT-M each behind
the prompt and the target tokens before it. Adam as in `finetune.loop`; entries
are clamped after each update, and its moments are not.

Axes: n edited layers.

Source: Zhu et al. 2020 (arXiv 2012.00363) for the box; the settings of the ROME
repository (Meng et al. 2022a, arXiv 2202.05262) and of EasyEdit; Zhang et al.
2024 (arXiv 2401.01286) for FT-M. Unlike the published code, the tokens of the
target do not include the one that a tokenizer puts before every text
(`train_begin` brings it back), and the box may be a share of the matrix.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp

from jaxedit.deltas import Dense
from jaxedit.methods.base import Editor, Method
from jaxedit.methods.finetune import (
    FinetuneConfig,
    Parts,
    State,
    finetune_editor,
)
from jaxedit.methods.settings import redefault, setting
from jaxedit.models.spec import ModelSpec, param_shapes, row
from jaxedit.numerics import einsum, wide
from jaxedit.types import Array


@flax.struct.dataclass
class _Map:
  """The change of a linear map while it is fitted: y + x W' + b'."""

  layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
  site: str = flax.struct.field(pytree_node=False)
  values: dict[str, Array]
  mergeable: ClassVar[bool] = True
  chooses: ClassVar[bool] = False

  def __call__(self, x, y, choice=(), prompt=None):
    del choice, prompt
    kernel = self.values['kernel']
    y = y + einsum('...f,fd->...d', x.astype(kernel.dtype), kernel)
    return y + self.values['bias'] if 'bias' in self.values else y


@dataclasses.dataclass(frozen=True)
class Map:
  """A linear map of some layers, fitted in full; values are new - old.

  See `finetune.loop.Fitted`; `fixed` is the largest change of an entry, [n] of
  each leaf, or None.
  """

  layers: tuple[int, ...]
  sites: tuple[str, ...]
  noisy: ClassVar[bool] = False

  def deltas(self, values: Any, fixed: Any, noise: Any) -> tuple[_Map, ...]:
    del fixed, noise
    return (_Map(self.layers, self.sites[0], values),)

  def penalty(self, values: Any) -> Array:
    return jnp.zeros([], values['kernel'].dtype)

  def project(self, values: Any, fixed: Any) -> Any:
    if fixed is None:
      return values
    side = lambda x, eps: eps.reshape(-1, *(1,) * (x.ndim - 1))
    clip = lambda x, eps: jnp.clip(x, -side(x, eps), side(x, eps))
    return jax.tree.map(clip, values, fixed)


@dataclasses.dataclass(frozen=True)
class FtConfig(FinetuneConfig):
  """Settings of FT-L; those of EasyEdit for Llama.

  Attributes:
    site: the linear map.
    bias: whether its bias is fitted too, where it has one.
    box: largest change of an entry, or None.
    box_unit: what `box` is measured in.
    train_begin: the token before every text is the first target.
  """

  scored: ClassVar[str] = 'prompt_last'
  site: str = setting('mlp/down', 'the linear map to fit', source='ROME')
  bias: bool = setting(True, 'fit its bias too, where it has one')
  box: float | None = setting(
      None,
      'largest change of an entry of the matrix; no limit unless given',
      low=0,
      exclusive=True,
  )
  box_unit: str = setting(
      'rms',
      'unit of --box: the root mean square of the entries of the matrix, or 1'
      ' (absolute, as published)',
      choices=('rms', 'absolute'),
  )
  train_begin: bool = False

  def fitted(self, spec: ModelSpec) -> Map:
    """What is fitted in a model."""
    del spec
    return Map(self.layers, (self.site,))


@dataclasses.dataclass(frozen=True)
class FtMConfig(FtConfig):
  """Settings of FT-M; those of FT-L but for its objective."""

  scored: ClassVar[str] = 'target'
  append_end: bool = redefault(FtConfig, 'append_end', True)


def ft(spec: ModelSpec, config: FtConfig) -> Editor:
  """Makes an editor; see `finetune.finetune_editor`.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. Its deltas are `Dense`.

  Raises:
    InputError: a layer or site that the model lacks.
  """
  names = ['kernel']
  if config.bias and f'layers/{config.site}/bias' in param_shapes(spec):
    names.append('bias')

  def start(model: Any, state: State) -> tuple[Any, Any]:
    del state
    leaves = model.params['layers']
    for part in config.site.split('/'):
      leaves = leaves[part]
    rows = row(spec.layers, len(leaves['kernel']), jnp.asarray(config.layers))
    old = {n: leaves[n][rows].astype(wide(leaves[n].dtype)) for n in names}
    box = None
    if config.box is not None:
      box = {n: _box(config, x) for n, x in old.items()}
    return jax.tree.map(jnp.zeros_like, old), box

  def deltas(values: Any) -> tuple[Dense, ...]:
    return tuple(
        Dense(config.layers, config.site, x, name) for name, x in values.items()
    )

  shapes = [param_shapes(spec).get(f'layers/{config.site}/{n}') for n in names]
  size = len(config.layers) * sum(math.prod(x[1:]) for x in shapes if x)
  parts = Parts(lambda model: (), start, deltas, size)
  return finetune_editor(spec, config, parts, trains_begin=config.train_begin)


def _box(config: FtConfig, old: Array) -> Array:
  """[n] largest change of an entry of a leaf [n, ...]."""
  rms = jnp.sqrt(jnp.mean(jnp.square(old), axis=tuple(range(1, old.ndim))))
  return config.box * (rms if config.box_unit == 'rms' else jnp.ones_like(rms))


_METHOD = Method(
    'ft_l',
    'fine-tunes one matrix on target tokens, all behind the prompt',
    FtConfig,
    ft,
    chunkable=False,
    contexts=False,
    encoders=True,
    parity={'easyedit': {'train_begin': True}},
    source='arXiv 2202.05262',
    small={'layers': (1,), 'fit_steps': 6, 'fit_rate': 1e-2, 'side_by_side': 2},
)
METHODS = (
    _METHOD,
    dataclasses.replace(
        _METHOD,
        name='ft_m',
        summary='fine-tunes one matrix on target tokens, each behind those before',
        config=FtMConfig,
        parity={'easyedit': {'append_end': False}},
        source='arXiv 2401.01286',
    ),
)
