"""What an editing run reports: notes, what the numbers mean, tables, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxedit import io
from jaxedit.eval import report
from jaxedit.eval.datasets import Loaded
from jaxedit.eval.evaluation import Evaluation
from jaxedit.methods.base import Info
from jaxedit.runs import side_effects
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.runs.edit_reports import EditReports
from jaxedit.runs.provenance import versions
from jaxedit.types import InputError

if TYPE_CHECKING:
  from jaxedit.runs.inputs import Session

# What --overwrite removes; the moments may be this run's own input.
_RESULTS = ('results.json', 'records.jsonl', 'delta.safetensors', 'deltas')
# What a run that is refused takes back.
WRITTEN = (*_RESULTS, 'model', 'templates.json', 'moments.safetensors')
_LISTED = 5  # skipped records that are told at once; results.json has all
# What is printed of a sequence along the way, where it was measured.
_ALONG = (
    'reliability', 'generalization', 'locality_agreement', 'es', 'ps', 'ns',
    'question/rouge_l_f1', 'paraphrase/rouge_l_f1',
)  # fmt: skip


def stale_results(config: RunConfig, resumed: bool) -> list[str]:
  """Lists what an earlier run left that this one replaces.

  Args:
    config: of the run.
    resumed: whether this run was interrupted here.

  Raises:
    InputError: --save_model would replace a folder that no run has written.
  """
  try:
    earlier = io.read_json(config.folder / 'results.json')
  except InputError:
    earlier = {}
  if 'saved' in earlier or (resumed and config.save_model):
    return [*_RESULTS, 'model']
  model = config.folder / 'model'
  if config.save_model and model.exists():
    raise InputError(
        f'{model}: exists, and no run in this folder has saved it; move it away'
        ' or choose another --output_dir'
    )
  return list(_RESULTS)


def notes(loaded: Loaded, wanted: int | None, found: int) -> list[str]:
  """Lists what a user should know of the requests before the run.

  Args:
    loaded: the requests.
    wanted: how many cases were asked for; None for all.
    found: how many there are.
  """
  lines = []
  if loaded.skipped:
    lines.append(
        f'note: {loaded.source}: {len(loaded.skipped)} bad records were skipped,'
        ' results.json lists them; the first are'
    )
    lines += [
        f'  record {one.number} (id {one.id}): {one.reason}'
        for one in loaded.skipped[:_LISTED]
    ]
  if loaded.unread:
    names = ', '.join(map(repr, loaded.unread[:_LISTED]))
    more = len(loaded.unread) - _LISTED
    lines.append(
        f'note: {loaded.source}: fields that are not read: {names}'
        + (f' and {more} more' if more > 0 else '')
    )
  if wanted and found < wanted:
    lines.append(
        f'note: --num_edits={wanted}: {loaded.source} holds {found} good records;'
        ' all of them are edited'
    )
  return lines


def protocol(session: Session, sources: Mapping[str, Any]) -> dict[str, Any]:
  """Says everything that a reader needs to know what the numbers mean.

  Args:
    session: what is worked on.
    sources: where the editor's statistics are from.

  Returns:
    Entries of results.json and of the delta's metadata.
  """
  config, loaded = session.config, session.loaded
  when = 'all records after all edits'
  return {
      'model': config.model,
      'revision': config.revision,
      'model_hash': session.model.hash,
      'dtype': config.dtype,
      'method': session.chosen.name,
      'settings': session.chosen.settings,
      **sources,
      'data': {
          'source': str(loaded.source),
          'format': loaded.format,
          'sha256': loaded.sha256,
          'records': len(loaded.requests),
          'unread_fields': list(loaded.unread),
      },
      'batch_size': config.batch_size,
      'mode': 'independent' if config.reset else 'sequential',
      'evaluated': when + (', each under its own edit' if config.reset else ''),
      **session.task.protocol(session.tokenizer, session.contexts),
      'intervals': '95% percentile bootstrap over records',
      'seed': config.seed,
  }


def work(session: Session, info: Info) -> dict[str, Any]:
  """What the optimiser ran and in what shapes, for results.json.

  Args:
    session: what is worked on.
    info: how the edits went.
  """
  if info.work is None:
    return {}
  names = ('slots', 'token_budget', 'length')
  found = {
      'shapes': [
          {name: getattr(shape, name) for name in names}
          for shape in session.plan.shapes
      ],
      'steps': info.work.steps,
      'tokens_run': info.work.computed,
      'tokens_needed': info.work.needed,
      'wasted': info.work.waste,
      'seconds': dict(info.work.seconds),
  }
  return found | ({'states_kept': info.work.kept} if info.work.kept else {})


def write(
    session: Session,
    became: EditReports,
    evaluations: Mapping[str, Evaluation],
    results: Mapping[str, Any],
    clock: Clock,
) -> None:
  """Writes records.jsonl and, last of all, results.json.

  Args:
    session: what was worked on.
    became: of the edits.
    evaluations: name ('pre', 'post', ...) -> evaluation.
    results: further entries.
    clock: the seconds by stage.
  """
  before, after = evaluations['pre'], evaluations['post']
  folder = session.config.folder
  io.write_jsonl(
      folder / 'records.jsonl', _records(session, became, before, after)
  )
  io.write_json(
      folder / 'results.json',
      {
          **tables(evaluations),
          **results,
          'unedited': knowledge(before),
          'skipped': [vars(one) for one in session.loaded.skipped],
          'versions': versions(),
          'timing': clock.seconds,
      },
  )


def _records(
    session: Session, became: EditReports, before: Evaluation, after: Evaluation
) -> list[dict[str, Any]]:
  """One JSON object a request: the edit, how it went, before and after."""
  info, known = became.info, ('number', 'id', 'case', 'superseded')
  drop = lambda entry: {k: v for k, v in entry.items() if k not in known}
  return [
      {
          'number': record.number,
          'id': record.id,
          **session.task.described(record),
          'written': bool(info.written[i]),
          **became.record(i),
          **{name: values[i] for name, values in info.per_edit.items()},
          'before': drop(before.per_record[i]),
          'after': drop(after.per_record[i]),
      }
      for i, record in enumerate(session.loaded.requests)
  ]


def tables(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
  """The results of evaluations by name, as plain numbers.

  Args:
    evaluations: name ('pre', 'post', ...) -> evaluation.

  Returns:
    'metrics' (name -> id -> fraction), 'intervals' (name -> id -> [low, high],
    95% bootstrap over records) and 'counts' (name -> id -> records).
  """
  found: dict[str, dict[str, Any]] = {
      'metrics': {},
      'intervals': {},
      'counts': {},
  }
  for name, evaluation in evaluations.items():
    items = evaluation.summary.items()
    found['metrics'][name] = {k: v['mean'] for k, v in items}
    found['intervals'][name] = {k: [v['low'], v['high']] for k, v in items}
    found['counts'][name] = {k: v['n'] for k, v in items}
  return found


def knowledge(evaluation: Evaluation) -> dict[str, float]:
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


def lines(
    session: Session,
    became: EditReports,
    results: Mapping[str, Any],
    evaluations: Mapping[str, Evaluation],
    clock: Clock,
) -> list[str]:
  """What a program prints at the end.

  Args:
    session: what was worked on.
    became: of the edits.
    results: of the run.
    evaluations: 'pre' and 'post'.
    clock: the seconds by stage.
  """
  before, after = evaluations['pre'], evaluations['post']
  info, found = became.info, ['']
  known = knowledge(before)
  if known:
    found.append(
        f'The unedited model prefers the true answer on'
        f' {known["prefers_true"]:.0%} of the facts and completes it on'
        f' {known["completes_true"]:.0%}.'
    )
  lost = len(info.written) - int(info.written.sum())
  if lost:
    found.append(
        f'{lost} edits were not written: their loss, keys or change were not'
        ' finite.'
    )
  found += became.lines(results)
  found += ['', report.table(before, after), '']
  if session.task.max_new_tokens and session.config.show:
    show = (
        report.generations if session.task.kind == 'fact' else report.excerpts
    )
    found.append(
        show(session.loaded.requests, before, after, session.config.show)
    )
  found += side_effects.lines(session.config, results)
  count = len(session.loaded.requests)
  if along := results.get('along'):
    found += ['', *_along(along, after, results)]
  found.append(
      f'\n{count} edits in {clock.seconds["total"]:.0f} s; results in'
      f' {session.config.folder}'
  )
  return found


def _along(
    along: Sequence[Mapping[str, Any]],
    after: Evaluation,
    results: Mapping[str, Any],
) -> list[str]:
  """A table of a sequence that was judged along the way.

  Args:
    along: as results.json has it.
    after: the evaluation after the last edit.
    results: of the run.
  """
  points = [(one['edits'], one['metrics']['post']) for one in along]
  last = {name: one['mean'] for name, one in after.summary.items()}
  points.append((len(after.per_record), last))
  read = [one['perplexity']['value'] for one in along if 'perplexity' in one]
  if read:
    read.append(results['perplexity']['post']['value'])
  names = [n for n in _ALONG if n in last]
  head = ['edits', *names, *['perplexity'][: len(read)]]
  rows = [
      [f'{edits}', *(f'{values[n]:.3f}' for n in names)]
      + ['-' if x is None else f'{x:.2f}' for x in read[i : i + 1]]
      for i, (edits, values) in enumerate(points)
  ]
  sizes = [max(map(len, column)) for column in zip(head, *rows)]
  line = lambda row: '  '.join(x.rjust(n) for x, n in zip(row, sizes))
  return ['after so many edits, of all so far:', *map(line, [head, *rows])]
