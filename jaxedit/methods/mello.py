"""MeLLo: the model asks itself sub-questions and checks them against a memory.

  X  ->  sub-question, tentative answer, the nearest stored fact, check; ...
     ->  final answer

An edit is a statement in a memory; no weight changes. See `edited.dialogue` for
the rounds and for what scoring means.

Source: Zhong et al. 2023, "MQuAKE" (MeLLo, arXiv 2305.14795), for models that
follow demonstrations well. The demonstrations are ours, the encoder is that of
the other retrieving methods (published: Contriever), and there are four
retrievals, where the published code counts four texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxedit.edited import dialogue
from jaxedit.edited.dialogue import FactDialogue
from jaxedit.edited.prompting import Fact
from jaxedit.methods.base import Editor, Method, Need, TextEncoder, Tokenizer
from jaxedit.methods.config import MethodConfig
from jaxedit.methods.memories import memory_editor, statement
from jaxedit.methods.settings import setting
from jaxedit.models.encoder import Encoder
from jaxedit.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class MelloConfig(MethodConfig):
  """Settings of `mello`.

  Attributes:
    rounds: retrievals of a question.
    round_tokens: tokens that the model may write in a round.
  """

  rounds: int = setting(4, 'retrievals a question at most', source='MeLLo',
                        low=1, high=16)  # fmt: skip
  round_tokens: int = setting(
      128,
      'what the model may write in a round (published 256)',
      unit='tokens',
      low=1,
  )


def _step(
    question: str, answer: str, fact: str, holds: str, contradicts: bool
) -> str:
  verdict = 'contradicts the answer' if contradicts else 'says nothing else'
  return (
      f'{dialogue.SUBQUESTION} {question}\n{dialogue.TENTATIVE} {answer}\n'
      f'{dialogue.RETRIEVED} {fact}\n'
      f'{dialogue.CHECK} the fact {verdict}, so what holds is: {holds}\n'
  )


def _shown(question: str, *steps: str, answer: str) -> str:
  return (
      f'{dialogue.QUESTION} {question}\n{"".join(steps)}'
      f'{dialogue.FINAL} {answer}'
  )


DEMONSTRATIONS = '\n\n'.join(
    (
        _shown(
            'What is the capital of the country that Elin Marsh is a citizen'
            ' of?',
            _step(
                'Which country is Elin Marsh a citizen of?',
                'Elin Marsh is a citizen of Canada.',
                'Elin Marsh is a citizen of Norway.',
                'Norway',
                True,
            ),
            _step(
                'What is the capital of Norway?',
                'The capital of Norway is Oslo.',
                'The author of The Salt Road is Ida Brandt.',
                'Oslo',
                False,
            ),
            answer='Oslo',
        ),
        _shown(
            'The harp maker Tom Adeyemi speaks the language of',
            _step(
                'Which language does Tom Adeyemi speak?',
                'Tom Adeyemi speaks English.',
                'Tom Adeyemi speaks the language of Portugal.',
                'Portugal',
                True,
            ),
            answer='Portugal',
        ),
        _shown(
            'On which continent is the country where the author of The Salt'
            ' Road was born?',
            _step(
                'Who is the author of The Salt Road?',
                'The author of The Salt Road is Per Lund.',
                'The author of The Salt Road is Ida Brandt.',
                'Ida Brandt',
                True,
            ),
            _step(
                'In which country was Ida Brandt born?',
                'Ida Brandt was born in Kenya.',
                'Elin Marsh is a citizen of Norway.',
                'Kenya',
                False,
            ),
            _step(
                'On which continent is Kenya?',
                'Kenya is on the continent of Africa.',
                'Kenya is on the continent of Asia.',
                'Asia',
                True,
            ),
            answer='Asia',
        ),
    )
)


def mello(spec: ModelSpec, config: MelloConfig) -> Editor:
  """Makes the editor; its edit is a memory that prompts ask in rounds."""
  del spec

  def make(found: Mapping[Need, Any]) -> FactDialogue:
    encoder: Encoder = found[TextEncoder()]
    return FactDialogue(
        (),
        demonstrations=DEMONSTRATIONS,
        rounds=config.rounds,
        round_tokens=config.round_tokens,
        encoder_hash=encoder.model.hash,
        tokenizer=found[Tokenizer()],
        encoder=encoder,
    )

  facts = lambda requests, _: [
      Fact(one.id, statement(one), f'{statement(one)}.') for one in requests
  ]
  return memory_editor(make, facts, (Tokenizer(), TextEncoder()))


METHOD = Method(
    'mello',
    'questions are answered in steps, each checked against a memory of facts',
    MelloConfig,
    mello,
    accepts=frozenset({'fact'}),
    chunkable=False,
    contexts=False,
    by_text=True,
    source='arXiv 2305.14795',
)
