"""Text for second moments: files, data sets, or the model's own samples.

A corpus is named by one string:

  self                      sampled from the model, no data needed
  file:PATH                 plain text, cut into documents by its own shape
  jsonl:PATH:FIELD          one JSON object a line, a document in FIELD
  hf:ID[:CONFIG[:FIELD]]    a Hugging Face data set, split 'train'

Documents come in an order that the seed shuffles. Samples are drawn from the
model's own distribution at temperature 1 among the most probable tokens: keys
of such text stand in for those of the training text where that is not at hand.

Not here: packing (`batching.packer`), collecting (`moments`).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxedit import io
from jaxedit.models import assets, decode
from jaxedit.models.spec import ModelSpec
from jaxedit.stats import accumulate, shipped
from jaxedit.types import InputError, Params, Progress, silent

KINDS = 'self, file:PATH, jsonl:PATH:FIELD or hf:ID[:CONFIG[:FIELD]]'
# Documents that a streamed data set is shuffled among.
_BUFFER = 10_000
# Of a text file, which is read whole.
_MOST_BYTES = 1 << 31
# Characters of a document that are tokenised for each token that is taken: more
# than any token of text has. Tokenising takes 600 times a text's memory.
_CHARACTERS = 64
# Faults of a file that are told in full.
_SHOWN = 20
_SAMPLES = 'jaxedit sampled text 1'
# Of samples: tokens to add to a start, texts at once, most probable tokens.
LENGTH, ROWS, TOP_K = 64, 64, 50
_TITLE = re.compile(r'= (?!=).*(?<!=) =')

# What samples begin with where a model has no token to begin with: short and
# unlike each other, so that the samples are. One word alone leaves small models
# without a thread.
STARTS = (
    'The city of', 'The first time', 'The company was', 'A small village',
    'In the summer of', 'When the war', 'It is known', 'There are many',
    'After a long', 'On the night of', 'He was born', 'She wrote her',
    'They lived in', 'We found that', 'I remember the', 'You can make',
    'This book is', 'Most people think', 'Many birds', 'Some of the oldest',
    'One of the largest', 'Two years later', 'During the last century',
    'Because the river', 'Although he never', 'While working at', 'If you want',
    'For a long time', 'At the age of', 'By the end of', 'With the help of',
    'From the top of', 'Since the early', 'Before the bridge', 'Under the law',
    'Between the two', 'According to a', 'The president of', 'The film stars',
    'The team played', 'My friend and I', 'Our planet', 'Their second album',
    'His father was', 'Her work in', 'The language spoken', 'Scientists have',
    'Today the museum', 'Last year, a', 'The king of', 'Once upon a',
    'How does a', 'What makes the', 'The capital of', 'The church was built',
    'The train from', 'Every student', 'The song was', 'Both of the',
    'All of the water', 'The disease is', 'The programming language',
    'To make bread', 'The island lies',
)  # fmt: skip


def _read(path: str | os.PathLike[str]) -> str:
  """Reads a UTF-8 file."""
  try:
    return io.read_bytes(path, _MOST_BYTES).decode('utf-8-sig')
  except OSError as error:
    raise InputError(
        f'{path}: cannot be read ({error.strerror}); check the path'
    ) from error
  except UnicodeDecodeError as error:
    raise InputError(
        f'{path}: is not UTF-8 text (byte {error.start}); convert it first'
    ) from error


def text_documents(path: str | os.PathLike[str]) -> list[str]:
  """Reads a text file as documents.

  A file with headings ` = Title = ` (WikiText) is cut there, at the first level
  only; one with blank lines into paragraphs; any other into lines.

  Args:
    path: UTF-8 file.

  Returns:
    Documents that are not blank, in order.

  Raises:
    InputError: the file cannot be read or holds no text.
  """
  lines = _read(path).splitlines()
  titles = [i for i, x in enumerate(lines) if _TITLE.fullmatch(x.strip())]
  if titles:
    cuts = itertools.pairwise([0, *titles, len(lines)])
    parts = ['\n'.join(lines[first:last]) for first, last in cuts]
  elif any(not line.strip() for line in lines[:-1]):
    parts = re.split(r'\n\s*\n', '\n'.join(lines))
  else:
    parts = lines
  documents = [part.strip() for part in parts if part.strip()]
  if not documents:
    raise InputError(f'{path}: holds no text')
  return documents


def jsonl_documents(path: str | os.PathLike[str], field: str) -> list[str]:
  """Reads one field of a JSONL file as documents.

  Args:
    path: UTF-8 file with one JSON object a line; blank lines are skipped.
    field: its text.

  Returns:
    Documents that are not blank, in order.

  Raises:
    InputError: the file cannot be read or holds no text, or lines are not
      objects with a string in that field; all such lines at once.
  """
  problems, documents = [], []
  # Other marks that Unicode calls line ends may stand in a JSON string.
  for number, line in enumerate(_read(path).split('\n'), 1):
    if not line.strip():
      continue
    try:
      record = io.parse_json(line)
      text = record.get(field) if isinstance(record, dict) else None
    except ValueError:
      problems.append(f'{path}: line {number} is not valid JSON')
      continue
    if isinstance(text, str):
      documents.append(text.strip())
      continue
    have = ', '.join(record) if isinstance(record, dict) else 'none'
    problems.append(
        f'{path}: line {number} has no text in field {field!r}; its fields'
        f' are: {have}'
    )
  if len(problems) > _SHOWN:
    more = len(problems) - _SHOWN
    problems[_SHOWN:] = [f'{path}: {more} more lines have such faults']
  documents = [text for text in documents if text]
  if not documents and not problems:
    problems.append(f'{path}: holds no text in field {field!r}')
  InputError.raise_for(problems)
  return documents


def hub_documents(
    name: str, config: str | None, field: str, *, seed: int
) -> Iterator[str]:
  """Streams the documents of a Hugging Face data set.

  Only what is read is fetched. The order is shuffled within a buffer of 10,000
  documents.

  Args:
    name: id of the data set.
    config: its configuration, or None.
    field: its text.
    seed: of the order.

  Yields:
    Documents that are not blank.

  Raises:
    InputError: the `datasets` package is not installed, the data set does not
      open, or has no such field.
  """
  try:
    import datasets  # an extra, and slow to import
  except ImportError as error:
    raise InputError(
        "reading hf: corpora needs the package 'datasets': install jaxedit with"
        " its extra 'data', or give a file instead"
    ) from error
  # What the hub, its files and the network raise is not specified.
  try:
    stream = datasets.load_dataset(name, config, split='train', streaming=True)
    stream = iter(stream.shuffle(seed=seed, buffer_size=_BUFFER))
    first = next(stream, None)
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise InputError(
        f'the data set {name!r} ({config or "no config"}) does not open:'
        f' {reason[:300]}'
    ) from error
  if first is None or not isinstance(first.get(field), str):
    raise InputError(
        f'the data set {name!r} has no text in field {field!r}; its fields are:'
        f' {", ".join(first or {}) or "none"}'
    )
  for record in itertools.chain([first], stream):
    if record[field] and record[field].strip():
      yield record[field].strip()


def fingerprint(corpus: str) -> str:
  """Names what the text of a corpus is, for whoever keeps what came of it.

  Args:
    corpus: see the module head.

  Returns:
    SHA-256 of the name and of the file's bytes, where the corpus is a file.

  Raises:
    InputError: the name is not of these forms, or the file cannot be read.
  """
  kind, _, rest = corpus.partition(':')
  path = {'file': rest, 'jsonl': rest.rpartition(':')[0]}.get(kind)
  if not path and corpus != 'self' and (kind != 'hf' or not rest):
    raise InputError(f'the corpus {corpus!r} is unknown; give {KINDS}')
  digest = hashlib.sha256(corpus.encode())
  if path:
    digest.update(bytes.fromhex(assets.sha256(pathlib.Path(path))))
  return digest.hexdigest()


def open_documents(corpus: str, *, seed: int) -> Iterable[str]:
  """Opens a corpus of documents by its name.

  Args:
    corpus: 'file:...', 'jsonl:...' or 'hf:...', see the module head.
    seed: of the order of documents.

  Returns:
    Documents, shuffled.

  Raises:
    InputError: the name is not of these forms, or what it names cannot be read.
  """
  kind, _, rest = corpus.partition(':')
  parts = rest.split(':')
  if kind == 'file' and rest:
    documents = text_documents(rest)
  elif kind == 'jsonl' and len(parts) > 1 and all(parts):
    path, _, field = rest.rpartition(':')
    documents = jsonl_documents(path, field)
  elif kind == 'hf' and len(parts) <= 3 and parts[0]:
    name, config, field = [*parts, '', ''][:3]
    return hub_documents(name, config or None, field or 'text', seed=seed)
  else:
    raise InputError(f'the corpus {corpus!r} is unknown; give {KINDS}')
  order = np.random.default_rng(seed).permutation(len(documents))
  return [documents[i] for i in order]


def tokenised(
    documents: Iterable[str], tokenizer: Any, max_length: int
) -> Iterator[list[int]]:
  """Turns documents into token ids, with the tokenizer's special tokens.

  Args:
    documents: texts.
    tokenizer: of `models.tokenizer.load_tokenizer`.
    max_length: longest text, tokens; the rest of a document is dropped.

  Yields:
    Token ids.
  """
  documents = iter(documents)
  while some := list(itertools.islice(documents, 32)):
    yield from tokenizer(
        [text[: _CHARACTERS * max_length] for text in some],
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )['input_ids']


def sample_starts(tokenizer: Any) -> list[list[int]]:
  """Chooses what samples begin with.

  A model whose vocabulary has a token that begins texts continues that. An
  instruct model would begin a dialogue there, so it, like a model without such
  a token, continues short beginnings of sentences.

  Args:
    tokenizer: of `models.tokenizer.load_tokenizer`.

  Returns:
    Token ids of one or more beginnings.
  """
  if tokenizer.bos_token_id is not None and not tokenizer.chat_template:
    return [[tokenizer.bos_token_id]]
  return [tokenizer(start)['input_ids'] for start in STARTS]


class _Samples:
  """Texts of one batch after the other, kept on disk if there is a path."""

  def __init__(
      self, path: str | os.PathLike[str] | None, identity: dict[str, Any]
  ):
    self._path = None if path is None else pathlib.Path(path)
    self._identity = identity
    self.texts: list[list[int]] = []
    self.batches = 0
    kinds = {'batches': int}
    found = accumulate.read_partial(self._path, identity, _SAMPLES, kinds)
    if found is None:
      return
    tensors, self.batches = found[0], found[1]['batches']
    if tensors.keys() != {'lengths', 'tokens'}:
      raise InputError(
          f'{self._path}: is damaged, it has no texts; delete it to start anew'
      )
    cuts = np.cumsum(tensors['lengths'])[:-1]
    self.texts = [t.tolist() for t in np.split(tensors['tokens'], cuts)]

  def add(self, texts: Sequence[list[int]]) -> None:
    """Appends a batch."""
    self.texts += texts
    self.batches += 1
    if self._path is None:
      return
    tensors = {
        'tokens': np.array([t for x in self.texts for t in x], np.int32),
        'lengths': np.array([len(text) for text in self.texts], np.int32),
    }
    record = {'identity': self._identity, 'batches': self.batches}
    io.write_tensors(self._path, tensors, kind=_SAMPLES, record=record)


def sample(
    spec: ModelSpec,
    params: Params,
    starts: Sequence[Sequence[int]],
    *,
    tokens: int,
    seed: int,
    stop_ids: Sequence[int] = (),
    length: int = LENGTH,
    batch_rows: int = ROWS,
    top_k: int = TOP_K,
    model: str = '',
    tokenizer: Any = None,
    store: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> list[list[int]]:
  """Samples short texts from the model, at temperature 1.

  Args:
    spec: the architecture.
    params: canonical parameters.
    starts: what texts begin with, in turn; see `sample_starts`.
    tokens: stop after the batch that reaches this many.
    seed: of the sampling.
    stop_ids: tokens that end a text; they are dropped.
    length: tokens to add to a start; fewer where the model takes no more.
    batch_rows: texts sampled at once.
    top_k: draw among the k most probable; 0 among all. 50 keeps nearly all of
      the probability and avoids the tail where small models lose the thread.
    model: hash of the model, which a store must agree with.
    tokenizer: of the model; with it, texts that the package ships are used.
    store: file that keeps finished batches; one left by the same run is
      continued. It stays: what needs the texts says when they are done with.
    progress: is told tokens.

  Returns:
    Token ids of every text, its start included.

  Raises:
    InputError: a start that cannot be continued, settings that cannot be, or a
      store of another run.
  """
  if min(tokens, length, batch_rows) < 1 or not starts:
    raise InputError(
        f'cannot sample {tokens} tokens in {batch_rows} rows of {length} from'
        f' {len(starts)} starts: every number must be at least 1'
    )
  free = spec.max_positions - max(map(len, starts))
  length = min(length, max(free, 1))
  identity = dict(
      model=model, dtype=params['embed']['embedding'].dtype.name, seed=seed,
      starts=[list(map(int, start)) for start in starts],
      stop_ids=list(map(int, stop_ids)), length=length, batch_rows=batch_rows,
      top_k=top_k,
  )  # fmt: skip
  samples = _Samples(store, identity)
  if tokenizer is not None and not samples.batches:
    samples.texts, samples.batches = shipped.texts(identity, tokenizer)
  with progress('sampling', tokens, 'token') as advance:
    have = sum(map(len, samples.texts))
    advance(min(have, tokens))
    while have < tokens:
      first = samples.batches * batch_rows
      numbers = range(first, first + batch_rows)
      prompts = [list(starts[i % len(starts)]) for i in numbers]
      # A stream of its own for every batch, so that none depends on how many
      # were asked for.
      stream = np.random.SeedSequence([seed, samples.batches])
      new = decode.generate(
          spec,
          params,
          prompts,
          max_new_tokens=length,
          stop_ids=stop_ids,
          temperature=1.0,
          top_k=top_k,
          seed=int(stream.generate_state(1)[0]),
          batch_size=batch_rows,
      )
      kept = [[t for t in text if t not in set(stop_ids)] for text in new]
      samples.add([start + text for start, text in zip(prompts, kept)])
      added = sum(map(len, samples.texts)) - have
      advance(min(have + added, tokens) - min(have, tokens))
      have += added
  return samples.texts
