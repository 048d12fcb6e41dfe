"""What a run takes is counted as the compiler counts it, and without weights."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import targets as targets_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.placement import device_bytes
from jaxedit.planning import fit, programs, stages, targets
from jaxedit.planning.stages import Stage
from jaxedit.targets import engine
from jaxedit.testing import facts, models

CONFIG = targets_lib.TargetConfig(steps=3, threshold=0.0)
# Wide enough for products to outweigh what is counted nowhere.
WIDE = dict(
    width=128, mlp_width=256, heads=4, kv_heads=4, head_size=32, vocab=512
)
TOLERANCE = 0.1


@functools.cache
def edits():
  return tuple(facts.random_edits(6, seed=2, contexts=2))


@functools.cache
def plan():
  return plan_lib.plan_shapes(edits(), slots=4)


@functools.cache
def step(layers, layer=1):
  """The compiled step of a model of so many layers, nothing allocated."""
  spec = models.tiny_spec('llama', layers=layers, **WIDE)
  params = programs.abstract_params(spec, 'float32')
  return spec, targets.programs(
      spec, params, edits(), plan(),
      number=0, layer=layer, output='block', config=CONFIG,
  )  # fmt: skip


class CompilerTest(absltest.TestCase):

  def test_body_of_the_loop_is_counted_once_and_its_trips_by_hand(self):
    # The last layer, which runs scored tokens alone, is outside the loop.
    _, last = step(layers=3)
    _, short = step(layers=4)
    spec, long = step(layers=10)
    np.testing.assert_allclose(short.step.flops, long.step.flops, rtol=0.01)
    body = long.step.flops - last.step.flops
    found = last.step.flops + (spec.layers - 3) * body
    want = targets.step_flops(spec, 1, plan(), plan().shapes[0])
    np.testing.assert_allclose(found, want, rtol=TOLERANCE)

  def test_one_trip_agrees_with_the_sum_by_hand(self):
    spec, found = step(layers=4)
    want = targets.step_flops(spec, 1, plan(), plan().shapes[0])
    np.testing.assert_allclose(found.step.flops, want, rtol=TOLERANCE)

  def test_arguments_are_those_of_a_run(self):
    spec = models.tiny_spec('llama')
    params = models.random_params(spec, 0)
    seen, run = [], engine.step

    def record(*args, **keywords):
      seen.append((args, keywords))
      return run(*args, **keywords)

    with mock.patch.object(engine, 'step', record):
      targets_lib.optimize(
          spec, params, edits(), plan=plan(),
          objective=targets_lib.Objective(1, CONFIG),
      )  # fmt: skip
    made = targets.step_arguments(
        spec, programs.abstract_params(spec, 'float32'), edits(), plan(),
        number=0, layer=1, output='block', config=CONFIG,
    )  # fmt: skip
    real, with_ = seen[0]
    self.assertEqual(made.keywords, with_)
    of = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    self.assertEqual(of(made.args[1:]), of(real[1:]))

  def test_memory_is_that_of_the_arrays(self):
    spec, found = step(layers=3)
    params = programs.abstract_params(spec, 'float32')
    weights = device_bytes(params)
    self.assertEqual(weights, 4 * sum(x.size for x in jax.tree.leaves(params)))
    # Arguments that a program does not read are left out.
    self.assertBetween(found.step.arguments, 0, weights + found.resident)
    self.assertGreater(found.step.temporary, 0)
    self.assertGreater(found.waiting, 0)


class CollectivesTest(absltest.TestCase):

  def test_bodies_of_loops_count_by_their_trips(self):
    text = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%body.1 (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = bf16[16,8]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %y)
}

ENTRY %main.2 (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4,8]) while(%s), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[4], f32[2]) all-reduce(%a, %b), to_apply=%add
  ROOT %out = f32[4] copy(%p)
}
"""
    found = programs.collectives(text)
    want = {'all-gather': 3 * 2 * 16 * 8, 'all-reduce': 4 * (4 + 2)}
    self.assertEqual(found, want)


class FitTest(parameterized.TestCase):

  def plan(self, weights=8.0, device=4.0, shared=False):
    gib = 2.0**30
    found = (
        Stage('load', '', kept=0.0),
        Stage('targets', '', {'float32': 1e12}, device=device * gib),
        Stage('insert', '', device=gib, host=2 * gib, kept=gib),
        Stage('evaluate', '', host=gib),
    )
    return fit.Plan(found, weights * gib, shared)

  def test_host_keeps_what_stages_leave(self):
    host = [x - fit.PROCESS_BYTES for x in self.plan().host]
    self.assertEqual([x / 2**30 for x in host], [0, 0, 2, 2])
    shared = [x - fit.PROCESS_BYTES for x in self.plan(shared=True).host]
    self.assertEqual([x / 2**30 for x in shared], [8, 12, 11, 10])

  def test_table(self):
    rates = {'float32': 1e11, 'memory': 1e10}
    head, *_, total = fit.table(self.plan(), rates)
    self.assertIn('TFLOP', head)
    self.assertRegex(total, r'^total +1 +- +- +12 +2\.34 +25$')

  def test_what_does_not_fit(self):
    gib = 2.0**30
    limits = fit.Limits(16 * gib, 4 * gib)
    self.assertEmpty(fit.misfits(self.plan(), limits))
    (problem,) = fit.misfits(self.plan(), fit.Limits(10 * gib, None))
    self.assertEqual(
        problem, 'stage targets needs 12 GiB of a device, which has 10'
    )
    (problem,) = fit.misfits(self.plan(shared=True), fit.Limits(gib, gib))
    self.assertIn('of the host', problem)

  @parameterized.parameters(
      (lambda slots, narrow, devices: slots <= 4, '--slots=4'),
      (
          lambda slots, narrow, devices: narrow or devices > 3,
          '--dtype=bfloat16, or --mesh=fsdp:4',
      ),
      (
          lambda slots, narrow, devices: narrow and devices > 1,
          '--dtype=bfloat16 --mesh=fsdp:2',
      ),
      (lambda slots, narrow, devices: False, 'smaller batches'),
  )
  def test_advice(self, fits, want):
    found = fit.advice(fits, slots=16, narrow=False, devices=1)
    self.assertIn(want, found)

  def test_seconds_are_those_of_arithmetic_or_memory(self):
    one = Stage('x', '', {'float32': 4e10}, moved=1e9)
    rates = {'float32': 1e11, 'memory': 1e10}
    self.assertAlmostEqual(one.seconds(rates), 0.4 / stages.EFFICIENCY)
    rates['memory'] = 1e8
    self.assertAlmostEqual(one.seconds(rates), 10.0)


if __name__ == '__main__':
  absltest.main()
