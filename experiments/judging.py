"""Judges edited models, and says in plain numbers what was found.

Nothing here reads a flag. Stages take a `types.Progress`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.editing import Outcome
from experiments.workbench import Workbench
from jaxedit import edited as edited_lib
from jaxedit import targets as targets_lib
from jaxedit.deltas import (
    Edited,
)
from jaxedit.eval import harness, perplexity
from jaxedit.methods.base import Info
from jaxedit.types import (
    InputError,
    Progress,
)

_PERPLEXITY_ROW = 512  # tokens a window
_PERPLEXITY_BATCH = 32  # windows of 512 tokens run eight together


def judge(
    bench: Workbench,
    outcome: Outcome | None,
    base: harness.Evaluation | None,
    *,
    evaluate: Callable[..., harness.Evaluation],
    seed: int,
    batch_size: int = 64,
) -> harness.Evaluation:
  """Evaluates the edited model, or the unedited one.

  Args:
    bench: what to work on.
    outcome: what editing gave; None for the unedited model.
    base: the unedited model's evaluation.
    evaluate: (lm, records, tokenizer, base=, seed=, edit_ids=) -> evaluation,
      such as `harness.evaluate` with its settings.
    seed: of the intervals.
    batch_size: sequences an evaluation batch.

  Returns:
    The evaluation of all records, each under the change it belongs to.
  """

  def call(edited: Edited, records: Sequence[Any], base: Any, **more: Any):
    return evaluate(
        edited_lib.open_model(bench.model, edited, batch_size=batch_size),
        records,
        bench.tokenizer,
        base=base,
        seed=seed,
        **more,
    )

  if outcome is None:
    return call(Edited(), bench.records, base)
  if outcome.owner is None:
    return call(outcome.edited, bench.records, base)
  if bench.each:
    return call(outcome.edited, bench.records, base, edit_ids=outcome.owner)
  # A change of many facts a row would not fit; one a batch is shared by its rows.
  parts = [
      call(
          edited_lib.select(outcome.edited, batch),
          [bench.records[i] for i in indices],
          harness.select(base, indices) if base else None,
      )
      for batch, indices in enumerate(bench.batches())
  ]
  return harness.join(parts, seed=seed)


def knowledge(
    evaluation: harness.Evaluation,
) -> dict[str, float]:
  """What the unedited model knows of the facts to be overwritten.

  Args:
    evaluation: of the unedited model.

  Returns:
    'prefers_true' and 'completes_true', fractions of the records with a true
    object; empty where there are none.
  """
  summary = evaluation.summary
  names = {'prefers_true': 'true_preferred', 'completes_true': 'true_acc'}
  return {
      name: summary[metric]['mean']
      for name, metric in names.items()
      if metric in summary
  }


def read_perplexity(
    bench: Workbench,
    path: str,
    tokens: int,
    progress: Progress,
    outcome: Outcome | None,
) -> dict[str, Any]:
  """Measures the perplexity of a text file.

  Args:
    bench: what to work on.
    path: plain text in UTF-8.
    tokens: how many are scored at most.
    progress: progress display.
    outcome: a change that all text is read under; None for no change.

  Returns:
    'value', 'nats' a token, 'tokens', 'protocol'.

  Raises:
    InputError: the file cannot be read, or holds nothing to score.
  """
  try:
    text = pathlib.Path(path).read_text('utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(
        f'{path}: cannot be read as UTF-8 text ({e}); name a plain text'
    ) from None
  edited = outcome.edited if outcome else Edited()
  found = perplexity.perplexity(
      edited_lib.open_model(bench.model, edited, batch_size=_PERPLEXITY_BATCH),
      [text],
      bench.tokenizer,
      row_tokens=min(_PERPLEXITY_ROW, bench.model.spec.max_positions),
      limit=tokens,
      progress=progress,
  )
  return found._asdict()


def work_report(bench: Workbench, work: targets_lib.Work) -> dict[str, Any]:
  """What the optimiser ran and in what shapes, for results.json."""
  shape = lambda batch_shape: {
      name: getattr(batch_shape, name) for name in ('slots', 'places', 'width')
  }
  return {
      'shapes': [shape(batch_shape) for batch_shape in bench.plan.shapes],
      'steps': work.steps,
      'places_run': work.computed,
      'tokens_needed': work.needed,
      'wasted': work.waste,
      'seconds': dict(work.seconds),
  }


def record_rows(
    bench: Workbench,
    info: Info,
    pre: harness.Evaluation,
    post: harness.Evaluation,
) -> list[dict[str, Any]]:
  """One JSON object a record: the edit, how it went, before and after."""
  finite = lambda x: float(x) if np.isfinite(x) else None
  drop = lambda entry: {
      k: v for k, v in entry.items() if k not in ('number', 'id', 'case')
  }
  rows = []
  for i, record in enumerate(bench.records):
    mine = np.flatnonzero(info.edit == i)
    rows.append(
        {
            'number': record.number,
            'id': record.id,
            **described(record),
            'written': bool(info.written[i]),
            'states': len(mine),
            # Of several states, the mean; the distance is the largest.
            'loss': finite(info.targets.loss[mine].mean()),
            'likelihood': finite(info.targets.likelihood[mine].mean()),
            'steps': int(info.targets.steps[mine].sum()),
            'distance': [finite(x) for x in info.distance[:, mine].max(axis=1)],
            'before': drop(pre.per_record[i]),
            'after': drop(post.per_record[i]),
        }
    )
  return rows


def described(record: Any) -> dict[str, Any]:
  """What a record asks to be written."""
  names = ('prompt', 'subject', 'target_new', 'target_true')
  names += ('question', 'answer', 'category', 'case')
  fact = hasattr(record, 'target_new')
  names = names[:4] if fact else names[4:]
  return {name: getattr(record, name) for name in names}


def metric_tables(
    evaluations: Mapping[str, harness.Evaluation],
) -> dict[str, dict[str, Any]]:
  """The results of evaluations by name, as plain numbers.

  Args:
    evaluations: name ('pre', 'post', ...) -> evaluation.

  Returns:
    'metrics' (name -> id -> fraction), 'intervals' (name -> id -> [low, high],
    95% bootstrap over records) and 'counts' (name -> id -> records).
  """
  tables: dict[str, dict[str, Any]] = {
      'metrics': {},
      'intervals': {},
      'counts': {},
  }
  for name, evaluation in evaluations.items():
    items = evaluation.summary.items()
    tables['metrics'][name] = {k: v['mean'] for k, v in items}
    tables['intervals'][name] = {k: [v['low'], v['high']] for k, v in items}
    tables['counts'][name] = {k: v['n'] for k, v in items}
  return tables
