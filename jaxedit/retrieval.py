"""Embeds texts and finds the nearest of up to a million.

  e = encoder(text), |e| = 1;   search: the k entries with the largest q . e

Texts are packed end to end in batches of one token budget, those of like length
together, so that any number of texts compiles one program a length. A search is
a matrix product by blocks of entries with a running top k: memory is bounded by
a budget, whatever the number of entries.

Axes here: N texts, or entries; Q queries; B texts of a batch; T tokens; D width.

Not here: which encoder (`models.encoder`), what is done with what is found.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import io
from jaxedit.batching import buckets
from jaxedit.batching.packer import end_to_end
from jaxedit.models import encoder as encoder_lib
from jaxedit.models.encoder import Encoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import (
    Array,
    InputError,
    PackedSequences,
    Params,
    Progress,
    silent,
)

# Lengths of a batch, tokens.
_LADDER = buckets.octaves(2, 16)
TOKEN_BUDGET = 4096
# Bytes of a block of entries and its scores. On a CPU blocks of ten times the
# size take four times as long: their memory is new each time.
BLOCK_BYTES = 16 * 2**20
_QUERIES = 256  # queries a block


class EmbeddingCache:
  """Embeddings by content, in memory and, if wanted, in a file.

  Content is the text, the encoder's weights, its pooling and the tokens it
  reads. A text's vector may differ by rounding from one that is computed anew
  among other texts.
  """

  _KIND = 'jaxedit-embeddings-1'

  def __init__(self, path: str | os.PathLike[str] | None = None):
    """Opens a cache.

    Args:
      path: file to read and write, which need not exist; None for memory alone.

    Raises:
      InputError: the file is damaged.
    """
    self._path = None if path is None else pathlib.Path(path)
    self._found: dict[bytes, np.ndarray] = {}
    if self._path is not None and self._path.exists():
      tensors, record = io.read_tensors(self._path, self._KIND, 'delete it')
      for group in record['groups']:
        keys, rows = tensors[f'{group}/keys'], tensors[f'{group}/vectors']
        self._found |= {key.tobytes(): row for key, row in zip(keys, rows)}

  def __len__(self) -> int:
    return len(self._found)

  def get(self, key: bytes) -> np.ndarray | None:
    """Returns the [D] vector of a key of `content_key`, if it is there."""
    return self._found.get(key)

  def put(self, key: bytes, vector: np.ndarray) -> None:
    """Adds a [D] vector; `save` writes it."""
    self._found[key] = vector

  def save(self) -> None:
    """Writes the file, if there is one.

    Raises:
      InputError: it cannot be written.
    """
    if self._path is None:
      return
    groups: dict[str, list[bytes]] = {}
    for key, vector in self._found.items():
      groups.setdefault(str(len(vector)), []).append(key)
    tensors = {}
    for name, keys in groups.items():
      joined = np.frombuffer(b''.join(keys), np.uint8)
      tensors[f'{name}/keys'] = joined.reshape(len(keys), -1)
      tensors[f'{name}/vectors'] = np.stack([self._found[k] for k in keys])
    record = {'groups': list(groups)}
    io.write_tensors(self._path, tensors, kind=self._KIND, record=record)


def content_key(encoder: Encoder, text: str, pooling: str) -> bytes:
  """Hashes all that a text's embedding depends on."""
  about = f'{encoder.model.hash}|{pooling}|{encoder.max_tokens}|'
  return hashlib.sha256((about + text).encode('utf-8', 'replace')).digest()


def embed(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    pooling: str | None = None,
    cache: EmbeddingCache | None = None,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = silent,
) -> np.ndarray:
  """Embeds texts.

  Args:
    encoder: the encoder.
    texts: N texts; an empty one is embedded as such.
    pooling: 'mean' or 'cls'; None for the encoder's own.
    cache: finds and keeps vectors; the caller saves it.
    token_budget: tokens a batch.
    progress: is told texts.

  Returns:
    [N, D] f32, every row of length 1.

  Raises:
    InputError: there is no such pooling.
  """
  pooling = pooling or encoder.pooling
  if pooling not in encoder_lib.POOLINGS:
    raise InputError(
        f'pooling is {pooling!r}; use {" or ".join(encoder_lib.POOLINGS)}'
    )
  found = np.zeros((len(texts), encoder.model.spec.width), np.float32)
  waiting = list(range(len(texts)))
  if cache is not None:
    keys = [content_key(encoder, text, pooling) for text in texts]
    for i, key in enumerate(keys):
      if (vector := cache.get(key)) is not None:
        found[i] = vector
    waiting = [i for i in waiting if cache.get(keys[i]) is None]
  with progress('embed', len(texts), 'texts') as advance:
    advance(len(texts) - len(waiting))
    chosen = [texts[i] for i in waiting]
    for part, vectors in _embed_all(encoder, chosen, pooling, token_budget):
      for j, vector in zip(part, vectors):
        found[waiting[j]] = vector
        if cache is not None:
          cache.put(keys[waiting[j]], vector)
      advance(len(part))
  return found


def _embed_all(
    encoder: Encoder, texts: Sequence[str], pooling: str, token_budget: int
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields (which texts, their vectors [B, D]), the longest first."""
  if not texts:
    return
  model, most = encoder.model, encoder.max_tokens
  # The files bring a truncation and a padding of their own.
  ids = encoder.tokenizer(
      list(texts), truncation=True, max_length=most, padding=False
  )['input_ids']
  total = sum(map(len, ids))
  budget = max(min(token_budget, buckets.round_up(total, buckets.POWERS)), most)
  for chosen, shape in _cut([len(one) for one in ids], budget, most):
    length = np.zeros(shape[0], np.int32)
    length[: len(chosen)] = [len(ids[i]) for i in chosen]
    rows = end_to_end(
        np.zeros_like(length), length, width=shape[1], token_budget=budget
    )
    tokens = np.zeros((1, budget), np.int32)
    tokens[0, : length.sum()] = np.concatenate([ids[i] for i in chosen])
    vectors = _embed(model.spec, model.params, tokens, rows, pooling=pooling)
    yield chosen, np.asarray(vectors)[: len(chosen)]


def _cut(
    lengths: Sequence[int], budget: int, most: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
  """Divides texts into batches, the longest first: (which, (B, T)).

  Texts of half the length T fill the budget. Shorter ones come in a batch of
  their own, as attention needs B T T numbers.
  """
  order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  while order:
    width = min(buckets.round_up(lengths[order[0]], _LADDER), most)
    count = min(
        max(1, 2 * budget // width),
        buckets.round_up(len(lengths), buckets.POWERS),
    )
    taken, tokens = 0, 0
    while taken < min(count, len(order)):
      tokens += lengths[order[taken]]
      if tokens > budget:
        break
      taken += 1
    yield order[:taken], (count, width)
    order = order[taken:]


@functools.partial(jax.jit, static_argnames=('spec', 'pooling'))
def _embed(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    rows: PackedSequences,
    *,
    pooling: str,
) -> Array:
  """Embeds one batch: [B, D]."""
  h = encoder_lib.hidden_states(spec, params, tokens, rows)
  return encoder_lib.pool(h, rows, pooling)


def search(
    queries: Array | np.ndarray,
    entries: Array | np.ndarray,
    k: int,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the entries with the largest products with each query.

    scores = queries entries^T, k largest a row; of equal ones the lowest index

  Args:
    queries: [Q, D].
    entries: [N, D], on the host (a memory map too) or on a device.
    k: how many, 1 to N.
    block_bytes: memory of a block of entries and its scores, bytes.

  Returns:
    ([Q, k] f32 scores, descending; [Q, k] int32 indices of entries). A product
    that is not a number counts as minus infinity.

  Raises:
    InputError: the widths differ, or k is out of range.
  """
  (count, width), (total, other) = np.shape(queries), np.shape(entries)
  problems = []
  if width != other:
    problems.append(
        f'queries have {width} dimensions and entries {other}; embed both with'
        ' the same encoder'
    )
  if not 1 <= k <= total:
    problems.append(
        f'k is {k}; it must be from 1 to the {total} entries that there are'
    )
  InputError.raise_for(problems)
  rows = min(_QUERIES, buckets.round_up(max(count, 1), buckets.POWERS))
  block = max(k, block_bytes // (4 * (width + rows)))
  block = min(block, total)
  scores = np.empty((count, k), np.float32)
  indices = np.empty((count, k), np.int32)
  parts = [slice(i, min(i + rows, count)) for i in range(0, count, rows)]
  padded = []
  for part in parts:
    asked = np.zeros((rows, width), np.float32)
    asked[: part.stop - part.start] = queries[part]
    padded.append(jnp.asarray(asked))
  nothing = jnp.zeros((rows, 0)), jnp.zeros((rows, 0), jnp.int32)
  best = [nothing] * len(parts)
  for first in range(0, total, block):
    # The last block overlaps the one before it, so that all have one shape.
    start = min(first, total - block)
    here = jnp.asarray(entries[start : start + block], jnp.float32)
    best = [
        _merge(asked, here, *found, first, start, k=k)
        for asked, found in zip(padded, best)
    ]
  for part, found in zip(parts, best):
    size = part.stop - part.start
    scores[part], indices[part] = (np.asarray(x)[:size] for x in found)
  return scores, indices


@functools.partial(jax.jit, static_argnames='k')
def _merge(
    queries: Array,
    block: Array,
    scores: Array,
    indices: Array,
    first: Array | int,
    start: Array | int,
    *,
    k: int,
) -> tuple[Array, Array]:
  """Takes a block of entries, those from `first` on, into the top k."""
  index = start + jnp.arange(block.shape[0], dtype=jnp.int32)
  new = jnp.einsum('qd,nd->qn', queries, block, precision='highest')
  new = jnp.where(jnp.isnan(new) | (index < first), -jnp.inf, new)
  top, at = jax.lax.top_k(new, k)
  # What was found before has the lower indices, and comes first where equal.
  joined = jnp.concatenate([scores, top], axis=1)
  top, place = jax.lax.top_k(joined, k)
  known = jnp.concatenate([indices, index[at]], axis=1)
  return top, jnp.take_along_axis(known, place, axis=1)
