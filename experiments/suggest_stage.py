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

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import (
    common,
    judging,
    methods,
    resources,
    suggest,
    suggest_inputs,
    timing,
    trace_plots,
    trace_results,
    workbench,
)
from experiments.kept import Kept
from jaxedit import io
from jaxedit.eval import datasets, harness
from jaxedit.models import loading
from jaxedit.trace import effects

FLAGS = flags.FLAGS

FILES = ('suggested.flags', 'suggest.json')
_LISTED = 8  # tries that are told; suggest.json has all
_LAST_SUBJECT = effects.CLASSES.index('last subject token')


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


def run(
    model: loading.Model,
    words: Any,
    records: datasets.Loaded,
    averages: Mapping[str, effects.Average],
    *,
    traced: Mapping[str, Any],
    proposal: suggest_inputs.Proposal | None,
    folder: pathlib.Path,
    pieces: Kept,
    clock: timing.Clock,
    formats: Sequence[str],
) -> Suggested:
  """Searches, and writes what was found.

  Args:
    model: the unedited model.
    words: its tokenizer.
    records: of `suggest_inputs.read_records`.
    averages: kind -> effects of the traces.
    traced: which facts those are of, as `suggest_inputs.facts_of` gives it.
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
    top = suggest_inputs.bounded(suggest.last_read(subject['hidden']))
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
      'facts': suggest_inputs.facts_of(records, records.records),
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


def _judge(
    proposal: suggest_inputs.Proposal, tries: Sequence[suggest.Tried]
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
  recipe = suggest_inputs.recipe_of(range(top + 1))
  contexts = suggest_inputs.given_contexts() or resources.sample_templates(
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
  value = suggest_inputs.recipe_of(best.layers).value
  io.write_json(
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
      'activations': FLAGS.activations,
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
  io.write_text(folder / 'suggested.flags', text)
