"""EasyEdit's CounterFact, prompts with the subject filled in.

  prompt, subject, target_new, ground_truth, rephrase_prompt   texts
  locality_prompt, locality_ground_truth                       a neighbour
  portability                                                  see `fields`
  case_id                                                      the identifier

Other fields are not read. Source: Wang et al. 2023, arXiv 2308.07269.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.text.joining import trim_prompt
from jaxedit.types import LOCALITY, Probe


def read(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads one object."""
  del options
  near = trim_prompt(fields.text('locality_prompt'))
  answer = fields.target('locality_ground_truth')
  yield {
      'prompt': fields.text('prompt'),
      'subject': fields.text('subject'),
      'target': fields.target('target_new'),
      'target_true': fields.target('ground_truth'),
      'rephrases': [trim_prompt(fields.text('rephrase_prompt'))],
      'probes': [Probe(LOCALITY, near, (answer,)), *lib.portability(fields)],
  }


FORMAT = lib.Format(
    'counterfact_flat',
    lib.FACT,
    ('locality_prompt', 'rephrase_prompt'),
    read,
    lib.finish_fact,
)
