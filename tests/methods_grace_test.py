"""GRACE: the codebook's rules against tables worked by hand; keys and values."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxedit.methods import grace
from jaxedit.methods.grace import Entry, GraceConfig
from jaxedit.testing import models
from jaxedit.types import InputError

SPEC = models.tiny_spec('llama')
A, B = (3, 4), (4, 3)  # targets of equal mean


def book(*edits: tuple[float, tuple[int, ...]], capacity: int = 4):
  """A codebook of keys on a line, each edit's value its number."""
  state = grace.empty(capacity, 2, 1, np.float64)
  entries = [
      Entry(np.array([x, 0.0]), np.array([float(i)]), grace.label_of(target))
      for i, (x, target) in enumerate(edits, 1)
  ]
  return grace.entered(state, entries, 1.0)


class CodebookTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('far', [(0, A), (2.5, B)], [0, 2.5], [1, 1], [1, 2]),
      ('split', [(0, A), (1.5, B)], [0, 1.5], [0.75 - 1e-5, 0.75], [1, 2]),
      ('joined', [(0, A), (1.5, A)], [0], [1.5], [1]),
      ('joined_inside', [(0, A), (0.5, A)], [0], [1], [1]),
      ('edited_again', [(0, A), (0, B)], [0], [1], [2]),
      (
          'a_split_widens_nothing',
          [(0, A), (0.4, B), (-0.9, B)],
          [0, 0.4, -0.9],
          [0.2 - 1e-5, 0.2, 0.45],
          [1, 2, 3],
      ),
      (
          'nearest_counts',
          [(0, A), (2.5, B), (2.0, A)],
          [0, 2.5, 2.0],
          [1, 0.25 - 1e-5, 0.25],
          [1, 2, 3],
      ),
  )
  def test_table(self, edits, keys, radii, values):
    got, full = book(*edits)
    self.assertEqual((int(got.count), full), (len(keys), []))
    n = len(keys)
    np.testing.assert_allclose(got.keys[:n, 0], keys)
    np.testing.assert_allclose(got.radii[:n], radii, atol=1e-12)
    np.testing.assert_allclose(got.values[:n, 0], values)

  def test_full(self):
    got, full = book((0, A), (5, B), (10, A), (5, A), (15, B), capacity=3)
    self.assertEqual((int(got.count), full), (3, [4]))
    self.assertEqual(got.values[1, 0], 4)  # an entry may still be overwritten

  def test_one_layer(self):
    with self.assertRaisesRegex(InputError, 'in one layer; name one'):
      grace.grace(SPEC, GraceConfig(layers=(0, 1)))


if __name__ == '__main__':
  absltest.main()
