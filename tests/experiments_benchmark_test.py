"""The benchmark: its torch loop, its presets, and the whole program."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from absl.testing import absltest, parameterized

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import config as config_lib
from experiments.benchmark import (
    judges,
    presets,
    report,
    torch_baseline,
    torch_model,
)
from experiments.benchmark import setup as setup_lib
from experiments.benchmark import stages as stages_lib
from jaxedit.models import decoder, families
from jaxedit.planning import machine
from jaxedit.runs.config import RunConfig
from jaxedit.targets import TargetConfig
from jaxedit.testing import facts, models
from jaxedit.types import InputError, silent

try:
  import naive_oracle
  import naive_rows
  import torch
except ImportError:
  naive_oracle = naive_rows = torch = None

ROOT = pathlib.Path(__file__).resolve().parents[1]
needs_torch = absltest.skipIf(torch is None, 'torch is missing')
SCHEDULE = TargetConfig(steps=8, rate=0.3, clamp=0.6)


def chained(count, *, contexts=1, kl=False):
  """Random edits with targets in chunks of three."""
  some = facts.random_edits(
      count, seed=4, contexts=contexts, targets=(7, 5, 3), kl=kl
  )
  cut = lambda n: tuple((i, min(i + 3, n)) for i in range(0, n, 3))
  return [
      dataclasses.replace(edit, chunks=cut(len(edit.target))) for edit in some
  ]


@needs_torch
class TorchLoopTest(parameterized.TestCase):
  """Padded batches and one forward a step give what single rows give."""

  @parameterized.parameters('llama', 'gptj', 'gpt2')
  def test_optimize(self, family):
    pair = naive_oracle.pair(family)
    for edit in facts.random_edits(3, seed=1):
      want = naive_oracle.optimize(pair.torch, edit, 1, SCHEDULE)
      (got,) = torch_baseline.optimize(
          pair.torch, edit, layer=1, config=SCHEDULE
      )
      np.testing.assert_allclose(got.z0, want.z0, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(got.z, want.z, rtol=1e-4, atol=1e-5)
      self.assertEqual(got.steps, len(want.losses))
      self.assertAlmostEqual(got.loss, want.losses[-1], places=4)
      longest = max(map(len, edit.rows)) + len(edit.target) - 1
      self.assertEqual(got.shape, (4, longest))

  def test_stops_and_goes_without_a_kl_row(self):
    pair = naive_oracle.pair('llama')
    (edit,) = facts.random_edits(1, seed=2, kl=False)
    easy = SCHEDULE._replace(threshold=100.0)
    (got,) = torch_baseline.optimize(pair.torch, edit, layer=1, config=easy)
    self.assertEqual((got.steps, got.shape[0]), (1, 3))
    np.testing.assert_array_equal(got.z, got.z0)
    want = naive_oracle.optimize(pair.torch, edit, 1, SCHEDULE)
    (got,) = torch_baseline.optimize(pair.torch, edit, layer=1, config=SCHEDULE)
    np.testing.assert_allclose(got.z, want.z, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(('llama', True), ('gptj', False))
  def test_chunks(self, family, kl):
    pair = naive_oracle.pair(family)
    for edit in chained(2, contexts=2, kl=kl):
      want = naive_oracle.chain(pair.torch, edit, 1, SCHEDULE)
      got = torch_baseline.optimize(pair.torch, edit, layer=1, config=SCHEDULE)
      self.assertLen(got, edit.stages)
      for k, (one, other) in enumerate(zip(got, want)):
        np.testing.assert_allclose(one.z0, other.z0, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one.z, other.z, rtol=1e-4, atol=2e-5)
        self.assertEqual(one.steps, len(other.losses))
        self.assertAlmostEqual(one.loss, other.losses[-1], places=4)
        longest = max(edit.stage(k, c).end for c in range(2))
        self.assertEqual(one.shape, (2 + (kl and k == 0), longest))

  @parameterized.parameters((True, 1), (False, 2))
  def test_insert_chunks(self, texts, contexts):
    pair, layers = naive_oracle.pair('llama'), (0, 1)
    edits = chained(3, contexts=contexts)
    moments = facts.random_moments(pair.spec, layers, seed=0)
    states = sum(edit.stages for edit in edits)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((states, pair.spec.width)).astype(np.float32)
    settings = dict(z=z, grams=list(moments.gram))
    row = naive_rows.memit(50.0)
    want, _, _ = naive_rows.write(
        pair.torch, edits, layers, row, whole=texts, **settings
    )
    got = torch_baseline.insert(
        pair.torch, edits, layers=layers, weight=50.0, texts=texts, **settings
    )
    for one, other in zip(got.changes, want):
      scale = np.abs(other).max()
      np.testing.assert_allclose(one, other, atol=1e-5 * scale, rtol=1e-4)

  @parameterized.parameters('llama', 'gpt2')
  def test_insert(self, family):
    pair, layers = naive_oracle.pair(family), (0, 1)
    edits = facts.random_edits(5, seed=3)
    moments = facts.random_moments(pair.spec, layers, seed=0)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((5, pair.spec.width)).astype(np.float32)
    before = torch_model.down(pair.torch, 0).weight.clone()
    settings = dict(z=z, grams=list(moments.gram), weight=50.0)
    want, _ = naive_oracle.memit(pair.torch, edits, layers, **settings)
    with mock.patch.object(torch_baseline, '_ROWS', 4):
      got = torch_baseline.insert(pair.torch, edits, layers=layers, **settings)
    for one, other in zip(got.changes, want):
      scale = np.abs(other).max()
      np.testing.assert_allclose(one, other, atol=1e-5 * scale, rtol=1e-4)
    after = torch_model.down(pair.torch, 0).weight
    self.assertTrue(torch.equal(before, after))
    rows = [len(row) for edit in edits for row in edit.rows]
    plain = [len(edit.rows[0]) for edit in edits]
    self.assertGreaterEqual(got.tokens, 2 * (sum(rows) + sum(plain)))

  @cases.first(
      1,
      parameterized.parameters('gptj-6b', 'gpt2-xl', 'llama3-8b', 'qwen2.5-7b'),
  )
  def test_same_random_weights(self, name):
    preset = presets.PRESETS[name]
    fields, _ = presets.scaled(preset, 0.01, 0.01)
    fields['vocab_size'] = 101
    spec = families.spec_from_hf(fields)
    params = presets.random_params(spec, 0, 'float32')
    model = torch_model.from_params(fields, spec, params, 'float32')
    torch.set_num_threads(1)
    ids = np.arange(7)
    got = naive_oracle.run(model, ids).detach().numpy()
    columns = decoder.token_layout(jnp.ones((1, 7), bool))
    want = decoder.forward(spec, params, jnp.asarray(ids[None]), columns)[0]
    np.testing.assert_allclose(got, want, atol=2e-4)


class PresetTest(parameterized.TestCase):

  @parameterized.parameters(
      ('gptj-6b', 6.05e9, 28),
      ('llama3-8b', 8.03e9, 32),
      ('qwen2.5-7b', 7.62e9, 28),
      ('gpt2-xl', 1.56e9, 48),
  )
  def test_true_sizes(self, name, parameters, layers):
    preset = presets.PRESETS[name]
    fields, edited = presets.scaled(preset, 1.0, 1.0)
    self.assertEqual(fields, dict(preset.config))
    self.assertEqual(edited, preset.layers)
    spec = families.spec_from_hf(fields)
    self.assertEqual(spec.layers, layers)
    shapes = models.param_shapes(spec).values()
    found = sum(float(np.prod(shape, dtype=np.float64)) for shape in shapes)
    self.assertBetween(found / parameters, 0.99, 1.01)
    self.assertEqual(preset.target.threshold, 0)

  def test_settings_of_long_answers(self):
    found = presets.PRESETS['smollm2'].text_target
    want = (25, 25.0, 1e-3, 4.0, 0.0, 1e-2)
    names = ('steps', 'rate', 'decay', 'clamp', 'kl', 'threshold')
    self.assertEqual(tuple(getattr(found, name) for name in names), want)
    found = presets.PRESETS['llama3-8b'].text_target
    self.assertEqual((found.rate, found.threshold), (0.5, 0.0))

  def test_scaled(self):
    preset = presets.PRESETS['llama3-8b']
    fields, edited = presets.scaled(preset, 0.25, 0.25)
    spec = families.spec_from_hf(fields)
    self.assertEqual((spec.layers, spec.width, spec.mlp_width), (8, 1024, 3584))
    self.assertEqual((spec.heads, spec.kv_heads, spec.head_size), (8, 2, 128))
    self.assertEqual(edited, (1, 2))

  @parameterized.parameters('float32', 'bfloat16')
  def test_random_params(self, dtype):
    spec = models.tiny_spec('gptj')
    params = presets.random_params(spec, 0, dtype)
    kernel = params['layers']['mlp']['down']['kernel']
    self.assertEqual(kernel.dtype.name, dtype)
    self.assertEqual(kernel.shape, (3, 128, 32))
    std = np.std(np.asarray(kernel, np.float32)) * np.sqrt(128)
    self.assertAlmostEqual(float(std), 1.0, delta=0.05)
    self.assertFalse(bool(jnp.all(kernel[0] == kernel[1])))
    want = jax.tree.structure(models.random_params(spec, 0))
    self.assertEqual(jax.tree.structure(params), want)

  def test_random_moments(self):
    moments = presets.RandomMoments(96, 0)
    gram = moments.layer(3)
    self.assertEqual((gram.dtype.name, gram.shape), ('float64', (96, 96)))
    gram = np.asarray(gram)
    np.testing.assert_array_equal(gram, np.asarray(moments.layer(3)))
    values = np.linalg.eigvalsh(gram)
    self.assertGreater(values[0], 0.99)
    self.assertLess(values[-1], 10)


class StageTest(absltest.TestCase):

  def test_compile_time_apart(self):
    stage = stages_lib.Stage('a', 'edit', 2, [5.0, 1.0, 3.0, 2.0])
    stage.flops = {'float32': 4.0, 'float64': 1.0}
    self.assertEqual((stage.median, stage.compile), (2.0, 3.0))
    share = stage.share({'float32': 4.0, 'float64': 1.0})
    self.assertEqual(share, 1.0)

  def test_ceilings(self):
    found = machine.ceilings(64)
    self.assertContainsSubset(('bfloat16', 'float32', 'float64'), found)
    self.assertGreater(min(found.values()), 0)

  def test_pace(self):
    self.assertGreater(machine.pace('float32', 64), 0)
    # The median of half a second, not the best; the first call only says how
    # many products are run together.
    calls = iter([(None, s) for s in (0.9, 0.1, 0.3, 0.2)])
    with mock.patch.object(machine, 'timed', lambda call: next(calls)):
      self.assertEqual(machine.pace('bfloat16', 100), 2e6 / 0.2)

  def test_peak(self):
    self.assertGreater(machine.peak_bytes(), 2**20)


class ReportTest(absltest.TestCase):

  def test_append_keeps_what_was_there(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'b.md'
      report.append(path, '## One\n')
      self.assertEqual(path.read_text(), '# Benchmarks\n\n## One\n')
      report.append(path, '## Two\n')
      self.assertEqual(path.read_text(), '# Benchmarks\n\n## One\n\n## Two\n')
      self.assertLen(list(path.parent.iterdir()), 1)

  def test_without_matplotlib(self):
    with mock.patch.dict(sys.modules, {'matplotlib': None}):
      (note,) = report.plot({}, pathlib.Path('.'))
    self.assertIn('pip install', note)

  def test_where_figures_come_from(self):
    where = report.origin(['--preset=gpt2-xl'])
    self.assertEndsWith(where['command'], 'benchmark --preset=gpt2-xl')
    self.assertIn('cores', where['hardware'])


class TorchMissingTest(absltest.TestCase):

  def test_says_what_to_install(self):
    with mock.patch.dict(sys.modules, {'torch': None}):
      with self.assertRaisesRegex(InputError, 'pip install torch'):
        torch_model.require()


# Suffixes of one length: one shape to compile.
FACTS = [
    ('Oslo', 'Asia', 'Norway'),
    ('Rome', 'Peru', 'Italy'),
    ('Lima', 'Iran', 'Peru'),
]


def write_facts(folder):
  """Writes records; returns the file."""
  path = folder / 'facts.jsonl'
  rows = [
      {
          'prompt': '{} is in',
          'subject': subject,
          'target_new': new,
          'target_true': true,
          'paraphrases': [f'You find {subject} in'],
          'neighbours': [{'prompt': 'Bern is in', 'answer': 'Europe'}],
      }
      for subject, new, true in FACTS
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


PASSAGES = [
    ('Where is Oslo?', 'It lies by a fjord.'),
    ('Who sang?', 'The old men did so.'),
    ('What is long?', 'This text here is far longer than the others are.'),
    ('And then?', 'Rain fell on us.'),
]


def write_passages(folder):
  """Writes passages; returns the file."""
  path = folder / 'passages.jsonl'
  rows = [{'question': q, 'answer': a} for q, a in PASSAGES]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def chat_model(folder):
  """Writes a model whose tokenizer has a chat template; returns its folder."""
  model = tiny_model.make(folder / 'model')
  (model / 'chat_template.jinja').write_text(
      "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}:"
      '{{ m.content }};{% endfor %}{% if add_generation_prompt %}A:{% endif %}'
  )
  return model


TINY = presets.Preset(
    config=dict(
        model_type='llama', num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, hidden_size=32, intermediate_size=48,
        max_position_embeddings=256, rms_norm_eps=1e-5, vocab_size=384,
        tie_word_embeddings=False,
    ),
    layers=(1, 2),
    moment_weight=5.0,
    # One of the facts is below that from the start, one after a few steps.
    target=TargetConfig(steps=12, rate=0.3, threshold=6.415),
    source='nobody',
)  # fmt: skip


def prepare(model, data, given=(), **settings):
  """Prepares a benchmark of the tiny preset against the torch loop."""
  config = RunConfig(
      str(model), data=str(data), output_dir=str(model), **dict(given)
  )
  settings = config_lib.BenchmarkConfig(
      'tiny', repeat=1, baseline='torch', moments_rows=1, **settings
  )
  with mock.patch.dict(presets.PRESETS, tiny=TINY):
    return setup_lib.prepare(config, settings, silent)


@needs_torch
class BaselineTest(absltest.TestCase):

  def test_agrees_with_ours(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    folder = pathlib.Path(folder.name)
    model, data = tiny_model.make(folder / 'model'), write_facts(folder)
    setup = prepare(model, data, baseline_edits=3)
    # Threads cost tiny models far more than they gain.
    with mock.patch.object(os, 'cpu_count', return_value=1):
      stages, found = benchmark.measure(setup)
    self.assertEqual(found['edits'], 3)
    agree = found['agreement']
    self.assertEqual(agree['steps'], agree['torch_steps'])
    self.assertLen(set(agree['steps']), 3)
    self.assertGreater(agree['z_cosine_min'], 1 - 1e-6)
    self.assertGreater(agree['d_cosine_min'], 1 - 1e-5)
    self.assertLess(agree['change_difference'], 1e-3)
    self.assertLess(agree['change_difference_same_states'], 1e-4)
    for name in ('optimize', 'insert', 'both'):
      self.assertGreater(found[name]['flop_ratio'], 1, name)
      self.assertGreater(found[name]['ratio'], 0, name)
    results = self.results(setup, stages, found)
    section = report.section(results)
    self.assertIn('the published loop in PyTorch', section)
    self.assertNotIn('activations', section)
    results['workload']['dtype'] = 'bfloat16'
    self.assertIn('two products', report.section(results))
    self.assertIn('equal step counts for 3 of 3 edits', section)

  @pytest.mark.long
  def test_long_answers_agree_with_ours(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    folder = pathlib.Path(folder.name)
    model, data = chat_model(folder), write_passages(folder)
    given = dict(max_answer_tokens=24, on_bad_record='skip', num_edits=3)
    setup = prepare(
        model, data, given, window=5, value_steps=6, baseline_edits=2,
        max_new_tokens=4,
    )  # fmt: skip
    self.assertTrue(setup.independent)
    self.assertEqual([edit.number for edit in setup.edits], [1, 2, 4])
    states = [edit.stages for edit in setup.edits]
    self.assertGreater(min(states), 2)
    with mock.patch.object(os, 'cpu_count', return_value=1):
      stages, found = benchmark.measure(setup)
    agree = found['agreement']
    self.assertEqual(agree['states'], sum(states[:2]))
    self.assertEqual(agree['steps'], agree['torch_steps'])
    self.assertGreater(agree['z_cosine_min'], 1 - 1e-6)
    self.assertGreater(agree['d_cosine_min'], 1 - 1e-4)
    self.assertLess(agree['change_difference'], 1e-2)
    self.assertLess(agree['change_difference_same_states'], 1e-4)
    for name in ('optimize', 'insert', 'both'):
      self.assertGreater(found[name]['flop_ratio'], 1, name)
    named = {stage.name: stage for stage in stages}
    self.assertNotIn('evaluate', named)
    self.assertEqual(named['answer'].more['texts'], 3)
    self.assertBetween(named['answer'].count, 3, 12)
    more = named['optimize'].more
    labels = sum(len(edit.target) for edit in setup.edits)
    self.assertEqual(more['needed'], 6 * labels)
    self.assertEqual(more['states'], sum(states))
    results = self.results(setup, stages, found)
    section = report.section(results)
    for words in (
        f'equal step counts for {sum(states[:2])} of {sum(states[:2])} chunks',
        'chunks of 5', 'tokens a second', '| both |', 'tiny, 3 long answers',
    ):  # fmt: skip
      self.assertIn(words, section)
    self.assertNotIn('contexts', section)
    lines = report.plot(results, folder)
    self.assertEqual(
        lines, [f'plot: {folder / name}' for name in ('time.png', 'time.svg')]
    )
    self.assertGreater((folder / 'time.png').stat().st_size, 1000)

  def results(self, setup, stages, found):
    ceilings = dict.fromkeys(('float32', 'float64'), 1e11)
    with mock.patch.dict(presets.PRESETS, tiny=TINY):
      workload = benchmark.workload(setup)
    return {
        'origin': report.origin([]),
        'workload': workload,
        'ceilings': ceilings,
        'stages': [stage.facts(ceilings) for stage in stages],
        'baseline': found,
    }


class ColdTest(absltest.TestCase):

  def test_empty_cache_and_back(self):
    before = jax.config.jax_compilation_cache_dir
    with benchmark.compilation_cache(True):
      folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
      self.assertEmpty(list(folder.iterdir()))
    self.assertFalse(folder.exists())
    self.assertEqual(jax.config.jax_compilation_cache_dir, before)


class ProgramTest(parameterized.TestCase):

  def run_program(self, folder, *arguments):
    """Runs the program; returns its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.benchmark', *arguments,
         '--ceiling_size=64', f'--output_dir={folder / "out"}'],
        cwd=ROOT,
        env={
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'JAX_PLATFORMS': 'cpu',
            'JAXEDIT_CACHE': str(folder / 'cache'),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    return done

  def folder(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    return pathlib.Path(folder.name)

  def check_results(self, folder):
    results = json.loads((folder / 'out' / 'results.json').read_text())
    stages = {stage['name']: stage for stage in results['stages']}
    whole = stages.pop('collect', None)
    if whole:
      self.assertLen(whole['seconds'], 1)
      self.assertEqual(whole['count'], results['workload']['moments_tokens'])
      self.assertGreater(whole['ceiling_share'], 0)
    names = (
        'moments', 'factor', 'prefill', 'optimize', 'insert', 'merge',
        'evaluate',
    )  # fmt: skip
    self.assertEqual(tuple(stages), names)
    for name, stage in stages.items():
      self.assertLen(stage['seconds'], 2, name)
      self.assertGreater(stage['median_seconds'], 0, name)
      self.assertGreater(stage['ceiling_share'], 0, name)
      self.assertGreater(stage['peak'], 0, name)
      self.assertGreater(stage['bytes'], 0, name)
    more = stages['optimize']['more']
    self.assertGreater(more['pace'], 0)
    floor = stages['optimize']['flops']['float32']
    self.assertLess(more['strict_flops'], floor)
    self.assertGreaterEqual(more['computed_flops'], floor)
    return results, stages

  @pytest.mark.long
  def test_scaled_down_preset(self):
    folder = self.folder()
    model = tiny_model.make(folder / 'model')
    done = self.run_program(
        folder, '--preset=gpt2-xl', f'--model={model}',
        f'--data={write_facts(folder)}',
        '--scale_layers=0.07', '--scale_width=0.04', '--repeat=1',
        '--moments_rows=1', '--moments_tokens=1024', f'--append={folder / "B.md"}',
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    results, stages = self.check_results(folder)
    work = results['workload']
    self.assertEqual((work['model_layers'], work['random']), (3, True))
    self.assertEqual(work['moments_tokens'], 1024)
    self.assertIn(
        'collect, a token', (folder / 'out' / 'section.md').read_text()
    )
    self.assertEqual(stages['optimize']['more']['steps_a_state'], 25)
    suffix = work['suffix'] * 3 * work['contexts']
    self.assertAlmostEqual(stages['optimize']['more']['needed'], 25 * suffix)
    self.assertIsNone(results['baseline'])
    section = (folder / 'out' / 'section.md').read_text()
    self.assertEndsWith((folder / 'B.md').read_text(), section)
    for word in (
        '--preset=gpt2-xl',
        'GFLOP/s',
        'optimize, an edit',
        'jax',
        'with their change, by the clock: ',
        'right before and after',
    ):
      self.assertIn(word, section)
    self.assertIn(section, done.stdout)
    drawn = (folder / 'out' / 'time.png').exists()
    self.assertEqual(drawn, '\nplot: ' in done.stdout)
    self.assertEqual(not drawn, '\nno plot: ' in done.stdout)

  def test_flags_of_long_answers(self):
    code = (
        'import sys; from absl import flags; from jaxedit.runs import cli;'
        ' from experiments.benchmark import __main__ as b, config as c;'
        ' b.define_flags(); flags.FLAGS(sys.argv);'
        ' x, y = cli.read(c.RunConfig), cli.read(c.BenchmarkConfig);'
        ' assert not c.errors(x, y); print([y.window, y.overlap,'
        ' x.max_answer_tokens, y.layers, y.value_steps])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, '--preset=gpt2-xl', '--output_dir=o',
         '--window=6', '--overlap=1', '--layers=1,3', '--value_steps=3'],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout.strip(), '[6, 1, None, (1, 3), 3]')

  def test_no_answers_without_new_tokens(self):
    settings = config_lib.BenchmarkConfig(window=3, max_new_tokens=0)
    setup = types.SimpleNamespace(independent=True, settings=settings)
    self.assertEqual(judges.judges_of(setup), [])

  def test_wrong_flags_are_told_at_once(self):
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.benchmark', '--scale_width=0.5',
         '--overlap=3', '--activations=bfloat16'],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn('error: --output_dir is missing', done.stderr)
    self.assertIn('error: --scale_layers and --scale_width', done.stderr)
    self.assertIn('error: --overlap is about long answers', done.stderr)
    self.assertIn('error: --activations=bfloat16 rounds nothing', done.stderr)


if __name__ == '__main__':
  absltest.main()
