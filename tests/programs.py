"""Runs our programs for tests: in this process, or as a user does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import tiny_model
from absl import flags
from absl.testing import parameterized

from jaxedit import edited as edited_lib
from jaxedit.models import loading
from jaxedit.runs import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
_WORDS = (
    'the mother tongue of Toko Yasuda in Paris France a twin city is'.split()
)


@dataclasses.dataclass(frozen=True)
class Done:
  """How a run ended."""

  code: int
  out: str
  err: str
  folder: pathlib.Path

  def rows(self, name: str) -> list[dict[str, Any]]:
    """The lines of a file in the output folder."""
    lines = (self.folder / name).read_text().splitlines()
    return [json.loads(line) for line in lines]

  @functools.cached_property
  def results(self) -> dict[str, Any]:
    return json.loads((self.folder / 'results.json').read_text())

  @functools.cached_property
  def records(self) -> list[dict[str, Any]]:
    return self.rows('records.jsonl')

  @property
  def files(self) -> list[str]:
    return sorted(path.name for path in self.folder.iterdir())

  def delta(self, **options: Any) -> Any:
    return edited_lib.load(self.folder / 'delta.safetensors', **options)


@contextlib.contextmanager
def defined(program: Any) -> Iterator[list[str]]:
  """Defines a program's flags for a while; tells their names."""
  known = set(flags.FLAGS)
  program.define_flags()
  names = sorted(set(flags.FLAGS) - known)
  try:
    yield names
  finally:
    for name in names:
      delattr(flags.FLAGS, name)


class Setup:
  """A tiny model, a folder and a cache that the runs of a file share."""

  def __init__(self, program: Any, **options: Any):
    """Makes them.

    Args:
      program: module that is run unless another is named.
      **options: of the tiny model.
    """
    self.program, self._options = program, options
    self.stack = contextlib.ExitStack()
    folder = self.stack.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.cache = self.folder / 'cache'
    self.stack.enter_context(
        mock.patch.dict(os.environ, {'JAXEDIT_CACHE': str(self.cache)})
    )
    self._numbers = itertools.count()
    self.model = tiny_model.make(self.folder / 'tiny', **options)

  def close(self) -> None:
    self.stack.close()

  def path(self, name: str) -> pathlib.Path:
    """A path that nothing lies at."""
    return self.folder / f'{next(self._numbers)}_{name}'

  def write(self, *records: Any) -> pathlib.Path:
    """Writes records, or lines as they are, to a file."""
    path = self.path('data.jsonl')
    dump = lambda one: one if isinstance(one, str) else json.dumps(one)
    path.write_text('\n'.join(map(dump, records)), encoding='utf-8')
    return path

  @functools.cached_property
  def text(self) -> pathlib.Path:
    """Sixty lines to collect moments from."""
    path, rng = self.path('text.txt'), np.random.default_rng(0)
    lines = (' '.join(rng.choice(_WORDS, 12)) for _ in range(60))
    path.write_text('\n'.join(lines))
    return path

  @functools.cached_property
  def base(self) -> loading.Model:
    return loading.load_model(self.model)

  @functools.cached_property
  def poisoned(self) -> pathlib.Path:
    """The same model with a character that overflows."""
    place = self.folder / 'poisoned'
    return tiny_model.make(place, poisoned=True, **self._options)

  def given(self) -> dict[str, Any]:
    """Flags of every run."""
    return {}

  def arguments(self, **changes: Any) -> list[str]:
    """The command line; None leaves a flag out, `words` are no flags."""
    given = dict(
        flagfile=None,  # first, so that all others overrule it
        model=self.model,
        compilation_cache=False,
        output_dir=self.path('out'),
    )
    given |= self.given() | changes
    words = given.pop('words', [])
    given = {k: v for k, v in given.items() if v is not None}
    return [f'--{k}={v}' for k, v in given.items()] + list(words)

  @contextlib.contextmanager
  def parsed(self, *arguments: str) -> Iterator[list[str]]:
    """Has the program's flags parsed for a while; tells what is no flag."""
    with defined(self.program):
      yield cli.parse(['program', *arguments])

  def run(self, program: Any = None, **changes: Any) -> Done:
    """Runs a program in this process."""
    program, arguments = program or self.program, self.arguments(**changes)
    places = [a for a in arguments if a.startswith('--output_dir=')]
    folder = pathlib.Path((places or ['=.'])[0].partition('=')[2])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
      stack.enter_context(defined(program))
      stack.enter_context(contextlib.redirect_stdout(out))
      stack.enter_context(contextlib.redirect_stderr(err))
      try:
        rest = cli.parse(['program', *arguments])
        code = cli.attempt(program.main, rest)
      except SystemExit as end:
        code = end.code
    return Done(code, out.getvalue(), err.getvalue(), folder)

  def start(self, *arguments: str) -> subprocess.Popen:
    """Starts the program as a user does."""
    return subprocess.Popen(
        [sys.executable, '-m', self.program.__name__, *arguments],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Case(parameterized.TestCase):
  """Runs that shall end well, or badly."""

  def succeed(self, run: Any, **changes: Any) -> Done:
    done = run(**changes)
    self.assertEqual(done.code, 0, done.err)
    return done

  def refuse(
      self,
      run: Any,
      sentences: Sequence[str],
      unreached: Sequence[tuple[Any, str]],
      **changes: Any,
  ) -> Done:
    """Runs in vain.

    Args:
      run: runs the program.
      sentences: patterns of the lines on standard error, all of them.
      unreached: (module, name) of what must not have been called.
      **changes: flags.
    """
    stop = mock.Mock(side_effect=AssertionError('too late'))
    with contextlib.ExitStack() as stack:
      for module, name in unreached:
        stack.enter_context(mock.patch.object(module, name, stop))
      done = run(**changes)
    self.assertEqual(done.code, 2, done.err)
    lines = [x for x in done.err.splitlines() if x.startswith('error: ')]
    self.assertLen(lines, len(sentences), done.err)
    for line, sentence in zip(lines, sentences):
      self.assertRegex(line, sentence)
    self.assertEqual(done.out, '')
    return done

  def assert_helps(self, setup: Setup) -> None:
    """Checks that --help lists every flag of the program."""
    process = setup.start('--help')
    out, err = process.communicate(timeout=300)
    self.assertEqual(process.returncode, 0, err)
    with defined(setup.program) as names:
      for name in names:
        self.assertRegex(out, rf'--(\[no\])?{name}:')
