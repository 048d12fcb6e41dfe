"""What an editing program tells: notes, what the numbers mean, tables, files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import common, editing, judging, timing, workbench
from jaxedit import io
from jaxedit.eval import datasets, harness, report
from jaxedit.methods.base import Info

FLAGS = flags.FLAGS

_LISTED = 5  # skipped records that are told at once; results.json has all


def notes(loaded: datasets.Loaded) -> list[str]:
  """What a user should know of the records before the run."""
  found, lines = len(set(workbench.case_numbers(loaded.records))), []
  if loaded.skipped:
    lines.append(
        f'note: {loaded.source}: {len(loaded.skipped)} faulty records were'
        ' skipped, results.json lists them; the first are'
    )
    lines += [
        f'  record {one.number} (id {one.id}): {one.reason}'
        for one in loaded.skipped[:_LISTED]
    ]
  if FLAGS.num_edits and found < FLAGS.num_edits:
    lines.append(
        f'note: --num_edits={FLAGS.num_edits}: {loaded.source} holds {found}'
        ' good records; all of them are edited'
    )
  return lines


def protocol(
    bench: workbench.Workbench,
    recipe: Any,
    *,
    settings: dict[str, Any],
    source: dict[str, Any],
    scores: dict[str, Any],
) -> dict[str, Any]:
  """Says everything that a reader needs to know what the numbers mean.

  Args:
    bench: what was worked on.
    recipe: the method.
    settings: of the method.
    source: where its statistics are from.
    scores: how answers were judged.

  Returns:
    Entries of results.json and of the delta's metadata.
  """
  loaded = bench.loaded
  return {
      'model': FLAGS.model,
      'revision': FLAGS.revision,
      'model_hash': bench.model.hash,
      'dtype': FLAGS.dtype,
      'method': recipe.name,
      'settings': settings,
      **source,
      'data': {
          'source': str(loaded.source),
          'format': loaded.format,
          'sha256': loaded.sha256,
          'records': len(loaded.records),
      },
      'batch_size': bench.batch_size,
      'mode': 'independent' if bench.apart else 'sequential',
      'evaluated': 'all records after all edits, each under its own change'
      if bench.apart
      else 'all records after all edits',
      **scores,
      'intervals': '95% percentile bootstrap over records',
      'seed': FLAGS.seed,
  }


def summary_lines(
    bench: workbench.Workbench,
    pre: harness.Evaluation,
    post: harness.Evaluation,
    *,
    info: Info,
    show: Callable[..., str],
) -> list[str]:
  """What a program prints at the end.

  Args:
    bench: what was worked on.
    pre: the unedited model's evaluation.
    post: the edited one's.
    info: how the edits went.
    show: (records, before, after, how many) -> texts to print.

  Returns:
    Lines.
  """
  lines = ['']
  known = judging.knowledge(pre)
  if known:
    lines.append(
        f'The unedited model prefers the true answer on'
        f' {known["prefers_true"]:.0%} of the facts and completes it on'
        f' {known["completes_true"]:.0%}.'
    )
  lost = len(info.written) - int(info.written.sum())
  if lost:
    lines.append(
        f'{lost} edits were not written: their loss, keys or change were not'
        ' finite.'
    )
  lines += ['', report.table(pre, post), '']
  if FLAGS.max_new_tokens and FLAGS.show:
    lines.append(show(bench.records, pre, post, FLAGS.show))
  return lines


def write_results(
    folder: pathlib.Path,
    bench: workbench.Workbench,
    outcome: editing.Outcome,
    evaluations: dict[str, harness.Evaluation],
    *,
    results: dict[str, Any],
    clock: timing.Clock,
) -> None:
  """Writes records.jsonl and, last of all, results.json."""
  pre, post = evaluations['pre'], evaluations['post']
  io.write_jsonl(
      folder / 'records.jsonl',
      judging.record_rows(bench, outcome.info, pre, post),
  )
  io.write_json(
      folder / 'results.json',
      {
          **judging.metric_tables(evaluations),
          **results,
          'unedited': judging.knowledge(pre),
          'skipped': [vars(one) for one in bench.loaded.skipped],
          'versions': common.versions(),
          'timing': clock.seconds,
      },
  )
