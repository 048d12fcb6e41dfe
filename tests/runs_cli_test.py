"""What programs share: the cache of compiled programs."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest

_PROGRAM = """
import jax, jax.numpy as jnp
from jaxedit.runs import cli
cli.use_compilation_cache(True)
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()))
"""


class CompilationCacheTest(absltest.TestCase):

  def test_damaged_entries_are_replaced(self):
    cache = self.enter_context(tempfile.TemporaryDirectory())

    def run():
      done = subprocess.run(
          [sys.executable, '-c', _PROGRAM],
          env={**os.environ, 'JAXEDIT_CACHE': cache, 'JAX_PLATFORMS': 'cpu'},
          capture_output=True,
          text=True,
          check=True,
          timeout=300,
      )
      self.assertNotIn('Warning', done.stderr)
      return float(done.stdout)

    want = run()
    entries = list(pathlib.Path(cache, 'xla').glob('*-cache'))
    self.assertNotEmpty(entries)
    whole = {path: path.read_bytes() for path in entries}
    cut = lambda blob: blob[: len(blob) // 2]
    flipped = lambda blob: blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:]
    for damage in (cut, flipped):
      for path, blob in whole.items():
        path.write_bytes(damage(blob))
      self.assertEqual(run(), want)
      for path, blob in whole.items():
        self.assertLen(path.read_bytes(), len(blob))
      self.assertEqual(run(), want)


if __name__ == '__main__':
  absltest.main()
