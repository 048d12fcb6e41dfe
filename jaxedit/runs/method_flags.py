"""The flags that choose and set a method, made from the registry.

Every number that a flag leaves out is the method's own published one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.base import Method
from jaxedit.methods.registry import METHODS
from jaxedit.methods.settings import Setting, configure, settings_of
from jaxedit.text.chunking import BOUNDARIES
from jaxedit.types import InputError

FLAGS = flags.FLAGS
POSTS = ('none', 'rect', 'prune')
RECT_DENSITY = 0.4  # published


class Chosen(NamedTuple):
  """A method with its settings.

  Attributes:
    method: the registry's entry.
    config: its settings.
    settings: name -> value of all that the numbers depend on, plain JSON types.
  """

  method: Method
  config: Any
  settings: dict[str, Any]

  @property
  def name(self) -> str:
    """The method's id, with what was combined with it."""
    if hasattr(self.config, 'recipe'):
      return self.config.recipe().name
    return self.method.name + ('+anyedit' if self.config.chunks else '')


def methods_for(kind: str) -> dict[str, Method]:
  """Lists the methods that take 'fact' or 'text' requests, or 'any' of both."""
  return {
      name: method
      for name, method in METHODS.items()
      if kind == 'any' or kind in method.accepts
  }


def _known(kind: str) -> dict[str, dict[str, Setting]]:
  """Name of a setting -> method -> the setting, published for that kind."""
  found: dict[str, dict[str, Setting]] = {}
  for name, method in methods_for(kind).items():
    config = method.config()
    if kind == 'text':
      config = method.for_texts(config, True)
    for setting in settings_of(method.config).values():
      default: Any = config
      for part in setting.path:
        default = getattr(default, part)
      setting = setting._replace(default=default)
      found.setdefault(setting.name, {})[name] = setting
  return found


def define_flags(kind: str) -> None:
  """Defines the flags of all methods of a kind.

  Args:
    kind: 'fact', 'text' or 'any', what the program edits.
  """
  names = list(methods_for(kind))
  lines = '; '.join(f'{n}: {METHODS[n].summary}' for n in names)
  flags.DEFINE_enum('method', 'memit', names, f'The method. {lines}.')
  for name, by_method in _known(kind).items():
    _define(name, by_method, kind)
  bundles = sorted({b for n in names for b in METHODS[n].parity} | {'anyedit'})
  flags.DEFINE_enum(
      'parity',
      'none',
      ('none', *bundles),
      'Behave as published code does where that moves numbers; docs/methods.md'
      ' lists what each bundle sets.',
  )
  flags.DEFINE_enum(
      'post',
      'none',
      POSTS,
      'What is done to a change: rect keeps the entries of largest relative'
      f' change ({RECT_DENSITY} of them), prune lowers singular values above the'
      " kernel's own, once after all batches.",
  )
  if kind != 'fact':
    _define_chunk_flags()


def _define_chunk_flags() -> None:
  flags.DEFINE_bool(
      'anyedit', True, 'Edit chunk by chunk; off: one target for an answer.'
  )
  flags.DEFINE_integer(
      'window', 40, 'Tokens a chunk (Llama-3: 40, Qwen2.5: 50).', lower_bound=1
  )
  flags.DEFINE_integer(
      'overlap', 0, 'Tokens that neighbouring chunks share.', lower_bound=0
  )
  flags.DEFINE_enum(
      'boundary',
      'window',
      BOUNDARIES,
      'Where chunks end: after so many tokens, or at ends of sentences and'
      ' lines, of at most so many.',
  )


def _define(name: str, by_method: Mapping[str, Setting], kind: str) -> None:
  """Defines the flag of one setting; unset unless given."""
  first = next(iter(by_method.values()))
  text = first.help[0].upper() + first.help[1:]
  unit = f', {first.unit}' if first.unit else ''
  text = f'{text}{unit}. Default: {_defaults(by_method, kind)}.'
  example = next(
      (s.default for s in by_method.values() if s.default is not None), 0.0
  )
  if first.choices:
    flags.DEFINE_enum(name, None, first.choices, text)
  elif isinstance(example, bool):
    flags.DEFINE_bool(name, None, text)
  elif isinstance(example, tuple):
    flags.DEFINE_list(name, None, text)
  elif isinstance(example, int):
    flags.DEFINE_integer(name, None, text, lower_bound=first.low)
  else:
    define_number(name, None, text, positive=first.exclusive)


def define_number(
    name: str, default: float | None, help_text: str, *, positive: bool = False
) -> None:
  """Defines a flag for a finite number that is not negative.

  Args:
    name: the flag.
    default: its value unless given; None leaves it unset.
    help_text: unit and source.
    positive: whether 0 is refused too.
  """
  flags.DEFINE_float(name, default, help_text)
  what = 'above 0' if positive else '0 or above'
  flags.register_validator(
      name,
      lambda x: x is None
      or (math.isfinite(x) and (x > 0 or (x == 0 and not positive))),
      message=f'give a finite number, {what}',
  )


def layer_list(names: Sequence[str] | None, flag: str) -> tuple[int, ...]:
  """Reads the layers of a list flag.

  Args:
    names: the flag's value.
    flag: the flag's name, for the message.

  Returns:
    Layer numbers, as given.

  Raises:
    InputError: none, or not whole numbers.
  """
  try:
    layers = tuple(int(name) for name in names or ())
  except ValueError:
    layers = ()
  if not layers:
    given = ','.join(names or ())
    raise InputError(f'--{flag}={given}: give layer numbers, e.g. 4,5,6,7,8')
  return layers


def _defaults(by_method: Mapping[str, Setting], kind: str) -> str:
  """The defaults of a setting, methods with the same one together."""
  found: dict[str, list[str]] = {}
  for method, setting in by_method.items():
    found.setdefault(_written(setting.default), []).append(method)
  if len(found) == 1 and len(by_method) == len(methods_for(kind)):
    return f'all {next(iter(found))}'
  return '; '.join(f'{", ".join(who)} {value}' for value, who in found.items())


def _written(value: Any) -> str:
  """A default as help shows it."""
  if isinstance(value, tuple):
    return ','.join(map(str, value))
  if isinstance(value, float):
    return f'{value:g}'
  return 'none' if value is None else str(value)


def table() -> str:
  """Writes the methods and their settings as Markdown, for docs/methods.md."""
  kinds = {'fact': 'facts', 'text': 'long answers'}
  lines = [
      '| `--method` | what it does | edits | source |',
      '|---|---|---|---|',
  ]
  for name, method in METHODS.items():
    edits = ', '.join(v for k, v in kinds.items() if k in method.accepts)
    paper = method.source.removeprefix('arXiv ')
    link = f'[{method.source}](https://arxiv.org/abs/{paper})'
    lines.append(
        f'| [`{name}`](#{name}) | {method.summary} | {edits} | {link} |'
    )
  lines += [
      '',
      '| setting | meaning | default, facts | default, long answers | from |',
      '|---|---|---|---|---|',
  ]
  known = {kind: _known(kind) for kind in kinds}
  for name in sorted(known['fact'] | known['text']):
    by_method = {kind: known[kind].get(name, {}) for kind in kinds}
    every = [one for some in by_method.values() for one in some.values()]
    first = every[0]
    # A bar would end the cell.
    meaning = first.help.replace('|', r'\|')
    meaning += f', {first.unit}' if first.unit else ''
    sources = sorted({one.source for one in every if one.source})
    cells = [_defaults(some, kind) for kind, some in by_method.items()]
    cells.append('; '.join(sources))
    lines.append(f'| `--{name}` | {meaning} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def from_flags(
    kind: str, *, base: Callable[[Any], Any] = lambda config: config
) -> Chosen:
  """Makes the method that flags name.

  Args:
    kind: 'fact' or 'text'.
    base: changes the published settings before flags do, a program's own.

  Returns:
    The method with its settings.

  Raises:
    InputError: all that is wrong with these flags.
  """
  method = METHODS[FLAGS.method]
  known, problems = settings_of(method.config), _problems(method, kind)
  chunked = kind == 'text' and FLAGS.anyedit
  config = method.config()
  if kind == 'text':
    config = method.for_texts(config, chunked)
  given: dict[str, Any] = {}
  for name in _known(kind):
    value = FLAGS[name].value
    if value is None:
      continue
    if name == 'layers':
      try:
        value = layer_list(value, name)
      except InputError as e:
        problems += e.problems
        continue
    if name in known:
      given[name] = value
  bundle = method.parity.get(FLAGS.parity, {})
  if 'null_space_share' in given:  # a bundle's threshold would win over it
    bundle = {k: v for k, v in bundle.items() if k != 'null_space_threshold'}
  if problems:
    raise InputError(*problems)
  config = configure(base(config), {**bundle, **given})
  if FLAGS.post == 'rect':
    config = dataclasses.replace(config, rect_density=RECT_DENSITY)
  if chunked:
    config = anyedit(config, FLAGS.window, FLAGS.overlap, FLAGS.boundary)
  elif FLAGS.parity == 'anyedit' and hasattr(config, 'schedule_edits'):
    config = dataclasses.replace(config, schedule_edits=FLAGS.batch_size)
  return Chosen(method, config, _settings(method, config))


def _settings(method: Method, config: Any) -> dict[str, Any]:
  """All that numbers depend on, as plain JSON types."""
  found: dict[str, Any] = {'post': FLAGS.post, 'parity': FLAGS.parity}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, tuple) and hasattr(value, '_asdict'):
      value = value._asdict()
    name = 'value' if field.name == 'target' else field.name
    found[name] = list(value) if isinstance(value, tuple) else value
  if hasattr(config, 'recipe'):
    recipe = config.recipe()
    for name in ('site', 'output', 'ridge', 'single_edit_ridge'):
      found[name] = getattr(recipe, name)
  if found.get('null_space_threshold') is not None:
    del found['null_space_share']  # has no effect
  return found


def _problems(method: Method, kind: str) -> list[str]:
  """Finds flags that do not go with the chosen method."""
  problems = []
  known = settings_of(method.config)
  for name, by_method in _known(kind).items():
    if FLAGS[name].value is not None and name not in known:
      problems.append(
          f'--{name} is no setting of {method.name}; it belongs to'
          f' {" and ".join(by_method)}: leave it out or change --method'
      )
  if FLAGS.activations == 'bfloat16' and FLAGS.dtype == 'float32':
    problems.append(
        '--activations=bfloat16 rounds nothing where weights are float32: give'
        ' --dtype=bfloat16 too, or leave it out'
    )
  # With texts, AnyEdit's bundle concerns how questions are asked as well.
  shared = kind == 'text' and FLAGS.parity == 'anyedit'
  if FLAGS.parity not in ('none', *method.parity) and not shared:
    by_method = [
        n for n, m in methods_for(kind).items() if FLAGS.parity in m.parity
    ]
    problems.append(
        f'--parity={FLAGS.parity} sets nothing for {method.name}, but for'
        f' {" and ".join(by_method) or "long texts"}: leave it out'
    )
  if kind == 'text' and FLAGS.kl_weight is not None:
    problems.append(
        '--kl_weight: long texts have no subject and so no KL row; leave it out'
    )
  if 'null_space_share' in known:
    if (FLAGS.null_space_share or 0) >= 1:
      problems.append(
          f'--null_space_share={FLAGS.null_space_share:g} leaves no direction that'
          ' may be changed; give a share below 1'
      )
    if None not in (FLAGS.null_space_share, FLAGS.null_space_threshold):
      problems.append(
          '--null_space_share and --null_space_threshold are two ways to choose'
          ' the same directions: leave one of them out'
      )
  fields = {field.name for field in dataclasses.fields(method.config)}
  if FLAGS.post != 'none' and 'rect_density' not in fields:
    problems.append(
        f'--post={FLAGS.post}: {method.name} changes a whole block, not one'
        ' matrix; leave --post out'
    )
  return problems
