"""Files of requests, for tests of their readers."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from absl.testing import parameterized

from jaxedit.eval import datasets
from jaxedit.types import EditRequest, InputError


def without(data: dict[str, Any], name: str) -> dict[str, Any]:
  """An object without one of its fields."""
  return {key: value for key, value in data.items() if key != name}


def asked(request: EditRequest) -> tuple[str, ...]:
  """Prompts of the rephrase probes."""
  return tuple(probe.prompt for probe in request.probes_of('rephrase'))


class Base(parameterized.TestCase):
  """A test with a file at `path`, of requests of some kinds."""

  kinds = ('fact',)

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = os.path.join(folder, 'requests.jsonl')

  def write(self, text):
    mode = 'wb' if isinstance(text, bytes) else 'w'
    with open(self.path, mode) as file:
      file.write(text)

  def load(self, *objects, as_list=False, **options):
    lines = '\n'.join(map(json.dumps, objects)) + '\n'
    self.write(json.dumps(objects, indent=1) if as_list else lines)
    given = {'kinds': self.kinds, **options}
    return datasets.load_requests(self.path, **given)

  def problems(self, *objects, **options):
    with self.assertRaises(InputError) as caught:
      self.load(*objects, **options)
    return caught.exception.problems
