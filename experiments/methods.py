"""The flags that choose and set a method, and the row they make.

Every number that a flag leaves out is the method's own published one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags

from experiments import common
from jaxedit.methods import (
    alphaedit,
    emmet,
    memit,
    pmet,
    rome,
    unke,
)
from jaxedit.targets import TargetConfig
from jaxedit.types import InputError

FLAGS = flags.FLAGS


class _Row(NamedTuple):
  """A method's factory and the flags that are arguments of it."""

  make: Callable[..., Any]
  settings: Mapping[str, str] = {}  # argument -> flag


METHODS: Mapping[str, _Row] = {
    'memit': _Row(memit.memit, {'moment_weight': 'moment_weight'}),
    'rome': _Row(rome.rome, {'moments': 'rome_moments'}),
    'r-rome': _Row(rome.r_rome, {'keys': 'rrome_keys'}),
    'emmet': _Row(
        emmet.emmet, {'moment_weight': 'moment_weight', 'ridge': 'ridge'}
    ),
    'pmet': _Row(pmet.pmet, {'moment_weight': 'moment_weight'}),
    'alphaedit': _Row(
        alphaedit.alphaedit,
        {
            'share': 'null_space_share',
            'threshold': 'null_space_threshold',
            'ridge': 'ridge',
            'preserve_previous': 'remember',
        },
    ),
}
# For passages alone.
TEXT_METHODS: Mapping[str, _Row] = {
    'unke': _Row(unke.Unke, {'steps': 'unke_steps', 'rate': 'unke_rate'}),
}
# Bundles of published behaviour: method -> arguments.
PARITY: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    'memit': {'alphaedit': {'threshold': alphaedit.THRESHOLD}},
    'easyedit': {
        'rome': {'moments': False},
        'emmet': {'single_edit_ridge': None},
        'alphaedit': {'threshold': alphaedit.THRESHOLD},
    },
    'anyedit': {
        'alphaedit': {
            'threshold': alphaedit.THRESHOLD,
            'preserve_previous': False,
        },
        'unke': {'pads': True},
    },
}
# Settings of the value optimisation and their flags.
VALUE = {
    'steps': 'value_steps',
    'rate': 'value_rate',
    'decay': 'value_decay',
    'clamp': 'clamp',
    'kl': 'kl_weight',
    'threshold': 'stop_loss',
}
# Methods that edit a run of layers.
_SPREAD = ('memit', 'pmet', 'alphaedit')
POSTS = ('none', 'rect', 'prune')
_RECT_KEEP = 0.4  # published


def define_flags(texts: bool = False) -> None:
  """Defines the flags of all methods; values cite MEMIT's appendix B.

  Args:
    texts: whether the program edits passages, for which there are more methods.
  """
  names = [*METHODS, *(TEXT_METHODS if texts else ())]
  flags.DEFINE_enum(
      'method', 'memit', names, 'The method; see docs/methods.md.'
  )
  if texts:
    flags.DEFINE_integer(
        'unke_steps', None, 'UnKE: updates of the block (50).', lower_bound=1
    )
    common.define_number(
        'unke_rate', None, 'UnKE: learning rate of the block (2e-4).'
    )
  flags.DEFINE_list(
      'layers',
      None,
      'Layers to edit (MEMIT, PMET, AlphaEdit 4-8; ROME, EMMET 5; UnKE 7).'
      if texts
      else "Layers to edit; the method's own for GPT-J (MEMIT, PMET 3-8; ROME,"
      ' EMMET 5) or Llama-3-8B (AlphaEdit 4-8) unless given.',
  )
  common.define_number(
      'moment_weight',
      None,
      'Lambda: virtual tokens of preserved text (GPT-J: MEMIT 15000, PMET 6000,'
      ' EMMET 1).',
      positive=True,
  )
  common.define_number(
      'ridge',
      None,
      'Ridge of the solve (EMMET 0.1, of one fact alone 0; AlphaEdit 10).',
  )
  common.define_number(
      'null_space_share',
      None,
      'AlphaEdit: share of the second moments held by directions that may not'
      ' be changed, below 1 (default 0.9).',
  )
  common.define_number(
      'null_space_threshold',
      None,
      'AlphaEdit: eigenvalue below which a direction may be changed, instead of'
      ' a share (published 0.02).',
      positive=True,
  )
  flags.DEFINE_bool(
      'remember',
      None,
      'AlphaEdit: hold the keys of earlier batches (default on).',
  )
  flags.DEFINE_bool(
      'rome_moments',
      None,
      'ROME: weigh keys by second moments (default on; off in EasyEdit).',
  )
  flags.DEFINE_enum(
      'rrome_keys',
      None,
      rome.R_ROME_KEYS,
      'R-ROME: keys averaged over contexts, or of the bare prompt (default:'
      ' mean).',
  )
  flags.DEFINE_enum(
      'post',
      'none',
      POSTS,
      'What is done to a change: rect keeps the entries of largest relative'
      ' change (0.4 of them), prune lowers singular values above the'
      " kernel's own, once after all batches.",
  )
  flags.DEFINE_enum(
      'parity',
      'none',
      ('none', *PARITY),
      'Behave as published code does where that moves numbers; docs/methods.md'
      ' lists what each bundle sets.',
  )
  _define_value_flags(texts)


def _define_value_flags(texts: bool) -> None:
  common.define_activations_flag()
  pick = lambda facts, passages: passages if texts else facts
  flags.DEFINE_integer(
      'value_steps',
      None,
      pick(
          'Losses evaluated an edit at most (v_num_grad_steps; MEMIT 25, ROME 20,'
          ' PMET 30).',
          'Losses evaluated a chunk at most (v_num_grad_steps; 25).',
      ),
      lower_bound=1,
  )
  common.define_number(
      'value_rate',
      None,
      'Learning rate of the value optimisation (v_lr; published'
      f' {pick("0.5, PMET 0.2, AlphaEdit 0.1,", "0.5")} at width 4096: the first'
      ' step has length rate * sqrt(width)).',
  )
  common.define_number(
      'value_decay',
      None,
      f'Weight of |d| / |z0|^2 (v_weight_decay; {pick("0.5", "0.001")}).',
  )
  common.define_number(
      'clamp',
      None,
      f'Largest |d| / |z0| (clamp_norm_factor; {pick("0.75, ROME 4", "4")}).',
  )
  common.define_number(
      'kl_weight',
      None,
      pick(
          'Weight of the KL term (kl_factor; 0.0625, PMET 1).',
          'Not for passages: they have no subject and so no KL row.',
      ),
  )
  common.define_number(
      'stop_loss',
      None,
      pick(
          'An edit stops below this loss, nats (0.05).',
          'A chunk stops below this loss, nats (0.01; UnKE 0.005, and 0 for UnKE'
          ' and AlphaEdit with --noanyedit).',
      ),
  )


def recipe_of_flags(
    layers: tuple[int, ...] | None = None, value: TargetConfig | None = None
) -> tuple[Any, dict[str, Any]]:
  """Makes the row that flags name.

  Args:
    layers: those of the program, for methods that edit several.
    value: settings of the program for what the flags leave out; None for the
      method's own.

  Returns:
    (the row, its settings for the protocol of the results).

  Raises:
    InputError: all that is wrong with these flags.
  """
  row = {**METHODS, **TEXT_METHODS}[FLAGS.method]
  problems = _strange(row, texts=value is not None)
  arguments = dict(PARITY.get(FLAGS.parity, {}).get(FLAGS.method, {}))
  if layers is not None and FLAGS.method in _SPREAD:
    arguments['layers'] = layers
  if value is not None:
    # When PMET stops is its own rule.
    arguments['value'] = value._replace(
        argmax_stop=row.make().value.argmax_stop
    )
  arguments |= {
      name: getattr(FLAGS, flag)
      for name, flag in row.settings.items()
      if getattr(FLAGS, flag) is not None
  }
  if FLAGS.null_space_share is not None and FLAGS.null_space_threshold is None:
    arguments['threshold'] = None  # a bundle's would win over the share
  if FLAGS.method == 'emmet' and FLAGS.ridge is not None:
    arguments['single_edit_ridge'] = (
        None  # what is asked for holds for one fact, too
    )
  if FLAGS.layers is not None:
    try:
      arguments['layers'] = common.layer_list(FLAGS.layers, 'layers')
    except InputError as e:
      problems += e.problems
  if problems:
    raise InputError(*problems)
  recipe = row.make(**arguments)
  given = {
      name: getattr(FLAGS, flag)
      for name, flag in VALUE.items()
      if getattr(FLAGS, flag) is not None
  }
  recipe = dataclasses.replace(
      recipe,
      value=recipe.value._replace(**given),
      activations=FLAGS.activations,
  )
  if FLAGS.post == 'rect':
    recipe = dataclasses.replace(recipe, rect_density=_RECT_KEEP)
  names = ('site', 'anchor', 'output', 'ridge', 'single_edit_ridge', 'steps')
  names += ('rate', 'decay', 'activations')
  mine = {n: getattr(recipe, n) for n in names if hasattr(recipe, n)}
  # What was left out too: numbers need all that they depend on.
  taken = inspect.signature(row.make).parameters
  arguments = {n: taken[n].default for n in row.settings} | arguments
  for name in ('layers', 'value'):
    arguments.pop(name, None)
  if arguments.get('threshold') is not None:
    del arguments['share']  # plays no part
  return recipe, {
      'layers': list(recipe.layers),
      'post': FLAGS.post,
      'parity': FLAGS.parity,
      **mine,
      **arguments,
      'value': recipe.value._asdict(),
  }


def _strange(row: _Row, texts: bool) -> list[str]:
  """Finds settings that the chosen method does not have."""
  problems = common.activations_faults()
  rows = {**METHODS, **TEXT_METHODS}
  bundle = PARITY.get(FLAGS.parity)
  # With passages, AnyEdit's bundle concerns how questions are asked as well.
  shared = texts and FLAGS.parity == 'anyedit'
  if bundle is not None and FLAGS.method not in bundle and not shared:
    problems.append(
        f'--parity={FLAGS.parity} sets nothing for {FLAGS.method}, but for'
        f' {" and ".join(bundle)}: leave it out'
    )
  if texts and FLAGS.kl_weight is not None:
    problems.append(
        '--kl_weight: passages have no subject and so no KL row; leave it out'
    )
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
  if FLAGS.method in TEXT_METHODS and FLAGS.post != 'none':
    problems.append(
        f'--post={FLAGS.post}: {FLAGS.method} changes a whole block, not one'
        ' matrix; leave --post out'
    )
  known = {flag for r in rows.values() for flag in r.settings.values()}
  mine = row.settings.values()
  for flag in sorted(known.difference(mine)):
    if flag in FLAGS and getattr(FLAGS, flag) is not None:
      users = [n for n, r in rows.items() if flag in r.settings.values()]
      problems.append(
          f'--{flag} is no setting of {FLAGS.method}; it belongs to'
          f' {" and ".join(users)}: leave it out or change --method'
      )
  return problems
