"""The fields of each record format, read with every fault told.

A format is a function from the fields of one object to the parts of a
`types.Record`, all texts as they stand in the file; `datasets`, whose head
documents the formats, does what all formats share.

It does not open files and does not look at more than one record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxedit.text import locate
from jaxedit.types import Probe

OWN_FIELDS = (
    'prompt', 'subject', 'target_new', 'target_true', 'paraphrases',
    'neighbours', 'portability', 'id', 'comment',
)  # fmt: skip
JSON_NAMES = {
    type(None): 'null', bool: 'true or false', int: 'a number',
    float: 'a number', str: 'text', list: 'a list', dict: 'an object',
}  # fmt: skip


class Fields:
  """Takes typed fields out of an object and collects what is wrong."""

  def __init__(
      self,
      data: Mapping[str, Any] | None,
      inside: str = '',
      faults: list[str] | None = None,
  ):
    """Opens an object; None stands for one whose fault is told already."""
    self.data = {} if data is None else data
    self.faults = [] if faults is None else faults
    self._inside = inside
    self._told = data is None

  def get(self, name: str, wanted: type, default: Any = None) -> Any:
    """Returns a field of one type; without a default it must be there.

    Args:
      name: the field.
      wanted: its JSON type.
      default: taken where the field is absent or null.

    Returns:
      The value, the default, or None where the field is faulty.
    """
    value = self.data.get(name)
    if value is None and default is not None:
      return default
    if isinstance(value, wanted) or self._told:
      return value
    if name not in self.data:
      self.fault(name, 'is missing; add it.')
    else:
      given = JSON_NAMES[type(value)]
      self.fault(name, f'holds {given}; it must be {JSON_NAMES[wanted]}.')
    return None

  def text(self, name: str, optional: bool = False) -> str:
    """Returns a text, '' where it is faulty or may be absent and is."""
    if optional and self.data.get(name) is None:
      return ''
    value = self.get(name, str)
    if value is not None and not value.strip():
      self.fault(name, 'is empty; write some text or drop the record.')
    return locate.valid_unicode(value or '')

  def fault(self, name: str, what: str) -> None:
    """Makes a fault of what is said of a field."""
    self.faults.append(f"field '{self._inside}{name}' {what}")

  def refuse_others(self, known: Sequence[str]) -> None:
    """Makes a fault of every field that has none of the known names."""
    for name in self.data:
      if name not in known:
        self.faults.append(
            f'field {name!r} is unknown; known fields are {", ".join(known)}.'
        )

  def inner(self, name: str, optional: bool = False) -> Fields:
    """Opens an object inside this one."""
    value = self.get(name, dict, {} if optional else None)
    return Fields(value, f'{self._inside}{name}.', self.faults)

  def items(self, name: str, optional: bool = False) -> Fields:
    """Opens a list inside this object, as fields '[1]', '[2]', ..."""
    values = self.get(name, list, [] if optional else None)
    numbered = {f'[{i}]': value for i, value in enumerate(values or (), 1)}
    return Fields(numbered, self._inside + name, self.faults)

  def texts(self, name: str, optional: bool = False) -> tuple[str, ...]:
    """Returns a list of texts, without white space at their ends."""
    items = self.items(name, optional)
    return tuple(items.text(key).rstrip() for key in items.data)

  def probe(self, name: str) -> Probe:
    """Returns the probe {prompt, answer} of a field."""
    fields = self.inner(name)
    return Probe(fields.text('prompt').rstrip(), fields.text('answer').strip())


def counterfact(fields: Fields) -> dict[str, Any]:
  """Reads the official CounterFact."""
  rewrite = fields.inner('requested_rewrite')
  true = rewrite.inner('target_true').text('str')
  prompts = fields.texts('neighborhood_prompts', optional=True)
  return {
      'prompt': rewrite.text('prompt'),
      'subject': rewrite.text('subject'),
      'target_new': rewrite.inner('target_new').text('str'),
      'target_true': true,
      'paraphrases': fields.texts('paraphrase_prompts', optional=True),
      'neighbours': tuple(Probe(p, true.strip()) for p in prompts),
  }


def flat(fields: Fields) -> dict[str, Any]:
  """Reads EasyEdit's CounterFact."""
  neighbour = Probe(
      fields.text('locality_prompt').rstrip(),
      fields.text('locality_ground_truth').strip(),
  )
  return {
      'prompt': fields.text('prompt'),
      'subject': fields.text('subject'),
      'target_new': fields.text('target_new'),
      'target_true': fields.text('ground_truth'),
      'paraphrases': (fields.text('rephrase_prompt').rstrip(),),
      'neighbours': (neighbour,),
  }


def zsre(fields: Fields, target: str = 'alt') -> dict[str, Any]:
  """Reads zsRE; `target` names the field of the object to write."""
  answers = fields.texts('answers')
  if not answers and isinstance(fields.data.get('answers'), list):
    fields.fault('answers', 'is an empty list; add the answer.')
  answer = answers[0] if answers else ''
  # The questions come as NaturalQuestions inputs for a T5: as MEMIT reads them,
  # without the task's name and with the mark that makes them questions.
  question = fields.text('loc').removeprefix('nq question: ').rstrip()
  question += '' if question.endswith('?') else '?'
  written = target == 'answers'
  return {
      'prompt': fields.text('src'),
      'subject': fields.text('subject'),
      'target_new': answer if written else fields.text('alt'),
      'target_true': '' if written else answer,
      'paraphrases': (fields.text('rephrase').rstrip(),),
      'neighbours': (Probe(question, fields.text('loc_ans').strip()),),
  }


def zsre_answers(fields: Fields) -> dict[str, Any]:
  """Reads zsRE with the true answer as the object to write."""
  return zsre(fields, 'answers')


def own(fields: Fields) -> dict[str, Any]:
  """Reads our own format."""
  fields.refuse_others(OWN_FIELDS)
  true = fields.text('target_true', optional=True)
  portability = {}
  kinds = fields.inner('portability', optional=True)
  for kind in kinds.data:
    probes = kinds.items(kind)
    portability[kind] = tuple(map(probes.probe, probes.data))
  return {
      'prompt': fields.text('prompt'),
      'subject': fields.text('subject'),
      'target_new': fields.text('target_new'),
      'target_true': true,
      'paraphrases': fields.texts('paraphrases', optional=True),
      'neighbours': _own_neighbours(fields, true.strip()),
      'portability': portability,
  }


def _own_neighbours(fields: Fields, true: str) -> tuple[Probe, ...]:
  items = fields.items('neighbours', optional=True)
  probes = []
  for key, value in items.data.items():
    if isinstance(value, str):
      probes.append(Probe(items.text(key).rstrip(), true))
      if not true and not fields.data.get('target_true'):
        items.fault(
            key,
            'has no answer; give the record a target_true, or write'
            ' {"prompt": ..., "answer": ...}.',
        )
    else:
      probes.append(items.probe(key))
  return tuple(probes)


BUILDERS: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    'counterfact': counterfact,
    'counterfact_flat': flat,
    'zsre': zsre,
    'zsre_answers': zsre_answers,
    'jaxedit': own,
}
