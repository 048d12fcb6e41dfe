"""What `causal_trace --suggest_layers` is given: flags, facts and a proposal."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import methods, resources, workbench
from jaxedit import io
from jaxedit.eval import datasets
from jaxedit.models import loading
from jaxedit.text import templates
from jaxedit.types import InputError

FLAGS = flags.FLAGS


class Proposal(NamedTuple):
  """What an earlier search found.

  Attributes:
    path: its suggest.json.
    layers: the best.
    facts: what they were tried on, as that names them.
    seen: facts that were tried or traced, as (hash of the file, number in it).
    model_hash: of the model.
  """

  path: str
  layers: tuple[int, ...]
  facts: Mapping[str, Any]
  seen: frozenset[tuple[str, int]]
  model_hash: str


def define_flags() -> None:
  """Defines the flags of the search."""
  flags.DEFINE_bool(
      'suggest_layers',
      False,
      'Also search the layers to edit with MEMIT: the traces say how far up to'
      ' look, MEMIT is tried on --probe_facts facts, and suggested.flags is a'
      ' flagfile for memit_batch. Value, moment and --moment_weight flags are'
      ' those of memit_batch.',
  )
  flags.DEFINE_string(
      'probe_data',
      None,
      'Facts to try MEMIT on, as --data of memit_batch; --data unless given.',
  )
  flags.DEFINE_integer('probe_facts', 50, 'How many of them.', lower_bound=2)
  flags.DEFINE_integer(
      'probe_skip', 0, 'How many good ones to pass over first.', lower_bound=0
  )
  flags.DEFINE_enum(
      'probe',
      'search',
      ('search', 'all'),
      'Try anchors coarsely and then near the best, or all there are.',
  )
  flags.DEFINE_list(
      'probe_widths', '1,5', 'Numbers of layers that are edited together.'
  )
  flags.DEFINE_string(
      'proposal',
      None,
      'suggest.json of an earlier search: its layers are compared with the best'
      ' that is found here (with --probe=all: the best there is). Facts that'
      ' the search tried or traced are passed over.',
  )
  flags.DEFINE_string(
      'context_templates',
      None,
      'JSON list of contexts with one {} each; sampled from the model unless'
      ' given.',
  )
  methods.define_flags()
  resources.define_flags()
  flags.adopt_module_key_flags(methods)
  flags.adopt_module_key_flags(resources)


def check_flags() -> list[str]:
  """Finds flags that do not go together, one sentence each."""
  if not FLAGS.suggest_layers:
    unused = FLAGS.proposal is not None
    return ['--proposal is judged with --suggest_layers: add it'] * unused
  problems = []
  if FLAGS.layers is not None:
    problems.append('--layers is what --suggest_layers finds: leave it out')
  if FLAGS.method != 'memit':
    problems.append(
        f'--method={FLAGS.method}: layers are searched with memit; leave it out'
    )
  if FLAGS.post != 'none':
    problems.append(
        f'--post={FLAGS.post}: layers are searched with changes as they are;'
        ' leave it out, and give it to memit_batch'
    )
  widths = FLAGS.probe_widths
  if not widths or not all(x.isdecimal() and int(x) for x in widths):
    problems.append(
        f'--probe_widths={",".join(widths)}: give numbers of layers, e.g. 1,5'
    )
  if 'hidden' not in FLAGS.kinds:
    problems.append('--suggest_layers needs the kind hidden; add it to --kinds')
  if FLAGS.probe_data is None and FLAGS.prompt is not None:
    problems.append('--suggest_layers: name facts to try with --probe_data')
  if problems:
    return problems
  # All are needed after the traces only; layer 0 is part of every search.
  checks = (
      lambda: resources.check_flags(recipe_of((0,))),
      given_contexts,
      read_proposal,
  )
  for check in checks:
    try:
      check()
    except InputError as e:
      problems += e.problems
  return problems


def given_contexts() -> tuple[str, ...]:
  """The context templates that flags name, if they do."""
  if not FLAGS.context_templates:
    return ()
  return tuple(templates.load_templates(FLAGS.context_templates))


def read_proposal() -> Proposal | None:
  """Reads what an earlier search found, if --proposal names one.

  Raises:
    InputError: it is no suggest.json.
  """
  path = FLAGS.proposal
  if not path:
    return None
  remedy = 'give the suggest.json that an earlier --suggest_layers wrote'
  try:
    found = io.read_json(path, remedy=remedy)
    facts = found['facts']
    return Proposal(
        path,
        tuple(map(int, found['tries'][0]['layers'])),
        facts,
        frozenset(
            (str(some['sha256']), int(number))
            for some in (facts, found['traced'])
            for number in some['numbers']
        ),
        str(found['model_hash']),
    )
  except InputError as e:
    raise InputError(f'--proposal={e}') from e
  except (ValueError, LookupError, TypeError) as e:
    raise InputError(
        f'--proposal={path}: is no suggest.json ({e!r}); {remedy}'
    ) from e


def check_moments(model: loading.Model) -> None:
  """Refuses second moments that could not be used after the traces.

  Raises:
    InputError: they are another model's, or lack a layer that will be tried.
  """
  layers = range(model.spec.layers) if FLAGS.probe == 'all' else (0,)
  if FLAGS.moments:
    resources.check_moments(FLAGS.moments, recipe_of(layers), model)


def bounded(top: int) -> int:
  """The last layer up to which --moments has all, but `top` at most.

  Args:
    top: last layer that the traces leave.
  """
  have = None
  if FLAGS.moments:
    have = resources.check_moments(FLAGS.moments, recipe_of((0,)))
  if have is None or {*range(top + 1)} <= {*have}:
    return top
  last = next(n for n in range(top + 1) if n not in have) - 1
  print(
      f'note: the traces leave layers 0 to {top}, of which --moments has 0 to'
      f' {last}: none above is tried',
      file=sys.stderr,
  )
  return last


def read_records(
    model: loading.Model, words: Any, proposal: Proposal | None
) -> datasets.Loaded:
  """Reads the facts to try.

  Args:
    model: the model.
    words: its tokenizer.
    proposal: of an earlier search, whose facts are passed over.

  Returns:
    The facts.

  Raises:
    InputError: the proposal is another model's; facts are faulty, too few, or
      lack what they are judged by.
  """
  if proposal and proposal.model_hash != model.hash:
    raise InputError(f'--proposal={proposal.path}: was found for another model')
  source, wanted = FLAGS.probe_data or FLAGS.data, FLAGS.probe_facts
  seen = proposal.seen if proposal else frozenset()
  loaded = datasets.load_records(
      source,
      limit=FLAGS.probe_skip + wanted + len(seen),
      on_bad_record=FLAGS.on_bad_record,
      check=workbench.record_check(
          words, model.spec, contexts=given_contexts(), max_new_tokens=0
      ),
  )
  records = [
      record
      for record in loaded.records[FLAGS.probe_skip :]
      if (loaded.sha256, record.number) not in seen
  ][:wanted]
  if len(records) < 2:
    passed = ' and those that the search has seen' if proposal else ''
    raise InputError(
        f'{source}: {len(loaded.records)} good records leave {len(records)}'
        f' after --probe_skip={FLAGS.probe_skip}{passed}; at least 2 are needed'
    )
  for name, part in (('paraphrases', 'PS'), ('neighbours', 'NS')):
    if not any(getattr(record, name) for record in records):
      raise InputError(
          f'{source}: no record has {name}, which {part} is read on; give'
          ' --probe_data that has, such as CounterFact'
      )
  return dataclasses.replace(loaded, records=tuple(records))


def recipe_of(layers: Sequence[int]) -> Any:
  """MEMIT with the flags' settings."""
  recipe, settings = methods.recipe_of_flags()
  del settings
  return dataclasses.replace(recipe, layers=tuple(layers))


def facts_of(loaded: Any, facts: Sequence[Any]) -> dict[str, Any]:
  """Names facts of a file in plain JSON types.

  Args:
    loaded: the file.
    facts: some of its facts.
  """
  return {
      'source': str(loaded.source),
      'sha256': loaded.sha256,
      'numbers': [fact.number for fact in facts],
  }
