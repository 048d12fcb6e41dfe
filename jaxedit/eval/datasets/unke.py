"""UnKEBench.

  question, para_question, answer   texts
  sub_question, sub_answer          lists of texts, one answer a sub-question
  id                                the identifier

Other fields are not read. Source: Deng et al. 2024, arXiv 2405.15349.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.types import SUB_QUESTION, Probe


def read(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads one object."""
  del options
  questions, answers = fields.texts('sub_question'), fields.texts('sub_answer')
  if len(questions) != len(answers) and not fields.errors:
    fields.errors.append(
        f"fields 'sub_question' and 'sub_answer' hold {len(questions)} and"
        f' {len(answers)} texts; give each sub-question one answer.'
    )
  yield {
      'prompt': fields.text('question').strip(),
      'target': fields.text('answer').rstrip(),
      'rephrases': [fields.text('para_question').strip()],
      'probes': [
          Probe(SUB_QUESTION, question, (answer.strip(),))
          for question, answer in zip(questions, answers)
      ],
  }


FORMAT = lib.Format(
    'unke', lib.TEXT, ('para_question', 'sub_question', 'sub_answer'), read
)
