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
    datasets,
    evaluation,
    minilm,
    protocols,
    report,
    similarity,
)
from jaxedit.eval.evaluation import Evaluation
from jaxedit.eval.scorers import generation, long_form
from jaxedit.eval.scorers.base import Scorer
from jaxedit.eval.scorers.generation import FreeGeneration
from jaxedit.eval.scorers.long_form import LongForm
from jaxedit.eval.scorers.teacher_forced import TeacherForced
from jaxedit.models import decode
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.text import chat as chat_lib
from jaxedit.text import encoding, templates
from jaxedit.text import passages as text_passages
from jaxedit.text.encoding import EncodedEdit, Encoder
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import EditRequest, InputError, Progress

Evaluate = Callable[..., Evaluation]
# Tokens that a sampled context and its full stop may add to a prompt.
_CONTEXT_TOKENS = 16


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

  @functools.cached_property
  def file(self) -> datasets.RequestFile:
    """The file of the requests, read once."""
    return datasets.open_requests(
        self.config.data,
        limit=self.config.num_edits,
        on_bad_record=self.config.on_bad_record,
        zsre_target=self.config.zsre_target,
    )

  def read(self, check: datasets.Check | None = None) -> datasets.Loaded:
    """Reads the requests; `check` finds further errors."""
    return self.file.load(check)

  def encoder(self, tokens: TokenCache, spec: ModelSpec) -> Encoder:
    """Encodes requests under the given contexts.

    Where contexts are sampled later some tokens are left for them.
    """
    return encoding.fact_encoder(
        tokens,
        self.given_contexts or (templates.BARE,),
        max_tokens=spec.max_positions
        - (0 if self.given_contexts else _CONTEXT_TOKENS),
        anchor=self.chosen.config.anchor,
    )

  def check(
      self,
      encoder: Encoder,
      tokens: TokenCache,
      spec: ModelSpec,
      progress: Progress,
  ) -> datasets.Check:
    """Makes the check of requests: all that editing or judging would refuse."""
    del progress
    judge = functools.partial(evaluation.errors, spec, self._scorers(tokens))
    # What both find is reported once, by the one that says more.
    return datasets.first_errors(encoder.check, judge)

  def contexts(self, model: Model, tokenizer: Any) -> tuple[str, ...]:
    """The context templates, sampled from the model unless given."""
    return self.given_contexts or sample_contexts(
        model, tokenizer, self.config.seed
    )

  def encode(
      self,
      encoder: Encoder,
      tokens: TokenCache,
      spec: ModelSpec,
      requests: Sequence[EditRequest],
      contexts: Sequence[str],
  ) -> tuple[EncodedEdit, ...]:
    """Turns requests into ids under the contexts."""
    if not self.given_contexts:
      encoder = encoding.fact_encoder(
          tokens,
          contexts,
          max_tokens=spec.max_positions,
          anchor=self.chosen.config.anchor,
      )
    return tuple(encoder.encode(requests))

  def _scorers(
      self, tokens: TokenCache, stop_ids: tuple[int, ...] = ()
  ) -> list[Scorer]:
    scorers: list[Scorer] = [TeacherForced(tokens)]
    if self.max_new_tokens:
      scorers.append(FreeGeneration(tokens, stop_ids, self.max_new_tokens))
    return scorers

  def evaluate(
      self, model: Model, tokens: TokenCache, progress: Progress
  ) -> Evaluate:
    """The evaluation: (lm, requests, before=, edit_ids=) -> Evaluation."""
    stop_ids = generation.stop_ids(tokens.tokenizer, model.spec.vocab)
    return functools.partial(
        evaluation.evaluate,
        scorers=self._scorers(tokens, stop_ids),
        seed=self.config.seed,
        progress=progress,
    )

  def protocol(self, tokenizer: Any, contexts: Sequence[str]) -> dict[str, Any]:
    """How answers are judged, for results.json."""
    del tokenizer
    return {
        'templates': list(contexts),
        'decoding': f'greedy, {self.max_new_tokens} new tokens at most, stopped'
        ' at end of text, a full stop or a line break',
    }

  def described(self, request: EditRequest) -> dict[str, Any]:
    """What a request asks to be written, for records.jsonl."""
    return {
        'prompt': request.prompt,
        'subject': request.subject,
        'target_new': request.target,
        'target_true': request.target_true,
    }

  def show(self, requests: Sequence[Any], before: Any, after: Any) -> str:
    """Texts before and after, to print."""
    if not self.max_new_tokens or not self.config.show:
      return ''
    return report.generations(requests, before, after, self.config.show)

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

  @functools.cached_property
  def file(self) -> datasets.RequestFile:
    """The file of the requests, read once."""
    return datasets.open_requests(
        self.config.data,
        kinds=(datasets.TEXT,),
        limit=self.config.num_edits,
        on_bad_record=self.config.on_bad_record,
        facts=self.config.facts,
    )

  def read(self, check: datasets.Check | None = None) -> datasets.Loaded:
    """Reads the requests; `check` finds further errors."""
    loaded = self.file.load(check)
    if self.config.per_category:
      some = first_of_each(loaded.requests, self.config.per_category)
      loaded = dataclasses.replace(loaded, requests=some)
    # Without a check, bad records are still among them.
    if check is not None and self._shadowed:
      self._check_schedule(loaded)
    return loaded

  def _check_schedule(self, loaded: datasets.Loaded) -> None:
    """Refuses batches of which the published schedule cannot be had."""
    cases = protocols.case_numbers(loaded.requests)
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

  def encoder(self, tokens: TokenCache, spec: ModelSpec) -> Encoder:
    """Encodes requests."""
    return text_passages.passage_encoder(
        tokens,
        max_tokens=spec.max_positions,
        chunking=self.chosen.config.chunks,
        **self.words(tokens.tokenizer),
    )

  def check(
      self,
      encoder: Encoder,
      tokens: TokenCache,
      spec: ModelSpec,
      progress: Progress,
  ) -> datasets.Check:
    """Makes the check of requests: all that editing or judging would refuse."""
    scorer = self._scorer(tokens)
    # Both are needed after the weights only, and refuse what they cannot use.
    long_form.end_ids(tokens.tokenizer, spec.vocab, scorer.chat.end)
    if self.config.encoder != 'none':
      minilm.find_encoder(self.config.encoder, progress)
    return datasets.first_errors(
        encoder.check,
        functools.partial(evaluation.errors, spec, [scorer]),
        functools.partial(self._too_long, tokens.tokenizer),
    )

  def _too_long(
      self, tokenizer: Any, requests: Sequence[EditRequest]
  ) -> list[list[str]]:
    """Lists answers over the limit of the run."""
    limit = self.config.max_answer_tokens
    if not limit or not requests:
      return [[] for _ in requests]
    texts = [request.target for request in requests]
    rows = tokenizer(texts, add_special_tokens=False)['input_ids']
    return [
        [
            f'its answer takes {len(ids)} tokens, more than'
            f' --max_answer_tokens={limit}; shorten it or raise the limit.'
        ]
        * (len(ids) > limit)
        for ids in rows
    ]

  def contexts(self, model: Model, tokenizer: Any) -> tuple[str, ...]:
    """Long answers are written under no context templates."""
    del model, tokenizer
    return ()

  def encode(
      self,
      encoder: Encoder,
      tokens: TokenCache,
      spec: ModelSpec,
      requests: Sequence[EditRequest],
      contexts: Sequence[str],
  ) -> tuple[EncodedEdit, ...]:
    """Turns requests into ids."""
    del tokens, spec, contexts
    return tuple(encoder.encode(requests))

  def _scorer(self, tokens: TokenCache, **more: Any) -> LongForm:
    return LongForm(
        tokens,
        sub_questions=self.config.sub_questions,
        decoding=self.config.decoding,
        max_new_tokens=self.max_new_tokens,
        **self.words(tokens.tokenizer),
        **more,
    )

  def evaluate(
      self, model: Model, tokens: TokenCache, progress: Progress
  ) -> Evaluate:
    """The evaluation: (lm, requests, before=, edit_ids=) -> Evaluation."""
    name, chat = self.config.encoder, self.words(tokens.tokenizer)['chat']
    scorer = self._scorer(
        tokens,
        stop_ids=long_form.end_ids(
            tokens.tokenizer,
            model.spec.vocab,
            chat.end,
            tokenizer_lib.end_ids(model.folder),
        ),
        encoder=None if name == 'none' else minilm.load_encoder(name, progress),
    )
    return functools.partial(
        evaluation.evaluate,
        scorers=[scorer],
        seed=self.config.seed,
        progress=progress,
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

  def described(self, request: EditRequest) -> dict[str, Any]:
    """What a request asks to be written, for records.jsonl."""
    return {
        'question': request.prompt,
        'answer': request.target,
        'category': request.category,
        'case': request.case,
    }

  def show(self, requests: Sequence[Any], before: Any, after: Any) -> str:
    """Answers before and after, to print."""
    if not self.max_new_tokens or not self.config.show:
      return ''
    return report.excerpts(requests, before, after, self.config.show)

  def tables(self, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by category, for results.json."""
    found = {
        name: evaluation.by_category(one, self.config.seed)
        for name, one in evaluations.items()
    }
    return {'categories': found} if any(found.values()) else {}


Task = FactTask | TextTask
TASKS = {'fact': FactTask, 'text': TextTask}


def first_of_each(
    requests: Sequence[EditRequest], count: int
) -> tuple[EditRequest, ...]:
  """The first requests of every category, in their order.

  Args:
    requests: the edits; those of one case count once and stay together.
    count: cases of a category, which is that of a case's first request.
  """
  cases = protocols.case_numbers(requests)
  category: dict[int, str] = {}
  for request, case in zip(requests, cases):
    category.setdefault(case, request.category)
  taken, seen = set(), collections.Counter()
  for case, name in category.items():
    seen[name] += 1
    if seen[name] <= count:
      taken.add(case)
  return tuple(r for r, case in zip(requests, cases) if case in taken)


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
