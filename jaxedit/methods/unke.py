"""UnKE: writes answers of any form into all parameters of a block.

  z     = h_L + d at every anchor (`values`), L the last edited layer
  X_out = block(X_in), at the anchors + (z - now) / (layers left)
  W     = argmin mean |block_W(S_in) - S_out|^2 + mean |block_W(X_in) - X_out|^2

by AdamW from the present weights (`regression`). S are texts whose outputs
shall stay. X are the questions alone, or, where answers go chunk by chunk
(AnyEdit), questions with their answers; what is no anchor keeps its output.

Axes: E edits, K stages of an edit, G groups that know nothing of each other, A
anchors of a group, N places, D width, n edited layers.

Source: Deng et al. 2024 (UnKE, arXiv 2405.15349); Jiang et al. 2025 (AnyEdit,
arXiv 2502.05628) for chunks. Unlike the published code, padding is neither run
nor part of the means (`pads` brings it back), questions and answers are joined
as ids, and parameters never change: the delta is new - old.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxedit import targets as targets_lib
from jaxedit.batching.buckets import POWERS, round_up
from jaxedit.deltas import Dense, Edited
from jaxedit.methods import base, regression
from jaxedit.methods.closed_form.recipe import TEXT_TARGET
from jaxedit.methods.config import TargetedConfig
from jaxedit.methods.regression import Goals, Rule, Side, Texts
from jaxedit.methods.settings import setting
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import fetch
from jaxedit.targets import TargetConfig
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, InputError, Params, Progress, Targets

# Published settings, the same for all models. Runs with chunks are published
# with a threshold of 5e-3, others without early stop.
_TARGET = TEXT_TARGET._replace(threshold=0.0)
_CHUNKED_THRESHOLD = 5e-3
_NOT_FINITE = (
    'text {} to preserve: its states are not finite in this model; leave it out'
)


@dataclasses.dataclass(frozen=True)
class UnkeConfig(TargetedConfig):
  """Settings of the method; the defaults are the published ones.

  Without chunks questions alone are in the fit.

  Attributes:
    steps: updates of the fit.
    rate: its learning rate.
    decay: its decoupled weight decay; norms have none.
    pads: pad texts to the longest of their group, and count the padding in the
      means, as published.
    side_by_side: groups fitted at once; each takes a copy of the block, its
      gradient and two moments in f32, and the activations of all texts.
  """

  layers: tuple[int, ...] = setting(
      (7,), 'layers to edit, ascending', source='UnKE'
  )
  target: TargetConfig = _TARGET
  anchor: str = 'prompt_last'
  steps: int = setting(
      50, 'updates of the block', source='UnKE', low=1, flag='unke_steps'
  )
  rate: float = setting(
      2e-4, 'learning rate of the block', source='UnKE', low=0, flag='unke_rate'
  )
  decay: float = 0.01
  pads: bool = False
  side_by_side: int = 4

  def for_texts(self, chunked: bool) -> UnkeConfig:
    """The published threshold of runs with chunks; without them, none."""
    threshold = _CHUNKED_THRESHOLD if chunked else 0.0
    target = self.target._replace(threshold=threshold)
    return dataclasses.replace(super().for_texts(chunked), target=target)


class State(NamedTuple):
  """What the editor keeps.

  Attributes:
    preserved: the texts whose outputs shall stay, laid out.
    pad: [] int32, the token that pads; None where nothing is padded.
  """

  preserved: Texts
  pad: np.ndarray | None


class _Job(NamedTuple):
  """What the texts of one group shall become."""

  edits: tuple[int, ...]
  texts: tuple[np.ndarray, ...]
  anchors: tuple[tuple[int, int], ...]  # (text, column) of every state
  states: tuple[int, ...]  # their numbers in the flat targets

  def without(self, bad: set[int]) -> _Job:
    """The job without the texts of some edits."""
    kept = [r for r, e in enumerate(self.edits) if e not in bad]
    now = {old: new for new, old in enumerate(kept)}
    here = [i for i, (r, _) in enumerate(self.anchors) if r in now]
    anchors = [(now[r], column) for r, column in self.anchors if r in now]
    return _Job(
        tuple(self.edits[r] for r in kept),
        tuple(self.texts[r] for r in kept),
        tuple(anchors),
        tuple(self.states[i] for i in here),
    )


def unke(spec: ModelSpec, config: UnkeConfig) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. It needs texts whose outputs shall stay. Its deltas are `Dense`,
    one a parameter of the block; those of independent edits are numpy arrays
    [n, G, ...], as they need not fit the device.

  Raises:
    InputError: a layer is out of range, a setting cannot be used; from `init`,
      a text to preserve cannot be run.
  """
  base.check_layers(spec, config.layers)
  _check_settings(config)

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    preserved = resources[base.PreservedTexts()]
    _check_preserved(spec, preserved)
    # They stay the same all along, so that a tight shape pays.
    shape = regression.shape_of([preserved], config.pads, _tight)
    pad = resources[base.PadToken()] if config.pads else None
    texts = regression.pack(preserved, shape, pad)
    h = regression.enter(spec, model.params, texts, stop=config.layers[-1] + 1)
    if broken := _broken(h, texts):
      raise InputError(*map(_NOT_FINITE.format, (i + 1 for i in broken)))
    return State(texts, None if pad is None else np.int32(pad))

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    edits = batch.encoded
    if not edits:
      return base.EditResult(
          Edited(), state, base.empty_info(spec, config.layers)
      )
    jobs = _jobs(spec, config, edits, batch.groups)
    begin = time.monotonic()
    found, work = targets_lib.optimize(
        dataclasses.replace(spec, activations=config.activations),
        model.params,
        edits,
        plan=batch.plan,
        objective=targets_lib.Objective(config.layers[-1], config.target),
        cache=run.cache,
        progress=run.progress,
    )
    targets = jax.tree.map(lambda *x: np.concatenate(x), *found)
    middle = time.monotonic()
    stages = [edit.stages for edit in edits]
    number = np.repeat(np.arange(len(edits), dtype=np.int32), stages)
    written = np.ones(len(edits), bool)
    np.logical_and.at(written, number, targets.finite)
    fitting = _Fitting(spec, model.params, config, state, targets, len(jobs))
    fitting.fit_all(jobs, np.flatnonzero(~written), run.progress)
    written[sorted(fitting.failed)] = False
    report = base.TargetReport(targets, number, fitting.distance)
    info = base.target_info(report, written, (begin, middle), work)
    edited = batch.edited(fitting.deltas(), on_host=True)
    return base.EditResult(edited, state, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del edits
    leaves = jax.tree.leaves(model.params['layers'])
    return 4 * sum(x[0].size for x in leaves) * len(config.layers)

  needs: tuple[base.Need, ...] = (base.PreservedTexts(),)
  needs += (base.PadToken(),) if config.pads else ()
  return base.Editor(needs, init, edit, bytes_of=bytes_of)


METHOD = base.Method(
    'unke',
    'long answers, written into all parameters of a block',
    UnkeConfig,
    unke,
    accepts=frozenset({'text'}),
    parity={'anyedit': {'pads': True}},
    source='arXiv 2405.15349',
    small={'unke_steps': 6, 'unke_rate': 1e-3, 'side_by_side': 2},
)


class _Fitting:
  """Fits groups, some at a time, and collects their changes on the host."""

  def __init__(
      self,
      spec: ModelSpec,
      params: Params,
      config: UnkeConfig,
      state: State,
      targets: Targets,
      groups: int,
  ):
    self._groups = groups
    # A power of two, so that small batches share compiled code.
    count = round_up(groups, POWERS)
    self.side_by_side = min(config.side_by_side, count)
    self._model, self._config = (spec, params), config
    self._texts, self._targets = state.preserved, targets
    self._pad = None if state.pad is None else int(state.pad)
    # Their states are the same for all groups up to the first edited layer.
    self._kept = regression.enter(
        spec, params, state.preserved, stop=config.layers[0]
    )
    shape = (len(config.layers) + 1, len(targets.z))
    self.distance = np.full(shape, np.nan, targets.z.dtype)
    self.failed: set[int] = set()
    self._changes: Params | None = None

  def fit_all(
      self, jobs: Sequence[_Job], bad: Sequence[int], progress: Progress
  ) -> None:
    """Fits all groups; edits named bad are left out of theirs."""
    bad = {int(e) for e in bad}
    # Groups of one size side by side leave few tokens empty.
    order = sorted(range(len(jobs)), key=lambda g: sum(map(len, jobs[g].texts)))
    with progress('insert', sum(len(j.edits) for j in jobs), 'edit') as advance:
      for first in range(0, len(jobs), self.side_by_side):
        groups = order[first : first + self.side_by_side]
        self.fit(groups, [jobs[g] for g in groups], bad)
        advance(sum(len(jobs[g].edits) for g in groups))

  def fit(
      self, groups: Sequence[int], jobs: Sequence[_Job], bad: set[int]
  ) -> None:
    """Fits some groups; edits named bad are left out of theirs."""
    asked = {e for job in jobs for e in job.edits}
    jobs = [job.without(bad) for job in jobs]
    texts, goals = self._lay_out(jobs)
    h = regression.enter(*self._model, texts, stop=self._config.layers[0])
    # What overflows in a later layer would spoil the others of its group.
    first, *_, last = (*self._config.layers, self._config.layers[-1])
    top = regression.reach(
        *self._model, h, texts.rows, start=first, stop=last + 1
    )
    broken = {
        job.edits[r]
        for g, job in enumerate(jobs)
        for r in _broken(top[g], jax.tree.map(lambda x: x[g], texts))
    }
    if broken:
      jobs = [job.without(broken) for job in jobs]
      texts, goals = self._lay_out(jobs)
      h = regression.enter(*self._model, texts, stop=self._config.layers[0])
    self.failed |= (bad & asked) | broken
    self._climb(groups, jobs, h, texts=texts, goals=goals)

  def _lay_out(self, jobs: Sequence[_Job]) -> tuple[Texts, Goals]:
    """Packs a slab; places past the last group stay empty."""
    config = self._config
    count = self.side_by_side
    shape = regression.shape_of([job.texts for job in jobs], config.pads)
    most = round_up(max(4, *(len(job.states) for job in jobs)), POWERS)
    place = np.full([count, most], shape[2], np.int32)
    z = np.zeros([count, most, self._targets.z.shape[1]], self._targets.z.dtype)
    packed = []
    for g in range(count):
      job = jobs[g] if g < len(jobs) else _Job((), (), (), ())
      packed.append(regression.pack(job.texts, shape, self._pad))
      for a, (r, column) in enumerate(job.anchors):
        place[g, a] = packed[-1].rows.index[r, column]
        z[g, a] = self._targets.z[job.states[a]]
    return jax.tree.map(lambda *x: np.stack(x), *packed), Goals(place, z)

  def _climb(
      self,
      groups: Sequence[int],
      jobs: Sequence[_Job],
      h: Array,
      *,
      texts: Texts,
      goals: Goals,
  ) -> None:
    """Takes a slab through the edited layers, lowest first."""
    (spec, params), config = self._model, self._config
    layers, kept, sound = config.layers, self._kept, True
    rule = Rule(config.steps, config.rate, config.decay)
    for i, layer in enumerate(layers):
      if i:
        above = dict(start=layers[i - 1] + 1, stop=layer)
        h = regression.reach(spec, params, h, texts.rows, **above)
        kept = regression.reach(spec, params, kept, self._texts.rows, **above)
      block = regression.take(params, layer)
      aim = functools.partial(regression.aim, spec, params, layer=layer)
      want, now = aim(
          h, texts.rows, goals, last=layers[-1], share=1 / (len(layers) - i)
      )
      self._measure(i, jobs, now)
      stay, _ = aim(kept, self._texts.rows, None, last=layer, share=0.0)
      new, old = Side(h, want, texts), Side(kept, stay, self._texts)
      change, fine = regression.fit_groups(spec, block, new, old, rule)
      h = regression.advance(spec, block, change, h, texts.rows)
      if i + 1 < len(layers):
        kept = regression.advance(spec, block, change, kept, self._texts.rows)
      sound = sound & fetch(fine)[: len(jobs)]
      self._collect(i, groups, change)
    self._measure(len(layers), jobs, regression.read(h, goals))
    for g, job, fine in zip(groups, jobs, sound):
      if not fine:
        self.failed |= set(job.edits)
      if not fine or not job.edits:
        for whole in jax.tree.leaves(self._changes):
          whole[:, g] = 0

  def _collect(self, i: int, groups: Sequence[int], change: Params) -> None:
    """Puts the changes of the i-th edited layer in their place."""
    if self._changes is None:
      lead = (len(self._config.layers), self._groups)
      self._changes = jax.tree.map(
          lambda x: np.zeros((*lead, *x.shape[1:]), x.dtype), change
      )
    for whole, part in zip(*map(jax.tree.leaves, (self._changes, change))):
      whole[i, list(groups)] = fetch(part)[: len(groups)]

  def _measure(self, i: int, jobs: Sequence[_Job], now: Array) -> None:
    """Notes |z - now| / |z - z0| of the states of a slab."""
    found, targets = fetch(now), self._targets
    for g, job in enumerate(jobs):
      s = list(job.states)
      length = np.linalg.norm(targets.z[s] - targets.z0[s], axis=-1)
      gap = np.linalg.norm(targets.z[s] - found[g, : len(s)], axis=-1)
      self.distance[i, s] = gap / np.maximum(length, 1e-30)

  def deltas(self) -> tuple[Dense, ...]:
    """The changes of all groups, [n, G, ...] one a parameter."""
    found = []
    for path, change in jax.tree_util.tree_leaves_with_path(self._changes):
      *site, leaf = (part.key for part in path)
      found.append(Dense(self._config.layers, '/'.join(site), change, leaf))
    return tuple(found)


def _tight(n: int) -> int:
  """A length that leaves next to nothing empty."""
  return -(-n // 16) * 16


def _broken(h: Array, texts: Texts) -> list[int]:
  """Texts with a state [1, N, D] that is not finite."""
  broken_tokens = ~np.isfinite(fetch(h)[0]).all(-1) & texts.counted
  return sorted({int(r) for r in texts.rows.row[broken_tokens]})


def _jobs(
    spec: ModelSpec,
    config: UnkeConfig,
    edits: Sequence[EncodedEdit],
    group: Sequence[int],
) -> list[_Job]:
  """Sorts edits into groups."""
  _check_edits(spec, config, edits)
  jobs: list[list[Any]] = [[[], [], [], []] for _ in range(max(group) + 1)]
  state = 0
  for e, (edit, number) in enumerate(zip(edits, group)):
    numbers, texts, anchors, states = jobs[number]
    for k in range(edit.stages):
      anchors.append((len(texts), edit.stage(k, 0).anchor))
      states.append(state)
      state += 1
    numbers.append(e)
    texts.append(_text(config, edit))
  return [_Job(*map(tuple, job)) for job in jobs]


def _text(config: UnkeConfig, edit: EncodedEdit) -> np.ndarray:
  """The ids of an edit that the fit sees."""
  if config.chunks is None:
    return edit.rows[0]
  return np.concatenate([edit.rows[0], edit.target])


def _check_settings(config: UnkeConfig) -> None:
  least = {'steps': 0, 'rate': 0, 'decay': 0, 'side_by_side': 1}
  problems = [
      f'{name} is {getattr(config, name)}; it must be at least {low}'
      for name, low in least.items()
      if getattr(config, name) < low
  ]
  InputError.raise_for(problems)


def _check_preserved(spec: ModelSpec, texts: Sequence[np.ndarray]) -> None:
  problems = []
  for i, ids in enumerate(texts, 1):
    name = f'text {i} to preserve'
    if not 1 <= len(ids) <= spec.max_positions:
      problems.append(
          f'{name}: has {len(ids)} tokens; the model takes 1 to'
          f' {spec.max_positions}: cut it or leave it out'
      )
    strange = [int(t) for t in ids if not 0 <= t < spec.vocab]
    if strange:
      problems.append(
          f'{name}: has token {strange[0]}, but the model knows 0 to'
          f' {spec.vocab - 1}; use the tokenizer that belongs to the model'
      )
  InputError.raise_for(problems)


def _check_edits(
    spec: ModelSpec, config: UnkeConfig, edits: Sequence[EncodedEdit]
) -> None:
  problems = []
  for edit in edits:
    length = len(_text(config, edit))
    if length > spec.max_positions:
      problems.append(
          f'record {edit.number}: question and answer take {length} tokens, the'
          f' model takes {spec.max_positions}; shorten the answer'
      )
    if edit.stages > 1 and config.chunks is None:
      problems.append(
          f'record {edit.number}: its answer is cut into {edit.stages} chunks,'
          ' but the method has no `chunks`; encode it without or give them'
      )
  InputError.raise_for(problems)
