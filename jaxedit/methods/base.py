"""What every editor is: data about what it needs, and two pure functions.

  state                = editor.init(model, resources)
  edited, state, info  = editor.edit(model, state, batch, run)

`edit` never changes the model: it returns an edit (`deltas.Edited`). What lasts
from one batch to the next is explicit in `state`, a pytree of bounded size.

A method is a file of this package that defines `METHOD`, or `METHODS`, and is
found by `registry`; its settings are a `config.MethodConfig`. Flags, `--help`,
the table of methods and the tests that hold every method come from these. Nothing
outside a method's file asks which method it is.

Axis letters: E edits of a batch, M targets of all of them, n edited layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit import io
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import Edited, SiteDelta
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.settings import Setting, configure, settings_of
from jaxedit.models.spec import ModelSpec
from jaxedit.planning.stages import Stage
from jaxedit.targets import TargetCache, Work
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import EditRequest, InputError, Progress, Targets, silent

# Why no hidden state could be optimised.
NOT_FINITE = (
    'every loss became non-finite; lower --value_rate or load the model with'
    ' --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class Need:
  """What an editor must be given; hashable and comparable.

  A run provides those of this module. A need of a method's own says how itself.
  """

  def check(self) -> None:
    """Refuses what cannot be provided, before weights are read.

    Raises:
      InputError: it cannot.
    """

  def admit(self, requests: Sequence[EditRequest]) -> None:
    """Refuses requests that it must not be used for, before weights are read.

    Raises:
      InputError: some are such.
    """
    del requests

  def provide(self, model: Any, seed: int, progress: Progress) -> Any:
    """Makes it.

    Args:
      model: the unedited model, a `models.loading.Model`.
      seed: of all that is drawn.
      progress: progress display.
    """
    raise NotImplementedError(f'{self} is not provided')

  def source(self, value: Any) -> dict[str, Any]:
    """Says where it is from, entries of results.json, plain JSON types."""
    del value
    return {}


@dataclasses.dataclass(frozen=True)
class Moments(Need):
  """Second moments of the keys of some layers, a `stats.moments.Moments`."""

  layers: tuple[int, ...]
  site: str


@dataclasses.dataclass(frozen=True)
class PreservedTexts(Need):
  """Token ids of texts whose outputs stay, a list of int32 arrays."""


@dataclasses.dataclass(frozen=True)
class PadToken(Need):
  """The id of the token that pads texts."""


@dataclasses.dataclass(frozen=True)
class Tokenizer(Need):
  """The model's tokenizer."""


@dataclasses.dataclass(frozen=True)
class TextEncoder(Need):
  """An encoder of texts, a `models.encoder.Encoder`."""


@dataclasses.dataclass(frozen=True)
class Demonstrations(Need):
  """Facts of other records with their probes, a list of `EditRequest`.

  Attributes:
    least: how many there must be.
  """

  least: int


class EditBatch(NamedTuple):
  """Edits that are made by one call.

  Attributes:
    encoded: E edits as ids.
    plan: static shapes of the run that they are part of.
    group: None for one joint edit; else [E] which independent edit each belongs
      to, counted from 0. The result then holds edits side by side.
    requests: what was asked for, if the method reads it.
  """

  encoded: Sequence[EncodedEdit]
  plan: BatchPlan
  group: Sequence[int] | None = None
  requests: Sequence[Any] = ()

  @property
  def joint(self) -> bool:
    """Whether they are one edit."""
    return self.group is None

  @property
  def groups(self) -> np.ndarray:
    """[E] which independent edit each belongs to; all to one if joint."""
    if self.joint:
      return np.zeros(len(self.encoded), int)
    return np.asarray(self.group, int)

  def edited(
      self, deltas: Sequence[SiteDelta], *, on_host: bool = False
  ) -> Edited:
    """Makes the edit of deltas whose leaves are [n, groups, ...].

    Args:
      deltas: of all groups.
      on_host: keep those of independent edits there, as they need not fit the
        device.
    """
    deltas = tuple(deltas)
    if self.joint:
      return Edited(jax.device_put(jax.tree.map(lambda x: x[:, 0], deltas)))
    size = int(self.groups.max()) + 1
    return Edited(deltas if on_host else jax.device_put(deltas), size=size)


class Run(NamedTuple):
  """What surrounds a call; nothing mathematical.

  Attributes:
    cache: targets that it holds are not optimised again; None for none.
    progress: progress display.
  """

  cache: TargetCache | None = None
  progress: Progress = silent


class TargetReport(NamedTuple):
  """How the targets of a batch were found and written.

  Attributes:
    targets: the optimised hidden states, M of them.
    edit: [M] int32 edit that a target belongs to; ascending.
    distance: [n + 1, M] |z - z_now| / |z - z0| before each of the n edited layers
      was written and after the last.
  """

  targets: Targets
  edit: np.ndarray
  distance: np.ndarray


class Info(NamedTuple):
  """What an edit reports.

  Attributes:
    written: [E] bool, False for an edit that became non-finite; it is not part of
      the result.
    seconds: wall time by stage.
    per_edit: name -> one plain JSON value an edit, for records.jsonl.
    targets: of methods that optimise hidden states, unless the run was resumed;
      else None.
    work: what the optimisation of targets ran; None without one.
    reason: why nothing was written, a sentence, where that is so.
  """

  written: np.ndarray
  seconds: Mapping[str, float]
  per_edit: Mapping[str, Sequence[Any]]
  targets: TargetReport | None = None
  work: Work | None = None
  reason: str = ''


class EditResult(NamedTuple):
  """What an edit returns."""

  edited: Edited
  state: Any
  info: Info


class Editor(NamedTuple):
  """A method bound to a model's architecture.

  Attributes:
    needs: what `init` must be given.
    init: (model, resources) -> state; resources by need.
    edit: (model, state, EditBatch, Run) -> EditResult.
    check: (targets of the largest independent group) -> why groups of that size
      cannot lie side by side, messages.
    bytes_of: (model, encoded edits of one group) -> memory that one independent
      group takes while it lies side by side with others.
    finish: (unedited model, the edits of a whole sequence) -> the edits, shaped
      once for all.
    cumulative: whether `edit` returns all edits so far, those of the state and
      of this batch (a codebook, a memory), not what the batch adds to the model
      it is given. In a sequence it is then given the unedited model.
    ordered: whether edits of a batch are made one after the other, so that their
      order matters.
    stages: (model as shapes, encoded edits, plan, indices of the edits of every
      batch, whether batches are independent) -> what it takes beside optimised
      targets, `planning.stages.Stage`; None where that is not counted.
  """

  needs: tuple[Need, ...]
  init: Callable[[Any, Mapping[Need, Any]], Any]
  edit: Callable[[Any, Any, EditBatch, Run], EditResult]
  check: Callable[[int], list[str]] = lambda targets: []
  bytes_of: Callable[[Any, Sequence[EncodedEdit]], int] = lambda *_: 0
  finish: Callable[[Any, Edited], Edited] = lambda model, edited: edited
  cumulative: bool = False
  ordered: bool = False
  stages: Callable[..., list[Stage]] | None = None


class ProposalInputs(NamedTuple):
  """What a setting is proposed from.

  Attributes:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    prompts: token ids of E edits' prompts.
    rephrases: of each edit, token ids of its paraphrases.
    neighbours: of each edit, token ids of its neighbours.
  """

  spec: ModelSpec
  params: Any
  prompts: Sequence[Sequence[int]]
  rephrases: Sequence[Sequence[Sequence[int]]]
  neighbours: Sequence[Sequence[Sequence[int]]]


class Proposal(NamedTuple):
  """A value of a setting, and lines that say what it was chosen among."""

  value: Any
  lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Method:
  """An entry of the registry.

  Attributes:
    name: its id.
    summary: a phrase for `--help` and the table of methods.
    config: a `config.MethodConfig` whose fields are settings.
    editor: (spec, config) -> Editor.
    accepts: 'fact', 'text' or both.
    chunkable: whether AnyEdit may cut its targets (`config.chunks`).
    contexts: whether facts are run in several context templates and with a KL
      row; without, the plain prompt alone.
    by_text: whether it edits by the texts of requests, not by token ids.
    encoders: whether it edits encoder-decoders.
    parity: name of a published code -> settings that reproduce it.
    source: the paper.
    trainer: how its editor is trained, a `hypernet.network.Trainer`; None where
      nothing is trained.
    small: settings that suit a model of three layers, for tests of every method.
    proposals: setting -> (config, `ProposalInputs`) -> `Proposal` from data.
  """

  name: str
  summary: str
  config: type[MethodConfig]
  editor: Callable[[ModelSpec, Any], Editor]
  accepts: frozenset[str] = frozenset({'fact', 'text'})
  chunkable: bool = True
  contexts: bool = True
  by_text: bool = False
  encoders: bool = False
  parity: Mapping[str, Mapping[str, Any]] = dataclasses.field(
      default_factory=dict
  )
  source: str = ''
  trainer: Any = None
  small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  proposals: Mapping[str, Callable[[Any, ProposalInputs], Proposal]] = (
      dataclasses.field(default_factory=dict)
  )

  @property
  def settings(self) -> dict[str, Setting]:
    """Its settings by name: those of its flags and of `jaxedit.edit`."""
    return settings_of(self.config)

  def make(self, spec: ModelSpec, config: Any) -> Editor:
    """Makes its editor for an architecture.

    Args:
      spec: the architecture.
      config: settings.

    Returns:
      The editor.

    Raises:
      InputError: settings that do not suit the model, or a model that the method
        cannot edit.
    """
    if spec.encoder_layers and not self.encoders:
      raise InputError(
          f'{self.name} edits decoders, and {spec.family} has an encoder under its'
          ' decoder; use a method that edits both, such as ft_m, lora, mend, kn or'
          ' t_patcher (docs/methods.md has the list)'
      )
    return self.editor(spec, config)

  def configure(self, **given: Any) -> Any:
    """Makes a config; see `settings.configure`."""
    return configure(self.config(), given)

  def published(self, kind: str, chunked: bool = False) -> MethodConfig:
    """The published settings for requests of a kind.

    Args:
      kind: 'fact' or 'text'.
      chunked: whether AnyEdit will cut the targets of texts.

    Raises:
      InputError: the method does not take them.
    """
    if kind not in self.accepts:
      names = {'fact': 'facts', 'text': 'long answers'}
      raise InputError(
          f'method {self.name} edits {names[min(self.accepts)]}, these requests'
          f' are {names[kind]}; choose another method'
      )
    if chunked and not self.chunkable:
      raise InputError(
          f'method {self.name} does not edit chunk by chunk; switch AnyEdit off'
      )
    config = self.config()
    return config.for_texts(chunked) if kind == 'text' else config


def check_layers(spec: ModelSpec, layers: Sequence[int]) -> None:
  """Refuses layers that a model does not have.

  Args:
    spec: the architecture.
    layers: layers to edit.

  Raises:
    InputError: empty, out of range, repeated or not ascending.
  """
  wrong = [layer for layer in layers if not 0 <= layer < spec.layers]
  if wrong or not layers:
    raise InputError(
        f'layers {list(layers)}: the model has layers 0 to {spec.layers - 1};'
        ' choose from these'
    )
  if list(layers) != sorted(set(layers)):
    raise InputError(
        f'layers {list(layers)}: list each once, in ascending order'
    )


def join_infos(infos: Sequence[Info]) -> Info:
  """Puts the reports of batches end to end.

  Args:
    infos: of one method, at least one.

  Returns:
    One report.
  """
  seconds: dict[str, float] = {}
  for info in infos:
    for stage, value in info.seconds.items():
      seconds[stage] = seconds.get(stage, 0.0) + value
  reports = [info.targets for info in infos]
  targets = None
  if None not in reports:
    sizes = [0, *(len(info.written) for info in infos)]
    before = np.cumsum(sizes, dtype=np.int32)
    targets = TargetReport(
        jax.tree.map(
            lambda *x: np.concatenate(x), *(r.targets for r in reports)
        ),
        np.concatenate([r.edit + n for r, n in zip(reports, before)]),
        np.concatenate([r.distance for r in reports], axis=1),
    )
  works = [info.work for info in infos if info.work is not None]
  return Info(
      np.concatenate([info.written for info in infos]),
      seconds,
      {
          name: [value for info in infos for value in info.per_edit[name]]
          for name in infos[0].per_edit
      },
      targets,
      functools.reduce(operator.add, works) if works else None,
      next((info.reason for info in infos if info.reason), ''),
  )


def info_record(info: Info) -> dict[str, Any]:
  """Writes a report as plain JSON types, without its targets."""
  work = None if info.work is None else info.work._asdict()
  return {
      'written': info.written.tolist(),
      'seconds': dict(info.seconds),
      'per_edit': {name: list(x) for name, x in info.per_edit.items()},
      'work': work and {**work, 'seconds': dict(work['seconds'])},
      'reason': info.reason,
  }


def info_of(record: Mapping[str, Any]) -> Info:
  """Reads what `info_record` wrote."""
  work = record['work']
  return Info(
      np.array(record['written'], bool),
      record['seconds'],
      record['per_edit'],
      work=None if work is None else Work(**work),
      reason=record['reason'],
  )


def per_edit(report: TargetReport, edits: int) -> dict[str, list[Any]]:
  """Lists the values of a report by edit, as plain JSON types.

  Of an edit with several targets: the mean loss, the sum of the steps, the
  largest distance, and the lowest probability a target token at the end of the
  optimisation (`probability`, a geometric mean over the target's tokens).

  Args:
    report: how targets were found and written.
    edits: E.

  Returns:
    name -> E values.
  """
  names = ('states', 'loss', 'likelihood', 'probability', 'steps', 'distance')
  found: dict[str, list[Any]] = {name: [] for name in names}
  for i in range(edits):
    mine = np.flatnonzero(report.edit == i)
    found['states'].append(len(mine))
    for name in ('loss', 'likelihood'):
      mean = getattr(report.targets, name)[mine].mean()
      found[name].append(io.json_number(mean))
    worst = report.targets.likelihood[mine].max()
    found['probability'].append(io.json_number(np.exp(-worst)))
    found['steps'].append(int(report.targets.steps[mine].sum()))
    far = report.distance[:, mine].max(axis=1)
    found['distance'].append(json_numbers(far))
  return found


def json_numbers(values: Iterable[float]) -> list[float | None]:
  """Numbers as plain JSON types; None where one is not finite."""
  return [io.json_number(x) for x in values]


def target_info(
    report: TargetReport,
    written: np.ndarray,
    times: tuple[float, float],
    work: Work,
    reason: str = NOT_FINITE,
) -> Info:
  """Reports on a batch of a method that optimises hidden states.

  Args:
    report: how targets were found and written.
    written: [E] bool.
    times: when the optimisation and when the insertion began, monotonic seconds.
    work: what the optimisation ran.
    reason: why nothing was written, if that is so.
  """
  begin, middle = times
  seconds = {'optimize': middle - begin, 'insert': time.monotonic() - middle}
  return Info(
      written,
      seconds,
      per_edit(report, len(written)),
      report,
      work,
      '' if written.any() else reason,
  )


def empty_info(spec: ModelSpec, layers: Sequence[int]) -> Info:
  """Returns the report on an empty batch of a method that optimises targets."""
  state, one = np.zeros((0, spec.width), np.float32), np.zeros(0, np.float32)
  steps, yes = np.zeros(0, np.int32), np.zeros(0, bool)
  report = TargetReport(
      Targets(state, state, one, one, steps, yes),
      steps,
      np.zeros((len(layers) + 1, 0), np.float32),
  )
  seconds = {'optimize': 0.0, 'insert': 0.0}
  return Info(yes, seconds, per_edit(report, 0), report, Work())
