"""Parts of a session that are functions of their own."""

from __future__ import annotations

import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxedit.runs import inputs, needs
from jaxedit.runs.clock import Clock, compile_seconds
from jaxedit.runs.config import RunConfig
from jaxedit.runs.tasks import first_of_each
from jaxedit.types import EditRequest


def request(number, case='', category=''):
  return EditRequest(
      number, str(number), 'q', None, 'a', category=category, case=case
  )


class BatchesTest(parameterized.TestCase):

  @parameterized.parameters(
      (1, [[0], [1, 2], [3]]), (2, [[0, 1, 2], [3]]), (3, [[0, 1, 2, 3]])
  )
  def test_cases_are_never_cut(self, size, want):
    self.assertEqual(inputs.batches_of((0, 1, 1, 2), size), want)

  def test_first_of_each_category(self):
    some = [
        request(1, '', 'B'), request(2, 'c', 'A'), request(3, 'c', 'B'),
        request(4, '', 'A'), request(5, 'd', 'C'), request(6, 'd', 'C'),
    ]  # fmt: skip
    found = first_of_each(some, 1)
    self.assertEqual([one.number for one in found], [1, 2, 3, 5, 6])

  @parameterized.parameters(
      (1, False, 4, [[0, 1, 2, 3]]),
      (1, True, 4, [[0, 1], [2, 3]]),
      (1, True, 9, [[0], [1], [2], [3]]),  # one at least
      (1, True, 1, [[0, 1, 2, 3]]),
      (2, True, 9, [[0, 1], [2, 3]]),
      (2, True, 5, [[0, 1], [2, 3]]),
      (2, True, 2, [[0, 1, 2, 3]]),
  )
  def test_deltas_that_are_held_at_one_time(self, size, reset, each, want):
    """Memory holds 9 units; a batch takes `each` for every edit."""
    editor = types.SimpleNamespace(
        bytes_of=lambda model, some: each * len(some)
    )
    config = RunConfig(batch_size=size, reset=reset)
    with mock.patch.object(inputs, '_SIDE_BYTES', 9):
      found = inputs._parts(config, editor, None, 'abcd', (0, 1, 2, 3))
    self.assertEqual(found, want)

  def test_padding_token(self):
    pick = lambda pad, eos: needs.pad_id(
        types.SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    )
    self.assertEqual([pick(3, 5), pick(None, 5), pick(None, None)], [3, 5, 0])


class ClockTest(absltest.TestCase):

  def test_adds_up_by_stage(self):
    clock = Clock()
    for _ in range(2):
      with clock('a'):
        time.sleep(0.01)
    with self.assertRaises(KeyError):
      with clock('b'):
        raise KeyError
    clock.add({'a': 1.0, 'c': 2.0})
    clock.stop()
    self.assertSameElements(clock.seconds, ['a', 'b', 'c', 'total'])
    self.assertGreaterEqual(clock.seconds['a'], 1.02)
    self.assertLess(clock.seconds['b'], clock.seconds['total'])

  def test_compilation_is_counted_once(self):
    seconds = {}
    inner = jax.jit(lambda x: jnp.sin(x) * 3)
    outer = jax.jit(lambda x: inner(x) + inner(x + 1))
    begin = time.monotonic()
    with compile_seconds(seconds):
      outer(jnp.ones(7))
      spent = seconds['compile']
      outer(jnp.ones(7))
      self.assertEqual(seconds['compile'], spent)
    self.assertGreater(spent, 0)
    self.assertLess(spent, time.monotonic() - begin)
    jax.jit(lambda x: x - 5)(jnp.ones(7))  # nobody listens
    self.assertEqual(seconds['compile'], spent)


if __name__ == '__main__':
  absltest.main()
