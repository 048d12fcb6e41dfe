"""What the families share: reading a config field by field, and rotary fields.

`Fields` notes every fault and raises them together, and it remembers which
fields were read, so that a field nobody read is seen. Nothing here knows a
family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxedit.models import families
from jaxedit.models import spec as spec_lib
from jaxedit.models.tensors import Source, maps, norms
from jaxedit.types import InputError

# transformers' names of the activations; gelu_fast is the tanh form with its
# constant written out to ten digits.
ACTIVATIONS = {
    'silu': 'silu',
    'swish': 'silu',
    'relu': 'relu',
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
}

# Llama's names, which Qwen2 and Mistral took over.
_SELF, _MLP = 'model.layers.{}.self_attn', 'model.layers.{}.mlp'
_NORMS = {
    'layers/attn_norm': 'model.layers.{}.input_layernorm',
    'layers/mlp_norm': 'model.layers.{}.post_attention_layernorm',
    'final_norm': 'model.norm',
}
_MAPS = {
    **{f'layers/attn/{x}': f'{_SELF}.{x}_proj' for x in 'qkv'},
    'layers/attn/out': f'{_SELF}.o_proj',
    **{f'layers/mlp/{x}': f'{_MLP}.{x}_proj' for x in ('gate', 'up', 'down')},
    'head': 'lm_head',
}
LLAMA_TENSORS = {
    'embed/embedding': Source('model.embed_tokens.weight'),
    **norms(_NORMS),
    **maps(_MAPS),
}
LLAMA_IGNORED = (f'{_SELF}.rotary_emb.inv_freq', 'model.rotary_emb.inv_freq')

_REQUIRED = object()


class Fields:
  """A config that is read once, with its faults collected.

  Attributes:
    problems: sentences so far; `finish` raises them.
  """

  def __init__(self, family: str, config: Mapping[str, Any]):
    self._family = family
    self._config = config
    self._read: set[str] = set()
    self.problems: list[str] = []

  def refuse(self, name: str, wanted: str) -> None:
    """Notes that a field's value cannot be used."""
    self.problems.append(
        f'config field {name!r} is {self._config.get(name)!r}, but a '
        f'{self._family} model here needs {wanted}'
    )

  def value(self, name: str, default: Any = _REQUIRED) -> Any:
    """A field's value; null counts as absent."""
    self._read.add(name)
    value = self._config.get(name)
    if value is not None:
      return value
    if default is _REQUIRED:
      self.problems.append(
          f'config field {name!r} is missing; a {self._family} config must '
          'have it'
      )
      return None
    return default

  def integer(self, name: str, default: Any = _REQUIRED) -> Any:
    """A positive whole number; 1 stands in for a faulty one."""
    value = self.value(name, default)
    if value is default or (type(value) is int and value > 0):
      return value
    if value is not None:
      self.refuse(name, 'a positive whole number')
    return 1

  def number(self, name: str, default: Any = _REQUIRED) -> Any:
    """A positive number; 1.0 stands in for a faulty one."""
    value = self.value(name, default)
    if value is default:
      return value
    if type(value) in (int, float) and 0 < value < float('inf'):
      return float(value)
    if value is not None:
      self.refuse(name, 'a positive number')
    return 1.0

  def flag(self, name: str, default: bool) -> bool:
    """A true or false field."""
    value = self.value(name, default)
    if isinstance(value, bool):
      return value
    self.refuse(name, 'true or false')
    return default

  def must_be(self, name: str, wanted: bool) -> None:
    """Refuses a flag whose other value is not supported."""
    if self.flag(name, wanted) is not wanted:
      self.refuse(name, str(wanted).lower())

  def activation(self, name: str, default: str) -> str:
    """An activation by transformers' name."""
    value = self.value(name, default)
    if isinstance(value, str) and value in ACTIVATIONS:
      return ACTIVATIONS[value]
    self.refuse(name, 'one of ' + ', '.join(ACTIVATIONS))
    return 'silu'

  def head_size(self, width: int, heads: int, explicit: bool = True) -> int:
    """The head size, from `head_dim` where a family has it."""
    given = self.integer('head_dim', None) if explicit else None
    if given is None and width % heads and not self.problems:
      self.problems.append(
          f'the width {width} is not a multiple of the {heads} attention heads'
      )
    return given or width // heads

  def finish(
      self, spec: spec_lib.ModelSpec, harmless: Iterable[str] = ()
  ) -> spec_lib.ModelSpec:
    """Returns the spec, or raises every fault found.

    Args:
      spec: what was read.
      harmless: the family's own fields that change nothing.
    """
    known = self._read | families.HARMLESS | set(harmless)
    for name in sorted(set(self._config) - known):
      if name.startswith('unsloth_'):  # bookkeeping of a training program
        continue
      if not _is_empty(self._config[name]):
        self.problems.append(
            f'config field {name!r} is {self._config[name]!r}: it is unknown '
            f'for {self._family} and may change what the model computes; '
            'remove it only if it does not'
        )
    if not self.problems:  # a faulty field would be told twice
      self.problems += _contradictions(spec)
    InputError.raise_for(self.problems)
    return spec


def _is_empty(value: Any) -> bool:
  if value is None or value is False:
    return True
  return isinstance(value, (str, list, tuple, dict)) and not value


def _contradictions(spec: spec_lib.ModelSpec) -> list[str]:
  """Sizes that do not fit each other."""
  problems = []
  if spec.heads % spec.kv_heads:
    problems.append(
        f'{spec.heads} attention heads cannot share {spec.kv_heads} key and '
        'value heads; the first must be a multiple of the second'
    )
  if spec.rotary != 'none' and (
      spec.rotary_size % 2 or not 0 < spec.rotary_size <= spec.head_size
  ):
    problems.append(
        f'the rotary size {spec.rotary_size} must be even and at most the '
        f'head size {spec.head_size}'
    )
  return problems


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary fields.

  Attributes:
    theta: base of the wavelengths.
    fraction: part of a head that is rotated.
    scaling: stretching, or None.
  """

  theta: float
  fraction: float
  scaling: spec_lib.RopeScaling | None


def rope(
    fields: Fields,
    *,
    theta_name: str = 'rope_theta',
    fraction_name: str = 'partial_rotary_factor',
    fraction: float | None = None,
) -> Rope:
  """Reads rotary fields in the older and the newer form of config.

  The older form has `rope_theta` (GPT-NeoX: `rotary_emb_base`, `rotary_pct`)
  beside a `rope_scaling` dict; transformers 5 has one dict `rope_parameters`.
  Both may be there if they agree.

  Args:
    fields: the config.
    theta_name: the family's own name of the base.
    fraction_name: the family's own name of the rotated part.
    fraction: the rotated part where the config is silent; None where the
      family rotates whole heads and nothing else.

  Returns:
    The fields; faults are noted in `fields`.
  """
  merged: dict[str, Any] = {}

  def put(key: str, value: Any, where: str) -> None:
    if value is not None and merged.setdefault(key, value) != value:
      fields.problems.append(
          f'the config says {merged[key]!r} and, in {where}, {value!r} for the '
          f'rotary field {key!r}; keep one'
      )

  for name, key in (
      (theta_name, 'rope_theta'),
      ('rope_theta', 'rope_theta'),
      (fraction_name, 'partial_rotary_factor'),
      ('partial_rotary_factor', 'partial_rotary_factor'),
  ):
    put(key, fields.number(name, None), name)
  for name in ('rope_parameters', 'rope_scaling'):
    given = fields.value(name, {})
    if not isinstance(given, Mapping):
      fields.refuse(name, 'an object')
      continue
    for key, value in given.items():
      put('rope_type' if key == 'type' else key, value, name)

  numbers = {}
  kind = merged.pop('rope_type', 'default')
  for key, value in merged.items():
    if type(value) not in (int, float) or not 0 < value < float('inf'):
      fields.problems.append(
          f'the rotary field {key!r} is {value!r}; it must be a positive number'
      )
    else:
      numbers[key] = value
  theta = float(numbers.pop('rope_theta', 10000.0))
  part = float(numbers.pop('partial_rotary_factor', fraction or 1.0))
  if fraction is None and part != 1.0:
    fields.problems.append(
        f'partial_rotary_factor is {part}, but this family rotates whole heads'
    )
  return Rope(theta, part, _scaling(fields, kind, numbers))


# Names of config fields, by what they hold.
GPT_NAMES = dict(
    layers='n_layer', width='n_embd', heads='n_head', mlp='n_inner',
    positions='n_positions', eps='layer_norm_epsilon', act='activation_function',
)  # fmt: skip
NAMES = dict(
    layers='num_hidden_layers', width='hidden_size', heads='num_attention_heads',
    mlp='intermediate_size', positions='max_position_embeddings',
    eps='layer_norm_eps', act='hidden_act',
)  # fmt: skip


def plain_sizes(
    fields: Fields,
    names: Mapping[str, str],
    *,
    positions: int,
    eps: float = 1e-5,
    activation: str,
) -> dict[str, Any]:
  """Reads what models with layer norms and a plain MLP have in common.

  Args:
    fields: the config.
    names: `GPT_NAMES` or `NAMES`.
    positions: longest input where the config is silent.
    eps: likewise, added to the variance.
    activation: likewise, transformers' name.

  Returns:
    Fields of `ModelSpec`.
  """
  width = fields.integer(names['width'])
  heads = fields.integer(names['heads'])
  inner = 4 * width if names is GPT_NAMES else _REQUIRED
  return dict(
      layers=fields.integer(names['layers']),
      width=width,
      mlp_width=fields.integer(names['mlp'], inner),
      heads=heads,
      kv_heads=heads,
      head_size=fields.head_size(width, heads, explicit=False),
      vocab=fields.integer('vocab_size'),
      max_positions=fields.integer(names['positions'], positions),
      norm='layer',
      norm_eps=fields.number(names['eps'], eps),
      activation=fields.activation(names['act'], activation),
      gated=False,
  )


def llama_spec(
    family: str,
    config: Mapping[str, Any],
    harmless: Iterable[str] = (),
    *,
    kv_heads: int | None = None,
    max_positions: int = 2048,
    more: Callable[[Fields], Mapping[str, Any]],
) -> spec_lib.ModelSpec:
  """Reads the config of a family that has Llama's block.

  Args:
    family: its name.
    config: the parsed config.json.
    harmless: the family's own fields that change nothing.
    kv_heads: key and value heads where the config is silent; None for all.
    max_positions: likewise.
    more: what the family has besides, as fields of `ModelSpec`.
  """
  fields = Fields(family, config)
  width = fields.integer('hidden_size')
  heads = fields.integer('num_attention_heads')
  head_size = fields.head_size(width, heads)
  rotary = rope(fields)
  spec = spec_lib.ModelSpec(
      family=family,
      layers=fields.integer('num_hidden_layers'),
      width=width,
      mlp_width=fields.integer('intermediate_size'),
      heads=heads,
      kv_heads=fields.integer('num_key_value_heads', kv_heads or heads),
      head_size=head_size,
      vocab=fields.integer('vocab_size'),
      max_positions=fields.integer('max_position_embeddings', max_positions),
      norm_eps=fields.number('rms_norm_eps', 1e-6),
      activation=fields.activation('hidden_act', 'silu'),
      rotary_size=head_size,
      rope_theta=rotary.theta,
      rope_scaling=rotary.scaling,
      tied=fields.flag('tie_word_embeddings', False),
      **more(fields),
  )
  return fields.finish(spec, harmless)


# Qwen's windows are off, or too long to matter once the check below has passed;
# then the layer that they start at does not matter either.
WINDOW_HARMLESS = ('max_window_layers',)


def check_window(fields: Fields, max_positions: int) -> None:
  """Refuses Qwen's windows of the upper layers, where they would hide tokens.

  Args:
    fields: the config.
    max_positions: longest input, tokens.
  """
  window = fields.integer('sliding_window', None)
  sliding = fields.flag('use_sliding_window', False)
  if sliding and window is not None and window < max_positions:
    fields.refuse(
        'use_sliding_window',
        f'false, or a sliding_window of at least the {max_positions} positions '
        f'instead of {window}',
    )
  kinds = fields.value('layer_types', [])
  if not sliding and any(kind != 'full_attention' for kind in kinds):
    fields.refuse('layer_types', "'full_attention' in every layer")


def _scaling(
    fields: Fields, kind: Any, numbers: Mapping[str, float]
) -> spec_lib.RopeScaling | None:
  """Builds the scaling; a missing or an extra number is a fault."""
  wanted = {
      'default': {},
      'linear': {'factor': 'factor'},
      'llama3': {
          'factor': 'factor',
          'low_freq_factor': 'low_freq_factor',
          'high_freq_factor': 'high_freq_factor',
          'original_max_position_embeddings': 'original_max_positions',
      },
  }
  if not isinstance(kind, str) or kind not in wanted:
    fields.problems.append(
        f'rotary scaling {kind!r} is not supported; supported are '
        f'{", ".join(wanted)}'
    )
    return None
  names = wanted[kind]
  errors = [
      f'rotary scaling {kind!r} needs the field {key!r}'
      for key in names
      if key not in numbers
  ] + [
      f'rotary field {key!r} is unknown for scaling {kind!r}'
      for key in numbers
      if key not in names
  ]
  fields.problems += errors
  if errors or not names:
    return None
  values = {names[key]: float(value) for key, value in numbers.items()}
  if 'original_max_positions' in values:
    values['original_max_positions'] = int(values['original_max_positions'])
  return spec_lib.RopeScaling(kind=kind, **values)
