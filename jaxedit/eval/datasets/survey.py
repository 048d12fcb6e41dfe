"""Probes that EasyEdit's files for the survey add to CounterFact and zsRE.

  portability                       a question one hop on, see `fields`
  alternative_subject               CounterFact: another name of the subject
  alter_subject_question            zsRE: the question under another name
  inverse question                  zsRE: asks for the subject
  unrelated_relation                CounterFact: {question, object} of another
                                    attribute of the subject
  distracting_neighborhood_prompts  CounterFact: neighbours after the edit was
                                    stated; their right answer is the true object

Each is a file of its own there, so that a record has one kind, or none. Source:
Yao et al. 2023 (arXiv 2305.13172), sections 5.1 and 5.2.
"""

from __future__ import annotations

from jaxedit.eval.datasets import fields as lib
from jaxedit.text.cloze import Cloze
from jaxedit.text.joining import trim_prompt
from jaxedit.types import (
    ALIAS,
    ATTRIBUTE,
    DISTRACT,
    REVERSED,
    Probe,
    cloze_parts,
)


def counterfact(
    fields: lib.Fields, cloze: Cloze, new: str, true: str
) -> list[Probe]:
  """Reads the probes of a record of CounterFact.

  Args:
    fields: of the record.
    cloze: its prompt.
    new: the object to write.
    true: the true object.
  """
  found = lib.portability(fields)
  alias = _text(fields, 'alternative_subject').strip()
  if alias and not cloze.errors:
    found.append(Probe(ALIAS, alias.join(cloze_parts(cloze.prompt)), (new,)))
  if _is_given(fields, 'unrelated_relation'):
    other = fields.inner('unrelated_relation')
    question = trim_prompt(other.text('question'))
    found.append(Probe(ATTRIBUTE, question, (other.target('object'),)))
  near = fields.texts('distracting_neighborhood_prompts', optional=True)
  return [*found, *(Probe(DISTRACT, text, (true,)) for text in near)]


def zsre(fields: lib.Fields, new: str) -> list[Probe]:
  """Reads the probes of a record of zsRE.

  Args:
    fields: of the record.
    new: the object to write.
  """
  found = lib.portability(fields)
  alias = trim_prompt(_text(fields, 'alter_subject_question'))
  if alias:
    found.append(Probe(ALIAS, alias, (new,)))
  inverse = trim_prompt(_text(fields, 'inverse question'))
  if inverse:
    found.append(Probe(REVERSED, inverse, (fields.target('subject'),)))
  return found


def _is_given(fields: lib.Fields, name: str) -> bool:
  """Whether a record has a field and something in it."""
  fields.seen.add(name)
  return bool(fields.data.get(name))


def _text(fields: lib.Fields, name: str) -> str:
  return fields.text(name) if _is_given(fields, name) else ''
