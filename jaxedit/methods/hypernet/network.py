"""What a hyper-network is, and how a trained one is kept.

A network maps the factors of an edit's gradient to a delta of low rank.

A trained network lies in a folder as `editor.safetensors`: its variables, and a
record that says what it was trained on: model, data, settings, and the subjects
of its records as hashes. It serves that model alone, and no record whose subject
it has seen, unless that is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import io
from jaxedit.methods.base import Need
from jaxedit.methods.hypernet import factors as lib
from jaxedit.methods.settings import setting
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.types import Array, EditRequest, InputError, Params, Progress

FILE = 'editor.safetensors'
# In place of a folder: a small network that is not trained, for tests.
UNTRAINED = 'untrained'
_FORMAT = 'jaxedit-editor-1'
_REMEDY = 'train it again with experiments.train_editor'


class Variables(NamedTuple):
  """The state of a network, nested dicts of arrays.

  Attributes:
    trained: what the optimiser changes.
    statistics: what no gradient changes: running statistics of factors, and
      constants.
  """

  trained: Any
  statistics: Any = ()


class Network(NamedTuple):
  """A hyper-network bound to a model's architecture and maps.

  Attributes:
    init: (seed's key, dtype) -> variables.
    observe: (statistics, factors) -> statistics with these factors.
    transform: (variables, factors, texts, embedding) -> site -> pair; texts are
      the edits as `Sequences`, embedding is the model's table [V, D].
    rate_of: (path of a trained leaf, learning rate) -> its own learning rate.
  """

  init: Callable[[Array, Any], Variables]
  observe: Callable[[Any, Mapping[str, lib.Factors]], Any]
  transform: Callable[
      [Variables, Mapping[str, lib.Factors], lib.Sequences, Array],
      dict[str, lib.Pair],
  ]
  rate_of: Callable[[str, float], float] = lambda path, rate: rate


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
  """Settings of every training.

  `metadata` of the fields holds help, unit and source.

  Attributes:
    edits: records whose deltas are summed before they are judged.
  """

  layers: tuple[int, ...] | None = setting(
      None, 'layers to edit, ascending; the last three unless given'
  )
  steps: int = setting(100_000, 'batches at most', source='EasyEdit', low=1)
  rate: float = setting(
      1e-6, 'learning rate of Adam', source='MEND', low=0, exclusive=True
  )
  batch_size: int = setting(
      8, 'records a step, each with a delta of its own', low=1
  )
  edits: int = 1
  edit_weight: float = setting(
      0.1, 'weight of the edit loss (cedit)', source='MEND', low=0
  )
  accumulate: int = setting(
      1, 'batches whose gradients are averaged before an update', low=1
  )
  clip: float = setting(
      100.0, 'largest norm of a gradient', source='MEND', low=0, exclusive=True
  )
  validate_every: int = setting(
      1000, 'batches between validations, each with a checkpoint',
      source='EasyEdit', low=1,
  )  # fmt: skip
  patience: int = setting(
      20_000,
      'stop after so many batches without a lower held-out loss; 0 never stops,'
      ' and keeps the last state instead of the best, as EasyEdit does',
      source='MEND',
      low=0,
  )


class Job(Protocol):
  """One training: examples, a loss, and an optimiser's step.

  Attributes:
    about: what it was trained with, for the editor's record, plain JSON types.
  """

  about: Mapping[str, Any]

  def start(self, seed: int) -> Any:
    """Makes the state: a pytree with `variables` and `skipped`, a count."""

  def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
    """Trains on a batch: (state, [] its loss); the old state's memory is reused."""

  def judge(self, variables: Variables | None) -> dict[str, float]:
    """Scores on held-out examples, 'loss' first; None the unedited model."""

  def batches(self, seed: int) -> Iterator[Callable[[], Any]]:
    """Yields functions that make the batches of a seed, without end."""


class Course(NamedTuple):
  """How an editor is trained, as a run of training asks for it.

  Attributes:
    needs: what `job` must be given beside a model.
    settled: (spec, settings) -> settings with layers.
    example: (request, tokens, settings, longest) -> the example of a request,
      which has a `subject`, a hash; None if it is of no use.
    job: (model, settings, examples to train on, held-out ones, resources,
      progress) -> Job.
  """

  needs: tuple[Need, ...]
  settled: Callable[[ModelSpec, Any], Any]
  example: Callable[[EditRequest, Any, Any, int], Any]
  job: Callable[..., Job]


class Trainer(NamedTuple):
  """How what a method uses is made and trained.

  Attributes:
    config: a subclass of `TrainingSettings`.
    course: how it is trained.
    network: (spec, maps, its config) -> Network; None where it is none.
    small: its config for tests.
    parity: name of a published code -> settings that reproduce it.
  """

  config: type
  course: Course
  network: Callable[[ModelSpec, lib.Maps, Any], Network] | None = None
  small: Any = None
  parity: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class TrainedEditor:
  """A trained network.

  Attributes:
    method: id of its method.
    maps: the maps that it edits.
    variables: its variables.
    model_hash: of the model that it was trained for.
    subjects: hashes of the subjects of its records, see `subject_hash`.
    record: data, settings and losses, plain JSON types.
  """

  method: str
  maps: lib.Maps
  variables: Variables
  model_hash: str
  subjects: frozenset[str]
  record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trained(Need):
  """A trained network of a method, a `TrainedEditor`.

  Attributes:
    method: id of the method.
    folder: where it lies, or `UNTRAINED`.
    allow_overlap: whether it may edit records whose subject it has seen.
    trainer: how it is trained.
  """

  method: str
  folder: str | None
  allow_overlap: bool
  trainer: Trainer = dataclasses.field(compare=False)

  def maps(self, spec: ModelSpec, layers: Sequence[int] | None) -> lib.Maps:
    """The maps that it edits.

    Args:
      spec: the architecture.
      layers: those that are asked for; None for its own.

    Raises:
      InputError: it edits other layers, or cannot be read.
    """
    if self.folder in (None, UNTRAINED):
      last = tuple(range(spec.layers))[-3:]
      return lib.maps_of(spec, last if layers is None else layers)
    maps = load(self.folder, variables=False).maps
    if layers is not None and tuple(layers) != maps.layers:
      raise InputError(
          f'layers {list(layers)}: the editor in {self.folder} was trained for'
          f' layers {list(maps.layers)}; leave --layers out'
      )
    return maps

  def check(self) -> None:
    """See `Need.check`."""
    if self.folder is None:
      raise InputError(
          f'method {self.method} needs --editor: name the folder of an editor that'
          f' was trained with experiments.train_editor --method={self.method}'
      )
    if self.folder == UNTRAINED:
      return
    method = load(self.folder, variables=False).method
    if method != self.method:
      raise InputError(
          f'--editor={self.folder}: it was trained for --method={method}, not'
          f' {self.method}; name another one'
      )

  def admit(self, requests: Sequence[EditRequest]) -> None:
    """See `Need.admit`."""
    if self.folder != UNTRAINED and not self.allow_overlap:
      check_requests(load(self.folder, variables=False), requests)

  def provide(self, model: Any, seed: int, progress: Progress) -> TrainedEditor:
    """See `Need.provide`."""
    del progress
    self.check()
    if self.folder == UNTRAINED:
      maps = lib.maps_of(model.spec, self.trainer.small.layers)
      network = self.trainer.network(model.spec, maps, self.trainer.small)
      variables = network.init(jax.random.key(seed), jnp.float32)
      return TrainedEditor(self.method, maps, variables, '', frozenset(), {})
    trained = load(self.folder)
    check_model(trained, model.hash)
    return trained

  def source(self, value: TrainedEditor) -> dict[str, Any]:
    """See `Need.source`."""
    return {
        'editor': {
            'folder': self.folder,
            'layers': list(value.maps.layers),
            'sites': list(value.maps.sites),
            **value.record,
        }
    }


def subject_hash(subject: str) -> str:
  """Hashes a subject, whatever its case and white space."""
  plain = ' '.join(subject.casefold().split())
  return hashlib.sha256(plain.encode()).hexdigest()[:16]


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Names the leaves of nested dicts by their '/'-joined paths."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    found[prefix + '/'.join(str(part.key) for part in path)] = leaf
  return found


def nest(leaves: Mapping[str, Any], prefix: str = '') -> Any:
  """Undoes `flatten` for the leaves of a prefix; () where there is none."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    if name.startswith(prefix):
      *outer, last = name.removeprefix(prefix).split('/')
      node = tree
      for part in outer:
        node = node.setdefault(part, {})
      node[last] = leaf
  return tree or ()


def save(folder: str | os.PathLike[str], trained: TrainedEditor) -> None:
  """Writes a trained network, atomically.

  Args:
    folder: where; it is made.
    trained: what to write.

  Raises:
    InputError: it cannot be written.
  """
  seen = [bytes.fromhex(x) for x in sorted(trained.subjects)]
  arrays = {
      **flatten(trained.variables.trained, 'trained/'),
      **flatten(trained.variables.statistics, 'statistics/'),
      'subjects': np.frombuffer(b''.join(seen), np.uint8).reshape(-1, 8),
  }
  record = {
      'method': trained.method,
      'layers': list(trained.maps.layers),
      'sites': list(trained.maps.sites),
      'model_hash': trained.model_hash,
      'about': dict(trained.record),
  }
  path = pathlib.Path(folder) / FILE
  arrays = {name: fetch(x) for name, x in arrays.items()}
  io.write_tensors(path, arrays, kind=_FORMAT, record=record)


def load(
    folder: str | os.PathLike[str], *, variables: bool = True
) -> TrainedEditor:
  """Reads a trained network.

  Args:
    folder: where `save` wrote it.
    variables: whether to read its variables, or only what it was trained on.

  Returns:
    The network.

  Raises:
    InputError: it is missing or damaged.
  """
  path = pathlib.Path(folder) / FILE
  if not path.is_file():
    raise InputError(
        f'--editor={folder}: holds no trained editor ({FILE}); name a folder that'
        ' experiments.train_editor has written'
    )
  names = None if variables else ('subjects',)
  arrays, record = io.read_tensors(path, _FORMAT, _REMEDY, names)
  seen = frozenset(row.tobytes().hex() for row in arrays.pop('subjects'))
  try:
    return TrainedEditor(
        record['method'],
        lib.Maps(tuple(record['layers']), tuple(record['sites'])),
        Variables(nest(arrays, 'trained/'), nest(arrays, 'statistics/')),
        record['model_hash'],
        seen,
        record['about'],
    )
  except (KeyError, TypeError) as error:
    raise InputError(f'{path}: damaged ({error}); {_REMEDY}') from error


def check_model(trained: TrainedEditor, model_hash: str) -> None:
  """Refuses an editor that was trained for another model.

  Raises:
    InputError: it was.
  """
  if trained.model_hash != model_hash:
    raise InputError(
        f'--editor: it was trained for model {trained.model_hash[:12]}, and this'
        f' is {model_hash[:12]}; load the model it was trained for, or train one'
        ' for this model with experiments.train_editor'
    )


def check_requests(
    trained: TrainedEditor, requests: Sequence[EditRequest]
) -> None:
  """Refuses records whose subject an editor has been trained on.

  Raises:
    InputError: there are some.
  """
  seen = [r for r in requests if was_seen(r, trained.subjects)]
  if seen:
    some = ', '.join(str(r.number) for r in seen[:5])
    more = ', ...' if len(seen) > 5 else ''
    raise InputError(
        f'--editor: it was trained on the subjects of {len(seen)} of'
        f' {len(requests)} records (record {some}{more}), so that scores of them'
        ' say nothing of new facts; choose other records, train with --exclude on'
        ' this file, or pass --allow_overlap'
    )


def was_seen(request: EditRequest, subjects: Iterable[str]) -> bool:
  """Whether the subject of a request is among hashed ones."""
  return request.subject is not None and (
      subject_hash(request.subject) in subjects
  )


def as_dtype(variables: Variables, dtype: Any) -> Variables:
  """Puts variables on the device in a dtype."""
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)


def embedding(params: Params) -> Array:
  """The model's token table [V, D]."""
  return params['embed']['embedding']
