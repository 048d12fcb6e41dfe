"""Where a model runs, and that nothing else asks for devices."""

import pathlib
import re
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from jaxedit import placement
from jaxedit.testing import models

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Programs that time one kernel, on the platform it was written for.
_ASKING = ('jaxedit/placement.py', 'kernels/timing.py')
_QUESTION = re.compile(
    r'jax\.(devices|local_devices|default_backend|device_count)\(|memory_stats\('
)


class PlacementTest(parameterized.TestCase):

  def test_one_device(self):
    (device,) = jax.devices()[:1]
    found = placement.one_device()
    self.assertEqual(found.devices, (device,))
    self.assertEqual(found.platform, device.platform)
    self.assertEqual(found.mesh.axis_names, placement.AXES)
    self.assertEqual(found.accelerated, device.platform != 'cpu')
    self.assertEmpty(found.rules)
    self.assertEqual(found, placement.one_device(device))

  def test_free_memory(self):
    self.assertGreater(placement.one_device().budget_bytes, 2**20)

  @parameterized.parameters(
      ({'bytes_limit': 80, 'bytes_in_use': 30}, 50), ({}, None)
  )
  def test_memory_of_an_accelerator(self, stats, want):

    gpu = mock.Mock(platform='gpu', memory_stats=lambda: stats)
    mesh = mock.Mock(local_devices=[gpu])
    mesh.devices.flat = (gpu,)
    found = placement.Placement(mesh)
    self.assertTrue(found.accelerated)
    self.assertEqual(found.budget_bytes, want)

  def test_a_model_has_one(self):
    spec = models.tiny_spec('llama')
    model = models.as_model(spec, {})
    self.assertEqual(model.placement, placement.one_device())

  def test_nothing_else_asks_for_devices(self):
    asking = []
    for folder in ('jaxedit', 'kernels', 'experiments'):
      for path in sorted((ROOT / folder).rglob('*.py')):
        name = path.relative_to(ROOT).as_posix()
        if name not in _ASKING and _QUESTION.search(path.read_text('utf-8')):
          asking.append(name)
    self.assertEmpty(asking, 'take `Model.placement` as an argument')


if __name__ == '__main__':
  absltest.main()
