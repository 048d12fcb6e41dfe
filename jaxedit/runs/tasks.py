"""What facts and long answers differ in: how they are read, encoded and judged.

A task is the only part of a run that asks which kind its requests are.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxedit.eval import (
    answers,
    datasets,
    generation,
    harness,
    longform,
    minilm,
    passages,
    report,
    similarity,
)
from jaxedit.models import decode
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.text import chat as chat_lib
from jaxedit.text import encoding, templates
from jaxedit.text import passages as text_passages
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import InputError, Progress

Evaluate = Callable[..., harness.Evaluation]
# Tokens that a sampled context and its full stop may add to a prompt.
_CONTEXT_TOKENS = 16


def case_numbers(records: Sequence[Any]) -> tuple[int, ...]:
  """Numbers the cases of records; a fact is a case of its own."""
  numbers: dict[Any, int] = {}
  keys = (getattr(record, 'case', '') or i for i, record in enumerate(records))
  return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


@dataclasses.dataclass(frozen=True)
class FactTask:
  """Facts: a cloze with a subject, written under context templates."""

  config: RunConfig
  chosen: Chosen
  kind = 'fact'

  @property
  def max_new_tokens(self) -> int:
    """Length of generated texts."""
    given = self.config.max_new_tokens
    return generation.MAX_NEW_TOKENS if given is None else given

  @functools.cached_property
  def given_contexts(self) -> tuple[str, ...]:
    """The context templates that are given, if any."""
    path = self.config.context_templates
    return tuple(templates.load_templates(path)) if path else ()

  def read(self, check: Any = None) -> datasets.Loaded:
    """Reads the records; `check` finds further errors."""
    return datasets.load_records(
        self.config.data,
        limit=self.config.num_edits,
        on_bad_record=self.config.on_bad_record,
        check=check,
        zsre_target=self.config.zsre_target,
    )

  def check(
      self, tokenizer: Any, spec: ModelSpec, progress: Progress
  ) -> Callable[[Any], list[str]]:
    """Makes the check of a record: all that editing or judging would refuse.

    Where contexts are sampled later some tokens are left for them.
    """
    del progress
    edit = encoding.edit_check(
        tokenizer,
        self.given_contexts or (templates.BARE,),
        max_tokens=spec.max_positions
        - (0 if self.given_contexts else _CONTEXT_TOKENS),
        anchor=self.chosen.config.anchor,
    )
    evaluation = harness.record_check(
        spec, tokenizer, max_new_tokens=self.max_new_tokens
    )
    # What both find is told once, by the one that says more.
    return lambda record: edit(record) or evaluation(record)

  def contexts(self, model: Model, tokenizer: Any) -> tuple[str, ...]:
    """The context templates, sampled from the model unless given."""
    return self.given_contexts or sample_contexts(
        model, tokenizer, self.config.seed
    )

  def encode(
      self,
      model: Model,
      tokenizer: Any,
      records: Sequence[Any],
      contexts: Sequence[str],
  ) -> tuple[EncodedEdit, ...]:
    """Turns records into ids under the contexts."""
    return tuple(
        encoding.encode_edits(
            tokenizer,
            records,
            contexts,
            max_tokens=model.spec.max_positions,
            anchor=self.chosen.config.anchor,
        )
    )

  def evaluate(
      self, model: Model, tokenizer: Any, progress: Progress
  ) -> Evaluate:
    """The evaluation: (lm, records, base=, edit_ids=) -> Evaluation."""
    stop = generation.stop_ids(tokenizer, model.spec.vocab)
    return lambda lm, records, **more: harness.evaluate(
        lm,
        records,
        tokenizer,
        max_new_tokens=self.max_new_tokens,
        stop=stop,
        seed=self.config.seed,
        progress=progress,
        **more,
    )

  def protocol(self, tokenizer: Any, contexts: Sequence[str]) -> dict[str, Any]:
    """How answers are judged, for results.json."""
    del tokenizer
    return {
        'templates': list(contexts),
        'decoding': f'greedy, {self.max_new_tokens} new tokens at most, stopped'
        ' at end of text, a full stop or a line break',
    }

  def described(self, record: Any) -> dict[str, Any]:
    """What a record asks to be written, for records.jsonl."""
    names = ('prompt', 'subject', 'target_new', 'target_true')
    return {name: getattr(record, name) for name in names}

  def show(self, records: Sequence[Any], before: Any, after: Any) -> str:
    """Texts before and after, to print."""
    if not self.max_new_tokens or not self.config.show:
      return ''
    return report.generations(records, before, after, self.config.show)

  def tables(self, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Further entries of results.json."""
    del evaluations
    return {}


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Long answers to questions, in the words of a chat."""

  config: RunConfig
  chosen: Chosen
  kind = 'text'

  @property
  def max_new_tokens(self) -> int:
    """Length of generated answers."""
    given = self.config.max_new_tokens
    return 512 if given is None else given

  @property
  def _parity(self) -> bool:
    return self.chosen.settings['parity'] == 'anyedit'

  @property
  def _shadowed(self) -> bool:
    """Whether the published slip of the plain methods is asked for."""
    plain = self._parity and self.chosen.config.chunks is None
    return plain and self.chosen.method.name in ('memit', 'alphaedit')

  def words(self, tokenizer: Any) -> dict[str, Any]:
    """How questions are asked."""
    # A flagfile has one flag a line.
    broken = lambda text: text and text.replace(r'\n', '\n')
    return {
        'chat': chat_lib.chat_of(
            tokenizer, broken(self.config.chat), broken(self.config.answer_end)
        ),
        'double_bos': self._parity,
    }

  def read(self, check: Any = None) -> datasets.Loaded:
    """Reads the records; `check` finds further errors."""
    loaded = passages.load_passages(
        self.config.data,
        limit=self.config.num_edits,
        on_bad_record=self.config.on_bad_record,
        check=check,
        facts=self.config.facts,
    )
    if self.config.per_category:
      some = first_of_each(loaded.records, self.config.per_category)
      loaded = dataclasses.replace(loaded, records=some)
    # Without a check, bad records are still among them.
    if check is not None and self._shadowed:
      self._check_schedule(loaded)
    return loaded

  def _check_schedule(self, loaded: datasets.Loaded) -> None:
    """Refuses batches of which the published schedule cannot be had."""
    cases = case_numbers(loaded.records)
    slip = (
        '--parity=anyedit: the published schedule depends on the edits a batch'
    )
    if max(cases) + 1 < len(cases):
      raise InputError(
          f'{slip}, and {loaded.source} has cases of several rewrites, which are'
          ' edited together; leave --parity=anyedit out for these'
      )
    if rest := len(cases) % self.config.batch_size:
      raise InputError(
          f'{slip}, and the last batch would have {rest}; let --num_edits be a'
          f' multiple of --batch_size={self.config.batch_size}'
      )

  def check(
      self, tokenizer: Any, spec: ModelSpec, progress: Progress
  ) -> Callable[[Any], list[str]]:
    """Makes the check of a record: all that editing or judging would refuse."""
    words = self.words(tokenizer)
    # Both are needed after the weights only, and refuse what they cannot use.
    answers.end_ids(tokenizer, spec.vocab, words['chat'].end)
    if self.config.encoder != 'none':
      minilm.find_encoder(self.config.encoder, progress)
    edit = text_passages.passage_check(
        tokenizer,
        max_tokens=spec.max_positions,
        chunking=self.chosen.config.chunks,
        **words,
    )
    ask = longform.record_check(
        spec,
        tokenizer,
        max_new_tokens=self.max_new_tokens,
        sub_questions=self.config.sub_questions,
        **words,
    )
    limit = self.config.max_answer_tokens

    def check(passage: Any) -> list[str]:
      errors = edit(passage) or ask(passage)
      if limit and not errors:
        ids = tokenizer(passage.answer, add_special_tokens=False)['input_ids']
        if len(ids) > limit:
          errors.append(
              f'its answer takes {len(ids)} tokens, more than'
              f' --max_answer_tokens={limit}; shorten it or raise the limit.'
          )
      return errors

    return check

  def contexts(self, model: Model, tokenizer: Any) -> tuple[str, ...]:
    """Long answers are written under no context templates."""
    del model, tokenizer
    return ()

  def encode(
      self,
      model: Model,
      tokenizer: Any,
      records: Sequence[Any],
      contexts: Sequence[str],
  ) -> tuple[EncodedEdit, ...]:
    """Turns records into ids."""
    del contexts
    return tuple(
        text_passages.encode_passages(
            tokenizer,
            records,
            max_tokens=model.spec.max_positions,
            chunking=self.chosen.config.chunks,
            **self.words(tokenizer),
        )
    )

  def evaluate(
      self, model: Model, tokenizer: Any, progress: Progress
  ) -> Evaluate:
    """The evaluation: (lm, records, base=, edit_ids=) -> Evaluation."""
    words, name = self.words(tokenizer), self.config.encoder
    settings = dict(
        stop=answers.end_ids(
            tokenizer,
            model.spec.vocab,
            words['chat'].end,
            tokenizer_lib.end_ids(model.folder),
        ),
        sub_questions=self.config.sub_questions,
        encoder=None if name == 'none' else minilm.load_encoder(name, progress),
        decoding=self.config.decoding,
        max_new_tokens=self.max_new_tokens,
        seed=self.config.seed,
        progress=progress,
        **words,
    )
    return lambda lm, records, **more: longform.evaluate(
        lm, records, tokenizer, **settings, **more
    )

  def protocol(self, tokenizer: Any, contexts: Sequence[str]) -> dict[str, Any]:
    """How answers are judged, for results.json."""
    del contexts
    words = self.words(tokenizer)
    return {
        'facts': self.config.facts,
        'chat': words['chat']._asdict(),
        'double_bos': words['double_bos'],
        'decoding': {
            **self.config.decoding._asdict(),
            'max_new_tokens': self.max_new_tokens,
        },
        'encoder': self.config.encoder,
        'not_scored': similarity.missing(),
    }

  def described(self, record: Any) -> dict[str, Any]:
    """What a record asks to be written, for records.jsonl."""
    names = ('question', 'answer', 'category', 'case')
    return {name: getattr(record, name) for name in names}

  def show(self, records: Sequence[Any], before: Any, after: Any) -> str:
    """Answers before and after, to print."""
    if not self.max_new_tokens or not self.config.show:
      return ''
    return longform.excerpts(records, before, after, self.config.show)

  def tables(self, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by category, for results.json."""
    found = {
        name: longform.by_category(evaluation, self.config.seed)
        for name, evaluation in evaluations.items()
    }
    return {'categories': found} if any(found.values()) else {}


Task = FactTask | TextTask
TASKS = {'fact': FactTask, 'text': TextTask}


def first_of_each(records: Sequence[Any], count: int) -> tuple[Any, ...]:
  """The first records of every category, in their order.

  Args:
    records: records; those of one case count once and stay together.
    count: cases of a category, which is that of a case's first record.
  """
  cases = case_numbers(records)
  category: dict[int, str] = {}
  for record, case in zip(records, cases):
    category.setdefault(case, record.category)
  taken, seen = set(), collections.Counter()
  for case, name in category.items():
    seen[name] += 1
    if seen[name] <= count:
      taken.add(case)
  return tuple(r for r, case in zip(records, cases) if case in taken)


def sample_contexts(model: Model, tokenizer: Any, seed: int) -> tuple[str, ...]:
  """Samples context templates from the model itself, as MEMIT does (top 5).

  Args:
    model: the unedited model.
    tokenizer: its tokenizer.
    seed: of the draw.

  Returns:
    The plain '{}' and five sampled templates.
  """

  def sample(prompts: list[str], seed: int, length: int) -> list[str]:
    starts = [tokenizer(prompt)['input_ids'] for prompt in prompts]
    texts = decode.generate(
        model.spec,
        model.params,
        starts,
        max_new_tokens=length - min(map(len, starts)),
        temperature=1.0,
        top_k=5,
        seed=seed,
    )
    whole = [(s + t)[:length] for s, t in zip(starts, texts)]
    return tokenizer.batch_decode(whole, skip_special_tokens=True)

  return templates.sample_templates(
      sample, seed=seed, special_tokens=tokenizer.all_special_tokens
  )
