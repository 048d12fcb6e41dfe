"""Text encoders: BERT-like models on the blocks of the decoders.

  h_0 = LN(word + position + type);  h_L = the blocks, every token seeing all
  e   = pool(h_L) / |pool(h_L)|,     pool: the mean over tokens, or the first one

so that the cosine of two texts is e . e'. The folder of a sentence encoder says
how it pools and how many tokens of a text it takes; without a word the mean and
256 tokens, [CLS] and [SEP] among them: two texts that part later are the same
to it.

Axis letters as in `jaxedit.types`.

Sources: Devlin et al. 2019 (arXiv 1810.04805) for the encoder; Reimers and
Gurevych 2019 (arXiv 1908.10084) for pooling.

Not here: batches of texts (`jaxedit.retrieval`), training, pickles.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit import io
from jaxedit.models import decoder, families, loading, packing
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.blocks import Norm
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import one_device
from jaxedit.types import (
    Array,
    InputError,
    PackedSequences,
    Params,
    Progress,
    TokenLayout,
    silent,
)

MAX_TOKENS = 256
POOLINGS = ('mean', 'cls')
# Modules of a sentence-transformers folder that leave `e` as it is above.
_MODULES = ('Transformer', 'Pooling', 'Normalize')


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A text encoder that is ready for use.

  Attributes:
    model: the model, of a family of `families.ENCODERS`.
    tokenizer: a fast tokenizer that adds [CLS] and [SEP].
    pooling: 'mean' or 'cls', as its folder has it.
    max_tokens: tokens of a text that are read, the added ones among them.
  """

  model: Model
  tokenizer: Any
  pooling: str
  max_tokens: int


def hidden_states(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    layout: TokenLayout | PackedSequences,
    *,
    types: Array | None = None,
) -> Array:
  """Runs the whole encoder.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32; [1, N] with `PackedSequences`.
    layout: [B, T] layout of the tokens; attention is never causal.
    types: token types like `tokens`; None for type 0.

  Returns:
    [B, T, D] (or [1, N, D]) output of the last layer, f32 or wider.
  """
  if isinstance(layout, PackedSequences):
    layout = layout.replace(layout=layout.layout.replace(causal=False))
  else:
    layout = layout.replace(causal=False)
  h = decoder.embed(spec, params, tokens, layout)
  table = params['embed']['type']
  h += table[jnp.zeros_like(tokens) if types is None else types]
  h = Norm(spec).apply({'params': params['embed']['norm']}, h)
  h, _ = decoder.run_layers(spec, params, h, layout, start=0, stop=spec.layers)
  return h


def pool(h: Array, rows: PackedSequences, pooling: str) -> Array:
  """Makes one vector a sequence.

  Args:
    h: [1, N, D] output of the last layer.
    rows: B sequences, N tokens in all.
    pooling: one of `POOLINGS`.

  Returns:
    [B, D] of length 1; zeros for a sequence without tokens.
  """
  if pooling == 'cls':
    first = rows.replace(index=rows.index[:, :1])
    pooled = packing.unflatten(first, h)[:, 0]
  else:
    count = jnp.sum(rows.index < h.shape[1], axis=1, keepdims=True)
    total = jnp.sum(packing.unflatten(rows, h), axis=1)
    pooled = total / jnp.maximum(count, 1)
  square = jnp.sum(jnp.square(pooled), axis=-1, keepdims=True)
  return pooled * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def load_encoder(
    folder: str | os.PathLike[str], progress: Progress = silent
) -> Encoder:
  """Loads a text encoder.

  Args:
    folder: has config.json, safetensors and tokenizer.json, as transformers and
      sentence-transformers write them.
    progress: is told upstream tensors.

  Returns:
    The encoder, its f32 parameters on the default device.

  Raises:
    InputError: see `check_folder`; weights that are not finite, or a tokenizer
      of another model.
  """
  pooling, most = check_folder(folder)
  model = loading.load_model(
      folder, progress=progress, names=families.ENCODERS, mesh=one_device()
  )
  tokenizer = tokenizer_lib.load_tokenizer(model.folder)
  if len(tokenizer) > model.spec.vocab:
    raise InputError(
        f'{folder}: the tokenizer has {len(tokenizer)} tokens and the model'
        f' {model.spec.vocab}; they do not belong together.'
    )
  most = min(most, model.spec.max_positions)
  return Encoder(model, tokenizer, pooling, most)


def check_folder(folder: str | os.PathLike[str]) -> tuple[str, int]:
  """Checks everything but the weights.

  Args:
    folder: as for `load_encoder`.

  Returns:
    How it pools, and how many tokens of a text it takes at most.

  Raises:
    InputError: it is no encoder that can be used; all errors at once.
  """
  problems: list[str] = []
  with InputError.collected(problems):
    loading.open_model(folder, families.ENCODERS)
  folder = pathlib.Path(folder)
  pooling, errors = _pooling(folder)
  problems += errors
  path, most = folder / 'sentence_bert_config.json', None
  if path.is_file():
    most = io.read_json(path).get('max_seq_length')
    if most is not None and (type(most) is not int or most < 2):
      problems.append(
          f'{path}: max_seq_length is {most!r}; it must be 2 tokens or more'
      )
  InputError.raise_for(problems)
  return pooling, most or MAX_TOKENS


def _pooling(folder: pathlib.Path) -> tuple[str, list[str]]:
  """Reads (pooling, errors) of what the folder says of its sentences."""
  problems, place, named = [], '1_Pooling', False
  path = folder / 'modules.json'
  for module in io.read_json(path, list) if path.is_file() else ():
    module = module if isinstance(module, dict) else {}
    kind = str(module.get('type')).rpartition('.')[2]
    if kind == 'Pooling':
      place, named = str(module.get('path', place)), True
    elif kind not in _MODULES:
      problems.append(
          f'{path}: has the module {kind}; supported are {", ".join(_MODULES)}'
      )
  path = folder / place / 'config.json'
  if named and not path.is_file():
    problems.append(f'{path}: is missing, and says how texts are pooled')
  prefix, on = 'pooling_mode', set()
  for field, value in io.read_json(path).items() if path.is_file() else ():
    if field == prefix:
      on.add(str(value))
    elif field.startswith(prefix) and value:
      on.add(field.removeprefix(f'{prefix}_').removesuffix('_tokens'))
  on = {'cls' if name == 'cls_token' else name for name in on} or {'mean'}
  if len(on) > 1 or not on <= set(POOLINGS):
    problems.append(
        f'{path}: asks for the pooling {", ".join(sorted(on))}; supported is'
        f' one of {", ".join(POOLINGS)}'
    )
  return min(on), problems
