"""Scores the answers of facts under teacher forcing; `metrics` defines the ids.

  edit prompt, rephrase probes   answers: new object, old object if it is known
  locality probes                answers: their own right one, new object
  other probes                   answer: their own

Locality probes, those of other attributes and distracting neighbours are judged
by what the unedited model preferred as well; the last two by that alone.

A request without `target_true` has no probability metrics at its edit prompt
and rephrase probes, as these compare two objects; its accuracies stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxedit import io
from jaxedit.edited import scoring
from jaxedit.eval import metrics
from jaxedit.eval.scorers.base import Judged, Questions, Replies, Scorer
from jaxedit.text.chat import Chat
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import (
    ATTRIBUTE,
    DISTRACT,
    LOCALITY,
    REPHRASE,
    EditRequest,
    InputError,
)

_EDIT = 'edit'
# Group -> ids of its success, magnitude, all-correct and token metrics.
_GROUPS = {
    _EDIT: ('es', 'em', 'es_acc', 'reliability'),
    REPHRASE: ('ps', 'pm', 'ps_acc', 'generalization'),
    LOCALITY: ('ns', 'nm', 'ns_acc', 'locality_correct'),
}
# Group -> metric id of its agreement with the unedited model.
_AGREEMENT = {
    LOCALITY: 'locality_agreement',
    ATTRIBUTE: 'attribute_agreement',
    DISTRACT: 'distract_agreement',
}


@dataclasses.dataclass(frozen=True)
class TeacherForced(Scorer):
  """The scorer; see the module head.

  Attributes:
    tokens: of the model's tokenizer.
    chat: words around every prompt.
  """

  tokens: TokenCache
  chat: Chat = Chat()

  def prepare(self, requests: Sequence[EditRequest]) -> list[Questions]:
    asked = [_asked(request) for request in requests]
    items = [
        (self.chat.wrap(prompt), *rest)
        for some in asked
        for _, prompt, *rest in some
    ]
    queries = iter(scoring.encode_queries(self.tokens, items))
    return [
        Questions(queries=[(prompt, next(queries)) for _, prompt, *_ in some])
        for some in asked
    ]

  def judge(
      self,
      requests: Sequence[EditRequest],
      replies: Sequence[Replies],
      before: Sequence[Sequence[Sequence[int]]] | None,
  ) -> list[Judged]:
    if before is not None and [len(old) for old in before] != [
        sum(len(request.probes_of(kind)) for kind in _AGREEMENT)
        for request in requests
    ]:
      raise InputError(
          'the unedited model was evaluated on other locality probes than those'
          ' given now; evaluate it on the same ones.'
      )
    olds = [None] * len(requests) if before is None else before
    return [_judge(*one) for one in zip(requests, replies, olds)]


def _judge(
    request: EditRequest, reply: Replies, before: Sequence[Sequence[int]] | None
) -> Judged:
  groups: dict[str, list[Sequence[scoring.Scored]]] = {}
  for (group, *_), scores in zip(_asked(request), reply.scores):
    groups.setdefault(group, []).append(scores)
  values = _metrics(groups)
  preferred: tuple[tuple[int, ...], ...] = ()
  for kind, metric in _AGREEMENT.items():
    own = tuple(scores[0].argmax for scores in groups.get(kind, ()))
    if before is not None and own:
      old = before[len(preferred) : len(preferred) + len(own)]
      values[metric] = metrics.agreement(own, old)
    preferred += own
  ((new, *true),) = groups[_EDIT]
  fields = {
      'nll_new': io.json_number(new.nll),
      'nll_true': io.json_number(true[0].nll) if true else None,
  }
  return Judged(values, fields, preferred)


def _asked(
    request: EditRequest,
) -> list[tuple[str, str, tuple[str, ...], bool | None]]:
  """Lists (group, prompt, answers, space), edit prompt and rephrases first."""
  objects = (request.target,)
  if request.target_true is not None:
    objects += (request.target_true,)
  asked = [(_EDIT, request.question, objects, request.space)]
  asked += [
      (REPHRASE, probe.prompt, objects, probe.space)
      for probe in request.probes_of(REPHRASE)
  ]
  asked += [
      (LOCALITY, one.prompt, (one.answers[0], request.target), one.space)
      for one in request.probes_of(LOCALITY)
  ]
  asked += [
      (probe.kind, probe.prompt, probe.answers[:1], probe.space)
      for probe in request.probes
      if probe.kind not in _GROUPS
  ]
  return asked


def _metrics(
    groups: Mapping[str, Sequence[Sequence[scoring.Scored]]],
) -> dict[str, float]:
  """Metrics of one request, of the scores of each group's prompts."""
  values = {}
  for group, prompts in groups.items():
    correct = [scores[0].correct for scores in prompts]
    if group in (ATTRIBUTE, DISTRACT):
      continue
    if group not in _GROUPS:
      name = metrics.PORTABILITY + group.removeprefix(metrics.PORTABILITY)
      values[name] = metrics.token_accuracy(correct)
      continue
    success, magnitude, every, token = _GROUPS[group]
    if len(prompts[0]) == 2:
      pairs = [(first.nll, second.nll) for first, second in prompts]
      values[success] = metrics.success(pairs)
      values[magnitude] = metrics.magnitude(pairs)
      if group == _EDIT:
        true = [scores[1].correct for scores in prompts]
        values['true_preferred'] = metrics.success([p[::-1] for p in pairs])
        values['true_acc'] = metrics.all_correct(true)
    values[every] = metrics.all_correct(correct)
    values[token] = metrics.token_accuracy(correct)
  return values
