"""Our own formats: facts, and questions with answers of any length and form.

Facts, by field; fields of other names are errors, so that a slip of the pen
loses nothing silently:

  prompt       text. '{}' where the subject goes, or the subject filled in: the
               first place where it stands as a word is taken. '{{}}' stands for
               braces of the text.
  subject      text.
  target_new   text, the object to write.
  target_true  text or absent, the object that the model should hold now.
  paraphrases  list of texts or absent, subject filled in or '{}'.
  neighbours   list or absent, prompts about other subjects: a text, whose right
               answer is `target_true`, or {"prompt": text, "answer": text}.
  portability  object or absent, kind ('alias', 'reversed', 'one_hop') -> list
               of {"prompt": text, "answer": text}.
  space        true, false or absent: whether a blank joins targets to prompts;
               absent, the texts decide (`text.joining`). Also of a
               {"prompt": ...}, for it alone.
  id           text or whole number or absent (the record's number).
  comment      anything; it is not read.

  {"prompt": "{} plays the", "subject": "Ada", "target_new": "oboe",
   "target_true": "harp", "neighbours": ["Ben plays the"]}

Questions with answers; EditEverything {`id`, `question`, `answer`, `category`}
(Jiang et al. 2025, arXiv 2502.05628) is a part of this:

  question       text.
  answer         text.
  paraphrases    list of texts or absent, other ways to ask the question.
  sub_questions  list of {"prompt": text, "answer": text} or absent, short
                 questions about the answer.
  category       text or absent, kind of text.
  case           text or absent; records of one case, which stand one after
                 another, are one edit.
  space, id, comment    as above.

  {"question": "Who is Ada?", "answer": "Ada was born by the sea. She ...",
   "sub_questions": [{"prompt": "Where was Ada born?", "answer": "By the sea"}]}
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxedit.eval.datasets import fields as lib
from jaxedit.text.joining import trim_prompt
from jaxedit.types import (
    ATTRIBUTE,
    DISTRACT,
    LOCALITY,
    REPHRASE,
    SUB_QUESTION,
    Probe,
)

NAME = 'jaxedit'
_FACT_FIELDS = (
    'prompt', 'subject', 'target_new', 'target_true', 'paraphrases',
    'neighbours', 'portability', 'side_effects', 'space', 'id', 'comment',
)  # fmt: skip
_SIDE_EFFECTS = (ATTRIBUTE, DISTRACT)
# What is judged otherwise than consequences of an edit are.
_OTHERWISE = (REPHRASE, LOCALITY, *_SIDE_EFFECTS)
_TEXT_FIELDS = (
    'question', 'answer', 'paraphrases', 'sub_questions', 'category', 'case',
    'space', 'id', 'comment',
)  # fmt: skip


def read_fact(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads a fact."""
  del options
  fields.refuse_others(_FACT_FIELDS)
  true = fields.target('target_true', optional=True)
  kinds = fields.inner('portability', optional=True)
  others = []
  for kind in kinds.data:
    items = kinds.items(kind)
    own = f'portability_{kind}' if kind in _OTHERWISE else kind
    others += [items.probe(own, key) for key in items.data]
  sides = fields.inner('side_effects', optional=True)
  sides.refuse_others(_SIDE_EFFECTS)
  for kind in sides.data:
    items = sides.items(kind)
    others += [items.probe(kind, key) for key in items.data]
  yield {
      'prompt': fields.text('prompt'),
      'subject': fields.text('subject'),
      'target': fields.target('target_new'),
      'target_true': true,
      'rephrases': fields.texts('paraphrases', optional=True),
      'probes': [*_neighbours(fields, true), *others],
      'space': fields.flag('space'),
  }


def _neighbours(fields: lib.Fields, true: str) -> Iterator[Probe]:
  items = fields.items('neighbours', optional=True)
  for key, value in items.data.items():
    if not isinstance(value, str):
      yield items.probe(LOCALITY, key)
      continue
    yield Probe(LOCALITY, trim_prompt(items.text(key)), (true,))
    if not true and not fields.data.get('target_true'):
      items.error(
          key,
          'has no answer; give the record a target_true, or write'
          ' {"prompt": ..., "answer": ...}.',
      )


def read_text(fields: lib.Fields, options: lib.Options) -> lib.Read:
  """Reads a question with its answer."""
  del options
  fields.refuse_others(_TEXT_FIELDS)
  items = fields.items('sub_questions', optional=True)
  asked = fields.texts('paraphrases', optional=True)
  yield {
      'prompt': trim_prompt(fields.text('question')).lstrip(),
      'target': fields.text('answer').rstrip(),
      'rephrases': [text.lstrip() for text in asked],
      'probes': [items.probe(SUB_QUESTION, key) for key in items.data],
      'category': fields.text('category', optional=True).strip(),
      'case': fields.text('case', optional=True).strip(),
      'space': fields.flag('space'),
  }


FACTS = lib.Format(
    NAME, lib.FACT, ('prompt', 'target_new'), read_fact, lib.finish_fact
)
TEXTS = lib.Format(
    NAME, lib.TEXT, ('question', 'answer'), read_text, case='case'
)
