"""Causal traces and the reach of states as they would be, without weights.

See `dry_run`, which plans the other programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxedit.edited.scoring import Query
from jaxedit.eval import datasets
from jaxedit.models import loading
from jaxedit.models.loading import Model
from jaxedit.planning import costs, stages
from jaxedit.planning.stages import Stage
from jaxedit.runs import cli, dry_run, tasks
from jaxedit.runs import tracing as runs_tracing
from jaxedit.runs.config import RunConfig
from jaxedit.runs.trace_config import TraceRunConfig
from jaxedit.text import chat as chat_lib
from jaxedit.text import passages
from jaxedit.text.chunking import Chunking
from jaxedit.trace import causal, facts
from jaxedit.trace import flops as trace_flops
from jaxedit.trace.restoration import restoration


def tracing(config: RunConfig, settings: TraceRunConfig) -> list[str]:
  """Plans a causal trace; as `editing`.

  The search for layers, whose trials depend on what the traces find, is not
  counted.

  Args:
    config: model, dtype and cache.
    settings: what to trace.
  """
  cli.use_compilation_cache(config.compilation_cache)
  opened = dry_run.open_abstract(config)
  model, spec, tokenizer = (
      opened.model,
      opened.model.spec,
      opened.tokens.tokenizer,
  )
  loading.require_decoder(spec, 'causal tracing')
  check = facts.checker(tokenizer, spec.max_positions)
  loaded = runs_tracing.open_facts(config, settings)(check)
  encoded = facts.encode(tokenizer, loaded.requests)[: settings.num_facts]
  notes = list(opened.notes)
  if settings.suggest_layers:
    notes.append('the search for layers is not counted')
  prompts = stages.score(
      model,
      [Query(tuple(map(int, one.ids)), ((0,),)) for one in encoded],
      batch_size=64,
  )
  found = [
      stages.load(model, opened.tensor_bytes),
      dataclasses.replace(prompts, name='complete'),
      _traced(model, settings, encoded),
  ]
  return dry_run.report(
      config, model, found, notes,
      slots=None, head=f'traces of {len(encoded)} facts',
  )  # fmt: skip


def _traced(
    model: Model, settings: TraceRunConfig, encoded: Sequence[Any]
) -> Stage:
  """The stage of all grids."""
  spec, draws = model.spec, settings.draws
  counted = trace_flops.count(spec, settings, encoded)
  columns, tables = causal.budgets(model.placement.platform)
  longest = max(len(one.ids) for one in encoded)
  one = causal.table_bytes(
      spec, model.params, longest, draws, settings.restorations
  )
  group = max(1, min(len(encoded), tables // one)) * one
  row = 4 * (2 * spec.mlp_width + 6 * spec.width) + 4 * spec.vocab // longest
  runs = counted['flops'] / (
      2 * columns * costs.layer_weights(spec) * spec.layers
  )
  read = costs.model_bytes(spec, spec.layers, stages.itemsize(model), head=True)
  return Stage(
      'trace',
      f"{counted['cells']:,} cells, {draws} draws, {columns} columns at a time",
      flops={stages.products(model): counted['flops']},
      moved=runs * read,
      device=2 * group + columns * row,
  )


def reaching(
    config: RunConfig,
    chunking: Chunking,
    *,
    stride: int,
    pushes: int,
    draws: int,
) -> list[str]:
  """Plans how far states reach into long answers; as `editing`.

  Args:
    config: model, dtype, data and cache.
    chunking: how answers are cut.
    stride: states of every n-th layer are pushed.
    pushes: of a layer.
    draws: corrupted copies of a question.
  """
  cli.use_compilation_cache(config.compilation_cache)
  opened = dry_run.open_abstract(config)
  model, spec, tokens = opened.model, opened.model.spec, opened.tokens
  loading.require_decoder(spec, 'causal tracing')
  chat = tasks.chat_of(
      config, tokens.tokenizer, chat_lib.TEMPLATE, config.answer_end
  )
  encoder = passages.passage_encoder(
      tokens, chat=chat, max_tokens=spec.max_positions, chunking=chunking
  )
  loaded = datasets.load_requests(
      config.data, kinds=(datasets.TEXT,), limit=config.num_edits,
      on_bad_record=config.on_bad_record, check=encoder.check,
  )  # fmt: skip
  edits = encoder.encode(loaded.requests)
  above = lambda layers: sum(spec.layers - 1 - layer for layer in layers)
  pushed, every = above(range(0, spec.layers - 1, stride)), above(
      range(spec.layers)
  )
  runs = {'reach': np.zeros(2), 'locating': np.zeros(2)}
  for edit in edits:
    whole, target = len(edit.text(0)), len(edit.target)
    # Tokens times layers, and scored tokens.
    count = (1 + pushes) * whole * spec.layers + pushes * target * pushed
    runs['reach'] += [count, target * (1 + pushes * pushed / spec.layers)]
    for k in range(edit.stages):
      one = edit.stage(k, 0)
      count = (1 + draws) * one.end * spec.layers
      count += draws * (one.end - one.anchor) * every
      runs['locating'] += [count, len(one.labels) * draws * spec.layers]
  longest = max(len(edit.text(0)) for edit in edits)
  found = [stages.load(model, opened.tensor_bytes)]
  for name, times in (('reach', pushes), ('locating', draws)):
    layers, scored = runs[name]
    flops = costs.score_flops(spec, layers / spec.layers, scored)
    one = causal.table_bytes(
        spec, model.params, longest, times, (restoration('hidden'),)
    )
    found.append(
        Stage(
            name,
            f'{len(edits)} passages to {longest} tokens, {times} draws',
            flops={stages.products(model): flops},
            device=2.0 * one + 4.0 * longest * times * spec.mlp_width,
        )
    )
  return dry_run.report(
      config, model, found, opened.notes,
      slots=None, head=f'reach into {len(edits)} passages',
  )  # fmt: skip
