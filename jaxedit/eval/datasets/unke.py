"""UnKEBench.

  question, para_question, answer   texts
  sub_question, sub_answer          lists of texts, one answer a sub-question
  id                                the identifier

Other fields are passed over. Source: Deng et al. 2024, arXiv 2405.15349.
"""

from __future__ import annotations

from jaxedit.eval.datasets.fields import (
    TEXT,
    Fields,
    Format,
    Options,
    Parts,
    rephrases,
)
from jaxedit.types import SUB_QUESTION, Probe


def read(fields: Fields, name: str, options: Options) -> list[Parts]:
  """Reads one object."""
  del name, options
  questions, answers = fields.texts('sub_question'), fields.texts('sub_answer')
  if len(questions) != len(answers) and not fields.errors:
    fields.errors.append(
        f"fields 'sub_question' and 'sub_answer' hold {len(questions)} and"
        f' {len(answers)} texts; give each sub-question one answer.'
    )
  parts = {
      'prompt': fields.text('question').strip(),
      'subject': None,
      'target': fields.text('answer').rstrip(),
  }
  probes = rephrases(
      [fields.text('para_question').strip()], parts['target']
  ) + tuple(
      Probe(SUB_QUESTION, question, (answer.strip(),))
      for question, answer in zip(questions, answers, strict=False)
  )
  return [parts | {'probes': probes}]


FORMAT = Format(
    'unke',
    TEXT,
    frozenset({'para_question', 'sub_question', 'sub_answer'}),
    read,
)
