"""What `benchmark` runs on: a preset's model, its moments, and the edits.

With a window long answers are edited instead of facts, each one alone, by
AnyEdit with the layers and moment weight of the preset and the target settings
of AnyEdit's code (smollm2 has a rate of its own).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from experiments.benchmark.config import BenchmarkConfig
from experiments.benchmark.presets import (
    PRESETS,
    RandomMoments,
    random_params,
    scaled,
)
from jaxedit.convert import hub
from jaxedit.methods import closed_form, memit
from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.base import Editor, Need
from jaxedit.methods.registry import METHODS
from jaxedit.models import families, loading, sharding, tokenizer
from jaxedit.placement import place_by
from jaxedit.runs import moments, tasks
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.text import encoding, templates
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


class Facts(tasks.FactTask):
  """Facts under contexts that are the same every time."""

  @functools.cached_property
  def given_contexts(self) -> tuple[str, ...]:
    """The context templates that are given, or six fixed ones."""
    return super().given_contexts or TEMPLATES


@dataclasses.dataclass(frozen=True)
class Setup:
  """All that the stages need.

  Attributes:
    config: model, edits and folder.
    settings: what is timed.
    task: what the kind of requests differs in.
    model: spec, params, folder, hash, Hugging Face config.
    tokenizer: where the ids are from.
    requests: the facts or long answers.
    edits: their ids, of facts under the contexts.
    recipe: the method.
    editor: the method bound to the model.
    resources: what the editor needs: moments, which have `layer(number)`, [F, F]
      float64.
    random: whether the weights are random.
  """

  config: RunConfig
  settings: BenchmarkConfig
  task: tasks.Task
  model: loading.Model
  tokenizer: Any
  requests: tuple[EditRequest, ...]
  edits: tuple[encoding.EncodedEdit, ...]
  recipe: closed_form.Recipe
  editor: Editor
  resources: Mapping[Need, Any]
  random: bool

  @property
  def independent(self) -> bool:
    """Whether every edit is made alone, on the unedited model."""
    return self.recipe.chunks is not None

  @property
  def group(self) -> range | None:
    """Which independent edit each belongs to; None for one joint edit."""
    return range(len(self.edits)) if self.independent else None


def prepare(
    config: RunConfig, settings: BenchmarkConfig, progress: Progress
) -> Setup:
  """Makes everything, the cheap and most often faulty things first.

  Args:
    config: model, edits and folder; collected moments appear there.
    settings: what to run.
    progress: progress display.

  Returns:
    The setup.

  Raises:
    InputError: anything that cannot be used.
  """
  preset = PRESETS[settings.preset]
  given = {'wheel': config.wheel, 'revision': config.revision}
  source = hub.resolve(config.model, progress=progress, **given)
  tokens = TokenCache(tokenizer.load_tokenizer(source))
  fields, layers = {}, preset.layers
  if preset.config:
    fields, layers = scaled(preset, settings.scale_layers, settings.scale_width)
    spec = families.spec_from_hf(fields)
  else:
    spec = loading.open_model(source)[2].spec
  method = _method(settings, settings.layers or layers)
  recipe = method.recipe()
  editor = closed_form.closed_form(spec, recipe)
  if len(tokens.tokenizer) > spec.vocab:
    raise InputError(
        f'--model={config.model}: its tokenizer has {len(tokens.tokenizer)}'
        f' tokens, the preset {settings.preset} takes {spec.vocab}; name another'
        ' --model'
    )
  chosen = Chosen(METHODS['memit'], method)
  make = tasks.TextTask if settings.window else Facts
  task = make(dataclasses.replace(config, max_new_tokens=0), chosen)
  requests = tuple(task.load(tokens, spec, progress).requests)
  edits = task.encode(spec, tokens, requests, task.contexts(None, tokens))
  if fields:
    params = random_params(spec, config.seed, config.dtype)
    name = f'random {settings.preset} {config.seed}'
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    placement = place_by(config.mesh, size)
    params = sharding.place(spec, params, placement)
    model = loading.Model(
        spec, params, source, name, fields, placement=placement
    )
  else:
    model = loading.load_model(source, config.dtype, progress, mesh=config.mesh)
  (need,) = editor.needs
  kind = settings.moments or ('random' if fields else 'self')
  if kind == 'random':
    found = RandomMoments(spec.mlp_width, config.seed)
  else:
    named = dict(moments=settings.moments_file, moments_tokens=_SELF_TOKENS)
    own = dataclasses.replace(config, **named)
    found = moments.find(own, model, tokens.tokenizer, need, progress=progress)
  return Setup(
      config, settings, task, model, tokens.tokenizer, requests, edits, recipe,
      editor, resources={need: found}, random=bool(fields),
  )  # fmt: skip


def _method(
    settings: BenchmarkConfig, layers: tuple[int, ...]
) -> memit.MemitConfig:
  """The preset's settings of MEMIT, with those that are given."""
  preset = PRESETS[settings.preset]
  target = preset.text_target if settings.window else preset.target
  if settings.value_steps:
    target = target._replace(steps=settings.value_steps)
  config = memit.MemitConfig(
      layers=layers, moment_weight=preset.moment_weight, target=target,
      activations=settings.activations,
  )  # fmt: skip
  if not settings.window:
    return config
  return anyedit(config, settings.window, settings.overlap)
