"""SERAC: a classifier decides which prompts a stored fact governs, and another
model answers those; the model itself stays.

  entry i = (text of the fact, what is read before a prompt in its scope)
  X in the scope of i:  the counterfactual model answers  "New Fact: F_i / Prompt: X"
  X in no scope:        the unedited model answers X, bit for bit

The classifier is a text encoder, trained so that a cosine above a threshold means
"asks for this fact" (`methods.scope`). The counterfactual model is the unedited
model itself, which reads the fact, after demonstrations if wanted, and may have
trained deltas. Scopes are decided
once a prompt, before it is read: a hit or a miss stays one while text is generated.
An edit adds entries; the newest of equal ones counts.

Source: Mitchell et al. 2022 (SERAC, arXiv 2206.06520) and its published code. The
classifier is that of its embeddings; entries hold the prompt alone, as a question
does not know its answer. The counterfactual model is no second, smaller one. EasyEdit begins each call with an empty memory; here it
grows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.edited.prompting import Fact, FactMemory
from jaxedit.methods import demonstrations, memories
from jaxedit.methods.base import (
    Demonstrations,
    EditBatch,
    Editor,
    EditResult,
    Method,
    Need,
    Run,
    TextEncoder,
    Tokenizer,
)
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.hypernet.factors import Maps
from jaxedit.methods.hypernet.network import (
    UNTRAINED,
    Trained,
    TrainedEditor,
    Trainer,
    Variables,
    load,
)
from jaxedit.methods.scope import answers, classifier, examples
from jaxedit.methods.scope.training import COURSE, SeracTraining
from jaxedit.methods.settings import setting
from jaxedit.models.encoder import Encoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import EditRequest, InputError, Progress

# Of an encoder that is not trained for it.
_THRESHOLD = 0.7


@dataclasses.dataclass(frozen=True)
class SeracConfig(MethodConfig):
  """Settings of `serac`.

  Attributes:
    count: demonstrations before the fact.
    shuffle: seed of the order of their kinds.
  """

  editor: str | None = setting(
      None, 'folder of a trained editor (experiments.train_editor)'
  )
  allow_overlap: bool = setting(
      False, 'edit records whose subject the editor was trained on, too'
  )
  threshold: float | None = setting(
      None,
      'cosine above which a prompt is in scope; that which was trained unless'
      ' given',
      low=0,
      high=1,
      flag='scope_threshold',
  )
  count: int = setting(
      0, 'demonstrations before the fact', low=0, flag='demonstration_count'
  )
  shuffle: int = setting(
      42, 'seed of the order of their kinds', source='IKE', low=0,
      flag='demonstration_seed',
  )  # fmt: skip


class TrainedScope(Trained):
  """A trained scope classifier, a `TrainedEditor`.

  `UNTRAINED` is the encoder as it comes with a threshold that suits MiniLM.
  """

  def maps(self, spec: ModelSpec, layers: Sequence[int] | None) -> Maps:
    """See `Trained.maps`: those of its counterfactual model."""
    del spec, layers
    if self.folder in (None, UNTRAINED):
      return Maps((), ())
    return load(self.folder, variables=False).maps

  def provide(self, model: Any, seed: int, progress: Progress) -> TrainedEditor:
    """See `Need.provide`."""
    if self.folder != UNTRAINED:
      return super().provide(model, seed, progress)
    about = {'entry': 'prompt'}
    return TrainedEditor(
        self.method, Maps((), ()), Variables({}), '', frozenset(), about
    )


def scope_encoder(
    trained: TrainedEditor, encoder: Encoder
) -> tuple[Encoder, float]:
  """Makes the encoder of a trained scope classifier.

  A memory that a file holds is bound to it: `memory.bound(encoder=...)`.

  Args:
    trained: the classifier, see `hypernet.network.load`.
    encoder: the encoder that it was trained on.

  Returns:
    (the encoder with the trained layers, the cosine above which a prompt is in
    scope).

  Raises:
    InputError: another encoder.
  """
  if not trained.variables.trained:
    return encoder, _THRESHOLD
  about, model = trained.record['encoder'], encoder.model
  if about['hash'] != model.hash:
    widths = f'{about["layers"]} layers of width {about["width"]}'
    raise InputError(
        f'--encoder: the scope classifier was trained on encoder'
        f' {about["hash"][:12]} ({widths}), given {model.hash[:12]}'
        f' ({model.spec.layers} layers of width {model.spec.width}); give the one'
        ' it was trained on, or train it again'
    )
  own = trained.variables.trained
  digest = hashlib.sha256(model.hash.encode())
  for leaf in jax.tree.leaves(own):
    digest.update(np.asarray(leaf).tobytes())
  params = {**model.params, 'layers': jax.tree.map(jnp.asarray, own['layers'])}
  model = dataclasses.replace(model, params=params, hash=digest.hexdigest())
  cut = classifier.threshold(trained.record['rule'], own)
  return dataclasses.replace(encoder, model=model), cut


def serac(spec: ModelSpec, config: SeracConfig) -> Editor:
  """Makes the editor; its edit is a memory, and what the counterfactual model is."""
  del spec
  trained = TrainedScope('serac', config.editor, config.allow_overlap, _TRAINER)
  shown = (Demonstrations(config.count),) if config.count else ()
  needs = (Tokenizer(), TextEncoder(), trained, *shown)

  def make(found: Mapping[Need, Any]) -> FactMemory:
    encoder, cut = scope_encoder(found[trained], found[TextEncoder()])
    return FactMemory(
        (),
        'Prompt:',
        'nearest',
        cut if config.threshold is None else config.threshold,
        encoder_hash=encoder.model.hash,
        last_sentence=True,
        routes='deltas' in found[trained].variables.trained,
        tokenizer=found[Tokenizer()],
        encoder=encoder,
    )

  def facts(
      requests: Sequence[EditRequest], found: Mapping[Need, Any]
  ) -> list[Fact]:
    contexts = [demonstrations.new_fact(one) for one in requests]
    if shown:
      contexts = demonstrations.contexts(
          requests,
          found[TextEncoder()],
          found[shown[0]],
          count=config.count,
          shuffle=config.shuffle,
          retain=False,  # the scope sees to neighbours
      )
    with_target = found[trained].record['entry'] == 'fact'
    return [
        Fact(one.id, examples.entry_text(one, with_target), context)
        for one, context in zip(requests, contexts)
    ]

  return _with_deltas(memories.memory_editor(make, facts, needs), trained)


def _with_deltas(editor: Editor, trained: Trained) -> Editor:
  """Puts the deltas of a trained counterfactual model beside a memory."""

  def edit(model: Any, state: Any, batch: EditBatch, run: Run) -> EditResult:
    result = editor.edit(model, state, batch, run)
    found: TrainedEditor = state.resources[trained]
    deltas = answers.deltas_of(
        found.maps, found.variables.trained.get('deltas', {})
    )
    edited = result.edited
    if edited.prompting is None or not deltas:
      return result
    if edited.size is not None:  # all have the same
      spread = lambda x: jnp.repeat(jnp.asarray(x)[:, None], edited.size, 1)
      deltas = jax.tree.map(spread, deltas)
    deltas = jax.tree.map(jnp.asarray, deltas)
    return result._replace(edited=edited.replace(deltas=deltas))

  return editor._replace(edit=edit)


_TRAINER = Trainer(
    SeracTraining,
    COURSE,
    small=SeracTraining(),
    parity={
        'serac': {
            'rule': 'distance',
            'negatives': 'own',
            'other_relations': 0.0,
            'entry': 'fact',
            'accumulate': 10,
        },
        'easyedit': {
            'supervised': False,
            'rule': 'distance',
            'entry': 'fact',
            'patience': 0,
        },
    },
)

METHOD = Method(
    'serac',
    'a trained classifier decides which prompts read a stored fact',
    SeracConfig,
    serac,
    accepts=frozenset({'fact'}),
    chunkable=False,
    contexts=False,
    by_text=True,
    encoders=True,
    source='arXiv 2206.06520',
    trainer=_TRAINER,
    small={'editor': UNTRAINED},
)
