"""The gradient of an edit as factors, and scores of answers under deltas.

  G = sum over t of x_t d_t^T      x_t  input of an edited map at token t
                                   d_t  gradient of the loss there, d loss / d y_t

The matrix G [in, out] is never formed. x comes from a tap; d is the gradient
with respect to an offset of zero that is added to the map's output.

What lies below the first edited layer depends on no edit: it is run once, and
all passes here begin with the states `h` that enter that layer.

Axes as in `jaxedit.types`: B sequences, T tokens, O scored tokens of a sequence,
n edited layers, D width, M pairs (key and value) of a delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching.buckets import POWERS, round_up
from jaxedit.deltas import ActiveDeltas, LowRank
from jaxedit.models import decoder
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import Array, Params, Tap, TokenLayout


class Maps(NamedTuple):
  """The edited linear maps; hashable.

  Attributes:
    layers: ascending layer numbers.
    sites: paths of maps of the MLP, e.g. 'mlp/down'.
  """

  layers: tuple[int, ...]
  sites: tuple[str, ...]


class Text(NamedTuple):
  """One text with tokens that are scored.

  Attributes:
    tokens: [T] int32 inputs.
    index: [O] int32 columns whose next token is scored.
    labels: [O] int32 those tokens.
  """

  tokens: np.ndarray
  index: np.ndarray
  labels: np.ndarray


class Sequences(NamedTuple):
  """Texts in one shape, padded on the right.

  Attributes:
    tokens: [B, T] int32.
    length: [B] int32, inputs of a text.
    index: [B, O] int32; 0 where nothing is scored.
    labels: [B, O] int32.
    weight: [B, O] f32, 1 where a token is scored, else 0.
  """

  tokens: Array
  length: Array
  index: Array
  labels: Array
  weight: Array


class Factors(NamedTuple):
  """The gradient at one site.

  Attributes:
    x: [n, B, T, in] inputs; 0 where d is.
    d: [n, B, T, out] gradients of the loss with respect to outputs.
  """

  x: Array
  d: Array

  @property
  def used(self) -> Array:
    """[n, B, T] bool, pairs that are not zero; others are no part of G."""
    return (self.x != 0).any(-1) & (self.d != 0).any(-1)


Pair = tuple[Array, Array]  # keys [n, B, M, in] and values [n, B, M, out]


def maps_of(
    spec: ModelSpec, layers: Sequence[int], sites: Sequence[str] = ()
) -> Maps:
  """Names edited maps.

  Args:
    spec: the architecture.
    layers: layers to edit.
    sites: paths of maps; all of the MLP unless given.

  Returns:
    The maps.
  """
  gate = ('mlp/gate',) if spec.gated else ()
  return Maps(tuple(layers), tuple(sites) or (*gate, 'mlp/up', 'mlp/down'))


def widths(spec: ModelSpec, site: str) -> tuple[int, int]:
  """Returns (in, out) of a linear map."""
  return param_shapes(spec)[f'layers/{site}/kernel'][1:]


def answer(prompt: np.ndarray, target: np.ndarray) -> Text:
  """Makes the text in which a prompt is answered and the answer is scored.

  Args:
    prompt: ids.
    target: ids that continue it, at least one.
  """
  first = len(prompt) - 1
  tokens = np.concatenate([prompt, target[:-1]])
  index = first + np.arange(len(target), dtype=np.int32)
  return Text(tokens, index, np.asarray(target, np.int32))


def pack(texts: Sequence[Text], shape: tuple[int, int, int]) -> Sequences:
  """Puts texts in one shape.

  Args:
    texts: at most B of them.
    shape: (B, T, O).

  Returns:
    Numpy arrays; texts past the last one are empty.
  """
  count, width, scored = shape
  zeros = lambda *shape: np.zeros(shape, np.int32)
  index, labels, weight = (zeros(count, scored) for _ in range(3))
  weight = weight.astype(np.float32)
  tokens, length = zeros(count, width), zeros(count)
  found = Sequences(tokens, length, index, labels, weight)
  for b, text in enumerate(texts):
    found.tokens[b, : len(text.tokens)] = text.tokens
    found.length[b] = len(text.tokens)
    found.index[b, : len(text.index)] = text.index
    found.labels[b, : len(text.labels)] = text.labels
    found.weight[b, : len(text.index)] = 1
  return found


def shape_of(edits: Sequence[EncodedEdit]) -> tuple[int, int, int]:
  """(B, T, O) of edits: powers of two, so that batches share compiled code."""
  labels = max(len(edit.target) for edit in edits)
  tokens = max(len(edit.rows[0]) + len(edit.target) - 1 for edit in edits)
  up = lambda n, least: max(least, round_up(n, POWERS))
  return up(len(edits), 1), up(tokens, 16), up(labels, 4)


def pack_answers(
    edits: Sequence[EncodedEdit], shape: tuple[int, int, int]
) -> Sequences:
  """Packs edits as prompts with the answers to write; see `pack`."""
  return pack([answer(edit.rows[0], edit.target) for edit in edits], shape)


@flax.struct.dataclass
class _Offset:
  """Adds a value at every token; its gradient is that of the site's output."""

  layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
  site: str = flax.struct.field(pytree_node=False)
  value: Array  # [n, B, T, out]
  axes: ClassVar[Mapping[str, str]] = {'value': 'T out'}
  mergeable: ClassVar[bool] = False
  chooses: ClassVar[bool] = False

  def __call__(self, x, y, choice=(), prompt=None):
    del x, choice, prompt
    return y + self.value


def layout_of(spec: ModelSpec, some: Sequences) -> TokenLayout:
  """The layout [B, T] of texts."""
  valid = jnp.arange(some.tokens.shape[1]) < some.length[:, None]
  return decoder.token_layout(valid, decoder.source_of(spec, some.tokens))


def enter(
    spec: ModelSpec, params: Params, some: Sequences, first: int
) -> Array:
  """Computes the states [B, T, D] that enter the first edited layer."""
  layout = layout_of(spec, some)
  h = decoder.embed(spec, params, some.tokens, layout)
  return decoder.run_layers(spec, params, h, layout, start=0, stop=first)[0]


def leave(
    spec: ModelSpec,
    params: Params,
    h: Array,
    some: Sequences,
    *,
    first: int,
    deltas: Sequence[Any] = (),
    taps: Sequence[Tap] = (),
) -> tuple[Array, tuple[Any, ...]]:
  """Runs the layers from the first edited one on.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, T, D] from `enter`.
    some: the texts.
    first: the first edited layer.
    deltas: of each sequence, leaves [n, B, ...]; () for none.
    taps: activations to return.

  Returns:
    ([B, O, D] output of the last layer at scored tokens, readings of taps).
  """
  h, seen = decoder.run_layers(
      spec,
      params,
      h,
      layout_of(spec, some),
      start=first,
      stop=spec.layers,
      deltas=ActiveDeltas(tuple(deltas), per_edit=True),
      taps=taps,
      remat=decoder.SAVE_PRODUCTS,
  )
  return jnp.take_along_axis(h, some.index[..., None], axis=1), seen


def token_nll(
    spec: ModelSpec, params: Params, h: Array, labels: Array
) -> tuple[Array, Array]:
  """Scores labels at outputs of the last layer.

  Args:
    spec: the architecture.
    params: canonical parameters.
    h: [B, O, D].
    labels: [B, O].

  Returns:
    ([B, O] negative log-likelihoods in nats, [B, O] bool, whether each label is
    the most probable token).
  """
  logits = decoder.logits(spec, params, h)
  mine = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - mine, logits.argmax(-1) == labels


def per_record(weight: Array, dtype: Any) -> Array:
  """Weights [B, O] of the mean over each record's own tokens."""
  weight = jnp.asarray(weight, dtype)
  return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)


def edit_factors(
    spec: ModelSpec,
    params: Params,
    maps: Maps,
    h: Array,
    some: Sequences,
    *,
    share: Array,
) -> tuple[dict[str, Factors], Array]:
  """Computes the factors of the gradient of every record's loss.

    loss_b = sum over o of share[b, o] * nll[b, o]

  Args:
    spec: the architecture.
    params: canonical parameters.
    maps: the edited maps.
    h: [B, T, D] from `enter`.
    some: prompts with the answers to write.
    share: [B, O] weights of tokens, e.g. `per_record`.

  Returns:
    (site -> factors, [B] loss).
  """
  shape = (len(maps.layers), *some.tokens.shape)
  zeros = {
      s: jnp.zeros((*shape, widths(spec, s)[1]), h.dtype) for s in maps.sites
  }
  # The gate reads what the plain map reads.
  read = {s: s.replace('gate', 'up') for s in maps.sites}
  tapped = tuple(dict.fromkeys(read.values()))

  def loss(offsets: Mapping[str, Array]) -> tuple[Array, Any]:
    out, seen = leave(
        spec,
        params,
        h,
        some,
        first=maps.layers[0],
        deltas=[_Offset(maps.layers, s, x) for s, x in offsets.items()],
        taps=[Tap(site, maps.layers) for site in tapped],
    )
    nll, _ = token_nll(spec, params, out, some.labels)
    each = jnp.where(share > 0, share * nll, 0).sum(-1)
    return each.sum(), (each, dict(zip(tapped, seen)))

  grads, (each, seen) = jax.grad(loss, has_aux=True)(zeros)
  found = {}
  for site, d in grads.items():
    used = (d != 0).any(-1, keepdims=True)
    x = seen[read[site]].astype(d.dtype)
    found[site] = Factors(jnp.where(used, x, 0), d)
  return found, each


def low_rank(maps: Maps, pairs: Mapping[str, Pair]) -> tuple[LowRank, ...]:
  """Makes the deltas of pairs, one a site."""
  return tuple(LowRank(maps.layers, s, *pairs[s]) for s in maps.sites)


def by_group(pairs: Mapping[str, Pair], size: int) -> dict[str, Pair]:
  """Sums the deltas of every `size` neighbours, for each of them.

  Args:
    pairs: of B records.
    size: records whose deltas are summed; it divides B.

  Returns:
    Pairs of B records, those of a group alike, with size * M pairs each.
  """
  if size == 1:
    return dict(pairs)

  def one(x: Array) -> Array:
    n, count, rank, width = x.shape
    joined = x.reshape(n, count // size, size * rank, width)
    return jnp.repeat(joined, size, axis=1)

  return {site: tuple(map(one, pair)) for site, pair in pairs.items()}
