"""`causal_trace --suggest_layers`: from traces to a flagfile for memit_batch.

See `suggest` for how layers are searched. Written to the output folder:

  suggested.flags  settings for memit_batch
  suggest.json     all tries, the best first, and what they were measured on
  plots/suggest.*  scores and effects by layer

With --proposal, the suggest.json of an earlier search, the layers that it found
are compared with the best that is found here, on facts that the search never saw:
neither tried nor traced there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import (
    common,
    judging,
    methods,
    resources,
    suggest,
    timing,
    trace_plots,
    trace_results,
    workbench,
)
from experiments.kept import Kept
from jaxedit.eval import datasets, harness
from jaxedit.models import loading
from jaxedit.text import templates
from jaxedit.trace import effects
from jaxedit.types import InputError

FLAGS = flags.FLAGS

FILES = ('suggested.flags', 'suggest.json')
_LISTED = 8  # tries that are told; suggest.json has all
_LAST_SUBJECT = effects.CLASSES.index('last subject token')


class Proposal(NamedTuple):
  """What an earlier search found.

  Attributes:
    path: its suggest.json.
    layers: the best.
    facts: what they were tried on, as `_write` writes it.
    seen: facts that were tried or traced, as (hash of the file, number in it).
    model_hash: of the model.
  """

  path: str
  layers: tuple[int, ...]
  facts: Mapping[str, Any]
  seen: frozenset[tuple[str, int]]
  model_hash: str


class Suggested(NamedTuple):
  """What a search found.

  Attributes:
    tries: all of them, the best first.
    judged: how --proposal compares with the best, if it was given.
    facts: on how many facts.
    plot: as SVG, if it was drawn.
  """

  tries: Sequence[suggest.Tried]
  judged: Mapping[str, Any] | None
  facts: int
  plot: str | None

  def lines(self) -> list[str]:
    """The best tries, and the comparison, to print."""
    lines = suggest.table(self.tries)
    if self.judged:
      lines.append(
          '{source}: score {score:.3f}, {difference:.3f} below the best here, 95%'
          ' interval {low:.3f} to {high:.3f}, {facts} facts'.format(
              facts=self.facts, **self.judged
          )
      )
    return lines

  def report(self) -> dict[str, Any]:
    """The same for results.json; suggest.json has all tries."""
    return {
        'facts': self.facts,
        'tries': suggest.report(self.tries[:_LISTED]),
        'proposal': self.judged,
    }


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
      lambda: resources.check_flags(_recipe((0,))),
      _given_contexts,
      read_proposal,
  )
  for check in checks:
    try:
      check()
    except InputError as e:
      problems += e.problems
  return problems


def _given_contexts() -> tuple[str, ...]:
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
  try:
    found = json.loads(pathlib.Path(path).read_text('utf-8'))
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
  except OSError as e:
    raise InputError(f'--proposal={path}: {e.strerror}') from e
  except (ValueError, LookupError, TypeError) as e:
    raise InputError(
        f'--proposal={path}: is no suggest.json ({e!r}); give the one that an'
        ' earlier --suggest_layers wrote'
    ) from e


def check_moments(model: loading.Model) -> None:
  """Refuses second moments that could not be used after the traces.

  Raises:
    InputError: they are another model's, or lack a layer that will be tried.
  """
  layers = range(model.spec.layers) if FLAGS.probe == 'all' else (0,)
  if FLAGS.moments:
    resources.check_moments(FLAGS.moments, _recipe(layers), model)


def bounded(top: int) -> int:
  """The last layer up to which --moments has all, but `top` at most.

  Args:
    top: last layer that the traces leave.
  """
  have = None
  if FLAGS.moments:
    have = resources.check_moments(FLAGS.moments, _recipe((0,)))
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
          words, model.spec, contexts=_given_contexts(), max_new_tokens=0
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


def _recipe(layers: Sequence[int]) -> Any:
  """MEMIT with the flags' settings."""
  recipe, settings = methods.recipe_of_flags()
  del settings
  return dataclasses.replace(recipe, layers=tuple(layers))


def run(
    model: loading.Model,
    words: Any,
    records: datasets.Loaded,
    averages: Mapping[str, effects.Average],
    *,
    traced: Mapping[str, Any],
    proposal: Proposal | None,
    folder: pathlib.Path,
    pieces: Kept,
    clock: timing.Clock,
    formats: Sequence[str],
) -> Suggested:
  """Searches, and writes what was found.

  Args:
    model: the unedited model.
    words: its tokenizer.
    records: of `read_records`.
    averages: kind -> effects of the traces.
    traced: which facts those are of, as `facts_of` gives it.
    proposal: of an earlier search, to be judged, if there is one.
    folder: where to write.
    pieces: states of an earlier run that was stopped, and a place for these.
    clock: stages are timed here.
    formats: of the plot; none to draw nothing.

  Returns:
    What was found.

  Raises:
    InputError: moments cannot be used, or the traces show nothing.
  """
  subject = {
      name: average.mean[_LAST_SUBJECT]
      for name, average in averages.items()
      if not name.startswith('severed')
  }
  widths = sorted(set(map(int, FLAGS.probe_widths)))
  if FLAGS.probe == 'all':
    top = model.spec.layers - 1
    anchors = list(range(top + 1))
  else:
    top = bounded(suggest.last_read(subject['hidden']))
    anchors = suggest.first_anchors(subject['hidden'], subject.get('mlp'))
    anchors = sorted({min(anchor, top) for anchor in anchors})
  last = max(top, *proposal.layers) if proposal else top
  with clock('probe_prepare'):
    bench, prober = _prepare(model, words, records, last, folder, pieces)
  with clock('probe'):
    # The search adds a few to those of its first round.
    total = len(suggest.windows(anchors, widths))
    with common.progress_bar('probe', total, 'try') as done:
      tries = suggest.search(prober, anchors, top=top, widths=widths, done=done)
    judged = None
    if proposal:
      if all(one.layers != proposal.layers for one in tries):
        tries = suggest.ranked([*tries, prober(proposal.layers)])
      judged = _judge(proposal, tries)
  searched = {
      'facts': facts_of(records, records.records),
      'traced': dict(traced),
      'effects': subject,
      'last_anchor': top,
      'proposal': judged,
  }
  _write(folder, bench, tries, searched)
  plot = None
  if formats:
    (folder / 'plots').mkdir(exist_ok=True)
    drawn = suggest.figure(tries, subject)
    plot = trace_plots.save(drawn, folder / 'plots', 'suggest', formats)
  return Suggested(tries, judged, len(records.records), plot)


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


def _judge(
    proposal: Proposal, tries: Sequence[suggest.Tried]
) -> dict[str, Any]:
  """Compares what was proposed with the best that was tried."""
  (mine,) = (one for one in tries if one.layers == proposal.layers)
  return {
      'source': proposal.path,
      'layers': list(mine.layers),
      **mine.metrics,
      **suggest.compare(mine, tries[0], seed=FLAGS.seed),
      'searched_on': dict(proposal.facts),
  }


def _prepare(
    model: loading.Model,
    words: Any,
    loaded: datasets.Loaded,
    top: int,
    folder: pathlib.Path,
    pieces: Kept,
) -> tuple[workbench.Workbench, suggest.Prober]:
  """Encodes facts, and finds templates and moments."""
  bench = workbench.Workbench(
      model=model,
      tokenizer=words,
      loaded=loaded,
      batch_size=len(loaded.records),
  )
  recipe = _recipe(range(top + 1))
  contexts = _given_contexts() or resources.sample_templates(
      model, words, FLAGS.seed
  )
  bench = workbench.encode_facts(bench, contexts, recipe.anchor)
  bench = workbench.shape(bench, None)
  judge = functools.partial(
      judging.judge,
      evaluate=functools.partial(harness.evaluate, max_new_tokens=0),
      seed=FLAGS.seed,
  )
  moments = resources.find_moments(model, words, recipe, folder)
  prober = suggest.Prober(
      bench,
      recipe,
      moments,
      judge=judge,
      pieces=pieces,
      progress=common.progress_bar,
  )
  return bench, prober


def _write(
    folder: pathlib.Path,
    bench: workbench.Workbench,
    tries: Sequence[suggest.Tried],
    searched: Mapping[str, Any],
) -> None:
  """Writes suggest.json, with what was searched, and suggested.flags."""
  best, found = tries[0], bench.loaded
  effect = {
      name: [trace_results.number(x) for x in mean]
      for name, mean in searched['effects'].items()
  }
  value = _recipe(best.layers).value
  common.write_json(
      folder / 'suggest.json',
      {
          'tries': suggest.report(tries),
          'records': {
              '-'.join(map(str, sorted({t.layers[0], t.layers[-1]}))): [
                  {k: r.get(k) for k in ('es', 'ps', 'ns')} for r in t.records
              ]
              for t in tries
          },
          **searched,
          'effects': effect,
          'model_hash': bench.model.hash,
          'moment_weight': FLAGS.moment_weight,
          'value': value._asdict(),
          'templates': list(bench.templates),
      },
  )
  score = best.metrics
  head = [
      f'MEMIT in {FLAGS.model}, layers found by causal_trace --suggest_layers.',
      '',
      '  python -m experiments.memit_batch --flagfile='
      f'{folder / "suggested.flags"} --data={found.source}',
      '',
      f'Measured on {len(found.records)} facts of {found.source}, one batch:'
      f' score {score["score"]:.3f},',
      f'ES {score["es"]:.3f}, PS {score["ps"]:.3f}, NS {score["ns"]:.3f}.',
  ]
  given = {
      'model': FLAGS.model,
      'revision': FLAGS.revision,
      'wheel': FLAGS.wheel,
      'dtype': FLAGS.dtype,
      'seed': FLAGS.seed,  # templates and moments are drawn with it
      'context_templates': FLAGS.context_templates,
  }
  for name in ('moment_weight', *methods.VALUE.values()):
    given[name] = FLAGS[name].value
  given |= {
      'moments': FLAGS.moments or folder / 'moments.safetensors',
      'on_bad_record': 'skip',
      'output_dir': 'runs/suggested',
  }
  text = suggest.flagfile(best, given, head)
  common.write_text(folder / 'suggested.flags', text)
