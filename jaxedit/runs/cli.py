"""What every program shares: flags from configs, progress bars, error exits.

A program is `run(main)`. `main` builds a config from flags and calls a tested
function; any `InputError`, and any wrong flag, ends as messages on standard error
and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import glob
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tqdm
from absl import app, flags, logging

from jaxedit import hosts, io
from jaxedit.methods.settings import settings_of
from jaxedit.models import assets
from jaxedit.runs import setting_flags, stopping
from jaxedit.types import InputError, Stopped

# Without torch transformers says so on import; its tokenizers need none.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

# Which processes run together (`hosts.Group`).
flags.DEFINE_bool(
    'distributed',
    None,
    'Run together with the processes that a launcher has started: true lets JAX'
    ' find them, false runs alone; unless given, by what Slurm, Open MPI,'
    ' Kubernetes or Cloud TPU say in the environment.',
)
flags.DEFINE_string(
    'coordinator',
    None,
    'host:port of the first of several processes, where nobody can find it.',
)
flags.DEFINE_integer(
    'num_processes',
    None,
    'With --coordinator: how many processes run together.',
    lower_bound=1,
)
flags.DEFINE_integer(
    'process_id',
    None,
    'With --coordinator: the number of this process, from 0.',
    lower_bound=0,
)
flags.DEFINE_integer(
    'heartbeat_seconds',
    100,
    'A process that has not answered for so long is lost, and all others end.',
    lower_bound=1,
)
HOST_FLAGS = tuple(field.name for field in dataclasses.fields(hosts.Group))

# Errors of a disk that is full, or that may not be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# The settings that choose and load a model, and run it.
MODEL_FIELDS = (
    'model',
    'revision',
    'wheel',
    'dtype',
    'mesh',
    'seed',
    'compilation_cache',
    'max_seconds',
)


def define(
    config: type,
    only: str = 'any',
    *,
    names: Sequence[str] | None = None,
    **defaults: Any,
) -> None:
  """Defines a flag for every field of a config that has a help text.

  Args:
    config: a frozen dataclass of `settings.setting` fields.
    only: 'fact' or 'text' leaves out the fields that belong to the other kind.
    names: fields to define; None for all.
    **defaults: a program's own.
  """
  for name, one in settings_of(config).items():
    if only not in ('any', one.only or only):
      continue
    if names is None or name in names:
      default = defaults.get(name, one.default)
      setting_flags.define(one, default, setting_flags.sentence(one))


def read(config: type) -> Any:
  """Makes a config of the flags that `define` has defined."""
  known, found = settings_of(config), {}
  for name in (field.name for field in dataclasses.fields(config)):
    if name in flags.FLAGS:
      value = flags.FLAGS[name].value
      one = known.get(name)
      found[name] = setting_flags.read(one, value) if one else value
  return config(**found)


def given() -> dict[str, str]:
  """Lists the flags that differ from their defaults.

  Those that may differ in a run that resumes are left out: of the folder, of the
  devices and processes, and `--max_seconds`.
  """
  ours = ('output_dir', 'overwrite', 'flagfile', 'max_seconds', 'mesh')
  ours += HOST_FLAGS
  return {
      name: flags.FLAGS[name].serialize()
      for name in sorted(flags.FLAGS)
      if not flags.FLAGS[name].using_default_value and name not in ours
  }


def use_compilation_cache(enabled: bool) -> None:
  """Turns JAX's persistent compilation cache on, unless it is set already.

  Programs that compile in less than JAX's own threshold of a second are kept as
  well: a run has some sixty of them.
  """
  if enabled and not jax.config.jax_compilation_cache_dir:
    folder = str(assets.cache_folder() / 'xla')
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    _replace_damaged(pathlib.Path(folder))


def _replace_damaged(folder: pathlib.Path) -> None:
  """Removes entries of the compilation cache that JAX could not read.

  JAX warns, compiles, and leaves the entry as it is; with the entry gone it
  writes a new one. The warning names a program, of which all entries go.
  """
  show = warnings.showwarning

  def watch(message, *details, **more):
    found = re.match(
        "Error reading persistent compilation cache entry for '([^']+)'",
        str(message),
    )
    if not found:
      return show(message, *details, **more)
    for path in folder.glob(f'{glob.escape(found[1])}-*'):
      path.unlink(missing_ok=True)

  warnings.showwarning = watch


@contextlib.contextmanager
def progress_bar(
    stage: str, total: int, unit: str
) -> Iterator[Callable[[int], None]]:
  """The `types.Progress` of programs: a bar with rate and time left.

  Where the program is to end (`stopping`) it raises `Stopped`.
  """
  stopping.poll(stage, 0, total, unit)
  with tqdm.tqdm(
      total=total,
      desc=f'{stage:<14}',
      unit=f' {unit}',
      file=sys.stderr,
      mininterval=0.5,
      disable=hosts.number() > 0,
  ) as bar:

    def advance(done: int) -> None:
      bar.update(done)
      stopping.poll(stage, int(bar.n), total, unit)

    yield advance


def parse(arguments: Sequence[str]) -> list[str]:
  """Parses flags; a wrong one is a message and exit code 2.

  Args:
    arguments: the program's name and what follows it.

  Returns:
    What is no flag, the name first.
  """
  try:
    if problem := _flagfile_error(arguments, set()):
      raise flags.Error(problem)
    return flags.FLAGS(list(arguments))
  except (flags.Error, OSError) as e:
    text = re.sub(r'^ERROR:: |\[Errno \d+\] ', '', str(e)).removesuffix('.')
    text = re.sub(r'invalid literal for int.*', 'give a whole number', text)
    text = re.sub(r'could not convert .* float.*', 'give a number', text)
    print(f'error: {text}; --help lists the flags', file=sys.stderr)
    sys.exit(2)
  except SystemExit:
    sys.exit(0)  # --help was asked for and given


def _flagfile_error(arguments: Sequence[str], seen: set[str]) -> str:
  """Says which flagfile, of arguments or named in another, cannot be read."""
  for place, word in enumerate(arguments):
    found = re.fullmatch(r'--?flagfile(?:=(.*))?', word.strip())
    name = found and (found[1] or ''.join(arguments[place + 1 : place + 2]))
    if not name or name in seen:
      continue
    seen.add(name)
    try:
      lines = io.read_bytes(os.path.expanduser(name)).decode().splitlines()
    except UnicodeDecodeError:
      return f'--flagfile={name}: is not UTF-8 text'
    except OSError as e:
      return f'--flagfile={name}: cannot be read ({e.strerror or e})'
    if inner := _flagfile_error(lines, seen):
      return inner
  return ''


def attempt(main: Callable[[], None], rest: Sequence[str]) -> int:
  """Runs a program whose flags are parsed.

  Args:
    main: takes no arguments, reads its flags.
    rest: what `parse` returned.

  Returns:
    The exit code; messages are on standard error. Where other processes run with
    this one, a failure ends the process here.
  """
  try:
    with stopping.listening(_max_seconds()) as stop:
      code = _attempt(main, rest, stop)
  except Exception:
    if hosts.count() == 1:
      raise
    traceback.print_exc()
    code = 1
  if not stop.reason:  # where all stop, they wait for each other
    hosts.leave(code)
  return code


def _max_seconds() -> float:
  """The flag, where a program has it."""
  known = flags.FLAGS
  return known['max_seconds'].value if 'max_seconds' in known else 0.0


def _attempt(
    main: Callable[[], None], rest: Sequence[str], stop: stopping.Stop
) -> int:
  """See `attempt`."""
  try:
    if len(rest) > 1:
      raise InputError(f'unexpected arguments: {" ".join(rest[1:])}')
    _join()
    main()
  except Stopped as e:
    kept = 'nothing to save yet: the same command begins anew'
    if e.saved:
      kept = f'saved in {", ".join(e.saved)}: the same command resumes'
    print(f'{e}; {kept}', file=sys.stderr)
    return stop.code
  except InputError as e:
    for line in e.lines():
      print(f'error: {line}', file=sys.stderr)
    return 2
  except OSError as e:
    if e.errno not in _DISK:
      raise
    print(
        f'error: {e.filename or "a file"}: cannot be written ({e.strerror});'
        ' make room there or choose another place, and repeat the command',
        file=sys.stderr,
    )
    return 2
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if 'RESOURCE_EXHAUSTED' not in str(e) and not isinstance(e, MemoryError):
      raise
    reason = ' '.join(str(e).split())[:300] or 'out of memory'
    print(
        f'error: the memory does not suffice ({reason}); lower the batch sizes',
        file=sys.stderr,
    )
    return 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  return 0


def _join() -> None:
  """Joins the processes that run together; all but the first write elsewhere."""
  known = flags.FLAGS
  hosts.join(hosts.Group(**{x: known[x].value for x in HOST_FLAGS}))
  for name in ('output_dir', 'out') if hosts.number() else ():
    if name in known and known[name].value:
      known[name].value = hosts.own(known[name].value)
  if hosts.number():  # the first one speaks
    sys.stdout = open(os.devnull, 'w')


def run(main: Callable[[], None]) -> None:
  """Runs a program and ends the process.

  Args:
    main: takes no arguments, reads its flags.
  """
  logging.set_verbosity(logging.WARNING)
  app.run(functools.partial(attempt, main), flags_parser=parse)
