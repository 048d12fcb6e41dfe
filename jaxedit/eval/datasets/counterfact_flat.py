"""EasyEdit's CounterFact, prompts with the subject filled in.

  prompt, subject, target_new, ground_truth, rephrase_prompt   texts
  locality_prompt, locality_ground_truth                       a neighbour
  case_id                                                      the identifier

Other fields are passed over. Source: Wang et al. 2023, arXiv 2308.07269.
"""

from __future__ import annotations

from jaxedit.eval.datasets.fields import (
    FACT,
    Fields,
    Format,
    Options,
    Parts,
    finish_fact,
    rephrases,
)
from jaxedit.types import LOCALITY, Probe


def read(fields: Fields, name: str, options: Options) -> list[Parts]:
  """Reads one object."""
  del name, options
  neighbour = Probe(
      LOCALITY,
      fields.text('locality_prompt').rstrip(),
      (fields.text('locality_ground_truth').strip(),),
  )
  parts = {
      'prompt': fields.text('prompt'),
      'subject': fields.text('subject'),
      'target': fields.text('target_new').strip(),
      'target_true': fields.text('ground_truth').strip(),
  }
  asked = rephrases([fields.text('rephrase_prompt').rstrip()], parts['target'])
  return [parts | {'probes': (*asked, neighbour)}]


FORMAT = Format(
    'counterfact_flat',
    FACT,
    frozenset({'locality_prompt', 'rephrase_prompt'}),
    read,
    finish_fact,
)
