"""Whatever a file holds, reading it ends in a value or in an InputError.

Every format that we read is mutated with a seed: bytes are flipped, cut, put in
and repeated; values of JSON are replaced by odd ones, keys repeated; headers of
tensor files are changed with and without checksums that fit. No exception but
`InputError` may come out, and no reader may take more than 256 MiB.

  python -m pytest -m long tests/loaders_fuzz_test.py   50,000 a format
"""

from __future__ import annotations

import copy
import json
import pathlib
import struct
import tempfile
import unittest
import zlib

import flax
import numpy as np
import pytest
import tiny_model
from absl.testing import absltest, parameterized

from jaxedit import io
from jaxedit.convert import gguf as gguf_lib
from jaxedit.convert import interop
from jaxedit.deltas import Dense, Edited, LowRank
from jaxedit.edited import files
from jaxedit.eval import datasets
from jaxedit.models import assets, families, loading
from jaxedit.models import checkpoint as folders
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.runs import cache, layer_inputs
from jaxedit.stats import accumulate, corpora, moments, storage
from jaxedit.testing import models
from jaxedit.text import templates
from jaxedit.types import InputError, Targets

SPEC = models.tiny_spec('llama', layers=2, tied=False)
MUTATIONS, MANY = 1000, 50_000
MOST_BYTES = 256 << 20
ODD = (
    None, True, 0, -1, 1e308, 10**30, '', 'x' * 5000, '\ud800', [], {}, [[]],
    {'a': {}}, [None], 'F64', 'gram/1', 0.5, [1, 2], ['a', 'b'], 2**31, -(2**63),
)  # fmt: skip
# What stands for a value in the text of JSON and has no Python value.
TEXTS = ('NaN', '-Infinity', '1e999', '[' * 3000 + ']' * 3000, '"\\ud83d"')


# Mutations.


def nodes_of(value):
  """Lists (container, key) of every value inside one."""
  found, waiting = [], [value]
  while waiting:
    node = waiting.pop()
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, inner in list(pairs):
      found.append((node, key))
      if isinstance(inner, dict | list):
        waiting.append(inner)
  return found


def mutate_value(rng, value):
  """Changes one to three values inside one."""
  value = {'': value}
  for _ in range(rng.integers(1, 4)):
    nodes = nodes_of(value)
    node, key = nodes[rng.integers(len(nodes))]
    how = rng.integers(4)
    if how == 0 and isinstance(node, dict) and key:
      node[str(rng.choice(['', 'x' * 300, 'layers', 'size']))] = node.pop(key)
    elif how == 1 and key:
      del node[key]
    else:
      node[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
  return value['']


def mutate_json(rng, text):
  """Changes the values of a JSON text, or writes what no value gives."""
  out = json.dumps(mutate_value(rng, json.loads(text)))
  if rng.random() < 0.1:
    out = out.replace('null', str(rng.choice(TEXTS)), 1)
  if rng.random() < 0.1 and out.startswith('{"'):
    out = '{' + out[1 : out.index(':')] + ': 1, ' + out[1:]
  return out


def mutate_bytes(rng, blob):
  """Changes bytes in one to three places."""
  blob = bytearray(blob)
  for _ in range(rng.integers(1, 4)):
    at = int(rng.integers(len(blob) + 1))
    if rng.random() < 0.5:  # where headers are
      at = min(at, int(rng.integers(1, 400)))
    length = int(rng.integers(1, 9))
    how = rng.integers(6)
    if how == 0 and at < len(blob):
      blob[at] ^= 1 << int(rng.integers(8))
    elif how == 1:
      blob[at : at + length] = rng.bytes(length)
    elif how == 2:
      del blob[at : at + length * length]
    elif how == 3:
      blob[at:at] = blob[at : at + 40] * length
    elif how == 4:
      numbers = (0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1)
      number = numbers[rng.integers(len(numbers))]
      blob[at : at + 8] = struct.pack('<Q', number)
    else:
      del blob[at:]
  return bytes(blob)


def mutate_tensors(rng, blob):
  """Changes bytes, or the header, of a safetensors file."""
  if rng.random() < 0.4:
    return mutate_bytes(rng, blob)
  length = int.from_bytes(blob[:8], 'little')
  raw, data = blob[8 : 8 + length], blob[8 + length :]
  header = json.loads(raw)
  about = header.get('__metadata__', {})
  if 'jaxedit' in about and rng.random() < 0.6:
    about['jaxedit'] = mutate_json(rng, about['jaxedit'])
  elif rng.random() < 0.5:
    data = mutate_bytes(rng, data)[: len(data)].ljust(len(data), b'\0')
  else:
    header = mutate_value(rng, header)
  if rng.random() < 0.7:
    sign(header, data)
  raw = json.dumps(header).encode()
  return struct.pack('<Q', len(raw)) + raw + data


def sign(header, data):
  """Puts checksums into a header that fit it, where that can be done."""
  try:
    about = header['__metadata__']
    entries = {k: v for k, v in header.items() if k != '__metadata__'}
    about['crc32'] = json.dumps(
        {
            name: zlib.crc32(data[slice(*entry['data_offsets'])])
            for name, entry in entries.items()
        }
    )
    kinds = {n: (e['dtype'], tuple(e['shape'])) for n, e in entries.items()}
    about['header_crc32'] = io._header_sum(about, kinds)
  except (AttributeError, KeyError, TypeError, ValueError):
    pass


def either(rng, blob):
  """Changes the bytes or the values of a JSON file, or of its lines."""
  if rng.random() < 0.4:
    return mutate_bytes(rng, blob)
  text = blob.decode()
  try:
    text = mutate_json(rng, text)
  except ValueError:  # one value a line
    lines = text.splitlines()
    at = rng.integers(len(lines))
    lines[at] = mutate_json(rng, lines[at])
    text = '\n'.join(lines)
  return text.encode('utf-8', 'surrogatepass')


# Formats: each makes a file in a folder and returns (mutate, file, read).


def _in_model(name, mutate, read):
  def make(folder):
    model = tiny_model.make(folder / 'm', chats=True)
    return mutate, model / name, lambda: read(model)

  return make


def read_spec(model):
  families.spec_from_hf(folders.read_config(model))


def read_weights(model):
  _, source, layout = loading.open_model(model)
  for name in layout.slots:
    source.tensors[name].read()


def read_tokenizer(model):
  if problems := tokenizer_lib._folder_faults(model):
    raise InputError(*problems)


def sharded(folder):
  model = tiny_model.make(folder / 'm')
  header = folders.read_header(model / 'model.safetensors')
  (model / 'model.safetensors').rename(model / 'a.safetensors')
  index = {
      'metadata': {'total_size': 1},
      'weight_map': dict.fromkeys(header.tensors, 'a.safetensors'),
  }
  path = model / folders.INDEX
  path.write_text(json.dumps(index))
  return either, path, lambda: loading.open_model(model)


def moments_file(folder):
  path = folder / 'moments.safetensors'
  about = {'site': 'mlp/down', 'model': 'a'}
  found = moments.Moments((0, 2), np.stack([np.eye(6)] * 2), 9, about)
  moments.save(path, found)
  read = lambda: storage.load(path, layers=[2], width=6, model_hash='a')
  return mutate_tensors, path, read


def partial_moments(folder):
  path = folder / 'partial'
  store = accumulate.Store(path, 0, {'a': 1})
  part = np.zeros((1, 3, 3), np.float32)
  store.write(accumulate.Total(np.zeros((1, 3, 3)), part, 1, 2, 3, 4, 'ab'))
  return mutate_tensors, path, store.read


def sampled(folder):
  path = folder / 'texts'
  corpora._Samples(path, {'a': 1}).add([[1, 2], [3]])
  return mutate_tensors, path, lambda: corpora._Samples(path, {'a': 1})


def delta(folder):
  path = folder / 'delta.safetensors'
  ones = lambda *shape: np.ones(shape, np.float32)
  low = LowRank((0, 2), 'mlp/down', ones(2, 3, 4), ones(2, 3, 5))
  bias = Dense((1,), 'mlp/up', ones(1, 5), 'bias')
  files.save(path, Edited((low, bias)), {'model_hash': 'ab' * 32})
  return mutate_tensors, path, lambda: files.load(path, model_hash='ab' * 32)


def targets(folder):
  kept = cache.TargetFiles(folder / 'kept', {}, exact=True)
  edit = unittest.mock.Mock()
  kept._path = lambda edit: folder / 'kept' / 'x.safetensors'
  names = Targets.__dataclass_fields__
  kept.put(edit, Targets(**{name: np.ones((1, 4)) for name in names}))
  return mutate_tensors, kept._path(edit), lambda: kept.get(edit)


def archive(folder):
  path = folder / 'h.3.mlp.fc_out_float32_mom2_1.npz'
  with open(path, 'wb') as stream:
    np.savez_compressed(
        stream, **{'mom2.count': 5, 'mom2.mom2': np.eye(8, dtype=np.float32)}
    )
  read = lambda: moments.load_npz(path, layers=[3], width=8)
  return mutate_bytes, path, read


FACTS = ''.join(
    json.dumps({
        'id': i, 'prompt': f'{{}} {i} lives in', 'subject': f'Zo\xe9 {i}',
        'target_new': 'Paris', 'target_true': 'Rome',
    }) + '\n'
    for i in range(3)
)  # fmt: skip
PASSAGES = ''.join(
    json.dumps({'question': f'Why {i}?', 'answer': 'As it is.'}) + '\n'
    for i in range(3)
)


def _records(text, kind, whole=False):
  def make(folder):
    path = folder / 'records'
    if whole:
      lines = [json.loads(line) for line in text.splitlines()]
      path.write_text(json.dumps(lines))
    else:
      path.write_text(text)
    return either, path, lambda: datasets.load_requests(path, kinds=(kind,))

  return make


def corpus(folder):
  path = folder / 'corpus.jsonl'
  path.write_text('{"text": "a b"}\n{"text": "c"}\n')
  return either, path, lambda: corpora.jsonl_documents(path, 'text')


def contexts(folder):
  path = folder / 'contexts.json'
  path.write_text('["{}", "It is said. {}"]')
  return either, path, lambda: templates.load_templates(path)


def proposal(folder):
  path = folder / 'suggest.json'
  some = {'sha256': 'ab', 'numbers': [1, 2]}
  found = {'tries': [{'layers': [1, 2]}], 'facts': some, 'traced': some}
  path.write_text(json.dumps(found | {'model_hash': 'cd'}))
  return either, path, lambda: layer_inputs.read_proposal(str(path))


def read_entry(entry):
  if not assets._is_complete(entry, {}):
    raise InputError('it is made again')


def converted(folder):
  entry = folder / 'entry'
  assets.keep(
      entry, {'source': 'x'}, lambda part: io.write_text(part / 'a', '')
  )
  path = entry / 'source.json'
  return either, path, lambda: read_entry(entry)


def msgpack(folder):
  path = folder / 'flax_model.msgpack'
  tree = interop.to_hf_flax(models.random_params(SPEC, 0), SPEC)
  path.write_bytes(flax.serialization.msgpack_serialize(tree))
  read = lambda: interop.load_hf_flax_msgpack(path, SPEC)
  return mutate_bytes, path, read


def gguf(folder):
  try:
    import convert_gguf_test
  except unittest.SkipTest as missing:
    raise unittest.SkipTest(str(missing)) from missing
  path = folder / 'm.gguf'
  convert_gguf_test.write_gguf(path)

  def read():
    with gguf_lib._open(path) as data:
      gguf_lib._check(path, data, 'float32')

  return mutate_bytes, path, read


FORMATS = {
    'config': _in_model('config.json', either, read_spec),
    'index': sharded,
    'weights': _in_model('model.safetensors', mutate_tensors, read_weights),
    'tokenizer_config': _in_model(
        'tokenizer_config.json', either, read_tokenizer
    ),
    'tokenizer': _in_model('tokenizer.json', either, read_tokenizer),
    'moments': moments_file,
    'partial_moments': partial_moments,
    'sampled': sampled,
    'delta': delta,
    'targets': targets,
    'archive': archive,
    'facts': _records(FACTS, 'fact'),
    'list': _records(FACTS, 'fact', whole=True),
    'passages': _records(PASSAGES, 'text'),
    'corpus': corpus,
    'contexts': contexts,
    'proposal': proposal,
    'converted': converted,
    'msgpack': msgpack,
    'gguf': gguf,
}


def memory():
  """The largest resident size since the last reset, bytes; 0 if unknown."""
  try:
    status = pathlib.Path('/proc/self/status').read_text()
    peak = int(status.split('VmHWM:')[1].split()[0]) << 10
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    return peak
  except (OSError, IndexError, ValueError):
    return 0


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def fuzz(self, make, count, seed=0):
    mutate, path, read = make(self.folder)
    whole = path.read_bytes()
    read()  # as it is, it can be read
    rng, refused = np.random.default_rng(seed), 0
    memory()
    before = memory()
    for number in range(count):
      path.write_bytes(mutate(rng, whole))
      try:
        read()
      except InputError as error:
        refused += 1
        self.assertLessEqual(len(str(error).splitlines()), 20)
        self.assertLess(len(str(error)), 25_000)
      except BaseException as error:
        error.add_note(f'mutation {number} of seed {seed}')
        raise
    self.assertLess(memory() - before, MOST_BYTES)
    self.assertGreater(refused, count // 10)
    path.write_bytes(whole)
    read()


class FuzzTest(Case):

  @parameterized.parameters(*FORMATS)
  def test_mutations(self, name):
    self.fuzz(FORMATS[name], MUTATIONS)

  def test_tokenizer_is_loaded(self):
    """Few, as each takes ten milliseconds."""
    read = _in_model('tokenizer.json', either, tokenizer_lib.load_tokenizer)
    self.fuzz(read, 50)


@pytest.mark.long
class LongFuzzTest(Case):

  @parameterized.parameters(*FORMATS)
  def test_mutations(self, name):
    self.fuzz(FORMATS[name], MANY, seed=1)

  def test_tokenizer_is_loaded(self):
    read = _in_model('tokenizer.json', either, tokenizer_lib.load_tokenizer)
    self.fuzz(read, 3000, seed=1)


if __name__ == '__main__':
  absltest.main()
