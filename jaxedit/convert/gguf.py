"""GGUF files of the llama architecture, turned into Hugging Face folders.

A GGUF file is a header (keys and values, then a table of tensors) followed by
aligned tensor data. Tensors are plain numbers or blocks of quantised weights
that share their constants, e.g. w = d q with q in [-128, 127] and d in half
precision for Q8_0; the `gguf` package dequantises whatever it knows: Q4_0 to
Q8_0, the K-quants, IQ types. The rows of the q and k maps of a llama file are
permuted: GGUF rotates neighbouring pairs, Hugging Face the two halves of a
head, so row (head, pair, part) goes back to (head, part, pair).

The header is parsed here, every length checked against the file before it is
used, so that a damaged file yields a sentence; the package's own reader trusts
the file and takes seconds for a large vocabulary. The values of quantised
blocks are not exact in bfloat16; float32 keeps them.

Sources: the GGUF format description of the ggml project. Not covered: other
architectures, mixtures of experts, biases, big-endian files, and frequency
factors stored as a tensor.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxedit import io, types
from jaxedit.convert import gguf_tokenizer
from jaxedit.models import families, tensors
from jaxedit.models.families import llama

_SCALARS = {
    0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4',
    7: '?', 10: '<u8', 11: '<i8', 12: '<f8',
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_OUTPUTS = {'float32': 'F32', 'bfloat16': 'BF16'}

# Parts of Hugging Face's tensor names, and what GGUF calls them.
_NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'model.layers': 'blk',
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}

# The `llama.*` keys that the config below accounts for. Any other key might
# change the mathematics, so it is refused.
_KNOWN_KEYS = frozenset({
    'vocab_size', 'context_length', 'block_count', 'embedding_length',
    'feed_forward_length', 'attention.head_count', 'attention.head_count_kv',
    'attention.layer_norm_rms_epsilon', 'attention.key_length',
    'attention.value_length', 'rope.dimension_count', 'rope.freq_base',
    'rope.scaling.type', 'rope.scaling.factor',
    'rope.scaling.original_context_length', 'rope.scaling.finetuned',
    'expert_count', 'expert_used_count',
})  # fmt: skip


class TensorInfo(NamedTuple):
  """One row of a GGUF file's table of tensors.

  Attributes:
    shape: outermost axis first, as numpy has it.
    kind: the number of the ggml type.
    start: bytes from the beginning of the tensor data.
  """

  shape: tuple[int, ...]
  kind: int
  start: int


class Header(NamedTuple):
  """What precedes the tensor data.

  Attributes:
    metadata: keys and values; arrays are lists.
    tensors: name -> `TensorInfo`.
    data_start: bytes from the beginning of the file to the tensor data.
  """

  metadata: dict[str, Any]
  tensors: dict[str, TensorInfo]
  data_start: int


# HF name of a tensor -> its GGUF name and shape.
Plan = dict[str, tuple[str, tuple[int, ...]]]


class _Damaged(Exception):
  """A header that cannot be read on; the message is half a sentence."""


class _Cursor:
  """Reads a buffer front to back and never past its end."""

  def __init__(self, data: mmap.mmap):
    self.data = data
    self.at = 0

  def take(self, size: int) -> bytes:
    if size > len(self.data) - self.at:
      raise _Damaged(f'it ends inside the header, at byte {len(self.data)}')
    self.at += size
    return self.data[self.at - size : self.at]

  def scalar(self, code: str) -> Any:
    return np.frombuffer(self.take(np.dtype(code).itemsize), code)[0].item()

  def string(self) -> str:
    raw = self.take(self.scalar('<u8'))
    try:
      return raw.decode('utf-8')
    except UnicodeDecodeError as error:
      raise _Damaged(f'the text before byte {self.at} is not UTF-8') from error

  def value(self, kind: int) -> Any:
    if kind in _SCALARS:
      return self.scalar(_SCALARS[kind])
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      raise _Damaged(f'there is no value type {kind} (before byte {self.at})')
    kind, count = self.scalar('<u4'), self.scalar('<u8')
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind])
      return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
    if kind == _STRING:
      return [self.string() for _ in range(count)]
    raise _Damaged(f'there are no arrays of type {kind} (byte {self.at})')


def _read_header(data: mmap.mmap) -> Header:
  """Parses the header; raises _Damaged."""
  cursor = _Cursor(data)
  cursor.take(4)  # the magic, checked by the caller
  version = cursor.scalar('<u4')
  if version & 0xFFFF == 0:
    raise _Damaged('it is big-endian, which is not supported')
  if version not in (2, 3):
    raise _Damaged(f'its format version is {version}; known are 2 and 3')
  tensor_count, key_count = cursor.scalar('<u8'), cursor.scalar('<u8')
  metadata: dict[str, Any] = {}
  for _ in range(key_count):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar('<u4'))
  tensors: dict[str, TensorInfo] = {}
  for _ in range(tensor_count):
    name = cursor.string()
    if name in tensors:
      raise _Damaged(f'tensor {name!r} is listed twice')
    axes = cursor.scalar('<u4')
    if not 1 <= axes <= 4:
      raise _Damaged(f'tensor {name!r} claims {axes} axes')
    shape = tuple(reversed([cursor.scalar('<u8') for _ in range(axes)]))
    tensors[name] = TensorInfo(
        shape, cursor.scalar('<u4'), cursor.scalar('<u8')
    )
  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or alignment <= 0:
    raise _Damaged(f'its alignment is {alignment!r}')
  return Header(metadata, tensors, -(-cursor.at // alignment) * alignment)


def _import_gguf() -> Any:
  """Imports the optional package that knows the block layouts."""
  try:
    import gguf
  except ImportError as error:
    raise types.InputError(
        'Reading a .gguf file needs the package gguf: run pip install'
        " 'jaxedit[gguf]'."
    ) from error
  return gguf


def _readable() -> dict[int, str]:
  """Number -> name of the types that the package gguf dequantises."""
  gguf = _import_gguf()
  found = {}
  for kind in gguf.GGMLQuantizationType:
    with contextlib.suppress(NotImplementedError):
      _, size = gguf.GGML_QUANT_SIZES[kind]
      gguf.dequantize(np.zeros((1, size), np.uint8), kind)
      found[kind.value] = kind.name
  return found


def _size_faults(path: pathlib.Path, header: Header, size: int) -> list[str]:
  """Lists tensors of unknown types and tensors that leave the file."""
  gguf, readable = _import_gguf(), _readable()
  names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
  problems = []
  unknown: dict[int, list[str]] = {}
  for name, info in header.tensors.items():
    if info.kind not in readable:
      unknown.setdefault(info.kind, []).append(name)
      continue
    block, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
    # Python integers: a damaged shape must not wrap.
    stored = math.prod(info.shape) // block * block_bytes
    end = header.data_start + info.start + stored
    if info.shape[-1] % block:
      problems.append(
          f'{path}: tensor {name} has rows of {info.shape[-1]} weights, not'
          f' whole {names[info.kind]} blocks of {block}; the file is damaged.'
      )
    elif end > size:
      problems.append(
          f'{path}: tensor {name} ends at byte {end} but the file has {size}'
          ' bytes; it is truncated: fetch it again.'
      )
  return problems + [
      f'{path}: {len(members)} tensors (first: {members[0]}) are of type'
      f' {names.get(kind, f"number {kind}")}; readable are'
      f' {", ".join(readable.values())}.'
      for kind, members in unknown.items()
  ]


def _config(path: pathlib.Path, header: Header, dtype: str) -> dict[str, Any]:
  """Derives the fields of a LlamaConfig; raises InputError."""
  meta = header.metadata
  problems = []

  def number(key: str, kind: type = int, default: Any = None) -> Any:
    value = meta.get(f'llama.{key}', default)
    if type(value) is not kind or not 0 < value < float('inf'):
      problems.append(
          f'{path}: llama.{key} is {value!r}; a positive {kind.__name__} is'
          ' needed.'
      )
      return kind(1)
    return value

  width, heads = number('embedding_length'), number('attention.head_count')
  epsilon = number('attention.layer_norm_rms_epsilon', float)
  embedding = header.tensors.get('token_embd.weight')
  config = {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'hidden_act': 'silu',
      'hidden_size': width,
      'intermediate_size': number('feed_forward_length'),
      'num_hidden_layers': number('block_count'),
      'num_attention_heads': heads,
      'num_key_value_heads': number('attention.head_count_kv', int, heads),
      'head_dim': number('attention.key_length', int, width // heads),
      'max_position_embeddings': number('context_length'),
      'rms_norm_eps': _decimal(epsilon),
      'rope_theta': _decimal(number('rope.freq_base', float, 10000.0)),
      'rope_scaling': _rope_scaling(path, meta, problems),
      'attention_bias': False,
      'mlp_bias': False,
      'tie_word_embeddings': 'output.weight' not in header.tensors,
      'dtype': dtype,
      'vocab_size': embedding.shape[0] if embedding else 0,
  }
  for role, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding')):
    config[f'{role}_token_id'] = meta.get(f'tokenizer.ggml.{key}_token_id')
  problems += _config_faults(path, header, config)
  types.InputError.raise_for(problems)
  return config


def _decimal(value: float) -> float:
  """Returns the shortest decimal that is the same float32 (1e-05, say)."""
  return float(str(np.float32(value)))


def _rope_scaling(
    path: pathlib.Path, meta: dict[str, Any], problems: list[str]
) -> dict[str, Any] | None:
  """Translates the rotary scaling; adds to the problems what it cannot."""
  kind = meta.get('llama.rope.scaling.type', 'none')
  factor = meta.get('llama.rope.scaling.factor', 1.0)
  if kind == 'none':
    return None
  if kind == 'linear' and isinstance(factor, float) and factor > 0:
    return {'rope_type': 'linear', 'factor': _decimal(factor)}
  problems.append(
      f'{path}: the rotary scaling {kind!r} with factor {factor!r} is not'
      " supported; known are 'none' and 'linear'."
  )
  return None


def _config_faults(
    path: pathlib.Path, header: Header, config: dict[str, Any]
) -> list[str]:
  """Lists settings that a LlamaConfig cannot say or that disagree."""
  meta = header.metadata
  problems = [
      f'{path}: the key {key} may change the computation and is not supported.'
      for key in meta
      if key.startswith('llama.') and key[len('llama.') :] not in _KNOWN_KEYS
  ]
  size, rows = config['head_dim'], config['vocab_size']
  for key, needed in (
      ('llama.attention.value_length', (size,)),
      ('llama.rope.dimension_count', (size,)),
      ('llama.vocab_size', (rows,)),
      ('llama.expert_count', (0,)),
      ('split.count', (1, 0)),  # both mean that all is in one file
  ):
    if meta.get(key, needed[0]) not in needed:
      problems.append(
          f'{path}: {key} is {meta[key]!r} where {needed[0]} is expected; such'
          ' models are not supported.'
      )
  if config['num_hidden_layers'] > len(header.tensors):
    problems.append(
        f'{path}: {config["num_hidden_layers"]} layers but'
        f' {len(header.tensors)} tensors; the file is damaged or incomplete.'
    )
  tokens = meta.get('tokenizer.ggml.tokens')
  if isinstance(tokens, list) and len(tokens) > rows:
    problems.append(
        f'{path}: {len(tokens)} tokens but {rows} embedding rows; the file is'
        ' damaged.'
    )
  return problems


def _tensor_plan(config: dict[str, Any]) -> Plan:
  """Finds what GGUF calls each tensor of such a model."""
  spec = families.spec_from_hf(config)
  plan = {}
  for name, slots in tensors.upstream_slots(spec, llama.TENSORS).items():
    source = name
    for part, short in _NAMES.items():
      source = source.replace(part, short)
    plan[name] = source, tensors.upstream_shape(slots[0])
  return plan


def _plan_faults(path: pathlib.Path, header: Header, plan: Plan) -> list[str]:
  """Lists tensors that are missing, misshapen or unaccounted for."""
  problems = []
  wanted = dict(plan.values())
  missing = [name for name in wanted if name not in header.tensors]
  extra = [name for name in header.tensors if name not in wanted]
  if missing:
    problems.append(
        f'{path}: {len(missing)} tensors are missing (first: {missing[0]}).'
    )
  if extra:
    problems.append(
        f'{path}: {len(extra)} tensors have no place in a plain llama model'
        f' (first: {extra[0]}). Use the safetensors folder of this model.'
    )
  return problems + [
      f'{path}: tensor {name} is {list(info.shape)}; the keys of the file'
      f' say {list(wanted[name])}.'
      for name, info in header.tensors.items()
      if name in wanted and info.shape != wanted[name]
  ]


def _open(path: pathlib.Path) -> mmap.mmap:
  """Maps a file that begins as a GGUF file does."""
  try:
    io.file_size(path)
    with path.open('rb') as file:
      if file.read(4) != b'GGUF':
        raise types.InputError(
            f'{path}: is not a GGUF file (it does not begin with GGUF).'
        )
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise types.InputError(
        f'{path}: cannot be read ({error.strerror}).'
    ) from error


def _check(
    path: pathlib.Path, data: mmap.mmap, dtype: str
) -> tuple[Header, dict[str, Any], Plan]:
  """Reads the header, the config and the plan; raises InputError."""
  try:
    header = _read_header(data)
  except _Damaged as error:
    raise types.InputError(
        f'{path}: cannot be read as GGUF: {error}; fetch the file again.'
    ) from error
  name = header.metadata.get('general.architecture')
  if name != 'llama':
    raise types.InputError(
        f'{path}: the architecture is {name!r}; only llama files can be'
        ' converted. Use the safetensors folder of this model.'
    )
  config = _config(path, header, dtype)
  try:
    plan = _tensor_plan(config)
  except types.InputError as error:
    raise types.InputError(*(f'{path}: {x}' for x in error.problems)) from error
  types.InputError.raise_for(
      _size_faults(path, header, len(data)) + _plan_faults(path, header, plan)
  )
  return header, config, plan


def _dequantize(
    path: pathlib.Path, data: mmap.mmap, header: Header, name: str
) -> np.ndarray:
  """Reads a tensor as float32."""
  gguf = _import_gguf()
  info = header.tensors[name]
  block, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
  stored = (*info.shape[:-1], info.shape[-1] // block * block_bytes)
  start = header.data_start + info.start
  # A copy of the bytes: a view would keep the map open after its file.
  raw = np.frombuffer(data[start : start + math.prod(stored)], np.uint8)
  kind = gguf.GGMLQuantizationType(info.kind)
  weights = gguf.dequantize(raw.reshape(stored), kind)
  if not np.isfinite(weights).all():
    raise types.InputError(
        f'{path}: tensor {name} holds weights that are not finite; the file'
        ' is damaged: fetch it again.'
    )
  return weights


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Takes rows from (head, pair, part) order to (head, part, pair)."""
  split = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return split.swapaxes(1, 2).reshape(rows.shape)


def convert_gguf(
    path: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    dtype: str = 'float32',
    *,
    progress: types.Progress = types.silent,
) -> pathlib.Path:
  """Converts a llama GGUF file to a Hugging Face folder.

  The folder appears under its name only when it is whole.

  Args:
    path: a .gguf file.
    out_folder: folder to create; it must not hold anything yet.
    dtype: 'float32', exact for every tensor type, or 'bfloat16', half the
      size, rounded to nearest even.
    progress: shows the tensors converted.

  Returns:
    `out_folder`, with model.safetensors, config.json, generation_config.json
    and the tokenizer's files.

  Raises:
    InputError: not a GGUF file, damaged, of another architecture or with a
      tensor type or tokenizer that is not supported; `out_folder` is in use;
      the package gguf is missing.
  """
  path = pathlib.Path(path)
  if dtype not in _OUTPUTS:
    raise types.InputError(
        f'dtype is {dtype!r}; known are {", ".join(_OUTPUTS)}.'
    )
  _import_gguf()
  with _open(path) as data:
    header, config, plan = _check(path, data, dtype)
    files = gguf_tokenizer.tokenizer_files(header.metadata, str(path))
    roles = [f'{role}_token_id' for role in ('bos', 'eos', 'pad')]
    roles = {key: config[key] for key in roles if config[key] is not None}
    heads = dict(
        q_proj=config['num_attention_heads'],
        k_proj=config['num_key_value_heads'],
    )
    with (
        io.new_folder(out_folder) as folder,
        open(folder / 'model.safetensors', 'wb') as stream,
        progress('convert weights', len(plan), 'tensors') as done,
    ):
      for name, text in files.items():
        io.write_text(folder / name, text)
      io.write_json(folder / 'config.json', config)
      generation = {'_from_model_config': True, **roles}
      io.write_json(folder / 'generation_config.json', generation)

      def read(name: str) -> np.ndarray:
        weights = _dequantize(path, data, header, plan[name][0])
        part = name.split('.')[-2]
        if part in heads:
          weights = _unpermute(weights, heads[part])
        done(1)
        return weights.astype(io.DTYPES[code], copy=False)

      code = _OUTPUTS[dtype]
      kinds = {name: (code, shape) for name, (_, shape) in plan.items()}
      io.stream_tensors(stream, kinds, read, {'format': 'pt'})
  return pathlib.Path(out_folder)
