"""Every way to run a decoder equals one plain numpy model.

The oracle, `numpy_decoder`, runs one unpadded text, without batches, masks by segment,
caches or interventions: those must not show in the numbers. Unless a test is
about another dtype it runs in f64, where equal means 1e-10.
"""

from __future__ import annotations

import functools
import itertools
import re

import edits
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from numpy_decoder import oracle, oracle_logits, outputs

from jaxedit.deltas import ActiveDeltas, Dense, LowRank
from jaxedit.models import decoder, loading
from jaxedit.models.spec import param_shapes
from jaxedit.testing import models as tiny
from jaxedit.types import KV, Patch, Tap, TokenLayout

LAYERS = (0, 1, 2)
OUTPUTS = ('attn', 'mlp', 'block')
# Left padding of three rows of nine columns, in tokens.
PADDING = (0, 4, 2)
WIDTH = 9


@functools.partial(jax.jit, static_argnums=0)
def _run(spec, params, tokens, layout, patches, deltas):
  h = decoder.embed(spec, params, tokens, layout)
  h, _ = decoder.run_layers(
      spec, params, h, layout,
      start=0, stop=spec.layers, patches=patches, deltas=deltas,
  )  # fmt: skip
  return h


def run(spec, params, tokens, layout, patches=(), deltas=()):
  """The last residual [B, T, D] of a batch."""
  return np.asarray(_run(spec, params, tokens, layout, patches, deltas))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _run_part(spec, params, h, layout, start, stop, prefix, deltas):
  taps = (Tap('kv', tuple(range(start, stop))),)
  h, (kv,) = decoder.run_layers(
      spec, params, h, layout,
      start=start, stop=stop, prefix=prefix, deltas=deltas, taps=taps,
  )  # fmt: skip
  return h, kv


def run_part(spec, params, h, layout, layers, prefix=None, deltas=()):
  """Layers first to last - 1, with their keys and values."""
  h, kv = _run_part(spec, params, h, layout, *layers, prefix, deltas)
  return np.asarray(h), KV(*map(np.asarray, kv), layout)


def cut(kv, first, end):
  """Some columns of a `KV`."""
  return KV(
      kv.key[..., first:end, :],
      kv.value[..., first:end, :],
      some(kv.layout, slice(first, end)),
  )


def some(layout, part):
  """A slice of columns."""
  return jax.tree.map(lambda leaf: leaf[:, part], layout)


def merge(params, deltas):
  """Adds changes to the weights, in numpy."""
  leaves = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    leaves['/'.join(key.key for key in path)] = np.array(leaf)
  for delta in deltas:
    for i, layer in enumerate(delta.layers):
      if isinstance(delta, Dense):
        kernel = np.asarray(delta.value[i])
      else:
        kernel = np.asarray(delta.key[i]).T @ np.asarray(delta.value[i])
      leaves[f'layers/{delta.site}/kernel'][layer] += kernel
  return loading.nest(leaves)


def shape_of(spec, site):
  """(in, out) of a linear map."""
  return param_shapes(spec)[f'layers/{site}/kernel'][1:]


@functools.cache
def model(family='llama', dtype='float64', **changes):
  """A tiny architecture with random parameters."""
  spec = tiny.tiny_spec(family, **changes)
  return spec, tiny.random_params(spec, 1, jnp.dtype(dtype))


def tight(family):
  """A window that is shorter than the texts, where the family has one."""
  return dict(window=3) if family == 'mistral' else {}


def padded_columns():
  """Three rows of nine columns, padded by `PADDING` on the left."""
  left = np.array(PADDING)[:, None]
  positions = np.maximum(np.arange(WIDTH) - left, 0).astype(np.int32)
  return TokenLayout(positions, (np.arange(WIDTH) >= left).astype(np.int32))


class DecoderTestCase(parameterized.TestCase):
  """Runs in f64 and knows one padded batch."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    self.rng = np.random.default_rng(0)
    self.tokens = self.rng.integers(1, 97, (len(PADDING), WIDTH))
    self.layout = padded_columns()

  def draw(self, *shape, scale=1.0):
    return self.rng.standard_normal(shape) * scale

  def text(self, row):
    return self.tokens[row, PADDING[row] :]

  def low_rank(self, spec, site, layers, rows=(), rank=2):
    """A random change of a kernel, with entries of order 0.1."""
    fan_in, fan_out = shape_of(spec, site)
    lead = (len(layers), *rows, rank)
    key = self.draw(*lead, fan_in, scale=0.3)
    return LowRank(layers, site, key, self.draw(*lead, fan_out, scale=0.3))

  def dense(self, spec, site, layers):
    kernel = self.draw(len(layers), *shape_of(spec, site), scale=0.1)
    return Dense(layers, site, kernel)

  def assert_same(self, actual, wanted, tolerance=1e-10):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance)

  def assert_rows(self, h, spec, params, intervene=lambda row: outputs):
    """Every row of the padded batch is what the oracle makes of its text."""
    for row, left in enumerate(PADDING):
      wanted, _ = oracle(spec, params, self.text(row), intervene(row))
      self.assert_same(h[row, left:], wanted)


class OracleTest(DecoderTestCase):

  @parameterized.parameters(*tiny.FAMILIES)
  def test_taps_and_residual(self, family):
    spec, params = model(family)
    linears = ['attn/q', 'attn/k', 'attn/v', 'attn/out', 'mlp/up', 'mlp/down']
    linears += ['mlp/gate'] if spec.gated else []
    sites = {site: (0, 2) for site in (*OUTPUTS, 'kv', *linears)}
    sites['mlp'] = LAYERS
    taps = [Tap(site, layers) for site, layers in sites.items()]
    taps.append(Tap('mlp/down', (1,), lambda x: jnp.sum(x * x, axis=(0, 1))))
    taps.append(Tap('block', (7,)))

    @jax.jit
    def observe(params, tokens, layout):
      h = decoder.embed(spec, params, tokens, layout)
      return decoder.run_layers(
          spec, params, h, layout, start=0, stop=3, taps=taps
      )

    seen = observe(params, self.tokens, self.layout)
    h, (*readings, reduced, absent) = jax.tree.map(np.asarray, seen)
    self.assertIsNone(absent)
    self.assertEqual(reduced.shape, (1, spec.mlp_width))
    self.assert_rows(h, spec, params)
    for row, left in enumerate(PADDING):
      _, layers = oracle(spec, params, self.text(row))
      for (site, observed), reading in zip(sites.items(), readings):
        for i, layer in enumerate(observed):
          own = lambda x: x[i, row][..., left:, :]
          ours = jax.tree.map(own, reading)
          jax.tree.map(self.assert_same, ours, layers[layer][site])

  @parameterized.parameters('gptj', 'qwen2')  # with a head bias, and tied
  def test_logits_and_scores(self, family):
    spec, params = model(family)
    h, _ = oracle(spec, params, self.text(0))
    wanted = oracle_logits(spec, params, h)
    self.assert_same(decoder.logits(spec, params, jnp.asarray(h)), wanted)
    labels = np.roll(self.tokens[0], -1)
    score, best = decoder.label_logprob(
        spec, params, jnp.asarray(h), jnp.asarray(labels)
    )
    total = np.log(np.exp(wanted).sum(axis=-1))
    self.assert_same(score, wanted[np.arange(WIDTH), labels] - total)
    np.testing.assert_array_equal(best, wanted.argmax(axis=-1))

  def test_no_layers(self):
    spec, params = model()
    h = self.draw(3, WIDTH, spec.width)
    out, taps = decoder.run_layers(
        spec, params, h, self.layout, start=3, stop=3, taps=(Tap('mlp', (2,)),)
    )
    self.assertIs(out, h)
    self.assertEqual(taps, (None,))


class PatchTest(DecoderTestCase):

  @parameterized.parameters('llama', 'gptj', 'gpt_neox')
  def test_sweep_over_layers(self, family):
    spec, params = model(family)
    kinds = [(site, mode) for site in OUTPUTS for mode in ('add', 'set')]
    offset = np.array([2, 0, 5])  # from each row's first token
    values = self.draw(len(kinds), 3, spec.width)
    traces = []

    @jax.jit
    def patched(layers):
      traces.append(None)
      patches = [
          Patch(*kind, layers[i], offset + PADDING, values[i])
          for i, kind in enumerate(kinds)
      ]
      return _run(spec, params, self.tokens, self.layout, patches, ())

    for i, layer in itertools.product(range(len(kinds)), LAYERS):
      # The others are of a layer that there is not.
      layers = np.full(len(kinds), spec.layers, np.int32)
      layers[i] = layer

      def intervene(row, i=i, layer=layer):
        def apply(at, site, x):
          x = x.copy()
          if (at, site) == (layer, kinds[i][0]):
            old = x[offset[row]] if kinds[i][1] == 'add' else 0
            x[offset[row]] = old + values[i, row]
          return x

        return apply

      h = np.asarray(patched(layers))
      self.assert_rows(h, spec, params, intervene)
    self.assertLen(traces, 1)

  def test_split_by_hand(self):
    # The residual is taken after a layer, changed, and run on; what several
    # patches do to one column they do in order.
    spec, params = model('gptj')
    rows, column = np.arange(3), np.array([8, 4, 6])
    first, second, third = self.draw(3, 3, spec.width)
    patches = (
        Patch('mlp', 'add', jnp.int32(1), column, third),  # is overwritten
        Patch('block', 'set', jnp.int32(1), column, first),
        Patch('block', 'add', jnp.int32(1), column, second),
    )
    h = np.asarray(params['embed']['embedding'])[self.tokens]
    h, _ = run_part(spec, params, h, self.layout, (0, 2))
    h = h.copy()
    h[rows, column] = first + second
    h, _ = run_part(spec, params, h, self.layout, (2, 3))
    self.assert_same(run(spec, params, self.tokens, self.layout, patches), h)


class DeltaTest(DecoderTestCase):

  def assert_merged(self, spec, params, deltas):
    """Lazy changes equal changed weights."""
    h = run(spec, params, self.tokens, self.layout, (), tuple(deltas))
    self.assert_rows(h, spec, merge(params, deltas))
    plain, _ = oracle(spec, params, self.text(0))
    self.assertGreater(np.abs(h[0] - plain).max(), 0.1)

  @parameterized.parameters(
      dict(down=(0,), out=(2,)),
      dict(down=(0, 2), out=(1,)),
      dict(down=(2,), out=(0, 2)),
      dict(down=LAYERS, out=LAYERS),
  )
  def test_low_rank(self, down, out):
    spec, params = model()
    deltas = [
        self.low_rank(spec, 'mlp/down', down),
        self.low_rank(spec, 'attn/out', out, rank=5),
    ]
    self.assert_merged(spec, params, deltas)

  def test_dense(self):
    spec, params = model()
    deltas = [
        self.dense(spec, 'mlp/down', (0, 2)),
        self.dense(spec, 'attn/out', (1,)),
    ]
    self.assert_merged(spec, params, deltas)

  @parameterized.parameters('llama', 'gptj', 'gpt2')
  def test_many_sites_at_once(self, family):
    spec, params = model(family)
    deltas = [
        self.low_rank(spec, 'mlp/down', (0, 2)),
        # The same site twice, in other layers.
        self.low_rank(spec, 'mlp/down', (1,), rank=5),
        self.low_rank(spec, 'attn/out', (1, 2)),
        self.dense(spec, 'attn/q', (0,)),
        self.low_rank(spec, 'attn/k', LAYERS),
        self.low_rank(spec, 'attn/v', (2,)),
        self.low_rank(spec, 'mlp/up', (0, 1)),
    ]
    if spec.gated:
      deltas.append(self.low_rank(spec, 'mlp/gate', (1,)))
    self.assert_merged(spec, params, deltas)

  def test_rows_of_their_own(self):
    spec, params = model()
    shared = self.low_rank(spec, 'mlp/up', (1,))
    own = [
        self.low_rank(spec, 'mlp/down', (0, 2), rows=(3,)),
        self.low_rank(spec, 'attn/out', (2,), rows=(3,)),
    ]
    everywhere = jax.tree.map(lambda x: np.stack([x] * 3, axis=1), shared)
    deltas = ActiveDeltas((everywhere, *own), per_edit=True)
    h = run(spec, params, self.tokens, self.layout, (), deltas)
    for row, left in enumerate(PADDING):
      deltas = [
          LowRank(d.layers, d.site, d.key[:, row], d.value[:, row]) for d in own
      ]
      merged = merge(params, [shared, *deltas])
      wanted, _ = oracle(spec, merged, self.text(row))
      self.assert_same(h[row, left:], wanted)

  def test_only_layers_that_are_run(self):
    spec, params = model()
    delta = self.low_rank(spec, 'mlp/down', LAYERS)
    h = self.draw(3, WIDTH, spec.width)
    lazy, _ = run_part(spec, params, h, self.layout, (1, 2), deltas=(delta,))
    merged, _ = run_part(spec, merge(params, [delta]), h, self.layout, (1, 2))
    self.assert_same(lazy, merged)

  def test_gradients_reach_the_factors(self):
    spec, params = model()
    delta = self.low_rank(spec, 'mlp/down', (0, 2))
    weight = self.draw(spec.width)

    @jax.jit
    @jax.grad
    def slope(delta):
      h = _run(spec, params, self.tokens, self.layout, (), (delta,))
      return jnp.sum(h[:, -1] @ weight)

    def loss(delta):
      runs = [
          oracle(spec, merge(params, [delta]), self.text(row))[0]
          for row in range(3)
      ]
      return sum(h[-1] @ weight for h in runs)

    step = jax.tree.map(lambda x: self.draw(*x.shape, scale=1e-5), delta)
    move = lambda sign: jax.tree.map(lambda x, y: x + sign * y, delta, step)
    parts = jax.tree.map(np.vdot, slope(delta), step)
    np.testing.assert_allclose(
        sum(jax.tree.leaves(parts)), (loss(move(1)) - loss(move(-1))) / 2,
        rtol=1e-6,
    )  # fmt: skip


class ColumnsTest(DecoderTestCase):

  def test_token_columns_by_hand(self):
    layout = decoder.token_layout(
        np.array([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    )
    np.testing.assert_array_equal(
        layout.positions, [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        layout.segment_ids, [[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    )
    self.assertEqual(layout.positions.dtype, jnp.int32)
    self.assertEqual(layout.segment_ids.dtype, jnp.int32)
    ours = decoder.token_layout(self.layout.segment_ids > 0)
    jax.tree.map(np.testing.assert_array_equal, ours, self.layout)

  def test_visible_by_hand(self):
    layout = TokenLayout(
        np.array([[0, 0, 1, 2, 2, 3]]), np.array([[0, 1, 1, 2, 3, 3]])
    )
    wanted = [  # padding, prefix, prefix, branch 2, branch 3, branch 3
        [0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 1, 1],
    ]
    seen = decoder.visible(layout, layout, None)[0]
    np.testing.assert_array_equal(seen, np.array(wanted, bool))
    # Position 0 is out of a window of two from 2 on, position 1 from 3 on.
    wanted[3][1] = wanted[4][1] = wanted[5][1] = wanted[5][2] = 0
    seen = decoder.visible(layout, layout, 2)[0]
    np.testing.assert_array_equal(seen, np.array(wanted, bool))

  def test_prefix_at_any_split(self):
    # TokenLayout on the wrong side of a split are padding, so that one program
    # serves all splits.
    spec, params = model('mistral', window=3)
    h = self.draw(3, WIDTH, spec.width)
    whole, kv = run_part(spec, params, h, self.layout, (1, 3))
    positions, segment_ids = self.layout.positions, self.layout.segment_ids
    for split in range(WIDTH + 1):
      before = np.arange(WIDTH) < split
      prefix = KV(
          kv.key, kv.value, TokenLayout(positions, segment_ids * before)
      )
      suffix = TokenLayout(positions, segment_ids * ~before)
      part, own = run_part(spec, params, h, suffix, (1, 3), prefix)
      for row, left in enumerate(PADDING):
        first = max(split, left)
        self.assert_same(part[row, first:], whole[row, first:])
        self.assert_same(
            own.value[:, row, :, first:], kv.value[:, row, :, first:]
        )

  @parameterized.parameters(('llama', 1), ('gpt2', 5))
  def test_prefix_under_changes(self, family, split):
    # A change cuts the run, and the prefix with it.
    spec, params = model(family)
    deltas = (self.low_rank(spec, 'mlp/down', (2,)),)
    h = self.draw(3, WIDTH, spec.width)
    whole, kv = run_part(spec, params, h, self.layout, (1, 3), deltas=deltas)
    suffix = some(self.layout, slice(split, None))
    part, own = run_part(
        spec, params, h[:, split:], suffix, (1, 3), cut(kv, 0, split), deltas
    )
    seen = suffix.segment_ids > 0
    self.assert_same(part[seen], whole[:, split:][seen])
    ours, wanted = own.key, kv.key[..., split:, :]
    by_column = lambda x: np.moveaxis(x, 3, 2)[:, seen]
    self.assert_same(by_column(ours), by_column(wanted))

  @parameterized.parameters('mistral', 'gptj', 'gpt2')
  def test_packed_texts_and_branches(self, family):
    spec, params = model(family, **tight(family))
    draw = lambda *sizes: [self.rng.integers(1, 97, n) for n in sizes]
    texts, ((prefix,), branches) = draw(4, 1, 5, 2), (draw(4), draw(3, 1, 2))
    segment_ids = np.array(
        [
            np.repeat([2, 3, 4, 5, 0], [4, 1, 5, 2, 2]),
            np.repeat([0, 1, 2, 3, 4, 0], [2, 4, 3, 1, 2, 2]),
        ]
    )
    place = lambda texts, first: [first + np.arange(len(t)) for t in texts]
    pad = [np.zeros(2, int)]
    positions = np.array(
        [
            np.concatenate(place(texts, 0) + pad),
            np.concatenate(pad + place([prefix], 0) + place(branches, 4) + pad),
        ]
    )
    tokens = np.array(
        [
            np.concatenate(texts + pad),
            np.concatenate(pad + [prefix] + branches + pad),
        ]
    )
    h = run(spec, params, tokens, TokenLayout(positions, segment_ids))
    self.assertTrue(np.isfinite(h).all())
    for i, text in enumerate(texts):
      wanted, _ = oracle(spec, params, text)
      self.assert_same(h[0, segment_ids[0] == i + 2], wanted)
    for i, branch in enumerate(branches):
      wanted, _ = oracle(spec, params, np.concatenate([prefix, branch]))
      self.assert_same(h[1, segment_ids[1] == 1], wanted[:4])
      self.assert_same(h[1, segment_ids[1] == i + 2], wanted[4:])

  def test_branches_on_a_prefix(self):
    spec, params = model('mistral', window=3)
    prefix, *branches = (self.rng.integers(1, 97, n) for n in (4, 2, 1, 3))
    table = np.asarray(params['embed']['embedding'])
    left = TokenLayout(np.arange(4)[None], np.ones((1, 4), int))
    _, kv = run_part(spec, params, table[prefix][None], left, (0, 3))
    right = TokenLayout(
        np.array([[4, 5, 4, 4, 5, 6]]), np.array([[2, 2, 3, 4, 4, 4]])
    )
    tails = table[np.concatenate(branches)][None]
    h, _ = run_part(spec, params, tails, right, (0, 3), kv)
    for i, branch in enumerate(branches):
      wanted, _ = oracle(spec, params, np.concatenate([prefix, branch]))
      self.assert_same(h[right.segment_ids == i + 2], wanted[4:])

  def test_padded_rows_are_finite(self):
    spec, params = model('mistral')
    valid = self.layout.segment_ids > 0
    valid[1] = False
    layout = TokenLayout(self.layout.positions, valid.astype(np.int32))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
      h = _run(spec, params, self.tokens, layout, (), ())
      score, _ = decoder.label_logprob(spec, params, h, self.tokens)
      return -jnp.sum(jnp.where(valid, score, 0)), (h, score)

    (value, (h, score)), slopes = loss(params)
    for leaf in jax.tree.leaves((value, h, score, slopes)):
      self.assertTrue(np.isfinite(leaf).all())
    for row in (0, 2):
      wanted, _ = oracle(spec, params, self.text(row))
      self.assert_same(np.asarray(h)[row, PADDING[row] :], wanted)


class RematTest(DecoderTestCase):

  def test_same_gradient(self):
    spec, params = model()
    h = self.draw(3, WIDTH, spec.width)
    _, kv = run_part(spec, params, h, self.layout, (1, 3))
    suffix = some(self.layout, slice(4, None))
    delta = self.low_rank(spec, 'mlp/down', (2,))

    def loss(remat, params, h, delta, value):
      patch = Patch('mlp', 'add', jnp.int32(1), np.zeros(3, int), value)
      h, (seen,) = decoder.run_layers(
          spec, params, h, suffix, start=1, stop=3, prefix=cut(kv, 0, 4),
          patches=(patch,), deltas=(delta,), remat=remat,
          taps=(Tap('mlp/down', (1, 2)),),
      )  # fmt: skip
      score, _ = decoder.label_logprob(spec, params, h, self.tokens[:, 4:])
      return jnp.sum(score) + jnp.sum(jnp.square(seen))

    inputs = params, h[:, 4:], delta, self.draw(3, spec.width)
    plain, saved = (
        jax.jit(jax.grad(functools.partial(loss, remat), (0, 1, 2, 3)))(*inputs)
        for remat in (None, decoder.SAVE_PRODUCTS)
    )
    # Sums may be taken in another order: relative to the largest entry.
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved)):
      self.assert_same(a, b, 1e-11 * (1 + np.abs(b).max()))
    for leaf in jax.tree.leaves(plain[1:]):
      self.assertGreater(np.abs(leaf).max(), 1e-3)


class DtypeTest(parameterized.TestCase):

  def inputs(self, spec, dtype):
    """Tokens, columns, patches and changes."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(dtype)
    tokens = rng.integers(1, 97, (len(PADDING), WIDTH))
    key, value = draw(2, 2, spec.mlp_width), draw(2, 2, spec.width)
    dense = Dense((1,), 'attn/out', draw(1, *shape_of(spec, 'attn/out')))
    patches = [
        Patch(site, mode, jnp.int32(1), np.arange(3), draw(3, spec.width))
        for site, mode in (('attn', 'add'), ('mlp', 'set'))
    ]
    deltas = (LowRank((0, 2), 'mlp/down', key, value), dense)
    return tokens, padded_columns(), patches, deltas

  def trace(self, spec, params, dtype):
    """Traces a run with interventions, on a prefix of its own.

    Returns:
      (the program as text, its outputs by name, without values).
    """
    sites = (*OUTPUTS, 'mlp/down', 'attn/out', 'kv')
    taps = [Tap(site, LAYERS) for site in sites]

    def everything(params, tokens, layout, patches, deltas):
      run_layers = functools.partial(
          decoder.run_layers, spec, params,
          start=0, stop=3, patches=patches, deltas=deltas, taps=taps,
      )  # fmt: skip
      h = decoder.embed(spec, params, tokens, layout)
      _, (*_, kv) = run_layers(h, layout)
      own = TokenLayout(layout.positions + WIDTH, layout.segment_ids)
      h, (*seen, kv) = run_layers(h, own, prefix=KV(*kv, layout))
      logits = decoder.logits(spec, params, h)
      score, best = decoder.label_logprob(spec, params, h, tokens)
      return dict(wide=(h, seen, logits, score), kv=kv, best=best)

    *inputs, deltas = self.inputs(spec, dtype)
    draw = edits.Draw(spec, dtype=dtype)
    deltas += (draw.neurons(), draw.codebook('attn'), draw.routed('mlp/up'))
    program, out = jax.make_jaxpr(everything, return_shape=True)(
        params, *inputs, deltas
    )
    self.assertEqual(out['best'].dtype, jnp.int32)
    return str(program), out

  @parameterized.parameters(*tiny.FAMILIES)
  def test_f64_stays_f64(self, family):
    with jax.enable_x64(True):
      program, out = self.trace(*model(family), np.float64)
    for leaf in jax.tree.leaves((out['wide'], out['kv'])):
      self.assertEqual(leaf.dtype, jnp.float64)
    # No value on the way is narrower either.
    self.assertRegex(program, r'\bf64\[')
    self.assertNotRegex(program, r'\b(f32|bf16|f16)\[')

  @parameterized.product(family=tiny.FAMILIES, weights=('bfloat16', 'float32'))
  def test_sums_are_f32(self, family, weights):
    program, out = self.trace(*model(family, weights), np.float32)
    for leaf in jax.tree.leaves(out['wide']):
      self.assertEqual(leaf.dtype, jnp.float32)
    for leaf in jax.tree.leaves(out['kv']):
      self.assertEqual(leaf.dtype, jnp.dtype(weights))
    # So does every product on the way, whatever is multiplied.
    products = re.findall(r'(\w+)\[[\d,]*\] = dot_general', program)
    self.assertGreater(len(products), 20)
    self.assertEqual(set(products), {'f32'})

  @parameterized.parameters('llama', 'gptj')
  def test_bf16_is_close_to_f64(self, family):
    spec, params = model(family, 'bfloat16')
    tokens, _, _, _ = self.inputs(spec, np.float32)
    every = TokenLayout(np.tile(np.arange(WIDTH), (3, 1)), np.ones_like(tokens))
    ours = run(spec, params, tokens, every)
    self.assertEqual(ours.dtype, np.float32)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for h, text in zip(ours, tokens):
      wanted, _ = oracle(spec, exact, text)
      size = np.linalg.norm(h, axis=-1) * np.linalg.norm(wanted, axis=-1)
      self.assertGreater((np.sum(h * wanted, axis=-1) / size).min(), 0.9995)

  def test_f32_is_close_to_f64(self):
    spec, params = model('llama', 'float32')
    tokens, layout, patches, deltas = self.inputs(spec, np.float32)
    h = run(spec, params, tokens, layout, (), deltas)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    merged = merge(exact, deltas)
    for row, left in enumerate(PADDING):
      wanted, _ = oracle(spec, merged, tokens[row, left:])
      np.testing.assert_allclose(h[row, left:], wanted, rtol=0, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
