"""Embeddings by content and nearest entries, against numpy."""

from __future__ import annotations

import pathlib
import tempfile
from unittest import mock

import editors
import jax.numpy as jnp
import models_encoder_test
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import retrieval
from jaxedit.models import encoder as encoder_lib
from jaxedit.types import InputError


def oracle(queries, entries, k):
  """Sorts everything; of equal scores the lowest index is first."""
  scores = queries.astype(np.float64) @ entries.astype(np.float64).T
  scores = np.where(np.isnan(scores), -np.inf, scores)
  order = np.argsort(-scores, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(scores, order, axis=1), order


class SearchTest(parameterized.TestCase):

  @parameterized.product(
      count=(1, 5, 300), k=(1, 7), block=(7, 64, 1000), device=(False, True)
  )
  def test_numpy(self, count, k, block, device):
    rng = np.random.default_rng([count, k])
    queries = rng.standard_normal((count, 12)).astype(np.float32)
    entries = rng.standard_normal((203, 12)).astype(np.float32)
    rows = min(256, 1 << (count - 1).bit_length())
    scores, indices = retrieval.search(
        queries,
        jnp.asarray(entries) if device else entries,
        k,
        block_bytes=4 * block * (12 + rows),
    )
    want, order = oracle(queries, entries, k)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(5, 16, 100)
  def test_of_equal_scores_the_lowest_index_is_first(self, block):
    # Whole numbers, so that products are exact.
    rng = np.random.default_rng(0)
    entries = rng.integers(-1, 2, (97, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, (4, 3)).astype(np.float32)
    got = retrieval.search(queries, entries, 5, block_bytes=4 * block * 7)
    for found, want in zip(got, oracle(queries, entries, 5)):
      np.testing.assert_array_equal(found, want)

  def test_what_is_not_a_number_comes_last_and_once(self):
    entries = np.arange(10, dtype=np.float32)[:, None]
    entries[3:9] = np.nan
    queries = np.ones((1, 1), np.float32)
    scores, indices = retrieval.search(queries, entries, 10, block_bytes=1)
    self.assertEqual(indices.tolist(), [[9, 2, 1, 0, 3, 4, 5, 6, 7, 8]])
    self.assertTrue((scores[0, 4:] == -np.inf).all())
    # Blocks that overlap at the end name no entry twice.
    _, indices = retrieval.search(queries, entries, 4, block_bytes=1)
    self.assertEqual(indices.tolist(), [[9, 2, 1, 0]])
    _, indices = retrieval.search(queries, entries, 7, block_bytes=1)
    self.assertEqual(indices.tolist(), [[9, 2, 1, 0, 3, 4, 5]])

  def test_one_program_for_any_number_of_entries(self):
    rng = np.random.default_rng(0)
    entries = rng.standard_normal((90, 6)).astype(np.float32)
    given = dict(block_bytes=4 * 10 * (6 + 4))
    retrieval.search(entries[:4], entries, 2, **given)
    with editors.compiles() as found:
      retrieval.search(entries[3:6], entries[:47], 2, **given)
    self.assertEqual(found.count, 0)
    scores, indices = retrieval.search(entries[:0], entries, 2, **given)
    self.assertEqual((scores.shape, indices.shape), ((0, 2), (0, 2)))

  def test_refused(self):
    entries = np.zeros((4, 3), np.float32)
    for k in (0, 5):
      with self.assertRaisesRegex(InputError, f'k is {k}; .* to the 4 entries'):
        retrieval.search(entries, entries, k)
    with self.assertRaisesRegex(InputError, 'have 2 dimensions and entries 3'):
      retrieval.search(entries[:, :2], entries, 1)


class EmbedTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
        cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    models_encoder_test.write_encoder(cls.root)
    cls.encoder = encoder_lib.load_encoder(cls.root)
    rng = np.random.default_rng(0)
    letters = list('abcdefghij')
    cls.texts = [
        ' '.join(rng.choice(letters, n)) for n in rng.integers(1, 120, 40)
    ]

  def test_many_batches_are_one_by_one(self):
    small = retrieval.embed(self.encoder, self.texts, token_budget=256)
    large = retrieval.embed(self.encoder, self.texts)
    alone = np.concatenate(
        [retrieval.embed(self.encoder, [text]) for text in self.texts]
    )
    np.testing.assert_allclose(small, alone, atol=1e-6)
    np.testing.assert_allclose(large, alone, atol=1e-6)

  def test_a_length_is_one_program(self):
    retrieval.embed(self.encoder, self.texts, token_budget=256)
    with editors.compiles() as found:
      retrieval.embed(self.encoder, self.texts[::-1], token_budget=256)
    self.assertEqual(found.count, 0)

  def test_cache(self):
    path = self.root / 'cache' / 'embeddings.safetensors'
    cache = retrieval.EmbeddingCache(path)
    first = retrieval.embed(self.encoder, self.texts[:9], cache=cache)
    cls = retrieval.embed(
        self.encoder, self.texts[:2], cache=cache, pooling='cls'
    )
    cache.save()
    again = retrieval.EmbeddingCache(path)
    self.assertLen(again, 11)
    with mock.patch.object(retrieval, '_embed', side_effect=AssertionError):
      found = retrieval.embed(self.encoder, self.texts[:9], cache=again)
      np.testing.assert_array_equal(found, first)
      found = retrieval.embed(
          self.encoder, self.texts[:2], cache=again, pooling='cls'
      )
      np.testing.assert_array_equal(found, cls)
    both = retrieval.embed(self.encoder, self.texts[5:12], cache=again)
    np.testing.assert_array_equal(both[:4], first[5:])
    new = retrieval.embed(self.encoder, self.texts[9:12])
    np.testing.assert_allclose(both[4:], new, atol=1e-6)
    path.write_bytes(path.read_bytes()[:-9])
    with self.assertRaisesRegex(InputError, 'delete it'):
      retrieval.EmbeddingCache(path)

  def test_content_is_text_and_weights(self):
    keys = {retrieval.content_key(self.encoder, 'a', 'mean')}
    keys.add(retrieval.content_key(self.encoder, 'b', 'mean'))
    keys.add(retrieval.content_key(self.encoder, 'a', 'cls'))
    with tempfile.TemporaryDirectory() as folder:
      models_encoder_test.write_encoder(pathlib.Path(folder), hidden_size=20)
      other = encoder_lib.load_encoder(folder)
    keys.add(retrieval.content_key(other, 'a', 'mean'))
    self.assertLen(keys, 4)


if __name__ == '__main__':
  absltest.main()
