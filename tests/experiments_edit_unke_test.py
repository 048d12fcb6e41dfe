"""UnKE through the editing program, in parts too, and targets that are kept."""

from __future__ import annotations

from unittest import mock

import editing_runs
import jax
from absl.testing import absltest, parameterized
from editing_runs import LONG, TEXTS, Case, interrupted_at

from jaxedit import edited as edited_lib
from jaxedit.deltas import Dense
from jaxedit.models import tokenizer
from jaxedit.runs import editing, inputs, needs
from jaxedit.stats import corpora
from jaxedit.targets import run as targets_run


def setUpModule():
  global TEXT
  TEXT = editing_runs.Texts()


def tearDownModule():
  TEXT.close()


class UnkeTest(Case):

  def in_parts(self):
    """Lets two changes of a block fit into memory."""
    leaves = jax.tree.leaves(TEXT.base.params['layers'])
    block = 4 * sum(leaf[0].size for leaf in leaves)
    return mock.patch.object(inputs, '_SIDE_BYTES', 2 * block)

  def test_whole_run(self):
    done = TEXT.block
    self.assertEqual(done.code, 0, done.err)
    self.assertEqual(
        done.files, ['delta.safetensors', 'records.jsonl', 'results.json']
    )
    protocol = done.results['protocol']
    self.assertEqual(protocol['method'], 'unke+anyedit')
    self.assertEqual(protocol['preserved']['texts'], 2)
    self.assertEqual(protocol['settings']['steps'], 10)
    self.assertEqual(protocol['settings']['value']['threshold'], 5e-3)
    edited, metadata = done.delta()
    self.assertEqual(metadata['records'], [1, 2, 3, 4])
    self.assertTrue(metadata['independent'])
    leaves = {(d.site, d.leaf) for d in edited.deltas}
    self.assertIn(('mlp_norm', 'scale'), leaves)
    self.assertIn(('attn/q', 'kernel'), leaves)
    for delta in edited.deltas:
      self.assertIsInstance(delta, Dense)
      self.assertEqual((delta.layers, delta.value.shape[1]), ((1,), 4))
    for row in done.records:
      self.assertNotEqual(row['before']['text'], row['after']['text'])
      self.assertLess(row['distance'][-1], 0.9)
    self.assert_judged(TEXT, edited, list(enumerate(done.records)))

  def test_in_parts_is_the_same(self):
    with self.in_parts():
      done = self.succeed(TEXT.unke)
    self.assertEqual(done.files, ['deltas', 'records.jsonl', 'results.json'])
    for one, other in zip(done.records, TEXT.block.records, strict=True):
      self.assert_same_rows(one, other)
    for name in ('metrics', 'intervals', 'counts', 'protocol', 'categories'):
      self.assertEqual(done.results[name], TEXT.block.results[name])
    places = sorted((done.folder / 'deltas').iterdir())
    self.assertEqual(
        [place.name for place in places],
        ['00001.safetensors', '00002.safetensors'],
    )
    for begin, place in zip((0, 2), places):
      edited, metadata = edited_lib.load(place, model_hash=TEXT.base.hash)
      self.assertEqual(metadata['records'], [begin + 1, begin + 2])
      rows = list(enumerate(done.records[begin : begin + 2]))
      self.assert_judged(TEXT, edited, rows)

    with self.subTest('a run in one part leaves no parts of an earlier one'):
      again = self.succeed(TEXT.unke, output_dir=done.folder, overwrite=True)
      self.assertEqual(again.files, TEXT.block.files)

    with self.subTest('what is there belongs to the interrupted run'):
      with self.in_parts(), interrupted_at('00002.safetensors'):
        again = TEXT.unke(output_dir=done.folder, overwrite=True)
      self.assertEqual(again.code, 130)
      self.assertEqual(again.files, ['deltas', 'unfinished'])
      names = [path.name for path in (done.folder / 'deltas').iterdir()]
      self.assertEqual(names, ['00001.safetensors'])

  def test_batches(self):
    settings = dict(batch_size=2)
    apart = self.succeed(TEXT.unke, **settings)
    row = self.succeed(TEXT.unke, reset=False, save_model=True, **settings)
    edited, _ = apart.delta()
    for delta in edited.deltas:
      self.assertEqual(delta.value.shape[1], 2)
    self.assert_judged(TEXT, edited, list(zip((0, 0, 1, 1), apart.records)))
    rows = [(None, record) for record in row.records]
    self.assert_judged(TEXT, row.delta()[0], rows)
    metrics = row.results['metrics']
    for name, value in metrics['post'].items():
      self.assertAlmostEqual(metrics['saved'][name], value, delta=1e-6)

  def test_batches_in_parts(self):
    data = TEXT.write(*LONG)
    with self.in_parts():
      done = self.succeed(TEXT.unke, batch_size=2, data=data)
    places = sorted((done.folder / 'deltas').iterdir())
    found = [edited_lib.load(place) for place in places]
    self.assertEqual(
        [metadata['records'] for _, metadata in found], [[1, 2, 3, 4], [5, 6]]
    )
    rows = [(i // 2, row) for i, row in enumerate(done.records[:4])]
    self.assert_judged(TEXT, found[0][0], rows, data)

  def test_what_is_needed(self):
    """Preserved texts can be sampled; published padding is the tokenizer's."""
    words = tokenizer.load_tokenizer(TEXT.model)
    lines = TEXT.text.read_text().splitlines()[:2]
    ids = words(lines)['input_ids']
    sample = mock.create_autospec(corpora.sample, return_value=ids)
    with mock.patch.object(corpora, 'sample', sample):
      done = self.succeed(TEXT.unke, preserve='self', seed=3)
    self.assertEqual(sample.call_args.kwargs['batch_rows'], 2)
    self.assertEqual(sample.call_args.kwargs['seed'], 3)
    self.assertEqual(sample.call_args.kwargs['stop_ids'], [1])
    source = done.results['protocol']['preserved']
    self.assertEqual((source['corpus'], source['texts']), ('self', 2))
    other = TEXT.block.results['protocol']['preserved']
    self.assertNotEqual(source['ids_digest'], other['ids_digest'])

    pad = mock.Mock(wraps=needs.pad_id)
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with (
        mock.patch.object(needs, 'pad_id', pad),
        mock.patch.object(editing, 'judge', stop),
    ):
      TEXT.unke(parity='anyedit')
    self.assertEqual(pad(words), words.eos_token_id)
    self.assertEqual(pad.call_count, 2)
    current = stop.call_args.args[0]
    texts = current.resources[current.editor.needs[0]]
    for one in texts:  # two BOS tokens, as published
      self.assertEqual(one[:2].tolist(), [words.bos_token_id] * 2)


class KeptTargetsTest(Case):

  @parameterized.parameters('run', 'unke')
  def test_targets_are_kept(self, how):
    """A run whose targets are kept optimises nothing, and gives the same."""
    run, store = getattr(TEXT, how), TEXT.path('states')
    want = TEXT.whole if how == 'run' else TEXT.block
    self.assertEqual(self.succeed(run, states=store).records, want.records)
    written = {path: path.read_bytes() for path in store.iterdir()}
    self.assertLen(written, len(TEXTS))
    with mock.patch.object(
        targets_run, 'Scheduler', side_effect=AssertionError
    ):
      again = self.succeed(run, states=store)
      self.assertEqual(again.records, want.records)
      self.assertEqual(again.results['work']['steps'], 0)
      self.assertEqual(again.results['work']['states_kept'], len(TEXTS))
      if how == 'unke':
        return
      # What is inserted otherwise has the same targets.
      other = self.succeed(run, states=store, moment_weight=1)
    self.assertNotEqual(other.records, want.records)
    self.assertEqual({p: p.read_bytes() for p in store.iterdir()}, written)
    self.succeed(run, states=store, value_steps=3)
    self.assertLen(list(store.iterdir()), 2 * len(TEXTS))
    path = next(iter(written))
    path.write_bytes(b'{}')
    done = run(states=store)
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, f'{path}: is cut short or damaged.*delete it')


if __name__ == '__main__':
  absltest.main()
