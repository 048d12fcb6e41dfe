"""What a run works on: model, requests as ids, and what the editor needs.

Errors that need no weights are raised before weights are read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxedit.batching.plan import BatchPlan
from jaxedit.convert import hub
from jaxedit.eval import protocols
from jaxedit.eval.datasets import Loaded
from jaxedit.eval.protocols import case_numbers
from jaxedit.methods import anyedit, base
from jaxedit.methods.base import EditBatch, Editor, Need
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.loading import Model
from jaxedit.runs import moments, needs, report
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.runs.tasks import TASKS, Task
from jaxedit.targets.budget import plan_batches
from jaxedit.text.encoding import EncodedEdit
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import InputError, Progress, silent

# Memory for the deltas of independent batches that are held at one time.
_SIDE_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Session:
  """Everything that is loaded and encoded; nothing is refused any more.

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

  def part(self, indices: Sequence[int]) -> Session:
    """The same session with some of the requests."""
    requests = [self.loaded.requests[i] for i in indices]
    return dataclasses.replace(
        self,
        loaded=dataclasses.replace(self.loaded, requests=requests),
        encoded=tuple(self.encoded[i] for i in indices),
    )


def batches_of(cases: Sequence[int], size: int) -> list[list[int]]:
  """Lists the requests of every batch; cases are never cut.

  Args:
    cases: number of the case of every request.
    size: cases a batch.

  Returns:
    Indices of the requests of each batch.
  """
  return [list(step.batch) for step in protocols.batches(size).steps(cases)]


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
    editor = chosen.method.make(layout.spec, chosen.config)
    tokens = TokenCache(tokenizer_lib.load_tokenizer(folder))
    for need in editor.needs:
      needs.check(config, need, layout.spec)
    if config.perplexity_text:
      loading.require_decoder(layout.spec, '--perplexity_text')
    loaded = task.load(tokens, layout.spec, progress)
    for need in editor.needs:
      need.admit(loaded.requests)
    cases = case_numbers(loaded.requests)
    batches = batches_of(cases, config.batch_size)
    largest = max(map(len, batches))
    _check_states(config, chosen, len(batches))
    _check_groups(config, editor, largest)
    model = loading.load_model(folder, config.dtype, progress, mesh=config.mesh)
  for line in report.notes(loaded, config.num_edits, max(cases) + 1):
    print(line, file=sys.stderr)
  begin()
  resources = _given(config, editor, model, clock)
  with clock('templates'):
    contexts = task.contexts(model, tokens)
    # Requests that are too long under the templates are refused before more runs.
    encoded = task.encode(model.spec, tokens, loaded.requests, contexts)
    chunks = chosen.config.chunks
    encoded = anyedit.cut(model.spec, model.params, encoded, chunks)
  alone = config.reset and config.batch_size == 1
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


def _given(
    config: RunConfig, editor: Editor, model: Model, clock: Clock
) -> dict[Need, Any]:
  """Given moments, which are checked before anything more runs."""
  found = {}
  for need in editor.needs:
    if isinstance(need, base.Moments) and config.moments:
      with clock('moments'):
        found[need] = moments.load(model, need, config.moments)
  return found


def _check_states(config: RunConfig, chosen: Chosen, batches: int) -> None:
  """Refuses a folder of targets where targets cannot be used again."""
  if not config.states:
    return
  if chosen.config.objective() is None:
    raise InputError(
        f'--states={config.states}: {chosen.method.name} optimises no hidden'
        ' states; leave it out'
    )
  if not config.reset and batches > 1:
    raise InputError(
        f'--states={config.states}: in a sequence the targets of a batch depend'
        ' on the batches before; use it with one batch or --reset'
    )


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
