"""zsRE as split by MEND.

  src, subject, rephrase   texts; `src` is the prompt with its subject
  alt, answers             the object to write is `alt` (EasyEdit), and the
                           first of `answers` is true; or that one is written
                           (ROME, MEMIT), see `Options.zsre_target`
  loc, loc_ans             a neighbour, a NaturalQuestions input
  portability, ...         what EasyEdit adds, see `survey`

Other fields are not read. Source: Mitchell et al. 2021, arXiv 2110.11309.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.eval.datasets import survey
from jaxedit.text.joining import trim_prompt
from jaxedit.types import LOCALITY, Probe

TARGETS = ('alt', 'answers')


def read(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads one object."""
  answers = fields.texts('answers')
  if not answers and isinstance(fields.data.get('answers'), list):
    fields.error('answers', 'is an empty list; add the answer.')
  true = answers[0].strip() if answers else ''
  # The questions come as NaturalQuestions inputs for a T5: as MEMIT reads them,
  # without the task's name and with the mark that makes them questions.
  question = fields.text('loc').removeprefix('nq question: ').rstrip()
  question += '' if question.endswith('?') else '?'
  written = options.zsre_target == 'answers'
  new = true if written else fields.target('alt')
  yield {
      'prompt': fields.text('src'),
      'subject': fields.text('subject'),
      'target': new,
      'target_true': '' if written else true,
      'rephrases': [trim_prompt(fields.text('rephrase'))],
      'probes': [
          Probe(LOCALITY, question, (fields.target('loc_ans'),)),
          *survey.zsre(fields, new),
      ],
  }


FORMAT = lib.Format('zsre', lib.FACT, ('src',), read, lib.finish_fact)
