"""Evaluates an edited model on passages: it answers, and answers are scored.

For every passage the model is asked the question as edited, its paraphrases and
its sub-questions, all in the words of the chat, and writes until it ends by
itself or has written `max_new_tokens`. Metrics are `<asked>/<score>`:

  question/...     the edited question against the edited answer
  paraphrase/...   each paraphrase against the same answer, averaged
  sub/...          each sub-question against its own short answer, averaged

with the scores of `similarity`; of a short answer only the recalls, and whether
its words stand in what was said ('contains').

Source: the protocol of UnKEBench, AKEW and EditEverything in AnyEdit (Jiang et
al. 2025, arXiv 2502.05628), whose decoding is close to greedy; here greedy is
greedy unless `decoding` says otherwise.

A sampled answer is drawn from a stream of its own, which the record's number
and the place of the question in it give: it depends neither on the records that
are evaluated together nor on batches, and before and after an edit the same
draws are made.

It reads no files and takes no times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxedit.edited.lm import LanguageModel
from jaxedit.eval import answers, generation, metrics, similarity
from jaxedit.eval.harness import Evaluation, check_edit_ids
from jaxedit.eval.minilm import Encoder
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.models.spec import ModelSpec
from jaxedit.text import passages as passages_lib
from jaxedit.text.chat import Chat
from jaxedit.types import (
    Passage,
    Progress,
    silent,
)

QUESTION, PARAPHRASE, SUB = 'question', 'paraphrase', 'sub'
_RECALLS = ('rouge_1_recall', 'rouge_2_recall', 'rouge_l_recall')
_LINE = 96


def evaluate(
    lm: LanguageModel,
    records: Sequence[Passage],
    tokenizer: Any,
    *,
    chat: Chat,
    stop: Sequence[int],
    base: Evaluation | None = None,
    edit_ids: Sequence[int] | None = None,
    double_bos: bool = False,
    sub_questions: bool = True,
    encoder: Encoder | None = None,
    decoding: Decoding = GREEDY,
    max_new_tokens: int = 512,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
  """Evaluates a model on passages.

  Args:
    lm: the model.
    records: the passages.
    tokenizer: a fast transformers tokenizer.
    chat: words around a question.
    stop: tokens that end an answer, see `answers.end_ids`.
    base: not needed; evaluations of facts have it.
    edit_ids: with edits side by side, which one each passage is judged under.
    double_bos: ask with two BOS tokens, see `text.passages`.
    sub_questions: whether to ask them.
    encoder: for `minilm_cosine`.
    decoding: how tokens are chosen.
    max_new_tokens: length of an answer, tokens.
    seed: of the intervals.
    progress: progress display.

  Returns:
    The evaluation; entries of `per_record` hold 'category', 'case', 'metrics',
    'text', 'paraphrase_texts' and 'sub_texts'. Passages of one case weigh as
    one in the summary.

  Raises:
    InputError: `edit_ids` of other records; see also `answers.answers`.
  """
  del base
  check_edit_ids(edit_ids, records)
  asked = [_asked(record, sub_questions) for record in records]
  flat = [(i, *question) for i, some in enumerate(asked) for question in some]
  said = answers.answers(
      lm,
      passages_lib.encode_questions(
          tokenizer, [text for _, _, text, _ in flat], chat, double_bos
      ),
      tokenizer=tokenizer,
      stop=stop,
      max_new_tokens=max_new_tokens,
      edit_ids=None if edit_ids is None else [edit_ids[i] for i, *_ in flat],
      decoding=decoding,
      streams=[
          _stream(record, place)
          for record, some in zip(records, asked)
          for place in range(len(some))
      ],
      progress=progress,
  )
  scored = similarity.scores(
      said, [wanted for *_, wanted in flat], encoder=encoder
  )
  entries = [
      {
          'number': record.number,
          'id': record.id,
          'category': record.category,
          'case': record.case,
          'metrics': {},
          'text': None,
          'paraphrase_texts': [],
          'sub_texts': [],
      }
      for record in records
  ]
  groups: dict[tuple[int, str], list[dict[str, float]]] = {}
  for (i, kind, _, wanted), text, scores in zip(flat, said, scored):
    if kind == SUB:
      scores = {name: scores[name] for name in _RECALLS}
      scores['contains'] = float(generation.contains(text, wanted))
      entries[i]['sub_texts'].append(text)
    elif kind == PARAPHRASE:
      entries[i]['paraphrase_texts'].append(text)
    else:
      entries[i]['text'] = text
    groups.setdefault((i, kind), []).append(scores)
  for (i, kind), rows in groups.items():
    for name in rows[0]:
      mean = float(np.mean([row[name] for row in rows]))
      entries[i]['metrics'][f'{kind}/{name}'] = mean
  summary = metrics.aggregate(metrics.by_case(entries), seed)
  return Evaluation(entries, summary, ((),) * len(entries))


def _asked(record: Passage, sub_questions: bool) -> list[tuple[str, str, str]]:
  """(kind, question, wanted answer) of all that a passage is asked."""
  found = [(QUESTION, record.question, record.answer)]
  found += [(PARAPHRASE, text, record.answer) for text in record.paraphrases]
  if sub_questions:
    found += [(SUB, p.prompt, p.answer) for p in record.sub_questions]
  return found


def _stream(record: Passage, place: int) -> int:
  """The number of a question's random stream: 31 bits, the same in every run.

  Sub-questions come last, so that leaving them out moves no other stream.
  """
  # Rewrites of one case have one number.
  name = f'{record.number}/{record.id}/{place}'.encode()
  digest = hashlib.blake2b(name, digest_size=4).digest()
  return int.from_bytes(digest, 'big') >> 1


def by_category(
    evaluation: Evaluation, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
  """Sums up the passages of each category.

  Args:
    evaluation: of passages.
    seed: of the intervals.

  Returns:
    category -> metric id -> fields of `metrics.Interval`; empty where there
    are fewer than two categories.
  """
  groups: dict[str, list[dict[str, Any]]] = {}
  for entry in evaluation.per_record:
    groups.setdefault(entry['category'], []).append(entry)
  if len(groups) < 2:
    return {}
  return {
      name: metrics.aggregate(metrics.by_case(rows), seed)
      for name, rows in sorted(groups.items())
  }


def record_check(
    spec: ModelSpec,
    tokenizer: Any,
    *,
    chat: Chat,
    max_new_tokens: int,
    double_bos: bool = False,
    sub_questions: bool = True,
) -> Callable[[Passage], list[str]]:
  """Makes the check that finds what `evaluate` would refuse in a passage.

  Args:
    spec: the architecture.
    tokenizer: a fast transformers tokenizer.
    chat: words around a question.
    max_new_tokens: length of an answer, tokens.
    double_bos: as for `evaluate`.
    sub_questions: as for `evaluate`.

  Returns:
    passage -> sentences that do not name it.
  """
  room = spec.max_positions - max_new_tokens

  def check(record: Passage) -> list[str]:
    asked = _asked(record, sub_questions)
    texts = [text for _, text, _ in asked]
    prompts = passages_lib.encode_questions(tokenizer, texts, chat, double_bos)
    faults = [
        f'answer {answer[:40]!r} has no word to compare an answer with; write it'
        ' out or remove its question.'
        for answer in dict.fromkeys(answer for *_, answer in asked)
        if not similarity.has_words(answer)
    ]
    return faults + [
        f'question {text[:60]!r}: its {len(ids)} tokens and'
        f' {max_new_tokens} generated ones are more than the'
        f' {spec.max_positions} positions of the model; shorten it or generate'
        ' fewer.'
        for text, ids in zip(texts, prompts)
        if len(ids) > room
    ]

  return check


def excerpts(
    records: Sequence[Passage], pre: Evaluation, post: Evaluation, count: int
) -> str:
  """Shows how answers begin before and after an edit.

  Args:
    records: the passages that were evaluated.
    pre: the unedited model's evaluation of them.
    post: the edited model's.
    count: passages to show, from the first on.

  Returns:
    Four lines a passage, without a final line break.
  """
  lines = []
  for record, old, new in list(zip(records, pre.per_record, post.per_record))[
      :count
  ]:
    lines += [
        _line(f'{record.number}. ', record.question),
        _line('   wanted: ', record.answer),
        _line('   before: ', old['text']),
        _line('   after:  ', new['text']),
    ]
  return '\n'.join(lines)


def _line(head: str, text: str) -> str:
  """One printable line."""
  text = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
  room = _LINE - len(head)
  return head + (text if len(text) <= room else text[: room - 3] + '...')
