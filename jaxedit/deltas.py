"""What an edit is: deltas at sites of a model, a prompt rule, a routing rule.

A site is a linear map of a block ('mlp/down') or an output of a block ('attn',
'mlp', 'block'). A delta there sees the site's input x and output y and returns
the edited output:

  LowRank    y + (x K^T) V                              ROME ... AlphaEdit, LoRA
  Dense      y + x W                                    fine-tuning, UnKE
  Neurons    y + act(x K^T + b) V                       T-Patcher, CaliNET
  Codebook   the value of the nearest key, if in radius GRACE
  Routed     y, or that of the shard a prompt chooses   WISE

Every array leaf of a delta has a leading axis n, the edited layers. Edits that
know nothing of each other lie side by side on the axis after it (`Edited.size`).
The mathematics below is that of one layer of one edit: both axes are gone.

Axis letters: n edited layers, E edits side by side, T tokens of one sequence, M
pairs, P neurons, C codebook entries, S shards. `in` and `out` are the widths of
the site's input and output.

Sources: Huang et al. 2023 (T-Patcher, arXiv 2301.09785), Hartvigsen et al. 2023
(GRACE, arXiv 2211.11031), Wang et al. 2024 (WISE, arXiv 2405.14768).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.numerics import einsum, wide

Array = jax.Array
_static = lambda **kwargs: flax.struct.field(pytree_node=False, **kwargs)

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}
REPLACEMENTS = ('last', 'prompt', 'all')


class SiteDelta(Protocol):
  """What an edit does at one site of some layers; a pytree.

  Attributes:
    layers: ascending layer numbers, static.
    site: path of a linear map inside a layer, or 'attn', 'mlp' or 'block',
      static.
    axes: array leaf -> its axes after those of layers and edits; 'in' and 'out'
      are the site's widths, 'size' is that of a bias or a scale.
    mergeable: whether it is a change of weights.
    chooses: whether it decides once a prompt, by `choose`.
  """

  layers: tuple[int, ...]
  site: str
  axes: Mapping[str, str]
  mergeable: ClassVar[bool]
  chooses: ClassVar[bool]

  def choose(self, x: Array, y: Array, prompt: Array) -> Any:
    """Decides once for a sequence, from the tokens of its prompt.

    Args:
      x: [T, in] input of the site.
      y: [T, out] output of the site.
      prompt: [T] bool, the tokens of the prompt.

    Returns:
      A pytree of arrays, kept while the sequence is continued.
    """

  def __call__(self, x: Array, y: Array, choice: Any, prompt: Any) -> Array:
    """Computes the edited output.

    Args:
      x: [..., in] input of the site; [T, in] of a delta that chooses.
      y: [..., out] output of the site.
      choice: what `choose` gave; () of a delta that does not choose.
      prompt: [T] bool, tokens of the prompt among these; None likewise.

    Returns:
      [..., out], in the dtype of y or wider.
    """


@flax.struct.dataclass
class LowRank:
  """Kernel changes as exact factors: the change of a layer is key^T value.

  Attributes:
    layers: ascending layer numbers, static.
    site: path of the linear map inside a layer, e.g. 'mlp/down', static.
    key: [n, M, in].
    value: [n, M, out].
  """

  layers: tuple[int, ...] = _static()
  site: str = _static()
  key: Array
  value: Array
  axes: ClassVar[Mapping[str, str]] = {'key': 'M in', 'value': 'M out'}
  mergeable: ClassVar[bool] = True
  chooses: ClassVar[bool] = False

  def __call__(self, x, y, choice=(), prompt=None):
    del choice, prompt
    x = einsum('...f,mf->...m', x.astype(wide(x.dtype)), self.key)
    return y + einsum('...m,md->...d', x, self.value)


@flax.struct.dataclass
class Dense:
  """Changes of one parameter of one module, in full.

  A bias or a scale is merged before a run (`edited.lm`): it is no function of
  the site's input and output.

  Attributes:
    layers: ascending layer numbers, static.
    site: path of the module inside a layer, e.g. 'mlp/down' or 'attn_norm',
      static.
    value: [n, in, out], or [n, size] for a bias or a scale.
    leaf: 'kernel', 'bias' or 'scale', static.
  """

  layers: tuple[int, ...] = _static()
  site: str = _static()
  value: Array
  leaf: str = _static(default='kernel')
  mergeable: ClassVar[bool] = True
  chooses: ClassVar[bool] = False

  @property
  def axes(self) -> Mapping[str, str]:
    return {'value': 'in out' if self.leaf == 'kernel' else 'size'}

  def __call__(self, x, y, choice=(), prompt=None):
    del choice, prompt
    return y + einsum('...f,fd->...d', x.astype(wide(x.dtype)), self.value)


@flax.struct.dataclass
class Neurons:
  """Neurons added beside a site, seen by every token of every query.

  Attributes:
    layers: ascending layer numbers, static.
    site: usually 'mlp', whose input and output an added neuron shares, static.
    key: [n, P, in].
    bias: [n, P].
    value: [n, P, out].
    activation: a name in `ACTIVATIONS`, static.
  """

  layers: tuple[int, ...] = _static()
  site: str = _static()
  key: Array
  bias: Array
  value: Array
  activation: str = _static(default='gelu')
  axes: ClassVar[Mapping[str, str]] = {
      'key': 'P in', 'bias': 'P', 'value': 'P out'
  }  # fmt: skip
  mergeable: ClassVar[bool] = False
  chooses: ClassVar[bool] = False

  def __call__(self, x, y, choice=(), prompt=None):
    del choice, prompt
    x = einsum('...f,pf->...p', x.astype(wide(x.dtype)), self.key) + self.bias
    x = ACTIVATIONS[self.activation](x)
    return y + einsum('...p,pd->...d', x, self.value)


@flax.struct.dataclass
class Codebook:
  """Stored outputs for inputs near a stored key; capacity C is fixed.

  The key of a prompt is the site's input at its last token. Its nearest entry
  is chosen where it lies within that entry's radius (Euclidean distance, the
  first of equally near ones).

  Attributes:
    layers: ascending layer numbers, static.
    site: the site, static.
    keys: [n, C, in].
    values: [n, C, out].
    radii: [n, C]; a negative radius is never matched.
    count: [n] int32, how many entries are in use.
    replacement: which outputs become the value: 'last' (of the last token of the
      prompt), 'prompt' (those before it) or 'all' (of every token, also of
      generated ones), static.
  """

  layers: tuple[int, ...] = _static()
  site: str = _static()
  keys: Array
  values: Array
  radii: Array
  count: Array
  replacement: str = _static(default='last')
  axes: ClassVar[Mapping[str, str]] = {
      'keys': 'C in', 'values': 'C out', 'radii': 'C', 'count': ''
  }  # fmt: skip
  mergeable: ClassVar[bool] = False
  chooses: ClassVar[bool] = True

  def choose(self, x: Array, y: Array, prompt: Array) -> Array:
    """Returns [] int32, the entry of the prompt or -1."""
    del y
    dtype = wide(self.keys.dtype)
    query = x[_last(prompt)].astype(dtype)
    distance = jnp.linalg.norm(self.keys.astype(dtype) - query, axis=-1)
    free = jnp.arange(len(distance)) >= self.count
    distance = jnp.where(free, jnp.inf, distance)
    nearest = jnp.argmin(distance)
    hit = (distance[nearest] <= self.radii[nearest]) & jnp.any(prompt)
    return jnp.where(hit, nearest, -1).astype(jnp.int32)

  def __call__(self, x, y, choice, prompt):
    del x
    tokens = jnp.arange(len(y))
    if self.replacement == 'all':
      replaced = jnp.ones_like(prompt)
    elif self.replacement == 'prompt':
      replaced = prompt & (tokens < _last(prompt))
    else:
      replaced = prompt & (tokens == _last(prompt))
    replaced &= choice >= 0
    value = self.values[jnp.maximum(choice, 0)].astype(y.dtype)
    return jnp.where(replaced[:, None], value, y)


@flax.struct.dataclass
class Routed:
  """Side copies of a map, of which a prompt chooses one or none.

  Each shard is a change W_s of one kernel. A shard's score is the mean over the
  prompt's tokens of |g(y) - g(y + x W_s)|, g the activation; the shard of the
  largest score above its threshold is chosen, none if all are at or below.

  Attributes:
    layers: ascending layer numbers, static.
    site: path of the linear map, static.
    shards: [n, S, in, out].
    thresholds: [n, S].
    activation: a name in `ACTIVATIONS`, static.
  """

  layers: tuple[int, ...] = _static()
  site: str = _static()
  shards: Array
  thresholds: Array
  activation: str = _static(default='silu')
  axes: ClassVar[Mapping[str, str]] = {
      'shards': 'S in out', 'thresholds': 'S'
  }  # fmt: skip
  mergeable: ClassVar[bool] = False
  chooses: ClassVar[bool] = True

  def choose(self, x: Array, y: Array, prompt: Array) -> Array:
    """Returns [] int32, the shard of the prompt or -1."""
    act = ACTIVATIONS[self.activation]
    moved = einsum('tf,sfd->std', x.astype(wide(x.dtype)), self.shards)
    gap = jnp.linalg.norm(act(y + moved) - act(y), axis=-1)
    count = jnp.maximum(jnp.sum(prompt), 1)
    score = jnp.sum(jnp.where(prompt, gap, 0), axis=-1) / count
    score = jnp.where(score > self.thresholds, score, -jnp.inf)
    best = jnp.argmax(score)
    return jnp.where(score[best] > -jnp.inf, best, -1).astype(jnp.int32)

  def __call__(self, x, y, choice, prompt):
    del prompt
    kernel = self.shards[jnp.maximum(choice, 0)]
    moved = einsum('tf,fd->td', x.astype(wide(x.dtype)), kernel)
    return jnp.where(choice >= 0, y + moved, y)


def _last(prompt: Array) -> Array:
  """[] int32, the last token of a prompt [T]; 0 where there is none."""
  return jnp.max(jnp.where(prompt, jnp.arange(len(prompt)), 0))


class Speak(Protocol):
  """Greedy generation under the edit of each text.

  Attributes:
    most: tokens that a text and what follows it may have.
  """

  most: int

  def __call__(
      self,
      texts: Sequence[Sequence[int]],
      which: Sequence[int],
      *,
      max_new_tokens: int,
      stop_ids: Sequence[int],
      stop_texts: Sequence[str],
  ) -> list[list[int]]:
    """Continues texts.

    Args:
      texts: token ids.
      which: the prompt that each belongs to, as its number in the call.
      max_new_tokens: tokens to add at most.
      stop_ids: tokens that end a text.
      stop_texts: strings that do, see `models.stop_texts`.

    Returns:
      New tokens of each, the one that ended it included.
    """


class Prompting:
  """A rule that rewrites prompts before the model reads them.

  A subclass has `rewrite`, and `without` if it has `ids`; the other methods say what a rule that has nothing
  but this can do. `edited.prompting.FactMemory` has all of them.

  Attributes:
    routes: whether prompts that it leaves as they are are answered by the
      unedited model.
    ids: of the edit requests whose facts it holds, oldest first; None where it
      does not say.
  """

  routes: bool = False
  ids: Sequence[str] | None = None

  def rewrite(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
      speak: Speak | None = None,
  ) -> list[list[int]]:
    """Returns the token ids that the answer of each prompt follows.

    Args:
      prompts: token ids.
      edit_ids: which edit a prompt is under; None where there is one.
      speak: generates, for a rule that lets the model write before it answers;
        the answer follows what was written, generated or scored. Opened models
        give it.
    """
    raise NotImplementedError

  def bound(self, tokenizer: Any) -> Prompting:
    """Returns the rule with the tokenizer of the model that it is opened with."""
    del tokenizer
    return self

  def select(self, index: int) -> Prompting:
    """Returns the rule of one of the edits side by side."""
    del index
    return self

  def stack(self, others: Sequence[Prompting]) -> Prompting:
    """Returns the rules of independent edits side by side, this one first.

    Raises:
      ValueError: it has no such form.
    """
    raise ValueError('only single edits without rules can be stacked')

  def without(self, indices: Sequence[int]) -> Prompting:
    """Returns the rule without some of its facts, by their indices in `ids`."""
    raise NotImplementedError

  def packed(self) -> tuple[dict[str, Array], dict[str, Any]] | None:
    """Writes the rule as arrays and plain JSON types; None: no file holds it."""
    return None


class Routing(Protocol):
  """A rule that says, prompt by prompt, whether an edit is in force."""

  def applies(
      self, prompts: Sequence[Sequence[int]], edit_ids: Sequence[int] | None
  ) -> list[bool]:
    """Returns True for each prompt that the edited model answers.

    Args:
      prompts: token ids as the user wrote them.
      edit_ids: which edit a prompt is under; None where there is one.
    """


@flax.struct.dataclass
class Edited:
  """The product of every editor: all that distinguishes an edited model.

  Attributes:
    deltas: changes at sites; at most one low-rank or dense one a parameter.
      Changes of weights apply before deltas of other kinds, and those in order.
    prompting: rewrites prompts, static.
    routing: decides which prompts the edit answers, static.
    size: edits side by side, each a model of its own, on axis 1 of every leaf
      of `deltas`; None for one edit without that axis, static.
    ledger: which edits a delta beside the weights holds (`edited.ledger`), where
      it says so, static; no computation depends on it.
  """

  deltas: tuple[Any, ...] = ()
  prompting: Prompting | None = _static(default=None)
  routing: Routing | None = _static(default=None)
  size: int | None = _static(default=None)
  ledger: Any = _static(default=None)

  @property
  def mergeable(self) -> bool:
    """Whether it can be merged into weights."""
    return not self.unmergeable

  @property
  def unmergeable(self) -> str:
    """Why it cannot be merged into weights, a sentence; '' if it can."""
    if self.size is not None:
      return (
          f'it holds {self.size} independent edits side by side; select one of'
          ' them'
      )
    kinds = {type(d).__name__ for d in self.deltas if not d.mergeable}
    parts = [f'{kind} deltas' for kind in sorted(kinds)] + self.rules
    if not parts:
      return ''
    return (
        f'it has {" and ".join(parts)}, which are no change of weights; keep it'
        ' beside the model'
    )

  @property
  def rules(self) -> list[str]:
    """Names of the rules it has."""
    rules = {'prompting': self.prompting, 'routing': self.routing}
    return [
        f'a {name} rule' for name, rule in rules.items() if rule is not None
    ]


UNEDITED = Edited()


@flax.struct.dataclass
class ActiveDeltas:
  """The deltas of one run of a model.

  Attributes:
    deltas: as in `Edited`; with `per_edit` [n, B, ...], one edit a sequence.
    per_edit: whether every sequence is under an edit of its own, static.
    prompt: [B, T] bool, tokens of the prompts among those of the run; None for
      all tokens that every branch of a sequence sees.
    choices: one entry a delta, what `choose` gave for the prompts, [n, B, ...];
      None to choose in this run.
  """

  deltas: tuple[Any, ...] = ()
  per_edit: bool = _static(default=False)
  prompt: Array | None = None
  choices: tuple[Any, ...] | None = None

  @property
  def per_sequence(self) -> bool:
    """Whether sequences differ in what they do."""
    return self.per_edit or any(d.chooses for d in self.deltas)


def active(
    deltas: Sequence[Any], edit_ids: Array | None = None, **options: Any
) -> ActiveDeltas:
  """Puts every sequence under its edit.

  Args:
    deltas: of one edit, or of E edits side by side where `edit_ids` is given.
    edit_ids: [B] int32 which of them a sequence is under.
    **options: `prompt` and `choices` of `ActiveDeltas`.

  Returns:
    The deltas of a run over B sequences.
  """
  if edit_ids is None:
    return ActiveDeltas(tuple(deltas), **options)
  pick = lambda x: jnp.take(x, edit_ids, axis=1)
  gathered = tuple(jax.tree.map(pick, delta) for delta in deltas)
  return ActiveDeltas(gathered, per_edit=True, **options)


class Below(NamedTuple):
  """Changes of lower layers, where every edit has a model of its own.

  Attributes:
    deltas: of the groups side by side, [n, groups, ...], on the host.
    group: [E] int, the group of an edit.
  """

  deltas: tuple[Any, ...]
  group: np.ndarray

  def active(self, edit: np.ndarray, rows: int = 1) -> ActiveDeltas:
    """Puts every sequence under its edit's changes.

    Args:
      edit: [E'] int, edits; any for -1, where there is none.
      rows: sequences an edit.

    Returns:
      The deltas of a run over E' * rows sequences.
    """
    mine = np.repeat(np.asarray(self.group)[np.maximum(edit, 0)], rows)
    pick = lambda x: np.take(x, mine, axis=1)
    return ActiveDeltas(jax.tree.map(pick, self.deltas), per_edit=True)


@flax.struct.dataclass
class LayerDeltas:
  """The deltas of one layer, as a block applies them.

  Attributes:
    deltas: number of a delta -> the delta of this layer, without a layer axis.
    per_edit: whether leaves have an axis of sequences, static.
    prompt: [B, T] bool, see `ActiveDeltas`.
    choices: number of a delta -> [B, ...]; {} to choose here.
  """

  deltas: Mapping[int, Any]
  per_edit: bool = _static(default=False)
  prompt: Array | None = None
  choices: Mapping[int, Any] = flax.struct.field(default_factory=dict)
