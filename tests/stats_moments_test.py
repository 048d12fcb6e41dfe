"""Second moments against a float64 oracle, and what must not change them."""

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
import tracemalloc
import zipfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import io
from jaxedit.batching import packer
from jaxedit.models import decoder
from jaxedit.stats import accumulate, moments
from jaxedit.testing import models
from jaxedit.types import PADDING, InputError, Stopped, Tap

SOURCE = moments.Source('hash', 'corpus', 0)


def draw_texts(number=23, longest=14, vocab=97, seed=0):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, longest + 1, number)
  return [rng.integers(0, vocab, size).tolist() for size in sizes]


def oracle(spec, params, texts, layers, site):
  """The same average from one text a row, in numpy float64."""
  tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
  valid = np.zeros(tokens.shape, bool)
  for i, text in enumerate(texts):
    tokens[i, : len(text)] = text
    valid[i, : len(text)] = True

  @jax.jit
  def keys_of(params):
    layout = decoder.token_layout(valid)
    h = decoder.embed(spec, params, tokens, layout)
    tap = Tap(site, tuple(range(spec.layers)))
    return decoder.run_layers(
        spec, params, h, layout, start=0, stop=spec.layers, taps=(tap,)
    )[1][0]

  keys = np.asarray(keys_of(params), np.float64)[list(layers)][:, valid]
  return np.einsum('lnf,lng->lfg', keys, keys) / valid.sum(), valid.sum()


def temporary_folder(test):
  """A folder that goes with the test, under any test runner."""
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


class PackingTest(parameterized.TestCase):

  def test_every_token_once_with_restarting_positions(self):
    texts = draw_texts()
    seen = []
    for row in packer.first_fit(texts, 16):
      self.assertNotIn(1, row.segment_ids)
      for segment_ids in range(2, row.segment_ids.max() + 1):
        here = row.segment_ids == segment_ids
        seen.append(row.tokens[here].tolist())
        np.testing.assert_array_equal(
            row.positions[here], np.arange(here.sum())
        )
      self.assertEqual(row.texts, row.segment_ids.max() - 1)
      self.assertEqual(row.count, np.sum(row.segment_ids != PADDING))
    self.assertCountEqual(map(tuple, seen), map(tuple, texts))

  def test_long_texts_lose_their_end_and_empty_ones_go(self):
    rows = list(packer.first_fit([[1] * 50, [], [2] * 50], 8, max_length=5))
    self.assertLen(rows, 2)
    np.testing.assert_array_equal(rows[0].tokens, [1] * 5 + [0] * 3)
    self.assertEqual([row.count for row in rows], [5, 5])

  def test_streams(self):
    def endless():
      while True:
        yield [1, 2, 3]

    row = next(packer.first_fit(endless(), 8, open_rows=2))
    self.assertEqual(row.count, 6)

  def test_sizes_are_checked(self):
    with self.assertRaisesRegex(InputError, 'at least 1'):
      list(packer.first_fit([[1]], 0))


class CollectTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.spec = models.tiny_spec('llama')
    self.params = models.random_params(self.spec, 0)
    self.texts = draw_texts()

  def collect(self, texts=None, spec=None, params=None, **settings):
    spec, params = spec or self.spec, params or self.params
    width = settings.pop('width', 16)
    texts = self.texts if texts is None else texts
    defaults = dict(
        layers=(0, 1, 2),
        source=SOURCE,
        cap=10**9,
        batch_rows=3,
        merge_batches=2,
    )
    rows = packer.first_fit(texts, width)
    return moments.collect(spec, params, rows, **(defaults | settings))

  @parameterized.product(family=models.FAMILIES)
  def test_equals_oracle_on_unpacked_texts(self, family):
    spec = models.tiny_spec(family)
    params = models.random_params(spec, 1)
    got = self.collect(spec=spec, params=params)
    want, count = oracle(spec, params, self.texts, (0, 1, 2), 'mlp/down')
    self.assertEqual(got.count, count)
    self.assertEqual(got.gram.dtype, np.float64)
    scale = np.abs(want).max()
    np.testing.assert_allclose(got.gram / scale, want / scale, atol=1e-6)

  def test_other_site(self):
    got = self.collect(site='attn/out', layers=(2, 0))
    self.assertEqual(got.layers, (0, 2))
    want, _ = oracle(self.spec, self.params, self.texts, (0, 2), 'attn/out')
    scale = np.abs(want).max()
    np.testing.assert_allclose(got.gram / scale, want / scale, atol=1e-6)

  def test_packing_changes_nothing(self):
    alone = self.collect(width=14, batch_rows=1)
    self.assertLess(alone.provenance['padding_share'], 1)
    packed = self.collect(width=40)
    scale = np.abs(alone.gram).max()
    np.testing.assert_allclose(
        packed.gram / scale, alone.gram / scale, atol=1e-6
    )

  def test_one_pass_equals_a_pass_a_layer(self):
    every = self.collect()
    for layer in range(3):
      one = self.collect(layers=(layer,))
      np.testing.assert_allclose(one.layer(layer), every.layer(layer), 1e-6)

  def test_merging_many_batches_equals_one(self):
    many = self.collect(merge_batches=1)
    one = self.collect(batch_rows=32)
    np.testing.assert_allclose(many.gram, one.gram, rtol=1e-5, atol=1e-6)

  def test_is_exactly_symmetric(self):
    gram = self.collect().gram
    np.testing.assert_array_equal(gram, gram.transpose(0, 2, 1))

  def test_float64_model(self):
    with jax.enable_x64(True):
      params = models.random_params(self.spec, 0, jnp.float64)
      got = self.collect(params=params)
      want, _ = oracle(self.spec, params, self.texts, (0, 1, 2), 'mlp/down')
    np.testing.assert_allclose(got.gram, want, rtol=1e-10, atol=1e-12)

  def test_cap_stops_after_a_row(self):
    got = self.collect(cap=30)
    self.assertBetween(got.count, 30, 45)
    self.assertEqual(got.provenance['tokens'], got.count)
    other = self.collect(cap=30, merge_batches=1)
    self.assertEqual(got.count, other.count)
    self.assertEqual(
        got.provenance['corpus_sha256'], other.provenance['corpus_sha256']
    )

  def test_bfloat16(self):
    params = models.random_params(self.spec, 0, jnp.bfloat16)
    got = self.collect(params=params)
    self.assertEqual(got.provenance['dtype'], 'bfloat16')
    want = self.collect().gram
    self.assertLess(np.abs(got.gram - want).max(), 0.05 * np.abs(want).max())

  def test_second_batch_does_not_compile(self):
    self.collect()
    before = moments.add_batch._cache_size()
    self.collect(texts=draw_texts(seed=1))
    self.assertEqual(moments.add_batch._cache_size(), before)

  def test_nothing_follows_the_last_key(self):
    # Widths at which the down projection of one layer dominates all else.
    spec = models.tiny_spec('llama', mlp_width=512, width=512)
    params = models.random_params(spec, 0)
    rows = list(packer.first_fit(self.texts, 64))[:1]
    batch = packer.stack(rows, 2)
    shape = jax.ShapeDtypeStruct((1, 512, 512), jnp.float32)

    def cost(fn):
      lowered = jax.jit(fn).lower(shape, params, batch)
      return lowered.compile().cost_analysis()['flops']

    def keys(total, params, batch):
      return moments.add_batch(
          total, spec, params, batch, layers=(0,), site='mlp/down'
      )

    def keys_and_output(total, params, batch):
      layout = decoder.TokenLayout(batch.positions, batch.segment_ids)
      h = decoder.embed(spec, params, batch.tokens, layout)
      h, seen = decoder.run_layer(spec, params, h, layout, layer=0)
      real = batch.segment_ids != PADDING
      return total + moments.gram(seen['mlp/down'], real)[None], h

    down = 2 * 2 * 64 * 512 * 512
    self.assertGreater(cost(keys_and_output) - cost(keys), 0.9 * down)

  @parameterized.parameters(
      (dict(layers=(0, 3)), 'between 0 and 2'),
      (dict(layers=()), 'one or more'),
      (dict(layers=(1, 1)), 'different layers'),
      (dict(site='mlp/sideways'), "no linear map 'mlp/sideways'"),
      (dict(cap=0, batch_rows=0), 'cap is 0.*\n.*batch_rows is 0'),
      (dict(width=65), 'at most 64'),
      (dict(texts=[]), 'no text'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(InputError, message):
      self.collect(**settings)

  def test_refuses_keys_that_are_not_finite(self):
    layers = jax.tree.map(lambda x: x, self.params['layers'])
    layers['mlp']['up']['kernel'] = (
        layers['mlp']['up']['kernel'].at[1].set(jnp.nan)
    )
    with self.assertRaisesRegex(InputError, r'layers \[1, 2\] .*not finite'):
      self.collect(params={**self.params, 'layers': layers})


class ResumeTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.spec = models.tiny_spec('llama')
    self.params = models.random_params(self.spec, 0)
    self.path = temporary_folder(self) / 'a.partial'
    self.texts = draw_texts(number=60)

  def collect(self, rows=None, **settings):
    if rows is None:
      rows = packer.first_fit(self.texts, 16)
    defaults = dict(
        layers=(0, 2), source=SOURCE, cap=10**9, batch_rows=2, merge_batches=2,
        checkpoint=self.path, checkpoint_seconds=0.0,
    )  # fmt: skip
    return moments.collect(
        self.spec, self.params, rows, **(defaults | settings)
    )

  def interrupt(self, after):
    def stopping():
      for i, row in enumerate(packer.first_fit(self.texts, 16)):
        if i == after:
          raise KeyboardInterrupt
        yield row

    with self.assertRaises(KeyboardInterrupt):
      self.collect(stopping())

  def rows(self):
    return io.read_tensors(self.path, accumulate.KIND, '')[1]['rows']

  def test_bits_are_those_of_an_uninterrupted_run(self):
    whole = self.collect(checkpoint=None)
    for after in (9, 17):  # the second is a continued run, interrupted again
      self.interrupt(after)
      done = self.rows()
    self.assertGreaterEqual(done, 8)
    computed = []
    add = moments.add_batch
    self.addCleanup(setattr, moments, 'add_batch', add)
    moments.add_batch = lambda *a, **k: computed.append(1) or add(*a, **k)
    resumed = self.collect()
    rows = len(list(packer.first_fit(self.texts, 16)))
    self.assertLen(computed, -(-(rows - done) // 2))
    np.testing.assert_array_equal(resumed.gram, whole.gram)
    self.assertEqual(dict(resumed.provenance), dict(whole.provenance))

  def test_a_stopped_run_saves_what_it_has(self):
    """Within a partial sum, without waiting for the time of a checkpoint."""
    settings = dict(merge_batches=8, checkpoint_seconds=1e9)
    whole = self.collect(checkpoint=None, **settings)

    def stopping(after):
      """Stops a run after so many batches, counted or computed."""
      calls = itertools.count(1)

      def advance(tokens):
        del tokens
        if next(calls) == after:
          raise Stopped('now')

      return lambda *stage: contextlib.nullcontext(advance)

    for after, rows in ((3, 6), (2, 6), (3, 6), (5, 10)):
      with self.assertRaises(Stopped) as caught:
        self.collect(progress=stopping(after), **settings)
      self.assertEqual(caught.exception.saved, [str(self.path)])
      self.assertEqual(self.rows(), rows)
    resumed = self.collect(**settings)
    np.testing.assert_array_equal(resumed.gram, whole.gram)
    self.assertEqual(dict(resumed.provenance), dict(whole.provenance))

  @parameterized.parameters(
      (dict(layers=(0, 1)), 'another layers'),
      (dict(source=SOURCE._replace(seed=1)), 'another seed'),
      (dict(source=SOURCE._replace(model='x'), cap=9), 'another model, cap'),
      (dict(batch_rows=1), 'another batch_rows'),
  )
  def test_refuses_another_run(self, settings, message):
    self.interrupt(9)
    with self.assertRaisesRegex(InputError, f'{message}.*delete it'):
      self.collect(**settings)

  def test_refuses_other_text(self):
    self.interrupt(9)
    with self.assertRaisesRegex(InputError, 'other text.*delete it'):
      self.collect(packer.first_fit(self.texts[::-1], 16))

  def test_refuses_a_corpus_that_became_shorter(self):
    self.interrupt(17)
    with self.assertRaisesRegex(InputError, 'other text.*delete it'):
      self.collect(packer.first_fit(self.texts[:5], 16))

  def test_refuses_a_damaged_checkpoint(self):
    self.interrupt(9)
    data = self.path.read_bytes()
    self.path.write_bytes(data[: len(data) // 2])
    with self.assertRaisesRegex(InputError, 'damaged.*delete it'):
      self.collect()


class FilesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = temporary_folder(self)
    self.path = self.folder / 'deep' / 'm.safetensors'
    rng = np.random.default_rng(0)
    half = rng.standard_normal((3, 8, 20))
    self.moments = moments.Moments(
        (4, 6, 7),
        half @ half.transpose(0, 2, 1) / 20,
        20,
        {'model': 'abc', 'site': 'mlp/down', 'layers': [4, 6, 7]},
    )

  def test_round_trip(self):
    moments.save(self.path, self.moments)
    back = moments.load(self.path, model_hash='abc')
    self.assertEqual(back.layers, (4, 6, 7))
    self.assertEqual(back.count, 20)
    self.assertEqual(back.gram.dtype, np.float64)
    np.testing.assert_array_equal(back.gram, self.moments.gram)
    self.assertEqual(dict(back.provenance), dict(self.moments.provenance))
    some = moments.load(self.path, layers=[7, 4])
    np.testing.assert_array_equal(some.layer(4), self.moments.gram[0])
    self.assertEqual(some.gram.shape[0], 2)
    self.assertLen(list(self.path.parent.iterdir()), 1)

  def test_unknown_layer(self):
    with self.assertRaisesRegex(InputError, 'layer 5, only of 4, 6, 7'):
      self.moments.layer(5)

  def test_tells_every_mismatch_at_once(self):
    moments.save(self.path, self.moments)
    with self.assertRaises(InputError) as caught:
      moments.load(
          self.path, model_hash='other', layers=[4, 5], site='attn/out'
      )
    self.assertLen(caught.exception.problems, 3)
    text = str(caught.exception)
    self.assertIn("hash 'abc', not of 'other'", text)
    self.assertIn('of layers 4, 6, 7, not of 5', text)
    self.assertIn('experiments.collect_moments', text)

  def test_refuses_missing_and_foreign_files(self):
    with self.assertRaisesRegex(InputError, 'no such file.*collect them'):
      moments.load(self.path)
    self.path.parent.mkdir()
    for kind, words in (('else', 'something else'), ('jaxedit 5', 'jaxedit 5')):
      io.write_tensors(self.path, {'x': np.zeros(2)}, kind=kind, record={})
      with self.assertRaisesRegex(InputError, f'{words}.*not second moments'):
        moments.load(self.path)
    for sign in (b'PK', b'GGUF', b'\x80', b'{', b'\x1f\x8b', b'\x93NUMPY'):
      self.path.write_bytes(sign + b'x' * 20)
      with self.assertRaisesRegex(InputError, 'not second moments') as caught:
        moments.load(self.path)
      # The advice names a file that is not there yet.
      self.assertIn('m-2.safetensors', str(caught.exception))
    self.path.write_bytes(b'not a file at all')
    with self.assertRaisesRegex(InputError, 'damaged.*collect them'):
      moments.load(self.path)

  @parameterized.parameters(
      (dict(count=0), 'says that 0 tokens'),
      (dict(count=-5), 'says that -5 tokens'),
      (dict(count='7'), "record has '7' as 'count'"),
      (dict(provenance=[]), "record has '\\[\\]' as 'provenance'"),
      (dict(layers=[4, 6, {}]), 'its layers are no numbers'),
      (dict(layers=[4, 5]), 'layer 5 has no matrix'),
      (dict(gram=np.full((3, 8, 8), np.nan)), 'layer 4: .* not finite'),
      (dict(gram=np.stack([-np.eye(8)] * 3)), 'layer 4: .* negative'),
      (dict(gram=np.stack([np.ones((8, 8)) - 2 * np.eye(8)] * 3)), 'negative'),
      (dict(gram=np.stack([3 - 2 * np.eye(8)] * 3)), 'larger than the squares'),
      (dict(gram=np.ones((3, 8, 7))), 'layer 4 has no matrix'),
      (dict(gram=np.stack([np.eye(7)] * 3)), 'width 7, where the model has 8'),
      (dict(gram=np.ones((3, 8, 8), np.float32)), 'layer 4 has no matrix'),
  )
  def test_refuses_what_cannot_be(self, changes, pattern):
    record = {'count': 10, 'layers': [4, 6, 7], 'provenance': {
        'site': 'mlp/down', 'model': 'abc'}} | changes  # fmt: skip
    grams = record.pop('gram', np.stack([np.eye(8)] * 3))
    tensors = {f'gram/{n}': gram for n, gram in zip((4, 6, 7), grams)}
    kind = 'jaxedit second moments 1'
    io.write_tensors(self.path, tensors, kind=kind, record=record)
    with self.assertRaisesRegex(InputError, pattern):
      moments.load(self.path, width=8)

  @parameterized.parameters(4, 100, -8)
  def test_refuses_a_file_cut_short(self, size):
    moments.save(self.path, self.moments)
    self.path.write_bytes(self.path.read_bytes()[:size])
    with self.assertRaisesRegex(InputError, 'damaged'):
      moments.load(self.path)

  def test_refuses_altered_bytes(self):
    moments.save(self.path, self.moments)
    data = bytearray(self.path.read_bytes())
    data[-5] ^= 1
    self.path.write_bytes(bytes(data))
    with self.assertRaisesRegex(InputError, 'gram/7 is missing or damaged'):
      moments.load(self.path)
    moments.load(self.path, layers=[4])  # untouched

  def test_failed_write_leaves_the_old_file(self):
    moments.save(self.path, self.moments)
    before = self.path.read_bytes()
    blocked = self.path / 'below_a_file'
    with self.assertRaisesRegex(InputError, 'cannot be written'):
      moments.save(blocked, self.moments)
    self.assertEqual(self.path.read_bytes(), before)


class PublishedTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = temporary_folder(self)
    keys = np.random.default_rng(0).standard_normal((2, 50, 8))
    self.sums = np.einsum('lnf,lng->lfg', keys, keys).astype(np.float32)
    for i, layer in enumerate((5, 17)):
      self.write(f'transformer.h.{layer}.mlp.fc_out', self.sums[i])
    self.write('transformer.h.5.attn.out_proj', self.sums[1])
    (self.folder / 'notes.txt').write_text('kept apart')

  def write(self, module, total, size=100000, **entries):
    path = self.folder / f'{module}_float32_mom2_{size}.npz'
    given = {
        'mom2.constructor': 'util.runningstats.SecondMoment()',
        'mom2.count': 50,
        'mom2.mom2': total,
        'sample_size': size,
    }
    np.savez(path, **(given | entries))
    return path

  def test_reads_sums_as_averages(self):
    got = moments.load_npz(
        self.folder, layers=[17, 5], width=8, model_hash='abc'
    )
    self.assertEqual(got.layers, (17, 5))
    self.assertEqual(got.count, 50)
    self.assertEqual(got.gram.dtype, np.float64)
    want = self.sums.astype(np.float64) / 50
    np.testing.assert_allclose(got.layer(17), want[1], rtol=1e-6, atol=1e-6)
    self.assertEqual(got.provenance['model'], 'abc')
    moments.save(self.folder / 'm', got)
    moments.load(self.folder / 'm', model_hash='abc', layers=[5])

  def test_other_site_and_single_file(self):
    got = moments.load_npz(self.folder, layers=[5], site='attn/out')
    np.testing.assert_allclose(got.gram[0], self.sums[1] / 50, rtol=1e-5)
    one = sorted(self.folder.glob('*h.17*'))[0]
    self.assertEqual(moments.load_npz(one, layers=[17]).layers, (17,))

  def test_tells_every_fault_at_once(self):
    self.write('transformer.h.5.mlp.fc_out', self.sums[0], size=1000)
    self.write('transformer.h.6.mlp.fc_out', self.sums[0][:3])
    cut = self.write('transformer.h.7.mlp.fc_out', self.sums[0])
    cut.write_bytes(cut.read_bytes()[:200])
    pickled = np.array([{'a': 1}], object)
    self.write('transformer.h.8.mlp.fc_out', pickled)
    self.write('transformer.h.9.mlp.fc_out', self.sums[0], **{'mom2.count': 0})
    with self.assertRaises(InputError) as caught:
      moments.load_npz(self.folder, layers=[4, 5, 6, 7, 8, 9, 17], width=8)
    problems = caught.exception.problems
    self.assertLen(problems, 6)
    self.assertIn('0 archives of mlp/down in layer 4', problems[0])
    self.assertIn('2 archives of mlp/down in layer 5', problems[1])
    self.assertIn('mom2.mom2.npy has shape [3, 8], where [8, 8]', problems[2])
    self.assertIn('no readable', problems[3])
    self.assertIn('no readable', problems[4])
    self.assertIn('counts 0 tokens', problems[5])

  def test_archives_that_hurt(self):
    path = self.write('transformer.h.3.mlp.fc_out', self.sums[0])
    whole = path.read_bytes()

    def header(at, value, width=2):
      # In the entry's own header and, 10 bytes further, in the directory.
      blob = bytearray(whole)
      for sign, shift in ((b'PK\3\4', 0), (b'PK\1\2', 2)):
        start = blob.find(sign)
        while start >= 0:
          place = slice(start + at + shift, start + at + shift + width)
          blob[place] = value.to_bytes(width, 'little')
          start = blob.find(sign, start + 4)
      return bytes(blob)

    big = whole.replace(b'(8, 8), }   ', b'(8, 8**9), }')
    wide = whole.replace(b"'shape': (8, 8)", b"'shape':(8<<9,)")
    for blob, pattern in (
        (header(6, 1), 'encrypted'),
        (header(8, 93), 'compress'),
        (header(8, 12), 'compress'),
        (big, 'no readable'),
        (wide, 'no readable'),
        (whole[:-30], 'no readable'),
        (b'', 'no zip archive'),
        (whole[:-12] + b'\xff' * 12, 'no readable'),
    ):
      path.write_bytes(blob)
      with self.assertRaisesRegex(InputError, pattern):
        moments.load_npz(path, layers=[3], width=8)
    for entries in (
        {'mom2.count': np.inf}, {'mom2.count': 1e30}, {'mom2.count': np.nan},
        {'mom2.count': -5}, {'mom2.count': 2.5}, {'mom2.count': [50]},
        {'mom2.mom2': -self.sums[0]}, {'mom2.mom2': self.sums[0] * np.nan},
    ):  # fmt: skip
      self.write('transformer.h.3.mlp.fc_out', self.sums[0], **entries)
      with self.assertRaises(InputError):
        moments.load_npz(path, layers=[3], width=8)

  def test_an_archive_is_unpacked_as_far_as_its_shape_goes(self):
    path = self.folder / 'h.3.mlp.fc_out_float32_mom2_1.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      with archive.open('mom2.mom2.npy', 'w') as stream:
        head = {'descr': '<f4', 'fortran_order': False, 'shape': (8, 8)}
        np.lib.format.write_array_header_1_0(stream, head)
        for _ in range(64):
          stream.write(bytes(1 << 20))
      with archive.open('mom2.count.npy', 'w') as stream:
        np.lib.format.write_array(stream, np.asarray(50))
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    with self.assertRaisesRegex(InputError, 'not the bytes of its shape'):
      moments.load_npz(path, layers=[3], width=8)
    self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 22)

  def test_wrong_model_width(self):
    with self.assertRaisesRegex(InputError, r'where \[16, 16\] is needed'):
      moments.load_npz(self.folder, layers=[5], width=16)


class MirrorTest(parameterized.TestCase):

  @parameterized.parameters(1, 5, 11, 12, 99)
  def test_blocks_do_not_matter(self, block):
    upper = np.triu(np.random.default_rng(0).standard_normal((2, 12, 12)))
    want = upper + np.triu(upper, 1).swapaxes(1, 2)
    # What lies below the diagonal is not read.
    got = upper + np.tril(np.ones((12, 12)), -1)
    with mock.patch.object(moments, '_MIRRORED', block):
      moments._mirror(got)
    np.testing.assert_array_equal(got, want)


class MomentsTest(absltest.TestCase):

  def test_is_frozen(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      moments.Moments((0,), np.eye(2)[None], 1, {}).count = 2


if __name__ == '__main__':
  absltest.main()
