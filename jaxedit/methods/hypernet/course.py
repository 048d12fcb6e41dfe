"""How a hyper-network is trained: settings, and the job of a run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxedit.methods.base import check_layers
from jaxedit.methods.hypernet import factors, training
from jaxedit.methods.hypernet.examples import Example, Prepared, example
from jaxedit.methods.hypernet.network import Course, Network, Variables
from jaxedit.methods.hypernet.training import Batch, Training, Trial
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.types import Progress


def course_of(
    make: Callable[[ModelSpec, factors.Maps, Any], Network],
) -> Course:
  """How a hyper-network is trained.

  Args:
    make: (spec, maps, its config) -> the network.
  """
  job = functools.partial(_HypernetJob, make)
  return Course((), _with_layers, example, job)


def _with_layers(spec: Any, settings: Training) -> Training:
  """Settings with the layers that are edited; the last three unless given."""
  layers = settings.layers
  if layers is None:
    layers = tuple(range(spec.layers))[-3:]
  check_layers(spec, layers)
  return dataclasses.replace(settings, layers=layers)


class _HypernetJob:
  """A `network.Job` of a hyper-network."""

  about: Mapping[str, Any] = types.MappingProxyType({})

  def __init__(
      self,
      make: Callable[[ModelSpec, factors.Maps, Any], Network],
      model: Model,
      settings: Training,
      train: Sequence[Example],
      held_out: Sequence[Example],
      resources: Any,
      progress: Progress,
  ):
    del resources
    maps = factors.maps_of(model.spec, settings.layers)
    made = make(model.spec, maps, settings)
    self._trial = Trial(model.spec, maps, made, settings)
    self._params = model.params
    size = settings.batch_size
    self._train = Prepared(model, maps, train, progress, size)
    self._held_out = Prepared(model, maps, held_out, progress)

  def start(self, seed: int) -> training.State:
    """See `network.Job`."""
    dtype = wide(self._params['embed']['embedding'].dtype)
    return training.start(self._trial, seed, dtype)

  def step(self, state: training.State, batch: Batch) -> tuple[Any, Any]:
    """See `network.Job`."""
    return training.step(self._trial, self._params, state, batch)

  def judge(self, variables: Variables | None) -> dict[str, float]:
    """See `network.Job`."""
    config, sums = self._trial.config, None
    far = np.full(config.batch_size, config.outer != 'edit')
    for indices in self._held_out.everything(config.batch_size):
      batch = self._held_out.batch(indices, config.batch_size, far)
      found = training.judge(self._trial, self._params, variables, batch)
      sums = found if sums is None else jax.tree.map(jax.numpy.add, sums, found)
    return {
        'loss': float(training.total(config, sums)),
        'nll': float(sums.nll / sums.tokens),
        'kl': float(sums.kl / sums.local_tokens),
        'right': float(sums.right / sums.outers),
    }

  def batches(self, seed: int) -> Iterator[Callable[[], Batch]]:
    """See `network.Job`."""
    settings = self._trial.config
    size = settings.batch_size
    for epoch in itertools.count():
      for indices in self._train.epoch(size, (seed, epoch)):
        outer = _outer(settings, (seed, epoch, indices[0]), size)
        yield functools.partial(self._train.batch, indices, size, outer)


def _outer(settings: Training, seed: Any, size: int) -> np.ndarray:
  """[B] bool, which records are asked their rephrased prompt."""
  if settings.outer == 'mixed':
    return np.random.default_rng(seed).random(size) < 0.5
  return np.full(size, settings.outer == 'rephrase')
