"""Typed fields of a JSON object with their errors, and what a format is.

A format reads the fields of one object of a file into the parts of
`types.EditRequest`s; what all formats share is in `reading`. An object with
errors may become anything.

It does not open files and does not look at more than one object.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxedit.text import locate
from jaxedit.text.cloze import fill, plain_form, resolve
from jaxedit.text.joining import trim_prompt, trim_target
from jaxedit.types import ALIAS, ONE_HOP, REPHRASE, Probe

FACT, TEXT, KNOWN = 'fact', 'text', 'known'  # kinds of requests
# EasyEdit's words for kinds of probes that have one of ours.
_KINDS = {'subject_aliasing': ALIAS, 'reasoning': ONE_HOP}
# Of a text. Longer ones are no edits, and take minutes and GiB to tokenise.
MOST_CHARACTERS = 200_000
JSON_NAMES = {
    type(None): 'null', bool: 'true or false', int: 'a number',
    float: 'a number', str: 'text', list: 'a list', dict: 'an object',
}  # fmt: skip


class Fields:
  """Takes typed fields out of an object and collects errors."""

  def __init__(
      self,
      data: Mapping[str, Any] | None,
      inside: str = '',
      errors: list[str] | None = None,
      id: str = '',  # pylint: disable=redefined-builtin
  ):
    """Opens an object; None stands for one whose error is reported already."""
    self.data = {} if data is None else data
    self.errors = [] if errors is None else errors
    self.seen: set[str] = set()  # names of fields that were asked for
    self.inside, self.id = inside, id
    self._reported = data is None

  def get(self, name: str, wanted: type, default: Any = None) -> Any:
    """Returns a field of one type; without a default it must be there.

    Args:
      name: the field.
      wanted: its JSON type.
      default: taken where the field is absent or null.

    Returns:
      The value, the default, or None where the field has an error.
    """
    self.seen.add(name)
    value = self.data.get(name)
    if value is None and default is not None:
      return default
    if isinstance(value, wanted) or self._reported:
      return value
    if name not in self.data:
      self.error(name, 'is missing; add it.')
    else:
      given = JSON_NAMES[type(value)]
      self.error(name, f'holds {given}; it must be {JSON_NAMES[wanted]}.')
    return None

  def text(self, name: str, optional: bool = False) -> str:
    """Returns a text, '' where it has an error or may be absent and is."""
    self.seen.add(name)
    if optional and self.data.get(name) is None:
      return ''
    value = self.get(name, str)
    if value is not None and len(value) > MOST_CHARACTERS:
      self.error(
          name,
          f'has {len(value):,} characters; give {MOST_CHARACTERS:,} at most.',
      )
      return ''
    if value is not None and not value.strip():
      self.error(name, 'is empty; write some text or drop the record.')
    return locate.valid_unicode(value or '')

  def error(self, name: str, what: str) -> None:
    """Reports an error of a field."""
    self.errors.append(f"field '{self.inside}{name}' {what}")

  def refuse_others(self, known: Sequence[str]) -> None:
    """Reports every field that has none of the known names."""
    self.seen.update(known)
    for name in self.data:
      if name not in known:
        self.errors.append(
            f'field {name!r} is unknown; known fields are {", ".join(known)}.'
        )

  def inner(self, name: str, optional: bool = False) -> Fields:
    """Opens an object inside this one."""
    value = self.get(name, dict, {} if optional else None)
    return Fields(value, f'{self.inside}{name}.', self.errors)

  def items(self, name: str, optional: bool = False) -> Fields:
    """Opens a list inside this object, as fields '[1]', '[2]', ..."""
    values = self.get(name, list, [] if optional else None)
    numbered = {f'[{i}]': value for i, value in enumerate(values or (), 1)}
    return Fields(numbered, self.inside + name, self.errors)

  def texts(self, name: str, optional: bool = False) -> tuple[str, ...]:
    """Returns a list of prompts, without blanks at their ends."""
    items = self.items(name, optional)
    return tuple(trim_prompt(items.text(key)) for key in items.data)

  def target(self, name: str, optional: bool = False) -> str:
    """Returns a text that continues a prompt, without white space around it."""
    return trim_target(self.text(name, optional))

  def flag(self, name: str) -> bool | None:
    """Returns true or false, or None where the field is absent."""
    given = self.data.get(name)
    return None if given is None else self.get(name, bool)

  def probe(self, kind: str, name: str) -> Probe:
    """Returns the probe {prompt, answer, space} of a field."""
    fields = self.inner(name)
    prompt = trim_prompt(fields.text('prompt'))
    return Probe(kind, prompt, (fields.target('answer'),), fields.flag('space'))


def portability(fields: Fields) -> list[Probe]:
  """Reads what EasyEdit's files say of an edit's consequences, if anything.

  `portability` is {"New Question": text, "New Answer": text}, or an object of
  kind -> {"prompt": text, "ground_truth": text or list} or a list of these.

  Args:
    fields: of a record.
  """
  if not fields.data.get('portability'):
    fields.seen.add('portability')
    return []
  inner = fields.inner('portability')
  if 'New Question' in inner.data:
    question = trim_prompt(inner.text('New Question'))
    return [Probe(ONE_HOP, question, (inner.target('New Answer'),))]
  found = []
  for name, value in inner.data.items():
    kind = re.sub(r'\W+', '_', name.strip()).lower()
    several = isinstance(value, list)
    items = inner.items(name) if several else inner
    for key in items.data if several else [name]:
      one = items.inner(key)
      prompt = trim_prompt(one.text('prompt'))
      answers = _answers(one, 'ground_truth')
      found.append(Probe(_KINDS.get(kind, kind), prompt, answers))
  return found


def _answers(fields: Fields, name: str) -> tuple[str, ...]:
  """Returns a text, or the texts of a list, which may lie in lists."""
  given = fields.data.get(name)
  while isinstance(given, list) and given and isinstance(given[0], list):
    given = given[0]
  if not isinstance(given, list):
    return (fields.target(name),)
  texts = Fields({name: given}, fields.inside, fields.errors).texts(name)
  if not texts:
    fields.error(name, 'is an empty list; add the answer.')
  return tuple(map(trim_target, texts)) or ('',)


class Options(NamedTuple):
  """What the caller of the loader may choose.

  Attributes:
    zsre_target: 'alt' or 'answers', the field of zsRE that holds the target.
    facts: 'unstructured' or 'structured', the form of AKEW's facts to write.
    triplets: most sub-questions of an AKEW fact; 5 is AnyEdit's number.
  """

  zsre_target: str = 'alt'
  facts: str = 'unstructured'
  triplets: int = 5


Parts = dict[str, Any]
Read = Iterator[Parts]  # the parts of each request of an object


class Format(NamedTuple):
  """What the objects of a file are.

  Attributes:
    name: as a user gives it.
    kind: 'fact', 'text' (long answers) or 'known' (facts to trace).
    signs: fields of which one is enough to tell the format.
    read: (fields, options) -> parts of each request of an object: fields of
      `EditRequest`, of which number and id are the object's unless given, and
      'rephrases', prompts of its rephrase probes.
    finish: (parts, errors) -> parts; finds what is wrong between fields.
    matches: of formats that share a sign, the first that matches is meant.
    case: field with the name of the case that an object is of, '' for none.
  """

  name: str
  kind: str
  signs: tuple[str, ...]
  read: Callable[[Fields, Options], Read]
  finish: Callable[[Parts, list[str]], Parts] = lambda parts, errors: parts
  matches: Callable[[Mapping[str, Any]], bool] = lambda data: True
  case: str = ''


def finish_fact(parts: Parts, errors: list[str]) -> Parts:
  """Puts '{}' where the subject is, and the subject where a probe has '{}'."""
  cloze = resolve(parts['prompt'], parts['subject'])
  errors.extend(cloze.errors)
  new, true = parts['target'], parts['target_true']
  if new and plain_form(new).split() == plain_form(true).split():
    errors.append(
        f'target_new and target_true are both {new!r}; there is nothing to'
        ' edit, give another target.'
    )
  rephrased = [Probe(REPHRASE, text, (new,)) for text in parts['rephrases']]
  probes = []
  for probe in (*rephrased, *parts['probes']):
    if probe.space is None:
      probe = dataclasses.replace(probe, space=parts.get('space'))
    probe, found = fill(probe, cloze.subject)
    probes.append(probe)
    errors.extend(found)
  return parts | {
      'prompt': cloze.prompt,
      'subject': cloze.subject,
      'target_true': true or None,
      'rephrases': (),
      'probes': probes,
  }
