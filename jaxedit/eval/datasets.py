"""Reads facts to edit from files, and says everything that is wrong with them.

A file holds one JSON object a line, or one JSON list of objects (UTF-8). Which
format it has is told by its fields:

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

import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxedit.eval import formats
from jaxedit.text import locate
from jaxedit.types import InputError, Record

DEMO = 'demo'
FORMATS = ('counterfact', 'counterfact_flat', 'zsre', 'jaxedit')
ZSRE_TARGETS = ('alt', 'answers')
_LISTED = 20  # faults told in full before only their count is


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record left out, and why."""

  number: int
  id: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a file held.

  Attributes:
    records: the good records, in the file's order.
    skipped: the bad ones that were passed over.
    source: the path as given, or 'demo'.
    sha256: of the file's bytes, in hex.
    format: the format it was read as.
  """

  records: tuple[Record, ...]
  skipped: tuple[Skipped, ...]
  source: str
  sha256: str
  format: str


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One object of the file, or what kept it from being read."""

  number: int
  data: Any
  fault: str = ''

  @property
  def id(self) -> str:
    if isinstance(self.data, dict):
      for name in ('id', 'case_id'):
        value = self.data.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
          return locate.valid_unicode(str(value))
    return str(self.number)


def load_records(
    path_or_name: str | os.PathLike[str],
    *,
    format: str = 'auto',  # pylint: disable=redefined-builtin
    limit: int | None = None,
    on_bad_record: str = 'fail',
    check: Callable[[Record], list[str]] | None = None,
    zsre_target: str = 'alt',
) -> Loaded:
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
  _check_options(format, limit, on_bad_record, zsre_target)
  source = os.fspath(path_or_name)
  blob = _read(source)
  text = _decode(blob, source)
  kind = _detect(text, source) if format == 'auto' else format
  convert = _Converter(kind, zsre_target, check)
  records, skipped, faults = [], [], []
  for seen, entry in enumerate(_entries(text, source)):
    if limit is not None and limit <= (
        seen if on_bad_record == 'fail' else len(records)
    ):
      break
    record, found = convert(entry)
    if not found:
      records.append(record)
    else:
      skipped.append(Skipped(entry.number, entry.id, ' '.join(found)))
      name = f'record {entry.number} (id {entry.id})'
      faults.extend(f'{name}: {fault}' for fault in found)
  if faults and (on_bad_record == 'fail' or not records):
    raise InputError(*_shorten(faults, source))
  if not records:
    raise InputError(f'{source}: holds no records; give a file with facts.')
  digest = hashlib.sha256(blob).hexdigest()
  return Loaded(tuple(records), tuple(skipped), source, digest, kind)


def _check_options(
    kind: str, limit: int | None, on_bad_record: str, zsre_target: str
) -> None:
  problems = []
  for name, value, known in (
      ('format', kind, ('auto', *FORMATS)),
      ('on_bad_record', on_bad_record, ('fail', 'skip')),
      ('zsre_target', zsre_target, ZSRE_TARGETS),
  ):
    if value not in known:
      problems.append(
          f'{name} {value!r} is unknown; use one of {", ".join(known)}.'
      )
  if limit is not None and limit < 1:
    problems.append(f'limit {limit} leaves no record; give 1 or more.')
  if problems:
    raise InputError(*problems)


def _shorten(faults: Sequence[str], source: str) -> list[str]:
  if len(faults) <= _LISTED:
    return list(faults)
  return [
      *faults[:_LISTED],
      f'{source}: {len(faults)} faults in all, the first {_LISTED} are listed;'
      ' mend the file, or skip bad records.',
  ]


def _read(source: str) -> bytes:
  if source == DEMO:
    package = importlib.resources.files('jaxedit.eval')
    return package.joinpath('demo_facts.jsonl').read_bytes()
  try:
    return pathlib.Path(source).read_bytes()
  except FileNotFoundError as error:
    raise InputError(
        f"{source}: there is no such file; check the path, or use '{DEMO}' for"
        ' the facts that come with the package.'
    ) from error
  except OSError as error:
    raise InputError(
        f'{source}: cannot be read ({error.strerror}); give a file of records.'
    ) from error


def _decode(blob: bytes, source: str) -> str:
  try:
    return blob.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = blob.count(b'\n', 0, error.start) + 1
    raise InputError(
        f'{source}: line {line} is not UTF-8; save the file as UTF-8.'
    ) from error


def _entries(text: str, source: str) -> Iterator[_Entry]:
  """Yields the objects of a list, or of the lines, numbered from 1."""
  if text.lstrip()[:1] == '[':
    try:
      values = json.loads(text)
    except (ValueError, RecursionError) as error:
      line = getattr(error, 'lineno', 1)
      raise InputError(
          f'{source}: not JSON at line {line} ({error}); mend the list there.'
      ) from error
    yield from (_Entry(i, value) for i, value in enumerate(values, 1))
    return
  number = 0
  # Not splitlines: JSON texts may hold U+2028 and its like as they are.
  for line, piece in enumerate(text.split('\n'), 1):
    if not piece.strip():
      continue
    number += 1
    try:
      yield _Entry(number, json.loads(piece))
    except (ValueError, RecursionError) as error:
      reason = getattr(error, 'msg', 'nested too deeply')
      yield _Entry(
          number,
          None,
          f'not JSON at line {line} ({reason}); write one object a line, or'
          ' one list of objects.',
      )


def _detect(text: str, source: str) -> str:
  """Tells the format by the first object with known fields."""
  unknown, faults, empty = None, [], True
  for entry in _entries(text, source):
    empty = False
    if isinstance(entry.data, dict):
      if 'requested_rewrite' in entry.data:
        return 'counterfact'
      if 'src' in entry.data:
        return 'zsre'
      if {'locality_prompt', 'rephrase_prompt'} & entry.data.keys():
        return 'counterfact_flat'
      if {'prompt', 'target_new'} & entry.data.keys():
        return 'jaxedit'
      unknown = unknown or entry
    elif entry.fault:
      faults.append(f'record {entry.number} (id {entry.id}): {entry.fault}')
  if empty:
    raise InputError(f'{source}: holds no records; give a file with facts.')
  if unknown is None and faults:
    raise InputError(*_shorten(faults, source))
  fields = ', '.join(map(repr, unknown.data)) if unknown else 'no objects'
  raise InputError(
      f'{source}: no known format has these fields ({fields}); known formats'
      f' are {", ".join(FORMATS)}; our own needs prompt, subject and'
      ' target_new.'
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

  def __call__(self, entry: _Entry) -> tuple[Record | None, list[str]]:
    """Returns the record and its faults; the record is good without any."""
    if entry.fault:
      return None, [entry.fault]
    if not isinstance(entry.data, dict):
      given = formats.JSON_NAMES[type(entry.data)]
      return None, [f'the record is {given}; it must be an object.']
    fields = formats.Fields(entry.data)
    parts = self._build(fields)
    record = _finish(entry, parts, fields.faults)
    if record is None:
      return None, fields.faults
    faults = list(self._check(record)) if self._check else []
    key = (_squeeze(record.subject), _squeeze(record.prompt))
    earlier = self._seen.get(key)
    if earlier is not None:
      faults.append(_repeated(record, earlier))
    if not faults:
      self._seen[key] = record
    return record, faults


def _squeeze(text: str) -> str:
  return ' '.join(text.split())


def _repeated(record: Record, earlier: Record) -> str:
  name = f'record {earlier.number} (id {earlier.id})'
  if _squeeze(record.target_new) == _squeeze(earlier.target_new):
    return f'it makes the same edit as {name}; drop one of them.'
  return (
      f'it writes {record.target_new!r} where {name} writes'
      f' {earlier.target_new!r} for the same subject and prompt; keep one.'
  )


def _finish(
    entry: _Entry, parts: dict[str, Any], faults: list[str]
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
  if new and _squeeze(new) == _squeeze(true):
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
