"""AKEW, in one of two forms, see `Options.facts`.

  requested_rewrite  one rewrite, or a list of them (the MQuAKE-CF part): one
                     case, whose requests have the ids '<case_id>.1', '.2', ...
                     and are edited together, as a multi-hop question needs them
                     all; AnyEdit takes the first alone
    unstructured     `question` -> `fact_new_uns`, a text. With
                     `paraphrase_prompts` (the CounterFact part) the question is
                     `prompt_full` where it is there, and the first of them is
                     the paraphrase, as published.
    structured       `prompt` with its subject -> `target_new` {str}
    sub-questions    the first of `unsfact_triplets_GPT`, `prompt` with its
                     subject -> `target`
  case_id            the identifier

Multi-hop questions are not read. Source: Wu et al. 2024, arXiv 2402.18909; the
protocol is that of AnyEdit (Jiang et al. 2025, arXiv 2502.05628).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxedit.eval.datasets import fields as lib
from jaxedit.text.cloze import PLACEHOLDER
from jaxedit.types import SUB_QUESTION, Probe, cloze_parts

FACTS = ('unstructured', 'structured')
_REWRITE = 'requested_rewrite'


def read(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads one object, which is a whole case."""
  if not isinstance(fields.data.get(_REWRITE), list):
    rewrite = fields.inner(_REWRITE)
    parts = _rewrite(rewrite, options)
    # CounterFact alone has paraphrases; there the published code asks the
    # cloze with its subject and takes the first paraphrase.
    asked = fields.texts('paraphrase_prompts', optional=True)[:1]
    full = rewrite.text('prompt_full', optional=True).strip()
    if asked and full and options.facts == 'unstructured':
      parts['prompt'] = full
    yield parts | {'rephrases': asked}
    return
  items = fields.items(_REWRITE)
  if not items.data:
    fields.error(_REWRITE, 'is an empty list; add the rewrite.')
  for i, key in enumerate(items.data, 1):
    own = {'id': f'{fields.id}.{i}', 'case': fields.id}
    yield own | _rewrite(items.inner(key), options)


def _rewrite(fields: lib.Fields, options: lib.Options) -> lib.Parts:
  """Reads a fact in the chosen form, with its sub-questions."""
  if options.facts == 'structured':
    question, answer = _filled(fields, whole=False), _object(fields)
  else:
    question = fields.text('question').strip()
    answer = fields.text('fact_new_uns').rstrip()
  triplets = fields.items('unsfact_triplets_GPT', optional=True)
  keys = list(triplets.data)[: options.triplets]
  return {
      'prompt': question,
      'target': answer,
      'probes': [_triplet(triplets.inner(key)) for key in keys],
  }


def _object(fields: lib.Fields) -> str:
  """Returns the text of the new object, given bare or as {str, id}."""
  if isinstance(fields.data.get('target_new'), str):
    return fields.target('target_new')
  return fields.inner('target_new').target('str')


def _triplet(fields: lib.Fields) -> Probe:
  prompt = _filled(fields, whole=True)
  return Probe(SUB_QUESTION, prompt, (fields.target('target'),))


def _filled(fields: lib.Fields, whole: bool) -> str:
  """Returns the prompt with its subject; a whole one may do without."""
  prompt, subject = fields.text('prompt'), fields.text('subject').strip()
  parts = cloze_parts(prompt)
  count = len(parts) - 1
  if count > 1 or (prompt.strip() and not count and not whole):
    fields.error(
        'prompt',
        f"has {count} placeholders; write '{PLACEHOLDER}' once, where the"
        ' subject goes.',
    )
  return subject.join(parts).strip()


def _matches(data: Mapping[str, Any]) -> bool:
  """Tells AKEW from CounterFact, which has no question in its rewrite."""
  rewrite = data.get(_REWRITE)
  return not isinstance(rewrite, dict) or 'fact_new_uns' in rewrite


FORMAT = lib.Format('akew', lib.TEXT, (_REWRITE,), read, matches=_matches)
