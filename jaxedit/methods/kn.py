"""KN: knowledge neurons, found by integrated gradients; their rows are rewritten.

  a_{l,i} = w_i / m  sum_k dP(y | w_l := s_k w_l) / dw_i

is what neuron i of layer l adds to the probability P of an answer token y: w_l
is the MLP's inner activation at the token that foretells y, s_k are m shares of
it, all other layers are computed as they come.

  paper     w is the input of 'mlp/down', s_k = k / m, k = 0 .. m - 1; a token of
            the answer is foretold after those before it
  easyedit  w is the input of the activation function, s_k from 0 to 1 with both
            ends; all tokens of the answer are scored at the prompt's last token

Attributions are averaged over the answer's tokens. A prompt's neurons are those
above `threshold` times its largest attribution; an edit's are those of at least
a share of its prompts (contexts). Then, with W_i the row of 'mlp/down' and e the
sum of a text's input embeddings,

  edit      W_i += |W_i| (c_new e_new / |e_new| - c_old e_old / |e_old|)
  erase     W_i := 0

Scaling w at one token changes nothing at earlier ones, so the gradient needs one
token a (layer, share), run from the layer on over the prefix's constant keys and
values. All of them are branches of one prompt: tokens at the same position that
do not see each other. The gradient for the output of the MLP comes first; only
then is it taken back to w.

Axis letters as in `jaxedit.types`; K shares, m of them; B prompts with one
answer token each; I neurons of an edit at most.

Source: Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers" (arXiv
2104.08696). Not here: statistics over a relation (its common neurons are not
left out, the sharing threshold is moved for each edit by itself), the check that
the model holds the old answer, and the greedy continuation after which published
ports score later tokens of Llama.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxedit import sources
from jaxedit.batching import packer
from jaxedit.batching.buckets import POWERS, round_up
from jaxedit.deltas import ACTIVATIONS, Edited, LowRank
from jaxedit.methods import base
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.settings import setting
from jaxedit.models import blocks, decoder
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.placement import fetch
from jaxedit.text.encoding import EncodedEdit
from jaxedit.text.locate import Continued
from jaxedit.text.token_cache import token_cache
from jaxedit.types import (
    PADDING,
    SHARED,
    Array,
    InputError,
    Params,
    Tap,
    TokenLayout,
)

SITE = 'mlp/down'
# Prompts at a time, and parts of the layers that are entered at one layer: its
# branches run all layers from there on.
_PROMPTS, _PARTS = 4, 3
# A neuron that is shared counts in so many prompts at least.
_LEAST = 3
# Neurons of an edit that are wanted, and how the share moves towards them.
_WANTED, _MOVE, _MOVES = (2, 5), 0.05, 6
# Neurons of an edit in one layer, as its memory is estimated.
_ROWS = 16
_NO_NEURONS = (
    'no neuron counts in enough contexts; lower --sharing_threshold or'
    ' --attribution_threshold'
)
_NOT_FINITE = (
    'every attribution became non-finite; load the model with --dtype=float32'
)


@dataclasses.dataclass(frozen=True)
class KnConfig(MethodConfig):
  """Settings of KN.

  Attributes:
    quantity: which w and s_k, see the module head.
    steps: m.
    threshold: share of a prompt's largest attribution.
    sharing: share of the prompts that must share a neuron; 0 for the plain
      prompt alone.
    change: 'edit' or 'erase'.
    old_weight: c_old.
    new_weight: c_new.
    row_norms: whether embeddings are scaled to the norm of the row.
    limit: I.
  """

  quantity: str = setting(
      'paper',
      'activation that is integrated: behind the activation function (paper) or'
      ' before it (easyedit)',
      choices=('paper', 'easyedit'), flag='attribution',
  )  # fmt: skip
  steps: int = setting(
      20, 'points of the integral', source='KN', low=1, flag='attribution_steps'
  )
  threshold: float = setting(
      0.2,
      "share of a prompt's largest attribution above which a neuron counts",
      source='KN', low=0, high=1, flag='attribution_threshold',
  )  # fmt: skip
  sharing: float = setting(
      0.7,
      'share of the contexts in which a neuron must count; 0: the plain prompt'
      ' alone',
      source='KN', low=0, high=1, flag='sharing_threshold',
  )  # fmt: skip
  change: str = setting(
      'edit',
      'edit puts the new answer in place of the old one, erase sets the rows of'
      ' the neurons to zero',
      choices=('edit', 'erase'), flag='neuron_change',
  )  # fmt: skip
  old_weight: float = setting(
      1.0, 'factor on the old answer that is taken away', source='KN', low=0
  )
  new_weight: float = setting(
      8.0, 'factor on the new answer that is added', source='KN', low=0
  )
  row_norms: bool = setting(
      True, "scale embeddings to the norm of the neuron's row", source='KN'
  )
  limit: int = setting(
      64, 'neurons of an edit at most, those of largest attribution',
      low=1, flag='neuron_limit',
  )  # fmt: skip
  anchor: str = 'prompt_last'


@flax.struct.dataclass
class State:
  """What an editor keeps: how texts become ids; no array."""

  tokenizer: Any = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Clean:
  """Activations of the unedited model at the last tokens of prompts.

  Attributes:
    h: [L, B, D] before each layer.
    x: [L, B, D] input of the MLP.
    inner: [L, B, F] input of 'mlp/down'.
    key: [L, B, G, T, H] keys of all tokens.
    value: [L, B, G, T, H].
    last: [B] int32 index of the last token.
    source: [B, T] bool, see `types.TokenLayout`.
  """

  h: Array
  x: Array
  inner: Array
  key: Array
  value: Array
  last: Array
  source: Array | None


class Prompt(NamedTuple):
  """What foretells one token of an answer."""

  edit: int
  context: int
  ids: np.ndarray
  label: int


@functools.partial(jax.jit, static_argnames='spec')
def read_clean(
    spec: ModelSpec, params: Params, tokens: Array, layout: TokenLayout
) -> Clean:
  """Runs prompts.

  Args:
    spec: the architecture.
    params: canonical parameters.
    tokens: [B, T] int32, padded on the right.
    layout: of the tokens.

  Returns:
    Their activations.
  """
  last = jnp.sum(layout.segment_ids != PADDING, axis=-1) - 1
  at = lambda x: jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
  every = tuple(range(spec.layers))
  taps = [Tap(site, every, at) for site in ('block', 'mlp/up', SITE)]
  taps.append(Tap('kv', every))
  h = decoder.embed(spec, params, tokens, layout)
  _, (after, x, inner, (key, value)) = decoder.run_layers(
      spec, params, h, layout, start=0, stop=spec.layers, taps=taps
  )
  before = jnp.concatenate([at(h)[None], after[:-1]])
  return Clean(
      before, x, inner, key, value, last.astype(jnp.int32), layout.source
  )


def _linear(spec: ModelSpec, weights: Params, x: Array) -> Array:
  """A map of an MLP."""
  y = blocks.product(spec, x, weights['kernel'])
  return y + weights['bias'] if 'bias' in weights else y


def _probability(
    spec: ModelSpec,
    params: Params,
    clean: Clean,
    label: Array,
    mlp: Array,
    start: int,
) -> Array:
  """[B, T] P where the MLP of one layer gives another output at the last token.

  Args:
    spec: the architecture.
    params: canonical parameters.
    clean: of the prompts.
    label: [B] int32.
    mlp: [n, B, K, D] that output in layers start to start + n - 1.
    start: first of these layers.
  """
  count, rows, shares, width = mlp.shape
  mlp = jnp.swapaxes(mlp, 0, 1).reshape(rows, count * shares, width)
  branch = jnp.arange(count * shares)
  own = start + branch // shares
  in_each = lambda x: jnp.broadcast_to(x, (rows, x.shape[-1]))
  of_each = lambda x: jnp.broadcast_to(x[:, None], (rows, len(branch)))
  layout = TokenLayout(of_each(clean.last), in_each(SHARED + 1 + branch))
  column = in_each(jnp.arange(clean.key.shape[3]))
  before = column < clean.last[:, None]
  prefix = TokenLayout(column, jnp.where(before, SHARED, PADDING), clean.source)

  def body(h: Array, layer: Array) -> tuple[Array, None]:
    def intervene(site: str, x: Array) -> Array:
      if site != 'mlp':
        return x
      return jnp.where((own == layer)[:, None], mlp.astype(x.dtype), x)

    earlier = (clean.key[layer], clean.value[layer], prefix)
    h, _ = decoder.run_layer(
        spec, params, h, layout,
        layer=layer, prefix=earlier, intervene=intervene,
    )  # fmt: skip
    return h, None

  body = jax.checkpoint(body, policy=decoder.SAVE_PRODUCTS)
  h = jnp.broadcast_to(clean.h[start][:, None], mlp.shape).astype(mlp.dtype)
  h, _ = jax.lax.scan(body, h, jnp.arange(start, spec.layers))
  logprob, _ = decoder.label_logprob(spec, params, h, of_each(label))
  return jnp.exp(logprob)


@functools.partial(jax.jit, static_argnames=('spec', 'start', 'stop', 'config'))
def attributions(
    spec: ModelSpec,
    params: Params,
    clean: Clean,
    label: Array,
    *,
    start: int,
    stop: int,
    config: KnConfig,
) -> Array:
  """Integrates the gradients of an answer token's probability.

  Args:
    spec: the architecture.
    params: canonical parameters.
    clean: of B prompts.
    label: [B] int32 the token.
    start: first layer.
    stop: one past the last layer.
    config: settings.

  Returns:
    [stop - start, B, F] attributions, probability.
  """
  layers = jnp.arange(start, stop)
  inner, x = clean.inner[start:stop], clean.x[start:stop]
  name = 'gate' if spec.gated else 'up'
  act = ACTIVATIONS[spec.activation]
  mlp_of = lambda layer: decoder.layer_params(params, layer)['mlp']
  paper = config.quantity == 'paper'

  def before_activation(args: tuple[Array, Array]) -> Array:
    layer, x = args
    return _linear(spec, mlp_of(layer)[name], x)

  def output(args: tuple[Array, Array, Array]) -> Array:
    layer, w, x = args
    weights = mlp_of(layer)
    if not paper:
      w = act(w)
      if spec.gated:
        w = w * _linear(spec, weights['up'], x)[:, None]
    return _linear(spec, weights['down'], w)

  if not paper:
    inner = jax.lax.map(before_activation, (layers, x))
  shares = jnp.linspace(
      0, 1, config.steps, endpoint=not paper, dtype=inner.dtype
  )
  scaled = inner[:, :, None] * shares[:, None]
  mlp, back = jax.vjp(lambda w: jax.lax.map(output, (layers, w, x)), scaled)
  chance = functools.partial(_probability, spec, params, clean, label)
  (gradient,) = back(jax.grad(lambda x: jnp.sum(chance(x, start)))(mlp))
  return inner * jnp.mean(gradient, axis=2)


@functools.partial(jax.jit, static_argnames='spec')
def _probabilities(
    spec: ModelSpec, params: Params, clean: Clean, label: Array
) -> Array:
  """[B] probability of the answer tokens, nothing scaled."""
  last = spec.layers - 1
  weights = decoder.layer_params(params, last)['mlp']['down']
  mlp = _linear(spec, weights, clean.inner[last])[None, :, None]
  return _probability(spec, params, clean, label, mlp, last)[:, 0]


def prompts_of(
    edits: Sequence[EncodedEdit],
    answers: Sequence[Sequence[int]],
    config: KnConfig,
) -> list[Prompt]:
  """Lists what is attributed: each answer token in each prompt of an edit.

  Args:
    edits: E edits.
    answers: [E] ids of the answer that neurons are looked for.
    config: settings.

  Returns:
    The prompts.
  """
  found = []
  for i, (edit, answer) in enumerate(zip(edits, answers)):
    rows = edit.rows if config.sharing else edit.rows[:1]
    for c, row in enumerate(rows):
      for j, label in enumerate(answer):
        seen = answer[: j if config.quantity == 'paper' else 0]
        ids = np.concatenate([row, np.asarray(seen, row.dtype)])
        found.append(Prompt(i, c, ids, int(label)))
  return found


def attribute(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Prompt],
    config: KnConfig,
    *,
    length: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Attributes prompts, some at a time.

  Args:
    spec: the architecture.
    params: canonical parameters.
    prompts: the prompts.
    config: settings.
    length: tokens to which all are padded at least.

  Yields:
    ([B, L, F] attributions, [B] probabilities of the tokens) of the next ones.
  """
  width = round_up(max(length, *(len(one.ids) for one in prompts), 1))
  rows = min(_PROMPTS, round_up(len(prompts), POWERS))
  # Tokens that foretell answers pass the layers of an encoder unchanged.
  first = spec.encoder_layers
  size = -(-(spec.layers - first) // _PARTS)
  for begin in range(0, len(prompts), rows):
    some = prompts[begin : begin + rows]
    full = [*some, *[some[0]] * (rows - len(some))]
    tokens, layout = packer.pad([one.ids for one in full], (rows, width))
    label = np.asarray([one.label for one in full], np.int32)
    clean = read_clean(spec, params, tokens, layout)
    of_layers = functools.partial(
        attributions, spec, params, clean, label, config=config
    )
    parts = [
        fetch(of_layers(start=start, stop=min(start + size, spec.layers)))
        for start in range(first, spec.layers, size)
    ]
    below = np.zeros((first, *parts[0].shape[1:]), parts[0].dtype)
    found = np.concatenate([below, *parts]).swapaxes(0, 1)
    chance = fetch(_probabilities(spec, params, clean, label))
    yield found[: len(some)], chance[: len(some)]


def neurons_of(found: np.ndarray, config: KnConfig) -> np.ndarray:
  """Chooses the neurons of an edit.

  Args:
    found: [C, L, F] attributions in its prompts.
    config: settings.

  Returns:
    [I', 2] int (layer, neuron), those of largest mean attribution first.
  """
  count, _, width = found.shape
  flat = found.reshape(count, -1)
  most = flat.max(axis=1, keepdims=True)
  counted = (flat > config.threshold * most) & (flat > 0)
  votes, share = counted.sum(axis=0), config.sharing
  floor = min(_LEAST, count)
  chosen = lambda: votes >= max(share * count - 1e-9, floor)
  for _ in range(_MOVES if count > 1 else 0):
    number = int(chosen().sum())
    if _WANTED[0] <= number <= _WANTED[1]:
      break
    share += _MOVE if number > _WANTED[1] else -_MOVE
  index = np.flatnonzero(chosen())
  order = np.argsort(-flat.mean(axis=0)[index], kind='stable')
  index = index[order][: config.limit]
  return np.stack(np.divmod(index, width), axis=-1)


@jax.jit
def _rows_at(kernel: Array, layer: Array, neuron: Array) -> Array:
  """[E, I, D] rows of the kernels [L, F, D]."""
  return kernel[layer, neuron].astype(wide(kernel.dtype))


@jax.jit
def _embedded(table: Array, ids: Array, mask: Array) -> Array:
  """[E, D] sums of input embeddings of ids [E, W]."""
  rows = table[ids].astype(wide(table.dtype))
  return jnp.sum(jnp.where(mask[..., None], rows, 0), axis=1)


def _embeddings(params: Params, texts: Sequence[Sequence[int]]) -> np.ndarray:
  """[E, D] e of texts as ids."""
  width = round_up(max(map(len, texts)), POWERS)
  rows = [np.asarray(text, np.int32) for text in texts]
  ids, layout = packer.pad(rows, (len(texts), width))
  table = params['embed']['embedding']
  return fetch(_embedded(table, ids, layout.segment_ids != PADDING))


def changes_of(
    rows: np.ndarray,
    config: KnConfig,
    old: np.ndarray | None = None,
    new: np.ndarray | None = None,
) -> np.ndarray:
  """Computes by how much rows of neurons change.

  Args:
    rows: [E, I, D] W_i.
    config: settings.
    old: [E, D] e_old, to edit.
    new: [E, D] e_new, to edit.

  Returns:
    [E, I, D].
  """
  if config.change == 'erase':
    return -rows
  size = lambda x: np.linalg.norm(x, axis=-1, keepdims=True)
  if config.row_norms:
    old, new = old / size(old), new / size(new)
  step = (config.new_weight * new - config.old_weight * old)[:, None]
  return (size(rows) if config.row_norms else np.ones_like(rows)) * step


def delta_of(
    spec: ModelSpec,
    neurons: Sequence[np.ndarray],
    changes: np.ndarray,
    group: Sequence[int],
    *,
    erase: bool,
) -> LowRank:
  """Writes changes of neurons as factors: unit keys, and the changes.

  Args:
    spec: the architecture.
    neurons: [E] of [I', 2] (layer, neuron).
    changes: [E, I, D].
    group: [E] which of the edits side by side an edit is part of.
    erase: whether a neuron's change counts once, however many edits have it;
      else changes are summed.

  Returns:
    The delta of all layers, numpy arrays, edits side by side on axis 1.
  """
  found: dict[tuple[int, int], dict[int, np.ndarray]] = {}
  for g, mine, change in zip(group, neurons, changes):
    for (layer, neuron), row in zip(mine.tolist(), change):
      place = found.setdefault((layer, g), {})
      if neuron in place and not erase:
        place[neuron] = place[neuron] + row
      else:
        place[neuron] = row
  size = round_up(max(map(len, found.values()), default=1), POWERS)
  lead = (spec.layers, max(group, default=0) + 1, size)
  key = np.zeros((*lead, spec.mlp_width), changes.dtype)
  value = np.zeros((*lead, spec.width), changes.dtype)
  for (layer, g), place in found.items():
    for m, (neuron, row) in enumerate(place.items()):
      key[layer, g, m, neuron] = 1
      value[layer, g, m] = row
  return LowRank(tuple(range(spec.layers)), SITE, key, value)


def _answers(
    batch: base.EditBatch, tokenizer: Any, config: KnConfig
) -> list[np.ndarray]:
  """Ids of the old answers; to erase, of the targets where there are none.

  Raises:
    InputError: records without an old answer, to edit.
  """
  found = [edit.target for edit in batch.encoded]
  missing = [
      f'record {one.number} (id {one.id}): kn takes away the old answer, which'
      ' this record does not have (target_true); add it, or erase with'
      ' --neuron_change=erase'
      for one in batch.requests
      if not one.target_true
  ]
  if config.change == 'edit':
    InputError.raise_for(missing)
    if len(batch.requests) != len(found):
      raise InputError(
          'kn takes away old answers and was given token ids alone; give it'
          ' requests, or erase (neuron_change=erase)'
      )
  tokens = token_cache(tokenizer)
  for i, one in enumerate(batch.requests):
    if one.target_true:
      ids = batch.encoded[i].rows[0]
      prompt = sources.prompt_text(tokens.tokenizer, ids, special=True)
      asked = Continued(prompt, one.target_true, one.space)
      (found[i],) = tokens.targets([asked])
  return found


class Found(NamedTuple):
  """What the attribution of an edit found.

  Attributes:
    neurons: [I', 2] int (layer, neuron); none where it is not finite.
    finite: whether all attributions are.
    chance: mean probability of the answer's tokens after the plain prompt.
    share: largest attribution in the plain prompt.
  """

  neurons: np.ndarray
  finite: bool
  chance: float
  share: float


def _found(
    prompts: Sequence[Prompt],
    attributed: Iterator[tuple[np.ndarray, np.ndarray]],
    config: KnConfig,
) -> Iterator[Found]:
  """Chooses the neurons of edits as their attributions come."""
  pairs = (pair for some in attributed for pair in zip(*some))
  each = zip(prompts, pairs, strict=True)
  for _, part in itertools.groupby(each, key=lambda one: one[0].edit):
    mine: dict[int, list[tuple[np.ndarray, float]]] = {}
    for prompt, pair in part:
      mine.setdefault(prompt.context, []).append(pair)
    mean = np.stack([sum(x for x, _ in y) / len(y) for y in mine.values()])
    finite = bool(np.isfinite(mean).all())
    neurons = neurons_of(mean, config) if finite else np.zeros((0, 2), int)
    chance = float(np.mean([p for _, p in mine[0]]))
    yield Found(neurons, finite, chance, float(mean[0].max()))


def _edit(
    spec: ModelSpec,
    config: KnConfig,
    params: Params,
    state: State,
    batch: base.EditBatch,
    run: base.Run,
) -> tuple[Edited, base.Info]:
  """Makes the edits of a batch."""
  begin, count = time.monotonic(), len(batch.encoded)
  if not count:
    return Edited(), _report([], [], (begin, begin))
  answers = _answers(batch, state.tokenizer, config)
  prompts = prompts_of(batch.encoded, answers, config)
  length = batch.plan.unshared_prompts.text[2]
  found = []
  with run.progress('attribute', count, 'edits') as done:
    attributed = attribute(spec, params, prompts, config, length=length)
    for one in _found(prompts, attributed, config):
      found.append(one)
      done(1)
  middle = time.monotonic()
  place = np.zeros((2, count, config.limit), np.int32)
  for i, one in enumerate(found):
    place[:, i, : len(one.neurons)] = one.neurons.T
  rows = _rows_at(params['layers']['mlp']['down']['kernel'], *place)
  texts = ()
  if config.change == 'edit':
    wanted = (answers, [edit.target for edit in batch.encoded])
    texts = [_embeddings(params, text) for text in wanted]
  changes = changes_of(fetch(rows), config, *texts)
  used = np.arange(config.limit) < [[len(one.neurons)] for one in found]
  finite = np.where(used, np.isfinite(changes).all(-1), True).all(-1)
  written = [bool(len(x.neurons)) and bool(ok) for x, ok in zip(found, finite)]
  info = _report(found, written, (begin, middle))
  neurons = [
      x.neurons if ok else x.neurons[:0] for x, ok in zip(found, written)
  ]
  delta = delta_of(
      spec, neurons, changes, batch.groups.tolist(),
      erase=config.change == 'erase',
  )  # fmt: skip
  return batch.edited([delta]), info


def _report(
    found: Sequence[Found], written: Sequence[bool], times: tuple[float, float]
) -> base.Info:
  """Reports on a batch; `times` are those at which its two stages began."""
  begin, middle = times
  reason = _NO_NEURONS if any(x.finite for x in found) else _NOT_FINITE
  return base.Info(
      np.asarray(written, bool),
      {'attribute': middle - begin, 'insert': time.monotonic() - middle},
      {
          'neuron_count': [len(one.neurons) for one in found],
          'answer_probability': base.json_numbers(x.chance for x in found),
          'largest_attribution': base.json_numbers(x.share for x in found),
      },
      reason='' if any(written) or not found else reason,
  )


def kn(spec: ModelSpec, config: KnConfig) -> base.Editor:
  """Makes an editor.

  Args:
    spec: the architecture.
    config: settings.

  Returns:
    The editor. Its edit changes rows of 'mlp/down' in any layer.
  """
  spec = dataclasses.replace(spec, activations='float32')

  def init(model: Any, resources: Mapping[base.Need, Any]) -> State:
    del model
    return State(resources[base.Tokenizer()])

  def edit(
      model: Any, state: State, batch: base.EditBatch, run: base.Run
  ) -> base.EditResult:
    edited, info = _edit(spec, config, model.params, state, batch, run)
    return base.EditResult(edited, state, info)

  def bytes_of(model: Any, edits: Sequence[EncodedEdit]) -> int:
    del model
    rows = _ROWS * spec.layers * len(edits)
    return 4 * rows * (spec.mlp_width + spec.width)

  return base.Editor((base.Tokenizer(),), init, edit, bytes_of=bytes_of)


METHOD = base.Method(
    'kn',
    "rows of the neurons that carry a fact's old answer; nothing is trained",
    KnConfig,
    kn,
    accepts=frozenset({'fact'}),
    chunkable=False,
    encoders=True,
    source='arXiv 2104.08696',
    parity={
        'easyedit': {
            'attribution': 'easyedit',
            'sharing_threshold': 0.0,
            'row_norms': False,
            'new_weight': 1.0,
        }
    },
    # The battery has ids alone, and random models few shared neurons.
    small={'neuron_change': 'erase', 'sharing_threshold': 0.0},
)
