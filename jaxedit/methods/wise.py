"""WISE: an edited copy of one linear map, which only some prompts read.

  a(row) = mean over tokens of |g(y) - g(y + x W_s)|   x, y: input, output of the
                                                       map; g: the activation
  L      = nll of the target
         + mean+(a_out - a_in + gamma) + mean+(a_out - alpha) + mean+(beta - a_in)
  W_s   <- clip(W_s - rate * M o (grad L + decay (W + W_s)))

in: the edit's own prompts, out: irrelevant texts, mean+ the mean of the positive
entries, M a Bernoulli(rho) mask over the entries of the matrix. Edits are made
one after the other in one shard W_s; every `save_every` edits a new shard with a
new mask is begun, and full shards are merged (`ties`). A prompt reads the shard
that moves its outputs most, if that is above `act_ratio` times the least a_in of
the shard's edits (`deltas.Routed`).

Layers up to the map run once an edit; irrelevant texts run nothing above it.

Axis letters: C rows (contexts of an edit), R irrelevant rows, T tokens of a row,
n foretelling tokens of a row, S shards, F and D input and output width.

Source: Wang et al. 2024, "WISE" (arXiv 2405.14768); margins of pairs and TIES as
in EasyEdit. Unlike that code, rows have lengths of their own, the mean loss of a
row counts its target tokens (there, one more), decay moves no entry outside the
mask, and the prompt alone decides, once, for every prompt of a batch. a_in is
taken over prompts, which is what the router sees; there over prompts and
targets. `parity` brings back all but the routing.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import io
from jaxedit.batching.buckets import round_up
from jaxedit.batching.plan import BatchPlan
from jaxedit.deltas import ACTIVATIONS, Edited, Routed
from jaxedit.edited import ledger as ledger_lib
from jaxedit.methods import base, patches
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.settings import setting
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import einsum, wide
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, InputError, Params, Tap

SITE = 'mlp/down'
# Tokens of an irrelevant text that are read.
_LONGEST = 64
# Training ends where the loss also moves less than this in one update.
_STANDS = 1e-4
_FULL = 'all shards are full; give more (--shards) or raise --save_every'
_NOT_FINITE = (
    'every loss became non-finite; lower --side_rate or load the model with'
    ' --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class WiseConfig(MethodConfig):
  """Settings of WISE; the defaults are those published for GPT-J.

  Attributes:
    layers: the layer of the map, one.
    rate: learning rate of plain gradient descent.
    steps: updates an edit at most.
    decay: weight decay of the whole weight, W + W_s.
    stop: training ends below this loss, once it stands still.
    bound: largest change of an entry.
    alpha: largest a_out that costs nothing.
    beta: least a_in that costs nothing.
    gamma: least a_in - a_out that costs nothing.
    mask_share: rho, the share of entries that a shard may change.
    act_ratio: threshold of a shard over the least a_in of its edits.
    save_every: edits a shard.
    merge_shards: full shards that become one; 0 never merges.
    merge_density: share of entries that a shard brings into a merge.
    shards: shards at most.
    irrelevant_rows: irrelevant texts an edit.
    seed: of masks.
    counts_one_more: divide a row's loss by its target tokens + 1, as published.
    decays_all: decay entries outside the mask too, as published.
    whole_rows: take a_in over prompts with their targets, as published.
  """

  layers: tuple[int, ...] = setting(
      (21,), 'layer of the side map', source='GPT-J, EasyEdit'
  )
  rate: float = setting(
      1.0, 'learning rate of the side map', source='GPT-J', low=0,
      flag='side_rate',
  )  # fmt: skip
  steps: int = setting(
      70, 'updates an edit at most', source='GPT-J', low=1, flag='side_steps'
  )
  decay: float = 1e-5
  stop: float = setting(
      0.02, 'an edit stops below this loss, once it stands still', unit='nats',
      source='EasyEdit', low=0, flag='side_stop_loss',
  )  # fmt: skip
  bound: float = setting(
      1.0, 'largest change of an entry of the side map', source='EasyEdit',
      low=0, exclusive=True, flag='side_bound',
  )  # fmt: skip
  alpha: float = setting(
      15.0, 'activation gap that irrelevant texts may have (alpha)',
      source='GPT-J', low=0, flag='gap_irrelevant',
  )  # fmt: skip
  beta: float = setting(
      40.0, 'activation gap that an edit shall have (beta)', source='GPT-J',
      low=0, flag='gap_edit',
  )  # fmt: skip
  gamma: float = setting(
      20.0, 'margin between the two gaps (gamma)', source='GPT-J', low=0,
      flag='gap_margin',
  )  # fmt: skip
  mask_share: float = setting(
      0.2, 'share of entries that a shard may change', source='EasyEdit',
      low=0, high=1, exclusive=True,
  )  # fmt: skip
  act_ratio: float = setting(
      0.88, 'threshold of a shard, as a share of the least gap of its edits',
      source='GPT-J', low=0,
  )  # fmt: skip
  save_every: int = setting(500, 'edits a shard', source='EasyEdit', low=1)
  merge_shards: int = setting(
      2, 'full shards that are merged into one; 0 keeps them', source='EasyEdit',
      low=0,
  )  # fmt: skip
  merge_density: float = 0.53
  shards: int = setting(4, 'shards of the side map at most', low=1)
  irrelevant_rows: int = setting(
      1, 'texts of --preserve that an edit is kept off', source='EasyEdit',
      low=1,
  )  # fmt: skip
  seed: int = 42
  counts_one_more: bool = False
  decays_all: bool = False
  whole_rows: bool = False


class State(NamedTuple):
  """All shards so far, on the host, and the irrelevant texts.

  Attributes:
    shards: [S, F, D] changes; unused ones are zero.
    least: [S] least a_in of a shard's edits; infinite where it is unused.
    used: [] int32 shards in use, the last of them the one in training.
    count: [] int32 edits written.
    texts: [N, T'] int32 irrelevant texts, their beginnings.
    lengths: [N] int32.
    names: of every shard in use, ids of its edits, see `edited.ledger`.
  """

  shards: np.ndarray
  least: np.ndarray
  used: np.ndarray
  count: np.ndarray
  texts: np.ndarray
  lengths: np.ndarray
  names: np.ndarray = ledger_lib.NO_NAMES


class Rows(NamedTuple):
  """Texts as they enter and leave the map; constant while it is trained.

  Attributes:
    x: [B, T, F] its input.
    y: [B, T, D] its output.
    out: [B, T, D] output of its block.
    counted: [B, T] bool, tokens over which a row's a is a mean.
    valid: [B, T] bool.
  """

  x: Array
  y: Array
  out: Array
  counted: Array
  valid: Array


class Labels(NamedTuple):
  """What rows must foretell.

  Attributes:
    index: [C, n] int32 column of the foretelling token.
    label: [C, n] int32.
    mask: [C, n] bool.
  """

  index: Array
  label: Array
  mask: Array


class Losses(NamedTuple):
  """The parts of a loss: its value, the target's, [C] a_in, [R] a_out."""

  loss: Array
  nll: Array
  inside: Array
  outside: Array


@functools.partial(jax.jit, static_argnames=('spec', 'layer'))
def read(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    valid: Array,
    counted: Array,
    *,
    layer: int,
) -> Rows:
  """Runs texts up to the map's block.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32.
    valid: [B, T] bool.
    counted: [B, T] bool, see `Rows`.
    layer: of the map.

  Returns:
    The rows.
  """
  layout = decoder.token_layout(valid)
  h = decoder.embed(spec, params, tokens, layout)
  taps = Tap(SITE, (layer,)), Tap('mlp', (layer,))
  out, (x, y) = decoder.run_layers(
      spec, params, h, layout, start=0, stop=layer + 1, taps=taps
  )
  exact = lambda z: jnp.where(valid[..., None], z.astype(wide(z.dtype)), 0)
  return Rows(exact(x[0]), exact(y[0]), exact(out), counted, valid)


def gaps(activation: str, rows: Rows, shard: Array) -> tuple[Array, Array]:
  """Measures how far a shard moves the map's output.

  Args:
    activation: g, a name in `deltas.ACTIVATIONS`.
    rows: B texts.
    shard: [F, D].

  Returns:
    ([B] a, [B, T, D] x W_s). The gradient of a length is 0 where it is 0.
  """
  act = ACTIVATIONS[activation]
  moved = einsum('btf,fd->btd', rows.x, shard)
  square = jnp.sum(jnp.square(act(rows.y + moved) - act(rows.y)), axis=-1)
  some = square > 0
  length = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
  count = jnp.maximum(jnp.sum(rows.counted, axis=-1), 1)
  return jnp.sum(jnp.where(rows.counted, length, 0), axis=-1) / count, moved


def _positive_mean(x: Array) -> Array:
  """Mean of the positive entries, 0 without any."""
  return jnp.sum(jnp.where(x > 0, x, 0)) / jnp.maximum(jnp.sum(x > 0), 1)


def loss_of(
    spec: ModelSpec,
    params: Params,
    config: WiseConfig,
    shard: Array,
    own: tuple[Rows, Labels],
    irrelevant: Rows,
) -> Losses:
  """The loss of one edit.

  Args:
    spec: the architecture.
    params: canonical parameters.
    config: settings.
    shard: [F, D].
    own: the edit's C rows, and what they must foretell.
    irrelevant: R rows.

  Returns:
    The loss and its parts.
  """
  rows, labels = own
  (layer,) = config.layers
  inside, moved = gaps(spec.activation, rows, shard)
  outside, _ = gaps(spec.activation, irrelevant, shard)
  h, layout = rows.out + moved, decoder.token_layout(rows.valid)
  h, _ = decoder.run_layers(
      spec, params, h, layout, start=layer + 1, stop=spec.layers
  )
  h = jnp.take_along_axis(h, labels.index[..., None], axis=1)
  logprob, _ = decoder.label_logprob(spec, params, h, labels.label)
  total = -jnp.sum(jnp.where(labels.mask, logprob, 0), axis=-1)
  count = jnp.sum(labels.mask, axis=-1) + config.counts_one_more
  nll = jnp.mean(total / count)
  loss = nll + _positive_mean(outside[:, None] - inside + config.gamma)
  loss += _positive_mean(outside - config.alpha)
  loss += _positive_mean(config.beta - inside)
  return Losses(loss, nll, inside, outside)


@functools.partial(jax.jit, static_argnames=('spec', 'config'))
def fit(
    spec: ModelSpec,
    params: Params,
    shard: Array,
    mask: Array,
    own: tuple[Rows, Labels],
    irrelevant: Rows,
    *,
    config: WiseConfig,
) -> tuple[Array, Losses, Array, Array]:
  """Trains one edit into a shard.

  Args:
    spec: the architecture.
    params: canonical parameters.
    shard: [F, D] the shard so far.
    mask: [F, D] bool, entries that may change.
    own: see `loss_of`.
    irrelevant: see `loss_of`.
    config: settings.

  Returns:
    (the shard, unchanged where it is not finite; the loss there; [] updates; []
    bool, whether all is finite).
  """
  (layer,) = config.layers
  kernel = params['layers']['mlp']['down']['kernel'][layer].astype(shard.dtype)

  def loss(shard: Array) -> tuple[Array, Losses]:
    found = loss_of(spec, params, config, shard, own, irrelevant)
    return found.loss, found

  def step(now: tuple[Array, Array, Array, Array]) -> Any:
    shard, before, count, _ = now
    (value, _), grad = jax.value_and_grad(loss, has_aux=True)(shard)
    done = (jnp.abs(value - before) <= _STANDS) & (value <= config.stop)
    decay = config.decay * (kernel + shard)
    if not config.decays_all:
      decay = jnp.where(mask, decay, 0)
    update = jnp.where(mask, grad, 0) + decay
    moved = jnp.clip(shard - config.rate * update, -config.bound, config.bound)
    return jnp.where(done, shard, moved), value, count + ~done, done

  start = (shard, jnp.full([], jnp.inf, shard.dtype), jnp.int32(0), False)
  start = jax.tree.map(jnp.asarray, start)
  goes_on = lambda now: (now[2] < config.steps) & ~now[3]
  trained, _, count, _ = jax.lax.while_loop(goes_on, step, start)
  _, found = loss(trained)
  finite = jnp.isfinite(found.loss) & jnp.all(jnp.isfinite(trained))
  return jnp.where(finite, trained, shard), found, count, finite


@functools.partial(jax.jit, static_argnames=('shape', 'share'))
def mask_of(seed: Array, number: Array, *, shape: Any, share: float) -> Array:
  """Draws the mask of the shard that has a number, [F, D] bool."""
  key = jax.random.fold_in(jax.random.key(seed), number)
  return jax.random.uniform(key, shape, jnp.float32) < share


def ties(shards: np.ndarray, density: float) -> np.ndarray:
  """Merges shards: trim, elect signs, mean of those that agree.

  Args:
    shards: [K, F, D] changes.
    density: share of its entries, the largest, that a shard keeps.

  Returns:
    [F, D]. An entry is the mean of the kept entries that have the sign of their
    sum (that of a sum of 0 is +), 0 without any.

  Source: Yadav et al. 2023 (TIES, arXiv 2306.01708), weights all alike.
  """
  flat = shards.reshape(len(shards), -1)
  count = max(1, int(density * flat.shape[1]))
  size = np.abs(flat)
  bound = np.partition(size, -count, axis=1)[:, -count, None]
  kept = np.where(size >= bound, flat, 0)
  sign = np.where(kept.sum(axis=0) >= 0, 1, -1)
  agrees = np.sign(kept) == sign
  total = np.where(agrees, kept, 0).sum(axis=0)
  merged = total / np.maximum(agrees.sum(axis=0), 1)
  return merged.astype(shards.dtype).reshape(shards.shape[1:])


class _Memory:
  """The shards of one group as its edits are made."""

  def __init__(self, state: State, config: WiseConfig):
    used = int(state.used)
    self.shards = list(state.shards[:used])
    self.least = [float(x) for x in state.least[:used]]
    self.count = int(state.count)
    self.names = ledger_lib.names_of(state.names) or [[] for _ in self.shards]
    self._config, self._empty = config, state.shards[0].shape
    self._dtype = state.shards.dtype

  @property
  def begins(self) -> bool:
    """Whether the next edit begins a shard."""
    return self.count % self._config.save_every == 0

  @property
  def full(self) -> bool:
    return self.begins and len(self.shards) == self._config.shards

  def next(self) -> tuple[Any, Array]:
    """(the shard that the next edit is trained in, its mask)."""
    config = self._config
    number = np.uint32(self.count // config.save_every)
    mask = mask_of(
        np.uint32(config.seed), number,
        shape=self._empty, share=config.mask_share,
    )  # fmt: skip
    if self.begins:
      return np.zeros(self._empty, self._dtype), mask
    return self.shards[-1], mask

  def put(self, shard: Any, inside: float, name: str | None) -> None:
    """Keeps a trained edit; merges full shards where it is time."""
    config = self._config
    if self.begins:
      self.shards.append(shard)
      self.least.append(inside)
      self.names.append([])
    else:
      self.shards[-1] = shard
      self.least[-1] = min(self.least[-1], inside)
    self.names[-1] += [] if name is None else [name]
    self.count += 1
    several = config.merge_shards
    if several < 2 or self.count % (several * config.save_every):
      return
    last = np.stack([np.asarray(x) for x in self.shards[-several:]])
    self.shards[-several:] = [ties(last, config.merge_density)]
    self.least[-several:] = [min(self.least[-several:])]
    self.names[-several:] = [sum(self.names[-several:], [])]

  def state(self, state: State) -> State:
    """The state after these edits."""
    shards, least = self.padded(len(state.shards))
    used, count = np.int32(len(self.shards)), np.int32(self.count)
    names = state.names
    if any(self.names):
      names = ledger_lib.with_names(ledger_lib.NO_NAMES, self.names)
    return state._replace(
        shards=shards, least=least, used=used, count=count, names=names
    )

  def padded(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(shards [size, F, D], least [size])."""
    shards = np.zeros((size, *self._empty), self._dtype)
    least = np.full(size, np.inf, self._dtype)
    for i, (shard, low) in enumerate(zip(self.shards, self.least)):
      shards[i], least[i] = shard, low
    return shards, least


def _own(
    edit: EncodedEdit, plan: BatchPlan, config: WiseConfig
) -> tuple[tuple[np.ndarray, ...], Labels]:
  """((tokens, valid, counted) [C, T], labels) of an edit, shaped by a plan."""
  count, width = plan.contexts, plan.unshared_prompts.text[2]
  most = min(width, round_up(max(shape.labels for shape in plan.shapes)))
  tokens = np.zeros((count, width), np.int32)
  valid, counted = np.zeros((2, count, width), bool)
  index, label = np.zeros((2, count, most), np.int32)
  mask = np.zeros((count, most), bool)
  for c in range(count):
    ids, stage = edit.text(c), edit.stage(0, c)
    n, prompt = len(stage.labels), len(edit.rows[c])
    tokens[c, : len(ids)], valid[c, : len(ids)] = ids, True
    counted[c, : len(ids) if config.whole_rows else prompt] = True
    index[c, :n] = stage.first + np.arange(n)
    label[c, :n], mask[c, :n] = stage.labels, True
  return (tokens, valid, counted), Labels(index, label, mask)


def wise(spec: ModelSpec, config: WiseConfig) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. It needs irrelevant texts. Its edit is `Routed`, all shards so
    far; edits of a batch are made one after the other, independent ones each in
    shards of their own. An edit whose loss is not finite is not written.

  Raises:
    InputError: not exactly one layer, or one that the model lacks.
  """
  base.check_layers(spec, config.layers)
  if len(config.layers) != 1:
    raise InputError(
        f'layers {list(config.layers)}: the side map is in one layer; name one'
    )

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    texts = resources[base.PreservedTexts()]
    dtype = wide(model.params['embed']['embedding'].dtype)
    lengths = np.array([min(len(ids), _LONGEST) for ids in texts], np.int32)
    tokens = np.zeros((len(texts), round_up(max(lengths))), np.int32)
    for row, (ids, length) in enumerate(zip(texts, lengths)):
      tokens[row, :length] = ids[:length]
    shards = np.zeros((config.shards, spec.mlp_width, spec.width), dtype)
    least = np.full(config.shards, np.inf, dtype)
    return State(shards, least, np.int32(0), np.int32(0), tokens, lengths)

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    begin, edits = time.monotonic(), batch.encoded
    joint = batch.joint or not edits
    count = max(batch.groups, default=0) + 1
    memories = [_Memory(state, config) for _ in range(count)]
    train = functools.partial(
        _train, spec, model.params, config, state, batch.plan
    )
    full, found = False, []
    names = [one.id for one in batch.requests] or [None] * len(edits)
    with run.progress('fit', len(edits), 'edit') as advance:
      for one, number, name in zip(edits, batch.groups, names):
        memory = memories[number]
        full |= memory.full
        found.append(None if memory.full else train(one, memory, name))
        advance(1)
    written = np.array([one is not None and one.finite for one in found], bool)
    reason = _FULL if full else _NOT_FINITE
    info = base.Info(
        written,
        {'fit': time.monotonic() - begin},
        _reports(found),
        reason='' if written.any() or not found else reason,
    )
    if joint and edits:
      state = memories[0].state(state)
    return base.EditResult(_edited(spec, config, memories, joint), state, info)

  def bytes_of(model: Any, edits: Sequence[Any]) -> int:
    del model
    shards = -(-len(edits) // config.save_every)
    return 4 * spec.mlp_width * spec.width * shards

  needs = (base.PreservedTexts(),)
  return base.Editor(
      needs, init, edit, bytes_of=bytes_of, cumulative=True, ordered=True
  )


class _Trained(NamedTuple):
  """What training one edit came to, on the host."""

  losses: Losses
  steps: int
  finite: bool


def _train(
    spec: ModelSpec,
    params: Params,
    config: WiseConfig,
    state: State,
    plan: BatchPlan,
    edit: EncodedEdit,
    memory: _Memory,
    name: str | None,
) -> _Trained:
  """Trains one edit into a memory, under its id."""
  (layer,) = config.layers
  texts, labels = _own(edit, plan, config)
  own = read(spec, params, *texts, layer=layer)
  # The draw depends on the edit alone, not on its place in a batch.
  rng = np.random.default_rng(patches.seed_of(edit))
  drawn = np.resize(rng.permutation(len(state.lengths)), config.irrelevant_rows)
  tokens = state.texts[drawn]
  valid = np.arange(tokens.shape[1]) < state.lengths[drawn, None]
  irrelevant = read(spec, params, tokens, valid, valid, layer=layer)
  shard, mask = memory.next()
  shard, losses, steps, finite = fit(
      spec, params, shard, mask, (own, labels), irrelevant, config=config
  )
  losses = jax.tree.map(fetch, losses)
  if finite:
    memory.put(shard, float(losses.inside.mean()), name)
  return _Trained(losses, int(steps), bool(finite))


def _edited(
    spec: ModelSpec,
    config: WiseConfig,
    memories: Sequence[_Memory],
    joint: bool,
) -> Edited:
  """The edit of one memory, or of several side by side."""
  size = None if joint else len(memories)
  most = max(len(one.shards) for one in memories)
  if not most:
    return Edited(size=size)
  stack = (lambda x: x[0]) if joint else np.stack
  shards, least = (stack(x) for x in zip(*(m.padded(most) for m in memories)))
  leaves = (jnp.asarray(x)[None] for x in (shards, config.act_ratio * least))
  routed = Routed(config.layers, SITE, *leaves, activation=spec.activation)
  names = memories[0].names if joint else []
  groups = [[ids, i, i + 1] for i, ids in enumerate(names)]
  ledger = ledger_lib.of_groups(groups) if groups and all(names) else None
  return Edited((routed,), size=size, ledger=ledger)


def _reports(found: Sequence[_Trained | None]) -> dict[str, list[Any]]:
  """Values by edit, as plain JSON types; None of an edit without a shard."""

  losses = [one and one.losses for one in found]
  each = lambda value: [x and io.json_number(value(x)) for x in losses]
  return {
      'loss': each(lambda x: x.loss),
      'likelihood': each(lambda x: x.nll),
      'gap_edit': each(lambda x: x.inside.mean()),
      'gap_irrelevant': each(lambda x: x.outside.max()),
      'steps': [one.steps if one else 0 for one in found],
  }


METHOD = base.Method(
    'wise',
    'a side copy of one map, read by prompts that it moves, for a stream',
    WiseConfig,
    wise,
    chunkable=False,
    parity={
        'easyedit': dict(counts_one_more=True, decays_all=True, whole_rows=True)
    },
    source='arXiv 2405.14768',
    small={
        'layers': (1,),
        'side_steps': 6,
        'side_rate': 2.0,
        'gap_irrelevant': 0.1,
        'gap_edit': 0.4,
        'gap_margin': 0.2,
        'act_ratio': 0.5,
        'shards': 2,
    },
)
