"""Every kind of delta against its rule in numpy, alone and inside a model."""

from __future__ import annotations

import functools
import itertools

import edits
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from numpy_decoder import oracle, oracle_logits

from jaxedit import deltas as deltas_lib
from jaxedit.batching.packer import Packer
from jaxedit.deltas import Codebook, Edited, Neurons, Routed
from jaxedit.edited import apply_model, select
from jaxedit.models import decoder
from jaxedit.testing import models
from jaxedit.types import OutputTokens, TokenLayout

IN, OUT, T = 5, 4, 9
# Padding, four tokens of a prompt, two of an answer, padding.
PROMPT = np.array([0, 0, 1, 1, 1, 1, 0, 0, 0], bool)
TEXT = slice(2, 8)


class Base(parameterized.TestCase):
  """Runs in f64, where equal means 1e-10."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    self.rng = np.random.default_rng(0)

  def draw(self, *shape):
    return self.rng.standard_normal(shape)

  def assert_same(self, got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


class RuleTest(Base):
  """One layer of one edit on one sequence."""

  def setUp(self):
    super().setUp()
    self.x, self.y = self.draw(T, IN), self.draw(T, OUT)

  def run_one(self, delta, prompt=PROMPT):
    """(output, choice) of layer 7, by the library."""
    own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], delta)

    @jax.jit
    def run(delta, x, y, prompt):
      if not delta.chooses:
        return delta(x, y), -1
      choice = delta.choose(x, y, prompt)
      return delta(x, y, choice, prompt), choice

    y, choice = run(own, self.x, self.y, prompt)
    return np.asarray(y), int(choice)

  def check(self, delta):
    """Compares a text with its rule; returns (output, choice)."""
    y, choice = self.run_one(delta)
    chosen = []
    edit = edits.rule([delta], 4, chosen)
    want = edit(7, delta.site, self.x[TEXT], self.y[TEXT])
    self.assert_same(y[TEXT], want)
    if delta.chooses:
      self.assertEqual([choice], chosen)
    return y, choice

  @parameterized.parameters('relu', 'silu', 'gelu', 'gelu_tanh')
  def test_neurons(self, activation):
    leaves = self.draw(1, 3, IN), self.draw(1, 3), self.draw(1, 3, OUT)
    y, _ = self.check(Neurons((7,), 'mlp', *leaves, activation))
    self.assertGreater(np.abs(y - self.y).max(), 0.1)

  def codebook(
      self, *, keys=None, radii=(9.0,) * 3, count=3, replacement='last'
  ):
    keys = self.draw(3, IN) if keys is None else np.asarray(keys)
    return Codebook(
        (7,), 'mlp', keys[None], self.draw(1, len(keys), OUT),
        np.array([radii], float), np.array([count], np.int32), replacement,
    )  # fmt: skip

  @parameterized.parameters(*deltas_lib.REPLACEMENTS)
  def test_codebook(self, replacement):
    delta = self.codebook(replacement=replacement)
    y, choice = self.check(delta)
    self.assertGreaterEqual(choice, 0)
    value = delta.values[0, choice]
    same = lambda at: np.all(y[at] == value) and np.any(self.y[at] != value)
    replaced = [bool(same(t)) for t in range(2, 8)]
    self.assertEqual(
        replaced,
        {
            'last': [False, False, False, True, False, False],
            'prompt': [True, True, True, False, False, False],
            'all': [True] * 6,
        }[replacement],
    )
    if replacement != 'all':
      kept = ~np.isin(np.arange(T), 2 + np.flatnonzero(replaced))
      np.testing.assert_array_equal(y[kept], self.y[kept])

  def test_the_nearest_entry_decides(self):
    near, far = self.x[5] + 0.1, self.x[5] + 1.0
    tie = [far, near, near]
    gap = float(np.sqrt(IN) * 0.1)
    for options, want in (
        (dict(keys=[far, near, far]), 1),
        (dict(keys=tie), 1),  # the first of equally near ones
        (dict(keys=tie, radii=[9, 9, -1]), 1),
        # One in reach does not stand in for a nearer one that is not.
        (dict(keys=tie, radii=[9, -1, 9]), -1),
        (dict(keys=tie, radii=[9, 0.9 * gap, 9]), -1),
        (dict(keys=tie, radii=[9, 1.1 * gap, 9]), 1),
        # Entries that are not in use.
        (dict(keys=tie, count=1), 0),
        (dict(keys=tie, count=1, radii=[0.1, 9, 9]), -1),
        (dict(keys=tie, count=0), -1),
        # A radius of zero holds its own key, a negative one not even that.
        (dict(keys=[far, self.x[5], far], radii=[0, 0, 0]), 1),
        (dict(keys=[far, self.x[5], far], radii=[9, -1, 9]), -1),
    ):
      for replacement in deltas_lib.REPLACEMENTS:
        _, choice = self.check(
            self.codebook(replacement=replacement, **options)
        )
        self.assertEqual(choice, want, options)

  def routed(self, thresholds, activation='silu'):
    shards = self.draw(1, 3, IN, OUT)
    return Routed((7,), 'mlp', shards, np.array([thresholds]), activation)

  def scores(self, delta):
    """The score of every shard over the prompt."""
    act = lambda x: x / (1 + np.exp(-x))
    x, y = self.x[2:6], self.y[2:6]
    return [
        np.mean(np.linalg.norm(act(y) - act(y + x @ shard), axis=1))
        for shard in delta.shards[0]
    ]

  @parameterized.parameters('silu', 'relu', 'gelu', 'gelu_tanh')
  def test_routed(self, activation):
    y, choice = self.check(self.routed([0.1] * 3, activation))
    self.assertGreaterEqual(choice, 0)
    self.assertGreater(np.abs(y - self.y)[TEXT].max(), 0.1)

  def test_the_largest_score_above_its_threshold(self):
    delta = self.routed([0.0] * 3)
    scores = np.array(self.scores(delta))
    low, mid, high = np.argsort(scores)
    for above, want in (
        ([low, mid, high], high),
        ([low, mid], mid),
        ([low], low),
        ([], -1),
    ):
      offset = np.where(np.isin(np.arange(3), above), -1e-6, 1e-6)
      own = delta.replace(thresholds=(scores + offset)[None])
      y, choice = self.check(own)
      self.assertEqual(choice, want)
      if want < 0:
        np.testing.assert_array_equal(y, self.y)
    # At the threshold is not above it.
    self.x, still = 0 * self.x, delta.replace(thresholds=np.zeros((1, 3)))
    self.assertEqual(self.check(still)[1], -1)

  def test_a_sequence_without_a_prompt(self):
    for delta in (self.codebook(replacement='all'), self.routed([0.0] * 3)):
      y, choice = self.run_one(delta, np.zeros(T, bool))
      self.assertEqual(choice, -1)
      np.testing.assert_array_equal(y, self.y)


@functools.cache
def model(family):
  spec = models.tiny_spec(family)
  return spec, models.random_params(spec, 1, jnp.float64)


LENGTHS = (9, 5, 7, 1, 8)
SITES = ('attn', 'mlp', 'block', 'mlp/down', 'attn/out', 'mlp/up', 'attn/q')


KINDS = ('neurons', 'routed', *deltas_lib.REPLACEMENTS)


def drawn(draw, name, site):
  """A delta of a kind at a site."""
  if name in deltas_lib.REPLACEMENTS:
    return draw.codebook(site, name)
  return getattr(draw, name)(site)


class ModelTest(Base):
  """A padded batch of texts; each is what numpy makes of it alone."""

  def setUp(self):
    super().setUp()
    self.texts = [self.rng.integers(1, 97, n).tolist() for n in LENGTHS]

  def batch(self, left):
    """([B, T] tokens, their layout), padded on the left or the right."""
    valid = np.arange(9) < np.array(LENGTHS)[:, None]
    valid = valid[:, ::-1] if left else valid
    tokens = np.zeros((5, 9), np.int32)
    tokens[valid] = np.concatenate(self.texts)
    return tokens, decoder.token_layout(valid), valid

  def logits(self, family, edited, left, edit_ids=None):
    spec, params = model(family)
    tokens, layout, valid = self.batch(left)
    run = jax.jit(functools.partial(apply_model, spec))
    got = run(params, edited, tokens, layout, edit_ids=edit_ids)
    return [np.asarray(row)[own] for row, own in zip(got, valid)]

  def check(self, got, family, edits_of):
    """Compares texts under their edits; returns what was chosen."""
    spec, params = model(family)
    chosen = []
    for row, text, edited in zip(got, self.texts, edits_of, strict=True):
      edit = edits.rule(edited.deltas, len(text), chosen)
      h, _ = oracle(spec, params, text, edit=edit)
      self.assert_same(row, oracle_logits(spec, params, h))
    return chosen

  @parameterized.parameters(
      *itertools.product(['llama'], SITES, KINDS),
      *itertools.product(['gptj'], SITES[:4], ['neurons', 'routed', 'all']),
  )
  def test_padded_batch(self, family, site, name):
    draw = edits.Draw(model(family)[0], dtype=jnp.float64)
    edited = Edited((drawn(draw, name, site),))
    left = name in ('last', 'routed')
    got = self.logits(family, edited, left)
    chosen = self.check(got, family, [edited] * 5)
    if name != 'neurons':
      self.assertLen(chosen, 10)
      self.assertGreater(len({*chosen}), 1, chosen)

  @parameterized.parameters('llama', 'gpt2')
  def test_every_sequence_under_its_edit(self, family):
    draw = edits.Draw(model(family)[0], dtype=jnp.float64, edits=3)
    deltas = (
        draw.codebook('block', 'prompt'), draw.low_rank('attn/out'),
        draw.neurons('attn'), draw.routed('mlp/up'), draw.codebook('mlp'),
    )  # fmt: skip
    edited, edit_ids = Edited(deltas, size=3), [2, 0, 0, 1, 2]
    got = self.logits(family, edited, True, np.array(edit_ids))
    alone = [select(edited, i) for i in edit_ids]
    chosen = self.check(got, family, alone)
    self.assertIn(-1, chosen)
    self.assertGreater(len({*chosen}), 3)

  def pack(self, last=LENGTHS):
    """The last tokens of each text, end to end: (their index, how they lie)."""
    ends = np.cumsum(LENGTHS)
    kept = [np.arange(end - n, end) for end, n in zip(ends, last)]
    # Two places stay empty.
    packer = Packer(5, 9, sum(last) + 2)
    at = 0
    for row, some in enumerate(kept):
      start = LENGTHS[row] - len(some)
      packer.put(row, np.arange(at, at + len(some), dtype=np.int32), start)
      at += len(some)
    none = [sum(LENGTHS) + 2] * 2
    return np.concatenate([*kept, none]).astype(np.int32), packer.packing()

  def run_packed(self, deltas, outputs=None):
    spec, params = model('llama')
    _, layout = self.pack()
    tokens = np.append(np.concatenate(self.texts), [0, 0])[None]

    @jax.jit
    def run(deltas):
      h = decoder.embed(spec, params, tokens, layout)
      h, _ = decoder.run_layers(
          spec, params, h, layout,
          start=0, stop=3, deltas=deltas, outputs=outputs,
      )  # fmt: skip
      return decoder.logits(spec, params, h)[0, :-2]

    return np.asarray(run(deltas))

  @parameterized.parameters(None, 3)
  def test_packed_sequences(self, size):
    draw = edits.Draw(model('llama')[0], dtype=jnp.float64, edits=size)
    deltas = (
        draw.codebook('mlp', 'all'), draw.low_rank('attn/out'),
        draw.neurons('block'), draw.routed('mlp/down'),
    )  # fmt: skip
    edited, edit_ids, alone = Edited(deltas, size=size), None, None
    if size is not None:
      edit_ids = np.array([2, 0, 0, 1, 2])
      alone = [select(edited, i) for i in edit_ids]
    got = self.run_packed(deltas_lib.active(deltas, edit_ids))
    got = np.split(got, np.cumsum(LENGTHS)[:-1])
    self.check(got, 'llama', alone or [edited] * 5)

  @parameterized.parameters(*SITES)
  def test_output_tokens(self, site):
    draw = edits.Draw(model('llama')[0], dtype=jnp.float64)
    deltas = (draw.neurons(site), draw.low_rank('attn/k'))
    index, rows = self.pack((2, 1, 3, 1, 0))
    got = self.run_packed(deltas, OutputTokens(index, rows))
    want = self.run_packed(deltas)
    self.assert_same(got, want[index[:-2]])
    with self.assertRaisesRegex(ValueError, 'per sequence'):
      self.run_packed((draw.codebook(site),), OutputTokens(index, rows))

  def test_gradients(self):
    # A distance and a change of zero have no slope of their own.
    spec, params = model('llama')
    draw = edits.Draw(spec, dtype=jnp.float64, layers=(1,))
    tokens = np.array([self.texts[0]])
    layout = decoder.token_layout(tokens > 0)
    _, seen = oracle(spec, params, self.texts[0])
    codebook, routed = draw.codebook('mlp', 'last'), draw.routed('attn/out')
    codebook = codebook.replace(
        keys=codebook.keys.at[0, 2].set(seen[1]['mlp/up'][-1])
    )
    routed = routed.replace(
        shards=routed.shards.at[0, 0].set(0), thresholds=0 * routed.thresholds
    )

    @jax.jit
    def slopes(params, deltas):
      run = lambda params, deltas: jnp.sum(
          jnp.sin(apply_model(spec, params, Edited(deltas), tokens, layout))
      )
      return jax.grad(run, (0, 1), allow_int=True)(params, deltas)

    for deltas in ((codebook, draw.neurons()), (routed, draw.neurons())):
      own, (chosen, neurons) = slopes(params, deltas)
      for leaf in jax.tree.leaves((own, chosen, neurons)):
        if leaf.dtype != jax.dtypes.float0:
          self.assertTrue(np.isfinite(leaf).all())
      for leaf in (neurons.key, neurons.bias, neurons.value):
        self.assertGreater(np.abs(leaf).max(), 1e-3)
      values = chosen.values if deltas[0] is codebook else chosen.shards
      largest = np.abs(values[0]).reshape(len(values[0]), -1).max(axis=1)
      self.assertLen(np.flatnonzero(largest), 1)

  def test_texts_packed_in_one_sequence_have_no_prompt(self):
    spec, params = model('llama')
    draw = edits.Draw(spec, dtype=jnp.float64)
    tokens = np.array([self.texts[1] + self.texts[2]], np.int32)
    layout = TokenLayout(
        np.array([[*range(5), *range(7)]]), np.array([[2] * 5 + [3] * 7])
    )
    run = jax.jit(functools.partial(apply_model, spec))
    for delta in (draw.codebook('mlp', 'all'), draw.routed('mlp')):
      got, base = (
          run(params, Edited(some), tokens, layout) for some in ((delta,), ())
      )
      np.testing.assert_array_equal(got, base)


if __name__ == '__main__':
  absltest.main()
