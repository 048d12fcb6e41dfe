"""The stages of an editing run, as functions that programs compose.

  prepare -> edit (sequential batches, or independent ones) -> judge -> write

Nothing here reads a flag. Stages take a `types.Progress`; programs time
them with `Clock`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import delta as delta_lib
from jaxedit import values
from jaxedit.edit.base import Editor, Info
from jaxedit.eval import datasets, generation, harness, perplexity
from jaxedit.models import loading, saving
from jaxedit.models.spec import ModelSpec
from jaxedit.solve import shaping
from jaxedit.text import batching, seating, templates
from jaxedit.types import Dense, Edited, InputError, LowRank, Progress, Record

# Tokens that a sampled context and its full stop may add to a prompt.
_CONTEXT_TOKENS = 16
_PERPLEXITY_ROW = 512  # tokens a window


class Clock:
  """Adds up wall seconds by stage; it starts when it is made."""

  def __init__(self):
    self._begin = time.monotonic()
    self.seconds: dict[str, float] = {}

  def stop(self) -> None:
    """Writes down the 'total'."""
    self.seconds['total'] = time.monotonic() - self._begin

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    begin = time.monotonic()
    try:
      yield
    finally:
      self.add({stage: time.monotonic() - begin})

  def add(self, seconds: Mapping[str, float]) -> None:
    """Adds seconds measured elsewhere."""
    for stage, value in seconds.items():
      self.seconds[stage] = self.seconds.get(stage, 0.0) + value


@dataclasses.dataclass(frozen=True)
class Workbench:
  """What every stage works on.

  Attributes:
    model: the unedited model; never changed.
    tokenizer: its tokenizer.
    loaded: the records to edit, facts or passages.
    batch_size: cases a batch.
    apart: batches know nothing of each other.
    slots: edits optimised side by side; None for as many as are of use and
      have room in memory.
    templates: context templates, the bare '{}' first; of facts.
    encoded: the records as ids, once they are.
    frame: the static shapes that all batches share, once `shape` has run.
  """

  model: loading.Model
  tokenizer: Any
  loaded: datasets.Loaded
  batch_size: int
  apart: bool = False
  slots: int | None = None
  templates: tuple[str, ...] = ()
  encoded: tuple[batching.EncodedEdit, ...] = ()
  frame: seating.Frame | None = None

  @property
  def records(self) -> Sequence[Any]:
    return self.loaded.records

  @functools.cached_property
  def cases(self) -> tuple[int, ...]:
    """Number of the case of every record."""
    return case_numbers(self.records)

  @property
  def each(self) -> bool:
    """Whether every case is edited alone, all of them side by side."""
    return self.apart and self.batch_size == 1

  def batches(self) -> list[list[int]]:
    """Indices of the records of every batch; cases are never cut."""
    found: dict[int, list[int]] = {}
    for i, case in enumerate(self.cases):
      found.setdefault(case // self.batch_size, []).append(i)
    return list(found.values())

  def edits(self, indices: Sequence[int]) -> list[batching.EncodedEdit]:
    """Some records, encoded."""
    return [self.encoded[i] for i in indices]

  def parts(self, side: int | None) -> list[list[int]]:
    """Indices of the records whose changes are held at one time.

    Args:
      side: batches at a time, where they know nothing of each other; None for
        all.
    """
    if side is None or not self.apart:
      return [list(range(len(self.records)))]
    batches = self.batches()
    return [
        list(itertools.chain(*batches[first : first + side]))
        for first in range(0, len(batches), side)
    ]

  def part(self, indices: Sequence[int]) -> Workbench:
    """The same bench with some of the records."""
    loaded = dataclasses.replace(
        self.loaded, records=[self.records[i] for i in indices]
    )
    encoded = tuple(self.edits(indices))
    return dataclasses.replace(self, loaded=loaded, encoded=encoded)


def case_numbers(records: Sequence[Any]) -> tuple[int, ...]:
  """Numbers the cases of records; a fact is a case of its own."""
  numbers: dict[Any, int] = {}
  keys = (getattr(record, 'case', '') or i for i, record in enumerate(records))
  return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def shape(bench: Workbench, side: int | None) -> Workbench:
  """Adds the shapes that serve the encoded records.

  Args:
    bench: what to work on.
    side: batches whose changes are held side by side; None for all.

  Returns:
    The bench, complete.
  """
  batch = max(map(len, bench.batches()))
  if bench.each:
    batch = max(map(len, bench.parts(side)))
  frame = values.frame_for(
      bench.model.spec,
      bench.model.params,
      bench.encoded,
      slots=bench.slots,
      batch=batch,
  )
  return dataclasses.replace(bench, frame=frame)


def encode_facts(
    bench: Workbench, contexts: Sequence[str], anchor: str
) -> Workbench:
  """Adds context templates and the facts as ids under them.

  Args:
    bench: what to work on.
    contexts: the templates, the bare '{}' first.
    anchor: the edited token, as the method has it.

  Returns:
    The bench with both.

  Raises:
    InputError: records that are too long under them, all at once.
  """
  encoded = batching.encode_edits(
      bench.tokenizer,
      bench.records,
      contexts,
      max_tokens=bench.model.spec.max_positions,
      anchor=anchor,
  )
  return dataclasses.replace(
      bench, templates=tuple(contexts), encoded=tuple(encoded)
  )


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What editing gave.

  Attributes:
    edited: the change; of independent batches with a batch axis, [n, batches,
      ...].
    owner: batch of every record, for independent batches, else None.
    info: of all records together.
  """

  edited: Edited
  owner: tuple[int, ...] | None
  info: Info


def record_check(
    tokenizer: Any,
    spec: ModelSpec,
    *,
    contexts: Sequence[str],
    max_new_tokens: int,
    anchor: str = 'subject_last',
) -> Callable[[Record], list[str]]:
  """Makes the check of a loader: all that editing or judging would refuse.

  Args:
    tokenizer: of the model.
    spec: the architecture.
    contexts: context templates; empty if they are sampled later, for which
      some room is left.
    max_new_tokens: length of generated texts, tokens.
    anchor: the edited token.

  Returns:
    record -> sentences that do not name the record.
  """
  edit = batching.edit_check(
      tokenizer,
      contexts or (templates.BARE,),
      max_tokens=spec.max_positions - (0 if contexts else _CONTEXT_TOKENS),
      anchor=anchor,
  )
  evaluation = harness.record_check(
      spec, tokenizer, max_new_tokens=max_new_tokens
  )
  # What both find is told once, by the one that says more.
  return lambda record: edit(record) or evaluation(record)


def edit_in_sequence(
    bench: Workbench, editor: Editor, state: Any, progress: Progress
) -> Outcome:
  """Edits batch after batch, each on the model that the last one left.

  Args:
    bench: what to work on.
    editor: the method.
    state: what its `init` returned.
    progress: progress display.

  Returns:
    The sum of all changes.
  """
  params, total, infos = bench.model.params, Edited(), []
  batches = bench.batches()
  for i, indices in enumerate(batches):
    edited, state, info = editor.edit(
        params,
        state,
        bench.edits(indices),
        frame=bench.frame,
        progress=progress,
    )
    total = delta_lib.add(total, edited)
    infos.append(info)
    if i + 1 < len(batches):
      # From the base each time: bf16 weights are rounded once in all.
      params = delta_lib.apply(bench.model.params, total)
  total = Edited(deltas=tuple(delta_lib.compact(d) for d in total.deltas))
  return Outcome(total, None, _join(infos))


def edit_apart(
    bench: Workbench, editor: Editor, state: Any, progress: Progress
) -> Outcome:
  """Edits batches that know nothing of each other.

  Args:
    bench: what to work on.
    editor: the method.
    state: what its `init` returned; every batch starts from it.
    progress: progress display.

  Returns:
    The changes side by side, one a batch.
  """
  if bench.each:
    edited, _, info = editor.edit_each(
        bench.model.params,
        state,
        bench.encoded,
        owner=bench.cases,
        frame=bench.frame,
        progress=progress,
    )
    return Outcome(edited, bench.cases, info)
  edits, infos = [], []
  for indices in bench.batches():
    edited, _, info = editor.edit(
        bench.model.params,
        state,
        bench.edits(indices),
        frame=bench.frame,
        progress=progress,
    )
    edits.append(edited)
    infos.append(info)
  owner = tuple(b for b, some in enumerate(bench.batches()) for _ in some)
  return Outcome(delta_lib.stack(_even(edits)), owner, _join(infos))


def _even(edits: Sequence[Edited]) -> list[Edited]:
  """Fills factors with zero rows, so that batches of any size stack."""
  ranks = [d.key.shape[1] for e in edits for d in e.deltas if _low_rank(d)]
  grow = lambda x: jnp.pad(x, ((0, 0), (0, max(ranks) - x.shape[1]), (0, 0)))
  pad = lambda d: jax.tree.map(grow, d) if _low_rank(d) else d
  return [Edited(deltas=tuple(map(pad, edited.deltas))) for edited in edits]


def _low_rank(delta: Any) -> bool:
  return isinstance(delta, LowRank)


def _join(infos: Sequence[Info]) -> Info:
  """Puts the reports of batches end to end."""
  seconds: dict[str, float] = {}
  for info in infos:
    for stage, value in info.seconds.items():
      seconds[stage] = seconds.get(stage, 0.0) + value
  before = np.cumsum([0] + [len(info.written) for info in infos])
  return Info(
      jax.tree.map(lambda *x: np.concatenate(x), *(i.targets for i in infos)),
      np.concatenate([i.edit + n for i, n in zip(infos, before)]),
      np.concatenate([i.written for i in infos]),
      np.concatenate([i.distance for i in infos], axis=1),
      seconds,
      functools.reduce(operator.add, (i.work for i in infos)),
  )


def join_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
  """Puts the reports of parts end to end; their changes are on disk."""
  return Outcome(Edited(), None, _join([one.info for one in outcomes]))


def prune(bench: Workbench, outcome: Outcome) -> Outcome:
  """Lowers the singular values of a sequence's change (PRUNE).

  Args:
    bench: what to work on.
    outcome: a change that all records share.

  Returns:
    The same with one matrix a layer.
  """
  pruned = []
  for delta in outcome.edited.deltas:
    kernel = bench.model.params['layers']
    for name in (*delta.site.split('/'), 'kernel'):
      kernel = kernel[name]
    changes = [
        shaping.prune(change, kernel[layer])
        for change, layer in zip(delta_lib.kernel(delta), delta.layers)
    ]
    pruned.append(Dense(delta.layers, delta.site, jnp.stack(changes)))
  return dataclasses.replace(outcome, edited=Edited(deltas=tuple(pruned)))


def replace_model(bench: Workbench, model: loading.Model) -> Workbench:
  """The same records and tokenizer on another model."""
  return dataclasses.replace(bench, model=model)


def judge(
    bench: Workbench,
    outcome: Outcome | None,
    base: harness.Evaluation | None,
    *,
    evaluate: Callable[..., harness.Evaluation],
    seed: int,
) -> harness.Evaluation:
  """Evaluates the edited model, or the unedited one.

  Args:
    bench: what to work on.
    outcome: what editing gave; None for the unedited model.
    base: the unedited model's evaluation.
    evaluate: (spec, params, edited, records, tokenizer, base=, seed=, stack=,
      owner=) -> evaluation, such as `harness.evaluate` with its settings.
    seed: of the intervals.

  Returns:
    The evaluation of all records, each under the change it belongs to.
  """

  def call(edited: Edited, records: Sequence[Any], base: Any, **more: Any):
    model, words = bench.model, bench.tokenizer
    return evaluate(
        model.spec, model.params, edited, records, words, base=base, seed=seed,
        **more,
    )  # fmt: skip

  if outcome is None:
    return call(Edited(), bench.records, base)
  if outcome.owner is None:
    return call(outcome.edited, bench.records, base)
  if bench.each:
    stack = dict(stack=outcome.edited, owner=outcome.owner)
    return call(Edited(), bench.records, base, **stack)
  # A change of many facts a row would not fit; one a batch is shared by its rows.
  parts = [
      call(
          delta_lib.one(outcome.edited, batch),
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


def save_folder(
    bench: Workbench,
    outcome: Outcome,
    folder: pathlib.Path,
    *,
    keep_float32: bool,
    keep_original: bool,
) -> saving.SaveReport:
  """Merges the change and writes a Hugging Face folder.

  Args:
    bench: what to work on.
    outcome: a change that all records share.
    folder: the folder to write.
    keep_float32: write edited matrices in float32, not the source's dtype.
    keep_original: keep the replaced matrices beside, for an exact restore.

  Returns:
    The rounding that merging cost.
  """
  model = bench.model
  merged = delta_lib.apply(model.params, outcome.edited, dtype=jnp.float32)
  changed = [
      (f'layers/{delta.site}/{getattr(delta, "leaf", "kernel")}', layer)
      for delta in outcome.edited.deltas
      for layer in delta.layers
  ]
  return saving.save_model(
      model.folder,
      folder,
      model.spec,
      merged,
      changed=changed,
      dtype='float32' if keep_float32 else None,
      keep_original=keep_original,
  )


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
  found = perplexity.perplexity(
      bench.model.spec,
      bench.model.params,
      outcome.edited if outcome else Edited(),
      [text],
      bench.tokenizer,
      row_tokens=min(_PERPLEXITY_ROW, bench.model.spec.max_positions),
      limit=tokens,
      progress=progress,
  )
  return found._asdict()


def work_report(bench: Workbench, work: values.Work) -> dict[str, Any]:
  """What the optimiser ran and in what shapes, for results.json."""
  shape = lambda room: {
      name: getattr(room, name) for name in ('slots', 'places', 'width')
  }
  return {
      'rooms': [shape(room) for room in bench.frame.rooms],
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
      k: v for k, v in entry.items() if k not in ('number', 'id')
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


def require_some(info: Info) -> None:
  """Refuses a run in which no edit could be written.

  Raises:
    InputError: no loss stayed finite.
  """
  if len(info.written) and not info.written.any():
    raise InputError(
        'no edit was written: every loss stopped being finite; lower'
        ' --value_rate or load the model with --dtype=float32'
    )


def stop_tokens(bench: Workbench) -> tuple[int, ...]:
  """Tokens that end a free generation, found once a run."""
  return generation.stop_ids(bench.tokenizer, bench.model.spec.vocab)


def write_delta(
    path: pathlib.Path, outcome: Outcome, metadata: Mapping[str, Any]
) -> None:
  """Writes the change with what it was made for."""
  independent = outcome.owner is not None
  with contextlib.suppress(OSError):  # the next line tells what is wrong
    path.parent.mkdir(exist_ok=True)
  delta_lib.save(path, outcome.edited, {**metadata, 'independent': independent})
