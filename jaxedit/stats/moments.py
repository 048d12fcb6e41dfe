"""Streaming second moments of the keys of a linear map.

  C^l = (1 / n) sum over n tokens of k k^T      k [F] the input of the map in
                                                layer l, uncentred

One pass over packed text serves all layers asked for. It stops at the key of
the last of them: what follows in that layer is never computed. Products are f32
at precision 'highest'; a few batches are summed in f32 on the device and then
merged in f64 on the host, so that rounding does not grow with the corpus. Only
the upper block triangle of the symmetric product is formed.

A run can be interrupted: its sums go to a file now and then, and where it is
stopped, and the next run continues with the same bits.

Axes as in `jaxedit.types`: n layers, F key width, B sequences, T tokens.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 3.1. We deviate in
collecting every layer in one pass, in packing texts, in the f64 merge, and in
counting tokens (not documents) towards the size of a sample.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching import packer
from jaxedit.models import decoder
from jaxedit.models.loading import require_decoder
from jaxedit.models.sharding import over_batch
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.stats import accumulate
from jaxedit.stats.published import load_npz
from jaxedit.stats.storage import Moments, load, save
from jaxedit.types import (
    PADDING,
    Array,
    InputError,
    Params,
    Progress,
    Tap,
    TokenLayout,
    silent,
)

__all__ = ['Moments', 'Source', 'collect', 'gram', 'load', 'load_npz', 'save']

# Tokens a key dimension of a default sample: 20 F tokens. Fewer than F leave C
# singular; beyond about 20 F its inverse changes little.
TOKENS_PER_DIMENSION = 20
# Block rows of the triangular product: 8 do 56% of the full product.
_BLOCKS = 8
# Columns that are mirrored at one time: one by one they are a cache miss a number.
_MIRRORED = 512


class Source(NamedTuple):
  """Where keys come from, for the provenance.

  Attributes:
    model: hash of the model.
    corpus: name of the corpus.
    seed: seed of the order of its documents, or of sampling.
  """

  model: str
  corpus: str
  seed: int


def gram(keys: Array, real: Array) -> Array:
  """Sums k k^T over real tokens, in f32 at precision 'highest'.

  Args:
    keys: [B, T, F].
    real: [B, T] bool, False at padding.

  Returns:
    [F, F] f32 or wider; the upper triangle is meant, what lies below it is
    zero in part.
  """
  size = keys.shape[-1]
  keys = jnp.where(real[..., None], keys, 0).reshape(-1, size)
  keys = keys.astype(jnp.promote_types(keys.dtype, jnp.float32))
  step = -(-size // _BLOCKS)
  rows = []
  for first in range(0, size, step):
    block = jax.lax.dot_general(
        keys[:, first : first + step],
        keys[:, first:],
        (((0,), (0,)), ((), ())),
        precision='highest',
    )
    rows.append(jnp.pad(block, ((0, 0), (first, 0))))
  return jnp.concatenate(rows)


@functools.partial(
    jax.jit, static_argnames=('spec', 'layers', 'site'), donate_argnames='total'
)
def add_batch(
    total: Array,
    spec: ModelSpec,
    params: Params,
    batch: packer.Row,
    *,
    layers: tuple[int, ...],
    site: str,
) -> Array:
  """Adds the Gram matrices of one batch to running sums.

  Args:
    total: [n, F, F] f32 or wider; donated.
    spec: the architecture.
    params: canonical parameters.
    batch: arrays [B, T].
    layers: ascending layers.
    site: path of the linear map.

  Returns:
    [n, F, F] sums, see `gram`.
  """
  layout = TokenLayout(batch.positions, batch.segment_ids)
  read = functools.partial(gram, real=batch.segment_ids != PADDING)
  h = decoder.embed(spec, params, batch.tokens, layout)
  *before, last = layers
  tap = Tap(site, tuple(before), read)
  h, (sums,) = decoder.run_layers(
      spec, params, h, layout, start=0, stop=last, taps=(tap,)
  )
  # Outside the loop over layers nothing needs what follows the last key, so the
  # compiler drops it.
  _, seen = decoder.run_layer(spec, params, h, layout, layer=last)
  final = read(seen[site])[None]
  total += final if sums is None else jnp.concatenate([sums, final])
  # Divided by rows: a device sums its share of the batch and then gets its part
  # of the result alone.
  return over_batch(params, total, 1)


def key_width(spec: ModelSpec, site: str) -> int:
  """Returns the input width of a linear map inside a layer.

  Args:
    spec: the architecture.
    site: path, e.g. 'mlp/down'.

  Raises:
    InputError: the model has no such map.
  """
  head, tail = 'layers/', '/kernel'
  widths = {
      path[len(head) : -len(tail)]: shape[1]
      for path, shape in param_shapes(spec).items()
      if path.startswith(head) and path.endswith(tail)
  }
  if site not in widths:
    raise InputError(
        f'the model has no linear map {site!r} in a layer; it has'
        f' {", ".join(widths)}'
    )
  return widths[site]


def check(
    spec: ModelSpec, layers: Sequence[int], sizes: Mapping[str, int]
) -> None:
  """Refuses settings that cannot be.

  Args:
    spec: the architecture.
    layers: layers to collect.
    sizes: name -> number that must be positive.

  Raises:
    InputError: all faults at once.
  """
  require_decoder(spec, 'the second moment of keys')
  problems = [
      f'{name} is {size}; it must be at least 1'
      for name, size in sizes.items()
      if size < 1
  ]
  outside = [n for n in layers if not 0 <= n < spec.layers]
  if outside or not layers or len(set(layers)) != len(layers):
    problems.append(
        f'layers {list(layers)} must name one or more different layers between'
        f' 0 and {spec.layers - 1}'
    )
  InputError.raise_for(problems)


def _first_width(
    spec: ModelSpec, rows: Iterable[packer.Row]
) -> tuple[int, Iterator[packer.Row]]:
  """Reads the width off the first row; returns all rows again.

  Raises:
    InputError: there is no row, or rows are wider than the model allows.
  """
  rows = iter(rows)
  first = next(rows, None)
  if first is None:
    raise InputError('the corpus has no text: nothing to collect moments from')
  width = first.tokens.size
  if width > spec.max_positions:
    raise InputError(
        f'rows of {width} tokens are longer than the model allows; pack rows of'
        f' at most {spec.max_positions}'
    )
  return width, itertools.chain([first], rows)


def _mirror(sums: np.ndarray) -> None:
  """Makes [n, F, F] exactly symmetric from the upper triangles, in place."""
  for matrix in sums:
    for i in range(0, len(matrix), _MIRRORED):
      block = slice(i, i + _MIRRORED)
      matrix[i + _MIRRORED :, block] = matrix[block, i + _MIRRORED :].T
      square = matrix[block, block]
      square[...] = np.triu(square) + np.triu(square, 1).T


def collect(
    spec: ModelSpec,
    params: Params,
    rows: Iterable[packer.Row],
    *,
    layers: Sequence[int],
    source: Source,
    site: str = 'mlp/down',
    cap: int | None = None,
    batch_rows: int = 4,
    merge_batches: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> Moments:
  """Collects second moments in one pass.

  Args:
    spec: the architecture.
    params: canonical parameters.
    rows: packed text, see `packer.first_fit`; the same for the same source.
    layers: layers to collect.
    source: for the provenance.
    site: linear map whose input is the key.
    cap: tokens after which no further row is taken; None for 20 F.
    batch_rows: rows computed at once (B); on a mesh of devices a multiple of
      those that divide batches.
    merge_batches: batches summed in f32 before they are merged in f64.
    checkpoint: file for the sums so far; one left by
      the same run is continued. It stays: who has saved the moments
      removes it.
    checkpoint_seconds: least time between two checkpoints, seconds; see
      `accumulate.Store`.
    progress: is told tokens.

  Returns:
    The moments, `layers` ascending. `count` is the tokens taken: less than the
    cap where the corpus ended, up to a row more elsewhere.

  Raises:
    InputError: settings or layers that cannot be, no text, a checkpoint of
      another run, or keys that are not finite.
    Stopped: by `progress`; the sums are saved.
  """
  size = key_width(spec, site)
  cap = TOKENS_PER_DIMENSION * size if cap is None else cap
  sizes = {'cap': cap, 'batch_rows': batch_rows, 'merge_batches': merge_batches}
  check(spec, layers, sizes)
  layers = tuple(sorted(layers))
  width, rows = _first_width(spec, rows)
  dtype = params['embed']['embedding'].dtype
  identity = {
      **source._asdict(),
      'dtype': dtype.name,
      'layers': list(layers),
      'site': site,
      'width': width,
  }
  shape = (len(layers), size, size)
  zero = accumulate.Total(np.zeros(shape, np.float64))
  store = accumulate.Store(
      checkpoint, checkpoint_seconds, {**identity, **sizes}
  )

  def add(part: Array | None, rows: Sequence[packer.Row]) -> Array:
    if part is None:
      part = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
      part = over_batch(params, part, 1)
    batch = packer.stack(rows, batch_rows)
    part = add_batch(part, spec, params, batch, layers=layers, site=site)
    return part.block_until_ready()

  with progress('second moments', cap, 'token') as advance:
    total = accumulate.accumulate(
        zero,
        accumulate.batches_of(rows, cap, batch_rows),
        add,
        store,
        merge=merge_batches,
        advance=advance,
    )
  return _average(total, layers, identity)


def _average(
    total: accumulate.Total,
    layers: tuple[int, ...],
    identity: Mapping[str, Any],
) -> Moments:
  """Divides the sums by the count; refuses sums that are not finite."""
  bad = [n for n, g in zip(layers, total.gram) if not np.all(np.isfinite(g))]
  if bad:
    raise InputError(
        f'layers {bad} of the model have keys that are not finite on this'
        ' corpus: check its weights, or load it in float32'
    )
  _mirror(total.gram)
  np.divide(total.gram, total.tokens, out=total.gram)
  provenance = {
      **identity,
      'corpus_sha256': total.digest,
      'tokens': total.tokens,
      'texts': total.texts,
      'padding_share': 1 - total.tokens / (total.rows * identity['width']),
  }
  return Moments(layers, total.gram, total.tokens, provenance)
