"""The official CounterFact.

  requested_rewrite     {prompt with '{}', subject, target_new {str},
                        target_true {str}}
  paraphrase_prompts    list of texts or absent
  neighborhood_prompts  list of texts or absent; their right answer is the true
                        object
  case_id               the identifier
  portability, ...      what the survey's files add, see `survey`

Other fields are not read. Source: Meng et al. 2022, arXiv 2202.05262.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.eval.datasets import survey
from jaxedit.text.cloze import resolve
from jaxedit.types import LOCALITY, Probe


def read(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads one object."""
  del options
  rewrite = fields.inner('requested_rewrite')
  true = rewrite.inner('target_true').target('str')
  new = rewrite.inner('target_new').target('str')
  prompt, subject = rewrite.text('prompt'), rewrite.text('subject')
  near = fields.texts('neighborhood_prompts', optional=True)
  yield {
      'prompt': prompt,
      'subject': subject,
      'target': new,
      'target_true': true,
      'rephrases': fields.texts('paraphrase_prompts', optional=True),
      'probes': [
          *(Probe(LOCALITY, text, (true,)) for text in near),
          *survey.counterfact(fields, resolve(prompt, subject), new, true),
      ],
  }


FORMAT = lib.Format(
    'counterfact', lib.FACT, ('requested_rewrite',), read, lib.finish_fact
)
