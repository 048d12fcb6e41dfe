"""Changes of the MLP's and the attention's outputs equal naive torch loops.

The oracle hooks the modules themselves and runs the whole of every row.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from unittest import mock

import editors
import jax
import naive_oracle
import numpy as np
import torch
from absl.testing import absltest, parameterized

from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.targets import engine
from jaxedit.testing import facts
from jaxedit.text import encoding

PLAIN = targets_lib.TargetConfig(
    steps=5, rate=0.1, decay=0.5, clamp=5.0, kl=0.0625, threshold=0.0
)
EASY = PLAIN._replace(
    steps=8, rate=0.3, kl=0.1, decay=0.05, clamp=20.0, argmax_stop=1e-9
)
EDITS, LAYER = 4, 1
OUTPUTS = ('mlp', 'attn+mlp')
Edits = tuple[encoding.EncodedEdit, ...]
STAGES = (
    engine.prefill,
    engine.assign,
    engine.assign_chunk,
    engine.append_kv,
    engine.step,
)


@functools.cache
def edits(kind: str = 'plain', seed: int = 1) -> Edits:
  """Random edits; 'short' ones end at the anchor, 'chunks' go two by two."""
  chunked = kind == 'chunks'
  some = facts.random_edits(
      EDITS,
      seed=seed,
      contexts=2,
      targets=(5, 2, 4, 3) if chunked else (1, 3, 2),
  )
  if kind == 'short':
    cut = lambda e: tuple(r[: a + 1] for r, a in zip(e.rows, e.anchors))
    some = [dataclasses.replace(edit, rows=cut(edit)) for edit in some]
  if chunked:
    cut = lambda n: tuple((i, min(i + 2, n)) for i in range(0, n, 2))
    some = [dataclasses.replace(e, chunks=cut(len(e.target))) for e in some]
  return tuple(some)


@functools.cache
def plan(slots: int = 4, shards: int = 1) -> plan_lib.BatchPlan:
  """One frame for all edits, so that a family compiles once."""
  cases = [(kind, seed) for kind in ('plain', 'chunks') for seed in (1, 2)]
  every = [edit for case in (*cases, ('short', 1)) for edit in edits(*case)]
  made = plan_lib.plan_shapes(every, slots=slots, shards=shards)
  assert len(made.shapes) == 1
  return made


def run(pair, some, output, config=PLAIN, *, layer=LAYER, **shape):
  """Targets of every edit, and what was run."""
  return targets_lib.optimize(
      pair.spec,
      pair.params,
      some,
      plan=plan(**shape),
      objective=targets_lib.Objective(layer, config, output),
  )


@functools.cache
def naive(family, output, config=PLAIN, kind='plain', layer=LAYER):
  """[edit][chunk] of the oracle."""
  model = naive_oracle.pair(family).torch
  if kind == 'chunks':
    one = naive_oracle.chain
  else:
    one = lambda *arguments: [naive_oracle.optimize(*arguments)]
  return [one(model, edit, layer, config, output) for edit in edits(kind)]


class OracleCase(parameterized.TestCase):
  """Compares with the oracle."""

  agree = editors.assert_targets

  def check(self, family, output, config=PLAIN, kind='plain', layer=LAYER):
    want = naive(family, output, config, kind, layer)
    pair = naive_oracle.pair(family)
    got, _ = run(pair, edits(kind), output, config, layer=layer)
    self.agree(got, want)
    return want


class OutputTest(OracleCase):

  @parameterized.parameters(
      ('llama', 'mlp'),  # sequential
      ('llama', 'attn+mlp'),
      ('gptj', 'mlp'),  # parallel
      ('gptj', 'attn+mlp'),
  )
  def test_plain(self, family, output):
    want = self.check(family, output)
    first, last = (sum(f.losses[i] for (f,) in want) for i in (0, -1))
    self.assertLess(last, first)
    self.assertEqual(sum(f.clamped for (f,) in want), 0)

  @parameterized.product(family=('llama', 'gptj'), output=OUTPUTS)
  def test_clamp_is_a_share_of_every_outputs_own_length(self, family, output):
    config = PLAIN._replace(clamp=0.02)
    parts = len(naive_oracle.SITES[output])
    for (f,) in self.check(family, output, config):
      self.assertGreaterEqual(f.clamped, parts * (config.steps - 2))
      moved = np.linalg.norm(f.z - f.z0)
      self.assertAlmostEqual(moved / np.linalg.norm(f.z0), 0.02, places=5)

  def test_last_layer(self):
    # Nothing runs above the last block: the label must stand at the anchor.
    # These blocks are parallel with two norms.
    self.check('gpt_neox', 'attn+mlp', kind='short', layer=2)

  @parameterized.parameters(dict(decay=30.0), dict(nll=3.0), dict(kl=2.0))
  def test_every_term_matters(self, **weights):
    strong = self.check('llama', 'attn+mlp', PLAIN._replace(**weights))
    (plain,) = naive('llama', 'attn+mlp')[1]
    self.assertGreater(np.abs(strong[1][0].z - plain.z).max(), 1e-2)

  def test_mlp_and_block_are_one_forward(self):
    # Without decay and clamp nothing asks for the size of z0.
    config = PLAIN._replace(decay=0.0, clamp=100.0)
    pair = naive_oracle.pair('llama')
    one, two = (run(pair, edits(), x, config)[0] for x in ('mlp', 'block'))
    for a, b in zip(one, two):
      np.testing.assert_allclose(a.z - a.z0, b.z - b.z0, atol=2e-5)
      np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
      self.assertGreater(np.abs(a.z0 - b.z0).max(), 0.1)

  def test_the_mlp_reads_the_attentions_change(self):
    # Where both are just added to the residual, two changes by one step are one
    # change by a step of twice the length.
    config = PLAIN._replace(steps=2, rate=1.0, decay=0.0, clamp=100.0)
    gap = lambda family: abs(
        naive(family, 'attn+mlp', config)[1][0].losses[1]
        / naive(family, 'block', config._replace(rate=2.0))[1][0].losses[1]
        - 1
    )
    self.assertLess(gap('gptj'), 1e-4)
    self.assertGreater(gap('llama'), 1e-3)

  def test_f64(self):
    # GPT-2 computes in the dtype of its weights throughout.
    pair = naive_oracle.pair('gpt2')
    exact = copy.deepcopy(pair.torch).double()
    want = [
        naive_oracle.chain(exact, edit, LAYER, PLAIN, 'attn+mlp')
        for edit in edits('chunks')
    ]
    with jax.enable_x64(True):
      params = jax.tree.map(lambda x: np.asarray(x, np.float64), pair.params)
      pair = pair._replace(params=params)
      got, _ = run(pair, edits('chunks'), 'attn+mlp')
    self.assertEqual(got[0].z.dtype, np.float64)
    self.agree(got, want, 1e-8)

  @parameterized.product(family=('llama', 'gptj'), output=OUTPUTS)
  def test_chunks(self, family, output):
    want = self.check(family, output, kind='chunks')
    self.assertEqual([len(edit) for edit in want], [3, 1, 2, 2])

  def test_unknown_output(self):
    with self.assertRaisesRegex(ValueError, "'ffn'; known are block, mlp, att"):
      run(naive_oracle.pair('llama'), edits(), 'ffn')


class EaseTest(OracleCase):
  """The rule that rests where every target token comes first."""

  def _edits(self, model) -> list[encoding.EncodedEdit]:
    """Edits whose target is about to come first in all contexts."""
    found = []
    for edit in (*edits(), *edits('plain', 2)):
      with torch.no_grad():
        last = torch.stack([naive_oracle.run(model, r)[-1] for r in edit.rows])
      behind = (last.amax(-1, keepdim=True) - last).amax(0)
      behind[behind == 0] = torch.inf
      target = np.array([int(behind.argmin())], np.int32)
      found.append(dataclasses.replace(edit, target=target))
    return found

  def test_rule(self):
    pair = naive_oracle.pair('llama')
    some = self._edits(pair.torch)
    oracle = lambda config: [
        naive_oracle.optimize(pair.torch, edit, LAYER, config, 'attn+mlp')
        for edit in some
    ]
    # The bound only ends a run: with one that ends none, see all KL terms.
    every = oracle(EASY)
    reached = [[t for t, x in zip(f.terms, f.found) if x] for f in every]
    terms = np.sort(np.concatenate(reached))
    middles = (terms[1:] + terms[:-1]) / 2
    ends = lambda argmax_stop: sum(
        min(r, default=np.inf) < argmax_stop for r in reached
    )
    goes_on = lambda argmax_stop: any(r and r[0] > argmax_stop for r in reached)
    gaps = [
        (high / low - 1, argmax_stop)
        for low, high, argmax_stop in zip(terms, terms[1:], middles)
        if ends(argmax_stop) and goes_on(argmax_stop)
    ]
    self.assertNotEmpty(gaps, reached)
    gap, argmax_stop = max(gaps)
    self.assertGreater(gap, 1e-2)  # rounding does not decide

    want = oracle(EASY._replace(argmax_stop=float(argmax_stop)))
    steps = [len(f.losses) for f in want]
    self.assertBetween(min(steps), 2, EASY.steps - 1)
    self.assertEqual(max(steps), EASY.steps)
    self.assertFalse(all(any(f.found) for f in want))
    config = EASY._replace(argmax_stop=float(argmax_stop))
    got, _ = run(pair, some, 'attn+mlp', config)
    self.agree(got, [[f] for f in want])
    # Another bound is another number, not another program.
    sizes = engine.step._cache_size()
    got, _ = run(pair, some, 'attn+mlp', EASY)
    self.agree(got, [[f] for f in every])
    self.assertEqual(engine.step._cache_size(), sizes)
    got, _ = run(pair, some, 'attn+mlp', EASY, slots=2, shards=2)
    self.agree(got, [[f] for f in every])


class RoomTest(parameterized.TestCase):
  """Nobody notices who else is there."""

  def _same(self, got, want, tolerance=1e-5):
    for a, b in zip(got, want):
      np.testing.assert_array_equal(a.steps, b.steps)
      error = np.linalg.norm(a.z - b.z, axis=-1)
      self.assertTrue((error < tolerance * np.linalg.norm(b.z)).all())
      np.testing.assert_allclose(a.loss, b.loss, rtol=2 * tolerance)

  @parameterized.parameters(('plain', 1), ('chunks', 1), ('chunks', 2))
  def test_slots_and_order(self, kind, shards):
    pair, some = naive_oracle.pair('llama'), edits(kind)
    want, _ = run(pair, some, 'attn+mlp')
    got, _ = run(pair, some[::-1], 'attn+mlp', slots=shards, shards=shards)
    self._same(got[::-1], want)

  def test_the_last_edits_move_to_a_smaller_room(self):
    pair = naive_oracle.pair('llama')
    some = [*edits('chunks'), *edits('chunks', 2)]
    got, work = run(pair, some, 'attn+mlp')
    self.assertLess(work.computed, work.steps * plan().shapes[0].token_budget)
    want, _ = run(pair, some, 'attn+mlp', slots=1)
    self._same(got, want)

  @parameterized.parameters(*OUTPUTS)
  def test_a_second_batch_does_not_compile(self, output):
    pair = naive_oracle.pair('llama')
    run(pair, edits('chunks'), output)
    sizes = [stage._cache_size() for stage in STAGES]
    run(pair, edits('chunks', 2), output, PLAIN._replace(nll=2.0, clamp=0.5))
    self.assertEqual([stage._cache_size() for stage in STAGES], sizes)

  def test_an_edit_that_is_not_finite_fails_alone(self):
    pair, bad = naive_oracle.pair('llama'), 1
    poison = pair.spec.vocab - 1
    table = pair.params['embed']['embedding'].at[poison].set(np.nan)
    params = pair.params | {'embed': {'embedding': table}}
    some = list(edits())
    rows = [row.copy() for row in some[bad].rows]
    for row, anchor in zip(rows, some[bad].anchors):
      row[anchor] = poison
    some[bad] = dataclasses.replace(some[bad], rows=tuple(rows))
    # One slot: who comes next must find nothing of it.
    got, _ = run(pair._replace(params=params), some, 'attn+mlp', slots=1)
    self.assertEqual(
        [bool(t.finite[0]) for t in got], [True, False, True, True]
    )
    want, _ = run(pair, edits(), 'attn+mlp')
    del got[bad], want[bad]
    self._same(got, want)


class ActivationsTest(parameterized.TestCase):
  """States of bf16 weights, beside those of f32 arithmetic on them."""

  def test_f32_activations_are_f32_arithmetic(self):
    pair, some = naive_oracle.pair('llama'), edits('chunks')
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    narrow = cast(pair.params, 'bfloat16')

    def states(params, **spec):
      spec = dataclasses.replace(pair.spec, **spec)
      return run(pair._replace(params=params, spec=spec), some, 'attn+mlp')[0]

    want = states(cast(narrow, 'float32'))

    def apart(**spec) -> float:
      worst = 0.0
      for a, b in zip(states(narrow, **spec), want):
        moved = np.linalg.norm(b.z - b.z0)
        worst = max(worst, np.linalg.norm(a.z - a.z0 - (b.z - b.z0)) / moved)
      return worst

    rounded = apart(activations='bfloat16')
    self.assertGreater(rounded, 1e-3)
    self.assertLess(apart(activations='float32'), 1e-5)  # weights are widened
    # Another name, so that the programs are not those of a CPU.
    default = lambda *args, default, **platforms: default(*args)
    with mock.patch.object(jax.lax, 'platform_dependent', default):
      pieces = apart(activations='float32', family='elsewhere')
    self.assertBetween(pieces, 1e-7, rounded / 50)


if __name__ == '__main__':
  absltest.main()
