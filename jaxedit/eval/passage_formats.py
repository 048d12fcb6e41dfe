"""The fields of each passage format, read with every fault told.

A format is a function from the fields of one entry to its `types.Passage`s;
`passages`, whose head documents the formats, does what all formats share. What
an entry with faults becomes is of no matter.

It does not open files and does not look at more than one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxedit.eval.formats import Fields
from jaxedit.text.locate import PLACEHOLDER
from jaxedit.types import Passage, Probe

OWN_FIELDS = (
    'question', 'answer', 'paraphrases', 'sub_questions', 'category', 'case',
    'id', 'comment',
)  # fmt: skip


class Choices(NamedTuple):
  """What the caller of the loader may choose.

  Attributes:
    facts: 'unstructured' or 'structured', the form of AKEW's facts to write.
    triplets: most sub-questions of an AKEW fact.
  """

  facts: str
  triplets: int


class Name(NamedTuple):
  """What an entry is called: its number and its identifier."""

  number: int
  id: str


def unke(fields: Fields, name: Name, choices: Choices) -> list[Passage]:
  """Reads UnKEBench."""
  del choices
  questions, answers = fields.texts('sub_question'), fields.texts('sub_answer')
  if len(questions) != len(answers) and not fields.faults:
    fields.faults.append(
        f"fields 'sub_question' and 'sub_answer' hold {len(questions)} and"
        f' {len(answers)} texts; give each sub-question one answer.'
    )
  probes = zip(questions, answers, strict=False)
  return [
      Passage(
          **name._asdict(),
          question=fields.text('question').strip(),
          answer=fields.text('answer').rstrip(),
          paraphrases=(fields.text('para_question').strip(),),
          sub_questions=tuple(Probe(q, a.strip()) for q, a in probes),
      )
  ]


def akew(fields: Fields, name: Name, choices: Choices) -> list[Passage]:
  """Reads a case of AKEW: one rewrite, or a list of them."""
  field = 'requested_rewrite'
  if not isinstance(fields.data.get(field), list):
    rewrite = fields.inner(field)
    parts = _rewrite(rewrite, choices)
    # CounterFact alone has paraphrases; there the published code asks the
    # cloze with its subject and takes the first paraphrase.
    paraphrases = fields.texts('paraphrase_prompts', optional=True)[:1]
    full = rewrite.text('prompt_full', optional=True).strip()
    if paraphrases and full and choices.facts == 'unstructured':
      parts['question'] = full
    return [Passage(**name._asdict(), **parts, paraphrases=paraphrases)]
  items = fields.items(field)
  if not items.data:
    fields.fault(field, 'is an empty list; add the rewrite.')
  return [
      Passage(
          number=name.number,
          id=f'{name.id}.{i}',
          case=name.id,
          **_rewrite(items.inner(key), choices),
      )
      for i, key in enumerate(items.data, 1)
  ]


def own(fields: Fields, name: Name, choices: Choices) -> list[Passage]:
  """Reads our own format, of which EditEverything's is a part."""
  del choices
  fields.refuse_others(OWN_FIELDS)
  probes = fields.items('sub_questions', optional=True)
  paraphrases = fields.texts('paraphrases', optional=True)
  return [
      Passage(
          **name._asdict(),
          question=fields.text('question').strip(),
          answer=fields.text('answer').rstrip(),
          paraphrases=tuple(text.strip() for text in paraphrases),
          sub_questions=tuple(map(probes.probe, probes.data)),
          category=fields.text('category', optional=True).strip(),
          case=fields.text('case', optional=True).strip(),
      )
  ]


def _rewrite(fields: Fields, choices: Choices) -> dict[str, Any]:
  """Reads a fact of AKEW in the chosen form, with its sub-questions."""
  if choices.facts == 'structured':
    question, answer = _filled(fields, whole=False), _object(fields)
  else:
    question = fields.text('question').strip()
    answer = fields.text('fact_new_uns').rstrip()
  triplets = fields.items('unsfact_triplets_GPT', optional=True)
  keys = list(triplets.data)[: choices.triplets]
  return {
      'question': question,
      'answer': answer,
      'sub_questions': tuple(_triplet(triplets.inner(key)) for key in keys),
  }


def _object(fields: Fields) -> str:
  """Returns the text of the new object, given bare or as {str, id}."""
  if isinstance(fields.data.get('target_new'), str):
    return fields.text('target_new').strip()
  return fields.inner('target_new').text('str').strip()


def _triplet(fields: Fields) -> Probe:
  return Probe(_filled(fields, whole=True), fields.text('target').strip())


def _filled(fields: Fields, whole: bool) -> str:
  """Returns the prompt with its subject; a whole one may do without."""
  prompt, subject = fields.text('prompt'), fields.text('subject').strip()
  count = prompt.count(PLACEHOLDER)
  if count > 1 or (prompt.strip() and not count and not whole):
    fields.fault(
        'prompt',
        f"has {count} placeholders; write '{PLACEHOLDER}' once, where the"
        ' subject goes.',
    )
  return prompt.replace(PLACEHOLDER, subject).strip()


Builder = Callable[[Fields, Name, Choices], list[Passage]]

BUILDERS: Mapping[str, Builder] = {'unke': unke, 'akew': akew, 'jaxedit': own}
