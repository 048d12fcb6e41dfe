"""Editing in context: the new fact is read before the prompt; no weight changes.

  ice           New Fact: F / Prompt: X
  ike           demonstrations, then the same, the fact itself the last of them
  ike_retrieve  as ice, for any number of facts: the one nearest to X, if near
  memprompt     F. X, for any number of facts: the one whose prompt is closest to
                X in characters, if close

Sources: Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context
Learning?" (IKE, arXiv 2305.12740); Madaan et al. 2022, "Memory-assisted prompt
editing" (MemPrompt, arXiv 2201.06009). `ike_retrieve` is ours: the plain
baseline that retrieves the fact itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxedit.edited.prompting import Fact, FactMemory
from jaxedit.methods.base import (
    Demonstrations,
    Editor,
    Method,
    Need,
    TextEncoder,
    Tokenizer,
)
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.demonstrations import contexts, new_fact
from jaxedit.methods.memories import memory_editor, statement
from jaxedit.methods.settings import setting
from jaxedit.models.encoder import Encoder
from jaxedit.models.spec import ModelSpec
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True)
class IceConfig(MethodConfig):
  """Settings of `ice`: none."""


@dataclasses.dataclass(frozen=True)
class IkeConfig(MethodConfig):
  """Settings of `ike`.

  Attributes:
    count: k.
    shuffle: seed of the order of kinds.
  """

  count: int = setting(
      32, 'demonstrations', source='IKE', low=1, flag='demonstration_count'
  )
  shuffle: int = setting(
      42, 'seed of the order of their kinds', source='IKE', low=0,
      flag='demonstration_seed',
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class IkeRetrieveConfig(MethodConfig):
  """Settings of `ike_retrieve`.

  Attributes:
    threshold: cosine above which a fact is in force.
  """

  threshold: float = setting(
      0.6,
      'cosine of prompt and edited prompt above which the fact is read',
      low=0,
      high=1,
      flag='scope_threshold',
  )


@dataclasses.dataclass(frozen=True)
class MemPromptConfig(MethodConfig):
  """Settings of `memprompt`.

  Attributes:
    distance: edit distance below which a fact is in force.
  """

  distance: int = setting(
      6,
      'edit distance of prompt and edited prompt below which the fact is read',
      unit='characters',
      source='MemPrompt',
      low=1,
      flag='scope_distance',
  )


def ice(spec: ModelSpec, config: IceConfig) -> Editor:
  """Makes the editor of `ice`; its edit reads all its facts before a prompt."""
  del spec, config
  make = lambda found: FactMemory((), 'Prompt:', tokenizer=found[Tokenizer()])
  facts = lambda requests, _: [
      Fact(one.id, one.question, new_fact(one)) for one in requests
  ]
  return memory_editor(make, facts, (Tokenizer(),))


def ike(spec: ModelSpec, config: IkeConfig) -> Editor:
  """Makes the editor of `ike`; an edit has one fact with its demonstrations."""
  del spec
  needs = (Tokenizer(), TextEncoder(), Demonstrations(config.count))
  make = lambda found: FactMemory((), 'Prompt:', tokenizer=found[Tokenizer()])

  def facts(
      requests: Sequence[EditRequest], found: Mapping[Need, Any]
  ) -> list[Fact]:
    made = contexts(
        requests,
        found[TextEncoder()],
        found[needs[2]],
        count=config.count,
        shuffle=config.shuffle,
    )
    return [
        Fact(one.id, one.question, text) for one, text in zip(requests, made)
    ]

  return memory_editor(
      make,
      facts,
      needs,
      'ike shows one fact with its demonstrations: edit each alone (--reset'
      ' --batch_size=1), or use ike_retrieve for many facts',
  )


def ike_retrieve(spec: ModelSpec, config: IkeRetrieveConfig) -> Editor:
  """Makes the editor of `ike_retrieve`."""
  del spec

  def make(found: Mapping[Need, Any]) -> FactMemory:
    encoder: Encoder = found[TextEncoder()]
    return FactMemory(
        (),
        'Prompt:',
        'nearest',
        config.threshold,
        encoder_hash=encoder.model.hash,
        tokenizer=found[Tokenizer()],
        encoder=encoder,
    )

  facts = lambda requests, _: [
      Fact(one.id, one.question, new_fact(one)) for one in requests
  ]
  return memory_editor(make, facts, (Tokenizer(), TextEncoder()))


def memprompt(spec: ModelSpec, config: MemPromptConfig) -> Editor:
  """Makes the editor of `memprompt`."""
  del spec
  make = lambda found: FactMemory(
      (), '', 'closest', config.distance, tokenizer=found[Tokenizer()]
  )
  facts = lambda requests, _: [
      Fact(one.id, one.question, f'{statement(one)}. ') for one in requests
  ]
  return memory_editor(make, facts, (Tokenizer(),))


def _method(name: str, summary: str, config: type, editor: Any) -> Method:
  source = '2201.06009' if name == 'memprompt' else '2305.12740'
  return Method(
      name,
      summary,
      config,
      editor,
      accepts=frozenset({'fact'}),
      chunkable=False,
      contexts=False,
      by_text=True,
      encoders=True,
      source=f'arXiv {source}',
  )


METHODS = (
    _method('ice', 'the new fact is read before the prompt', IceConfig, ice),
    _method(
        'ike',
        'the new fact, after demonstrations, is read first',
        IkeConfig,
        ike,
    ),
    _method(
        'ike_retrieve',
        'of many facts, the one nearest to the prompt is read first',
        IkeRetrieveConfig,
        ike_retrieve,
    ),
    _method(
        'memprompt',
        'of many facts, the one closest to the prompt in wording is read first',
        MemPromptConfig,
        memprompt,
    ),
)
