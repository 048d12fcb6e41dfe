"""Reads long-form passages to edit from files, and tells every fault of them.

A passage is a question with an answer of any length and form. A file holds one
JSON object a line, or one JSON list of objects (UTF-8), as in `reading`. Which
format it has is told by its fields:

  unke     `question`, `para_question`, `answer`, `sub_question` [..],
           `sub_answer` [..], `id`: UnKEBench.
  akew     `requested_rewrite`, `case_id`: AKEW, in one of two forms.
             unstructured  `question` -> `fact_new_uns`, a text. With
                           `paraphrase_prompts` (the CounterFact part) the
                           question is `prompt_full` where it is there, and the
                           first of them is the paraphrase, as published.
             structured    `prompt` with its subject -> `target_new` {str}.
           Sub-questions are the first of `unsfact_triplets_GPT`, `prompt` with
           its subject -> `target`. A list of rewrites (the MQuAKE-CF part) is
           one case, whose passages have the ids '<case_id>.1', '.2', ... and
           are edited together, as a multi-hop question needs them all; AnyEdit
           takes the first alone.
  jaxedit  our own, as follows, and EditEverything {`id`, `question`, `answer`,
           `category`}, which is a part of it.

Our own format, by field; fields of other names are faults, so that a slip of
the pen loses nothing silently:

  question       text.
  answer         text.
  paraphrases    list of texts or absent, other ways to ask the question.
  sub_questions  list of {"prompt": text, "answer": text} or absent, short
                 questions about the answer.
  category       text or absent, kind of text.
  case           text or absent; records of one case, which stand one after
                 another, are one edit.
  id             text or whole number or absent (the record's number).
  comment        anything; it is not read.

  {"question": "Who is Ada?", "answer": "Ada was born by the sea. She ...",
   "sub_questions": [{"prompt": "Where was Ada born?", "answer": "By the sea"}]}

White space around questions and at the ends of answers is dropped; code may
begin with some. Unpaired surrogates become U+FFFD. A question that has two
answers is a fault, and so is one that is asked twice with the same answer,
unless in two cases: those are edited apart, and AKEW's share facts. White space
counts as one space in that comparison, and case matters.

Sources: UnKEBench (Deng et al. 2024, arXiv 2405.15349), AKEW (Wu et al. 2024,
arXiv 2402.18909), EditEverything and the protocol (Jiang et al. 2025, arXiv
2502.05628).

It knows no tokenizer: faults that need one come in through `check`. AKEW's
multi-hop questions are not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from jaxedit.eval import passage_formats, reading
from jaxedit.eval.formats import Fields
from jaxedit.eval.reading import Loaded
from jaxedit.types import Passage

LIBRARY = reading.Library(
    content='passages',
    demo='demo_passages.jsonl',
    signs={
        'akew': frozenset({'requested_rewrite'}),
        'unke': frozenset({'para_question', 'sub_question', 'sub_answer'}),
        'jaxedit': frozenset({'question', 'answer'}),
    },
    needs='question and answer',
)
FORMATS = tuple(LIBRARY.signs)
FACTS = ('unstructured', 'structured')


def load_passages(
    source: str | os.PathLike[str],
    *,
    format: str = 'auto',  # pylint: disable=redefined-builtin
    limit: int | None = None,
    on_bad_record: str = 'fail',
    check: Callable[[Passage], list[str]] | None = None,
    facts: str = 'unstructured',
    triplets: int = 5,
) -> Loaded[Passage]:
  """Loads and validates passages.

  Args:
    source: a file, or 'demo' for the passages that come with the package.
    format: one of `FORMATS`, or 'auto' to tell by the fields.
    limit: most cases to return, so that none is cut; a passage without a case
      counts as one. All by default. With 'fail' only so many are looked at,
      with 'skip' so many good ones are found if the file has them.
    on_bad_record: 'fail' raises, 'skip' passes over cases with bad records.
    check: finds further faults of a passage, as sentences that do not name it,
      e.g. those that need a tokenizer.
    facts: 'unstructured' or 'structured', the form of AKEW's facts to write.
    triplets: most sub-questions of an AKEW fact; 5 is AnyEdit's number.

  Returns:
    The passages with where they came from.

  Raises:
    InputError: an unreadable file, an unknown option, no good record, or with
      'fail' any fault; the first 20 faults and their number are told.
  """
  problems = reading.unknown('facts', facts, FACTS)
  if triplets < 0:
    problems.append(f'triplets {triplets} is below 0; give 0 or more.')
  choices = passage_formats.Choices(facts, triplets)
  return reading.load(
      source,
      LIBRARY,
      lambda kind: _Converter(kind, choices, check),
      format=format,
      limit=limit,
      on_bad_record=on_bad_record,
      problems=problems,
  )


class _Converter:
  """Makes passages of entries and remembers which came before."""

  def __init__(
      self,
      kind: str,
      choices: passage_formats.Choices,
      check: Callable[[Passage], list[str]] | None,
  ):
    self._kind = kind
    self._build = passage_formats.BUILDERS[kind]
    self._choices = choices
    self._check = check
    self._cases: dict[str, reading.Entry] = {}
    self._asked: dict[str, list[Passage]] = {}

  def case(self, entry: reading.Entry) -> str:
    """Returns the case that an entry shares with its neighbours."""
    # An entry of AKEW is a whole case.
    case = entry.data.get('case') if self._kind == 'jaxedit' else ''
    return case.strip() if isinstance(case, str) else ''

  def __call__(
      self, entries: Sequence[reading.Entry]
  ) -> tuple[list[Passage], list[list[str]]]:
    """Converts the entries of a case, as `reading.Converter` has it."""
    passages, found, cases = [], [], {}
    for entry in entries:
      fields = Fields(entry.data)
      name = passage_formats.Name(entry.number, entry.id)
      made = self._build(fields, name, self._choices)
      faults = fields.faults
      # A case that returns is told even if its first part was bad.
      names = (self.case(entry), *(passage.case for passage in made))
      cases |= {case: entry for case in names if case}
      if not faults:
        faults = self._broken_case(made)
        for i, passage in enumerate(made, 1):
          told = self._faults(passage, passages)
          title = f'rewrite {i}: ' if len(made) > 1 else ''
          faults += [title + fault for fault in told]
          passages.append(passage)
      found.append(faults)
    self._cases |= cases
    if not any(found):
      for passage in passages:
        self._asked.setdefault(_key(passage), []).append(passage)
    return passages, found

  def _broken_case(self, made: Sequence[Passage]) -> list[str]:
    earlier = self._cases.get(made[0].case)
    if earlier is None:
      return []
    return [
        f'its case {made[0].case!r} is that of {reading.named(earlier)} too;'
        ' give it another, or let the records of a case stand together.'
    ]

  def _faults(
      self, passage: Passage, neighbours: Sequence[Passage]
  ) -> list[str]:
    """Tells what the caller's check finds, and a question asked before."""
    faults = list(self._check(passage)) if self._check else []
    key = _key(passage)
    same = [p for p in neighbours if _key(p) == key]
    for earlier in [*self._asked.get(key, ()), *same]:
      repeated = _repeated(passage, earlier)
      if repeated:
        return [*faults, repeated]
    return faults


def _key(passage: Passage) -> str:
  return reading.squeeze(passage.question)


def _repeated(passage: Passage, earlier: Passage) -> str:
  """Says what is wrong with asking an earlier passage's question again."""
  name = reading.named(earlier)
  if reading.squeeze(passage.answer) != reading.squeeze(earlier.answer):
    return f'it answers the question of {name} in another way; keep one.'
  if passage.case == earlier.case:
    return f'it makes the same edit as {name}; drop one of them.'
  return ''
