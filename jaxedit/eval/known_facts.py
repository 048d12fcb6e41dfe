"""Reads facts that a model may know: a prompt, its subject and what follows.

A file holds one JSON object a line, or one JSON list of objects (UTF-8), as in
`reading`. Which format it has is told by its fields:

  known      `prompt` with the subject filled in, `subject`, `attribute` (what
             follows the prompt), and maybe `template`, the same text with '{}'
             where the subject goes, and `known_id`: the known facts of ROME.
             Other fields are passed over.
  the others as in `datasets`, for files of facts to edit; the attribute is the
             true object, the object to write is not looked at.

The template says which occurrence of the subject is meant, as far as it agrees
with the prompt; otherwise the first one that stands as a word is taken. A
record without a prompt has its template filled in.

Two facts may ask the same: the published file has such a pair, and counts both.

Source of the format: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.

It knows no tokenizer and no model: whether a model knows a fact is not its
business, and faults that need a tokenizer come in through `check`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxedit.eval import datasets, formats, reading
from jaxedit.eval.reading import Loaded
from jaxedit.text import locate

KNOWN = 'known'
LIBRARY = reading.Library(
    content='facts',
    demo=datasets.LIBRARY.demo,
    # Facts to edit have an object to write; what has none is a known fact.
    signs={
        **datasets.LIBRARY.signs,
        'jaxedit': frozenset({'target_new'}),
        KNOWN: frozenset({'attribute', 'known_id', 'prompt'}),
    },
    needs='prompt, subject and attribute',
)
FORMATS = tuple(LIBRARY.signs)


@dataclasses.dataclass(frozen=True)
class Fact:
  """A fact to look for in a model.

  Attributes:
    number: place in its file, counted from 1; error messages use it.
    id: the data set's own identifier.
    prompt: cloze with exactly one '{}' where the subject goes.
    subject: the subject's text.
    attribute: what should follow, without white space at its ends; '' if
      nothing is said of it.
  """

  number: int
  id: str
  prompt: str
  subject: str
  attribute: str = ''

  @property
  def question(self) -> str:
    """The prompt with its subject."""
    return self.prompt.replace(locate.PLACEHOLDER, self.subject)

  @property
  def parts(self) -> tuple[str, str, str]:
    """The text before the subject, the subject, the text after it."""
    before, _, after = self.prompt.partition(locate.PLACEHOLDER)
    return before, self.subject, after


def load_facts(
    path_or_name: str | os.PathLike[str],
    *,
    format: str = 'auto',  # pylint: disable=redefined-builtin
    limit: int | None = None,
    on_bad_record: str = 'fail',
    check: Callable[[Fact], list[str]] | None = None,
) -> Loaded[Fact]:
  """Loads and validates facts.

  Args:
    path_or_name: a file, or 'demo' for the facts that come with the package.
    format: one of `FORMATS`, or 'auto' to tell by the fields.
    limit: most facts to return; all by default. With 'fail' only so many
      records are looked at, with 'skip' so many good ones are found if the
      file has them.
    on_bad_record: 'fail' raises, 'skip' passes over bad records.
    check: finds further faults of a fact, as sentences that do not name it,
      e.g. those that need a tokenizer.

  Returns:
    The facts with where they came from.

  Raises:
    InputError: an unreadable file, an unknown option, no good record, or with
      'fail' any fault; the first 20 faults and their number are told.
  """
  return reading.load(
      path_or_name,
      LIBRARY,
      lambda kind: _Converter(kind, check),
      format=format,
      limit=limit,
      on_bad_record=on_bad_record,
  )


def single(prompt: str, subject: str) -> tuple[Fact | None, list[str]]:
  """Makes the only fact of a run from two texts.

  Args:
    prompt: text with the subject filled in, or a '{}' in its place.
    subject: the subject.

  Returns:
    The fact, numbered 1, or None; and what is wrong, in sentences.
  """
  texts = {'prompt': prompt, 'subject': subject}
  fields = formats.Fields(texts)
  parts = {name: fields.text(name) for name in texts}
  cloze = _cloze(parts['prompt'], parts['subject'], '', fields.faults)
  if fields.faults:
    return None, fields.faults
  return Fact(1, '1', cloze, parts['subject'].strip()), []


class _Converter:
  """Makes facts of entries."""

  def __init__(self, kind: str, check: Callable[[Fact], list[str]] | None):
    self._build = _known if kind == KNOWN else _edited(formats.BUILDERS[kind])
    self._check = check

  def case(self, entry: reading.Entry) -> str:
    """Returns no case: each fact stands alone."""
    del entry
    return ''

  def __call__(
      self, entries: Sequence[reading.Entry]
  ) -> tuple[list[Fact], list[list[str]]]:
    """Converts one entry, as `reading.Converter` has it."""
    (entry,) = entries
    fields = formats.Fields(entry.data)
    parts = self._build(fields)
    cloze = _cloze(
        parts['prompt'],
        parts['subject'],
        parts.get('template', ''),
        fields.faults,
    )
    if fields.faults:
      return [], [fields.faults]
    fact = Fact(
        number=entry.number,
        id=entry.id,
        prompt=cloze,
        subject=parts['subject'].strip(),
        attribute=parts['attribute'].strip(),
    )
    return [fact], [list(self._check(fact)) if self._check else []]


def _known(fields: formats.Fields) -> dict[str, Any]:
  """Reads a known fact of ROME."""
  subject = fields.text('subject')
  # Some templates lack the last words of their prompt.
  template = fields.text('template', optional=True)
  return {
      'prompt': fields.text('prompt', optional=bool(template)) or template,
      'subject': subject,
      'attribute': fields.text('attribute'),
      'template': template,
  }


def _edited(
    build: Callable[[formats.Fields], dict[str, Any]],
) -> Callable[[formats.Fields], dict[str, Any]]:
  """Reads a fact to edit as one that the model may know."""

  def read(fields: formats.Fields) -> dict[str, Any]:
    parts = build(fields)
    if not parts['target_true'].strip() and not fields.faults:
      fields.faults.append(
          'the record does not say what is true, so nobody can tell whether the'
          ' model knows it; add the true object.'
      )
    return {
        'prompt': parts['prompt'],
        'subject': parts['subject'],
        'attribute': parts['target_true'],
    }

  return read


def _cloze(prompt: str, subject: str, template: str, faults: list[str]) -> str:
  """Puts '{}' where the subject is; what is wrong goes to `faults`."""
  subject, mark = subject.strip(), locate.PLACEHOLDER
  if mark in prompt:
    if prompt.count(mark) > 1:
      faults.append(
          f"the prompt has {prompt.count(mark)} placeholders; write '{mark}'"
          ' once, where the subject goes.'
      )
    return prompt.rstrip()
  before, found, _ = template.partition(mark)
  if found and prompt.startswith(before + subject):
    return before + mark + prompt[len(before + subject) :].rstrip()
  cloze = locate.make_cloze(prompt.rstrip(), subject)
  if cloze is None and prompt.strip() and subject:
    where = 'only inside a longer word' if subject in prompt else 'nowhere'
    faults.append(
        f'the subject {subject!r} is {where} in the prompt {prompt!r}; write'
        f" the subject as it stands there, or '{mark}' in its place."
    )
  return cloze or ''
