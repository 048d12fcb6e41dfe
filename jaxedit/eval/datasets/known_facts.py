"""Facts that a model may know, for tracing: prompt, subject, what follows.

  prompt     text with the subject filled in; without one the template is filled
  subject    text
  attribute  text, what follows the prompt
  template   text or absent, the prompt with '{}' where the subject goes
  known_id   the identifier

Other fields are not read: the known facts of ROME (Meng et al. 2022, arXiv
2202.05262, section 2). Facts to edit are read as well; there the true object
follows, and the object to write is not looked at.

The template says which occurrence of the subject is meant, as far as it agrees
with the prompt; otherwise the first one that stands as a word is taken. The
`target` of a request is what should follow, '' if nothing is said of it.
Whether a model knows a fact is not its business.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.text.cloze import PLACEHOLDER, Cloze, resolve
from jaxedit.text.joining import trim_prompt
from jaxedit.types import EditRequest, cloze_parts

NAME = 'known'


def read(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads one object."""
  del options
  subject = fields.text('subject')
  # Some templates lack the last words of their prompt.
  template = fields.text('template', optional=True)
  yield {
      'prompt': fields.text('prompt', optional=bool(template)) or template,
      'subject': subject,
      'target': fields.target('attribute'),
      'template': template,
  }


def finish(parts: lib.Parts, errors: list[str]) -> lib.Parts:
  """Puts '{}' where the subject is."""
  prompt, subject = parts['prompt'], parts['subject'].strip()
  before, *rest = cloze_parts(parts.get('template', ''))
  given = before + subject
  if rest and len(cloze_parts(prompt)) == 1 and prompt.startswith(given):
    # Two fields agree on the place, so nothing is left to find or to doubt.
    prompt = prompt[: len(before)] + PLACEHOLDER + prompt[len(given) :]
    cloze = Cloze(trim_prompt(prompt), subject)
  else:
    cloze = resolve(prompt, subject)
  errors.extend(cloze.errors)
  return {
      'prompt': cloze.prompt,
      'subject': cloze.subject,
      'target': parts['target'],
  }


def traced(edited: lib.Format) -> lib.Format:
  """Makes the format of facts to trace of one of facts to edit."""

  def finish_edited(parts: lib.Parts, errors: list[str]) -> lib.Parts:
    if not parts['target_true'] and not errors:
      errors.append(
          'the record does not say what is true, so nobody can tell whether the'
          ' model knows it; add the true object.'
      )
    return finish(parts | {'target': parts['target_true']}, errors)

  # Facts to edit have an object to write; what has none is a known fact.
  signs = tuple(sign for sign in edited.signs if sign != 'prompt')
  return edited._replace(kind=lib.KNOWN, signs=signs, finish=finish_edited)


def single(prompt: str, subject: str) -> tuple[EditRequest | None, list[str]]:
  """Makes the only fact of a run from two texts.

  Args:
    prompt: text with the subject filled in, or a '{}' in its place.
    subject: the subject.

  Returns:
    The fact, numbered 1, or None; and its errors.
  """
  fields = lib.Fields({'prompt': prompt, 'subject': subject})
  parts = {name: fields.text(name) for name in fields.data} | {'target': ''}
  fact = EditRequest(1, '1', **finish(parts, fields.errors))
  return None if fields.errors else fact, fields.errors


FORMAT = lib.Format(
    NAME, lib.KNOWN, ('attribute', 'known_id', 'prompt'), read, finish
)
