"""What a run needs beside model and records: context templates, moments.

Second moments that an earlier run has collected are found again in the cache, by
all that they depend on.
"""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import numpy as np
from absl import flags, logging

from experiments import collect_moments, common
from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.models import decode, loading
from jaxedit.solve.preconditioner import identity
from jaxedit.stats import corpora, storage
from jaxedit.stats import moments as moments_lib
from jaxedit.text import templates
from jaxedit.types import InputError, Progress

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags that say where second moments come from."""
  flags.DEFINE_string(
      'moments',
      None,
      'Second moments: a file of collect_moments, or a folder of the .npz files'
      ' that ROME and MEMIT publish. Collected, and kept for the next run,'
      ' unless given.',
  )
  flags.DEFINE_string(
      'moments_corpus', 'self', f'Text to collect them from: {corpora.KINDS}.'
  )
  flags.DEFINE_integer(
      'moments_tokens',
      None,
      'Tokens to collect them from (default: 20 a key dimension).',
      lower_bound=1,
  )


def check_flags(recipe: Recipe) -> None:
  """Refuses second moments that cannot be had, as far as needs no model.

  Args:
    recipe: the method.

  Raises:
    InputError: what flags name cannot be used.
  """
  if FLAGS.moments:
    check_moments(FLAGS.moments, recipe)
  else:
    corpora.fingerprint(FLAGS.moments_corpus)


def find_moments(
    model: loading.Model, tokenizer: Any, recipe: Recipe, folder: pathlib.Path
) -> moments_lib.Moments:
  """Loads the second moments that flags name, or collects them.

  Args:
    model: the unedited model.
    tokenizer: its tokenizer.
    recipe: the method; its layers are needed.
    folder: those that are collected appear here.

  Returns:
    The moments; zeros for a method that weighs no keys by them.

  Raises:
    InputError: see `load_moments` and `collect`.
  """
  if recipe.preconditioner is identity:
    width = moments_lib.key_width(model.spec, recipe.site)
    none = np.broadcast_to(0.0, (len(recipe.layers), width, width))
    return moments_lib.Moments(recipe.layers, none, 0, {'corpus': 'none'})
  if FLAGS.moments:
    return load_moments(model, recipe, FLAGS.moments)
  return collect(
      model,
      tokenizer,
      recipe,
      corpus=FLAGS.moments_corpus,
      tokens=FLAGS.moments_tokens,
      seed=FLAGS.seed,
      folder=folder,
      progress=common.progress_bar,
  )


def sample_templates(
    model: loading.Model, tokenizer: Any, seed: int
) -> tuple[str, ...]:
  """Draws context templates from the model itself, as MEMIT does (top 5).

  Args:
    model: the unedited model.
    tokenizer: its tokenizer.
    seed: of the draw.

  Returns:
    The bare '{}' and five sampled templates.
  """

  def sample(prompts: list[str], seed: int, length: int) -> list[str]:
    starts = [tokenizer(prompt)['input_ids'] for prompt in prompts]
    texts = decode.generate(
        model.spec,
        model.params,
        starts,
        max_new_tokens=length - min(map(len, starts)),
        temperature=1.0,
        top_k=5,
        seed=seed,
    )
    whole = [(s + t)[:length] for s, t in zip(starts, texts)]
    return tokenizer.batch_decode(whole, skip_special_tokens=True)

  return templates.sample_templates(
      sample, seed=seed, special_tokens=tokenizer.all_special_tokens
  )


def check_moments(
    path: str, recipe: Recipe, model: loading.Model | None = None
) -> tuple[int, ...] | None:
  """Refuses what `load_moments` would, without reading matrices.

  Args:
    path: as for `load_moments`.
    recipe: the method.
    model: the model they must be of, if it is known yet.

  Returns:
    The layers that the file has; None for a folder of published files.

  Raises:
    InputError: the file is missing, cut short, of another model, or lacks a
      layer.
  """
  if pathlib.Path(path).is_dir():
    return None
  record = storage.check(
      path,
      model_hash=model.hash if model else None,
      layers=recipe.layers,
      site=recipe.site,
  )
  return tuple(map(int, record['layers']))


def load_moments(
    model: loading.Model, recipe: Recipe, path: str | pathlib.Path
) -> moments_lib.Moments:
  """Loads the second moments of the layers to edit.

  Args:
    model: the model they must be of.
    recipe: the method.
    path: a file of collect_moments, or a folder of published .npz files.

  Returns:
    The moments.

  Raises:
    InputError: the file is damaged, of another model, or lacks a layer.
  """
  if not pathlib.Path(path).is_dir():
    return moments_lib.load(
        path, model_hash=model.hash, layers=recipe.layers, site=recipe.site
    )
  return moments_lib.load_npz(
      path,
      layers=recipe.layers,
      width=moments_lib.key_width(model.spec, recipe.site),
      model_hash=model.hash,
      site=recipe.site,
  )


def collect(
    model: loading.Model,
    tokenizer: Any,
    recipe: Recipe,
    *,
    corpus: str,
    tokens: int | None,
    seed: int,
    folder: pathlib.Path,
    progress: Progress,
) -> moments_lib.Moments:
  """Collects second moments, unless an earlier run has done so.

  Args:
    model: the unedited model.
    tokenizer: its tokenizer.
    recipe: the method; its layers are needed.
    corpus: text to collect from, see `stats.corpora`.
    tokens: how many, or None for 20 a key dimension.
    seed: of the text.
    folder: the moments appear here too, as moments.safetensors.
    progress: progress display.

  Returns:
    The moments.

  Raises:
    InputError: the corpus cannot be read, or the cache cannot be used.
  """
  kept = _place(model, recipe, (corpora.fingerprint(corpus), tokens, seed))
  try:
    found = load_moments(model, recipe, kept)
  except InputError:  # not there yet, or damaged
    config = collect_moments.Config(
        layers=recipe.layers,
        out=kept,
        corpus=corpus,
        tokens=tokens,
        seed=seed,
        site=recipe.site,
        overwrite=True,
    )
    report = collect_moments.collect(config, model, tokenizer, progress)
    for warning in report.warnings():
      logging.warning(warning)
    found = load_moments(model, recipe, kept)
  common.link(kept, folder / 'moments.safetensors')
  return found


def _place(
    model: loading.Model, recipe: Recipe, sample: tuple[Any, ...]
) -> pathlib.Path:
  """Names a cached file by all that its moments depend on; makes its folder."""
  dtype = model.params['embed']['embedding'].dtype.name
  what = (
      (model.hash, model.spec, dtype),
      (recipe.layers, recipe.site),
      sample,
  )
  name = hashlib.sha256(repr(what).encode()).hexdigest()
  folder = common.cache_dir() / 'moments'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise InputError(
        f'{folder}: second moments cannot be kept there ({e.strerror}); let'
        ' JAXEDIT_CACHE name another folder'
    ) from e
  return folder / f'{name[:24]}.safetensors'
