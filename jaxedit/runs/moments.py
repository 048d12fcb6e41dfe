"""Second moments of a model's keys, for a run: given, kept, or collected.

Those that an earlier run has collected are found again in the cache, by all that
they depend on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from jaxedit import hosts, io
from jaxedit.batching import packer
from jaxedit.methods.base import Moments as Need
from jaxedit.methods.settings import setting
from jaxedit.models import assets
from jaxedit.models.loading import Model
from jaxedit.runs.config import RunConfig
from jaxedit.stats import corpora, moments, storage
from jaxedit.types import InputError, Progress, silent

# Widest key whose eigenvalues are computed at the end: minutes beyond.
_EIGEN_WIDTH = 4096
# Linux's request to let a file share the blocks of another (linux/fs.h).
_FICLONE = 0x40049409


@dataclasses.dataclass(frozen=True)
class MomentsConfig:
  """What to collect.

  Attributes:
    layers: layers to collect.
    out: file to write.
    corpus: name of the text, see `corpora`.
    tokens: sample size, or None for 20 a key dimension.
    seed: of document order or sampling.
    site: linear map whose input is the key.
    width: tokens of a packed sequence; longer documents are cut. At most what
      the model takes is used.
    batch_rows: sequences computed at once.
    overwrite: replace an existing output.
  """

  layers: tuple[int, ...]
  out: pathlib.Path
  corpus: str = setting('self', f'text: {corpora.KINDS}')
  tokens: int | None = setting(
      None,
      'sample size (default: 20 a key dimension)',
      unit='tokens',
      low=1,
      high=10**9,
  )
  seed: int = 0
  site: str = setting(
      'mlp/down', 'linear map whose input is the key, as in the params'
  )
  width: int = setting(
      512,
      'tokens of a packed sequence; longer documents are cut. 512 loses little'
      ' speed to attention and leaves little padding',
  )
  batch_rows: int = setting(
      4,
      'sequences computed at once; more on an accelerator; rounded up to a'
      ' multiple of the devices that divide batches',
      low=1,
      high=4096,
  )
  overwrite: bool = setting(False, 'replace an existing output')


@dataclasses.dataclass(frozen=True)
class Report:
  """What a collection did.

  Attributes:
    moments: what was written.
    seconds: of the pass over the text, compilation included.
    wanted: tokens asked for.
    out: the file.
  """

  moments: moments.Moments
  seconds: float
  wanted: int
  out: pathlib.Path

  def warnings(self) -> Iterator[str]:
    """Yields what a user of the moments should know."""
    count, width = self.moments.count, self.moments.gram.shape[-1]
    if count < self.wanted:
      yield (
          f'the corpus ended after {count:,} of {self.wanted:,} tokens; give a'
          ' larger one, or a wider --width where documents were cut'
      )
    if count < width:
      yield (
          f'{count:,} tokens leave moments of {width:,} dimensions singular;'
          f' collect {20 * width:,}'
      )

  def line(self) -> str:
    """Sums the collection up."""
    padding = self.moments.provenance['padding_share']
    rate = self.moments.count / self.seconds
    return (
        f'{self.moments.count:,} tokens, {rate:,.0f} tokens/s,'
        f' padding {padding:.1%}, condition'
        f' {condition(self.moments)}, {self.out}'
    )


def condition(found: moments.Moments) -> str:
  """Writes the largest condition number of any layer, in 2-norm."""
  if found.gram.shape[-1] > _EIGEN_WIDTH:
    return f'not computed (key width over {_EIGEN_WIDTH})'
  worst = 0.0
  for gram in found.gram:
    values = np.linalg.eigvalsh(gram)
    # Rounding leaves the zeros of a singular matrix on either side of zero.
    floor = len(gram) * np.finfo(np.float64).eps * values[-1]
    worst = max(worst, values[-1] / values[0] if values[0] > floor else np.inf)
  return f'{worst:.2e}' if np.isfinite(worst) else 'infinite (singular)'


def _beside(out: pathlib.Path, ending: str) -> pathlib.Path:
  """The working file beside an output."""
  return out.with_name(out.name + ending)


def _texts(
    config: MomentsConfig,
    model: Model,
    tokenizer: Any,
    tokens: int,
    progress: Progress,
) -> Any:
  """Opens the corpus as token ids."""
  if config.corpus != 'self':
    documents = corpora.open_documents(config.corpus, seed=config.seed)
    return corpora.tokenised(documents, tokenizer, config.width)
  return corpora.sample(
      model.spec,
      model.params,
      corpora.sample_starts(tokenizer),
      tokens=tokens,
      seed=config.seed,
      stop_ids=[i for i in (tokenizer.eos_token_id,) if i is not None],
      model=model.hash,
      tokenizer=tokenizer,
      store=_beside(config.out, '.texts'),
      progress=progress,
  )


def collect(
    config: MomentsConfig,
    model: Model,
    tokenizer: Any,
    progress: Progress = silent,
) -> Report:
  """Collects and writes second moments.

  Args:
    config: what to collect.
    model: the model.
    tokenizer: its tokenizer.
    progress: is told sampled and collected tokens.

  Returns:
    The moments and how the run went.

  Raises:
    InputError: the output exists, the corpus cannot be read, settings do not
      fit the model, or left-over files are of another run.
  """
  if config.out.exists() and not config.overwrite:
    raise InputError(
        f'--out={config.out}: exists; choose another file or pass --overwrite'
    )
  width = min(config.width, model.spec.max_positions)
  config = dataclasses.replace(config, width=width)
  size = moments.key_width(model.spec, config.site)
  tokens = config.tokens
  if tokens is None:
    tokens = moments.TOKENS_PER_DIMENSION * size
  sizes = {'tokens': tokens, 'width': width, 'batch_rows': config.batch_rows}
  moments.check(model.spec, config.layers, sizes)
  texts = _texts(config, model, tokenizer, tokens, progress)
  begin = time.monotonic()
  found = moments.collect(
      model.spec,
      model.params,
      packer.first_fit(texts, config.width),
      layers=config.layers,
      source=moments.Source(model.hash, config.corpus, config.seed),
      site=config.site,
      cap=tokens,
      batch_rows=model.placement.full(config.batch_rows),
      checkpoint=_beside(config.out, '.partial'),
      progress=progress,
  )
  seconds = time.monotonic() - begin
  moments.save(config.out, found)
  for ending in ('.texts', '.partial'):
    _beside(config.out, ending).unlink(missing_ok=True)
  return Report(found, seconds, tokens, config.out)


def check(path: str, need: Need, model_hash: str | None = None) -> None:
  """Refuses a file of moments that `load` would, without reading matrices.

  Args:
    path: as for `load`.
    need: layers and site that are needed.
    model_hash: of the model that they must be of, if it is known yet.

  Raises:
    InputError: the file is missing, cut short, of another model, or lacks a
      layer.
  """
  if not pathlib.Path(path).is_dir():
    storage.check(
        path, model_hash=model_hash, layers=need.layers, site=need.site
    )


def load(model: Model, need: Need, path: str | pathlib.Path) -> moments.Moments:
  """Loads the second moments of the layers to edit.

  Args:
    model: the model that they must be of.
    need: layers and site that are needed.
    path: a file of collect_moments, or a folder of published .npz files.

  Returns:
    The moments.

  Raises:
    InputError: the file is damaged, of another model, or lacks a layer.
  """
  wanted = dict(
      layers=need.layers,
      model_hash=model.hash,
      site=need.site,
      width=moments.key_width(model.spec, need.site),
  )
  folder = pathlib.Path(path).is_dir()
  return (moments.load_npz if folder else moments.load)(path, **wanted)


def find(
    config: RunConfig,
    model: Model,
    tokenizer: Any,
    need: Need,
    *,
    copy: bool = True,
    progress: Progress = silent,
) -> moments.Moments:
  """Loads the second moments that a run names, or collects them.

  Args:
    config: of the run.
    model: the unedited model.
    tokenizer: its tokenizer.
    need: layers and site that are needed.
    copy: put a copy of collected moments into the run's folder.
    progress: progress display.

  Returns:
    The moments.

  Raises:
    InputError: see `load` and `collect`.
  """
  if config.moments:
    return load(model, need, config.moments)
  tokens, seed = config.moments_tokens, config.seed
  corpus = config.moments_corpus
  kept = _kept(model, need, (corpora.fingerprint(corpus), tokens, seed))
  try:
    found = load(model, need, kept)
  except InputError:  # not there yet, or damaged
    found = None
  if not all(hosts.gather(found is not None)):
    kept = pathlib.Path(hosts.own(str(kept)))
    report = collect(
        MomentsConfig(
            layers=need.layers,
            out=kept,
            corpus=corpus,
            tokens=tokens,
            seed=seed,
            site=need.site,
            overwrite=True,
        ),
        model,
        tokenizer,
        progress,
    )
    for warning in report.warnings():
      logging.warning(warning)
    found = load(model, need, kept)
  if copy:
    _copy(kept, config.folder / 'moments.safetensors')
  return found


def _kept(model: Model, need: Need, sample: tuple[Any, ...]) -> pathlib.Path:
  """Names a cached file by all that its moments depend on; makes its folder."""
  dtype = model.params['embed']['embedding'].dtype.name
  what = (
      (model.hash, model.spec, dtype),
      (need.layers, need.site),
      sample,
  )
  name = hashlib.sha256(repr(what).encode()).hexdigest()
  folder = assets.cache_folder() / 'moments'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise InputError(
        f'{folder}: second moments cannot be kept there ({e.strerror}); let'
        ' JAXEDIT_CACHE name another folder'
    ) from e
  io.sweep_folder(folder)
  return folder / f'{name[:24]}.safetensors'


def _copy(source: pathlib.Path, place: pathlib.Path) -> None:
  """Copies a file, sharing its blocks where the file system can."""
  io.sweep(place)
  with source.open('rb') as old, io.new_file(place) as new:
    # Not a link: whoever changes one of the two must not change the other.
    try:
      fcntl.ioctl(new, _FICLONE, old.fileno())
    except OSError:
      shutil.copyfileobj(old, new, 1 << 22)
