"""How SERAC is trained: settings, and the job of a run.

The classifier alone needs no pass of the language model. A counterfactual model
that is trained, and the port's training, do (`answers`).

Axes as in `classifier` and `answers`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxedit.methods.base import Need, TextEncoder, check_layers
from jaxedit.methods.hypernet.factors import Maps, Sequences, maps_of
from jaxedit.methods.hypernet.network import Course, TrainingSettings, Variables
from jaxedit.methods.scope import answers, classifier
from jaxedit.methods.scope.classifier import NEGATIVES, RULES, ScopeBatch
from jaxedit.methods.scope.examples import (
    Scoped,
    ScopeExamples,
    example,
)
from jaxedit.methods.settings import redefault, setting
from jaxedit.models.encoder import Encoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import Array, Params, Progress

ENTRIES = ('prompt', 'fact')
COUNTERFACTUALS = ('context', 'trained')
_JUDGED = 64  # texts that are embedded at once to judge
_ANSWERED = 32  # held-out records whose answers are judged
_LONGEST = 32  # tokens of a text that are read in training, the last ones


@dataclasses.dataclass(frozen=True)
class SeracTraining(TrainingSettings):
  """Settings of training."""

  rate: float = redefault(TrainingSettings, 'rate', 1e-5, source='SERAC')
  batch_size: int = redefault(
      TrainingSettings, 'batch_size', 10, help='records a step',
      source='SERAC', low=2,
  )  # fmt: skip
  edit_weight: float = redefault(
      TrainingSettings, 'edit_weight', 0.1, source='SERAC',
      help='weight of the edit loss (cedit), unsupervised',
  )  # fmt: skip
  patience: int = redefault(
      TrainingSettings, 'patience', 40_000, source='SERAC'
  )
  scope_rate: float = setting(
      1e-3, "learning rate of the sigmoid's two numbers", low=0
  )
  rule: str = setting(
      'sigmoid',
      'how a cosine becomes a probability: by a trained sigmoid, or as published'
      ' by the squared distance, exp(-d^2)',
      choices=RULES,
      flag='scope_rule',
  )
  negatives: str = setting(
      'hardest',
      'entries of a batch that a prompt must miss: the nearest, all, or that of'
      ' its own record alone, as published',
      choices=NEGATIVES,
      flag='scope_negatives',
  )
  hard_negatives: float = setting(
      0.5,
      'share of the second half of a batch that is drawn near the first',
      source='SERAC',
      low=0,
      high=1,
  )
  other_relations: float = setting(
      1.0,
      'weight of prompts of another relation of the same subject as negatives',
      low=0,
  )
  entry: str = setting(
      'prompt',
      'text of an entry: the edited prompt, or its target too, as published',
      choices=ENTRIES,
      flag='scope_entry',
  )
  counterfactual: str = setting(
      'context',
      'the model that answers in a scope: the language model, which reads the'
      ' fact; or the same with trained deltas',
      choices=COUNTERFACTUALS,
  )
  layers: tuple[int, ...] | None = setting(
      None,
      'layers whose MLPs the counterfactual model changes, ascending; the last'
      ' third unless given',
  )
  rank: int = setting(8, 'rank of these changes', low=1)
  answer_rate: float = setting(
      1e-3, 'their learning rate', low=0, exclusive=True
  )
  answers: int = setting(
      4, 'records of a batch whose answers are trained', low=1
  )
  supervised: bool = setting(
      True,
      'train the classifier by rephrased and other prompts; without, as EasyEdit'
      ' does, by the answers of a mixture of both models',
  )

  @property
  def answered(self) -> bool:
    """Whether the language model takes part."""
    return self.counterfactual == 'trained' or not self.supervised


class State(NamedTuple):
  """What training changes.

  Attributes:
    variables: see `classifier.init`.
    optimizer: optax's state.
    skipped: [] int32, batches whose gradient was not finite.
  """

  variables: Variables
  optimizer: Any
  skipped: Array


class Trial(NamedTuple):
  """What a compiled step is made for; hashable."""

  spec: ModelSpec  # of the encoder
  pooling: str
  config: SeracTraining
  model: ModelSpec
  maps: Maps


def optimizer_of(config: SeracTraining) -> optax.GradientTransformation:
  """Adam after clipping, with a learning rate of each part."""
  rates = {'layers': config.rate, 'deltas': config.answer_rate}

  def scale(path: Any, update: Array) -> Array:
    return -rates.get(path[0].key, config.scope_rate) * update

  own = optax.stateless(
      lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates)
  )
  made = optax.chain(
      optax.clip_by_global_norm(config.clip), optax.scale_by_adam(), own
  )
  if config.accumulate == 1:
    return made
  return optax.MultiSteps(made, config.accumulate).gradient_transformation()


@functools.partial(jax.jit, static_argnames='trial', donate_argnames='state')
def step(
    trial: Trial,
    params: tuple[Params, Params],
    state: State,
    batch: ScopeBatch,
) -> tuple[State, Array]:
  """Trains on one batch; one whose gradient is not finite is left out.

  Args:
    trial: what is trained.
    params: of the encoder as it comes, and of the language model.
    state: the state; its memory is reused.
    batch: the records.

  Returns:
    (the state after the batch, [] its loss).
  """
  config = trial.config
  value, grads = jax.value_and_grad(
      lambda trained: batch_loss(trial, params, trained, batch)
  )(state.variables.trained)
  checks = [jnp.isfinite(x).all() for x in jax.tree.leaves((value, grads))]
  sound = jnp.all(jnp.stack(checks))
  old = (state.variables.trained, state.optimizer)
  updates, inner = optimizer_of(config).update(grads, old[1], old[0])
  new = (optax.apply_updates(old[0], updates), inner)
  keep = lambda x, y: jnp.where(sound, x, y)
  trained, inner = jax.tree.map(keep, new, old)
  return State(Variables(trained), inner, state.skipped + ~sound), value


def batch_loss(
    trial: Trial, params: tuple[Params, Params], trained: Any, batch: ScopeBatch
) -> Array:
  """The loss of a batch: of scopes, and of answers where they are trained."""
  config, (encoder, model) = trial.config, params
  value, (_, local, _) = classifier.batch_loss(
      trial.spec, encoder, config, trained, batch, trial.pooling
  )
  if not config.answered:
    return value
  deltas = answers.deltas_of(trial.maps, trained.get('deltas', {}))
  run = functools.partial(answers.log_probabilities, trial.model, model)
  texts: answers.Answers = batch.answers
  if config.supervised:
    return value + answers.nll(run(texts.near, deltas), texts.near)[0]
  count = len(texts.own.length)
  cosines = jnp.ones(count), jnp.diagonal(local)[:count]
  odds = [classifier.log_odds(config.rule, trained, u) for u in cosines]
  return answers.mixture_loss(
      (run(texts.plain_own), run(texts.plain_local)),
      (run(texts.own, deltas), run(texts.local, deltas)),
      odds,
      texts,
      config.edit_weight,
  )


@functools.partial(jax.jit, static_argnames='trial')
def judge_answers(
    trial: Trial, model: Params, trained: Any, texts: Sequences
) -> tuple[Array, Array]:
  """(mean nll, [B] bool, whether right) of the counterfactual model."""
  deltas = answers.deltas_of(trial.maps, trained.get('deltas', {}))
  found = answers.log_probabilities(trial.model, model, texts, deltas)
  return answers.nll(found, texts)


class ScopeJob:
  """A `network.Job`."""

  def __init__(
      self,
      model: Any,
      settings: SeracTraining,
      train: Sequence[Scoped],
      held_out: Sequence[Scoped],
      resources: Mapping[Need, Any],
      progress: Progress,
  ):
    encoder: Encoder = resources[TextEncoder()]
    self._encoder, self._config = encoder, settings
    maps = maps_of(model.spec, settings.layers)
    self._trial = Trial(
        encoder.model.spec, encoder.pooling, settings, model.spec, maps
    )
    self._params = encoder.model.params, model.params
    make = functools.partial(
        ScopeExamples,
        encoder=encoder,
        config=settings,
        longest=min(_LONGEST, encoder.max_tokens),
    )
    with progress('prepare', 2, 'part') as advance:
      self._train = make(train)
      advance(1)
      self._held_out = make(held_out)
      advance(1)
    self.about = {
        'encoder': {
            'hash': encoder.model.hash,
            'width': encoder.model.spec.width,
            'layers': encoder.model.spec.layers,
        },
        'entry': settings.entry,
        'rule': settings.rule,
    }

  def start(self, seed: int) -> State:
    """See `network.Job`."""
    config = self._config
    trained = classifier.init(self._params[0], jnp.float32)
    if config.counterfactual == 'trained':
      spec, maps = self._trial.model, self._trial.maps
      trained['deltas'] = answers.init(
          spec, maps, config.rank, seed, jnp.float32
      )
    optimizer = optimizer_of(self._config).init(trained)
    return State(Variables(trained), optimizer, jnp.zeros([], jnp.int32))

  def step(self, state: State, batch: ScopeBatch) -> tuple[State, Any]:
    """See `network.Job`."""
    return step(self._trial, self._params, state, batch)

  def batches(self, seed: int) -> Iterator[Callable[[], ScopeBatch]]:
    """See `network.Job`."""
    config, some = self._config, self._train
    epochs = some.epochs(config.batch_size, config.hard_negatives, seed)
    for indices in epochs:
      yield functools.partial(some.batch, indices)

  def judge(self, variables: Variables | None) -> dict[str, float]:
    """See `network.Job`: every held-out prompt against every held-out entry.

    Returns:
      'loss'; 'hit', the share of rephrased prompts that find their own entry;
      'miss', of local prompts that find none; 'other', of prompts of another
      relation of an edited subject that find none; where answers are trained,
      'nll' and 'right' of those to some rephrased prompts.
    """
    params = self._params[0]
    trained = classifier.init(params, jnp.float32)
    if variables is not None:
      trained = variables.trained
    own = {**params, 'layers': trained['layers']}
    some, config = self._held_out, self._config
    vectors = [self._embedded(own, texts, some.width) for texts in some.texts]
    same = some.subjects[:, None] == some.subjects
    near, local, other = classifier.cosines(
        vectors[0], np.concatenate(vectors[1:])
    )
    loss = classifier.loss(config, trained, (near, local, other), same)
    cut = classifier.threshold(config.rule, trained)
    near = np.asarray(near)
    mine = near.argmax(1) == np.arange(len(near))
    asked = [bool(ids) for ids in some.texts[3]]
    missed = lambda x: np.asarray(x).max(1) <= cut
    found = {
        'loss': float(loss),
        'hit': float(np.mean(mine & ~missed(near))),
        'miss': float(np.mean(missed(local))),
        'other': float(missed(other)[asked].mean()) if any(asked) else 1.0,
    }
    if config.answered:
      texts = some.rephrased(_ANSWERED)
      nll, right = judge_answers(self._trial, self._params[1], trained, texts)
      found |= {'nll': float(nll), 'right': float(right.mean())}
      found['loss'] += found['nll']
    return found

  def _embedded(self, params: Params, texts: Any, width: int) -> np.ndarray:
    """Embeds texts of ids, some at a time."""
    parts = []
    for first in range(0, len(texts), _JUDGED):
      some = texts[first : first + _JUDGED]
      vectors = classifier.run_embed(
          self._trial.spec,
          params,
          classifier.pack([*some, *[[]] * (_JUDGED - len(some))], width),
          pooling=self._trial.pooling,
      )
      parts.append(np.asarray(vectors)[: len(some)])
    return np.concatenate(parts)


def settled(spec: ModelSpec, settings: SeracTraining) -> SeracTraining:
  """Settings with the layers that are changed, none without training them."""
  layers = settings.layers
  if settings.counterfactual != 'trained':
    layers = ()
  elif layers is None:
    layers = tuple(range(spec.layers))[-max(1, spec.layers // 3) :]
  if layers:
    check_layers(spec, layers)
  return dataclasses.replace(settings, layers=layers)


COURSE = Course((TextEncoder(),), settled, example, ScopeJob)
