"""Reads facts to edit from files, and says everything that is wrong with them.

A file holds one JSON object a line, or one JSON list of objects (UTF-8), as in
`reading`. Which format it has is told by its fields:

  counterfact       `requested_rewrite` {prompt, subject, target_new {str},
                    target_true {str}}, `paraphrase_prompts`,
                    `neighborhood_prompts`, `case_id`: the official CounterFact.
  counterfact_flat  `prompt` and `rephrase_prompt` with the subject filled in,
                    `subject`, `target_new`, `ground_truth`, `locality_prompt`,
                    `locality_ground_truth`, `case_id`: EasyEdit's CounterFact.
  zsre              `src`, `subject`, `alt`, `answers`, `rephrase`, `loc`,
                    `loc_ans`: zsRE as split by MEND. The object to write is
                    `alt` (EasyEdit) or `answers[0]` (ROME, MEMIT).
  jaxedit           our own, as follows.

Our own format, by field; fields of other names are faults, so that a slip of
the pen loses nothing silently:

  prompt       text. '{}' where the subject goes, or the subject filled in: the
               first place where it stands as a word is taken.
  subject      text.
  target_new   text, the object to write.
  target_true  text or absent, the object that the model should hold now.
  paraphrases  list of texts or absent, subject filled in.
  neighbours   list or absent, prompts about other subjects: a text, whose right
               answer is `target_true`, or {"prompt": text, "answer": text}.
  portability  object or absent, kind ('alias', 'reversed', 'one_hop') -> list
               of {"prompt": text, "answer": text}.
  id           text or whole number or absent (the record's number).
  comment      anything; it is not read.

  {"prompt": "{} plays the", "subject": "Ada", "target_new": "oboe",
   "target_true": "harp", "neighbours": ["Ben plays the"]}

White space around targets and answers and after prompts is dropped, as a target
brings its own space; unpaired surrogates become U+FFFD. Two records that edit
one (subject, prompt) are a fault, whether their targets agree or not. White
space counts as one space in that comparison, and case matters.

It knows no tokenizer: faults that need one come in through `check`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxedit.eval import formats, reading
from jaxedit.eval.reading import Loaded
from jaxedit.text import locate
from jaxedit.types import InputError, Record

LIBRARY = reading.Library(
    content='facts',
    demo='demo_facts.jsonl',
    signs={
        'counterfact': frozenset({'requested_rewrite'}),
        'zsre': frozenset({'src'}),
        'counterfact_flat': frozenset({'locality_prompt', 'rephrase_prompt'}),
        'jaxedit': frozenset({'prompt', 'target_new'}),
    },
    needs='prompt, subject and target_new',
)
FORMATS = tuple(LIBRARY.signs)
ZSRE_TARGETS = ('alt', 'answers')


def load_records(
    path_or_name: str | os.PathLike[str],
    *,
    format: str = 'auto',  # pylint: disable=redefined-builtin
    limit: int | None = None,
    on_bad_record: str = 'fail',
    check: Callable[[Record], list[str]] | None = None,
    zsre_target: str = 'alt',
) -> Loaded[Record]:
  """Loads and validates records.

  Args:
    path_or_name: a file, or 'demo' for the facts that come with the package.
    format: one of `FORMATS`, or 'auto' to tell by the fields.
    limit: most records to return; all by default. With 'fail' only so many
      records are looked at, with 'skip' so many good ones are found if the
      file has them.
    on_bad_record: 'fail' raises, 'skip' passes over bad records.
    check: finds further faults of a record, as sentences that do not name it,
      e.g. those that need a tokenizer.
    zsre_target: 'alt' or 'answers', the field that holds the object to write.

  Returns:
    The records with where they came from.

  Raises:
    InputError: an unreadable file, an unknown option, no good record, or with
      'fail' any fault; the first 20 faults and their number are told.
  """
  return reading.load(
      path_or_name,
      LIBRARY,
      lambda kind: _Converter(kind, zsre_target, check),
      format=format,
      limit=limit,
      on_bad_record=on_bad_record,
      problems=reading.unknown('zsre_target', zsre_target, ZSRE_TARGETS),
  )


class _Converter:
  """Makes records of entries and remembers which edits came before."""

  def __init__(
      self,
      kind: str,
      zsre_target: str,
      check: Callable[[Record], list[str]] | None,
  ):
    answers = kind == 'zsre' and zsre_target == 'answers'
    self._build = formats.BUILDERS['zsre_answers' if answers else kind]
    self._check = check
    self._seen: dict[tuple[str, str], Record] = {}

  def case(self, entry: reading.Entry) -> str:
    """Returns no case: each fact is an edit."""
    del entry
    return ''

  def __call__(
      self, entries: Sequence[reading.Entry]
  ) -> tuple[list[Record], list[list[str]]]:
    """Converts one entry, as `reading.Converter` has it."""
    (entry,) = entries
    fields = formats.Fields(entry.data)
    parts = self._build(fields)
    record = _finish(entry, parts, fields.faults)
    if record is None:
      return [], [fields.faults]
    faults = list(self._check(record)) if self._check else []
    key = (reading.squeeze(record.subject), reading.squeeze(record.prompt))
    earlier = self._seen.get(key)
    if earlier is not None:
      faults.append(_repeated(record, earlier))
    if not faults:
      self._seen[key] = record
    return [record], [faults]


def _repeated(record: Record, earlier: Record) -> str:
  name = reading.named(earlier)
  if reading.squeeze(record.target_new) == reading.squeeze(earlier.target_new):
    return f'it makes the same edit as {name}; drop one of them.'
  return (
      f'it writes {record.target_new!r} where {name} writes'
      f' {earlier.target_new!r} for the same subject and prompt; keep one.'
  )


def _finish(
    entry: reading.Entry, parts: dict[str, Any], faults: list[str]
) -> Record | None:
  """Checks what all formats share; returns None where there are faults."""
  subject, prompt = parts['subject'], parts['prompt'].rstrip()
  count = prompt.count(locate.PLACEHOLDER)
  if count > 1:
    faults.append(
        f"the prompt has {count} placeholders; write '{{}}' once, where the"
        ' subject goes.'
    )
  elif not count and prompt.strip() and subject.strip():
    subject = subject.strip()
    cloze = locate.make_cloze(prompt, subject)
    if cloze is None:
      where = 'only inside a longer word' if subject in prompt else 'nowhere'
      faults.append(
          f'the subject {subject!r} is {where} in the prompt {prompt!r}; write'
          " '{}' where the subject goes."
      )
    prompt = cloze or prompt
  new, true = parts['target_new'].strip(), parts['target_true'].strip()
  if new and reading.squeeze(new) == reading.squeeze(true):
    faults.append(
        f'target_new and target_true are both {new!r}; there is nothing to'
        ' edit, give another target.'
    )
  if faults:
    return None
  return Record(
      number=entry.number,
      id=entry.id,
      prompt=prompt,
      subject=subject,
      target_new=new,
      target_true=true or None,
      paraphrases=parts['paraphrases'],
      neighbours=parts['neighbours'],
      portability=parts.get('portability', {}),
  )


def kind_of(path_or_name: str | os.PathLike[str]) -> str:
  """Says whether a file holds facts ('fact') or long answers ('text')."""
  from jaxedit.eval import passages

  try:
    load_records(path_or_name, limit=1, on_bad_record='skip')
  except InputError:
    passages.load_passages(path_or_name, limit=1, on_bad_record='skip')
    return 'text'
  return 'fact'
