"""What became of the edits of a run: those that were not learned, and facts that
a later batch of a sequence edited again.

An edit is learned where its optimisation ended with a probability of at least
`LEARNED` a target token (geometric mean; of several targets the worst). Of a fact
that is edited again the last edit is in force: earlier ones with another target
are superseded, and are left out of the metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxedit.eval import evaluation
from jaxedit.eval.datasets.earlier import edit_key
from jaxedit.eval.evaluation import Evaluation
from jaxedit.methods.base import Info
from jaxedit.types import EditRequest

if TYPE_CHECKING:
  from jaxedit.runs.inputs import Session

LEARNED = 0.5
_LISTED = 5  # edits that are printed; results.json has all
_SUCCESS = ('es_acc', 'question/exact_match', 'question/rouge_l_f1')


@dataclasses.dataclass(frozen=True)
class EditReports:
  """What became of every request.

  Attributes:
    requests: R of them.
    info: how the edits went.
    superseded_by: index of a request -> that of the last edit of the same fact,
      which wrote something else.
    preserved: whether the method preserves the keys of earlier batches, which
      works against editing a fact again.
    seed: of the intervals.
  """

  requests: Sequence[EditRequest]
  info: Info
  superseded_by: Mapping[int, int]
  preserved: bool
  seed: int

  def learned(self, i: int) -> bool | None:
    """Whether an edit was learned; None of a method that optimises nothing."""
    if 'probability' not in self.info.per_edit:
      return None
    probability = self.info.per_edit['probability'][i]
    return probability is not None and probability >= LEARNED

  @property
  def not_learned(self) -> list[int]:
    """Indices of the edits that were written and not learned."""
    return [
        i
        for i in range(len(self.requests))
        if self.info.written[i] and self.learned(i) is False
    ]

  def marked(self, found: Evaluation, *, after: bool = False) -> Evaluation:
    """Sums an evaluation up over the edits that are in force.

    Args:
      found: of all requests.
      after: whether it is of the edited model, so that 'learned' is a metric.
    """
    entries = [dict(entry) for entry in found.per_record]
    for i, entry in enumerate(entries):
      if after and (learned := self.learned(i)) is not None:
        entry['metrics'] = {**entry['metrics'], 'learned': float(learned)}
      if i in self.superseded_by:
        entry['superseded'] = True
    marked = dataclasses.replace(found, per_record=entries)
    return evaluation.join([marked], seed=self.seed)

  def record(self, i: int) -> dict[str, Any]:
    """Entries of a request for records.jsonl."""
    found = {}
    if (learned := self.learned(i)) is not None:
      found['learned'] = learned
    if i in self.superseded_by:
      found['superseded_by'] = self.requests[self.superseded_by[i]].number
    if self._again(i):
      found['edited_again'] = True
      if self.preserved:
        found['against_preserved_keys'] = True
    return found

  def _again(self, i: int) -> bool:
    """Whether a request edits what an earlier one has written otherwise."""
    return i in self.superseded_by.values()

  def results(self, after: Evaluation) -> dict[str, Any]:
    """Entries of results.json.

    Args:
      after: the edited model's evaluation, `marked`.
    """
    found: dict[str, Any] = {}
    if 'probability' in self.info.per_edit:
      values = self.info.per_edit
      found['not_learned'] = {
          'count': len(self.not_learned),
          'probability_below': LEARNED,
          'records': [
              {
                  'number': self.requests[i].number,
                  'id': self.requests[i].id,
                  'loss': values['loss'][i],
                  'probability': values['probability'][i],
              }
              for i in self.not_learned
          ],
      }
    if self.superseded_by:
      last = sorted(set(self.superseded_by.values()))
      own = evaluation.join(
          [evaluation.select(after, last)], seed=self.seed
      ).summary
      found['edited_again'] = {
          'records': [self.requests[i].number for i in last],
          'superseded': [self.requests[i].number for i in self.superseded_by],
          'against_preserved_keys': self.preserved,
          'metrics': {name: one['mean'] for name, one in own.items()},
      }
    return found

  def lines(self, results: Mapping[str, Any]) -> list[str]:
    """What is printed above the table.

    Args:
      results: of `results`.
    """
    found, bad = [], self.not_learned
    if bad:
      found.append(
          f'{len(bad)} of {len(self.requests)} edits were not learned (under'
          f' {LEARNED:.0%} a target token after the optimisation):'
      )
      for one in results['not_learned']['records'][:_LISTED]:
        loss, p = (one[k] or 0.0 for k in ('loss', 'probability'))
        found.append(
            f'  record {one["number"]} (id {one["id"]}): loss {loss:.2f},'
            f' probability {p:.1%}'
        )
      if len(bad) > _LISTED:
        found.append(f'  and {len(bad) - _LISTED} more, see results.json')
    if again := results.get('edited_again'):
      name = next((n for n in _SUCCESS if n in again['metrics']), None)
      success = f': {name} {again["metrics"][name]:.3f}' if name else ''
      found.append(
          f'{len(again["records"])} facts were edited again in a later batch;'
          f' the metrics are of the last edit{success}'
      )
      if self.preserved:
        found.append(
            '  the method preserves the keys of earlier batches, which works'
            ' against it'
        )
    return found


def edit_reports(session: Session, info: Info) -> EditReports:
  """Says what became of the requests of a session.

  Args:
    session: what was worked on.
    info: how the edits went.
  """
  return EditReports(
      session.loaded.requests,
      info,
      superseded(session.loaded.requests),
      session.chosen.config.preserves_edits,
      session.config.seed,
  )


def superseded(requests: Sequence[EditRequest]) -> dict[int, int]:
  """Finds edits of which a later one, of the same fact, wrote something else.

  Returns:
    Index of a request -> that of the last one.
  """
  last = {edit_key(request): i for i, request in enumerate(requests)}
  found = {}
  for i, request in enumerate(requests):
    j = last[edit_key(request)]
    if request.target.split() != requests[j].target.split():
      found[i] = j
  return found
