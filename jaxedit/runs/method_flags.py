"""The flags that choose and set a method, made from the registry.

Every number that a flag leaves out is the method's own published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags

from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.base import Method
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.registry import METHODS
from jaxedit.methods.settings import Setting, configure, settings_of
from jaxedit.runs import setting_flags
from jaxedit.text.chunking import BOUNDARIES
from jaxedit.types import InputError

FLAGS = flags.FLAGS


class Chosen(NamedTuple):
  """A method with its settings.

  Attributes:
    method: the registry's entry.
    config: its settings.
    parity: the published code that is followed, or 'none'.
  """

  method: Method
  config: MethodConfig
  parity: str = 'none'

  @property
  def name(self) -> str:
    """The method's id, with what was combined with it."""
    return self.config.label(self.method.name)

  @property
  def settings(self) -> dict[str, Any]:
    """Name -> value of all that numbers depend on, plain JSON types."""
    return {'parity': self.parity, **self.config.described()}


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
    wanted = min(method.accepts) if kind == 'any' else kind
    config = method.published(wanted, method.chunkable and wanted == 'text')
    for setting in settings_of(method.config).values():
      setting = setting._replace(default=setting.of(config))
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
  for by_method in _known(kind).values():
    first = next(iter(by_method.values()))
    text = setting_flags.sentence(first)
    text = f'{text} Default: {_defaults(by_method, kind)}.'
    setting_flags.define(first, None, text)
  bundles = sorted({b for n in names for b in METHODS[n].parity} | {'anyedit'})
  flags.DEFINE_enum(
      'parity',
      'none',
      ('none', *bundles),
      'Behave as published code does where that moves numbers; docs/methods.md'
      ' lists what each bundle sets.',
  )
  if kind != 'fact':
    _define_chunk_flags()


def _define_chunk_flags() -> None:
  flags.DEFINE_bool(
      'anyedit',
      None,
      'Edit chunk by chunk; off: one target for an answer. Default: on, where'
      ' the method can.',
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
      'Where chunks end: after so many tokens; at ends of sentences and lines,'
      ' of at most so many; or before the tokens that the unedited model expects'
      ' least, of so many on average.',
  )


def _defaults(by_method: Mapping[str, Setting], kind: str) -> str:
  """The defaults of a setting, methods with the same one together."""
  found: dict[str, list[str]] = {}
  for method, setting in by_method.items():
    found.setdefault(written(setting.default), []).append(method)
  if len(found) == 1 and len(by_method) == len(methods_for(kind)):
    return f'all {next(iter(found))}'
  return '; '.join(f'{", ".join(who)} {value}' for value, who in found.items())


def written(value: Any) -> str:
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
      '| `--method` | what it does | edits | models | source |',
      '|---|---|---|---|---|',
  ]
  for name, method in METHODS.items():
    edits = ', '.join(v for k, v in kinds.items() if k in method.accepts)
    models = 'all' if method.encoders else 'decoders'
    paper = method.source.removeprefix('arXiv ')
    link = f'[{method.source}](https://arxiv.org/abs/{paper})'
    lines.append(
        f'| [`{name}`](#{name}) | {method.summary} | {edits} | {models} | {link} |'
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
    # A bar would end the cell.
    meaning = every[0].described().replace('|', r'\|')
    sources = sorted({one.source for one in every if one.source})
    cells = [_defaults(some, kind) for kind, some in by_method.items()]
    cells.append('; '.join(sources))
    lines.append(f'| `--{name}` | {meaning} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def from_flags(kind: str) -> Chosen:
  """Makes the method that flags name.

  Args:
    kind: 'fact' or 'text'.

  Returns:
    The method with its settings.

  Raises:
    InputError: all that is wrong with these flags.
  """
  method = METHODS[FLAGS.method]
  chunked = kind == 'text' and FLAGS.anyedit is not False and method.chunkable
  config = method.published(kind, chunked)
  problems, given = _problems(method, kind), {}
  for name, setting in settings_of(method.config).items():
    value = FLAGS[name].value
    if value is None:
      continue
    with InputError.collected(problems):
      given[name] = setting_flags.read(setting, value)
  # A given setting wins over a bundle.
  config = configure(config, method.parity.get(FLAGS.parity, {}))
  try:
    config = configure(config, given)
    problems += [f'--{problem}' for problem in config.errors(FLAGS.dtype)]
  except InputError as e:
    problems += [f'--{problem}' for problem in e.problems]
  InputError.raise_for(problems)
  if chunked:
    config = anyedit(config, FLAGS.window, FLAGS.overlap, FLAGS.boundary)
  if FLAGS.parity != 'none' and 'batch_size' in FLAGS:
    config = config.for_batches(FLAGS.batch_size)
  config.described()  # refuses what does not go together
  return Chosen(method, config, FLAGS.parity)


def _problems(method: Method, kind: str) -> list[str]:
  """Finds flags that do not go with the chosen method."""
  problems = []
  known = settings_of(method.config)
  for name, by_method in _known('any').items():
    if name not in FLAGS or FLAGS[name].value is None:
      continue
    if name not in known:
      own = [n for n in by_method if kind in METHODS[n].accepts]
      problems.append(
          f'--{name} is no setting of {method.name}; it belongs to'
          f' {" and ".join(own or by_method)}: leave it out or change --method'
      )
    elif known[name].only not in ('', kind):
      names = {'fact': 'facts', 'text': 'long answers'}
      problems.append(
          f'--{name} is for {names[known[name].only]}, and these are'
          f' {names[kind]}: leave it out'
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
  if kind == 'text' and FLAGS.anyedit and not method.chunkable:
    problems.append(
        f'--anyedit: {method.name} does not edit chunk by chunk; leave it out'
    )
  return problems
