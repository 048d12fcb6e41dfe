"""What facts and long answers differ in: how they are encoded and judged.

A task is the only part of a run that asks which kind its requests are.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxedit.convert import hub
from jaxedit.eval import datasets, evaluation, similarity
from jaxedit.eval.datasets import Loaded
from jaxedit.eval.datasets.reading import RequestFile
from jaxedit.eval.evaluation import Evaluation
from jaxedit.eval.protocols import case_numbers
from jaxedit.eval.scorers import base, generation
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
from jaxedit.text import encoding, passages, templates
from jaxedit.text.chat import Chat
from jaxedit.text.encoding import KL_TEMPLATE, EncodedEdit, Encoder
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import EditRequest, InputError, Progress

# Tokens that a sampled context and its full stop may add to a prompt.
_CONTEXT_TOKENS = 16


def chat_of(
    config: RunConfig, tokenizer: Any, kind: str, end: str | None = None
) -> Chat:
  """Words around prompts: what is given, or a kind."""
  # A flagfile has one flag a line.
  broken = lambda text: text and text.replace(r'\n', '\n')
  return chat_lib.chat_of(tokenizer, broken(config.chat) or kind, broken(end))


@dataclasses.dataclass(frozen=True)
class _Task:
  """What tasks share.

  Attributes:
    config: settings of the run.
    chosen: the method.
    kind: of the requests.
    options: settings that their reader takes.
    longest: tokens of a generated text, unless given.
  """

  config: RunConfig
  chosen: Chosen
  kind: ClassVar[str]
  options: ClassVar[tuple[str, ...]]
  longest: ClassVar[int]

  @functools.cached_property
  def file(self) -> RequestFile:
    """The file of requests, read once."""
    return datasets.open_requests(
        self.config.data,
        kinds=(self.kind,),
        limit=self.config.num_edits,
        on_bad_record=self.config.on_bad_record,
        batch_size=_sequence(self.config),
        **{name: getattr(self.config, name) for name in self.options},
    )

  @property
  def max_new_tokens(self) -> int:
    """Length of generated texts; 0 for none."""
    given = self.config.max_new_tokens
    return self.longest if given is None else given


@dataclasses.dataclass(frozen=True)
class FactTask(_Task):
  """Facts: a cloze with a subject, written under context templates."""

  kind = 'fact'
  options = ('zsre_target',)
  longest = generation.MAX_NEW_TOKENS
  double_bos = False

  @functools.cached_property
  def given_contexts(self) -> tuple[str, ...]:
    """The context templates that are given, if any."""
    path = self.config.context_templates
    if not self.chosen.method.contexts:
      if path:
        raise InputError(
            f'--context_templates: {self.chosen.method.name} runs the plain'
            ' prompt alone; leave it out'
        )
      return (templates.PLAIN,)
    return tuple(templates.load_templates(path)) if path else ()

  def load(
      self, tokens: TokenCache, spec: ModelSpec, progress: Progress
  ) -> Loaded:
    """Loads the requests that can be edited and judged.

    Where contexts are sampled later some tokens are left for them.
    """
    del progress
    reserve = 0 if self.given_contexts else _CONTEXT_TOKENS
    contexts = self.given_contexts or (templates.PLAIN,)
    encoder = self._encoder(tokens, contexts, spec.max_positions - reserve)
    scorers = self.scorers(tokens, spec)
    return self.file.load(_check(spec, encoder, scorers))

  def _encoder(
      self, tokens: TokenCache, contexts: Sequence[str], most: int
  ) -> Encoder:
    return encoding.fact_encoder(
        tokens,
        contexts,
        max_tokens=most,
        anchor=self.chosen.config.anchor,
        kl_template=KL_TEMPLATE if self.chosen.method.contexts else None,
        chat=self._words(tokens.tokenizer),
    )

  def _words(self, tokenizer: Any) -> Chat:
    """What stands around prompts; what ends an answer is not written."""
    return chat_of(self.config, tokenizer, chat_lib.NONE)

  def contexts(self, model: Model, tokens: TokenCache) -> tuple[str, ...]:
    """The context templates, sampled from the model unless given."""
    return self.given_contexts or sample_contexts(
        model, tokens.tokenizer, self.config.seed
    )

  def encode(
      self,
      spec: ModelSpec,
      tokens: TokenCache,
      requests: Sequence[EditRequest],
      contexts: Sequence[str],
  ) -> tuple[EncodedEdit, ...]:
    """Turns requests into ids under the contexts."""
    encoder = self._encoder(tokens, contexts, spec.max_positions)
    return tuple(encoder.encode(requests))

  def scorers(
      self, tokens: TokenCache, spec: ModelSpec, model: Model | None = None
  ) -> tuple[Scorer, ...]:
    """What is measured; without a model, enough to check requests."""
    chat, stop = self._words(tokens.tokenizer), ()
    scorers: tuple[Scorer, ...] = (TeacherForced(tokens, chat),)
    if not self.max_new_tokens:
      return scorers
    if model is not None:
      stop = generation.stop_ids(tokens.tokenizer, spec.vocab, chat.end)
    return (*scorers, FreeGeneration(tokens, stop, self.max_new_tokens, chat))

  def protocol(self, tokenizer: Any, contexts: Sequence[str]) -> dict[str, Any]:
    """How answers are judged, for results.json."""
    return {
        'templates': list(contexts),
        'chat': self._words(tokenizer)._asdict(),
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

  def tables(self, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Further entries of results.json."""
    del evaluations
    return {}


@dataclasses.dataclass(frozen=True)
class TextTask(_Task):
  """Long answers to questions, in the words of a chat."""

  kind = 'text'
  options = ('facts',)
  longest = 512

  @property
  def double_bos(self) -> bool:
    """Whether texts begin with two BOS tokens, as AnyEdit's code has it."""
    return self.chosen.parity == 'anyedit'

  def words(self, tokenizer: Any) -> dict[str, Any]:
    """How questions are asked."""
    config, kind = self.config, chat_lib.TEMPLATE
    chat = chat_of(config, tokenizer, kind, config.answer_end)
    return {'chat': chat, 'double_bos': self.double_bos}

  def load(
      self, tokens: TokenCache, spec: ModelSpec, progress: Progress
  ) -> Loaded:
    """Loads the requests that can be edited and judged."""
    # Refused now, as it is needed after the weights only.
    if self.config.encoder != 'none':
      hub.find_encoder(self.config.encoder, progress)
    edit = self._encoder(tokens, spec)
    check = _check(spec, edit, self.scorers(tokens, spec))
    loaded = self.file.load(
        lambda requests: [
            self._long(tokens, request, errors)
            for request, errors in zip(requests, check(requests))
        ]
    )
    if self.config.per_category:
      some = first_of_each(loaded.requests, self.config.per_category)
      loaded = dataclasses.replace(loaded, requests=some)
    self._check_schedule(loaded)
    return loaded

  def _long(
      self, tokens: TokenCache, request: EditRequest, errors: list[str]
  ) -> list[str]:
    """Adds that an answer is longer than asked for."""
    limit = self.config.max_answer_tokens
    if not limit or errors:
      return errors
    ids = tokens.tokenizer(request.target, add_special_tokens=False)
    count = len(ids['input_ids'])
    if count <= limit:
      return errors
    return [
        f'its answer takes {count} tokens, more than'
        f' --max_answer_tokens={limit}; shorten it or raise the limit.'
    ]

  def _check_schedule(self, loaded: Loaded) -> None:
    """Refuses batches of which the published schedule cannot be had."""
    if not self.chosen.config.even_batches:
      return
    cases = case_numbers(loaded.requests)
    slip = (
        f'--parity={self.chosen.parity}: the published schedule depends on the'
        ' edits a batch'
    )
    if max(cases) + 1 < len(cases):
      raise InputError(
          f'{slip}, and {loaded.source} has cases of several rewrites, which are'
          ' edited together; leave --parity out for these'
      )
    if rest := len(cases) % self.config.batch_size:
      raise InputError(
          f'{slip}, and the last batch would have {rest}; let --num_edits be a'
          f' multiple of --batch_size={self.config.batch_size}'
      )

  def _encoder(self, tokens: TokenCache, spec: ModelSpec) -> Encoder:
    return passages.passage_encoder(
        tokens,
        max_tokens=spec.max_positions,
        chunking=self.chosen.config.chunks,
        **self.words(tokens.tokenizer),
    )

  def contexts(self, model: Model, tokens: TokenCache) -> tuple[str, ...]:
    """Long answers are written under no context templates."""
    del model, tokens
    return ()

  def encode(
      self,
      spec: ModelSpec,
      tokens: TokenCache,
      requests: Sequence[EditRequest],
      contexts: Sequence[str],
  ) -> tuple[EncodedEdit, ...]:
    """Turns requests into ids."""
    del contexts
    return tuple(self._encoder(tokens, spec).encode(requests))

  def scorers(
      self, tokens: TokenCache, spec: ModelSpec, model: Model | None = None
  ) -> tuple[Scorer, ...]:
    """What is measured; without a model, enough to check requests."""
    words, encoder = self.words(tokens.tokenizer), None
    named = () if model is None else tokenizer_lib.end_ids(model.folder)
    stop = base.end_ids(tokens.tokenizer, spec.vocab, words['chat'].end, named)
    if not self.max_new_tokens:
      return ()
    if model is not None and self.config.encoder != 'none':
      encoder = hub.load_encoder(self.config.encoder)
    scorer = LongForm(
        tokens,
        stop_ids=stop,
        sub_questions=self.config.sub_questions,
        encoder=encoder,
        decoding=self.config.decoding,
        max_new_tokens=self.max_new_tokens,
        **words,
    )
    return (scorer,)

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

  def tables(self, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Metrics by category, for results.json."""
    found = {
        name: evaluation.by_category(one, self.config.seed)
        for name, one in evaluations.items()
    }
    return {'categories': found} if any(found.values()) else {}


def _sequence(config: RunConfig) -> int | None:
  """Cases a batch, where a later batch may edit what an earlier one did."""
  fixed = not config.reset and not config.per_category
  return config.batch_size if fixed else None


Task = FactTask | TextTask
TASKS = {'fact': FactTask, 'text': TextTask}


def _check(spec: ModelSpec, encoder: Encoder, scorers: Sequence[Scorer]) -> Any:
  """The check of a loader: all that editing or judging would refuse.

  What both find is told once, by the one that says more.
  """

  def check(requests: Sequence[EditRequest]) -> list[list[str]]:
    found = encoder.check(requests)
    fine = [i for i, errors in enumerate(found) if not errors]
    judged = evaluation.errors(spec, scorers, [requests[i] for i in fine])
    for i, errors in zip(fine, judged):
      found[i] = errors
    return found

  return check


def first_of_each(
    requests: Sequence[EditRequest], count: int
) -> tuple[EditRequest, ...]:
  """The first requests of every category, in their order.

  Args:
    requests: those of one case count once and stay together.
    count: cases of a category, which is that of a case's first request.
  """
  cases = case_numbers(requests)
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
    The plain '{}' and five sampled templates; '{}' alone of an encoder-decoder,
    which goes on with no text.
  """
  if model.spec.encoder_layers:
    return (templates.PLAIN,)

  def sample(prompts: list[str], seed: int, length: int) -> list[str]:
    starts = [tokenizer(prompt)['input_ids'] for prompt in prompts]
    new = length - min(map(len, starts))
    texts = decode.generate(
        model.spec, model.params, starts,
        max_new_tokens=new, temperature=1.0, top_k=5, seed=seed,
    )  # fmt: skip
    whole = [(s + t)[:length] for s, t in zip(starts, texts)]
    return tokenizer.batch_decode(whole, skip_special_tokens=True)

  return templates.sample_templates(
      sample, seed=seed, special_tokens=tokenizer.all_special_tokens
  )
