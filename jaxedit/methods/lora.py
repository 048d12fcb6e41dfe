"""LoRA and AdaLoRA: low-rank adapters fitted to the targets of edits.

  LoRA     y + (alpha / r) B A x                  A random, B = 0 at first
  AdaLoRA  y + (alpha / (r + 1e-5)) B diag(e) A x    A, B random, e = 0 at first
           loss + 1/2 mean over all A, B of |A A^T - I| and |B^T B - I|

by Adam as in `finetune.loop`. While an adapter is fitted, entries of its input
are dropped at random. In a sequence the same adapter goes on, so that earlier
edits are not protected.

Here A is [r, in] and B lies transposed, [r, out].

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685); Zhang et al. 2023 (AdaLoRA, arXiv
2303.10512) as EasyEdit runs it: ranks are never dropped, and the rank is the
initial one of 12, whatever rank its settings give. Unlike there, maps that a
model fuses (GPT-2's q, k, v) have adapters of their own.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import LowRank
from jaxedit.methods.base import Editor, Method
from jaxedit.methods.finetune import (
    FinetuneConfig,
    Parts,
    State,
    finetune_editor,
)
from jaxedit.methods.finetune.loop import Noise
from jaxedit.methods.settings import redefault, setting
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.numerics import einsum, wide
from jaxedit.types import Array

_PENALTY = 0.5
_SCALE = 0.02  # of the entries of AdaLoRA's factors


@flax.struct.dataclass
class _Adapter:
  """Factors while they are fitted: y + drop(x) key^T value.

  Attributes:
    layers: static.
    site: static.
    key: [n, r, in].
    value: [n, r, out].
    noise: of this step, arrays [n, ...]; None where nothing is dropped.
    dropout: share of entries of x that are dropped, static.
  """

  layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
  site: str = flax.struct.field(pytree_node=False)
  key: Array
  value: Array
  noise: Noise | None
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  mergeable: ClassVar[bool] = True
  chooses: ClassVar[bool] = False

  def __call__(self, x, y, choice=(), prompt=None):
    del choice, prompt
    x = x.astype(wide(x.dtype))
    if self.noise is not None:
      x = jnp.where(self._kept(x), x / (1 - self.dropout), 0)
    x = einsum('...f,mf->...m', x, self.key)
    return y + einsum('...m,md->...d', x, self.value)

  def _kept(self, x: Array) -> Array:
    """[N, in] bool, which entries of x [1, N, in] are kept."""
    limit = int(2**32 * (1 - self.dropout))
    bits = lambda salt: jax.random.bits(
        jax.random.fold_in(self.noise.key, salt), x.shape[-1:], jnp.uint32
    )
    salt = self.noise.salt_of(x.shape[1])
    return jax.vmap(bits)(salt) < np.uint32(limit)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Adapters of linear maps; see `finetune.loop.Fitted`.

  Values are site -> {'a': [n, r, in], 'b': [n, r, out]}, with 'e' [n, r] of
  AdaLoRA.

  Attributes:
    layers: layers that have them.
    sites: linear maps that have them.
    scale: factor on their product.
    dropout: share of entries of the input that are dropped.
    orthogonal: whether A and B are held near orthogonal rows.
  """

  layers: tuple[int, ...]
  sites: tuple[str, ...]
  scale: float
  dropout: float
  orthogonal: bool

  @property
  def noisy(self) -> bool:
    return self.dropout > 0

  def factors(self, values: Any) -> tuple[Array, Array]:
    """Of one site: (key, value), their product the change of the map."""
    value = self.scale * values['b']
    if 'e' in values:
      value = value * values['e'][..., None]
    return values['a'], value

  def deltas(
      self, values: Any, fixed: Any, noise: Noise | None
  ) -> tuple[_Adapter, ...]:
    del fixed
    found, n = [], len(self.layers)
    for number, site in enumerate(self.sites):
      own = None
      if noise is not None:
        key = jax.random.fold_in(noise.key, number)
        each = lambda x: jnp.broadcast_to(x, (n, *x.shape))
        own = Noise(jax.random.split(key, n), *map(each, noise[1:]))
      key, value = self.factors(values[site])
      found.append(_Adapter(self.layers, site, key, value, own, self.dropout))
    return tuple(found)

  def penalty(self, values: Any) -> Array:
    if not self.orthogonal:
      return jnp.zeros([], jax.tree.leaves(values)[0].dtype)
    norms = []
    for one in values.values():
      for x in (one['a'], one['b']):
        gram = einsum('nri,nsi->nrs', x, x)
        off = gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)
        norms.append(jnp.sqrt(jnp.sum(jnp.square(off), axis=(1, 2))))
    return _PENALTY * jnp.mean(jnp.concatenate(norms))

  def project(self, values: Any, fixed: Any) -> Any:
    del fixed
    return values


@dataclasses.dataclass(frozen=True)
class LoraConfig(FinetuneConfig):
  """Settings of LoRA; those of EasyEdit for Llama.

  Attributes:
    layers: layers that have adapters; None for all.
    sites: linear maps that have them.
    rank: r.
    alpha: factor on the adapters, times r.
    dropout: share of entries of their input that are dropped.
    adapter_seed: of A, B and what is dropped.
  """

  by_token: ClassVar[bool] = True
  layers: tuple[int, ...] | None = setting(
      None, 'layers to edit, ascending', source='EasyEdit'
  )
  epochs: int = redefault(FinetuneConfig, 'epochs', 70)
  rate: float = redefault(FinetuneConfig, 'rate', 5e-3)
  stop_loss: float = redefault(FinetuneConfig, 'stop_loss', 0.0)
  sites: tuple[str, ...] = setting(
      ('attn/q', 'attn/v'), 'linear maps with adapters', source='EasyEdit'
  )
  rank: int = setting(8, 'rank of an adapter', source='EasyEdit', low=1)
  alpha: float = setting(
      32.0, 'factor on an adapter, times its rank', source='EasyEdit', low=0
  )
  dropout: float = setting(
      0.1,
      "share of an adapter's input that is dropped while it is fitted, below 1",
      source='EasyEdit',
      low=0,
      high=0.99,
  )
  adapter_seed: int = setting(0, 'seed of adapters and of dropout', low=0)

  @property
  def seed(self) -> int:
    """Seed of what is dropped."""
    return self.adapter_seed

  def fitted(self, spec: ModelSpec) -> Adapters:
    """What is fitted in a model."""
    del spec
    scale = self.alpha / self.rank
    return Adapters(self.layers, self.sites, scale, self.dropout, False)


@dataclasses.dataclass(frozen=True)
class AdaloraConfig(LoraConfig):
  """Settings of AdaLoRA; those of LoRA but for the rank."""

  rank: int = redefault(
      LoraConfig,
      'rank',
      12,
      source='EasyEdit, whose settings say 8 and are not read',
  )

  def fitted(self, spec: ModelSpec) -> Adapters:
    """What is fitted in a model."""
    del spec
    scale = self.alpha / (self.rank + 1e-5)
    return Adapters(self.layers, self.sites, scale, self.dropout, True)


def lora(spec: ModelSpec, config: LoraConfig) -> Editor:
  """Makes an editor; see `finetune.finetune_editor`.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. Its deltas are `LowRank`.

  Raises:
    InputError: a layer or site that the model lacks.
  """
  if config.layers is None:
    config = dataclasses.replace(config, layers=tuple(range(spec.layers)))
  fitted = config.fitted(spec)
  shapes = param_shapes(spec)

  def init(model: Any) -> Any:
    dtype = wide(model.params['embed']['embedding'].dtype)
    widths = {s: shapes[f'layers/{s}/kernel'][1:] for s in config.sites}
    values = {site: _first(config, site, w) for site, w in widths.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), values)

  def deltas(values: Any) -> tuple[LowRank, ...]:
    return tuple(
        LowRank(config.layers, site, *fitted.factors(values[site]))
        for site in config.sites
    )

  def start(model: Any, state: State) -> tuple[Any, Any]:
    del model
    return state.values, None

  widths = [sum(shapes.get(f'layers/{s}/kernel', ())[1:]) for s in config.sites]
  size = len(config.layers) * config.rank * sum(widths)
  parts = Parts(init, start, deltas, size, continues=True)
  return finetune_editor(spec, config, parts)


def _first(config: LoraConfig, site: str, widths: tuple[int, int]) -> Any:
  """The values of a site before the first update."""
  n, r, (fan_in, fan_out) = len(config.layers), config.rank, widths
  seed = (config.adapter_seed, zlib.crc32(site.encode()))
  rng = np.random.default_rng(seed)
  if not isinstance(config, AdaloraConfig):
    bound = fan_in**-0.5  # Kaiming's, for a slope of sqrt(5)
    a = rng.uniform(-bound, bound, (n, r, fan_in))
    return {'a': a, 'b': np.zeros((n, r, fan_out))}
  draw = lambda width: _SCALE * rng.standard_normal((n, r, width))
  return {'a': draw(fan_in), 'b': draw(fan_out), 'e': np.zeros((n, r))}


_SMALL = dict(layers=(1, 2), fit_steps=6, fit_rate=1e-2, rank=2, side_by_side=2)
_METHOD = Method(
    'lora',
    'low-rank adapters of attention, fitted to the targets',
    LoraConfig,
    lora,
    chunkable=False,
    contexts=False,
    encoders=True,
    source='arXiv 2106.09685',
    small=_SMALL,
)
METHODS = (
    _METHOD,
    dataclasses.replace(
        _METHOD,
        name='adalora',
        summary='LoRA as a singular value decomposition with an orthogonality'
        ' penalty',
        config=AdaloraConfig,
        source='arXiv 2303.10512',
    ),
)
