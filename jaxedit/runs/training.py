"""Trains an editor: records, batches, validation, early stopping, checkpoints.

  read -> exclude -> split by subject -> states of all texts -> steps
       -> every so often: held-out loss, checkpoint -> the best variables

An interrupted run resumes from its newest checkpoint, of a validation or of where
it was stopped, with the same numbers: the order of records follows from the seed
and the step, and the checkpoint holds all that a step changes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit import io
from jaxedit.checkpoint import Checkpoint
from jaxedit.convert import hub
from jaxedit.methods.base import Method
from jaxedit.methods.hypernet import factors, network
from jaxedit.methods.hypernet.network import (
    Job,
    TrainedEditor,
    TrainingSettings,
    Variables,
)
from jaxedit.methods.settings import setting
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.loading import Model
from jaxedit.placement import fetch
from jaxedit.runs import cli
from jaxedit.runs import needs as needs_lib
from jaxedit.runs.config import RunConfig
from jaxedit.runs.output import Output
from jaxedit.runs.provenance import versions
from jaxedit.runs.training_data import (
    Examples,
    load,
)
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import InputError, Progress, Stopped, silent

LOG = 'training.json'


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """What a run of training is told, beside its method and its model."""

  data: str = setting(
      'demo',
      'a file of facts with a rephrased and a local prompt each: CounterFact,'
      ' zsRE, or our own JSONL (docs/data.md)',
  )
  output_dir: str | None = setting(None, 'folder for the trained editor')
  exclude: str | None = setting(
      None, 'file of facts that will be judged: their subjects are left out'
  )
  num_records: int | None = setting(
      None, 'read the first N good records; all unless given', low=1
  )
  held_out: int = setting(
      100,
      'records that are held out for validation, with their subjects',
      low=1,
  )
  longest: int = setting(
      32, 'longest text; longer ones are left out', unit='tokens', low=2
  )
  minutes: float | None = setting(
      None,
      'end at the first validation after so many minutes of training, those of'
      ' interrupted runs included',
      low=0,
      exclusive=True,
  )
  overwrite: bool = setting(False, 'replace an editor that was trained before')
  seed: int = 0


class Point(NamedTuple):
  """One validation.

  Attributes:
    step: batches so far.
    loss: held-out loss.
    scores: name -> other scores of the held-out examples.
    train_loss: mean loss of the batches since the last validation.
    seconds: time spent on these batches.
  """

  step: int
  loss: float
  scores: Mapping[str, float] = types.MappingProxyType({})
  train_loss: float = 0.0
  seconds: float = 0.0

  def record(self) -> dict[str, float | None]:
    """All of it as plain JSON types; None for a number that is not finite."""
    found = {**self._asdict(), **self.scores}
    del found['scores']
    return {k: x if math.isfinite(x) else None for k, x in found.items()}

  def said(self) -> str:
    """Its scores, for the user."""
    return ', '.join(f'{name} {x:.3f}' for name, x in self.scores.items())


def run(
    config: TrainConfig,
    model_config: RunConfig,
    method: Method,
    settings: TrainingSettings,
    *,
    command: Mapping[str, Any],
    progress: Progress = silent,
) -> list[str]:
  """Trains an editor and writes it.

  Args:
    config: data and folder.
    model_config: names the model.
    method: the method.
    settings: its settings of training.
    command: what a run that resumes must repeat, plain JSON types.
    progress: progress display.

  Returns:
    Lines to print.

  Raises:
    InputError: anything that cannot be used.
  """
  written = (network.FILE, LOG)
  with Output(
      config.output_dir, command, overwrite=config.overwrite, writes=written
  ) as output:
    cli.use_compilation_cache(model_config.compilation_cache)
    folder = hub.resolve(
        model_config.model,
        wheel=model_config.wheel,
        revision=model_config.revision,
        progress=progress,
    )
    spec = loading.open_model(folder)[2].spec
    course = method.trainer.course
    for need in course.needs:
      needs_lib.check(model_config, need)
    settings = course.settled(spec, settings)
    tokens = TokenCache(tokenizer_lib.load_tokenizer(folder))
    longest = min(config.longest, spec.max_positions)
    make = lambda one: course.example(one, tokens, settings, longest)
    records = load(config, settings, make, longest)
    model = loading.load_model(
        folder, model_config.dtype, progress, mesh=model_config.mesh
    )
    resources = {
        need: needs_lib.provide(
            model_config, model, tokens.tokenizer, need, progress=progress
        )
        for need in course.needs
    }
    for line in notes(config, records):
      print(line, file=sys.stderr)
    output.begin()
    output.clear(written)
    about = {'command': dict(command), 'versions': versions()}
    job = course.job(
        model,
        settings,
        records.train,
        records.held_out,
        resources,
        progress,
    )
    fitted = fit(
        job,
        settings,
        seed=config.seed,
        minutes=config.minutes,
        checkpoint=Checkpoint(output.unfinished / 'steps'),
        progress=progress,
    )
    trained = fitted.editor(model, method, settings, records, config)
    network.save(output.folder, trained)
    log = {**about, **dict(trained.record), 'log': fitted.record()}
    io.write_json(output.folder / LOG, log)
    return fitted.lines(output.folder / network.FILE)


def errors(config: TrainConfig) -> list[str]:
  """Finds settings that cannot be used; reads nothing."""
  if config.output_dir:
    return []
  return ['--out is missing: name a folder for the trained editor']


def notes(config: TrainConfig, records: Examples) -> list[str]:
  """What was done with the records, for the user."""
  lines = [
      f'{len(records.train)} records to train on, {len(records.held_out)} held'
      f' out, of {len(records.loaded.requests)} good ones in {config.data}'
  ]
  if config.exclude:
    lines.append(
        f'{records.excluded} records left out: their subjects are in'
        f' {config.exclude}'
    )
  if records.unusable:
    lines.append(
        f'{records.unusable} records left out: without a rephrased or a local'
        f' prompt, or {config.longest} tokens or longer'
    )
  return lines


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What training came to.

  Attributes:
    unedited: held-out scores of the unedited model.
    log: validations in order.
    best: index into `log` of the validation whose variables are kept.
    variables: those.
    skipped: batches whose gradient was not finite.
    stopped: why training ended.
    about: what else the editor's record says.
  """

  unedited: Point
  log: tuple[Point, ...]
  best: int
  variables: Variables
  skipped: int
  stopped: str
  about: Mapping[str, Any]

  def record(self) -> list[dict[str, Any]]:
    """All validations as plain JSON types."""
    return [one.record() for one in (self.unedited, *self.log)]

  def editor(
      self,
      model: Model,
      method: Method,
      settings: TrainingSettings,
      records: Examples,
      config: TrainConfig,
  ) -> TrainedEditor:
    """The trained editor with what it was trained on."""
    maps = factors.maps_of(model.spec, settings.layers)
    seen = (*records.train, *records.held_out)
    best = self.log[self.best]
    plain = lambda x: list(x) if isinstance(x, tuple) else x
    record = {
        'data': config.data,
        'data_sha256': records.loaded.sha256,
        'records': len(records.train),
        'held_out': len(records.held_out),
        'excluded': records.excluded,
        'seed': config.seed,
        'settings': {
            k: plain(v) for k, v in dataclasses.asdict(settings).items()
        },
        'step': best.step,
        'held_out_loss': {'unedited': self.unedited.loss, 'trained': best.loss},
        **self.about,
    }
    return TrainedEditor(
        method.name,
        maps,
        jax.tree.map(fetch, self.variables),
        model.hash,
        frozenset(one.subject for one in seen),
        record,
    )

  def lines(self, path: Any) -> list[str]:
    """What to print at the end."""
    old, best = self.unedited, self.log[self.best]
    wide = lambda cells: ' '.join(f'{cell:>8}' for cell in cells)
    found = [
        f'{"":14} {wide(["loss", *best.scores])}',
        *(
            f'{name:14} {wide(f"{v:.3f}" for v in (x.loss, *x.scores.values()))}'
            for name, x in (('unedited', old), (f'step {best.step}', best))
        ),
        f'{self.stopped}; held-out scores above, of the variables kept: {path}',
    ]
    if self.skipped:
      found.append(f'{self.skipped} batches left out: gradient not finite')
    return found


def fit(
    job: Job,
    settings: TrainingSettings,
    *,
    seed: int,
    minutes: float | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> Fitted:
  """Trains until the steps are done or the held-out loss stays.

  Args:
    job: what is trained.
    settings: of the method: `steps`, `validate_every`, `patience`.
    seed: of the initial variables and the order of records.
    minutes: of training at most; None for no limit.
    checkpoint: where to save and to resume; None for neither.
    progress: progress display.

  Returns:
    What it came to.

  Raises:
    Stopped: by `progress`; the present step is saved.
  """
  fitting = _Fitting(job, settings, seed, minutes)
  if checkpoint is not None:
    fitting.restore(checkpoint)
  first, last = fitting.steps, settings.steps
  with progress('train', last, 'step') as advance:
    batches = itertools.islice(job.batches(seed), first, last)
    try:
      advance(first)
      for make in () if fitting.ended else batches:
        fitting.step(make())
        if not fitting.steps % settings.validate_every or fitting.steps == last:
          fitting.validate()
          print(fitting.line(), file=sys.stderr)
          if checkpoint is not None:
            fitting.save(checkpoint)
        advance(1)
        if fitting.ended:
          break
    except Stopped:
      if checkpoint is not None and fitting.steps > first:
        fitting.save(checkpoint)
      raise
  return fitting.done()


def _finite(loss: float) -> float:
  """A loss that is not finite is higher than any other."""
  return loss if math.isfinite(loss) else math.inf


class _Fitting:
  """The state of training, its validations and the best variables so far."""

  def __init__(self, job: Job, settings: Any, seed: int, minutes: float | None):
    self._job, self._settings, self._minutes = job, settings, minutes
    self._state = job.start(seed)
    self._log: list[Point] = []
    self._best: tuple[int, Any] = (0, None)
    self._losses: list[Any] = []
    self._begin = time.monotonic()
    self.steps = self._saved = 0
    self._unedited = self._judged(None)

  @property
  def ended(self) -> str:
    """Why training ends before its last step; '' if it goes on."""
    config = self._settings
    if not self._log:
      return ''
    best = self._log[self._best[0]].step
    if config.patience and self.steps - best >= config.patience:
      return f'no lower held-out loss since step {best}'
    spent = sum(one.seconds for one in self._log) / 60
    if self._minutes is not None and spent >= self._minutes:
      return f'{spent:.1f} minutes'
    return ''

  def step(self, batch: Any) -> None:
    """Trains on a batch."""
    self._state, loss = self._job.step(self._state, batch)
    self._losses.append(loss)
    self.steps += 1

  def validate(self) -> None:
    """Judges the variables, and keeps them where they are the best yet."""
    found = self._judged(self._state.variables)._replace(
        train_loss=float(np.mean([float(x) for x in self._losses])),
        seconds=time.monotonic() - self._begin,
    )
    self._log.append(found)
    number = len(self._log) - 1
    lower = _finite(found.loss) < _finite(self._log[self._best[0]].loss)
    # The last ones are kept where nothing stops.
    if number == 0 or not self._settings.patience or lower:
      # A copy: the memory of the state is reused.
      self._best = number, jax.tree.map(np.array, self._state.variables)
    self._losses, self._begin = [], time.monotonic()

  def _judged(self, variables: Variables | None) -> Point:
    """Scores of the held-out records."""
    loss, *rest = self._job.judge(variables).items()
    return Point(self.steps, loss[1], dict(rest))

  def line(self) -> str:
    """The newest validation, for the user."""
    now, old = self._log[-1], self._unedited
    return (
        f'step {now.step}: held-out loss {now.loss:.3f} (unedited'
        f' {old.loss:.3f}; {now.said()}), training {now.train_loss:.3f}'
    )

  def save(self, checkpoint: Checkpoint) -> None:
    """Saves all that a step changes, and the best variables."""
    if self.steps == self._saved:
      return
    number, best = self._best
    leaves = enumerate(jax.tree.leaves((self._state, best)))
    # JSON has no number for what is not finite.
    log = [
        jax.tree.map(repr, one._asdict() | {'scores': dict(one.scores)})
        for one in self._log
    ]
    losses = [repr(float(x)) for x in self._losses]
    spent = time.monotonic() - self._begin
    checkpoint.save(
        self.steps,
        {str(i): fetch(leaf) for i, leaf in leaves},
        {'log': log, 'best': number, 'losses': losses, 'seconds': spent},
    )
    self._saved = self.steps

  def restore(self, checkpoint: Checkpoint) -> None:
    """Goes on from the newest checkpoint, if there is one."""
    found = checkpoint.restore()
    if found is None:
      return
    self.steps, arrays, record = found
    self._saved = self.steps
    # There is no best one before the first validation.
    best = self._state.variables if record['log'] else None
    leaves, structure = jax.tree.flatten((self._state, best))
    leaves = [jax.numpy.asarray(arrays[str(i)]) for i, _ in enumerate(leaves)]
    self._state, best = jax.tree.unflatten(structure, leaves)
    self._log = [
        Point(**(jax.tree.map(float, one) | {'step': int(one['step'])}))
        for one in record['log']
    ]
    self._best = record['best'], jax.tree.map(np.array, best)
    self._losses = [float(x) for x in record['losses']]
    self._begin = time.monotonic() - record['seconds']

  def done(self) -> Fitted:
    """What training came to.

    Raises:
      InputError: the held-out loss has never been finite.
    """
    number, best = self._best
    if not math.isfinite(self._log[number].loss):
      raise InputError(
          'the held-out loss is not finite: no editor was trained; lower --rate'
      )
    stopped = f'{self.steps} steps'
    if self.ended:
      stopped += f', then {self.ended}'
    return Fitted(
        self._unedited,
        tuple(self._log),
        number,
        best,
        int(self._state.skipped),
        stopped,
        self._job.about,
    )
