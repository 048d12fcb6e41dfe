"""The official CounterFact.

  requested_rewrite     {prompt with '{}', subject, target_new {str}, target_true
                        {str}}
  paraphrase_prompts    list of texts or absent
  neighborhood_prompts  list of texts or absent; their right answer is the true
                        object
  case_id               the identifier

Other fields are passed over. Source: Meng et al. 2022, arXiv 2202.05262.
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
  rewrite = fields.inner('requested_rewrite')
  true = rewrite.inner('target_true').text('str').strip()
  prompts = fields.texts('neighborhood_prompts', optional=True)
  parts = {
      'prompt': rewrite.text('prompt'),
      'subject': rewrite.text('subject'),
      'target': rewrite.inner('target_new').text('str').strip(),
      'target_true': true,
  }
  probes = rephrases(
      fields.texts('paraphrase_prompts', optional=True), parts['target']
  ) + tuple(Probe(LOCALITY, prompt, (true,)) for prompt in prompts)
  return [parts | {'probes': probes}]


FORMAT = Format(
    'counterfact', FACT, frozenset({'requested_rewrite'}), read, finish_fact
)
