"""Counted arithmetic against hand counts and against the compiler's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments.benchmark import costs as loops
from jaxedit.models import decoder
from jaxedit.planning import costs, lengths
from jaxedit.testing import models
from jaxedit.text.encoding import EncodedEdit


def ids(*sizes):
  return tuple(np.arange(n, dtype=np.int32) for n in sizes)


# Two contexts of 5 and 8 tokens, anchors at 2 and 5, three labels, KL of 4.
EDIT = EncodedEdit(1, ids(5, 8), (2, 5), *ids(3, 4))
# Question of 6 tokens, answer of 7 in chunks of 3, so that the anchors are tokens
# 5, 8 and 11 and the inputs end before 8, 11 and 12.
CHAIN = EncodedEdit(2, ids(6), (5,), *ids(7, 0), ((0, 3), (3, 6), (6, 7)))
SPEC = models.tiny_spec('llama')  # 3 layers, D 32, F 48, 4 and 2 heads of 8


class LengthsTest(absltest.TestCase):

  def test_hand_count(self):
    sizes = lengths.lengths([EDIT, EDIT])
    want = dict(
        tokens=7 + 10,
        left=2 + 5,
        kl=4,
        reach=3 + 6,
        plain=3,
        keys=2,
        states=1,
    )
    for name, value in want.items():
      np.testing.assert_array_equal(getattr(sizes, name), [value] * 2, name)

  def test_a_step(self):
    want = dict(
        suffix=5 + 5,
        scored=6,
        # Tokens 2 to 6 see 3 to 7 tokens, tokens 5 to 9 see 6 to 10.
        pairs=(3 + 4 + 5 + 6 + 7) + (6 + 7 + 8 + 9 + 10),
        kl=4,
    )
    loads = lengths.loads([EDIT, EDIT])
    for name, value in want.items():
      np.testing.assert_array_equal(getattr(loads, name), [value] * 2, name)

  def test_chunks(self):
    sizes = lengths.lengths([CHAIN])
    found = [int(x[0]) for x in sizes]
    self.assertEqual(found, [12, 5, 0, 12, 12, 3, 3])
    # With the whole text all of its keys are read, the last token's too.
    sizes = lengths.lengths([CHAIN], texts=True)
    found = [int(x[0]) for x in sizes]
    self.assertEqual(found, [12, 5, 0, 13, 12, 13, 3])
    loads = lengths.loads([CHAIN, EDIT])
    np.testing.assert_array_equal(loads.suffix, [3, 3, 1, 10])
    np.testing.assert_array_equal(loads.scored, [3, 3, 1, 6])
    pairs = [6 + 7 + 8, 9 + 10 + 11, 12]
    np.testing.assert_array_equal(loads.pairs[:3], pairs)
    np.testing.assert_array_equal(loads.kl, [0, 0, 0, 4])
    overlap = dataclasses.replace(CHAIN, chunks=((0, 4), (3, 7)))
    loads = lengths.loads([overlap])
    np.testing.assert_array_equal(loads.suffix, [4, 4])

  def test_systems(self):
    systems = lengths.systems
    self.assertEqual(systems([EDIT, EDIT]), [(2, 0)])
    self.assertEqual(systems([CHAIN, CHAIN], texts=True), [(6, 20)])
    both = systems([CHAIN, EDIT], independent=True)
    self.assertEqual(both, [(3, 0), (1, 0)])
    both = systems([CHAIN, CHAIN], texts=True, independent=True)
    self.assertEqual(both, [(3, 10), (3, 10)])

  def test_what_edits_share_counts_once(self):
    sizes = lengths.own(lengths.lengths([EDIT, EDIT, EDIT]), [1, 4])
    self.assertEqual(sizes.tokens.sum(), 3 * 17 - 2 * 5)
    self.assertEqual(sizes.left.sum(), 3 * 7 - 2 * 5)
    self.assertEqual(sizes.reach.sum(), 3 * 9 - 2 * 5)
    self.assertEqual(sizes.plain.sum(), 3 * 3 - 2 * 1)

  def test_no_edits(self):
    empty = (*lengths.lengths([]), *lengths.loads([]))
    for array in empty:
      self.assertEqual(array.shape, (0,))


class CostsTest(parameterized.TestCase):

  def test_weights(self):
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    self.assertEqual(costs.layer_weights(SPEC), attention + 3 * 32 * 48)
    self.assertEqual(costs.head_weights(SPEC), 32 * 97)
    tied = dataclasses.replace(SPEC, tied=True)
    self.assertEqual(costs.head_weights(tied), 32 * 97)
    plain = models.tiny_spec('gptj')
    self.assertEqual(
        costs.layer_weights(plain), 4 * 32 * 32 + 2 * 32 * plain.mlp_width
    )

  def test_value_floor(self):
    w, head = costs.layer_weights(SPEC), costs.head_weights(SPEC)
    # One edit, four steps, above layer 0 there are two.
    floor = costs.target_flops(SPEC, 0, 4 * 10, 4 * 6)
    self.assertEqual(floor, 4 * (4 * 10 * 2 * w + 4 * 6 * head))
    # No backward pass in the last step.
    strict = floor - costs.target_flops(SPEC, 0, 10, 6) / 2
    self.assertEqual(strict, (4 * 4 - 2) * (10 * 2 * w + 6 * head))

  def test_what_is_prepared(self):
    w = costs.layer_weights(SPEC)
    sizes, read = lengths.lengths([EDIT]), 2 * 32 * 16
    # 17 + 4 tokens up to layer 1, 7 + 3 of them to the keys and values above.
    got = costs.prefill_flops(SPEC, 1, sizes)
    self.assertEqual(got, 2 * (21 * 2 * w + 10 * read))
    got = costs.prefill_flops(SPEC, 0, sizes)
    self.assertEqual(got, 2 * (21 * w + 10 * (w + read)))
    self.assertEqual(costs.prefill_flops(SPEC, 2, sizes), 2 * 21 * 3 * w)

  def test_insertion(self):
    w = costs.layer_weights(SPEC)
    got = costs.insert_flops(SPEC, (0, 1), lengths.lengths([EDIT]))
    mlp, key = 3 * 32 * 48, 2 * 32 * 48
    self.assertEqual(costs.layer_weights(SPEC, 'mlp'), mlp)
    self.assertEqual(costs.layer_weights(SPEC, 'attn'), w - mlp)
    # 9 tokens climb to the MLP of layer 1, where 2 anchors have their key; the
    # bare 3 look one layer ahead from layer 0, none from layer 1, and at either
    # the MLP of layer 1 is run for the anchor.
    climbs, looks = 9 * (2 * w - mlp) + 2 * key, 3 * w + 2 * mlp
    self.assertEqual(got, 2 * (climbs + looks))
    f, d, m = 48, 32, 5
    self.assertAlmostEqual(
        costs.solve_flops(SPEC, 2, [(m, 0)]),
        2 * (2 * f * f * m + 2 * f * m * m + m**3 / 3 + 2 * m * m * d),
    )
    # Three states beside ten held keys, twice: 13 rows are whitened, 3 lifted,
    # 10 x 10 and 3 x 3 are factored.
    one = f * f * (13 + 3) + 2 * f * (10 * 10 + 3 * 3) + (10**3 + 3**3) / 3
    one += 4 * f * 3 * 10 + 2 * 10 * 10 * 3 + 2 * 3 * 3 * d
    got = costs.solve_flops(SPEC, 2, [(3, 10), (3, 10)])
    self.assertAlmostEqual(got, 2 * 2 * one)
    # More rows than F: sums over all of them, one factor, solves for D columns.
    one = 3 * 53 * f * f + 2 * 3 * f * d + f**3 / 3 + 3 * f * f * d
    self.assertAlmostEqual(costs.solve_flops(SPEC, 2, [(3, 50)]), 2 * one)
    self.assertAlmostEqual(costs.factor_flops(SPEC, 2), 2 * f**3 / 3)

  def test_insertion_of_texts(self):
    w, mlp, down = costs.layer_weights(SPEC), 3 * 32 * 48, 32 * 48
    sizes = lengths.lengths([CHAIN], texts=True)
    # All 13 tokens climb and have a key; 12 look ahead, of which 3 are anchors.
    climbs = 13 * (2 * w - mlp) + 13 * (mlp - down)
    looks = 12 * w + 2 * 3 * mlp
    got = costs.insert_flops(SPEC, (0, 1), sizes)
    self.assertEqual(got, 2 * (climbs + looks))

  def test_moments_and_scores(self):
    w = costs.layer_weights(SPEC)
    model, gram = costs.moment_flops(SPEC, (0, 2), 100)
    self.assertEqual(model, 2 * 100 * (3 * w - 48 * 32))
    self.assertEqual(gram, 2 * 100 * 48 * 49)
    self.assertEqual(
        costs.score_flops(SPEC, 10, 3), 2 * (10 * 3 * w + 3 * 32 * 97)
    )
    self.assertEqual(
        costs.model_bytes(SPEC, 2, 2, head=True), 2 * (2 * w + 32 * 97)
    )
    self.assertEqual(
        costs.target_bytes(SPEC, 1, 25, 4), 2 * 25 * 4 * (w + 32 * 97)
    )

  def test_published_loop(self):
    w, head = costs.layer_weights(SPEC), costs.head_weights(SPEC)
    # 3 rows of 10: forward 3 layers four times, back through 1 thrice.
    products = 2 * 30 * ((4 * 3 + 3 * 1) * w + (4 + 3) * head)
    attention = 4 * 32 * 300 * (4 * 3 + 2 * 3 * 1)
    got = loops.loop_flops(SPEC, 1, 3, 10, 4)
    self.assertEqual(got, products + attention)
    forward, dense = loops.loop_insert_flops(SPEC, 2, 30, [(5, 0)])
    self.assertEqual(forward, 2 * 30 * (3 * w + head))
    f, d, m = 48, 32, 5
    self.assertAlmostEqual(
        dense, 2 * (2 * f**3 / 3 + 4 * f * f * m + 2 * f * m * d)
    )
    _, more = loops.loop_insert_flops(SPEC, 2, 30, [(5, 7)])
    self.assertAlmostEqual(more - dense, 2 * 2 * f * f * 7)

  def test_ours_adds_the_kl_row_and_attention(self):
    sizes, w = lengths.lengths([EDIT]), costs.layer_weights(SPEC)
    got = costs.ours_flops(SPEC, 1, [EDIT], np.array([4]))
    upper = 4 * 4 * (11 * w + 7 * 32 * 97)
    attention = 3 * 4 * 32 * 4 * (25 + 40 + 4)
    self.assertEqual(
        got, upper + attention + costs.prefill_flops(SPEC, 1, sizes)
    )

  def test_chunks_are_a_suffix_each(self):
    w, head = costs.layer_weights(SPEC), costs.head_weights(SPEC)
    steps = np.array([4, 2, 5])
    got = costs.ours_flops(SPEC, 1, [CHAIN], steps)
    tokens = 3 * 4 + 3 * 2 + 5
    pairs = 4 * (6 + 7 + 8) + 2 * (9 + 10 + 11) + 5 * 12
    want = 4 * tokens * (w + head) + 3 * 4 * 32 * pairs
    want += costs.prefill_flops(SPEC, 1, lengths.lengths([CHAIN]))
    self.assertEqual(got, want)


class CompilerTest(parameterized.TestCase):
  """XLA counts pointwise work too, so it finds a little more."""

  @parameterized.parameters('llama', 'gptj', 'gpt2')
  def test_forward_of_a_layer_and_the_head(self, family):
    spec = self.wide(family)
    tokens = 16
    params = models.random_params(spec, 0)
    h = jnp.ones((1, tokens, spec.width))
    columns = decoder.token_layout(jnp.ones((1, tokens), bool))

    def run(h):
      h, _ = decoder.run_layer(spec, params, h, columns, layer=0)
      return decoder.logits(spec, params, h)

    want = costs.score_flops(spec, tokens, tokens)
    want += costs.attention_flops(spec, tokens * tokens, 1)
    self.check(run, h, want)

  @parameterized.parameters('llama', 'gptj')
  def test_step_of_value_optimisation(self, family):
    spec, tokens = self.wide(family), 16
    params = models.random_params(spec, 0)
    h = jnp.ones((1, tokens, spec.width))
    columns = decoder.token_layout(jnp.ones((1, tokens), bool))

    def loss(h):
      h, _ = decoder.run_layer(spec, params, h, columns, layer=0)
      return jnp.sum(
          jax.nn.log_softmax(decoder.logits(spec, params, h))[..., 0]
      )

    # One layer above, every position scored.
    deep = dataclasses.replace(spec, layers=2)
    want = costs.target_flops(deep, 0, tokens, tokens)
    want += 3 * costs.attention_flops(spec, tokens * tokens, 1)
    self.check(jax.value_and_grad(loss), h, want)

  def wide(self, family):
    return models.tiny_spec(
        family, layers=1, width=128, mlp_width=256, heads=4, kv_heads=4,
        head_size=32, vocab=512,
    )  # fmt: skip

  def check(self, function, h, want):
    analysis = jax.jit(function).lower(h).compile().cost_analysis()
    self.assertBetween(analysis['flops'] / want, 1.0, 1.1)


if __name__ == '__main__':
  absltest.main()
