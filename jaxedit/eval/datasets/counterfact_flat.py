"""EasyEdit's CounterFact, prompts with the subject filled in.

  prompt, subject, target_new, ground_truth, rephrase_prompt   texts
  locality_prompt, locality_ground_truth                       a neighbour
  case_id                                                      the identifier

Other fields are passed over. Source: Wang et al. 2023, arXiv 2308.07269.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.types import LOCALITY, Probe


def read(
    fields: lib.Fields, name: str, options: lib.Options
) -> list[lib.Parts]:
  """Reads one object."""
  del name, options
  near = fields.text('locality_prompt').rstrip()
  answer = fields.text('locality_ground_truth').strip()
  return [
      {
          'prompt': fields.text('prompt'),
          'subject': fields.text('subject'),
          'target': fields.text('target_new').strip(),
          'target_true': fields.text('ground_truth').strip(),
          'rephrases': [fields.text('rephrase_prompt').rstrip()],
          'probes': [Probe(LOCALITY, near, (answer,))],
      }
  ]


FORMAT = lib.Format(
    'counterfact_flat',
    lib.FACT,
    ('locality_prompt', 'rephrase_prompt'),
    read,
    lib.finish_fact,
)
