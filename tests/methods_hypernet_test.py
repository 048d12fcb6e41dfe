"""MEND and KE against materialised weights, dense formulas and plain autodiff.

The oracles know no factors, no caches, no batches: every record is a full
forward pass of a model whose matrices are written.
"""

from __future__ import annotations

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import Edited
from jaxedit.methods import mend
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.hypernet import network as network_lib
from jaxedit.methods.hypernet import training
from jaxedit.methods.hypernet.network import TrainedEditor
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder
from jaxedit.testing import facts, models
from jaxedit.text.encoding import EncodedEdit

FAMILIES = ('llama', 'gptj', 'gpt2', 't5')
METHOD_IDS = ('mend', 'ke')
LAYERS = (1, 2)
SMALL = {
    'mend': dict(rank=5, scaled_init=True, step_size=0.02, descend=True),
    'ke': dict(
        lstm_width=6, condition_width=7, inner_width=5, largest_step=0.5
    ),
}
SHAPE = (2, 9, 3)
CLOSE = 1e-10


def setUpModule():
  jax.config.update('jax_enable_x64', True)


def tearDownModule():
  jax.config.update('jax_enable_x64', False)


@functools.cache
def model(family):
  spec = models.tiny_spec(family)
  return models.as_model(spec, models.random_params(spec, 0, jnp.float64))


@functools.cache
def records(seed=0, lengths=(4, 6), targets=(1, 3), family='llama'):
  """Random (prompt, target) ids; a source is two tokens longer than it reads."""
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(2, 90, n).astype(np.int32)
  prompt = draw
  if family == 't5':
    prompt = lambda n: facts.source(draw(n - 2))
  return [(prompt(n), draw(m)) for n, m in zip(lengths, targets)]


def packed(some, shape=SHAPE):
  return lib.pack([lib.answer(*one) for one in some], shape)


@functools.cache
def bound(method, family, **changes):
  """(maps, network, variables with nothing at its neutral value)."""
  spec = model(family).spec
  maps = lib.maps_of(spec, LAYERS)
  trainer = METHODS[method].trainer
  config = trainer.config(**{**SMALL[method], 'layers': LAYERS, **changes})
  network = trainer.network(spec, maps, config)
  variables = network.init(jax.random.key(1), jnp.float64)
  rng = np.random.default_rng(2)
  noisy = lambda x: jnp.asarray(
      x
      + 0.1
      * np.sqrt(np.mean(np.square(x)) + 0.01)
      * rng.standard_normal(x.shape)
  )
  trained = jax.tree.map(noisy, variables.trained)
  return maps, network, variables._replace(trained=trained), config


# Oracles.


def kernels(params, maps):
  return {
      (layer, site): functools.reduce(
          lambda node, name: node[name], site.split('/'), params['layers']
      )['kernel'][layer]
      for layer in maps.layers
      for site in maps.sites
  }


def written(params, changes):
  """Params with matrices replaced: (layer, site) -> [in, out]."""
  for (layer, site), kernel in changes.items():
    part, name = site.split('/')
    layers = params['layers']
    leaf = layers[part][name]
    new = {**leaf, 'kernel': leaf['kernel'].at[layer].set(kernel)}
    layers = {**layers, part: {**layers[part], name: new}}
    params = {**params, 'layers': layers}
  return params


def log_probs(spec, params, tokens):
  """[T, V] of one text without padding."""
  tokens = jnp.asarray(tokens)[None]
  source = decoder.source_of(spec, tokens)
  layout = decoder.token_layout(jnp.ones(tokens.shape, bool), source)
  return jax.nn.log_softmax(decoder.forward(spec, params, tokens, layout)[0])


def nlls(spec, params, record):
  """[n] of the target tokens of one record."""
  prompt, target = record
  text = np.concatenate([prompt, target[:-1]])
  found = log_probs(spec, params, text)[len(prompt) - 1 :]
  return -found[np.arange(len(target)), target]


@functools.cache
def gradients(family, seed=0):
  """[(layer, site) -> [in, out] gradient of a record's mean over tokens]."""
  spec, params = model(family).spec, model(family).params
  maps = lib.maps_of(spec, LAYERS)

  def one(record):
    loss = lambda ws: nlls(spec, written(params, ws), record).mean()
    return jax.value_and_grad(loss)(kernels(params, maps))

  return jax.jit(lambda: [one(x) for x in records(seed, family=family)])()


def dense_mend(variables, maps, spec, pairs):
  """The published formulas, token by token: pairs are (x [T, in], d [T, out])."""
  changes = {}
  for name, sites in mend.groups(spec, maps).items():
    ours, known = variables.trained[name], variables.statistics[name]
    std = {
        s: jnp.sqrt(known[f'square_{s}'] / (known['count'] - 1)) for s in 'xd'
    }

    def token(x, d, i, j, ours=ours, known=known, std=std):
      z = jnp.concatenate(
          [
              (x - known['mean_x']) / (std['x'] + 1e-7),
              (d - known['mean_d']) / (std['d'] + 1e-7),
          ]
      )
      for k in range(2):
        y = ours['expand'][k].T @ (ours['reduce'][k].T @ z)
        y = ours['scale'][k, i, j] * (y + ours['bias'][k])
        y = y + ours['shift'][k, i, j]
        z = z + jnp.where(y >= 0, y, 0)
      change = jnp.outer(z[: len(x)], z[len(x) :])
      return jnp.where((x != 0).any() & (d != 0).any(), change, 0)

    for i, layer in enumerate(maps.layers):
      for j, site in enumerate(sites):
        each = jax.vmap(lambda x, d, i=i, j=j: token(x, d, i, j))
        change = each(*pairs[layer, site]).sum(0)
        changes[layer, site] = ours['alpha'][i, j] * change
  return changes


def lstm_end(ours, way, rows):
  """The last state of an LSTM, step by step."""
  size = ours['recurrent'].shape[1]
  h = c = jnp.zeros(size)
  for x in rows[::-1] if way else rows:
    gates = x @ ours['kernel'][way] + ours['bias'][way]
    gates = gates + h @ ours['recurrent'][way]
    i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
  return h


def dense_ke(variables, maps, params, record, grads):
  """The published formulas with the gradient as a matrix (out, in)."""
  text = np.concatenate(record)
  ours = variables.trained['text']
  rows = params['embed']['embedding'][np.where(text < 0, ~text, text)]
  both = jnp.concatenate([lstm_end(ours, way, rows) for way in (0, 1)])
  c = jnp.tanh(both @ ours['out_kernel'] + ours['out_bias'])
  changes = {}
  for site in maps.sites:
    for i, layer in enumerate(maps.layers):
      one = jax.tree.map(
          lambda x, i=i: x[i], variables.trained[site.replace('/', '_')]
      )
      u = c
      for part in ('in', 'out'):
        v = one[f'{part}_direction'].T  # rows are outputs
        w = v / jnp.linalg.norm(v, axis=1, keepdims=True)
        u = (one[f'{part}_length'][:, None] * w) @ u + one[f'{part}_bias']
        u = jnp.tanh(u) if part == 'in' else u
      fan_in, fan_out = kernels(params, maps)[layer, site].shape
      sizes = np.cumsum([fan_in, fan_out, fan_in, fan_out])
      ca, ra, cb, rb, s = jnp.split(u, sizes)
      gradient = grads[layer, site].T
      change = gradient * jnp.outer(jax.nn.softmax(ra), ca)
      change += jnp.outer(jax.nn.softmax(rb), cb)
      most = variables.statistics['largest_step']
      changes[layer, site] = (most * jax.nn.sigmoid(s[0]) * change).T
  return changes


def dense(method, variables, maps, family, b, seed=0):
  """(layer, site) -> change of record b."""
  spec, params = model(family).spec, model(family).params
  if method == 'ke':
    grads = gradients(family, seed)[b][1]
    record = records(seed, family=family)[b]
    return dense_ke(variables, maps, params, record, grads)
  pairs = {
      (layer, site): (one.x[i, b], one.d[i, b])
      for site, one in factors_of(family, seed)[0].items()
      for i, layer in enumerate(maps.layers)
  }
  return dense_mend(variables, maps, spec, pairs)


@functools.cache
def factors_of(family, seed=0, joint=False):
  """(factors, losses) of the records of a seed."""
  spec, params = model(family).spec, model(family).params
  maps, texts = lib.maps_of(spec, LAYERS), packed(records(seed, family=family))
  share = lib.per_record(texts.weight, jnp.float64)
  if joint:
    share = texts.weight.astype(float) / texts.weight.sum()

  @jax.jit
  def run():
    h = lib.enter(spec, params, texts, LAYERS[0])
    return lib.edit_factors(spec, params, maps, h, texts, share=share)

  return run()


def observed(method, family, variables, seed=0):
  """Variables whose statistics have seen some records."""
  network = bound(method, family)[1]
  found, _ = factors_of(family, seed)
  statistics = jax.jit(network.observe)(variables.statistics, found)
  return variables._replace(statistics=statistics)


@functools.cache
def batch_of(family, seed=0):
  """A batch of training, and its records as (edit, outer, local)."""
  spec, params = model(family).spec, model(family).params
  kinds = [records(seed + i, family=family) for i in range(3)]
  # An outer prompt asks for the target of the edit.
  kinds[1] = [(p, t) for (p, _), (_, t) in zip(kinds[1], kinds[0])]

  @jax.jit
  def run():
    parts = []
    for some in kinds:
      texts = packed(some)
      parts += [texts, lib.enter(spec, params, texts, LAYERS[0])]
    out, _ = lib.leave(spec, params, parts[5], parts[4], first=LAYERS[0])
    return training.Batch(*parts, out)

  return run(), kinds


def naive_loss(method, family, variables, config, kinds):
  """The loss of a batch by full forward passes of written models."""
  spec, params = model(family).spec, model(family).params
  maps = bound(method, family)[0]
  base = kernels(params, maps)
  nll, kl = [], []
  for b, (_, outer, local) in enumerate(zip(*kinds)):
    change = dense(method, variables, maps, family, b)
    new = written(params, {k: base[k] + change[k] for k in base})
    nll.append(nlls(spec, new, outer))
    prompt, target = local
    text = np.concatenate([prompt, target[:-1]])
    old, now = (
        log_probs(spec, p, text)[len(prompt) - 1 :] for p in (params, new)
    )
    kl.append((jnp.exp(old) * (old - now)).sum(-1))
  nll, kl = jnp.concatenate(nll).mean(), jnp.concatenate(kl).mean()
  return config.edit_weight * nll + config.locality_weight * kl


every_pair = parameterized.product(method=METHOD_IDS, family=FAMILIES)


class OracleTest(parameterized.TestCase):

  def assert_close(self, got, want, tolerance=CLOSE):
    scale = np.abs(want).max()
    self.assertGreater(scale, 0)
    self.assertLess(np.abs(np.asarray(got) - want).max() / scale, tolerance)

  @parameterized.parameters(*FAMILIES)
  def test_factors_are_those_of_the_gradient(self, family):
    found, losses = factors_of(family, 0)
    for b, (loss, want) in enumerate(gradients(family, 0)):
      for (layer, site), gradient in want.items():
        one, i = found[site], LAYERS.index(layer)
        self.assert_close(one.x[i, b].T @ one.d[i, b], gradient)
      self.assertAlmostEqual(float(losses[b]), float(loss), 12)

  @every_pair
  def test_updates_are_those_of_the_dense_formulas(self, method, family):
    maps, network, variables, _ = bound(method, family)
    variables = observed(method, family, variables)
    params, (found, _) = model(family).params, factors_of(family, 0)
    pairs, wanted = jax.jit(
        lambda now: (
            network.transform(
                now,
                found,
                packed(records(family=family)),
                params['embed']['embedding'],
            ),
            [
                dense(method, now, maps, family, b)
                for b in range(len(records()))
            ],
        )
    )(variables)
    for b, want in enumerate(wanted):
      for (layer, site), change in want.items():
        key, value = (x[LAYERS.index(layer), b] for x in pairs[site])
        self.assert_close(key.T @ value, change)

  @cases.first(
      2,
      parameterized.parameters(
          ('mend', 'llama'),
          ('ke', 'gptj'),
          ('mend', 'gptj'),
          ('mend', 'gpt2'),
          ('ke', 'llama'),
          ('ke', 'gpt2'),
          ('mend', 't5'),
      ),
  )
  def test_the_gradient_of_the_loss_is_that_through_written_weights(
      self, method, family
  ):
    maps, network, variables, config = bound(
        method, family, edit_weight=0.7, locality_weight=0.4
    )
    spec, params = model(family).spec, model(family).params
    batch, kinds = batch_of(family)
    variables = observed(method, family, variables, 9)
    trial = training.Trial(spec, maps, network, config)
    value, grads, statistics = jax.jit(
        lambda now: training.gradient(trial, params, now, batch)
    )(variables)
    now = variables._replace(statistics=statistics)
    gradients(family), factors_of(family, 0)  # not within jit
    naive = lambda trained: naive_loss(
        method, family, now._replace(trained=trained), config, kinds
    )
    want, wanted = jax.jit(jax.value_and_grad(naive))(variables.trained)
    self.assertAlmostEqual(float(value), float(want), 10)
    names = network_lib.flatten(wanted)
    for name, gradient in network_lib.flatten(grads).items():
      self.assert_close(gradient, names[name])


class MendTest(absltest.TestCase):

  def test_the_clamp_has_derivative_one_at_zero(self):
    slope = jax.grad(mend.clamp)
    self.assertEqual(float(slope(0.0)), 1)
    self.assertEqual(float(slope(1.0)), 1)
    self.assertEqual(float(slope(-1.0)), 0)
    # So U, which begins at 0 where every value before the clamp is 0, trains.
    maps, network, _, config = bound('mend', 'llama')
    variables = network.init(jax.random.key(0), jnp.float64)
    variables = observed('mend', 'llama', variables)
    trial = training.Trial(model('llama').spec, maps, network, config)
    batch, _ = batch_of('llama')
    _, grads, _ = jax.jit(
        lambda now: training.gradient(trial, model('llama').params, now, batch)
    )(variables)
    for shape in grads.values():
      self.assertGreater(float(jnp.abs(shape['expand'][-1]).max()), 0)

  def test_statistics_are_those_of_all_rows(self):
    maps, network, variables, _ = bound('mend', 'llama')
    spec, statistics = model('llama').spec, variables.statistics
    observe = jax.jit(network.observe)
    for seed in (0, 3):
      found = factors_of('llama', seed)[0]
      statistics = observe(statistics, found)
    for name, sites in mend.groups(spec, maps).items():
      for side in ('x', 'd'):
        rows = [
            getattr(factors_of('llama', seed)[0][site], side)[
                factors_of('llama', seed)[0][site].used
            ]
            for seed in (0, 3)
            for site in sites
        ]
        rows, known = np.concatenate(rows), statistics[name]
        self.assertEqual(float(known['count']), len(rows))
        np.testing.assert_allclose(
            known[f'mean_{side}'], rows.mean(0), atol=CLOSE
        )
        std = np.sqrt(known[f'square_{side}'] / (known['count'] - 1))
        np.testing.assert_allclose(std, rows.std(0, ddof=1), atol=CLOSE)

  def test_an_untrained_network_steps_along_the_normalised_gradient(self):
    maps, network, _, _ = bound('mend', 'gpt2')
    variables = network.init(jax.random.key(0), jnp.float64)
    variables = observed('mend', 'gpt2', variables)
    found = factors_of('gpt2', 0)[0]
    pairs = jax.jit(network.transform)(variables, found, None, None)
    for name, sites in mend.groups(model('gpt2').spec, maps).items():
      known = variables.statistics[name]
      for site in sites:
        for side, got in zip('xd', pairs[site]):
          rows = getattr(found[site], side) - known[f'mean_{side}']
          rows /= np.sqrt(known[f'square_{side}'] / (known['count'] - 1)) + 1e-7
          alpha = -0.02 if side == 'd' else 1.0
          used = found[site].used[..., None]
          np.testing.assert_allclose(
              got, np.where(used, alpha * rows, 0), atol=CLOSE
          )


class EditorTest(parameterized.TestCase):

  def edit(self, method, group=None, some=None, **changes):
    """(edited, info) of the common records under variables with noise."""
    some = records() if some is None else some
    encoded = [
        EncodedEdit(i + 1, (p,), (len(p) - 1,), t, np.zeros(0, np.int32))
        for i, (p, t) in enumerate(some)
    ]
    maps, _, variables, _ = bound(method, 'llama')
    variables = observed(method, 'llama', variables)
    config = METHODS[method].configure(
        editor=network_lib.UNTRAINED, layers=LAYERS, **changes
    )
    editor = METHODS[method].editor(model('llama').spec, config)
    trained = TrainedEditor(method, maps, variables, '', frozenset(), {})
    state = editor.init(model('llama'), {editor.needs[0]: trained})
    plan = plan_lib.plan_shapes(encoded, slots=4, batch=4)
    batch = EditBatch(encoded, plan, group)
    edited, after, info = editor.edit(model('llama'), state, batch, Run())
    self.assertIs(after, state)
    return edited, info

  def changes(self, edited):
    return {
        (layer, delta.site): full[i]
        for delta in edited.deltas
        for full in [np.asarray(edited_lib.full(delta))]
        for i, layer in enumerate(delta.layers)
    }

  def assert_same(self, got, want):
    self.assertEqual(got.keys(), want.keys())
    for place, change in want.items():
      np.testing.assert_allclose(
          got[place], change, atol=CLOSE * np.abs(change).max()
      )

  @parameterized.parameters(*METHOD_IDS)
  def test_a_batch_is_the_sum_of_its_edits(self, method):
    joint, _ = self.edit(method)
    alone = [
        self.changes(self.edit(method, some=[one])[0]) for one in records()
    ]
    total = {k: sum(one[k] for one in alone) for k in alone[0]}
    self.assert_same(self.changes(joint), total)
    apart, info = self.edit(method, group=[1, 0])
    for number, part in enumerate(reversed(alone)):
      self.assert_same(self.changes(edited_lib.select(apart, number)), part)
    for loss, (want, _) in zip(info.per_edit['loss'], gradients('llama', 0)):
      self.assertAlmostEqual(loss, float(want), 12)

  def test_scale(self):
    once, _ = self.edit('mend')
    half, _ = self.edit('mend', edit_scale=0.5)
    want = {k: 0.5 * x for k, x in self.changes(once).items()}
    self.assert_same(self.changes(half), want)

  def test_jointly_as_published(self):
    # One loss over all tokens of the batch: smaller gradients, whose
    # normalisation moves them towards that of none.
    maps, network, variables, _ = bound('mend', 'llama')
    variables = observed('mend', 'llama', variables)
    found = factors_of('llama', 0, True)[0]
    pairs = jax.jit(network.transform)(variables, found, None, None)
    want = {
        (layer, site): sum(
            k.T @ v for k, v in zip(*(x[i] for x in pairs[site]))
        )
        for site in maps.sites
        for i, layer in enumerate(maps.layers)
    }
    joint, _ = self.edit('mend', joint=True)
    self.assert_same(self.changes(joint), want)
    apart, _ = self.edit('mend')
    for place, change in self.changes(apart).items():
      self.assertGreater(np.abs(change - want[place]).max(), 1e-3)


class StepTest(parameterized.TestCase):

  def start(self, **changes):
    config = mend.MendTraining(
        **SMALL['mend'], layers=LAYERS, rate=1e-2, **changes
    )
    maps = lib.maps_of(model('llama').spec, LAYERS)
    network = mend.network(model('llama').spec, maps, config)
    trial = training.Trial(model('llama').spec, maps, network, config)
    return trial, training.start(trial, 0, jnp.float64)

  def updates(self, **changes):
    """After which of five batches the variables have changed."""
    trial, state = self.start(accumulate=2, **changes)
    batch, changed = batch_of('llama')[0], []
    for number in range(5):
      before = np.array(state.variables.trained['32x48']['alpha'])
      state, _ = training.step(trial, model('llama').params, state, batch)
      after = np.asarray(state.variables.trained['32x48']['alpha'])
      if (before != after).any():
        changed.append(number)
    return changed

  def test_gradients_are_accumulated(self):
    self.assertEqual(self.updates(), [1, 3])
    # As published: the first update sees one batch more.
    self.assertEqual(self.updates(late_update=True), [2, 4])

  def test_alpha_has_a_learning_rate_of_its_own(self):
    moved = {}
    for one_rate in (False, True):
      trial, state = self.start(one_rate=one_rate, step_rate=1e-4)
      before = np.array(state.variables.trained['32x48']['alpha'])
      state, _ = training.step(
          trial, model('llama').params, state, batch_of('llama')[0]
      )
      after = np.asarray(state.variables.trained['32x48']['alpha'])
      moved[one_rate] = np.abs(after - before).max()
    # The first step of Adam is the learning rate.
    self.assertAlmostEqual(moved[False], 1e-4, 7)
    self.assertAlmostEqual(moved[True], 1e-2, 5)

  def test_a_gradient_that_is_not_finite_is_left_out(self):
    trial, state = self.start()
    batch = batch_of('llama')[0]
    before = jax.tree.map(np.array, state.variables)
    bad = batch._replace(outer_h=batch.outer_h * np.nan)
    state, _ = training.step(trial, model('llama').params, state, bad)
    self.assertEqual(int(state.skipped), 1)
    jax.tree.map(np.testing.assert_array_equal, state.variables, before)

  def test_groups_of_edits_are_judged_together(self):
    trial, _ = self.start(edits=2)
    params, batch = model('llama').params, batch_of('llama')[0]
    _, network, variables, _ = bound('mend', 'llama')
    variables = observed('mend', 'llama', variables)

    @jax.jit
    def both(now):
      found = training._factors(trial, params, batch)  # pylint: disable=protected-access
      pairs = network.transform(now, found, batch.edit, None)
      return training.losses(trial, params, pairs, batch), pairs

    got, pairs = both(variables)
    flat = lambda x: np.asarray(x).reshape(len(x), -1, x.shape[-1])
    deltas = tuple(
        lib.LowRank(LAYERS, site, *map(flat, pairs[site]))
        for site in trial.maps.sites
    )
    edited = edited_lib.apply(params, Edited(deltas))
    _, kinds = batch_of('llama')
    want = sum(nlls(model('llama').spec, edited, o).sum() for o in kinds[1])
    self.assertAlmostEqual(float(got.nll), float(want), 8)


if __name__ == '__main__':
  absltest.main()
