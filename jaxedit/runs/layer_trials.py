"""The search for layers as a stage of a tracing run.

See `layer_search` for how layers are searched. Written to the output folder:

  suggested.flags  settings for memit_batch
  suggest.json     all trials, the best first, and what they were measured on
  plots/suggest.*  scores and effects by layer
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxedit import edited as edited_lib
from jaxedit import io
from jaxedit.deltas import UNEDITED
from jaxedit.eval.evaluation import Evaluation, evaluate
from jaxedit.methods.base import EditBatch, Run
from jaxedit.methods.closed_form import State
from jaxedit.methods.settings import settings_of
from jaxedit.runs import (
    layer_inputs,
    layer_search,
    layer_search_report,
    moments,
)
from jaxedit.runs.answers import Answers
from jaxedit.runs.cache import TargetFiles, target_settings
from jaxedit.runs.layer_inputs import Proposal, Search
from jaxedit.runs.layer_search import Trial
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.targets.budget import plan_batches
from jaxedit.trace import effects, plots, results

FILES = ('suggested.flags', 'suggest.json')
# Every anchor has programs of its own; those of two dozen have run into the number
# of memory maps that Linux allows a process.
_ANCHORS = 8


def run(
    search: Search,
    averages: Mapping[str, effects.Average],
    traced: Mapping[str, Any],
    output: Output,
) -> layer_search_report.Suggested:
  """Searches, and writes what was found.

  Args:
    search: what to work on.
    averages: restoration -> effects of the traces.
    traced: which facts those are of, see `layer_inputs.facts_of`.
    output: where to write, and to keep targets until the run ends.

  Returns:
    What was found.

  Raises:
    InputError: moments cannot be used, or the traces show nothing.
  """
  settings, proposal, folder = search.settings, search.proposal, output.folder
  subject = {
      name: average.mean[results.LAST_SUBJECT]
      for name, average in averages.items()
      if not name.startswith('severed')
  }
  anchors, top = _anchors(search, subject)
  last = max(top, *proposal.layers) if proposal else top
  with search.clock('probe_prepare'):
    contexts = search.task.contexts(search.model, search.tokens)
    probe = prober(search, contexts, last, output)
  with search.clock('probe'):
    trials = layer_search.search(
        probe, anchors, top=top,
        widths=sorted(set(map(int, settings.probe_widths))),
        progress=search.progress,
    )  # fmt: skip
    judged = None
    if proposal:
      if all(one.layers != proposal.layers for one in trials):
        trials = layer_search.ranked([*trials, probe(proposal.layers)])
      judged = _judge(proposal, trials, search.config.seed)
  numbers = [request.number for request in search.loaded.requests]
  io.write_json(
      folder / 'suggest.json',
      {
          **layer_search_report.document(trials, subject),
          'facts': layer_inputs.facts_of(search.loaded, numbers),
          'traced': dict(traced),
          'last_anchor': top,
          'proposal': judged,
          'model_hash': search.model.hash,
          'moment_weight': search.chosen.config.moment_weight,
          'value': search.chosen.config.target._asdict(),
          'templates': list(contexts),
      },
  )
  text = layer_search_report.flagfile(
      trials[0], _flags(search, output), _comment(search, trials[0], output)
  )
  io.write_text(folder / 'suggested.flags', text)
  plot = None
  if settings.plots:
    drawn = layer_search_report.figure(trials, subject)
    plot = plots.save(drawn, folder / 'plots', 'suggest', settings.formats)
  return layer_search_report.Suggested(trials, judged, len(numbers), plot)


def _anchors(
    search: Search, subject: Mapping[str, np.ndarray]
) -> tuple[list[int], int]:
  """(anchors to try first, the last one allowed)."""
  if search.settings.probe == 'all':
    return list(range(search.model.spec.layers)), search.model.spec.layers - 1
  top = layer_search.last_read(subject['hidden'])
  if search.config.moments:
    top = layer_inputs.bounded(search.config.moments, search.chosen, top)
  anchors = layer_search.first_anchors(subject['hidden'], subject.get('mlp'))
  return sorted({min(anchor, top) for anchor in anchors}), top


def prober(
    search: Search, contexts: Sequence[str], last: int, output: Output
) -> Callable[[tuple[int, ...]], Trial]:
  """Makes what tries layers; every trial starts from the same model.

  Args:
    search: what to work on.
    contexts: context templates.
    last: last layer that may be tried.
    output: collected moments appear here; targets are kept until the run ends.

  Returns:
    Edits all facts at once in some layers and evaluates them.
  """
  model, task, requests = search.model, search.task, search.loaded.requests
  encoded = task.encode(model.spec, search.tokens, requests, contexts)
  batch = EditBatch(encoded, plan_batches(model, encoded))
  scorers = task.scorers(search.tokens, model.spec, model)
  about = {'model': model.hash, 'versions': versions()}
  answers = Answers(output.unfinished / 'answers', about)

  def judge(edited: Any, before: Evaluation | None = None) -> Evaluation:
    size = search.config.eval_batch_size
    lm = edited_lib.open_model(model, edited, batch_size=size)
    return evaluate(
        answers.open(lm, edited, size),
        requests,
        scorers,
        before=before,
        seed=search.config.seed,
        progress=search.progress,
    )

  base = judge(UNEDITED)
  found = moments.find(
      search.config,
      model,
      search.tokens.tokenizer,
      layer_inputs.need_of(search.chosen, range(last + 1)),
      progress=search.progress,
  )
  anchors: set[int] = set()  # those with programs in memory

  def editor(layers: Sequence[int]) -> Any:
    mine = layer_inputs.at(search.chosen, layers)
    return mine, mine.method.make(model.spec, mine.config)

  @functools.cache
  def preconditioner(layer: int) -> Any:
    _, one = editor((layer,))
    state = one.init(model, {need: found for need in one.needs})
    return state.preconditioners[0]

  def probe(layers: tuple[int, ...]) -> Trial:
    anchors.add(layers[-1])
    if len(anchors) > _ANCHORS:
      jax.clear_caches()
      anchors.intersection_update(layers[-1:])
    mine, one = editor(layers)
    about = target_settings(model, mine.config) | {'versions': versions()}
    cache = TargetFiles(output.unfinished / 'targets', about, exact=True)
    state = State(tuple(map(preconditioner, layers)))
    edited, _, info = one.edit(model, state, batch, Run(cache, search.progress))
    edited = one.finish(model, edited)
    rows = tuple(row['metrics'] for row in judge(edited, base).per_record)
    return Trial(layers, rows, float(np.nanmean(info.targets.distance[-1])))

  return probe


def _judge(
    proposal: Proposal, trials: Sequence[Trial], seed: int
) -> dict[str, Any]:
  """Compares what was proposed with the best that was tried."""
  (mine,) = (one for one in trials if one.layers == proposal.layers)
  return {
      'source': proposal.path,
      'layers': list(mine.layers),
      **mine.metrics,
      **layer_search.compare(mine, trials[0], seed=seed),
      'searched_on': dict(proposal.facts),
  }


def _comment(search: Search, best: Trial, output: Output) -> list[str]:
  """The head of suggested.flags."""
  score, source = best.metrics, search.loaded.source
  return [
      f'MEMIT in {search.config.model}, layers found by causal_trace'
      ' --suggest_layers.',
      '',
      '  python -m experiments.memit_batch --flagfile='
      f'{output.folder / "suggested.flags"} --data={source}',
      '',
      f'Measured on {len(search.loaded.requests)} facts of {source}, one batch:'
      f' score {score["score"]:.3f},',
      f'ES {score["es"]:.3f}, PS {score["ps"]:.3f}, NS {score["ns"]:.3f}.',
  ]


def _flags(search: Search, output: Output) -> dict[str, Any]:
  """Settings that make memit_batch repeat a trial."""
  config = search.config
  # Templates and moments are drawn with the seed.
  names = ('model', 'revision', 'wheel', 'dtype', 'seed', 'context_templates')
  found = {name: getattr(config, name) for name in names}
  for setting in settings_of(search.chosen.method.config).values():
    value: Any = search.chosen.config
    for part in setting.path:
      value = getattr(value, part)
    if setting.name != 'layers' and value != setting.default:
      found[setting.name] = value
  return found | {
      'moments': config.moments or output.folder / 'moments.safetensors',
      'on_bad_record': 'skip',
      'output_dir': 'runs/suggested',
  }
