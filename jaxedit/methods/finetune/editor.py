"""The editor that fits parameters to the targets of edits.

Axis letters: E edits of a batch, n edited layers; `groups` independent edits,
or the one joint batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.deltas import Edited, SiteDelta
from jaxedit.methods import base
from jaxedit.methods.config import MethodConfig, TargetedConfig
from jaxedit.methods.finetune import examples as examples_lib
from jaxedit.methods.finetune import loop
from jaxedit.methods.finetune.examples import Example
from jaxedit.methods.settings import setting
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import InputError, Progress

# Share of the free memory that edits side by side may use, and copies of their
# values: gradients, moments, and all of these after an update.
_MEMORY_SHARE = 0.6
_COPIES = 8
_NOTHING = (
    'every loss or change became non-finite; lower --fit_rate or load the model'
    ' with --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class SpecialToken(base.Need):
  """The id of a special token, 'eos' or 'bos'; None where a model has none."""

  name: str

  def provide(self, model: Any, seed: int, progress: Progress) -> int | None:
    del seed, progress
    tokenizer = model.tokenizer or tokenizer_lib.load_tokenizer(model.folder)
    return getattr(tokenizer, f'{self.name}_token_id')


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(MethodConfig):
  """Settings of all methods that fit parameters to targets.

  Attributes:
    scored: 'target' scores every token of the target behind the ones before
      it, 'prompt_last' all of them behind the prompt.
    by_token: whether every token of a minibatch counts the same, or every edit.
    layers: layers to edit, ascending.
    epochs: passes over the edits of a joint batch, each an update a minibatch.
    rate: Adam's learning rate.
    stop_loss: see `gradient.fit`, nats.
    minibatch: edits an update.
    append_end: the end-of-text token is part of a target that has none.
    activations: dtype of activations, if wider than the weights; see
      `ModelSpec`.
    side_by_side: independent edits fitted at once, at most.
  """

  scored: ClassVar[str] = 'target'
  by_token: ClassVar[bool] = False
  layers: tuple[int, ...] = setting(
      (21,), 'layers to edit, ascending', source='EasyEdit'
  )
  epochs: int = setting(
      25,
      'passes over all edits, each an update a minibatch',
      source='EasyEdit',
      low=1,
      flag='fit_steps',
  )
  rate: float = setting(
      5e-4, 'learning rate of Adam', source='EasyEdit', low=0, flag='fit_rate'
  )
  stop_loss: float = setting(
      0.01,
      'an edit stops below this loss; 0 never',
      unit='nats',
      source='ROME, published code',
      low=0,
      flag='fit_stop_loss',
  )
  minibatch: int = setting(
      100, 'edits of a joint batch that share an update', low=1
  )
  append_end: bool = setting(
      False, 'end-of-text is part of a target that does not end in it'
  )
  activations: str = setting(
      'float32',
      'dtype of activations while parameters are fitted, where weights are'
      ' bfloat16',
      choices=('float32', 'bfloat16'),
  )
  side_by_side: int = setting(
      16, 'independent edits fitted at once, at most', low=1
  )

  errors = TargetedConfig.errors

  @property
  def seed(self) -> int:
    """Seed of noise."""
    return 0

  def fitted(self, spec: ModelSpec) -> loop.Fitted:
    """What is fitted in a model."""
    raise NotImplementedError


class State(NamedTuple):
  """What an editor keeps.

  Attributes:
    end: [] int32 the end-of-text token; -1 where none is appended.
    begin: [] int32 the token that stands before every text; -1 where it is no
      target.
    values: what later batches go on from; () where each begins anew.
  """

  end: np.ndarray
  begin: np.ndarray
  values: Any = ()


class Parts(NamedTuple):
  """What a method adds to `finetune_editor`.

  Attributes:
    init: (model) -> values that the state begins with.
    start: (model, state) -> (values of one edit, what `Fitted` takes besides).
    deltas: (values [n, ...] or [n, groups, ...]) -> the deltas they mean.
    size: numbers among the values of one edit.
    continues: whether the next batch goes on from the values of this one.
  """

  init: Callable[[Any], Any]
  start: Callable[[Any, State], tuple[Any, Any]]
  deltas: Callable[[Any], tuple[SiteDelta, ...]]
  size: int
  continues: bool = False


def finetune_editor(
    spec: ModelSpec,
    config: FinetuneConfig,
    parts: Parts,
    *,
    trains_begin: bool = False,
) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.
    parts: what the method adds.
    trains_begin: the token before every text is the first target.

  Returns:
    The editor; leaves of independent edits are numpy arrays, as they need not
    fit the device.

  Raises:
    InputError: a layer or site that the model lacks.
  """
  base.check_layers(spec, config.layers)
  fitted = config.fitted(spec)
  check_sites(spec, fitted.sites, fitted.layers)
  needs: tuple[base.Need, ...] = ()
  if config.append_end:
    needs += (SpecialToken('eos'),)
  if trains_begin:
    needs += (SpecialToken('bos'),)

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    named = {need.name: resources[need] for need in needs}
    token = lambda i: np.int32(-1 if i is None else i)
    return State(
        token(named.get('eos')), token(named.get('bos')), parts.init(model)
    )

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    edits = batch.encoded
    if not edits:
      return base.EditResult(Edited(), state, _info([], {}, 0.0))
    begin = time.monotonic()
    examples = [_example(config.scored, state, one) for one in edits]
    _check_lengths(spec, edits, examples)
    start = parts.start(model, state)
    exact = dataclasses.replace(spec, activations=config.activations)
    model = dataclasses.replace(model, spec=exact)
    fitting = _Fitting(model, config, fitted, start, examples)
    fitting.fit_all(batch.groups.tolist(), run.progress)
    info = _info(
        fitting.written.tolist(), fitting.per_edit, time.monotonic() - begin
    )
    if batch.joint and parts.continues and info.written.any():
      values = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), fitting.values)
      state = state._replace(values=values)
    edited = batch.edited(parts.deltas(fitting.values), on_host=True)
    return base.EditResult(edited, state, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del model, edits
    return 4 * parts.size

  return base.Editor(
      needs, init, edit, bytes_of=bytes_of, cumulative=parts.continues
  )


def check_sites(
    spec: ModelSpec, sites: Sequence[str], layers: Sequence[int]
) -> None:
  """Refuses linear maps that a model, or one of its layers, does not have.

  Raises:
    InputError: unknown, or none.
  """
  ending = '/kernel'
  known = {
      path.removeprefix('layers/').removesuffix(ending): shape[0]
      for path, shape in param_shapes(spec).items()
      if path.startswith('layers/') and path.endswith(ending)
  }
  wrong = [site for site in sites if site not in known]
  if wrong or not sites or len(set(sites)) < len(sites):
    raise InputError(
        f'sites {list(sites)}: the linear maps of a layer are'
        f' {", ".join(known)}; choose from these, each once'
    )
  for site in sites:
    first = spec.layers - known[site]
    if lower := [layer for layer in layers if layer < first]:
      raise InputError(
          f'{site} of layer {lower[0]}: the layers {first} to {spec.layers - 1}'
          ' alone have this map; choose from these (--layers)'
      )


def _example(scored: str, state: State, edit: EncodedEdit) -> Example:
  """What an edit's plain prompt shall be followed by."""
  prompt, target = edit.rows[0], edit.target
  if state.end >= 0 and target[-1] != state.end:
    target = np.append(target, state.end).astype(np.int32)
  if scored == 'prompt_last':
    if state.begin >= 0 and prompt[0] == state.begin:
      target = np.append(state.begin, target).astype(np.int32)
    return Example(prompt, len(prompt) - 1, target[None])
  ids = np.concatenate([prompt, target[:-1]])
  return Example(ids, len(prompt) - 1, target[:, None])


def _check_lengths(
    spec: ModelSpec, edits: Sequence[EncodedEdit], examples: Sequence[Example]
) -> None:
  problems = [
      f'record {edit.number}: prompt and target take {len(one.ids)} tokens, the'
      f' model takes {spec.max_positions}; shorten them'
      for edit, one in zip(edits, examples)
      if len(one.ids) > spec.max_positions
  ]
  InputError.raise_for(problems)


def _info(
    written: Sequence[bool], per_edit: Mapping[str, Any], seconds: float
) -> base.Info:
  values = {
      name: base.json_numbers(per_edit.get(name, ()))
      for name in ('loss_before', 'loss')
  }
  values['steps'] = [int(x) for x in per_edit.get('steps', ())]
  return base.Info(
      np.array(written, bool),
      {'optimize': seconds},
      values,
      reason='' if any(written) or not written else _NOTHING,
  )


class _Fitting:
  """Fits groups, some at a time, and collects their values on the host.

  Attributes:
    values: [n, groups, ...] of all groups; those that failed are as they began.
    written: [E] bool, edits that are part of them.
    per_edit: name -> [E]; losses are means of a target token, nats.
  """

  def __init__(
      self,
      model: Any,
      config: FinetuneConfig,
      fitted: loop.Fitted,
      start: tuple[Any, Any],
      examples: Sequence[Example],
  ):
    self._model, self._config, self._fitted = model, config, fitted
    self._start, self._fixed = start
    self._examples = examples
    count = len(examples)
    self.written = np.ones(count, bool)
    losses = {name: np.full(count, np.nan) for name in ('loss_before', 'loss')}
    self.per_edit = {**losses, 'steps': np.zeros(count, np.int32)}

  def fit_all(self, group: Sequence[int], progress: Progress) -> None:
    """Fits all groups; [E] the group of each edit."""
    jobs: list[list[int]] = [[] for _ in range(max(group) + 1)]
    for i, number in enumerate(group):
      jobs[number].append(i)
    self.values = jax.tree.map(
        lambda x: np.repeat(np.asarray(x)[:, None], len(jobs), axis=1),
        self._start,
    )
    with progress('fit', len(group), 'edit') as advance:
      for some in self._slabs(dict(enumerate(jobs))):
        self._fit(some)
        advance(sum(map(len, some.values())))

  def _slabs(self, jobs: Mapping[int, Sequence[int]]) -> list[dict[int, Any]]:
    """Cuts groups into slabs of like sizes; group -> its edits."""
    jobs = {number: some for number, some in jobs.items() if some}
    size = lambda g: sum(len(self._examples[i].ids) for i in jobs[g])
    found = []
    for count in sorted({self._minibatches(some) for some in jobs.values()}):
      order = [g for g in jobs if self._minibatches(jobs[g]) == count]
      order.sort(key=size)
      slabs = -(-len(order) // self._side(jobs[order[-1]]))
      side = -(-len(order) // slabs)
      found += [
          {g: jobs[g] for g in order[first : first + side]}
          for first in range(0, len(order), side)
      ]
    return found

  def _side(self, largest: Sequence[int]) -> int:
    """Groups side by side, so many as fit the memory."""
    free = self._model.placement.budget_bytes
    if free is None:
      return self._config.side_by_side
    spec, some = self._model.spec, largest[: self._config.minibatch]
    heads = spec.head_size * (spec.heads + 2 * spec.kv_heads)
    token = heads + 3 * spec.width + (2 + spec.gated) * spec.mlp_width
    tokens = sum(len(self._examples[i].ids) for i in some)
    outputs = sum(len(self._examples[i].labels) for i in some)
    if spec.encoder_layers:  # kept keys and values of sources
      token += 2 * spec.kv_heads * spec.head_size
    layers = spec.layers - self._fitted.layers[0]
    values = sum(x.nbytes for x in jax.tree.leaves(self._start))
    each = 4 * (layers * token * tokens + 3 * spec.vocab * outputs)
    count = int(_MEMORY_SHARE * free / (each + _COPIES * values))
    return max(1, min(self._config.side_by_side, count))

  def _minibatches(self, edits: Sequence[int]) -> int:
    return -(-len(edits) // self._config.minibatch)

  def _fit(self, jobs: Mapping[int, Sequence[int]]) -> None:
    """Fits one slab."""
    fitted, fixed = self._fitted, self._fixed
    spec_params = self._model.spec, self._model.params
    size = self._config.minibatch
    cut = {
        g: [some[i : i + size] for i in range(0, len(some), size)]
        for g, some in jobs.items()
    }
    packed = self._pack(list(cut.values()))
    entry, before = loop.enter(*spec_params, fitted, packed)
    self._note('loss_before', cut, before)
    known = np.isfinite(self.per_edit['loss_before'])
    bad = {i for some in jobs.values() for i in some if not known[i]}
    if bad:
      self.written[list(bad)] = False
      rest = {g: [i for i in some if i not in bad] for g, some in jobs.items()}
      for some in self._slabs(rest):
        self._fit(some)
      return
    config = self._config
    rule = loop.Rule(config.epochs, config.rate, config.stop_loss, config.seed)
    fit, after = loop.fit_groups(
        *spec_params, fitted, self._start, fixed, packed, entry, rule
    )
    self._note('loss', cut, after)
    self._collect(jobs, fit)

  def _pack(self, cut: Sequence[Sequence[Sequence[int]]]) -> Any:
    groups = [[[self._examples[i] for i in some] for some in g] for g in cut]
    shape = examples_lib.shape_of(groups, len(groups))
    return examples_lib.pack_groups(groups, shape, self._config.by_token)

  def _note(self, name: str, cut: Mapping[int, Any], found: Any) -> None:
    """Notes what is known of every text, [groups, minibatches, B]."""
    for mine, minibatches in zip(fetch(found), cut.values()):
      for row, some in zip(mine, minibatches):
        self.per_edit[name][list(some)] = row[: len(some)]

  def _collect(self, jobs: Mapping[int, Sequence[int]], fit: Any) -> None:
    """Puts the values of a slab in their place."""
    values, losses, steps = jax.tree.map(fetch, fit)
    sound = np.isfinite(losses)
    for leaf in jax.tree.leaves(values):
      sound &= np.isfinite(leaf).all(tuple(range(1, leaf.ndim)))
    for number, (g, some) in enumerate(jobs.items()):
      self.per_edit['steps'][list(some)] = steps[number]
      if not sound[number]:
        self.written[list(some)] = False
        continue

      leaves = map(jax.tree.leaves, (self.values, values))
      for whole, part in zip(*leaves):
        whole[:, g] = part[number]
